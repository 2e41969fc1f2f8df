"""Fast layers in place of PyTorch's own, in any network: same parameters, keys and outputs."""

import pickle
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.networks.convolution import Conv2d
from engine.networks.fast_batch_norm import BatchNorm2d
from engine.networks.layers import BATCH_NORMS, copy_network
from engine.system.errors import NetworkError
from engine.system.hardware import kept_streams


class BatchNormBeforeRectifier(BatchNorm2d):
    """A batch norm that does the work of the `ReLU` or `ReLU6` after it, its only reader, as well.

    Its attribute `rectifier` says which; `reader` holds it, a tuple, so that it is no module of
    this one. Where a hook of one of the two looks at what is between them, each does its own work.
    """

    unread: int | None = None  # the storage of its output, until `reader` has read it

    def forward(self, input: Tensor) -> Tensor:
        """Map the input (N, C, H, W) to φ(batch_norm(input)), marked as rectified."""
        (reader,) = self.reader
        if _is_looked_at(self, reader):
            return super().forward(input)
        y = super().forward(input, self.rectifier)
        y.is_rectified = True  # on the tensor: nothing in the module's state can be out of date
        self.unread = y.untyped_storage()._cdata
        return y


def _is_looked_at(norm: nn.Module, reader: nn.Module) -> bool:
    """Tell whether a hook sees what is between the two, or its gradient."""
    hooks = [*norm._forward_hooks.values(), *norm._backward_hooks.values()]
    hooks += [*norm._backward_pre_hooks.values(), *reader._forward_pre_hooks.values()]
    hooks += [*reader._forward_hooks.values(), *reader._backward_hooks.values()]
    return not all(getattr(hook, "is_output_only", False) for hook in hooks)


class _PassesRectified:
    """A module that returns what one of its `norms` has rectified as it is."""

    norms: tuple[nn.Module, ...] = ()

    def forward(self, input: Tensor) -> Tensor:
        for norm in self.norms:
            if norm.unread == input.untyped_storage()._cdata:  # also as another tensor, or a view
                norm.unread = None
        if not getattr(input, "is_rectified", False):
            return super().forward(input)
        input.is_rectified = False  # for the batch norm's reader only, not for one after that
        return input


class ReLU(_PassesRectified, nn.ReLU):
    """`nn.ReLU` where the batch norm before it may have done the work."""


class ReLU6(_PassesRectified, nn.ReLU6):
    """`nn.ReLU6` where the batch norm before it may have done the work."""


FAST = {nn.Conv2d: Conv2d, nn.BatchNorm2d: BatchNorm2d}
# activations that the batch norm before them can take over, under its name for them
RECTIFIERS = {nn.ReLU: ("relu", ReLU), nn.ReLU6: ("relu6", ReLU6)}


def use_fast_layers(net: nn.Module) -> nn.Module:
    """Give PyTorch's own layers, in place, a second derivative that is cheap; return the network.

    `nn.Conv2d` and `nn.BatchNorm2d` compute the same as before, of the same parameters under the
    same names; a batch norm does the work of the `nn.ReLU` or `nn.ReLU6` that alone reads it.
    Subclasses and all other modules stay as they are: autograd differentiates them. Only dropout no
    longer writes into its input.
    """
    pairs = rectified_norms(net)
    followers = {net.get_submodule(name) for _, name in pairs}  # one may follow several
    for norm_name, activation_name in pairs:
        norm = net.get_submodule(norm_name)
        # the class, not the module, is exchanged: parameters, hooks and their order stay
        norm.__class__ = BatchNormBeforeRectifier
        activation = net.get_submodule(activation_name)
        norm.rectifier, _ = RECTIFIERS[type(activation)]
        norm.reader = (activation,)
        activation.norms = (*getattr(activation, "norms", ()), norm)  # it may follow several
    for m in followers:
        _, m.__class__ = RECTIFIERS[type(m)]
    for m in net.modules():
        m.__class__ = FAST.get(type(m), type(m))
        if isinstance(m, nn.modules.dropout._DropoutNd):
            m.inplace = False  # it might write into an activation, which `run_recorded` refuses
    return net


