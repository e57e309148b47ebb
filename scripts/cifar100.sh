#!/bin/bash
# The tables of CIFAR-100: the recipes and the loop. cifar100_teachers.sh, cifar100_same.sh, cifar100_cross.sh and
# srd_dist.sh name their networks or pairs and source this; what follows on the command line is the same for all:
#
#     DATA=/cifar scripts/cifar100_teachers.sh                                  first the teachers, with seed 0
#     DATA=/cifar scripts/cifar100_same.sh METHOD [PAIRS [SEEDS]] [FLAGS]       all pairs of the table, 5 seeds
#     DATA=/cifar scripts/cifar100_same.sh dkd 'resnet56-resnet20 cifar_vgg13-cifar_vgg8' '0 1 2' --gpu 1
#     DATA=--dummy scripts/cifar100_same.sh dkd resnet56-resnet20 0 --epochs 1  a check without images or teachers
#     DATA=/cifar RUNS=/tmp/runs scripts/cifar100_same.sh base 'resnet8'        folders of runs elsewhere
#     DATA=/cifar scripts/cifar100_same.sh kd cifar_vgg13-cifar_vgg8 0,1,2 --fast --cuda-graph --cache-teacher lazy
#
# Seeds with a comma between them are trained side by side: on a GPU, in a fraction of the time that they take in turn.
# A PAIR is TEACHER-STUDENT. Runs go to runs/cifar100/METHOD-TEACHER-STUDENT-SEED, without a teacher to
# base-NETWORK-SEED; called again, what is finished is passed over and what was interrupted goes on. All students of a
# teacher have the same one, base-TEACHER-0, at its last epoch. FLAGS of main_*.py win over the recipe.
#
#     METHOD       base, no teacher; teachers, those of the pairs; any --distiller alone, by its defaults (ab and fsp
#                  for 30 epochs, then the labels: FLAGS are those of main_base.py); and
#     kd_dot       KD with the optimizer DOT
#     kd_lskd      KD of standardized logits. The CE weight beside it is open: 1 here, --ce-weight 0.1 in the last code
#     dkd_lskd     DKD of them: weight times alpha and beta, and LSKD's T, as the code has it since May 2024
#     fitnet_kd, at_kd, srd_full    SRDwithDIST's rows FitNet, AT and SRD
#
# A pair has values of its own where they are published; where a method has such values but not for this pair, a note
# says so and the default is taken. Exp-KD's are those of its configurations, which no published code ever used. MRKD's
# launcher multiplied batch and rate by the number of GPUs, here they are those of one; its weights are those of
# MRKD.py; its configurations name compiled code instead, which has --mrkd-pearson 32 --mrkd-kendall 16 --mrkd-top 0.5.
# ReviewKD's weights of cifar_vgg13-cifar_vgg8 and cifar_resnet50-cifar_mobilenet_v2 are users'; other teachers of a
# MobileNetV2 may want more than the default, too. OFD's weight of resnet56-resnet20 is what its author advised where
# the usual one fell below the student alone. SimKD's student shows its last stage: the convolution behind it, in
# MobileNetV2 and ShuffleNetV2, is out of use.
set -euo pipefail

usage() { echo "usage: DATA=CIFAR_ROOT|--dummy $(basename "$0") $words [FLAGS of main_*.py]" >&2; exit 2; }

[[ ${1--} != -* ]] || usage
method=$1
shift
for name in pairs seeds; do  # with nothing given, the table's own
    [[ ${1--} == -* ]] || { printf -v "$name" %s "$1"; shift; }
done
[[ ${DATA-} ]] || { echo "$(basename "$0"): DATA is not set: the folder of CIFAR-100, or --dummy" >&2; exit 2; }
folder=${RUNS:-runs}/$table
[[ $DATA != --dummy ]] || folder=${RUNS:-runs}/check/$table  # a table's own folders are for its runs

unpublished() { echo "note: $method, $pair: no $1 is published, this is the default" >&2; }

