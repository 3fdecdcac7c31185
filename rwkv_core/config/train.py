"""How long to train, on how much at a time, and how fast."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rwkv_core.config.section import Config
from rwkv_core.errors import InputError


class OptimizerConfig(Config):
    """How fast to learn: the optimizer, and the course of its learning rate. Formulas: docs/training.md."""

    kind: Literal["adamw", "adamw_8bit", "adamw_8bit_paged", "fused_adam", "cpu_adam", "muon"]
    """adamw: torch's. 8bit: bitsandbytes', a quarter of its memory; paged: moved out where a GPU is full. fused_adam, cpu_adam:
    DeepSpeed's, of GPUs and of offloading. muon: for the blocks' matrices, with adamw for all else."""

    lr: float = Field(gt=0, le=1)
    """Peak learning rate, reached after warmup_steps."""

    lr_final: float = Field(ge=0, le=1)
    """Learning rate at the last step."""

    schedule: Literal["constant", "linear", "cosine", "exponential", "wsd"]
    """Course from lr to lr_final after the warm-up. constant stays at lr, and lr_final must equal it. exponential: RWKV-LM's,
    by equal factors. wsd: warm-up, stable at lr, and a decay at the end."""

    decay: Annotated[str, Field(pattern=r"^\d+(\.\d+)?%$")] | Annotated[int, Field(ge=1)] | None
    """Of wsd: how many of the last steps it decays in, or which share of the run: 10%. Else null."""

    decay_form: Literal["linear", "cosine", "exponential", "sqrt"] | None
    """Of wsd: how it decays. sqrt: by one minus the root of the way done. Else null."""

    warmup_steps: int = Field(ge=0)
    """Optimizer steps over which the learning rate rises linearly."""

    warmup_from: Annotated[float, Field(ge=0, lt=1)] | None
    """Share of lr that the first of them has: 0.01 in RWKV-PEFT, 0.2 in RWKV-LM. null: 1 / warmup_steps, a rise from 0."""

    layerwise_lr: bool
    """RWKV's own multiples of lr: time_decay twice, time_first three times (RWKV-4 and 5), w0 twice (RWKV-7)."""

    rates: dict[Annotated[str, Field(min_length=1)], Annotated[float, Field(gt=0)]]
    """Multiples of lr instead, by names inside a block or outside of any; the first pattern counts: {'*.lora_B': 16, emb.*: 2}.
    Usually {}."""

    weight_decay: float = Field(ge=0, lt=1)
    """AdamW's decoupled decay, on matrices only."""

    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]
    """AdamW's averaging of gradients and of their squares, each in [0, 1)."""

    eps: float = Field(gt=0, lt=1)
    """AdamW's term against division by zero. RWKV is pretrained with 1e-18."""

    momentum: Annotated[float, Field(ge=0, lt=1)] | None
    """Of muon: its averaging of the matrices' gradients, usually 0.95. Else null."""

    grad_clip: float = Field(ge=0)
    """Largest norm of the whole gradient; longer ones are scaled down to it. 0: never."""

    @model_validator(mode="after")
    def _course_makes_sense(self) -> Self:
        if self.schedule == "constant" and self.lr_final != self.lr:
            raise ValueError(f"a constant schedule stays at lr = {self.lr:g}, but lr_final is {self.lr_final:g}")
        if self.lr_final > self.lr:
            raise ValueError(f"lr_final = {self.lr_final:g} is above lr = {self.lr:g}")
        if "exponential" in (self.schedule, self.decay_form) and self.lr_final == 0:
            raise ValueError(
                "exponential never gets to lr_final = 0; give it a small one, or take linear as RWKV-LM does"
            )
        return self

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> Self:
        for name, owner, is_its in (
            ("decay", "schedule = wsd", self.schedule == "wsd"),
            ("decay_form", "schedule = wsd", self.schedule == "wsd"),
            ("momentum", "kind = muon", self.kind == "muon"),
        ):
            value = getattr(self, name)
            if is_its and value is None:
                raise ValueError(f"{owner} needs {name}, which is null")
            if not is_its and value is not None:
                raise ValueError(f"{name} = {value} is of {owner} alone, and null with any other")
        if self.warmup_from is not None and not self.warmup_steps:
            raise ValueError(
                f"warmup_from = {self.warmup_from:g} is of a warm-up, and warmup_steps is 0; then it is null"
            )
        if isinstance(self.decay, str) and not 0 < float(self.decay[:-1]) <= 100:
            raise ValueError(f"decay = {self.decay} must be above 0 % and at most 100 %")
        return self


