"""The command line's part for states: `rwkvflow state average`, `interpolate`, `from-text`, `leaderboard`, `check`."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows import options
from rwkv_core.errors import InputError

if TYPE_CHECKING:
    from rwkv_core.state_lab import Tuned
    from rwkv_core.state_lab.compare import Standing

_OUT = typer.Argument(help="The .pth to write, for clients.")
_STATE = typer.Argument(help="A tuned state: .pth, .state, or an adapter that is nothing else.")

app = typer.Typer(no_args_is_help=True)


@app.callback()
def state() -> None:
    """Work with tuned states: mix them, make one of a text, compare them, see which clients can mount a file."""


@app.command()
def average(
    paths: Annotated[
        list[Path], typer.Argument(metavar="STATE... OUT", help="States of one model, then the new .pth.")
    ],
    weights: Annotated[
        str | None, typer.Option(help="How much of each, as in '3 1'; their sum counts as 1. Equal ones, if none.")
    ] = None,
) -> None:
    """Write the mean of states. Of one it is that one, as a .pth that clients mount."""
    from rwkv_core import state_lab

    *given, out = paths
    if not given:
        raise InputError(str(out), "what is to be averaged comes before the file to write", "name states, then OUT.pth")
    states = [state_lab.read(path) for path in given]
    shares = _shares(weights, len(states))
    _tell(_mixed(states, shares, out), f"mean of {len(states)}")


@app.command()
def interpolate(
    first: Annotated[Path, _STATE],
    second: Annotated[Path, _STATE],
    out: Annotated[Path, _OUT],
    at: Annotated[float | None, typer.Option(min=0, max=1, help="Where between: 0 is the first, 1 the second.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=2, help="Write so many, evenly from the first to the second: OUT-0.25.pth ...")
    ] = None,
) -> None:
    """Write what lies between two states: (1 - at) times the first and at times the second."""
    from rwkv_core import state_lab

    if (at is None) == (steps is None):
        raise InputError("--at and --steps", "one of them says where", "give --at 0.5, or --steps 5")
    states = [state_lab.read(first), state_lab.read(second)]
    places = [at] if at is not None else [i / ((steps or 2) - 1) for i in range(steps or 2)]
    for place in places:
        file = out if steps is None else out.with_name(f"{out.stem}-{place:.3g}{out.suffix}")
        _tell(_mixed(states, [1 - place, place], file), f"at {place:.3g}")


@app.command(name="from-text")
def from_text(
    model: options.Model,
    out: Annotated[Path, _OUT],
    text: Annotated[str | None, typer.Option(help="What the model reads.")] = None,
    file: Annotated[Path | None, typer.Option(help="A file of it, in UTF-8.")] = None,
    begin: Annotated[Path | None, typer.Option(help="A state that it is read after, as more of the same.")] = None,
    tokenizer: options.Tokenizer = None,
    special: options.Special = None,
    dtype: options.Dtype = "fp32",
    head_size_divisor: options.Divisor = None,
    device: options.Device = None,
) -> None:
    """Read a text once, and write the state that it leaves: who begins from it goes on as if he had read the text.

    A conversation (User: ..., System: ...) is read up to the blank line after its last turn, where the next one begins.
    """
    from rwkv_core import state_lab
    from rwkv_core.files import sha256
    from rwkv_core.generation.opened import open_model
    from rwkv_core.models.state import unmount
    from rwkv_core.state_lab import text as texts

    given = texts.as_read(_text(text, file))
    before = None if begin is None else state_lab.read(begin)
    digest = sha256(model)
    if before is not None:
        state_lab.fits(before, digest, model)
    opened = open_model(
        model,
        state=begin,
        tokenizer=tokenizer,
        special=options.special_tokens(special),
        dtype=dtype,
        device=device,
        head_size_divisor=head_size_divisor,
    )
    known = texts.from_text(opened.model, opened.tokenizer, given, opened.begin)
    made_of = [*([] if before is None else [state_lab.ingredient(before, 1.0)]), texts.of_text(given)]
    tensors = {name: x.float().cpu() for name, x in unmount(known.state).items()}
    _tell(state_lab.write(out, tensors, digest, opened.tokenizer.digest, made_of), f"after {known.tokens} tokens")
    loss = texts.without_shift(opened.model, known)
    typer.echo(
        f"Clients mount it without its token shift. Of what comes next that changes the first token by {loss.first:.2g} nats, "
        f"and the next {loss.tokens} by {loss.mean:.2g} each; the likeliest is the same for {loss.same:.0%}."
    )


@app.command()
def leaderboard(
    model: options.Model,
    data: Annotated[
        Path,
        typer.Argument(help="What no state was trained on: outputs/data/valid, or any text that can be trained on."),
    ],
    states: Annotated[list[Path], _STATE],
    out: Annotated[Path | None, typer.Option(help="Write the table too: a .md or a .csv.")] = None,
    ctx_len: Annotated[int, typer.Option(min=1, help="Tokens of a document that are read at once.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Documents side by side.")] = 8,
    resamples: Annotated[int, typer.Option(min=100, help="Draws of the bootstrap.")] = 2000,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.999, help="Of the intervals.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    tokenizer: options.Tokenizer = None,
    special: options.Special = None,
    quantize: options.Quantize = "none",
    dtype: options.Dtype = "fp32",
    head_size_divisor: options.Divisor = None,
    device: options.Device = None,
) -> None:
    """Score held-out documents after each state and without one: the best first, with intervals of the differences."""
    import tempfile

    from rwkv_core import state_lab
    from rwkv_core.data.binidx import Documents
    from rwkv_core.data.whole import whole
    from rwkv_core.files import sha256
    from rwkv_core.generation.opened import open_model
    from rwkv_core.state_lab import compare

    if out is not None and out.suffix not in (".md", ".csv"):
        raise InputError(f"--out {out}", "must end in .md or .csv", "name it so")
    read, digest = [state_lab.read(path) for path in states], sha256(model)
    for one in read:
        state_lab.fits(one, digest, model)
    opened = open_model(
        model,
        tokenizer=tokenizer,
        special=options.special_tokens(special),
        quantize=quantize,
        dtype=dtype,
        device=device,
        head_size_divisor=head_size_divisor,
    )
    with tempfile.TemporaryDirectory() as folder:
        prefix = data.with_suffix("") if data.suffix in (".bin", ".idx") else data
        is_binidx = prefix.with_name(f"{prefix.name}.idx").is_file()
        documents = Documents(prefix) if is_binidx else whole(data, opened.tokenizer, Path(folder) / "data")[0]
        standings = compare.leaderboard(
            opened.model,
            documents,
            opened.tokenizer,
            dict(zip(_names(states), (one.tensors for one in read), strict=True)),
            ctx_len=ctx_len,
            batch=batch,
            resamples=resamples,
            confidence=confidence,
            seed=seed,
        )
    typer.echo(_markdown(standings, confidence), nl=False)
    typer.echo(_verdict(standings))
    if out is not None:
        from rwkv_core.files import whole_file

        with whole_file(out) as temporary:
            table = _markdown(standings, confidence) if out.suffix == ".md" else _csv(standings)
            temporary.write_text(table, encoding="utf-8")


@app.command()
def check(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A state's file, of any program.")],
    model: Annotated[Path | None, typer.Option(help="What it is to be mounted on.")] = None,
) -> None:
    """Say which clients can mount a file, how, and what to do about those that can't. Fails if none can."""
    from rwkv_core import checkpoint, models
    from rwkv_core.adapters.file import read_record
    from rwkv_core.files import sha256
    from rwkv_core.state_lab.clients import check as verdicts

    shape = None
    if model is not None:
        tensors = checkpoint.read(model)
        shape = models.version_of(tensors, model).shape_of(tensors, models.divisor(model))
        record = read_record(path) if path.is_file() else None
        if record is not None and record.base_sha256 not in (sha256(model), None):
            raise InputError(
                f"{path} belongs to the base {(record.base_sha256 or '')[:12]}...",
                f"{model} is another",
                "give the model that it was made with",
            )
    found = verdicts(path, shape)
    width = max(len(verdict.client) for verdict in found)
    for verdict in found:
        typer.echo(f"{verdict.client:{width}}  {'mounts it' if verdict.mounts else 'does not '}  {verdict.says}")
    if not any(verdict.mounts for verdict in found):
        raise typer.Exit(1)


