"""A whole training step as one compiled function.

PyTorch's `make_fx` runs `compute_gradients` once on tensors without values and records each
operation that it calls: those of the forward pass, of both backward passes with their hand-derived
adjoints, and of the penalty. `torch.compile` makes one function of the record; on a GPU it is
launched as CUDA graphs.
"""

import sys
from collections.abc import Callable, Hashable
from functools import partial

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call, functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from engine.networks.batch_norm import foldable_pairs
from engine.networks.compiling import WHOLE_STEP_OPTIONS, eager_kernels
from engine.networks.outputs import network_boundary
from engine.step.gradients import compute_gradients
from engine.system.errors import NetworkError
from engine.system.hardware import get_rng_state, rng_from

NO_EFFECT = "--step compiled has no effect"
Results = tuple[Tensor, Tensor, Tensor]  # L, R and the number correct


class CompiledStep:
    """`compute_gradients`, compiled for batches of `n_images`; for others it runs as it is.

    There is a function for each penalty and for each set of modules in training mode. Where one
    cannot be compiled, a line says why, and this and all later steps run as they are.
    """

    def __init__(self, n_images: int) -> None:
        self.n_images = n_images
        self.is_usable = True
        self._functions: dict[Hashable, Callable[..., Results]] = {}

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
    ) -> Results:
        """Set every .grad and return L, R and the number correct, as `compute_gradients` does."""
        how = net, criterion, regularizer
        options = dtype, difference_step
        if self.is_usable and len(x) == self.n_images:
            try:
                with network_boundary(net):
                    return self._function(*how, *options, x, y)(x, y, penalty_scale)
            except NetworkError as error:
                print(f"{NO_EFFECT}: {error}", file=sys.stderr)
                self.is_usable = False
        return compute_gradients(*how, x, y, dtype, penalty_scale, difference_step)

    def _function(
        self,
        net: nn.Module,
        criterion: nn.Module,
        regularizer: nn.Module | None,
        dtype: torch.dtype,
        difference_step: float | None,
        x: Tensor,
        y: Tensor,
    ) -> Callable[[Tensor, Tensor, float], Results]:
        """Return the function of images, labels and the penalty's factor; it sets every .grad."""
        key = regularizer, *(m.training for m in net.modules())
        if key not in self._functions:
            step = partial(_Step, net, criterion, dtype=dtype, difference_step=difference_step)
            inputs = regularizer.inputs if regularizer else ()
            if "folded_weights" in inputs:
                foldable_pairs(net)  # found by an export, which cannot be part of a record
            runs_again = difference_step is not None or "loss_change" in inputs
            if runs_again and draws_random_numbers(record(step(None), x, y)):
                raise NetworkError(
                    f"{type(net).__name__} draws random numbers as it runs, and the second pass of "
                    "this penalty has to draw the same"
                )
            self._functions[key] = _compiled(net, record(step(regularizer), x, y))
        return self._functions[key]


class _Step(nn.Module):
    """`compute_gradients` as a module, so that `functional_call` can give it other tensors."""

    def __init__(self, net, criterion, regularizer, dtype, difference_step):
        super().__init__()
        self.net = net
        self.arguments = criterion, regularizer
        self.options = dtype, difference_step

    def forward(self, x, y, penalty_scale):
        dtype, difference_step = self.options
        arguments = self.net, *self.arguments, x, y, dtype, penalty_scale, difference_step
        return compute_gradients(*arguments)


def record(step: nn.Module, x: Tensor, y: Tensor) -> fx.GraphModule:
    """Return the operations of a step on images x and labels y as a graph.

    It maps (parameters, buffers, x, y, the penalty's factor) to (∇L + ∇R of the parameters that are
    not frozen, the new buffers, (L, R, number correct)), and changes nothing.
    """
    parameters, buffers = dict(step.named_parameters()), dict(step.named_buffers())

    def function(values, buffer_values, x, y, penalty_scale):
        leaves = {
            name: value.detach().requires_grad_(parameters[name].requires_grad)
            for name, value in zip(parameters, values, strict=True)
        }
        copies = {name: b.clone() for name, b in zip(buffers, buffer_values, strict=True)}
        results = functional_call(step, {**leaves, **copies}, (x, y, penalty_scale))
        grads = [leaf.grad for leaf in leaves.values() if leaf.requires_grad]
        return grads, [*copies.values()], [each.detach() for each in results]

    arguments = [*parameters.values()], [*buffers.values()], x, y, x.new_ones(())
    with eager_kernels(), rng_from(get_rng_state(x.device), x.device):
        graph = make_fx(function, tracing_mode="fake")(*arguments)
        # once more, for operations that write into their inputs
        graph = make_fx(functionalize(graph), tracing_mode="fake")(*arguments)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def draws_random_numbers(graph: fx.GraphModule) -> bool:
    """Tell whether an operation of the graph reads the stream of random numbers."""
    tags = (getattr(node.target, "tags", ()) for node in graph.graph.nodes)
    return any(torch.Tag.nondeterministic_seeded in each for each in tags)


def _compiled(net: nn.Module, graph: fx.GraphModule) -> Callable[[Tensor, Tensor, float], Results]:
    """Return the graph of `record` as a function that changes the network as the step does."""
    device_type = next(net.parameters()).device.type
    options = WHOLE_STEP_OPTIONS["cpu" if device_type == "cpu" else "cuda"]
    function = torch.compile(graph, fullgraph=True, dynamic=False, options=options)

    @torch.no_grad()
    def step(x, y, penalty_scale):
        parameters, buffers = [*net.parameters()], [*net.buffers()]
        torch.compiler.cudagraph_mark_step_begin()  # nothing of the step before is needed any more
        grads, new_buffers, results = function(
            [p.detach() for p in parameters], buffers, x, y, x.new_full((), penalty_scale)
        )
        for buffer, new in zip(buffers, new_buffers, strict=True):
            buffer.copy_(new)
        trainable = [p for p in parameters if p.requires_grad]
        for p, g in zip(trainable, grads, strict=True):
            p.grad = g
        # a CUDA graph writes the next step's results into the same memory
        return tuple(each.clone() for each in results)

    return step
