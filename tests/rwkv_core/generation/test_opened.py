"""An adapter beside packed matrices: the model that was trained, as it was."""

import pytest
import torch
from methods import EXAMPLES, train
from random_models import make

from rwkv_core import checkpoint, models
from rwkv_core.adapters import attach, file, trained_state
from rwkv_core.adapters.file import AdapterRecord
from rwkv_core.files import sha256
from rwkv_core.generation.opened import open_model

TOKENS = torch.randint(1, 256, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("config", [EXAMPLES[0], EXAMPLES[1], EXAMPLES[-1]], ids=lambda x: x.kind)
@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_it_computes_what_it_did_in_training(config, form, tmp_path):
    base, path = tmp_path / "base.pth", tmp_path / "adapter.pth"
    checkpoint.write(base, make(vocab_size=256).state_dict())
    model = models.load(base, quantize=form)
    attach(model, config, seed=0, originals=checkpoint.read(base))
    train(model, TOKENS, 3)
    about = {"format": 1, "adapter": config, "base_sha256": sha256(base), "data_sha256": "", "vocabulary_sha256": ""}
    file.write(path, trained_state(model), AdapterRecord(**about, quantize=form, run="r"))
    opened = open_model(base, adapter=path, quantize=form, device="cpu")
    with torch.no_grad():
        state = None if opened.begin is None else model.initial_state(2)
        assert torch.equal(opened.model(TOKENS, state)[0], model.eval()(TOKENS)[0])
    assert (opened.begin is not None) == (config.kind == "state")
    assert not any(p.requires_grad for p in opened.model.parameters())
    exact = open_model(base, adapter=path, device="cpu").model(TOKENS)[0]
    bare = open_model(base, quantize=form, device="cpu").model(TOKENS)[0]
    assert not torch.allclose(bare, opened.model(TOKENS)[0], atol=1e-3), "the adapter counts"
    if config.kind == "lora":  # merged as it was trained: into rounded matrices
        torch.testing.assert_close(exact, opened.model(TOKENS)[0], rtol=1e-3, atol=1e-3)
