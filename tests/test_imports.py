import ast
import importlib
import sys
from pathlib import Path

import fork_server
import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for pattern in ("*.py", "engine/**/*.py", "analysis/**/*.py")
    for path in ROOT.glob(pattern)
    if path.stem != "__init__"
)
BENCHMARKS = sorted(path.stem for path in (ROOT / "benchmarks").glob("[!_]*.py"))
POSIX_ONLY = ("fcntl", "pwd", "resource", "termios")


def import_alone(module):
    import torch

    assert sys.modules.keys().isdisjoint(MODULES)
    before = torch.get_rng_state()
    importlib.import_module(module)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.sampled(4)
def test_each_module_imports_alone_and_without_side_effects(module, tmp_path):
    completed = fork_server.call(import_alone, module, cwd=tmp_path)
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout == "" and not list(tmp_path.iterdir())


# Rooms of the engine: each may import from itself and those before it.
ROOMS = "system images networks step quantization training deploy".split()


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_of_the_engine_import_only_those_below_them(room):
    allowed = {"engine", *(f"engine.{name}" for name in ROOMS[: ROOMS.index(room) + 1])}
    for path in (ROOT / "engine" / room).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom):
                continue
            top = node.module.split(".")[0]
            is_own = top in ("engine", "analysis") or (ROOT / f"{top}.py").exists()
            assert not is_own or ".".join(node.module.split(".")[:2]) in allowed, (
                path,
                node.module,
            )


def import_benchmark(name):
    importlib.import_module(name)


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.sampled(3)
def test_each_benchmark_imports(name, tmp_path):
    completed = fork_server.call(import_benchmark, name, cwd=tmp_path)
    assert completed.returncode == 0, completed.stderr


def train_without_posix(modules, script, flags):
    """Import everything and run a script as if on a system that lacks what only POSIX has."""
    import os
    import signal

    import torch

    torch.set_num_threads(1)
    for name in POSIX_ONLY:
        sys.modules[name] = None  # `import name` is then an ImportError
    for owner, name in ((signal, "SIGHUP"), (os, "killpg"), (os, "pathconf"), (os, "setsid")):
        delattr(owner, name)
    for module in modules:
        importlib.import_module(module)
    importlib.import_module(script).main(flags.split())


def test_everything_imports_and_trains_without_what_only_posix_has(tmp_path):
    flags = (
        "--dataset Synthetic --train_subset 32 --holdout 32 --batch_size 16 --n_epochs 1 "
        "--regularizer L2Grad --precision fp32 --no-compile --device cpu --run_name r"
    )
    done = fork_server.call(train_without_posix, MODULES, "train", flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {"r.pt", "r.json", "r.ckpt"} <= {path.name for path in tmp_path.iterdir()}
