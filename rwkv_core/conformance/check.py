"""A file against the model that it was made from: its structure, and the logits that its clients get from it.

How far logits may be apart is measured, not guessed. A reference of ours, which knows only the rules of the format, computes in
float64 and again in float32: how far these two are apart is what float32 does to this very model, and who computes in it may be
`_TIMES` as far from the core. What a client rounds by habit, the reference rounds too, to know how much that changes.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rwkv_core import checkpoint
from rwkv_core.conformance import child, recurrence, structure, web_rwkv
from rwkv_core.conformance.child import Answer, Job
from rwkv_core.conformance.contents import Array, Contents, Unreadable
from rwkv_core.conformance.core import Core, rounded, stored
from rwkv_core.conformance.read import form, read, read_state
from rwkv_core.conformance.recurrence import Habits
from rwkv_core.conformance.structure import Finding
from rwkv_core.tokenizer import Tokenizer, greedy_encoder, world

PROMPTS = {
    "ASCII": "User: What is the capital of France?\n\nAssistant: The capital of France is Paris.\n\n",
    "Chinese": "User: 请用一句话介绍长城。\n\nAssistant: 长城是中国古代的伟大防御工程。\n\n",
    "code": "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n",
}
"""What is read to each reader; token 0 stands before each, as before a document in training."""

Mode = Literal["full", "structure"]

_TIMES = 16
"""Two programs that add in another order are about as far apart as either is from the truth. The most that was measured, over
all versions, is 3.2 times."""

_HABIT_TIMES = 4
"""The same, of what llama.cpp rounds before it multiplies: where that falls is chance, how much it is is not."""


class Subject(NamedTuple):
    """A file to check."""

    path: Path
    model: Path | None = None
    """Of a state: the model's file that it is mounted on. Of a LoRA: the base's .st that it is blended into."""
    alpha: float | None = None
    """Of a LoRA: what its recipe says."""


class Logits(NamedTuple):
    """What one reader computed from one prompt."""

    reader: str
    prompt: str
    tokens: int
    difference: float
    """Largest of a logit to the core's; of a client with a habit that is the same each time, behind that."""
    allowed: float
    same_top: float
    """Share of the positions at which both find the same token the likeliest."""
    decided: float
    """Share of those whose two likeliest are further apart than twice what is allowed: there the likeliest must be the same."""
    passed: bool


@dataclass
class Checked:
    """The verdict on one file."""

    file: str
    format: str = "unknown"
    reader: str = "structure"
    """The client that has computed with it; "reference", where it was the reader of ours; "structure", where nothing ran it."""
    findings: list[Finding] = field(default_factory=list)
    logits: list[Logits] = field(default_factory=list)
    flushed: int = 0
    """Values that became zero in the file's precision."""
    total: int = 0

    @property
    def passed(self) -> bool:
        """Whether all of it is as it must be."""
        return all(x.passed for x in self.findings) and all(x.passed for x in self.logits)


class Expected(NamedTuple):
    """What the files were made from."""

    model: Mapping[str, Tensor] | None = None
    """Under the official names; None: what `rwkv_core.checkpoint` reads from each file: the readers are compared with that."""
    state: Mapping[str, Tensor] | None = None
    """The tuned state; None: what is read from its file."""
    merged: Mapping[str, Tensor] | None = None
    """What a base becomes with a LoRA."""
    head_size_divisor: float = 8.0
    tokenizer: Tokenizer | None = None
    """None: World's, if the model has as many tokens."""


def check(subjects: Sequence[Subject], expected: Expected, mode: Mode = "full") -> list[Checked]:
    """Check files of one model.

    Args:
        subjects: the files.
        expected: what they must be.
        mode: "full" computes logits; "structure" runs no model.

    Raises:
        InputError: there is nothing to compare with, for we can't read a file either.
    """
    with tempfile.TemporaryDirectory(prefix="rwkvflow-conform-") as folder:
        cases = [_Case(subject, expected) for subject in subjects]
        for case in cases:
            case.look()
        if mode == "full":
            running = [case for case in cases if case.runs]
            jobs = [case.job(Path(folder) / str(i)) for i, case in enumerate(running)]
            answers = iter(child.run([job for job in jobs if job is not None]))
            core = Core(expected.head_size_divisor)
            for case, job in zip(running, jobs, strict=True):
                case.judge(next(answers) if job is not None else None, core)
    return [case.checked for case in cases]


