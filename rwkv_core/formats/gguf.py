"""GGUF of RWKV-6 and RWKV-7 as llama.cpp reads it: names, shapes, metadata and tokenizer, and back.

Matrices are of the file's type. All that is small (norms, mixes, decays, low-rank pairs) stays in float32: some percent of the
size, and no rounding.

Shapes: C channels, D a low rank, H heads, N head size.
Source: ggml-org/llama.cpp: src/models/rwkv6.cpp and rwkv7.cpp (what the loader takes), conversion/rwkv.py and base.py (what its
own converter writes), src/llama-vocab.cpp (how the text of a token is unescaped).
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy
import torch
from torch import Tensor

from rwkv_core import memory
from rwkv_core.errors import InputError, WorldError
from rwkv_core.files import whole_file
from rwkv_core.formats import gguf_file, order, q8_0
from rwkv_core.formats.container import PIECE, let_go, mapped_files, pieces
from rwkv_core.tokenizer import FIRST_FREE

SUFFIX = ".gguf"

Form = Literal["f32", "f16", "bf16", "q8_0"]

EOT = 261
"""The token of a blank line: it ends a turn in World's dialogues."""

_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}  # llama.h, llama_ftype
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # llama.h, llama_token_type
_CONTEXT = 1 << 20  # tokens; the state knows no limit, and llama.cpp asks for one
_NORM_EPS = 1e-5
_HEAD_SIZES = (64, 128)
"""What the operators of all of llama.cpp's backends take. Others abort, or on a CPU with AVX-512 read past the head's end."""

_RESCALE = 6

_OUTSIDE = {"emb": "token_embd", "blocks.0.ln0": "token_embd_norm", "ln_out": "output_norm", "head": "output"}
_MATRICES = ("receptance", "key", "value", "output")
_BLOCK = {"ln1": "attn_norm", "ln2": "attn_norm_2", "att.ln_x": "time_mix_ln"}
_BLOCK_7 = {
    **_BLOCK,
    **{f"att.{x}{i}": f"time_mix_{x}{i}" for x in "wavg" for i in range(3) if (x, i) != ("g", 0)},
    **{f"att.{x}": f"time_mix_{x}" for x in ("k_k", "k_a", "r_k", *_MATRICES)},
    **{f"ffn.{x}": f"channel_mix_{x}" for x in ("key", "value")},
    "ffn.x_k": "channel_mix_lerp_k",
}
_BLOCK_6 = {
    **_BLOCK,
    **{f"att.time_maa_{x}": f"time_mix_{y}" for x, y in (("x", "lerp_x"), ("w1", "w1"), ("w2", "w2"))},
    **{f"att.time_decay{x}": f"time_mix_decay{x}" for x in ("", "_w1", "_w2")},
    "att.time_faaaa": "time_mix_first",
    **{f"att.{x}": f"time_mix_{x}" for x in (*_MATRICES, "gate")},
    **{f"ffn.{x}": f"channel_mix_{x}" for x in ("key", "value", "receptance")},
    **{f"ffn.time_maa_{x}": f"channel_mix_lerp_{x}" for x in "kr"},
}
_NAMES = {6: _BLOCK_6, 7: _BLOCK_7}
_MIXES = {6: [f"att.time_maa_{x}" for x in "wkvrg"], 7: [f"att.x_{x}" for x in "rwkvag"]}
"""In the order of time_mix_lerp_fused."""

_LARGE = re.compile(r"(token_embd|output|blk\.\d+\.(time|channel)_mix_(receptance|key|value|output|gate))\.weight")
_TURNED = re.compile(r"blk\.\d+\.time_mix_([wavg][12]|decay_w[12])\.weight")
_HALVED = re.compile(r"blk\.(\d+)\.(time_mix_output|channel_mix_value)\.weight")
_BONUS = re.compile(r"blk\.\d+\.time_mix_r_k\.weight")
_FUSED = re.compile(r"blk\.(\d+)\.time_mix_lerp_fused\.weight")
_KIND = re.compile(r"\.(receptance|key|value|output|gate|ln_x)$|^ln.$")
"""What official names have ".weight" or ".bias" behind."""
_VECTOR = re.compile(r"time_mix_(decay|lerp_.|w0|a0|v0|k_k|k_a)\.|channel_mix_lerp_.\.")
"""What is (1, 1, C) in the official files."""
_FIRST_V = re.compile(r"blk\.0\.time_mix_v[012]\.weight")
"""The first block of RWKV-7 mixes no value in. llama.cpp wants the tensors, and never uses them: here they are a0, a1, a2."""


