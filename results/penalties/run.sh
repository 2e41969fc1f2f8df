#!/usr/bin/env bash
# Is a cheap gradient penalty as good as the exact one? Real CIFAR-10, the protocol of the study (six
# epochs without a penalty, three with it, at a tenth of the learning rate), on a network and on as
# many images as a slow machine can train: VGGSmall of an eighth of the width, 20,000 images. Run
# from the root of the repository; files are written to runs/penalties. Finished runs are skipped,
# others resume. $SEEDS and $VARIANTS say which: two of these programs can run side by side.
set -euo pipefail
export OMP_NUM_THREADS=1  # sums are split among threads
out=runs/penalties
python=${PYTHON:-python}
mkdir -p "$out"

run() { # NAME FLAGS…
    [ -f "$out/$1.pt" ] && return
    "$python" train.py --run_name "$1" --save_file "$out/$1" --resume --model VGGSmall --width 0.125 \
        --train_subset 20000 --lr 0.05 --scheduler multistep --gamma 0.1 --milestones 6,8 \
        --no_test_penalty --track L1Grad L2Grad "${@:2}"
}

quantize() { # NAME FLAGS…
    [ -f "$out/$1/results.json" ] && return
    "$python" quant_inference.py "$out/${1%%.*}.pt" --no_plots --schemes uniform --output "$out/$1" "${@:2}"
}

exact=(--regularizer L2Grad --lmbda 0.03 --first_regularized_epoch 6)
difference=("${exact[@]}" --penalty_gradient difference)
for seed in ${SEEDS:-0 1 2}; do
    run "trunk_$seed" --n_epochs 6 --seed "$seed"
    for variant in ${VARIANTS:-control exact difference every_4th difference_every_4th}; do
        case $variant in
            control) flags=() ;;
            exact) flags=("${exact[@]}") ;;
            difference) flags=("${difference[@]}") ;;
            every_4th) flags=("${exact[@]}" --penalty_every 4) ;;
            difference_every_4th) flags=("${difference[@]}" --penalty_every 4) ;;
        esac
        name=${variant}_$seed
        run "$name" --n_epochs 9 --seed "$seed" --init_from "$out/trunk_$seed.ckpt" "${flags[@]}"
        quantize "$name.weights" --bits 4 3
        quantize "$name.activations" --bits 4 --act_bits same --fold_bn
    done
done
