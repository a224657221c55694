"""WebShop on small files in the official format, the reward by hand, the real 1,000 products."""

import json
import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from official import (
    LUCENE_BEST,
    LUCENE_STEMS,
    LUCENE_TEXTS,
    NEEDS_PACKAGES,
    OPTION_HITS,
    asin,
    human,
    real_files,
    shop_row,
    write_webshop,
)

from benchmarks import webshop
from benchmarks.files import stream_json
from benchmarks.webshop import (
    MODELS,
    Product,
    SearchIndex,
    ShoppingGoal,
    choose_options,
    search_stems,
    title_nouns,
    webshop_reward,
)
from envs import Lenient, make_env
from trajectory import InputError, Step, Trajectory

pytest.importorskip("Stemmer", reason=NEEDS_PACKAGES)
pytest.importorskip("rapidfuzz", reason=NEEDS_PACKAGES)


@pytest.fixture(autouse=True)
def tagger(request, monkeypatch):
    """Types are compared by words, whether or not a model is here; a test may bring a tagger."""
    monkeypatch.setattr(webshop, "load_tagger", lambda: getattr(request, "param", ("", None)))
    title_nouns.cache_clear()
    yield
    title_nouns.cache_clear()


def open_shop(folder: Path, rows: list, **files):
    return make_env("webshop", data=write_webshop(folder, rows, **files))


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return open_shop(tmp_path_factory.mktemp("webshop"), [shop_row(i) for i in range(30)])


def task_of(shop, number: int, *values: str) -> str:
    """The first synthetic goal about a product, with these values of its options."""
    for task_id, goal in shop.goals.items():
        if goal.product.asin != asin(number) or task_id.startswith("human"):
            continue
        if not values or list(values) == [value for _, value in goal.options]:
            return task_id
    raise LookupError(number)


# ---------------------------------------------------------------------------- goals


def test_goals_are_every_instruction_with_every_combination_of_options(shop):
    # The human instruction without attributes is skipped.
    assert len(shop.goals) == 15 * 1 + 15 * 4 + 1
    texts = set()
    for task_id, goal in shop.goals.items():
        if goal.product.asin == asin(1) and task_id.isdigit():
            texts.add(goal.text.split(", and price")[0])
    assert texts == {
        "Find me walking shoes model1 with color: c1-black, and size: 7",
        "Find me walking shoes model1 with color: c1-black, and size: 7.5",
        "Find me walking shoes model1 with color: c2 | red, and size: 7",
        "Find me walking shoes model1 with color: c2 | red, and size: 7.5",
    }
    red = shop.goal(task_of(shop, 1, "c2 | red", "7.5"))
    assert red.options == [("color", "c2 | red"), ("size", "7.5")]
    asked = "i want a red shoe, model1, size 7.5, and price lower than "
    assert shop.goal("human-0").text.startswith(asked)


def test_splits_part_the_products_and_human_products_are_not_in_train(shop):
    asins = {}
    for split, task_ids in shop.splits.items():
        asins[split] = {shop.goal(task_id).product.asin for task_id in task_ids}
    assert sum(len(shop.splits[split]) for split in ("train", "dev", "test")) == 75
    assert shop.splits["human"] == ["human-0"]
    assert not asins["train"] & (asins["dev"] | asins["test"] | asins["human"])
    assert not asins["dev"] & asins["test"]


def test_price_bounds_are_the_same_every_time_and_above_the_price(tmp_path, shop):
    again = open_shop(tmp_path, [shop_row(i) for i in range(30)])
    texts = {task_id: goal.text for task_id, goal in shop.goals.items()}
    assert {task_id: goal.text for task_id, goal in again.goals.items()} == texts
    for goal in shop.goals.values():
        assert goal.product.price < goal.price_upper <= goal.product.price + 40
        assert f"price lower than {goal.price_upper:.2f} dollars" in goal.text
    tags = {goal.product.tag for goal in shop.goals.values()}
    assert tags == {"$19.99", "$19.99 to $25.0"}


def test_prices_none_and_high(tmp_path):
    rows = [shop_row(0, pricing=""), shop_row(1, pricing="$1,985.50"), shop_row(2)]
    shop = open_shop(tmp_path, rows)
    assert shop.products[asin(0)].price == 100
    assert shop.products[asin(0)].tag == "$100.0"
    dear = shop.goal(task_of(shop, 1))
    assert dear.product.price == 1985.5
    assert dear.price_upper == 1e6
    assert "price" not in dear.text