class ContextConfig(Config):
    """Contexts longer than memory, and how they grow; see docs/long-context.md."""

    segment: Annotated[int, Field(ge=1)] | None
    """Tokens of a row that are in memory at once: longer rows are read segment by segment, backwards in a second pass. The
    gradient is that of the whole row. null: rows are read whole."""

    bptt: Literal["exact"] | Annotated[int, Field(ge=1)]
    """How far gradients go back. exact: through the whole row. A number k: they are cut at every k-th border of segments,
    counted from the row's beginning; 1 is RWKV-PEFT's infctx."""

    parts: int = Field(ge=1)
    """Slices of time in which a layer's recurrence runs, each from the state of the one before: less memory for a moment, the
    same gradient. TrainChatGal's ctx_parts."""

    grad_cp: bool
    """Whether the blocks' activations are made again in the backward pass, not kept."""

    initial_ctx_len: Annotated[int, Field(ge=1)] | None
    """Context that training begins with: rows are read in windows of so many tokens, each from nothing, which grow to ctx_len.
    null: rows are whole from the first step on."""

    ctx_warmup_steps: int = Field(ge=0)
    """Optimizer steps over which the windows grow linearly to ctx_len; 0 without initial_ctx_len."""

    @model_validator(mode="after")
    def _all_have_an_effect(self) -> Self:
        if self.segment is None and self.bptt != "exact":
            raise ValueError(f"bptt = {self.bptt} counts segments, and without segment there are none; say exact")
        if (self.initial_ctx_len is None) != (self.ctx_warmup_steps == 0):
            raise ValueError(
                f"initial_ctx_len = {self.initial_ctx_len} and ctx_warmup_steps = {self.ctx_warmup_steps}: a warm-up of the "
                "context has both; null and 0 are none"
            )
        return self


class ParallelConfig(Config):
    """Which processes share a run, on one machine or several. docs/several-devices.md says what each strategy is for."""

    strategy: Literal[
        "one_device",
        "ddp",
        "fsdp",
        "deepspeed_stage_1",
        "deepspeed_stage_2",
        "deepspeed_stage_2_offload",
        "deepspeed_stage_3",
        "deepspeed_stage_3_offload",
    ]
    """What each process holds. one_device: there is one, with all. ddp: each has all. deepspeed_stage_1 has a share of the
    optimizer's state, _2 of the gradients too, _3 and fsdp of the parameters too. offload: the optimizer, and in stage 3 the
    parameters, in the machine's memory."""

    devices: Annotated[int, Field(ge=1)] | None
    """Processes on each machine, one a card. null: as many as torchrun or Slurm has started, else all cards, or 1 on CPU."""

    nodes: int = Field(ge=1)
    """Machines. Where there are several, torchrun or Slurm starts the processes."""

    bucket_mb: int = Field(ge=1)
    """Gradients are sent in pieces of this size. Larger ones are fewer, and need the memory."""

    @property
    def stage(self) -> int:
        """DeepSpeed's; 0 where it has no part in it."""
        return int(self.strategy.split("_")[2]) if self.strategy.startswith("deepspeed") else 0

    @property
    def offloads(self) -> bool:
        """Whether the machine's memory has what else is on the card."""
        return self.strategy.endswith("offload")

    @property
    def shares(self) -> bool:
        """Whether a process has a part alone of anything that is trained: parameters, gradients, or the optimizer's state."""
        return self.stage > 0 or self.strategy == "fsdp"

    @property
    def shares_parameters(self) -> bool:
        """Whether a process has a part of the parameters alone."""
        return self.stage == 3 or self.strategy == "fsdp"

    @model_validator(mode="after")
    def _one_is_one(self) -> Self:
        for name, value in (("devices", self.devices), ("nodes", self.nodes)):
            if self.strategy == "one_device" and value not in (None, 1):
                raise ValueError(f"strategy = one_device is one process, but {name} is {value}; ddp shares a run out")
        return self


class SavesConfig(Config):
    """What is kept of a run beside its checkpoints: adapters, in outputs/train/saves, see docs/runs.md."""

    every: Annotated[int, Field(ge=1)] | None
    """Keep the adapter after each so many optimizer steps, and after the last. null: not by steps."""

    every_epochs: Annotated[float, Field(gt=0)] | None
    """The same after each so many epochs: 1, 0.5, ... Both may be set."""

    keep_last: Annotated[int, Field(ge=1)] | None
    """Of these only the last so many. null: all."""

    keep_best: int = Field(ge=0)
    """Beside these, the so many of lowest held-out loss, of all steps after which it was measured."""

    result: Literal["last", "best"]
    """The adapter that is merged and exported: that after the last step, or that of lowest held-out loss."""

    @property
    def asks(self) -> bool:
        """Whether any adapter is kept on the way."""
        return bool(self.every or self.every_epochs or self.keep_best or self.result == "best")

    @model_validator(mode="after")
    def _something_to_keep(self) -> Self:
        if self.keep_last is not None and self.every is None and self.every_epochs is None:
            raise ValueError("keep_last is of the adapters kept by every and every_epochs, and both are null")
        return self


Answer = Literal["ignore", "warn", "stop", "quarantine"]


