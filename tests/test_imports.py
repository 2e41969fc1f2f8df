import importlib
import sys
from pathlib import Path

import fork_server
import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in (".", "engine", "analysis")
    for path in (ROOT / folder).glob("*.py")
    if path.stem != "__init__"
)
POSIX_ONLY = ("fcntl", "pwd", "resource", "termios")


def import_alone(module):
    import torch

    assert sys.modules.keys().isdisjoint(MODULES)
    before = torch.get_rng_state()
    importlib.import_module(module)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("module", MODULES)
def test_each_module_imports_alone_and_without_side_effects(module, tmp_path):
    done = fork_server.call(import_alone, module, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and not list(tmp_path.iterdir())
