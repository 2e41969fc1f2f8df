"""The loss of one batch as a function of parameters and activations, and its first derivatives."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.networks import outputs
from engine.networks.fast_layers import rectified_are_read
from engine.networks.layers import penalized_weights, trainable_parameters
from engine.system import distributed
from engine.system.errors import PenaltyError
from engine.system.hardware import RandomState, autocast, get_rng_state, rng_from


@dataclass
class FirstOrderResult:
    """What a forward and a backward pass give: this rank's contribution to sums over the ranks."""

    loss: Tensor  # scalar, contribution to the mean over the batch
    n_correct: Tensor  # scalar
    grads: Sequence[Tensor] = ()  # ∂loss/∂p of every trainable parameter p
    tensors: dict[str, list[Tensor]] = field(default_factory=dict)  # inputs that are lists, by name
    activations: dict[int, Tensor] = field(default_factory=dict)  # by run, those of a_grads


class StartingState(NamedTuple):
    """What a forward pass begins with beside parameters and images, and changes."""

    random: RandomState
    buffers: dict[str, Tensor]  # copies, by name

    @classmethod
    def of(cls, net: nn.Module, device: torch.device) -> "StartingState":
        """Return the state of the network, and of the random streams it draws from, now."""
        return cls(get_rng_state(device), {name: b.clone() for name, b in net.named_buffers()})


@dataclass(frozen=True)
class BatchLoss:
    """The loss of one batch as a function of parameters and activations."""

    net: nn.Module
    criterion: nn.Module  # logits, labels → mean loss
    x: Tensor  # images (B, 3, H, W), this rank's share
    y: Tensor  # labels (B,)
    dtype: torch.dtype  # of the convolutions
    start: StartingState | None  # of the first forward pass, for others after it

    def forward_only(self) -> FirstOrderResult:
        """Return loss and number correct, without a derivative."""
        with torch.inference_mode(), self._forward_pass():
            logits, _ = outputs.run_network(self.net, self.x)
            loss, n_correct = self.criterion(logits, self.y), self._n_correct(logits)
        return FirstOrderResult(loss, n_correct, tensors={"weights": penalized_weights(self.net)})

    def first_order(
        self, inputs: Sequence[str], create_graph: bool = False, keep_activations: bool = False
    ) -> FirstOrderResult:
        """Differentiate once, by what the regularizer's `inputs` ask for."""
        net = self.net
        has_activations = "a_grads" in inputs
        with self._forward_pass(), differentiable_twice(create_graph):
            logits, activations, recorded = outputs.run_recorded(net, self.x, has_activations)
            loss = distributed.to_global_mean(self.criterion(logits, self.y), len(self.x))
        params = [*trainable_parameters(net).values()]
        weights = penalized_weights(net)
        # an activation before the first trainable layer is a constant
        activations = [a for a in activations if a.requires_grad] if has_activations else []
        # one backward pass for all of them: they share most of the way
        targets = [*params, *activations]
        # checkpointing runs parts of the network in the backward pass as well
        with outputs.network_boundary(net), differentiable_twice(create_graph):
            grads = grad(loss, targets, create_graph=create_graph, materialize_grads=True)
        grad_of = dict(zip(params, grads, strict=False))
        available = {
            "weights": weights,
            "w_grads": [grad_of[w] for w in weights],
            "a_grads": list(grads[len(params) :]),
        }
        runs = outputs.activation_runs(net, activations, recorded) if keep_activations else ()
        return FirstOrderResult(
            loss.detach(),
            self._n_correct(logits),
            grads[: len(params)],
            {name: available[name] for name in available if name in inputs},
            {run: a.detach() for run, a in zip(runs, activations, strict=False)},
        )

    def _n_correct(self, logits: Tensor) -> Tensor:
        return (logits.argmax(dim=1) == self.y).sum()

    @contextmanager
    def _forward_pass(self) -> Iterator[None]:
        with autocast(self.x.device, self.dtype), rectified_are_read(self.net):
            yield

    def perturbed(
        self, params: Mapping[str, Tensor], offsets: Mapping[int, Tensor]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Return this rank's contributions to the loss elsewhere and to its derivatives there.

        `params` are leaves, by name, which it is differentiated in; `offsets` is what is added to
        activations, by their run. In training mode batch norms take the statistics of these
        activations; the real running statistics stay unchanged. The pass begins as the first one
        did, in `start`: dropout drops the same units. With gradients disabled there are none.
        """
        net, x = self.net, self.x
        buffers = {name: b.clone() for name, b in self.start.buffers.items()}

        def run() -> tuple[Tensor, Sequence[Tensor]]:
            with (
                self._forward_pass(),
                rng_from(self.start.random, x.device),
                outputs.moved_activations(net, offsets),
            ):
                logits, _ = outputs.split_output(net, net(x.clone()), [])
                loss = distributed.to_global_mean(self.criterion(logits, self.y), len(x))
            if not torch.is_grad_enabled():
                return loss, ()
            # here, where the network has these parameters: checkpointing runs parts of it again
            with outputs.fixed_activations(net) if offsets else nullcontext():
                return loss.detach(), grad(loss, [*params.values()], materialize_grads=True)

        tensors = {f"net.{name}": t for name, t in (buffers | dict(params)).items()}
        with outputs.network_boundary(net):
            return functional_call(_Around(net), tensors, (run,))

    def change(self, loss: Tensor, grads: Sequence[Tensor], deltas: Sequence[Tensor]) -> Tensor:
        """Return L(W + Δ) − L(W) for a Δ_l of each penalized weight.

        `loss` is L(W) and `grads` its derivatives, both of the whole batch, from the first-order
        pass. L(W + Δ) is one more step, differentiable once in Δ and the parameters.
        """
        name_of = {p: name for name, p in self.net.named_parameters()}
        moved = trainable_parameters(self.net)
        for w, delta in zip(penalized_weights(self.net), deltas, strict=True):
            moved[name_of[w]] = w + delta
        # The penalty is of the whole batch, this forward pass of the rank's share: the pair below
        # adds up the losses on the way forward, and their derivatives on the way back
        moved = dict(zip(moved, distributed.copy_to_ranks(*moved.values()), strict=True))
        leaves = {name: t.detach().requires_grad_(t.requires_grad) for name, t in moved.items()}
        moved_loss, moved_grads = self.perturbed(leaves, {})
        if torch.is_grad_enabled():
            moved_loss = _WithDerivatives.apply(moved_loss, moved_grads, *moved.values())
            params = trainable_parameters(self.net).values()
            loss = _WithDerivatives.apply(loss, [g.detach() for g in grads], *params)
        return distributed.reduce_from_ranks(moved_loss) - loss


class _Around(nn.Module):
    """Calls a function while `torch.func.functional_call` has other tensors in the network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


class _WithDerivatives(torch.autograd.Function):
    """A scalar of this value, whose derivatives in the tensors are known, and have none themselves.

    Raises PenaltyError where they are to be differentiated.
    """

    @staticmethod
    def forward(ctx, value, derivatives, *tensors):
        ctx.derivatives = derivatives
        return value.clone()

    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled():  # as with create_graph=True
            raise PenaltyError(
                "loss_change has one derivative, which the training step takes: a regularizer "
                "cannot differentiate it with create_graph=True"
            )
        return None, None, *(g * derivative for derivative in ctx.derivatives)


def differentiable_twice(needed: bool) -> AbstractContextManager[None]:
    """Context manager in which attention has a second derivative: one of PyTorch's kernels does."""
    return sdpa_kernel(SDPBackend.MATH) if needed else nullcontext()
