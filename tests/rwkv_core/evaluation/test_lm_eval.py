"""lm-eval with a model of ours: against its own path for Hugging Face's RWKV-4, and our own measures of the same files."""

import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from byte_level_bpe import bpe
from random_models import make

from rwkv_core.config import LmEvalConfig
from rwkv_core.errors import InputError, WorldError
from rwkv_core.evaluation import task_files
from rwkv_core.evaluation.likelihood import Reader
from rwkv_core.evaluation.lm_eval import RWKVLM, paired, run
from rwkv_core.models.state import mount
from rwkv_core.tokenizer import bytes_tokenizer, pile

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "dog", "thought", "it", "was", "best", "of", "times")


def sentence(rng, words):
    return " ".join(rng.choices(WORDS, k=words))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Test sets as files, and tasks of lm-eval that read the same files, written as lm-eval's own are."""
    folder, rng = tmp_path_factory.mktemp("evaluation"), random.Random(0)
    passages = [{"text": sentence(rng, rng.randint(3, 30))} for _ in range(30)]
    questions = [
        {
            "question": sentence(rng, rng.randint(2, 12)),
            "choices": {"text": [sentence(rng, rng.randint(1, 5)) for _ in range(n)], "label": list("ABCDE"[:n])},
            "answerKey": rng.choice("ABCDE"[:n]),
        }
        for n in rng.choices((3, 4, 5), k=30)
    ]
    lambada = """
        doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
        doc_to_target: "{{' '+text.split(' ')[-1]}}"
        output_type: loglikelihood
        metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false},
                      {metric: acc, aggregation: mean, higher_is_better: true}]"""
    arc = """
        doc_to_text: "Question: {{question}}\\nAnswer:"
        doc_to_target: "{{choices.label.index(answerKey)}}"
        doc_to_choice: "{{choices.text}}"
        output_type: multiple_choice
        metric_list: [{metric: acc, aggregation: mean, higher_is_better: true},
                      {metric: acc_norm, aggregation: mean, higher_is_better: true}]"""
    rolling = """
        doc_to_text: ""
        doc_to_target: "{{text}}"
        output_type: loglikelihood_rolling
        metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]"""
    written = """
        doc_to_text: "{{text}}"
        doc_to_target: "{{text}}"
        output_type: generate_until
        generation_kwargs: {until: ["\\n", " the"], max_gen_toks: 6}
        metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]"""
    for name, rows, task in (
        ("lambada", passages, lambada), ("arc", questions, arc), ("rolling", passages, rolling), ("written", passages, written),
    ):  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(
            f"task: own_{name}\ndataset_path: json\ntest_split: test\n"
            f"dataset_kwargs: {{data_files: {{test: {folder / name}.jsonl}}}}\n"
            + "\n".join(line.removeprefix("        ") for line in task.splitlines())
        )
    (folder / "group.yaml").write_text("group: own_words\ntask: [own_lambada, own_arc]\n")
    return folder


TASKS = ("own_lambada", "own_arc", "own_written", "own_rolling")


@pytest.fixture(scope="module", autouse=True)
def _no_network(tmp_path_factory):
    import datasets
    import huggingface_hub.constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        datasets.disable_progress_bars()
        yield


