"""Which processes share a run, through Lightning's strategies: where each stands, what they send each other, what they save.

All ranks have the same rows of a step between them, and the loss is one weighted mean, whatever the split. Each strategy
averages the gradients of the ranks, and Lightning divides by the micro-batches of a step; `loss_factor` undoes both.
"""

import contextlib
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import (  # type: ignore[attr-defined]
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    OptimStateKeyType,
    StateDictType,
)

from kernels.head_loss import IGNORE
from rwkv_core.config import ParallelConfig, TrainConfig
from rwkv_core.data.sampling import Batch, Group
from rwkv_core.errors import InputError
from rwkv_core.models.skeleton import Block
from rwkv_core.processes import FIRST
from rwkv_core.tokenizer import END
from rwkv_core.training import checkpoints

T = TypeVar("T")

_MEGABYTE = 1 << 20


class Ranks(NamedTuple):
    """A process among those that share a run. All of them call each method, in the same order."""

    rank: int = 0
    world: int = 1

    def total(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Sums over the ranks, in float64: one message for all values."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(tensor)
        return tensor.tolist()

    def most(self, value: int, device: torch.device) -> int:
        """The largest of the ranks'."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value, device=device)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
        return int(tensor)

    def all(self, one: T) -> list[T]:
        """What each rank has, by rank."""
        if self.world == 1:
            return [one]
        found: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(found, one)
        return found


ALONE = Ranks()
"""Of a run that is one process."""


def environment() -> ClusterEnvironment:
    """Who starts the processes: torchrun, Slurm's srun, or this one."""
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if "SLURM_NTASKS" in os.environ and SLURMEnvironment.detect():
        try:
            return SLURMEnvironment(auto_requeue=False)  # a stopped run is whole: Slurm's own --requeue runs it again
        except RuntimeError:  # --ntasks alone does not say how many are on each machine
            given = f"SLURM_NTASKS = {os.environ['SLURM_NTASKS']}"
            raise InputError(given, "Slurm must say how many are on a node", "use srun --ntasks-per-node") from None
    return LightningEnvironment()


def devices(config: ParallelConfig) -> int:
    """Processes on this machine."""
    if config.devices is not None:
        return config.devices
    if config.strategy == "one_device":
        return 1
    started = os.environ.get("LOCAL_WORLD_SIZE") if TorchElasticEnvironment.detect() else None
    if started is None and "SLURM_NTASKS" in os.environ:
        started = os.environ.get("SLURM_NTASKS_PER_NODE")
    return int(started) if started is not None else max(1, torch.cuda.device_count())


def ranks(config: ParallelConfig) -> Ranks:
    """Where this process stands.

    Raises:
        InputError: the settings do not fit this machine, or what torchrun or Slurm has started.
    """
    here, where = devices(config), environment()
    cards = torch.cuda.device_count()
    if cards and here > cards:
        raise InputError(
            f"train.parallel.devices = {here}", f"this machine has {cards}", f"set {cards} or less, or null"
        )
    if config.stage and not torch.cuda.is_available():
        raise InputError(
            f"train.parallel.strategy = {config.strategy}",
            "DeepSpeed needs an NVIDIA card",
            "set ddp, fsdp or one_device",
        )
    world = here * config.nodes
    if isinstance(where, LightningEnvironment):
        if config.nodes > 1:
            raise InputError(
                f"train.parallel.nodes = {config.nodes}",
                "the processes of several machines are started by torchrun or Slurm",
                "see docs/several-devices.md for the command",
            )
        return Ranks(where.local_rank(), world)
    if where.world_size() != world:
        raise InputError(
            f"train.parallel has devices = {here} and nodes = {config.nodes}",
            f"{where.world_size()} processes were started",
            "let devices * nodes be as many",
        )
    return Ranks(where.global_rank(), world)


def check(config: TrainConfig, *, bridged: bool, after_state: bool, quantized: bool) -> None:
    """Refuse what a strategy can't train.

    Args:
        config: of the run.
        bridged: the adapter's kind is peft.
        after_state: a state is tuned.
        quantized: the base's matrices are packed.

    Raises:
        InputError: it can't.
    """
    if after_state and config.parallel.shares_parameters:
        raise InputError(
            f"train.parallel.strategy = {config.parallel.strategy}",
            "each process has a share of a block's parameters, and adapter.state is read outside the block",
            "set ddp or deepspeed_stage_2",
        )
    if bridged and config.parallel.shares_parameters:
        raise InputError(
            f"train.parallel.strategy = {config.parallel.strategy}",
            "each process has a share of the parameters, and those of adapter.kind = peft are in that library's layers too",
            "set ddp or deepspeed_stage_2, or the adapter to a kind of ours",
        )
    if quantized and config.parallel.shares_parameters:
        raise InputError(
            f"train.parallel.strategy = {config.parallel.strategy}",
            "each process has a share of the parameters, and those of model.quantize can't be cut up",
            "set it to none, or ddp",
        )
    if config.saves.asks and config.parallel.shares:
        raise InputError(
            f"train.saves with {config.parallel.strategy}",
            "what is trained is whole at the end of the run alone",
            "set all of it to null, 0 and last, or the strategy to ddp",
        )
    if config.optimizer.kind == "muon" and config.parallel.shares:
        raise InputError(
            f"train.optimizer.kind = muon with {config.parallel.strategy}",
            "a step of Muon is of a whole matrix, and each process has a share of it",
            "set adamw, or the strategy to ddp",
        )
    if config.samples is not None and config.parallel.shares_parameters:
        raise InputError(
            f"train.samples with {config.parallel.strategy}",
            "each process has a share of the parameters, and a text is made by one",
            "set null, or the strategy to ddp",
        )
    if config.parallel.strategy == "fsdp" and config.precision in ("bf16", "fp16"):
        raise InputError(
            f"train.precision = {config.precision}",
            "fsdp has the parameters of a block end to end, in one dtype, and what is trained stays float32",
            "set fp32, or deepspeed_stage_3",
        )


def trainer(config: TrainConfig, here: Ranks, plugins: Sequence[Any] = (), **arguments: Any) -> pl.Trainer:
    """Lightning's, with the strategy that the settings ask for."""
    p = config.parallel
    if p.strategy != "one_device":
        plugins = [*plugins, environment()]
        if here.rank == 0:
            os.environ[FIRST] = str(os.getpid())  # Lightning starts the others with this one's environment
    return pl.Trainer(
        accelerator="auto",
        devices=devices(p),
        num_nodes=p.nodes,
        strategy=strategy(config),
        plugins=list(plugins),
        **arguments,
    )


def strategy(config: TrainConfig) -> Strategy | str:
    """Lightning's strategy."""
    p = config.parallel
    match p.strategy:
        case "one_device":
            return "auto"
        case "ddp":
            # A parameter that nothing reads has no gradient, and no weight decay, as on one device. And the order of summing is
            # that of the first step for ever.
            return DDPStrategy(
                find_unused_parameters=True,
                forward_sync_buffers=False,
                gradient_as_bucket_view=True,
                bucket_cap_mb=p.bucket_mb,
            )
        case "fsdp":
            kind = FSDPStrategy if torch.cuda.is_available() else OnCPU
            return kind(auto_wrap_policy={Block}, state_dict_type="full", sharding_strategy="FULL_SHARD")
        case _:
            return DeepSpeedStrategy(config=deepspeed_config(config), exclude_frozen_parameters=True)


class OnCPU(FSDPStrategy):
    """Lightning's FSDP without a card: torch is told so, and nothing whole is moved to the CPU, where moving would free it."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(
            model, sharding_strategy=self.sharding_strategy, device_id=self.root_device, **self.kwargs
        )

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole, on the first rank."""
        with self._whole() as model:
            return model.state_dict()

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Whole, on the first rank, as of an optimizer on one device."""
        plain = getattr(optimizer, "_optimizer", optimizer)  # of Lightning's wrapper
        with self._whole() as model:
            state = FullyShardedDataParallel.optim_state_dict(model, plain)
            if self.global_rank:
                return state
            return FullyShardedDataParallel.rekey_optim_state_dict(state, OptimStateKeyType.PARAM_ID, model)

    @contextlib.contextmanager
    def _whole(self) -> Iterator[FullyShardedDataParallel]:
        model: Any = self.model
        of_model = FullStateDictConfig(offload_to_cpu=False, rank0_only=True)
        of_optimizer = FullOptimStateDictConfig(offload_to_cpu=False, rank0_only=True)
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, of_model, of_optimizer):
            yield model


def deepspeed_config(config: TrainConfig) -> dict[str, Any]:
    """DeepSpeed's settings; Lightning adds accumulation and precision.

    Source: deepspeed.ai/docs/config-json.
    """
    p = config.parallel
    bucket = p.bucket_mb * _MEGABYTE // (2 if config.precision in ("bf16", "fp16") else 4)  # DeepSpeed counts elements
    zero: dict[str, Any] = {
        "stage": p.stage,
        "contiguous_gradients": True,
        "overlap_comm": True,
        "reduce_scatter": True,
        "allgather_partitions": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if p.offloads:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        if p.stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # any of torch's, which work on parts as on the whole
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": config.optimizer.grad_clip,
        "train_micro_batch_size_per_gpu": config.micro_batch,  # said in its log, no more
    }


def loss_factor(config: TrainConfig, world: int) -> int:
    """What a micro-batch's share of its step's mean is multiplied by, so that the gradient is that of the mean.

    The ranks' gradients are averaged, and Lightning divides by `accumulate`; so does DeepSpeed's backward, once more
    (pytorch-lightning 2.6.6, ClosureResult; deepspeed 0.19.8, DeepSpeedEngine.backward).
    """
    return world * config.accumulate ** (2 if config.parallel.stage else 1)


def evened(groups: Sequence[Group], here: Ranks, device: torch.device) -> tuple[Group, ...]:
    """As many groups as the rank with the most has: the added ones are of one token, and nothing is learned of it.

    Where each process has a share of the parameters, they meet in every forward pass.
    """
    more = max(1, here.most(len(groups), device)) - len(groups)
    one = Group(torch.full((1, 1), END, device=device), torch.full((1, 1), IGNORE, device=device), None, None, None)
    return (*groups, *[one] * more)


def gathered(trainer: pl.Trainer, config: TrainConfig, names: Collection[str]) -> dict[str, Tensor]:
    """What is trained, whole and in the precision it is trained in. All ranks call it; of fsdp, the first has the answer.

    Where DeepSpeed trains in bf16, the model has a rounded copy.

    Args:
        trainer: that is training now.
        config: of the run.
        names: of parameters that are trained, and of buffers, in Lightning's module.
    """
    if config.parallel.strategy == "fsdp":
        found = trainer.strategy.lightning_module_state_dict()
        return {name: x for name, x in found.items() if name in names}
    training = trainer.lightning_module
    named = dict((*training.named_parameters(), *training.named_buffers()))
    chosen = {name: x for name, x in named.items() if name in names}
    if not config.parallel.stage:
        return {name: x.detach() for name, x in chosen.items()}
    from deepspeed.utils import safe_get_full_fp32_param

    return {
        name: (safe_get_full_fp32_param(x) if isinstance(x, nn.Parameter) else x).detach().cpu().clone()
        for name, x in chosen.items()
    }


def read_together(trainer: pl.Trainer, batch: Batch, number: int) -> float:
    """Read a micro-batch that only this rank has something to learn of, or only another, and take no step that would change
    what is trained: the norm of its share of the step's gradient. All ranks call it.

    What the strategy keeps beside the parameters is of no step any more.
    """
    training: Any = trainer.lightning_module
    strategy: Any = trainer.strategy
    whole = strategy.model
    stage = isinstance(strategy, DeepSpeedStrategy)
    if stage:  # it finds the norm in its step alone
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = 0.0
        whole.set_gradient_accumulation_boundary(True)
    loss = strategy.training_step(batch, number)
    strategy.backward(loss / trainer.accumulate_grad_batches, None)  # as Lightning divides it
    if not stage:
        return float(training.norm_of(training.parameters()))
    whole.step()
    return float(whole.get_global_grad_norm())


def leave_whole(trainer: pl.Trainer, config: TrainConfig, names: Collection[str]) -> None:
    """Put what is `gathered` into the model in place of the processes' shares. All ranks call it, when training has ended."""
    if not config.parallel.shares:
        return
    tensors, training = gathered(trainer, config, names), trainer.lightning_module
    _unwrap(training)
    for name, x in tensors.items():
        module, _, leaf = name.rpartition(".")
        # under a name that neither sees: a parameter of theirs has hooks, and of ZeRO 3 no data
        training.get_submodule(module)._parameters[leaf] = nn.Parameter(x)


@torch.no_grad()
def take_back(trainer: pl.Trainer, training: nn.Module, config: TrainConfig) -> None:
    """Let each process have the whole model by itself again, on the CPU as it was loaded. Training has ended between two steps.

    The parameters stay the objects that they were, for whoever else holds them. All ranks call it.
    """
    if not config.parallel.shares:
        return
    whole: Any = trainer.strategy.model
    if config.parallel.strategy == "fsdp":
        # a block after the other to the CPU, but for what is there: moving would free it
        on_all = FullStateDictConfig(offload_to_cpu=torch.cuda.is_available())
        with FullyShardedDataParallel.state_dict_type(whole, StateDictType.FULL_STATE_DICT, on_all):
            tensors = whole.state_dict()
        _unwrap(training)
    else:
        import deepspeed

        trained = [name for name, p in training.named_parameters() if p.requires_grad]
        tensors = gathered(trainer, config, trained)
        for name, p in training.named_parameters():
            if name not in tensors:
                with deepspeed.zero.GatheredParameters([p], enabled=config.parallel.stage == 3):
                    tensors[name] = p.detach().cpu().clone()
        whole.destroy()
    for name, p in training.named_parameters():
        vars(p).clear()  # what they have noted with it
        p.data, p.grad = tensors[name], None


def _unwrap(training: nn.Module) -> None:
    """Take FSDP's modules out."""
    for parent in list(training.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, FullyShardedDataParallel):
                setattr(parent, name, child.module)


def plain(name: str) -> str:
    """A module's name without those of the strategy."""
    return name.replace("_fsdp_wrapped_module.", "")


def save(trainer: pl.Trainer, config: TrainConfig, folder: Path) -> None:
    """Save the run in its folder. All ranks call it; the first writes, with DeepSpeed all of them.

    Raises:
        WorldError: on the first rank: the folder can't be written to.
    """
    shared = config.parallel.stage > 0

    def write(path: Path) -> None:
        trainer.save_checkpoint(path)
        if shared:
            training: Any = trainer.lightning_module
            told = {"global_step": trainer.global_step, "state_dict": gathered(trainer, config, training.trained)}
            training.on_save_checkpoint(told)
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                callback.on_save_checkpoint(trainer, training, told)
            if trainer.is_global_zero:
                torch.save(told, path / checkpoints.SUMMARY)

    checkpoints.save(folder, write, first=trainer.is_global_zero, shared=shared)
    trainer.strategy.barrier()
