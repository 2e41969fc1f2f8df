"""Atomic writes of weights and records, safe reading, and one lock per run name."""

import errno
import glob
import json
import os
import pickle
import re
import sys
import tempfile
import textwrap
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock
import torch
from torch import Tensor, nn

from engine.system import distributed
from engine.system.errors import FileError, ReportedError
from engine.system.extras import require

MAX_NAME_BYTES = 255  # of a file, on the file systems in use
RESERVED_NAME_BYTES = 40  # for suffixes and temporary names
NO_LOCKS_HERE = (errno.ENOLCK, errno.EOPNOTSUPP)  # what some network file systems answer
MAX_REASON = 160  # characters of a library's own message in an error


def check_writable(path: Path) -> None:
    """Raise ValueError, naming the folder, unless rank 0 can create or replace a file at path."""
    if distributed.get_rank():
        return
    folder = path.parent
    try:
        while not folder.exists():  # it will be made
            folder = folder.parent
        if not folder.is_dir():
            raise ValueError(f"{path}: {folder} is not a folder")
        longest = MAX_NAME_BYTES - RESERVED_NAME_BYTES
        if len(os.fsencode(path.name)) > longest:
            raise ValueError(f"{path}: the name is longer than {longest} bytes")
        if path.is_dir():
            raise ValueError(f"{path} is a folder: give the name of a file")
        with tempfile.TemporaryFile(dir=folder):  # which has no name to leave behind
            pass
    except OSError as error:
        raise ValueError(f"{path}: cannot write in {folder}: {error.strerror}") from error


@contextmanager
def warn_on_error(consequence: str) -> Iterator[None]:
    """Context manager that prints an OSError or FileError as one line, "consequence: error"."""
    try:
        yield
    except (OSError, FileError) as error:
        with suppress(OSError):  # where stderr itself is what failed
            print(f"{consequence}: {error}", file=sys.stderr)


@contextmanager
def file_boundary(name: str | Path, problem: str = "is not what was saved there") -> Iterator[None]:
    """Context manager in which whatever a damaged, hostile or foreign file leads to is a FileError.

    Its message is one line: the `name` of the file or of a part of it, the `problem`, and a reason.
    Readers parse inside as if every file were our own: this is the one place that knows better.
    """
    try:
        yield
    except Exception as error:  # each library raises its own kinds, torch alone a dozen
        if isinstance(error, ReportedError):
            raise
        if isinstance(error, OSError) and error.strerror:  # the file cannot be read at all
            raise FileError(f"{name}: {error.strerror}") from error
        raise FileError(f"{name} {problem}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return what a library says is wrong, as one short line."""
    if isinstance(error, pickle.UnpicklingError):
        return (
            "it is text, or holds more than tensors and numbers, such as a whole network: "
            "torch.save(net.state_dict(), path) saves weights"
        )
    if isinstance(error, KeyError):
        is_byte = error.args and isinstance(error.args[0], int)  # that pickle has no meaning for
        return "it is not of PyTorch" if is_byte else f"no {error}"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return textwrap.shorten(lines[-1], MAX_REASON, placeholder=" …")  # there PyTorch names a tensor


@contextmanager
def read_json(path: Path) -> Iterator[Any]:
    """Context manager that yields the content of a JSON file.

    A missing file, and whatever error a wrong content leads to inside, is a FileError naming it.
    """
    with file_boundary(path):
        yield json.loads(path.read_text(encoding="utf-8"))


def atomic_write(path: Path, write: Callable[[Path], None], backup: Path | None = None) -> None:
    """Call write(temporary path in the same folder), flush to disk, and rename to path.

    At every moment path holds the old content or the new one, whole, or, with `backup`, the old one
    is whole under that name. Of several processes rank 0 writes. Raises OSError.
    """
    if distributed.get_rank():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if backup and path.exists():
            os.replace(path, backup)
        os.replace(temporary, path)
        with suppress(OSError):  # where the system can, renames are to survive a power cut
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)  # "No space left on device" alone does not say where
        raise
    finally:
        with suppress(OSError):
            temporary.unlink()


def torch_save(value: Any, path: Path) -> None:
    """Write what torch.save can pickle; a full disk is an OSError, as for any other file."""
    try:
        torch.save(value, path)
    except RuntimeError as error:  # what torch makes of a failed write
        reason = str(error).splitlines()[0]
        raise OSError(f"cannot write {path} (is the disk full?): {reason}") from error


