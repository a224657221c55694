"""The commands of the paper's full-size runs, with what they need and what they cost: python experiments/recipe.py -> results/recipe.md"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
from cost import BENCHMARKS, SHAPES, cost, short  # noqa: E402
from memory import MODELS, on_meta  # noqa: E402
from model import training_bytes  # noqa: E402
from parallel import write_text  # noqa: E402
from stepagent import ROUNDS, Config  # noqa: E402

IDS = ("mistralai/Mistral-7B-Instruct-v0.1", "meta-llama/Meta-Llama-3-8B-Instruct", "mistralai/Mistral-Nemo-Instruct-2407")
GPUS, K = 8, Config.practice
ETO = "[agent-eto/eto-sft-trajectory](https://huggingface.co/datasets/agent-eto/eto-sft-trajectory)"
QUESTIONS = ("From [{0}](https://{0}): {1}, into data/{2}. The scripted expert follows the annotators' pages; for the paper's setting collect GPT-4's "
             "trajectories as FireAct did, and give them with `--expert`.")
# benchmark -> (options, metric, the paper's test set and ours, files)
HOW = {
    "WebShop": (["--env", "webshop", "--env-options", "data=data/webshop", "--expert", "data/webshop_sft.json"], "mean reward", "200 goals, both",
                "WebShop's items_shuffle.json, items_ins_v2.json and items_human_ins.json (`setup.sh -d all`) and ETO's WebShop index lists as "
                f"eto_train_indices.json and eto_test_indices.json (eval_agent/data/webshop of its repository), into data/webshop; webshop_sft.json of {ETO} into data."),
    "Mind2Web": (["--env", "mind2web", "--env-options", "data=data/mind2web dev=0", "--eval-each", ""], "macro element accuracy",
                 "912 tasks, test_domain; without a dev split, as in the paper",
                 "From [osunlp/Mind2Web](https://huggingface.co/datasets/osunlp/Mind2Web) data/train/*.json, the folder test_domain of test.zip, and "
                 "scores_all_data.pkl (the ranks of elements), side by side in data/mind2web."),
    "ScienceWorld": (["--env", "scienceworld", "--env-options", "split=eto data=data/scienceworld", "--expert", "data/sciworld_sft.json"],
                     "mean reward", "241 tasks in the paper, 211 in ETO's index file, which we take",
                     "`pip install scienceworld==1.2.3` and Java; train_indices.json, dev_indices.json and test_indices.json of ETO's repository "
                     f"(eval_agent/data/sciworld) into data/scienceworld; sciworld_sft.json of {ETO} into data."),
    "ALFWorld": (["--env", "alfworld", "--env-options", "data=data/alfworld", "--expert", "data/alfworld_sft.json"], "success",
                 "134 games, valid_unseen, both",
                 "`pip install 'textworld[pddl]==1.7.0' alfworld==0.4.2`, then `ALFWORLD_DATA=data/alfworld alfworld-download`; alfworld_sft.json of "
                 f"{ETO} into data."),
    "HotpotQA": (["--env", "hotpotqa", "--env-options", "data=data/hotpotqa"], "exact match",
                 "500 questions of the dev file; the paper's draw is not published",
                 QUESTIONS.format("hotpotqa.github.io", "hotpot_train_v1.1.json and hotpot_dev_distractor_v1.json", "hotpotqa")),
    "2WikiMultihopQA": (["--env", "2wikimultihopqa", "--env-options", "data=data/2wikimultihopqa"], "exact match", "as for HotpotQA",
                        QUESTIONS.format("github.com/Alab-NII/2wikimultihop", "train.json and dev.json", "2wikimultihopqa")),
    "MuSiQue": (["--env", "musique", "--env-options", "data=data/musique"], "exact match", "as for HotpotQA",
                QUESTIONS.format("github.com/StonyBrookNLP/musique", "musique_ans_v1.0_train.jsonl and musique_ans_v1.0_dev.jsonl", "musique")),
}
# The paper's Table 2: SFT, StepAgent-Implicit, StepAgent-Inverse; it draws Mistral-Nemo in Figure 3 and gives no figures
PAPER = {"WebShop": ((60.1, 66.2, 66.5), (62.6, 67.2, 67.6)), "Mind2Web": ((48.7, 53.3, 53.6), (50.3, 55.8, 55.9)),
         "ScienceWorld": ((52.0, 59.6, 59.7), (54.5, 63.6, 64.1)), "ALFWorld": ((68.5, 74.2, 74.9), (67.8, 75.5, 76.1)),
         "HotpotQA": ((24.8, 31.0, 30.8), (33.0, 38.1, 37.8)), "2WikiMultihopQA": ((40.4, 46.8, 46.6), (47.8, 51.3, 52.0)),
         "MuSiQue": ((22.9, 27.7, 27.5), (30.6, 34.4, 34.1))}


def command(name: str, method: str, model: str = "$MODEL", out: str = "$OUT") -> list[str]:
    """The words of one run; every hyper-parameter is the default, which is the paper's where it gives one."""
    start = [] if method == "sft" else ["--init", f"{out}/sft/policy"]
    start += ["--match", f"{out}/stepagent-implicit"] * (method == "sft+")             # the control: plain imitation in the same updates
    return ["torchrun", "--nproc_per_node", str(GPUS), "stepagent.py", *HOW[name][0], "--model", model, "--method", method, *start,
            "--out", f"{out}/{method}"]


