#!/usr/bin/env bash
# Pretrain on several machines under Slurm, one process for each GPU; they meet by the variables of Slurm's step.
#   sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 scripts/launch_slurm.sh imagenet_vit_large --engine fsdp --fsdp 8
# One process for each machine (--ntasks-per-node=1) uses all GPUs of it; other numbers are refused. Arguments go to
# `mae-jax pretrain`; --workdir must be on storage that all machines share. Slurm's SIGTERM before the time limit, or
# before a preemption, makes all processes save one step (SIGUSR1 and SIGUSR2 do too). Submitted again it continues; so
# does what --requeue starts anew after a preemption or the failure of a machine.
# Where the cluster sets http_proxy or https_proxy, no_proxy must name the machines: gRPC would ask the proxy for them.
#SBATCH --job-name=mae-jax
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
source .venv/bin/activate
# A task that fails ends the others at once; by themselves they end at their next step, or JAX aborts them within two
# minutes (exit code 134).
exec srun --kill-on-bad-exit=1 --label mae-jax pretrain "$@"
