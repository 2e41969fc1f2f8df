"""Exponentially averaged weights, saved beside the last ones.

After step t, w̄_t = d·w̄_{t−1} + (1 − d)·w_t for every parameter, with the decay d, and w̄_1 = w_1;
it is PyTorch's `AveragedModel`. Statistics of batch norms are not averaged: those that fit w̄ are
estimated at the end. Every process makes the same average, as the weights are the same in all.
"""

from collections.abc import Iterable

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from engine.networks.batch_norm import norms_with_statistics, recalibrate_batch_norm
from engine.networks.layers import copy_network

MAX_BN_IMAGES = 10_000  # at most, that statistics are estimated on unless a flag says how many


def make_average(net: nn.Module, decay: float) -> AveragedModel:
    """Return an average of no weights yet; `decay` is a step's, from 0 (the last one) to 1."""
    return AveragedModel(copy_network(net), multi_avg_fn=get_ema_multi_avg_fn(decay))


def averaged_network(average: AveragedModel, batches: Iterable[Tensor]) -> nn.Module:
    """Return the network of the averaged weights, in evaluation mode.

    `batches` are images (B, 3, H, W) on which the statistics of its batch norms are estimated.
    """
    net = average.module
    net.eval()
    if norms_with_statistics(net):
        recalibrate_batch_norm(net, batches)
    return net
