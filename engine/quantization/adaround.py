"""AdaRound: learn for each weight whether it is rounded up or down, layer by layer.

Source: Nagel et al., ICML 2020, arXiv 2004.10568. With w₀ ≤ w ≤ w₁ the neighbours of a weight on
its quantizer's grid, the soft-quantized weight is ŵ = w₀ + (w₁ − w₀)·h, h = clip(1.2·σ(V) − 0.1,
0, 1): the paper's s·clip(⌊w/s⌋ + h, n, p). V minimizes

    ‖W x − Ŵ x̂‖² + 0.01·Σ(1 − |2h − 1|^β),

summed over output channels and averaged over images and pixels. x is the layer's input in the
unquantized network, x̂ that in the network whose earlier layers are quantized (the paper's
asymmetric reconstruction, without the activation function). A batch norm that follows scales the
output's channels. β falls from 20 to 2; the first fifth of the steps has no second term.

The error is a quadratic function of Ŵ. So a layer's inputs are read once, to sum up its
coefficients, and a step is a product of matrices with the exact gradient over all images: nothing
is drawn at random.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, fx

from engine.networks.folding import output_gains
from engine.networks.graph import aten, copy_graph, layers, set_tensor
from engine.quantization.output_error import Batches, LayerRuns, OutputError, output_error
from engine.system import distributed
from engine.system.progress import StepDisplay

# (name of a layer, where its weights are rounded up: a bool each, 0 or 1 for all, None: to
# nearest) → its quantized tensors, "weight" and "bias" if it has one, on the CPU
Quantized = Callable[[str, Tensor | int | None], Mapping[str, Tensor]]

LEARNED = {aten.conv2d.default, aten.conv2d.padding, aten.linear.default}
LAMBDA = 0.01  # of the term that drives h to 0 and 1
FIRST_BETA = 20.0
LAST_BETA = 2.0
WARM_UP = 0.2  # share of the steps
LEARNING_RATE = 0.1  # of Adam: in 500 steps a tenth less error than 0.03 (ConvNet, layer2, 3 bits)


def learned_layers(graph: fx.GraphModule) -> list[str]:
    """Return the names of layers whose rounding is learned: 2-d convolutions and linear ones."""
    return [name for name, layer in layers(graph).items() if layer.node.target in LEARNED]


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
    names = learned_layers(graph)
    full = copy_graph(graph).to(device)
    graph_q = copy_graph(full)
    runs = LayerRuns(full, graph_q, batches)
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
            error = output_error(runs, name, gain)
            weights = (w, *(trial["weight"].to(device) for trial in trials))
            learn = partial(learn_layer, *weights, error, n_steps, display.step)
            # on one rank: a tie that two broke differently would be two networks
            round_up[name] = distributed.run_on_rank0_and_broadcast(learn)
            learned = quantized(name, round_up[name])["weight"]
            set_tensor(graph_q, f"{name}.weight", learned.to(device))
    return round_up


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
    optimizer = torch.optim.Adam([v], LEARNING_RATE, fused=True)
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
        power = u.abs().log_().mul_(beta - 1).exp_()  # |u|^(β−1) in a third of the time of `pow`
        gradient -= (2 * LAMBDA * beta) * power.copysign_(u)
    return gradient * slope
