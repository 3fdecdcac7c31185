"""Scripts of the other tools, as their documents have them, become params.yaml that is valid here."""

import io
import subprocess

import pytest
from project import ROOT
from ruamel.yaml import YAML
from typer.testing import CliRunner

from flows import flags
from flows.cli import app
from flows.flags import FLAGS, RUNNER, TOOLS, flags_of
from flows.import_script import import_script, translate
from rwkv_core.errors import InputError
from tasks import params

DISHA = r"""
load_model='/home/rwkv/RWKV-PEFT/model/RWKV-x070-World-0.4B-v2.9-20250107-ctx4096.pth'
proj_dir='/home/rwkv/RWKV-PEFT/output-manjuan/disha'
data_file='/home/rwkv/RWKV-PEFT/data/rzb_rwkvself'

n_layer=24
n_embd=1024

micro_bsz=4
epoch_save=1
epoch_steps=1200
ctx_len=2048

disha_config='{"mode":"bone","load":"","r":64}'


python train.py --load_model $load_model \
--proj_dir $proj_dir --data_file $data_file \
--vocab_size 65536 \
--n_layer $n_layer --n_embd $n_embd \
--data_type binidx --dataload pad --loss_mask pad \
--ctx_len $ctx_len --micro_bsz $micro_bsz \
--epoch_steps $epoch_steps --epoch_count 4 --epoch_begin 0 --epoch_save $epoch_save \
--lr_init 2e-5 --lr_final 2e-5 --warmup_steps 0 --beta1 0.9 --beta2 0.99 --adam_eps 1e-8 \
--accelerator gpu --devices 1 --precision bf16 --strategy deepspeed_stage_1 --grad_cp 1 \
--my_testing "x070" \
--peft disha --disha_config $disha_config \
# The following are optional
# --op cuda/fla/triton (choose different operators, default is cuda if this parameter is not added)
# --wandb RWKV-PEFT-LoRA (whether to use wandb to monitor the training process)
# --lr_schedule wsd (whether to enable cosine annealing, default lr_schedule = cos_decay)
"""
"""The reference script of the DiSHA tutorial."""

STATE = r"""#!/bin/bash
load_model="/models/RWKV-x060-World-1B6.pth"
data_file=/data/novel
QUANT='nf4'
micro_bsz=1
ctx_len=512
python train.py --load_model $load_model --proj_dir out --data_file $data_file --data_type binidx --vocab_size 65536 \
  --n_layer 24 --n_embd 2048 --ctx_len ${ctx_len} --micro_bsz $micro_bsz --epoch_steps 800 --epoch_count 20 \
  --lr_init 1 --lr_final 1e-2 --warmup_steps 10 --adam_eps 1e-8 --precision bf16 --devices 1 --strategy deepspeed_stage_1 \
  --grad_cp 1 --my_testing "x060" --train_type "state" --quant $QUANT --dataload pad --accelerator gpu
"""

CHATGAL = r"""
CUDA_VISIBLE_DEVICES=0 python3 train.py --load_model "pretrained_models/RWKV-4-World-7B.pth" --wandb "chatgal" --proj_dir out \
 --data_file "../data/chatgal_text_document" --data_type "binidx" --vocab_size 65536 --ctx_len 8192 \
 --accumulate_grad_batches 8 --epoch_steps 1000 --epoch_count 2 --epoch_save 1 --micro_bsz 1 --n_layer 32 --n_embd 4096 \
 --pre_ffn 0 --head_qk 0 --lr_init 5e-5 --lr_final 1e-6 --warmup_steps 50 --beta1 0.9 --beta2 0.999 --adam_eps 1e-8 \
 --accelerator gpu --devices 1 --precision bf16 --strategy deepspeed_stage_2_offload --grad_cp 1 --state_cp 1 --ctx_parts 8 \
 --initial_ctx_len 4096 --ctx_warmup_steps 200 \
 --lora --lora_r 64 --lora_alpha 128 --lora_dropout 0.01 --lora_load "old/rwkv-3.pth" --lora_parts att,ffn,ln,time \
 --lora_layers "0-3 25-31"
"""

