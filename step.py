"""One training step: the exact gradient of the loss plus a penalty that may contain gradients.

In a run of several processes, each has a share of the batch, and the gradient is that of the whole:
first-order gradients are summed over the processes before the penalty sees them, the second pass
starts from the direction of the whole, and what it gives is summed once more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call

import distributed
import utils
from regularizers import Regularizer


@dataclass
class Pass:
    """What a forward and a backward pass give: the loss, and what a regularizer is fed."""

    loss: Tensor  # scalar, the batch mean; of a batch that is shared out, this share's part of it
    n_correct: Tensor  # scalar
    grads: Sequence[Tensor]  # ∂loss/∂p of every parameter p
    tensors: dict[str, list[Tensor]]  # those of the regularizer's inputs that are lists


def first_order(
    net: nn.Module, criterion: nn.Module, inputs: Sequence[str], x: Tensor, y: Tensor,
    dtype: torch.dtype, create_graph: bool = False,
) -> Pass:
    """Differentiate the loss of images x (B, 3, H, W) with labels y (B,) once."""
    with utils.autocast(x.device, dtype):
        logits, activations = net(x)
        loss = distributed.part(criterion(logits, y), len(x))
    params, weights = list(net.parameters()), utils.penalized_weights(net)
    wanted = params + (list(activations) if "a_grads" in inputs else [])
    grads = grad(loss, wanted, create_graph=create_graph, materialize_grads=True)
    of = dict(zip(params, grads, strict=False))
    available = {
        "weights": weights,
        "w_grads": [of[w] for w in weights],
        "a_grads": list(grads[len(params):]),
    }
    n_correct = (logits.detach().argmax(dim=1) == y).sum()
    tensors = {name: ts for name, ts in available.items() if name in inputs}
    return Pass(loss.detach(), n_correct, grads[: len(params)], tensors)


def loss_change(
    net: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, dtype: torch.dtype, loss: Tensor,
    grads: Sequence[Tensor], deltas: Sequence[Tensor],
) -> Tensor:
    """Return L(W + Δ) − L(W) for the Δ_l of each penalized weight, on the same images.

    L(W) is `loss` and its derivative `grads`, known from the first-order pass, both of the whole
    batch; L(W + Δ) is one more forward pass, differentiable in Δ and the parameters. In training
    mode that normalises by its own batch statistics, and updates copies of the running ones: those
    belong to the clean pass.
    """
    name_of = {p: name for name, p in net.named_parameters()}
    weights = utils.penalized_weights(net)
    moved = dict(net.named_parameters())
    moved |= {name_of[w]: w + delta for w, delta in zip(weights, deltas, strict=True)}
    moved = dict(zip(moved, distributed.enter(*moved.values()), strict=True))
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    with utils.autocast(x.device, dtype):
        logits, _ = functional_call(net, {**buffers, **moved}, (x,))
        moved_loss = distributed.leave(distributed.part(criterion(logits, y), len(x)))
    tangents = zip(net.parameters(), grads, strict=False)  # of value 0 and derivative g
    here = loss + sum((g.detach() * (p - p.detach())).sum() for p, g in tangents)
    return moved_loss - here


def update_gradients(
    net: nn.Module, criterion: nn.Module, regularizer: Regularizer | None, x: Tensor, y: Tensor,
    dtype: torch.dtype = torch.float32, strength: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Set the .grad of every parameter to ∇L + ∇R, exactly; return L, R and the number correct.

    R is `strength` times the regularizer: a function of tensors t (weights, gradients) that are
    functions of the parameters p, so ∇R = Σ_t ∂R/∂t · ∂t/∂p, and, through loss_change and folded
    weights, of p itself. Folded with the running statistics from before this batch.
    The direction ∂R/∂t is taken on detached copies, which is cheap; for gradients, one backward
    pass through the graph of the first-order pass then carries it to the parameters.
    """
    inputs = regularizer.inputs if regularizer else ()
    params = list(net.parameters())
    folded = utils.folded_weights(net) if "folded_weights" in inputs else []
    with distributed.summing(params) as summed:
        done = first_order(
            net, criterion, inputs, x, y, dtype, create_graph=takes_gradients(regularizer)
        )
        grads = summed(done.grads)
    loss, n_correct = distributed.batch_sum(torch.stack([done.loss, done.n_correct])).unbind()
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    if regularizer is None:
        return loss, torch.zeros_like(loss), n_correct

    whole = dict(done.tensors)
    if "w_grads" in whole:
        whole["w_grads"] = [w.grad for w in utils.penalized_weights(net)]
    copies = {name: [t.detach().requires_grad_() for t in ts] for name, ts in whole.items()}
    change = partial(loss_change, net, criterion, x, y, dtype, loss, grads)
    fed = {**copies, "loss_change": change, "folded_weights": folded}
    penalty = strength * regularizer(*(fed[name] for name in inputs))
    tensors, leaves = sum(done.tensors.values(), []), sum(copies.values(), [])
    directions = grad(penalty, leaves + params, allow_unused=True)
    carried = []
    for t, direction in zip(tensors + params, directions, strict=True):
        if t.requires_grad and direction is not None:
            if t.is_leaf:  # a parameter
                t.grad = t.grad + direction
            else:
                carried.append((t, direction))
    if carried:
        with distributed.summing(params) as summed:
            tensors, directions = zip(*carried, strict=True)
            carried_on = summed(grad(tensors, params, directions, allow_unused=True))
        for p, g in zip(params, carried_on, strict=True):
            if g is not None:
                p.grad = p.grad + g
    return loss, penalty.detach(), n_correct


def takes_gradients(regularizer: Regularizer | None) -> bool:
    """Tell whether the penalty is a function of gradients: only then a step is of second order."""
    return regularizer is not None and not {"w_grads", "a_grads"}.isdisjoint(regularizer.inputs)
