"""Images in files: found in folders, decoded, cropped and resized as torchvision does.

The layout is that of `torchvision.datasets.ImageFolder`: a folder for each class.
"""

import hashlib
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from engine.images.loader import seed_of
from engine.system import hardware
from engine.system.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
RESIZE_RATIO = 256 / 224  # shorter side of a resized image to the side of its centre crop
CROP_AREA, CROP_ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)  # of a random crop
MAX_LISTED = 5  # classes that an error names


# --- finding ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageFiles:
    """Images on disk that stand for a uint8 tensor (N, 3, image_size, image_size).

    A slice of them is of the same kind. Paths are bytes in one array: worker processes then share
    its memory, which they would copy of a list.
    """

    paths: np.ndarray  # bytes (N,)
    n_bytes: np.ndarray  # int64 (N,), of each file
    image_size: int  # pixels
    dtype: torch.dtype = torch.uint8

    @classmethod
    def of(cls, files: Sequence[Path], image_size: int) -> "ImageFiles":
        """Return the files in their order; DataError where one is missing or empty."""
        try:
            n_bytes = np.array([file.stat().st_size for file in files])
        except OSError as error:
            raise DataError(str(error)) from error
        if not n_bytes.all():
            raise DataError(f"{files[n_bytes.argmin()]} is empty: delete it or put the image back")
        return cls(np.array([os.fsencode(file) for file in files]), n_bytes, image_size)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, part: slice) -> "ImageFiles":
        return replace(self, paths=self.paths[part], n_bytes=self.n_bytes[part])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of the tensor that the images stand for."""
        return len(self), 3, self.image_size, self.image_size

    def path(self, i: int) -> str:
        """Return the path of image i."""
        return os.fsdecode(self.paths[i])

    def sizes(self) -> np.ndarray:
        """Return height and width of each file's image, int64 (N, 2), from the files' heads."""
        sizes = np.empty((len(self), 2), np.int64)
        for i in range(len(self)):
            with opened(self.path(i)) as image:
                sizes[i] = image.height, image.width
        return sizes


def find_classes(folder: Path) -> list[str]:
    """Return the names of the class folders, sorted; DataError where there are not two or more."""
    if not folder.is_dir():
        raise DataError(
            f"{folder}: there is no such folder; --data_dir holds train/CLASS/… and val/CLASS/…"
        )
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(names) < 2:
        raise DataError(f"{folder} has {len(names)} class folders: it takes two or more")
    return names


def check_same_classes(train: Sequence[str], test: Sequence[str], folder: Path) -> None:
    """Raise DataError, naming the difference, unless train/ and val/ have the same classes."""
    only = {"train": sorted({*train} - {*test}), "val": sorted({*test} - {*train})}
    parts = [
        f"only in {where}/: {', '.join(names[:MAX_LISTED])}{', …' * (len(names) > MAX_LISTED)}"
        for where, names in only.items()
        if names
    ]
    if parts:
        raise DataError(f"{folder}: train/ and val/ differ in their classes; {'; '.join(parts)}")


def find_images(folder: Path, classes: Sequence[str], image_size: int) -> tuple[ImageFiles, Tensor]:
    """Return the images of all classes and their labels, int64 (N,).

    They are in the order of a hash of their paths below `folder`, in which classes are mixed: the
    first or last N of them are a random sample. Hidden files, and those that are no images by their
    suffix, are skipped and counted. DataError for an empty file, and for a class without images.
    """
    rows, skipped = [], []
    for label, name in enumerate(classes):
        n_before = len(rows)
        for path in _files_below(folder / name):
            if path.name.startswith(".") or path.suffix.lower() not in SUFFIXES:
                skipped.append(path)
                continue
            key = os.fsencode(path.relative_to(folder).as_posix())
            rows.append((hashlib.blake2b(key, digest_size=16).digest(), path, label))
        if len(rows) == n_before:
            raise DataError(f"{folder / name} holds no images: files ending in {SUFFIXES}")
    if skipped:
        tqdm.write(f"{folder}: {len(skipped)} files are no images and skipped, as {skipped[0]}")
    _, paths, labels = zip(*sorted(rows), strict=True)
    return ImageFiles.of(paths, image_size), torch.tensor(labels)


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield the paths of all files below the folder, but not in hidden folders.

    Links are followed, but not those that lead back to a folder on the way to them.
    """
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        above = {path.resolve() for path in (Path(parent), *Path(parent).parents)}
        shown = sorted(name for name in folders if not name.startswith("."))
        folders[:] = [name for name in shown if Path(parent, name).resolve() not in above]
        yield from (Path(parent, name) for name in sorted(names))


def _raise(error: OSError) -> None:
    raise error


# --- decoding --------------------------------------------------------------------------------


@contextmanager
def opened(path: str) -> Iterator[Image.Image]:
    """Context manager that yields the image, of which only the head has been read.

    Whatever is wrong with the file, inside as well, is a DataError that names it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.mode[0] in "IF":
                    raise ValueError(f"pixels of mode {image.mode}: save it with 8 bits each")
                yield image
    except Exception as error:  # decoders raise errors of many kinds
        if hardware.is_out_of_memory(error):
            raise
        raise DataError(f"{path}: not an image that can be used: {error}") from error


def decode(path: str) -> Tensor:
    """Return the file's image as uint8 RGB (3, H, W), in memory pixel by pixel.

    Grey images are converted and transparency is dropped. Raises DataError where the file is
    damaged, is no image or has more pixels than Pillow's limit against decompression bombs.
    """
    with opened(path) as image:
        return _pixels(image)


def decode_centre_crop(path: str, size: int) -> Tensor:
    """Return the file's image as it is tested with, uint8 RGB (3, size, size).

    Its shorter side is resized to size·256/224 pixels, and the centre of that is cropped. Raises
    DataError as `decode` does, and where resizing would take too much memory.
    """
    from torchvision.transforms.v2 import functional as F  # slow to import, rarely needed

    with opened(path) as image:
        if max(image.size) * (size * RESIZE_RATIO) ** 2 > Image.MAX_IMAGE_PIXELS * min(image.size):
            raise ValueError(f"{image.width}×{image.height} pixels are too long and thin")
        resized = F.resize(_pixels(image), [round(size * RESIZE_RATIO)], antialias=True)
        return F.center_crop(resized, [size, size])


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def random_crop(image: Tensor, size: int, key: tuple[int, ...]) -> Tensor:
    """Crop (3, H, W) at random, resize that to `size`, and flip it every second time.

    Area and aspect ratio are torchvision's for training. What is drawn is a function of `key`
    alone, and the global random stream is left as it was.
    """
    from torchvision.transforms import RandomResizedCrop
    from torchvision.transforms.v2 import functional as F

    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed_of("crop", *key))  # torchvision's own stream
        box = RandomResizedCrop.get_params(image, list(CROP_AREA), list(CROP_ASPECT))
        flip = torch.rand(()) < 0.5
    crop = F.resized_crop(image, *box, [size, size], antialias=True)
    return crop.flip(2) if flip else crop
