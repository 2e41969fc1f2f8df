#!/usr/bin/env bash
# Real CIFAR-10: what regularizers do to the weights. All branch from one trunk, that of
# weights/run.sh, which is to be run first. Run from the root of the repository; networks are
# written to runs/distributions. λ of variances is far above the study's, so that it can be seen.
set -euo pipefail
export OMP_NUM_THREADS=1
python=${PYTHON:-python}
out=runs/distributions
mkdir -p "$out"

branch() { # NAME FLAGS…
    "$python" train.py --run_name "$1" --save_file "$out/$1" --lr 0.1 --scheduler multistep \
        --gamma 0.1 --milestones 6,8 --no_test_penalty --seed 0 --resume --n_epochs 9 \
        --init_from runs/trunk.ckpt --first_regularized_epoch 6 "${@:2}"
}

branch variancenorm --regularizer VarianceNorm --lmbda 300 --watch --watch_freq 391
branch stddevnorm --regularizer StdDevNorm --lmbda 20
branch inversevariancenorm --regularizer InverseVarianceNorm --lmbda 3e-3
branch inversestddevnorm --regularizer InverseStdDevNorm --lmbda 0.3
branch rangenorm --regularizer RangeNorm --lmbda 0.1
branch kurtosisnorm --regularizer KurtosisNorm --lmbda 1 --watch --watch_freq 391
"$python" quant_inference.py weights/control.pt weights/l2grad.pt \
    $out/{variancenorm,stddevnorm,inversevariancenorm,inversestddevnorm,rangenorm,kurtosisnorm}.pt \
    --bits 8 4 3 2 --schemes uniform --precision bf16 --output results/distributions
