"""A program's output as lines, progress bars included."""

from flows.lines import PROGRESS_EVERY, Lines


def given(*chunks: tuple[float, bytes], final: bool = True) -> list[str]:
    lines = Lines()
    found = [line for now, data in chunks for line in lines.feed(data, now)]
    found += lines.feed(b"", chunks[-1][0], final=True) if final else []
    return [line.text for line in found]


def test_plain_lines_come_whole():
    assert given((0, b"one\ntw"), (0, b"o\r\n\n\x1b[31mred\x1b[0m\nlast")) == ["one", "two", "red", "last"]


def test_of_a_progress_bar_only_the_last_state_comes():
    bar = b"".join(b"\rstep %d" % step for step in range(100))
    assert given((0, bar + b"\ndone\n"), final=False) == ["step 99", "done"]


def test_a_bar_is_looked_at_now_and_then_and_its_end_is_not_lost():
    ticks = [(step / 10, b"\rstep %d" % step) for step in range(101)]  # 10 seconds
    found = given(*ticks)
    assert len(found) <= 10 / PROGRESS_EVERY + 2
    assert found[-1] == "step 100"


def test_a_bar_that_clears_itself_and_many_short_bars():
    assert given((0, b"\rvalid 9/9\r         \r\n")) == ["valid 9/9"]
    bars = b"".join(b"\rbar %d\n" % bar for bar in range(50))
    assert given((0, bars + b"text\n")) == ["bar 49", "text"]


def test_what_is_not_utf8_is_shown_all_the_same():
    assert given((0, b"\xff\xfe ok\n")) == ["\ufffd\ufffd ok"]


def test_a_bar_is_told_from_what_is_said():
    assert list(Lines().feed(b"said\n\rbar", 0)) == [("said", False), ("bar", True)]
