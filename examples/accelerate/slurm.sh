#!/bin/bash
# fastsdpo on the nodes of a Slurm job, one launcher a node:
#
#   CONFIG=examples/accelerate/fsdp2.yaml sbatch examples/accelerate/slurm.sh data.jsonl --model MODEL -o FOLDER --resume
#
# All nodes need the same files, FOLDER on a disk that they share among them. The same command goes on from the
# newest checkpoint after the job was stopped.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
set -euo pipefail

export CONFIG=${CONFIG:-examples/accelerate/fsdp2.yaml} GPUS=${GPUS:-8} PORT=${PORT:-29500}
FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export FIRST

# In single quotes: each node fills in its own SLURM_NODEID.
# shellcheck disable=SC2016
srun bash -c 'exec accelerate launch --config_file "$CONFIG" \
    --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" --num_processes "$((SLURM_NNODES * GPUS))" \
    --main_process_ip "$FIRST" --main_process_port "$PORT" -m fastsdpo.train "$@"' fastsdpo "$@"