def settings(folder, *tasks, **changes):
    return LmEvalConfig(**{"tasks": tasks, "include": folder, "limit": None, "num_fewshot": None} | changes)


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """The same RWKV-4 here and in transformers, and the same tokenizer; theirs begins each text with token 0, as ours does."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast, RwkvConfig, RwkvForCausalLM

    ours = make(version="4", vocab_size=264, seed=3).eval()
    renamed = {"att.": "attention.", "ffn.": "feed_forward.", "ln0": "pre_ln", "emb.": "embeddings."}
    renamed |= {
        f"time_mix_{short}": f"time_mix_{name}"
        for short, name in zip("kvr", ("key", "value", "receptance"), strict=True)
    }
    tensors = {}
    for name, x in ours.state_dict().items():
        for one, other in renamed.items():
            name = name.replace(one, other)
        tensors[name if name.startswith("head") else f"rwkv.{name}"] = x.clone()
    shape = {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 3, "bos_token_id": 0, "eos_token_id": 0}
    theirs = RwkvForCausalLM(RwkvConfig(**shape, intermediate_size=128, rescale_every=0, context_length=1024)).eval()
    theirs.load_state_dict(tensors)
    file = bpe(tmp_path_factory.mktemp("tokenizer") / "20B_tokenizer.json")
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), bos_token=end, eos_token=end, pad_token=end)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{end} $A", special_tokens=[(end, 0)])
    return Reader(ours, pile(file), ctx_len=16, batch=4), theirs, tokenizer


def test_numbers_are_those_of_lm_eval_s_own_path(twins, folder):
    """Every kind of request, sample by sample: tokens, seams, prefixes, stops and what is made of them."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    reader, model, tokenizer = twins
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    wanted, found = {}, {}
    for first, tasks in {True: TASKS[:3], False: TASKS[3:]}.items():  # a rolling text has a token 0 before it by itself
        theirs = HFLM(
            pretrained=model, tokenizer=tokenizer, add_bos_token=first, batch_size=1, max_length=1024, device="cpu"
        )
        for results, one in ((wanted, theirs), (found, RWKVLM(reader))):
            made = lm_eval.simple_evaluate(model=one, bootstrap_iters=0, tasks=list(tasks), task_manager=manager)
            results |= {task: (made["samples"][task], made["results"][task]) for task in tasks}
    for task in TASKS:
        for one, other in zip(wanted[task][0], found[task][0], strict=True):
            assert one["arguments"] == other["arguments"]
            if task == "own_written":
                assert one["resps"] == other["resps"]
            else:
                one, other = (np.array(x["resps"], float).ravel() for x in (one, other))
                np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
        numbers = {name: x for name, x in wanted[task][1].items() if isinstance(x, float)}
        assert numbers == pytest.approx({name: found[task][1][name] for name in numbers}, rel=1e-4)
    assert len({sample["resps"][0][0] for sample in found["own_written"][0]}) > 1


def test_our_own_numbers_of_the_same_files_are_lm_eval_s(twins, folder):
    reader, _, _ = twins
    found = run(reader, settings(folder, *TASKS[:2]))
    for task in ("lambada", "arc"):
        ours = task_files.measure(reader, task_files.read(folder / f"{task}.jsonl"))
        theirs = {
            name.partition("/")[2]: items for name, items in found.items.items() if name.startswith(f"own_{task}/")
        }
        assert ours.keys() == theirs.keys()
        for name, items in ours.items():
            np.testing.assert_allclose(items.total, theirs[name].total, rtol=1e-6)
            assert items.weight.tolist() == theirs[name].weight.tolist()
            assert items.higher_is_better == theirs[name].higher_is_better
    table = found.table
    assert math.exp(ours_mean(reader, folder)) == pytest.approx(table["own_lambada"]["perplexity,none"], rel=1e-6)
    assert 0 < found.items["own_arc/acc"].mean() < 1


def ours_mean(reader, folder):
    return task_files.measure(reader, task_files.read(folder / "lambada.jsonl"))["log_perplexity"].mean()


def test_items_are_what_lm_eval_s_own_numbers_are_made_of(twins, folder):
    reader, _, _ = twins
    found = run(reader, settings(folder, "own_rolling", "own_words"))
    table = found.table["own_rolling"]
    for name in ("word_perplexity", "byte_perplexity"):
        log = found.items[f"own_rolling/log_{name}"]
        assert math.exp(log.mean()) == pytest.approx(table[f"{name},none"], rel=1e-6)
        assert not log.higher_is_better
    assert found.items["own_rolling/bits_per_byte"].mean() == pytest.approx(table["bits_per_byte,none"])
    texts = [json.loads(line)["text"] for line in (folder / "rolling.jsonl").open()]
    assert found.items["own_rolling/bits_per_byte"].weight.tolist() == [len(text.encode()) for text in texts]
    both = [found.items[f"own_{task}/acc"] for task in ("lambada", "arc")]
    assert found.items["own_words/acc"].total.tolist() == [*both[0].total, *both[1].total]
    assert found.unpaired == []


