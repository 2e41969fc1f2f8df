import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("module", sorted(path.stem for path in ROOT.glob("*.py")))
def test_each_module_imports_alone_and_without_side_effects(module, tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import torch; before = torch.get_rng_state()\n"
        f"import {module}; assert torch.equal(before, torch.get_rng_state())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and not list(tmp_path.iterdir())
