#!/usr/bin/env bash
# Make the samples and train a generator on one GPU: train/gpu/one_card.sh DAY [MODEL]
# NEGREC_WAREHOUSE and NEGREC_CONFIG say where and how, as for `negrec`.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec .venv/bin/negrec train generator --until "$1" --model "${2:-small}"
