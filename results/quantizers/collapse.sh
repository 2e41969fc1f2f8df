#!/usr/bin/env bash
# Which networks lose their accuracy at (8,8), (6,6) and (4,4), per tensor, and what repairs it: controls of
# several networks and recipes, 20,000 training images for 10 epochs, measured on 5,000 held-out training
# images. Run from the root of the repository; files are written to runs/collapse, and gathered into
# collapse.jsonl.gz. Finished runs are skipped, others resume. One thread, so two can run side by side:
# `bash results/quantizers/collapse.sh vgg plain`.
set -euo pipefail
export OMP_NUM_THREADS=1
out=runs/collapse
script() { # SCRIPT FLAGS…
    "${PYTHON:-python}" results/quantizers/plain_vgg.py "$@"
}

run() { # NAME FLAGS…
    if [ ! -f "$out/$1.pt" ]; then
        mkdir -p "$out"
        script train.py --run_name "$1" --save_file "$out/$1" --holdout 5000 --train_subset 20000 --n_epochs 10 \
            --lr 0.02 --scheduler multistep --milestones 7,9 --gamma 0.1 --no_test_penalty --seed 0 --resume "${@:2}"
    fi
    for calibration in minmax topk_median percentile mse; do
        quantize "$1" "$calibration"
        quantize "$1" "${calibration}_first_last" --keep_first_last
    done
    calibration=mse
    quantize "$1" mse_equalize --equalize
    quantize "$1" mse_per_channel --per_channel
}

quantize() { # NAME CASE FLAGS…
    local folder=$out/$1/$2
    [ -f "$folder/results.json" ] && return
    script quant_inference.py "$out/$1.pt" --holdout 5000 --bits 8 6 4 --act_bits same --schemes uniform \
        "${network[@]}" --calibration "$calibration" --no_plots --output "$folder" "${@:3}"
}

[ $# -gt 0 ] || set -- vgg plain resnet20 weight_decay constant no_weight_decay
vgg=(--model VGGSmall --width 0.25)
for name in "$@"; do
    network=(--fold_bn)
    case $name in
        vgg) run "$name" "${vgg[@]}" ;;
        plain) network=(--biases full); run "$name" --model VGGPlain --width 0.25 ;;
        no_weight_decay) run "$name" "${vgg[@]}" --weight_decay 0 ;;
        weight_decay) run "$name" "${vgg[@]}" --weight_decay 0.005 ;;
        constant) run "$name" "${vgg[@]}" --scheduler none ;;
        resnet20) network=(--fold_bn --quantize_sums); run "$name" --model ResNet20 --lr 0.1 --weight_decay 1e-4 ;;
        *) echo "$name: not one of the networks of this file" >&2; exit 2 ;;
    esac
done