class _Case:
    """One subject, on its way to a verdict."""

    def __init__(self, subject: Subject, expected: Expected) -> None:
        self.subject, self.expected = subject, expected
        self.checked = Checked(subject.path.name)
        self.is_lora = subject.alpha is not None
        self.is_state = subject.model is not None and not self.is_lora
        self.file = subject.model or subject.path
        """The one that has the model."""
        self.state: Contents | None = None
        self.runs = False
        """Whether the file is whole enough to compute with."""

    def look(self) -> None:
        """Read the file, and check its structure."""
        try:
            kind = form(self.file if self.is_state else self.subject.path)
            self.checked.format = "lora" if self.is_lora else f"{kind} state" if self.is_state else kind
            self._look()
        except Unreadable as problem:
            self._find("clients can read it", str(problem), "they can", passed=False)
        except (KeyError, ValueError, IndexError, TypeError) as error:  # a damaged file has broken our reader as well
            self._find("clients can read it", f"{type(error).__name__}: {error}", "they can", passed=False)

    def _look(self) -> None:
        subject, expected, found = self.subject, self.expected, self.checked.findings
        self.holder = read(self.file)
        if self.is_lora:
            self.holder = web_rwkv.with_lora(self.holder, subject.path, subject.alpha or 0.0)
            found += structure.names(self.holder)
            self.tensors = dict(expected.merged or expected.model or {})
        else:
            self.tensors = dict(expected.model if expected.model is not None else checkpoint.read(self.file))
            contents, source = self.holder, self.tensors
            if self.is_state:
                contents = self.state = read_state(subject.path)
                source = self.states = dict(expected.state or checkpoint.read(subject.path))
            found += structure.names(contents)
            compared = structure.values(contents, {name: stored(x) for name, x in source.items()})
            found += compared.findings
            self.checked.flushed, self.checked.total = compared.flushed, compared.total
            if self.is_state:
                found += structure.state(contents, self.holder)
        self.size = len(self.tensors["emb.weight"])
        if self.checked.format == "hf" and self.size == len(world().table):
            found.append(structure.world_file(self.file, self._known().table))
        if self.checked.format == "gguf":
            found += structure.vocabulary(self.holder, self._known().table, self._known().digest)
        vital = {
            "no tensor is missing",
            "shapes",
            "as many states as blocks",
            "shape of each state",
            "heads times size",
        }
        self.runs = not vital & {finding.what for finding in found if not finding.passed}

    def job(self, folder: Path) -> Job | None:
        """What the format's client has to do, if it is installed."""
        where = form(self.file)
        wanted: dict[str, tuple[child.Reader, str]] = {
            "pth": ("rwkv", "rwkv"), "gguf": ("llama", "llama_cpp"), "hf": ("transformers", "transformers")
        }  # fmt: skip
        reader, package = wanted.get(where, (None, ""))
        if reader is None or find_spec(package) is None or (where == "hf" and self.is_state):
            return None
        texts = list(PROMPTS.values())
        if where == "hf" and not _is_our_code(self.file):
            texts = []
            if self.holder.version != "4":
                return None
        folder.mkdir()
        state = str(self.subject.path) if self.is_state else None
        return Job(reader, str(self.file), str(folder), self.prompts(), self.holder.version, state, texts)

    def judge(self, client: Answer | None, core: Core) -> None:
        """Compare what the readers compute with what the core does."""
        state = None if self.state is None else {name: x.values() for name, x in self.state.tensors.items()}
        prompts = self.prompts()

        def reference(dtype: type, habits: Habits | None = None) -> list[Array]:
            with np.errstate(all="ignore"):
                return recurrence.logits(self.holder, prompts, dtype, habits=habits, state=state)

        computes = client is not None and (client.trouble is not None or bool(client.logits))
        self.checked.reader = client.reader if client is not None and computes else "reference"
        given = None if self.state is None else rounded(self.states, self.state)
        wanted = core.logits(self.tensors, self.holder, prompts, given)
        exact, plain = reference(np.float64), reference(np.float32)
        allowed = _TIMES * _apart(plain, exact)
        if self.is_lora:
            allowed += self._rounding_of_lora(core, wanted)
        self._compare("reference", exact, wanted, allowed)
        if client is None:
            return
        if client.trouble is not None:
            self._find(f"{client.reader} computes with it", client.trouble, "logits", passed=False)
            return
        if "pieces" in client.tokens:
            self._tokens_of_llama(client)
            habit = _apart(reference(np.float32, Habits(activations=True)), plain)
            self._compare(client.reader, client.logits, wanted, allowed + _HABIT_TIMES * habit)
            return
        if client.tokens:
            self._tokens_of_transformers(client)
        if not client.logits:
            return
        if self.file.suffix == ".pth" and self.holder.version != "7":
            changed = reference(np.float32, Habits(embedding=True))
            wanted = [want + (new - old) for want, new, old in zip(wanted, changed, plain, strict=True)]
        self._compare(client.reader, client.logits, wanted, allowed)

    def _rounding_of_lora(self, core: Core, wanted: Sequence[Array]) -> float:
        """What the roundings of either side explain: of matrices that web-rwkv has blended, and of those that were merged."""
        prompts = self.prompts()
        of_float16 = _apart(core.logits(self.tensors, None, prompts), wanted)
        blended = {
            name: torch.from_numpy(x.values().copy()).view(self.tensors[name].shape)
            for name, x in self.holder.tensors.items()
            if name in self.tensors
        }
        as_merged = {name: x.to(self.tensors[name].dtype) for name, x in blended.items()}
        of_merged = _apart(core.logits(as_merged, None, prompts), core.logits(blended, None, prompts))
        return _HABIT_TIMES * (of_float16 + of_merged)

    def _compare(self, reader: str, found: Sequence[Array], wanted: Sequence[Array], allowed: float) -> None:
        for prompt, got, want in zip(PROMPTS, found, wanted, strict=True):
            difference = float(np.abs(got - want).max()) if got.shape == want.shape else float("inf")
            if not np.isfinite(difference) or not np.isfinite(allowed):
                row = Logits(reader, prompt, len(want), float("inf"), allowed, 0.0, 0.0, passed=False)
            else:
                best = np.partition(want, -2)[:, -2:]
                decided = np.abs(best[:, 1] - best[:, 0]) > 2 * allowed
                same = got.argmax(-1) == want.argmax(-1)
                passed = difference <= allowed and bool(same[decided].all())
                shares = float(same.mean()), float(decided.mean())
                row = Logits(reader, prompt, len(want), difference, allowed, *shares, passed)
            self.checked.logits.append(row)

    def _tokens_of_transformers(self, client: Answer) -> None:
        """How the folder's own tokenizer reads and writes, run by transformers."""
        told = client.tokens
        same = [[0, *ids] for ids in told["encoded"]] == self.prompts() and told["decoded"] == list(PROMPTS.values())
        self._find("prompts, encoded and decoded", "as ours" if same else "otherwise", "as ours", passed=same)
        right = told["rendered"] == structure.RENDERED
        self._find(
            "dialogue", "as it must be" if right else repr(told["rendered"]), repr(structure.RENDERED), passed=right
        )
        self._find("eos", str(told["eos"]), "0", passed=told["eos"] == 0)

    def _tokens_of_llama(self, client: Answer) -> None:
        """How llama.cpp itself reads the tokens."""
        table = self._known().table
        pieces = [bytes.fromhex(piece) for piece in client.tokens["pieces"]]
        wrong = [
            f"{i} is {piece!r}, of the tokenizer {entry!r}"
            for i, (piece, entry) in enumerate(zip(pieces, table, strict=False))
            if entry and piece != entry
        ]
        told = f"{wrong[0]}; {len(wrong)} in all" if wrong else f"{len(pieces)}"
        self._find("tokens, as llama.cpp prints them", told, "the tokenizer's, to the byte", passed=not wrong)
        same = [[0, *ids] for ids in client.tokens["encoded"]] == self.prompts()
        self._find("prompts, as llama.cpp encodes them", "as ours" if same else "otherwise", "as ours", passed=same)
        ends = {end: client.tokens[end] for end in ("bos", "eos", "eot")}
        right = {"bos": 0, "eos": 0, "eot": table.index(b"\n\n")}
        self._find("ends, as llama.cpp knows them", str(ends), str(right), passed=ends == right)

    def prompts(self) -> list[list[int]]:
        """Token ids of each prompt; of a model of other tokens than are known, bytes instead."""
        known, given = self._known(), self.expected.tokenizer is not None
        if len(known.table) > self.size or (not given and len(known.table) < self.size):
            return [[0, *(byte % self.size for byte in text.encode())] for text in PROMPTS.values()]
        # by the definition: the fast encoder takes 240 MB
        encode = greedy_encoder(world().table) if len(known.table) == len(world().table) else known.encode
        return [[0, *encode(text)] for text in PROMPTS.values()]

    def _known(self) -> Tokenizer:
        return self.expected.tokenizer or world()

    def _find(self, what: str, found: str, rule: str, *, passed: bool) -> None:
        self.checked.findings.append(Finding(what, found, rule, passed))


def _is_our_code(folder: Path) -> bool:
    """Whether a folder's tokenizer is the code that we write: no other is run."""
    code = folder / "hf_rwkv_tokenizer.py"
    ours = resources.files("rwkv_core").joinpath("hf_rwkv_tokenizer.py.j2")
    return code.is_file() and ours.is_file() and code.read_bytes() == ours.read_bytes()


def _apart(some: Sequence[Array], others: Sequence[Array]) -> float:
    """The largest difference of a logit."""
    return max(float(np.nan_to_num(np.abs(x - y), nan=np.inf).max()) for x, y in zip(some, others, strict=True))
