#!/bin/bash
# MGD's ImageNet table: MobileNetV1 under torchvision's ResNet-50.
#
#     GPUS=8 scripts/imagenet.sh METHOD DIR [FLAGS]                        8 processes share the batch
#     scripts/imagenet.sh METHOD --dummy --epochs 1 --warmup 0             a check without images
#
#     METHOD                     error %, top-1 and top-5, as MGD's README gives them
#     -       the teacher        23.85    7.13
#     base    no teacher         31.13   11.24
#     mgd                        28.53    9.67
#     mgd_kd  with KD beside it      not published
#
# FLAGS come last and win over the recipe. Batch and learning rate are those of all GPUs together.
set -euo pipefail

usage() { echo 'usage: imagenet.sh base|mgd|mgd_kd DIR|--dummy [FLAGS of main_*.py]' >&2; exit 2; }

[[ ${2-} ]] || usage
method=$1 data=$2
shift 2

# The warm-up adds its 10 epochs to the 120 and to the drops, which come at 41, 71 and 91.
script=main_distill.py
recipe=(--epochs 120 --warmup 1 --lr-drop-epochs 31 61 81 --nesterov 1
        --teacher-arch resnet50 --mgd-loss-factor 1e4 --mgd-update-freq 1 --pair-images 20480)
case $method in
    base) script=main_base.py recipe=(--epochs 100 --lr-drop-epochs 30 60 90) ;;
    mgd) recipe+=(--distiller mgd) ;;
    mgd_kd) recipe+=(--distiller mgd kd --kd-temperature 1.5 --kd-weight 1) ;;
    *) usage ;;
esac

launch=python
((${GPUS:-1} > 1)) && launch="torchrun --standalone --nproc-per-node $GPUS"
exec $launch "$(dirname "$0")/../$script" "$data" --arch mobilenet_v1 \
    --batch-size 256 --lr 0.1 --momentum 0.9 --wd 1e-4 "${recipe[@]}" "$@"
