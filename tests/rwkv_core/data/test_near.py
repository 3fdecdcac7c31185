"""Against Jaccard's similarity of sets, on random copies."""

import subprocess
import sys

import numpy as np
import pytest

from rwkv_core.data import near
from rwkv_core.data.binidx import Documents, Writer
from rwkv_core.data.near import HASHES, TRIED, Index, seen, signature, similarity


def copies(rng, tokens, wanted):
    """A document, and one whose end is another, so that they share about as much."""
    runs = max(tokens - 4, 1)
    changed = round(runs * (1 - wanted) / (1 + wanted))
    one = rng.integers(1, 65536, tokens)
    other = one.copy()
    other[tokens - changed :] = rng.integers(1, 65536, changed)
    return one, other


def exact(a, b):
    one, other = ({tuple(x[i : i + 5].tolist()) for i in range(max(len(x) - 4, 1))} for x in (a, b))
    return len(one & other) / len(one | other)


@pytest.mark.parametrize("tokens", [0, 1, 4, 5, 9, 50, 700])
@pytest.mark.parametrize("kinds", [2, 65536])
def test_the_exact_similarity_is_that_of_sets(tokens, kinds):
    rng = np.random.default_rng(tokens)
    for wanted in (0.0, 0.5, 0.9, 1.0):
        a, b = (x % kinds for x in copies(rng, tokens, wanted))
        assert similarity(a, b) == exact(a, b)


@pytest.mark.parametrize("tokens", [20, 60, 300, pytest.param(3000, marks=pytest.mark.slow)])
def test_found_and_passed_over_as_often_as_the_bands_say(tokens):
    rng = np.random.default_rng(1)
    for wanted, least, most in ((0.2, 0, 0.02), (0.4, 0, 0.15), (0.8, 0.98, 1), (0.9, 1, 1), (1.0, 1, 1)):
        found, errors = 0, []
        for _ in range(300):
            one, other = copies(rng, tokens, wanted)
            documents, estimates = Index(signature(one)[None]).candidates(signature(other))
            found += len(documents)
            errors.append((signature(one) == signature(other)).mean() - exact(one, other))
            assert estimates.tolist() in ([], [(signature(one) == signature(other)).mean()])
        assert least <= found / 300 <= most, wanted
        assert abs(np.mean(errors)) < 0.015  # unbiased, also where most ranges are empty
        assert np.std(errors) < 0.07


def test_the_estimate_of_eight_tenths_is_found_with_more_than_ninety_nine_hundredths():
    rng = np.random.default_rng(2)
    pairs = [copies(rng, 600, 0.8) for _ in range(2000)]
    assert abs(np.mean([exact(*pair) for pair in pairs[:100]]) - 0.8) < 0.005
    assert sum(len(Index(signature(a)[None]).candidates(signature(b))[0]) for a, b in pairs) > 0.99 * len(pairs)


@pytest.mark.parametrize("held_out", [0, 1, 300])
def test_a_band_agrees_where_there_are_candidates(held_out):
    draw = np.random.default_rng(held_out)
    signatures = draw.integers(0, 2**16, (held_out, near.HASHES)).astype(np.uint16)
    others = draw.integers(0, 2**16, (200, near.HASHES)).astype(np.uint16)
    for i in range(0, 200 if held_out else 0, 7):  # some have one band, any of them, in common with one
        band = slice(i % near.BANDS * near.ROWS, (i % near.BANDS + 1) * near.ROWS)
        others[i, band] = signatures[i % held_out, band]
    index = near.Index(signatures)
    agrees = index.agrees(others)
    assert agrees.tolist() == [len(index.candidates(other)[0]) > 0 for other in others]
    assert agrees.sum() == (29 if held_out else 0)


def test_the_nearest_is_told_by_its_exact_similarity():
    rng = np.random.default_rng(3)
    held_out = [rng.integers(1, 65536, rng.integers(1, 400)) for _ in range(500)]
    index = Index(np.stack([signature(x) for x in held_out]))
    for number, document in enumerate(held_out):
        assert index.nearest(document, signature(document), held_out.__getitem__, 1.0) == (number, 1.0)
    tell = {}
    for wanted in (0.7, 0.76, 0.84, 0.9):
        tell[wanted] = 0
        for number in range(0, 500, 5):
            document = held_out[number]
            changed = round((len(document) - 4) * (1 - wanted) / (1 + wanted))
            if len(document) < 200:
                continue
            other = np.append(document[: len(document) - changed], rng.integers(1, 65536, changed))
            found = index.nearest(other, signature(other), held_out.__getitem__, 0.8)
            truth = exact(document, other)
            assert found is None or found == (number, truth)
            assert found is not None or truth < 0.85
            tell[wanted] += found is not None
    assert tell[0.7] == tell[0.76] == 0 < tell[0.84] <= tell[0.9]
    stranger = rng.integers(1, 65536, 300)
    assert index.nearest(stranger, signature(stranger), held_out.__getitem__, 0.1) is None


