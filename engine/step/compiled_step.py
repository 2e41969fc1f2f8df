"""A whole training step as one compiled function.

PyTorch's `make_fx` runs `compute_gradients` once on tensors without values and records each
operation that it calls: those of the forward pass, of both backward passes with their hand-derived
adjoints, and of the penalty. `torch.compile` makes one function of the record; on a GPU it is
launched as CUDA graphs.
"""

import copy
import sys
from collections.abc import Callable, Hashable

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call, functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from engine.networks.batch_norm import find_foldings
from engine.networks.compiling import WHOLE_STEP_OPTIONS, eager_kernels
from engine.networks.outputs import foreign_code
from engine.step.gradients import compute_gradients
from engine.step.penalty_inputs import runs_forward_again
from engine.system.errors import NetworkError
from engine.system.hardware import kept_streams

NO_EFFECT = "--step compiled has no effect"
Results = tuple[Tensor, Tensor, Tensor]  # L, R and the number correct
Function = Callable[[Tensor, Tensor, float], Results]  # of images, labels, the penalty's factor


class CompiledStep:
    """`compute_gradients`, compiled for batches of `n_images`; for others it runs as it is.

    There is a function for each penalty and for each set of modules in training mode. Where one
    cannot be compiled, a line says why, and these steps run as they are.
    """

    def __init__(self, n_images: int) -> None:
        self.n_images = n_images
        self._functions: dict[Hashable, Function | None] = {}

    @property
    def is_compiled(self) -> bool:
        """Whether there was a step to compile, and all that there were are compiled."""
        return bool(self._functions) and None not in self._functions.values()

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
        arguments = net, criterion, regularizer, x, y, dtype, penalty_scale, difference_step
        if len(x) != self.n_images:
            return compute_gradients(*arguments)
        key = regularizer, *(m.training for m in net.modules())
        if key not in self._functions:
            self._functions[key] = None
            step = _Step(net, criterion, regularizer, dtype, difference_step)
            try:
                with foreign_code("this step"):
                    function = compile_step(step, x, y)
                    results = function(x, y, penalty_scale)
            except NetworkError as error:
                print(f"{NO_EFFECT}: {error}", file=sys.stderr)
            else:
                self._functions[key] = function
                return results
        function = self._functions[key]
        return function(x, y, penalty_scale) if function else compute_gradients(*arguments)


class _Step(nn.Module):
    """`compute_gradients` as a module, so that `functional_call` can give it other tensors."""

    def __init__(self, net, criterion, regularizer, dtype, difference_step):
        super().__init__()
        self.net = net
        # in a list, so that they are no modules of this one, with parameters of it
        self.others = [criterion, regularizer]
        self.dtype, self.difference_step = dtype, difference_step

    def forward(self, x, y, penalty_scale):
        options = self.dtype, penalty_scale, self.difference_step
        results = compute_gradients(self.net, *self.others, x, y, *options)
        # what the buffers are now: a network may write into one, or put another in its place
        return results, [*self.net.buffers()]


def compile_step(step: _Step, x: Tensor, y: Tensor) -> Function:
    """Return the step on such images and labels as a function that changes the step's network.

    Raises NetworkError, or what PyTorch raises, where that cannot be.
    """
    criterion, regularizer = step.others
    if runs_forward_again(regularizer, step.difference_step):
        plain = _Step(step.net, criterion, None, step.dtype, None)
        if draws_random_numbers(record(plain, x, y)):
            raise NetworkError(
                f"{type(step.net).__name__} draws random numbers as it runs, and the second pass "
                "of this penalty has to draw the same"
            )
    net, graph = step.net, record(step, x, y)
    options = WHOLE_STEP_OPTIONS["cpu" if x.device.type == "cpu" else "cuda"]
    function = torch.compile(graph, fullgraph=True, dynamic=False, options=options)

    @torch.no_grad()
    def call(x, y, penalty_scale):
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

    return call


def record(step: _Step, x: Tensor, y: Tensor) -> fx.GraphModule:
    """Return the operations of a step on images x and labels y as a graph.

    It maps (parameters, buffers, x, y, the penalty's factor) to (∇L + ∇R of the parameters that are
    not frozen, the new buffers, (L, R, number correct)), and changes nothing. What the network or
    the penalty keeps as it runs, such as a mask, is kept by a copy.
    """
    step = copy.deepcopy(step)
    regularizer = step.others[1]
    if regularizer and "folded_weights" in regularizer.inputs:
        find_foldings(step.net, x.shape[1:])  # found by an export, which cannot be recorded
    parameters, buffers = dict(step.named_parameters()), dict(step.named_buffers())

    def function(values, buffer_values, x, y, penalty_scale):
        leaves = {
            name: value.detach().requires_grad_(parameters[name].requires_grad)
            for name, value in zip(parameters, values, strict=True)
        }
        copies = {name: b.clone() for name, b in zip(buffers, buffer_values, strict=True)}
        arguments = x, y, penalty_scale
        results, new_buffers = functional_call(step, {**leaves, **copies}, arguments)
        grads = [leaf.grad for leaf in leaves.values() if leaf.requires_grad]
        return grads, *([each.detach() for each in ts] for ts in (new_buffers, results))

    arguments = [*parameters.values()], [*buffers.values()], x, y, x.new_ones(())
    with eager_kernels(), kept_streams(x.device):
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
