#!/bin/bash
# CIFAR-100, teacher and student of different families. Words, methods and recipes: cifar100.sh.
words='METHOD [PAIRS [SEEDS]]'
pairs='resnet32x4-shufflenet_v1 wrn_40_2-shufflenet_v1 cifar_vgg13-cifar_mobilenet_v2
       cifar_resnet50-cifar_mobilenet_v2 resnet32x4-cifar_shufflenet_v2'
seeds='0 1 2 3 4' table=cifar100
source "$(dirname "$0")/cifar100.sh"
