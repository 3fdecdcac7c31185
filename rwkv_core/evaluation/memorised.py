"""How much of its training text a model recites.

Source: Carlini et al. 2022, "Quantifying Memorization Across Neural Language Models", arXiv:2202.07646, definition 3.1: a
string is extractable with k tokens of context if the model, given the k tokens that stand before it in the training data,
writes it by greedy decoding.
"""

import numpy as np

from rwkv_core.data.binidx import Documents
from rwkv_core.evaluation.likelihood import Pair, Reader, likelihoods
from rwkv_core.evaluation.measure import Items


def passages(documents: Documents, *, count: int, prompt: int, continuation: int, seed: int) -> list[Pair]:
    """The beginnings of documents that are long enough, drawn at random: what is given, and what may be recited.

    Args:
        documents: of the training.
        count: how many, at most.
        prompt: tokens that are given, k in the source.
        continuation: tokens after them.
        seed: of the draw.
    """
    end = prompt + continuation
    fit = np.flatnonzero(documents.sizes >= end)
    chosen = np.sort(np.random.default_rng(seed).choice(fit, min(count, len(fit)), replace=False))
    return [
        Pair(tuple(tokens[:prompt]), tuple(tokens[prompt:end]))
        for tokens in (documents[int(i)][:end].tolist() for i in chosen)
    ]


def recited(reader: Reader, asked: list[Pair]) -> dict[str, Items]:
    """Share of the passages whose continuation greedy decoding reproduces, token by token.

    Nothing is decoded: greedy decoding writes a continuation exactly if each of its tokens is the likeliest after those before
    it, which one reading of the text tells.
    """
    if not asked:
        return {}
    greedy = likelihoods(reader, asked).greedy
    return {"verbatim": Items(greedy.astype(float), np.ones(len(asked)), higher_is_better=False)}
