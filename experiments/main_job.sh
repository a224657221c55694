#!/usr/bin/env bash
# The main job of run.sh: SFT on the household, then SFT+ and both reflections from that SFT.
# usage: main_job.sh BIN [SEED]      BIN holds python and torchrun
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$1
seed=${2:-0}
out=runs/household/seed$seed
started=$(date +%s)

# Two ranks, unless there is only one GPU, or no GPU and only one core.
processors=$("$bin/python" - <<'PYTHON'
import os

import torch

cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
print(torch.cuda.device_count() or cores)
PYTHON
)
ranks=${RANKS:-$((processors > 1 ? 2 : 1))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

run() {
    "$bin/torchrun" --standalone --nproc_per_node "$ranks" stepagent.py \
        --env household --model models/tiny-household --seed "$seed" "$@"
}

# The learning rates are from `reproduce.py tune`, but for Inverse's: a prototype's, on dev.
run --method sft --out "$out/sft"
run --method stepagent-implicit --init "$out/sft/policy" --lr 1.5e-4 --out "$out/implicit"
run --method sft+ --init "$out/sft/policy" --lr 5e-4 --match "$out/implicit" --out "$out/sft_plus"
run --method stepagent-inverse --init "$out/sft/policy" --lr 1.5e-4 --batch 256 --out "$out/inverse"

echo
"$bin/python" experiments/compare.py --out "$out/table.md" \
    "SFT=$out/sft" "SFT+=$out/sft_plus" \
    "StepAgent-Implicit=$out/implicit" "StepAgent-Inverse=$out/inverse"
echo "SFT+ imitates the demonstrations that StepAgent practises on, in the same updates as Implicit."
seconds=$(($(date +%s) - started))
echo "$((seconds / 60)) min $((seconds % 60)) s on $ranks ranks. A run on a page:" \
    "$bin/python experiments/report.py $out/implicit"
