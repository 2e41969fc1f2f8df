"""The data sets. To add one: a function that returns an ImageDataset, and a line in DATASETS.

The function takes (data_dir, seed), and those of OPTIONS that have an effect on it.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.images import cifar, file_loader
from engine.images.image_files import ImageFiles, check_same_classes, find_classes, find_images
from engine.images.loader import Loader, seeded_generator
from engine.system.errors import DataError

PROJECT_DATA = Path(__file__).with_name("data")  # where --data_dir is by default
# mean and standard deviation of each channel, of pixels scaled to 0..1
CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2023, 0.1994, 0.2010)
CIFAR100_MEAN = (0.5071, 0.4865, 0.4409)
CIFAR100_STD = (0.2673, 0.2564, 0.2762)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGE_SIZE, WORKERS, CACHE_GB = 224, 2, 4.0  # defaults of the flags of ImageFolder
OPTIONS = ("image_size", "workers", "cache_images")  # flags that data sets can take

CIFAR10_CLASSES = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())
CIFAR100_CLASSES = tuple(
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus "
    "butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch "
    "crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo "
    "keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse "
    "mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy "
    "porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper "
    "snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television "
    "tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm".split()
)


@dataclass(frozen=True)
class ImageDataset:
    """A data set: uint8 images (N, 3, H, W) in memory or in files, int64 labels (N,).

    `mean` and `std` are per channel, of pixels scaled to 0..1. `classes` are names, where there are
    any. `make_loader` makes batches: it has the arguments of `engine.images.loader.Loader`.
    """

    train_images: Tensor | ImageFiles
    train_labels: Tensor
    test_images: Tensor | ImageFiles
    test_labels: Tensor
    num_classes: int = 10
    mean: tuple[float, ...] = CIFAR_MEAN
    std: tuple[float, ...] = CIFAR_STD
    classes: tuple[str, ...] = ()
    make_loader: Callable[..., Loader] = Loader


def cifar10(data_dir: str, seed: int = 0) -> ImageDataset:
    """Find or fetch CIFAR-10: 50,000 training and 10,000 test images (`seed` is not used).

    Raises DataError where no source worked; the message lists what was tried.
    """
    arrays = cifar.find_or_fetch(cifar.CIFAR10, data_dir, PROJECT_DATA)
    return ImageDataset(*arrays, classes=CIFAR10_CLASSES)


def cifar100(data_dir: str, seed: int = 0) -> ImageDataset:
    """Find or fetch CIFAR-100 with its 100 fine labels, otherwise as `cifar10` does."""
    arrays = cifar.find_or_fetch(cifar.CIFAR100, data_dir, PROJECT_DATA)
    return ImageDataset(*arrays, 100, CIFAR100_MEAN, CIFAR100_STD, CIFAR100_CLASSES)


def image_folder(
    data_dir: str,
    seed: int = 0,
    image_size: int = IMAGE_SIZE,
    workers: int = WORKERS,
    cache_images: float = CACHE_GB,
) -> ImageDataset:
    """Find images in data_dir/train/CLASS/ and data_dir/val/CLASS/ (`seed` is not used).

    `workers` processes decode them to `image_size` pixels; they stay in memory where they take no
    more than `cache_images` GB. Raises DataError, naming the file or folder that is wrong.
    """
    train, test = Path(data_dir, "train"), Path(data_dir, "val")
    classes = find_classes(train)
    check_same_classes(classes, find_classes(test), Path(data_dir))
    return ImageDataset(
        *find_images(train, classes, image_size),
        *find_images(test, classes, image_size),
        num_classes=len(classes),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        classes=tuple(classes),
        make_loader=partial(file_loader.make_loader, workers=workers, max_gb=cache_images),
    )


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


DATASETS: dict[str, Callable[..., ImageDataset]] = {
    "CIFAR10": cifar10,
    "CIFAR100": cifar100,
    "ImageFolder": image_folder,
    "Synthetic": synthetic,
}


CLASSES = {"CIFAR10": CIFAR10_CLASSES, "CIFAR100": CIFAR100_CLASSES}  # known without the images


def accepts(name: str, option: str) -> bool:
    """Tell whether the data set takes that one of OPTIONS."""
    return option in inspect.signature(DATASETS[name]).parameters


def is_seeded(name: str) -> bool:
    """Tell whether the images of a data set depend on the seed."""
    return name == "Synthetic"


def load(name: str, data_dir: str, seed: int, **options: Any) -> ImageDataset:
    """Return the data set of that name, a key of `DATASETS`, with those options that it takes.

    Raises DataError where there is no such data set, or it is missing and could not be fetched.
    """
    if name not in DATASETS:
        raise DataError(f"unknown data set {name!r}; there are {', '.join(DATASETS)}")
    accepted = {key: value for key, value in options.items() if accepts(name, key)}
    return DATASETS[name](data_dir, seed, **accepted)


def check_dataset(name: str, dataset: ImageDataset) -> None:
    """Raise DataError, saying what is wrong, where a data set is not what training takes."""

    def require(is_so: object, what: str) -> None:
        if not is_so:
            raise DataError(f"data set {name}: {what}")

    found = type(dataset).__name__
    require(isinstance(dataset, ImageDataset), f"its function returns a {found}, no ImageDataset")
    for part in ("train", "test"):
        images, labels = (getattr(dataset, f"{part}_{kind}") for kind in ("images", "labels"))
        is_tensor = isinstance(images, Tensor)
        dtype = getattr(images, "dtype", type(images).__name__)
        is_image = isinstance(images, ImageFiles) or (is_tensor and dtype == torch.uint8)
        require(is_image, f"{part}_images are of {dtype}: uint8 (N, 3, H, W), 0 to 255")
        require(not is_tensor or images.dim() == 4, f"{part}_images are no (N, 3, H, W)")
        n = len(images)
        require(n, f"it has no {part}_images")
        dtype = getattr(labels, "dtype", type(labels).__name__)
        require(
            dtype == torch.int64, f"{part}_labels are of {dtype}: int64, a class for each image"
        )
        require(labels.shape == (n,), f"{part}_labels are {tuple(labels.shape)}, not ({n},)")
        low, high, last = int(labels.min()), int(labels.max()), dataset.num_classes - 1
        require(0 <= low <= high <= last, f"{part}_labels are from {low} to {high}: 0 to {last}")
    for value in (*dataset.mean, *dataset.std):
        require(0 <= value <= 1, f"mean and std are of pixels scaled to 0 … 1, not {value:g}")
    require(all(dataset.std), "std has a 0")


def subset(data: ImageDataset, n: int, part: str = "train") -> ImageDataset:
    """Keep the first `n` images of a part, "train" or "test"; ValueError where it has fewer."""
    fields = f"{part}_images", f"{part}_labels"
    n_images = len(getattr(data, fields[0]))
    if not 1 <= n <= n_images:
        raise ValueError(f"choose 1 to {n_images} images")
    return replace(data, **{field: getattr(data, field)[:n] for field in fields})


def use_holdout_as_test(data: ImageDataset, n: int) -> ImageDataset:
    """Make the last `n` training images the test set, for choices that must not see the real one.

    Raises ValueError where n < 1, or no training image would be left.
    """
    if not 1 <= n < len(data.train_images):
        raise ValueError(f"choose 1 to {len(data.train_images) - 1} images")
    held_out = {"test_images": data.train_images[-n:], "test_labels": data.train_labels[-n:]}
    return subset(replace(data, **held_out), len(data.train_images) - n)
