import pytest
from reports import CHANGE, COMPARISON, FULL, MEASURES, measure

from rwkv_core import verdict
from rwkv_core.texts import TEXTS

NO_CHANGE = COMPARISON | {"better": 0, "change": {name: {"value": 0.0, "low": -0.1, "high": 0.1} for name in CHANGE}}
WORSE = COMPARISON | {"better": -1, "change": {name: {"value": 0.3, "low": 0.1, "high": 0.4} for name in CHANGE}}
ANSWERED = {"answers": {"f1": measure(50, 0.4, 0.7, 0.1, higher_is_better=True)}}
FORGOT = {"general": {"wiki.txt": measure(50, 2.8, 2.95, 0.05)}}


def points(found):
    return " ".join(text.en for _, text in found.points)


@pytest.mark.parametrize(
    ("comparison", "measures", "headline", "tone", "advice"),
    [
        (COMPARISON, {}, "is_better", "better", "do_use"),
        (COMPARISON, ANSWERED, "is_better", "better", "do_use"),
        (COMPARISON, FORGOT, "is_mixed", "mixed", "do_weigh"),
        (COMPARISON, {"memorised": MEASURES["memorised"]}, "is_mixed", "mixed", "do_weigh"),
        (WORSE, {}, "is_worse", "worse", "do_not_use"),
        (WORSE, ANSWERED, "is_worse", "worse", "do_not_use"),
        (NO_CHANGE, {}, "is_same", "same", "do_more"),
        (NO_CHANGE, ANSWERED, "is_better_but", "better", "do_use"),
        (NO_CHANGE, FORGOT, "is_worse_but", "worse", "do_not_use"),
        (NO_CHANGE, ANSWERED | FORGOT, "is_worse_but", "mixed", "do_weigh"),
        (COMPARISON | {"documents": 9, "better": 0}, {}, "few", "same", "do_more"),
        (COMPARISON | {"documents": 9, "better": 0}, FORGOT, "few", "same", "do_more"),
    ],
)
def test_the_headline_says_no_more_than_was_measured(comparison, measures, headline, tone, advice):
    found = verdict.judge(comparison | {"measures": measures}, [])
    assert (found.headline, found.tone) == (TEXTS[headline], tone)
    assert found.advice[0] == TEXTS[advice]


@pytest.mark.parametrize(
    ("better", "english", "chinese"),
    [(1, "better than", "优于"), (-1, "worse than", "劣于"), (0, "not distinguishable from", "无法区别于")],
)
def test_the_sentence(better, english, chinese):
    sentence = verdict.sentence(COMPARISON | {"better": better})
    assert sentence.en == (
        f"On 321 held-out documents (98,765 tokens) the tuned model is {english} its base: the loss goes from 2.1250 to 1.6250 "
        "nats a token, a change of -0.5000 (95% interval -0.6251 to -0.4000)."
    )
    assert sentence.zh == (
        f"在 321 个留出文档（98,765 个词元）上，微调模型{chinese}基座模型：每词元损失从 2.1250 变为 1.6250 奈特，变化 -0.5000"
        "（95% 区间 -0.6251 至 -0.4000）。"
    )


def test_forgetting_is_named_first_and_with_its_size():
    found = verdict.judge(FULL, [])
    tone, text = found.points[1]
    assert tone == "worse"
    assert text.en == (
        "It has forgotten some of what the base knew: the loss on wiki.txt rises by +0.1400 (+0.0900 to +0.1900)."
    )


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (
            measure(50, 2.8, 2.81, 0.05),
            "No forgetting was found: the loss on wiki.txt rises by 0.0600 nats",
        ),
        (measure(50, 2.8, 2.5, 0.05), "No forgetting was found: the loss on wiki.txt falls."),
        (measure(9, 2.8, 3.5, 0.05), "Whether it forgets is open: wiki.txt has too few items"),
    ],
)
def test_what_is_not_shown_of_forgetting_is_said_to_be_so(entry, words):
    found = verdict.judge(COMPARISON | {"measures": {"general": {"wiki.txt": entry}}}, [])
    assert words in points(found)
    assert "has forgotten" not in points(found)


def test_every_group_has_a_sentence_and_every_measure_is_in_it():
    text = points(verdict.judge(FULL, []))
    assert (
        "By source: better on support.jsonl (3.1000 to 2.2000), 文档/手册.jsonl (2.9000 to 2.7000); no difference shown on "
        "poems.jsonl; too few items for a verdict on tiny.jsonl (fewer than 10)."
    ) in text
    assert "Memorisation: worse on passages continued word for word (1.0% to 5.5%)." in text
    for name in (
        "exactly right",
        "words in common",
        "right choice",
        "ends by itself",
        "lambada/log_perplexity",
        "piqa/acc",
    ):
        assert name in text


