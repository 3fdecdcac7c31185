"""What to learn from, and how it is read."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rwkv_core.config.section import Config


class HoldoutConfig(Config):
    """Which rows are kept from training, to judge the result by."""

    fraction: float = Field(gt=0, lt=1)
    """Share of the groups held out. A group's side depends on its name alone, so new rows never move old ones."""

    group: str | None
    """Field of a row whose value names its group: rows of one group are never on both sides. null: the text itself."""

    near_duplicates: Annotated[float, Field(gt=0, le=1)] | None
    """Similarity (Jaccard's, of runs of 5 tokens) from which a training document leaks a held-out one. null: not looked for."""

    leaks: Literal["keep", "drop"]
    """What becomes of training documents that do: they are counted, or left out too."""


Column = Literal[
    "text", "messages", "conversations", "system", "tools", "instruction", "input", "output", "prompt", "completion",
    "question", "answer", "weight",
]  # fmt: skip
"""The fields of a row that are known, see `rwkv_core.data.dialogue.read`."""


class PartConfig(Config):
    """Some files of the source, and how they are read: the first part whose pattern a file matches has it."""

    name: str = Field(pattern=r"^[a-z0-9_-]+$")
    """What the part is called in reports, and in train.mix."""

    files: str = Field(min_length=1)
    """Which files, by their path inside data.source: *, *.txt, and **/*.txt for those in folders inside too."""

    kind: Literal[
        "auto", "jsonl", "csv", "parquet", "arrow", "utf-8", "utf-16le", "binidx", "numpy", "uint16", "dummy", "wds_img"
    ]
    """What they are. auto: by name and content. utf-8, utf-16le, numpy, uint16: each file is one document."""

    columns: dict[Column, str]
    """What the file calls the fields that are known: {prompt: frage, completion: antwort}. Usually {}."""

    blank_lines: Literal["collapse", "keep"]
    """Blank lines inside a turn: one would end it, so they become single line ends; or are kept, as G1 models can bear."""

    think: Literal["as_given", "empty", "remove"]
    """Thoughts of G1 models before answers. empty: answers without any begin with <think></think>. remove: none has any."""

    mask: Literal["none", "pad", "qa", "se"]
    """What is learned. none, pad: all. qa: answers, and that they end. se: from the second of the marks to the first."""

    marks: tuple[Annotated[str, Field(min_length=1)], Annotated[str, Field(min_length=1)]] | None
    """For se: the text after which nothing is learned, and that after which all is. Else null."""

    weight: float = Field(gt=0)
    """What each token counts in the loss, times what the row's own "weight" says."""

    @model_validator(mode="after")
    def _marks_belong_to_se(self) -> Self:
        if (self.mask == "se") != (self.marks is not None):
            raise ValueError(f"marks are what mask = se goes by; mask is {self.mask} and marks {self.marks}")
        if self.marks is not None and self.marks[0] == self.marks[1]:
            raise ValueError(f"marks are two, but both are {self.marks[0]!r}")
        return self


class DataConfig(Config):
    """What to learn from."""

    source: Path
    """A file, or a folder of files: jsonl (also .gz, .zst), csv, parquet, a Hugging Face data set, text files, binidx."""

    tokenizer: str
    """world, bytes (a vocabulary of 256), or the path of the 20B_tokenizer.json of RWKV-4's Pile models."""

    special_tokens: dict[Annotated[str, Field(min_length=1)], Annotated[int, Field(ge=65530, le=65535)]]
    """Texts that become one token each, by World's free numbers: {<tool>: 65530}. Train their rows: adapter.also."""

    parts: tuple[PartConfig, ...] = Field(min_length=1)
    """Which files are read, and how: the first part whose pattern matches a file has it."""

    refused: float = Field(ge=0, lt=1)
    """Share of the rows that may be unusable. They are listed in refused.jsonl; if there are more, the stage fails."""

    holdout: HoldoutConfig

    processes: int | None = Field(ge=1)
    """Processes that prepare; null: one a core. The result does not depend on it."""

    cluster: str | None
    """Dask scheduler whose workers prepare instead, tcp://host:8786; they must see the same files. Needs the extra dask."""

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        for names, what in (
            ([part.name for part in self.parts], "name"),
            ([*self.special_tokens.values()], "special token"),
        ):
            if len(set(names)) < len(names):
                raise ValueError(
                    f"parts and special tokens differ from each other, but one {what} is there twice: {names}"
                )
        return self
