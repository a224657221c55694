"""WebShop on small files of our own in the official format, its reward by hand, and the real 1,000 products where they are."""
import json
import os
import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("bm25s", reason="pip install -r requirements-envs.txt")
pytest.importorskip("rapidfuzz", reason="pip install -r requirements-envs.txt")

from envs import Product, ShoppingGoal, _stream_json, make_env, webshop_reward  # noqa: E402
from rollout import InputError  # noqa: E402

REAL = os.path.join(os.environ.get("STEPAGENT_DATA", ""), "webshop")
real = pytest.mark.skipif(not os.path.exists(os.path.join(REAL, "items_shuffle_1000.json")),
                          reason="STEPAGENT_DATA names no folder with webshop/items_shuffle_1000.json")


def row(i: int, **changes) -> dict:
    colours = {"Color": [{"value": "C1-Black"}, {"value": "C2/Red "}], "Size": [{"value": "7"}, {"value": "7.5"}], "Style": None}
    return {"asin": f"B0{i:08}", "name": f"Walking shoe model{i} for men", "full_description": f"A shoe, kind{i}.",
            "small_description": ["Rubber sole", "Easy to clean"], "customization_options": colours if i % 2 else "",
            "category": "fashion", "product_category": "Clothing › Shoes › Walking", "query": "walking shoes ",
            "pricing": "$19.99" if i % 3 else "$19.99 to $25.0", "images": [], "average_rating": "", **changes}


def write(folder: Path, rows: list, **files) -> str:
    small = {"items_shuffle_1000.json": rows,
             "items_ins_v2_1000.json": {r["asin"]: {"attributes": ["rubber sole"], "instruction": f"Find me walking shoes model{i}",
                                                    "instruction_attributes": ["rubber sole"]} for i, r in enumerate(rows)},
             "items_human_ins.json": {rows[1]["asin"]: [
                 {"instruction": "i want a red shoe, model1, size 7.5.", "instruction_attributes": ["rubber sole"],
                  "instruction_options": ["red", "7.5"]},
                 {"instruction": "nothing asked", "instruction_attributes": [], "instruction_options": []}]}}
    for name, content in {**small, **files}.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return make_env("webshop", data=write(tmp_path_factory.mktemp("webshop"), [row(i) for i in range(30)]))


def task_of(shop, asin: str, **fields) -> str:
    return next(i for i, g in shop.goals.items() if g.product.asin == asin and not i.startswith("human")
                and all(getattr(g, name) == value for name, value in fields.items()))


# --- goals -----------------------------------------------------------------------------------------------------------
def test_goals_are_every_instruction_with_every_combination_of_options(shop):
    assert len(shop.goals) == 15 * 1 + 15 * 4 + 1                    # the instruction without attributes is skipped
    texts = {g.text.split(", and price")[0] for i, g in shop.goals.items() if g.product.asin == "B000000001" and i.isdigit()}
    assert texts == {f"Find me walking shoes model1 with color: {c}, and size: {s}" for c in ("c1-black", "c2 | red") for s in ("7", "7.5")}
    assert shop.goal("human-0").text.startswith("i want a red shoe, model1, size 7.5, and price lower than ")


def test_splits_part_the_products_and_human_products_are_not_in_train(shop):
    asins = {split: {shop.goal(i).product.asin for i in ids} for split, ids in shop.splits.items()}
    assert sum(len(shop.splits[s]) for s in ("train", "dev", "test")) == 75 and shop.splits["human"] == ["human-0"]
    assert not asins["train"] & (asins["dev"] | asins["test"] | asins["human"]) and not asins["dev"] & asins["test"]


def test_price_bounds_are_the_same_every_time_and_above_the_price(tmp_path, shop):
    again = make_env("webshop", data=write(tmp_path, [row(i) for i in range(30)]))
    assert {i: g.text for i, g in again.goals.items()} == {i: g.text for i, g in shop.goals.items()}
    for goal in shop.goals.values():
        assert goal.product.price < goal.price_upper <= goal.product.price + 40
        assert f"price lower than {goal.price_upper:.2f} dollars" in goal.text
    assert {g.product.tag for g in shop.goals.values()} == {"$19.99", "$19.99 to $25.0"}


