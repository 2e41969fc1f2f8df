#!/usr/bin/env bash
# Rounding learned layer by layer (adaround) and for blocks with quantized inputs (qdrop): weights/control.pt and a
# ResNet20 of a short training, on the first 2,000 test images. Run from the root of the repository; files are written
# to runs/toolkits. Finished runs are skipped.
set -euo pipefail
python=${PYTHON:-python}
out=runs/toolkits
mkdir -p "$out"

if [ ! -f "$out/resnet20.pt" ]; then
    "$python" train.py --run_name resnet20 --save_file "$out/resnet20" --model ResNet20 --train_subset 10000 \
        --n_epochs 8 --lr 0.1 --scheduler multistep --gamma 0.1 --milestones 5,7 --data_dir "${DATA_DIR:-./data}"
fi

quantize() { # NAME FILE FLAGS…
    for rounding in qdrop adaround; do
        [ -f "$out/$rounding-$1/results.json" ] && continue
        "$python" quant_inference.py "$2" --fold_bn --test_subset 2000 --calibration_images 512 \
            --rounding_images 1024 --schemes uniform --rounding "$rounding" --no_plots \
            --data_dir "${DATA_DIR:-./data}" --output "$out/$rounding-$1" "${@:3}"
    done
}

sums=--quantize_sums # of ConvNet there are none
quantize resnet20-both "$out/resnet20.pt" --bits 4 --act_bits 4 $sums
quantize control-both weights/control.pt --bits 4 --act_bits 4
quantize control-weights weights/control.pt --bits 3 2
quantize control-both-per_channel weights/control.pt --bits 4 --act_bits 4 --per_channel
quantize resnet20-weights "$out/resnet20.pt" --bits 3 2
quantize resnet20-both-per_channel "$out/resnet20.pt" --bits 4 --act_bits 4 --per_channel $sums

"$python" - "$out" <<'PY'
"""Gather the records into one file, a line each: {"path": …, "content": …}."""
import json, pathlib, sys

from analysis.study.records import pack_records

folder = pathlib.Path(sys.argv[1])
paths = [folder / "resnet20.json", *folder.glob("adaround-*/results.json"), *folder.glob("qdrop-*/results.json")]
records = {path.relative_to(folder).as_posix(): json.loads(path.read_text()) for path in paths}
pathlib.Path("results/toolkits/rounding.jsonl.gz").write_bytes(pack_records(records))
PY