class GuardsConfig(Config):
    """What is watched while training, and what is done about it; see docs/guards.md.

    ignore: it is not looked at. warn: it is said and noted. stop: noted, and the run ends with an error. quarantine: the run
    goes back to its last checkpoint, the micro-batch that did it is kept with what reproduces it, and is left out.
    """

    not_finite: Answer
    """A step's loss or gradient norm is NaN or infinite."""

    spike: Answer
    """A step's loss is more than spike_z robust deviations above the median of the last `window` steps."""

    spike_z: float = Field(gt=0)
    """A robust deviation is 1.4826 median absolute deviations: of normal noise it is the standard deviation."""

    blow_up: Answer
    """A step's gradient norm is more than blow_up_times the median of the last `window` steps."""

    blow_up_times: float = Field(gt=1)
    """The norm is that before clipping."""

    window: int = Field(ge=8)
    """Steps that spikes and blow-ups are judged by. None of a run's first `window` steps is judged."""

    dead_adapter: Literal["ignore", "warn", "stop"]
    """An adapted matrix gets no gradient, or has one and does not move."""

    dead_every: int = Field(ge=2)
    """Optimizer steps between two looks for dead adapters; the last step is looked at too."""

    out_of_memory: Literal["stop", "replan"]
    """replan: go back to the last checkpoint, and on with smaller micro-batches, more of them to a step: the same rows."""

    attempts: int = Field(ge=1)
    """How often a run may go back to a checkpoint, all its continuations together. Then it stops."""


class StopEarlyConfig(Config):
    """When a run ends before its time."""

    patience: int = Field(ge=1)
    """It ends when so many measurements of the held-out loss in a row were no gain."""

    min_gain: float = Field(ge=0)
    """Nats a token that a measurement must be below the best one before it, to be a gain."""


class TrainSamplesConfig(Config):
    """Texts that the model continues while it is trained, for a person to read."""

    every: int = Field(ge=1)
    """Optimizer steps between two times. It is done before the first step and after the last also."""

    prompts: tuple[Annotated[str, Field(min_length=1)], ...] = Field(min_length=1)
    """Beginnings to continue."""

    max_tokens: int = Field(ge=1)
    """Longest continuation, in tokens."""

    temperature: float = Field(ge=0)
    """0: always the likeliest token."""

    top_p: float = Field(gt=0, le=1)
    """Draw only from the likeliest tokens that together have this probability."""


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

    precision: Literal["fp32", "tf32", "bf16", "fp16"]
    """Precision of the matrix products; the WKV state and the loss are float32 under all. tf32: float32 with products that a
    GPU rounds. fp16 scales the loss, and skips steps whose gradient overflows."""

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

    halt: Annotated[int, Field(ge=1)] | None
    """Optimizer steps after which to end for now, at a measurement: a multiple of validate_every. All else is as in
    the whole run, and with a later one, or null, it goes on from there. null: never."""

    stop_early: StopEarlyConfig | None
    """End the run when the held-out loss falls no more; null: never."""

    samples: TrainSamplesConfig | None
    """Texts to generate on the way; null: none."""

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
    def _halt_measures_nothing_more(self) -> Self:
        if self.halt is not None and self.halt % self.validate_every:
            raise ValueError(
                f"halt = {self.halt} is no multiple of validate_every = {self.validate_every}: a run that goes on has the "
                "measurements of one that never halted"
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
    def _context_makes_sense(self) -> Self:
        c = self.context
        if c.segment is not None and c.segment >= self.ctx_len:
            raise ValueError(
                f"context.segment = {c.segment} has no effect on rows of ctx_len = {self.ctx_len}; say null"
            )
        if c.segment is not None and c.bptt != "exact" and c.bptt * c.segment >= self.ctx_len:
            raise ValueError(
                f"context.bptt = {c.bptt} segments of {c.segment} are all of a row of {self.ctx_len}; say exact"
            )
        if c.parts > (c.segment or self.ctx_len):
            raise ValueError(
                f"context.parts = {c.parts} are more than the {c.segment or self.ctx_len} tokens in a graph"
            )
        if c.initial_ctx_len is not None and c.initial_ctx_len >= self.ctx_len:
            raise ValueError(f"context.initial_ctx_len = {c.initial_ctx_len} must be below ctx_len = {self.ctx_len}")
        if c.initial_ctx_len is not None and self.carry_state:
            raise ValueError(
                "context.initial_ctx_len cuts rows into windows read from nothing, and carry_state reads on"
            )
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

    @property
    def goes_back(self) -> bool:
        """Whether anything can make the run go back to a checkpoint."""
        g = self.guards
        return g.out_of_memory == "replan" or "quarantine" in (g.not_finite, g.spike, g.blow_up)

    def check_rows(self, after_state: bool) -> None:
        """Refuse rows that no tuned state could stand before.

        Raises:
            InputError: they are those, and a state is trained.
        """
        if not after_state:
            return
        rule = "adapter.state stands at a document's beginning"
        if self.context.initial_ctx_len is not None:
            raise InputError(
                f"train.context.initial_ctx_len = {self.context.initial_ctx_len}",
                f"{rule}, and the windows of a growing context begin anywhere",
                "set null, and ctx_warmup_steps: 0",
            )
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
