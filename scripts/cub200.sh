#!/bin/bash
# MGD's transfer to CUB-200-2011: small networks with ImageNet weights under a ResNet-50 fine-tuned on CUB.
#
#     scripts/cub200.sh resnet50 base DIR --output runs/cub-teacher                            first the teacher
#     scripts/cub200.sh shufflenet_v2 mgd DIR runs/cub-teacher/best.pth [FLAGS]                then a student
#     scripts/cub200.sh shufflenet_v2 mgd --dummy --epochs 1                                   a check without images
#
#     NETWORK           METHOD    error %, top-1 and top-5, of the best test epoch
#     resnet50          base      20.02    6.06
#     mobilenet_v2_mgd  base      24.61    7.56
#     mobilenet_v2_mgd  mgd       20.47    5.23
#     mobilenet_v2_mgd  mgd_kd        not published
#     shufflenet_v2     base      31.39   10.90
#     shufflenet_v2     mgd       25.95    7.46
#     shufflenet_v2     mgd_kd    25.18    7.87
#
# DIR has train/ (5,994 images) and valid/ (5,794). FLAGS come last and win over the recipe. With GPUS=4 in front, 4
# processes share the batch, as published: 16 images each for BatchNorm. Two things are not as published: how networks
# were fine-tuned without a teacher is not known, so base is ours, the students' recipe without one; and MGD took its
# margins from the ImageNet teacher by mistake, here they are those of the teacher that teaches.
set -euo pipefail

usage() {
    echo 'usage: cub200.sh resnet50|mobilenet_v2_mgd|shufflenet_v2 base DIR|--dummy [FLAGS of main_base.py]
       cub200.sh mobilenet_v2_mgd|shufflenet_v2 mgd|mgd_kd DIR TEACHER.pth|--dummy [FLAGS of main_distill.py]' >&2
    exit 2
}

[[ ${3-} ]] || usage
network=$1 method=$2 data=$3
shift 3

case $network-$method in
    resnet50-base | mobilenet_v2_mgd-* | shufflenet_v2-*) ;;
    *) usage ;;
esac

# All 1000 outputs of the ImageNet head stay, of which CUB uses 200.
recipe=(--arch "$network" --num-classes 1000 --epochs 120 --batch-size 64 --lr 0.01 --lr-drop-epochs 31 61 81
        --momentum 0.9 --nesterov 1 --wd 1e-4)
[[ $data == --dummy ]] || recipe+=(--pretrained)  # a check shall not download

script=main_distill.py
case $method in
    base) script=main_base.py ;;
    mgd) recipe+=(--distiller mgd) ;;
    mgd_kd) recipe+=(--distiller mgd kd --kd-temperature 1.5 --kd-weight 1) ;;
    *) usage ;;
esac
if [[ $method != base ]]; then
    recipe+=(--teacher-arch resnet50 --mgd-loss-factor 1e4 --mgd-update-freq 2 --mgd-remainder cut --pair-images 5994)
    if [[ $data != --dummy ]]; then
        [[ ${1--} != -* ]] || usage
        recipe+=(--teacher-resume "$1")
        shift
    fi
fi

launch=python
((${GPUS:-1} > 1)) && launch="torchrun --standalone --nproc-per-node $GPUS"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100  # else torchrun kills what saves after a signal, 30 seconds later
exec $launch "$(dirname "$0")/../$script" "$data" "${recipe[@]}" "$@"
