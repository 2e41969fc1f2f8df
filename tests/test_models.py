import importlib.machinery
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import data
import models
import quant_inference as qi
import train
from analysis.weights_files import find_weights
from engine.networks.layers import unpenalized_parameters
from engine.system.errors import NetworkError
from models import ConvNet, find_model, is_model, make_model


def plain_convnet(num_classes=10):
    """ConvNet in the words of the definition, of PyTorch's modules alone."""
    channels = [
        (3, 32, 1),
        (32, 32, 1),
        (32, 64, 2),
        (64, 64, 1),
        (64, 64, 1),
        (64, 128, 2),
        (128, 128, 1),
        (128, 256, 1),
        (256, 256, 1),
    ]
    net = nn.Module()
    for i, (c_in, c_out, stride) in enumerate(channels):
        conv = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
        net.add_module(f"layer{i}", nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU()))
    net.classifier = nn.Linear(256, num_classes)
    return net


def test_parameters_and_shapes():
    net = ConvNet()
    assert sum(p.numel() for p in net.parameters()) == 1_212_778
    logits, activations = net(torch.zeros(2, 3, 32, 32))
    assert logits.shape == (2, 10)
    assert [tuple(a.shape[1:]) for a in activations] == [
        (32, 32, 32),
        (32, 32, 32),
        (64, 16, 16),
        (64, 16, 16),
        (64, 16, 16),
        (128, 8, 8),
        (128, 8, 8),
        (256, 8, 8),
        (256, 8, 8),
    ]


def test_a_seed_gives_the_network_of_plain_modules_under_the_same_keys():
    torch.manual_seed(7)
    ours = ConvNet().state_dict()
    torch.manual_seed(7)
    plain = plain_convnet().state_dict()
    assert list(ours) == list(plain)
    assert all(torch.equal(ours[key], plain[key]) for key in plain)


@pytest.mark.parametrize("training", [True, False])
def test_outputs_are_those_of_plain_modules(training):
    net, plain = ConvNet().double().train(training), plain_convnet().double().train(training)
    plain.load_state_dict(net.state_dict())
    a = x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    logits, activations = net(x)
    for i, activation in enumerate(activations):
        a = plain.get_submodule(f"layer{i}")(a)
        torch.testing.assert_close(activation, a)
    torch.testing.assert_close(logits, plain.classifier(a.mean(dim=(2, 3))))
    torch.testing.assert_close(net.state_dict(), plain.state_dict())


def test_networks_of_timm(monkeypatch):
    calls = []
    timm = types.ModuleType("timm")
    timm.__spec__ = importlib.machinery.ModuleSpec("timm", None)
    timm.is_model = lambda name: name == "resnet10t"
    timm.create_model = lambda name, **options: calls.append((name, options)) or nn.Identity()
    monkeypatch.setitem(sys.modules, "timm", timm)
    make_model("timm:ResNet10t", 7)
    assert calls == [("resnet10t", {"pretrained": False, "num_classes": 7})]
    with pytest.raises(ValueError, match=r"unknown network 'x' of timm: timm.list_models\(\)"):
        find_model("timm:x")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="timm:NAME needs timm: .*requirements-timm.txt"):
        find_model("timm:resnet10t")


# --- inputs that torchvision's weights expect -------------------------------------------------

PLAIN, TRANSFORMED = "torchvision:googlenet", "torchvision:googlenet@transform_input"


@pytest.fixture
def googlenet(monkeypatch, tmp_path, tiny_images):
    """A file of weights of a small network in place of torchvision's GoogLeNet, w.pt."""
    torchvision = pytest.importorskip("torchvision")

    class Small(nn.Sequential):
        def __init__(self, weights, num_classes, transform_input=False):
            super().__init__(nn.Flatten(), nn.Linear(192, num_classes))
            self.transform_input = transform_input

        def forward(self, x):
            return super().forward(x + 1 if self.transform_input else x)

    monkeypatch.setattr(torchvision.models, "get_model_builder", lambda name: Small)
    monkeypatch.chdir(tmp_path)
    torch.save(Small(None, 4).state_dict(), "w.pt")


