"""Any task of lm-eval, EleutherAI's lm-evaluation-harness, with a model of ours. Its package is imported when this module is.

    from rwkv_core.evaluation.lm_eval import RWKVLM
    lm_eval.simple_evaluate(model=RWKVLM(Reader(model, tokenizer, ctx_len=512, batch=8)), tasks=["arc_easy"])

Source: lm_eval/api/model.py says what a model class must do.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rwkv_core.config import LmEvalConfig
from rwkv_core.data.dialogue import one_turn
from rwkv_core.errors import InputError, WorldError
from rwkv_core.evaluation.likelihood import Pair, Reader, likelihoods
from rwkv_core.evaluation.measure import Items
from rwkv_core.generation.sampling import Sampling

try:
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise WorldError(
        f"lm-eval ({error})", "its tasks come with its package", "pip install 'rwkv-flow[lm-eval]', or leave them out"
    ) from error

_LONGEST = 256
"""Tokens of an answer whose task does not say: as lm-eval's models."""

_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names that tasks have for the longest answer, the first that is there counts; as in lm_eval/models/utils.py."""

_CLOSE = 1e-6


class RWKVLM(LM):  # type: ignore[misc]  # lm_eval has no types
    """What lm-eval asks of a model.

    Every text is read after token 0 or after a tuned state, see `Reader`, and whole, however long it is: the state is carried
    from slice to slice, so nothing is cut off, and a rolling likelihood needs no windows.
    """

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        self.reader = reader

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval keeps its own stored requests apart by."""
        return f"rwkv-flow-{self.reader.tokenizer.digest[:16]}"

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """Turns as RWKV World models were trained on them; a last one that the assistant begins is left open."""
        turns = [f"{said['role'].capitalize()}: {one_turn(said['content'])}" for said in chat_history]
        return "\n\n".join([*turns, "Assistant:"] if add_generation_prompt else turns)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each (context, continuation): its logarithm in nats, and whether greedy decoding would write it."""
        pairs = [self.reader.pair(*request.args) for request in requests]
        found = likelihoods(self.reader, pairs)
        answers = [(-nats, greedy) for nats, greedy in zip(found.nats.tolist(), found.greedy.tolist(), strict=True)]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of each (text,): the logarithm of its probability in nats."""
        encode = self.reader.tokenizer.encode
        pairs = [Pair((), tuple(encode(request.args[0]))) for request in requests]
        answers: list[float] = (-likelihoods(self.reader, pairs).nats).tolist()
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Of each (context, settings): what follows, up to one of the texts "until"; greedily, unless "do_sample"."""
        alike = defaultdict[Sampling, list[int]](list)
        for i, request in enumerate(requests):
            alike[_sampling(request.args[1])].append(i)
        answers = [""] * len(requests)
        for sampling, numbers in alike.items():
            prompts = [requests[i].args[0] for i in numbers]
            for i, answer in zip(numbers, self.reader.generate(prompts, sampling), strict=True):
                answers[i] = answer.text
                self.cache_hook.add_partial("generate_until", requests[i].args, answer.text)
        return answers


def _sampling(settings: Mapping[str, Any]) -> Sampling:
    until = settings.get("until") or ()
    temperature = float(settings.get("temperature") or 0.0)
    draws = settings.get("do_sample", temperature > 0)
    return Sampling(
        max_tokens=next((int(settings[name]) for name in _LIMITS if settings.get(name)), _LONGEST),
        temperature=(temperature or 1.0) if draws else 0.0,
        top_p=float(settings.get("top_p") or 1.0),
        top_k=int(settings.get("top_k") or 0),
        seed=0,
        stop=(until,) if isinstance(until, str) else tuple(text for text in until if text),
    )


class Results(NamedTuple):
    """What a model got in some tasks."""

    items: Mapping[str, Items]
    """By task and metric, for what is a mean over samples; a perplexity's logarithm is."""
    table: Mapping[str, Mapping[str, Any]]
    """lm-eval's own numbers, by task or group."""
    unpaired: Sequence[str]
    """Metrics of whole tasks, no mean over samples (F1 of a class, BLEU): they are in the table alone."""


