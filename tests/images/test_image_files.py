import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import tiny_scripts
import torch
from PIL import Image
from torchvision import transforms

import data
import quant_inference
import train
from engine.images import file_loader, image_files
from engine.system.errors import DataError, ImageError

SAMPLES = Path(matplotlib.__file__).parent / "mpl-data" / "sample_data"  # real pictures
CLASSES = {"hopper": "grace_hopper.jpg", "minduka": "Minduka_Present_Blue_Pack.png"}
SIZE = 12


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Two classes of crops of two pictures, of many sizes, 9 for training and 4 for testing."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, file in CLASSES.items():
        picture = Image.open(SAMPLES / file).convert("RGB")
        for split, n in (("train", 9), ("val", 4)):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                x, y, width, height = rng.integers((0, 0, 20, 20), (60, 60, 60, 60))
                crop = picture.crop((x, y, x + width, y + height))
                crop.save(root / split / name / f"{i}.{('png', 'jpg', 'JPEG')[i % 3]}")
    return root


@pytest.fixture
def root(original, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "pictures"))


def load(root, **options):
    return data.load("ImageFolder", str(root), 0, **{"image_size": SIZE, "workers": 0, **options})


def test_links_that_lead_back_are_not_followed(root):
    expected = len(load(root).train_images)
    hopper, minduka = root / "train" / "hopper", root / "train" / "minduka"
    (hopper / "up").symlink_to(root, target_is_directory=True)
    (hopper / "self").symlink_to(hopper, target_is_directory=True)
    assert len(load(root).train_images) == expected
    (hopper / "other").symlink_to(minduka, target_is_directory=True)  # a link like any other
    (minduka / "other").symlink_to(hopper, target_is_directory=True)
    assert len(load(root).train_images) == 2 * expected


def train_loader(d, batch_size=4, **settings):
    options = {"seed": 3, "augment": True, "shuffle": True, **settings}
    return d.make_loader(d.train_images, d.train_labels, batch_size, d.mean, d.std, **options)


def same(a, b):
    a, b = list(a), list(b)
    return len(a) == len(b) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True)
    )


# --- what is found -----------------------------------------------------------------------------


def test_images_and_labels_are_those_of_the_folders_and_mixed(original):
    d = load(original)
    assert d.classes == ("hopper", "minduka") and d.num_classes == 2
    assert d.train_images.shape == (18, 3, SIZE, SIZE) and d.test_images.shape[0] == 8
    paths = [Path(d.train_images.path(i)) for i in range(18)]
    assert sorted(paths) == sorted(p for p in (original / "train").rglob("*") if p.is_file())
    assert [d.classes[y] for y in d.train_labels] == [p.parent.name for p in paths]
    assert 2 < d.train_labels[:9].sum() < 7  # the first N are a sample of both classes
    again = load(original)
    assert [again.train_images.path(i) for i in range(18)] == list(map(str, paths))


def test_order_does_not_depend_on_where_the_folder_is_nor_on_other_files(original, root):
    (root / "train" / "hopper" / "0.png").unlink()
    names = [
        [Path(d.train_images.path(i)).relative_to(r).as_posix() for i in range(len(d.train_labels))]
        for r, d in ((original, load(original)), (root, load(root)))
    ]
    assert names[1] == [name for name in names[0] if name != "train/hopper/0.png"]


def test_hidden_files_and_others_are_skipped_and_counted(root, capsys):
    folder = root / "train" / "hopper"
    (folder / "notes.txt").write_text("not an image")
    (folder / "._0.png").write_bytes(b"what macOS leaves")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "1.png").write_bytes(b"hidden")
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "train" / "README.png").write_bytes(b"in no class")
    (folder / "more").mkdir()
    shutil.copy(folder / "0.png", folder / "more" / "0.png")  # as torchvision: at any depth
    d = load(root)
    assert len(d.train_images) == 19 and d.classes == ("hopper", "minduka")
    assert "2 files are no images and skipped, as " in capsys.readouterr().out


def replace_with(raw):
    def damage(root):
        (root / "train" / "hopper" / "0.png").write_bytes(raw)

    return damage


def png(width, height, mode="RGB"):
    Image.new(mode, (width, height)).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def bomb():
    """The head of a PNG of 60,000 × 60,000 pixels."""
    raw = bytearray(png(1, 1))
    raw[16:24] = (60_000).to_bytes(4) * 2
    raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4)
    return bytes(raw)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: shutil.rmtree(root / "val"), "val: there is no such folder"),
        (lambda root: (root / "val" / "hopper").rename(root / "val" / "cat"),
         "differ in their classes; only in train/: hopper; only in val/: cat"),
        (lambda root: shutil.rmtree(root / "train" / "hopper"), "has 1 class folders"),
        (lambda root: [p.unlink() for p in (root / "val" / "hopper").iterdir()],
         "hopper holds no images"),
        (replace_with(b""), "0.png is empty"),
    ],
)  # fmt: skip
def test_a_folder_that_is_wrong_is_named(root, damage, message):
    damage(root)
    with pytest.raises(DataError, match=message) as caught:
        load(root)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cache", [0, 1])
