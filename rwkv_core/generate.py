"""Text from a model, one token at a time."""

import torch
from torch import Tensor

from rwkv_core.models.rwkv7 import RWKV7
from rwkv_core.tokenizer import END, Tokenizer


@torch.no_grad()
def generate(
    model: RWKV7, tokenizer: Tokenizer, prompt: str, *, max_tokens: int, temperature: float, top_p: float, seed: int
) -> str:
    """Continue `prompt`, until the end of the document or `max_tokens`.

    The model reads token 0 first, as before every document in training.

    Args:
        model: in evaluation mode, on any device.
        tokenizer: of its vocabulary.
        prompt: what to continue. For a chat, it ends with "Assistant:", without a blank.
        max_tokens: longest continuation.
        temperature: 0 takes the likeliest token always.
        top_p: draw only from the likeliest tokens that together have this probability.
        seed: of the draws.

    Returns:
        The continuation, without the prompt; U+FFFD where it ends inside a character.
    """
    generator = torch.Generator().manual_seed(seed)
    device = model.emb.weight.device
    unread, state, out = [END, *tokenizer.encode(prompt)], None, list[int]()
    while len(out) < max_tokens:
        logits, state = model(torch.tensor([unread], device=device), state)
        token = draw(logits[0, -1].float().cpu(), temperature, top_p, generator)
        if token == END or not tokenizer.table[token]:  # the free ids of the vocabulary have no text
            break
        out.append(token)
        unread = [token]
    return tokenizer.decode(out)


def draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token from logits (V,)."""
    if temperature == 0:
        return int(logits.argmax())
    p, order = torch.softmax(logits, -1).sort(descending=True)
    kept = int((p.cumsum(-1) < top_p).sum()) + 1  # the first token to reach top_p is kept too
    # relative to the largest, which is 1 at any temperature: the others may vanish at a low one
    p = (p[:kept].double() / p[0]) ** (1 / temperature)
    return int(order[torch.multinomial(p / p.sum(), 1, generator=generator)])
