#!/usr/bin/env bash
# The main job once a seed, then one table over all seeds. usage: seeds.sh BIN [SEED...]
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$1; shift
seeds=("${@:-0 1 2}"); read -ra seeds <<< "${seeds[*]}"
for s in "${seeds[@]}"; do bash experiments/main_job.sh "$bin" "$s"; done
of() { local paths=(); for s in "${seeds[@]}"; do paths+=("runs/household/seed$s/$1"); done; (IFS=,; echo "${paths[*]}"); }
"$bin/python" experiments/compare.py "SFT=$(of sft)" "SFT+=$(of sft_plus)" "StepAgent-Implicit=$(of implicit)" \
    "StepAgent-Inverse=$(of inverse)" --out experiments/results/household.md