@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"not an image", "cannot identify"),
        (png(30, 30)[:60], ""),  # cut off
        (bomb(), "decompression bomb"),
        (png(30, 30, "I;16"), "mode I;16: save it with 8 bits"),
    ],
)
def test_a_file_that_is_wrong_is_named(root, raw, message, cache):
    replace_with(raw)(root)
    d = load(root, cache_images=cache)
    with pytest.raises(DataError, match=f"hopper/0.png: not an image.*{message}") as caught:
        list(train_loader(d).batches(0))
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ImageError) == (cache == 0)  # of one rank, or of all


def test_a_long_thin_file_is_refused_where_resizing_it_would_take_all_memory(root):
    replace_with(png(1, 60_000))(root)
    list(train_loader(load(root)).batches(0))
    held = data.use_holdout_as_test(load(root, image_size=64), 17)
    with pytest.raises(DataError, match="1×60000 pixels are too long and thin"):
        held.make_loader(held.test_images, held.test_labels, 4, held.mean, held.std)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_images_of_every_kind_are_rgb(tmp_path, mode):
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    grey.convert(mode).save(path := str(tmp_path / f"x.{'tif' if mode == 'CMYK' else 'png'}"))
    image = image_files.decode(path)
    assert image.shape == (3, 16, 16) and image.dtype == torch.uint8
    if mode != "1":
        assert (image.float() - torch.arange(256.0).view(16, 16)).abs().max() <= 1


# --- pixels ------------------------------------------------------------------------------------