def test_prices_none_and_high(tmp_path):
    shop = make_env("webshop", data=write(tmp_path, [row(0, pricing=""), row(1, pricing="$1,985.50"), row(2)]))
    assert shop.products["B000000000"].price == 100 and shop.products["B000000000"].tag == "$100.0"
    dear = shop.goal(task_of(shop, "B000000001"))
    assert dear.product.price == 1985.5 and dear.price_upper == 1e6 and "price" not in dear.text


def full(folder: Path, train: list, test: list) -> str:
    rows = [row(i) for i in range(30)]
    human = {r["asin"]: [{"instruction": f"shoes model{i}", "instruction_attributes": ["rubber sole"], "instruction_options": []}]
             for i, r in enumerate(rows)}
    return write(folder, rows, **{"items_shuffle.json": rows, "items_ins_v2.json": {}, "items_human_ins.json": human,
                                  "eto_train_indices.json": train, "eto_test_indices.json": test})


def test_full_files_take_the_human_goals_in_official_order_and_eto_s_lists(tmp_path):
    shop = make_env("webshop", data=full(tmp_path, [3, 4, 4, 5, 0], [5, 7]))
    assert shop.splits["train"] == ["3", "4", "0"] and shop.splits["test"] == ["5", "7"]
    assert shop.splits["dev"] == [str(i) for i in range(30) if i not in (0, 3, 4, 5, 7)]
    order = list(range(30))
    random.seed(233)                                                 # as WebShop shuffles
    random.shuffle(order)
    assert [shop.goal(str(i)).product.asin for i in range(30)] == [f"B0{i:08}" for i in order]


def test_products_are_read_one_by_one_whatever_the_chunk(tmp_path):
    rows = [row(i, name='à "}, {" name') for i in range(3)]
    (tmp_path / "x").write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    for chunk in (1, 7, 100, 10 ** 6):
        read = list(_stream_json(str(tmp_path / "x"), chunk))
        data = (tmp_path / "x").read_bytes()
        assert [r for r, _, _ in read] == rows == [json.loads(data[start:start + size]) for _, start, size in read]


# --- reward ----------------------------------------------------------------------------------------------------------
def product(name="Suede walking shoe", features=(), description="", path="Clothing › Shoes › Walking", query="shoes", price=20.0,
            attributes=()) -> Product:
    return Product("B000000000", name, description, list(features), "fashion", path, query, {}, "", price, list(attributes))


def reward(bought=None, chosen=(), attributes=("rubber sole",), options=(), bound=30.0, wanted=None) -> float:
    bought = bought or product(attributes=["rubber sole"])
    return webshop_reward(bought, dict(chosen), ShoppingGoal(wanted or product(), "", list(attributes), list(options), bound))


def test_reward_counts_attributes_options_and_price():
    assert reward() == 1
    assert reward(product()) == 1 / 2                                # attribute nowhere
    assert reward(product(attributes=["rubber sole"], price=30.0)) == 1                          # the bound itself is kept
    assert reward(product(attributes=["rubber sole"], price=30.01)) == 1 / 2
    assert reward(product(attributes=["rubber sole"]), attributes=["rubber sole", "blue ink"]) == 2 / 3


@pytest.mark.parametrize("chosen, options, hits", [
    ({}, ["red", "7.5"], 0),
    ({"color": "red"}, ["red", "7.5"], 1),                           # a subset earns its share
    ({"color": "red", "size": "7.5"}, ["red", "7.5"], 2),
    ({"color": "c1-red"}, ["red", "7.5"], 1),                        # a colour within the name
    ({"color": "navyblue"}, ["blue sky", "7.5"], 1),                 # both are reduced to their colour
    ({"color": "red", "size": "7"}, ["red", "8.5"], 1),
    ({"size": "7.5 wide"}, ["red", "7.5"], 1),                       # fuzzy, sizes too: words of the one are words of the other
    ({"size": "x-large"}, ["red", "x large"], 1),
    ({"color": "blue", "style": "suede"}, ["red"], 0),               # what the title says is no wish
    ({"color": "red", "style": "suede"}, ["red"], 1),
    ({"color": "red", "style": "red"}, ["red", "blue"], 1),          # a wish counts once
    ({"color": "red"}, ["red", "dark red"], 1),                      # "dark red" is reduced to dark
    ({"style": "red dress"}, ["red"], 1),
])
def test_reward_of_options(chosen, options, hits):
    assert reward(chosen=chosen, options=options) == pytest.approx((2 + hits) / (2 + len(options)))


