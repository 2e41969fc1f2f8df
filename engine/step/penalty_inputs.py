"""What a penalty is a function of. One function supplies it, in training and in evaluation."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.networks.layers import penalized_weights, trainable_parameters
from engine.networks.outputs import foreign_code
from engine.step.batch_loss import BatchLoss
from engine.step.norms import batch_of
from engine.system import distributed
from engine.system.errors import PenaltyError


class PenaltyInputs(NamedTuple):
    """All that a regularizer's `forward` can take, by the names of its arguments.

    l counts layers, B is the number of images; all of it is of the whole batch.
    """

    weights: Sequence[Tensor]  # W_l of every Conv2d and Linear, in module order
    w_grads: Sequence[Tensor]  # ∂L/∂W_l of the batch-mean loss L, same shapes
    a_grads: Sequence[Tensor]  # ∂L/∂A_l of the network's activations, mostly (B, …)
    # Δ ↦ L(W + Δ) − L(W), Δ_l as W_l; to be differentiated once, by the training step
    loss_change: Callable[[Sequence[Tensor]], Tensor]
    folded_weights: Sequence[Tensor]  # Ŵ_l = W_l·γ_l/√(σ_l² + ε), see `folded_weights`
    detached_w_grads: Sequence[Tensor]  # w_grads, constants when the penalty is differentiated


INPUTS = PenaltyInputs._fields
OF_WEIGHTS = {"weights", "folded_weights"}  # without the network's loss
DIFFERENTIATED_GRADIENTS = {"w_grads", "a_grads"}


def needs_gradients(regularizer: nn.Module | None) -> bool:
    """Tell whether the penalty is a function of gradients, be they constants in it."""
    names = DIFFERENTIATED_GRADIENTS | {"detached_w_grads"}
    return regularizer is not None and not names.isdisjoint(regularizer.inputs)


def needs_double_backward(regularizer: nn.Module | None) -> bool:
    """Tell whether the penalty is a function of gradients that is differentiated through them."""
    return regularizer is not None and not DIFFERENTIATED_GRADIENTS.isdisjoint(regularizer.inputs)


def runs_forward_again(regularizer: nn.Module | None, difference_step: float | None) -> bool:
    """Tell whether the penalty takes a second forward pass, which must drop the same units."""
    by_difference = needs_double_backward(regularizer) and difference_step is not None
    return by_difference or (regularizer is not None and "loss_change" in regularizer.inputs)


def detached_leaves(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return tensors of the same memory that a penalty is computed, and differentiated, from."""
    return [t.detach().requires_grad_() for t in tensors]


def evaluate_penalty(
    regularizer: nn.Module,
    batch: BatchLoss,
    loss: Tensor,
    grads: Sequence[Tensor],
    tensors: Mapping[str, Sequence[Tensor]],
    folded: Sequence[Tensor],
) -> Tensor:
    """Return the penalty (scalar) of a batch, without its graph where gradients are disabled.

    `loss` and `grads`, its derivatives in the trainable parameters (none where the regularizer does
    not need gradients), are those of the whole batch. `tensors` are the "weights", "w_grads" and
    "a_grads" that the regularizer takes, the last of this rank's images; `folded` folded weights.
    Raises PenaltyError where the regularizer returns no real scalar, and NetworkError for whatever
    it raises itself.
    """
    is_differentiated = torch.is_grad_enabled()

    def loss_change(deltas: Sequence[Tensor]) -> Tensor:
        # of the regularizer's own no_grad as well; in evaluation it would cost a backward pass
        with torch.set_grad_enabled(is_differentiated and torch.is_grad_enabled()):
            return batch.change(loss, grads, deltas)

    grad_of = dict(zip(trainable_parameters(batch.net).values(), grads, strict=False))
    inputs = PenaltyInputs(
        weights=tensors.get("weights", ()),
        w_grads=tensors.get("w_grads", ()),
        a_grads=distributed.whole_batch(tensors.get("a_grads", ())),
        loss_change=loss_change,
        folded_weights=folded,
        detached_w_grads=[grad_of[w] for w in penalized_weights(batch.net) if grad_of],
    )
    # with gradients in any case: a regularizer may itself differentiate
    with foreign_code(regularizer.name), torch.enable_grad(), batch_of(len(batch.x)):
        penalty = regularizer(*(getattr(inputs, name) for name in regularizer.inputs))
    if not isinstance(penalty, Tensor) or penalty.dim() or penalty.is_complex():
        found = type(penalty).__name__
        if isinstance(penalty, Tensor):
            found = tuple(penalty.shape) if penalty.dim() else "a complex number"
        raise PenaltyError(
            f"{regularizer.name} returned {found}: it must return a real scalar tensor"
        )
    return penalty if is_differentiated else penalty.detach()