def run(reader: Reader, settings: LmEvalConfig) -> Results:
    """Ask a model what tasks of lm-eval ask. All seeds are lm-eval's own, so every model is asked the same.

    Args:
        reader: the model.
        settings: which tasks, where those of one's own are, and how much of them.

    Raises:
        InputError: there is no such task or folder, or a task's file is faulty.
        WorldError: a task's data is not on this machine and can't be fetched.
    """
    if settings.include is not None and not settings.include.is_dir():
        raise InputError(str(settings.include), "no folder of tasks is there", "correct evaluate.lm_eval.include")
    manager = _manager(settings)
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    try:
        found = lm_eval.simple_evaluate(
            model=RWKVLM(reader),
            tasks=list(settings.tasks),
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=True,
        )
    except (ConnectionError, FileNotFoundError) as error:
        said = " ".join(str(error).split())[:200]
        raise WorldError(
            f"the data of {', '.join(settings.tasks)} ({said})", "must be on this machine or be fetched",
            "run once with a network, or give a task whose dataset_path is json and whose data_files are local",
        ) from error  # fmt: skip
    return paired(found)


def _manager(settings: LmEvalConfig) -> Any:
    """Who knows the tasks: those in `include` alone, if that is all of them, for to look through lm-eval's own takes 15 s."""
    own = None if settings.include is None else str(settings.include)
    manager = None if own is None else TaskManager(include_path=own, include_defaults=False)
    if manager is None or not all(manager.match_tasks([task]) for task in settings.tasks):
        manager = TaskManager(include_path=own)
    unknown = [task for task in settings.tasks if not manager.match_tasks([task])]
    if unknown:
        rule = f"is none of the {len(manager.all_tasks)} that lm-eval knows here"
        raise InputError(f"the task {unknown[0]}", rule, "correct evaluate.lm_eval")
    return manager


def paired(found: Mapping[str, Any]) -> Results:
    """What `lm_eval.simple_evaluate` found, as items that can be paired with those of another model.

    What a sample's number means is told by the task's own: samples are a mean's if their mean is the task's number, and a
    perplexity's if the exponential of their mean is.
    """
    items, unpaired = dict[str, Items](), list[str]()
    for task, samples in found["samples"].items():
        numbers = {name: value for name, value in found["results"][task].items() if isinstance(value, float | int)}
        by_filter = defaultdict[str, list[Mapping[str, Any]]](list)
        for sample in samples:
            by_filter[sample["filter"]].append(sample)
        for filter_, of in by_filter.items():
            of.sort(key=lambda sample: sample["doc_id"])
            for metric in of[0]["metrics"]:
                name = f"{task}/{metric}" + (f" ({filter_})" if len(by_filter) > 1 else "")
                better = found["higher_is_better"][task].get(metric)
                whole = numbers.get(f"{metric},{filter_}")
                read = None if whole is None else _as_items([sample[metric] for sample in of], float(whole), better)
                if read is None:
                    unpaired.append(name)
                else:
                    items[name.replace(metric, f"log_{metric}") if read[0] else name] = read[1]
    for group, tasks in found.get("group_subtasks", {}).items():
        items |= _of_group(group, tasks, items)
    table = {**found["results"], **found.get("groups", {})}
    return Results(items, table, unpaired)


def _as_items(values: Sequence[Any], whole: float, better: bool | None) -> tuple[bool, Items] | None:
    """Samples whose mean is the task's number, or the logarithm of it; whether the latter, and the items; None: neither."""
    try:
        pairs = np.array([value if isinstance(value, tuple | list) else (value, 1) for value in values], dtype=float)
    except (TypeError, ValueError):
        return None
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not np.isfinite(pairs).all() or not (pairs[:, 1] > 0).all():
        return None
    total, weight = pairs.T
    plain = Items(total, weight, higher_is_better=better is not False)
    nats = Items(-total, weight, higher_is_better=False)
    bits = Items(-total / math.log(2), weight, higher_is_better=False)
    for logarithm, one in ((False, plain), (True, nats), (False, bits)):
        mean = one.mean()
        if math.isclose(math.exp(min(mean, 700)) if logarithm else mean, whole, rel_tol=_CLOSE, abs_tol=_CLOSE):
            return logarithm, one
    return None


def _of_group(group: str, tasks: Sequence[str], items: Mapping[str, Items]) -> dict[str, Items]:
    """The metrics that all of a group's tasks have, over the samples of all: each sample counts the same."""
    metrics = [{name.partition("/")[2] for name in items if name.startswith(f"{task}/")} for task in tasks]
    found = {}
    for metric in sorted(set.intersection(*metrics)) if metrics else ():
        of = [items[f"{task}/{metric}"] for task in tasks]
        total, weight = (np.concatenate(columns) for columns in zip(*((x.total, x.weight) for x in of), strict=True))
        found[f"{group}/{metric}"] = Items(total, weight, of[0].higher_is_better)
    return found
