"""The course of the learning rate."""

import math

from rwkv_core.config import OptimizerConfig
from rwkv_core.errors import InputError


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of optimizer step `step`, counting from 0, in a run of `steps`.

    It rises linearly over the warm-up, the first step having 1 / warmup_steps of it, and reaches lr_final in the last step.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = min((step - config.warmup_steps) / max(steps - 1 - config.warmup_steps, 1), 1.0)
    left = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.schedule]
    return config.lr_final + (config.lr - config.lr_final) * left


def check(config: OptimizerConfig, steps: int) -> None:
    """Refuse a warm-up that the run does not get through.

    Raises:
        InputError: it is as long as the run, or longer.
    """
    if config.warmup_steps >= steps:
        raise InputError(
            f"train.optimizer.warmup_steps = {config.warmup_steps}",
            f"this run has {steps} optimizer steps, and the warm-up must end within them",
            "lower it, or train longer",
        )
