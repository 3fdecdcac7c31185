"""What a step allocates: against what a real one does, and the heap's own rules."""

import pytest
import random_models
import torch
from methods import EXAMPLES, PEFT, SOME

from benchmarks.train_step import _New
from kernels.head_loss import head_loss
from rwkv_core.adapters import attach
from rwkv_core.adapters.peft import all_tensors
from rwkv_core.config import PeftConfig
from rwkv_core.footprint import Gpu, Heap, Trace, peak, record, without_memory


@pytest.mark.parametrize("version", random_models.VERSIONS)
def test_what_is_kept_is_what_a_real_forward_leaves(version):
    check_kept(version, EXAMPLES[0])


PLANNED = [values for values in PEFT if values["peft_type"] not in ("WAVEFT", "SHIRA")]
"""These make tensors whose sizes values decide."""


@pytest.mark.parametrize("values", PLANNED, ids=lambda x: "-".join(map(str, x.values())))
def test_what_a_method_of_peft_keeps_is_what_a_real_forward_leaves(values):
    check_kept("7", PeftConfig(kind="peft", config=values, **SOME))


def check_kept(version, adapter):
    model, tokens = random_models.make(version=version, n_layer=2), torch.zeros(2, 40, dtype=torch.int64)
    attach(model, adapter, 0)
    with _New() as new:
        features, after = model.features(tokens)
        loss = head_loss(features.flatten(0, 1), model.head.now(), tokens.flatten())
    del features, after
    known = {x.untyped_storage()._cdata for x in (*all_tensors(model), tokens)}
    left = sum(size for key, (found, _, size) in new.found.items() if key not in known and not found.expired())
    assert loss.requires_grad
    with without_memory():
        fake = type(model)(model.config)
        attach(fake, adapter, 0)
        trace = record(fake, torch.zeros(2, 40, dtype=torch.int64), None)
    assert sum(trace.sizes[number] for number in trace.kept) == left


def test_a_heap_reuses_and_never_shrinks():
    heap = Heap()
    one, two, three = (heap.allocate(1 << 20) for _ in range(3))
    most = heap.resident
    assert 3 << 20 < most < (3 << 20) + 1000
    heap.free(one)
    heap.free(two)
    assert heap.resident == most
    heap.free(heap.allocate(1 << 19))
    assert heap.resident == most
    heap.free(three)
    large = heap.allocate(40 << 20)
    assert heap.resident > most + (40 << 20)
    heap.free(large)
    assert heap.resident == most


def test_small_objects_keep_a_freed_block_from_its_like():
    heap = Heap()
    one = heap.allocate(1 << 20)
    for _ in range(8):
        heap.objects()
    heap.allocate(1 << 20)
    before = heap.resident
    heap.free(one)
    heap.allocate(1 << 20)
    assert heap.resident > before


def test_gradients_of_a_step_stay_until_the_next_backward():
    # forward: 0 is kept; backward: gradient 1, and 0 goes
    trace = Trace(sizes=[1024, 512], events=[0, 1, ~0], forward=1, kept={0}, gradients={1})
    found = peak(trace, Gpu())
    assert (found.total, found.gradients, found.kept, found.after) == (1536, 512, 1024, 512)
    assert peak(trace, Gpu(), accumulate=2).total == 2048  # the second micro-batch's is added to the first's
