"""What Lightning trains: a model, its loss, its optimizer, and the history of both."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import move_data_to_device
from torch import Tensor

from kernels.head_loss import head_loss, token_nll
from rwkv_core.adapters import trained_state
from rwkv_core.config import TrainConfig
from rwkv_core.data.sampling import Batch, Group
from rwkv_core.errors import InputError
from rwkv_core.models.skeleton import RWKV
from rwkv_core.models.state import BlockState, State
from rwkv_core.training import context, optimizers
from rwkv_core.training.parallel import ALONE, Ranks, evened, loss_factor
from rwkv_core.training.schedule import learning_rate

T = TypeVar("T")

History = dict[int, dict[str, float]]
"""Rows by the number of optimizer steps done; the same step measured twice is one row."""


class Lanes:
    """The states that rows have left, for the rows that go on from them. Detached, so nothing is learned through them."""

    def __init__(self) -> None:
        self.state: State | None = None
        """Of all lanes, a batch; float32."""

    def before(self, model: RWKV, group: Group) -> State | None:
        """The state that a group is read from; None for that before a document."""
        if group.lanes is None or group.goes_on is None or self.state is None:
            return None
        self.state = [BlockState(*(x.to(group.lanes.device) for x in block)) for block in self.state]
        begin = model.initial_state(len(group.inputs))
        lanes = group.lanes.clamp(max=len(self.state[0].wkv) - 1)  # one that nothing was kept of yet does not go on
        return [
            BlockState(*(_chosen(group.goes_on, y[lanes], x) for x, y in zip(fresh, kept, strict=True)))
            for fresh, kept in zip(begin, self.state, strict=True)
        ]

    def keep(self, group: Group, after: State) -> None:
        """Keep what a group has left. A reading that another goes on from is not filled up: this is the state at its end."""
        if group.lanes is None:
            return
        count = int(group.lanes.max()) + 1
        if self.state is None or len(self.state[0].wkv) < count:
            more = [
                BlockState(*(x.new_zeros(count, *x.shape[1:], dtype=torch.float32) for x in block)) for block in after
            ]
            for old, new in zip(self.state or [], more, strict=False):
                for x, y in zip(old, new, strict=True):
                    y[: len(x)] = x
            self.state = more
        for kept, block in zip(self.state, after, strict=True):
            for x, y in zip(kept, block, strict=True):
                x[group.lanes] = y.detach().float()

    def of_all(self, here: Ranks) -> State | None:
        """The states of all ranks' lanes; a lane's rows are all on one rank."""
        of_ranks = here.all(self.state)
        states = [state for state in of_ranks if state is not None]
        if here.world == 1 or not states:
            return self.state
        whole = max(states, key=lambda state: len(state[0].wkv))
        whole = [BlockState(*(x.cpu().clone() for x in block)) for block in whole]
        for rank, state in enumerate(of_ranks):
            for kept, block in zip(whole, state or [], strict=False):
                for x, y in zip(kept, block, strict=True):
                    x[rank : len(y) : here.world] = y[rank :: here.world].cpu()
        return whole


class Training(pl.LightningModule):
    """One run. Only what is trained goes into its checkpoints: the frozen base is a file already."""

    def __init__(
        self,
        model: RWKV,
        groups: list[dict[str, Any]],
        config: TrainConfig,
        steps: int,
        seed: int,
        here: Ranks = ALONE,
    ) -> None:
        super().__init__()
        self.strict_loading = False
        self._here = here
        self.model, self._groups, self._config, self._steps, self._seed = model, groups, config, steps, seed
        self.history: dict[str, History] = {"train": {}, "valid": {}}
        self.grad_norm = 0.0
        self.step_loss = 0.0
        self.ended = False
        """The run is over, at this step, before its last; one that halts is not."""
        self.step_learned = self.step_tokens = 0
        """Tokens of the step: learned; read, learned or not."""
        self._lanes = Lanes()
        self._waiting: tuple[Sequence[Group], float] | None = None
        """Of a micro-batch whose backward pass is about to begin: what is read in it, and its step's weight."""
        self.trained = frozenset(name for name, p in self.named_parameters() if p.requires_grad)
        """Names of the parameters."""
        self.told = frozenset(f"model.{name}" for name in trained_state(model))
        """The same, and of what a merge needs beside them."""
        model.shared = config.parallel.shares_parameters
        model.spare(parts=config.context.parts, grad_cp=config.context.grad_cp)

    @property
    def seed(self) -> int:
        """Of dropout."""
        return self._seed

    @property
    def loss_factor(self) -> int:
        """By what a loss that is differentiated is more than its share of the step's mean, see `parallel.loss_factor`."""
        return loss_factor(self._config, self._here.world)

    def lanes_now(self) -> State | None:
        """A copy of the states that rows have left."""
        state = self._lanes.state
        return None if state is None else [BlockState(*(x.clone() for x in block)) for block in state]

    def set_lanes(self, state: State | None) -> None:
        """Let rows go on from these states."""
        self._lanes.state = state

    def _read(self, groups: Iterable[Group], lanes: Lanes) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the head reads, the targets, and their weights: of all groups, end to end."""
        features, targets, weights = [], [], []
        for group in groups:
            x, after = self.model.features(group.inputs, lanes.before(self.model, group))
            lanes.keep(group, after)
            features.append(x.flatten(0, 1))
            targets.append(group.targets.flatten())
            weights.append(None if group.weights is None else group.weights.flatten())
        counts = [
            torch.ones_like(t, dtype=torch.float32) if w is None else w for t, w in zip(targets, weights, strict=True)
        ]
        weighted = any(w is not None for w in weights)
        return _joined(features), _joined(targets), _joined(counts) if weighted else None

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Make dropout a function of the seed and the micro-batch, so that a continued run draws what it would have."""
        number = batch_idx * self._here.world + self._here.rank
        context.draw_from((self._seed * 1_000_003 + number) % 2**63, self.device)
        if batch_idx % self._config.accumulate == 0:
            self.step_loss, self.step_learned, self.step_tokens = 0.0, 0, 0

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The micro-batch's share of its step's weighted mean cross-entropy: one number, however the step is cut up."""
        self.step_learned, self.step_tokens = self.step_learned + batch.learned, self.step_tokens + batch.tokens
        groups, size = self._windows(batch.groups, batch_idx), self._config.context.segment
        if self.shares:
            groups = evened(groups, self._here, self.device)
        if not groups:  # a sum of nothing, whose gradient is 0 for all: as of rows of which nothing is learned
            return torch.stack([p.flatten()[:0].sum() for p in self.parameters() if p.requires_grad]).sum()
        weight = batch.step_weight or 1  # 0, where the step has nothing to learn
        # DeepSpeed adds up the ranks' gradients in the order they are found in, which in a sweep is another: all do, or none
        if size is not None and self._config.parallel.shares_parameters:
            self._waiting = groups, weight  # a segment's gradients would be forgotten: Lightning does so behind this
            return torch.zeros((), device=self.device, requires_grad=True)
        short = len(groups) == 1 and groups[0].inputs.shape[1] <= (size or 0) and not self.shares
        if size is None or short:
            loss = self._head_loss(*self._read(groups, self._lanes))
        else:
            loss = self._swept(groups, size, 1 / weight)
        loss = loss / weight
        self.step_loss += float(loss.detach())
        return loss * self.loss_factor  # the shares add up; Lightning would average them

    def on_before_backward(self, loss: Tensor) -> None:
        """Where processes share each parameter, make all passes of the segments here; `loss` has no gradient for any."""
        if self._waiting is None:
            return
        (groups, weight), self._waiting = self._waiting, None
        size, bptt = self._config.context.segment or 0, self._config.context.bptt
        # as Lightning divides the loss of a training step
        scale = self.loss_factor / weight / self._config.accumulate
        sweep = context.SharedSweep(
            self.model, self._head_loss, size, bptt, scale=scale, passes=_Passes(self), here=self._here
        )
        self._sweep(groups, sweep)
        self.step_loss += float(sweep.total()) / weight

    def forward(self, work: Callable[[], T]) -> T:
        """What a strategy takes for a forward pass: the parameters are there, within."""
        return work()

    def _windows(self, groups: tuple[Group, ...], batch_idx: int) -> tuple[Group, ...]:
        """What is read at this step of a growing context; afterwards the groups as they are."""
        whole = self._config.ctx_len
        size = context.ctx_len_at(self._config.context, whole, batch_idx // self._config.accumulate)
        return groups if size == whole else tuple(part for group in groups for part in context.windows(group, size))

    def _swept(self, groups: tuple[Group, ...], size: int, scale: float) -> Tensor:
        """The sum of the losses, as `_head_loss` of `_read`, with no more than a segment in memory."""
        scaler = getattr(self._trainer and self._trainer.precision_plugin, "scaler", None)
        if scaler is not None:  # small gradients are lost where they are found, not in the backward that passes them on
            scale *= scaler.get_scale()
        sweep = context.Sweep(self.model, self._head_loss, size, self._config.context.bptt, scale=scale)
        self._sweep(groups, sweep)
        return sweep.loss()

    def _sweep(self, groups: Iterable[Group], sweep: context.Sweep) -> None:
        for group in groups:
            before = self._lanes.before(self.model, group)
            before = self.model.initial_state(len(group.inputs)) if before is None else before
            self._lanes.keep(group, sweep.read(group, before))

    def _head_loss(self, features: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        rows, values = self.model.head.trained_rows()
        return head_loss(
            features,
            self.model.head.now(),
            targets,
            self._config.l2_wrap,
            token_weight=weights,
            rows=rows,
            values=values,
        )

    @property
    def shares(self) -> bool:
        """Whether the ranks meet in a forward pass, or each parameter must have a gradient on each of them."""
        return self._config.parallel.shares

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip to grad_clip where it is set; measure the norm either way."""
        if self._config.parallel.stage:  # DeepSpeed does it, in its step
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = self.norm_of(parameters)
        if self._config.optimizer.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._config.optimizer.grad_clip, norm)
        self.grad_norm = float(norm)

    def norm_of(self, parameters: Iterable[Tensor]) -> Tensor:
        """Of their gradients, which are whole, or shares that lie here as fsdp has them."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self._config.parallel.strategy == "fsdp":
            (square,) = self._here.total([float(norm) ** 2], self.device)
            norm = torch.tensor(square**0.5, dtype=norm.dtype, device=norm.device)
        return norm

    def validation_step(self, groups: Iterable[Group], lanes: Lanes) -> Tensor:
        """Nats of all targets of a micro-batch. Lightning's strategies know this name: the parameters are there, within."""
        parts = self._measured(groups, lanes)
        return torch.stack([token_nll(x, self.model.head.now(), targets).double().sum() for x, targets in parts]).sum()

    @torch.no_grad()
    def held_out_loss(self, batches: Iterable[Batch]) -> float:
        """Mean cross-entropy of the targets in `batches`, in nats a token, as training computes it but without dropout.

        All targets count the same, whatever their weights. `batches` are this rank's, and the loss is that of all ranks'.

        Raises:
            InputError: there are none.
        """
        nats, tokens, lanes = 0.0, 0, Lanes()
        measure: Any = self.trainer.strategy.validation_step if self.shares else self.validation_step
        self.eval()
        with self.trainer.precision_plugin.val_step_context():
            for batch in batches:
                groups = move_data_to_device(batch.groups, self.device)
                if self.shares:
                    groups = evened(groups, self._here, self.device)
                if groups:
                    nats += float(measure(groups, lanes))
                    tokens += batch.learned
        self.train()
        nats, learned = self._here.total([nats, tokens], self.device)
        if not learned:
            raise InputError(
                f"train.validate_rows = {self._config.validate_rows}",
                "none of their tokens is learned, so there is no loss to measure",
                "measure more rows, raise ctx_len, or see the masks in outputs/preview",
            )
        return nats / learned

    def _measured(self, groups: Iterable[Group], lanes: Lanes) -> Iterator[tuple[Tensor, Tensor]]:
        """What the head reads and the targets: all at once, or segment by segment where training has those."""
        size = self._config.context.segment
        if size is None:
            features, targets, _ = self._read(groups, lanes)
            yield features, targets
            return
        for group in groups:
            state = lanes.before(self.model, group)
            cut: Sequence[Group] = context.segments(group, size)
            whole = evened(cut, self._here, self.device) if self._config.parallel.shares_parameters else cut
            for part in cut:
                x, state = self.model.features(part.inputs, state)
                yield x.flatten(0, 1), part.targets.flatten()
            lanes.keep(group, state or [])
            for part in whole[len(cut) :]:
                x, _ = self.model.features(part.inputs, context.of_one_reading(state or []))
                yield x.flatten(0, 1), part.targets.flatten()

    def sum_ranks(self) -> None:
        """A step is done: let its loss, its tokens and its gradient norm be those of all ranks."""
        if self._here.world > 1:
            shares = [self.step_loss, self.step_learned, self.step_tokens]
            loss, learned, tokens = self._here.total(shares, self.device)
            self.step_loss, self.step_learned, self.step_tokens = loss, int(learned), int(tokens)
        if self._config.parallel.stage:
            engine: Any = self.trainer.strategy.model
            self.grad_norm = float(engine.get_global_grad_norm())

    def note_step(self, step: int) -> dict[str, float]:
        """Add the row of a finished optimizer step to the history; its `tokens` are those learned so far."""
        lr = learning_rate(self._config.optimizer, step - 1, self._steps)
        before = self.history["train"].get(step - 1)
        tokens = self.step_learned + (int(before["tokens"]) if before else 0)
        row = {"tokens": tokens, "loss": self.step_loss, "lr": lr, "grad_norm": self.grad_norm}
        if self._config.context.initial_ctx_len is not None:
            row["ctx_len"] = context.ctx_len_at(self._config.context, self._config.ctx_len, step - 1)
        self.history["train"][step] = row
        return row

    def configure_optimizers(self) -> Any:
        """The optimizer over the groups, each at its own multiple of the scheduled rate."""
        o = self._config.optimizer
        optimizer = optimizers.build(
            self._groups, o, scaled=self._config.precision == "fp16", offloaded=self._config.parallel.offloads
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: learning_rate(o, s, self._steps) / o.lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained, the lanes' states, and the history."""
        checkpoint["state_dict"] = {name: x for name, x in checkpoint["state_dict"].items() if name in self.trained}
        checkpoint["history"] = self.history
        state = self._lanes.of_all(self._here)
        checkpoint["lanes"] = None if state is None else [tuple(block) for block in state]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the history, and the lanes' states."""
        self.history = checkpoint["history"]
        if checkpoint["lanes"] is not None:
            self._lanes.state = [BlockState(*(x.to(self.device) for x in block)) for block in checkpoint["lanes"]]


class _Passes:
    """Those of the strategy that trains now."""

    def __init__(self, training: Training) -> None:
        self._training, self._strategy = training, training.trainer.strategy

    def forward(self, work: Callable[[], T]) -> T:
        whole: Any = self._strategy.model
        with self._strategy.precision_plugin.train_step_context():
            made: T = whole(work)
        return made

    def backward(self, loss: Tensor) -> None:
        self._strategy.precision_plugin.backward(loss, self._training, None)


def _chosen(rows: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Of a batch, these rows of `one`, and the others of `other`, in its dtype."""
    return torch.where(rows.view(-1, *[1] * (other.ndim - 1)), one.to(other.dtype), other)


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
