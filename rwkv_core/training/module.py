"""What Lightning trains: a model, its loss, its optimizer, and the history of both."""

from collections.abc import Iterable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from kernels.head_loss import IGNORE, head_loss, token_nll
from rwkv_core.config import TrainConfig
from rwkv_core.data.sampling import Batch
from rwkv_core.models.skeleton import RWKV
from rwkv_core.training.schedule import learning_rate

History = dict[int, dict[str, float]]
"""Rows by the number of optimizer steps done; the same step measured twice is one row."""


class Training(pl.LightningModule):
    """One run. Only what is trained goes into its checkpoints: the frozen base is a file already."""

    def __init__(self, model: RWKV, groups: list[dict[str, Any]], config: TrainConfig, steps: int, seed: int) -> None:
        super().__init__()
        self.strict_loading = False
        self.model, self._groups, self._config, self._steps, self._seed = model, groups, config, steps, seed
        self.history: dict[str, History] = {"train": {}, "valid": {}}
        self.grad_norm = 0.0
        self.step_loss = 0.0

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        features, _ = self.model.features(batch.inputs)
        return features.flatten(0, 1), self.model.head.now(), batch.targets.flatten()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Make dropout a function of the seed and the micro-batch, so that a continued run draws what it would have."""
        torch.manual_seed((self._seed * 1_000_003 + batch_idx) % 2**63)
        if batch_idx % self._config.accumulate == 0:
            self.step_loss = 0.0

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The micro-batch's share of its step's mean cross-entropy: one number, however the step is cut up."""
        rows, values = self.model.head.trained_rows()
        loss = head_loss(*self._inputs(batch), self._config.l2_wrap, rows=rows, values=values) / batch.step_tokens
        self.step_loss += float(loss.detach())
        return loss * self._config.accumulate  # Lightning divides by it; the shares add up without

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip to grad_clip where it is set; measure the norm either way."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self._config.optimizer.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._config.optimizer.grad_clip, norm)
        self.grad_norm = float(norm)

    @torch.no_grad()
    def held_out_loss(self, batches: Iterable[Batch]) -> float:
        """Mean cross-entropy of the targets in `batches`, in nats a token, as training computes it but without dropout."""
        nats, tokens = 0.0, 0
        self.eval()
        with self.trainer.precision_plugin.val_step_context():
            for batch in batches:
                moved = Batch(batch.inputs.to(self.device), batch.targets.to(self.device), batch.step_tokens)
                nats += float(token_nll(*self._inputs(moved)).double().sum())
                tokens += int((batch.targets != IGNORE).sum())
        self.train()
        return nats / tokens

    def note_step(self, step: int, tokens: int) -> dict[str, float]:
        """Add the row of a finished optimizer step to the history; `tokens` are those learned so far."""
        lr = learning_rate(self._config.optimizer, step - 1, self._steps)
        row = {"tokens": tokens, "loss": self.step_loss, "lr": lr, "grad_norm": self.grad_norm}
        self.history["train"][step] = row
        return row

    def configure_optimizers(self) -> Any:
        """AdamW over the groups, each at its own multiple of the scheduled rate."""
        o = self._config.optimizer
        optimizer = torch.optim.AdamW(self._groups, lr=o.lr, betas=o.betas, eps=o.eps, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: learning_rate(o, s, self._steps) / o.lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained, and the history."""
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {name: x for name, x in checkpoint["state_dict"].items() if name in trained}
        checkpoint["history"] = self.history

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the history."""
        self.history = checkpoint["history"]
