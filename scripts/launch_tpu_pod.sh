#!/usr/bin/env bash
# Pretrain on all hosts of a TPU pod slice; JAX finds the others by the TPU's own metadata.
#   scripts/launch_tpu_pod.sh TPU_NAME ZONE imagenet_vit_huge --engine fsdp --data folder:/data --workdir /shared/h14
# The project must lie at the same path on every host as here (relative to the home directory), installed with
# `source scripts/setup.sh tpu`; data and --workdir on storage that all hosts share. Run again, it continues.
set -euo pipefail
if [ $# -lt 3 ]; then
    sed -n 2,5p "$0" >&2
    exit 2
fi
tpu="$1" zone="$2"
shift 2
project="$(realpath --relative-to="$HOME" "$(dirname "$0")/..")"
# Each word quoted once more: they go through a shell on every host.
command="cd $(printf %q "$project") && .venv/bin/mae-jax pretrain $(printf '%q ' "$@")"
exec gcloud compute tpus tpu-vm ssh "$tpu" --zone "$zone" --worker=all --command "$command"
