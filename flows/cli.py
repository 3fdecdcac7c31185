"""The command line; `rwkvflow --help` lists it.

Prefect, MLflow, DVC and torch are imported by the commands that use them: they take seconds, and `--help` should not.
"""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from flows import data, evaluate, lm_eval, options, serve, state
from flows.export import export
from rwkv_core.errors import InputError, Problem

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")
app.add_typer(data.app, name="data")
app.add_typer(state.app, name="state")
app.command()(evaluate.evaluate)
app.command(name="lm-eval")(lm_eval.lm_eval)
app.command()(serve.serve)


@app.callback()
def rwkvflow() -> None:
    """Fine-tune RWKV models reproducibly: DVC stages, Prefect runs, MLflow records."""


@app.command()
def up(
    prefect_port: Annotated[int, typer.Option(min=1, max=65535, help="Where Prefect listens.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(min=1, max=65535, help="Where MLflow listens.")] = 5000,
    retrain_cron: Annotated[
        str | None,
        typer.Option(help="When to retrain on new data: '0 3 * * *'. If none: as the schedule is in the UI."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="The address to listen at. Beyond this machine the servers ask for a password.")
    ] = "127.0.0.1",
) -> None:
    """Start Prefect, MLflow and the deployments on this machine; Ctrl+C stops them."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table

    from flows import access
    from flows import up as servers
    from flows.environment import LOGS
    from tasks.record import main_root

    console = Console(highlight=False)
    root = Path.cwd()

    def announce(prefect: str, mlflow: str) -> None:
        lines = Table.grid(padding=(0, 2))
        lines.add_row("Prefect", prefect, "start runs, watch them, cancel them")
        lines.add_row("MLflow", mlflow, "compare what they measured")
        lines.add_row("logs", str(main_root(root) / LOGS), "")
        if not access.is_loopback(host):
            lines.add_row("user", access.USER, f"the password is in {access.VARIABLE}, or else in {access.FILE}")
        console.print(Panel(lines, title="rwkvflow", subtitle="Ctrl+C stops everything", expand=False))

    console.print("Starting Prefect and MLflow; the first time takes up to a minute …")
    servers.up(root, prefect_port, mlflow_port, announce, console.print, host, retrain_cron)
    console.print("Stopped.")


@app.command()
def run(
    targets: Annotated[list[str] | None, typer.Argument(help="Stages to bring up to date; all, if none.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Run them even if nothing has changed.")] = False,
) -> None:
    """Bring the pipeline up to date: shown in Prefect where `rwkvflow up` runs, else by `dvc repro` alone."""
    from flows import run as runs

    raise typer.Exit(runs.run(Path.cwd(), targets or [], force=force, say=typer.echo))


@app.command()
def deploy(
    pool: Annotated[str, typer.Option(help="The work pool; deploy/ has templates to make one.")],
    folder: Annotated[
        Path | None, typer.Option(help="Where its workers have a checkout. If none: where this one is.")
    ] = None,
    retrain_cron: Annotated[
        str | None,
        typer.Option(help="When to retrain on new data: '0 3 * * *'. If none: as the schedule is in the UI."),
    ] = None,
) -> None:
    """Offer the deployments on any Prefect server, PREFECT_API_URL's, through a work pool, for workers to run."""
    import asyncio

    from flows.environment import set_defaults

    root = Path.cwd()
    set_defaults(root)
    from flows import deployments  # imports Prefect, which reads the environment set above

    for name in asyncio.run(deployments.register(root, pool, str(folder or root), retrain_cron)):
        typer.echo(f"{name} is offered through {pool}")


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="What to try: a YAML file, see docs/experiments.md.")],
    slots: Annotated[int | None, typer.Option(min=1, help="Arms at a time, instead of the file's.")] = None,
) -> None:
    """Try many values, each as a DVC experiment. The same sweep again does what is missing."""
    from flows import run as runs

    raise typer.Exit(runs.sweep(Path.cwd(), file, slots, typer.echo))


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(help="Experiments, revisions, MLflow's run ids, or workspace; the first is the measure."),
    ],
) -> None:
    """Print in what runs differ: params, data, code, metrics."""
    from flows.compare import compare as differences

    typer.echo(differences(Path.cwd(), runs), nl=False)


