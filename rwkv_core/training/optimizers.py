"""The optimizers, and which parameters learn how fast in them.

bitsandbytes and deepspeed are imported where they are asked for.
"""

import contextlib
import fnmatch
import importlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from filelock import FileLock

from kernels.build import cache
from rwkv_core.config import OptimizerConfig
from rwkv_core.errors import InputError
from rwkv_core.models.skeleton import RWKV
from rwkv_core.quantize import quiet_bitsandbytes

Groups = list[dict[str, Any]]
"""Of parameters: "params", "lr", "weight_decay", and "muon" where Muon is asked for."""


def groups(model: RWKV, config: OptimizerConfig) -> Groups:
    """The groups of what is trained in a model.

    Raises:
        InputError: a pattern of `rates` matches nothing that is trained.
    """
    short = {name: re.sub(r"^blocks\.\d+\.", "", name) for name, p in model.named_parameters() if p.requires_grad}
    rates: dict[str, float] = {}
    for pattern, rate in config.rates.items():
        found = [name for name, known in short.items() if fnmatch.fnmatchcase(known, pattern)]
        if not found:
            raise InputError(
                f"train.optimizer.rates has {pattern!r}",
                "each must match a parameter that is trained",
                f"there are {', '.join(sorted(set(short.values())))}",
            )
        rates = dict.fromkeys(found, rate) | rates
    return model.parameter_groups(
        config.lr, config.weight_decay, own_rates=config.layerwise_lr, rates=rates, muon=config.kind == "muon"
    )


def build(
    groups: Groups, config: OptimizerConfig, *, scaled: bool = False, offloaded: bool = False
) -> torch.optim.Optimizer:
    """The optimizer of a kind over the groups.

    Args:
        groups: each may have its own "lr" and "weight_decay".
        config: the kind, and what all kinds are told.
        scaled: the loss is (fp16), so the gradients must be measured and clipped before the optimizer sees them.
        offloaded: DeepSpeed keeps what is optimized in the CPU's memory, wherever the model is.

    Raises:
        InputError: the kind needs a library that is missing, or another device.
    """
    device = "cpu" if offloaded else groups_device(groups)
    common: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    match config.kind:
        case "adamw":
            return torch.optim.AdamW(groups, **common, fused=not scaled)
        case "muon":
            return Muon(groups, config, fused=not scaled)
        case "adamw_8bit":
            with quiet_bitsandbytes():
                optim: Any = _library("bitsandbytes", config.kind).optim
            made: torch.optim.Optimizer = optim.AdamW8bit(groups, **common)
            return made
        case "adamw_8bit_paged":
            _on("cuda", device, config.kind, "its pages are an NVIDIA GPU's", "adamw_8bit")
            with quiet_bitsandbytes():
                optim = _library("bitsandbytes", config.kind).optim
            made = optim.PagedAdamW8bit(groups, **common)
            return made
        case "fused_adam":
            _on("cuda", device, config.kind, "it is a program for NVIDIA GPUs", "adamw, which is fused too")
            return _compiled(config.kind, lambda adam: adam.FusedAdam(groups, **common, adam_w_mode=True))
        case "cpu_adam":
            _on("cpu", device, config.kind, "what it steps must be in the CPU's memory", "adamw or fused_adam")
            return _compiled(
                config.kind, lambda adam: _cpu_adam(adam.DeepSpeedCPUAdam)(groups, **common, adamw_mode=True)
            )


def groups_device(groups: Groups) -> str:
    """Kind of device that the parameters are on: cpu, cuda."""
    return next(str(p.device.type) for group in groups for p in group["params"])


