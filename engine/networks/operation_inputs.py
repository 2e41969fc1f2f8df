"""What a network's operations take, read or replaced: where activations are quantized.

Convolutions, linear layers, pooling and sums, whether they are modules or, for pooling and sums,
functions in the forward of a module. Only functions of PyTorch are seen, not loops over pixels.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from engine.networks.layers import LAYER_TYPES, Add

Transform = Callable[[str, Tensor], Tensor]  # (name of the input, input) → what to take instead

POOLINGS = nn.AvgPool2d | nn.AdaptiveAvgPool2d
POOLING_FUNCTIONS = (F.avg_pool2d, F.adaptive_avg_pool2d)
MEAN_FUNCTIONS = (torch.mean, Tensor.mean)  # of height and width: global average pooling
NAMED_INPUT = (*POOLING_FUNCTIONS, *MEAN_FUNCTIONS)  # whose tensor may be given as input=
SUM_FUNCTIONS = (torch.add, Tensor.add, Tensor.add_)
OPERATION_MODULES = ("torch.nn", "engine.")  # whose modules are operations: not looked into
SPATIAL = ((2, 3), (-2, -1), (3, 2), (-1, -2))


def transform_inputs(net: nn.Module, transform: Transform) -> list[RemovableHandle]:
    """Have every operation take transform(name, input) in place of its input, by hooks in place.

    Inputs have the name of their module, those of a sum with [0] and [1] after it. A function has
    that of the module in whose forward it is called, `.pool` or `.add`, and, from the second on in
    that forward, its number.
    """
    functions = _FunctionInputs(transform)
    handles = []
    for name, m in net.named_modules():
        if isinstance(m, LAYER_TYPES | POOLINGS):
            handles.append(m.register_forward_pre_hook(_first_input(transform, name)))
        elif isinstance(m, Add):
            handles.append(m.register_forward_pre_hook(_both_inputs(transform, name)))
        handles += functions.watch(m, name)
    return handles + functions.enter_with(net)


@contextmanager
def transformed_inputs(net: nn.Module, transform: Transform) -> Iterator[None]:
    """Context manager in which `transform_inputs` holds."""
    handles = transform_inputs(net, transform)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def operands(transform: Transform, name: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a sum of that name takes in place of a and b."""
    return transform(f"{name}[0]", a), transform(f"{name}[1]", b)


def _first_input(transform: Transform, name: str) -> Callable:
    return lambda module, args: (transform(name, args[0]), *args[1:])


def _both_inputs(transform: Transform, name: str) -> Callable:
    return lambda module, args: operands(transform, name, *args)


class _FunctionInputs(TorchFunctionMode):
    """Transforms what functions take that a module calls, unless it is an operation itself."""

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.transform = transform
        self.running: list[tuple[str, bool, Counter]] = []  # modules, the innermost last

    def enter_with(self, net: nn.Module) -> list[RemovableHandle]:
        """Be active while the network runs."""

        def enter(module: nn.Module, args: tuple) -> None:
            self.__enter__()

        def leave(module: nn.Module, args: tuple, output: Any) -> None:
            self.__exit__(None, None, None)

        return [
            net.register_forward_pre_hook(enter, prepend=True),
            net.register_forward_hook(leave, always_call=True),
        ]

    def watch(self, m: nn.Module, name: str) -> list[RemovableHandle]:
        """Know while the module runs."""
        is_operation = type(m).__module__.startswith(OPERATION_MODULES)

        def begin(module: nn.Module, args: tuple) -> None:
            self.running.append((name, is_operation, Counter()))

        def end(module: nn.Module, args: tuple, output: Any) -> None:
            self.running.pop()

        return [m.register_forward_pre_hook(begin), m.register_forward_hook(end, always_call=True)]

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.running and not self.running[-1][1]:
            args = self._transformed(function, args, kwargs)
        return function(*args, **kwargs)

    def _transformed(self, function, args, kwargs):
        if "input" in kwargs and not args and function in NAMED_INPUT:
            args = (kwargs.pop("input"),)
        if _pools(function, args, kwargs):
            return self.transform(self._name("pool"), args[0]), *args[1:]
        if function in SUM_FUNCTIONS and _are_maps(args):
            a, b = operands(self.transform, self._name("add"), *args)
            if function is Tensor.add_ and a is not args[0]:
                a = args[0].copy_(a)  # what is added to stays the same tensor
            return a, b
        return args

    def _name(self, kind: str) -> str:
        name, _, counts = self.running[-1]
        counts[kind] += 1
        number = f"_{counts[kind]}" if counts[kind] > 1 else ""
        return f"{name}.{kind}{number}".lstrip(".")


def _pools(function: Callable, args: tuple, kwargs: dict) -> bool:
    """Tell whether the call averages over pixels: pooling, or a mean of height and width."""
    if function in POOLING_FUNCTIONS:
        return True
    if function not in MEAN_FUNCTIONS or args[0].dim() != 4:
        return False
    dims = args[1] if len(args) > 1 else kwargs.get("dim", ())
    return tuple(dims) in SPATIAL if isinstance(dims, tuple | list) else False


def _are_maps(args: tuple) -> bool:
    """Tell whether these are two feature maps or token sequences of one shape."""
    return (
        len(args) == 2
        and all(isinstance(t, Tensor) and t.is_floating_point() for t in args)
        and args[0].shape == args[1].shape
        and args[0].dim() > 2
    )
