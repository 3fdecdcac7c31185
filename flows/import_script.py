"""Other trainers' shell scripts, as params.yaml: RWKV-PEFT's, TrainChatGal's, RWKV-LM's. `flows.flags` is the table of it."""

import io
import json
import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.representer import RoundTripRepresenter

from flows.flags import FATES, TOOLS, Flag, flags_of
from rwkv_core.errors import InputError
from tasks import params

Given = dict[str, list[str]]
"""The words after each flag of a script."""


class Imported(NamedTuple):
    """What became of a script."""

    tool: str
    """Whose script it is."""
    yaml: str
    """A whole params.yaml, with the notes as comments."""
    notes: list[str]
    """What is different here, what had no effect, what has no home."""


def import_script(script: Path, root: Path, tool: str | None = None) -> Imported:
    """Translate a script. What it does not say stays as params.yaml in `root` has it.

    Args:
        script: the shell script that starts the training.
        root: the repository.
        tool: letter of the tool that the script is of, see `flows.flags.TOOLS`; None: found from its flags.

    Raises:
        InputError: no training is started in it, or how can't be told without running it; or what it asks for is not valid.
    """
    try:
        text = script.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(str(script), "there is no such script", "name the .sh that starts the training") from None
    given = _flags(_training(text, script))
    letter = tool or _tool(given)
    settings, notes = translate(given, letter)
    yaml = YAML()
    yaml.width, yaml.Representer = 120, _Representer
    values = yaml.load(_template(root))
    for home, value in settings.items():
        _put(values, home.split("."), value)
    values.ca.comment = None
    body = io.StringIO()
    yaml.dump(values, body)
    head = [f"From {script.name}, a script of {TOOLS[letter]}; `rwkvflow import` made it. What is to know:", *notes]
    written = "".join(f"# {line}\n" for line in head) + body.getvalue()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{script.name} as params.yaml"
        path.write_text(written, encoding="utf-8")
        try:
            params.load(path)
        except InputError as error:
            raise InputError(str(script), error.rule, error.remedy) from None
    return Imported(TOOLS[letter], written, notes)


def translate(given: Given, tool: str) -> tuple[dict[str, Any], list[str]]:
    """Settings by their whole names, and notes: of what these flags of a tool are here.

    Raises:
        InputError: a flag's value is not one that the tool takes, or is not known here.
    """
    known = flags_of(tool)
    settings: dict[str, Any] = {
        "train.optimizer.kind": "adamw",
        "train.l2_wrap": 1e-4,
        "train.optimizer.grad_clip": 1.0,
    }
    notes: list[str] = []
    words: dict[str, str] = {name: flag.default for name, flag in known.items() if flag.default is not None}
    for said, values in given.items():
        longer = [other for other in known if other.startswith(said)]
        name = longer[0] if said not in known and len(longer) == 1 else said  # argparse takes a flag's beginning for it
        flag = known.get(name)
        if flag is None:
            notes.append(f"--{name} {' '.join(values)}: no flag of {TOOLS[tool]}; nothing was made of it")
            continue
        words[name] = " ".join(values)
        if line := _about(flag, words[name]):
            notes.append(line)
    for name, word in words.items():
        flag = known[name]
        if flag.fate == "moved" and flag.value is not None:
            settings[flag.home] = _read(name, word, flag.value)
    script = _Script(tool, given, words, settings, notes)
    for part in (_data, _rows, _length, _course, _method, _engine, _rest):
        part(script)
    return settings, notes


def _about(flag: Flag, word: str) -> str:
    """What is to say of a flag that a script has; nothing, where all is as it was."""
    said = f"--{flag.name} {word}".strip()
    if flag.fate == "moved":
        return f"{said}: {flag.home}; {flag.note}" if flag.note else ""
    return f"{said}: {FATES[flag.fate]}" + (f"; {flag.note}" if flag.note else "")


