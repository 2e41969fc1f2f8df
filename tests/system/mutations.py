"""Changes of files, at random: bytes, what is in them, and code that must not run."""

import io
import json
import math
import os
import pickle
import zipfile

import torch
from torch import nn


class Runs:
    """A pickle that makes a file, or worse, when it is loaded."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def flip(chance, raw, tree):
    flipped = bytearray(raw)
    for _ in range(chance.choice([1, 1, 2, 10])):
        flipped[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
    return bytes(flipped)


def cut(chance, raw, tree):
    return raw[: chance.randrange(len(raw))]


def splice(chance, raw, tree):
    a, b, c = (chance.randrange(len(raw)) for _ in range(3))
    return raw[:a] + chance.choice([b"", raw[b:c], chance.randbytes(9), bytes(500)]) + raw[b:]


def repickle(chance, raw, tree):
    """Break the pickle inside, with checksums that are right."""
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl"):
                content = chance.choice([flip, flip, flip, cut, splice])(chance, content, tree)
            new.writestr(name, content)
    return changed.getvalue()


def strange(chance):
    """Return a value that has no business in a checkpoint, or not there."""
    nested = []
    for _ in range(chance.choice([3, 200])):
        nested = [nested]
    return chance.choice(
        [
            None,
            True,
            -1,
            0,
            1,
            3,
            2**62,
            10**400,
            -0.5,
            1e308,
            math.inf,
            math.nan,
            "",
            "x\ny",
            "\ud800",
            "../../x",
            b"x",
            [],
            {},
            (),
            [None],
            {"a": 1},
            {1: 2},
            nested,
            torch.zeros(()),
            torch.zeros(3),
            torch.full((2, 2), math.nan),
            torch.zeros(3, dtype=torch.int8),
            torch.zeros(1).expand(10**6),
            torch.eye(3).to_sparse(),
            torch.zeros(2, device="meta"),
            nn.Parameter(torch.zeros(4)),
            torch.zeros(0),
            torch.zeros(4, dtype=torch.complex64),
        ]
    )


def change(chance, node):
    """Return the tree with one place in it changed."""
    if isinstance(node, dict | list | tuple) and node and chance.random() < 0.85:
        copy = dict(node) if isinstance(node, dict) else list(node)
        key = chance.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
        mode = chance.random()
        if mode < 0.1:
            del copy[key]
        elif mode < 0.15 and isinstance(copy, dict):
            copy[chance.choice(["x", "\ud800", 7, None])] = copy.pop(key)
        elif mode < 0.2 and isinstance(copy, list):
            copy.append(copy[key])
        else:
            copy[key] = change(chance, copy[key])
        return tuple(copy) if isinstance(node, tuple) else copy
    if type(node) is torch.Tensor and node.layout == torch.strided and chance.random() < 0.5:
        flat = node.reshape(-1)
        return chance.choice([flat[:0], flat, node.double(), node * math.nan])
    return strange(chance)


def restructure(chance, raw, tree):
    """Change what the checkpoint holds, with checksums that are right."""
    for _ in range(chance.choice([1, 1, 2, 5])):
        tree = change(chance, tree)
    file = io.BytesIO()
    torch.save(tree, file)
    return file.getvalue()


def trap(chance, raw, tree):
    """Put code into it."""
    code = chance.choice(
        [
            Runs(open, "trace", "w"),
            Runs(os.system, "touch trace"),
            Runs(eval, "open('trace', 'w')"),
            Runs(getattr, "os", "system"),
            Runs(bytearray, 10**13),
            Runs(__import__, "antigravity"),
        ]
    )
    content = {**tree, chance.choice([*tree, "x"]): code}
    if chance.random() < 0.3:
        return pickle.dumps(content["x"] if "x" in content else code, protocol=2)
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


MUTATIONS = [flip, cut, splice, repickle, repickle, restructure, restructure, restructure, trap]


def rewrite(chance, raw, tree):
    """Change what a JSON file holds; numbers that are not finite are written as Python does."""
    tree = json.loads(raw)
    for _ in range(chance.choice([1, 1, 2, 5])):
        tree = change(chance, tree)
    try:
        return json.dumps(tree, default=str).encode()
    except (TypeError, ValueError):  # a key that JSON does not have
        return flip(chance, raw, tree)


BYTES = [flip, cut, splice]
JSON = [flip, cut, splice, rewrite, rewrite, rewrite]
