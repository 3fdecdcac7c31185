import pytest
import torch
from random_models import make
from safetensors.torch import save_file

from rwkv_core import checkpoint
from rwkv_core.errors import InputError
from rwkv_core.formats import web_rwkv
from rwkv_core.state_lab.clients import check

RUNNER, PACKAGE, AI00, OURS, LLAMA = "RWKV Runner", "rwkv package", "Ai00, web-rwkv", "RWKV-Flow", "llama.cpp, Ollama"
PTH = {RUNNER, PACKAGE, OURS}


def tensors(layers=3, heads=4, size=8):
    generator = torch.Generator().manual_seed(0)
    return {f"blocks.{i}.att.time_state": torch.randn(heads, size, size, generator=generator) for i in range(layers)}


SHIFT = {f"blocks.{i}.{part}.ts_state": torch.zeros(32) for i in range(3) for part in ("att", "ffn")}


@pytest.fixture
def verdicts(tmp_path):
    def of(made, ending=".pth", shape=None, writer=None):
        path = tmp_path / f"state{ending}"
        if writer is not None:
            writer(made, path)
        elif ending == ".pth":
            checkpoint.write(path, made)
        else:
            web_rwkv.write(path, made)
        return {verdict.client: verdict for verdict in check(path, shape)}

    return of


def mount(found):
    return {client for client, verdict in found.items() if verdict.mounts}


@pytest.mark.parametrize("version", ["5.2", "6", "7"])
def test_a_plain_state_is_mounted_by_those_that_read_pth(verdicts, version):
    shape = make(version=version).config
    found = verdicts(tensors(), shape=shape)
    assert mount(found) == PTH
    assert ("transpose" in found[PACKAGE].says) == (version != "7")
    assert "safetensors in float16" in found[AI00].says
    assert mount(verdicts(tensors())) == PTH


def test_the_token_shift_is_one_tensor_too_many_for_runner(verdicts):
    found = verdicts(tensors() | SHIFT)
    assert mount(found) == {PACKAGE, OURS}
    assert "it counts the tensors" in found[RUNNER].says
    assert "with its token shift" in found[OURS].says


def test_ai00s_form_is_mounted_by_ai00(verdicts):
    assert mount(verdicts(tensors(), ".state")) == {AI00, OURS}
    found = verdicts(tensors(), ".st")
    assert mount(found) == {OURS}
    assert "rename it" in found[AI00].says


def test_ai00_reads_float16_alone(verdicts):
    found = verdicts(tensors(), ".state", writer=save_file)
    assert not found[AI00].mounts
    assert "it reads float16, and this is float32" in found[AI00].says
    found = verdicts({name: 1e5 * x.sign() for name, x in tensors().items()})
    assert "float16, which ends at 65504, and a value is 100000" in found[AI00].says
    assert mount(found) == PTH


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (tensors(layers=2), "blocks.2.att.time_state is missing; give a whole state, of 3 blocks"),
        (tensors(layers=4), "it is of 4 blocks, and the model has 3"),
        (tensors(heads=2, size=16), r"(2, 16, 16), and the model's is (4, 8, 8)"),
        (tensors(heads=4, size=4), r"(4, 4, 4), and the model's is (4, 8, 8)"),
        ({name: x / 0 for name, x in tensors().items()}, "has a value that is no number"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_does_not_fit_the_model_is_mounted_by_none(verdicts, made, says):
    for ending in (".pth", ".state"):
        found = verdicts(made, ending, make().config)
        assert mount(found) == set()
        assert all(says in verdict.says for client, verdict in found.items() if client != LLAMA)


def test_without_a_model_the_blocks_must_agree_with_each_other(verdicts):
    assert mount(verdicts({f"blocks.{i}.att.time_state": torch.zeros(4, 8, 8) for i in (0, 2)})) == set()
    assert mount(verdicts(tensors() | {"blocks.1.att.time_state": torch.zeros(2, 8, 8)})) == set()


def test_rwkv_4_has_none(verdicts):
    found = verdicts(tensors(), shape=make(version="4").config)
    assert mount(found) == set()
    assert "RWKV-4, which has no matrix for a state" in found[RUNNER].says


def test_what_is_no_state_is_refused(verdicts):
    with pytest.raises(InputError, match="so it is no state"):
        verdicts(make().state_dict())


def test_an_adapter_beside_is_for_none(verdicts):
    found = verdicts(tensors() | {"blocks.0.att.key.lora_A": torch.zeros(2, 32)})
    assert mount(found) == {PACKAGE}
    assert "merge the adapter" in found[OURS].says
