"""Any method of Hugging Face's peft that adapts matrices, by that library's own layers.

The library makes the layer, gives it its initial values, computes it and merges it. What is ours is where it stands: the matrix
keeps its name, only what is trained beside it is added to the model, and each matrix's layer is made for it alone, so that a
merge needs no model. Hence what a method shares between matrices, or learns from data first, can't be had.
"""

import contextlib
import copy
import functools
import importlib
import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from rwkv_core.adapters.linear import AdaptedLinear, autocast, fitting, wide
from rwkv_core.errors import InputError, WorldError
from rwkv_core.quantize import Packed, quiet_bitsandbytes

if TYPE_CHECKING:
    from rwkv_core.config import PeftConfig

_NAME = "default"
"""What the library calls an adapter that has no name."""

_SHARED = "its matrices share tensors, which the merge of one matrix does not have"
_PROMPT = "it adapts the text before the first token, and no matrix: tune a state instead"
_OWN = "what it makes of the base's matrix is not in its file, and depends on the base's precision and the machine"
REFUSED = {
    "ADALORA": "its ranks are decided during training by calls that Lightning's loop does not make",
    "ADAMSS": _OWN, "OSF": _OWN, "PSOFT": _OWN,
    "FROD": _SHARED, "LILY": _SHARED, "PVERA": _SHARED, "RANDLORA": _SHARED, "TINYLORA": _SHARED, "UNILORA": _SHARED,
    "VBLORA": _SHARED, "VERA": _SHARED,
    "ADAPTION_PROMPT": _PROMPT, "CARTRIDGE": _PROMPT, "CPT": _PROMPT, "MULTITASK_PROMPT_TUNING": _PROMPT, "P_TUNING": _PROMPT,
    "PREFIX_TUNING": _PROMPT, "PROMPT_TUNING": _PROMPT,
    "BEFT": "it trains biases, and RWKV's matrices have none: adapter.also trains parameters as they are",
    "LN_TUNING": "it trains norms as they are: say adapter.also: [ln*]",
    "TRAINABLE_TOKENS": "it trains rows of tokens: say adapter.also: ['emb.weight[65530-65535]']",
    "POLY": "it needs the number of a task with each text",
    "SHADOW": "it runs a second model beside the first",
    "XLORA": "it mixes adapters by what the model says of a text, so no matrix computes the same",
}  # fmt: skip
"""Methods that can't work here, and why."""

_OF_A_MODEL = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_config", "megatron_core", "peft_version", "revision",
    "runtime_config", "task_type",
}  # fmt: skip
"""Settings that say nothing of what is computed."""

_PLACES = {
    "exclude_modules", "feedforward_modules", "layer_replication", "layers_pattern", "layers_to_transform", "modules_to_save",
    "target_modules", "target_parameters", "trainable_token_indices",
}  # fmt: skip
"""Settings that say where, as do those that end in _pattern."""


