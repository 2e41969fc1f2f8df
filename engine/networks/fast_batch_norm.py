"""Batch norm, with or without the ReLU after it, that is cheap to differentiate twice.

Where a batch is shared out to several processes, its statistics are those of the whole batch, and
so are the sums of every derivative. Statistics stay float32 under `torch.autocast`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from engine.networks import batch_norm_kernels as kernels
from engine.networks.convolution import forbid_third_derivative
from engine.networks.layers import BATCH_AND_INSTANCE_NORMS, BATCH_NORMS
from engine.system import distributed
from engine.system.errors import BatchTooSmallError, SetupError


class _BatchNorm(torch.autograd.Function):
    """y = φ(γ·(x − μ)·r + β), φ the `rectifier`; shapes as in batch_norm_kernels.py.

    n is the number of values, in each channel, that μ and σ² are the mean and variance of; 0 where
    they are constants. Where n exceeds the values of x, the other ranks hold the rest, and all sums
    are added up over the ranks.
    """

    @staticmethod
    def forward(ctx, x, gamma, beta, mean, var, eps, n, rectifier):
        norm = kernels.norm_rows(mean, var, gamma, beta, eps=eps)  # (4, C)
        ctx.save_for_backward(x, gamma, norm)
        ctx.n = n
        ctx.rectifier = rectifier
        y = kernels.normalize(x.flatten(2), norm, rectifier=rectifier)
        return torch.ops.aten._unsafe_view(y, x.shape)  # of a view, `y += s` would be refused

    @staticmethod
    def backward(ctx, gy):
        x, gamma, norm = ctx.saved_tensors
        grads = _BatchNormAdjoint.apply(gy, x, gamma, norm, ctx.n, ctx.rectifier)
        # none for μ and σ²: `adjoint` has their derivatives in it
        return *grads, None, None, None, None, None


class _BatchNormAdjoint(torch.autograd.Function):
    """gx = γr·(h − m(h) − x̂·m(h x̂)), dγ = Σ h x̂, dβ = Σ h; m is the mean over all n, 0 if n is 0.

    dγ and dβ are this rank's contributions.
    """

    @staticmethod
    def forward(ctx, gy, x, gamma, norm, n, rectifier):
        gy = _match_memory_format(gy, x)
        flat = gy.flatten(2), x.flatten(2), norm  # (N, C, H·W): one kernel for either format
        ggamma, gbeta = kernels.adjoint_sums(*flat, rectifier=rectifier)
        # the means are those of the whole batch, dγ and dβ are summed later, with all gradients
        mhx, mh = _means((ggamma, gbeta), x, n) if n else torch.zeros_like(norm[:2])
        ctx.save_for_backward(gy, x, norm, mhx, mh)
        ctx.n = n
        ctx.rectifier = rectifier
        gx = kernels.adjoint(*flat, kernels.adjoint_rows(mhx, mh, norm), rectifier=rectifier)
        return gx.view_as(x), ggamma, gbeta

    @staticmethod
    @forbid_third_derivative
    def backward(ctx, v, c, d):
        """Return the cotangents of gy, x and γ, given those of (gx, dγ, dβ): (v, c, d).

        c and d are the same on all ranks, as directions of summed gradients are.
        With q = −γr·(m(h x̂)·v + m(v x̂)·h) + c·h and A = m(v h) − m(v)m(h) − m(v x̂)m(h x̂):
        ∂gy = φ′(z)·(γr·(v − m(v) − x̂·m(v x̂)) + c·x̂ + d),
        ∂x = r·(q − m(q) − x̂·m(q x̂)) − γ·A·r²·x̂ and ∂γ = N·r·A.
        """
        gy, x, norm, mhx, mh = ctx.saved_tensors
        flat = _match_memory_format(v, x).flatten(2), gy.flatten(2), x.flatten(2), norm
        # two passes over memory: the sums, and with them the elements
        sums = kernels.second_sums(*flat, rectifier=ctx.rectifier)
        means = _means(sums, x, ctx.n) if ctx.n else torch.zeros_like(norm[:3])
        # seven rows for the kernel below, and A for ∂γ
        k, a = kernels.second_rows(c, d, *means, mhx, mh, norm)
        # N of this rank: its contribution, of which the sum over the ranks is ∂γ
        r = norm[1]
        ggamma = x.numel() // len(mh) * r * a if ctx.n else r * sums[2]
        ggy, gx = kernels.second(*flat, k, rectifier=ctx.rectifier)
        return ggy.view_as(x), gx.view_as(x), ggamma, None, None, None


def _means(sums, x, n):
    """Divide sums (C) over x by n, after adding those of the ranks that have the rest of n."""
    if n != x.numel() // x.shape[1]:
        sums = distributed.batch_sum(torch.stack(sums)).unbind()
    return torch._foreach_div(sums, n)


def _merge_rank_stats(mean, var, n):
    """Return mean and biased variance (C) of all ranks' x from each one's and its n."""
    rows = distributed.gather(torch.cat((mean, var, mean.new_full((1,), n))))  # (ranks, 2C + 1)
    means, variances = rows[:, :-1].unflatten(1, (2, -1)).unbind(1)
    share = rows[:, -1:] / rows[:, -1:].sum()  # (ranks, 1), of the values
    mean = (share * means).sum(0)
    # about the common mean, without the cancellation of E[x²] − E[x]²
    return mean, (share * (variances + (means - mean).square())).sum(0)


def _match_memory_format(t, like):
    """Return t in the memory format of `like`, copied only if it is in another."""
    channels_last = like.is_contiguous(memory_format=torch.channels_last)
    return t.contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    sync: bool = True,
    rectifier: str | None = None,
) -> Tensor:
    """Return φ(γ·(x − μ)/√(σ² + eps) + β) of x (N, C, H, W) in the dtype of x.

    `rectifier` is φ: "relu", "relu6", or None for the identity.

    The other tensors are (C), as in `F.batch_norm`: if `training`, μ and σ² are the batch's and
    the running statistics, where given, move towards them by `momentum` (σ² unbiased); otherwise
    they are the running ones. Where the batch is shared out to several processes, `sync` takes the
    statistics over all of it. Raises BatchTooSmallError where a channel has one value to train on.
    """
    x = _match_memory_format(x, x)
    n = 0  # values per channel that the statistics are of: none, they are constants
    if training:
        n_here = x.numel() // x.shape[1]
        n = n_here // len(x) * distributed.global_batch_size(len(x)) if sync else n_here
        if n < 2:
            raise BatchTooSmallError(
                f"a batch norm got {tuple(x.shape)}, and needs more than 1 value per channel to "
                "train: choose another --batch_size, --train_subset, or larger images"
            )
        with torch.no_grad():
            mean, var = kernels.statistics(x.flatten(2))
            if n > n_here:
                mean, var = _merge_rank_stats(mean, var, n_here)
            if running_mean is not None:
                running = running_mean, running_var
                ours = (mean, var * (n / (n - 1)))
                ours = [t.to(to.dtype) for t, to in zip(ours, running, strict=True)]
                if isinstance(momentum, Tensor):  # a scalar: nothing is read from the device
                    momentum = [momentum.expand_as(t) for t in running]
                torch._foreach_lerp_(running, ours, momentum)
    else:
        mean, var = map(kernels.at_least_float32, (running_mean, running_var))
    gamma = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
    beta = torch.zeros_like(mean) if bias is None else bias.to(mean.dtype)
    return _BatchNorm.apply(x, gamma, beta, mean, var, eps, n, rectifier)


class BatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` through `batch_norm`.

    `sync` is whether statistics are those of all processes' shares of a batch.
    """

    sync = True  # of the class, as `use_fast_layers` changes the class of modules that exist

    def forward(self, input: Tensor, rectifier: str | None = None) -> Tensor:
        """Map the input (N, C, H, W) to φ(batch_norm(input)), the same shape; φ: `rectifier`."""
        self._check_input_dim(input)
        momentum = self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:  # the cumulative average
                momentum = 1.0 / self.num_batches_tracked.to(self.running_mean.dtype)
        buffers = self.running_mean, self.running_var
        training = self.training or buffers == (None, None)
        momentum = 0.0 if momentum is None else momentum
        options = (training, momentum, self.eps, self.sync, rectifier)
        return batch_norm(input, self.weight, self.bias, *buffers, *options)


def set_sync_bn(net: nn.Module, enabled: bool) -> None:
    """Have batch norms take their statistics over all processes, or over each one's own share.

    Raises SetupError, with its name, for one that can not.
    """
    for name, m in net.named_modules():
        if isinstance(m, BatchNorm2d):
            m.sync = enabled
        elif enabled and isinstance(m, BATCH_NORMS):
            raise SetupError(
                f"--sync_bn: {name} is a {type(m).__name__} of {type(m).__module__}, and only "
                "nn.BatchNorm2d sums over several processes: use that, or --no-sync_bn"
            )


def unsynced_norm_buffers(net: nn.Module) -> Iterator[Tensor]:
    """Yield the running statistics that each process makes of its own share of the batches."""
    for m in net.modules():
        if isinstance(m, BATCH_AND_INSTANCE_NORMS) and not getattr(m, "sync", False):
            yield from m.buffers()
