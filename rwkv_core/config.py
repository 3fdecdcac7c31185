"""What a run can be told, as closed, immutable, typed sections of params.yaml.

Types, ranges and meanings live here; values live in params.yaml only, so no field has a default. Nothing in this file
imports torch: a mistake in params.yaml is reported before anything slow is loaded.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rwkv_core.errors import InputError


class Config(BaseModel):
    """Immutable and closed: an unknown key is an error. A field's docstring is its help text."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


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


class ModelConfig(Config):
    """What to start from."""

    base: Path
    """An RWKV-4, 5, 6 or 7 checkpoint: .pth, .safetensors, .st, or a folder. Version, sizes and ranks are read from it."""

    head_size_divisor: Annotated[float, Field(gt=0)] | None
    """What the model was pretrained with, which its tensors do not tell. null: what its config.json says, else 8."""

    op: Literal["auto", "cpu", "cuda", "triton", "fla", "torch", "reference"]
    """Implementation of the operators, see `kernels.choice`. auto: of each the fastest that works here."""

    quantize: Literal["none", "int8", "int8-double", "nf4", "nf4-double", "fp4", "fp4-double", "fp8"]
    """How the frozen matrices of the blocks are kept in training, to save memory. double: their scales in 8 bits too."""

    def how(self) -> dict[str, Any]:
        """What `models.load` is told beside the path and the precision, to train."""
        return self.model_dump(include={"head_size_divisor", "op", "quantize"})


Patterns = tuple[Annotated[str, Field(min_length=1)], ...]


class _Method(Config):
    """What every method is told."""

    layers: Annotated[str, Field(pattern=r"^(all|\d+(-\d+)?( \d+(-\d+)?)*)$")]
    """Blocks to work on, counted from 0: all, or numbers and ranges as in 0-3 25-31. A state is always of all blocks."""

    state: Literal["none", "wkv", "wkv and token shift"]
    """Initial state to train beside: none, that of the WKV recurrence, or the token shift's too, which clients can't mount."""

    load: Path | None
    """An adapter of this method to go on from, ours or another program's: what was trained in it are the first values."""


class _Matrices(_Method):
    """What a method is told that puts something beside frozen matrices."""

    targets: Patterns = Field(min_length=1)
    """Matrices to adapt, by their name inside a block; * matches anything: att.receptance, att.*, ffn.key."""

    also: Patterns
    """Parameters trained as they are, by their name inside a block or outside of any: ln*, att.x_*, ln_out.*, emb.weight;
    or some rows of emb.weight and head.weight, as for new tokens: emb.weight[65530-65535]."""


class _Beside(_Matrices):
    """What a method is told that has a rank."""

    rank: int = Field(ge=1)
    """Rank of what is trained beside a matrix."""


class LoraConfig(_Beside):
    """LoRA: a trainable low-rank update beside each frozen matrix, y = W x + scale B A dropout(x)."""

    kind: Literal["lora"]

    alpha: float = Field(gt=0)
    """The update is scaled by alpha / rank."""

    rank_stabilized: bool
    """Scale by alpha / sqrt(rank) instead (rsLoRA), so that a high rank learns as fast as a low one."""

    dropout: float = Field(ge=0, lt=1)
    """Probability of zeroing each input of the update during training."""

    dora: bool
    """Learn how long each row of the matrix is beside where it points (DoRA): dearer; at low ranks nearer to full training."""


class PissaConfig(_Beside):
    """PiSSA: LoRA that begins as the principal part of each matrix, which is taken out of it."""

    kind: Literal["pissa"]

    iterations: int = Field(ge=0, le=100)
    """Power iterations of the randomised decomposition: more are more exact. RWKV-PEFT uses 4."""

    load_init: Path | None
    """RWKV-PEFT's init_pissa.pth, where load is one of RWKV-PEFT's. Our files have in them what it tells."""


class BoneConfig(_Beside):
    """Bone, today's MiSS: one small matrix through which every stretch of rank inputs goes. Half of a LoRA of that rank."""

    kind: Literal["bone"]


class BatConfig(_Beside):
    """Bat: a small matrix for each stretch of rank inputs, which also turns the frozen matrix's own columns."""

    kind: Literal["bat"]


class PeftConfig(_Matrices):
    """A method of Hugging Face's peft, which is an extra: pip install 'rwkv-flow[peft]'."""

    kind: Literal["peft"]

    config: dict[str, Any]
    """Its settings, by that library's names: {peft_type: LOHA, r: 8, alpha: 16}. Where it works, targets and layers say."""


class FullConfig(_Method):
    """No adapter: parameters of the model itself are trained."""

    kind: Literal["full"]

    also: Patterns = Field(min_length=1)
    """Parameters to train, by their name inside a block or outside of any: * for all, att.*, ln*, emb.weight."""


