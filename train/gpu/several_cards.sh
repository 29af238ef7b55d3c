#!/usr/bin/env bash
# The same on all GPUs of one machine: train/gpu/several_cards.sh DAY [MODEL] [CARDS]
# Spark makes the samples once; then one process per card trains, and the first of them writes.
set -euo pipefail
cd "$(dirname "$0")/../.."
cards=${3:-$(nvidia-smi -L | wc -l)}
.venv/bin/negrec run --ds "$1" --force --stages \
  item_semantic_id,training_translation,training_alignment,training_next_negative,training_grpo
exec .venv/bin/accelerate launch --multi_gpu --num_machines 1 --num_processes "$cards" --mixed_precision no \
  -m jobs.cli train generator --until "$1" --model "${2:-small}" --no-samples
