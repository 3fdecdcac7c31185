import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_core.generation.cache import Cache
from rwkv_core.models.state import BlockState

LOGITS = torch.zeros(1, 8)


def state(size=4):
    return [BlockState(*(torch.zeros(1, size) for _ in range(3)))]


def of(tokens, state=None, logits=None, nbytes=1 << 20):
    cache = Cache(nbytes)
    for some in tokens:
        cache.put(some, state or globals()["state"](), logits)
    return cache


def test_the_longest_beginning_is_found():
    cache = of([[1, 2], [1, 2, 3], [2, 3, 4, 5]])
    assert cache.longest([1, 2, 3, 4]).length == 3
    assert cache.longest([1, 2, 4]).length == 2
    assert cache.longest([1]) is None
    assert cache.longest([258, 2, 3]) is None


def test_all_of_it_is_found_only_with_what_comes_next():
    assert of([[1, 2], [1, 2, 3]]).longest([1, 2, 3]).length == 2
    assert of([[1, 2, 3]], logits=LOGITS).longest([1, 2, 3]).logits is LOGITS


def test_those_that_were_not_asked_for_make_room():
    each = 3 * 4 * 4 + 4
    cache = of([[1], [2], [3]], nbytes=3 * each)
    assert cache.longest([1, 9]).length == 1
    cache.put([4], state())
    assert [cache.longest([i, 9]) is None for i in (1, 2, 3, 4)] == [False, True, False, False]
    assert cache.nbytes == 3 * each


def test_what_is_put_twice_is_held_once():
    cache = of([[1], [1]])
    assert (len(cache), cache.nbytes) == (1, 3 * 4 * 4 + 4)


def test_one_that_is_too_large_is_not_kept():
    cache = of([[1]], nbytes=60)
    cache.put([2], state(100))
    assert cache.longest([1, 1]) is not None
    assert cache.longest([2, 1]) is None


def test_a_state_is_kept_without_what_was_read_with_it():
    whole = torch.zeros(1, 1000, 4)
    cache = of([[1]], state=[BlockState(whole[:, -1], whole[:, -1], whole[:, -1])])
    kept = cache.longest([1, 1]).state
    assert all(x.untyped_storage().nbytes() == 16 for x in kept[0])


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), max_size=12), st.integers(0, 400))
def test_it_never_holds_more_than_it_may(texts, most):
    cache = of(texts, nbytes=most)
    assert cache.nbytes <= most
    assert cache.nbytes == sum(52 - 4 + 4 * len(key) // 4 for key in cache._known)