@pytest.mark.parametrize("where", [{"attributes": ["Rubber Sole"]}, {"attributes": ["rubber outer sole"]}, {"features": ["a Rubber sole"]},
                                   {"name": "Walking shoe rubber sole"}, {"description": "With rubber sole."}])
def test_attributes_count_in_attributes_title_features_and_description(where):
    assert reward(product(**where)) == 1
    assert reward(product(), attributes=["rubber soles"]) == 1 / 2


@pytest.mark.parametrize("own, wanted, hit", [("hand wash", "hand washed", True), ("machine wash", "machine washable", True),  # 90, 85.7
                                              ("anti slip", "non slip", False)])                                             # 70.6
def test_attributes_are_compared_by_token_set_ratio(own, wanted, hit):
    assert reward(product(attributes=[own]), attributes=[wanted]) == (1 + hit) / 2


@pytest.mark.parametrize("other, expected", [
    ({"name": "Suede boot"}, 1.0),                                   # 1 of 3 words
    ({"name": "Shoelace for walking boots"}, 1.0),
    ({"name": "Teapot"}, 0.0),                                       # no word in common: another thing, whatever the category
    ({"name": "A shoe of leather", "query": "boots", "path": "Clothing › Boots"}, 1.0),
])
def test_type_by_title_words(other, expected):
    assert reward(product(attributes=["rubber sole"], **other)) == expected


def test_type_by_few_words_needs_query_or_category():
    title = "suede walking shoe " + " ".join("abcdefghijklm"[i] * 3 for i in range(5))           # 8 words
    wanted, other = product(title), {"query": "boots", "path": "Home › Walking", "attributes": ["rubber sole"]}
    assert reward(product("suede", **other), wanted=wanted) == 0.5                               # 1 / 8
    assert reward(product("suede", **other | {"query": "shoes"}), wanted=wanted) == 1
    assert reward(product("suede", **other | {"path": "Shoes › Walking"}), wanted=wanted) == 1   # two parts in common
    wanted = product(title + " nnn ooo ppp")                                                     # 1 / 11
    assert reward(product("suede", **other | {"query": "shoes"}), wanted=wanted) == 0.1


# --- pages -----------------------------------------------------------------------------------------------------------
def play(episode, *actions: str) -> list:
    return [episode.step(f"Thought: so.\nAction: {action}") for action in actions]


def test_pages_can_be_turned_and_left(shop):
    episode, first = shop.start(task_of(shop, "B000000001"))
    assert first.startswith("WebShop [SEP] Instruction: [SEP] Find me walking shoes model1") and first.endswith(" [SEP] Search")
    (one, *_), (two, *_), (three, *_), (last, _, _, info), (back, *_) = play(
        episode, "search[walking shoe]", "click[Next >]", "click[next >]", "click[Next >]", "click[< Prev]")
    assert "Back to Search [SEP] Page 1 (Total results: 30) [SEP] Next > [SEP] B0" in one and "< Prev" not in one
    assert "Page 2 (Total results: 30) [SEP] < Prev [SEP] Next >" in two and back == two
    assert "Page 3" in three and "Next >" not in three and last == three and info == {"valid": False}
    codes = [re.findall(r"B0\d{8}", page) for page in (one, two, three)]
    assert [len(c) for c in codes] == [10, 10, 10] and len(set(sum(codes, []))) == 30
    assert play(episode, f"click[{codes[1][3]}]", "click[Reviews]", "click[< Prev]", "click[< Prev]")[-1][0] == two
    assert play(episode, "click[Back to Search]")[0][0] == first