class _Script(NamedTuple):
    """One that is being translated: its flags, with defaults, and what has been made of them so far."""

    tool: str
    given: Given
    words: dict[str, str]
    settings: dict[str, Any]
    notes: list[str]

    def number(self, name: str, default: float) -> float:
        """A flag's value."""
        return _read(name, self.words.get(name) or str(default), float)  # type: ignore[no-any-return]

    def whole(self, name: str, default: int) -> int:
        """A flag's value."""
        return int(self.number(name, default))

    def mapping(self, name: str, default: Mapping[str, Any]) -> dict[str, Any]:
        """A flag's JSON. As in the tools, it replaces the default whole."""
        found = _read(name, self.words.get(name) or json.dumps(default), json.loads)
        if not isinstance(found, dict):
            raise InputError(f"--{name} {self.words[name]}", "must be a JSON object", 'write it like {"r":32}')
        return found

    def load(self, path: str) -> str | None:
        """Where an adapter to go on from is expected."""
        if not path:
            return None
        self.notes.append(f"{path}: copy it into start/, where dvc.yaml looks for what a run goes on from")
        return f"start/{Path(path).name}"


def _data(script: _Script) -> None:
    part: dict[str, Any] = {
        "name": "all", "files": "*", "kind": "auto", "columns": {}, "blank_lines": "collapse", "think": "as_given",
        "mask": "none", "marks": None, "weight": 1,
    }  # fmt: skip
    kind, file = script.words.get("data_type", "utf-8"), Path(script.words.get("data_file", ""))
    if str(file) != ".":
        if kind == "binidx":
            part |= {"kind": "binidx", "files": f"{file.name}.*"}
            script.settings["data.source"] = str(file.parent)
        else:
            script.settings["data.source"] = str(file)
            part["kind"] = kind if kind in ("jsonl", "utf-8", "utf-16le", "numpy", "uint16", "dummy") else "auto"
    if kind == "sft":
        fields = script.given.get("sft_field", ["instruction", "output"])
        part |= {"columns": dict(zip(("instruction", "output"), fields, strict=False)), "mask": "qa"}
        script.notes.append(
            f"--data_type sft: fetch the data set first: rwkvflow data fetch {file}; then name its folder"
        )
    match script.words.get("loss_mask"):
        case "qa":
            part["mask"] = "qa"
        case "se":
            marks = script.mapping("mask_id", {"mask0": "0", "mask1": "1"})
            part |= {"mask": "se", "marks": [marks.get("mask0"), marks.get("mask1")]}
    script.settings["data.parts"] = [part]
    match script.whole("vocab_size", 65536 if kind in ("binidx", "jsonl", "sft") else 0):
        case 65536:
            script.settings["data.tokenizer"] = "world"
        case 256:
            script.settings["data.tokenizer"] = "bytes"
        case size:
            script.notes.append(f"--vocab_size {size}: set data.tokenizer to the path of this vocabulary's tokenizer")


def _rows(script: _Script) -> None:
    settings, prime = script.settings, script.whole("magic_prime", 0)
    settings |= {"train.order": settings.get("train.order", "shuffled"), "train.carry_state": False, "train.mix": {}}
    if script.tool in "PQ":
        rows = {"pad": "pad", "only": "only", "get": "stream"}.get(script.words.get("dataload", "pad"))
        if rows is None:
            raise InputError(f"--dataload {script.words['dataload']}", "must be pad, only or get", "correct the script")
        settings["train.rows"] = rows
        if rows == "only" and settings["train.micro_batch"] != 1:
            script.notes.append("--dataload only: --micro_bsz is 1, as the tool could take no other")
            settings["train.micro_batch"] = 1
        if script.tool == "P" and not script.whole("data_shuffle", 1):
            settings["train.order"] = "as_given"
    elif prime:
        settings |= {"train.rows": "magic_prime", "train.order": "as_given"}
    else:
        settings["train.rows"] = "pad" if script.words.get("data_type") == "jsonl" else "stream"