def torch_load(path: Path) -> Any:
    """Read onto the CPU what torch.save wrote: tensors and plain containers, with checksums.

    PyTorch before 1.6 wrote no zip files, and no checksums; a .safetensors file has none either.
    No code in the file is ever run, and it cannot unfold to more than its size. Raises FileError,
    in one line, for whatever is wrong.
    """
    what = "checkpoint" if ".ckpt" in path.suffixes else "file of weights"
    with file_boundary(path, f"is damaged or not a {what}"):
        if path.suffix == ".safetensors":
            return require("safetensors.torch", path.name).load_file(path)
        n_free = path.stat().st_size  # bytes of the file that no storage has taken yet

        def on_cpu(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
            nonlocal n_free  # for files of before 1.6, memory is set aside before it is filled
            n_free -= storage.nbytes()
            if n_free < 0:
                raise ValueError("its tensors are larger than the file")
            return storage

        if _is_zip(path):
            with zipfile.ZipFile(path) as archive:  # torch itself checks no checksum
                if sum(member.file_size for member in archive.infolist()) > n_free:
                    raise ValueError("torch.save compresses nothing")
                if damaged := archive.testzip():
                    raise ValueError(f"checksum of {damaged!r}")
        with warnings.catch_warnings(action="ignore"):  # of TorchScript, which is then refused
            return torch.load(path, map_location=on_cpu, weights_only=True)


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"  # as torch itself decides it


def save_weights(net: nn.Module, path: Path) -> None:
    """Write the network's state_dict, contiguous and on the CPU, as a plain .pt file."""
    state = {key: t.detach().cpu().contiguous() for key, t in net.state_dict().items()}
    atomic_write(path, lambda temporary: torch_save(state, temporary))


def save_json(value: object, path: Path) -> None:
    """Write value as readable JSON; numbers that are not finite, which JSON lacks, become null."""
    finite = json.loads(json.dumps(value), parse_constant=lambda name: None)
    text = json.dumps(finite, indent=2, ensure_ascii=False) + "\n"
    content = text.encode(errors="backslashreplace")  # a file name need not be Unicode
    atomic_write(path, lambda temporary: temporary.write_bytes(content))


def load_weights(
    net: nn.Module, path: Path, num_classes: int | None = None, new_head: bool = False
) -> None:
    """Read a file of weights, or the weights in a .ckpt, into the network.

    Other tools wrap, name and round them in their own ways: what had to be undone is printed in one
    line. With `new_head` the layers that end in the network's `num_classes`, where the file has
    another number of classes, keep the weights they have. Raises FileError, in one line, where they
    are not of that network; with `num_classes` it names --new_head where that would help.
    """
    state = torch_load(path)
    undone = [] if _is_zip(path) else ["in a format without checksums"]
    if isinstance(state, dict) and not _is_state_dict(state):
        wrapper = next((w for w in WRAPPERS if isinstance(state.get(w), dict)), None)
        if wrapper and "format" not in state:  # a .ckpt of our own has one
            others = [k for k, v in state.items() if k != wrapper and v and _is_state_dict(v)]
            beside = f", not from {', '.join(map(repr, others))}" if others else ""
            undone.append(f"taken from {wrapper!r}{beside}")
        state = state.get(wrapper, state)
    if not _is_state_dict(state):
        raise FileError(f"{path} is not a state_dict: a file of named real tensors")
    own = net.state_dict()
    state, renamed = _renamed(dict(state), own)  # without _metadata, which may hold anything
    own_dtypes = {t.dtype for t in own.values()}
    dtypes = {t.dtype for t in state.values() if t.is_floating_point()} - own_dtypes
    undone += [*renamed, *sorted(f"converted from {d}".replace("torch.", "") for d in dtypes)]
    if codes := [k for k, t in state.items() if k in own and _are_codes(t, own[k])]:
        dtype = str(state[codes[0]].dtype).removeprefix("torch.")
        raise FileError(
            f"{path} has {codes[0]} as {dtype}: codes of quantized weights without what one of "
            "them stands for; save their values, in floating point"
        )
    heads = _heads(state, own, num_classes)
    if heads and not new_head:
        classes = f"{len(state[heads[0]])} classes, not {num_classes}"
        raise FileError(f"{path} has {classes}: --new_head takes all but {', '.join(heads)}")
    if heads:
        undone.append(f"without {', '.join(heads)}, drawn anew for {num_classes} classes")
    elif new_head:
        undone.append(f"of {num_classes} classes, so that --new_head has no effect")
    state |= {name: own[name] for name in heads}
    kind = type(net).__name__
    with file_boundary(path, f"is not of this {kind}{_made_for(path, kind)}"):
        load_tensors(net, state)  # which converts
    if undone:
        print(f"{path}: weights {', '.join(undone)}")


def load_tensors(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state_dict as one of the modules' own versions, which torchvision's MNASNet asks for.

    What a file says about versions is left out: that may be anything. Batch norms have none, so
    that files from before they counted batches are read.
    """
    state = OrderedDict(state)
    state._metadata = {
        name: version
        for name, version in net.state_dict()._metadata.items()
        if not isinstance(net.get_submodule(name), nn.modules.batchnorm._BatchNorm)
    }
    net.load_state_dict(state)


WRAPPERS = ("state_dict", "model_state_dict", "model", "net")  # keys under which weights lie
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")  # DataParallel, torch.compile, Lightning
# torchvision's DenseNets were saved with names that PyTorch no longer allows
OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.(?=[12]\.)")


def _is_state_dict(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(t, Tensor) and not t.is_complex()
        for name, t in value.items()
    )


def _renamed(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict, list[str]]:
    """Return the weights under the network's `own` names, if a way is known, and what it took."""
    done = []
    if state.keys() != own.keys():
        renamed = {OLD_DENSENET.sub(r"\1", name): t for name, t in state.items()}
        renamed = {name.replace("._orig_mod.", "."): t for name, t in renamed.items()}
        done = ["renamed"] if renamed.keys() != state.keys() else []
        state = renamed
    if state.keys() & own.keys():
        return state, done
    candidates = dict.fromkeys(prefix for name in state for prefix in _prefixes(name))
    # the whole network, beside others such as a criterion or PyTorch's n_averaged, or all there is
    whole = (p for p in candidates if all(p + name in state for name in own))
    shared = (p for p in reversed(candidates) if all(name.startswith(p) for name in state))
    if prefix := next(whole, None) or next(shared, None):
        others = [name for name in state if not name.startswith(prefix)]
        state = {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        left_out = [f"without {others[0]}{more}"] if others else []
        done += [f"without the prefix {prefix!r}", *left_out]
    return state, done


def _prefixes(name: str) -> Iterator[str]:
    """Yield what tools may have put before a network's own name: one of PREFIXES, two, …"""
    prefix = ""
    while (part := f"{name.removeprefix(prefix).partition('.')[0]}.") in PREFIXES:
        prefix += part
        yield prefix


def _are_codes(t: Tensor, own: Tensor) -> bool:
    """Tell whether a tensor holds small whole numbers where the network has others."""
    return own.is_floating_point() and t.dtype in (torch.int8, torch.uint8, torch.int32)


def _heads(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], num_classes: int | None
) -> list[str]:
    """Return which tensors differ in shape, if nothing else differs but the number of classes."""
    if state.keys() != own.keys():
        return []
    shapes = {k: (t.shape, own[k].shape) for k, t in state.items()}
    differing = {k: pair for k, pair in shapes.items() if pair[0] != pair[1]}
    changes = {
        (a[:1], b[:1]) if len(a) and a[1:] == b[1:] and b[:1] == (num_classes,) else None
        for a, b in differing.values()
    }
    return list(differing) if len(changes) == 1 and None not in changes else []


def _made_for(path: Path, kind: str) -> str:
    """Return which other network the record beside a .pt file names, to end an error's line."""
    record = path.with_suffix(".json")
    with suppress(FileError), read_json(record) as content:
        model = content["settings"]["model"]
        if isinstance(model, str) and model.isprintable() and model != kind:
            return f" but made for {model} ({record.name}), --model {model}"
    return ""


# --- one run per name ------------------------------------------------------------------------

RUN_FILE_SUFFIXES = (".pt", ".json", ".ckpt", ".ckpt.previous", "_preregul.pt")


@contextmanager
def run_lock(
    out: Path, instead: str = "another --run_name or --save_file", wait: float = 0
) -> Iterator[None]:
    """Context manager that holds <out>.lock and removes what a killed run left half-written.

    The system frees the lock of a process that dies. Of several processes rank 0 has it. FileError
    where another run still has it after `wait` seconds, with `instead` as the remedy; OSError where
    it cannot be created.
    """
    if distributed.get_rank():
        yield
        return
    path = Path(f"{out}.lock")
    lock = filelock.FileLock(path, timeout=wait)
    try:
        lock.acquire()
    except OSError as error:
        if isinstance(error, filelock.Timeout):
            reason = f"another run is writing to {out}: wait for it, or give this one {instead}"
            raise FileError(reason) from error
        if error.errno not in NO_LOCKS_HERE:
            raise
        print(f"{path}: this file system has no locks: start this run only once", file=sys.stderr)
    try:
        for suffix in RUN_FILE_SUFFIXES:
            pattern = f".{glob.escape(out.name)}{suffix}.[0-9]*.tmp"
            for temporary in path.parent.glob(pattern):
                temporary.unlink(missing_ok=True)
        yield
    finally:
        with suppress(OSError):  # Windows removes it when it is released
            path.unlink()
        lock.release()


def backup_existing(names: Sequence[tuple[Path, str]]) -> None:
    """Rename existing files, each (name, suffix), so that they are not overwritten; print one line.

    name.suffix becomes name_old1.suffix, or the next free number, the same for all.
    """
    present = [(name, s) for name, s in names if os.path.lexists(f"{name}{s}")]
    if not present:
        return
    n = 1
    while any(os.path.lexists(f"{name}_old{n}{s}") for name, s in names):
        n += 1
    for name, s in present:
        os.replace(f"{name}{s}", f"{name}_old{n}{s}")
    first = present[0][0]
    hint = "; --resume continues a run" if (first, ".ckpt") in present else ""
    print(f"{first}: the files of an earlier run are kept as {first}_old{n}{hint}", file=sys.stderr)
