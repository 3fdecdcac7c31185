"""Runs Hugging Face's transformers on a folder: its tokenizer, and RWKV-4, the one RWKV that it computes itself.

Only ever in a process of its own: the tokenizer is code that comes with the folder.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rwkv_core.conformance.contents import Array


def name() -> str:
    """What the verdict calls it."""
    import transformers

    return f"transformers {transformers.__version__}"


def logits(folder: Path, prompts: Sequence[Sequence[int]]) -> list[Array]:
    """(T, V) for each prompt, of an RWKV-4 in float32. In that there is nothing to rescale for."""
    import torch
    from transformers import RwkvForCausalLM

    model = RwkvForCausalLM.from_pretrained(folder, dtype=torch.float32, rescale_every=0)
    model.train(False)
    with torch.no_grad():
        return [model(torch.tensor([list(prompt)])).logits[0].numpy() for prompt in prompts]


def tokens(folder: Path, texts: Sequence[str], dialogue: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """What the folder's tokenizer makes of texts and of a dialogue, and its end."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return {
        "encoded": [tokenizer.encode(text, add_special_tokens=False) for text in texts],
        "decoded": [tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) for text in texts],
        "rendered": tokenizer.apply_chat_template(
            [dict(turn) for turn in dialogue], tokenize=False, add_generation_prompt=True
        ),
        "eos": tokenizer.eos_token_id,
    }
