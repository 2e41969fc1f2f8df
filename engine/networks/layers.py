"""Convolution and batch norm + ReLU that are cheap to differentiate twice.

Autograd reaches the second derivative of these layers through dozens of element-wise passes. Here
each layer is one `autograd.Function` whose backward is another one with a hand-derived backward, so
every order is ordinary convolution kernels, one reduction and one element-wise pass. A third
derivative raises an error. Where a batch is shared out to several processes (`distributed`), batch
norm takes its statistics over all of it, in every order: its sums are sums over the ranks too.

    y = conv2d(x, weight); y = batch_norm_relu(y, gamma, beta, running_mean, running_var)

or, as modules with the parameters, initializers and `state_dict` keys of PyTorch's own, `Conv2d`,
`BatchNorm2d` and `BatchNormReLU`; `use_fast_layers` of engine/networks/outputs.py puts them into a
network.
Under `torch.autocast` convolutions take its dtype; statistics stay float32.
"""

import functools
import importlib.util
import logging
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.system import distributed
from engine.system.errors import BatchTooSmallError, SetupError

IMAGE_CHANNELS = 4  # a convolution of no more channels is one of images

log = logging.getLogger(__name__)
_compile_for: str | None = None  # type of the device whose element-wise functions are compiled
COMPILERS = {"cpu": ("c++", "g++"), "cuda": ("cc", "gcc", "clang")}  # that torch.compile calls


def set_compile(enabled: bool, device: str = "cpu") -> bool:
    """Compile the element-wise functions of a device from now on (True) or of none (False).

    At import it is False. Nothing is compiled before it is first called; where that fails, all run
    eagerly from then on, and one line says so. Returns what it is now: False also where the
    compiler that this device needs, or Triton for a GPU, is missing. One logged line says which.
    """
    global _compile_for
    kind = torch.device(device).type
    has_compiler = any(map(shutil.which, COMPILERS.get(kind, ())))
    has_triton = kind != "cuda" or importlib.util.find_spec("triton") is not None
    _compile_for = kind if enabled and has_compiler and has_triton else None
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime …"
    log.info("element-wise kernels: %s", "torch.compile" if _compile_for else "eager")
    return _compile_for is not None


def _compiled(fn: Callable, on_cpu: bool = True) -> Callable:
    """Run the pure function fn compiled while `set_compile` says so, else as it is.

    One compilation for each shape but for the batch, which stays free: the smaller batch at the
    end of an epoch compiles nothing. What two sums share is computed twice, not stored between.
    A function of values per channel (C) or (K, C) is compiled once for any number of channels.
    What is not worth a compilation on a CPU is never compiled there.
    """
    options = {"realize_reads_threshold": 64}

    @functools.cache
    def variant(constants, *shape):
        def bound(*args):
            return fn(*args, **dict(constants))

        return torch.compile(bound, options=options, isolate_recompiles=True)

    @functools.wraps(fn)
    def call(*args, **constants):
        global _compile_for
        kind = args[0].device.type
        if kind != _compile_for or (kind == "cpu" and not on_cpu):
            return fn(*args, **constants)
        args = [t.detach() for t in args]  # requires_grad would be compiled for, yes and no
        x = args[0]
        for t in args:
            torch._dynamo.maybe_mark_dynamic(t, 0 if t.dim() == 3 else t.dim() - 1)
        layout = (x.shape[1:], x.stride(1)) if x.dim() == 3 else ()
        key = tuple(constants.items()), layout, x.dtype, x.device
        try:
            return variant(*key)(*args)
        except RuntimeError as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            reason = str(error).strip().splitlines()[0]
            print(f"torch.compile failed, kernels run eagerly: {reason}", file=sys.stderr)
            _compile_for = None
            return fn(*args, **constants)

    call.is_compiled = True
    return call


_compiled_on_gpu = functools.partial(_compiled, on_cpu=False)


def _forbid_third_derivative(backward: Callable) -> Callable:
    """Raise an error where autograd would have to differentiate this backward too."""

    @functools.wraps(backward)
    def call(ctx, *grads):
        if torch.is_grad_enabled():  # once_differentiable lets some wrong third derivatives through
            raise RuntimeError("these layers have no third derivative: leave out create_graph=True")
        return backward(ctx, *grads)

    return call


# --- convolution ------------------------------------------------------------------------------


class _Conv(torch.autograd.Function):
    """y = conv(x, w)."""

    @staticmethod
    def forward(ctx, x, w, geometry):
        ctx.save_for_backward(x, w)
        ctx.geometry = geometry
        return F.conv2d(x, w, None, *geometry)

    @staticmethod
    def backward(ctx, gy):
        x, w = ctx.saved_tensors
        return *_ConvAdjoint.apply(gy, x, w, ctx.geometry, ctx.needs_input_grad[:2]), None