def write_full(folder: Path, train: list, test: list) -> str:
    rows = [shop_row(i) for i in range(30)]
    requests = {asin(i): [human(f"shoes model{i}", ["rubber sole"], [])] for i in range(30)}
    files = {
        "items_shuffle.json": rows,
        "items_ins_v2.json": {},
        "items_human_ins.json": requests,
        "eto_train_indices.json": train,
        "eto_test_indices.json": test,
    }
    return write_webshop(folder, rows, **files)


def test_full_files_take_the_human_goals_in_official_order_and_eto_s_lists(tmp_path):
    shop = make_env("webshop", data=write_full(tmp_path, [3, 4, 4, 5, 0], [5, 7]))
    assert shop.splits["train"] == ["3", "4", "0"]
    assert shop.splits["test"] == ["5", "7"]
    assert shop.splits["dev"] == [str(i) for i in range(30) if i not in (0, 3, 4, 5, 7)]
    # As WebShop shuffles.
    order = list(range(30))
    random.seed(233)
    random.shuffle(order)
    assert [shop.goal(str(i)).product.asin for i in range(30)] == [asin(i) for i in order]


@pytest.mark.parametrize("chunk", [1, 7, 100, 10**6])
def test_products_are_read_one_by_one_whatever_the_chunk(tmp_path, chunk):
    rows = [shop_row(i, name='à "}, {" name') for i in range(3)]
    path = tmp_path / "x"
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    data = path.read_bytes()
    read = list(stream_json(str(path), chunk))
    assert [product_row for product_row, _, _ in read] == rows
    assert [json.loads(data[start : start + size]) for _, start, size in read] == rows


# ---------------------------------------------------------------------------- reward


def product(**changes) -> Product:
    fields = {
        "asin": asin(0),
        "name": "Suede walking shoe",
        "description": "",
        "features": [],
        "category": "fashion",
        "path": "Clothing › Shoes › Walking",
        "query": "shoes",
        "options": {},
        "tag": "",
        "price": 20.0,
        "attributes": [],
    }
    return Product(**(fields | changes))


def reward(bought=None, chosen=(), attributes=("rubber sole",), options=(), wanted=None) -> float:
    """The price bound is 30."""
    bought = bought or product(attributes=["rubber sole"])
    goal = ShoppingGoal(wanted or product(), "", list(attributes), list(options), 30.0)
    return webshop_reward(bought, dict(chosen), goal)


def test_reward_counts_attributes_options_and_price():
    assert reward() == 1
    # The attribute is nowhere.
    assert reward(product()) == 1 / 2
    # The bound itself is kept.
    assert reward(product(attributes=["rubber sole"], price=30.0)) == 1
    assert reward(product(attributes=["rubber sole"], price=30.01)) == 1 / 2
    one_of_two = reward(product(attributes=["rubber sole"]), (), ["rubber sole", "blue ink"])
    assert one_of_two == 2 / 3


@pytest.mark.parametrize(
    "chosen, options, hits",
    [
        ({}, ["red", "7.5"], 0),
        # A subset earns its share.
        ({"color": "red"}, ["red", "7.5"], 1),
        ({"color": "red", "size": "7.5"}, ["red", "7.5"], 2),
        # A colour within the name.
        ({"color": "c1-red"}, ["red", "7.5"], 1),
        # Both are reduced to their colour.
        ({"color": "navyblue"}, ["blue sky", "7.5"], 1),
        ({"color": "red", "size": "7"}, ["red", "8.5"], 1),
        # Fuzzy, sizes too: words of the one are words of the other.
        ({"size": "7.5 wide"}, ["red", "7.5"], 1),
        ({"size": "x-large"}, ["red", "x large"], 1),
        # What the title says is no wish.
        ({"color": "blue", "style": "suede"}, ["red"], 0),
        ({"color": "red", "style": "suede"}, ["red"], 1),
        # A wish counts once.
        ({"color": "red", "style": "red"}, ["red", "blue"], 1),
        # "dark red" is reduced to dark, "green camo" to camo.
        ({"color": "red"}, ["red", "dark red"], 1),
        ({"color": "green"}, ["green camo"], 0),
        ({"style": "red dress"}, ["red"], 1),
    ],
)
def test_reward_of_options(chosen, options, hits):
    assert reward(chosen=chosen, options=options) == pytest.approx((2 + hits) / (2 + len(options)))


