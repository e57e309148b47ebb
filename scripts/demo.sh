#!/usr/bin/env bash
# The project's main job on images it makes itself: a student trained alone and under a teacher, with several seeds.
# `make demo` sets up what it needs. Stopped, it goes on with what is missing when called again.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${BIN:+$BIN/}python demo=runs/demo
export OMP_NUM_THREADS=1  # a core per run, two at a time

images=$demo/images
"$python" scripts/make_images.py "$images" --classes 12 --train 60 --valid 40

# One recipe for all students, its learning rate the best of 0.01, 0.02, 0.05 and 0.1 for it alone. The methods' own
# values are the published ones.
recipe='--image-size 40 --epochs 6 --schedule cosine --warmup --warmup-epochs 1 --warmup-by iteration --batch-size 32
    --lr 0.02 --channels-last --workers 0'

mkdir -p $demo/teacher
echo "teacher: $demo/teacher/out.txt"
"$python" main_base.py "$images" --arch resnet18 $recipe --lr 0.05 --seed 0 --output $demo/teacher \
    >> $demo/teacher/out.txt 2>&1 || { code=$?; tail -n 8 $demo/teacher/out.txt >&2; exit $code; }

"$python" scripts/compare.py "$images" --methods alone kd mgd mgd+kd --seeds 0 1 2 --jobs 2 --output $demo \
    --flags mgd+kd '--kd-temperature 1.5 --kd-weight 1' \
    -- --arch shufflenet_v2_x0_5 $recipe --teacher-arch resnet18 --teacher-resume $demo/teacher/last.pth \
    --skip-first-evaluation --pair-images 256
echo "logs and weights: $demo/{teacher,alone-0,...}/"
