"""benchmarks/gpu.py on a CPU: the checks that need no GPU, and what happens where one fails."""

import json

import gpu
import pytest
import torch


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_gradients_and_batches_are_right(capsys):
    names = ["gradients", "batches", "synchronizations"]
    assert gpu.main(["--device", "cpu", "--checks", *names]) == 0
    found = last_line(capsys)
    assert found["holds"] and found["gradients"]["L2Grad"]["against_plain"] < 1e-10
    assert found["synchronizations"] == {"not_run": "CUDA: not run"}


def test_a_wrong_gradient_is_found(monkeypatch, capsys):
    right = gpu.plain_gradient
    monkeypatch.setattr(gpu, "plain_gradient", lambda *args: right(*args) * (1 + 1e-8))
    assert gpu.main(["--device", "cpu", "--checks", "gradients"]) == 1
    assert "against_plain in float64 1.0e-08" in last_line(capsys)["gradients"]["reason"]


def test_a_check_that_cannot_begin_does_not_hold(capsys):
    assert gpu.main(["--device", "cpu", "--checks", "batches", "--minutes", "-1"]) == 1
    assert "no time left" in last_line(capsys)["batches"]["reason"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_device_that_is_not_here_is_named(capsys):
    with pytest.raises(SystemExit) as end:
        gpu.main([])
    assert end.value.code == 2 and "no device 'cuda'" in capsys.readouterr().err