@pytest.mark.parametrize("value, wish, hit", OPTION_HITS)
def test_options_hit_as_in_webshop(value, wish, hit):
    expected = (2 + hit) / 3
    assert reward(chosen={"option": value}, options=[wish]) == pytest.approx(expected)


@pytest.mark.parametrize(
    "where",
    [
        {"attributes": ["Rubber Sole"]},
        {"attributes": ["rubber outer sole"]},
        {"features": ["a Rubber sole"]},
        {"name": "Walking shoe rubber sole"},
        {"description": "With rubber sole."},
    ],
)
def test_attributes_count_in_attributes_title_features_and_description(where):
    assert reward(product(**where)) == 1
    assert reward(product(), attributes=["rubber soles"]) == 1 / 2


@pytest.mark.parametrize(
    "listed, wanted, hit",
    [
        # Ratios 90, 85.7 and 70.6.
        ("hand wash", "hand washed", True),
        ("machine wash", "machine washable", True),
        ("anti slip", "non slip", False),
    ],
)
def test_attributes_are_compared_by_token_set_ratio(listed, wanted, hit):
    assert reward(product(attributes=[listed]), attributes=[wanted]) == (1 + hit) / 2


@pytest.mark.parametrize(
    "other, expected",
    [
        # 1 of 3 words.
        ({"name": "Suede boot"}, 1.0),
        ({"name": "Shoelace for walking boots"}, 1.0),
        # No word in common: another thing, whatever the category.
        ({"name": "Teapot"}, 0.0),
        ({"name": "A shoe of leather", "query": "boots", "path": "Clothing › Boots"}, 1.0),
        # Numbers and empty words are not shared.
        ({"name": "Teapot for 9 or 10"}, 0.0),
    ],
)
def test_type_by_title_words(other, expected):
    wanted = product(name="Suede walking shoe for 9 or 10")
    assert reward(product(attributes=["rubber sole"], **other), wanted=wanted) == expected


def test_type_counts_a_noun_as_often_as_the_wanted_title_has_it():
    # 2 of 11 words, 2 of the 4 that differ.
    wanted = product(name="Oat bar, oat cake, oat bar, oat oat oat, nut bar")
    other = {"name": "Nut cake", "query": "snack", "path": "Grocery"}
    assert reward(product(attributes=["rubber sole"], **other), wanted=wanted) == 0.5
    # 1 of 11.
    assert (
        reward(product(attributes=["rubber sole"], **other | {"name": "cake"}), wanted=wanted)
        == 0.1
    )


class Token:
    def __init__(self, text: str):
        self.text, self.pos_ = text.split("_")


TAGGED = {
    "Women's soft T-Shirt": "Women_NOUN 's_PART soft_ADJ T_PROPN -_PUNCT Shirt_PROPN",
    "T-shirts": "T_NOUN -_PUNCT shirts_NOUN",
    "Soft cloth": "Soft_ADJ cloth_NOUN",
}


def stand_in(title: str) -> list[Token]:
    return list(map(Token, TAGGED[title].split()))


@pytest.mark.parametrize("tagger", [("en_core_web_sm", stand_in)], indirect=True)
def test_type_by_the_nouns_of_a_model(tmp_path, capsys):
    wanted = product(name="Women's soft T-Shirt")
    assert title_nouns(wanted.name) == ["women", "t", "shirt"]
    shares_the_t = product(name="T-shirts", attributes=["rubber sole"])
    assert reward(shares_the_t, wanted=wanted) == 1
    shares_an_adjective = product(name="Soft cloth", attributes=["rubber sole"])
    assert reward(shares_an_adjective, wanted=wanted) == 0
    shop = open_shop(tmp_path, [shop_row(i) for i in range(3)])
    assert "type scores by the nouns that en_core_web_sm finds" in capsys.readouterr().err
    assert shop.start("0")[0].step("")[-1] == {"valid": False, "spacy_nouns": 1.0}


def test_without_a_model_it_is_said(tmp_path, capsys):
    shop = open_shop(tmp_path, [shop_row(i) for i in range(3)])
    said = capsys.readouterr().err
    assert "by all words of the titles; for the official ones: pip install spacy" in said
    assert shop.start("0")[0].step("")[-1] == {"valid": False, "spacy_nouns": 0.0}


