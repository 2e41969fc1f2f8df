import io
import json
import pickle
import re
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import utils
from engine.system.errors import SetupError
from engine.system.io import (
    RUN_FILE_SUFFIXES,
    FileError,
    atomic_write,
    backup_existing,
    check_writable,
    load_tensors,
    load_weights,
    run_lock,
    save_json,
    save_weights,
    torch_load,
)
from models import ConvNet, make_model


def test_saved_weights_are_plain_and_contiguous(tmp_path):
    net = utils.make_net("ConvNet", 10, "cpu")
    save_weights(net, tmp_path / "w.pt")
    state = torch.load(tmp_path / "w.pt", weights_only=True)
    assert list(state) == list(net.state_dict()) and all(t.is_contiguous() for t in state.values())
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]


def test_numbers_that_json_lacks_become_null(tmp_path):
    path = tmp_path / "a.json"
    save_json({"loss": [float("nan"), 1.5, (float("inf"),)], "text": "NaN"}, path)
    assert json.loads(path.read_text()) == {"loss": [None, 1.5, [None]], "text": "NaN"}
    assert "Infinity" not in path.read_text()


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.json"
    save_json({"old": "ü"}, path)

    def half(temporary):
        temporary.write_text("{")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, half)
    assert json.loads(path.read_text()) == {"old": "ü"}
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_in_is_told(tmp_path):
    check_writable(tmp_path / "x.pt")
    check_writable(tmp_path / "missing" / "x.pt")  # it can be made
    with pytest.raises(ValueError, match="is a folder: give the name of a file"):
        check_writable(tmp_path)
    with pytest.raises(ValueError, match="cannot write in .*: File name too long"):
        check_writable(tmp_path / ("x" * 300) / "x.pt")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="not a folder"):
        check_writable(tmp_path / "file" / "x.pt")
    (tmp_path / "file").unlink()
    with pytest.raises(ValueError, match="cannot write"):
        check_writable(Path("/proc/x.pt"))
    assert not list(tmp_path.iterdir())


# --- what is not a file of weights -----------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "w.pt"
    save_weights(ConvNet(), path)
    return path


def test_weights_come_back(saved):
    net, other = ConvNet(), ConvNet()
    load_weights(net, saved)
    load_weights(other, saved)
    torch.testing.assert_close(net.state_dict(), other.state_dict(), rtol=0, atol=0)


class Runs:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("form", ["plain pickle", "torch.save"])
def test_code_in_a_file_is_never_run(form, tmp_path):
    trace, path = tmp_path / "trace", tmp_path / "evil.pt"
    if form == "torch.save":
        torch.save({"layer0.0.weight": Runs(trace)}, path)
    else:
        path.write_bytes(pickle.dumps({"layer0.0.weight": Runs(trace)}, protocol=2))
    with pytest.raises(FileError, match="evil.pt"):
        load_weights(ConvNet(), path)
    assert not trace.exists()


