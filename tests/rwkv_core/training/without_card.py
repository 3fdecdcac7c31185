"""DeepSpeed and FSDP on processes without cards: Lightning asks for cards, what the two do with tensors does not."""

import deepspeed
import torch
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, fsdp
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    StateDictType,
)

from rwkv_core.training import parallel

# DeepSpeed's own sum over shared memory serves inference alone. It is compiled when a run begins, which takes a minute, and
# waits without end for a lock that a process killed at it has left.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class DeepSpeed(DeepSpeedStrategy):
    """As Lightning has it, but for the check that there are cards."""

    def setup_environment(self):
        # of a small model stage 3 would keep each parameter whole everywhere
        self.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        DDPStrategy.setup_environment(self)

    def setup_distributed(self):
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self):
        return torch.device("cpu", self.local_rank)


class FSDP(FSDPStrategy):
    """As Lightning has it, on a device that has no number."""

    def _setup_model(self, model):
        return FullyShardedDataParallel(
            model, sharding_strategy=self.sharding_strategy, device_id=torch.device("cpu"), **self.kwargs
        )


def _whole(module, world_size, rank0_only=True):
    """Lightning's, without the copy to the CPU: it frees what is there already."""
    return FullyShardedDataParallel.state_dict_type(
        module,
        StateDictType.FULL_STATE_DICT,
        FullStateDictConfig(offload_to_cpu=False, rank0_only=rank0_only),
        FullOptimStateDictConfig(offload_to_cpu=False, rank0_only=rank0_only),
    )


def allow():
    """Let `parallel.strategy` give these."""
    fsdp._get_full_state_dict_context = _whole
    given = parallel.strategy

    def strategy(config):
        made = given(config)
        for kind in (DeepSpeed, FSDP):
            if isinstance(made, kind.__base__):
                made.__class__ = kind
        return made

    parallel.strategy = strategy
