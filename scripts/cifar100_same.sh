#!/bin/bash
# CIFAR-100, teacher and student of one family. Words, methods and recipes: cifar100.sh.
words='METHOD [PAIRS [SEEDS]]'
pairs='resnet56-resnet20 resnet110-resnet32 resnet32x4-resnet8x4 wrn_40_2-wrn_16_2 wrn_40_2-wrn_40_1
       cifar_vgg13-cifar_vgg8'
seeds='0 1 2 3 4' table=cifar100
source "$(dirname "$0")/cifar100.sh"