def test_a_product_its_pages_and_its_purchase(shop):
    episode, _ = shop.start(task_of(shop, "B000000001", options=["c2 | red", "7.5"]))
    (_, _, _, found), (item, *_), (features, *_), (again, *_), (reviews, *_) = play(
        episode, "search[model1]", "click[b000000001]", "click[Features]", "click[< Prev]", "click[Reviews]")
    assert found["valid"] and item.endswith(
        "Back to Search [SEP] < Prev [SEP] color [SEP] c1-black [SEP] c2 | red [SEP] size [SEP] 7 [SEP] 7.5 [SEP] Walking shoe "
        "model1 for men [SEP] Price: $19.99 [SEP] Rating: N.A. [SEP] Description [SEP] Features [SEP] Reviews [SEP] Buy Now")
    assert features.endswith("< Prev [SEP] Rubber sole [SEP] Easy to clean") and again == item and reviews.endswith("No reviews")
    steps = play(episode, "click[< prev]", "click[c2 | red]", "click[description]", "click[< Prev]", "click[7.5]", "click[Buy Now]")
    assert [r for _, r, _, _ in steps] == [0, 0, 0, 0, 0, 1] and [d for _, _, d, _ in steps] == [False] * 5 + [True]
    assert play(episode, "click[Buy Now]", "search[shoe]")[1][1:] == (1, True, {"valid": False})


def test_options_are_forgotten_where_one_leaves_the_product(shop):
    episode, _ = shop.start(task_of(shop, "B000000001", options=["c2 | red", "7.5"]))
    steps = play(episode, "search[model1]", "click[B000000001]", "click[c2 | red]", "click[7.5]", "click[7]", "click[< Prev]",
                 "click[B000000001]", "click[7.5]", "click[Buy Now]")
    assert steps[-1][1:3] == (pytest.approx(3 / 4), True) and all(info["valid"] for *_, info in steps)


@pytest.mark.parametrize("action, valid", [
    ("Search [ model1 ]", True), ("SEARCH[model1", True), ('search["model1"]', True), ("search[model1] now", True), ("search[zzz]", True),
    ("search[]", False), ("search[ ]", False), ("search model1", False), ("click[Buy Now]", False), ("click[]", False), ("click[model1]", False)])
def test_actions_are_read_with_tolerance(shop, action, valid):
    episode, first = shop.start("0")
    [(page, _, done, info)] = play(episode, action)
    assert info == {"valid": valid} and not done and (page != first) == valid
    if valid and "zzz" not in action:
        assert "Total results: 1)" in page
    assert episode.step("I do not know what to do")[0] == page


def test_quotes_within_an_option_stay(tmp_path):
    size = {"Size": [{"value": '18" x 18"'}, {"value": "[2 pack] `big`"}]}
    shop = make_env("webshop", data=write(tmp_path, [row(i, customization_options=size) for i in range(3)]))
    for click in ('click[18" x 18"]', 'click["18" x 18""]', "click[[2 pack]  `big`]", "click[[2 Pack] big]"):
        episode, _ = shop.start("0")
        assert play(episode, "search[model1]", "click[B000000001]", click)[-1][3] == {"valid": True}, click


# --- expert ----------------------------------------------------------------------------------------------------------
def test_the_expert_earns_everything_within_ten_steps_and_says_only_what_it_read(shop):
    for task in shop.goals:
        expert, goal = shop.expert(task), shop.goal(task)
        assert expert.reward == 1 and not expert.truncated and len(expert.steps) <= shop.max_steps(task) == 10
        for i, step in enumerate(expert.steps):
            read = " ".join(s.observation for s in expert.steps[:i + 1])
            assert goal.product.asin not in step.action or goal.product.asin in read
            assert all(option in read for option in re.findall(r"asks for (.*), which", step.action))
    assert shop.task_type(task) == "fashion" and shop.example.count("Action: ") >= 3


def test_no_expert_where_the_product_is_not_found(tmp_path):
    rows = [row(i, name="Walking shoe", full_description="", customization_options={}) for i in range(60)]
    ask = {r["asin"]: {"attributes": [], "instruction": "Find me a walking shoe", "instruction_attributes": ["rubber sole"]} for r in rows}
    shop = make_env("webshop", data=write(tmp_path, rows, **{"items_ins_v2_1000.json": ask}))
    shown = {shop.goal(i).product.asin: shop.expert(i) for i in shop.goals if i.isdigit()}
    assert shown["B000000059"] is None and len(shown["B000000000"].steps) == 3 and len(shown["B000000019"].steps) == 4


