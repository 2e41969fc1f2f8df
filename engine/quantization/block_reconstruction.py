"""Block reconstruction: learn up or down for all weights of a block, with quantized inputs.

Sources: BRECQ, Li et al., ICLR 2021, arXiv 2102.05426, without its Fisher weights, and QDrop, Wei
et al., ICLR 2022, arXiv 2203.05740. For one block after another, the V of all its layers minimize

    mean ‖B(x) − B̂(x̂)‖² + 0.01·Σ(1 − |2h − 1|^β),

with ŵ, h and β those of `adaround`. x is the block's input in the unquantized network, and x̂ that
in the network whose earlier blocks are quantized. In B̂ inputs of operations are rounded on their
grids too; in each step each of their elements keeps full precision with probability ½, and is that
of x in place of x̂ where it enters the block. The gradient goes straight through their rounding.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, fx
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from engine.networks.graph import (
    BATCH,
    Transform,
    aten,
    copy_graph,
    layers,
    returning_values,
    set_tensor,
    with_inputs,
)
from engine.quantization.activations import quantize_activations
from engine.quantization.adaround import (
    Quantized,
    beta_at,
    initial_v,
    learned_layers,
    objective_gradient,
    soft_rounding,
)
from engine.quantization.grids import Grid
from engine.quantization.output_error import Batches
from engine.quantization.weights import NO_EXCEPTIONS
from engine.system import distributed
from engine.system.progress import StepDisplay

BATCH_SIZE = 32  # images of a step
LEARNING_RATE = 0.1  # of Adam


class SoftWeight(NamedTuple):
    """A weight between its neighbours on the grid; low, high and V have its shape."""

    low: Tensor
    high: Tensor
    v: Tensor

    def value(self) -> Tensor:
        """Return ŵ = low + (high − low)·h(V)."""
        return self.low + (self.high - self.low) * soft_rounding(self.v)[0]


def learn_block_rounding(
    grids: Mapping[str, Grid],
    graph: fx.GraphModule,
    quantized: Quantized,
    batches: Batches,
    n_steps: int,
    device: str,
) -> dict[str, Tensor]:
    """Return where the weights of each layer are rounded up, by its name: bools of their shape.

    `graph` is an exported network on the CPU, and `grids` are those of its inputs, by name. 2-d
    convolutions and linear layers are learned, those of a block together in n_steps steps. Layers
    that are missing go to nearest: those of other kinds, and of a block where learning has no less
    error on the images. What is returned is on the CPU. Of N processes, rank 0 reads all images and
    learns.
    """
    blocks = [block.to(device) for block in find_blocks(graph)]
    round_up = {}
    with StepDisplay(n_steps * len(blocks), "step") as display:
        learning = learn_blocks(blocks, quantized, grids, batches, n_steps, display)
        for _ in blocks:
            round_up |= distributed.run_on_rank0_and_broadcast(lambda: next(learning))
    return round_up


def find_blocks(graph: fx.GraphModule) -> list[fx.GraphModule]:
    """Return the blocks of an exported network, each a network, in the order in which they run.

    They meet at values that everything flows through, so that each has one input and one output,
    and are as small as that allows, with a layer that is learned in each. An activation function
    belongs to the layer before it, and what changes the shape, as pooling does, to the layer after
    it. Behind the last layer's activation function there is no block.
    """
    values = bottlenecks(graph)
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    positions = [order[layers(graph)[name].node] for name in learned_layers(graph)]
    start, end, is_open = values[0], None, False
    blocks = []
    for before, value in pairwise(values):
        if any(order[before] < position <= order[value] for position in positions):
            if end:
                blocks.append((start, end))
                start = end
            end, is_open = value, True
        elif is_open := is_open and value.meta["shape"] == end.meta["shape"]:
            end = value
    blocks += [(start, end)] if end else []
    return [returning_values(graph, end, given=start) for start, end in blocks]


def bottlenecks(graph: fx.GraphModule) -> list[fx.Node]:
    """Return the values that every path from the images to the logits goes through, in order.

    Their first dimension is that of images.
    """
    [images] = graph.graph.find_nodes(op="placeholder")
    position = {images: 0}  # of the nodes that depend on the images, in the order they run
    common, last_read = [], 0  # where any value before the node is read last
    for node in graph.graph.nodes:
        if any(source in position for source in node.all_input_nodes):
            position[node] = len(position)
    for node, i in position.items():
        if last_read <= i and node.meta.get("shape", ())[:1] == (BATCH,):
            common.append(node)
        last_read = max([last_read, *(position[user] for user in node.users)])
    return common


@torch.no_grad()
def learn_blocks(
    blocks: list[fx.GraphModule],
    quantized: Quantized,
    grids: Mapping[str, Grid],
    batches: Batches,
    n_steps: int,
    display: StepDisplay,
) -> Iterator[dict[str, Tensor]]:
    """Yield what `learn_block_rounding` returns, block by block; they are where the images are."""
    x = x_q = torch.cat([*batches()])  # what enters the block, of all images
    for number, block in enumerate(blocks):
        y = in_batches(block, x)
        nearest = with_rounding(block, quantized)
        trainer = BlockTrainer(nearest, soft_weights(block, quantized), grids, number)
        display.describe(f"rounding of {', '.join(trainer.weights)}")
        for i in range(n_steps):
            trainer.step(x, x_q, y, i / n_steps)
            display.step()
        learned = with_rounding(block, quantized, trainer.round_up())
        outputs = [
            in_batches(quantize_activations(each, grids), x_q) for each in (nearest, learned)
        ]
        errors = [block_error(block, y_q, y) for y_q in outputs]
        is_better = bool(errors[1] < errors[0])
        x, x_q = y, outputs[is_better]
        yield trainer.round_up() if is_better else {}


class BlockTrainer:
    """Learns V of the layers of a block, whose other tensors are quantized already."""

    def __init__(
        self,
        block_q: fx.GraphModule,
        weights: Mapping[str, SoftWeight],
        grids: Mapping[str, Grid],
        seed: int,
    ) -> None:
        """Take the weights by layer, and the seed of the images and elements that are drawn."""
        self.weights = weights
        device = next(block_q.buffers()).device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.drops = bool(grids)
        transforms = {name: self._rounding_some(grid) for name, grid in grids.items()}
        self.block_q = with_inputs(block_q, transforms)
        self.optimizer = torch.optim.Adam([w.v for w in weights.values()], LEARNING_RATE)

    def round_up(self) -> dict[str, Tensor]:
        """Return where weights are rounded up, by layer: bools on the CPU."""
        return {name: (soft_rounding(w.v)[0] >= 0.5).cpu() for name, w in self.weights.items()}

    def step(self, x: Tensor, x_q: Tensor, y: Tensor, progress: float) -> None:
        """Learn from a batch of the images, whose x, x̂ and B(x) these are."""
        chosen = torch.randperm(len(x), generator=self.generator, device=x.device)[:BATCH_SIZE]
        beta = beta_at(progress)
        gradients = self.gradients(*(t[chosen] for t in (x, x_q, y)))
        for w, gradient in zip(self.weights.values(), gradients, strict=True):
            step = w.high - w.low
            w.v.grad = objective_gradient(w.v, w.low, step, lambda _, g=gradient: g, beta)
        self.optimizer.step()

    def gradients(self, x: Tensor, x_q: Tensor, y: Tensor) -> list[Tensor]:
        """Return the derivative of the block's error in each Ŵ."""
        if self.drops:
            x_q = torch.lerp(x_q, x, self._kept(x))
        names = [layers(self.block_q)[name].weight for name in self.weights]
        tensors = [w.value().requires_grad_() for w in self.weights.values()]
        with torch.enable_grad():
            y_q = functional_call(self.block_q, dict(zip(names, tensors, strict=True)), (x_q,))
            error = block_error(self.block_q, y_q, y)
        return [*torch.autograd.grad(error, tensors)]

    def _kept(self, x: Tensor) -> Tensor:
        """Return 1 or 0 for each element of x, each with probability ½."""
        like = torch.empty_like(x)  # in x's memory format
        words = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device)
        words.random_(generator=self.generator).bitwise_and_(0x0101010101010101)  # in each byte
        return words.view(torch.int8).as_strided(like.shape, like.stride()).to(x.dtype)

    def _rounding_some(self, grid: Grid) -> Transform:
        """Return the function that rounds about half of the elements on the grid."""

        def round_some(x: Tensor) -> Tensor:
            return _RoundRest.apply(x, self._kept(x), grid)

        return round_some