def test_a_frame_that_all_have_in_common_costs_each_only_some_comparisons():
    rng = np.random.default_rng(6)
    frame = rng.integers(1, 65536, 300)
    held_out = [np.append(frame, rng.integers(1, 65536, 100)) for _ in range(2000)]
    index = Index(np.stack([signature(x) for x in held_out]))
    asked = []

    def tokens(document):
        asked.append(document)
        return held_out[document]

    other = np.append(frame, rng.integers(1, 65536, 100))
    assert index.nearest(other, signature(other), tokens, 0.7) is None
    assert 0 < len(asked) <= TRIED
    assert index.nearest(held_out[1234], signature(held_out[1234]), tokens, 1.0) == (1234, 1.0)


@pytest.mark.parametrize("tokens", [[], [0], [7, 0], [1, 2, 3, 0], [1, 2, 3, 4, 0]])
def test_short_documents_are_like_themselves_alone(tokens):
    others = [[], [0], [7, 0], [0, 7], [1, 2, 3, 0], [1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 0]]
    known = signature(np.array(tokens, np.uint16))
    assert known.shape == (HASHES,)
    index = Index(np.stack([signature(np.array(x, np.uint16)) for x in others]))
    documents, estimates = index.candidates(known)
    assert (documents[0], estimates[0]) == (others.index(tokens), 1.0)


def test_of_equal_documents_it_is_the_first_and_ties_go_by_number():
    rng = np.random.default_rng(4)
    a, b = rng.integers(1, 65536, 100), rng.integers(1, 65536, 100)
    index = Index(np.stack([signature(x) for x in (b, b, a, b, a)]))
    assert index.candidates(signature(a))[0].tolist() == [2]
    assert index.candidates(signature(b))[0].tolist() == [0]
    assert not len(Index(np.zeros((0, HASHES), np.uint16)).candidates(signature(a))[0])


def test_the_dtype_of_tokens_does_not_matter():
    tokens = np.arange(3, 200, 3)
    for dtype in (np.uint8, np.uint16, np.int32, np.uint64):
        assert (signature(tokens.astype(dtype)) == signature(tokens)).all()


def test_signatures_are_the_same_in_every_process():
    code = (
        "import numpy as np, zlib; from rwkv_core.data.near import signature;"
        "print([zlib.crc32(signature(np.arange(n) * 7 % 1000).astype('<u2').tobytes()) for n in (3, 40, 900)])"
    )
    said = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in "ab"
    }
    assert said == {"[302389106, 2063629652, 3531395038]\n"}


@pytest.fixture
def sides(tmp_path):
    """Held-out documents, and a training's: equal to 3 and 7, nearly 5, and rather like 9. 7 is there twice."""
    rng = np.random.default_rng(3)
    held = [rng.integers(1, 65536, 100) for _ in range(12)]
    held[11] = held[7]
    near_5, near_9 = held[5].copy(), held[9].copy()
    near_5[95:] = 1
    near_9[70:] = 1
    others = [rng.integers(1, 65536, 100) for _ in range(40)]
    for name, documents in {"valid": held, "train": [*others, held[3], held[7], near_5, near_9]}.items():
        writer = Writer(tmp_path / name)
        for document in documents:
            writer.add([*document.tolist(), 0])
        writer.close()
    return Documents(tmp_path / "valid"), Documents(tmp_path / "train")


@pytest.mark.parametrize(("least", "wanted"), [(None, [3, 7, 11]), (0.8, [3, 5, 7, 11])])
@pytest.mark.parametrize("together", [7, 1000])
def test_held_out_documents_that_a_training_has_seen_are_found(least, wanted, together, sides, monkeypatch):
    monkeypatch.setattr(near, "_INDEXED", together)
    assert np.flatnonzero(seen(*sides, least)).tolist() == wanted
