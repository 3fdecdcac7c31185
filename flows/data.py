"""The command line's part for data: `rwkvflow data make`, `json2binidx`, `preview`, `fetch`."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

_ROWS = typer.Argument(metavar="FILE", help='A .jsonl file: {"text": ...} a line.')
_TOKENIZER = typer.Option(help="world, bytes, or the path of 20B_tokenizer.json.")


class _OrMake(TyperGroup):
    """`data FILE N CTX` is `data make FILE N CTX`: the words that make_data.py is given."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        return super().resolve_command(ctx, args if args[0] in self.commands else ["make", *args])


app = typer.Typer(cls=_OrMake, no_args_is_help=True)


@app.callback()
def data() -> None:
    """Make token files, and look at them. `rwkvflow data FILE N CTX` makes them as RWKV-LM's make_data.py does."""


@app.command()
def make(
    source: Annotated[Path, _ROWS],
    copies: Annotated[int, typer.Argument(metavar="N", min=1, help="How many, each in an order of its own.")],
    ctx_len: Annotated[int, typer.Argument(metavar="CTX", min=1, help="The trainer's ctx_len, for the magic prime.")],
    out: Annotated[Path | None, typer.Option(help="Path without .bin and .idx; FILE's name here, if none.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the orders.")] = 0,
    tokenizer: Annotated[str, _TOKENIZER] = "world",
) -> None:
    """Write a binidx of uint16 for pretraining, and say the numbers that RWKV-LM's trainer is told."""
    from rwkv_core.data.magic_prime import magic_prime
    from rwkv_core.data.make_data import make_data
    from rwkv_core.tokenizer import named

    out = out or Path(source.stem)
    made = make_data(source, copies, out, named(tokenizer), seed)
    prime = magic_prime(made.tokens, ctx_len)
    typer.echo(f"{out}.bin, {out}.idx: {made.tokens} tokens, {made.documents} documents, uint16")
    if prime is None:
        typer.echo(
            f"no magic prime: there is one from {3 * ctx_len} tokens on; add text or copies, or shorten the context"
        )
    typer.echo(f"--my_exit_tokens {made.tokens} --magic_prime {prime} --ctx_len {ctx_len}")


@app.command()
def json2binidx(
    source: Annotated[Path, _ROWS],
    out: Annotated[
        Path | None, typer.Option(help="Path without _text_document.bin; FILE's name here, if none.")
    ] = None,
    tokenizer: Annotated[str, _TOKENIZER] = "world",
) -> None:
    """Write a binidx of int32 with the rows in order, byte for byte as json2binidx_tool does with --append-eod."""
    from rwkv_core.data import make_data
    from rwkv_core.tokenizer import named

    out = out or Path(source.stem)
    made = make_data.json2binidx(source, out, named(tokenizer))
    written = f"{out}_text_document"
    typer.echo(f"{written}.bin, {written}.idx: {made.tokens} tokens, {made.documents} documents, int32")


@app.command()
def preview(
    side: Annotated[Literal["train", "valid"], typer.Option(help="Which documents.")] = "train",
    count: Annotated[int, typer.Option(min=1, help="How many are shown, beside the longest.")] = 20,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("preview.html"),
) -> None:
    """Show what the prepare stage made of the source: which tokens are learned, which are not, and what is cut off."""
    from rich.console import Console

    from rwkv_core.data import preview as page
    from rwkv_core.data.binidx import Documents
    from tasks import preview as stage_preview
    from tasks import stage
    from tasks.params import load

    params = load()
    documents, train = Documents(stage.DATA / side), params.train
    stage_preview.write(out, params, side, count)
    lengths = page.histogram(documents.sizes)
    console = Console(highlight=False)
    widest, most = len(f"{lengths[-1].most}") if lengths else 0, max((bar.documents for bar in lengths), default=0)
    console.print(f"{side}: {len(documents)} documents of {documents.tokens} tokens; by length:")
    for bar in lengths:
        drawn = "█" * -(-40 * bar.documents // most) if bar.documents else ""
        mark = " longer than ctx_len" if bar.least > train.ctx_len else ""
        console.print(f"  up to {bar.most:>{widest}}  [cyan]{drawn}[/] {bar.documents}[yellow]{mark}[/]")
    console.print(f"{out}: open it in a browser")


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="A data set on the Hugging Face hub: owner/name.")],
    folder: Annotated[Path, typer.Argument(help="A new folder for its files, to be named in data.source.")],
    revision: Annotated[str | None, typer.Option(help="A branch, a tag or a commit; the newest, if none.")] = None,
) -> None:
    """Copy a data set from the Hugging Face hub to the disk: what a run reads must stay as it is."""
    from rwkv_core.data import hub

    typer.echo(f"{folder}: {name} as of commit {hub.fetch(name, folder, revision)}")
