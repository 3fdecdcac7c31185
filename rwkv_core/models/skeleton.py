"""What all versions share: embedding, blocks of time mixing and channel mixing on residual branches, head.

Module names are the checkpoint's names, so `state_dict()` is the official checkpoint.
Shapes: B batch, T time, C channels, H heads, N head size, V vocabulary.
Source: BlinkDL/RWKV-LM: RWKV-v4neo, RWKV-v5 and RWKV-v7/train_temp.
"""

import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.choice import Op
from kernels.linear import linear
from kernels.token_shift import Norm, mix
from rwkv_core.formats.tuned_state import is_part
from rwkv_core.models.remake import Remake
from rwkv_core.models.state import BlockState, State, mount


@dataclass(frozen=True)
class Shape:
    """Version and sizes of a model, all read from its tensors: nobody types these."""

    version: str
    """4, 5.0, 5.1, 5.2, 6 or 7."""
    n_layer: int
    n_embd: int
    """Channels, C."""
    dim_att: int
    """Channels inside time mixing, H * N: C in every published model."""
    dim_ffn: int
    """Hidden channels of channel mixing."""
    head_size: int
    """N; 1 in RWKV-4, where every channel is on its own."""
    vocab_size: int
    head_size_divisor: float
    """The output of a head is divided by it before the group norm; 8 in nearly all published models. The files do not say."""

    @property
    def group_norm_eps(self) -> float:
        """Dividing by d before a norm of epsilon 1e-5 is the same as an epsilon of 1e-5 d d."""
        return 1e-5 * self.head_size_divisor**2


class Linear(nn.Linear):
    """y = x W'. A few rows, as of one token, go through it at the speed of memory; see `kernels.linear`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return linear(x, self.weight)

    def now(self) -> Tensor:
        """The matrix as it is now, for who multiplies by it himself; of an adapted head, see `adapters.rows`."""
        return self.weight

    def trained_rows(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Where only some of its rows are trained: which, and what gets their gradient."""
        return None, None


def vector(channels: int) -> nn.Parameter:
    """A parameter per channel, as checkpoints store it: (1, 1, C)."""
    return nn.Parameter(torch.empty(1, 1, channels))


def mixed(x: Tensor, last: Tensor, mus: Sequence[Tensor], norm: Norm, op: Op) -> tuple[Tensor, ...]:
    """The mixes of `kernels.token_shift.mix`, and behind them the last token."""
    mixes, last = mix(x, last, mus, norm, op=op)
    return *mixes, last