@app.command()
def promote(
    version: Annotated[
        str, typer.Argument(help="Number, alias or beginning of the sha256 of a registered model; the newest, if none.")
    ] = "candidate",
) -> None:
    """Judge a model against its base and the champion, by promote in params.yaml; if all holds, it is the champion."""
    from flows import registry

    raise typer.Exit(registry.promote(Path.cwd(), version, typer.echo))


@app.command()
def rollback() -> None:
    """Let the champion be the model that it was before the last promotion. Twice goes back two."""
    from flows import registry

    registry.rollback(Path.cwd(), typer.echo)


@app.command()
def card(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Number, alias or beginning of the sha256 of a registered model; if none, this checkout's outputs."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A file to write it to, instead of printing it.")] = None,
) -> None:
    """Write a model's card for Hugging Face: what it is, how to load it, how it was trained and judged."""
    from flows import registry

    registry.card(Path.cwd(), model, out, lambda text: typer.echo(text, nl=False))


@app.command()
def lineage(
    model: Annotated[
        str, typer.Argument(help="A file; or number, alias or beginning of the sha256 of a registered model.")
    ],
    rows: Annotated[bool, typer.Option("--rows", help="Print the documents it was trained and judged on.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs, with all settings.")] = False,
) -> None:
    """Walk a model back: merge, adapter, base, data and its rows, code, settings, and who ran it."""
    from flows import registry

    registry.lineage(Path.cwd(), model, typer.echo, rows=rows, as_json=as_json)


@app.command()
def plan(
    gpu_memory: Annotated[
        str | None, typer.Option(help="A card's memory, as 24GB. If none: this machine's card, or else its memory.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Of a model that is not here yet, version:layers x width: 7:32x2560.")
    ] = None,
    solve: Annotated[
        bool, typer.Option("--solve", help="Find the nearest settings that fit; fail if none do.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: bytes, seconds, settings.")] = False,
    speed: Annotated[bool, typer.Option(help="Time a few layers.")] = True,
) -> None:
    """Say what training will take by params.yaml: memory, time, disk; and what would fit."""
    from flows.plan import show

    show(gpu_memory, shape, as_json=as_json, solve=solve, speed=speed)


@app.command()
def sync() -> None:
    """Put into MLflow what DVC's outputs say and MLflow does not know yet."""
    from flows.environment import set_defaults
    from tasks import params, tracking

    root = Path.cwd()
    set_defaults(root)
    tracking.publish(root, params.load().tracking)


