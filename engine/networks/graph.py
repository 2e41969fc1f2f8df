"""The calls that a network makes, in the order in which they run.

The network is run once on real images, so that any Python in its `forward` is allowed. Sizes that
it reads from a tensor become constants.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from engine.networks.layers import Add
from engine.networks.outputs import split_output

# Modules that are one call; others are entered. Subclasses count as well.
LEAF_KINDS: dict[type[nn.Module], str] = {
    nn.Conv2d: "conv",
    nn.Linear: "linear",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    Add: "add",
    nn.AdaptiveAvgPool2d: "global_pool",
    nn.MaxPool2d: "max_pool",
    nn.Flatten: "flatten",
    nn.Identity: "identity",
    nn.Dropout: "identity",
}
# Functions by name, with and without a trailing underscore (in place).
FUNCTION_KINDS = {
    "relu": "relu",
    "relu6": "relu6",
    "flatten": "flatten",
    "getitem": "slice",
    "to": "identity",
    "float": "identity",
    "contiguous": "identity",
    "dropout": "identity",
    "adaptive_avg_pool2d": "global_pool",
}
# Functions of these kinds have names of their own, those of engine/networks/operation_inputs.py.
OPERATIONS = {"add": "add", "global_pool": "pool"}


@dataclass(frozen=True)
class Call:
    """One call: `kind` is a value of LEAF_KINDS or FUNCTION_KINDS, or the function's own name.

    `name` is the module's, or that of the module that calls the function. `inputs` and `output` are
    numbers of values: 0 is the network's input. `in_shape` is that of the first, without the batch.
    """

    kind: str
    name: str
    module: nn.Module | None
    inputs: tuple[int, ...]
    output: int
    arguments: tuple[Any, ...] = ()  # of a function, without tensors
    in_shape: tuple[int, ...] = ()

    @property
    def input_names(self) -> tuple[str, ...]:
        """Return the names that engine/networks/operation_inputs.py gives to what is quantized."""
        return (f"{self.name}[0]", f"{self.name}[1]") if self.kind == "add" else (self.name,)


@dataclass(frozen=True)
class NetworkGraph:
    """All calls of a network, and which value is the logits."""

    calls: tuple[Call, ...]
    output: int


@dataclass
class _Recorder(TorchFunctionMode):
    """Records calls of leaf modules (through `hooks`) and of functions outside them."""

    calls: list[Call] = field(default_factory=list)
    numbers: dict[int, int] = field(default_factory=dict)  # id of a tensor → number of its value
    kept: list[Tensor] = field(default_factory=list)  # alive, so that no id is used twice
    # Names of the modules that are running, and how often each called a function of OPERATIONS.
    path: list[tuple[str, Counter]] = field(default_factory=lambda: [("", Counter())])
    in_leaf: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    def new_value(self, x: Tensor) -> int:
        """Number the tensor as a new value, even where it was one before: an in-place result."""
        self.kept.append(x)
        self.numbers[id(x)] = len(self.kept) - 1
        return len(self.kept) - 1

    def record(self, kind: str, module: nn.Module | None, args: tuple, output: Any) -> None:
        """Add a call for each tensor that comes out, if a value goes into it."""
        tensors = [a for a in _flat(args) if isinstance(a, Tensor)]
        inputs = tuple(self.numbers[id(a)] for a in tensors if id(a) in self.numbers)
        outputs = [y for y in _flat((output,)) if isinstance(y, Tensor)]
        if not inputs or not outputs:
            return
        if any(output is a for a in tensors) and kind == "identity":
            return
        rest = tuple(a for a in args if not isinstance(a, Tensor))
        name = self.name_operation(OPERATIONS[kind]) if not module and kind in OPERATIONS else None
        name, shape = name or self.path[-1][0], tuple(tensors[0].shape[1:])
        for y in outputs:
            self.calls.append(Call(kind, name, module, inputs, self.new_value(y), rest, shape))

    def name_operation(self, operation: str) -> str:
        """Return a name for a function that the running module calls."""
        name, counts = self.path[-1]
        counts[operation] += 1
        number = f"_{counts[operation]}" if counts[operation] > 1 else ""
        return f"{name}.{operation}{number}".lstrip(".")

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Run the function; record it unless a leaf module calls it."""
        result = function(*args, **(kwargs or {}))
        if not self.in_leaf:
            name = getattr(function, "__name__", str(function)).strip("_")
            kind = FUNCTION_KINDS.get(name, name)
            self.record(kind, None, (*args, *(kwargs or {}).values()), result)
        return result

    def hooks(self, name: str, module: nn.Module) -> list[Any]:
        """Install the hooks that keep `path` and record a leaf; return their handles."""
        kinds = [kind for leaf, kind in LEAF_KINDS.items() if isinstance(module, leaf)]

        def enter(module: nn.Module, args: tuple) -> None:
            self.path.append((name, Counter()))
            self.in_leaf = bool(kinds)

        def leave(module: nn.Module, args: tuple, output: Any) -> None:
            if kinds:
                self.record(kinds[0], module, args, output)
            self.in_leaf = False
            self.path.pop()

        return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


def _flat(args: tuple) -> list[Any]:
    """Return the arguments with those inside lists and tuples."""
    return [b for a in args for b in (_flat(a) if isinstance(a, list | tuple) else (a,))]


@torch.no_grad()
def trace(net: nn.Module, images: Tensor) -> NetworkGraph:
    """Return the calls of `net(images)`, images (B, 3, H, W); the network is in evaluation mode.

    Of (logits, activations) only the logits count.
    """
    recorder = _Recorder()
    recorder.new_value(images)
    handles = [h for name, m in net.named_modules() if name for h in recorder.hooks(name, m)]
    try:
        with recorder:
            output = net(images)
    finally:
        for handle in handles:
            handle.remove()
    logits, _ = split_output(net, output, [])
    return _without_dead_calls(recorder.calls, recorder.numbers[id(logits)])


def _without_dead_calls(calls: list[Call], output: int) -> NetworkGraph:
    """Return only the calls that the output depends on."""
    needed, live_calls = {output}, []
    for call in reversed(calls):
        if call.output in needed:
            needed.update(call.inputs)
            live_calls.append(call)
    return NetworkGraph(tuple(reversed(live_calls)), output)
