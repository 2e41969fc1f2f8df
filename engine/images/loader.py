"""Batches of images held in memory, cropped, flipped and normalized all at once."""

import hashlib
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.system.distributed import share_bounds

Batch = tuple[Tensor, Tensor]  # images and labels
PADDING = 4  # black pixels on each side of an image before a random crop


def seed_of(*key: object) -> int:
    """Return a well-mixed function of `key`, from 0 to 2^64 − 1."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest())


def seeded_generator(*key: object) -> torch.Generator:
    """Return a CPU generator of its own, seeded by a well-mixed function of `key`."""
    return torch.Generator().manual_seed(seed_of(*key))


class Loader:
    """Batches of images held in memory as uint8, cropped, flipped and normalized all at once.

    Order, crops and flips are a pure function of (seed, epoch, position): the global random
    streams are neither read nor moved, and an epoch can be entered at any batch.

    Args:
        images: uint8 (N, 3, H, W).
        labels: int64 (N,).
        batch_size: of the global batch; the last one of an epoch may be smaller.
        mean, std: per channel, of pixels scaled to 0..1.
        seed: of order and augmentation.
        augment: pad by 4 black pixels, crop at random to H x W, flip left-right every second time.
        shuffle: a new order every epoch; otherwise the order given.
        device: where the images are kept and the batches made.
        rank, world_size: this process yields its contiguous share of each batch, which may be
            empty; the shares of all ranks in order are exactly the batch of a single process.
        memory_format: of the batches.
        cache: keep the normalized batches (do not write to them); for evaluation only.

    Raises ValueError for a batch size, rank or shape that makes no sense, and for a cache of random
    batches.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        seed: int = 0,
        augment: bool = False,
        shuffle: bool = False,
        device: str | torch.device = "cpu",
        rank: int = 0,
        world_size: int = 1,
        memory_format: torch.memory_format = torch.contiguous_format,
        cache: bool = False,
    ) -> None:
        if images.dtype != torch.uint8 or len(images.shape) != 4 or len(images) != len(labels):
            raise ValueError("images must be uint8 (N, 3, H, W) with one label each")
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"bad {batch_size=} or {rank=} of {world_size=}")
        if cache and (augment or shuffle):
            raise ValueError("only batches without augmentation and shuffling can be cached")
        self.n_images = len(images)
        self.batch_size = batch_size
        self.seed = seed
        self.augment = augment
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.memory_format = memory_format
        self.labels = labels.to(device)
        self.device = self.labels.device
        self.images = self._hold(images)
        mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (mean, std))
        self.scale = (1 / (255 * std)).float().to(device)
        self.shift = (-mean / std).float().to(device)
        self.cache: dict[int, Batch] | None = {} if cache else None

    def __len__(self) -> int:
        # batches of an epoch, the last smaller one included
        return -(-self.n_images // self.batch_size)

    def n_images_in_batch(self, number: int) -> int:
        """Return the number of images in batch `number`, of all ranks."""
        return min(self.batch_size, self.n_images - number * self.batch_size)

    def batches(self, epoch: int, start: int = 0, every: int = 1) -> Iterator[Batch]:
        """Yield the epoch's (x, y) from batch `start` on: float32 (b, 3, H, W), int64 (b,).

        With `every` N, only each N-th batch.
        """
        numbers = range(start, len(self), every)
        if self.cache is None:
            yield from self._make(epoch, numbers)
            return
        made = self._make(epoch, [number for number in numbers if number not in self.cache])
        for number in numbers:
            if number not in self.cache:
                self.cache[number] = next(made)
            yield self.cache[number]

    def pixels(self, n: int | None = None) -> Tensor:
        """Return the first n images, or all, uint8 (n, 3, H, W), that batches are normalized of.

        On the CPU, for loaders that neither augment nor shuffle.
        """
        return self.images[:n].cpu()

    def close(self) -> None:
        """End the processes that make batches, where there are any."""

    def _hold(self, images: Tensor) -> Tensor:
        """Return the images or, to augment them, a view (N, 9, 9, 3, H, W) of all their crops."""
        images = images.to(self.device)
        if not self.augment:
            return images
        height, width = images.shape[2:]
        padded = F.pad(images, (PADDING,) * 4)
        # gathering crops of channels-last images is several times faster
        padded = padded.contiguous(memory_format=torch.channels_last)
        return padded.unfold(2, height, 1).unfold(3, width, 1).permute(0, 2, 3, 1, 4, 5)

    def _make(self, epoch: int, numbers: Iterable[int]) -> Iterator[Batch]:
        """Make this rank's share of the batches of these numbers, in their order."""
        draws = [draw.to(self.device) for draw in self._sample_augmentation(epoch)]
        for number in numbers:
            order, rows, columns, flips = (draw[self._share(number)] for draw in draws)
            if self.augment:
                x = self.images[order, rows, columns]
                x = torch.where(flips.view(-1, 1, 1, 1), x.flip(3), x)
            else:
                x = self.images[order]
            yield self._normalize(x), self.labels[order]

    def _share(self, number: int) -> slice:
        """Return the positions in the epoch of this rank's share of batch `number`."""
        first = number * self.batch_size
        begin, end = share_bounds(self.n_images_in_batch(number), self.rank, self.world_size)
        return slice(first + begin, first + end)

    def _sample_augmentation(self, epoch: int) -> list[Tensor]:
        """Return the epoch's image, crop row, crop column and flip at each position, (N,) each."""
        generator = seeded_generator("epoch", self.seed, epoch)
        n = self.n_images
        order = self._order(generator)
        rows, columns = torch.randint(0, 2 * PADDING + 1, (2, n), generator=generator)
        flips = torch.randint(0, 2, (n,), generator=generator).bool()
        return [order, rows, columns, flips]

    def _order(self, generator: torch.Generator) -> Tensor:
        """Return the image at each position of an epoch, (N,)."""
        if self.shuffle:
            return torch.randperm(self.n_images, generator=generator)
        return torch.arange(self.n_images)

    def _normalize(self, x: Tensor) -> Tensor:
        """Return uint8 images as normalized float32 in the memory format of batches."""
        x = x.to(torch.float32, memory_format=self.memory_format)
        return x.mul_(self.scale).add_(self.shift)