class _ConvAdjoint(torch.autograd.Function):
    """(gx, gw), the adjoints of y = conv(x, w) at gy; bilinear in (gy, w) and (gy, x)."""

    @staticmethod
    def forward(ctx, gy, x, w, geometry, output_mask):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gy, x, w)
        ctx.geometry = geometry
        return _conv_adjoint(gy, x, w, geometry, output_mask)

    @staticmethod
    @_forbid_third_derivative
    def backward(ctx, ggx, ggw):
        """Return conv(ggx, w) + conv(x, ggw) for gy, and the adjoints of gy with (ggx, ggw)."""
        (gy, x, w), geometry, (for_gy, for_x, for_w, *_) = (
            ctx.saved_tensors,
            ctx.geometry,
            ctx.needs_input_grad,
        )
        for_x, for_w = for_x and ggw is not None, for_w and ggx is not None
        terms = [
            F.conv2d(a, b, None, *geometry)
            for a, b in ((ggx, w), (x, ggw))
            if for_gy and a is not None and b is not None
        ]
        ggy = functools.reduce(Tensor.add_, terms) if terms else None
        gx, _ = _conv_adjoint(gy, x, ggw, geometry, (True, False)) if for_x else (None, None)
        _, gw = _conv_adjoint(gy, ggx, w, geometry, (False, True)) if for_w else (None, None)
        return ggy, gx, gw, None, None


def _conv_adjoint(gy, x, w, geometry, output_mask):
    """Return (gx, gw) of conv(x, w) at gy, None where not wanted."""
    stride, padding, dilation, groups = geometry
    return torch.ops.aten.convolution_backward(
        gy, x, w, None, stride, padding, dilation, False, (0, 0), groups, (*output_mask, False)
    )[:2]


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
) -> Tensor:
    """Convolve x (N, C, H, W) with weight (O, C/groups, K, K), as `F.conv2d` does.

    `stride`, `padding` and `dilation` are an int or a pair. Under autocast everything is cast to
    its dtype, but images (at most 4 channels) are convolved in float32: it costs next to nothing,
    and rounding them would be a good part of all the rounding in the gradients.

    With (ggx, ggw) the cotangents of the adjoints (gx, gw) of gy, the second backward is
    conv(ggx, w) + conv(x, ggw) for gy, and the adjoints of gy with kernel ggw and input ggx.
    """
    pair = nn.modules.utils._pair
    stride, padding = pair(stride), pair(padding)
    if x.device.type == "cpu" and is_strided_pointwise(weight, stride, padding):
        x, stride = x[:, :, :: stride[0], :: stride[1]], (1, 1)
    out = x.dtype
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        out = torch.get_autocast_dtype(x.device.type)
        dtype = torch.float32 if x.shape[1] <= IMAGE_CHANNELS else out
        x, weight, bias = (t if t is None else t.to(dtype) for t in (x, weight, bias))
    with torch.autocast(x.device.type, enabled=False):  # the casts are made
        y = _Conv.apply(x, weight, (stride, padding, pair(dilation), groups))
    return (y if bias is None else y + bias[:, None, None]).to(out)