class PeftLinear(AdaptedLinear):
    """A frozen matrix, and the parameters of the library's layer, which computes both."""

    PARTS: ClassVar[tuple[str, ...]] = ()
    """Each layer's own."""

    def __init__(self, base: nn.Linear, config: "PeftConfig", generator: torch.Generator) -> None:
        """See `AdaptedLinear`.

        Raises:
            ValueError: as there; or its initial values change the matrix.
            InputError: the settings are none of such a method.
            WorldError: the library is missing.
        """
        super().__init__(base, config, generator)
        with unset_fake_temporarily():  # a number, also where a plan makes tensors without values
            seed = int(torch.randint(2**62, (), generator=generator))
        packed: Any = self.weight if isinstance(self.weight, Packed) else None
        weight = self.weight.detach() if packed is None else packed.unpacked()
        layer = (_planned if isinstance(weight, FakeTensor) else _layer)(weight, config.config, seed)
        layer.base_layer = base  # of the same weight: the model's own way to multiply by it
        if packed is not None:
            _check_products_alone(layer, base.in_features, config)
        self._layer = (layer,)  # not as a module of this one, whose names would be in the model's
        trained, kept = [], []
        for name, x in _parts(layer).items():
            if isinstance(x, nn.Parameter) and x.requires_grad:
                self.register_parameter(name, x)
                trained.append(name)
            else:
                self.register_buffer(name, x)
                kept.append(name)
        self.PARTS, self.KEPT = tuple(trained), tuple(kept)  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        x = autocast(x)
        y: Tensor = self._layer[0](x)
        return y.to(x.dtype)  # some of its layers answer in the precision of what they train

    def train(self, mode: bool = True) -> Self:
        """Dropout, or none."""
        self._layer[0].train(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As for the parameters, which both hold, for what the layer has beside them."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._layer[0]._apply(fn)
        return self

    @property
    def beside(self) -> list[Tensor]:
        """What is neither trained nor saved, and no buffer of the model: where in the matrix something is, and the like."""
        return _beside(self._layer[0])

    @staticmethod
    def merged(weight: Tensor, parts: Mapping[str, Tensor], config: "PeftConfig") -> Tensor:
        """See `AdaptedLinear.merged`."""
        layer = _layer(weight, config.config, 0)
        held = _parts(layer)
        given = fitting(parts, {name: tuple(x.shape) for name, x in held.items()})
        with torch.no_grad():
            for x, value in zip(held.values(), given, strict=True):
                x.copy_(value)
        layer.eval()
        layer.merge()
        y: Tensor = layer.get_base_layer().weight.detach()
        return y


@torch.no_grad()
def _check_products_alone(layer: Any, inputs: int, config: "PeftConfig") -> None:
    """Refuse a method that reads the numbers of the matrix itself: packed, it only multiplies."""
    try:
        layer(torch.zeros(1, inputs, device=layer.base_layer.weight.device))
    except (AttributeError, TypeError) as error:
        raise InputError(
            f"adapter.config.peft_type = {config.config['peft_type']}",
            f"it reads the matrix itself, which model.quantize packs ({error})",
            "set model.quantize: none, or take another method",
        ) from None


def all_tensors(model: nn.Module) -> list[Tensor]:
    """All that a model has in memory: parameters, buffers, and what the library's layers hold beside them."""
    beside = [x for module in model.modules() if isinstance(module, PeftLinear) for x in module.beside]
    return [*model.parameters(), *model.buffers(), *beside]


def load_library() -> None:
    """Import it, if it is there: who asks afterwards how much memory this process has taken is told of that too."""
    if importlib.util.find_spec("peft") is not None:
        with quiet_bitsandbytes():
            importlib.import_module("peft")


def part_name(key: str) -> str:
    """What a part is called in our files, after the module: a word, made from the library's name within the layer."""
    words = [word for word in key.split(".") if word != _NAME]
    return "_".join(words[:-1] if len(words) > 1 and words[-1] == "weight" else words)


def settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide what is computed, without those that are the library's own values.

    Args:
        values: of one of the library's configs: `adapter.config`, or what its adapter_config.json says.

    Raises:
        InputError: they are none of a method that works here, or say where it is to work.
        WorldError: the library is missing.
    """
    ours, plain = vars(_config(values)), vars(_config({"peft_type": values.get("peft_type")}))
    named = {name: x for name, x in values.items() if name in ours and name not in _OF_A_MODEL and not _is_place(name)}
    found = {name: ours[name] for name in named if ours[name] != plain[name]}
    return {"peft_type": values["peft_type"]} | {
        name: x.value if isinstance(x, Enum) else sorted(x) if isinstance(x, set) else x for name, x in found.items()
    }


def _is_place(name: str) -> bool:
    return name in _PLACES or name.endswith("_pattern")


def _config(values: Mapping[str, Any]) -> Any:
    """The library's config, for a model of one matrix."""
    kind = values.get("peft_type")
    if kind in REFUSED:
        raise InputError(f"adapter.config.peft_type = {kind}", REFUSED[kind], "take another method")
    if importlib.util.find_spec("peft") is None:
        raise WorldError("peft", f"the package that has {kind} is missing", "pip install 'rwkv-flow[peft]'")
    with quiet_bitsandbytes():
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as KINDS
    if kind not in KINDS:
        known = ", ".join(sorted({k.value for k in KINDS} - REFUSED.keys()))
        raise InputError(
            f"adapter.config.peft_type = {kind}", "peft has no such method", f"those that work here: {known}"
        )
    places = [name for name, value in values.items() if _is_place(name) and value]
    if places:
        raise InputError(
            f"adapter.config.{places[0]} = {values[places[0]]!r}",
            "where a method works, adapter.targets, layers and also say, and it is the same everywhere",
            "leave it out",
        )
    known_settings = {name: x for name, x in values.items() if name not in _OF_A_MODEL and not _is_place(name)}
    fixed = {"target_modules": ["matrix"]} | ({"feedforward_modules": []} if kind == "IA3" else {})
    try:
        return KINDS[kind](**known_settings | fixed)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"adapter.config = {dict(values)}", str(error), f"see peft's documentation of {kind}"
        ) from None


