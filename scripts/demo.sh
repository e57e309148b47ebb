#!/usr/bin/env bash
# The project's main job on images it makes itself: train, evaluate, draw. `make demo` sets up what it needs.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${BIN:+$BIN/}python
images=runs/demo/images run=runs/demo/resnet18

"$python" scripts/make_images.py "$images"
"$python" main_base.py "$images" --arch resnet18 --image-size 64 --epochs 10 --batch-size 32 --lr 0.05 \
    --schedule cosine --warmup --warmup-epochs 1 --warmup-by iteration --workers 2 --print-freq 20 --seed 0 --output "$run"
"$python" main_base.py "$images" --arch resnet18 --image-size 64 --batch-size 32 --workers 2 \
    --student-resume "$run/best.pth" --evaluate --output "$run"
"$python" scripts/plot.py "$run" -o runs/demo/curves.png
"$python" - "$run" <<'EOF'
import json
import sys

run = sys.argv[1]
result = json.load(open(f'{run}/result.json'))
print('\n| network  | epochs | last top-1 | best top-1 (epoch) | seconds |')
print('|----------|--------|------------|--------------------|---------|')
last, best = result['last'], result['best']
print(f'| resnet18 | {last["epoch"] + 1:6} | {last["top1"]:10.2f} | {best["top1"]:13.2f} ({best["epoch"]:2}) '
      f'| {result["seconds"]:7.0f} |')
print(f'\nlogs and weights: {run}/\ncurves: runs/demo/curves.png')
EOF
