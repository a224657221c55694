"""Both reflections train on every benchmark, from small files in its official format."""

import json
from pathlib import Path

import pytest
from ranks import QUIET, metrics, run

from stepagent import METHODS

# ------------------------------------------------------------------------------ question answering


def hotpot(number: int) -> dict:
    town, river = f"Aville {number}", f"Brook {number}"
    context = [
        [town, [f"{town} is a town.", f" It lies on the {river}."]],
        [river, [f"{river} is a river.", f" It is {number} miles long."]],
    ]
    return {
        "_id": f"h{number}",
        "question": f"How long is the river of {town}?",
        "answer": f"{number} miles",
        "type": "bridge",
        "level": "easy",
        "supporting_facts": [[town, 1], [river, 1]],
        "context": context,
    }


def two_wiki(number: int) -> dict:
    film, person = f"Film {number}", f"Ann {number}"
    facts = [[film, "director", person], [person, "date of birth", "1 May 1950"]]
    context = []
    for subject, relation, thing in facts:
        context.append([subject, [f"{subject} is here.", f"Its {relation} is {thing}."]])
    return {
        "_id": f"w{number}",
        "type": "compositional",
        "question": f"When was the director of {film} born?",
        "context": context,
        "entity_ids": "Q1",
        "supporting_facts": [[film, 1], [person, 1]],
        "evidences": facts,
        "answer": "1 May 1950",
    }


def musique(number: int) -> dict:
    land, town, mayor = f"Land {number}", f"Town {number}", f"Zoë {number}"
    texts = [(land, f"The capital of {land} is {town}."), (town, f"{town} has the mayor {mayor}.")]
    paragraphs, hops = [], []
    for place, (title, text) in enumerate(texts):
        paragraph = {"idx": place, "title": title, "paragraph_text": text, "is_supporting": True}
        paragraphs.append(paragraph)
    for place, (question, answer) in enumerate([(f"{land} >> capital", town), ("#1", mayor)]):
        hop = {"id": place, "question": question, "answer": answer, "paragraph_support_idx": place}
        hops.append(hop)
    return {
        "id": f"2hop__{number}",
        "paragraphs": paragraphs,
        "question": f"Who is the mayor of the capital of {land}?",
        "question_decomposition": hops,
        "answer": mayor,
        "answer_aliases": [],
        "answerable": True,
    }


QUESTIONS = {
    "hotpotqa": (hotpot, "hotpot_train_v1.1.json", "hotpot_dev_distractor_v1.json"),
    "2wikimultihopqa": (two_wiki, "train.json", "dev.json"),
    "musique": (musique, "musique_ans_v1.0_train.jsonl", "musique_ans_v1.0_dev.jsonl"),
}


def write_questions(folder: Path, name: str) -> None:
    make, train, dev = QUESTIONS[name]
    for file, numbers in ((train, range(10)), (dev, range(10, 17))):
        rows = [make(number) for number in numbers]
        text = json.dumps(rows)
        if file.endswith(".jsonl"):
            text = "\n".join(map(json.dumps, rows)) + "\n"
        (folder / file).write_text(text)


# ------------------------------------------------------------------------------------- web worlds


def write_mind2web(folder: Path) -> None:
    """Tasks of one click."""
    page = '<html backend_node_id="1"><button backend_node_id="10">Book</button>'
    page += '<a backend_node_id="40">Menu</a></html>'
    nodes = {}
    for tag, node in (("button", "10"), ("a", "40")):
        attributes = json.dumps({"backend_node_id": node})
        nodes[tag] = {"tag": tag, "attributes": attributes, "backend_node_id": node}
    click = {
        "action_uid": "a",
        "raw_html": page,
        "cleaned_html": page,
        "operation": {"original_op": "CLICK", "value": "", "op": "CLICK"},
        "pos_candidates": [
            nodes["button"] | {"is_original_target": True, "is_top_level_target": True}
        ],
        "neg_candidates": [nodes["a"]],
    }

    def task(name: str) -> dict:
        return {
            "website": "tables",
            "domain": "Travel",
            "subdomain": "Restaurant",
            "annotation_id": name,
            "confirmed_task": "Book a table",
            "action_reprs": ["[button]  Book -> CLICK"],
            "actions": [click],
        }

    files = {"train/train_0": [f"t{number}" for number in range(6)]}
    files["test_domain/test_domain_0"] = ["d0"]
    for file, names in files.items():
        (folder / file).parent.mkdir()
        (folder / f"{file}.json").write_text(json.dumps([task(name) for name in names]))


def write_webshop(folder: Path) -> None:
    """Thirty shoes, each with one instruction of the synthetic kind."""
    products, instructions = [], {}
    for number in range(30):
        asin = f"B0{number:08}"
        products.append(
            {
                "asin": asin,
                "name": f"Walking shoe model{number} for men",
                "full_description": f"A shoe, kind{number}.",
                "small_description": ["Rubber sole"],
                "customization_options": "",
                "category": "fashion",
                "product_category": "Clothing › Shoes › Walking",
                "query": "walking shoes",
                "pricing": "$19.99",
                "images": [],
                "average_rating": "",
            }
        )
        instructions[asin] = {
            "attributes": ["rubber sole"],
            "instruction": f"Find me walking shoes model{number}",
            "instruction_attributes": ["rubber sole"],
        }
    asked = {"instruction": "i want a shoe, model1.", "instruction_attributes": ["rubber sole"]}
    human = {products[1]["asin"]: [asked | {"instruction_options": []}]}
    files = {"items_shuffle_1000": products, "items_ins_v2_1000": instructions}
    for name, content in (files | {"items_human_ins": human}).items():
        (folder / f"{name}.json").write_text(json.dumps(content))


# ------------------------------------------------------------------------------------ whole runs

# Environment -> the scores that it has beside success.
BENCHMARKS = {
    "webshop": set(),
    "mind2web": {"operation_f1", "step_success"},
    "hotpotqa": {"f1"},
    "2wikimultihopqa": {"f1"},
    "musique": {"f1"},
}


@pytest.mark.parametrize("method", ["stepagent-implicit", "stepagent-inverse"])
@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_benchmark_trains_from_its_own_files(tmp_path, name, method):
    folder = tmp_path / "data"
    folder.mkdir()
    options = f"data={folder}"
    if name == "webshop":
        pytest.importorskip("bm25s", reason="pip install -r requirements-envs.txt")
        pytest.importorskip("rapidfuzz", reason="pip install -r requirements-envs.txt")
        write_webshop(folder)
    elif name == "mind2web":
        write_mind2web(folder)
        options += " dev=0"
    else:
        write_questions(folder, name)
    words = ["--env", name, "--env-options", options, "--method", method, "--iterations", "1"]
    out = run(tmp_path / "x", *QUIET, "--eval-splits", "test", "--eval-tasks", "2", *words)
    last = metrics(out, "eval")[-1]
    assert last["split"] == "test" and last["tasks"] in (1, 2)
    assert set(last["secondary"]) == BENCHMARKS[name]
    reflection = METHODS[method].iteration.__name__
    assert {row["phase"] for row in metrics(out)} >= {"sft", "inspect", reflection, "eval"}
    report = (out / "report.md").read_text()
    assert all(score in report for score in BENCHMARKS[name])
