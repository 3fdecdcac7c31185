"""RWKV-LM's order of pretraining: windows of a token stream, each once, in an order that a cube modulo a prime makes.

Source: BlinkDL/RWKV-LM, RWKV-v7/train_temp/src/dataset.py and RWKV-v5/make_data.py.
"""

import math


def magic_prime(tokens: int, ctx_len: int) -> int | None:
    """The largest prime p of p % 3 == 2 and p <= tokens // ctx_len - 1; None below 3 windows, of which there is no order."""
    if tokens < 3 * ctx_len:
        return None
    return next((p for p in range(tokens // ctx_len - 1, 1, -1) if p % 3 == 2 and _is_prime(p)), None)


def _is_prime(n: int) -> bool:
    return n >= 2 and all(n % d for d in range(2, math.isqrt(n) + 1))


def window(number: int, prime: int) -> int:
    """Which window the row `number`, counted from 0, is: in [0, prime). `prime` rows take each exactly once.

    n -> n^3 is a permutation modulo a prime that is 2 modulo 3; the factor is the golden ratio's part of the prime.
    """
    factor = int(prime * (math.sqrt(5) - 1) / 2)
    return factor * pow(number + 1, 3, prime) % prime
