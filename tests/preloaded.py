"""Loads other people's packages, and none of our own modules: what the fork server starts with."""

import gc

import hypothesis  # noqa: F401
import matplotlib.figure  # noqa: F401
import onnx  # noqa: F401
import pandas  # noqa: F401
import pytest  # noqa: F401
import scipy.optimize  # noqa: F401
import scipy.stats  # noqa: F401
import torch._dynamo  # noqa: F401
import torch._inductor.sizevars  # noqa: F401
import torch.export._trace  # noqa: F401
import torch.export.pt2_archive._package  # noqa: F401
import torchvision  # noqa: F401
import wandb  # noqa: F401

# A fork would otherwise look through all that is loaded whenever it collects garbage: half a
# second, and a copy of each page.
gc.collect()
gc.freeze()