@contextmanager
def rectified_are_read(net: nn.Module) -> Iterator[None]:
    """Context manager of a forward pass; NetworkError if what a norm rectified was not read so.

    A network may change, as it trains, which module reads another's output.
    """
    norms = [m for m in net.modules() if isinstance(m, BatchNormBeforeRectifier)]
    for norm in norms:
        norm.unread = None
    yield
    if unread := [norm for norm in norms if norm.unread is not None]:
        name_of = {m: name for name, m in net.named_modules()}
        names = name_of[unread[0]], name_of[unread[0].reader[0]]
        raise NetworkError(
            f"{type(net).__name__}: {names[0]} was not read by {names[1]} alone, as when training "
            "began, and had done its work: in a network that changes its order, F.relu in place of "
            "nn.ReLU stays apart"
        )


PLAIN = {
    Conv2d: nn.Conv2d,
    BatchNorm2d: nn.BatchNorm2d,
    BatchNormBeforeRectifier: nn.BatchNorm2d,
    ReLU: nn.ReLU,
    ReLU6: nn.ReLU6,
}


def plain_copy(net: nn.Module) -> nn.Module:
    """Return a copy of the network with PyTorch's own layers in place of the fast ones."""
    net = copy_network(net)
    for m in net.modules():
        m.__class__ = PLAIN.get(type(m), type(m))
        for name in ("rectifier", "reader", "norms", "unread"):  # what only fast layers have
            vars(m).pop(name, None)
    return net


class _NoDecisions(TorchDispatchMode):
    """A mode in which no value of a tensor can be read, as `if` and `item` do."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise NetworkError("a decision that depends on a tensor's values")
        return func(*args, **(kwargs or {}))


def _what_may_count(net: nn.Module) -> list[object]:
    """Return the plain values that modules keep, and the random states of Python and NumPy."""
    plain = [
        (name, key, value)
        for name, module in net.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, int | float | str) and key != "training"
    ]
    return [plain, random.getstate(), pickle.dumps(np.random.get_state())]


class ModuleTracer(fx.Tracer):
    """Traces down to modules without children and to PyTorch's own."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Tell whether m is one node of the graph."""
        is_container = isinstance(m, nn.Sequential | nn.ModuleList | nn.ModuleDict)
        own = type(m).__module__.startswith("torch.nn") and not is_container
        return own or isinstance(m, BATCH_NORMS) or next(m.children(), None) is None


def rectified_norms(net: nn.Module) -> list[tuple[str, str]]:
    """Return each batch norm, by name, whose output only a ReLU or ReLU6 reads, and that one.

    In training and in evaluation mode; none where the network's order cannot be traced in both.
    Training needs this alone of a network's structure: `torch.export`, which quantizing goes
    through, would cost it seconds.
    """
    first, second = (_only_readers(net, training) for training in (True, False))
    return [
        (norm, reader)
        for norm, reader in first.items()
        if second.get(norm) == reader
        and type(net.get_submodule(norm)) is nn.BatchNorm2d
        and type(net.get_submodule(reader)) in RECTIFIERS
    ]


def _only_readers(net: nn.Module, training: bool) -> dict[str, str]:
    """Return the module that alone reads another's output, by the name of the latter.

    None where that may be another one in a later batch: where the network decides by values,
    draws random numbers of Python or NumPy, or counts something.
    """
    try:
        copied = copy_network(net)  # a network that keeps what it computes would keep symbols
        copied.train(training)  # which need not return it
        after = _what_may_count(copied)
        with _NoDecisions(), kept_streams(torch.device("cpu")):
            for _ in range(2):  # what a first run changes, as it notes a constant, a second may not
                graph = ModuleTracer().trace(copied)
                before, after = after, _what_may_count(copied)
                if after == before:
                    break
            else:
                return {}
        nodes = [n for n in graph.nodes if n.op == "call_module"]
    except Exception:  # what a foreign forward raises on symbols is of any kind
        return {}
    n_runs = Counter(node.target for node in nodes)
    readers = {}
    for node in nodes:
        source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if isinstance(source, fx.Node) and source.op == "call_module":
            if len(source.users) == 1 and n_runs[source.target] == 1:
                readers[source.target] = node.target
    return readers
