#!/usr/bin/env bash
# The project's main job on images it makes itself: a student trained alone and under a teacher, with several seeds.
# `make demo` sets up what it needs. Stopped, it goes on with what is missing when called again.
set -euo pipefail
cd "$(dirname "$0")/.."
export python=${BIN:+$BIN/}python demo=runs/demo
export OMP_NUM_THREADS=1  # a core per run, two at a time

run() {  # NAME SCRIPT ARGUMENTS: all it prints goes to runs/demo/NAME/out.txt
    local out=$demo/$1
    mkdir -p "$out"
    if "$python" "${@:2}" --output "$out" >> "$out/out.txt" 2>&1; then
        echo "$1: $(tail -n 1 "$out/out.txt" | sed 's/;.*//')"
    else
        echo "$1 failed; the end of $out/out.txt:" >&2
        tail -n 8 "$out/out.txt" >&2
        return 255  # xargs then starts no more
    fi
}
export -f run
two_at_a_time() { xargs -P 2 -L 1 bash -c 'run "$@"' run; }

images=$demo/images
"$python" scripts/make_images.py "$images" --classes 12 --train 60 --valid 40

# One recipe for all students, its learning rate the best of 0.01, 0.02, 0.05 and 0.1 for it alone. The methods' own
# values are the published ones, but that MGD sums over pixels: its divisor of 1e4 at 224 pixels is 1e4 * (40/224)^2 at 40.
recipe='--image-size 40 --epochs 6 --schedule cosine --warmup --warmup-epochs 1 --warmup-by iteration --batch-size 32
    --lr 0.02 --channels-last --workers 0 --no-tensorboard'
student="$images --arch shufflenet_v2_x0_5 $recipe"
taught="$student --teacher-arch resnet18 --teacher-resume $demo/teacher/last.pth --skip-first-evaluation --pair-images 256"
seeds='0 1 2'
{
    echo teacher main_base.py $images --arch resnet18 $recipe --lr 0.05 --seed 0
    for seed in $seeds; do
        echo alone-$seed main_base.py $student --seed $seed
    done
} | two_at_a_time
for seed in $seeds; do
    echo kd-$seed main_distill.py $taught --seed $seed --distiller kd
    echo mgd-$seed main_distill.py $taught --seed $seed --distiller mgd --mgd-loss-factor 319
    echo mgd+kd-$seed main_distill.py $taught --seed $seed --mgd-with-kd 1 --mgd-loss-factor 319
done | two_at_a_time

echo
"$python" scripts/compare.py $demo/{alone,kd,mgd,mgd+kd}-? --teacher $demo/teacher -o $demo/curves.png
printf '\ncurves: %s\nlogs and weights: %s\n' $demo/curves.png "$demo/{teacher,alone-0,...}/"
