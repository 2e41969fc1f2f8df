"""The arithmetic of batch norm and its derivatives: pure functions, compiled where that pays.

x, gy and v are (N, C, S), S = H·W: the input, the cotangent of y, and the cotangent of gx. `norm`
(4, C) stacks μ, r = 1/√(σ² + eps), γ and β; x̂ = (x − μ)·r and z = γ·x̂ + β. `rectifier` is the
activation φ of y = φ(z): None, "relu" or "relu6". h = gy·φ′(z): gy where z > 0 (and z < 6 for
"relu6"), else 0. `k` (K, C) has one row for each coefficient of the sum that a kernel returns.
"""

import functools

import torch

from engine.networks.compiling import compiled

# For values per channel. On a GPU each operation is a launch, and compiling makes them one; on a
# CPU there is too little to do.
compiled_on_gpu = functools.partial(compiled, on_cpu=False)


def at_least_float32(x):
    """Return x in float32 or, where it is, float64."""
    return x if x.dtype == torch.float64 else x.float()


def _rows(t):
    """Split t (K, C) into K views (C, 1)."""
    return t[:, :, None].unbind()


def _sum(x):
    """Sum x (N, C, S) over N and S."""
    return x.sum(2).sum(0)  # two stages vectorize in either memory format, one does not


def _masked(gy, x, norm, rectifier):
    """Return x̂, the mask φ′(z) ≠ 0 (None without a rectifier) and h."""
    mean, r, gamma, beta = _rows(norm)
    xhat = (at_least_float32(x) - mean) * r
    if rectifier is None:
        return xhat, None, at_least_float32(gy)
    # z is computed again rather than stored: a stored one would be a pass over memory
    z = xhat * gamma + beta
    mask = (z > 0) & (z < 6) if rectifier == "relu6" else z > 0
    return xhat, mask, torch.where(mask, at_least_float32(gy), 0)


@compiled
def statistics(x):
    """Return mean (C) and biased variance (C) of x (N, C, S)."""
    x = at_least_float32(x)
    means = x.mean(2)  # (N, C)
    mean = means.mean(0)
    # each image about its own mean: E[x²] − E[x]² would cancel
    within = (x - means[:, :, None]).square().mean(2).mean(0)
    return mean, within + (means - mean).square().mean(0)


@compiled
def normalize(x, norm, rectifier):
    """Return y = φ(γ·x̂ + β) in the dtype of x."""
    mean, r, gamma, beta = _rows(norm)
    z = (at_least_float32(x) - mean) * r * gamma + beta
    if rectifier is not None:
        z = z.clamp(0, 6) if rectifier == "relu6" else z.relu()
    return z.to(x.dtype)


@compiled
def adjoint_sums(gy, x, norm, rectifier):
    """Return dγ = Σ h·x̂ and dβ = Σ h, (C) each."""
    xhat, _, h = _masked(gy, x, norm, rectifier)
    return _sum(h * xhat), _sum(h)


@compiled
def adjoint(gy, x, norm, k, rectifier):
    """Return gx = k0·h + k1·x̂ + k2."""
    k0, k1, k2 = _rows(k)  # (C, 1) each: from `adjoint_rows`
    xhat, _, h = _masked(gy, x, norm, rectifier)
    return (k0 * h + k1 * xhat + k2).to(x.dtype)


@compiled
def second_sums(v, gy, x, norm, rectifier):
    """Return Σ v, Σ v·x̂ and Σ v·h, (C) each."""
    xhat, _, h = _masked(gy, x, norm, rectifier)
    v = at_least_float32(v)
    return _sum(v), _sum(v * xhat), _sum(v * h)


@compiled
def second(v, gy, x, norm, k, rectifier):
    """Return ∂gy = φ′(z)·(k0·v + k1·x̂ + k2) and ∂x = k3·h + k4·v + k5·x̂ + k6."""
    k0, k1, k2, k3, k4, k5, k6 = _rows(k)  # (C, 1) each: from `second_rows`
    xhat, mask, h = _masked(gy, x, norm, rectifier)
    v = at_least_float32(v)
    ggy = k0 * v + k1 * xhat + k2
    ggy = ggy if rectifier is None else torch.where(mask, ggy, 0)
    return ggy.to(x.dtype), (k3 * h + k4 * v + k5 * xhat + k6).to(x.dtype)


# --- coefficients per channel, of tensors (C): outside of the loops over x, in half the time ------


@compiled_on_gpu
def norm_rows(mean, var, gamma, beta, eps):
    """Return `norm`."""
    return torch.stack((mean, (var + eps).rsqrt(), gamma, beta))


@compiled_on_gpu
def adjoint_rows(mhx, mh, norm):
    """Return the `k` of `adjoint`, given the means of h·x̂ and h."""
    gr = norm[2] * norm[1]
    return torch.stack((gr, -gr * mhx, -gr * mh))


@compiled_on_gpu
def second_rows(c, d, mv, mvx, mvh, mhx, mh, norm):
    """Return the `k` of `second`, and A.

    c and d are the cotangents of dγ and dβ; mv, mvx, mvh, mhx, mh are the means of v, v·x̂, v·h,
    h·x̂, h. `_BatchNormAdjoint.backward` in fast_batch_norm.py has the formulas, of q and of A.
    """
    r, gamma = norm[1], norm[2]
    gr = gamma * r
    a = mvh - mv * mh - mvx * mhx
    # the means of q and q·x̂, from those of h and v: m(x̂) = 0 and m(x̂²) = 1
    mq = c * mh - gr * (mhx * mv + mvx * mh)
    mqx = c * mhx - 2 * gr * mhx * mvx
    ch = c - gr * mvx
    # ∂gy: v, x̂, 1; ∂x: h, v, x̂, 1
    k = (gr, ch, d - gr * mv, r * ch, -r * gr * mhx, -r * (mqx + gr * a), -r * mq)
    return torch.stack(k), a