def _shares(weights: str | None, count: int) -> list[float]:
    """What is taken of each; 1 in all."""
    try:
        given = [1.0] * count if weights is None else [float(x) for x in weights.replace(",", " ").split()]
    except ValueError:
        raise InputError(f"--weights '{weights}'", "must be numbers", "write --weights '3 1'") from None
    if len(given) != count:
        raise InputError(f"--weights '{weights}'", f"there are {count} states", "give a number for each")
    if not all(math.isfinite(x) and x >= 0 for x in given) or sum(given) <= 0:
        raise InputError(f"--weights '{weights}'", "must be 0 or more, and one above 0", "correct them")
    return [x / sum(given) for x in given]


def _mixed(states: "list[Tuned]", shares: list[float], out: Path) -> list[Path]:
    """Write what is mixed; the files."""
    from rwkv_core import state_lab

    tensors = state_lab.mix(states, shares)
    base = next((one.base for one in states if one.base), None)  # those that know theirs agree
    vocabulary = next((one.vocabulary for one in states if one.vocabulary), None)
    made_of = [state_lab.ingredient(one, share) for one, share in zip(states, shares, strict=True)]
    return state_lab.write(out, tensors, base, vocabulary, made_of)


def _tell(files: list[Path], what: str) -> None:
    typer.echo(f"{files[0]}: {what}, for clients to mount")
    for file in files[1:]:
        typer.echo(f"{file}: the same with its token shift, which RWKV-Flow alone mounts")


