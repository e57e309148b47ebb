#!/bin/bash
# Train on several nodes, and go on in the next allocation when the time is up:
#
#     sbatch scripts/slurm.sh main_base.py /imagenet --arch resnet50 --output runs/r50
#
# Options before the script's name change what is asked for: sbatch --nodes=4 --time=12:00:00 scripts/slurm.sh ...

#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
# The last line warns two minutes before the end. Without `B:` Slurm warns the step, that is torchrun, and spares this
# shell, which would die of it; so torchrun must be what srun starts, with no shell around it to get the signal instead.

set -uo pipefail

refuse() { echo "slurm.sh: $1" >&2; exit 2; }

output=
for ((i = 1; i <= $#; i++)); do
    case ${!i} in
        --output=*) output=${!i#*=} ;;
        --output) next=$((i + 1)); output=${!next-} ;;
        --overwrite) refuse 'every restart would begin anew with --overwrite' ;;
    esac
done
[[ $output ]] || refuse 'name the folder of the run with --output, it is where an interrupted run goes on'
[[ ${SLURM_JOB_ID-} ]] || refuse 'not in a Slurm job, start it with sbatch'

# The marker is the run's word that it saved and stopped because it was told to. torchrun cannot say so: after a signal
# it exits with 1 whatever its workers did. An old marker would requeue a run that failed, for ever.
marker=$output/interrupted
rm -f "$marker"

first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
[[ $first_node ]] || refuse 'scontrol names no node'
port=$((20000 + SLURM_JOB_ID % 10000))  # jobs that share a node do not share a port

# torchrun hands TERM on (USR1 only if it is new enough), but would kill its workers 30 seconds later, amid the saving;
# that of torch 2.8 does, as it does not know this variable.
# --kill-on-bad-exit=0: the first node to stop must not take away the one that still writes the checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100
# A store of their own for each round of workers: nodes count restarts each for itself, so ranks cannot tell them apart.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
srun --kill-on-bad-exit=0 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-gpu}" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$first_node:$port" --rdzv-id "$SLURM_JOB_ID" \
    "$@"
status=$?

if [[ -e $marker ]]; then
    echo "slurm.sh: interrupted, job $SLURM_JOB_ID goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID"  # ends this script; the same command resumes in the same --output
    exit
fi
exit "$status"
