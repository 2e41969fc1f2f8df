#!/usr/bin/env bash
# Which network loses much? One seed each, judged on 5,000 held-out training images alone.
# Usage, in the root of the repository: bash results/claim/pilot.sh [--data_dir DIR]
set -euo pipefail
PYTHON=${PYTHON:-python}
OUT=runs/claim_pilot
mkdir -p $OUT
# The recipe of study.py: the rate falls by ten where a penalty would begin, and once more.
RECIPE="--n_epochs 9 --lr 0.1 --scheduler multistep --gamma 0.1 --milestones 6,8 --holdout 5000"

pilot() {  # name, flags of the network, flags of the training
  local name=$1 network=$2 training=$3
  shift 3
  # shellcheck disable=SC2086
  $PYTHON train.py --run_name "pilot_$name" --save_file "$OUT/$name" --resume $network $RECIPE \
    $training "$@"
  for way in per_tensor per_channel; do
    local flags=--fold_bn
    [ $way = per_channel ] && flags="$flags --per_channel"
    # shellcheck disable=SC2086
    $PYTHON quant_inference.py "$OUT/$name.pt" $network $flags --holdout 5000 --bits 2 3 4 6 8 \
      --schemes uniform clip pwlq --no_plots --output "$OUT/${name}_weights_$way" "$@"
    # shellcheck disable=SC2086
    $PYTHON quant_inference.py "$OUT/$name.pt" $network $flags --holdout 5000 --bits 3 4 6 8 \
      --act_bits same --quantize_sums --schemes uniform clip --no_plots \
      --output "$OUT/${name}_both_$way" "$@"
  done
}

pilot resnet20_half "--model ResNet20 --width 0.5" "--weight_decay 1e-4" "$@"
pilot mobilenetv2_quarter "--model MobileNetV2 --width 0.25" "--weight_decay 1e-4" "$@"
pilot vggsmall_quarter "--model VGGSmall --width 0.25" "--weight_decay 5e-4" "$@"
pilot resnet20 "--model ResNet20" "--weight_decay 1e-4" "$@"
