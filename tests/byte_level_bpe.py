"""A small tokenizer in the form of 20B_tokenizer.json."""

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers


def bpe(file: Path, **changes: Any) -> Path:
    """A byte-level BPE in the form of 20B_tokenizer.json, with three merges and a token for three blanks."""
    names = ["<|endoftext|>", "<|padding|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġt", "he", "Ġthe"]
    names = changes.get("names", names)
    vocabulary = {name: i for i, name in enumerate(names)}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "t"), ("h", "e"), ("Ġt", "he")]))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=changes.get("prefix", False))
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, special=True) for name in names if name.startswith("<|")])
    made.add_tokens([AddedToken("   ", normalized=True)])
    made.save(str(file))
    return file
