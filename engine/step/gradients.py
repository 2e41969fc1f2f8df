"""The gradient of loss plus penalty, where the penalty may itself contain gradients.

It is exact, or, where a step is given for it, a difference of two first-order gradients.

With several processes each has a share of the batch, and the gradient is that of the whole batch:
first-order gradients are summed over the ranks before the penalty sees them, the second backward
pass starts from the direction of the whole batch, and its result is summed once more.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call

from engine.networks.batch_norm import folded_weights
from engine.networks.layers import penalized_weights, trainable_parameters
from engine.networks.outputs import activation_runs, moved_activations, run_recorded, split_output
from engine.step.norms import lp_norms, whole_batch_norms
from engine.system import distributed
from engine.system.errors import PenaltyError
from engine.system.hardware import autocast, get_rng_state, rng_from

DIFFERENCE_STEP = 0.01  # relative; docs/fast_step.md says why
DIFFERENTIATED_GRADIENTS = {"w_grads", "a_grads"}


def needs_gradients(regularizer: nn.Module | None) -> bool:
    """Tell whether the penalty is a function of gradients, be they constants in it."""
    names = DIFFERENTIATED_GRADIENTS | {"detached_w_grads"}
    return regularizer is not None and not names.isdisjoint(regularizer.inputs)


def needs_double_backward(regularizer: nn.Module | None) -> bool:
    """Tell whether the penalty is a function of gradients that is differentiated through them."""
    return regularizer is not None and not DIFFERENTIATED_GRADIENTS.isdisjoint(regularizer.inputs)


# --- the loss of a batch ---------------------------------------------------------------------


@dataclass
class FirstOrderResult:
    """What a forward and a backward pass give.

    Where the batch is shared out to several processes, all of it is this rank's contribution:
    the sum over the ranks is meant.
    """

    loss: Tensor  # scalar, contribution to the mean over the batch
    n_correct: Tensor  # scalar
    grads: Sequence[Tensor]  # ∂loss/∂p of every trainable parameter p
    w_grads: list[Tensor]  # those of them that are ∂loss/∂W_l
    tensors: dict[str, list[Tensor]]  # those of the regularizer's inputs that are lists
    activations: dict[int, Tensor]  # by run (`activation_runs`), those that a_grads belong to


@dataclass(frozen=True)
class BatchLoss:
    """The loss of one batch as a function of parameters and activations."""

    net: nn.Module
    criterion: nn.Module  # logits, labels → mean loss
    x: Tensor  # images (B, 3, H, W), this rank's share
    y: Tensor  # labels (B,)
    dtype: torch.dtype  # of the convolutions
    rng_state: Tensor | None  # that the first forward pass starts from, for others after it

    def first_order(
        self, inputs: Sequence[str], create_graph: bool = False, keep_activations: bool = False
    ) -> FirstOrderResult:
        """Differentiate once, by what the regularizer's `inputs` ask for."""
        net, x, has_activations = self.net, self.x, "a_grads" in inputs
        with autocast(x.device, self.dtype):
            logits, activations, recorded = run_recorded(net, x, has_activations)
            loss = distributed.to_global_mean(self.criterion(logits, self.y), len(x))
        params, weights = [*trainable_parameters(net).values()], penalized_weights(net)
        # an activation before the first trainable layer is a constant
        activations = [a for a in activations if a.requires_grad] if has_activations else []
        targets = [*params, *activations]
        grads = grad(loss, targets, create_graph=create_graph, materialize_grads=True)
        grad_of = dict(zip(params, grads, strict=False))
        w_grads = [grad_of[w] for w in weights]
        available = {"weights": weights, "w_grads": w_grads, "a_grads": list(grads[len(params) :])}
        runs = activation_runs(net, activations, recorded) if keep_activations else ()
        return FirstOrderResult(
            loss.detach(),
            (logits.detach().argmax(dim=1) == self.y).sum(),
            grads[: len(params)],
            w_grads,
            {name: available[name] for name in available if name in inputs},
            {run: a.detach() for run, a in zip(runs, activations, strict=False)},
        )

    def perturbed(self, params: Mapping[str, Tensor], offsets: Mapping[int, Tensor]) -> Tensor:
        """Return this rank's contribution to the loss at other parameters and activations.

        `params` are by name, `offsets` what is added to activations, by their run. In training mode
        batch norms take the statistics of these activations; the real running statistics stay
        unchanged. Dropout drops the same units: it starts from `rng_state`, as the first pass did.
        """
        net, x = self.net, self.x
        buffers = {name: b.clone() for name, b in net.named_buffers()}
        with (
            autocast(x.device, self.dtype),
            rng_from(self.rng_state, x.device),
            moved_activations(net, offsets),
        ):
            logits, _ = split_output(net, functional_call(net, {**buffers, **params}, (x,)), [])
            return distributed.to_global_mean(self.criterion(logits, self.y), len(x))

    def change(self, loss: Tensor, grads: Sequence[Tensor], deltas: Sequence[Tensor]) -> Tensor:
        """Return L(W + Δ) − L(W) for a Δ_l of each penalized weight.

        `loss` is L(W) and `grads` its derivatives, both of the whole batch, from the first-order
        pass. L(W + Δ) is one more forward pass, differentiable in Δ and the parameters.
        """
        name_of = {p: name for name, p in self.net.named_parameters()}
        perturbed_params = dict(self.net.named_parameters())
        for w, delta in zip(penalized_weights(self.net), deltas, strict=True):
            perturbed_params[name_of[w]] = w + delta
        names, tensors = zip(*perturbed_params.items(), strict=True)
        perturbed_params = dict(zip(names, distributed.copy_to_ranks(*tensors), strict=True))
        perturbed_loss = distributed.reduce_from_ranks(self.perturbed(perturbed_params, {}))
        # L(W) with the derivatives that are known already: each term has value 0 and derivative g
        params = trainable_parameters(self.net).values()
        zeros = [(g.detach() * (p - p.detach())).sum() for p, g in zip(params, grads, strict=False)]
        linearized_loss = loss + sum(zeros)
        return perturbed_loss - linearized_loss