class Muon(torch.optim.Optimizer):
    """torch's Muon for the groups marked "muon", its AdamW for the others: one optimizer to schedule, save and continue.

    A step of Muon is scaled to the length that AdamW's would have (0.2 sqrt(the longer side)), so both go by one rate and one
    decay. Sources: Jordan 2024, kellerjordan.github.io/posts/muon; the scale: Liu and others 2025, arXiv 2502.16982.
    """

    def __init__(self, groups: Groups, config: OptimizerConfig, *, fused: bool) -> None:
        muon = getattr(torch.optim, "Muon", None)
        if muon is None:
            raise InputError(
                "train.optimizer.kind = muon",
                f"torch {torch.__version__} does not have it yet; it came with 2.9",
                "install a later torch, or set adamw",
            )
        chosen = [group for group in groups if group.get("muon") and group["params"]]
        others = [group for group in groups if not group.get("muon") and group["params"]]
        if not chosen:
            raise InputError(
                "train.optimizer.kind = muon", "is for the blocks' matrices, of which none is trained", "set adamw"
            )
        super().__init__([*chosen, *others], {"lr": config.lr})
        # they make the defaults of their groups, and are then made to share this one's groups and state
        self._parts = [
            muon(
                self.param_groups[: len(chosen)], lr=config.lr, momentum=config.momentum, adjust_lr_fn="match_rms_adamw"
            )
        ]
        if others:
            self._parts.append(
                torch.optim.AdamW(
                    self.param_groups[len(chosen) :], lr=config.lr, betas=config.betas, eps=config.eps, fused=fused
                )
            )
        self._step_supports_amp_scaling = False
        self._share()

    def _share(self) -> None:
        first = 0
        for part in self._parts:
            count = len(part.param_groups)
            part.param_groups = self.param_groups[first : first + count]
            part.state = self.state
            first += count

    def load_state_dict(self, state_dict: Any) -> None:
        """Go on from a saved state."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss


def _cpu_adam(adam: Any) -> Any:
    """DeepSpeed's, made so that a continued run has the bits of one that was not stopped."""

    class CPUAdam(adam):  # type: ignore[misc]
        """It multiplies the betas' powers up from step to step; begun anew in each, it takes them from the step's number."""

        def step(self, closure: Any = None) -> Any:
            group = self.param_groups[0]
            self.ds_opt_adam.create_adam(
                self.opt_id, group["lr"], *group["betas"], group["eps"], group["weight_decay"], self.adam_w_mode, False
            )
            return super().step(closure)

    return CPUAdam


def _compiled(kind: str, make: Callable[[Any], torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """One of DeepSpeed's, which compiles it when it is first made."""
    adam = _library("deepspeed.ops.adam", kind)
    try:
        with _own_extensions():
            return make(adam)
    except RuntimeError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[-1]
        raise InputError(
            f"train.optimizer.kind = {kind}",
            f"DeepSpeed could not compile it: {reason}",
            "install a C++ compiler (and nvcc, for fused_adam) and ninja, or set adamw",
        ) from error


@contextlib.contextmanager
def _own_extensions() -> Iterator[None]:
    """Within, torch compiles extensions in a folder where nobody else does, one process after the other.

    Its own lock is a file that stays when a process is killed at it, and whoever comes next waits for ever. Here it can go: the
    lock around it is the system's, which ends with its process.
    """
    folder = cache() / f"extensions-{torch.__version__}"
    folder.mkdir(parents=True, exist_ok=True)
    before = os.environ.get("TORCH_EXTENSIONS_DIR")
    with FileLock(folder / "compiling"):
        for left in folder.glob("*/lock"):
            left.unlink()
        os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
        try:
            yield
        finally:
            del os.environ["TORCH_EXTENSIONS_DIR"]
            if before is not None:
                os.environ["TORCH_EXTENSIONS_DIR"] = before


def _library(name: str, kind: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise InputError(
            f"train.optimizer.kind = {kind}", f"needs {package}: {error}", f"pip install {package}, or set adamw"
        ) from None


def _on(wanted: str, device: str, kind: str, rule: str, instead: str) -> None:
    if device != wanted:
        raise InputError(f"train.optimizer.kind = {kind}", f"{rule}, and this run is on {device}", f"set {instead}")


def mixed(precision: str) -> torch.dtype | None:
    """What autocast makes products of; None: of what the model is."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)


@contextlib.contextmanager
def products(precision: str) -> Iterator[None]:
    """Within, float32 products are as exact as a precision asks for: those of tf32 may be rounded by the GPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