def test_broken_files_are_refused_in_one_line(saved, tmp_path):
    intact = saved.read_bytes()
    flipped = bytearray(intact)
    flipped[len(intact) // 2] ^= 1
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as z:
        z.writestr("hello.txt", "hello")
    cases = {
        "empty": b"",
        "cut": intact[: len(intact) // 2],
        "flipped": bytes(flipped),
        "text": b"these are no weights",
        "zip": archive.getvalue(),
    }
    for name, content in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(FileError) as refused:
            load_weights(ConvNet(), path)
        assert "\n" not in str(refused.value) and str(path) in str(refused.value)
    with pytest.raises(FileError, match="absent"):
        load_weights(ConvNet(), tmp_path / "absent.pt")


@pytest.mark.parametrize(
    "value",
    [
        [1, 2],
        {"layer0.0.weight": 3},
        {"other": torch.zeros(1)},
        {**ConvNet().state_dict(), "classifier.bias": torch.zeros(3)},
        {**ConvNet().state_dict(), 5: torch.zeros(3)},
    ],
)
def test_weights_of_something_else_are_refused_in_one_line(value, tmp_path):
    torch.save(value, tmp_path / "w.pt")
    with pytest.raises(FileError) as refused:
        load_weights(ConvNet(), tmp_path / "w.pt")
    assert "\n" not in str(refused.value) and "w.pt" in str(refused.value)


# --- weights as other tools save them --------------------------------------------------------


def convolution_with_norm():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def prefixed(prefix, state):
    return {prefix + name: t for name, t in state.items()}


OTHER_FORMS = {
    "taken from 'state_dict'": lambda s: {"epoch": 3, "state_dict": s},
    "taken from 'net'": lambda s: {"net": s, "acc": 90.0},
    "taken from 'model', without the prefix 'module.'": lambda s: {"model": prefixed("module.", s)},
    "taken from 'model_state_dict'": lambda s: {"model_state_dict": s, "optimizer": {"lr": 1}},
    "without the prefix '_orig_mod.'": lambda s: prefixed("_orig_mod.", s),
    "without the prefix '_orig_mod.module.'": lambda s: prefixed("_orig_mod.module.", s),
    "taken from 'state_dict', not from 'state_dict_ema'": lambda s: {  # of timm
        "state_dict": s,
        "state_dict_ema": s,
    },
    "without the prefix 'module.module.', without n_averaged": lambda s: (
        {"n_averaged": torch.tensor(7)} | prefixed("module.module.", s)
    ),
    "without the prefix 'model.', without module.criterion and 2 more": lambda s: (
        prefixed("module.", dict.fromkeys(("criterion", "a", "b"), torch.ones(3)))
        | prefixed("model.", s)
    ),
    "renamed": lambda s: {name.replace(".", "._orig_mod."): t for name, t in s.items()},
    "converted from bfloat16": lambda s: {
        name: t.bfloat16() if t.is_floating_point() else t for name, t in s.items()
    },
}


@pytest.mark.parametrize("said", OTHER_FORMS)
@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_other_tools_are_read_and_it_is_said(said, zipped, tmp_path, capsys):
    source, net = convolution_with_norm().bfloat16().float(), convolution_with_norm()
    path = tmp_path / "w.pth"
    content = OTHER_FORMS[said](source.state_dict())
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    load_weights(net, path)
    unchecked = "" if zipped else "in a format without checksums, "
    assert capsys.readouterr().out == f"{path}: weights {unchecked}{said}\n"
    torch.testing.assert_close(net.state_dict(), source.state_dict(), rtol=0, atol=0)
    assert all(p.dtype == torch.float32 for p in net.parameters())


def test_integers_are_not_taken_for_weights(tmp_path):
    net, path = convolution_with_norm(), tmp_path / "w.pt"
    state = net.state_dict()
    torch.save(state | {"0.weight": (100 * state["0.weight"]).to(torch.int8)}, path)
    with pytest.raises(FileError, match=r"w.pt has 0.weight as int8: codes of quantized weights"):
        load_weights(net, path)


def test_a_network_with_a_prefix_of_its_own_keeps_it(tmp_path, capsys):
    net = nn.ModuleDict({"model": convolution_with_norm()})
    save_weights(net, tmp_path / "w.pt")
    load_weights(net, tmp_path / "w.pt")
    assert capsys.readouterr().out == ""


def test_old_names_of_densenets_are_read_as_torchvision_reads_them(tmp_path, capsys):
    net = make_model("torchvision:densenet121", 10)
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|relu|conv))([12]\.)", r"\1.\2", name): t
        for name, t in net.state_dict().items()
    }
    assert old.keys() != net.state_dict().keys()
    torch.save(prefixed("module.", old), tmp_path / "w.pt")
    load_weights(net, tmp_path / "w.pt")
    assert "weights renamed, without the prefix 'module.'" in capsys.readouterr().out


def test_a_module_that_asks_for_its_version_is_loaded(tmp_path):
    class Versioned(nn.Linear):
        _version = 7

        def _load_from_state_dict(self, state, prefix, metadata, *rest):
            if metadata.get("version") != 7:  # as torchvision's MNASNet
                raise ValueError("no version")
            super()._load_from_state_dict(state, prefix, metadata, *rest)

    source, net = (
        nn.Sequential(nn.ModuleDict({"backbone": Versioned(3, 2)}), nn.BatchNorm2d(2))
        for _ in range(2)
    )
    state = source.state_dict()
    del state["1.num_batches_tracked"]  # as before PyTorch 0.4.1
    torch.save(state, tmp_path / "w.pt")
    load_weights(net, tmp_path / "w.pt")
    assert torch.equal(net[0]["backbone"].weight, source[0]["backbone"].weight)
    averaged = torch.optim.swa_utils.AveragedModel(net)
    load_tensors(averaged, averaged.state_dict())


def classifier(n_classes, n_channels=5):
    """A convolution, a classifier and an auxiliary one, as of GoogLeNet."""
    heads = {"fc": nn.Linear(n_channels, n_classes), "aux": nn.Conv2d(n_channels, n_classes, 1)}
    return nn.ModuleDict({"conv": nn.Conv2d(3, n_channels, 1), **heads})


def test_a_file_of_other_classes_gives_all_but_the_heads(tmp_path, capsys):
    path = tmp_path / "w.pt"
    net, source = classifier(4), classifier(7)
    save_weights(nn.ModuleDict({"module": source.half()}), path)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    heads = "fc.weight, fc.bias, aux.weight, aux.bias"
    with pytest.raises(FileError, match=f"w.pt has 7 classes, not 4: --new_head .*{heads}"):
        load_weights(net, path, 4)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    load_weights(net, path, 4, new_head=True)
    [line] = capsys.readouterr().out.splitlines()
    assert line.endswith(f"without {heads}, drawn anew for 4 classes") and "prefix" in line
    for name, t in net.state_dict().items():
        expected = source.state_dict()[name].float() if "conv" in name else before[name]
        torch.testing.assert_close(t, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "other", [classifier(7, 6), nn.Linear(5, 7), nn.ModuleDict({"fc": nn.Linear(5, 7)})]
)
@pytest.mark.parametrize("new_head", [False, True])
def test_a_new_head_is_no_way_out_for_another_network(other, new_head, tmp_path):
    torch.save({**other.state_dict(), "conv.bias": torch.tensor(1.0)}, tmp_path / "w.pt")
    with pytest.raises(FileError, match=r"w.pt is not of this ModuleDict") as refused:
        load_weights(classifier(4), tmp_path / "w.pt", 4, new_head)
    assert "--new_head" not in str(refused.value)