RWKV_LM = r"""
MODEL_TYPE="x070"
N_LAYER="12" # layers
N_EMBD="768"
PROJ_DIR="out/L"$N_LAYER"-D"$N_EMBD"-"$MODEL_TYPE
M_BSZ="16"
python train.py --load_model "0" --wandb "Test" --proj_dir $PROJ_DIR --my_testing $MODEL_TYPE \
 --ctx_len 512 --train_stage 3 --epoch_count 999999 --epoch_begin 0 \
 --data_file "data/minipile" --my_exit_tokens 1498226207 --magic_prime 2926181 \
 --num_nodes 1 --micro_bsz $M_BSZ --n_layer $N_LAYER --n_embd $N_EMBD \
 --lr_init 6e-4 --lr_final 6e-5 --warmup_steps 10 --beta1 0.9 --beta2 0.99 --adam_eps 1e-18 --data_type "binidx" \
 --vocab_size 65536 --weight_decay 0.001 --epoch_save 10 --head_size 64 \
 --accelerator gpu --devices 1 --precision bf16 --strategy deepspeed_stage_2 --grad_cp 1 --enable_progress_bar True \
 --ds_bucket_mb 2
"""

MISS = r"""
python train.py --load_model m.pth --data_file d.jsonl --data_type jsonl --vocab_size 65536 --n_layer 24 --n_embd 1024 \
 --ctx_len 1024 --micro_bsz 8 --epoch_steps 1001 --epoch_count 3 --lr_init 2e-5 --lr_final 1e-6 --warmup_steps 20 \
 --my_testing x070 --peft miss --peft_config '{"r":32}' --merge 0 --precision bf16 --devices 1
"""


@pytest.fixture
def imported(tmp_path):
    """Imports a script's text; returns the settings as `tasks.params` reads them, and the notes."""

    def run(text, tool=None):
        script = tmp_path / "old.sh"
        script.write_text(text)
        found = import_script(script, ROOT, tool)
        path = tmp_path / "params.yaml"
        path.write_text(found.yaml)
        return params.load(path), found

    return run


def test_the_disha_script(imported):
    p, found = imported(DISHA)
    assert found.tool == "RWKV-PEFT 2025"
    assert str(p.model.base) == "/home/rwkv/RWKV-PEFT/model/RWKV-x070-World-0.4B-v2.9-20250107-ctx4096.pth"
    assert (str(p.data.source), p.data.parts[0].files, p.data.parts[0].kind) == (
        "/home/rwkv/RWKV-PEFT/data", "rzb_rwkvself.*", "binidx"
    )  # fmt: skip
    assert (p.adapter.kind, p.adapter.rank, p.adapter.targets) == ("bone", 64, ("att.*", "ffn.*"))
    assert p.adapter.also == ("ln*", "att.ln_x.*"), "RWKV-7 has nothing called time"
    t, o = p.train, p.train.optimizer
    assert (t.ctx_len, t.micro_batch, t.rows, t.precision, t.steps) == (2048, 4, "pad", "bf16", 4800)
    assert (o.lr, o.lr_final, o.schedule, o.warmup_steps, o.betas, o.eps) == (
        2e-5,
        2e-5,
        "constant",
        0,
        (0.9, 0.99),
        1e-8,
    )
    assert (o.grad_clip, t.l2_wrap) == (1, 1e-4), "what all of these tools do"
    base = params.load(ROOT / "params.yaml")
    assert (p.seed, p.evaluate, p.export, p.data.holdout) == (base.seed, base.evaluate, base.export, base.data.holdout)
    said = "\n".join(found.notes)
    assert p.train.context.grad_cp
    assert "--grad_cp 1: train.context.grad_cp; blocks are made again in the backward pass; never the number of" in said
    assert "--epoch_steps 1200: train.steps; a mini-epoch" in said
    assert "optional" not in said
    assert all(f"# {note}" in found.yaml for note in found.notes)


def test_the_state_script(imported):
    p, found = imported(STATE)
    assert (p.adapter.kind, p.adapter.state, p.adapter.also) == ("state", "wkv", ())
    assert (p.model.quantize, p.train.rows, p.train.steps) == ("nf4", "pad", 16000)
    o = p.train.optimizer
    assert (o.lr, o.lr_final, o.schedule, o.warmup_steps, o.warmup_from) == (1, 0.01, "cosine", 0, None)
    assert "--warmup_steps 10: had no effect there without --lr_schedule wsd, and is left out" in found.notes


