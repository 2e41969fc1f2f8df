"""Batches of images that worker processes decode from files, in each epoch or once for all."""

import ctypes
import gc
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_convert
from tqdm import tqdm

from engine.images.image_files import ImageFiles, decode, decode_centre_crop, random_crop
from engine.images.loader import Loader, seeded_generator
from engine.system import distributed, hardware
from engine.system.errors import DataError, ImageError, ReportedError
from engine.system.signals import STOP_SIGNALS

GIGABYTE = 10**9
CHUNK = 32  # centre crops that a worker sends at a time
PR_SET_PDEATHSIG = 1  # of Linux's prctl

Key = tuple[int, int, int]  # epoch, position in it, image
Decoded = Sequence[Tensor] | None  # uint8 images (3, H, W)


def make_loader(
    images: ImageFiles,
    labels: Tensor,
    *positional: Any,
    workers: int,
    max_gb: float,
    augment: bool = False,
    cache: bool = False,
    **settings: Any,
) -> Loader:
    """Return a Loader of image files. Other arguments are those of `Loader`.

    Args:
        images, labels: the files, and int64 (N,).
        workers: processes that decode; with 0 this process does.
        max_gb: keep decoded images in memory, as uint8, where they take no more gigabytes than
            that: whole images to be cropped at random (`augment`), otherwise their centre crops.
            Batches are the same, bit for bit, as without.
        augment: crop at random, resize and flip, as torchvision does for training.
        cache: without effect, normalized images would take four times the memory.
    """
    if augment:
        decoded = _decode_whole(images, workers, max_gb)
        settings |= {"augment": True, "workers": workers, "decoded": decoded}
        return FileLoader(images, labels, *positional, **settings)
    if np.prod(images.shape) > max_gb * GIGABYTE:
        return FileLoader(images, labels, *positional, workers=workers, **settings)
    crops = _decode_crops(images, Workers(ImageMaker(images), workers))
    return Loader(crops, labels, *positional, **settings)


# --- what the worker processes do ------------------------------------------------------------


@dataclass(frozen=True)
class ImageMaker:
    """Makes uint8 images (b, 3, S, S) of b keys, from `decoded` where that is given, or the files.

    With `augment` they are random crops, otherwise centre crops.
    """

    images: ImageFiles
    augment: bool = False
    seed: int = 0
    decoded: Decoded = None

    def __post_init__(self) -> None:
        import torchvision.transforms.v2  # noqa: F401  slow: once, before processes are forked

    def __call__(self, keys: Sequence[Key]) -> Tensor:
        """Return the images of the keys."""
        made = [self._make(*key) for key in keys]
        return torch.stack(made) if made else torch.empty(self.images[:0].shape, dtype=torch.uint8)

    def _make(self, epoch: int, position: int, i: int) -> Tensor:
        if not self.augment:
            return decode_centre_crop(self.images.path(i), self.images.image_size)
        image = decode(self.images.path(i)) if self.decoded is None else self.decoded[i]
        return random_crop(image, self.images.image_size, (self.seed, epoch, position))


# --- the worker processes --------------------------------------------------------------------


class Workers:
    """Processes that call `make` on one item after the other; results come in the items' order.

    They start at once, while there is little to inherit, and are kept: wandb, for one, forbids what
    it does in later forks. With n = 0 this process calls. `make` and the items must be picklable;
    DataErrors of `make` are raised here.
    """

    def __init__(self, make: Callable[[Any], Tensor], n: int, pin_memory: bool = False) -> None:
        self.items = _Items()
        on_linux = sys.platform == "linux"  # forks share what is in memory
        with warnings.catch_warnings():  # more workers than cores are the user's choice
            warnings.filterwarnings("ignore", "This DataLoader will create")
            self.loader = DataLoader(
                _Calls(make),
                batch_sampler=self.items,
                collate_fn=default_convert,  # which leaves a tensor, or an error, as it is
                num_workers=n,
                persistent_workers=n > 0,
                multiprocessing_context="fork" if n and on_linux else None,
                worker_init_fn=_begin_worker,
                pin_memory=pin_memory,
                generator=torch.Generator(),  # else it draws from the global stream
            )
            if n:
                iter(self.loader)  # starts them

    def map(self, items: Iterable[Any]) -> Iterator[Tensor]:
        """Yield make(item) of each."""
        self.items.current = items
        try:
            for result in self.loader:
                if isinstance(result, ReportedError):
                    raise result
                yield result
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):
                raise
            reason = str(error).splitlines()[0]
            raise DataError(f"a process that decodes images is lost: {reason}") from error


class _Items:
    """What DataLoader takes for lists of indices."""

    current: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.current)


