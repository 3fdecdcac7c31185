"""What `rwkv_core.models` computes of a model, once its tensors are rounded as a file has them: the measure of all readers."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rwkv_core import checkpoint, models
from rwkv_core.conformance import layout
from rwkv_core.conformance.contents import ROUNDED, Array, Contents, Stored
from rwkv_core.errors import InputError
from rwkv_core.models.skeleton import RWKV
from rwkv_core.models.state import mount

_KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_EXACT = {("F16", "F16"), ("F16", "F32"), ("BF16", "BF16"), ("BF16", "F32"), ("F32", "F32")}
"""What is stored, and what in: nothing is lost."""


def stored(x: Tensor) -> Stored:
    """One of our tensors as the readers have theirs.

    Raises:
        InputError: it is of another dtype than models have.
    """
    if x.dtype not in _KINDS:
        raise InputError(f"a tensor of {x.dtype}", "models are in bfloat16, float16 or float32", "convert it")
    x = x.detach().contiguous()
    raw = x.view(torch.int16).numpy().view(np.uint16) if x.dtype == torch.bfloat16 else x.numpy()
    return Stored(raw, _KINDS[x.dtype])


def rounded(tensors: Mapping[str, Tensor], holder: Contents | None) -> dict[str, Tensor]:
    """Tensors in float32, each as what is left of it in the storage that a file has for it.

    Args:
        tensors: the model's.
        holder: the file's; None: they stay. Of Q8_0, whose writers may round half a step either way, its values are taken.
    """
    made = {}
    for name, x in checkpoint.one_by_one(dict(tensors)):
        kept, values = None if holder is None else holder.tensors.get(name), stored(x).values()
        if holder is not None and kept is not None and name not in layout.UNUSED:
            scale = np.float32(holder.divisor(name))
            if kept.kind == "Q8_0" and kept.shape == tuple(x.shape):
                values = kept.values() * scale
            elif kept.kind in ROUNDED:
                values = ROUNDED[kept.kind](values / scale) * scale
        made[name] = torch.from_numpy(np.array(values, np.float32)).view(x.shape)
    return made


class Core:
    """Runs the models; one that was made for a file serves the next, if that has rounded it alike."""

    def __init__(self, head_size_divisor: float) -> None:
        self._divisor = head_size_divisor
        self._made: tuple[object, Mapping[str, Tensor], RWKV] | None = None

    @torch.no_grad()
    def logits(
        self,
        tensors: Mapping[str, Tensor],
        holder: Contents | None,
        prompts: Sequence[Sequence[int]],
        state: Mapping[str, Tensor] | None = None,
    ) -> list[Array]:
        """(T, V) for each prompt.

        Args:
            tensors: the model's.
            holder: the file that has them: it says how they are rounded; None: not at all.
            prompts: token ids.
            state: what the model begins from.
        """
        model, found = self._model(tensors, holder), []
        for prompt in prompts:
            begin = model.initial_state(1)
            logits, _ = model(torch.tensor([list(prompt)]), begin if state is None else mount(begin, state))
            found.append(logits[0].numpy())
        return found

    def _model(self, tensors: Mapping[str, Tensor], holder: Contents | None) -> RWKV:
        files = {} if holder is None else holder.kinds
        kinds = {name: (_KINDS[x.dtype], files.get(name, "F32")) for name, x in tensors.items()}
        lossy = {name: kind for name, kind in kinds.items() if kind not in _EXACT}
        divided = (holder.rescale, dict(holder.smaller)) if holder is not None and lossy else ()
        packed = id(holder) if any(kind == "Q8_0" for _, kind in lossy.values()) else 0
        which = ({name: x.data_ptr() for name, x in tensors.items()}, lossy, divided, packed)
        if self._made is None or self._made[0] != which:
            self._made = None  # one model in memory
            values = rounded(tensors, holder)
            version = models.version_of(values, Path("the model"))
            with torch.device("meta"):
                model = version(version.shape_of(values, self._divisor))
            # the tensors are kept, so that no others come to lie where they do
            self._made = which, tensors, model.adopt(values).eval()
        return self._made[2]