def test_the_chatgal_script(imported):
    p, found = imported(CHATGAL)
    assert found.tool == "TrainChatGal"
    a = p.adapter
    assert (a.kind, a.rank, a.alpha, a.dropout, a.layers, str(a.load)) == (
        "lora",
        64,
        128,
        0.01,
        "0-3 25-31",
        "start/rwkv-3.pth",
    )
    assert a.targets == ("att.key", "att.value", "att.receptance", "ffn.key", "ffn.receptance", "ffn.value")
    assert a.also == ("ln*", "*.time_*")
    t, o = p.train, p.train.optimizer
    assert (t.accumulate, t.steps, t.rows, t.ctx_len) == (8, 250, "stream", 8192)
    assert (o.schedule, o.warmup_steps, o.warmup_from, o.betas) == ("exponential", 50, 0.2, (0.9, 0.999))
    c = t.context
    assert (c.segment, c.bptt, c.parts, c.grad_cp) == (1024, "exact", 1, True)
    assert (c.initial_ctx_len, c.ctx_warmup_steps) == (4096, 200)
    assert (t.parallel.strategy, t.parallel.devices) == ("deepspeed_stage_2_offload", 1)
    assert (t.saves.every, p.tracking.also) == (None, ("wandb",))


def test_infctx_and_several_cards(imported):
    p, _ = imported(
        MISS.replace(
            "--devices 1", "--devices 4 --strategy deepspeed_stage_1 --train_type infctx --chunk_ctx 256 --epoch_save 1"
        )
    )
    assert (p.train.context.segment, p.train.context.bptt) == (256, 1)
    assert (p.train.parallel.strategy, p.train.parallel.devices) == ("deepspeed_stage_1", 4)
    assert p.train.saves.every is None


def test_the_rwkv_lm_script(imported):
    p, found = imported(RWKV_LM)
    assert found.tool == "RWKV-LM"
    assert (p.adapter.kind, p.adapter.also) == ("full", ("*",))
    t, o = p.train, p.train.optimizer
    assert (t.rows, t.order, t.tokens, t.steps, t.epochs) == ("magic_prime", "as_given", 1498226207, None, None)
    assert (o.schedule, o.warmup_steps, o.warmup_from, o.eps, o.weight_decay) == ("cosine", 10, 0.01, 1e-18, 0.001)
    assert any("set model.base" in note for note in found.notes)
    assert (t.parallel.strategy, t.saves.every) == ("one_device", 25200)
    assert "--proj_dir out/L12-D768-x070: not here" in "\n".join(found.notes)


def test_the_miss_script(imported):
    p, found = imported(MISS)
    assert found.tool == "RWKV-PEFT 2026"
    assert (p.adapter.kind, p.adapter.rank, p.train.steps) == ("bone", 32, 126 * 3)
    assert p.adapter.targets == ("*.receptance", "*.key", "*.value", "*.output")
    assert (p.train.optimizer.schedule, p.train.optimizer.warmup_from) == ("cosine", 0.01)


def test_stage_2_has_rates_of_its_own(imported):
    text = "python train.py --my_pile_stage 2 --data_type binidx --data_file d --vocab_size 65536 --load_model m.pth"
    p, _ = imported(text)
    assert p.train.optimizer.rates == {"*.time_mix_[a-z]": 2, "att.time_decay": 5, "att.time_f*": 5}
    with pytest.raises(InputError, match=r"--my_pile_stage 1: makes a model's first values and trains nothing"):
        imported(text.replace("stage 2", "stage 1"))


