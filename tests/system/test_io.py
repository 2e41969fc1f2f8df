import io
import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

import utils
from engine.system.io import (
    RUN_FILE_SUFFIXES,
    FileError,
    atomic_write,
    backup_existing,
    check_writable,
    load_weights,
    run_lock,
    save_json,
    save_weights,
)
from models import ConvNet


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
