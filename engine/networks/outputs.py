"""Any network of PyTorch's own layers: its logits and activations, and which module reads which.

A network maps images to logits, or to `(logits, activations)`. Where it does not return them, the
activations A_l are the outputs of its activation modules in the order in which they run.
"""

import itertools
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from engine.networks.layers import image_dtype
from engine.system import hardware
from engine.system.errors import NetworkError, ReportedError

# Modules whose outputs are the activations A_l, with their subclasses. Functions such as F.relu are
# no modules, and not seen.
ACTIVATIONS = (
    nn.ReLU | nn.ReLU6 | nn.LeakyReLU | nn.PReLU | nn.RReLU | nn.ELU | nn.SELU | nn.CELU | nn.GELU
    | nn.SiLU | nn.Mish | nn.Softplus | nn.Softsign | nn.Tanh | nn.Sigmoid | nn.LogSigmoid
    | nn.Hardtanh | nn.Hardswish | nn.Hardsigmoid | nn.Threshold | nn.GLU
)  # fmt: skip
MAX_ROUNDING = 1e-3  # of the largest logit: how far the same network may be in another form


def run_network(
    net: nn.Module, x: Tensor, with_activations: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Return the logits (B, classes) of images x (B, C, H, W) and, if asked for, the A_l.

    Raises NetworkError where the network returns something else, or raises whatever error.
    """
    logits, activations, _ = run_recorded(net, x, with_activations)
    return logits, activations


def run_recorded(
    net: nn.Module, x: Tensor, with_activations: bool = True, problem: str = ""
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return what `run_network` does, and all outputs of activation modules where asked for.

    A module that runs twice has two. The A_l are others than these where the network returns its
    activations itself. Raises NetworkError where they are to be differentiated, and one was written
    into after it was recorded: autograd knows only what it is now.
    """
    recorded: list[Tensor] = []
    versions: list[int] = []

    def record(y: Tensor) -> None:
        recorded.append(y)
        versions.append(y._version if torch.is_grad_enabled() else 0)

    with network_boundary(net, problem):
        with _activation_hooks(net, record) if with_activations else nullcontext():
            output = net(x.clone())  # a network may write into its input
        logits, activations = split_output(net, output, recorded)
    if torch.is_grad_enabled() and activations is recorded:
        for i, (y, version) in enumerate(zip(recorded, versions, strict=True)):
            if y._version != version:
                raise NetworkError(
                    f"{type(net).__name__} writes into the output of an activation module, number "
                    f"{i} as they run, as y *= 2 or a module with inplace=True does: its gradient "
                    "can be penalized without that, or be left out of the penalty"
                )
    if logits.dim() != 2 or len(logits) != len(x):
        name, shape = type(net).__name__, tuple(logits.shape)
        hint = ": choose another --batch_size, which leaves no single image" * (len(x) == 1)
        raise NetworkError(
            f"{name} returned logits {shape} of {len(x)} images, not ({len(x)}, classes){hint}"
        )
    return logits, activations, recorded


def network_boundary(net: nn.Module, problem: str = "") -> AbstractContextManager[None]:
    """Context manager in which whatever a stranger's network raises is a NetworkError of one line.

    The line begins with the network's name and the `problem`.
    """
    return foreign_code(type(net).__name__ + problem)


@contextmanager
def foreign_code(what: str) -> Iterator[None]:
    """Context manager in which whatever is raised is a NetworkError of one line that begins so.

    Memory that ran out is no fault of the network.
    """
    try:
        yield
    except Exception as error:  # foreign code raises errors of every kind
        if isinstance(error, ReportedError) or hardware.is_out_of_memory(error):
            raise
        kind = type(error).__name__
        reason = next(iter(str(error).strip().splitlines()), "")
        reason = textwrap.shorten(reason, 200, placeholder=" …")
        reason = reason if isinstance(error, RuntimeError) and reason else f"{kind}: {reason}"
        if "view size is not compatible" in reason:
            reason = f"{reason} Or --memory_format contiguous"
        raise NetworkError(f"{what}: {reason}") from error


def split_output(
    net: nn.Module, output: Any, recorded: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Return logits and activations out of what a network returned; `recorded` if it has none.

    Of torchvision's named tuples the field `logits` is taken: auxiliary classifiers do not train.
    """
    output = getattr(output, "logits", output)
    if isinstance(output, Tensor):
        return output, recorded
    match output:
        case (Tensor() as logits, list() | tuple() as activations):
            for a in activations:
                if not isinstance(a, Tensor):
                    raise NetworkError(
                        f"{type(net).__name__} returned a {type(a).__name__} among its "
                        "activations: a network must return logits, or logits and a list of tensors"
                    )
            return logits, list(activations)
    raise NetworkError(
        f"{type(net).__name__} returned a {type(output).__name__}: a network must return logits, "
        "or logits and a list of activations"
    )


@contextmanager
def moved_activations(net: nn.Module, offsets: Mapping[int, Tensor]) -> Iterator[None]:
    """Context manager in which the i-th run of an activation module returns offsets[i] more.

    Runs are counted from 0, as `activation_runs` counts them.
    """
    runs = itertools.count()

    def move(y: Tensor) -> Tensor | None:
        offset = offsets.get(next(runs))
        return None if offset is None else y + offset.to(y.dtype)

    with _activation_hooks(net, move):
        yield


def fixed_activations(net: nn.Module) -> AbstractContextManager[None]:
    """Context manager of a backward pass in which an activation module that runs is an error."""

    def refuse(y: Tensor) -> None:
        raise NetworkError(
            f"--penalty_gradient difference: {type(net).__name__} runs activation modules again in "
            "its backward pass, as torch.utils.checkpoint does, where their outputs cannot be "
            "moved: take --penalty_gradient exact, or leave gradients of activations out"
        )

    return _activation_hooks(net, refuse)


@contextmanager
def _activation_hooks(net: nn.Module, hook: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Context manager in which hook(output), unless None, replaces outputs of activation layers."""
    modules = [m for m in net.modules() if isinstance(m, ACTIVATIONS)]

    def on_output(m: nn.Module, args: tuple, y: Tensor) -> Tensor | None:
        return hook(y)

    on_output.is_output_only = True  # `fast_layers`: the input of the module may be anything
    handles = [m.register_forward_hook(on_output) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def activation_runs(
    net: nn.Module, activations: Sequence[Tensor], recorded: Sequence[Tensor]
) -> list[int]:
    """Return which run of an activation module gave each of the activations.

    `recorded` is what `run_recorded` returned. Raises NetworkError where none did, which a
    network can bring about that returns its activations itself.
    """
    run_of = {id(a): run for run, a in enumerate(recorded)}
    runs = [run_of.get(id(a)) for a in activations]
    if None in runs:
        raise NetworkError(
            f"--penalty_gradient difference: {type(net).__name__} returns activations of which "
            f"number {runs.index(None)} is the output of no activation module, such as nn.ReLU: "
            "return such outputs, or leave gradients of activations out"
        )
    return runs


def blank_images(net: nn.Module, n: int, image_shape: Sequence[int]) -> Tensor:
    """Return n black images in the dtype and on the device of the network."""
    device = next(net.parameters(), torch.empty(0)).device
    return torch.zeros(n, *image_shape, dtype=image_dtype(net), device=device)


def check_network(
    net: nn.Module, image_shape: Sequence[int], num_classes: int, n_images: int = 2
) -> int:
    """Return how many activations A_l the network has for images of `image_shape` (3, H, W).

    Raises NetworkError where it cannot map n_images of these to num_classes logits: it is tried, in
    evaluation mode. Lazy modules of PyTorch get their sizes and first weights by it.
    """
    name = type(net).__name__
    x = blank_images(net, n_images, image_shape)
    with torch.no_grad(), on_trial(net):
        logits, activations, _ = run_recorded(net, x, problem=_cannot_take(image_shape))
    if logits.shape[1] != num_classes:
        shape, wanted = tuple(logits.shape), (n_images, num_classes)
        raise NetworkError(f"{name} returned logits {shape} of {n_images} images, not {wanted}")
    return len(activations)


@contextmanager
def on_trial(net: nn.Module) -> Iterator[None]:
    """Context manager of evaluation mode, after which the buffers are what they were.

    Those of lazy modules keep the sizes that they get.
    """
    kept = [
        (module._buffers, name, tensor, None if tensor is None else tensor.clone())
        for module in net.modules()
        for name, tensor in module._buffers.items()
        if not is_lazy(tensor)
    ]
    versions = [0 if tensor is None else tensor._version for _, _, tensor, _ in kept]
    try:
        with every_module_in(net, training=False):
            yield
    finally:
        for (buffers, name, tensor, value), version in zip(kept, versions, strict=True):
            buffers[name] = tensor  # a network may put another one there
            if tensor is not None and tensor._version != version:
                with torch.no_grad():
                    tensor.copy_(value)


def random_images(net: nn.Module, n: int, image_shape: Sequence[int]) -> Tensor:
    """Return n images of noise, always the same, in the network's dtype and on its device."""
    x = blank_images(net, n, image_shape)
    return x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)


def trial_logits(net: nn.Module, image_shape: Sequence[int]) -> Tensor:
    """Return the logits of two random images of `image_shape` (3, H, W), always the same ones.

    Neither the network's buffers nor the random streams are changed by it.
    """
    x = random_images(net, 2, image_shape)
    with torch.no_grad(), on_trial(net), hardware.kept_streams(x.device):
        return run_recorded(net, x, False, _cannot_take(image_shape))[0]


def is_near(logits: Tensor, expected: Tensor, tolerance: float = MAX_ROUNDING) -> bool:
    """Tell whether the logits are those expected, to a part of the largest."""
    if expected.is_meta:  # nothing is computed
        return True
    limit = tolerance * expected.nan_to_num(0, 0, 0).abs().max().item()
    return torch.allclose(logits, expected, rtol=0, atol=limit, equal_nan=True)


def _cannot_take(image_shape: Sequence[int]) -> str:
    """Return what a line says of a network that raises on such images."""
    return f" cannot take images of {' × '.join(map(str, image_shape))}"


@contextmanager
def every_module_in(net: nn.Module, *, training: bool) -> Iterator[None]:
    """Context manager that puts every module into training or evaluation mode, and back."""
    modes = [(m, m.training) for m in net.modules()]
    net.train(training)
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode
