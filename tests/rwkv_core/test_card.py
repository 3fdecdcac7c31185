import json
import re
from pathlib import PurePath

import pytest
from reports import COMPARISON, EVIL, EVILS, FULL, MEASURES

from rwkv_core import card
from rwkv_core.config import CardConfig
from rwkv_core.texts import TEXTS

hub = pytest.importorskip("huggingface_hub")

SETTINGS = CardConfig(license="apache-2.0", languages=("en", "zh"), base_model=None, datasets=("me/my-data",))
SILENT = CardConfig(license=None, languages=(), base_model=None, datasets=())
SECRET = "/home/someone/secret place"


def entry(file, **more):
    return {"file": file, "sha256": "ab" * 32, "bytes": 35_498_481, **more}


STATE = {"state": entry("state.pth")}
FORMATS = {"pth": entry("model.pth"), "st": entry("model.st"), "gguf-f16": entry("model-f16.gguf"), "hf": entry("hf")}


def subject(formats=FORMATS, comparison=FULL, base="RWKV-x070-World-0.1B-v2.8-20241210-ctx4096.pth", **changes):
    made = card.Subject(
        base={"path": f"{SECRET}/{base}", "version": "7", "n_layer": 12},
        kind="lora",
        source=PurePath(f"{SECRET}/answers.jsonl"),
        tokenizer="world",
        conformance={"formats": formats},
        comparison=comparison,
        facts=[(TEXTS["data"], [(TEXTS["source"], PurePath(f"{SECRET}/answers.jsonl")), (TEXTS["rows"], "924")])],
        lineage=[(TEXTS["base_hash"], "cd" * 32), (TEXTS["host"], "my-laptop, Linux"), (TEXTS["commit"], "ef" * 20)],
    )
    return made._replace(**changes)


def read(text):
    """As the hub reads it; its parser raises if the head is no YAML, or the results are not of the hub's form."""
    return hub.ModelCard(text)


def test_the_hub_reads_it():
    data = read(card.text(subject(), SETTINGS)).data
    assert data.base_model == "BlinkDL/rwkv-7-world"
    assert data.license == "apache-2.0"
    assert data.language == ["en", "zh"]
    assert data.datasets == ["me/my-data"]
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["rwkv", "rwkv7", "gguf", "lora"]
    results = {(result.dataset_name, result.metric_type): result for result in data.eval_results}
    assert len(results) == 3 + sum(map(len, MEASURES.values()))
    assert results["answers.jsonl, held out", "perplexity"].metric_value == 5.0784
    assert results["lm-eval: piqa/acc", "acc"].metric_value == 0.655
    assert {result.task_type for result in results.values()} == {"text-generation"}


def test_what_is_not_known_is_not_said():
    data = read(card.text(subject({"pth": FORMATS["pth"]}, None, base="mine.pth"), SILENT)).data.to_dict()
    assert data == {
        "library_name": "rwkv", "pipeline_tag": "text-generation", "tags": ["rwkv", "rwkv7", "lora"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("RWKV-x070-World-1.5B-v3-20250127-ctx4096.pth", "BlinkDL/rwkv-7-world"),
        ("rwkv7-g1-1.5b-20250429-ctx4096.pth", "BlinkDL/rwkv7-g1"),
        ("rwkv7a-g1b-0.1b-20250819-ctx4096.pth", "BlinkDL/rwkv7-g1"),
        ("RWKV-x060-World-1B6-v2.1-20240328-ctx4096.pth", "BlinkDL/rwkv-6-world"),
        ("RWKV-5-World-1B5-v2-20231025-ctx4096.pth", "BlinkDL/rwkv-5-world"),
        ("RWKV-4-World-0.4B-v1-20230529-ctx4096.pth", "BlinkDL/rwkv-4-world"),
        ("base.pth", None), ("my-RWKV-x070-World.pth", None),
    ],
)  # fmt: skip
def test_a_base_is_known_by_the_name_it_was_released_under(name, repository):
    assert card.release(name) == repository
    head = read(card.text(subject(base=name), SILENT)).data
    assert head.base_model == repository
    named = SILENT.model_copy(update={"base_model": "someone/else"})
    assert read(card.text(subject(base=name), named)).data.base_model == "someone/else"


@pytest.mark.parametrize("comparison", [FULL, COMPARISON, None])
def test_no_place_on_a_machine_is_told(comparison):
    measures = {
        "sources": {
            f"{SECRET}/a.jsonl": MEASURES["general"]["wiki.txt"],
            f"{SECRET}/b": MEASURES["general"]["wiki.txt"],
        }
    }
    given = comparison and comparison | {"measures": measures}
    text = card.text(subject(comparison=given, tokenizer=f"{SECRET}/tokens.json"), SETTINGS)
    assert "secret" not in text
    assert "someone" not in text
    assert "my-laptop" not in text
    assert "answers.jsonl" in text
    assert ("a.jsonl" in text.replace("answers.jsonl", "")) == (comparison is not None)


def test_two_of_a_name_are_two():
    one, other = MEASURES["general"]["wiki.txt"], MEASURES["sources"]["support.jsonl"]
    measures = {
        "sources": {"/a/x": one, "/b/x": other},
        "lm_eval": {"piqa/acc": one, "arc/acc": other, "/d/arc/acc": one},
    }
    text = card.text(subject(comparison=COMPARISON | {"measures": measures}), SETTINGS)
    for name in (
        "By source: x |",
        "By source: x (2) |",
        "lm-eval: piqa/acc |",
        "lm-eval: arc/acc |",
        "lm-eval: arc/acc (2) |",
    ):
        assert f"| {name}" in text


