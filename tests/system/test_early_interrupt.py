import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("script", ["train.py", "quant_inference.py", "study.py"])
@pytest.mark.sampled(3)
def test_a_ctrl_c_during_the_imports_is_one_line(script, tmp_path):
    """Some imports catch every exception: without a handler, the script would then go on."""
    process = subprocess.Popen(
        [sys.executable, ROOT / script, "--n_epochs", "100000", "--dataset", "Synthetic"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(1.2)  # imports take longer
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=100)[1]
    assert process.returncode == -signal.SIGINT and error == f"{script}: stopped\n"


def test_bad_code_in_a_registry_is_one_line(tmp_path):
    (tmp_path / "engine").symlink_to(ROOT / "engine")  # so that the script is one of ours
    script = tmp_path / "script.py"
    script.write_text(
        "import engine.system.early_interrupt\n"
        "from engine.system.errors import PenaltyError\n"
        "raise PenaltyError('the name is taken')\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "script.py: error: the name is taken\n")


@pytest.mark.slow
def test_a_program_that_imports_a_script_keeps_its_own_handler(tmp_path):
    program = "import signal, train; print(signal.getsignal(signal.SIGINT).__name__)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "default_int_handler\n", done.stderr