def is_strided_pointwise(weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> bool:
    """Tell whether a convolution is 1×1, unpadded and strided: it reads every s-th pixel only.

    Then convolving x[:, :, ::s, ::s] with stride 1 is exactly the same. On CPUs that is what is
    done: PyTorch 2.14.1 writes beyond its memory in the weight adjoint of such a convolution of
    stride 2, float32, channels-last, at most 8 channels in and 16 out, images of 50 or more even
    rows, which ends the process (`tests/networks/test_networks.py` tells when that is over).
    """
    return weight.shape[2:] == (1, 1) and tuple(stride) != (1, 1) and tuple(padding) == (0, 0)


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` through `conv2d`; PyTorch's own path where that does not apply."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x (N, C, H, W) to (N, O, H', W')."""
        if x.dim() != 4 or self.padding_mode != "zeros" or isinstance(self.padding, str):
            return super().forward(x)
        return conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


# --- batch norm, with and without ReLU: pure functions of x (N, C, S), S = H·W ------------------
#
# `norm` (4, C) stacks μ, r = 1/√(σ² + eps), γ and β; x̂ = (x − μ)·r and z = γ·x̂ + β. `rectifier` is
# the activation that is part of the function, y = φ(z): None, "relu" or "relu6". h = gy·φ′(z): gy
# where z > 0 (and z < 6 for "relu6"), else 0.
# `k` holds one row a coefficient: keeping their arithmetic out of the loops over x halves the time.


def _at_least_float32(x):
    """Return x in float32 or, where it is, float64."""
    return x if x.dtype == torch.float64 else x.float()


def _rows(t):
    """Split t (K, C) into K views (C, 1)."""
    return t[:, :, None].unbind()


def _sum(x):
    """Sum x (N, C, S) over N and S; in two stages, which vectorize in either memory format."""
    return x.sum(2).sum(0)


def _masked(gy, x, norm, rectifier):
    """Return x̂, the mask φ′(z) ≠ 0 (None without a rectifier) and h."""
    mean, r, gamma, beta = _rows(norm)
    xhat = (_at_least_float32(x) - mean) * r
    if rectifier is None:
        return xhat, None, _at_least_float32(gy)
    z = xhat * gamma + beta
    mask = (z > 0) & (z < 6) if rectifier == "relu6" else z > 0
    return xhat, mask, torch.where(mask, _at_least_float32(gy), 0)


@_compiled
def _statistics(x):
    """Return mean (C) and biased variance (C); each image about its own mean: no cancellation."""
    x = _at_least_float32(x)
    means = x.mean(2)
    mean = means.mean(0)
    within = (x - means[:, :, None]).square().mean(2).mean(0)
    return mean, within + (means - mean).square().mean(0)


@_compiled
def _normalize(x, norm, rectifier):
    """Return y = φ(γ·x̂ + β) in the dtype of x."""
    mean, r, gamma, beta = _rows(norm)
    z = (_at_least_float32(x) - mean) * r * gamma + beta
    if rectifier is not None:
        z = z.clamp(0, 6) if rectifier == "relu6" else z.relu()
    return z.to(x.dtype)


@_compiled
def _adjoint_sums(gy, x, norm, rectifier):
    """Return dγ = Σ h·x̂ and dβ = Σ h."""
    xhat, _, h = _masked(gy, x, norm, rectifier)
    return _sum(h * xhat), _sum(h)


@_compiled
def _adjoint(gy, x, norm, k, rectifier):
    """Return gx = k0·h + k1·x̂ + k2."""
    k0, k1, k2 = _rows(k)
    xhat, _, h = _masked(gy, x, norm, rectifier)
    return (k0 * h + k1 * xhat + k2).to(x.dtype)


@_compiled
def _second_sums(v, gy, x, norm, rectifier):
    """Return Σ v, Σ v·x̂ and Σ v·h."""
    xhat, _, h = _masked(gy, x, norm, rectifier)
    v = _at_least_float32(v)
    return _sum(v), _sum(v * xhat), _sum(v * h)


@_compiled
def _second(v, gy, x, norm, k, rectifier):
    """Return ∂gy = φ′(z)·(k0·v + k1·x̂ + k2) and ∂x = k3·h + k4·v + k5·x̂ + k6."""
    k0, k1, k2, k3, k4, k5, k6 = _rows(k)
    xhat, mask, h = _masked(gy, x, norm, rectifier)
    v = _at_least_float32(v)
    ggy = k0 * v + k1 * xhat + k2
    ggy = ggy if rectifier is None else torch.where(mask, ggy, 0)
    return ggy.to(x.dtype), (k3 * h + k4 * v + k5 * xhat + k6).to(x.dtype)


# --- the same per channel, of tensors (C): small, but each operation is a launch on a GPU ---------


@_compiled_on_gpu
def _norm_rows(mean, var, gamma, beta, eps):
    """Return `norm`."""
    return torch.stack((mean, (var + eps).rsqrt(), gamma, beta))


@_compiled_on_gpu
def _adjoint_rows(mhx, mh, norm):
    """Return the `k` of `_adjoint`, given the means of h·x̂ and h."""
    gr = norm[2] * norm[1]
    return torch.stack((gr, -gr * mhx, -gr * mh))


@_compiled_on_gpu
def _second_rows(c, d, mv, mvx, mvh, mhx, mh, norm):
    """Return the `k` of `_second`, and A, as `_BatchNormAdjoint.backward` names them."""
    r, gamma = norm[1], norm[2]
    a = mvh - mv * mh - mvx * mhx
    gr = gamma * r
    mq = c * mh - gr * (mhx * mv + mvx * mh)
    mqx = c * mhx - 2 * gr * mhx * mvx
    ch = c - gr * mvx
    k = (gr, ch, d - gr * mv, r * ch, -r * gr * mhx, -r * (mqx + gr * a), -r * mq)
    return torch.stack(k), a


class _BatchNorm(torch.autograd.Function):
    """y = γ·(x − μ)·r + β; μ and σ² are functions of x, of n values, or constants if n is 0.

    With a `rectifier`, y is that of this. Where n is more than x has, the others have the rest of
    it, and sums go over all.
    """

    @staticmethod
    def forward(ctx, x, gamma, beta, mean, var, eps, n, rectifier):
        norm = _norm_rows(mean, var, gamma, beta, eps=eps)
        ctx.save_for_backward(x, gamma, norm)
        ctx.n, ctx.rectifier = n, rectifier
        y = _normalize(x.flatten(2), norm, rectifier=rectifier)
        return torch.ops.aten._unsafe_view(y, x.shape)  # of a view, `y += s` would be refused

    @staticmethod
    def backward(ctx, gy):
        x, gamma, norm = ctx.saved_tensors
        grads = _BatchNormAdjoint.apply(gy, x, gamma, norm, ctx.n, ctx.rectifier)
        return *grads, None, None, None, None, None


class _BatchNormAdjoint(torch.autograd.Function):
    """gx = γr·(h − m(h) − x̂·m(h x̂)), dγ = Σ h x̂, dβ = Σ h; m is the mean, 0 if n is.

    dγ and dβ are of this x alone.
    """

    @staticmethod
    def forward(ctx, gy, x, gamma, norm, n, rectifier):
        gy = _match_memory_format(gy, x)
        flat = gy.flatten(2), x.flatten(2), norm
        ggamma, gbeta = _adjoint_sums(*flat, rectifier=rectifier)
        mhx, mh = _means((ggamma, gbeta), x, n) if n else torch.zeros_like(norm[:2])
        ctx.save_for_backward(gy, x, norm, mhx, mh)
        ctx.n, ctx.rectifier = n, rectifier
        gx = _adjoint(*flat, _adjoint_rows(mhx, mh, norm), rectifier=rectifier)
        return gx.view_as(x), ggamma, gbeta

    @staticmethod
    @_forbid_third_derivative
    def backward(ctx, v, c, d):
        """Return the cotangents of gy, x and γ, given those of (gx, dγ, dβ): (v, c, d).

        c and d are the same on all ranks, as directions of summed gradients are.
        With q = −γr·(m(h x̂)·v + m(v x̂)·h) + c·h and A = m(v h) − m(v)m(h) − m(v x̂)m(h x̂):
        ∂gy = φ′(z)·(γr·(v − m(v) − x̂·m(v x̂)) + c·x̂ + d),
        ∂x = r·(q − m(q) − x̂·m(q x̂)) − γ·A·r²·x̂ and ∂γ = N·r·A.
        """
        gy, x, norm, mhx, mh = ctx.saved_tensors
        flat = _match_memory_format(v, x).flatten(2), gy.flatten(2), x.flatten(2), norm
        r, n_here = norm[1], x.numel() // len(mh)
        sums = _second_sums(*flat, rectifier=ctx.rectifier)
        means = _means(sums, x, ctx.n) if ctx.n else torch.zeros_like(norm[:3])
        k, a = _second_rows(c, d, *means, mhx, mh, norm)
        ggamma = n_here * r * a if ctx.n else r * sums[2]
        ggy, gx = _second(*flat, k, rectifier=ctx.rectifier)
        return ggy.view_as(x), gx.view_as(x), ggamma, None, None, None


def _means(sums, x, n):
    """Divide sums (C) over x by n, after adding those of the ranks that have the rest of n."""
    if n != x.numel() // x.shape[1]:
        sums = distributed.batch_sum(torch.stack(sums)).unbind()
    return torch._foreach_div(sums, n)


def _merge_rank_stats(mean, var, n):
    """Return mean and biased variance of all ranks' x from each one's and its n, without loss."""
    rows = distributed.gather(torch.cat((mean, var, mean.new_full((1,), n))))  # (ranks, 2C + 1)
    (means, variances), share = rows[:, :-1].unflatten(1, (2, -1)).unbind(1), rows[:, -1:]
    share = share / share.sum()
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0)


def set_sync_bn(net: nn.Module, enabled: bool) -> None:
    """Have batch norms take their statistics over all processes, or over each one's own share.

    Raises SetupError, with its name, for one that can not.
    """
    for name, m in net.named_modules():
        if isinstance(m, BatchNorm2d):
            m.sync = enabled
        elif enabled and isinstance(m, nn.modules.batchnorm._BatchNorm):
            raise SetupError(
                f"--sync_bn: {name} is a {type(m).__name__} of {type(m).__module__}, and only "
                "nn.BatchNorm2d sums over several processes: use that, or --no-sync_bn"
            )


def unsynced_bn_buffers(net: nn.Module) -> Iterator[Tensor]:
    """Yield the running statistics that each process makes of its own share of the batches."""
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and not getattr(m, "sync", False):
            yield from m.buffers()


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
    x, n = _match_memory_format(x, x), 0
    if training:
        n_here = x.numel() // x.shape[1]
        n = n_here // len(x) * distributed.global_batch_size(len(x)) if sync else n_here
        if n < 2:
            raise BatchTooSmallError(
                f"a batch norm got {tuple(x.shape)}, and needs more than 1 value per channel to "
                "train: choose another --batch_size, --train_subset, or larger images"
            )
        with torch.no_grad():
            mean, var = _statistics(x.flatten(2))
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
        mean, var = _at_least_float32(running_mean), _at_least_float32(running_var)
    gamma = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
    beta = torch.zeros_like(mean) if bias is None else bias.to(mean.dtype)
    return _BatchNorm.apply(x, gamma, beta, mean, var, eps, n, rectifier)


batch_norm_relu = functools.partial(batch_norm, rectifier="relu")


class BatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` through `batch_norm`.

    `sync` is whether statistics are those of all processes' shares of a batch.
    """

    sync, rectifier = True, None  # of the class: `use_fast_layers` changes the class of a module

    def forward(self, x: Tensor) -> Tensor:
        """Map x (N, C, H, W) to φ(batch_norm(x)), the same shape; φ is the `rectifier`."""
        self._check_input_dim(x)
        momentum = self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:  # the cumulative average
                momentum = 1.0 / self.num_batches_tracked.to(self.running_mean.dtype)
        buffers = self.running_mean, self.running_var
        training = self.training or buffers == (None, None)
        momentum = 0.0 if momentum is None else momentum
        options = (training, momentum, self.eps, self.sync, self.rectifier)
        return batch_norm(x, self.weight, self.bias, *buffers, *options)


class BatchNormReLU(BatchNorm2d):
    """`nn.BatchNorm2d` and the ReLU after it, in one; keys of `nn.BatchNorm2d`.

    `activation` is what remains of the module once its batch norm is folded away.
    """

    rectifier = "relu"

    def __init__(self, *args, **kwargs) -> None:
        """Take the arguments of `nn.BatchNorm2d`."""
        super().__init__(*args, **kwargs)
        self.activation = nn.ReLU()


class BatchNormBeforeRectifier(BatchNorm2d):
    """A batch norm that does the work of the `ReLU` or `ReLU6` after it, its only reader, as well.

    Its attribute `rectifier` says which.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map x (N, C, H, W) to φ(batch_norm(x)), marked as rectified."""
        y = super().forward(x)
        y.is_rectified = True
        return y


class _PassesRectified:
    """A module that returns what a `BatchNormBeforeRectifier` has rectified as it is."""

    def forward(self, x: Tensor) -> Tensor:
        if not getattr(x, "is_rectified", False):
            return super().forward(x)
        x.is_rectified = False  # for the batch norm's reader only, not for one after that
        return x


class ReLU(_PassesRectified, nn.ReLU):
    """`nn.ReLU` where the batch norm before it may have done the work."""


class ReLU6(_PassesRectified, nn.ReLU6):
    """`nn.ReLU6` where the batch norm before it may have done the work."""


class Add(nn.Module):
    """The sum of a residual connection: a module, so that what is added can be quantized."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return a + b, of one shape."""
        return a + b


# --- which layers ----------------------------------------------------------------------------


LAYER_TYPES = nn.Conv2d | nn.Linear  # whose weights are penalized and quantized


def quantizable_layers(net: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """Return every convolution and linear layer by name, in module order.

    Of several layers that share one weight, the first.
    """
    layer_of: dict[Tensor, tuple[str, nn.Conv2d | nn.Linear]] = {}
    for name, m in net.named_modules():
        if isinstance(m, LAYER_TYPES):
            layer_of.setdefault(m.weight, (name, m))
    return dict(layer_of.values())


def trainable_parameters(net: nn.Module) -> dict[str, nn.Parameter]:
    """Return every parameter that is not frozen by name, in module order."""
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def penalized_weights(net: nn.Module) -> list[nn.Parameter]:
    """Return W_l: the weight of every convolution and linear layer, in module order.

    Frozen weights are constants: neither they nor their gradients are penalized.
    """
    weights = (layer.weight for layer in quantizable_layers(net).values())
    return [w for w in weights if w.requires_grad]
