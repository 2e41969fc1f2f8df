#!/usr/bin/env bash
# How the learning rate of the study was chosen, on 5,000 held-out images, seed 0: run.log has what the
# trainings printed, results.csv the tables of all quantizations (bn_images: with how many images
# batch-norm statistics were estimated again). From the root.
set -euo pipefail
export OMP_NUM_THREADS=1
common=(--resume --seed 0 --holdout 5000 --lr 0.1 --no_test_penalty)
mkdir -p pilot

for gamma in 0.65 0.55 1.0; do
    python train.py --run_name "p$gamma" --save_file "pilot/trunk_$gamma" "${common[@]}" \
        --scheduler exponential --gamma "$gamma" --n_epochs 6
done

branch() { # NAME TRUNK FLAGS…
    python train.py --run_name "$1" --save_file "pilot/$1" "${common[@]}" --n_epochs 9 --init_from "pilot/trunk_$2.ckpt" "${@:3}"
    python quant_inference.py "pilot/$1.pt" --bits 2 3 4 --schemes uniform --precision bf16 --holdout 5000 \
        --output "pilot/q_$1"
    python quant_inference.py "pilot/$1.pt" --bits 3 4 --schemes uniform --precision bf16 --bn_images 4000 --holdout 5000 \
        --output "pilot/r_$1"
}
steep=(--scheduler exponential --gamma 0.65)
branch c65 0.65 "${steep[@]}"
branch c55 0.55 --scheduler exponential --gamma 0.55
branch ms01 1.0 --override --scheduler multistep --milestones 6,8 --gamma 0.1
branch rn65 0.65 "${steep[@]}" --regularizer RangeNorm --lmbda 0.1 --first_regularized_epoch 6
branch sn65f 0.65 "${steep[@]}" --regularizer StepNoise --lmbda 1 --first_regularized_epoch 6 --freeze_bn_from 6
