import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_core.generation.thoughts import WAYS, Thoughts


def parted(effort, pieces):
    thoughts = Thoughts(effort)
    found = [thoughts.push(piece) for piece in pieces] + [thoughts.push("", final=True)]
    return "".join(thought for thought, _ in found), "".join(said for _, said in found)


@pytest.mark.parametrize(
    ("effort", "written", "thought", "said"),
    [
        ("medium", ">\nTwo and two.\n</think>\n4", "Two and two.\n", "4"),
        ("medium", ">Hm</think", "Hm</think", ""),
        ("medium", "ing</think> 4", "", "<thinking</think> 4"),
        ("minimal", ">\n\n4 <think>", "", "4 <think>"),
        ("minimal", "", "</think", ""),
        ("none", " 4</think>", "", "4</think>"),
        ("none", " <think>a</think>b", "", "<think>a</think>b"),
        ("low", "", "", "<think"),
    ],
)
def test_an_answer_is_parted_wherever_it_is_cut(effort, written, thought, said):
    @given(st.sets(st.integers(0, len(written))))
    def cut(places):
        edges = [0, *sorted(places), len(written)]
        pieces = [written[a:b] for a, b in itertools.pairwise(edges)]
        assert parted(effort, pieces) == (thought, said)

    cut()


def test_a_piece_comes_as_soon_as_it_is_certain():
    thoughts = Thoughts("medium")
    assert [thoughts.push(piece) for piece in (">", "a <", "b", " </thi", "nk> c")] == [
        ("", ""), ("a ", ""), ("<b", ""), (" ", ""), ("", "c"),
    ]  # fmt: skip


def test_every_way_begins_with_an_open_thought_or_none():
    assert all(way.begun == "" or way.begun.startswith("<think") for way in WAYS.values())
    assert not any(way.begun.endswith(">") for way in WAYS.values()), "a token may begin with it"
