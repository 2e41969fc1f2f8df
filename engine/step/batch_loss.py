"""The loss of one batch as a function of parameters and activations, and its first derivatives."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.networks import outputs
from engine.networks.layers import penalized_weights, trainable_parameters
from engine.system import distributed
from engine.system.hardware import autocast, rng_from


@dataclass
class FirstOrderResult:
    """What a forward and a backward pass give: this rank's contribution to sums over the ranks."""

    loss: Tensor  # scalar, contribution to the mean over the batch
    n_correct: Tensor  # scalar
    grads: Sequence[Tensor] = ()  # ∂loss/∂p of every trainable parameter p
    tensors: dict[str, list[Tensor]] = field(default_factory=dict)  # inputs that are lists, by name
    activations: dict[int, Tensor] = field(default_factory=dict)  # by run, those of a_grads


@dataclass(frozen=True)
class BatchLoss:
    """The loss of one batch as a function of parameters and activations."""

    net: nn.Module
    criterion: nn.Module  # logits, labels → mean loss
    x: Tensor  # images (B, 3, H, W), this rank's share
    y: Tensor  # labels (B,)
    dtype: torch.dtype  # of the convolutions
    rng_state: Tensor | None  # that the first forward pass starts from, for others after it

    def forward_only(self) -> FirstOrderResult:
        """Return loss and number correct, without a derivative."""
        with torch.inference_mode(), autocast(self.x.device, self.dtype):
            logits, _ = outputs.run_network(self.net, self.x)
            loss, n_correct = self.criterion(logits, self.y), self._n_correct(logits)
        return FirstOrderResult(loss, n_correct, tensors={"weights": penalized_weights(self.net)})

    def first_order(
        self, inputs: Sequence[str], create_graph: bool = False, keep_activations: bool = False
    ) -> FirstOrderResult:
        """Differentiate once, by what the regularizer's `inputs` ask for."""
        net = self.net
        has_activations = "a_grads" in inputs
        # of PyTorch's kernels for attention, one has a second derivative
        kernel = sdpa_kernel(SDPBackend.MATH) if create_graph else nullcontext()
        with autocast(self.x.device, self.dtype), kernel:
            logits, activations, recorded = outputs.run_recorded(net, self.x, has_activations)
            loss = distributed.to_global_mean(self.criterion(logits, self.y), len(self.x))
        params = [*trainable_parameters(net).values()]
        weights = penalized_weights(net)
        # an activation before the first trainable layer is a constant
        activations = [a for a in activations if a.requires_grad] if has_activations else []
        # one backward pass for all of them: they share most of the way
        targets = [*params, *activations]
        with outputs.network_boundary(net):
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

    def perturbed(self, params: Mapping[str, Tensor], offsets: Mapping[int, Tensor]) -> Tensor:
        """Return this rank's contribution to the loss at other parameters and activations.

        `params` are by name, `offsets` what is added to activations, by their run. In training mode
        batch norms take the statistics of these activations; the real running statistics stay
        unchanged. Dropout drops the same units: it starts from `rng_state`, as the first pass did.
        """
        net, x = self.net, self.x
        buffers = {name: b.clone() for name, b in net.named_buffers()}
        with (
            outputs.network_boundary(net),
            autocast(x.device, self.dtype),
            rng_from(self.rng_state, x.device),
            outputs.moved_activations(net, offsets),
        ):
            logits, _ = outputs.split_output(
                net, functional_call(net, {**buffers, **params}, (x.clone(),)), []
            )
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
        # The penalty is of the whole batch, this forward pass of the rank's share: the pair below
        # adds up the losses on the way forward, and their derivatives on the way back
        names, tensors = zip(*perturbed_params.items(), strict=True)
        perturbed_params = dict(zip(names, distributed.copy_to_ranks(*tensors), strict=True))
        perturbed_loss = distributed.reduce_from_ranks(self.perturbed(perturbed_params, {}))
        # L(W) with the derivatives that are known already: each term has value 0 and derivative g
        params = trainable_parameters(self.net).values()
        zeros = [(g.detach() * (p - p.detach())).sum() for p, g in zip(params, grads, strict=False)]
        linearized_loss = loss + sum(zeros)
        return perturbed_loss - linearized_loss