class StateConfig(_Method):
    """State tuning: the state that a document begins from is trained, and no matrix."""

    kind: Literal["state"]

    state: Literal["wkv", "wkv and token shift"]
    """Initial state to train: that of the WKV recurrence, or the token shift's too, which clients can't mount."""

    layers: Literal["all"]
    """all: a state is of every block."""

    also: Patterns
    """Parameters trained as they are beside it, by their name inside a block or outside of any: ln*, ln_out.*. May be empty."""


AdapterConfig = Annotated[
    LoraConfig | PissaConfig | BoneConfig | BatConfig | PeftConfig | FullConfig | StateConfig,
    Field(discriminator="kind"),
]
"""A method and its settings."""


class OptimizerConfig(Config):
    """How fast to learn: AdamW and the course of its learning rate."""

    lr: float = Field(gt=0, lt=1)
    """Peak learning rate, reached after warmup_steps."""

    lr_final: float = Field(ge=0, lt=1)
    """Learning rate at the last step."""

    schedule: Literal["constant", "linear", "cosine"]
    """Course from lr to lr_final after the warm-up. constant stays at lr, and lr_final must equal it."""

    warmup_steps: int = Field(ge=0)
    """Optimizer steps over which the learning rate rises linearly from 0."""

    weight_decay: float = Field(ge=0, lt=1)
    """AdamW's decoupled decay, on matrices only."""

    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]
    """AdamW's averaging of gradients and of their squares, each in [0, 1)."""

    eps: float = Field(gt=0, lt=1)
    """AdamW's term against division by zero. RWKV is pretrained with 1e-18."""

    grad_clip: float = Field(ge=0)
    """Largest norm of the whole gradient; longer ones are scaled down to it. 0: never."""

    @model_validator(mode="after")
    def _course_makes_sense(self) -> Self:
        if self.schedule == "constant" and self.lr_final != self.lr:
            raise ValueError(f"a constant schedule stays at lr = {self.lr:g}, but lr_final is {self.lr_final:g}")
        if self.lr_final > self.lr:
            raise ValueError(f"lr_final = {self.lr_final:g} is above lr = {self.lr:g}")
        return self