# Epochs count from 0: 150 is the 151st, the first at the lower rate.
schedule() {  # NETWORK: how it is trained by whatever method
    recipe=(--dataset cifar100 --arch "$1" --epochs 240 --batch-size 64 --lr 0.05 --lr-drop-epochs 150 180 210
            --momentum 0.9 --wd 5e-4 --print-freq 200)
    case $1 in
        *mobilenet* | *shufflenet*) recipe+=(--lr 0.01) ;;
        cifar_resnet18 | resnet[0-9]*)
            [[ $table != srd_dist ]] || recipe+=(--epochs 350 --batch-size 128 --lr 0.1 --lr-drop-epochs 150 250 320) ;;
    esac
    [[ $table != srd_dist ]] || recipe+=(--crop-padding reflect)
}

distillation() {  # for $pair by $method
    local weight temperature beta
    case $method in
        kd_dot) recipe+=(--distiller kd --optimizer dot) ;;
        kd_lskd)
            case $pair in
                cifar_resnet50-cifar_mobilenet_v2) read -r temperature weight <<< '3 1' ;;
                resnet110-resnet20) read -r temperature weight <<< '4 12' ;;
                resnet32x4-wrn_16_2 | resnet32x4-wrn_40_2 | cifar_vgg13-cifar_vgg8 | cifar_vgg13-cifar_mobilenet_v2 \
                    | wrn_40_2-cifar_mobilenet_v2) read -r temperature weight <<< '3 9' ;;
                resnet56-resnet20 | resnet110-resnet32 | resnet32x4-resnet8x4 | resnet32x4-cifar_shufflenet_v2 \
                    | wrn_40_2-wrn_16_2 | wrn_40_2-wrn_40_1 | wrn_40_2-resnet8x4)
                    read -r temperature weight <<< '2 9' ;;
                *) unpublished 'temperature and weight'; read -r temperature weight <<< '2 9' ;;
            esac
            recipe+=(--distiller kd --logit-standardize --ce-weight 1
                     --kd-temperature "$temperature" --kd-weight "$weight") ;;
        dkd_lskd)
            case $pair in
                resnet56-resnet20) read -r temperature weight beta <<< '3 18 2' ;;
                cifar_vgg13-cifar_mobilenet_v2) read -r temperature weight beta <<< '3 9 2' ;;
                resnet32x4-wrn_16_2) read -r temperature weight beta <<< '2 9 2' ;;
                wrn_40_2-wrn_16_2 | wrn_40_2-wrn_40_1) read -r temperature weight beta <<< '2 12 2' ;;
                wrn_40_2-resnet8x4) read -r temperature weight beta <<< '2 18 2' ;;
                resnet110-resnet32 | resnet110-resnet20 | cifar_vgg13-cifar_vgg8 | cifar_resnet50-cifar_mobilenet_v2 \
                    | wrn_40_2-cifar_mobilenet_v2) read -r temperature weight beta <<< '2 15 2' ;;
                resnet32x4-resnet8x4 | resnet32x4-cifar_shufflenet_v2 | resnet32x4-wrn_40_2)
                    read -r temperature weight beta <<< '2 9 8' ;;
                *) unpublished 'temperature, weight and beta'; read -r temperature weight beta <<< '2 9 8' ;;
            esac
            recipe+=(--distiller dkd --logit-standardize --dkd-temperature "$temperature"
                     --dkd-alpha "$weight" --dkd-beta $((weight * beta))) ;;
        dkd)
            recipe+=(--distiller dkd)
            case $pair in
                resnet56-resnet20 | resnet110-resnet32) recipe+=(--dkd-beta 2) ;;
                wrn_40_2-wrn_16_2 | wrn_40_2-wrn_40_1 | cifar_vgg13-cifar_vgg8 | cifar_vgg13-cifar_mobilenet_v2 \
                    | cifar_resnet50-wrn_16_2)
                    recipe+=(--dkd-beta 6) ;;
                resnet32x4-resnet8x4 | resnet32x4-shufflenet_v1 | resnet32x4-cifar_shufflenet_v2 \
                    | wrn_40_2-shufflenet_v1 | cifar_resnet50-cifar_mobilenet_v2) recipe+=(--dkd-beta 8) ;;
                *) unpublished beta ;;
            esac ;;
        reviewkd)
            recipe+=(--distiller reviewkd)
            case $pair in
                resnet56-resnet20) recipe+=(--reviewkd-weight 0.6) ;;
                resnet110-resnet32) recipe+=(--reviewkd-weight 1) ;;
                resnet32x4-resnet8x4 | wrn_40_2-wrn_16_2 | wrn_40_2-wrn_40_1 | resnet32x4-shufflenet_v1 \
                    | wrn_40_2-shufflenet_v1 | cifar_vgg13-cifar_vgg8) recipe+=(--reviewkd-weight 5) ;;
                resnet32x4-cifar_shufflenet_v2) recipe+=(--reviewkd-weight 8) ;;
                cifar_resnet50-cifar_mobilenet_v2) recipe+=(--reviewkd-weight 30) ;;
                *) unpublished weight ;;
            esac ;;
        mrkd)
            recipe+=(--distiller mrkd)
            case $pair in
                resnet56-resnet20 | resnet110-resnet32 | cifar_vgg13-cifar_vgg8) recipe+=(--lr 0.01) ;;
                resnet32x4-resnet8x4 | wrn_40_2-wrn_16_2 | wrn_40_2-wrn_40_1 | resnet32x4-shufflenet_v1 \
                    | wrn_40_2-shufflenet_v1 | cifar_vgg13-cifar_mobilenet_v2 | cifar_resnet50-cifar_mobilenet_v2 \
                    | resnet32x4-cifar_shufflenet_v2 | wrn_40_2-cifar_shufflenet_v2) ;;  # the common rate
                *) unpublished rate ;;
            esac ;;
        expkd)
            recipe+=(--distiller expkd)
            case $pair in
                resnet56-resnet20) recipe+=(--lr 0.05 --expkd-weight 0.5) ;;
                resnet110-resnet32) recipe+=(--lr 0.01 --expkd-weight 1) ;;
                resnet110-resnet20) recipe+=(--lr 0.01 --expkd-weight 0.5) ;;
                resnet32x4-resnet8x4) recipe+=(--lr 0.01 --expkd-weight 200) ;;
                wrn_40_2-wrn_16_2) recipe+=(--lr 0.01 --expkd-weight 50) ;;
                wrn_40_2-wrn_40_1) recipe+=(--batch-size 256 --lr 0.1 --expkd-weight 10) ;;
                cifar_vgg13-cifar_vgg8) recipe+=(--lr 0.05 --expkd-weight 200) ;;
                resnet32x4-shufflenet_v1) recipe+=(--expkd-weight 1000) ;;
                wrn_40_2-shufflenet_v1) recipe+=(--expkd-weight 100) ;;
                cifar_vgg13-cifar_mobilenet_v2) recipe+=(--expkd-weight 3000) ;;
                cifar_resnet50-cifar_mobilenet_v2) recipe+=(--expkd-weight 50000) ;;
                # published of the 1.5 times wider student
                resnet32x4-cifar_shufflenet_v2 | resnet32x4-cifar_shufflenet_v2_x1_5) recipe+=(--expkd-weight 100) ;;
                resnet56-cifar_shufflenet_v2 | resnet56-cifar_shufflenet_v2_x1_5) recipe+=(--expkd-weight 1) ;;
                resnet32x4-cifar_mobilenet_v2) recipe+=(--expkd-weight 5) ;;
                cifar_resnet34-cifar_resnet18) recipe+=(--lr 0.05 --expkd-weight 2000 --expkd-temperature 2) ;;
                resnet32x4-resnet20) recipe+=(--lr 0.1 --expkd-weight 10) ;;
                shufflenet_v1-resnet20) recipe+=(--lr 0.05 --expkd-weight 1) ;;
                *) unpublished 'weight or rate' ;;
            esac ;;
        ofd)
            recipe+=(--distiller ofd)
            [[ $pair != resnet56-resnet20 ]] || recipe+=(--ofd-weight 1e-4) ;;
        fitnet_kd) recipe+=(--distiller kd fitnet --ce-weight 0.1
                            --fitnet-stage 3 --fitnet-stage-t 3 --fitnet-weight 2) ;;
        at_kd) recipe+=(--distiller kd at --ce-weight 0.1) ;;
        srd_full) recipe+=(--distiller srd --srd-feat full --srd-logit-weight 2) ;;
        srdwithdist)
            recipe+=(--distiller srdwithdist)
            case $pair in
                wrn_40_4-wrn_16_4 | wrn_40_2-wrn_40_1 | resnet20-resnet14 | resnet32-resnet14 | resnet56-resnet14 \
                    | resnet110-resnet14 | resnet110-resnet32)  # the last five: its study of capacity
                    recipe+=(--srdwithdist-inter 10 --srdwithdist-intra 10) ;;
                wrn_40_4-wrn_16_2) recipe+=(--srdwithdist-inter 4 --srdwithdist-intra 4) ;;
                *) unpublished B ;;
            esac ;;
        simkd) recipe+=(--distiller simkd --simkd-student-map stage) ;;
        ft)
            recipe+=(--distiller ft --pair-images 50000)  # the paraphraser sees all training images
            [[ $pair != *-cifar_vgg8 ]] || recipe+=(--ft-paraphraser-lr 0.05) ;;
        *) recipe+=(--distiller "$method") ;;
    esac
}