def quoted(words: list[str]) -> str:
    return " ".join(f'"{w}"' if " " in w or not w else w for w in words)


def page() -> str:
    implicit, inverse = ROUNDS["stepagent-implicit"], ROUNDS["stepagent-inverse"]
    need = [training_bytes(on_meta(MODELS[i.split("/")[1]]), Config(dtype="bfloat16"), GPUS) for i in IDS]
    lines = ["# The paper's runs, at full size", "",
             f"For {GPUS} GPUs of 80 GB, as in the paper (A100 there; hours here are for H100s). **Nothing on this page was run by us**: scores are the paper's "
             "(Table 2), hours and memory are arithmetic ([cost.md](cost.md), [memory.md](memory.md)); measured figures of ours are in the README, and "
             "none is of this size.", "",
             "Set up with `bash run.sh test` (or `bash run.sh`, which also runs the small main job) and `source .venv/bin/activate`, for WebShop, ScienceWorld and ALFWorld also `pip install -r requirements-envs.txt`; "
             "Llama-3 and Mistral's weights want a Hugging Face login (`hf auth login`). A trajectory longer than the model's context (Llama-3: 8,192 "
             "tokens) stops a run at its start and is named: on Mind2Web expect some. Every hyper-parameter is the default, which is the paper's where it gives one: SFT 1e-5, 64 trajectories an update, 4 epochs, cosine with 3% "
             f"warm-up; reflection 5e-7, 16 step pairs an update, 1 epoch, K = {K}; {implicit} iterations (implicit) and {inverse} (inverse), the peaks of "
             "its Figure 4. It does not give beta, temperatures, PPO's and D's settings: those are ours (`--help`). SFT+ is our control, plain SFT in the updates of Implicit; tune its `--lr` on dev. Weights are sharded where one GPU "
             "cannot hold them; add `--lora-rank 16 --micro-tokens 2048` and a higher `--lr` for one GPU of 24 GB (7B and 8B).", "",
             "Hours: H100-hours of all iterations' inspection, scoring and reflection (GPUs x wall time, idle ones included). SFT, D, evaluation and "
             "saving come on top. An update of 16 pairs is a part of one trajectory's, so that most GPUs idle in reflection; `--batch 346` on ScienceWorld, a "
             "trajectory for each GPU, needs a sixth, and is another experiment than the paper's.", "",
             "The paper's inconsistencies: Table 3's `final` row equals Table 2's ETO row for Llama-3 digit for digit; section 7.2 quotes 67.2 and 63.6 as final-"
             "reward scores, which are StepAgent-Implicit's; ScienceWorld's test split has 241 tasks there and 211 in ETO's file; Table 1 counts all questions "
             "of the QA sets (HotpotQA's 90,447), of which 5,000 / 500 / 500 are used.", ""]
    for b in BENCHMARKS:
        _, metric, test, files = HOW[b.name]
        lines += [f"## {b.name}", "", f"{metric[0].upper()}{metric[1:]}; test: {test}. {files}", "", "```bash",
                  f"for MODEL in {' '.join(IDS)}; do", f"  OUT=runs/{b.name.lower()}/$(basename $MODEL)"]
        lines += [f"  {quoted(command(b.name, method))}" for method in ("sft", "stepagent-implicit", "stepagent-inverse", "sft+")]
        lines += ["done", "```", "", f"| model | paper: SFT / Implicit / Inverse | ours | H100-hours, {implicit} iterations Implicit / {inverse} Inverse | "
                  "GB a GPU, update / generation |", "|---|---|---|---|---|"]
        for n, (model, shape) in enumerate(zip(IDS, SHAPES)):
            hours = [rounds * cost(shape, b, K, GPUS, True, inverse_)["h100_hours"] for rounds, inverse_ in ((implicit, False), (inverse, True))]
            paper = " / ".join(map(str, PAPER[b.name][n])) if n < 2 else "Figure 3 only"
            lines.append(f"| {model.split('/')[1]} | {paper} | not run | {' / '.join(map(short, hours))} | "
                         f"{need[n]['update'] / 1e9:.0f} / {need[n]['generate'] / 1e9:.0f} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    write_text(ROOT / "experiments/results/recipe.md", page())
    print(page())


if __name__ == "__main__":
    main()
