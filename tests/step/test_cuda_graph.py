"""The bookkeeping of CUDA graphs, with a capture that runs on the CPU."""

from functools import partial

import pytest
import reference
import torch
from test_train import small_fit
from torch import nn

import train
from engine.step import cuda_graph
from engine.step.cuda_graph import GraphedGradients
from engine.step.gradients import compute_gradients
from engine.system import distributed
from regularizers import KurtosisNorm, LPGrad

PHASES = [
    train.Phase(0),
    train.Phase(2, LPGrad(0.01, 2), warmup=3, every=2),
    train.Phase(5, KurtosisNorm(0.01)),
]


class CpuCapture:
    """Like a graph: the capture changes nothing, and a replay runs what was captured then."""

    made = []

    def __init__(self, net, function):
        self.function, self.n_replays = function, 0
        before = {key: t.clone() for key, t in net.state_dict().items()}
        self.outputs = [t.clone() for t in function()]
        net.load_state_dict(before)
        self.made.append(self)

    def replay(self):
        self.n_replays += 1
        for output, value in zip(self.outputs, self.function(), strict=True):
            output.copy_(value)


def graphed(net, monkeypatch):
    monkeypatch.setattr(CpuCapture, "made", [])
    return GraphedGradients(partial(CpuCapture, net))


def trained(compute, net, **options):
    """Train eight epochs of batches of 32, 32 and 6 images; return weights and history."""
    net, history = small_fit(PHASES, 8, net, freeze_bn_from=7, compute_gradients=compute, **options)
    timeless = [{k: v for k, v in e.items() if "second" not in k} for e in history]
    return net.state_dict(), timeless


def new_net():
    torch.manual_seed(3)
    return reference.SmoothNet(num_classes=10)


def test_a_training_with_graphs_has_the_same_bits(monkeypatch):
    monkeypatch.setattr(cuda_graph, "N_EAGER", 1)
    net = new_net()
    weights, history = trained(graphed(net, monkeypatch), net)
    expected, expected_history = trained(compute_gradients, new_net())
    assert history == expected_history
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    # full and last batches without penalty, with L2Grad, with KurtosisNorm; full ones
    # with frozen batch norms
    assert len(CpuCapture.made) == 7 and sum(c.n_replays for c in CpuCapture.made) > 10


def test_graphs_that_were_not_used_for_longest_are_dropped(monkeypatch):
    net = new_net()
    compute, criterion = graphed(net, monkeypatch), nn.CrossEntropyLoss()
    for n in range(1, 2 + cuda_graph.MAX_GRAPHS):
        x, y = torch.randn(n, 3, 8, 8), torch.zeros(n, dtype=torch.int64)
        for _ in range(cuda_graph.N_EAGER + 2):
            compute(net, criterion, None, x, y)
    assert len(CpuCapture.made) == cuda_graph.MAX_GRAPHS + 1
    assert [kind.inputs[0].shape[0] for kind in compute.kinds.values()] == [2, 3, 4, 5]


def test_gradients_of_a_replay_are_not_those_of_the_batch_before(monkeypatch):
    net, criterion = new_net(), nn.CrossEntropyLoss()
    compute, reference_net = graphed(net, monkeypatch), new_net()
    for i in range(cuda_graph.N_EAGER + 3):
        x, y = torch.randn(4, 3, 8, 8), torch.randint(10, (4,))
        if i == cuda_graph.N_EAGER + 1:  # in between, a batch of another kind
            for each, f in ((net, compute), (reference_net, compute_gradients)):
                f(each, criterion, None, x[:3], y[:3])
        found = compute(net, criterion, None, x, y)
        expected = compute_gradients(reference_net, criterion, None, x, y)
        assert all(map(torch.equal, found, expected))
        pairs = zip(net.parameters(), reference_net.parameters(), strict=True)
        assert all(torch.equal(p.grad, q.grad) for p, q in pairs)
    assert [c.n_replays for c in CpuCapture.made] == [3]


def test_where_capturing_fails_a_line_says_so_and_the_training_goes_on(capsys):
    attempts = []

    def make_capture(function):
        attempts.append(function)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    weights, history = trained(GraphedGradients(make_capture), new_net())
    expected, expected_history = trained(compute_gradients, new_net())
    assert history == expected_history
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    printed = capsys.readouterr()
    line = "no CUDA graph of this step: operation not permitted when stream is capturing\n"
    assert (printed.out + printed.err).count(line) == len(attempts) >= 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_real_graph_has_the_same_bits():
    net = new_net().cuda()
    other = new_net().cuda()
    compute, criterion = GraphedGradients(), nn.CrossEntropyLoss()
    for i in range(20):
        torch.manual_seed(i)
        x, y = torch.randn(4, 3, 8, 8, device="cuda"), torch.randint(10, (4,), device="cuda")
        penalty = PHASES[1].regularizer
        found = compute(net, criterion, penalty, x, y, penalty_scale=i / 20)
        expected = compute_gradients(other, criterion, penalty, x, y, penalty_scale=i / 20)
        assert all(map(torch.equal, found, expected))
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
            with torch.no_grad():
                p -= 0.1 / (1 + i) * p.grad
                q -= 0.1 / (1 + i) * q.grad
    assert any(kind.capture for kind in compute.kinds.values())


def test_several_processes_ignore_the_flag(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    started = []
    monkeypatch.setattr(train, "run", lambda args, *_: started.append(args.cuda_graph))
    for several in (False, True):
        monkeypatch.setattr(distributed, "several_started", lambda several=several: several)
        train.main(["--run_name", "r", "--device", "cuda", "--cuda_graph"])
    assert started == [True, False]
    assert "without effect: --cuda_graph (needs one process)" in capsys.readouterr().err
