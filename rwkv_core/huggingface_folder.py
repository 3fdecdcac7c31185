"""A folder that Hugging Face's libraries load: config, weights in parts, tokenizer."""

import json
import shutil
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_core.files import whole_folder, write_json
from rwkv_core.formats import container, gguf, huggingface
from rwkv_core.tokenizer import FIRST_FREE

VOCABULARY = "rwkv_vocab_v20230424.txt"
"""The name that llama.cpp's converter looks for, too."""

_END = "<|rwkv_tokenizer_end_of_text|>"


def write(
    folder: Path,
    tensors: Mapping[str, Tensor],
    shape: Any,
    dtype: torch.dtype,
    *,
    part_bytes: int,
    table: Sequence[bytes] = (),
    special: Mapping[str, int] | None = None,
    tokenizer: Path | None = None,
) -> None:
    """Write a checkpoint as such a folder, a tensor at a time.

    Args:
        folder: it appears whole or not at all.
        tensors: official.
        shape: the model's `models.skeleton.Shape`.
        dtype: of all tensors.
        part_bytes: how large a part may be. A tensor is never cut.
        table: the bytes of each token, where the vocabulary is World's; else empty.
        special: texts that are a token each, as in the training's `data.special_tokens`.
        tokenizer: a file of the `tokenizers` package, where it is not World's.

    Raises:
        InputError: neither fla nor transformers has such a model.
        WorldError: there is no room, or no permission.
    """
    config = huggingface.config(shape, dtype)
    converted = huggingface.from_official(tensors)
    with whole_folder(folder) as out:
        write_json(out / "config.json", config)
        write_json(out / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 0})
        _weights(out, converted, config, dtype, part_bytes)
        if table:
            _world(out, table, special or {})
        elif tokenizer is not None:
            shutil.copyfile(tokenizer, out / "tokenizer.json")
            ends = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
            write_json(out / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **ends})


def _weights(
    out: Path, converted: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype, part_bytes: int
) -> None:
    """model.safetensors, or parts with an index."""
    parts: list[list[str]] = [[]]
    size = 0
    for name, x in converted.items():
        if parts[-1] and size + x.numel() * dtype.itemsize > part_bytes:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += x.numel() * dtype.itemsize
    total = sum(x.numel() for x in converted.values()) * dtype.itemsize
    weight_map: dict[str, str] = {}
    for i, names in enumerate(parts, 1):
        file = "model.safetensors" if len(parts) == 1 else f"model-{i:05}-of-{len(parts):05}.safetensors"
        part = {name: converted[name] for name in names}
        about = {name: (x.shape, dtype) for name, x in part.items()}
        container.write_safetensors(
            out / file, about, (huggingface.folded(name, x, config) for name, x in container.one_by_one(part))
        )
        weight_map |= dict.fromkeys(names, file)
    if len(parts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(out / "model.safetensors.index.json", index)


def _world(out: Path, table: Sequence[bytes], special: Mapping[str, int]) -> None:
    """World's vocabulary, and the code that encodes by it: the `tokenizers` package can't encode greedily."""
    lines = [f"{i} {_literal(entry)} {len(entry)}\n" for i, entry in enumerate(table[:FIRST_FREE]) if entry]
    (out / VOCABULARY).write_text("".join(lines), encoding="utf-8", newline="\n")
    code = resources.files(__package__).joinpath("hf_rwkv_tokenizer.py.j2").read_text(encoding="utf-8")
    (out / "hf_rwkv_tokenizer.py").write_text(code, encoding="utf-8", newline="\n")
    tokens = {_END: 0, **special}
    added = {
        str(i): {
            "content": text, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
            "special": i == 0,
        }
        for text, i in tokens.items()
    }  # fmt: skip
    told = {
        "tokenizer_class": "RwkvWorldTokenizer",
        "auto_map": {"AutoTokenizer": ["hf_rwkv_tokenizer.RwkvWorldTokenizer", None]},
        "added_tokens_decoder": added,
        **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), _END),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1 << 20,
        "chat_template": gguf.chat_template(),
    }
    write_json(out / "tokenizer_config.json", told)
    write_json(
        out / "special_tokens_map.json",
        {key: told[key] for key in ("bos_token", "eos_token", "pad_token", "unk_token")},
    )
    if special:
        (out / "added_tokens.json").write_text(json.dumps(dict(special), ensure_ascii=False) + "\n", encoding="utf-8")


def _literal(entry: bytes) -> str:
    """A token as the published file has it: a text where it is one, else bytes."""
    try:
        return repr(entry.decode("utf-8"))
    except UnicodeDecodeError:
        return repr(entry)