@pytest.mark.parametrize("name", MODELS)
def test_a_real_model_finds_the_nouns_of_its_whole_pipeline(name, monkeypatch):
    reason = f"python -m spacy download {name}"
    pytest.importorskip(name, reason=reason)
    import spacy

    monkeypatch.undo()
    monkeypatch.setattr(webshop, "MODELS", [name])
    webshop.load_tagger.cache_clear()
    assert webshop.load_tagger()[0] == name
    title = "Women Tops Summer Casual T-Shirt, Short Sleeve V-Neck Tee (Black, XX-Large) for Her"
    nouns = []
    for token in spacy.load(name)(title):
        nouns += [token.text.lower()] if token.pos_ in ("NOUN", "PROPN") else []
    assert title_nouns(title) == nouns
    assert {"t", "shirt", "women"} <= set(nouns)
    webshop.load_tagger.cache_clear()


def test_type_by_few_words_needs_query_or_category():
    eight_words = "suede walking shoe aaa bbb ccc ddd eee"
    other = {"name": "suede", "attributes": ["rubber sole"]}
    other |= {"query": "boots", "path": "Home › Walking"}
    wanted = product(name=eight_words)
    assert reward(product(**other), wanted=wanted) == 0.5
    assert reward(product(**other | {"query": "shoes"}), wanted=wanted) == 1
    # Two parts of the path in common.
    assert reward(product(**other | {"path": "Shoes › Walking"}), wanted=wanted) == 1
    # 1 of 11 words.
    wanted = product(name=f"{eight_words} nnn ooo ppp")
    assert reward(product(**other | {"query": "shoes"}), wanted=wanted) == 0.1


# ---------------------------------------------------------------------------- search


@pytest.mark.parametrize("text, stems", LUCENE_STEMS)
def test_texts_are_read_as_lucene_reads_them(text, stems):
    assert search_stems(text) == stems.split()


@pytest.mark.parametrize("words, best", LUCENE_BEST)
def test_search_ranks_as_lucene_does(words, best):
    index = SearchIndex(LUCENE_TEXTS.values())
    codes = list(LUCENE_TEXTS)
    assert [codes[number] for number in index.best(words, 50)] == best.split()
    assert [codes[number] for number in index.best(words, 2)] == best.split()[:2]


def test_equal_products_come_in_the_order_of_their_codes(tmp_path):
    alike = {"name": "Walking shoe", "full_description": "", "customization_options": {}}
    shop = open_shop(tmp_path, [shop_row(i, **alike) for i in range(60, 0, -1)])
    assert [found.asin for found in shop.find("shoes")] == [asin(i) for i in range(1, 51)]


# ---------------------------------------------------------------------------- pages


def play(episode, *actions: str) -> list:
    return [episode.step(f"Thought: so.\nAction: {action}") for action in actions]


def pages(episode, *actions: str) -> list[str]:
    return [observation for observation, _, _, _ in play(episode, *actions)]


def test_pages_can_be_turned_and_left(shop):
    episode, first = shop.start(task_of(shop, 1))
    assert first.startswith("WebShop [SEP] Instruction: [SEP] Find me walking shoes model1")
    assert first.endswith(" [SEP] Search")
    one, two, three = pages(episode, "search[walking shoe]", "click[Next >]", "click[next >]")
    assert "Back to Search [SEP] Page 1 (Total results: 30) [SEP] Next > [SEP] B0" in one
    assert "< Prev" not in one
    assert "Page 2 (Total results: 30) [SEP] < Prev [SEP] Next >" in two
    assert "Page 3 (Total results: 30) [SEP] < Prev [SEP] Next > [SEP] B0" in three
    # One may go on to an empty page.
    four, back, again = pages(episode, "click[Next >]", "click[< Prev]", "click[< Prev]")
    assert four.endswith("Page 4 (Total results: 30) [SEP] < Prev [SEP] Next >")
    assert back == three and again == two
    codes = [re.findall(r"B0\d{8}", page) for page in (one, two, three)]
    assert [len(on_page) for on_page in codes] == [10, 10, 10]
    assert len(set(sum(codes, []))) == 30
    back_and_forth = (f"click[{codes[1][3]}]", "click[Reviews]", "click[< Prev]", "click[< Prev]")
    assert pages(episode, *back_and_forth)[-1] == two
    assert pages(episode, "click[Back to Search]") == [first]


