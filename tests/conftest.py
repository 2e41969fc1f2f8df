"""What several test files use: a quiet logger, a small problem, and the scripts as commands."""

import functools
import gc
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Hashable
from pathlib import Path

import fork_server
import pytest
import torch

import data
from engine.deploy import verify

ROOT = Path(__file__).parent.parent

# Tests start hundreds of processes, and each would compile the modules of the project anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

torch.set_num_threads(1)  # the nets are small: a second thread only waits
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs behind it
    signal.signal(signal.SIGINT, signal.default_int_handler)  # runs that tests interrupt have it


# Hundreds of tests read these images, which nothing changes; to make them takes 0.2 s.
data.synthetic = data.DATASETS["Synthetic"] = functools.cache(data.synthetic)
verify.ROUNDS, verify.SECONDS_PER_ROUND = 1, 0.0  # no test looks at how fast a file is


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items):
    """Leave all but every n-th case of a test that is `sampled(n)` to `make test-slow`."""
    seen = Counter()
    for item in items:
        if marker := item.get_closest_marker("sampled"):
            test, _, _ = item.nodeid.partition("[")
            if seen[test] % marker.args[0]:
                item.add_marker("slow")
            seen[test] += 1


def pytest_collection_finish():
    """Keep all that is loaded by now out of later garbage collections, which take half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _quiet_wandb(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.fixture(autouse=True)
def _default_determinism():
    yield
    torch.use_deterministic_algorithms(False)


def code_of(net, images):
    """All that the graph of a network depends on, apart from the values of its tensors."""
    parts = [(images.shape, images.dtype, images.device)]
    first_names = {}  # of a layer that runs twice, or a weight that two layers share
    for name, module in net.named_modules(remove_duplicate=False):
        parts += [(name, type(module), first_names.setdefault(id(module), name))]
        for key, tensor in (module._parameters | module._buffers).items():
            shared = first_names.setdefault(id(tensor), f"{name}.{key}")
            parts += [(key, shared, getattr(tensor, "shape", None), getattr(tensor, "dtype", None))]
        plain = {key: value for key, value in vars(module).items() if not key.startswith("_")}
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        for key, value in [*plain.items(), *enumerate(hooks)]:  # functions are the same or not
            parts += [(key, value if isinstance(value, Hashable) else repr(value))]
    return tuple(parts)


@pytest.fixture(autouse=True, scope="session")
def _traced_once():
    """Trace networks of the same code once: it takes a second, whatever their weights are.

    `export_network` compares the logits of the graph with those of the network each time.
    """
    from engine.networks import export

    trace, programs = export.traced, {}

    def traced(net, images):
        code = code_of(net, images)
        if code not in programs:
            programs[code] = trace(net, images)
        return programs[code]

    export.traced = traced
    yield
    export.traced = trace


@pytest.fixture
def registry():
    """REGULARIZERS, which is as it was again when the test has ended."""
    from regularizers import REGULARIZERS

    before = dict(REGULARIZERS)
    yield REGULARIZERS
    REGULARIZERS.clear()
    REGULARIZERS.update(before)


@pytest.fixture
def problem():
    """Images and labels in float64 for reference.SmoothNet."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(6, 3, 6, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(4, (6,), generator=generator)
    return x, y


def make_net():
    """Make a ConvNet whose batch norms do something: random parameters and statistics."""
    from models import ConvNet

    torch.manual_seed(3)
    net = ConvNet().eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 2)
            module.bias.data.normal_()
            module.running_mean.normal_()
            module.running_var.uniform_(0.1, 3)
    return net


@pytest.fixture
def net():
    return make_net()


@pytest.fixture(scope="session")
def graph():
    """The exported graph of `net`."""
    from engine.networks.export import export_network

    return export_network(make_net(), (3, 32, 32))


@pytest.fixture
def tiny_images(monkeypatch):
    """Register "Tiny": 96 training and 48 test images of 8 × 8 pixels and 4 classes."""
    import data

    whole = data.synthetic()
    small = data.ImageDataset(
        whole.train_images[:96, :, :8, :8].clone(),
        whole.train_labels[:96] % 4,
        whole.test_images[:48, :, :8, :8].clone(),
        whole.test_labels[:48] % 4,
        num_classes=4,
    )
    monkeypatch.setitem(data.DATASETS, "Tiny", lambda data_dir, seed: small)


@pytest.fixture
def script(tmp_path):
    """script("train.py", "--flag", …, VARIABLE="value") runs it in tmp_path, without a terminal.

    Returns the finished process. A variable that is None is taken out of the environment.
    """

    def run(name: str, *arguments: object, **changes: str | None) -> subprocess.CompletedProcess:
        env = {**os.environ, "OMP_NUM_THREADS": "1", **changes}
        env = {key: value for key, value in env.items() if value is not None}
        argv = [str(ROOT / name), *map(str, arguments)]
        return fork_server.call(fork_server.command, argv, cwd=tmp_path, env=env)

    return run
