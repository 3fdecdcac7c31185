"""The architecture, as tests: who may import whom, and that dvc.yaml depends on the code that its stages run."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
OURS = ("kernels", "rwkv_core", "tasks", "flows", "demo")

MAY_IMPORT = {
    "kernels": {"torch", "triton", "fla"},
    "rwkv_core": {
        "kernels", "torch", "pytorch_lightning", "lightning_utilities", "numpy", "pydantic", "safetensors", "pyrwkv_tokenizer",
        "tokenizers", "rich", "jinja2", "markupsafe", "bitsandbytes", "deepspeed", "peft", "gguf", "filelock", "pyarrow",
        "huggingface_hub", "lm_eval",
        "rwkv", "llama_cpp", "transformers",  # clients that conformance runs
    },
    "tasks": {
        "rwkv_core", "mlflow", "prefect", "pydantic", "ruamel", "filelock", "psutil", "numpy", "torch", "distributed",
        "wandb",
    },
    "flows": {
        "tasks", "rwkv_core", "prefect", "httpx", "dvc", "networkx", "typer", "rich", "psutil", "ruamel", "mlflow", "filelock",
        "matplotlib", "pydantic", "pynvml", "fastapi", "uvicorn",
    },
    "demo": {"tasks", "rwkv_core", "torch", "pydantic"},
}  # fmt: skip


def imports(file: Path) -> list[tuple[int, str]]:
    """Every module that the file imports, wherever in it, by line; `from a import b` counts as a.b too."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute here"
            found += [(node.lineno, node.module), *((node.lineno, f"{node.module}.{a.name}") for a in node.names)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "implementation":
            # kernels.choice.implementation("wkv7", ...): one of that operator's forms
            forms = (ROOT / "kernels").glob(f"{ast.literal_eval(node.args[0])}_*.py")
            found += [(node.lineno, f"kernels.{form.stem}") for form in sorted(forms)]
    return found


def module_file(name: str) -> Path | None:
    path = ROOT.joinpath(*name.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file
    return None


def has_code(file: Path) -> bool:
    """An __init__.py with a docstring alone has nothing that could change a result."""
    return any(not isinstance(n, ast.Expr) for n in ast.parse(file.read_text(encoding="utf-8")).body)


def closure(file: Path, seen: set[Path]) -> set[Path]:
    """Our own files that run when `file` does."""
    if file in seen:
        return seen
    seen.add(file)
    for _, name in imports(file):
        parts = name.split(".")
        if parts[0] in OURS:
            for i in range(1, len(parts) + 1):
                inner = module_file(".".join(parts[:i]))
                if inner is not None and has_code(inner):
                    closure(inner, seen)
    return seen


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_a_layer_imports_only_what_it_may(layer):
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in sorted((ROOT / layer).rglob("*.py"))
        for line, name in imports(file)
        if name.split(".")[0] not in sys.stdlib_module_names | MAY_IMPORT[layer] | {layer}
    ]
    assert not wrong, f"{wrong}; {layer} may import only {sorted(MAY_IMPORT[layer])}"


def stages():
    for file in ("dvc.yaml", "demo/dvc.yaml"):
        for name, stage in YAML(typ="safe").load(ROOT / file)["stages"].items():
            yield pytest.param(file, stage, id=f"{file}:{name}")


@pytest.mark.parametrize(("file", "stage"), list(stages()))
def test_a_stage_depends_on_exactly_the_code_it_runs(file, stage):
    """Less, and DVC would call a result current after its code had changed; more, and it would repeat work for nothing.

    `kernels` may be named as one, where not all of its operators are run.
    """
    module = stage["cmd"].split()[-1]
    needs = {f.relative_to(ROOT) for f in closure(module_file(module), set())}
    code = [Path(d) for d in stage["deps"] if Path(d).parts[0] in OURS and "outputs" not in Path(d).parts]
    missing = sorted(str(f) for f in needs if not any(f.is_relative_to(d) for d in code))
    assert not missing, f"{file}: {module} runs {missing} but does not depend on them"
    held = {
        f.relative_to(ROOT)
        for d in code
        if d != Path("kernels")
        for f in ([ROOT / d] if (ROOT / d).is_file() else (ROOT / d).rglob("*.py"))
    }
    extra = sorted(str(f) for f in held - needs if f.suffix == ".py" and has_code(ROOT / f))
    assert not extra, f"{file}: {module} depends on {extra} but does not run them"


def test_stages_stand_in_the_order_they_run():
    made: set[str] = set()
    for stage in YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"].values():
        later = [d for d in stage["deps"] if str(d).startswith("outputs/") and d not in made]
        assert not later, f"{later} are made further down"
        outs = [*stage.get("outs", []), *stage.get("metrics", []), *stage.get("plots", [])]
        made |= {next(iter(out)) if isinstance(out, dict) else out for out in outs}


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("kernels", {"torch"}),
        ("rwkv_core", {"torch", "numpy"}),
        ("rwkv_core.config", {"torch", "numpy"}),
        ("tasks.stage", {"torch", "prefect", "mlflow", "dvc"}),
        ("tasks.prepare", {"torch", "prefect", "mlflow", "dvc"}),
        ("tasks.merge", {"pytorch_lightning", "prefect", "mlflow", "dvc", "matplotlib"}),
        ("tasks.evaluate", {"pytorch_lightning", "prefect", "mlflow", "dvc", "matplotlib"}),
        ("tasks.train", {"prefect", "mlflow", "dvc", "scipy", "transformers", "matplotlib"}),
        (
            "rwkv_core.models",
            {"pytorch_lightning", "safetensors", "pydantic", "ninja", "triton", "fla", "prefect", "mlflow", "dvc"},
        ),
        ("rwkv_core.adapters", {"pytorch_lightning", "pydantic", "bitsandbytes", "peft", "transformers"}),
        (
            "rwkv_core.training.fit",
            {"prefect", "mlflow", "dvc", "deepspeed", "bitsandbytes", "fla", "scipy", "transformers"},
        ),
        ("flows.cli", {"torch", "prefect", "mlflow", "dvc"}),
    ],
)
def test_importing_is_light(module, heavy):
    """A stage pays for what it uses, and a library user for no orchestrator."""
    code = f"import sys, {module}; print(*sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_no_file_is_named_for_nothing():
    names = {f.name for layer in OURS for f in (ROOT / layer).rglob("*.py")}
    assert not names & {"utils.py", "common.py", "helpers.py", "base.py", "misc.py"}