class Part(NamedTuple):
    """A tensor that can be made, of llama.cpp's or of the official ones."""

    make: Callable[[], Tensor]
    sources: tuple[Tensor, ...]
    """What it is made of."""
    shape: tuple[int, ...] = ()


def write(
    path: Path,
    tensors: Mapping[str, Tensor],
    form: Form,
    table: Sequence[bytes],
    *,
    name: str = "RWKV",
    special: Mapping[str, int] | None = None,
    head_size_divisor: float = 8.0,
) -> None:
    """Write a checkpoint as GGUF, a tensor at a time. What float16 can't hold becomes infinite: check before.

    Args:
        path: the file.
        tensors: official, of an RWKV-6 or 7.
        form: of the matrices.
        table: the bytes of each token of World's vocabulary.
        name: of the model, for people.
        special: texts that are a token each, as in the training's `data.special_tokens`.
        head_size_divisor: of the model.

    Raises:
        InputError: llama.cpp has no such model.
        WorldError: there is no room, or no permission, or the package is missing.
    """
    gguf = library()
    check(tensors, form, len(table), head_size_divisor)
    parts = from_official(tensors, form)
    with whole_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, f"rwkv{version_of(tensors)}")
        writer.add_type("model")
        writer.add_name(name)
        _describe(writer, tensors, form)
        _tokenizer(writer, table, special or {})
        for theirs, part in parts.items():
            kind = gguf.GGMLQuantizationType[_form(theirs, form).upper()]
            block, size = gguf.GGML_QUANT_SIZES[kind]
            shape = (*part.shape[:-1], part.shape[-1] // block * size)  # in bytes: the dtype says so
            writer.add_tensor_info(theirs, shape, numpy.dtype("u1"), math.prod(shape), raw_dtype=kind)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            file: Any = writer.fout[0] if writer.fout else None
            writer.write_padding(file, file.tell())
            mapped = mapped_files()
            for theirs, part in parts.items():
                begin = file.tell()
                for piece in _pieces(part.make(), _form(theirs, form)):
                    file.write(piece.numpy().data)
                writer.write_padding(file, file.tell() - begin)
                for source in part.sources:
                    let_go(source, mapped)
                memory.give_back()
        finally:
            writer.close()


def library() -> Any:
    """The package that writes GGUF.

    Raises:
        WorldError: it is missing.
    """
    try:
        import gguf
    except ImportError:
        raise WorldError("gguf", "the package that writes GGUF is missing", "pip install 'rwkv-flow[gguf]'") from None
    return gguf


def version_of(tensors: Mapping[str, Tensor]) -> Literal[6, 7]:
    """The version, of those that llama.cpp reads.

    Raises:
        InputError: it is none of them.
    """
    if "blocks.0.att.r_k" in tensors:
        return 7
    if "blocks.0.att.time_maa_w1" in tensors:
        return 6
    version = "5" if "blocks.0.att.ln_x.weight" in tensors else "4"
    raise InputError(f"gguf of an RWKV-{version}", "llama.cpp reads RWKV-6 and 7", "export pth or hf")


def check(tensors: Mapping[str, Tensor], form: Form, vocab_size: int, head_size_divisor: float = 8.0) -> None:
    """Refuse what llama.cpp would not load, or load and compute otherwise.

    Args:
        tensors: official.
        form: of the matrices.
        vocab_size: tokens of World's vocabulary.
        head_size_divisor: of the model.

    Raises:
        InputError: it has no such model.
    """
    version = version_of(tensors)
    unknown = next((name for name in tensors if _theirs(name, version) is None), None)
    if unknown is not None:
        raise InputError(f"gguf with {unknown}", "llama.cpp has no such tensor", "leave it out of the model's file")
    if len(tensors["emb.weight"]) != vocab_size:
        raise InputError(
            f"gguf of a model of {len(tensors['emb.weight'])} tokens",
            f"llama.cpp has World's tokenizer, of {vocab_size}",
            "export pth or hf",
        )
    head_size = _head_size(tensors)
    if head_size not in _HEAD_SIZES:
        raise InputError(f"gguf of heads of {head_size}", "llama.cpp computes with 64 and 128", "export pth or hf")
    if head_size_divisor != 8:
        raise InputError(
            f"gguf of a model with head_size_divisor {head_size_divisor:g}", "llama.cpp's is 8", "export pth or hf"
        )
    widths = {
        x.shape[-1] for name, x in tensors.items() if x.ndim == 2 and _LARGE.fullmatch(_theirs(name, version) or "")
    }
    if form == "q8_0" and any(width % q8_0.BLOCK for width in widths):
        raise InputError(
            f"gguf in q8_0 of rows of {min(w for w in widths if w % q8_0.BLOCK)}",
            f"they are packed {q8_0.BLOCK} values at a time",
            "take f16 or bf16",
        )


def from_official(tensors: Mapping[str, Tensor], form: Form) -> dict[str, Part]:
    """What a file consists of, under llama.cpp's names, in the official order. A tensor is computed when its part is made."""
    version = version_of(tensors)
    parts: dict[str, Part] = {}
    for name, x in tensors.items():
        theirs = _theirs(name, version)
        if theirs is None or _FIRST_V.fullmatch(theirs):
            continue
        if _FUSED.fullmatch(theirs):
            rows = [tensors[f"{name.partition('.att.')[0]}.{mix}"] for mix in _MIXES[version]]
            shape = (len(rows), 1, 1, rows[0].numel())
            parts.setdefault(theirs, Part(partial(_stacked, rows, shape), tuple(rows), shape))
        else:
            y = _shaped(theirs, x)
            halvings = _halvings(theirs, _rescale(version, form))
            parts[theirs] = Part(partial(_halved, y, halvings, -1), (x,), tuple(y.shape))
    if version == 7:
        parts |= {f"blk.0.time_mix_v{i}.weight": parts[f"blk.0.time_mix_a{i}.weight"] for i in range(3)}
    return parts


def lazily(path: Path) -> dict[str, Part]:
    """What makes each of the official tensors in a file, in the official order.

    Raises:
        InputError: the file can't be read, or llama.cpp's model in it is no RWKV-6 or 7.
    """
    metadata, stored = gguf_file.read(path)
    architecture = metadata.get("general.architecture")
    if architecture not in ("rwkv6", "rwkv7"):
        raise InputError(f"{path}: {architecture}", "must be rwkv6 or rwkv7", "give the GGUF of an RWKV-6 or 7")
    version: Literal[6, 7] = 6 if architecture == "rwkv6" else 7
    rescale = int(metadata.get(f"{architecture}.rescale_every_n_layers", 0))
    head_size = int(metadata.get(f"{architecture}.wkv.head_size", 0))
    if any(x.data.numel() % max(head_size, 1) or not head_size for name, x in stored.items() if _BONUS.fullmatch(name)):
        raise InputError(f"{path}: heads of {head_size}", "must share the channels", "download it again")
    ours = {theirs: official for official, theirs in _NAMES[version].items()}
    outside = {theirs: official for official, theirs in _OUTSIDE.items()}
    makes: dict[str, Part] = {}
    for theirs, found in stored.items():
        fused, block = _FUSED.fullmatch(theirs), re.fullmatch(r"blk\.(\d+)\.(.+)\.(weight|bias)", theirs)
        if version == 7 and _FIRST_V.fullmatch(theirs):
            continue
        if fused is not None:
            for i, mix in enumerate(_MIXES[version]):
                makes[f"blocks.{fused[1]}.{mix}"] = Part(partial(_row, found, i), (found.data,))
        elif block is None:
            module, _, kind = theirs.rpartition(".")
            makes[f"{outside.get(module, module)}.{kind}"] = Part(found.values, (found.data,))
        else:
            layer, inner, kind = block.groups()
            single = inner.removeprefix("time_mix_lerp_")  # before the mixes were fused
            official = f"att.time_maa_{single}" if version == 6 and single in set("wkvrg") else ours.get(inner, inner)
            name = f"blocks.{layer}.{official}"
            make = partial(_official, theirs, found, _halvings(theirs, rescale), head_size)
            makes[f"{name}.{kind}" if _KIND.search(official) else name] = Part(make, (found.data,))
    return order.official(makes)


def special_tokens(path: Path) -> dict[str, int]:
    """The texts that are a token each, on the vocabulary's free ids.

    Raises:
        InputError: the file can't be read.
    """
    metadata, _ = gguf_file.read(path)
    tokens, types = (metadata.get(f"tokenizer.ggml.{key}", []) for key in ("tokens", "token_type"))
    entries = enumerate(zip(tokens, types, strict=False))
    return {text.replace("\\\\", "\\"): i for i, (text, kind) in entries if kind == _USER_DEFINED and i >= FIRST_FREE}


def about(path: Path) -> dict[str, Any]:
    """What a file says for people: its name, how matrices are stored, special tokens and tokens in all.

    Raises:
        InputError: the file can't be read.
    """
    metadata, _ = gguf_file.read(path)
    forms = {number: form for form, number in _FILE_TYPES.items()}
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    return {
        "name": metadata.get("general.name", "none"),
        "matrices": forms.get(int(metadata.get("general.file_type", -1)), "of several types"),
        "tokenizer": f"{metadata.get('tokenizer.ggml.model', 'none')}, {len(tokens)} tokens",
        "special tokens": list(special_tokens(path)),
        "ends a turn": metadata.get("tokenizer.ggml.eot_token_id", "nothing"),
    }


def _theirs(name: str, version: int) -> str | None:
    """llama.cpp's name of an official tensor; None if it has none. All mixes of the token shift are in one."""
    module, _, kind = name.rpartition(".")
    if module in _OUTSIDE:
        return f"{_OUTSIDE[module]}.{kind}"
    found = re.fullmatch(r"blocks\.(\d+)\.(.+?)(?:\.(weight|bias))?", name)
    if found is None:
        return None
    block, inner, kind = found.groups(default="weight")
    inside = "time_mix_lerp_fused" if inner in _MIXES[version] else _NAMES[version].get(inner)
    return inside and f"blk.{block}.{inside}.{kind}"


def _form(theirs: str, form: Form) -> Form:
    return form if _LARGE.fullmatch(theirs) else "f32"


def _head_size(tensors: Mapping[str, Tensor]) -> int:
    return tensors["blocks.0.att.r_k" if version_of(tensors) == 7 else "blocks.0.att.time_faaaa"].shape[-1]


def _rescale(version: int, form: Form) -> int:
    """Blocks after which llama.cpp halves what RWKV-6 has added up; 0 is never.

    That can be more than float16 holds, which some backends compute with where the matrices are in it or packed. Each halving
    raises the epsilon of the norms behind it, so a file of a wider type has none and is exact.
    """
    return _RESCALE if version == 6 and form in ("f16", "q8_0") else 0


def _halvings(theirs: str, rescale: int) -> int:
    """How often a matrix is halved, as what it is added to was."""
    found = _HALVED.fullmatch(theirs)
    return int(found[1]) // rescale if found is not None and rescale else 0


def _halved(x: Tensor, times: int, sign: int) -> Tensor:
    return x if times == 0 else x.to(torch.float32) * 2.0 ** (sign * times)


def _shaped(theirs: str, x: Tensor) -> Tensor:
    """An official tensor as llama.cpp wants it: (C,) of what is a vector; low-rank pairs turned around."""
    if _TURNED.fullmatch(theirs):
        return x.mT
    return x if x.ndim == 1 or _LARGE.fullmatch(theirs) or theirs.endswith(".time_mix_first.weight") else x.flatten()


def _official(theirs: str, found: gguf_file.Stored, halvings: int, head_size: int) -> Tensor:
    """The inverse of `_shaped`, in the dtype of the file where that holds it."""
    x = _halved(found.values(), halvings, 1).to(found.dtype)
    if _TURNED.fullmatch(theirs):
        return x.mT.contiguous()
    if _BONUS.fullmatch(theirs):
        return x.view(-1, head_size)
    return x.view(1, 1, -1) if _VECTOR.search(theirs) else x


def _row(found: gguf_file.Stored, i: int) -> Tensor:
    return found.values()[i].reshape(1, 1, -1)


def _stacked(rows: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
    return torch.stack([x.flatten() for x in rows]).view(shape)


def _pieces(x: Tensor, form: Form) -> Iterator[Tensor]:
    """The bytes of a tensor in a form, some at a time."""
    if form == "q8_0":
        return map(q8_0.pack, torch.split(x.contiguous().view(-1), PIECE))
    return pieces(x, _DTYPES[form])


def stored(name: str, tensors: Mapping[str, Tensor], form: Form) -> tuple[bool, float]:
    """Of an official tensor in a file: whether it is packed, and how far a value may be from what it was, besides its rounding.

    What is halved is smaller in the file: more of it is below what float16 holds in full.
    """
    version = version_of(tensors)
    theirs = _theirs(name, version) or ""
    times = _halvings(theirs, _rescale(version, form))
    packed = _form(theirs, form) == "q8_0"
    return packed, 2.0 ** (times - 25) * (127 if packed else 1) if times else 0.0


def _describe(writer: Any, tensors: Mapping[str, Tensor], form: Form) -> None:
    """What llama.cpp asks for besides the tensors."""
    version = version_of(tensors)

    def rank(name: str) -> int:
        return tensors[name].shape[-1]

    writer.add_file_type(_FILE_TYPES[form])
    writer.add_quantization_version(2)
    writer.add_context_length(_CONTEXT)
    writer.add_embedding_length(tensors["emb.weight"].shape[1])
    writer.add_block_count(1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")))
    writer.add_feed_forward_length(tensors["blocks.0.ffn.key.weight"].shape[0])
    writer.add_head_count(0)  # of attention; it must be there
    writer.add_layer_norm_eps(_NORM_EPS)
    writer.add_wkv_head_size(_head_size(tensors))
    writer.add_token_shift_count(2)
    if version == 7:
        writer.add_decay_lora_rank(rank("blocks.0.att.w1"))
        writer.add_iclr_lora_rank(rank("blocks.0.att.a1"))
        writer.add_value_residual_mix_lora_rank(
            rank("blocks.1.att.v1" if "blocks.1.att.v1" in tensors else "blocks.0.att.a1")
        )
        writer.add_gate_lora_rank(rank("blocks.0.att.g1"))
    else:
        writer.add_time_mix_extra_dim(rank("blocks.0.att.time_maa_w1") // 5)
        writer.add_time_decay_extra_dim(rank("blocks.0.att.time_decay_w1"))
        writer.add_rescale_every_n_layers(_rescale(version, form))


def _tokenizer(writer: Any, table: Sequence[bytes], special: Mapping[str, int]) -> None:
    """The vocabulary, and what a client needs for a dialogue."""
    texts, types = [], []
    for i, entry in enumerate(table):
        # as Python shows bytes: llama.cpp undoes that
        texts.append(repr(entry)[2:-1].encode() if entry else b"<s>" if i == 0 else f"[PAD{i}]".encode())
        types.append(_NORMAL if entry else _CONTROL if i == 0 else _UNUSED)
    for text, i in special.items():
        # llama.cpp looks for it in a text before it undoes anything, so only what it would take for an escape is one
        texts[i], types[i] = text.replace("\\", "\\\\").encode(), _USER_DEFINED
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_eot_token_id(EOT)
    writer.add_chat_template(chat_template())


def chat_template() -> str:
    """World's convention of a dialogue, for Jinja."""
    return resources.files(__package__).joinpath("world_chat.j2").read_text(encoding="utf-8").rstrip("\n")
