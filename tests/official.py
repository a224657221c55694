"""Small files in the official formats of the benchmarks, and where the real ones are."""

import json
import os
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

NEEDS_PACKAGES = "pip install -r requirements-envs.txt"


def real_files(name: str) -> Path:
    """The folder of a benchmark's real files; without them the test is skipped."""
    folder = Path(os.environ.get("STEPAGENT_DATA", "-"), name)
    if not folder.is_dir():
        pytest.skip(f"STEPAGENT_DATA names no folder with {name}/")
    return folder


# ------------------------------------------------------------------------------ question answering

QA_FILES = {
    "hotpotqa": ("hotpot_train_v1.1.json", "hotpot_dev_distractor_v1.json"),
    "2wikimultihopqa": ("train.json", "dev.json"),
    "musique": ("musique_ans_v1.0_train.jsonl", "musique_ans_v1.0_dev.jsonl"),
}


def hotpot_row(i: int) -> dict:
    """Odd rows compare a town with a beach, even ones go from a town to its river."""
    town, river, beach = f"Aville {i}", f"Brook {i} (river)", f"Rock &amp; Sand {i}"
    row = {
        "_id": f"h{i}",
        "context": [
            [town, [f"{town} is a town.", f" It lies on the {river}."]],
            [river, [f"Brook {i} is a river.", f" It is {i} miles long."]],
            [beach, ["A beach."]],
            ["Shared", [f"Told by {i}."]],
        ],
        "question": f"How long is the river of {town}?",
        "answer": f"{i} miles",
        "type": "bridge",
        "level": "easy",
        "supporting_facts": [[river, 1], [town, 1]],
    }
    if i % 2:
        row |= {"question": f"Are {town} and Rock & Sand {i} both towns?", "answer": "no"}
        row |= {"type": "comparison", "level": "hard"}
        row["supporting_facts"] = [[town, 0], [beach, 0]]
    return row


def wiki_row(i: int) -> dict:
    """Odd rows go from a film to its director's birth, even ones compare two films so."""
    triples = [
        [f"Film {i}a", "director", f"Ann a{i}"],
        [f"Film {i}b", "director", f"Ann b{i}"],
        [f"Ann a{i}", "date of birth", "1 May 1950"],
        [f"Ann b{i}", "date of birth", "2 May 1950"],
    ]
    context = []
    for subject, relation, thing in triples:
        context.append([subject, [f"{subject} is here.", f"Its {relation} is {thing}."]])
    chosen = [triples[0], triples[2]] if i % 2 else triples
    return {
        "_id": f"w{i}",
        "type": "compositional" if i % 2 else "bridge_comparison",
        "question": f"Of Film {i}a and Film {i}b ..?",
        "context": context,
        "entity_ids": "Q1",
        "supporting_facts": [[subject, 1] for subject, _, _ in chosen],
        "evidences": chosen,
        "answer": "1 May 1950" if i % 2 else f"Film {i}b",
    }


def musique_row(i: int) -> dict:
    texts = [
        ("Capital", f"First of {i}."),
        (f"Land {i}", f"The capital of Land {i} is Town {i}."),
        ("Capital", f"Town {i} has the mayor Zoë {i}."),
    ]
    paragraphs = []
    for number, (title, text) in enumerate(texts):
        marks = {"idx": number, "is_supporting": number > 0}
        paragraphs.append({"title": title, "paragraph_text": text, **marks})
    parts = [
        {"id": 1, "question": f"Land {i} >> capital", "answer": f"Town {i}"},
        {"id": 2, "question": "who is mayor of #1", "answer": f"Zoë {i}"},
    ]
    return {
        "id": f"2hop__{i}_{i}",
        "paragraphs": paragraphs,
        "question": f"Who is the mayor of the capital of Land {i}?",
        "question_decomposition": [{**part, "paragraph_support_idx": part["id"]} for part in parts],
        "answer": f"Zoë {i}",
        "answer_aliases": [f"Mayor {i}", f"Z. {i}"],
        "answerable": True,
    }


