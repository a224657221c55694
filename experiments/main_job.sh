#!/usr/bin/env bash
# The main job of run.sh: SFT on the household, then SFT+ and both reflections from that same SFT, then one table.
# usage: main_job.sh BIN [SEED]      BIN holds python and torchrun
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$1 seed=${2:-0}
out=runs/household/seed$seed
cores=$("$bin/python" -c 'import os, torch; print(torch.cuda.device_count() or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')   # or GPUs
ranks=${RANKS:-$(( cores > 1 ? 2 : 1 ))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

run() { "$bin/torchrun" --standalone --nproc_per_node "$ranks" stepagent.py --env household --model models/tiny-household --seed "$seed" "$@"; }

started=$(date +%s)
run --method sft --out "$out/sft"
init=(--init "$out/sft/policy")
# learning rates: from `reproduce.py tune`
run --method stepagent-implicit "${init[@]}" --lr 1.5e-4 --out "$out/implicit"
run --method sft+ "${init[@]}" --lr 5e-4 --match "$out/implicit" --out "$out/sft_plus"
run --method stepagent-inverse "${init[@]}" --lr 5e-5 --batch 256 --out "$out/inverse"
echo
"$bin/python" experiments/compare.py "SFT=$out/sft" "SFT+=$out/sft_plus" "StepAgent-Implicit=$out/implicit" \
    "StepAgent-Inverse=$out/inverse" --out "$out/table.md"
echo "$(( ($(date +%s) - started) / 60 )) min $(( ($(date +%s) - started) % 60 )) s, $ranks ranks with $OMP_NUM_THREADS threads each; whole episodes in $out/*/eval"
