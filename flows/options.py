"""Options that several commands have: what is mounted on a model, and how its answers are drawn."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from rwkv_core.errors import InputError

Model = Annotated[Path, typer.Argument(help="Any RWKV-4 to 7: outputs/merged/model.pth, .safetensors, .st, a folder.")]
State = Annotated[Path | None, typer.Option(help="A tuned state to begin from: state.pth.")]
Adapter = Annotated[Path | None, typer.Option(help="An adapter trained on the model, and its state.")]
Tokenizer = Annotated[Path | None, typer.Option(help="20B_tokenizer.json, for a Pile model.")]
Special = Annotated[
    list[str] | None, typer.Option(help="A special token of the training: '<tool>=65530'. May be repeated.")
]
Dtype = Annotated[Literal["bf16", "fp32", "fp16", "as_loaded"], typer.Option(help="What to compute in.")]
Beside = Annotated[
    Path | None,
    typer.Option(help="An adapter trained on the model, and its state. It is not merged, but stays beside."),
]
Precision = Annotated[
    Literal["bf16", "fp32", "as_loaded"] | None, typer.Option(help="What to compute in; bf16 on a GPU, else fp32.")
]
Packed = Annotated[
    Literal["none", "int8", "int8-double", "nf4", "nf4-double", "fp4", "fp4-double", "fp8"] | None,
    typer.Option(help="Pack the matrices of the blocks; as in the adapter's training, if none."),
]
Divisor = Annotated[float | None, typer.Option(help="What the model was made with; its config.json's, or 8, if none.")]
Device = Annotated[Literal["cpu", "cuda"] | None, typer.Option(help="Where; cuda, if there is one.")]
Quantize = Annotated[
    Literal["none", "int8", "int8-double", "nf4", "nf4-double", "fp4", "fp4-double", "fp8"],
    typer.Option(help="How the matrices are kept in memory."),
]

Temperature = Annotated[float, typer.Option(help="0: always the likeliest token.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens that have this probability.")]
TopK = Annotated[int, typer.Option(help="Draw from so many of the likeliest, also; 0: any.")]
PresencePenalty = Annotated[float, typer.Option(help="Against a token that was said before.")]
FrequencyPenalty = Annotated[float, typer.Option(help="Against it, for each time that it was.")]
PenaltyDecay = Annotated[float, typer.Option(help="What each token leaves of those times.")]
MaxTokens = Annotated[int, typer.Option(help="Longest answer.")]
Seed = Annotated[int | None, typer.Option(help="Equal seeds, equal answers; another each time, if none.")]


def special_tokens(options: list[str] | None) -> dict[str, int]:
    """What --special says.

    Raises:
        InputError: one is no text with its token.
    """
    found = {}
    for option in options or ():
        text, _, number = option.rpartition("=")
        if not text or not number.isdecimal():
            raise InputError(f"--special {option}", "must be a text and its token", "write --special '<tool>=65530'")
        found[text] = int(number)
    return found
