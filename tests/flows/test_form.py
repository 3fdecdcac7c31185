"""The form of a training: what it asks is what rwkv_core.config and params.yaml say, and what is answered is confined."""

from pathlib import Path
from typing import Any, get_args

import pytest
from ruamel.yaml import YAML

from flows import form
from rwkv_core.config import AdapterConfig
from rwkv_core.errors import InputError
from tasks import params

ROOT = Path(__file__).parents[2]


def values() -> Any:
    return YAML(typ="safe").load((ROOT / "params.yaml").read_text())


def setting(dotted: str) -> tuple[Any, Any]:
    """The field of a config class, and the value in params.yaml."""
    section, value = params.Params, values()
    *parents, last = dotted.split(".")
    for name in parents:
        section, value = section.model_fields[name].annotation, value[name]
    return section.model_fields[last], value[last]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    root.mkdir()
    (root / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    return root


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("dotted", [name for name in (*form.TRAINING, *form.EVALUATION) if name != "adapter"])
def test_a_field_is_the_setting_s_own(dotted: str):
    titles = form.TRAINING if dotted in form.TRAINING else form.EVALUATION
    shown = form.schema(ROOT, titles)["properties"][dotted]
    field, value = setting(dotted)
    assert words(field.description or "") in shown["description"]
    assert shown["description"].endswith(f"({dotted})")
    assert shown.get("default") == value
    assert {"type", "title", "position"} <= shown.keys()
    for bound, key in (("ge", "minimum"), ("gt", "exclusiveMinimum"), ("le", "maximum"), ("lt", "exclusiveMaximum")):
        inner = [
            *field.metadata,
            *(m for part in get_args(field.annotation) for m in getattr(part, "__metadata__", ())),
        ]
        limits = [getattr(m, bound) for m in _unpacked(inner) if hasattr(m, bound)]
        assert [shown[key]] == limits if key in shown else not limits
        assert all(f"{limit}" in shown["description"] for limit in limits)


def _unpacked(metadata: list[Any]) -> list[Any]:
    return [m for found in metadata for m in (found.metadata if hasattr(found, "metadata") else [found])]


def test_every_kind_of_adapter_has_its_own_settings():
    kinds = form.schema(ROOT, form.TRAINING)["properties"]["adapter"]["anyOf"]
    sections = {get_args(s.model_fields["kind"].annotation)[0]: s for s in get_args(get_args(AdapterConfig)[0])}
    assert kinds[0]["title"] == values()["adapter"]["kind"]
    assert {kind["title"] for kind in kinds} == sections.keys()
    for kind in kinds:
        section = sections[kind["title"]]
        assert kind["properties"].keys() == section.model_fields.keys()
        for name, field in section.model_fields.items():
            if name != "kind":
                assert words(field.description) in kind["properties"][name]["description"]
            if "default" in kind["properties"][name] and name != "kind":
                assert kind["properties"][name]["default"] == values()["adapter"][name]
    lora, full, state = (next(k for k in kinds if k["title"] == t) for t in ("lora", "full", "state"))
    assert lora["required"] == ["kind"]
    assert full["required"] == ["kind", "also"]  # params.yaml's own, none, would not do
    assert "default" not in state["properties"]["state"]


def test_the_schema_is_one_that_prefect_takes():
    from prefect.utilities.schema_tools.validation import is_valid_schema, validate

    from flows.pipeline import pipeline

    schema = form.parameters(pipeline.parameters.model_dump(exclude_unset=True), ROOT, form.TRAINING)
    is_valid_schema(schema)
    assert [f["position"] for f in schema["properties"].values()] == list(range(len(schema["properties"])))
    assert schema["properties"]["targets"]["type"] == "array"

    def refused(**settings: Any) -> list[str]:
        return [error.message for error in validate({"settings": settings}, schema)]

    assert not refused()
    assert not refused(**{"adapter": {"kind": "bone", "rank": 4}, "train.epochs": 0.5, "more": ["seed=1"]})
    assert "0 is less than the minimum of 1" in refused(**{"train.micro_batch": 0})[0]
    assert "is not one of" in refused(**{"model.base": "/etc/passwd"})[0]
    assert "is not one of" in refused(**{"train.precision": "fp8"})[0]
    assert refused(adapter={"kind": "bone", "alpha": 3})
    assert refused(more=["no equals sign"])


def test_the_bases_are_those_in_models(project: Path):
    (project / "models/folder").mkdir(parents=True)
    for name in ("b.pth", "a.safetensors", "c.st", "b.pth.dvc", ".gitignore", "notes.txt"):
        (project / "models" / name).touch()
    field = form.schema(project, form.TRAINING)["properties"]["model.base"]
    here = ["models/a.safetensors", "models/b.pth", "models/c.st", "models/folder"]
    assert field["enum"] == [*here, values()["model"]["base"]]
    assert field["default"] == values()["model"]["base"]


def test_only_what_is_other_is_an_override(project: Path):
    everything = {name: setting(name)[1] for name in form.TRAINING if name != "adapter"}
    assert form.overrides(everything | {"adapter": values()["adapter"]}, project) == {}
    assert form.overrides({}, project) == {}
    given = everything | {"train.ctx_len": 64, "adapter": values()["adapter"] | {"rank": 4}}
    assert form.overrides(given, project) == {"train.ctx_len": 64, "adapter.rank": 4}


def test_another_kind_of_adapter_takes_over_what_it_shares(project: Path):
    changed = form.overrides({"adapter": {"kind": "bone", "rank": 4}}, project)
    old = values()["adapter"]
    same = {name: old[name] for name in ("targets", "layers", "also", "state", "load")}
    assert changed == {"adapter": {"kind": "bone", "rank": 4} | same}
    state = form.overrides({"adapter": {"kind": "state", "state": "wkv"}}, project)["adapter"]
    assert state == {"kind": "state", "state": "wkv", "layers": "all", "also": [], "load": None}
    pissa = form.overrides({"adapter": {"kind": "pissa", "iterations": 4}}, project)["adapter"]
    assert pissa["load_init"] is None
    assert pissa["rank"] == old["rank"]


def test_a_run_has_one_end(project: Path):
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(
        text.replace("epochs: 2\n", "epochs: null\n").replace("steps: null", "steps: 7")
    )
    assert form.overrides({"train.epochs": 1}, project) == {"train.steps": None, "train.epochs": 1}
    assert form.overrides({"more": ["train.tokens=900"]}, project) == {"train.steps": None, "train.tokens": 900}
    assert form.overrides({"train.ctx_len": 64}, project) == {"train.ctx_len": 64}


def test_other_settings_are_text(project: Path):
    more = ["train.saves.keep_best=3", "adapter.targets=[att.key]", "train.mix={}", "data.parts=null"]
    assert form.overrides({"more": more}, project) == {
        "train.saves.keep_best": 3,
        "adapter.targets": ["att.key"],
        "data.parts": None,
    }
    with pytest.raises(InputError, match=r"train\.epohcs: there is no such setting"):
        form.overrides({"more": ["train.epohcs=3"]}, project)
    with pytest.raises(InputError, match="must be a setting and its value"):
        form.overrides({"more": ["train.epochs"]}, project)
    with pytest.raises(InputError, match=r"adapter\.kind = dora"):
        form.overrides({"adapter": {"kind": "dora"}}, project)


@pytest.mark.parametrize(
    "path", ["../other.jsonl", "/etc/passwd", "data/../../other.jsonl", "link/rows.jsonl", "/proc/self/environ"]
)
@pytest.mark.parametrize("name", ["data.source", "model.base", "adapter.load", "data.tokenizer"])
def test_a_path_that_leads_out_is_refused(project: Path, name: str, path: str):
    (project.parent / "outside").mkdir()
    (project / "link").symlink_to(project.parent / "outside")
    with pytest.raises(InputError, match="must be inside the project") as error:
        form.overrides({"more": [f"{name}={path}"]}, project)
    assert name in str(error.value)
    if name == "adapter.load":
        with pytest.raises(InputError, match="must be inside the project"):
            form.overrides({"adapter": {"kind": "bone", "load": path}}, project)
    if name != "data.tokenizer":
        with pytest.raises(InputError, match="must be inside the project"):
            form.overrides({name: path}, project)


def test_a_sweep_s_paths_are_confined_too(project: Path):
    from flows.arms import Range
    from flows.sweep import Sweep, _confine

    outside = "../secret.jsonl"
    _confine(Sweep(name="s", grid={"data.source": ["a.jsonl"], "adapter.rank": [1, 2]}), project)
    for change in (
        {"grid": {"data.source": ["a.jsonl", outside]}},
        {"fixed": {"model.base": outside}},
        {"fixed": {"adapter": {"kind": "bone", "load": outside}}},
        {"fixed": {"model": {"base": outside}}},
        {"random": {"count": 1, "seed": 0, "space": {"data.source": Range(choices=[outside])}}},
    ):
        with pytest.raises(InputError, match="must be inside the project"):
            _confine(Sweep.model_validate({"name": "s", "grid": {"seed": [1]}} | change), project)


def test_a_path_inside_is_one_from_the_project(project: Path):
    (project / "data").mkdir()
    assert form.overrides({"data.source": str(project / "data/x.jsonl")}, project) == {"data.source": "data/x.jsonl"}
    assert form.overrides({"data.source": "data/../y.jsonl"}, project) == {"data.source": "y.jsonl"}
    assert form.overrides({"more": ["data.tokenizer=bytes"]}, project) == {"data.tokenizer": "bytes"}


def test_the_values_params_yaml_has_are_not_judged(project: Path):
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(
        text.replace("source: demo/outputs/corpus.jsonl", "source: /data/corpus.jsonl")
    )
    assert form.overrides({"data.source": "/data/corpus.jsonl"}, project) == {}


@pytest.mark.parametrize(("run", "name"), [("Swift Otter", "swift-otter-0123abcd"), ("../x;y", "x-y-0123abcd")])
def test_an_experiment_is_named_as_its_run(run: str, name: str):
    assert form.experiment_name(run, "0123abcd-0000") == name