def test_wsd_was_a_cosine(imported):
    p, found = imported(
        DISHA.replace("--lr_final 2e-5", "--lr_final 1e-5 --lr_schedule wsd").replace(
            "$disha_config \\", "$disha_config"
        )
    )
    o = p.train.optimizer
    assert (o.schedule, o.lr_final, o.warmup_steps, o.warmup_from) == ("cosine", 0, 100, 0)
    assert any("--lr_schedule wsd: " in note and "wsd was that too, to 0" in note for note in found.notes)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("A=3\nB=$A\npython train.py --micro_bsz $B", 3),
        ("export A='3'; python train.py --micro_bsz ${A} && echo done", 3),
        ('A="--micro_bsz 3"\npython train.py $A', 3),
        ("python train.py --micro_bsz ${BSZ:-3}", 3),
        ("python train.py --micro_bsz=3 # 4", 3),
        ("python train.py \\\n  --micro_bsz \\\n  3", 3),
        ("if true; then\n  echo --micro_bsz 5\nfi\npython train.py --micro 3", 3),
        ("python prepare.py --micro_bsz 5\ntorchrun --nproc_per_node 1 train.py --micro_bsz 3", 3),
    ],
)
def test_the_shell_is_understood(text, want, imported):
    p, _ = imported(text + "\n", "P")
    assert p.train.micro_batch == want


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo hello\n", r"starts no training: there is no train.py with flags in it; leave one command"),
        ("python train.py --a 1\npython train.py --a 2\n", r"starts 2 trainings; leave one command"),
        (
            "python train.py --micro_bsz $NOWHERE\n",
            r"--micro_bsz: its value is not set in the script, or made by running",
        ),
        (
            "python train.py --micro_bsz $(nproc)\n",
            r"--micro_bsz: its value is not set in the script, or made by running",
        ),
        ("python train.py --micro_bsz $1\n", r"--micro_bsz: its value is not set in the script"),
        ("if x; then\nA=1\nfi\npython train.py --micro_bsz $A\n", r"--micro_bsz: its value is not set in the script"),
        ("python train.py --micro_bsz many\n", r"--micro_bsz many: must be a whole number; correct the script"),
        ("python train.py --peft lora --lora_config '{r:3}'\n", r"--lora_config \{r:3\}: must be JSON"),
        (
            'python train.py --peft disha --disha_config \'{"mode":"mode","r":3}\'\n',
            r"mode mode: trains nothing: it must be bone",
        ),
        ("python train.py --peft prefix\n", r"--peft prefix: is not known"),
        ("python train.py --quant int9 --peft lora\n", r"model.quantize = 'int9'"),
        ("python train.py --lr_init 1e-5 --lr_final 1e-4\n", r"lr_final = 0.0001 is above lr = 1e-05"),
    ],
)
def test_what_can_t_be_told_is_refused(text, message, imported):
    with pytest.raises(InputError, match=message):
        imported(text)


def test_unknown_and_dead_flags_are_reported(imported):
    _, found = imported("python train.py --peft lora --my_new_flag 3 --my_pos_emb 0 --dropout 0.1\n")
    assert "--my_new_flag 3: no flag of RWKV-PEFT 2025; nothing was made of it" in found.notes
    assert "--my_pos_emb 0: had no effect there" in found.notes
    assert "--dropout 0.1: had no effect there; a LoRA's own is adapter.dropout" in found.notes


