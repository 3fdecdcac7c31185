import random

import torch

from rwkv_core.formats import order

OF_4 = """
emb.weight
blocks.0.ln1.weight blocks.0.ln1.bias blocks.0.ln2.weight blocks.0.ln2.bias blocks.0.ln0.weight blocks.0.ln0.bias
blocks.0.att.time_decay blocks.0.att.time_first blocks.0.att.time_mix_k blocks.0.att.time_mix_v blocks.0.att.time_mix_r
blocks.0.att.key.weight blocks.0.att.value.weight blocks.0.att.receptance.weight blocks.0.att.output.weight
blocks.0.ffn.time_mix_k blocks.0.ffn.time_mix_r
blocks.0.ffn.key.weight blocks.0.ffn.receptance.weight blocks.0.ffn.value.weight
blocks.2.ln1.weight blocks.10.ln1.weight ln_out.weight ln_out.bias head.weight another
"""

OF_7 = """
emb.weight
blocks.0.ln1.weight blocks.0.ln1.bias blocks.0.ln2.weight blocks.0.ln2.bias blocks.0.ln0.weight blocks.0.ln0.bias
blocks.0.att.x_r blocks.0.att.x_w blocks.0.att.x_k blocks.0.att.x_v blocks.0.att.x_a blocks.0.att.x_g
blocks.0.att.w0 blocks.0.att.r_k blocks.0.att.w1 blocks.0.att.w2 blocks.0.att.a1 blocks.0.att.a2 blocks.0.att.a0
blocks.0.att.g1 blocks.0.att.g2 blocks.0.att.v2 blocks.0.att.v1 blocks.0.att.v0 blocks.0.att.k_k blocks.0.att.k_a
blocks.0.att.receptance.weight blocks.0.att.key.weight blocks.0.att.value.weight blocks.0.att.output.weight
blocks.0.att.ln_x.weight blocks.0.att.ln_x.bias
blocks.0.ffn.x_k blocks.0.ffn.key.weight blocks.0.ffn.value.weight
blocks.1.ln1.weight ln_out.weight ln_out.bias head.weight
"""


def test_the_official_order_is_restored():
    for names in (OF_4.split(), OF_7.split()):
        for seed in range(5):
            mixed = {name: torch.zeros(1) for name in random.Random(seed).sample(names, len(names))}
            assert list(order.official(mixed)) == names


def test_names_of_any_kind_have_a_place():
    odd = [
        "",
        ".",
        "blocks",
        "blocks.x.att.y",
        "blocks.0",
        "blocks.0.att.unknown.weight",
        "Ünï.weight",
        "blocks.1.zzz.q",
    ]
    assert sorted(order.official(dict.fromkeys(odd, torch.zeros(1)))) == sorted(odd)
