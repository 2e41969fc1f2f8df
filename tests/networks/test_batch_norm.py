import copy

import pytest
import reference
import torch
from torch import nn

from engine.networks import batch_norm, layers
from engine.networks.export import export_network
from engine.networks.fast_batch_norm import BatchNorm2d, unsynced_norm_buffers
from engine.networks.folding import batch_norms, fold_batch_norms, recalibrate_statistics
from engine.networks.graph import returning_values, weights
from engine.system.errors import NetworkError


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_folding_keeps_the_outputs(net, graph):
    x = torch.randn(4, 3, 32, 32, generator=seeded())
    folded = fold_batch_norms(graph)
    rectified = folded.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    with torch.no_grad():
        logits, activations = net(x)
        folded_logits, folded_activations = folded(x), returning_values(folded, rectified)(x)
    torch.testing.assert_close(folded_logits, logits, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(folded_activations, activations, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not batch_norms(folded) and len(batch_norms(graph)) == 9


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_folding_of_plain_modules(affine, bias):
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2, bias=bias)
    net = nn.Sequential(conv, nn.BatchNorm2d(6, affine=affine), nn.Tanh()).double()
    x = torch.randn(5, 4, 9, 9, generator=seeded()).double()
    net(x)  # moves the running statistics
    net.eval()
    torch.testing.assert_close(fold_batch_norms(export_network(net, (4, 9, 9)))(x), net(x))


def test_folded_weights_are_those_of_the_folded_network(net, graph):
    found = batch_norm.folded_weights(net)
    folded = weights(fold_batch_norms(graph))
    assert len(found) == len(net.BLOCKS) + 1
    for w, (name, m) in zip(found, layers.penalized_layers(net).items(), strict=True):
        torch.testing.assert_close(w, folded[name])
        assert (w is m.weight) == isinstance(m, nn.Linear)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3600, 2))
    pairs = zip(batch_norm.folded_weights(plain), layers.penalized_weights(plain), strict=True)
    assert all(w is m for w, m in pairs)


def test_a_network_without_batch_norms_stays_as_it_is():
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    graph = export_network(net, (3, 4, 4))
    folded = fold_batch_norms(graph)
    assert folded is not graph and folded.state_dict().keys() == graph.state_dict().keys()
    assert batch_norm.find_foldings(net, (3, 4, 4)) == []


def test_folding_where_nothing_can_be_folded_is_refused():
    apart = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3))
    with pytest.raises(NetworkError, match="no batch norm after a convolution in Sequential"):
        batch_norm.find_foldings(apart)
    norm = nn.BatchNorm2d(3, track_running_stats=False)
    net = nn.Sequential(nn.Conv2d(3, 3, 1), norm)
    with pytest.raises(NetworkError, match="without running statistics"):
        batch_norm.find_foldings(net)
    with pytest.raises(NetworkError, match="without running statistics"):
        fold_batch_norms(export_network(net, (3, 32, 32)))


class Tokens(nn.Module):
    """A batch norm of T tokens after a linear layer of as many channels."""

    def __init__(self, n_tokens, n_channels):
        super().__init__()
        self.linear = nn.Linear(192 // n_tokens, n_channels)
        self.norm = nn.BatchNorm1d(n_tokens)

    def forward(self, x):
        tokens = x.flatten(1).unflatten(1, (self.norm.num_features, -1))
        return self.norm(self.linear(tokens)).mean(1)


@pytest.mark.parametrize("n_channels", [16, 8])
def test_a_batch_norm_of_tokens_is_not_folded_as_if_they_were_channels(n_channels):
    net = Tokens(16, n_channels).eval()
    nn.init.uniform_(net.norm.weight, 0.5, 2)
    nn.init.uniform_(net.norm.running_var, 0.5, 2)
    x = torch.randn(4, 3, 8, 8, generator=seeded())
    torch.testing.assert_close(fold_batch_norms(export_network(net, (3, 8, 8)))(x), net(x))
    with pytest.raises(NetworkError, match="no batch norm after"):
        batch_norm.find_foldings(net, (3, 8, 8))


def test_folded_weights_leave_out_transposed_convolutions():
    up = nn.ConvTranspose2d(4, 6, 2, bias=False)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), up, nn.BatchNorm2d(6)
    ).eval()
    [w] = batch_norm.folded_weights(net)
    torch.testing.assert_close(w, net[0].weight / (1 + net[1].eps) ** 0.5)