QA_ROWS = {"hotpotqa": hotpot_row, "2wikimultihopqa": wiki_row, "musique": musique_row}


def write_questions(
    folder: Path,
    name: str,
    train: Iterable[int] | None = range(10),
    change: Callable = list,
    official: bool = True,
) -> str:
    """Both files. change(rows) makes the dev file's content from its rows."""
    train_file, dev_file = QA_FILES[name]
    contents = {dev_file: change([QA_ROWS[name](i) for i in range(10, 17)])}
    if train is not None:
        contents[train_file] = [QA_ROWS[name](i) for i in train]
    for file, content in contents.items():
        if not isinstance(content, str) and file.endswith(".jsonl"):
            content = "".join(json.dumps(row) + "\n" for row in content)
        elif not isinstance(content, str):
            content = json.dumps(content)
        path = folder / (file if official else file.replace(".json", "_sample.json"))
        path.write_text(content)
    return str(folder)


# ---------------------------------------------------------------------------------------- Mind2Web

PAGE = """<html backend_node_id="1"><body backend_node_id="2"><div backend_node_id="3">
 <button backend_node_id="10" type="button">
  <svg backend_node_id="11"/><text backend_node_id="12">Book a  table</text></button>
 <input backend_node_id="20" type="text" placeholder="City &amp; state" input_value="Paris"/>
 <select backend_node_id="30" name="party">
  <option backend_node_id="31" value="1">1 guest</option><option backend_node_id="32">2 guests
  </option></select>
 <a backend_node_id="40" aria_label="Open the menu"><img backend_node_id="41" alt="Menu"></a>
</div></body></html>"""
TAGS = {"10": "button", "20": "input", "30": "select", "40": "a", "12": "text"}


def candidate(node: str, **extra) -> dict:
    attributes = json.dumps({"backend_node_id": node})
    tag = TAGS.get(node, "div")
    return {"tag": tag, "attributes": attributes, "backend_node_id": node, **extra}


def action(uid: str, operation: str, right: list, value: str = "") -> dict:
    """The last of the right nodes is the annotator's."""
    positive = []
    for node in right:
        is_target = node == right[-1]
        positive.append(candidate(node, is_original_target=is_target, is_top_level_target=True))
    return {
        "action_uid": uid,
        "raw_html": "<html>" + "x" * 500,
        "cleaned_html": PAGE,
        "operation": {"original_op": operation, "value": value, "op": operation},
        "pos_candidates": positive,
        "neg_candidates": [candidate(node) for node in TAGS if node not in right],
    }


def task(name: str, actions: list | None = None, **changes) -> dict:
    actions = actions or [
        action("a", "CLICK", ["12", "10"]),
        action("b", "TYPE", ["20"], "New York"),
        action("c", "SELECT", ["30"], "2 guests"),
        action("d", "CLICK", ["40"]),
    ]
    return {
        "website": "tables",
        "domain": "Travel",
        "subdomain": "Restaurant",
        "annotation_id": name,
        "confirmed_task": "Book a table for 2 guests in New York",
        "action_reprs": [f"[x]  thing -> {recorded['action_uid']}" for recorded in actions],
        "actions": actions,
        **changes,
    }


def write_mind2web(folder: Path, train=None, test=None, ranks=None, **more) -> str:
    files = {
        "train/train_0.json": train or [task("t0"), task("t1", domain="Café")],
        "train/train_1.json": [task("t2"), task("t3")],
        "test_domain/test_domain_0.json": test or [task("d0")],
        **more,
    }
    for name, tasks in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(tasks, ensure_ascii=False), encoding="utf-8")
    if ranks is not None:
        if not isinstance(ranks, bytes):
            ranks = pickle.dumps({"scores": {}, "ranks": ranks})
        (folder / "scores_all_data.pkl").write_bytes(ranks)
    return str(folder)


# ----------------------------------------------------------------------------------------- WebShop


