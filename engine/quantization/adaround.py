"""AdaRound: learn for each weight whether it is rounded up or down, layer by layer.

Source: Nagel et al., ICML 2020, arXiv 2004.10568. With w₀ ≤ w ≤ w₁ the neighbours of a weight on
its quantizer's grid, the soft-quantized weight is ŵ = w₀ + (w₁ − w₀)·h, h = clip(1.2·σ(V) − 0.1,
0, 1): the paper's s·clip(⌊w/s⌋ + h, n, p). V minimizes

    ‖W x − Ŵ x̂‖² + 0.01·Σ(1 − |2h − 1|^β),

summed over output channels and averaged over images and pixels. x is the layer's input in the
unquantized network, x̂ that in the network whose earlier layers are quantized (the paper's
asymmetric reconstruction, without the activation function). A batch norm that follows scales the
output's channels. β falls from 20 to 2; the first fifth of the steps has no second term.

The error is a quadratic function of Ŵ. So the images are read once for each layer, to sum up its
coefficients, and a step is a product of matrices with the exact gradient over all images: nothing
is drawn at random, and no layer's inputs are kept.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from engine.networks.convolution import padding_widths
from engine.networks.folding import output_gains
from engine.networks.graph import Operation, aten, copy_graph, layers, returning_values, set_tensor
from engine.system import distributed
from engine.system.progress import StepDisplay

# (name of a layer, where its weights are rounded up: a bool each, 0 or 1 for all, None: to
# nearest) → its quantized tensors, "weight" and "bias" if it has one, on the CPU
Quantized = Callable[[str, Tensor | int | None], Mapping[str, Tensor]]
Batches = Callable[[], Iterable[Tensor]]  # images (B, 3, H, W), the same ones at every call

LEARNED = {aten.conv2d.default, aten.conv2d.padding, aten.linear.default}
LAMBDA = 0.01  # of the term that drives h to 0 and 1
FIRST_BETA = 20.0
LAST_BETA = 2.0
WARM_UP = 0.2  # share of the steps
LEARNING_RATE = 0.1  # of Adam: in 500 steps a tenth less error than 0.03 (ConvNet, layer2, 3 bits)


@torch.no_grad()
def learn_rounding(
    graph: fx.GraphModule, quantized: Quantized, batches: Batches, n_steps: int, device: str
) -> dict[str, Tensor]:
    """Return where the weights of each layer are rounded up, by its name: bools of their shape.

    `graph` is an exported network on the CPU. Its 2-d convolutions and linear layers are learned in
    the order in which they run, each in n_steps steps; weights of others go to nearest, and so does
    a layer where learning has no less error on the images. What is returned is on the CPU. In a run
    of N processes, `batches` are this process's, and rank 0 learns.
    """
    names = [name for name, layer in layers(graph).items() if layer.node.target in LEARNED]
    full = copy_graph(graph).to(device)
    graph_q = copy_graph(full)
    gains = output_gains(graph)
    round_up = {}
    with StepDisplay(len(names) * n_steps, "step") as display:
        for name in names:
            display.describe(f"rounding of {name}")
            # to nearest, all down and all up: the two neighbours of each weight, for any quantizer
            trials = [quantized(name, up) for up in (None, 0, 1)]
            # While its weight is learned, the layer has the bias already that it will have.
            for kind, tensor in trials[0].items():
                set_tensor(graph_q, f"{name}.{kind}", tensor.to(device))
            w = full.get_buffer(f"{name}.weight")
            set_tensor(graph_q, f"{name}.weight", w)
            gain = gains.get(name, torch.ones(len(w))).to(device)
            error = output_error(full, graph_q, name, batches, gain)
            weights = (w, *(trial["weight"].to(device) for trial in trials))
            learn = partial(learn_layer, *weights, error, n_steps, display.step)
            # on one rank: a tie that two broke differently would be two networks
            round_up[name] = distributed.run_on_rank0_and_broadcast(learn)
            learned = quantized(name, round_up[name])["weight"]
            set_tensor(graph_q, f"{name}.weight", learned.to(device))
    return round_up


@dataclass(frozen=True)
class OutputError:
    """A layer's mean squared output error, as a quadratic function of its weight's change D.

    With e = (W x + b) − (W x̂ + b̂) what the earlier layers and the bias leave and a the gain of each
    output channel, it is E(D) = mean ‖a·(e − D x̂)‖² = c − 2⟨D, C⟩ + ⟨a²D, D G⟩. Weights and their
    changes are (groups, output channels / groups, K), K those of a channel; tensors are in float64.

    Attributes:
        gram: G = mean x̂x̂ᵀ, (groups, K, K).
        cross: C = mean a²·e x̂ᵀ, (groups, output channels / groups, K).
        constant: c = mean ‖a·e‖².
        gain: a, (groups, output channels / groups, 1).
    """

    gram: Tensor
    cross: Tensor
    constant: Tensor
    gain: Tensor

    def __call__(self, change: Tensor) -> float:
        """Return E(D)."""
        d = change.double()  # c − 2⟨D, C⟩ + ⟨a²D, D G⟩ cancels: not in float32
        quadratic = (d * self.gain.square()) @ self.gram - 2 * self.cross
        return (self.constant + (d * quadratic).sum()).item()

    def gradient(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """Return the function D ↦ ∂E/∂D = 2(a²·D G − C), computed in `dtype`."""
        gram, cross = (self.gram * 2).to(dtype), (self.cross * 2).to(dtype)
        scale = self.gain.square().to(dtype)
        return lambda d: ((d * scale) @ gram).sub_(cross)


def output_error(
    full: fx.GraphModule, graph_q: fx.GraphModule, name: str, batches: Batches, gain: Tensor
) -> OutputError:
    """Return the error of the named layer of graph_q, whose weight is still that of `full`.

    `gain` (output channels) multiplies the output's channels. Images are read twice at a time, one
    batch in each network, and only as far as the layer.
    """
    layer, w = layers(full)[name], full.get_buffer(f"{name}.weight")
    gain = gain.double().view(layer.groups, -1, 1)
    (groups, c_out, _), k = gain.shape, w[0].numel()
    gram, cross = (gain.new_zeros(groups, n, k) for n in (k, c_out))
    constant, n_positions = gain.new_zeros(()), gain.new_zeros(())
    before, before_q = (
        returning_values(graph, [layers(graph)[name].node.args[0]]) for graph in (full, graph_q)
    )
    for images in batches():
        [x], [x_q] = before(images), before_q(images)
        # a·e, (groups, output channels / groups, positions), and x̂, (groups, K, positions)
        e = apply_layer(full, layer, x) - apply_layer(graph_q, layer, x_q)
        e = to_columns(e, layer) * gain.to(x.dtype)
        patches = to_columns(receptive_fields(x_q, layer, w.shape[2:]), layer)
        gram += patches @ patches.mT  # sums over images: no layer's inputs are kept
        cross += (e * gain.to(x.dtype)) @ patches.mT
        # ‖a·e‖² is not needed for the gradient, and is summed in float64: E(D) is a difference
        constant += e.double().square().sum()
        n_positions += e.shape[-1]
    # each process has read its own images; positions make means of the sums
    sums = [distributed.all_reduce_sum(t) for t in (gram, cross, constant, n_positions)]
    return OutputError(*(t / sums[-1] for t in sums[:-1]), gain)


def apply_layer(graph: fx.GraphModule, layer: Operation, x: Tensor) -> Tensor:
    """Return what the layer makes of x with the weight and the bias that it has in the graph."""
    tensors = [None if t is None else graph.get_buffer(t) for t in (layer.weight, layer.bias)]
    return layer.node.target(x, *tensors, *layer.node.args[3:])


def receptive_fields(x: Tensor, layer: Operation, kernel: Sequence[int]) -> Tensor:
    """Return what each output of a convolution is a sum over, (B, groups·K, positions).

    `kernel` is its height and width. Of a linear layer, the input itself.
    """
    if layer.kind == "linear":
        return x
    given = layer.node.args[3:6]
    stride, padding, dilation = (*given, *([1], [0], [1])[len(given) :])
    stride, dilation = ((each * 2)[:2] for each in (stride, dilation))  # one number is for both
    (top, left), (bottom, right) = padding_widths(padding, kernel, dilation)
    x = F.pad(x, [left, right, top, bottom])
    return F.unfold(x, tuple(kernel), dilation, stride=stride)


def to_columns(t: Tensor, layer: Operation) -> Tensor:
    """Return inputs or outputs of a layer as (groups, channels / groups, all positions)."""
    t = t.reshape(1, -1, t.shape[-1]).mT if layer.kind == "linear" else t.flatten(2)
    columns = t.unflatten(1, (layer.groups, -1)).permute(1, 2, 0, 3)
    return columns.reshape(*columns.shape[:2], -1)


def learn_layer(
    w: Tensor,
    nearest: Tensor,
    low: Tensor,
    high: Tensor,
    error: OutputError,
    n_steps: int,
    on_step: Callable[[], object],
) -> Tensor:
    """Return where weights w are rounded up, bools of their shape on the CPU.

    `low` and `high` are their neighbours on the grid, the same where one end of the grid is the
    nearest to either. V starts where Ŵ is W.
    """
    shape = w.shape
    # (groups, output channels / groups, K), as the error has them
    w, nearest, low, high = (t.reshape(error.cross.shape) for t in (w, nearest, low, high))
    step = high - low
    v = initial_v(w, low, step)
    output_gradient = error.gradient(v.dtype)
    optimizer = torch.optim.Adam([v], LEARNING_RATE)
    for i in range(n_steps):
        beta = beta_at(i / n_steps)
        v.grad = objective_gradient(v, low - w, step, output_gradient, beta)
        optimizer.step()
        on_step()
    up = soft_rounding(v)[0] >= 0.5  # h need not have reached 0 or 1
    is_better = error(torch.where(up, high, low) - w) < error(nearest - w)
    return (up if is_better else nearest == high).reshape(shape).cpu()


def initial_v(w: Tensor, low: Tensor, step: Tensor) -> Tensor:
    """Return V for which low + step·h(V) is w, or as near as it comes: of w's shape."""
    h = ((w - low) / torch.where(step > 0, step, 1)).clamp_(0, 1)
    return ((h + 0.1) / 1.2).logit_()  # the inverse of soft_rounding


