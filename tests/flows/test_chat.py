"""`rwkvflow chat` as a program: with lines from a pipe, and in a terminal."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flows import chat, cli

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from project import write_base

    path = tmp_path_factory.mktemp("chat") / "base.pth"
    write_base(path)
    return path


def command(model: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "flows.cli", "chat", str(model), "--device", "cpu", "--dtype", "fp32", *options]


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "dumb"}


def test_lines_from_a_pipe_are_answered(model: Path, tmp_path: Path):
    lines = b"h\xffi\n\n/retry\nagain\n/save talk.txt\n/save talk.txt\n/save\n/help\n/nonsense\n/reset\n/retry\nhello"
    done = subprocess.run(
        command(model, "--seed", "1", "--max-tokens", "5"),
        input=lines, capture_output=True, env=ENVIRONMENT, cwd=tmp_path, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    first, retried, again, after, nothing = done.stdout.decode().split(" […]\n")
    assert len({first, retried, again}) == 3
    assert (tmp_path / "talk.txt").read_text(encoding="utf-8") == (
        f"User: h\ufffdi\n\nAssistant: {retried}\n\nUser: again\n\nAssistant: {again}\n"
    )
    assert after.startswith(f"(written to talk.txt)\n{chat.HELP}\n(forgotten)\n")
    assert nothing == ""
    assert done.stderr.decode().splitlines() == [
        "rwkvflow: talk.txt: is there already; give another name",
        "rwkvflow: /save: needs a name; give that of a new file",
        "rwkvflow: /nonsense: is no command; /help lists them",
        "rwkvflow: there is no answer yet: only an answer can be tried again; say something",
    ]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--top-p", "0"], "rwkvflow: top_p = 0.0: must be above 0, and 1 at most; correct it\n"),
        (["--adapter", "none.pth"], "rwkvflow: none.pth: "),
        (["--tokenizer", "none.json"], "rwkvflow: none.json: no tokenizer is there; correct the path, "),
        (
            ["--special", "<a>"],
            "rwkvflow: --special <a>: must be a text and its token; write --special '<tool>=65530'\n",
        ),
        (
            ["--special", "<a>=7"],
            "rwkvflow: special token '<a>': 7: free are 65530 to 65535, each once; ",
        ),
    ],
    ids=str,
)
def test_a_problem_is_one_line(
    model: Path,
    options: list[str],
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(sys, "argv", ["rwkvflow", *command(model, *options)[3:]])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith(problem)
    assert message.count("\n") == 1


class Impatient:
    """Its user presses Ctrl+C during each piece of an answer."""

    last = None

    def __init__(self) -> None:
        self.heard = list[str]()

    def answer(self, message: str, halt: Callable[[], bool]) -> Iterator[str]:
        for piece in ("one ", "two ", "three"):
            yield piece
            os.kill(os.getpid(), signal.SIGINT)
            if message == "once" and halt():
                break
        self.heard.append(message)


def test_ctrl_c_twice_takes_the_message_back(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"once\ntwice\nonce\n")))
    before = signal.getsignal(signal.SIGINT)
    user = Impatient()
    chat.converse(user)  # type: ignore[arg-type]
    assert user.heard == ["once", "once"]
    assert capsys.readouterr().out.split("\n") == ["one ", "one two ", "(taken back)", "one ", ""]
    assert signal.getsignal(signal.SIGINT) is before


class Terminal:
    """A chat in a terminal of its own."""

    def __init__(self, words: list[str]) -> None:
        self._pid, self._file = pty.fork()
        if self._pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
            os.execve(words[0], words, ENVIRONMENT)
        self.seen = ""

    def type(self, keys: str) -> None:
        os.write(self._file, keys.encode())

    def until(self, pattern: str, seconds: float = 60) -> str:
        """What appears until the pattern does, which is then behind us."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen, re.DOTALL)):
            assert time.monotonic() < deadline, f"{pattern!r} did not appear in {self.seen!r}"
            if select.select([self._file], [], [], 0.2)[0]:
                self.seen += os.read(self._file, 4096).decode(errors="replace").replace("\r\n", "\n")
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text

    def left(self, seconds: float = 30) -> int:
        """The exit code, once the program has ended."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._pid = 0
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        raise AssertionError("it has not ended")

    def close(self) -> None:
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        os.close(self._file)


@pytest.fixture
def terminal(model: Path) -> Iterator[Terminal]:
    chat = Terminal(command(model, "--max-tokens", "100000", "--seed", "1", "--top-p", "0.9"))
    yield chat
    chat.close()


def test_ctrl_c_ends_an_answer_and_keeps_the_chat(terminal: Terminal, tmp_path: Path):
    terminal.until("/help says.*User: ")
    time.sleep(1)  # a signal between prompt and select() would wait for a key, CPython's Modules/readline.c
    terminal.type("\x03")
    terminal.until(r"\(Ctrl\+D leaves\)\n\nUser: ")
    for message in ("hello", "and now"):
        terminal.type(message + "\n")
        terminal.until("Assistant: .{20}")  # it streams: the answer is far from over
        terminal.type("\x03")
        terminal.until(r"\[interrupted\]\n\nUser: ")
    terminal.type(f"/save {tmp_path / 'talk.txt'}\n")
    terminal.until("written.*User: ")
    talk = (tmp_path / "talk.txt").read_text(encoding="utf-8")
    assert re.fullmatch(r"User: hello\n\nAssistant: .{20,}\n\nUser: and now\n\nAssistant: .{20,}\n", talk, re.DOTALL)
    terminal.type("\x04")
    assert terminal.left() == 0