def test_a_metric_of_a_whole_task_stays_in_the_table():
    """F1 is no mean over samples: they are pairs of what is right and what was said."""
    samples = [
        {"doc_id": i, "filter": "none", "metrics": ["f1", "acc"], "f1": (i % 2, i % 3 == 0), "acc": float(i % 3 == 0)}
        for i in (2, 0, 1, 3)
    ]
    results = {"own": {"alias": "own", "f1,none": 0.4, "acc,none": 0.5, "acc_stderr,none": "N/A"}}
    found = paired(
        {"samples": {"own": samples}, "results": results, "higher_is_better": {"own": {"acc": True, "f1": True}}}
    )
    assert found.unpaired == ["own/f1"]
    assert found.items["own/acc"].total.tolist() == [1, 0, 0, 1]  # in the documents' order
    assert found.table["own"]["f1,none"] == 0.4


def request(*words):
    return SimpleNamespace(args=words)


def test_a_tuned_state_takes_the_place_of_token_0():
    model = make(vocab_size=256).eval()
    generator = torch.Generator().manual_seed(1)
    state = {f"blocks.{i}.att.time_state": torch.randn(4, 8, 8, generator=generator) for i in range(3)}
    begin = mount(model.initial_state(1), state)
    asked = RWKVLM(Reader(model, bytes_tokenizer(), ctx_len=5, batch=2, begin=begin))
    text = b"It was the best"
    with torch.no_grad():
        logits, _ = model(torch.tensor([list(text)]), begin)
    log_p = torch.log_softmax(logits[0].double(), -1)
    each = [log_p[i - 1, text[i]].item() for i in range(1, len(text))]
    (found,) = asked.loglikelihood([request("It was the", " best")])
    assert found[0] == pytest.approx(sum(each[-5:]), rel=1e-5)
    assert asked.loglikelihood_rolling([request("It was the best")])[0] == pytest.approx(sum(each), rel=1e-5)
    assert asked.loglikelihood([request("", "It was the best")])[0][0] == pytest.approx(sum(each), rel=1e-5)
    written = asked.generate_until([request("It was the best", {"max_gen_toks": 1})])
    assert written == [bytes([int(log_p[-1].argmax())]).decode("utf-8", errors="replace")]


def test_what_is_drawn_and_where_it_ends_is_as_the_task_says():
    asked = RWKVLM(Reader(make(vocab_size=256).eval(), bytes_tokenizer(), ctx_len=8, batch=4))
    greedy, longer, drawn = asked.generate_until([
        request("the cat", {"until": ["\n"], "max_gen_toks": 4}),
        request("the cat", {"until": "\n", "max_new_tokens": 9, "do_sample": False, "temperature": 0.7}),
        request("the cat", {"max_gen_toks": 9, "do_sample": True, "temperature": 1.0}),
    ])  # fmt: skip
    assert longer.startswith(greedy.rstrip("\ufffd"))
    assert len(greedy) <= 4 < len(longer)
    assert drawn != longer
    stop = longer[3:5]
    (stopped,) = asked.generate_until([request("the cat", {"until": [stop], "max_gen_toks": 9})])
    assert stopped == longer[: longer.index(stop)]


def test_a_chat_is_as_clients_send_it():
    asked = RWKVLM(Reader(make(vocab_size=256), bytes_tokenizer(), ctx_len=8, batch=4))
    said = [
        {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello.\n\nWho are you?"},
        {"role": "assistant", "content": "A bird"},
    ]  # fmt: skip
    assert asked.apply_chat_template(said[:2]) == "System: Be kind.\n\nUser: Hello.\nWho are you?\n\nAssistant:"
    assert asked.apply_chat_template(said, add_generation_prompt=False).endswith("\n\nAssistant: A bird")


def test_wrong_tasks_are_told(twins, folder, tmp_path):
    reader, _, _ = twins
    with pytest.raises(InputError, match="no folder of tasks is there"):
        run(reader, settings(tmp_path / "no", "own_arc"))
    (tmp_path / "far.yaml").write_text(
        "task: far\ndataset_path: nobody/nothing\ntest_split: test\noutput_type: loglikelihood\n"
        "doc_to_text: '{{text}}'\ndoc_to_target: '{{text}}'\nmetric_list: [{metric: acc}]\n"
    )
    with pytest.raises(WorldError, match="the data of far"):
        run(reader, settings(tmp_path, "far"))


@pytest.mark.slow
def test_a_task_that_nobody_knows_is_told(twins, folder):
    """Slow: all of lm-eval's own are looked through."""
    reader, _, _ = twins
    with pytest.raises(InputError, match="the task own_nothing: is none of the 1"):
        run(reader, settings(folder, "own_arc", "own_nothing"))