def beta_at(progress: float) -> float | None:
    """Return β after that share of the steps; None in the warm-up."""
    if progress < WARM_UP:
        return None
    return FIRST_BETA + (LAST_BETA - FIRST_BETA) * (progress - WARM_UP) / (1 - WARM_UP)


def soft_rounding(v: Tensor) -> tuple[Tensor, Tensor]:
    """Return h = clip(1.2·σ(V) − 0.1, 0, 1) and its derivative."""
    sigmoid = v.sigmoid()
    h = (1.2 * sigmoid - 0.1).clamp_(0, 1)
    return h, 1.2 * sigmoid * (1 - sigmoid) * ((h > 0) & (h < 1))


def objective_gradient(
    v: Tensor,
    low: Tensor,
    step: Tensor,
    output_gradient: Callable[[Tensor], Tensor],
    beta: float | None,
) -> Tensor:
    """Return the derivative of E(low + step·h(V)) + λ·Σ(1 − |2h − 1|^β) in V; no sum without β."""
    h, slope = soft_rounding(v)
    gradient = step * output_gradient(low + step * h)
    if beta:
        u = 2 * h - 1  # d|u|^β/dh = 2β·|u|^(β−1)·sign(u)
        gradient -= (2 * LAMBDA * beta) * u.abs().pow_(beta - 1).copysign_(u)
    return gradient * slope