class TrainConfig(Config):
    """How long to train, on how much at a time."""

    ctx_len: int = Field(ge=2, le=1_048_576)
    """Tokens per row; of rows that are documents, the most."""

    rows: Literal["stream", "pad", "pack", "chunk", "only", "magic_prime"]
    """How documents become rows, see docs/data.md. stream: end to end. pad: one a row, cut at ctx_len; only: so too, alone in
    its micro-batch. pack: several whole ones. chunk: windows of one. magic_prime: RWKV-LM's. A tuned state needs pad, only,
    pack or chunk."""

    order: Literal["shuffled", "similar_lengths", "short_first", "long_first", "as_given"]
    """Of the documents, anew each epoch. similar_lengths: those of a step are of like length. as_given: as they lie in the
    data."""

    carry_state: bool
    """The state goes on: from window to window in chunk, from document to document of a row in pack."""

    mix: dict[str, Annotated[str, Field(pattern=r"^(\d+(\.\d+)?|\.\d+)[x%]$")]]
    """How often an epoch goes through parts of data.parts: {replay: 10%, chat: 3x}; 10% of its tokens. Usually {}: all once."""

    micro_batch: int = Field(ge=1)
    """Rows per forward pass."""

    accumulate: int = Field(ge=1)
    """Micro-batches per optimizer step."""

    epochs: Annotated[float, Field(gt=0)] | None
    """Passes over the training rows. Fractions are allowed. One of epochs, steps and tokens is set, the others are null."""

    steps: Annotated[int, Field(ge=1)] | None
    """Optimizer steps."""

    tokens: Annotated[int, Field(ge=1)] | None
    """Tokens read, learned or not."""

    precision: Literal["fp32", "bf16"]
    """Precision of the matrix products. The WKV state and the loss are float32 under both."""

    l2_wrap: float = Field(ge=0)
    """Pull of each position's largest logit towards 0, against overconfidence. RWKV's pretraining uses 1e-4; 0: off."""

    validate_every: int = Field(ge=1)
    """Optimizer steps between two measurements of the held-out loss."""

    validate_rows: int = Field(ge=1)
    """Rows of held-out text measured each time, from the front; all are measured in the evaluate stage."""

    checkpoint_every: int = Field(ge=1)
    """Optimizer steps between two checkpoints. A killed run loses at most these."""

    optimizer: OptimizerConfig

    @model_validator(mode="after")
    def _one_end(self) -> Self:
        ends = {"epochs": self.epochs, "steps": self.steps, "tokens": self.tokens}
        if sum(end is not None for end in ends.values()) != 1:
            shown = ", ".join(f"{name} {'null' if end is None else end}" for name, end in ends.items())
            raise ValueError(
                f"one of epochs, steps and tokens says when to stop, and the others are null; here: {shown}"
            )
        return self

    @model_validator(mode="after")
    def _rows_make_sense(self) -> Self:
        if self.rows == "only" and self.micro_batch != 1:
            raise ValueError(
                f"rows = only has one row a micro-batch, but micro_batch is {self.micro_batch}; pad has more"
            )
        if self.carry_state and self.rows not in ("pack", "chunk"):
            raise ValueError(f"carry_state is of rows = pack and chunk; rows is {self.rows}, where nothing goes on")
        kind = f"{self.rows} with carry_state" if self.carry_state and self.rows == "chunk" else self.rows
        orders = _ORDERS.get(kind, ("shuffled", "similar_lengths", "short_first", "long_first", "as_given"))
        if self.order not in orders:
            raise ValueError(f"order = {self.order} has no effect on rows = {kind}, which can have {', '.join(orders)}")
        if self.order == "similar_lengths" and self.micro_batch * self.accumulate == 1:
            raise ValueError("order = similar_lengths is of rows that share a step; micro_batch * accumulate is 1")
        if self.mix and self.rows == "magic_prime":
            raise ValueError("rows = magic_prime goes once through all documents as they lie, and mix must be {}")
        return self

    @model_validator(mode="after")
    def _mix_makes_sense(self) -> Self:
        for name, given in self.mix.items():
            if float(given[:-1]) == 0:
                raise ValueError(f"mix.{name} = {given} is none of it; leave the part out of data.parts")
        if sum(float(given[:-1]) for given in self.mix.values() if given.endswith("%")) >= 100:
            raise ValueError(
                "the shares in mix are 100 % or more: they are of what an epoch reads, with the parts without one"
            )
        return self

    def check_rows(self, after_state: bool) -> None:
        """Refuse rows that no tuned state could stand before.

        Raises:
            InputError: they are those, and a state is trained.
        """
        if not after_state:
            return
        rule = "adapter.state stands at a document's beginning"
        if self.rows in ("stream", "magic_prime"):
            raise InputError(
                f"train.rows = {self.rows}", f"{rule}, and these rows begin anywhere", "set pad, pack or chunk"
            )
        if self.rows == "pack" and self.carry_state:
            raise InputError(
                "train.carry_state = true", f"{rule}, and in a row only the first would begin from it", "set false"
            )
        if self.rows == "chunk" and not self.carry_state:
            raise InputError(
                "train.carry_state = false",
                f"{rule}, and all but the first windows of one would begin from nothing",
                "set true",
            )


_ORDERS = {
    "stream": ("shuffled", "short_first", "long_first", "as_given"),
    "pack": ("shuffled", "as_given"),
    "chunk with carry_state": ("shuffled", "as_given"),
    "magic_prime": ("as_given",),
}
"""That have an effect, by the rows that not all have one on."""


class SampleConfig(Config):
    """Texts to generate for a person to read."""

    prompts: tuple[str, ...]
    """Beginnings to continue, beside those taken from held-out rows."""

    held_out: int = Field(ge=0)
    """How many held-out rows to take a prompt from: their text up to the first answer."""

    max_tokens: int = Field(ge=1)
    """Longest continuation, in tokens."""

    temperature: float = Field(ge=0)
    """0: always the likeliest token."""

    top_p: float = Field(gt=0, le=1)
    """Draw only from the likeliest tokens that together have this probability."""


class EvaluateConfig(Config):
    """How to judge the tuned model against its base."""

    ctx_len: int = Field(ge=1)
    """Tokens per slice. The state is carried from slice to slice, so every document is scored whole."""

    batch: int = Field(ge=1)
    """Documents scored together."""

    resamples: int = Field(ge=100)
    """Bootstrap draws over documents."""

    confidence: float = Field(gt=0.5, lt=1)
    """Coverage of the interval, e.g. 0.95."""

    samples: SampleConfig


class ExportConfig(Config):
    """Which files to make for which clients."""

    formats: tuple[Literal["pth", "st"], ...] = Field(min_length=1)
    """pth: the rwkv package and RWKV Runner. st: web-rwkv and Ai00, fp16."""

    dtype: Literal["as_loaded", "bf16", "fp16", "fp32"]
    """Precision of the .pth file."""

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len(set(self.formats)) < len(self.formats):
            raise ValueError(f"formats names one twice: {', '.join(self.formats)}")
        return self


class TrackingConfig(Config):
    """Names in MLflow. No stage depends on them."""

    experiment: str = Field(min_length=1)
    """Experiment that the runs belong to."""

    registered_model: str = Field(min_length=1)
    """Model under which each merged checkpoint becomes a new version."""
