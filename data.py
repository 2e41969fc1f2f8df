"""The data sets. To add one: a function that returns an ImageDataset, and a line in DATASETS.

The function takes (data_dir, seed). A data set is held in memory as uint8.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from engine import cifar10 as cifar10_files
from engine.errors import DataError
from engine.loader import seeded_generator

PROJECT_DATA = Path(__file__).with_name("data")  # where --data_dir is by default
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


@dataclass(frozen=True)
class ImageDataset:
    """A data set in memory: uint8 images (N, 3, 32, 32), int64 labels (N,).

    `mean` and `std` are per channel, of pixels scaled to 0..1.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int = 10
    mean: tuple[float, ...] = CIFAR_MEAN
    std: tuple[float, ...] = CIFAR_STD


def cifar10(data_dir: str, seed: int = 0) -> ImageDataset:
    """Find or fetch CIFAR-10: 50,000 training and 10,000 test images (`seed` is not used).

    Raises DataError where no source worked; the message lists what was tried.
    """
    return ImageDataset(*cifar10_files.find_or_fetch(data_dir, PROJECT_DATA))


def synthetic(data_dir: str = "", seed: int = 0) -> ImageDataset:
    """Make 2,000 training and 250 test images in memory from the seed (`data_dir` is not used).

    Each of the ten classes is a smooth colour pattern, shifted at random, faint under noise. The
    patterns are the same for every seed: what is trained with one can be tested with another.
    """
    generator = seeded_generator("synthetic", seed)
    patterns = torch.randn(10, 3, 5, 5, generator=seeded_generator("patterns"))
    patterns = F.interpolate(patterns, size=(40, 40), mode="bicubic")
    windows = patterns.unfold(2, 32, 1).unfold(3, 32, 1)  # (10, 3, 9, 9, 32, 32)

    def split(n: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(n) % 10
        dy, dx = torch.randint(0, 9, (2, n), generator=generator)
        noise = torch.randn(n, 3, 32, 32, generator=generator)
        images = 128 + 24 * windows[labels, :, dy, dx] + 48 * noise
        return images.round().clamp(0, 255).to(torch.uint8), labels

    return ImageDataset(*split(2000), *split(250), mean=(0.5,) * 3, std=(0.2,) * 3)


DATASETS: dict[str, Callable[[str, int], ImageDataset]] = {
    "CIFAR10": cifar10,
    "Synthetic": synthetic,
}


def load(name: str, data_dir: str, seed: int) -> ImageDataset:
    """Return the data set called `name`, a key of `DATASETS`.

    Raises:
        DataError: there is no such data set, or it is missing and could not be fetched.
    """
    if name not in DATASETS:
        raise DataError(f"unknown data set {name!r}; there are {', '.join(DATASETS)}")
    return DATASETS[name](data_dir, seed)


def subset(data: ImageDataset, n: int) -> ImageDataset:
    """Keep the first `n` training images, in the given order; the test set stays whole.

    Raises:
        ValueError: n < 1 or more than there are.
    """
    if not 1 <= n <= len(data.train_images):
        raise ValueError(f"choose 1 to {len(data.train_images)} images")
    return replace(data, train_images=data.train_images[:n], train_labels=data.train_labels[:n])


def test_subset(data: ImageDataset, n: int) -> ImageDataset:
    """Keep the first `n` test images, in the given order; the training set stays whole.

    Raises:
        ValueError: n < 1 or more than there are.
    """
    if not 1 <= n <= len(data.test_images):
        raise ValueError(f"choose 1 to {len(data.test_images)} images")
    return replace(data, test_images=data.test_images[:n], test_labels=data.test_labels[:n])


def use_holdout_as_test(data: ImageDataset, n: int) -> ImageDataset:
    """Make the last `n` training images the test set, for choices that must not see the real one.

    Raises:
        ValueError: n < 1, or no training image would be left.
    """
    if not 1 <= n < len(data.train_images):
        raise ValueError(f"choose 1 to {len(data.train_images) - 1} images")
    with_holdout = replace(
        data, test_images=data.train_images[-n:], test_labels=data.train_labels[-n:]
    )
    return subset(with_holdout, len(data.train_images) - n)