class _Calls(Dataset):
    """What DataLoader takes for a data set; an index is an item."""

    def __init__(self, make: Callable[[Any], Tensor]) -> None:
        self.make = make

    def __getitems__(self, item: Any) -> Tensor | ReportedError:
        try:
            return self.make(item)
        except ReportedError as error:
            return error  # raised, DataLoader would make a long text of it
        except (MemoryError, RuntimeError) as error:
            if not hardware.is_out_of_memory(error):
                raise
            return DataError("memory ran out where an image is decoded: fewer --workers take less")


def _begin_worker(number: int) -> None:
    """Have this worker process end with its parent, and by no signal of anyone else's.

    Who stops a training signals all its processes; the parent then needs us to finish its batch.
    """
    gc.freeze()  # garbage that a fork inherits is the parent's: queues must not be closed here
    for stop_signal in {*STOP_SIGNALS} - {signal.SIGTERM}:
        signal.signal(stop_signal, signal.SIG_IGN)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_wait_for_parents_sigterm, daemon=True).start()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # else it keeps the run's lock


def _wait_for_parents_sigterm() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


# --- batches ---------------------------------------------------------------------------------


class FileLoader(Loader):
    """A Loader of image files, which worker processes decode, crop and resize.

    Order and crops are a pure function of (seed, epoch, position), as of any Loader, whatever the
    number of workers. Other arguments are those of `ImageMaker` and `make_loader`.
    """

    def __init__(
        self, *arguments: Any, workers: int, decoded: Decoded = None, **settings: Any
    ) -> None:
        self.n_workers = workers
        self.decoded = decoded
        super().__init__(*arguments, **settings)

    def pixels(self, n: int | None = None) -> Tensor:
        """Decode the first n images, or all, into memory; see `Loader.pixels`."""
        return _decode_crops(self.images[:n], self.workers)

    def close(self) -> None:
        """End the worker processes now: garbage collection may do it late and in any thread."""
        self.workers = None

    def _hold(self, images: ImageFiles) -> ImageFiles:
        maker = ImageMaker(images, self.augment, self.seed, self.decoded)
        self.workers = Workers(maker, self.n_workers, pin_memory=self.device.type == "cuda")
        return images

    def _make(self, epoch: int, numbers: Iterable[int]) -> Iterator[tuple[Tensor, Tensor]]:
        order = self._order(seeded_generator("epoch", self.seed, epoch))
        shares = [self._share(number) for number in numbers]
        images = order.tolist()
        keys = ([(epoch, p, images[p]) for p in range(s.start, s.stop)] for s in shares)
        try:
            for share, x in zip(shares, self.workers.map(keys), strict=True):
                x = x.to(self.device, non_blocking=True)
                yield self._normalize(x), self.labels[order[share].to(self.device)]
        except DataError as error:
            raise ImageError(str(error)) from error


# --- decoded once for all --------------------------------------------------------------------


def _decode_whole(images: ImageFiles, workers: int, max_gb: float) -> list[Tensor] | None:
    """Return the images as they are in their files, None where that takes more than max_gb."""
    if images.n_bytes.sum() > max_gb * GIGABYTE:  # decoded they are larger: do not open them all
        return None
    sizes = images.sizes()
    n_bytes = 3 * sizes.prod(axis=1)
    if n_bytes.sum() > max_gb * GIGABYTE:
        return None
    # parts of one block of memory, which processes can share
    parts = torch.empty(n_bytes.sum(), dtype=torch.uint8).split(n_bytes.tolist())
    views = (part.view(*size, 3) for part, size in zip(parts, sizes.tolist(), strict=True))
    decoded = [view.permute(2, 0, 1) for view in views]
    _decode_into(decoded, Workers(decode, workers), map(images.path, range(len(images))))
    return decoded


def _decode_crops(images: ImageFiles, workers: Workers) -> Tensor:
    """Return the centre crops, uint8 (N, 3, S, S), that workers of an `ImageMaker` make."""
    crops = torch.empty(images.shape, dtype=torch.uint8)
    positions = torch.arange(len(images)).split(CHUNK)
    keys = ([(0, i, i) for i in part.tolist()] for part in positions)
    _decode_into(crops.split(CHUNK), workers, keys)
    return crops


def _decode_into(targets: Sequence[Tensor], workers: Workers, items: Iterable[Any]) -> None:
    """Copy what is made of each item into its target; DataError for a file that is damaged."""
    hidden = True if distributed.get_rank() else None  # None: where there is no terminal
    with tqdm(desc="decode images", total=len(targets), leave=False, disable=hidden) as bar:
        for target, image in zip(targets, workers.map(items), strict=True):
            target.copy_(image)
            bar.update()