@pytest.mark.parametrize(
    ("recorded", "asked", "transforms"),
    [
        (None, PLAIN, True),  # as torchvision's files
        (PLAIN, PLAIN, False),
        (TRANSFORMED, PLAIN, True),
        (TRANSFORMED, None, True),
        (PLAIN, TRANSFORMED, True),
    ],
)
def test_inputs_are_transformed_as_the_file_was_trained(
    recorded, asked, transforms, googlenet, capsys
):
    if recorded:
        Path("w.json").write_text(json.dumps({"settings": {"model": recorded}}))
    flags = ["w.pt", "--dataset", "Tiny", *(["--model", asked] if asked else [])]
    args = (parser := qi.make_parser()).parse_args(flags)
    dataset = data.DATASETS["Tiny"]("", 0)
    loaded = qi.load_networks(find_weights(["w.pt"]), args, parser.explicit_flags, dataset)["w"]
    assert loaded.net.transform_input == transforms
    assert loaded.model == (TRANSFORMED if transforms else PLAIN)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == (asked == PLAIN and transforms)
    assert all(line.startswith(f"w.pt: read as {TRANSFORMED}, as ") for line in printed)


def test_a_training_from_torchvisions_weights_is_of_the_network_that_they_are_of(googlenet):
    flags = f"--model {PLAIN} --dataset Tiny --n_epochs 1 --init_weights w.pt --run_name r"
    flags = [*flags.split(), "--no-compile", "--precision", "fp32"]
    train.main(flags)
    assert json.loads(Path("r.json").read_text())["settings"]["model"] == TRANSFORMED
    train.main([*flags, "--resume"])  # the file, and with it the network, is the same


def test_only_two_networks_transform_their_inputs():
    pytest.importorskip("torchvision")
    assert is_model("torchvision:Inception_v3@transform_input")
    assert not any(map(is_model, ["ConvNet@transform_input", "torchvision:vgg11@transform_input"]))


class Failing(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        raise OSError("no table of weights")


@pytest.mark.parametrize(
    ("network", "reason"),
    [(Failing, "OSError: no table of weights"), (lambda: None, "TypeError: .*takes 0 positional")],
)
def test_a_constructor_that_fails_is_one_line(network, reason, monkeypatch):
    monkeypatch.setitem(models.MODELS, "Mine", network)
    with pytest.raises(NetworkError, match=f"^Mine: {reason}") as raised:
        make_model("Mine", 10)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "network",
    [
        lambda depth=3, num_classes=10: nn.Linear(depth, num_classes),
        lambda *, num_classes=10: nn.Linear(3, num_classes),
        lambda n: nn.Linear(3, n),
        lambda num_classes, /: nn.Linear(3, num_classes),
    ],
)
def test_the_number_of_classes_is_given_by_its_name_or_first(network, monkeypatch):
    monkeypatch.setitem(models.MODELS, "Mine", network)
    assert make_model("Mine", 7).weight.shape == (7, 3)


class Counting(nn.Linear):
    """What it keeps beside tensors is in its state_dict."""

    def get_extra_state(self):
        return {"n": 3}


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (lambda n: [n], "Mine made a list, not an nn.Module"),
        (lambda n: nn.Linear(3, n, dtype=torch.cfloat), "Mine: .* weight is of torch.complex64, "),
        (lambda n: Counting(3, n), "Mine: .* has a dict as _extra_state, .*: get_extra_state must"),
    ],
)
def test_what_cannot_be_trained_and_saved_is_one_line(network, reason, monkeypatch):
    monkeypatch.setitem(models.MODELS, "Mine", network)
    with pytest.raises(NetworkError, match=f"^{reason}") as raised:
        make_model("Mine", 10)
    assert "\n" not in str(raised.value)


def test_weights_that_no_penalty_is_of_are_named():
    """Of other layers than nn.Conv2d and nn.Linear; biases, frozen and computed ones are not."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 4, 2), nn.Conv1d(4, 4, 1), nn.Linear(4, 4)
    )
    net.append(nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)))
    net.append(nn.LSTM(2, 2)).append(nn.Bilinear(2, 2, 2).requires_grad_(False))
    lstm = ["5.weight_ih_l0", "5.weight_hh_l0"]
    assert unpenalized_parameters(net) == ["1.weight", "2.weight", *lstm]
    assert unpenalized_parameters(make_model("ConvNet", 10)) == []
