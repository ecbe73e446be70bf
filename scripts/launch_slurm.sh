#!/usr/bin/env bash
# Pretrain on several machines under Slurm, one process for each GPU; JAX finds the others by Slurm's variables.
#   sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 scripts/launch_slurm.sh imagenet_vit_large --engine fsdp --fsdp 8
# Arguments go to `mae-jax pretrain`; --workdir must be on storage that all machines share. Slurm's SIGTERM before the
# time limit, or before a preemption, makes all processes save one step. Submitted again it continues; so does what
# --requeue starts anew after a preemption or the failure of a machine.
#SBATCH --job-name=mae-jax
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
source .venv/bin/activate
# A task that fails ends the others at once; those that are alive would end by themselves within two minutes.
exec srun --kill-on-bad-exit=1 --label mae-jax pretrain "$@"