class Block(nn.Module):
    """Time mixing, then channel mixing, each on a residual branch. Each does its layer norm itself, on the way to its mixes."""

    grad_cp = False
    """See `RWKV.spare`."""

    def __init__(self, shape: Shape, layer: int, att: nn.Module, ffn: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.ln1, self.ln2 = nn.LayerNorm(shape.n_embd), nn.LayerNorm(shape.n_embd)
        if layer == 0:
            self.ln0 = nn.LayerNorm(shape.n_embd)
        self.att, self.ffn = att, ffn

    def forward(self, x: Tensor, v_first: Tensor | None, state: BlockState) -> tuple[Tensor, Tensor | None, BlockState]:
        """(B, T, C) -> (B, T, C); also RWKV-7's value of layer 0, and the state after the last token."""
        if not self.grad_cp or not torch.is_grad_enabled():
            return self._run(x, v_first, state, Remake())
        # what is within a checkpoint is made again as a whole, and Remake would keep what it needs from the checkpoint's hooks
        made: tuple[Tensor, Tensor | None, BlockState] = checkpoint(
            self._run, x, v_first, state, Remake(active=False), use_reentrant=False
        )
        return made

    def _run(
        self, x: Tensor, v_first: Tensor | None, state: BlockState, remake: Remake
    ) -> tuple[Tensor, Tensor | None, BlockState]:
        if self.layer == 0:
            x = self.ln0(x)
        with remake:
            change, v_first, att_shift, wkv = self.att(x, _norm(self.ln1), v_first, state.att_shift, state.wkv, remake)
            x = x + change
            change, ffn_shift = self.ffn(x, _norm(self.ln2), state.ffn_shift, remake)
            return x + change, v_first, BlockState(att_shift, wkv, ffn_shift)


def _norm(ln: nn.LayerNorm) -> Norm:
    return Norm(ln.weight, ln.bias, ln.eps)


class RWKV(nn.Module, ABC):
    """The whole model. Each version is a subclass."""

    time_mix: ClassVar[Any]
    """Of a block: made from (shape, layer, op); (x, norm, v_first, shift, wkv, remake) -> (output, v_first, shift, wkv)."""
    channel_mix: ClassVar[Any]
    """Of a block: made from (shape, layer, op); (x, norm, shift, remake) -> (output, shift)."""
    rates: ClassVar[Mapping[str, float]]
    """Ends of parameter names, and how many times the learning rate of the others they learn with in full training."""

    shared = False
    """Whether processes have a share each of the parameters: one is whole while its module runs, on all of them at once."""

    def __init__(self, shape: Shape, op: Op = "auto") -> None:
        """Build the modules for `shape`; their values are not set: load a checkpoint, or call `initialize`."""
        super().__init__()
        self.config, self._op = shape, op
        self.emb = nn.Embedding(shape.vocab_size, shape.n_embd)
        self.blocks = nn.ModuleList(
            Block(shape, layer, self.time_mix(shape, layer, op), self.channel_mix(shape, layer, op))
            for layer in range(shape.n_layer)
        )
        self.ln_out = nn.LayerNorm(shape.n_embd)
        self.head = Linear(shape.n_embd, shape.vocab_size)
        self._order: Sequence[str] = ()
        self.register_state_dict_post_hook(_in_the_files_order)  # type: ignore[no-untyped-call]

    @classmethod
    @abstractmethod
    def shape_of(cls, tensors: Mapping[str, Tensor], head_size_divisor: float) -> Shape:
        """Sizes of the model in a checkpoint of this version.

        Raises:
            KeyError: a tensor that tells a size is missing.
            ValueError: such a tensor has another number of dimensions, or two disagree.
        """

    @classmethod
    @abstractmethod
    def new_shape(cls, n_layer: int, n_embd: int, head_size: int, vocab_size: int) -> Shape:
        """Sizes of a new model, by the official rules for training from scratch."""

    def initial_wkv(self, batch: int) -> Tensor:
        """The WKV state of a block before the first token."""
        s = self.config
        return self.ln_out.weight.new_zeros(
            batch, s.dim_att // s.head_size, s.head_size, s.head_size, dtype=torch.float32
        )

    @abstractmethod
    def initialize_block(self, block: Any, layer: int, generator: torch.Generator) -> None:
        """Set every value of a block but its layer norms."""

    def initial_state(self, batch: int) -> State:
        """The state before the first token: the tuned one, if the blocks have its parameters, else as if nothing was read."""
        none = self.ln_out.weight.new_zeros(batch, self.config.n_embd)
        state = [BlockState(none, self.initial_wkv(batch), none) for _ in range(self.config.n_layer)]
        tuned = {name: p for name, p in self.named_parameters() if is_part(name)}
        return mount(state, tuned) if tuned else state

    def spare(self, *, parts: int, grad_cp: bool) -> None:
        """Take less memory in training, for more time. The gradients stay.

        Args:
            parts: slices of time in which the recurrences run; 1 is all at once. See `kernels.recurrence.in_parts`.
            grad_cp: whether a block's backward makes all of its activations again, from its inputs.
        """
        blocks: Any = self.blocks
        for block in blocks:
            block.grad_cp = grad_cp
            block.att.parts = parts

    def features(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """What the head reads: tokens (B, T) int64 -> (B, T, C), and the state after the last token."""
        state = self.initial_state(len(tokens)) if state is None else state
        x, v_first, after = self.emb(tokens), None, []
        for block, before in zip(self.blocks, state, strict=True):
            x, v_first, last = block(x, v_first, before)
            after.append(last)
        return self.ln_out(x), after

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Tokens (B, T) int64 -> logits (B, T, V), and the state after the last token.

        A sequence run whole, in slices that pass the state on, or token by token has the same logits.
        """
        x, state = self.features(tokens, state)
        return self.head(x), state

    def adopt(self, tensors: Mapping[str, Tensor]) -> Self:
        """Take a checkpoint's tensors as the parameters, without a copy; `state_dict()` keeps their order."""
        self.load_state_dict(tensors, assign=True)
        self._order = list(tensors)
        return self

    def parameter_groups(
        self,
        lr: float,
        weight_decay: float,
        *,
        own_rates: bool = True,
        rates: Mapping[str, float] = MappingProxyType({}),
        muon: bool = False,
    ) -> list[dict[str, Any]]:
        """The optimizer groups of the official pretraining: decay on the large matrices, multiples of lr for some vectors.

        What an adapter trains beside a matrix is a large matrix too. But where something is frozen, rows of tokens do not
        decay: AdamW would move those of tokens that never occur.

        Args:
            lr: of those that have no multiple.
            weight_decay: of those that decay.
            own_rates: the version's own multiples count.
            rates: multiples instead of these, by the parameters' names.
            muon: groups of the blocks' large matrices are marked "muon", and are apart from the others.
        """
        tuned = not all(p.requires_grad for p in self.parameters())
        of_tokens = {"emb.weight", "emb.values", "head.values"} if tuned else set()
        own = self.rates if own_rates else {}
        groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {
            (1.0, weight_decay, False): [],
            (1.0, 0.0, False): [],
        }
        for name, p in self.named_parameters():
            rate = next((rate for end, rate in own.items() if name.endswith(end)), 1.0)
            owner = self.get_submodule(name.rpartition(".")[0])
            large = p.squeeze().ndim >= 2 and isinstance(owner, nn.Linear | nn.Embedding) and name not in of_tokens
            apart = muon and large and p.ndim == 2 and name.startswith("blocks.")
            if p.requires_grad:
                groups.setdefault((rates.get(name, rate), weight_decay if large else 0.0, apart), []).append(p)
        return [
            {"params": params, "lr": rate * lr, "weight_decay": wd} | ({"muon": apart} if muon else {})
            for (rate, wd, apart), params in groups.items()
            if params
        ]

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Set every value as the official pretraining does."""
        s = self.config
        self.emb.weight.uniform_(-1e-4, 1e-4, generator=generator)
        head_gain = 0.5 * math.sqrt(s.vocab_size / s.n_embd) if s.vocab_size > s.n_embd else 0.5
        nn.init.orthogonal_(self.head.weight, gain=head_gain, generator=generator)
        for norm in self.modules():
            if isinstance(norm, nn.LayerNorm):
                norm.weight.fill_(1)
                norm.bias.zero_()
        for layer, block in enumerate(self.blocks):
            self.initialize_block(block, layer, generator)
            ln_x: nn.GroupNorm | None = getattr(block.att, "ln_x", None)
            if ln_x is not None:
                ln_x.weight.fill_(((1 + layer) / s.n_layer) ** 0.7)
                ln_x.bias.zero_()


def _in_the_files_order(model: RWKV, tensors: OrderedDict[str, Any], prefix: str, _metadata: object) -> None:
    """Put a model's entries in the order of the file that it was loaded from."""
    for name in model._order:
        if prefix + name in tensors:
            tensors.move_to_end(prefix + name)


def layers_of(names: Mapping[str, Tensor]) -> int:
    """Number of blocks of a checkpoint.

    Raises:
        KeyError: it has none.
        ValueError: some are missing.
    """
    found = [name.split(".")[1] for name in names if name.startswith("blocks.")]
    layers = {int(layer) for layer in found if layer.isdecimal()}
    if not layers:
        raise KeyError("blocks.0.ln1.weight")
    if max(layers) >= len(layers):
        raise ValueError(f"blocks.{max(layers)} is there, and of the {max(layers)} before it {len(layers) - 1} are")
    return 1 + max(layers)


def width(tensors: Mapping[str, Tensor], name: str, dimension: int, dimensions: int = 2) -> int:
    """A size that a tensor tells.

    Raises:
        KeyError: it is missing.
        ValueError: it has another number of dimensions.
    """
    size = tensors[name].shape
    if len(size) != dimensions:
        raise ValueError(f"{name} is {tuple(size)}; it must have {dimensions} dimensions")
    return size[dimension]
