"""Models by version. `load` reads a checkpoint and finds out what it is."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from kernels.choice import Op
from rwkv_core import checkpoint
from rwkv_core.errors import InputError
from rwkv_core.formats import huggingface
from rwkv_core.models.rwkv4 import RWKV4
from rwkv_core.models.rwkv5 import RWKV5
from rwkv_core.models.rwkv6 import RWKV6
from rwkv_core.models.rwkv7 import RWKV7
from rwkv_core.models.skeleton import RWKV, Linear
from rwkv_core.quantize import Form, Packed, QuantizedLinear

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""What a model can compute in."""

# Parts of names that none of our models has, and what has them. The first that fits counts.
_REFUSED = (
    ("rosa", "RWKV-8 with ROSA", "its suffix automaton has no published, settled form"),
    (".ffn.enn.", "a preview of RWKV-8 (DeepEmbed)", "its channel mixing multiplies by an embedding of the token"),
    (
        ".qkv.",
        "RWKV-7b (DeepEmbed attention)",
        "it has attention over all tokens before, which no recurrent state holds",
    ),
    (".ffn.s_emb", "RWKV-7a (DeepEmbed)", "its channel mixing multiplies by an embedding of the token"),
    (".att.gate_w1", "RWKV-6a (x060a)", "its gate is of low rank: a research variant"),
    (".att.time_maa_rkvw_w1", "RWKV-6b or 6c (x060b, x060c)", "it has no gate and another norm: a research variant"),
    (".ffnPre.", "RWKV-4 with pre_ffn", "its first layer has no attention: no published model has this"),
    ("head_q.", "RWKV-4 with head_qk", "its head attends to all tokens before: no published model has this"),
    (".tiny_", "RWKV-4 with tiny attention", "it has attention over all tokens before, which no recurrent state holds"),
    (".att.qq.", "RWKV-4a", "it has attention over all tokens before, which no recurrent state holds"),
    ("pos_emb_", "RWKV-4 with a position embedding", "it is for pictures: no published language model has this"),
    (".att.A_log", "a Mamba", "its layers are no RWKV layers"),
)


def version_of(tensors: Mapping[str, Tensor], path: Path) -> type[RWKV]:
    """The model that a checkpoint's names are of.

    Raises:
        InputError: none, or one of the variants that are not supported.
    """
    for part, what, why in _REFUSED:
        name = next((name for name in tensors if part in name), None)
        if name is not None:
            raise InputError(f"{path} has {name}, so it is {what}", f"not supported: {why}", "give an RWKV-4 to 7")
    if "blocks.0.att.r_k" in tensors or "blocks.0.att.x_r" in tensors:
        return RWKV7
    if any(".time_maa_" in name for name in tensors):
        return RWKV6
    if "blocks.0.att.ln_x.weight" in tensors:
        return RWKV5
    if "blocks.0.att.time_first" in tensors:
        return RWKV4
    some = ", ".join(list(tensors)[:3])
    raise InputError(
        f"{path} has no RWKV names ({some}, ...)", "must be RWKV-4, 5, 6 or 7", "give the model file of an RWKV"
    )


def divisor(path: Path, override: float | None = None) -> float:
    """The head size divisor of a checkpoint, the one number that its tensors don't tell.

    It is `override`, else what the config.json of a Hugging Face folder says, else 8, as in nearly all published models; some
    small ones have 1.
    """
    return override or huggingface.head_size_divisor(path) or 8.0


def load(
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    op: Op = "auto",
    head_size_divisor: float | None = None,
    quantize: Form = "none",
) -> RWKV:
    """The model in a checkpoint; version, sizes and ranks are read from it.

    Args:
        path: what `checkpoint.read` takes.
        dtype: of the parameters; None keeps the file's.
        device: where to put them.
        op: implementation of the operators, see `kernels.choice`.
        head_size_divisor: of RWKV-5, 6 and 7, see `divisor`.
        quantize: how to pack the matrices of the blocks, which can't be trained then, only adapted. Each is packed as it is
            read, on `device`, so that the model is never whole in memory; what is not packed is as without.

    Raises:
        InputError: the file can't be read, is another model, or has tensors missing, left over, of a wrong shape or of a
            dtype that no model computes in.
    """
    tensors = checkpoint.read(path)
    version = version_of(tensors, path)
    if op in ("cuda", "triton", "fla") and not torch.cuda.is_available():
        raise InputError(f"op = {op}", "it works on a GPU, and torch sees none", "say auto")
    try:
        shape = version.shape_of(tensors, divisor(path, head_size_divisor))
        with torch.device("meta"):
            model = version(shape, op)
    except KeyError as error:
        raise InputError(f"{path} lacks {error}", f"a {version.__name__} has it", "give a whole checkpoint") from None
    except (ValueError, RuntimeError) as error:  # torch's own: sizes beyond any memory
        raise InputError(f"{path}: {error}", "the sizes must fit together", "give a whole checkpoint") from None
    wanted = {name: x.shape for name, x in model.state_dict().items()}
    faults = {
        "lacks": wanted.keys() - tensors.keys(),
        "has the unknown": tensors.keys() - wanted.keys(),
        "has of a wrong shape": {n for n in wanted.keys() & tensors.keys() if wanted[n] != tensors[n].shape},
        "has of a wrong dtype": {name for name, x in tensors.items() if x.dtype not in DTYPES},
    }
    if any(faults.values()):
        listed = "; ".join(f"{fault} {', '.join(sorted(names)[:3])}" for fault, names in faults.items() if names)
        raise InputError(
            f"{path}: {listed}", f"must be the tensors of an RWKV-{shape.version}", "give a whole checkpoint"
        )
    names = list(tensors)
    packed = {} if quantize == "none" else _pack(model, tensors, quantize, device)
    dtypes = {x.dtype for x in tensors.values()}
    if dtype is None and len(dtypes) > 1:
        listed = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
        raise InputError(f"{path} has {listed}", "a model computes in one dtype", "say which: load with a dtype")
    checkpoint.convert(tensors, dtype, device)
    return model.adopt({n: x for name in names for n, x in (packed.get(name) or {name: tensors[name]}).items()})


def _pack(model: RWKV, tensors: dict[str, Tensor], form: Form, device: str) -> dict[str, dict[str, Tensor]]:
    """Move the matrices of the blocks from `tensors` into the model, packed.

    Returns:
        What each consists of now, by its name and those parts' names in the model's state_dict.
    """
    matrices = {f"{name}.weight": name for name, m in model.named_modules() if isinstance(m, Linear) and name != "head"}
    made: dict[str, dict[str, Tensor]] = {}
    for name, x in checkpoint.one_by_one({name: tensors.pop(name) for name in matrices}):
        packed = Packed(x, form, device)
        model.set_submodule(matrices[name], QuantizedLinear(packed))
        made[name] = {f"{name}.{part}": y for part, y in packed.state_dict().items()}
    return made
