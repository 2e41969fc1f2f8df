"""The gradient of loss plus penalty, where the penalty may itself contain gradients.

It is exact, or, where a size is given for it, a difference of two first-order gradients.

With several processes each has a share of the batch, and the gradient is that of the whole batch:
first-order gradients are summed over the ranks before the penalty sees them, the second backward
pass starts from the direction of the whole batch, and its result is summed once more.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import grad

from engine.networks.batch_norm import folded_weights
from engine.networks.layers import penalized_weights, trainable_parameters
from engine.networks.outputs import foreign_code, network_boundary
from engine.step.batch_loss import BatchLoss, FirstOrderResult, StartingState, differentiable_twice
from engine.step.norms import lp_norms, whole_batch_norms
from engine.step.penalty_inputs import (
    detached_leaves,
    evaluate_penalty,
    needs_double_backward,
    runs_forward_again,
)
from engine.system import distributed
from engine.system.errors import PenaltyError

NOT_TWICE = " cannot be differentiated twice, which --penalty_gradient difference does without"
DIFFERENCE_STEP = 0.01  # relative size of a difference; docs/fast_step.md says why


def compute_gradients(
    net: nn.Module,
    criterion: nn.Module,
    regularizer: nn.Module | None,
    x: Tensor,
    y: Tensor,
    dtype: torch.dtype = torch.float32,
    penalty_scale: float = 1.0,
    difference_step: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Set the .grad of every trainable parameter to ∇L + ∇R; return L, R and the number correct.

    x are images (B, 3, H, W), y labels (B,); L is the mean loss, and R is `penalty_scale` times the
    regularizer. R is a function of tensors t (weights, gradients) that are functions of the
    parameters p, so ∇R = Σ_t ∂R/∂t · ∂t/∂p, and, through loss_change and folded weights, of p
    itself. The directions ∂R/∂t are taken on detached copies, which is cheap. For gradients,
    `vector_jacobian_product` carries them to the parameters through the graph of the first-order
    pass or, with a `difference_step`, `difference_product` without one.

    Raises PenaltyError where the regularizer returns no scalar, or none that depends on its inputs,
    and NetworkError for whatever it or the network raises.
    """
    inputs = regularizer.inputs if regularizer else ()
    params = [*trainable_parameters(net).values()]
    # with the running statistics from before this batch, which the forward pass moves
    folded = folded_weights(net) if "folded_weights" in inputs else []
    second_order = needs_double_backward(regularizer)
    by_difference = second_order and difference_step is not None
    runs_again = runs_forward_again(regularizer, difference_step)
    start = StartingState.of(net, x.device) if runs_again else None
    batch = BatchLoss(net, criterion, x, y, dtype, start)
    with distributed.overlapped_grad_all_reduce(params) as sum_grads:
        first = batch.first_order(inputs, second_order and not by_difference, by_difference)
        grads = sum_grads(first.grads)
    loss, n_correct = distributed.batch_sum(torch.stack([first.loss, first.n_correct])).unbind()
    for p, g in zip(params, grads, strict=True):
        p.grad = g  # ∇L of the whole batch; what follows adds ∇R
    if regularizer is None:
        return loss, torch.zeros_like(loss), n_correct

    # a graph from the copies t to R alone: the way from p to t, which is long, is not walked twice
    copies = _detached_copies(first.tensors, penalized_weights(net))
    penalty = penalty_scale * evaluate_penalty(regularizer, batch, loss, grads, copies, folded)
    directions = _add_direct_gradients(regularizer.name, params, penalty, first.tensors, copies)
    penalty = penalty.detach()
    del copies  # they are the memory of gradients, which the second pass frees one by one
    if second_order:
        _add(params, _through_gradients(batch, params, first, grads, directions, difference_step))
    return loss, penalty, n_correct


Lists = dict[str, list[Tensor]]  # of tensors, by the name of the input
Directions = dict[str, Sequence[Tensor | None]]  # ∂penalty/∂t, by the name of the input


def _detached_copies(tensors: Lists, weights: Sequence[Tensor]) -> Lists:
    """Return leaves with the values that the regularizer is evaluated at.

    Gradients of weights are those of the whole batch, which are in the .grad of `weights`.
    """
    values = dict(tensors)
    if "w_grads" in values:
        values["w_grads"] = [w.grad for w in weights]
    return {name: detached_leaves(ts) for name, ts in values.items()}


def _add_direct_gradients(
    name: str, params: Sequence[Tensor], penalty: Tensor, tensors: Lists, copies: Lists
) -> Directions:
    """Add ∂penalty/∂p to the .grad of every parameter p, but for what goes through gradients.

    The penalty, of a regularizer of that name, was computed from `copies` of `tensors`. Returns its
    directions ∂penalty/∂t at the gradients t, by the name of the input; None where it does not
    depend on one.
    """
    leaves = sum(copies.values(), [])
    # params as well: loss_change and folded weights depend on them without a copy in between
    directions = derivatives(name, penalty, [*leaves, *params])
    at_leaves = iter(directions)
    by_input = {name: [next(at_leaves) for _ in ts] for name, ts in copies.items()}
    # a weight is a parameter itself: ∂t/∂p is 1, and its direction is a gradient already
    _add(tensors.get("weights", ()), by_input.pop("weights", ()))
    _add(params, directions[len(leaves) :])
    return by_input