def test_a_product_its_pages_and_its_purchase(shop):
    episode, _ = shop.start(task_of(shop, 1, "c2 | red", "7.5"))
    [(_, _, _, found)] = play(episode, "search[model1]")
    assert found["valid"]
    looks = ("click[b000000001]", "click[Features]", "click[< Prev]", "click[Reviews]")
    item, features, again, reviews = pages(episode, *looks)
    assert item.endswith(
        "Back to Search [SEP] < Prev [SEP] color [SEP] c1-black [SEP] c2 | red [SEP] "
        "size [SEP] 7 [SEP] 7.5 [SEP] Walking shoe model1 for men [SEP] Price: $19.99 [SEP] "
        "Rating: N.A. [SEP] Description [SEP] Features [SEP] Reviews [SEP] Buy Now"
    )
    assert features.endswith("< Prev [SEP] Rubber sole [SEP] Easy to clean")
    assert again == item
    assert reviews.endswith("Back to Search [SEP] < Prev")
    choices = ("click[< prev]", "click[c2 | red]", "click[description]", "click[< Prev]")
    steps = play(episode, *choices, "click[7.5]", "click[Buy Now]")
    assert [step_reward for _, step_reward, _, _ in steps] == [0, 0, 0, 0, 0, 1]
    assert [done for _, _, done, _ in steps] == [False] * 5 + [True]
    after = play(episode, "click[Buy Now]", "search[shoe]")[1]
    assert after[1:3] == (1, True) and not after[3]["valid"]


def test_empty_texts_as_webshop_shows_them(tmp_path):
    empty = {"full_description": "", "small_description": ["One ", "", "Two"], "name": ""}
    shop = open_shop(tmp_path, [shop_row(i, **empty) for i in range(3)])
    episode, _ = shop.start("0")
    looks = ("click[B000000000]", "click[Description]", "click[< Prev]", "click[Features]")
    results, item, description, _, features = pages(episode, "search[one]", *looks)
    assert "Next > [SEP] B000000000 [SEP] $19.99 to $25.0 [SEP] B000000002 [SEP] $" in results
    assert "Back to Search [SEP] < Prev [SEP] Price: $19.99 to $25.0 [SEP] Rating" in item
    assert description.endswith("Back to Search [SEP] < Prev")
    assert features.endswith("< Prev [SEP] One [SEP]  [SEP] Two")


def test_options_are_forgotten_where_one_leaves_the_product(shop):
    episode, _ = shop.start(task_of(shop, 1, "c2 | red", "7.5"))
    chooses = ("click[c2 | red]", "click[7.5]", "click[7]", "click[< Prev]")
    buys = ("click[B000000001]", "click[7.5]", "click[Buy Now]")
    steps = play(episode, "search[model1]", "click[B000000001]", *chooses, *buys)
    assert steps[-1][1:3] == (pytest.approx(3 / 4), True)
    assert all(info["valid"] for _, _, _, info in steps)


@pytest.mark.parametrize(
    "action, strict, lenient",
    [
        ("search[model1]", True, True),
        ("search[model1] now", True, True),
        ("search[model1].", True, True),
        ("search[Model1]", True, True),
        ("search[zzz]", True, True),
        ("Search[model1]", False, True),
        ("**search[model1]**", False, True),
        ("`search[model1]`", False, True),
        ("  search[model1]", False, True),
        ("I search[model1]", False, False),
        ("search[model1", False, False),
        ("search[]", False, False),
        ("search model1", False, False),
        ("click[Buy Now]", False, False),
        ("click[model1]", False, False),
    ],
)
def test_a_search_is_read_as_webshop_reads_it(shop, action, strict, lenient):
    for world, valid in ((shop, strict), (Lenient(shop), lenient)):
        episode, first = world.start("0")
        [(page, _, done, info)] = play(episode, action)
        assert info["valid"] == valid and not done and (page != first) == valid
        if valid and "zzz" not in action:
            assert "Total results: 1)" in page
        assert episode.step("I do not know what to do")[0] == page