def test_a_new_head_is_no_way_out_where_layers_are_missing(tmp_path):
    source = classifier(7)
    del source["aux"]
    save_weights(source, tmp_path / "w.pt")
    with pytest.raises(FileError, match="is not of this ModuleDict") as refused:
        load_weights(classifier(4), tmp_path / "w.pt", 4)
    assert "--new_head" not in str(refused.value)


def test_a_new_head_that_is_not_needed_is_said(tmp_path, capsys):
    save_weights(classifier(4), tmp_path / "w.pt")
    load_weights(classifier(4), tmp_path / "w.pt", 4, new_head=True)
    [line] = capsys.readouterr().out.splitlines()
    assert line.endswith("weights of 4 classes, so that --new_head has no effect")


def test_safetensors_are_read_and_a_damaged_file_is_one_line(tmp_path):
    safetensors = pytest.importorskip(
        "safetensors.torch", reason="requirements-export.txt is not installed"
    )
    source, net = convolution_with_norm(), convolution_with_norm()
    path = tmp_path / "w.safetensors"
    safetensors.save_file(source.state_dict(), path)
    load_weights(net, path)
    torch.testing.assert_close(net.state_dict(), source.state_dict(), rtol=0, atol=0)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(FileError, match="w.safetensors is damaged"):
        load_weights(net, path)


def test_safetensors_without_its_package_are_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(SetupError, match="w.safetensors needs safetensors: .*requirements-export"):
        load_weights(ConvNet(), tmp_path / "w.safetensors")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_whole_network_is_refused_with_how_to_save_weights(zipped, tmp_path):
    torch.save(ConvNet(), tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(FileError, match=r"torch.save\(net.state_dict\(\), path\) saves weights"):
        load_weights(ConvNet(), tmp_path / "w.pt")


def test_old_files_cannot_unfold_run_code_or_end_early(tmp_path):
    path, trace = tmp_path / "w.pt", tmp_path / "trace"
    old = {"_use_new_zipfile_serialization": False}
    torch.save({"a": torch.zeros(8)}, path, **old)
    content = path.read_bytes()
    for n_cut in range(1, len(content) - 1, 7):
        path.write_bytes(content[:n_cut])
        with pytest.raises(FileError):
            load_weights(ConvNet(), path)
    # its pickle says how many numbers a storage has: 8, as one byte, becomes 2**31 - 1, as four
    assert content.count(b"cpu") == 1
    head, tail = content.split(b"cpu")
    size = tail.index(b"K\x08")
    vast = tail[:size] + b"J\xff\xff\xff\x7f" + tail[size + 2 :]
    path.write_bytes(head + b"cpu" + vast)
    with pytest.raises(FileError, match="its tensors are larger than the file"):
        load_weights(ConvNet(), path)
    torch.save({"layer0.0.weight": Runs(trace)}, path, **old)
    with pytest.raises(FileError, match="w.pt"):
        load_weights(ConvNet(), path)
    assert not trace.exists()


def test_a_file_that_wraps_itself_is_refused(tmp_path):
    content = {}
    content["model"] = content
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(FileError, match="is not a state_dict"):
        load_weights(ConvNet(), tmp_path / "w.pt")


# --- one run to a name -----------------------------------------------------------------------


def test_a_name_is_held_by_one_run_at_a_time(tmp_path):
    with run_lock(tmp_path / "r"):
        with pytest.raises(FileError, match="another run"):
            with run_lock(tmp_path / "r"):
                pass
        with run_lock(tmp_path / "other"):
            pass
    with run_lock(tmp_path / "r"):
        pass
    assert not list(tmp_path.iterdir())


def test_files_of_an_earlier_run_are_kept_and_it_is_said(tmp_path, capsys):
    names = [(tmp_path / "r", suffix) for suffix in RUN_FILE_SUFFIXES]
    for n in (1, 2):
        for suffix in (".pt", ".json", ".ckpt"):
            (tmp_path / f"r{suffix}").write_text(str(n))
        backup_existing(names)
        assert f"r_old{n}" in capsys.readouterr().err
        assert (tmp_path / f"r_old{n}.pt").read_text() == str(n)
    backup_existing(names)
    assert capsys.readouterr().err == "" and len(list(tmp_path.iterdir())) == 6


def test_a_torchscript_archive_is_refused_without_pytorchs_own_warning(tmp_path, recwarn):
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "net.pt")
    recwarn.clear()
    with pytest.raises(FileError, match=r"net\.pt is damaged or not a file of weights"):
        torch_load(tmp_path / "net.pt")
    assert not recwarn
