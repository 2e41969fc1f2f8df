"""benchmarks/toolkits.py: what all toolkits are given, how it is measured, and the table."""

import pytest
import toolkits
import torch
from peers.plain_network import PlainNetwork, measure

from engine.networks.export import export_network
from engine.networks.folding import fold_batch_norms
from models import make_model


@pytest.mark.parametrize("model", ["ConvNet", "ResNet20"])
def test_the_plain_network_computes_the_folded_graph(model):
    torch.manual_seed(0)
    net = make_model(model, 10, 0.5).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    graph = fold_batch_norms(export_network(net, (3, 32, 32)))
    nodes, tensors = toolkits.plain_nodes(graph)
    plain = PlainNetwork(nodes).eval()
    plain.load_state_dict(tensors)
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), graph(x))


def test_values_of_weights_and_inputs_are_counted_where_they_are_computed_with():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 2))
    net[0].weight.data.mul_(9).round_()
    net[2].weight.data.sign_().mul_(torch.tensor([[1.0], [2.0]]))
    images = torch.randint(0, 3, (8, 3, 4, 4)).float()
    labels = net(images).argmax(1)
    found = measure(net, images, labels, per_channel=True)
    assert found["accuracy"] == 1
    assert found["weight_levels"] == [max(len(w.unique()) for w in net[0].weight), 2]
    assert found["input_levels"][0] == 3 and found["biases_in_float"]
    assert measure(net, images, labels, per_channel=False)["weight_levels"][1] == 4


def record(row, setting, accuracy, seconds):
    return {"row": row, "setting": setting, "accuracy": accuracy, "seconds": seconds}


def test_the_table_shows_the_best_of_each_toolkit_and_our_place():
    ours = [
        record("4 bits", "--a", 0.8, 3),
        record("4 bits", "--b", 0.8, 2),
        record("3 bits", "c", 0.5, 1),
        record("(4,4)", "d", 0.7, 1),
    ]
    brevitas = [
        record("4 bits", "e", 0.8, 1),
        record("3 bits", "f", 0.503, 1),
        record("(4,4)", "g", 0.7031, 1),
        record("(8,8), per channel", "h", 0.9, 1),
    ]
    lines = toolkits.lines_of({"ours": ours, "brevitas": brevitas, "aimet": []})
    assert lines == [
        ["4 bits", "80.00 (2 s) b", "80.00 (1 s) e", "–", "first, +0.00"],
        ["3 bits", "50.00 (1 s) c", "50.30 (1 s) f", "–", "close, -0.30"],
        ["(4,4)", "70.00 (1 s) d", "70.31 (1 s) g", "–", "behind, -0.31"],
        ["(8,8), per channel", "–", "90.00 (1 s) h", "–", "–"],
    ]