@pytest.mark.parametrize(
    "click, strict, lenient",
    [
        ("click[Back to Search]", True, True),
        ("click[back TO search]", True, True),
        ('click[18" x 18"]', True, True),
        ("click[red `mat`]", True, True),
        ('click["Back to Search"]', False, True),
        ("click[Back  to Search]", False, True),
        ("Click[Back to Search]", False, True),
        ("click[ Back to Search ]", False, False),
        ('click[18" x 18]', False, False),
    ],
)
def test_a_click_must_name_what_the_page_offers(tmp_path, click, strict, lenient):
    size = {"Size": [{"value": '18" x 18"'}, {"value": "red `mat`"}]}
    shop = open_shop(tmp_path, [shop_row(i, customization_options=size) for i in range(3)])
    for world, valid in ((shop, strict), (Lenient(shop), lenient)):
        episode, _ = world.start("0")
        [*_, last] = play(episode, "search[model1]", "click[B000000001]", click)
        assert last[3]["valid"] == valid


def test_rows_of_expert_files_name_goals_by_number_if_the_text_is_the_goal_s(shop):
    number = task_of(shop, 1)
    _, first = shop.start(number)
    # Prices are drawn anew in each process of the original.
    first = first.replace("price lower than", "price lower than 9") + " "
    assert "price lower than 9" in first
    for name in (number, f"webshop_{number}"):
        assert shop.task_of(Trajectory(name, [], [Step(first, "Action: search[x]")])) == number
    other = "WebShop [SEP] Instruction: [SEP] i need a lamp [SEP] Search"
    for name, said in ((number, other), ("99999", first), ("webshop_x", first)):
        assert shop.task_of(Trajectory(name, [], [Step(said, "Action: search[x]")])) is None


def test_an_option_with_the_text_of_a_button_cannot_be_chosen(tmp_path):
    extras = {"Shows": [{"value": "Features"}, {"value": "Back to Search"}]}
    shop = open_shop(tmp_path, [shop_row(i, customization_options=extras) for i in range(3)])
    task_id = task_of(shop, 1, "features")
    episode, _ = shop.start(task_id)
    clicks = ("click[B000000001]", "click[Features]", "click[< Prev]", "click[Buy Now]")
    steps = play(episode, "search[model1]", *clicks)
    assert steps[2][0].endswith("< Prev [SEP] Rubber sole [SEP] Easy to clean")
    assert steps[-1][1:3] == (pytest.approx(2 / 3), True)
    episode, first = shop.start(task_id)
    returns = ("click[B000000001]", "click[Back to Search]")
    assert pages(episode, "search[model1]", *returns)[-1] == first


# ---------------------------------------------------------------------------- expert


def test_the_expert_earns_everything_within_ten_steps_and_says_only_what_it_read(shop):
    for task_id in shop.goals:
        expert = shop.expert(task_id)
        code = shop.goal(task_id).product.asin
        assert expert.reward == 1
        assert not expert.truncated
        assert len(expert.steps) <= shop.max_steps(task_id) == 10
        read = ""
        chosen = []
        for step in expert.steps:
            read += f" {step.observation}"
            assert code not in step.action or code in read
            for option in re.findall(r"asks for (.*), which", step.action):
                assert option in read
                chosen.append(option)
        assert len(chosen) == len(shop.goal(task_id).options)
    assert shop.task_type(task_id) == "fashion"
    assert shop.example.count("Action: ") >= 3


def test_no_expert_where_the_product_is_not_found(tmp_path):
    alike = {"name": "Walking shoe", "full_description": "", "customization_options": {}}
    rows = [shop_row(i, **alike) for i in range(60)]
    request = {
        "attributes": [],
        "instruction": "Find me a walking shoe",
        "instruction_attributes": ["rubber sole"],
    }
    requests = {asin(i): request for i in range(60)}
    shop = open_shop(tmp_path, rows, **{"items_ins_v2_1000.json": requests})
    # Among equals the order is the file's: the first is on page 1, the 20th on page 2.
    assert len(shop.expert(task_of(shop, 0)).steps) == 3
    assert len(shop.expert(task_of(shop, 19)).steps) == 4
    assert shop.expert(task_of(shop, 59)) is None


def test_the_expert_chooses_the_very_value_before_a_similar_one():
    options = {"size": ["7", "7.5"]}
    assert choose_options(options, [("size", "7.5")]) == {"size": "7.5"}
    assert choose_options(options, ["7.5"]) == {"size": "7.5"}


