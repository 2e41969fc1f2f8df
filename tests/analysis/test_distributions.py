import csv
from pathlib import Path

import pytest
import torch
from torch import nn

from analysis import distributions
from engine.networks.layers import penalized_layers

PNG = b"\x89PNG\r\n\x1a\n"


def make_net(scale=1.0, outlier=0.0, seed=0):
    """A network of three layers; the last one's first weight is `outlier` standard deviations."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 20, 5), nn.Conv2d(20, 20, 5), nn.Linear(200, 100))
    with torch.no_grad():
        for layer in net:
            layer.weight.normal_(std=scale)
        net[2].weight[0, 0] = outlier * scale
    return net


def flat_weights(**nets):
    return distributions.flat_weights(
        {
            name: {key: m.weight for key, m in penalized_layers(net).items()}
            for name, net in nets.items()
        }
    )


def test_statistics_of_normal_weights_with_an_outlier():
    net = make_net(scale=0.5, outlier=20.0)
    rows = distributions.statistics(flat_weights(a=net))
    assert [row["layer"] for row in rows] == ["0", "1", "2"]
    assert all(tuple(row) == distributions.COLUMNS for row in rows)
    assert [row["n_weights"] for row in rows] == [1500, 10_000, 20_000]
    assert all(row["std"] == pytest.approx(0.5, rel=0.05) for row in rows)
    assert rows[1]["kurtosis"] == pytest.approx(3, abs=0.2)
    assert rows[2]["kurtosis"] == pytest.approx(3 + 20**4 / 20_000, rel=0.1)
    assert rows[2]["max_over_std"] == pytest.approx(20, rel=0.05)


def test_equal_weights_have_no_kurtosis(tmp_path):
    net = nn.Sequential(nn.Linear(3, 2))
    nn.init.zeros_(net[0].weight)
    weights = flat_weights(a=net, b=net)
    row = distributions.statistics(weights)[0]
    assert (row["std"], row["kurtosis"], row["max_over_std"]) == (0, None, None)
    distributions.distributions_plot(weights, ["0"], False, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


def test_the_most_telling_layers_are_those_that_differ():
    nets = {"a": make_net(), "b": make_net(outlier=30.0, seed=1)}
    rows = distributions.statistics(flat_weights(**nets))
    assert distributions.choose_layers(rows, None) == ["0", "1", "2"]
    distributions.N_LAYERS, n = 1, distributions.N_LAYERS
    try:
        assert distributions.choose_layers(rows, None) == ["2"]
    finally:
        distributions.N_LAYERS = n
    assert distributions.choose_layers(rows, ["2", "0"]) == ["0", "2"]
    with pytest.raises(ValueError, match="--layers 7: choose among 0, 1, 2"):
        distributions.choose_layers(rows, ["7"])
    other = distributions.statistics({"c": {"x": torch.ones(3)}})
    with pytest.raises(ValueError, match="no layer of the same name"):
        distributions.choose_layers(rows + other, None)


def test_several_files_are_compared(monkeypatch, tmp_path):
    import data
    import quant_inference as qi
    from engine.system.io import save_weights
    from models import ConvNet

    small = data.subset(data.subset(data.synthetic(), 32), 10, "test")
    monkeypatch.setitem(data.DATASETS, "Synthetic", lambda data_dir, seed: small)
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        save_weights(ConvNet(), Path(f"{name}.pt"))
    flags = ["--dataset", "synthetic", "--bits", "8", "--schemes", "uniform"]
    with pytest.raises(SystemExit) as caught:
        qi.main(["a.pt", "b.pt", *flags, "--layers", "layer3.0", "--absolute_weights"])
    assert caught.value.code == 0
    assert Path("distributions.png").read_bytes().startswith(PNG)
    with open("distributions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["checkpoint"] for row in rows] == ["a"] * 10 + ["b"] * 10