def _text(text: str | None, file: Path | None) -> str:
    if (text is None) == (file is None):
        raise InputError("--text and --file", "one of them has the text", "give one")
    if file is None:
        return text or ""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} ({error})", "must be a text in UTF-8", "give another file") from None


def _names(paths: list[Path]) -> list[str]:
    """Short names that tell the files apart."""
    short = [path.name for path in paths]
    return [name if short.count(name) == 1 else str(path) for name, path in zip(short, paths, strict=True)]


def _markdown(standings: "list[Standing]", confidence: float) -> str:
    """A table for people."""
    lines = [
        f"| state | loss | perplexity | bits a byte | against none, {confidence:.0%} | against the best |",
        "| --- | ---: | ---: | ---: | --- | --- |",
    ]
    for one in standings:
        changes = [
            "" if change["value"] == change["low"] == change["high"] == 0
            else f"{change['value']:+.4f} ({change['low']:+.4f} to {change['high']:+.4f})"
            for change in (one.from_none, one.from_best)
        ]  # fmt: skip
        lines.append(
            f"| {one.name} | {one.loss:.4f} | {one.perplexity:.2f} | {one.bits_per_byte:.4f} | {changes[0]} | {changes[1]} |"
        )
    return "\n".join(lines) + "\n"


def _csv(standings: "list[Standing]") -> str:
    """A table for programs."""
    import csv
    import io

    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    names = [f"{which}_{end}" for which in ("from_none", "from_best") for end in ("value", "low", "high")]
    table.writerow(["state", "loss", "perplexity", "bits_per_byte", *names, "better_than_none"])
    for one in standings:
        numbers = [change[end] for change in (one.from_none, one.from_best) for end in ("value", "low", "high")]
        numbers = [one.loss, one.perplexity, one.bits_per_byte, *numbers]
        table.writerow([one.name, *(format(x, ".9g") for x in numbers), one.better])
    return out.getvalue()


def _verdict(standings: "list[Standing]") -> str:
    """In words."""
    best, *others = standings
    near = [one.name for one in others if not one.behind]
    if near:
        return f"{best.name} is first, but no better, as far as these documents tell, than {', '.join(near)}."
    return f"{best.name} is better than all others."
