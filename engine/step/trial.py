"""What is tried before a training: the derivatives of a network, and each of the penalties."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from engine.networks.batch_norm import folded_weights
from engine.networks.layers import penalized_weights, trainable_parameters
from engine.networks.outputs import blank_images, every_module_in, network_boundary
from engine.step.batch_loss import BatchLoss, FirstOrderResult, StartingState
from engine.step.gradients import NOT_TWICE, compute_gradients, derivatives
from engine.step.penalty_inputs import (
    OF_WEIGHTS,
    detached_leaves,
    evaluate_penalty,
    needs_double_backward,
)
from engine.system.errors import PenaltyError
from engine.system.hardware import rng_from


def check_derivatives(net: nn.Module, image_shape: Sequence[int], second: bool) -> None:
    """Raise NetworkError where the network has no derivative or, with `second`, no second one.

    It is tried on two images of `image_shape` (3, H, W), in evaluation mode, before there are any
    gradients in .grad.
    """
    x = blank_images(net, 2, image_shape)
    y = torch.zeros(2, dtype=torch.long, device=x.device)
    with every_module_in(net, training=False):
        batch = BatchLoss(net, nn.CrossEntropyLoss(), x, y, x.dtype, None)
        first = batch.first_order(("w_grads",), create_graph=second)
        gradients = [t for t in first.tensors["w_grads"] if t.requires_grad]
        if second and gradients:
            with network_boundary(net, NOT_TWICE):
                # unlike `grad`, this goes to the ends of the graph: a function that is
                # `once_differentiable` may end it, and `grad` then returns too little in silence
                torch.autograd.backward(gradients, [torch.ones_like(t) for t in gradients])
            net.zero_grad()


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
    x = blank_images(net, 2, image_shape)
    x += torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    y = torch.zeros(2, dtype=torch.long, device=x.device)
    start = StartingState.of(net, x.device)
    # cuDNN's recurrent layers have no derivative in evaluation mode
    no_cudnn = torch.backends.cudnn.flags(enabled=False)
    with every_module_in(net, training=False), rng_from(start.random, x.device), no_cudnn:
        batch = BatchLoss(net, nn.CrossEntropyLoss(), x, y, x.dtype, start)
        zero = x.new_zeros(())
        first = FirstOrderResult(zero, zero, tensors={"weights": penalized_weights(net)})
        if not OF_WEIGHTS.issuperset(regularizer.inputs):  # otherwise the network need not run
            first = batch.first_order(regularizer.inputs)
        folded = folded_weights(net) if "folded_weights" in regularizer.inputs else []
        copies = {name: detached_leaves(ts) for name, ts in first.tensors.items()}
        inputs = copies | {"folded_weights": folded}
        given = {f"its input {name}": tensors for name, tensors in inputs.items()}
        before = _versions(given | _everything_kept(regularizer))
        with torch.set_grad_enabled(is_minimized):
            penalty = evaluate_penalty(regularizer, batch, first.loss, first.grads, copies, folded)
        after = _versions(given | _everything_kept(regularizer))
        if changed := [name for name, versions in after.items() if before.get(name) != versions]:
            raise PenaltyError(
                f"{regularizer.name}: `forward` has to be a pure function of its inputs, but it "
                f"changed {', '.join(changed)}; constants are made in the constructor, and what "
                "is kept from batch to batch no resumed run would have"
            )
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
