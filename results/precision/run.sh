#!/usr/bin/env bash
# Real CIFAR-10: the same runs in bfloat16 and in float32, control and late L2Grad, then quantized.
# Run from the root of the repository as `run.sh PRECISION SEED`; files are written to runs/precision.
# The runs of one seed share their first 8 of 10 epochs. Finished runs are skipped.
set -euo pipefail
precision=$1 seed=$2
out=runs/precision
mkdir -p "$out"
python=${PYTHON:-python}

run() { # NAME FLAGS…
    name=${1}_${precision}_$seed
    [ -f "$out/$name.done" ] && return
    "$python" train.py --run_name "$name" --save_file "$out/$name" --resume --seed "$seed" --lr 0.1 --scheduler exponential --gamma 0.7 \
        --precision "$precision" "${@:2}" 2>&1 | tee -a "$out/$name.log"
    touch "$out/$name.done"
}

trunk=$out/trunk_${precision}_$seed.ckpt
run trunk --n_epochs 8 --no_test_penalty
run control --n_epochs 10 --init_from "$trunk"
run l2grad --n_epochs 10 --init_from "$trunk" --regularizer L2Grad --lmbda 0.01 --first_regularized_epoch 8
"$python" quant_inference.py $out/control_${precision}_$seed.pt $out/l2grad_${precision}_$seed.pt \
    --bits 2 3 4 5 6 8 --schemes uniform pwlq --output "$out/quantized_${precision}_$seed"
