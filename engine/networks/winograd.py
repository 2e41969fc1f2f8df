"""3×3 convolutions with 2.25 times fewer multiplications: Winograd's F(2×2, 3×3).

After Lavin and Gray, arXiv 1509.09308, section 4.1. An image is cut into overlapping 4×4 tiles d,
of which each gives 2×2 outputs, y = Aᵀ[(G w Gᵀ) ⊙ (Bᵀ d B)]A: for each of the 16 places of a tile
one matrix product over the channels of all tiles. The weight adjoint is the transpose of that in w,
gw = Gᵀ[Σ_tiles (A gy Aᵀ) ⊙ (Bᵀ d B)]G, whose sum over tiles the matrix products make. An infinite
number makes its whole tile NaN.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The halves in two rows of G are in SCALE. The last rows of Bᵀ and of A have the opposite of their
# sign in the paper, which changes no product: so every row of a matrix has a 1.
B_T = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, -1, 0, 1))
A = ((1, 0), (1, 1), (1, -1), (0, 1))
A_T = tuple(zip(*A, strict=True))
G = ((1, 0, 0), (1, 1, 1), (1, -1, 1), (0, 0, 1))
G_T = tuple(zip(*G, strict=True))
SCALE = (1.0, 0.5, 0.5, 1.0)
FLIPPED = [3, 1, 2, 0]  # the places of a tile of flipped weights
MAX_TILE_VALUES = 1 << 21  # at once, or one image: more would not stay in the cache

# Where it is faster, see results/speed/LOG.md
CAPABILITY = "AVX2"  # of the processor; with more than that it was not measured
GEOMETRY = (1, 1), (1, 1), (1, 1), 1  # stride, padding, dilation, groups
MIN_CHANNELS = 128  # in, and out
MIN_PIXELS = 512  # of all images together: the transform of the weights has to pay
# The convolution and its input adjoint gain less, and need more
MIN_CHANNEL_PAIRS = 128 * 256
MIN_PIXELS_OF_PAIRS = 1024
_enabled = False


def set_winograd(enabled: bool, device: str = "cpu") -> bool:
    """Use these kernels from now on where they are faster (True) or never (False, as at import).

    Returns what it is now: False also on a device or processor for which that was not measured.
    """
    global _enabled
    is_measured = torch.backends.cpu.get_cpu_capability() == CAPABILITY
    _enabled = enabled and torch.device(device).type == "cpu" and is_measured
    return _enabled


def weight_adjoint_is_faster(x: Tensor, w: Tensor, geometry: tuple) -> bool:
    """Tell whether `weight_adjoint` is to be used for conv(x, w) of that geometry.

    `geometry` is (stride, padding, dilation, groups). The answer depends on shapes, layouts and
    the kind of processor alone, so that a run's bits can be had again.
    """
    return (
        _enabled
        and _is_wide(w.shape, geometry)
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.shape[2] % 2 == x.shape[3] % 2 == 0
        and _pixels(x) >= MIN_PIXELS
    )


def is_faster(x: Tensor, w: Tensor, geometry: tuple) -> bool:
    """Tell whether `conv2d` and `input_adjoint` are to be used for conv(x, w) of that geometry."""
    pays = w.shape[0] * w.shape[1] >= MIN_CHANNEL_PAIRS and _pixels(x) >= MIN_PIXELS_OF_PAIRS
    return pays and weight_adjoint_is_faster(x, w, geometry)


def may_be_used_by(net: nn.Module, dtype: torch.dtype, memory_format: torch.memory_format) -> bool:
    """Tell whether a convolution of the network goes through these kernels if images allow it."""
    convolutions = (m for m in net.modules() if isinstance(m, nn.Conv2d))
    fits = dtype == torch.float32 and memory_format == torch.channels_last
    # not by the weight's own shape: to read a weight that is computed may change what it is next
    return (_enabled and fits) and any(
        _is_wide(
            (m.out_channels, m.in_channels // m.groups, *m.kernel_size),
            (m.stride, m.padding, m.dilation, m.groups),
        )
        for m in convolutions
    )


def _is_wide(weight_shape: Sequence[int], geometry: tuple) -> bool:
    *channels, height, width = weight_shape
    return geometry == GEOMETRY and (height, width) == (3, 3) and min(channels) >= MIN_CHANNELS


def _pixels(x: Tensor) -> int:
    return len(x) * x.shape[2] * x.shape[3]


def conv2d(x: Tensor, w: Tensor) -> Tensor:
    """Return the convolution of x (N, C, H, W) with w (O, C, 3, 3), padded by 1: (N, O, H, W).

    H and W are even. The result is channels-last, as x should be.
    """
    return _multiply_tiles(x, _weight_tiles(w).flatten(0, 1).mT)


def input_adjoint(gy: Tensor, w: Tensor) -> Tensor:
    """Return the adjoint in x of `conv2d` at gy (N, O, H, W): (N, C, H, W)."""
    flipped = _weight_tiles(w)[FLIPPED][:, FLIPPED]
    return _multiply_tiles(gy.contiguous(memory_format=torch.channels_last), flipped.flatten(0, 1))


def weight_adjoint(gy: Tensor, x: Tensor) -> Tensor:
    """Return the adjoint in w of `conv2d` of x (N, C, H, W) at gy (N, O, H, W): (O, C, 3, 3).

    It is channels-last.
    """
    gy = gy.contiguous(memory_format=torch.channels_last)
    products = x.new_zeros(16, gy.shape[1], x.shape[1])
    for images in _chunks(x, gy):
        g = gy[images].permute(0, 2, 3, 1)
        output_tiles = _transform(A, _transform(A, g, 1, 2), 3, 2).view(16, -1, gy.shape[1])
        products.baddbmm_(output_tiles.mT, _input_tiles(x[images]))
    scaled = products.view(4, 4, *products.shape[1:]).mul_(_scale(x))
    gw = x.new_empty(gy.shape[1], 3, 3, x.shape[1])
    out = gw.permute(1, 2, 0, 3)[:, :, None, None]
    _transform(G_T, _transform(G_T, scaled, 0, 1), 2, 1, out)
    return gw.permute(0, 3, 1, 2)


def _multiply_tiles(x: Tensor, weight_tiles: Tensor) -> Tensor:
    """Return the outputs (N, O, H, W) of x (N, C, H, W), with weights (16, C, O)."""
    n, _, height, width = x.shape
    n_out = weight_tiles.shape[2]
    y = x.new_empty(n, height, width, n_out)
    for images in _chunks(x, y):
        tiles = (_input_tiles(x[images]) @ weight_tiles).view(
            4, 4, -1, height // 2, width // 2, n_out
        )
        blocks = y[images].view(-1, height // 2, 2, width // 2, 2, n_out).permute(2, 4, 0, 1, 3, 5)
        _transform(A_T, _transform(A_T, tiles, 0, 1), 2, 1, blocks[:, :, None, None])
    return y.permute(0, 3, 1, 2)


def _input_tiles(x: Tensor) -> Tensor:
    """Return Bᵀ d B of every tile of x (N, C, H, W): (16, N·H/2·W/2, C)."""
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    return _transform(B_T, _transform(B_T, padded, 1, 2), 3, 2).view(16, -1, x.shape[1])


def _weight_tiles(w: Tensor) -> Tensor:
    """Return G w Gᵀ of w (O, C, 3, 3): (4, 4, O, C)."""
    tiles = _transform(G, _transform(G, w.permute(2, 3, 0, 1), 0, 1), 2, 1)
    return tiles[:, :, 0, 0].mul_(_scale(w))


def _transform(
    matrix: Sequence[Sequence[int]], x: Tensor, dim: int, step: int, out: Tensor | None = None
) -> Tensor:
    """Return `matrix` times every window of x along `dim`; its rows become the first dimension.

    Windows are as long as a row, and begin at every `step`-th place.
    """
    planes = x.unfold(dim, len(matrix[0]), step).movedim(-1, 0)
    out = x.new_empty(len(matrix), *planes.shape[1:]) if out is None else out
    for row, result in zip(matrix, out, strict=True):
        terms = [(c, plane) for c, plane in zip(row, planes, strict=True) if c]
        (_, value), *others = sorted(terms, key=lambda term: -term[0])  # the first one's c is 1
        if not others:
            result.copy_(value)
        for c, plane in others:
            value = torch.add(value, plane, alpha=c, out=result)
    return out


def _scale(like: Tensor) -> Tensor:
    """Return what the halves of G multiply each place of a tile by: (4, 4, 1, 1)."""
    scale = like.new_tensor(SCALE)
    return torch.outer(scale, scale)[:, :, None, None]


def _chunks(*tensors: Tensor) -> Iterator[slice]:
    """Iterate over the images, as many at once as have no more than MAX_TILE_VALUES in tiles."""
    n = len(tensors[0])
    largest = max(tensor[:1].numel() for tensor in tensors)
    size = max(1, MAX_TILE_VALUES // max(1, 4 * largest))
    return (slice(start, start + size) for start in range(0, n, size))
