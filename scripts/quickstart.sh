#!/usr/bin/env bash
# From a bare machine to a pretrained masked autoencoder: proof, run, picture, scores. Can be run again; it continues.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh torch
export PATH="$PWD/.venv/bin:$PATH"
run=runs/digits

echo; echo "== The numbers against PyTorch, stage by stage"
python -m parity --report runs/parity

echo; echo "== Pretraining on 1,797 handwritten digits"
mae-jax pretrain digits --workdir "$run"

echo; echo "== What it makes of hidden patches, and what its features are worth"
mae-jax reconstruct "$run" --out "$run/reconstructions.png"
mae-jax knn "$run"

echo; echo "== A linear probe, and fine-tuning, on four fifths of the digits"
mae-jax probe digits --init "$run" --workdir "$run-probe"
mae-jax finetune digits --init "$run" --workdir "$run-finetuned"

echo
echo "Reconstructions:  $run/reconstructions.png"
echo "Checkpoints:      $run/checkpoints"
echo "Mistakes:         $run-finetuned/confusion.png, worst.png"
echo "Losses:           $run/metrics.jsonl"
echo "Proof:            runs/parity/parity.md, parity.png"
