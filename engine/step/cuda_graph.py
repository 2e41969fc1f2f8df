"""The step as a CUDA graph: all of a batch's kernels in one launch. Nobody has run it on a GPU yet.

A small network is bound by the launches of its kernels, not by their work. A graph repeats the
kernels that one batch launched, on the same memory, so everything that changes from batch to batch
is copied into fixed tensors first: images, labels, and the factor of the penalty. The optimizer
stays outside, so that the learning rate stays a number.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from engine.networks.layers import trainable_parameters
from engine.step.gradients import compute_gradients

N_EAGER = 3  # batches of a kind before it is captured: what is set up lazily is then there
MAX_GRAPHS = 4  # each has memory of its own: full and last batches, with and without the penalty

Tensors = Sequence[Tensor]


class CudaCapture:
    """What a function launches on the GPU, without running it, and then as often as one likes."""

    def __init__(self, function: Callable[[], Any]) -> None:
        """Capture one call; raises RuntimeError where it does what no graph can hold."""
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = function()

    def replay(self) -> None:
        """Run it: `outputs` then have the values for what its inputs hold now."""
        self.graph.replay()


@dataclass
class _BatchKind:
    """Batches that one graph can serve, and what has become of them so far."""

    n_eager: int = 0
    inputs: Tensors = ()  # images, labels, the penalty's factor: what the graph reads
    capture: Any = None  # None: not yet or, after more than N_EAGER batches, it has failed


class GraphedGradients:
    """`compute_gradients` for training in one process, as a graph for each kind of batch.

    A kind is a shape of images, a regularizer or none, and a state of the network's modules (which
    of them train, which have hooks). Its first batches run without one. Where capturing fails, a
    line says so, and the kind never has a graph. The tensors that a call returns, and the gradients
    that it sets, are overwritten by later calls.
    """

    def __init__(self, make_capture: Callable[[Callable[[], Tensors]], Any] = CudaCapture) -> None:
        """`make_capture` is replaced in tests."""
        self.make_capture = make_capture
        self.kinds: dict[tuple, _BatchKind] = {}  # the last one used is the last

    def __call__(
        self,
        net: nn.Module,
        criterion: nn.Module,
        regularizer: nn.Module | None,
        x: Tensor,
        y: Tensor,
        dtype: torch.dtype = torch.float32,
        penalty_scale: float = 1.0,
        difference_step: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Do what `compute_gradients` does, with the same bits."""

        def step(x: Tensor, y: Tensor, scale: float | Tensor) -> Tensors:
            return compute_gradients(
                net, criterion, regularizer, x, y, dtype, scale, difference_step
            )

        key = net, criterion, regularizer, x.shape, x.stride(), dtype, difference_step
        kind = self._kind((*key, *_mode(net)))
        params = [*trainable_parameters(net).values()]
        if kind.capture is None and kind.n_eager == N_EAGER:
            self._capture(kind, step, params, (x, y, penalty_scale))
        if kind.capture is None:
            kind.n_eager += 1
            return step(x, y, penalty_scale)
        held_x, held_y, held_scale = kind.inputs
        held_x.copy_(x)
        held_y.copy_(y)
        held_scale.fill_(penalty_scale)
        kind.capture.replay()
        loss, penalty, n_correct, *grads = kind.capture.outputs
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        return loss, penalty, n_correct

    def _kind(self, key: tuple) -> _BatchKind:
        """Return the kind of that key; of too many, the one that was not used for longest goes."""
        kind = self.kinds.pop(key, None) or _BatchKind()
        self.kinds[key] = kind
        if len(self.kinds) > MAX_GRAPHS:
            del self.kinds[next(iter(self.kinds))]
        return kind

    def _capture(
        self, kind: _BatchKind, step: Callable[..., Tensors], params: Tensors, example: tuple
    ) -> None:
        """Capture a step; where that fails, print why."""
        x, y, scale = example
        kind.inputs = x.clone(), y.clone(), torch.tensor(scale, device=x.device)
        try:
            kind.capture = self.make_capture(
                lambda: [*step(*kind.inputs), *(p.grad for p in params)]
            )
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            tqdm.write(f"no CUDA graph of this step: {reason}", file=sys.stderr)


def _mode(net: nn.Module) -> tuple:
    """Return what decides which kernels run, besides parameters: training modes and hooks."""
    return tuple(
        (m.training, len(m._forward_pre_hooks), len(m._forward_hooks)) for m in net.modules()
    )
