#!/bin/bash
# One training stage on a Slurm cluster, one process a GPU:
#
#   sbatch examples/slurm.sh RECIPE parallel.replicate=4 parallel.shard=8 parallel.expert=8 parallel.device=cuda
#
# The degrees must multiply to nodes x tasks. The stages before it (freehold run RECIPE up to tokenize) need one machine
# only; the run folder must lie on storage that all nodes share. Two minutes before the time limit the running step is
# finished and saved; the same command goes on from there.
#SBATCH --job-name=freehold
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
set -euo pipefail

: "${1:?usage: sbatch examples/slurm.sh RECIPE [key=value ...]}"
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

exec srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec freehold pretrain "$@"
' freehold "$@"
