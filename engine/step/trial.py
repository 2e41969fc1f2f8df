"""What is tried before a training: the derivatives of a network, and each of the penalties."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from engine.networks.batch_norm import folded_weights
from engine.networks.layers import penalized_weights, trainable_parameters
from engine.networks.outputs import (
    blank_images,
    foreign_code,
    network_boundary,
    on_trial,
    random_images,
    run_network,
)
from engine.step.batch_loss import BatchLoss, FirstOrderResult, StartingState
from engine.step.gradients import NOT_TWICE, compute_gradients, derivatives
from engine.step.penalty_inputs import (
    OF_WEIGHTS,
    detached_leaves,
    evaluate_penalty,
    needs_double_backward,
)
from engine.system import distributed
from engine.system.errors import PenaltyError, SetupError
from engine.system.hardware import get_rng_state, rng_from


def check_derivatives(net: nn.Module, image_shape: Sequence[int], second: bool) -> None:
    """Raise NetworkError where the network has no derivative or, with `second`, no second one.

    It is tried on two images of `image_shape` (3, H, W), in evaluation mode, before there are any
    gradients in .grad.
    """
    x = blank_images(net, 2, image_shape)
    y = torch.zeros(2, dtype=torch.long, device=x.device)
    with on_trial(net):
        batch = BatchLoss(net, nn.CrossEntropyLoss(), x, y, x.dtype, None)
        first = batch.first_order(("w_grads",), create_graph=second)
        gradients = [t for t in first.tensors["w_grads"] if t.requires_grad]
        if second and gradients:
            with network_boundary(net, NOT_TWICE):
                # unlike `grad`, this goes to the ends of the graph: a function that is
                # `once_differentiable` may end it, and `grad` then returns too little in silence
                torch.autograd.backward(gradients, [torch.ones_like(t) for t in gradients])
            net.zero_grad()


def check_criterion(name: str, criterion: nn.Module, num_classes: int) -> bool:
    """Try a loss of that name on logits at random; return whether it is a mean over images.

    Raises SetupError where it cannot be trained with, or is to be trained itself.
    """
    if any(p.requires_grad for p in criterion.parameters()):
        raise SetupError(f"--criterion {name} has parameters of its own, which nothing would train")
    labels = torch.arange(2 * num_classes) % num_classes
    n, n_first = len(labels), 1 + num_classes // 2  # parts of other classes
    logits = torch.randn(n, num_classes, generator=torch.Generator().manual_seed(0))
    device = torch.device("cpu")
    start = get_rng_state(device)

    def loss(part: slice) -> Any:
        with torch.no_grad(), rng_from(start, device), foreign_code(f"--criterion {name}"):
            return copy.deepcopy(criterion).eval()(logits[part], labels[part])

    whole = loss(slice(None))
    if not isinstance(whole, torch.Tensor) or whole.dim():
        raise SetupError(f"--criterion {name} returns no scalar tensor")
    parts = n_first * loss(slice(n_first)) + (n - n_first) * loss(slice(n_first, None))
    return torch.allclose(whole, parts / n, rtol=1e-4)


def check_penalty(
    net: nn.Module,
    regularizer: nn.Module,
    image_shape: Sequence[int],
    is_minimized: bool = True,
    difference_step: float | None = None,
) -> None:
    """Try the penalty on two random images of `image_shape` (3, H, W), in evaluation mode.

    Raises PenaltyError and NetworkError as `compute_gradients` does, and PenaltyError where the
    regularizer's `forward` changes what it is given, or something that it keeps itself. One that
    is not minimized, but only measured, may be a constant. The random streams stay where they are,
    and no .grad is left.
    """
    x = random_images(net, 2, image_shape)
    y = torch.zeros(2, dtype=torch.long, device=x.device)
    start = StartingState.of(net, x.device)
    # cuDNN's recurrent layers have no derivative in evaluation mode
    no_cudnn = torch.backends.cudnn.flags(enabled=False)
    with on_trial(net), rng_from(start.random, x.device), no_cudnn:
        batch = BatchLoss(net, nn.CrossEntropyLoss(), x, y, x.dtype, start)
        zero = x.new_zeros(())
        first = FirstOrderResult(zero, zero, tensors={"weights": penalized_weights(net)})
        if not OF_WEIGHTS.issuperset(regularizer.inputs):  # otherwise the network need not run
            first = batch.first_order(regularizer.inputs)
        folded = folded_weights(net) if "folded_weights" in regularizer.inputs else []
        copies = {name: detached_leaves(ts) for name, ts in first.tensors.items()}
        inputs = copies | {"folded_weights": folded}
        given = {f"its input {name}": tensors for name, tensors in inputs.items()}
        with _nothing_changes(regularizer, given), torch.set_grad_enabled(is_minimized):
            penalty = evaluate_penalty(regularizer, batch, first.loss, first.grads, copies, folded)
        if distributed.get_world_size() > 1 and "a_grads" in regularizer.inputs:
            _check_shares(net, x, regularizer.name)
        if not is_minimized:
            return
        leaves = [*sum(copies.values(), []), *trainable_parameters(net).values()]
        derivatives(regularizer.name, penalty, leaves)
        with torch.no_grad():  # as an evaluation does
            evaluate_penalty(regularizer, batch, first.loss, first.grads, copies, folded)
        if difference_step is not None and needs_double_backward(regularizer):
            options = {"dtype": x.dtype, "difference_step": difference_step}
            compute_gradients(net, batch.criterion, regularizer, x, y, **options)
            net.zero_grad()


@contextmanager
def _nothing_changes(regularizer: nn.Module, given: Mapping[str, Any]) -> Iterator[None]:
    """Context manager; PenaltyError where what is given, or what it keeps itself, has changed."""
    before = _versions(given | _everything_kept(regularizer))
    yield
    after = _versions(given | _everything_kept(regularizer))
    if changed := [name for name, versions in after.items() if before.get(name) != versions]:
        raise PenaltyError(
            f"{regularizer.name}: `forward` has to be a pure function of its inputs, but it "
            f"changed {', '.join(changed)}; constants are made in the constructor, and what is "
            "kept from batch to batch no resumed run would have"
        )


def _check_shares(net: nn.Module, x: torch.Tensor, name: str) -> None:
    """Raise PenaltyError where an activation is not made of images, of which each rank has some."""
    with torch.no_grad():
        of_two, of_three = (run_network(net, images, True)[1] for images in (x, x[[0, 1, 1]]))
    for i, (a, b) in enumerate(zip(of_two, of_three, strict=True)):
        if a.shape == b.shape:
            raise PenaltyError(
                f"{name}: activation {i}, {tuple(a.shape)}, is of no image, and its gradient a sum "
                "over all: several processes can only leave gradients of activations out"
            )


def _everything_kept(regularizer: nn.Module) -> dict[str, Any]:
    """Return all attributes and buffers of a regularizer and of the terms in it, by name."""
    kept = {}
    for prefix, module in regularizer.named_modules():
        attributes = vars(module) | module._buffers
        del attributes["_buffers"]
        kept |= {f"{prefix}.{name}".lstrip("."): value for name, value in attributes.items()}
    return kept


def _versions(things: Mapping[str, Any]) -> dict[str, list[tuple[int, int, object]]]:
    """Return the id of each object in a thing, how often it was written into, and the object.

    While the object is kept, no other one gets its id. Only tensors count what is written.
    """
    return {
        name: [(id(leaf), getattr(leaf, "_version", 0), leaf) for leaf in tree_leaves(thing)]
        for name, thing in things.items()
    }