# --- the step --------------------------------------------------------------------------------


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
    Batch norms are folded with the running statistics from before this batch.
    """
    inputs = regularizer.inputs if regularizer else ()
    params = [*trainable_parameters(net).values()]
    folded = folded_weights(net) if "folded_weights" in inputs else []
    second_order = needs_double_backward(regularizer)
    by_difference = second_order and difference_step is not None
    runs_again = by_difference or "loss_change" in inputs
    batch = BatchLoss(net, criterion, x, y, dtype, get_rng_state(x.device) if runs_again else None)
    with distributed.overlapped_grad_all_reduce(params) as sum_grads:
        first = batch.first_order(inputs, second_order and not by_difference, by_difference)
        grads = sum_grads(first.grads)
    loss, n_correct = distributed.batch_sum(torch.stack([first.loss, first.n_correct])).unbind()
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    if regularizer is None:
        return loss, torch.zeros_like(loss), n_correct

    penalty, copies = _penalty(regularizer, batch, first, loss, grads, folded)
    penalty = penalty_scale * penalty
    directions = _add_direct_gradients(params, penalty, first.tensors, copies)
    if by_difference:
        _add(params, difference_product(batch, first, grads, directions, difference_step))
    elif second_order:
        _add(params, vector_jacobian_product(params, first, directions))
    return loss, penalty.detach(), n_correct


def _penalty(
    regularizer: nn.Module,
    batch: BatchLoss,
    first: FirstOrderResult,
    loss: Tensor,
    grads: Sequence[Tensor],
    folded: Sequence[Tensor],
) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """Return the penalty and the copies of `first.tensors` that it is a function of.

    `loss` and `grads` are those of the whole batch, the latter also in the .grad of the parameters.
    """
    weights = penalized_weights(batch.net)
    copies = _detached_copies(first.tensors, weights)
    available = {
        **copies,
        "a_grads": distributed.whole_batch(copies.get("a_grads", [])),
        "detached_w_grads": [w.grad for w in weights],
        "loss_change": partial(batch.change, loss, grads),
        "folded_weights": folded,
    }
    return _evaluate_penalty(regularizer, available), copies


def _detached_copies(
    tensors: dict[str, list[Tensor]], weights: Sequence[Tensor]
) -> dict[str, list[Tensor]]:
    """Return leaves with the values that the regularizer is evaluated at.

    Gradients of weights are those of the whole batch, which are in the .grad of `weights`.
    """
    values = dict(tensors)
    if "w_grads" in values:
        values["w_grads"] = [w.grad for w in weights]
    return {name: [t.detach().requires_grad_() for t in ts] for name, ts in values.items()}


def _evaluate_penalty(regularizer: nn.Module, available: dict[str, object]) -> Tensor:
    """Return the penalty; PenaltyError where it is not a scalar tensor made of its inputs."""
    penalty = regularizer(*(available[name] for name in regularizer.inputs))
    if not isinstance(penalty, Tensor) or penalty.dim():
        shape = tuple(penalty.shape) if isinstance(penalty, Tensor) else type(penalty).__name__
        raise PenaltyError(f"{regularizer.name} returned {shape}: it must return a scalar tensor")
    if not penalty.requires_grad:
        raise PenaltyError(f"{regularizer.name} does not depend on its inputs: nothing to minimize")
    return penalty


Directions = Mapping[str, Sequence[Tensor | None]]


def _add_direct_gradients(
    params: Sequence[Tensor],
    penalty: Tensor,
    tensors: dict[str, list[Tensor]],
    copies: dict[str, list[Tensor]],
) -> Directions:
    """Add ∂penalty/∂p to the .grad of every parameter p, but for what goes through gradients.

    The penalty was computed from `copies` of `tensors`. Returns its directions ∂penalty/∂t at the
    gradients t, by the name of the input; None where it does not depend on one.
    """
    leaves = sum(copies.values(), [])
    directions = grad(penalty, [*leaves, *params], allow_unused=True)
    of_leaves = iter(directions)
    of_inputs = {name: [next(of_leaves) for _ in ts] for name, ts in copies.items()}
    _add(tensors.get("weights", ()), of_inputs.pop("weights", ()))
    _add(params, directions[len(leaves) :])
    return of_inputs


def _add(params: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Add gradients, where there are, to the .grad of parameters: all of them in one launch."""
    pairs = [(p, g) for p, g in zip(params, gradients, strict=True) if g is not None]
    if pairs:
        params, gradients = zip(*pairs, strict=True)
        sums = torch._foreach_add([p.grad for p in params], gradients)
        for p, total in zip(params, sums, strict=True):
            p.grad = total


