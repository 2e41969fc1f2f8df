"""The gradient of loss plus penalty, exactly, where the penalty may itself contain gradients.

With several processes each has a share of the batch, and the gradient is that of the whole batch:
first-order gradients are summed over the ranks before the penalty sees them, the second backward
pass starts from the direction of the whole batch, and its result is summed once more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call

from engine import distributed
from engine.batch_norm import folded_weights
from engine.errors import PenaltyError
from engine.hardware import autocast, get_rng_state, rng_from
from engine.layers import penalized_weights, trainable_parameters
from engine.networks import run_network, split_output


def needs_double_backward(regularizer: nn.Module | None) -> bool:
    """Tell whether the penalty is a function of gradients."""
    return regularizer is not None and not {"w_grads", "a_grads"}.isdisjoint(regularizer.inputs)


@dataclass
class FirstOrderResult:
    """What a forward and a backward pass give.

    Where the batch is shared out to several processes, all of it is this rank's contribution:
    the sum over the ranks is meant.
    """

    loss: Tensor  # scalar, contribution to the mean over the batch
    n_correct: Tensor  # scalar
    grads: Sequence[Tensor]  # ∂loss/∂p of every trainable parameter p
    tensors: dict[str, list[Tensor]]  # those of the regularizer's inputs that are lists


def first_order(
    net: nn.Module,
    criterion: nn.Module,
    inputs: Sequence[str],
    x: Tensor,
    y: Tensor,
    dtype: torch.dtype,
    create_graph: bool = False,
) -> FirstOrderResult:
    """Differentiate the loss of images x (B, 3, H, W) with labels y (B,) once."""
    with autocast(x.device, dtype):
        logits, activations = run_network(net, x, with_activations="a_grads" in inputs)
        loss = distributed.to_global_mean(criterion(logits, y), len(x))
    params, weights = [*trainable_parameters(net).values()], penalized_weights(net)
    # an activation before the first trainable layer is a constant
    activations = [a for a in activations if a.requires_grad] if "a_grads" in inputs else []
    targets = [*params, *activations]
    grads = grad(loss, targets, create_graph=create_graph, materialize_grads=True)
    grad_of = dict(zip(params, grads, strict=False))
    available = {
        "weights": weights,
        "w_grads": [grad_of[w] for w in weights],
        "a_grads": list(grads[len(params) :]),
    }
    n_correct = (logits.detach().argmax(dim=1) == y).sum()
    tensors = {name: available[name] for name in available if name in inputs}
    return FirstOrderResult(loss.detach(), n_correct, grads[: len(params)], tensors)


def loss_change(
    net: nn.Module,
    criterion: nn.Module,
    x: Tensor,
    y: Tensor,
    dtype: torch.dtype,
    loss: Tensor,
    grads: Sequence[Tensor],
    rng_state: Tensor | None,
    deltas: Sequence[Tensor],
) -> Tensor:
    """Return L(W + Δ) − L(W) for a Δ_l of each penalized weight, on the same images.

    `loss` is L(W) and `grads` its derivatives, both of the whole batch, from the first-order pass.
    L(W + Δ) is one more forward pass, differentiable in Δ and the parameters. In training mode it
    normalizes by its own batch statistics; the real running statistics stay unchanged. Dropout
    drops the same units: it starts from `rng_state`, as the first pass did.
    """
    name_of = {p: name for name, p in net.named_parameters()}
    perturbed_params = dict(net.named_parameters())
    for w, delta in zip(penalized_weights(net), deltas, strict=True):
        perturbed_params[name_of[w]] = w + delta
    names, tensors = zip(*perturbed_params.items(), strict=True)
    perturbed_params = dict(zip(names, distributed.copy_to_ranks(*tensors), strict=True))
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    with autocast(x.device, dtype), rng_from(rng_state, x.device):
        output = functional_call(net, {**buffers, **perturbed_params}, (x,))
        logits, _ = split_output(net, output, [])
        perturbed_loss = distributed.reduce_from_ranks(
            distributed.to_global_mean(criterion(logits, y), len(x))
        )
    # L(W) with the derivatives that are known already: each term has value 0 and derivative g
    params = trainable_parameters(net).values()
    zeros = [(g.detach() * (p - p.detach())).sum() for p, g in zip(params, grads, strict=False)]
    linearized_loss = loss + sum(zeros)
    return perturbed_loss - linearized_loss


def compute_gradients(
    net: nn.Module,
    criterion: nn.Module,
    regularizer: nn.Module | None,
    x: Tensor,
    y: Tensor,
    dtype: torch.dtype = torch.float32,
    penalty_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Set the .grad of every trainable parameter to ∇L + ∇R; return L, R and the number correct.

    x are images (B, 3, H, W), y labels (B,); L is the mean loss, and R is `penalty_scale` times the
    regularizer. R is a function of tensors t (weights, gradients) that are functions of the
    parameters p, so ∇R = Σ_t ∂R/∂t · ∂t/∂p, and, through loss_change and folded weights, of p
    itself. The directions ∂R/∂t are taken on detached copies, which is cheap; for gradients, one
    vector-Jacobian product through the graph of the first-order pass carries them to the
    parameters. Batch norms are folded with the running statistics from before this batch.
    """
    inputs = regularizer.inputs if regularizer else ()
    params = [*trainable_parameters(net).values()]
    folded = folded_weights(net) if "folded_weights" in inputs else []
    rng_state = get_rng_state(x.device) if "loss_change" in inputs else None
    with distributed.overlapped_grad_all_reduce(params) as sum_grads:
        first = first_order(
            net, criterion, inputs, x, y, dtype, create_graph=needs_double_backward(regularizer)
        )
        grads = sum_grads(first.grads)
    loss, n_correct = distributed.batch_sum(torch.stack([first.loss, first.n_correct])).unbind()
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    if regularizer is None:
        return loss, torch.zeros_like(loss), n_correct

    copies = _detached_copies(first.tensors, penalized_weights(net))
    available = {
        **copies,
        "loss_change": partial(loss_change, net, criterion, x, y, dtype, loss, grads, rng_state),
        "folded_weights": folded,
    }
    if "a_grads" in copies:
        available["a_grads"] = distributed.whole_batch(copies["a_grads"])
    penalty = penalty_scale * _evaluate_penalty(regularizer, available)
    _add_penalty_gradients(params, penalty, first.tensors, copies)
    return loss, penalty.detach(), n_correct


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


def _add_penalty_gradients(
    params: Sequence[Tensor],
    penalty: Tensor,
    tensors: dict[str, list[Tensor]],
    copies: dict[str, list[Tensor]],
) -> None:
    """Add ∂penalty/∂p to the .grad of every parameter p.

    The penalty was computed from `copies`; `tensors` are the same with their graphs.
    """
    sources, leaves = sum(tensors.values(), []), sum(copies.values(), [])
    directions = grad(penalty, [*leaves, *params], allow_unused=True)
    vjp_pairs = []
    for t, direction in zip([*sources, *params], directions, strict=True):
        if t.requires_grad and direction is not None:
            if t.is_leaf:  # a parameter
                t.grad = t.grad + direction
            else:
                vjp_pairs.append((t, direction))
    if vjp_pairs:
        with distributed.overlapped_grad_all_reduce(params) as sum_grads:
            outputs, directions = zip(*vjp_pairs, strict=True)
            penalty_grads = sum_grads(grad(outputs, params, directions, allow_unused=True))
        for p, g in zip(params, penalty_grads, strict=True):
            if g is not None:
                p.grad = p.grad + g