def test_the_worst_of_a_group_gives_its_tone():
    tones = {text.en.partition(":")[0]: tone for tone, text in verdict.judge(FULL, []).points}
    assert tones["By source"] == "better"
    assert tones["Tasks"] == "worse"
    assert tones["lm-eval"] == "plain"


def test_what_was_not_measured_is_named_with_what_to_do():
    found = verdict.judge(COMPARISON | {"measures": ANSWERED | {"tasks": {}}}, [])
    assert found.unmeasured == [TEXTS[n] for n in ("sources", "general", "format", "memorised", "tasks", "lm_eval")]
    assert found.advice[-1] == TEXTS["do_measure"]
    full = verdict.judge(FULL, [])
    assert full.unmeasured == []
    assert TEXTS["do_measure"] not in full.advice


def test_too_few_documents_are_named_and_no_number_of_them_is_called_better():
    few = COMPARISON | {"documents": 9, "better": 0}
    found = verdict.judge(few, [])
    assert "9 documents are too few for a verdict, whatever the numbers say: 10 are the least." in points(found)
    assert found.sentence.en.startswith(
        "On 9 held-out documents (98,765 tokens), too few for a verdict, the loss goes from 2.1250"
    )
    assert [m.verdict for m in verdict.measures(few)] == ["too_few"] * 3


def test_many_comparisons_are_said_to_differ_by_chance():
    words = "13 measures were compared. Of so many, about 0.7 would seem to change by chance alone."
    assert words in points(verdict.judge(FULL, []))
    assert "by chance" not in points(verdict.judge(COMPARISON, []))


@pytest.mark.parametrize(
    ("valid", "step"),
    [
        ([(0, 3.0), (10, 2.0), (20, 2.2)], "10"),
        ([(0, 3.0), (10, 2.0), (20, 2.001)], None),  # no more than noise
        ([(0, 3.0), (10, 2.0)], None),
        ([], None),
    ],
)
def test_overfitting_is_told_from_the_curve(valid, step):
    found = verdict.judge(COMPARISON, valid)
    assert ("overfits" in points(found)) == (step is not None)
    assert (any(f"about step {step}." in text.en for text in found.advice)) == (step is not None)


def test_the_cost():
    cost = {"steps": 1200, "tokens": 160_780, "seconds": 5000, "bytes": 604_911}
    assert "It cost 1,200 steps of training over 160,780 tokens, 83 min; the adapter has 604.9 kB." in points(
        verdict.judge(COMPARISON, [], cost)
    )
    assert [verdict.time(s).en for s in (38.2, 119, 120, 7300)] == ["38 s", "119 s", "2 min", "2.0 h"]
    assert [verdict.size(n) for n in (0, 999, 1000, 35_498_481, 5e12)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "35.5 MB",
        "5000.0 GB",
    ]


@pytest.mark.parametrize(
    ("group", "name", "base", "tuned", "shown"),
    [
        ("answers", "f1", 0.42, 0.66, "66.0%"), ("tasks", "lambada acc", 0.4, 0.5, "50.0%"),
        ("tasks", "lambada/log_perplexity", 0.9, 0.8, "0.8000"), ("lm_eval", "wiki bits_per_byte", 0.9, 0.8, "0.8000"),
        ("lm_eval", "x score", 2.0, 0.8, "0.8000"), ("general", "b", 0.9, 0.8, "0.8000"), ("general", "a", 900.0, 80.0, "80.0"),
    ],
)  # fmt: skip
def test_shares_are_in_per_cent_and_losses_are_not(group, name, base, tuned, shown):
    found = verdict.measures(COMPARISON | {"measures": {group: {name: measure(50, base, tuned, 0.01)}}})[-1]
    assert found.shown(found.tuned) == shown


def test_one_source_is_all_there_is_and_not_said_twice():
    one = COMPARISON | {"measures": {"sources": {"all": measure(50, 3.0, 2.0, 0.1)}}}
    assert [m.group for m in verdict.measures(one)] == ["held_out"] * 3
    assert TEXTS["sources"] not in verdict.judge(one, []).unmeasured


def test_a_change_of_a_share_is_in_points():
    found = verdict.measures(FULL)[8]
    assert found.key == "exact_match"
    assert found.shown(found.value, change=True) == "+27.0 pp"
