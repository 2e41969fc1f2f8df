"""What is asked of the hardware, without a GPU at hand: the answers of one are made up."""

import argparse
from types import SimpleNamespace

import pytest
import torch

from engine.system import environment, hardware
from engine.training.resume import settled_precision


def test_float32_is_not_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    hardware.use_ieee_float32()
    assert not torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_device_is_looked_for_and_not_touched(monkeypatch):
    monkeypatch.setattr(torch, "zeros", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("cpu", "cuda", "CUDA:1"):
        assert hardware.parse_device(name) == name.lower()
    for name in ("cuda:2", "meta", "mps", "abacus", "", "cpu:1"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"no device '{name}'"):
            hardware.parse_device(name)


def test_apples_gpus_are_used_where_asked_for_and_have_no_float64(monkeypatch):
    monkeypatch.setattr(torch.mps, "device_count", lambda: 1)
    assert hardware.parse_device("mps") == "mps"
    for name, default in {"mps": "cpu", "cuda": "cuda"}.items():
        device = torch.device(name)
        monkeypatch.setattr(hardware, "accelerator", lambda device=device: device)
        assert hardware.default_device() == default
        assert hardware.with_float64(device).type == default
    doubled = hardware.to_float64(torch.ones(2))
    assert doubled.dtype == torch.float64 and doubled.device.type == "cpu"


def test_streams_of_random_numbers_of_apples_gpus_have_no_index(monkeypatch):
    states = [torch.tensor([1])]
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: states[-1])
    monkeypatch.setattr(torch.mps, "set_rng_state", states.append)
    mps = torch.device("mps")
    of_cpu, _, *others = hardware.get_rng_state(mps)
    with hardware.rng_from((of_cpu, torch.tensor([2]), *others), mps):
        assert hardware.get_rng_state(mps)[1] == 2
    assert hardware.get_rng_state(mps)[1] == 1


@pytest.mark.parametrize(
    ("flag", "saved", "chosen"),
    [
        ("auto", None, "bf16"),
        ("auto", "fp32", "fp32"),
        ("auto", "auto", "bf16"),  # as earlier versions saved it
        ("fp32", "bf16", "fp32"),  # checked elsewhere
    ],
)
def test_auto_is_what_the_checkpoint_has_or_the_device_is_fast_at(monkeypatch, flag, saved, chosen):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    checkpoint = saved and {"settings": {"precision": saved}}
    assert settled_precision(flag, "cpu", checkpoint) == chosen


def test_a_record_names_what_a_gpu_runs_on(monkeypatch):
    cuda = SimpleNamespace(is_available=lambda: True, get_device_name=lambda: "a GPU")
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92000)
    described = environment.describe_accelerator()
    assert described["accelerator"] == "a GPU" and described["driver"] == 13000
    assert {"cuda", "cudnn"} < described.keys()
