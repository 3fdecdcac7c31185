"""DeepSpeed on processes without cards: Lightning asks for cards, what it does with tensors does not."""

import deepspeed
import torch
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy

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


def allow():
    """Let `parallel.strategy` give this."""
    given = parallel.strategy

    def strategy(config):
        made = given(config)
        if isinstance(made, DeepSpeedStrategy):
            made.__class__ = DeepSpeed
        return made

    parallel.strategy = strategy
