"""`rwkvflow chat`: a conversation in the terminal, or with lines from a pipe."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rwkv_core.errors import InputError
from rwkv_core.generation.chat import Chat

HELP = """\
/retry      another answer to the last message
/reset      forget all that was said
/save FILE  write the conversation to a new file
/help       this
Ctrl+C      end the answer and keep the conversation; twice: as if the message had not been said
Ctrl+D      leave"""


def converse(chat: Chat) -> None:
    """Answer line after line from standard input, until it ends."""
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        import readline  # noqa: F401 - input() edits lines with it, and remembers them

        print("/help says what else you can type.")
    while True:
        try:
            line = input("\nUser: " if at_terminal else "").strip()
        except EOFError:
            print(end="\n" if at_terminal else "")
            return
        except KeyboardInterrupt:
            if not at_terminal:
                raise
            print("\n(Ctrl+D leaves)", flush=True)
            continue
        try:
            if line:
                _obey(chat, line, "\nAssistant: " if at_terminal else "")
        except KeyboardInterrupt:
            print("\n(taken back)", flush=True)
        except InputError as error:
            print(f"rwkvflow: {error}", file=sys.stderr, flush=True)


def _obey(chat: Chat, line: str, lead: str) -> None:
    command, _, rest = line.partition(" ")
    if command == "/retry":
        _show(chat, chat.retry, lead)
    elif command == "/reset":
        chat.reset()
        print("(forgotten)", flush=True)
    elif command == "/save":
        _save(chat, rest.strip())
    elif command == "/help":
        print(HELP, flush=True)
    elif command.startswith("/"):
        raise InputError(command, "is no command", "/help lists them")
    else:
        _show(chat, lambda halt: chat.answer(line, halt), lead)


def _show(chat: Chat, ask: Callable[[Callable[[], bool]], Iterator[str]], lead: str) -> None:
    with _interrupt() as interrupted:
        pieces = ask(interrupted)
        print(lead, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
    ending = chat.last.ending if chat.last is not None else "end"
    print({"length": " […]", "halted": " [interrupted]"}.get(ending, ""), flush=True)


def _save(chat: Chat, name: str) -> None:
    if not name:
        raise InputError("/save", "needs a name", "give that of a new file")
    try:
        with Path(name).open("x", encoding="utf-8") as file:
            file.write(chat.transcript + "\n")
    except FileExistsError:
        raise InputError(name, "is there already", "give another name") from None
    except OSError as error:
        raise InputError(name, f"can't be written ({error.strerror})", "give the name of a new file") from None
    print(f"(written to {name})", flush=True)


@contextmanager
def _interrupt() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl+C was pressed in the block; the second time it is a KeyboardInterrupt."""
    pressed = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
