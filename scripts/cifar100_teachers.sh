#!/bin/bash
# The teachers of cifar100_same.sh and cifar100_cross.sh, by cifar100.sh's words. One of each teaches all students.
words='[NETWORKS [SEEDS]]'
pairs='resnet56 resnet110 resnet32x4 wrn_40_2 cifar_vgg13 cifar_resnet50'
seeds=0 table=cifar100
set -- teachers "$@"
source "$(dirname "$0")/cifar100.sh"