def _length(script: _Script) -> None:
    """Optimizer steps that the script would do, whatever the size of its data."""
    ends: dict[str, Any] = {"epochs": None, "steps": None, "tokens": None}
    tokens = abs(script.whole("my_exit_tokens", 0))
    stage = max(script.whole("my_pile_stage", 0), script.whole("train_stage", 0))
    accumulate = script.settings["train.accumulate"]
    steps, count = _mini_epoch(script), script.whole("epoch_count", 500)
    if tokens and script.tool in "GL":
        ends["tokens"] = tokens
    elif stage and script.settings["train.rows"] == "magic_prime":
        ends["epochs"] = 1
        script.notes.append("a magic prime's run goes once through all rows: train.epochs is 1")
    else:
        ends["steps"] = max(int(steps * count) // accumulate, 1)
    if script.tool == "G":
        script.notes.append("TrainChatGal never stops by itself; here the run ends after --epoch_count")
    script.settings.update({f"train.{name}": value for name, value in ends.items()})


def _mini_epoch(script: _Script) -> Fraction:
    """Micro-batches of one, on each device."""
    devices, steps = script.whole("devices", 1) * script.whole("num_nodes", 1), script.whole("epoch_steps", 1000)
    if script.tool == "Q":
        return Fraction(math.ceil(steps / (script.settings["train.micro_batch"] * devices)))
    if script.tool == "L" and script.settings["train.rows"] == "magic_prime":
        return Fraction(40320, script.settings["train.micro_batch"] * devices)
    return Fraction(steps, devices)


def _engine(script: _Script) -> None:
    """Long contexts, several devices, and what is kept."""
    c, p, settings = "train.context.", "train.parallel.", script.settings
    ctx_len, parts = settings["train.ctx_len"], max(script.whole("ctx_parts", 1), 1)
    segment: int | None = None
    bptt: int | str = "exact"
    if script.tool in "PQ" and script.words.get("train_type") == "infctx":
        segment, bptt = script.whole("chunk_ctx", 512), 1
    elif script.whole("state_cp", 0) and parts > 1:
        segment, parts = math.ceil(ctx_len / parts), 1
    elif script.whole("state_cp", 0):
        script.notes.append("--state_cp 1: had no effect there without --ctx_parts")
    if segment is not None and segment >= ctx_len:
        segment, bptt = None, "exact"
    grows = script.whole("initial_ctx_len", 0) if script.whole("ctx_warmup_steps", 0) else 0
    if grows >= ctx_len or settings["adapter"]["state"] != "none":  # of nothing, or before a tuned state: not here
        grows = 0
    settings |= {
        c + "segment": segment, c + "bptt": bptt, c + "parts": parts, c + "initial_ctx_len": grows or None,
        c + "ctx_warmup_steps": script.whole("ctx_warmup_steps", 0) if grows else 0,
    }  # fmt: skip
    devices, nodes = max(script.whole("devices", 1), 1), max(script.whole("num_nodes", 1), 1)
    given = script.words.get("strategy", "auto")
    known = re.fullmatch(r"(deepspeed_stage_[123](?:_offload)?|fsdp|ddp).*", given)
    strategy = known[1] if known else "ddp"
    if devices * nodes == 1 and not strategy.endswith("offload"):
        strategy = "one_device"
    strategy = {"deepspeed_stage_1_offload": "deepspeed_stage_2_offload"}.get(strategy, strategy)
    settings |= {
        p + "strategy": strategy, p + "devices": None if strategy == "one_device" else devices, p + "nodes": nodes,
        p + "bucket_mb": script.whole("ds_bucket_mb", 25),
    }  # fmt: skip
    every = int(script.whole("epoch_save", 0) * _mini_epoch(script)) // settings["train.accumulate"]
    if every and not strategy.startswith(("deepspeed", "fsdp")):
        settings["train.saves.every"] = every
    if script.words.get("wandb"):
        settings["tracking.also"] = ["wandb"]


def _course(script: _Script) -> None:
    """Schedule and warm-up, and the betas."""
    o, settings = "train.optimizer.", script.settings
    lr, final = settings[o + "lr"], settings[o + "lr_final"]
    warmup, share = max(script.whole("warmup_steps", -1), 0), None
    if script.tool in "PQ":
        schedule = "cosine"
        if script.words.get("lr_schedule") == "wsd":
            warmup, share = (warmup or 100) if script.tool == "P" else 100, 0.0
            final = lr if lr == final else 0.0
        elif script.tool == "Q":
            share = 0.01
        elif warmup:
            script.notes.append(
                f"--warmup_steps {warmup}: had no effect there without --lr_schedule wsd, and is left out"
            )
            warmup = 0
        if final == lr and script.tool == "P":
            warmup = 0
    else:
        share = 0.01 if script.tool == "L" and "x070" in script.words.get("my_testing", "") else 0.2
        schedule = "cosine" if script.whole("my_exit_tokens", 0) else "exponential" if final else "linear"
        if script.whole("my_exit_tokens", 0) < 0:
            script.notes.append("--my_exit_tokens below 0 took the mean of two schedules; here it is the cosine alone")
    schedule = "constant" if lr == final else schedule
    settings |= {
        o + "lr_final": final, o + "schedule": schedule, o + "decay": None, o + "decay_form": None, o + "momentum": None,
        o + "warmup_steps": warmup, o + "warmup_from": share if warmup else None,
        o + "betas": [script.number("beta1", 0.9), script.number("beta2", 0.99)],
    }  # fmt: skip
    stage = max(script.whole("my_pile_stage", 0), script.whole("train_stage", 0))
    rates: dict[str, float] = {}
    if stage == 1:
        raise InputError(
            "--my_pile_stage 1" if "my_pile_stage" in script.given else "--train_stage 1",
            "makes a model's first values and trains nothing",
            "give the script that trains, with the file of first values as its --load_model",
        )
    version = _version(script)
    if stage == 2 and settings[o + "layerwise_lr"] and version != "7" and not _is_adapter(script):
        mixes = 5.0 if script.tool in "PQ" else 2.0
        rates = {f"*.time_{'maa' if version == '6' else 'mix'}_[a-z]": mixes, "att.time_decay": 5.0}
        rates |= {} if version == "6" else {"att.time_f*": 5.0}
    settings[o + "rates"] = rates


def _is_adapter(script: _Script) -> bool:
    return (
        script.words.get("peft", "none") != "none"
        or "lora" in script.given
        or script.words.get("train_type") == "state"
    )


_LN = ["ln*", "att.ln_x.*"]
"""Layer norms, by their names in and outside of a block."""


def _also(parts: list[str], version: str) -> list[str]:
    """Patterns for RWKV-PEFT's and TrainChatGal's parts of names."""
    found: list[str] = []
    for part in parts:
        for one in re.findall(r"[\w.]+", part):
            if one == "ln":
                found += _LN if version != "4" else _LN[:1]
            elif one == "time":
                found += [] if version == "7" else ["*.time_*"]
            elif one not in ("att", "ffn"):
                found += [f"*{one}*"]
    return list(dict.fromkeys(found))


def _version(script: _Script) -> str:
    """As the tools have it."""
    testing = script.words.get("my_testing", "")
    if script.tool in "GL" and not testing:
        return "4"
    return "7" if "7" in testing else "6" if "6" in testing else "5"


def _method(script: _Script) -> None:
    """The section `adapter`, whole: what it holds depends on the kind."""
    adapter: dict[str, Any]
    tuned = "wkv" if "state" in (script.words.get("train_type"), script.words.get("peft")) else "none"
    shared = {"layers": script.words.get("lora_layers", "all"), "state": tuned, "load": None}
    matrices = shared | {"targets": ["att.*", "ffn.*"], "also": []}
    version = _version(script)
    kind = script.words.get("peft", "lora" if "lora" in script.given else "none")
    if script.tool == "P":
        matrices["also"] = _also(script.given.get("train_parts", ["time", "ln"]), version)
    if script.tool == "Q":
        matrices["targets"] = ["*.receptance", "*.key", "*.value", "*.output"]
    match kind:
        case "none" | "state":
            adapter = {**shared, "kind": "full", "also": ["*"]}
            if tuned != "none":
                adapter |= {"kind": "state", "also": []}
        case "lora":
            adapter = {"kind": "lora", **matrices, **_lora(script), "rank_stabilized": False, "dora": False}
            if script.tool == "G":
                parts = script.words.get("lora_parts", "att,ffn,ln,time").split(",")
                adapter["targets"] = [
                    *(("att.key", "att.value", "att.receptance") if "att" in parts else ()),
                    *(("ffn.key", "ffn.receptance", "ffn.value") if "ffn" in parts else ()),
                ]
                adapter["also"] = _also(parts, version)
        case "pissa":
            c = script.mapping("pissa_config", {"pissa_load": "", "pissa_init": "", "pissa_r": 8, "svd_niter": 4})
            adapter = {
                "kind": "pissa", **matrices, "rank": c.get("pissa_r"), "iterations": c.get("svd_niter"),
                "load": script.load(c.get("pissa_load", "")), "load_init": script.load(c.get("pissa_init", "")),
            }  # fmt: skip
        case "disha" | "bone" | "miss":
            adapter = {**matrices, **_bone(script, kind)}
        case _:
            raise InputError(f"--peft {kind}", "is not known", "it is none, state, lora, pissa, disha, bone or miss")
    script.settings["adapter"] = {"kind": adapter.pop("kind"), **adapter}


def _lora(script: _Script) -> dict[str, Any]:
    if script.tool == "G":
        load, rank = script.words.get("lora_load", ""), script.number("lora_r", 8)
        alpha, dropout = script.number("lora_alpha", 32), script.number("lora_dropout", 0.01)
        return {"rank": int(rank), "alpha": alpha, "dropout": dropout, "load": script.load(load)}
    if script.tool == "Q":
        c = script.mapping("peft_config", {})
        return {
            "rank": c.get("r", 8),
            "alpha": c.get("lora_alpha", 8),
            "dropout": c.get("lora_dropout", 0.0),
            "load": None,
        }
    c = script.mapping("lora_config", {"lora_load": "", "lora_r": 8, "lora_alpha": 32, "lora_dropout": 0.01})
    return {
        "rank": c.get("lora_r"), "alpha": c.get("lora_alpha"), "dropout": c.get("lora_dropout"),
        "load": script.load(c.get("lora_load", "")),
    }  # fmt: skip


def _bone(script: _Script, kind: str) -> dict[str, Any]:
    if kind == "miss":
        return {"kind": "bone", "rank": script.mapping("peft_config", {}).get("r", 64)}
    name, prefix = ("disha_config", "") if kind == "disha" else ("bone_config", "bone_")
    c = script.mapping(name, {f"{prefix}mode": "bone", f"{prefix}load": "", f"{prefix}r": 64})
    mode = c.get(f"{prefix}mode", "bone")
    if mode not in ("bone", "bat"):
        raise InputError(f"--{name}: mode {mode}", "trains nothing: it must be bone or bat", "correct the script")
    return {"kind": mode, "rank": c.get(f"{prefix}r"), "load": script.load(c.get(f"{prefix}load", ""))}


def _rest(script: _Script) -> None:
    if script.whole("random_seed", -1) >= 0:
        script.settings["seed"] = script.whole("random_seed", -1)
    if script.settings.get("model.quantize", "none") != "none" and script.settings["adapter"]["kind"] == "full":
        script.notes.append("--quant with full training: what is trained can't be packed; model.quantize is none")
        script.settings["model.quantize"] = "none"
    if script.settings.get("model.base") in ("", "0"):
        script.notes.append("--load_model: was a new model, or the newest of --proj_dir; set model.base")
        del script.settings["model.base"]
    if script.settings["train.rows"] in ("stream", "magic_prime") and script.settings["adapter"]["state"] != "none":
        script.notes.append("a tuned state stands at a document's beginning: train.rows is pad")
        script.settings["train.rows"] = "pad"


def _read(name: str, word: str, value: Callable[[str], Any]) -> Any:
    try:
        return value(word)
    except ValueError:
        kind = {"loads": "JSON", "int": "a whole number"}.get(value.__name__, "a number")
        raise InputError(f"--{name} {word}", f"must be {kind}", "correct the script") from None


def _put(values: Any, path: list[str], value: Any) -> None:
    *sections, last = path
    for section in sections:
        values = values[section]
    values[last] = _styled(value)


def _styled(value: Any, depth: int = 0) -> Any:
    """As params.yaml is written: lists in one line, but for those of sections."""
    if isinstance(value, dict):
        made = CommentedMap({name: _styled(one, depth + 1) for name, one in value.items()})
        if not any(isinstance(one, dict | list) for one in value.values()) and depth > 1:
            made.fa.set_flow_style()
        return made
    if isinstance(value, list):
        items = CommentedSeq([_styled(one, depth + 1) for one in value])
        if not any(isinstance(one, dict) for one in value):
            items.fa.set_flow_style()
        return items
    return value


class _Representer(RoundTripRepresenter):
    """Writes null, where the library would leave nothing."""


_Representer.add_representer(type(None), lambda made, _: made.represent_scalar("tag:yaml.org,2002:null", "null"))


def _template(root: Path) -> str:
    """params.yaml as it is; as it was last committed, where a shell has just emptied it to be written to."""
    path = root / "params.yaml"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if not text.strip():
        shown = subprocess.run(
            ["git", "show", "HEAD:./params.yaml"], cwd=root, capture_output=True, text=True, check=False
        )
        text = shown.stdout
    if not text.strip():
        raise InputError(
            str(path), "what a script does not say is taken from it, and it is empty", "run this in the repository"
        )
    return text


def _tool(given: Given) -> str:
    """Letter of the tool that a script is of."""
    newer = {"peft_config", "merge", "miss_config", "optimizer", "num_workers", "persistent_workers", "prefetch_factor"}
    if newer & given.keys() or given.get("peft") in (["miss"], ["state"], ["adalora"], ["prefix"]):
        return "Q"
    for letter, other in (("P", "G"), ("G", "P")):
        if given.keys() & flags_of(letter).keys() - flags_of(other).keys() - flags_of("L").keys():
            return letter
    return "L"


def _flags(words: list[str]) -> Given:
    """The words after the script's name, by flag."""
    given: Given = {}
    current: list[str] | None = None
    for word in words:
        if re.match(r"--\w", word):
            name, equals, value = word[2:].partition("=")
            current = given[name.replace("-", "_")] = [value] if equals else []
        elif current is not None:
            current.append(word)
    return given


def _training(text: str, script: Path) -> list[str]:
    """The words of the command that starts the training, after the name of what is started.

    Raises:
        InputError: there is none, or more than one; or a word of it can't be known without running the script.
    """
    found = []
    for command in _commands(text, script):
        names = [i for i, word in enumerate(command) if word.endswith(".py") and "train" in Path(word).name]
        if names and any(word.startswith("--") for word in command[names[0] :]):
            found.append(command[names[0] + 1 :])
    if len(found) != 1:
        rule = (
            f"starts {len(found)} trainings" if found else "starts no training: there is no train.py with flags in it"
        )
        raise InputError(str(script), rule, "leave one command in it that does, like python train.py --load_model ...")
    return found[0]


_WORD = re.compile(
    r"(?P<space>[ \t\r]+)|(?P<comment>(?<![^\s;&|])#[^\n]*)|(?P<end>\n|;|&&|\|\||&|\|)|(?P<single>'[^']*')"
    r"|\$\{(?P<braced>\w+)(?::?-(?P<otherwise>[^}]*))?\}|\$(?P<variable>[A-Za-z_]\w*)|(?P<made>\$\(|`|\$[0-9@*#?$!])"
    r"|\\(?P<escaped>.)|(?P<double>\")|(?P<plain>[^\s'\"$`\\;&|]+)|(?P<other>.)",
    re.DOTALL,
)
_IN_QUOTES = re.compile(
    r"\$\{(?P<braced>\w+)(?::?-(?P<otherwise>[^}]*))?\}|\$(?P<variable>[A-Za-z_]\w*)|(?P<made>\$\(|`|\$[0-9@*#?$!])"
    r"|\\(?P<escaped>[\"\\$`])|(?P<double>\")|(?P<other>.)",
    re.DOTALL,
)


def _commands(text: str, script: Path) -> Iterator[list[str]]:
    """The commands of a shell script, with its variables put in."""
    variables: dict[str, str] = {}
    words: list[str] = []
    word: str | None = None
    depth = 0
    text = re.sub(r"\\\r?\n", "", text) + "\n"
    at, quoted = 0, False

    def value(found: re.Match[str]) -> str:
        if found["made"]:
            return _UNKNOWN
        name = found["braced"] or found["variable"]
        return variables.get(name) or (
            found["otherwise"] if found["otherwise"] is not None else variables.get(name, _UNKNOWN)
        )

    while found := (_IN_QUOTES if quoted else _WORD).match(text, at):
        at = found.end()
        kind = found.lastgroup
        if kind == "double":
            quoted, word = not quoted, word or ""
        elif quoted:
            inside = (
                value(found)
                if found["made"] or found["braced"] or found["variable"]
                else found["escaped"] or found["other"]
            )
            word = (word or "") + (inside or "")
        elif kind in ("space", "comment", "end"):
            if word is not None:
                words.append(word)
                word = None
            if kind == "end" and words:
                depth += (words[0] in _BLOCKS) - (words[0] in _BLOCKS.values())
                yield from _run(words, variables, script, sure=depth == 0)
                words = []
        elif kind == "single":
            word = (word or "") + found["single"][1:-1]
        elif found["made"] or found["braced"] or found["variable"]:
            assigned = word is not None and re.match(r"\w+=", word) is not None
            parts = [value(found)] if assigned else re.split(r"\s+", value(found))
            for i, part in enumerate(parts):  # the shell splits what is not quoted
                if i and word is not None:
                    words.append(word)
                    word = None
                word = (word or "") + part if part or word is not None else word
        else:
            word = (word or "") + (found["escaped"] or found["plain"] or found["other"] or "")


_BLOCKS = {"if": "fi", "for": "done", "while": "done", "until": "done", "case": "esac"}
"""What is in these may be done, or not."""

_UNKNOWN = "\0"
"""In a word that can't be known without running the script."""


def _run(words: list[str], variables: dict[str, str], script: Path, *, sure: bool) -> Iterator[list[str]]:
    """What the shell does with a command: takes assignments, or runs it."""
    words = words[1:] if words[0] in ("export", "declare", "local", "readonly") else words
    while words and (found := re.fullmatch(r"([A-Za-z_]\w*)=(.*)", words[0], re.DOTALL)):
        variables[found[1]] = found[2] if sure else _UNKNOWN
        words = words[1:]
    if any(word.endswith(".py") and "train" in word for word in words):
        for i, word in enumerate(words):
            if _UNKNOWN in word:
                flag = next((w for w in reversed(words[: i + 1]) if w.startswith("--")), words[0])
                raise InputError(
                    f"{script}: {flag}",
                    "its value is not set in the script, or made by running something",
                    "write the value there",
                )
    if words:
        yield words
