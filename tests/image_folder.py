"""Folders of image files of random pixels."""

from pathlib import Path

import torch
from PIL import Image


def write_image_folder(root, classes, n_train, n_val, height, width):
    """Write root/train/CLASS/… and root/val/CLASS/…, n files of each class as PNG."""
    generator = torch.Generator().manual_seed(0)
    for part, n in (("train", n_train), ("val", n_val)):
        for name in classes:
            folder = Path(root, part, name)
            folder.mkdir(parents=True)
            for i in range(n):
                shape = (height, width, 3)
                pixels = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