@app.command()
def merge(
    base: Annotated[Path, typer.Argument(help="The model that the adapters were trained on: a file or a folder.")],
    adapters: Annotated[
        list[str], typer.Argument(help="Adapter files; 0.5*file.pth takes half of what that one changes.")
    ],
    out: Annotated[Path, typer.Argument(help="The .pth to write; its receipt is written beside it.")],
    layers: Annotated[
        str, typer.Option(help="Which blocks take part, and how much: 0.2*25-31 31. Others stay the base's.")
    ] = "all",
    alpha: Annotated[
        float | None, typer.Option(help="Of LoRAs that another program has trained: their files don't have it.")
    ] = None,
    pissa_init: Annotated[
        Path | None, typer.Option(help="RWKV-PEFT's init_pissa.pth, for a PiSSA that it has trained.")
    ] = None,
    quantize: Annotated[
        Literal["none", "int8", "int8-double", "nf4", "nf4-double", "fp4", "fp4-double", "fp8"] | None,
        typer.Option(help="Round the base first, as it was in training. Our files say how; none: take it exactly."),
    ] = None,
) -> None:
    """Put adapters into their base: one ordinary checkpoint, for every client. How each is merged, its file says.

    A tuned state is not merged: it is written beside, as OUT.state.pth without OUT's own ending, for clients to mount.
    """
    from rwkv_core.formats import tuned_state
    from rwkv_core.merge import Part
    from rwkv_core.merge import merge as merge_files

    state = out.with_suffix(".state.pth")
    for file in (out, state, tuned_state.whole(state)):
        _refuse_what_is_there(file)
    parts = []
    for given in adapters:
        weight, star, path = given.partition("*")
        try:
            parts.append(
                Part(Path(path if star else given), float(weight) if star else 1.0, alpha, pissa_init, quantize)
            )
        except ValueError:
            raise InputError(given, "what stands before * must be a number", "write 0.5*file.pth") from None
    receipt = merge_files(base, parts, out, layers=layers, state=state)
    written = _write_receipt(out, receipt)
    changed = receipt["merged"]
    unknown = [entry["path"] for entry in receipt["adapters"] if not entry["base_checked"]]
    if unknown:
        typer.echo(
            f"{', '.join(unknown)}: another program's, which doesn't say what it was trained on; check the result",
            err=True,
        )
    typer.echo(
        f"{out}: {changed['matrices_changed']} matrices changed, {changed['tensors_replaced']} tensors replaced; "
        f"sha256 {changed['sha256'][:16]}, receipt {written}"
    )
    if receipt["states"]:
        typer.echo(f"{state}: the tuned state, for a client to mount beside the model; it is not in it")
    if len(receipt["states"]) > 1:
        typer.echo(
            f"{tuned_state.whole(state)}: the same with its token shift, which only `rwkvflow chat --state` mounts"
        )


@app.command()
def unmerge(
    base: Annotated[Path, typer.Argument(help="The model as it was: a file or a folder.")],
    tuned: Annotated[Path, typer.Argument(help="The same model, tuned or merged.")],
    out: Annotated[Path, typer.Argument(help="The adapter to write; its receipt is written beside it.")],
    rank: Annotated[int, typer.Option(min=1, help="Of the LoRA: what it can't hold of a matrix's change is left out.")],
) -> None:
    """Find the LoRA that leads from one checkpoint to another; other tensors that differ are kept whole."""
    from rwkv_core.unmerge import unmerge as unmerge_files

    _refuse_what_is_there(out)
    receipt = unmerge_files(base, tuned, out, rank=rank)
    written = _write_receipt(out, receipt)
    left_out, settings = receipt["left_out_of"], receipt["adapter"]["settings"]
    for name in sorted(left_out, key=left_out.__getitem__, reverse=True)[:3]:
        typer.echo(f"{name}: rank {rank} leaves out {left_out[name]:.2%} of its change")
    typer.echo(
        f"{out}: {settings['kind']} of {len(left_out)} matrices, which leaves out {receipt['left_out']:.2%} of their change; "
        f"{receipt['tensors_kept_whole']} tensors kept whole; sha256 {receipt['adapter']['sha256'][:16]}, receipt {written}"
    )


def _refuse_what_is_there(out: Path) -> None:
    if out.exists():
        raise InputError(str(out), "something is there already", "name another file, or remove it")


def _write_receipt(out: Path, receipt: dict[str, Any]) -> Path:
    """Beside `out`; its path."""
    from rwkv_core.files import whole_file, write_json

    written = out.with_name(f"{out.name}.receipt.json")
    with whole_file(written) as temporary:
        write_json(temporary, receipt)
    return written


app.command()(export)


