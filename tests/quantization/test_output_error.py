"""The coefficients of a layer's output error, and networks that are run a layer at a time."""

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn

from engine.networks.export import export_network
from engine.networks.graph import PartialRun, copy_graph, layers, returning_values, set_tensor
from engine.quantization import output_error
from engine.quantization.output_error import LayerRuns, Windows

CONVOLUTIONS = [  # kernel, stride, padding, dilation, height and width
    (3, 1, 1, 1, (8, 7)),
    (3, 1, 0, 1, (8, 7)),
    (5, 1, 2, 1, (6, 6)),
    (3, 1, 1, 1, (2, 2)),  # no pixel is seen by all taps
    (3, 1, 1, 1, (1, 5)),
    ((2, 3), 1, (1, 0), 1, (6, 5)),
    (4, 1, "same", 1, (6, 5)),
    (3, 2, 1, 1, (8, 7)),
    ((3, 2), (2, 1), 1, (1, 2), (8, 7)),
    (1, 1, 0, 1, (4, 4)),
    (1, 2, 0, 1, (4, 5)),
]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("geometry", CONVOLUTIONS, ids=str)
@pytest.mark.sampled(2)
def test_sums_over_windows_are_those_of_unfolded_patches(geometry, groups):
    """Against PyTorch's own unfolding."""
    kernel, stride, padding, dilation, size = geometry
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, kernel, stride, padding, dilation, groups).double()
    x = torch.randn(3, 4, *size, dtype=torch.float64)
    graph = export_network(conv, (4, *size))
    [layer] = layers(graph).values()
    windows = Windows.of_layer(layer, conv.weight, x)
    if padding == "same":
        x, padding = F.pad(x, conv._reversed_padding_repeated_twice), 0
    patches = F.unfold(x, conv.kernel_size, dilation, padding, stride)
    patches = patches.movedim(1, 0).reshape(groups, conv.weight[0].numel(), -1)
    e = torch.randn(groups, 8 // groups, patches.shape[-1], dtype=torch.float64)
    torch.testing.assert_close(windows.gram(), patches @ patches.mT)
    torch.testing.assert_close(windows.cross(e), e @ patches.mT)


def test_a_graph_in_parts_has_the_values_of_a_whole_run():
    torch.manual_seed(0)
    graph = export_network(reference.Stranger().eval(), (3, 8, 8))
    x = torch.randn(5, 3, 8, 8)
    run = PartialRun(graph, x)
    for name, layer in layers(graph).items():
        node = layer.node.args[0]
        [expected] = returning_values(graph, [node])(x)
        assert torch.equal(run.value(node), expected), name
    last = layers(graph)["fc"].node
    assert torch.equal(run.value(last), graph(x))
    assert run.n_bytes() == graph(x).nbytes  # the rest is forgotten


@pytest.mark.parametrize("kept_bytes", [0, 20000, 2**30])
def test_what_is_not_kept_is_computed_again(monkeypatch, kept_bytes):
    """Whatever fits into memory, inputs are those of the network as it is by then."""
    monkeypatch.setattr(output_error, "KEPT_BYTES", kept_bytes)
    torch.manual_seed(0)
    full = export_network(reference.Stranger().eval(), (3, 8, 8))
    graph_q, n_read = copy_graph(full), 0
    images = torch.randn(10, 3, 8, 8)

    def batches():
        nonlocal n_read
        for batch in images.split(4):
            n_read += 1
            yield batch

    runs = LayerRuns(full, graph_q, batches)
    for name, layer in layers(full).items():
        found = [*runs.outputs_and_inputs(name)]
        wanted = [(full, layer.node), (graph_q, layers(graph_q)[name].node.args[0])]
        for which, (graph, node) in enumerate(wanted):
            [expected] = returning_values(graph, [node])(images)
            assert torch.equal(torch.cat([pair[which] for pair in found]), expected)
        set_tensor(graph_q, layer.weight, 1.5 * full.get_buffer(layer.weight))  # as quantizing does
    whole, once = 3 * len(layers(full)), 3
    assert {0: n_read == whole, 20000: once < n_read < whole, 2**30: n_read == once}[kept_bytes]