# --- from directions at gradients to the parameters ------------------------------------------


def vector_jacobian_product(
    params: Sequence[Tensor], first: FirstOrderResult, directions: Directions
) -> list[Tensor | None]:
    """Return Σ_t d_t · ∂t/∂p of every parameter p: t are gradients with their graph.

    Where the directions d_t are None or the t constants, there is nothing to return but Nones.
    """
    pairs = [
        (t, d)
        for name, ds in directions.items()
        for t, d in zip(first.tensors[name], ds, strict=True)
        if t.requires_grad and d is not None
    ]
    if not pairs:
        return [None] * len(params)
    outputs, vectors = zip(*pairs, strict=True)
    with distributed.overlapped_grad_all_reduce(params) as sum_grads:
        return sum_grads(grad(outputs, params, vectors, allow_unused=True))


def difference_product(
    batch: BatchLoss,
    first: FirstOrderResult,
    grads: Sequence[Tensor],
    directions: Directions,
    relative_step: float,
) -> list[Tensor]:
    """Return (∇L(W + h·d, A + h·e) − ∇L(W, A)) / h of every parameter, of the whole batch.

    The limit h → 0 is Σ_t d_t · ∂t/∂p, for a smooth network: d_l are the directions at ∂L/∂W_l and
    e_l those at ∂L/∂A_l. `grads` is ∇L(W, A). h is `relative_step` times the least ‖t‖/‖d‖ over
    weights and activations t and their directions d: no tensor moves by more than that part of it.
    Source: Zhao et al., arXiv 2202.03599, for weights; the offsets of activations are our own.
    """
    weights = zip(penalized_weights(batch.net), directions.get("w_grads", ()), strict=False)
    of_weights = {w: d for w, d in weights if d is not None}
    activations = zip(first.activations.items(), directions.get("a_grads", ()), strict=True)
    of_activations = {run: (a, e) for (run, a), e in activations if e is not None}
    h = relative_step * _largest_step(of_weights.items(), of_activations.values())
    moved = {}
    if of_weights:
        with torch.no_grad():
            steps = torch._foreach_mul([*of_weights.values()], h)
            sums = torch._foreach_add([*of_weights], steps)
        moved = dict(zip(of_weights, sums, strict=True))
    params = {
        name: moved.get(p, p).detach().requires_grad_()
        for name, p in trainable_parameters(batch.net).items()
    }
    leaves = [*params.values()]
    with distributed.overlapped_grad_all_reduce(leaves) as sum_grads:
        loss = batch.perturbed(params, {run: h * e for run, (_, e) in of_activations.items()})
        moved_grads = sum_grads(grad(loss, leaves, materialize_grads=True))
    return torch._foreach_div(torch._foreach_sub(moved_grads, grads), h)


Pairs = Iterable[tuple[Tensor, Tensor]]  # of tensors t and their directions d


@torch.no_grad()
def _largest_step(weights: Pairs, activations: Pairs) -> Tensor:
    """Return min ‖t‖₂/‖d‖₂ (scalar) over all pairs (t, d), the same on all ranks.

    Of activations each rank has its share of the images. Where t or d is zero there is no bound; if
    there is none at all, the result is 1.
    """
    of_weights = lp_norms([t for pair in weights for t in pair], 2)
    of_activations = whole_batch_norms([t for pair in activations for t in pair], 2)
    norms = torch.stack([*of_weights, *of_activations])
    sizes, slopes = norms[::2], norms[1::2]
    ratios = torch.where((sizes > 0) & (slopes > 0), sizes / slopes, math.inf)
    least = ratios.amin()
    return torch.where(least.isfinite(), least, 1)