@app.command(name="import")
def import_(
    script: Annotated[
        Path, typer.Argument(help="The .sh that started trainings: RWKV-PEFT's, TrainChatGal's, RWKV-LM's.")
    ],
    tool: Annotated[
        Literal["rwkv-peft-2025", "rwkv-peft-2026", "trainchatgal", "rwkv-lm"] | None,
        typer.Option(help="Whose script it is; its flags tell, if none."),
    ] = None,
) -> None:
    """Print another trainer's script as params.yaml, and on stderr what is different: rwkvflow import OLD.sh > params.yaml"""
    from flows.flags import TOOLS
    from flows.import_script import import_script

    letters = {name.lower().replace(" ", "-"): letter for letter, name in TOOLS.items()}
    imported = import_script(script, Path.cwd(), letters[tool] if tool else None)
    typer.echo(imported.yaml, nl=False)
    typer.echo(f"{script}: a script of {imported.tool}", err=True)
    for note in imported.notes:
        typer.echo(f"  {note}", err=True)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Any file or folder: a model, an adapter, a tuned state.")],
) -> None:
    """Say what a file is: of which version and sizes, by which method, from what."""
    from rwkv_core.describe import describe

    found = describe(path)
    width = max(map(len, found))
    for name, value in found.items():
        typer.echo(f"{name:{width}}  {', '.join(map(str, value)) or 'none' if isinstance(value, list) else value}")


@app.command()
def conform(
    file: Annotated[
        Path, typer.Argument(help="A model as its clients get it: .pth, .st, .gguf, a Hugging Face folder.")
    ],
    against: Annotated[
        Path | None,
        typer.Option(help="The model that it was made from. If none: what rwkvflow reads from the file itself."),
    ] = None,
    state: Annotated[Path | None, typer.Option(help="A tuned state to mount on it: state.pth, model.state.")] = None,
    lora: Annotated[
        Path | None, typer.Option(help="A LoRA for Ai00, to blend into a .st; --against is then the merged model.")
    ] = None,
    alpha: Annotated[float, typer.Option(help="Of the LoRA, as Ai00's recipe says.")] = 1.0,
    structure: Annotated[
        bool, typer.Option("--structure", help="Run no model: tensors, values and tokens alone.")
    ] = False,
    head_size_divisor: options.Divisor = None,
    form: Annotated[Literal["text", "markdown", "json"], typer.Option("--format", help="How to say it.")] = "text",
) -> None:
    """Check a file with its clients: do they read it, and do they compute what it says? Fails if not."""
    from flows.conform import conform as conform_file

    right = conform_file(
        file, against=against, state=state, lora=(lora, alpha) if lora else None, head_size_divisor=head_size_divisor,
        mode="structure" if structure else "full", form=form, say=typer.echo,
    )  # fmt: skip
    raise typer.Exit(0 if right else 1)


@app.command()
def chat(
    model: options.Model,
    state: options.State = None,
    adapter: options.Adapter = None,
    system: Annotated[str, typer.Option(help="What the model is told before the first turn.")] = "",
    tokenizer: options.Tokenizer = None,
    special: options.Special = None,
    temperature: options.Temperature = 1.0,
    top_p: options.TopP = 0.3,
    top_k: options.TopK = 0,
    presence_penalty: options.PresencePenalty = 0.5,
    frequency_penalty: options.FrequencyPenalty = 0.5,
    penalty_decay: options.PenaltyDecay = 0.996,
    max_tokens: options.MaxTokens = 2000,
    seed: options.Seed = None,
    dtype: options.Dtype = "as_loaded",
    head_size_divisor: options.Divisor = None,
    device: options.Device = None,
) -> None:
    """Talk with a model in the terminal. The settings' defaults are those of ChatRWKV."""
    import secrets

    from flows.chat import converse
    from rwkv_core.generation.chat import open_chat
    from rwkv_core.generation.sampling import Sampling

    sampling = Sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=secrets.randbits(32) if seed is None else seed,
        top_k=top_k,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        penalty_decay=penalty_decay,
    )
    opened = open_chat(
        model,
        sampling,
        adapter=adapter,
        state=state,
        tokenizer=tokenizer,
        special=options.special_tokens(special),
        system=system,
        dtype=dtype,
        device=device,
        head_size_divisor=head_size_divisor,
    )
    converse(opened)


def main() -> None:
    """Run the command line; a problem that a person can put right is shown without a traceback."""
    try:
        app()
    except Problem as problem:
        typer.echo(f"rwkvflow: {problem}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
