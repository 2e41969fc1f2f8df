import copy

import pytest
import reference
import torch
from torch import nn

from engine.networks import batch_norm, layers
from engine.networks.fast_batch_norm import BatchNormReLU
from engine.system.errors import NetworkError


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_folding_keeps_the_outputs(net):
    x = torch.randn(4, 3, 32, 32, generator=seeded())
    with torch.no_grad():
        logits, activations = net(x)
        folded = batch_norm.fold_batch_norm(net)
        folded_logits, folded_activations = folded(x)
    torch.testing.assert_close(folded_logits, logits, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(folded_activations, activations, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == 9


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_folding_of_plain_modules(affine, bias):
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2, bias=bias)
    net = nn.Sequential(conv, nn.BatchNorm2d(6, affine=affine), nn.Tanh()).double()
    x = torch.randn(5, 4, 9, 9, generator=seeded()).double()
    net(x)  # moves the running statistics
    net.eval()
    torch.testing.assert_close(batch_norm.fold_batch_norm(net)(x), net(x))


def test_folded_weights_are_those_of_the_folded_network(net):
    found = batch_norm.folded_weights(net)
    folded = batch_norm.fold_batch_norm(net)
    assert len(found) == len(net.BLOCKS) + 1
    for w, (name, m) in zip(found, layers.quantizable_layers(net).items(), strict=True):
        torch.testing.assert_close(w, folded.get_submodule(name).weight)
        assert (w is m.weight) == isinstance(m, nn.Linear)
    own = layers.penalized_weights(folded)
    pairs = zip(batch_norm.folded_weights(folded), own, strict=True)
    assert all(w is m for w, m in pairs)


def test_a_network_without_batch_norms_stays_as_it_is():
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    folded = batch_norm.fold_batch_norm(net)
    assert folded is not net and folded.state_dict().keys() == net.state_dict().keys()
    assert batch_norm.check_folding(net, (3, 4, 4)) == 0


def test_folding_where_nothing_can_be_folded_is_refused():
    with pytest.raises(ValueError, match="no batch norm after a convolution in Sequential"):
        batch_norm.fold_batch_norm(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)))
    norm = nn.BatchNorm2d(3, track_running_stats=False)
    with pytest.raises(ValueError, match="without running statistics"):
        batch_norm.fold_batch_norm(nn.Sequential(nn.Conv2d(3, 3, 1), norm))


class Untraceable(reference.Reordered):
    """Which layers run depends on the images: not known before."""

    def forward(self, x):
        assert x.sum().isfinite()
        return super().forward(x)


class Shared(Untraceable):
    """Its convolution runs twice."""

    def features(self, x):
        return self.norm(self.conv(self.conv(x)))


class SharedAndTraceable(reference.Reordered):
    features = Shared.features


class InOrder(reference.Reordered):
    def features(self, x):
        return self.norm(self.conv(x))


def test_folding_is_checked_on_outputs(net):
    batch_norm.check_folding(net, (3, 32, 32))
    new = InOrder()
    state = copy.deepcopy(new.state_dict())
    batch_norm.check_folding(new, (3, 8, 8))
    assert all(torch.equal(state[key], t) for key, t in new.state_dict().items())
    for make in (Untraceable, Shared):  # new: statistics that would hide it
        with pytest.raises(NetworkError, match=f"{make.__name__}: a batch norm does not run"):
            batch_norm.check_folding(make(), (3, 8, 8))
    for make in (reference.Reordered, SharedAndTraceable):
        with pytest.raises(NetworkError, match=f"no batch norm after a convol.* {make.__name__}"):
            batch_norm.check_folding(make(), (3, 8, 8))


def test_a_check_of_folding_draws_nothing_from_the_stream(net):
    before = torch.get_rng_state()
    batch_norm.check_folding(net, (3, 32, 32))
    assert torch.equal(torch.get_rng_state(), before)


# --- activations -----------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNormReLU])
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