def test_no_expert_where_the_options_take_too_many_steps(tmp_path):
    rows = [row(i, customization_options={f"part{n}": [{"value": f"value{n}"}] for n in range(count)}) for i, count in enumerate((7, 8))]
    shop = make_env("webshop", data=write(tmp_path, rows))
    assert len(shop.expert(task_of(shop, "B000000000")).steps) == 10 and shop.expert(task_of(shop, "B000000001")) is None


def test_episodes_side_by_side_do_not_mix(shop):
    alone = [shop.expert(i) for i in shop.goals]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(shop.expert, shop.goals)) == alone


# --- bad input -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("files, words", [
    ({"items_shuffle_1000.json": "[{"}, "items_shuffle_1000.json"),
    ({"items_shuffle_1000.json": '[{"asin": "B1"'}, "broken JSON"),
    ({"items_shuffle_1000.json": "{}"}, "'asin'"),
    ({"items_shuffle_1000.json": json.dumps([row(0)])[:-1]}, "broken JSON"),
    ({"items_shuffle_1000.json": [{"name": "x"}]}, "asin"),
    ({"items_shuffle_1000.json": [row(0, pricing="$a lot")]}, "product 0,"),
    ({"items_shuffle_1000.json": [row(0), row(1, customization_options=["red"])]}, "product 1,"),
    ({"items_shuffle_1000.json": []}, "no instruction"),
    ({"items_ins_v2_1000.json": []}, "not a JSON object"),
    ({"items_ins_v2_1000.json": {"B000000000": ["x"]}}, "product 0,"),
    ({"items_human_ins.json": "nonsense"}, "items_human_ins.json"),
    ({"items_human_ins.json": {"B000000002": [{"instruction": "x"}]}}, "instruction_attributes"),
])
def test_broken_files_are_refused_in_one_line(tmp_path, files, words):
    with pytest.raises(InputError) as error:
        make_env("webshop", data=write(tmp_path, [row(i) for i in range(3)], **files))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_absent_files_are_named(tmp_path, monkeypatch):
    monkeypatch.delenv("STEPAGENT_DATA", raising=False)
    with pytest.raises(InputError, match="data=FOLDER"):
        make_env("webshop")
    with pytest.raises(InputError, match="lacks items_shuffle_1000.json, items_ins_v2_1000.json, items_human_ins.json; WebShop's setup.sh"):
        make_env("webshop", data=str(tmp_path))
    monkeypatch.setenv("STEPAGENT_DATA", str(tmp_path))
    (tmp_path / "webshop").mkdir()
    write(tmp_path / "webshop", [row(i) for i in range(3)])
    shop = make_env("webshop")
    for use in (shop.start, shop.expert, shop.task_type):
        with pytest.raises(InputError, match="no task '999'"):
            use("999")
    (tmp_path / "webshop" / "items_shuffle.json").write_text("[]")
    with pytest.raises(InputError, match="lacks items_ins_v2.json, eto_train_indices.json, eto_test_indices.json"):
        make_env("webshop")


@pytest.mark.parametrize("lists", [([99], [0]), ([0], {"a": 1})])
def test_lists_of_other_goals_are_refused(tmp_path, lists):
    with pytest.raises(InputError, match="not a list of numbers below 30"):
        make_env("webshop", data=full(tmp_path, *lists))


# --- the real 1,000 products -----------------------------------------------------------------------------------------
@real
def test_real_products():
    shop = make_env("webshop", data=REAL)
    assert len(shop.products) == 1000 and len(shop.goals) == 6910 + 13
    assert {shop.task_type(i) for i in shop.splits["test"]} == {"beauty", "electronics", "garden", "fashion", "grocery"}
    shown = [shop.expert(i) for split in shop.splits.values() for i in split[::20]]
    finished = [t for t in shown if t]
    assert len(finished) / len(shown) > 0.9 and sum(t.reward for t in finished) / len(finished) >= 0.95
    lists = [json.loads(Path(REAL, f"eto_{split}_indices.json").read_text()) for split in ("train", "test")]
    assert all(0 <= i < 12087 for indices in lists for i in indices)
