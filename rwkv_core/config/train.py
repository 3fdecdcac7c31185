"""How long to train, on how much at a time, and how fast."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rwkv_core.config.section import Config
from rwkv_core.errors import InputError


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


class ContextConfig(Config):
    """Contexts longer than memory, and how they grow."""


class ParallelConfig(Config):
    """Which processes share a run, on one machine or several."""


class SavesConfig(Config):
    """What is kept of a run beside its last checkpoint."""


class GuardsConfig(Config):
    """What is watched while training, and what is done about it."""


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

    memory: Literal["refuse", "warn"]
    """What to do about a run that the plan says can't fit: refuse it before anything is loaded, or say so and go on."""

    optimizer: OptimizerConfig

    context: ContextConfig

    parallel: ParallelConfig

    saves: SavesConfig

    guards: GuardsConfig

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