def test_testing_is_torchvisions(original):
    d = load(original, image_size=28)
    loader = d.make_loader(d.test_images, d.test_labels, 3, d.mean, d.std, cache=True)
    x = torch.cat([x for x, _ in loader.batches(0)])
    usual = transforms.Compose(
        [
            transforms.Resize(32),
            transforms.CenterCrop(28),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    for i, got in enumerate(x):
        expected = usual(Image.open(d.test_images.path(i)).convert("RGB"))
        assert (got - expected).abs().max() * min(d.std) * 255 < 1.01  # Pillow rounds otherwise


def test_training_is_torchvisions_with_our_random_numbers(original):
    image = image_files.decode(str(original / "train" / "hopper" / "1.jpg"))
    usual = transforms.Compose(
        [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip()]
    )
    state, crops = torch.get_rng_state(), []
    for position in range(6):
        crops.append(image_files.random_crop(image, SIZE, (3, 1, position)))
        assert torch.equal(torch.get_rng_state(), state)
        with torch.random.fork_rng():
            torch.manual_seed(image_files.seed_of("crop", 3, 1, position))
            difference = usual(image).int() - crops[-1].int()
        assert difference.abs().max() <= 1  # it rounds otherwise
    assert len({crop.numpy().tobytes() for crop in crops}) == 6


# --- batches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n_workers, cache", [(1, 0), (2, 1)])
def test_batches_depend_on_neither_workers_nor_cache(original, n_workers, cache):
    expected = [list(train_loader(load(original)).batches(epoch)) for epoch in (0, 1)]
    d = load(original, workers=n_workers, cache_images=cache)
    loader, state = train_loader(d), torch.get_rng_state()
    assert (loader.decoded is None) == (cache == 0)
    for epoch in (0, 1):
        assert same(loader.batches(epoch), expected[epoch])
    assert same(loader.batches(1, 3), expected[1][3:])
    assert same(loader.batches(0, 1, 2), expected[0][1::2])
    half = loader.batches(1)
    next(half)
    half.close()  # as where a run is stopped
    assert same(loader.batches(0), expected[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert not same(expected[0], expected[1])
    labels = torch.cat([y for _, y in expected[1]])
    assert labels.sort().values.tolist() == d.train_labels.sort().values.tolist()


@pytest.mark.parametrize("world_size", [2, 5])
def test_the_shares_of_all_ranks_make_the_batch(original, world_size):
    d = load(original)
    whole = list(train_loader(d).batches(2))
    shares = [
        list(train_loader(d, rank=rank, world_size=world_size).batches(2))
        for rank in range(world_size)
    ]
    joined = [map(torch.cat, zip(*parts, strict=True)) for parts in zip(*shares, strict=True)]
    assert same(map(tuple, joined), whole)


def test_labels_go_with_their_images(original):
    d = load(original)
    by_pixels = {
        image_files.decode_centre_crop(d.train_images.path(i), SIZE).numpy().tobytes(): y
        for i, y in enumerate(d.train_labels.tolist())
    }
    unscaled = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}
    loader = d.make_loader(d.train_images, d.train_labels, 5, **unscaled, shuffle=True, seed=1)
    for x, y in loader.batches(4):
        for image, label in zip(x.to(torch.uint8), y.tolist(), strict=True):
            assert by_pixels[image.numpy().tobytes()] == label


@pytest.mark.parametrize("cache", [0, 1])
def test_images_for_testing_are_the_same_kept_or_not(original, cache):
    d = load(original, cache_images=cache, workers=cache)
    settings = {"cache": True, "memory_format": torch.channels_last}
    loader = d.make_loader(d.test_images, d.test_labels, 3, d.mean, d.std, **settings)
    assert isinstance(loader, file_loader.FileLoader) == (cache == 0)
    first = list(loader.batches(0))
    crops = [image_files.decode_centre_crop(d.test_images.path(i), SIZE) for i in range(8)]
    expected = transforms.functional.normalize(torch.stack(crops) / 255, d.mean, d.std)
    torch.testing.assert_close(torch.cat([x for x, _ in first]), expected, atol=2e-6, rtol=0)
    assert same(loader.batches(0, 1, 2), first[1::2])


def test_subset_and_holdout_of_files(original):
    d = load(original)
    held = data.use_holdout_as_test(d, 5)
    assert held.test_images.path(0) == d.train_images.path(13) and len(held.train_images) == 13
    assert torch.equal(held.test_labels, d.train_labels[13:])
    first = data.subset(held, 4)
    assert first.train_images.shape == (4, 3, SIZE, SIZE) and len(first.test_images) == 5
    assert len(list(train_loader(first, 3).batches(0))) == 2


# --- the scripts -------------------------------------------------------------------------------

TINY = (
    "--model TinyFused --lr 0.01 --batch_size 4 --precision fp32 --no-compile --device cpu".split()
)


def flags(root, *more):
    return ["--dataset", "ImageFolder", "--data_dir", str(root), "--image_size", str(SIZE), *more]


def test_a_folder_is_trained_on_resumed_and_quantized(original, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common = [*TINY, *flags(original, "--holdout", "4", "--train_subset", "10"), "--n_epochs", "2"]
    train.main([*common, "--run_name", "r", "--workers", "0"])
    record = json.loads(Path("r.json").read_text())
    assert record["classes"] == ["hopper", "minduka"] and len(record["history"]) == 2
    assert torch.load("r.pt")["linear.weight"].shape == (2, 6)

    again = [*common, "--run_name", "r", "--resume"]
    train.main([*again, "--workers", "1", "--cache_images", "0"])
    with pytest.raises(SystemExit) as refused:
        train.main([*again, "--workers", "0", "--image_size", "16"])
    assert refused.value.code == 1 and "(--image_size)" in capsys.readouterr().err

    quantize = ["r.pt", "--data_dir", str(original), "--workers", "0", "--no_plots"]
    quantize += ["--bits", "4", "--act_bits", "8", "--recalibrate_bn_images", "10"]
    with pytest.raises(SystemExit) as done:
        quant_inference.main([*quantize, "--calibration_images", "6"])
    assert done.value.code == 0
    results = json.loads(Path("results.json").read_text())
    assert results["settings"]["image_size"] == SIZE
    assert len(results["rows"]) == 4 and all(0 <= row["accuracy"] <= 1 for row in results["rows"])


def run(folder, *arguments):
    """Start train.py with a tiny network in the folder, in a session of its own."""
    command = [sys.executable, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(folder / "log", "ab") as log:
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )


def has_ended(process):
    """Tell whether no process of this session is left but the zombie of its leader."""
    states = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[3]) == process.pid:
            states.append(fields[0])
    return set(states) <= {"Z"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_stopped_in_an_epoch_ends_in_the_same_weights(original, tmp_path, how):
    """By SIGKILL of the training alone, or by SIGTERM of its workers, too, as clusters send it."""
    script = [tiny_scripts.__file__, "train.py", *TINY, *flags(original), "--n_epochs", "40"]
    assert run(tmp_path, *script, "--run_name", "whole").wait(300) == 0
    stopped = [*script, "--run_name", "stopped", "--checkpoint_minutes", "0.0001"]
    process = run(tmp_path, *stopped, "--cache_images", "0")
    while not (tmp_path / "stopped.ckpt").exists():
        time.sleep(0.01)
    if how == signal.SIGKILL:
        process.kill()
    else:
        os.killpg(process.pid, how)
    assert process.wait(60) == (-how if how == signal.SIGKILL else 128 + how)
    deadline = time.monotonic() + 2  # its workers, which would hold its lock, end with it
    while not has_ended(process):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert run(tmp_path, *stopped, "--resume", "--workers", "1").wait(300) == 0
    assert "resuming at epoch" in (tmp_path / "log").read_text()
    whole, resumed = (torch.load(tmp_path / f"{name}.pt") for name in ("whole", "stopped"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.slow
def test_two_processes_train_what_one_does(original, tmp_path):
    script = [tiny_scripts.__file__, "train.py", *TINY, *flags(original), "--n_epochs", "2"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    assert run(tmp_path, *script, "--run_name", "one").wait(300) == 0
    assert run(tmp_path, *torchrun, *script, "--run_name", "two").wait(300) == 0
    one, two = (torch.load(tmp_path / f"{name}.pt") for name in ("one", "two"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-5)
