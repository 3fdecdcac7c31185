"""What to start from, and the method."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from rwkv_core.config.section import Config


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