def test_statistics_of_one_value_a_channel_are_refused():
    net = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4)).eval()
    graph = export_network(net, (3, 8, 8))
    batches = torch.randn(5, 3, 8, 8, generator=seeded()).split(4)
    with pytest.raises(NetworkError, match="1: its statistics cannot be estimated"):
        recalibrate_statistics(graph, batches)
    recalibrate_statistics(graph, batches[:1])


class OfTheBatch(nn.Sequential):
    """Its batch norm takes the statistics of the batch in evaluation mode, too."""

    def forward(self, x):
        self[1].train()
        return super().forward(x)


def test_a_norm_that_does_not_use_its_running_statistics_is_not_folded():
    net = OfTheBatch(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2)).eval()
    graph = export_network(net, (3, 8, 8))
    for fold in (lambda: fold_batch_norms(graph), lambda: batch_norm.find_foldings(net, (3, 8, 8))):
        with pytest.raises(NetworkError, match="without running statistics, or"):
            fold()


class Untraceable(reference.Reordered):
    """Which layers run depends on the images: not known before."""

    def forward(self, x):
        assert x.sum().isfinite()
        return super().forward(x)


class Shared(reference.Reordered):
    """Its convolution runs twice, the second time before the batch norm."""

    def features(self, x):
        return self.norm(self.conv(self.conv(x)))


class InOrder(reference.Reordered):
    def features(self, x):
        return self.norm(self.conv(x))


@pytest.mark.parametrize("make", [InOrder, Shared])
def test_what_is_folded_is_what_runs(make):
    net = make().eval()
    net.norm.running_mean.fill_(-1.5)
    net.norm.running_var.fill_(0.01)
    state = copy.deepcopy(net.state_dict())
    folded = fold_batch_norms(export_network(net, (3, 8, 8)))
    assert not batch_norms(folded)
    x = torch.randn(4, 3, 8, 8, generator=seeded())
    torch.testing.assert_close(folded(x), net(x)[0], rtol=1e-4, atol=1e-4)
    assert all(torch.equal(state[key], t) for key, t in net.state_dict().items())


class TwoNorms(InOrder):
    """Another batch norm each time that its convolution runs."""

    def __init__(self):
        super().__init__()
        self.second = nn.BatchNorm2d(3)

    def features(self, x):
        return self.second(self.conv(self.norm(self.conv(x))))


class NormTwice(InOrder):
    """The same batch norm each time that its convolution runs."""

    def features(self, x):
        return self.norm(self.conv(self.norm(self.conv(x))))


@pytest.mark.parametrize(
    ("make", "pairs", "n_left"),
    [
        (InOrder, [("conv.weight", "norm")], None),
        (Shared, [], "1"),
        (TwoNorms, [], "2"),
        (NormTwice, [], "1"),
    ],
)
def test_a_weight_that_runs_more_than_once_is_penalized_as_it_is(make, pairs, n_left):
    net = make().eval()
    assert [each[:2] for each in batch_norm.find_foldings(net, (3, 8, 8))] == pairs
    line = batch_norm.describe_unfolded(net, (3, 8, 8), "R")
    assert (line and line.split()[0]) == n_left
    plain = all(map(torch.equal, batch_norm.folded_weights(net), layers.penalized_weights(net)))
    assert plain == (not pairs)


def test_what_cannot_be_folded_is_refused():
    with pytest.raises(NetworkError, match=r"no batch norm after a convol.* Reordered"):
        batch_norm.find_foldings(reference.Reordered(), (3, 8, 8))
    with pytest.raises(NetworkError, match="Untraceable cannot be exported by torch") as refused:
        batch_norm.find_foldings(Untraceable(), (3, 8, 8))
    assert "\n" not in str(refused.value)


def test_a_check_of_folding_draws_nothing_from_the_stream(net):
    before = torch.get_rng_state()
    batch_norm.find_foldings(net)
    assert torch.equal(torch.get_rng_state(), before)


