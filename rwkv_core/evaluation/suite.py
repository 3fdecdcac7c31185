"""All that models are asked beside the losses of documents: the same of each, and asked once for the same bytes."""

import functools
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rwkv_core.config import EvaluateConfig
from rwkv_core.data.binidx import Documents
from rwkv_core.evaluation import answers, memorised, task_files
from rwkv_core.evaluation.likelihood import Reader
from rwkv_core.evaluation.measure import Items, Measures
from rwkv_core.evaluation.subject import Subject
from rwkv_core.files import sha256
from rwkv_core.tokenizer import Tokenizer

Say = Callable[[str], None]


class Suite:
    """What the settings ask for, prepared: the questions are drawn and the files are read."""

    def __init__(
        self,
        settings: EvaluateConfig,
        tokenizer: Tokenizer,
        held_out: Documents,
        training: Documents | None,
        *,
        marks: Sequence[str],
        seed: int,
        skip_first: bool,
        left_out: Sequence[int] = (),
        say: Say = lambda text: None,
    ) -> None:
        """Draw the questions, and read the files.

        Args:
            settings: what is asked.
            tokenizer: of the documents and of the models.
            held_out: whose questions are asked.
            training: what may have been memorised; None only where that is not asked.
            marks: texts that end an answer in these, see `answers.questions`.
            seed: of what is drawn.
            skip_first: another of the models begins from a tuned state, see `Reader`.
            left_out: held-out documents that are not asked about, by number.
            say: is told what there is to say for a person.

        Raises:
            InputError: a file of questions can't be used.
        """
        self._settings, self._skip_first, self._say = settings, skip_first, say
        self._of = {"seed": seed, "marks": list(marks), "held_out": held_out.digest(), "left_out": list(left_out)}
        self._questions = list[answers.Question]()
        if settings.answers is not None:
            self._questions = answers.questions(held_out, tokenizer, settings.answers.count, seed, marks, left_out)
            if not self._questions:
                say("no held-out row has a question: answers are not measured")
        self._passages = list[Any]()
        if settings.memorised is not None and training is not None:
            sizes = {"prompt": settings.memorised.prompt, "continuation": settings.memorised.continuation}
            self._passages = memorised.passages(training, count=settings.memorised.count, seed=seed, **sizes)
            if not self._passages:
                say(f"no training row has {sum(sizes.values())} tokens: what is memorised is not measured")
        self._files = {name: (task_files.read(path), sha256(path)) for name, path in settings.tasks.items()}

    def ask(self, subject: Subject) -> Measures:
        """What a model gets: groups answers, format, memorised, tasks and lm_eval, of those that are asked for.

        Raises:
            InputError: a task of lm-eval is none, or faulty.
            WorldError: its package or its data are missing.
        """
        settings, found = self._settings, dict[str, dict[str, Items]]()
        if settings.answers is not None and self._questions:
            longest, asked = settings.answers.max_tokens, self._questions
            of = {"of": "answers", **self._of, **settings.answers.model_dump()}
            found |= _grouped(self._measured(subject, of, lambda reader: _flat(answers.judge(reader, asked, longest))))
        if settings.memorised is not None and self._passages:
            of = {"of": "memorised", "passages": [[*pair.context, *pair.continuation] for pair in self._passages]}
            of |= settings.memorised.model_dump()
            found["memorised"] = self._measured(subject, of, lambda reader: memorised.recited(reader, self._passages))
        for name, (rows, digest) in self._files.items():
            of = {"of": "task", "file": digest}
            measured = self._measured(subject, of, functools.partial(task_files.measure, asked=rows))
            found.setdefault("tasks", {}).update({f"{name}/{metric}": items for metric, items in measured.items()})
        if settings.lm_eval is not None:
            found["lm_eval"] = self._lm_eval(subject)
        return found

    def _lm_eval(self, subject: Subject) -> dict[str, Items]:
        from rwkv_core.evaluation import lm_eval  # its package is imported with it

        settings = self._settings.lm_eval
        if settings is None:
            raise ValueError("lm-eval is not asked for")

        def make(reader: Reader) -> Mapping[str, Items]:
            results = lm_eval.run(reader, settings)
            for name in results.unpaired:
                task, _, metric = name.partition("/")
                told = {key: value for key, value in results.table[task].items() if key.split(",")[0] == metric}
                self._say(f"lm-eval, {task}: {told} is of the whole task, and gets no interval")
            return results.items

        of = {"of": "lm_eval", "version": importlib.metadata.version("lm_eval"), **settings.model_dump(mode="json")}
        if settings.include is not None:
            of["files"] = sha256(settings.include)
        return self._measured(subject, of, make)

    def _measured(
        self, subject: Subject, of: Mapping[str, Any], make: Callable[[Reader], Mapping[str, Items]]
    ) -> dict[str, Items]:
        """One part of what is asked; from the store, if it is there."""
        sizes = {"ctx_len": self._settings.ctx_len, "batch": self._settings.batch}

        def ask() -> Mapping[str, Items]:
            self._say(f"asking for {of['of']}")
            begin = subject.start()
            return make(Reader(subject.model, subject.tokenizer, begin=begin, skip_first=self._skip_first, **sizes))

        return subject.measured({**of, **sizes, "skip_first": self._skip_first}, ask)


def _flat(measures: Measures) -> dict[str, Items]:
    """As the store keeps them: by "group/name"."""
    return {f"{group}/{name}": items for group, measured in measures.items() for name, items in measured.items()}


def _grouped(measured: Mapping[str, Items]) -> dict[str, dict[str, Items]]:
    found: dict[str, dict[str, Items]] = {}
    for name, items in measured.items():
        group, _, inner = name.partition("/")
        found.setdefault(group, {})[inner] = items
    return found