def _layer(weight: Tensor, values: Mapping[str, Any], seed: int) -> Any:
    """The library's layer for a copy of this matrix, in the precision that sums over it are made in."""
    config = _config(values)
    from peft import inject_adapter_in_model

    matrix = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    matrix.weight = nn.Parameter(weight.to(wide(weight), copy=True), requires_grad=False)
    model = nn.ModuleDict({"matrix": matrix})
    devices = [weight.device] if weight.is_cuda else []
    with warnings.catch_warnings(), torch.random.fork_rng(devices=devices), _same_environment():
        warnings.simplefilter("ignore")  # of models in general: that this one has no config, or is of no known family
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, model)
        except (ValueError, NotImplementedError, RuntimeError, AssertionError) as error:
            raise ValueError(f"peft refuses a matrix of {tuple(weight.shape)}: {error}") from None
    layer: Any = model["matrix"]
    if not torch.equal(matrix.weight, weight.to(matrix.weight.dtype)):
        raise ValueError(
            "its initial values change the matrix itself, which its file does not tell; take others, or kind pissa"
        )
    return layer


def _planned(weight: Tensor, values: Mapping[str, Any], seed: int) -> Any:
    """The same for a matrix without memory, see `rwkv_core.footprint`: what stands beside it has none either."""
    pattern = _pattern(tuple(weight.shape), weight.dtype, json.dumps(values), seed=0)
    instead: dict[int, Any] = {}
    for x in (*_parts(pattern).values(), *_beside(pattern)):
        empty = torch.empty_like(x)
        instead[id(x)] = nn.Parameter(empty, requires_grad=x.requires_grad) if isinstance(x, nn.Parameter) else empty
    return copy.deepcopy(pattern, instead)


@functools.lru_cache(maxsize=8)
def _pattern(shape: tuple[int, int], dtype: torch.dtype, values: str, *, seed: int) -> Any:
    """A layer as those of all matrices of a shape are, but for the values: the library looks at some when it makes one."""
    with unset_fake_temporarily():
        layer = _layer(torch.zeros(shape, dtype=dtype), json.loads(values), seed)
    layer.base_layer = nn.Module()  # what is kept is small
    drops = [getattr(layer, name, {}).get(_NAME, 0.0) for name in ("module_dropout", "rank_dropout")]
    if hasattr(layer, "module_dropout") and not any(drops):
        layer.eval()  # it does the same, without a draw that says whether it does anything
    return layer


def _beside(layer: Any) -> list[Tensor]:
    """All that a layer holds but for the matrix and its parts."""
    known = {id(x) for x in _parts(layer).values()}
    matrix = set(layer.base_layer.modules())
    held = [x for module in layer.modules() if module not in matrix for x in vars(module).values()]
    values = [y for x in held for y in (x.values() if type(x) is dict else [x])]
    return [x for x in values if isinstance(x, Tensor) and id(x) not in known]


@contextlib.contextmanager
def _same_environment() -> Iterator[None]:
    """Take back what the library leaves in the environment: where BOFT can't compile, $CC and $CXX."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _parts(layer: Any) -> dict[str, Tensor]:
    """What stands beside the matrix: parameters and saved buffers, by their names in our files."""
    found: dict[str, Tensor] = {}
    for key, x in layer.state_dict(keep_vars=True).items():
        if not key.startswith("base_layer."):
            if part_name(key) in found:
                raise ValueError(f"two of its tensors would be called {part_name(key)} in a file")
            found[part_name(key)] = x
    if not found:
        raise ValueError("it adapts no matrix")
    return found
