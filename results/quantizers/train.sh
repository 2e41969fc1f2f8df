#!/usr/bin/env bash
# Real CIFAR-10: a ConvNet for each baseline, by the study's protocol. Six epochs that all share, then
# three of each. Hyper-parameters are those of the papers; none was chosen on test images.
# Run from the root of the repository; files are written to runs/quantizers. Finished runs are skipped,
# others resume. One thread, so two can run side by side: `bash results/quantizers/train.sh sharpness dampening`.
set -euo pipefail
export OMP_NUM_THREADS=1
out=runs/quantizers
mkdir -p "$out"

run() { # NAME FLAGS…
    [ -f "$out/$1.pt" ] && return
    "${PYTHON:-python}" train.py --run_name "$1" --save_file "$out/$1" --lr 0.1 --no_test_penalty \
        --seed 0 --resume "${@:2}" 2>&1 | tee -a "$out/$1.log"
}

decay=(--scheduler multistep --gamma 0.1 --milestones 6,8)
constant=(--scheduler none)
branch=(--n_epochs 9 --init_from "$out/trunk.ckpt" --allow_changed_settings)
penalty=(--first_regularized_epoch 6 --regularizer)

run trunk --n_epochs 6 "${decay[@]}"
[ $# -gt 0 ] || set -- lsq plain constant sharpness weight_decay label_smoothing dampening \
    adaptive_sharpness
for name in "$@"; do
    case $name in
        lsq) flags=("${decay[@]}" --qat_bits 4,4 --qat_from 6) ;;
        plain) flags=("${decay[@]}" --ema 0.999) ;;
        constant) flags=("${constant[@]}" --ema 0.999) ;;
        sharpness) flags=("${decay[@]}" "${penalty[@]}" Sharpness --rho 0.05 --lmbda 1) ;;
        adaptive_sharpness) flags=("${decay[@]}" "${penalty[@]}" AdaptiveSharpness --rho 0.5 --lmbda 1) ;;
        # 2·λ·lr/(1 − momentum), summed over the steps, is 1.6: the loss aside, a fifth of a distance is left
        dampening) flags=("${decay[@]}" "${penalty[@]}" Dampening --lmbda 0.01) ;;
        weight_decay) flags=("${decay[@]}" --weight_decay 0.005) ;;
        label_smoothing) flags=("${decay[@]}" --label_smoothing 0.1) ;;
        *) echo "$name: not one of the networks of this file" >&2; exit 2 ;;
    esac
    run "$name" "${branch[@]}" "${flags[@]}"
done
