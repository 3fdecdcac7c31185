"""The course of the learning rate.

Sources: BlinkDL/RWKV-LM (exponential, cosine, warm-up from a share of the rate); wsd: Hu and others 2024, arXiv 2404.06395;
its decay by a square root: Hägele and others 2024, arXiv 2405.18392.
"""

import math

from rwkv_core.config import OptimizerConfig
from rwkv_core.errors import InputError


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of optimizer step `step`, counting from 0, in a run of `steps`.

    It rises over the warm-up, and reaches lr_final in the last step.
    """
    if step < config.warmup_steps:
        if config.warmup_from is None:
            return config.lr * (step + 1) / config.warmup_steps
        return config.lr * (config.warmup_from + (1 - config.warmup_from) * step / config.warmup_steps)
    if config.schedule == "constant":
        form, done = "linear", 0.0
    elif config.schedule == "wsd":
        form, last = config.decay_form or "linear", decay_steps(config, steps)
        done = (step - (steps - last) + 1) / last  # the step before the decay is the last at lr
    elif config.schedule == "exponential":  # as upstream counts: its first step is one down already
        form, done = "exponential", (step - config.warmup_steps + 1) / (steps - config.warmup_steps)
    else:
        form, done = config.schedule, (step - config.warmup_steps) / max(steps - 1 - config.warmup_steps, 1)
    done = min(max(done, 0.0), 1.0)
    if form == "exponential":
        return config.lr * math.pow(config.lr_final / config.lr, done)
    left = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "sqrt": 1 - math.sqrt(done)}[form]
    return config.lr_final + (config.lr - config.lr_final) * left


def decay_steps(config: OptimizerConfig, steps: int) -> int:
    """The last steps of a run of `steps`, in which wsd decays; a share of them is rounded up."""
    if isinstance(config.decay, str):
        return math.ceil(steps * float(config.decay[:-1]) / 100)
    return config.decay or 0


def check(config: OptimizerConfig, steps: int) -> None:
    """Refuse what the run has no room for.

    Raises:
        InputError: the warm-up is as long as the run, or longer; or it and the decay are together longer.
    """
    if config.warmup_steps >= steps:
        raise InputError(
            f"train.optimizer.warmup_steps = {config.warmup_steps}",
            f"this run has {steps} optimizer steps, and the warm-up must end within them",
            "lower it, or train longer",
        )
    if config.warmup_steps + decay_steps(config, steps) > steps:
        raise InputError(
            f"train.optimizer.decay = {config.decay}",
            f"is {decay_steps(config, steps)} steps, and the warm-up {config.warmup_steps}; this run has {steps}",
            "lower one of them, or train longer",
        )
