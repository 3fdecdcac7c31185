"""Operators that are torch.library's for whoever traces a program, and plain calls for whoever runs it.

What torch.library adds to a call is Python, and a matrix product leaves none of it in the processor's cache: on a CPU it then
takes longer than some of the kernels do.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PLAIN = (Tensor, torch.nn.Parameter)
"""Classes of tensors that nobody else has a say in."""


def operator(name: str) -> Callable[[Callable[..., Any]], "Operator"]:
    """Make a function with annotated tensors and settings an operator of that name, which changes none of its inputs."""
    return lambda function: Operator(name, function)


class Operator:
    """A function that torch.library knows, and that is called without it where that makes no difference."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.registered = torch.library.custom_op(name, function, mutates_args=())
        """For `opcheck`."""
        self._name, self._plain, self._run = name, function, function

    def register_fake(self, function: Callable[..., Any]) -> None:
        """Give the shapes, dtypes and devices of the results; see `torch.library.register_fake`."""
        self.registered.register_fake(function)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """Give the backward; see `torch.library.register_autograd`."""
        self.registered.register_autograd(backward, setup_context=setup_context)
        members = {
            "forward": staticmethod(self._plain),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(backward),
        }
        function: Any = type(self._name, (torch.autograd.Function,), members)
        self._run = function.apply

    def __call__(self, *args: Any) -> Any:
        """What the function gives, with gradients where that was told how."""
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or not self._memory(args):
            return self.registered(*args)
        return self._run(*args)

    def _memory(self, args: Any) -> bool:
        """Whether these are memory and nothing else, and autograd knows as much of them without torch.library."""
        simple = self._run is self._plain
        for x in args:
            if isinstance(x, Tensor):
                if x.__class__ not in PLAIN or x.is_meta:
                    return False
                if simple and x.requires_grad and torch.is_grad_enabled():
                    return False  # a backward that is to be differentiated: torch.library refuses when it comes to that
            elif x.__class__ is list and not (simple and self._memory(x)):
                return False  # torch.autograd.Function does not look into lists
        return True
