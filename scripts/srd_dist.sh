#!/bin/bash
# CIFAR-100, the pairs of SRDwithDIST, by cifar100.sh's words; METHOD is base, kd, fitnet_kd, at_kd, dml, dist, srd_full
# or srdwithdist. First its own teachers, in runs/srd_dist as all of it:
#
#     DATA=/cifar scripts/srd_dist.sh teachers 'wrn_40_4 wrn_40_2 cifar_resnet18' 0
#
# Images are padded with their reflection before the crop. Which teacher made DML's first column is not known; here it
# is the pair's. Published are single runs.
words='METHOD [PAIRS [SEEDS]]'
pairs='wrn_40_4-wrn_16_4 wrn_40_2-wrn_40_1 wrn_40_4-wrn_16_2 wrn_40_4-cifar_mobilenet_v2_x1_0
       cifar_resnet18-cifar_mobilenet_v2_x1_0'
seeds='0 1 2 3 4' table=srd_dist
source "$(dirname "$0")/cifar100.sh"
