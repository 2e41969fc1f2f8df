import importlib
import sys
from pathlib import Path

import forks
import pytest

MODULES = sorted(path.stem for path in (Path(__file__).parent.parent).glob("*.py"))


def import_alone(module):
    import torch

    assert sys.modules.keys().isdisjoint(MODULES)
    before = torch.get_rng_state()
    importlib.import_module(module)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("module", MODULES)
def test_each_module_imports_alone_and_without_side_effects(module, tmp_path):
    done = forks.call(import_alone, module, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and not list(tmp_path.iterdir())
