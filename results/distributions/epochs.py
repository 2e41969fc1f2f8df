"""Draw epochs.png: how the weights of a layer move over the epochs, from --watch histograms.

After weights/run.sh, its first part with --watch --watch_freq 391, and this folder's run.sh,
from the root of the repository:

    python results/distributions/epochs.py layer4.0.weight wandb/offline-run-TRUNK \
        VarianceNorm=wandb/offline-run-A KurtosisNorm=wandb/offline-run-B
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from analysis.distributions import epochs_plot, logged_histograms  # noqa: E402
from analysis.offline_run import read_offline_run  # noqa: E402

parameter, trunk, *branches = sys.argv[1:]
shared = logged_histograms(read_offline_run(Path(trunk))["history"], parameter)
runs = {}
for branch in branches:
    name, _, path = branch.rpartition("=")
    runs[name] = shared + logged_histograms(read_offline_run(Path(path))["history"], parameter)
epochs_plot(runs, parameter, ROOT / "results" / "distributions" / "epochs.png")