@pytest.mark.parametrize("form", FORMATS)
def test_each_file_has_a_way_to_be_loaded(form):
    text = card.text(subject({form: FORMATS[form]}), SETTINGS)
    words = {
        "pth": ["### RWKV Runner", "### The rwkv package", 'RWKV(model="model"', 'os.environ["RWKV_V7_ON"] = "1"'],
        "st": ["### Ai00", 'name = "model.st"'],
        "gguf-f16": ["### llama.cpp", "-m model-f16.gguf", "### Ollama", "FROM ./model-f16.gguf"],
        "hf": ["### Transformers", 'folder = "hf"', "import fla"],
    }
    for other, expected in words.items():
        assert all((each in text) == (other == form) for each in expected), other
    assert f"| {FORMATS[form]['file']} |" in text


def test_several_of_a_kind_are_one_way_to_load():
    formats = {"gguf-f16": entry("model-f16.gguf"), "gguf-q8_0": entry("model-q8_0.gguf")}
    text = card.text(subject(formats), SETTINGS)
    assert text.count("### Ollama") == 1
    assert text.count("| llama.cpp, Ollama |") == 2


@pytest.mark.parametrize(("mode", "words"), [("full", "computed the logits"), ("structure", "no logits were computed")])
def test_it_says_how_the_files_were_proved(mode, words):
    verdict = {"mode": mode, "files": [{"file": "model.pth", "reader": "rwkv 0.8.32"}]}
    text = card.text(subject(conformance={"formats": FORMATS, "conformance": verdict}), SETTINGS)
    assert words in text
    assert "| 35.5 MB | rwkv 0.8.32 |" in text
    assert "Each was read back" in card.text(subject(), SETTINGS)
    assert "It has not been exported yet." in card.text(subject({}), SETTINGS)


def test_python_in_it_is_python():
    text = card.text(subject(), SETTINGS)
    text += card.text(subject(tokenizer="/x/\")\nimport os\n#'``` tokens.json"), SETTINGS)
    blocks = re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        compile(block, "card", "exec")


def test_a_tuned_state_is_told_of():
    formats = {"pth": entry("model.pth", state=entry("state.pth")), "st": entry("model.st", state=entry("model.state"))}
    text = card.text(subject(formats), SETTINGS)
    assert "choose `state.pth` as the state model" in text
    assert 'path = "assets/models/model.state"' in text
    assert "| model.state | Ai00, web-rwkv, RWKV Runner (WebGPU): the tuned state |" in text
    assert "[[state]]" not in card.text(subject(), SETTINGS)


def test_it_says_what_was_measured_and_what_was_not():
    text = card.text(subject(), SETTINGS)
    assert "> Better on the held-out documents, worse on other measures. On 321 held-out documents" in text
    assert "It has forgotten some of what the base knew" in text
    assert "| Answers: exactly right | 31.0% | 58.0% | +27.0 pp | +18.0 pp to +36.0 pp | 120 | better |" in text
    assert "Not measured" not in text
    assert "Not measured: By source, General text, Answers" in card.text(subject(comparison=COMPARISON), SETTINGS)
    assert "It was not evaluated." in card.text(subject(comparison=None), SETTINGS)


def test_another_tokenizer_is_named():
    assert "must be given its tokenizer, tokens.json" in card.text(subject(tokenizer="x/tokens.json"), SETTINGS)
    assert "must be given" not in card.text(subject(), SETTINGS)


@pytest.mark.parametrize("evil", [*EVILS, EVIL, 'a": b\n---\n# x', "'\" \\ \t: - [ {", "\u2028\ud800\ufffe\x7f"])
def test_what_comes_from_outside_is_text(evil):
    measures = {group: {evil: next(iter(of.values()))} for group, of in MEASURES.items()}
    facts = [(TEXTS["data"], [(TEXTS["source"], evil)])]
    made = subject(
        comparison=COMPARISON | {"measures": measures}, base=f"{evil.replace('/', '')}.pth", kind=evil, facts=facts,
        source=PurePath(evil), tokenizer=evil, lineage=[(TEXTS["run"], evil)],
    )  # fmt: skip
    text = card.text(made, SETTINGS)
    text.encode()
    parsed = read(text)
    assert parsed.data.license == "apache-2.0"
    assert all(isinstance(result.metric_value, float) for result in parsed.data.eval_results)
    code = re.compile(r"```\w+\n.*?\n```|`[^`\n]*`", re.DOTALL)
    words = code.sub("", parsed.text)
    assert "<" not in words
    assert "](" not in words.replace("\\](", "")
    assert not [line for line in words.split("\n") if line == "# x"]
    assert "\u202e" not in text


def test_settings_of_the_card_are_plain(tmp_path):
    evil = SILENT.model_copy(update={"license": "a: b\n# c", "languages": ('"', "- x"), "datasets": ("[", "{")})
    data = read(card.text(subject(), evil)).data
    assert data.license == "a: b # c"
    assert data.language == ['"', "- x"]
    assert data.datasets == ["[", "{"]


def test_yaml_is_what_json_is():
    yaml = pytest.importorskip("yaml")
    value = {"a": [{"b": {"c": 1.5, "d": ["x", "y: z"]}}, {"e": None}], "f": "- no", "g": {"h": [1, 2]}}
    assert yaml.safe_load("\n".join(card._yaml(value))) == json.loads(json.dumps(value))