def derivatives(name: str, penalty: Tensor, tensors: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Return ∂penalty/∂t of each tensor t, None where it does not depend on one.

    Raises PenaltyError where it depends on none, and NetworkError where there is no derivative;
    both begin with the regularizer's name.
    """
    with foreign_code(f"{name} cannot be differentiated"):
        found = grad(penalty, tensors, allow_unused=True) if penalty.requires_grad else ()
    if all(each is None for each in found):
        raise PenaltyError(f"{name} does not depend on its inputs: nothing to minimize")
    return found


def _add(params: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Add gradients, where there are, to the .grad of parameters: all of them in one launch."""
    pairs = [(p, g) for p, g in zip(params, gradients, strict=True) if g is not None]
    if pairs:
        params, gradients = zip(*pairs, strict=True)
        # not in place: .grad is the memory of ∇L, which `difference_product` still reads
        sums = torch._foreach_add([p.grad for p in params], gradients)
        for p, total in zip(params, sums, strict=True):
            p.grad = total


# --- from directions at gradients to the parameters ------------------------------------------


def _through_gradients(
    batch: BatchLoss,
    params: Sequence[Tensor],
    first: FirstOrderResult,
    grads: Sequence[Tensor],
    directions: Directions,
    difference_step: float | None,
) -> list[Tensor | None]:
    """Return Σ_t d_t · ∂t/∂p of every parameter p, exactly or, with a step, by a difference."""
    if difference_step is None:
        return vector_jacobian_product(batch.net, params, first, directions)
    return difference_product(batch, first, grads, directions, difference_step)


def vector_jacobian_product(
    net: nn.Module, params: Sequence[Tensor], first: FirstOrderResult, directions: Directions
) -> list[Tensor | None]:
    """Return Σ_t d_t · ∂t/∂p of every parameter p: t are gradients with their graph.

    Both are removed from `first` and `directions`, so that the pass can free them. Where the
    directions d_t are None or the t constants, there is nothing to return but Nones.
    Raises NetworkError where the network cannot be differentiated twice.
    """
    pairs = [
        (t, d)
        for name, ds in directions.items()
        for t, d in zip(first.tensors[name], ds, strict=True)
        if t.requires_grad and d is not None
    ]
    if not pairs:
        return [None] * len(params)
    # one backward pass from all of them, however many layers: the price is that of one
    start = _Start.apply([d for _, d in pairs], *(t for t, _ in pairs))
    pairs.clear()
    first.tensors.clear()
    directions.clear()
    overlapped = distributed.overlapped_grad_all_reduce(params)
    twice = differentiable_twice(True)
    with network_boundary(net, NOT_TWICE), twice, overlapped as sum_grads:
        return sum_grads(grad(start, params, allow_unused=True))


class _Start(torch.autograd.Function):
    """A scalar whose backward pass starts from given directions at tensors, and keeps none.

    `torch.autograd.grad(tensors, …, directions)` would hold all of both until it returns; this way
    each is freed where the pass is done with it.
    """

    @staticmethod
    def forward(ctx, directions, *tensors):
        ctx.directions = directions
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx, _):
        directions = tuple(ctx.directions)
        ctx.directions.clear()
        return None, *directions


def difference_product(
    batch: BatchLoss,
    first: FirstOrderResult,
    grads: Sequence[Tensor],
    directions: Directions,
    relative_size: float,
) -> list[Tensor]:
    """Return (∇L(W + h·d, A + h·e) − ∇L(W, A)) / h of every parameter, of the whole batch.

    The limit h → 0 is Σ_t d_t · ∂t/∂p, for a smooth network: d_l are the directions at ∂L/∂W_l and
    e_l those at ∂L/∂A_l. `grads` is ∇L(W, A). h is `relative_size` times the least ‖t‖/‖d‖ over
    weights and activations t and their directions d: no tensor moves by more than that part of it.
    Source: Zhao et al., arXiv 2202.03599, for weights; the offsets of activations are our own.
    """
    weights = zip(penalized_weights(batch.net), directions.get("w_grads", ()), strict=False)
    weights = {w: d for w, d in weights if d is not None}
    activations = zip(first.activations.items(), directions.get("a_grads", ()), strict=True)
    activations = {run: (a, e) for (run, a), e in activations if e is not None}
    # one h for all (scalar): a size of its own for each layer would weight the sum
    h = relative_size * _largest_move(weights.items(), activations.values())
    moved = {}
    if weights:
        with torch.no_grad():
            moves = torch._foreach_mul([*weights.values()], h)
            moved = dict(zip(weights, torch._foreach_add([*weights], moves), strict=True))
    params = {
        name: moved.get(p, p).detach().requires_grad_()
        for name, p in trainable_parameters(batch.net).items()
    }
    leaves = [*params.values()]  # ∇L at the moved weights, in all parameters
    with distributed.overlapped_grad_all_reduce(leaves) as sum_grads:
        offsets = {run: h * e for run, (_, e) in activations.items()}
        moved_grads = sum_grads(batch.perturbed(params, offsets)[1])
    return torch._foreach_div(torch._foreach_sub(moved_grads, grads), h)


Pairs = Iterable[tuple[Tensor, Tensor]]  # of tensors t and their directions d


@torch.no_grad()
def _largest_move(weights: Pairs, activations: Pairs) -> Tensor:
    """Return min ‖t‖₂/‖d‖₂ (scalar) over all pairs (t, d), the same on all ranks.

    Activations are this rank's share of the images. Where t or d is zero there is no bound; if
    there is none at all, the result is 1.
    """
    weight_norms = lp_norms([t for pair in weights for t in pair], 2)
    activation_norms = whole_batch_norms([t for pair in activations for t in pair], 2)
    norms = torch.stack([*weight_norms, *activation_norms])  # ‖t‖, ‖d‖, ‖t‖, ‖d‖, …
    tensor_norms, direction_norms = norms[::2], norms[1::2]
    is_bound = (tensor_norms > 0) & (direction_norms > 0)
    # `where`, not an index: nothing is read from the device
    least = torch.where(is_bound, tensor_norms / direction_norms, math.inf).amin()
    return torch.where(least.isfinite(), least, 1)