def test_the_file_may_be_the_one_that_the_shell_has_emptied(tmp_path, imported):
    """`rwkvflow import OLD.sh > params.yaml`: what was committed counts. Without that, it is refused."""
    whole = imported(MISS)[1].yaml
    root = tmp_path / "repository"

    def run(*words):
        subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e", *words], cwd=root, check=True)

    root.mkdir()
    run("init", "-q")
    (root / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    run("add", "params.yaml")
    run("commit", "-qm", "x")
    (root / "params.yaml").write_text("")
    assert import_script(tmp_path / "old.sh", root).yaml == whole
    run("rm", "-qf", "params.yaml")
    run("commit", "-qm", "y")
    with pytest.raises(InputError, match="what a script does not say is taken from it, and it is empty"):
        import_script(tmp_path / "old.sh", root)


def test_the_command_prints_yaml_and_tells_the_rest_beside(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    script = tmp_path / "run.sh"
    script.write_text(DISHA)
    done = CliRunner().invoke(app, ["import", str(script)])
    assert done.exit_code == 0, done.stderr
    assert YAML(typ="safe").load(io.StringIO(done.stdout))["adapter"]["kind"] == "bone"
    assert done.stderr.startswith(f"{script}: a script of RWKV-PEFT 2025\n  --proj_dir")


EXAMPLES = {
    "load_model": "x.pth", "head_size_divisor": "4", "op": "torch", "quant": "nf4", "data_file": "a/b.jsonl",
    "data_type": "utf-16le",
    "vocab_size": "256", "dataload": "get", "loss_mask": "qa", "mask_id": '{"mask0":"A","mask1":"B"}',
    "data_shuffle": "0",
    "sft_field": "ask answer", "train_split_ratio": "0.7", "train_data_sort": "long_first", "ctx_len": "77",
    "micro_bsz": "3",
    "accumulate_grad_batches": "5", "epoch_steps": "40", "epoch_count": "41", "my_exit_tokens": "12345",
    "magic_prime": "2926181",
    "my_pile_stage": "2", "train_stage": "2", "random_seed": "9", "lr_init": "3e-4", "lr_final": "2e-6",
    "lr_schedule": "wsd",
    "warmup_steps": "7", "beta1": "0.8", "beta2": "0.95", "adam_eps": "1e-18", "weight_decay": "0.02",
    "layerwise_lr": "0",
    "grad_clip": "2", "precision": "fp32", "peft": "lora", "train_type": "state", "train_parts": "emb",
    "lora_config": '{"lora_load":"a.pth","lora_r":3,"lora_alpha":5,"lora_dropout":0.2}',
    "pissa_config": '{"pissa_load":"a.pth","pissa_init":"b.pth","pissa_r":3,"svd_niter":9}',
    "disha_config": '{"mode":"bat","load":"a.pth","r":3}',
    "bone_config": '{"bone_mode":"bat","bone_load":"a.pth","bone_r":3}',
    "peft_config": '{"r":3,"lora_alpha":5,"lora_dropout":0.2}', "lora": "", "lora_r": "3", "lora_alpha": "5",
    "lora_dropout": "0.2",
    "lora_load": "a.pth", "lora_parts": "att", "lora_layers": "0-1", "grad_cp": "1", "chunk_ctx": "16", "ctx_parts": "4",
    "state_cp": "1", "initial_ctx_len": "64", "ctx_warmup_steps": "7", "devices": "2", "num_nodes": "3",
    "strategy": "deepspeed_stage_2_offload", "ds_bucket_mb": "7", "epoch_save": "2", "wandb": "project",
}  # fmt: skip
"""A value of each flag that has a home, other than what there is without it."""

BESIDE = {
    "lora_config": {"peft": "lora"}, "pissa_config": {"peft": "pissa"}, "disha_config": {"peft": "disha"},
    "bone_config": {"peft": "bone"}, "peft_config": {"peft": "lora"}, "train_parts": {"peft": "lora"},
    "mask_id": {"loss_mask": "se"},
    "lora_r": {"lora": ""}, "lora_alpha": {"lora": ""}, "lora_dropout": {"lora": ""}, "lora_load": {"lora": ""},
    "lora_parts": {"lora": ""}, "lora_layers": {"lora": ""}, "sft_field": {"data_type": "sft", "data_file": "x"},
    "data_type": {"data_file": "x"}, "lr_schedule": {"lr_init": "1e-4"}, "warmup_steps P": {"lr_schedule": "wsd"},
    "quant": {"peft": "lora"}, "chunk_ctx": {"train_type": "infctx"}, "state_cp": {"ctx_parts": "4"},
    "initial_ctx_len": {"ctx_warmup_steps": "5"}, "ctx_warmup_steps": {"initial_ctx_len": "64"},
}  # fmt: skip
"""What a flag needs beside it to have an effect."""


@pytest.mark.parametrize(
    ("tool", "flag"),
    [(tool, flag) for flag in FLAGS for tool in flag.tools if flag.fate == "moved"],
    ids=lambda x: getattr(x, "name", x),
)
def test_each_flag_gets_to_its_home(tool, flag):
    """What the table says of a flag is what is done with it."""
    beside = {
        name: value.split()
        for name, value in (BESIDE.get(flag.name) or BESIDE.get(f"{flag.name} {tool}", {})).items()
        if name in flags_of(tool)
    }
    without, _ = translate(dict(beside), tool)
    made, _ = translate(beside | {flag.name: EXAMPLES[flag.name].split() or []}, tool)
    changed = {f"{k}.{n}" for k in ("adapter",) for n in made[k] if made[k].get(n) != without[k].get(n)}
    changed |= {name for name, value in made.items() if without.get(name) != value}
    for home in flag.home.split(", "):
        assert home in changed, f"{flag.name} should change {home}; it changes {sorted(changed)}"


def test_homes_are_settings():
    values = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    kinds = {name for kind in params.Params.model_fields["adapter"].annotation.__args__ for name in kind.model_fields}
    for flag in FLAGS:
        assert bool(flag.home) is (flag.fate == "moved"), flag.name
        for home in filter(None, flag.home.split(", ")):
            section, *rest = home.split(".")
            if section == "adapter":
                assert rest[0] in kinds, home
            else:
                inside = values[section]
                for name in rest:
                    assert name in inside, home
                    inside = inside[name]
    assert len({(flag.name, tool) for flag in FLAGS for tool in flag.tools}) == sum(len(flag.tools) for flag in FLAGS)
    assert {tool for flag in FLAGS for tool in flag.tools} == set(TOOLS)
    assert {name for *_, name in RUNNER} <= {flag.name for flag in FLAGS}


def test_the_page_has_the_table():
    page = (ROOT / "docs/coming-from-other-tools.md").read_text()
    assert flags.tables() in page, "write it anew: python -m flows.flags"