failed=0
run() {  # SCRIPT NAME FLAGS
    local script=$1 output=$folder/$2 whose=(--seed "$seed") status=0
    shift 2
    [[ $seed != *,* ]] || { output=${output%"-$seed"} whose=(--seeds ${seed//,/ }); }
    python "$(dirname "$0")/../$script" "$DATA" "${recipe[@]}" --output "$output" "${whose[@]}" "$@" || status=$?
    ((status <= 1 || status == 3)) || exit "$status"  # interrupted, or wrong in a way that will be wrong for all
    if ((status)); then  # one line has said why: a pair that the method cannot work with, a missing file, a loss of NaN
        failed=$status
        [[ -z $teacher || -e $teacher ]] || echo "note: its teacher is trained by: $(basename "$0") teachers $pair 0" >&2
    fi
    return "$status"
}

for pair in $pairs; do
    for seed in $seeds; do
        teacher=
        case $method in
            teachers) schedule "${pair%%-*}"; run main_base.py "base-${pair%%-*}-$seed" "$@" || true ;;
            base) schedule "${pair##*-}"; run main_base.py "base-${pair##*-}-$seed" "$@" || true ;;
            *)
                [[ $pair == *-* ]] || usage
                name=$method-$pair-$seed
                schedule "${pair#*-}"
                plain=("${recipe[@]}")
                recipe+=(--teacher-arch "${pair%%-*}")
                [[ $method == dml || $DATA == --dummy ]] ||
                    recipe+=(--teacher-resume "${teacher:=$folder/base-${pair%%-*}-0/last.pth}")
                home=${teacher%/*}  # of a run, unless somebody has put weights there, and nothing else
                if [[ $teacher && " $*" != *" --teacher-resume"* && ( -e $home/args.json || -e $home/result.json ) ]] &&
                    ! grep -qs '"finished": true' "$home/result.json"; then
                    echo "error: $name: the teacher, ${teacher%/*}, is still learning" >&2
                    failed=1
                    continue
                fi
                distillation
                case $method in
                    ab | fsp)  # 30 epochs of nothing else, then the labels
                        [[ $seed != *,* ]] || { echo "$method: one seed at a time, as it trains twice" >&2; exit 2; }
                        [[ " $*" != *" --$method-"* ]] ||
                            { echo "$method: FLAGS go to main_base.py, too, which has no --$method-..." >&2; exit 2; }
                        [[ " $*" != *" --student-resume"* ]] ||
                            { echo "$method: --student-resume would pass over its first stage" >&2; exit 2; }
                        first=(--ce-weight 0 --epochs 30)  # of whatever schedule FLAGS make the second stage's
                        [[ $DATA != --dummy ]] || first=(--ce-weight 0)
                        run main_distill.py "$name/first" "$@" "${first[@]}" || continue
                        recipe=("${plain[@]}" --student-resume "$folder/$name/first/last.pth")
                        run main_base.py "$name" "$@" || true ;;
                    *) run main_distill.py "$name" "$@" || true ;;
                esac ;;
        esac
    done
done
exit "$failed"
