#!/usr/bin/env bash
# Real CIFAR-10: the networks of this folder, which are those of the study's seed 0. Six epochs
# without a penalty, then three with each. One thread, because sums are split among threads.
# Run from the root of the repository; the first six epochs are written to runs/trunk.
set -euo pipefail
export OMP_NUM_THREADS=1
python=${PYTHON:-python}
mkdir -p runs

run() { # FILE FLAGS…
    "$python" train.py --run_name "$(basename "$1")" --save_file "$@" --lr 0.1 --scheduler multistep \
        --gamma 0.1 --milestones 6,8 --no_test_penalty --seed 0 --resume
}

branch() { # NAME FLAGS…
    run "weights/$1" --n_epochs 9 --init_from runs/trunk.ckpt "${@:2}"
}

run runs/trunk --n_epochs 6
branch control
branch l2grad --first_regularized_epoch 6 --regularizer L2Grad --lmbda 0.03
branch kurtosisnorm --first_regularized_epoch 6 --regularizer KurtosisNorm --lmbda 1
branch kurtosisnorm_folded --first_regularized_epoch 6 \
    --regularizer KurtosisNorm --fold_bn --lmbda 0.01
