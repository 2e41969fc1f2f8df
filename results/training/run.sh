#!/usr/bin/env bash
# Real CIFAR-10: a 10-epoch control, one epoch of every regularizer from a fresh start, late L2Grad.
# Run from the root of the repository; files are written to runs/training. Finished runs are skipped.
set -euo pipefail
out=runs/training
mkdir -p "$out"
python=${PYTHON:-python}

run() { # NAME FLAGS…
    [ -f "$out/$1.done" ] && return
    "$python" train.py --run_name "$1" --save_file "$out/$1" --resume "${@:2}" 2>&1 | tee -a "$out/$1.log"
    touch "$out/$1.done"
}

run control_10 --n_epochs 10 --lr 0.1 --scheduler multistep --gamma 0.1
run l1grad_1 --n_epochs 1 --regularizer L1Grad --lmbda 0.001
run l2grad_1 --n_epochs 1 --regularizer L2Grad --lmbda 0.01
run l2grad_weights_1 --n_epochs 1 --regularizer L2Grad --lmbda 0.01 --no_activation_gradients
run variancenorm_1 --n_epochs 1 --regularizer VarianceNorm --lmbda 1.25
run stddevnorm_1 --n_epochs 1 --regularizer StdDevNorm --lmbda 0.1
run inversevariancenorm_1 --n_epochs 1 --regularizer InverseVarianceNorm --lmbda 1e-5
run inversestddevnorm_1 --n_epochs 1 --regularizer InverseStdDevNorm --lmbda 1e-3
run l2grad_10 --n_epochs 10 --lr 0.1 --scheduler multistep --gamma 0.1 \
    --regularizer L2Grad --lmbda 0.01 --first_regularized_epoch 8 --save_preregularized_model
