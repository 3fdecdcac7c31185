"""`rwkvflow lm-eval`: any task of lm-eval with any model."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from flows import options


def lm_eval(
    model: Annotated[Path, typer.Argument(help="Any RWKV-4 to 7: a file or a folder.")],
    tasks: Annotated[list[str], typer.Argument(help="Tasks or groups of lm-eval: lambada_openai arc_easy mmlu.")],
    include: Annotated[
        Path | None, typer.Option(help="A folder with task files of one's own; their data may be local.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many samples of each task.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question; as each task says, if none.")
    ] = None,
    adapter: options.Beside = None,
    state: options.State = None,
    quantize: options.Packed = None,
    tokenizer: options.Tokenizer = None,
    dtype: options.Precision = None,
    ctx_len: Annotated[int, typer.Option(min=1, help="Tokens of each text that go through the model at once.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Texts side by side.")] = 8,
    head_size_divisor: options.Divisor = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: lm-eval's own results.")] = False,
) -> None:
    """Ask a model what tasks of lm-eval ask. Their data comes from the network, but for tasks of one's own."""
    from rwkv_core import side_by_side
    from rwkv_core.config import LmEvalConfig
    from rwkv_core.evaluation.likelihood import Reader
    from rwkv_core.evaluation.lm_eval import run
    from rwkv_core.evaluation.subject import Subject
    from rwkv_core.tokenizer import for_vocabulary

    words = for_vocabulary(side_by_side.vocabulary(model), tokenizer)
    subject = Subject(
        model, words, adapter=adapter, state=state, quantize=quantize, dtype=dtype, head_size_divisor=head_size_divisor
    )
    reader = Reader(subject.model, words, ctx_len=ctx_len, batch=batch, begin=subject.start())
    asked = LmEvalConfig(tasks=tuple(tasks), include=include, limit=limit, num_fewshot=num_fewshot)
    found = run(reader, asked).table
    if as_json:
        typer.echo(json.dumps(found, indent=2, default=str))
        return
    for line in table(found):
        typer.echo(line)


def table(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """lm-eval's own numbers, a metric a line: "acc,none" is the metric acc, of answers that went through no filter."""
    rows = []
    for task, numbers in found.items():
        samples = numbers.get("sample_len", "")
        for key, value in numbers.items():
            metric, _, through = key.partition(",")
            if through and not metric.endswith("_stderr") and isinstance(value, int | float):
                rows.append(
                    (task, metric if through == "none" else f"{metric} ({through})", f"{value:.4f}", str(samples))
                )
    widths = [max(len(row[i]) for row in [("task", "metric", "", "samples"), *rows]) for i in range(4)]
    for task, metric, number, samples in [("task", "metric", "", "samples"), *rows]:
        yield f"{task:{widths[0]}}  {metric:{widths[1]}}  {number:>{widths[2]}}  {samples:>{widths[3]}}"
