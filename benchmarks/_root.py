"""Lets the benchmarks import the project: put its folder on the path; import this before it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
