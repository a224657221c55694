#!/usr/bin/env bash
# A real model in a real environment: SFT, then SFT+ and one iteration of each reflection, in
# bfloat16 on one CPU core.
# usage: real_model.sh BIN MODEL scienceworld|alfworld|hotpotqa
# BIN holds python; MODEL is a folder of SmolLM2-135M-Instruct.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$1
model=$2
env=$3
out=runs/real/$env
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

longest=64
splits=test
# Of two rates of SFT+, ScienceWorld's dev split chose this one.
rates=5e-6
options=()
practised=()
case $env in
scienceworld)
    # Four short tasks, 8 train, 8 dev and 8 test variations of each.
    tasks=find-non-living-thing,lifespan-longest-lived,lifespan-shortest-lived
    tasks+=,lifespan-longest-lived-then-shortest-lived
    options=(--env-options "tasks=$tasks variations=8" --eval-tasks 32 --episodes 8)
    splits=dev,test
    rates="5e-6 2e-5"
    ;;
alfworld)
    options=(--experts 32 --eval-tasks 20 --episodes 20)
    practised=(--practice-experts 16)
    ;;
hotpotqa)
    options=(--experts 32 --eval-tasks 30 --episodes 15)
    # Its thoughts quote sentences: 64 tokens cut off 40% of practice.
    longest=160
    ;;
*)
    echo "error: unknown environment $env; give scienceworld, alfworld or hotpotqa" >&2
    exit 2
    ;;
esac

run() {
    "$bin/python" stepagent.py --env "$env" --model "$model" "${options[@]}" \
        --max-new-tokens "$longest" --checkpointing false --micro-tokens 2500 --leaves 64 \
        --eval-each "" --eval-splits "$splits" "$@"
}

run --method sft --sft-lr 1e-4 --sft-batch 4 --sft-epochs 3 --out "$out/sft"
reflect=(--init "$out/sft/policy" --iterations 1 "${practised[@]}")
run --method stepagent-implicit "${reflect[@]}" --lr 5e-6 --out "$out/implicit"
rows=("SFT=$out/sft")
for rate in $rates; do
    run --method sft+ "${reflect[@]}" --match "$out/implicit" --lr "$rate" \
        --out "$out/sft_plus_$rate"
    rows+=("SFT+ $rate=$out/sft_plus_$rate")
done
run --method stepagent-inverse "${reflect[@]}" --lr 5e-6 --out "$out/inverse"
rows+=("StepAgent-Implicit=$out/implicit" "StepAgent-Inverse=$out/inverse")
for split in ${splits//,/ }; do
    echo "== $split"
    "$bin/python" experiments/compare.py "${rows[@]}" --to "SFT+ 5e-6" --splits "$split" \
        --out "$out/$split.md"
done
