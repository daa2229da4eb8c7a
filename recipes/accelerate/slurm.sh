#!/bin/bash
# Slurm: sbatch recipes/accelerate/slurm.sh recipes/sft.py [--output_dir runs/m1 ...]
# Started again by `sbatch --requeue` or by hand, a stage resumes from its last whole checkpoint.
#SBATCH --job-name=codexhf
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120          # two minutes to finish the step and save
#SBATCH --requeue
set -eu
export MAIN=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export GPUS=${GPUS:-8} PORT=${PORT:-29500}
# single quotes: each node fills in its own number
exec srun --kill-on-bad-exit=1 bash -c '
  exec accelerate launch --config_file recipes/accelerate/multi_node.yaml \
    --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" \
    --num_processes $((SLURM_NNODES * GPUS)) --main_process_ip "$MAIN" \
    --main_process_port "$PORT" "$@"' bash "$@"