class _RoundRest(torch.autograd.Function):
    """x, rounded on the grid where `kept` is 0, not 1; there, the gradient is that of clipping."""

    @staticmethod
    def forward(ctx, x, kept, grid):
        ctx.save_for_backward(x, kept)
        ctx.limits = [(code - grid.zero_point) * grid.scale for code in (0, grid.max_code)]
        return torch.lerp(grid.round(x), x, kept)  # `where` takes three times as long

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """Pass the gradient straight through the rounding."""
        x, kept = ctx.saved_tensors
        clipped = aten.hardtanh_backward(grad, x, *ctx.limits)
        return torch.lerp(clipped, grad, kept), None, None


def soft_weights(block: fx.GraphModule, quantized: Quantized) -> dict[str, SoftWeight]:
    """Return the weight of each layer that is learned, by name, on the block's device."""
    weights = {}
    for name in learned_layers(block):
        w = block.get_buffer(layers(block)[name].weight)
        low, high = (quantized(name, up)["weight"].to(w.device) for up in (0, 1))
        weights[name] = SoftWeight(low, high, initial_v(w, low, high - low))
    return weights


def with_rounding(
    block: fx.GraphModule, quantized: Quantized, round_up: Mapping[str, Tensor] = NO_EXCEPTIONS
) -> fx.GraphModule:
    """Return a copy with quantized tensors; `round_up`, by layer: weights not to nearest."""
    copied = copy_graph(block)
    for name, layer in layers(block).items():
        device = block.get_buffer(layer.weight).device
        for kind, tensor in quantized(name, round_up.get(name)).items():
            set_tensor(copied, layer.tensors[kind], tensor.to(device))
    return copied


def in_batches(block: fx.GraphModule, x: Tensor) -> Tensor:
    """Return the block's output for all images, a batch at a time."""
    return torch.cat([block(part) for part in x.split(BATCH_SIZE)])


def block_error(block: fx.GraphModule, y_q: Tensor, y: Tensor) -> Tensor:
    """Return ‖y − ŷ‖², summed over channels, a mean over images and pixels.

    Channels are those of the block's last layer: of a linear layer the last dimension.
    """
    [*_, last] = layers(block).values()
    n_channels = y.shape[-1 if last.kind == "linear" else 1]
    return (y_q - y).square().sum() * (n_channels / y.numel())
