"""Output bias correction: biases make up for the mean errors of their layers' outputs.

Source: Nagel et al., ICCV 2019, arXiv 1906.04721, section 4.2, with means measured on images: y is
the output of a layer in the unquantized network, and b̂ = b + mean(y − ŷ) for each channel, over
images and pixels. ŷ is the layer's output with quantized weights, of one of two inputs: "quantized"
ones, those of the quantized network whose earlier layers are corrected already, so that biases make
up for the errors of these and of quantized inputs, too; or "float" ones, those of the unquantized
network, so that each layer makes up for its own weights alone.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, fx

from engine.networks.graph import copy_graph, layers, returning_values, set_constant
from engine.quantization.activations import quantize_activations
from engine.quantization.grids import Grid
from engine.quantization.output_error import Batches
from engine.system import distributed
from engine.system.hardware import with_float64

INPUTS = ("quantized", "float")


@torch.no_grad()
def correct_outputs(
    graph: fx.GraphModule,
    graph_q: fx.GraphModule,
    grids: Mapping[str, Grid],
    batches: Batches,
    inputs: str = "quantized",
) -> fx.GraphModule:
    """Return a copy of graph_q, on its device, with other biases, also in layers that had none.

    `graph` is the unquantized network, and `graph_q` the same one with quantized weights; both are
    on the device of the images. `grids` are those of its inputs, by name, which it is run with, and
    `inputs` one of INPUTS. In a run of N processes, `batches` are this process's.
    """
    corrected = copy_graph(graph_q)
    targets = output_means(graph, layers(graph), batches)
    for name, layer in layers(corrected).items():
        w = corrected.get_buffer(layer.weight)
        if inputs == "quantized":
            with_errors = quantize_activations(corrected, grids)
        else:
            with_errors = copy_graph(graph)
            set_constant(with_errors, layers(with_errors)[name], "weight", w)
        means = output_means(with_errors, [name], batches)
        bias = corrected.get_buffer(layer.bias) if layer.bias else w.new_zeros(())
        change = (targets[name] - means[name]).to(w)
        set_constant(corrected, layer, "bias", bias + change)
    return copy_graph(corrected)


@torch.no_grad()
def correct_outputs_better(
    graph: fx.GraphModule, graph_q: fx.GraphModule, grids: Mapping[str, Grid], batches: Batches
) -> tuple[fx.GraphModule, dict[str, float]]:
    """Return what `correct_outputs` makes of those INPUTS that change the predictions less.

    Also returned is the `divergence` of each, by inputs.
    """
    corrected = {
        inputs: correct_outputs(graph, graph_q, grids, batches, inputs) for inputs in INPUTS
    }
    divergences = {
        inputs: divergence(graph, each, grids, batches) for inputs, each in corrected.items()
    }
    return corrected[min(divergences, key=divergences.get)], divergences


def divergence(
    graph: fx.GraphModule, graph_q: fx.GraphModule, grids: Mapping[str, Grid], batches: Batches
) -> float:
    """Return the mean over images of KL(p ‖ q), in nats: q are the quantized probabilities."""
    run_q = quantize_activations(graph_q, grids)
    total = torch.zeros(2, dtype=torch.float64)
    for images in batches():
        p, q = (run(images).cpu().double().log_softmax(-1) for run in (graph, run_q))
        summed = torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True)
        total += torch.stack([summed, torch.tensor(len(images))])
    summed, n = distributed.all_reduce_sum(total).tolist()
    return summed / n


def output_means(
    graph: fx.GraphModule, names: Collection[str], batches: Batches
) -> dict[str, Tensor]:
    """Return the mean output of the named layers, (output channels), over images and pixels.

    By name, in float64. The network runs no further than the last of them.
    """
    observed = copy_graph(graph)
    outputs = [layers(observed)[name] for name in names]
    sums, totals = [], []
    for layer in outputs:
        axis = -1 if layer.kind == "linear" else 1  # of channels
        with observed.graph.inserting_after(layer.node):
            sums.append(observed.graph.call_function(_channel_sums, (layer.node, axis)))
        device = with_float64(graph.get_buffer(layer.weight).device)
        n_channels = layer.node.meta["shape"][axis]
        totals.append(torch.zeros(n_channels + 1, dtype=torch.float64, device=device))
    run = returning_values(observed, sums)
    for images in batches():
        for total, each in zip(totals, run(images), strict=True):
            total += each
    totals = [distributed.all_reduce_sum(total) for total in totals]
    return {name: t[:-1] / t[-1] for name, t in zip(names, totals, strict=True)}


def _channel_sums(y: Tensor, axis: int) -> Tensor:
    """Return the sum of each channel along that axis, then how many values it is of, (C + 1)."""
    y = y.to(with_float64(y.device)).movedim(axis, 0)
    sums = y.sum(dim=[*range(1, y.dim())], dtype=torch.float64)
    return torch.cat([sums, sums.new_tensor([y[0].numel()])])