def test_no_expert_where_the_options_take_too_many_steps(tmp_path):
    rows = []
    for number, count in enumerate((7, 8)):
        options = {f"part{i}": [{"value": f"value{i}"}] for i in range(count)}
        rows.append(shop_row(number, customization_options=options))
    shop = open_shop(tmp_path, rows)
    assert len(shop.expert(task_of(shop, 0)).steps) == 10
    assert shop.expert(task_of(shop, 1)) is None


def test_episodes_side_by_side_do_not_mix(shop):
    alone = [shop.expert(task_id) for task_id in shop.goals]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(shop.expert, shop.goals)) == alone


# ---------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("items_shuffle_1000.json", "[{", "items_shuffle_1000.json"),
        ("items_shuffle_1000.json", '[{"asin": "B1"', "broken JSON"),
        ("items_shuffle_1000.json", "{}", "'asin'"),
        ("items_shuffle_1000.json", json.dumps([shop_row(0)])[:-1], "broken JSON"),
        ("items_shuffle_1000.json", [{"name": "x"}], "asin"),
        ("items_shuffle_1000.json", [shop_row(0, pricing="$a lot")], "product 0,"),
        (
            "items_shuffle_1000.json",
            [shop_row(0), shop_row(1, customization_options=["red"])],
            "product 1,",
        ),
        ("items_shuffle_1000.json", [], "no instruction"),
        ("items_ins_v2_1000.json", [], "not a JSON object"),
        ("items_ins_v2_1000.json", {"B000000000": ["x"]}, "product 0,"),
        ("items_human_ins.json", "nonsense", "items_human_ins.json"),
        ("items_human_ins.json", {asin(2): [{"instruction": "x"}]}, "instruction_attributes"),
    ],
)
def test_broken_files_are_refused_in_one_line(tmp_path, name, content, words):
    with pytest.raises(InputError) as error:
        open_shop(tmp_path, [shop_row(i) for i in range(3)], **{name: content})
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_absent_files_are_named(tmp_path, monkeypatch):
    monkeypatch.delenv("STEPAGENT_DATA", raising=False)
    with pytest.raises(InputError, match="data=FOLDER"):
        make_env("webshop")
    small = "items_shuffle_1000.json, items_ins_v2_1000.json, items_human_ins.json"
    with pytest.raises(InputError, match=f"lacks {small}; .* {small} .* setup.sh -d small"):
        make_env("webshop", data=str(tmp_path))
    monkeypatch.setenv("STEPAGENT_DATA", str(tmp_path))
    (tmp_path / "webshop").mkdir()
    write_webshop(tmp_path / "webshop", [shop_row(i) for i in range(3)])
    shop = make_env("webshop")
    for use in (shop.start, shop.expert, shop.task_type):
        with pytest.raises(InputError, match="no task '999'"):
            use("999")
    (tmp_path / "webshop" / "items_shuffle.json").write_text("[]")
    full = "items_ins_v2.json, eto_train_indices.json, eto_test_indices.json"
    with pytest.raises(InputError, match=f"lacks {full}"):
        make_env("webshop")


@pytest.mark.parametrize("train, test", [([99], [0]), ([0], {"a": 1})])
def test_lists_of_other_goals_are_refused(tmp_path, train, test):
    with pytest.raises(InputError, match="not a list of numbers below 30"):
        make_env("webshop", data=write_full(tmp_path, train, test))


# ---------------------------------------------------------------------------- the real products


def test_real_products():
    folder = real_files("webshop")
    shop = make_env("webshop", data=str(folder))
    assert len(shop.products) == 1000
    assert len(shop.goals) == 6910 + 13
    kinds = {shop.task_type(task_id) for task_id in shop.splits["test"]}
    assert kinds == {"beauty", "electronics", "garden", "fashion", "grocery"}
    shown = []
    for task_ids in shop.splits.values():
        shown += [shop.expert(task_id) for task_id in task_ids[::20]]
    rewards = [expert.reward for expert in shown if expert]
    assert len(rewards) / len(shown) > 0.9
    assert sum(rewards) / len(rewards) >= 0.95
    for split in ("train", "test"):
        indices = json.loads((folder / f"eto_{split}_indices.json").read_text())
        assert all(0 <= i < 12087 for i in indices)