def shop_row(number: int, **changes) -> dict:
    """A product. Odd ones have options."""
    options = {
        "Color": [{"value": "C1-Black"}, {"value": "C2/Red "}],
        "Size": [{"value": "7"}, {"value": "7.5"}],
        "Style": None,
    }
    return {
        "asin": asin(number),
        "name": f"Walking shoe model{number} for men",
        "full_description": f"A shoe, kind{number}.",
        "small_description": ["Rubber sole", "Easy to clean"],
        "customization_options": options if number % 2 else "",
        "category": "fashion",
        "product_category": "Clothing › Shoes › Walking",
        "query": "walking shoes ",
        "pricing": "$19.99" if number % 3 else "$19.99 to $25.0",
        "images": [],
        "average_rating": "",
        **changes,
    }


def asin(number: int) -> str:
    return f"B0{number:08}"


def human(text: str, attributes: list, options: list) -> dict:
    return {
        "instruction": text,
        "instruction_attributes": attributes,
        "instruction_options": options,
    }


def write_webshop(folder: Path, rows: list, **files) -> str:
    synthetic = {}
    for number, product_row in enumerate(rows):
        synthetic[product_row["asin"]] = {
            "attributes": ["rubber sole"],
            "instruction": f"Find me walking shoes model{number}",
            "instruction_attributes": ["rubber sole"],
        }
    asked = human("i want a red shoe, model1, size 7.5.", ["rubber sole"], ["red", "7.5"])
    small = {
        "items_shuffle_1000.json": rows,
        "items_ins_v2_1000.json": synthetic,
        "items_human_ins.json": {rows[1]["asin"]: [asked, human("nothing asked", [], [])]},
    }
    for name, content in {**small, **files}.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8")
    return str(folder)


# (an option's value, what was wished, hits): get_option_reward of WebShop with thefuzz 0.20.0. A
# synthetic goal's wish is a pair.
OPTION_HITS = [
    ("xx-large", ("size", "3x-large"), False),
    ("x-large", ("size", "x-large"), True),
    ("large", ("size", "x-large"), True),
    ("7", ("size", "7.5"), True),
    ("7.5 wide", ("size", "7.5"), False),
    ("red", ("color", "dark red"), True),
    ("camo green", ("color", "green"), False),
    ("c1-black", ("color", "black"), True),
    ("navyblue", ("color", "navyblue"), False),
    ("color", ("color", "teal"), False),
    ("xx-large", "3x-large", True),
    ("green", "green camo", False),
    ("wine red", "red wine", True),
    ("fée", "fe", True),
]

# (a text, its stems) of Anserini 0.14.3's DefaultEnglishAnalyzer, as in pyserini 0.17.0.
LUCENE_STEMS = [
    (
        "Women's T-Shirts, size 9 (XX-Large), 1,000 pieces at 7.5oz",
        "women t shirt size 9 xx larg 1,000 piec 7.5oz",
    ),
    (
        "it's O'Neil's ❤ wi-fi don't u.s.a. e.g. foo_bar 3x4 is its ties running happily",
        "o'neil ❤ wi fi don't u.s.a e.g foo_bar 3x4 it ti run happili",
    ),
    ("US size S, XS or OS", "us size s xs os"),
]
# The last two are of equal length for Lucene, but 40 and 41 words long.
LUCENE_TEXTS = {
    "B1": "Shirt, long sleeve",
    "B2": "Shirts and shirts: a pack of 9 shirts, long sleeve",
    "B3": "T-shirt for women, size 9",
    "B4": "Women's running shoes, 7.5",
    "B5": "Shirt" + 40 * " red",
    "B6": "Shirt" + 39 * " red",
    "B8": "Shirt, long sleeve",
    "B9": "Long dress for women",
}
# (words, what its SimpleSearcher finds in these texts)
LUCENE_BEST = [
    ("shirts", "B2 B1 B8 B3 B5 B6"),
    ("9", "B3 B2"),
    ("long sleeves for a woman", "B1 B8 B2 B9"),
    ("Shirt shirt long", "B2 B1 B8 B9 B3 B5 B6"),
    ("run 7.5", "B4"),
    ("women", "B9 B4 B3"),
    ("the", ""),
    ("zzz", ""),
]
