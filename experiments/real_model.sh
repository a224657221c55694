#!/usr/bin/env bash
# A real model in a real environment, bfloat16 on one CPU core: SFT, then SFT+ and one iteration of each reflection.
# usage: real_model.sh BIN MODEL scienceworld|alfworld|hotpotqa        BIN holds python; MODEL: a folder of SmolLM2-135M-Instruct
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$1 model=$2 env=$3
out=runs/real/$env longest=64 splits=test rates=5e-6                     # of two rates of SFT+, ScienceWorld's dev chose this one
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
case $env in
scienceworld)   # 4 short tasks, 8 train, 8 dev and 8 test variations each
    options=(--env-options "tasks=find-non-living-thing,lifespan-longest-lived,lifespan-shortest-lived,lifespan-longest-lived-then-shortest-lived variations=8"
             --eval-tasks 32) splits=dev,test rates="5e-6 2e-5" ;;
alfworld) options=(--experts 32 --practice-experts 16 --eval-tasks 20 --episodes 20) ;;
hotpotqa) options=(--experts 32 --eval-tasks 30 --episodes 15) longest=160 ;;            # its thoughts quote sentences: 64 tokens cut 40% of practice
*) echo "error: unknown environment $env; give scienceworld, alfworld or hotpotqa" >&2; exit 2 ;;
esac
run() { "$bin/python" stepagent.py --env "$env" --model "$model" --episodes 8 "${options[@]}" --max-new-tokens "$longest" --checkpointing false --micro-tokens 2500 \
        --eval-each "" --eval-splits "$splits" --iterations 1 --leaves 64 "$@"; }
run --method sft --sft-lr 1e-4 --sft-batch 4 --sft-epochs 3 --out "$out/sft"
init=(--init "$out/sft/policy" --lr 5e-6) rows=("SFT=$out/sft")
run --method stepagent-implicit "${init[@]}" --out "$out/implicit"
for rate in $rates; do
    run --method sft+ "${init[@]}" --match "$out/implicit" --lr "$rate" --out "$out/sft_plus_$rate"
    rows+=("SFT+ $rate=$out/sft_plus_$rate")
done
run --method stepagent-inverse "${init[@]}" --out "$out/inverse"
rows+=("StepAgent-Implicit=$out/implicit" "StepAgent-Inverse=$out/inverse")
for split in ${splits//,/ }; do
    echo "== $split"
    "$bin/python" experiments/compare.py "${rows[@]}" --to "SFT+ 5e-6" --splits "$split" --out "$out/$split.md"
done
