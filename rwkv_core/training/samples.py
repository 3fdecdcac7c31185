"""Texts that a model continues while it is trained."""

import json
from pathlib import Path

import pytorch_lightning as pl
import torch

from rwkv_core.config import TrainSamplesConfig
from rwkv_core.files import whole_file
from rwkv_core.formats.tuned_state import is_part
from rwkv_core.generation.sampling import Sampling
from rwkv_core.generation.text import generate
from rwkv_core.tokenizer import Tokenizer
from rwkv_core.training.callbacks import StepCallback
from rwkv_core.training.module import Training

SAMPLES = "samples.jsonl"
"""In a run folder: a line a text, {"step": n, "prompt": ..., "text": ..., "ending": ...}."""


class Samples(StepCallback):
    """Continues the prompts every so many steps. What is drawn depends on the seed and the step alone."""

    def __init__(
        self, config: TrainSamplesConfig, tokenizer: Tokenizer, folder: Path, steps: int, ctx_len: int, seed: int
    ) -> None:
        self._config, self._tokenizer, self._path = config, tokenizer, folder / SAMPLES
        self._steps, self._ctx_len, self._seed = steps, ctx_len, seed

    def on_run_start(self, trainer: pl.Trainer, training: Training, step: int) -> None:
        """What the untrained model says, to compare with."""
        if step == 0:
            self._continue(trainer, training, step)

    def on_step_end(self, trainer: pl.Trainer, training: Training, step: int) -> None:
        """It is time, or the run ends."""
        if step % self._config.every == 0 or step == self._steps or training.ended:
            self._continue(trainer, training, step)

    def _continue(self, trainer: pl.Trainer, training: Training, step: int) -> None:
        if not trainer.is_global_zero:
            return
        config, model = self._config, training.model
        sampling = Sampling(
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=self._seed * 1_000_003 + step,
        )
        # a tuned state stands before a document; without one it begins with token 0
        tuned = any(is_part(name) for name, _ in model.named_parameters())
        model.eval()
        with torch.no_grad(), trainer.precision_plugin.val_step_context():
            begin = model.initial_state(1) if tuned else None
            found = generate(
                model,
                self._tokenizer,
                config.prompts,
                sampling,
                ctx_len=self._ctx_len,
                batch=len(config.prompts),
                states=[begin] * len(config.prompts),
            )
        model.train()
        lines = self._path.read_text(encoding="utf-8").split("\n")[:-1] if self._path.exists() else []
        # of a run that was killed, some steps are done again
        kept = [line for line in lines if json.loads(line)["step"] < step]
        kept += [
            json.dumps({"step": step, "prompt": prompt, "text": one.text, "ending": one.ending}, ensure_ascii=False)
            for prompt, one in zip(config.prompts, found, strict=True)
        ]
        with whole_file(self._path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
