"""`rwkvflow export`: any model, tuned state or adapter, for any client."""

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from flows import options
from rwkv_core.errors import InputError

FORMATS = ("pth", "st", "gguf-f32", "gguf-f16", "gguf-bf16", "gguf-q8_0", "hf", "ai00-lora")


def export(
    model: Annotated[
        Path, typer.Argument(help="A model in any form, a tuned state, or, for ai00-lora, an adapter of RWKV-Flow.")
    ],
    out: Annotated[Path, typer.Argument(help="A new folder for the files and their report.")],
    formats: Annotated[list[str], typer.Option("--format", help=f"{', '.join(FORMATS)}. May be repeated.")],
    state: Annotated[Path | None, typer.Option(help="A tuned state to write beside the model.")] = None,
    dtype: Annotated[
        Literal["as_loaded", "bf16", "fp16", "fp32"], typer.Option(help="Precision of a .pth and of a folder.")
    ] = "as_loaded",
    part_gb: Annotated[float, typer.Option(help="Largest part of a folder's weights.")] = 5.0,
    base: Annotated[
        Path | None, typer.Option(help="The model that an adapter was trained on: what Ai00 makes of both is checked.")
    ] = None,
    tokenizer: Annotated[str, typer.Option(help="world, bytes, or 20B_tokenizer.json of a Pile model.")] = "world",
    special: options.Special = None,
    head_size_divisor: options.Divisor = None,
    conformance: Annotated[
        Literal["full", "structure"],
        typer.Option(help="Whether the clients compute with the files, or these are only read."),
    ] = "full",
) -> None:
    """Write a model for other clients, check every file with them, and say what rounding has changed.

    A .gguf, .st or folder goes in as well: with --format pth it becomes an ordinary checkpoint again.
    """
    from rwkv_core import ai00
    from rwkv_core import export as core
    from rwkv_core.config import FormatsConfig
    from rwkv_core.conformance import report as verdict
    from rwkv_core.conformance.check import Checked
    from rwkv_core.conformance.exports import exported
    from rwkv_core.files import whole_folder, write_json
    from rwkv_core.tokenizer import named

    if out.exists():
        raise InputError(str(out), "something is there already", "name another folder, or remove it")
    unknown = next((form for form in formats if form not in FORMATS), None)
    if unknown is not None:
        raise InputError(f"--format {unknown}", f"must be {', '.join(FORMATS)}", "write one of these")
    if "ai00-lora" in formats and len(formats) > 1:
        raise InputError("--format ai00-lora", "is of an adapter, all else of a model", "export each alone")
    checked = list[Checked]()
    with whole_folder(out) as folder:
        if formats == ["ai00-lora"]:
            report = ai00.export(model, folder, base)
            if base is not None:
                checked = ai00.conform(model, folder, report, base, conformance, head_size_divisor)
        elif core.is_state(model):
            report = core.export_state(model, folder, formats)
        else:
            kinds = [form.removeprefix("gguf-") for form in formats if form.startswith("gguf-")]
            chosen: dict[str, Any] = {
                "formats": list(dict.fromkeys(form.partition("-")[0] for form in formats)), "dtype": dtype,
                "gguf": kinds or ["f16"], "hf": {"dtype": dtype, "part_gb": part_gb},
            }  # fmt: skip
            report = core.export(
                model, folder, FormatsConfig.model_validate(chosen), state=state, tokenizer=tokenizer,
                special=options.special_tokens(special), head_size_divisor=head_size_divisor,
            )  # fmt: skip
            checked = exported(
                folder, report, model, conformance, state=state, head_size_divisor=head_size_divisor,
                tokenizer=named(tokenizer, report.get("special_tokens")),
            )  # fmt: skip
        if not all(one.passed for one in checked):
            refused = out.with_name(f"{out.name}.refused")
            refused.mkdir(exist_ok=True)
            verdict.write(refused, report, checked, conformance)
            verdict.refuse(checked, refused / "conformance.md")
        if checked:
            verdict.write(folder, report, checked, conformance)
        else:
            write_json(folder / "conformance.json", report)
    if checked:
        typer.echo(f"conforms: {verdict.conforms(checked)}; see {out}/conformance.md")
    elif formats == ["ai00-lora"]:
        typer.echo("What Ai00 makes of a base with it was not checked: give --base")
    for line in _told(report):
        typer.echo(f"{out}/{line}")


def _told(report: dict[str, Any]) -> list[str]:
    """A line for each file."""
    if "alpha" in report:
        return [f"{name}: {entry['bytes']} bytes" for name, entry in report["files"].items()] + [
            f"conformance.json: {report['matrices']} matrices of rank {report['rank']}, alpha = {report['alpha']:g}"
        ]
    lines = []
    for entry in report["formats"].values():
        for made in (entry, *([entry["state"]] if "state" in entry else [])):
            lines.append(
                f"{made['file']}: {made['bytes']} bytes, {made['tensors']} tensors; "
                f"rounding of at most {made['largest_rounding']:.3g}, {made['flushed_to_zero']} values became 0"
            )
    special = " ".join(
        f"--special {shlex.quote(f'{text}={i}')}" for text, i in report.get("special_tokens", {}).items()
    )
    return (
        [*lines, f"conformance.json: special tokens, which a .pth and a .st don't have: {special}"]
        if special
        else lines
    )
