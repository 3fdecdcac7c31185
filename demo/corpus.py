"""Real English without a network: what every CPython carries of its own documentation.

Two files come of it. `pretrain` has plain documents, for a base model to learn the language from; `corpus` has the rows that a
user would bring: User / Assistant turns in RWKV World's convention, each with its topic. No topic is in both.
"""

import ast
import hashlib
import json
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from demo.settings import FILE, OUTPUTS, DemoSettings
from rwkv_core.errors import WorldError
from rwkv_core.files import whole_file
from tasks import params, stage

# Not the library itself: tests, vendored copies, and data in the shape of code.
_SKIPPED = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "site-packages",
    "dist-packages",
    "ensurepip",
    "pydoc_data",
}

_SHORTEST = 80
"""Characters below which a docstring says too little to ask about."""

_LONGEST = 3000
"""Characters after which an answer is cut at a paragraph, as a person would answer."""


class Entry(NamedTuple):
    """One thing that is documented."""

    topic: str
    """Top-level module, or language topic: what a split keeps together."""
    name: str
    """Its dotted name."""
    kind: str
    """module, class, function or topic."""
    text: str


def entries() -> Iterator[Entry]:
    """All documentation there is, in a fixed order: the language's topics, then the library's docstrings."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise WorldError(
            "pydoc_data.topics", "this Python was built without its documentation", "use a CPython that has it"
        ) from None
    for name, text in sorted(topics.items()):
        yield Entry(f"topic {name}", name, "topic", _clean(text))
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.rglob("*.py")):
        parts = file.relative_to(library).with_suffix("").parts
        if _SKIPPED.isdisjoint(parts) and not parts[0].startswith("__"):
            module = ".".join(parts).removesuffix(".__init__")
            yield from _docstrings(module, file)


def _docstrings(module: str, file: Path) -> Iterator[Entry]:
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError:
        return
    topic = module.split(".")[0]

    def walk(node: ast.AST, name: str, kind: str) -> Iterator[Entry]:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = _clean(ast.get_docstring(node) or "")
            if len(text) >= _SHORTEST:
                yield Entry(topic, name, kind, text)
            for child in node.body:
                if isinstance(child, ast.ClassDef):
                    yield from walk(child, f"{name}.{child.name}", "class")
                elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield from walk(child, f"{name}.{child.name}", "function")

    yield from walk(tree, module, "module")


def _clean(text: str) -> str:
    """Unix line ends, no underlined headings, no trailing blanks, and no blank lines: in a turn, one would end it."""
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    return "\n".join(line for line in lines if line and not re.fullmatch(r"\s*[*=~^+\"-]{3,}", line)).strip()


def _in_corpus(topic: str, share: float) -> bool:
    """Whether a topic is asked about, rather than read in pretraining. It depends on its name alone."""
    return int.from_bytes(hashlib.sha256(f"demo:{topic}".encode()).digest()[:8]) < share * 2**64


def _turns(entry: Entry) -> str:
    question = {
        "topic": f"Explain the Python topic {entry.name!r}.",
        "module": f"What is the Python module {entry.name} for?",
        "class": f"What is the class {entry.name} in Python?",
        "function": f"What does {entry.name} do in Python?",
    }[entry.kind]
    return f"User: {question}\n\nAssistant: {_shortened(entry.text)}"


def _shortened(text: str) -> str:
    if len(text) <= _LONGEST:
        return text
    cut = text.rfind("\n", 0, _LONGEST)
    return text[: cut if cut > 0 else _LONGEST]


def write(pretrain: Path, corpus: Path, share: float) -> dict[str, int]:
    """Write both files.

    Args:
        pretrain: a .jsonl of {"text"}: the name, then the documentation.
        corpus: a .jsonl of {"text", "topic"}: a question and its answer.
        share: of the topics that go to the corpus.

    Returns:
        Rows and characters of each.
    """
    counts = {"pretrain_rows": 0, "pretrain_characters": 0, "corpus_rows": 0, "corpus_characters": 0}
    seen: set[str] = set()
    with (
        whole_file(pretrain) as plain,
        whole_file(corpus) as asked,
        plain.open("w", encoding="utf-8") as plain_file,
        asked.open("w", encoding="utf-8") as asked_file,
    ):
        for entry in entries():
            if entry.text in seen:  # inherited docstrings stand in many places
                continue
            seen.add(entry.text)
            if _in_corpus(entry.topic, share):
                side, file, row = "corpus", asked_file, {"text": _turns(entry), "topic": entry.topic}
            else:
                side, file, row = "pretrain", plain_file, {"text": f"{entry.name}\n{entry.text}"}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            counts[f"{side}_rows"] += 1
            counts[f"{side}_characters"] += len(row["text"])
    return counts


def corpus() -> None:
    """Python's documentation -> demo/outputs: pretrain.jsonl and corpus.jsonl."""
    settings = params.read(FILE, DemoSettings).corpus
    print(write(OUTPUTS / "pretrain.jsonl", OUTPUTS / "corpus.jsonl", settings.share))


if __name__ == "__main__":
    stage.main(corpus)
