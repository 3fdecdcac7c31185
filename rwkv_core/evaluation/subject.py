"""A model that is judged as it is used: with an adapter beside its matrices, after a state, packed, or as any file has it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.choice import Op
from rwkv_core import checkpoint, models
from rwkv_core.adapters import attach, file
from rwkv_core.checkpoint import Dtype
from rwkv_core.config import AdapterConfig
from rwkv_core.data.binidx import Documents
from rwkv_core.errors import InputError
from rwkv_core.evaluation.held_out import Scores, score
from rwkv_core.evaluation.measure import Items
from rwkv_core.evaluation.store import Store
from rwkv_core.files import sha256
from rwkv_core.formats.tuned_state import is_part
from rwkv_core.generation.sampling import Sampling
from rwkv_core.generation.text import Ending, generate
from rwkv_core.models.skeleton import RWKV
from rwkv_core.models.state import State, mount
from rwkv_core.quantize import Form
from rwkv_core.tokenizer import Tokenizer


class Said(NamedTuple):
    """What a model said to a prompt."""

    text: str
    ending: Ending


class Subject:
    """One model, loaded when something must be computed: what the store has of it costs no loading."""

    about: Mapping[str, Any]
    """Digests of its files, and how they are loaded: what its numbers depend on."""

    def __init__(
        self,
        path: Path,
        tokenizer: Tokenizer,
        *,
        adapter: Path | None = None,
        state: Path | None = None,
        quantize: Form | None = None,
        dtype: Dtype | None = None,
        op: Op = "auto",
        head_size_divisor: float | None = None,
        store: Store | None = None,
    ) -> None:
        """A model, and what it is used with.

        Args:
            path: a checkpoint, as `models.load` takes it.
            tokenizer: of its vocabulary.
            adapter: of RWKV-Flow, trained on it; it stays beside the matrices, as in training. Its tuned state, if it has one,
                is begun from.
            state: a file of a state tuned on it.
            quantize: how the matrices of the blocks are packed; None: as they were when the adapter was trained, if there is
                one, else not at all.
            dtype: what to compute in; None: bf16 on a GPU, else fp32.
            op: implementation of the operators.
            head_size_divisor: see `models.divisor`.
            store: of what is known already; None: nothing is, and nothing is kept.

        Raises:
            InputError: a file can't be read, the adapter was trained on another base, or there are two states.
        """
        digest, record = sha256(path), None
        if adapter is not None:
            self._parts, record = file.read_for(path, digest, adapter, "give that one")
            if state is not None and record.adapter.state != "none":
                raise InputError(str(state), f"{adapter} has a state of its own", "give one of them")
        self.path, self.tokenizer = path, tokenizer
        self._adapter, self._state_file = None if record is None else record.adapter, state
        dtype = dtype or ("bf16" if torch.cuda.is_available() else "fp32")
        self._dtype, self._op, self._divisor = checkpoint.DTYPES.get(dtype), op, models.divisor(path, head_size_divisor)
        self._quantize: Form = quantize or (record.quantize if record else "none")
        self._store = store or Store(None)
        self._loaded: RWKV | None = None
        self.about = {
            "model": digest,
            "adapter": None if adapter is None else sha256(adapter),
            "state": None if state is None else sha256(state),
            "quantize": self._quantize,
            "dtype": dtype,
            "op": op,
            "head_size_divisor": self._divisor,
            "vocabulary": tokenizer.digest,
        }

    @property
    def has_state(self) -> bool:
        """Whether documents begin from a tuned state, and not from token 0."""
        return self._state_file is not None or (self._adapter is not None and self._adapter.state != "none")

    @property
    def model(self) -> RWKV:
        """In evaluation mode, on the GPU where there is one.

        Raises:
            InputError: the file can't be read, or what belongs to it does not fit.
        """
        if self._loaded is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            model = models.load(
                self.path, dtype=self._dtype, device=device, op=self._op, head_size_divisor=self._divisor,
                quantize=self._quantize,
            )  # fmt: skip
            if self._adapter is not None:
                self._attach(model, self._adapter)
            self._loaded = model.eval()
        return self._loaded

    def _attach(self, model: RWKV, adapter: AdapterConfig) -> None:
        originals = checkpoint.read(self.path) if self._quantize != "none" else None
        attach(model, adapter, 0, originals=originals, start=self._parts)
        if self._dtype is not None:  # what is trained is float32; mixed precision has it in this one for products
            model.to(self._dtype)

    def release(self) -> None:
        """Let the model go: one at a time is in memory."""
        self._loaded = None

    def tuned_state(self) -> Mapping[str, Tensor] | None:
        """What documents begin from, as `mount` takes it."""
        if self._state_file is not None:
            return checkpoint.read(self._state_file)
        if not self.has_state:
            return None
        return {name: p for name, p in self.model.named_parameters() if is_part(name)}

    def start(self) -> State | None:
        """The state of one row that a text begins from; None: from token 0."""
        tuned = self.tuned_state()
        return None if tuned is None else mount(self.model.initial_state(1), tuned)

    def score(
        self,
        documents: Documents,
        *,
        ctx_len: int,
        batch: int,
        skip_first: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Scores:
        """As `held_out.score`; what was scored before is taken from the store, and what is scored goes there batch by batch."""
        facts = {
            "of": "documents",
            "data": documents.digest(),
            "ctx_len": ctx_len,
            "batch": batch,
            "skip_first": skip_first,
        }
        with self._store.journal({**self.about, **facts}) as journal:
            done = sum(len(sizes) for *_, sizes in journal.pieces) == len(documents)
            return score(
                lambda: self.model, documents, self.tokenizer, ctx_len=ctx_len, batch=batch,
                state=None if done else self.tuned_state(), skip_first=skip_first or self.has_state, progress=progress,
                journal=journal,
            )  # fmt: skip

    def texts(self, prompts: Sequence[str], sampling: Sampling, *, ctx_len: int, batch: int) -> list[Said]:
        """What it says to each prompt; from the store, if it is there."""
        facts = {"of": "texts", "prompts": prompts, "sampling": asdict(sampling), "ctx_len": ctx_len, "batch": batch}

        def make() -> list[Said]:
            states = [self.start()] * len(prompts)
            found = generate(self.model, self.tokenizer, prompts, sampling, ctx_len=ctx_len, batch=batch, states=states)
            return [Said(one.text, one.ending) for one in found]

        return [Said(*one) for one in self._store.once({**self.about, **facts}, make)]

    def measured(self, facts: Mapping[str, Any], make: Callable[[], Mapping[str, Items]]) -> dict[str, Items]:
        """Any other measure of this model, by name; from the store, if it is there.

        Args:
            facts: all that it depends on beside the model: what is measured, on what, by which settings.
            make: measures it.
        """

        def as_lists() -> dict[str, Any]:
            return {name: (x.total.tolist(), x.weight.tolist(), x.higher_is_better) for name, x in make().items()}

        found = self._store.once({**self.about, **facts}, as_lists)
        return {
            name: Items(np.array(total), np.array(weight), higher) for name, (total, weight, higher) in found.items()
        }
