#!/bin/bash
# One training stage on a Slurm cluster, one process a GPU: recipes/gpu8.yaml on four machines of eight GPUs.
#
#   freehold run gpu8 until=tokenize     once, on one machine: the stages before training
#   sbatch examples/slurm.sh gpu8 parallel.nproc=0 parallel.replicate=4 parallel.shard=8 parallel.expert=8
#
# The degrees must multiply to nodes x tasks. Submit from the folder of the run, on storage that all nodes share;
# FREEHOLD_VENV names the virtual environment (default: .venv there). Five minutes before the time limit the running
# step is finished and saved, and the job is queued again under its number; so it is after a node failure. It resumes
# from the newest good checkpoint, and ends when the stage is done.
#SBATCH --job-name=freehold
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

: "${1:?usage: sbatch examples/slurm.sh RECIPE [key=value ...]}"
cd "${SLURM_SUBMIT_DIR:-.}"
environment=${FREEHOLD_VENV:-.venv}
if [ -e "$environment/bin/activate" ]; then
    source "$environment/bin/activate"
elif ! command -v freehold > /dev/null; then
    echo "no freehold on PATH and no virtual environment in $environment; FREEHOLD_VENV names it" >&2
    exit 2
fi
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# The time limit is near: every rank finishes its step and saves, then the job waits for its next turn.
again() {
    trap '' USR1
    scancel --signal=TERM "$SLURM_JOB_ID"
    wait "$ranks" || true
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap again USR1

srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec freehold pretrain "$@"
' freehold "$@" &
ranks=$!
wait "$ranks"