# --- activations -----------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNorm2d])
def test_recalibrated_statistics_are_those_of_the_images(norm):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.Conv2d(4, 2, 3), norm(2)).eval()
    batches = [torch.randn(n, 3, 9, 9) for n in (8, 8, 2)]
    batch_norm.recalibrate_batch_norm(net, iter(batches))
    with torch.no_grad():
        for conv, bn in ((0, 1), (2, 3)):
            seen = []
            for x in batches:
                for module in net[:conv]:
                    if isinstance(module, norm):  # as it was then: with the batch's statistics
                        module = copy.deepcopy(module).train()
                    x = module(x)
                seen.append(net[conv](x))
            means = sum(len(y) * y.mean((0, 2, 3)) for y in seen) / 18
            variances = sum(len(y) * y.var((0, 2, 3)) for y in seen) / 18
            torch.testing.assert_close(net[bn].running_mean, means, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(net[bn].running_var, variances, rtol=1e-4, atol=1e-5)
    assert not any(module.training for module in net) and net[1].momentum == 0.1
    with pytest.raises(ValueError, match="Linear has no batch-norm statistics"):
        batch_norm.recalibrate_batch_norm(nn.Linear(2, 2), batches)


class RunsTwice(nn.Module):
    """A batch norm that runs twice, after an instance norm."""

    def __init__(self):
        super().__init__()
        self.before = nn.InstanceNorm2d(3, track_running_stats=True)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.norm(self.before(x)).sigmoid()
        return self.norm(input=x).mean((2, 3))


def test_statistics_of_a_norm_are_means_over_its_runs_also_on_the_graph():
    torch.manual_seed(0)
    net, batches = RunsTwice().eval(), (3 + torch.randn(16, 3, 4, 4)).split(12)
    graph = recalibrate_statistics(export_network(net, (3, 4, 4)), batches)
    batch_norm.recalibrate_batch_norm(net, batches)
    for name in ("before", "norm"):
        for kind in ("running_mean", "running_var"):
            expected = net.get_buffer(f"{name}.{kind}")
            torch.testing.assert_close(graph.get_buffer(f"{name}.{kind}"), expected)
    runs = []
    for x in batches:
        normed = nn.InstanceNorm2d(3)(x)
        again = nn.BatchNorm2d(3)(normed).sigmoid()
        runs += [(len(x), y.mean((0, 2, 3))) for y in (normed, again)]
    mean = sum(n * each for n, each in runs) / sum(n for n, _ in runs)
    torch.testing.assert_close(net.norm.running_mean, mean)


def test_all_norms_with_running_statistics_are_recalibrated():
    torch.manual_seed(0)
    instance = nn.InstanceNorm2d(3, track_running_stats=True)
    fixed = nn.BatchNorm1d(12, track_running_stats=False)
    net = nn.Sequential(instance, nn.Flatten(), nn.BatchNorm1d(12), fixed).eval()
    x = 3 + torch.randn(16, 3, 2, 2)
    batch_norm.recalibrate_batch_norm(net, x.split(8))
    torch.testing.assert_close(net[0].running_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(net[0].running_var, x.var((2, 3)).mean(0))
    normed = torch.cat([nn.InstanceNorm2d(3)(part) for part in x.split(8)]).flatten(1)
    torch.testing.assert_close(net[2].running_mean, normed.mean(0), atol=1e-6, rtol=0)
    variance = sum(part.var(0) for part in normed.split(8)) / 2
    torch.testing.assert_close(net[2].running_var, variance)
    assert fixed.running_mean is None and not any(m.training for m in net)


def test_statistics_that_each_process_has_of_its_own_are_those_of_all_norms_but_synced_ones():
    instance = nn.InstanceNorm2d(2, track_running_stats=True)
    net = nn.Sequential(BatchNorm2d(2), nn.BatchNorm1d(2), instance, nn.LayerNorm(2))
    expected = [*net[1].buffers(), *instance.buffers()]
    assert [*map(id, unsynced_norm_buffers(net))] == [*map(id, expected)]
