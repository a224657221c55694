"""WebShop (Yao et al., 2022): shopping by instruction, over the official product files, as text."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import itertools
import os
import random
import re
import sys
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from benchmarks.files import benchmark_folder, load_json, need, shortest_play, stream_json
from trajectory import InputError, Step, Trajectory, parse_action

# Products, synthetic instructions, human instructions. If the full set is there, it is used.
FULL_FILES = ["items_shuffle.json", "items_ins_v2.json", "items_human_ins.json"]
ETO_FILES = ["eto_train_indices.json", "eto_test_indices.json"]
SMALL_FILES = ["items_shuffle_1000.json", "items_ins_v2_1000.json", "items_human_ins.json"]
FILES = (
    f"{', '.join(SMALL_FILES)} (github.com/princeton-nlp/WebShop, setup.sh -d small) "
    f"or {', '.join(FULL_FILES + ETO_FILES)} "
    "(setup.sh -d all, and ETO's train_indices.json and test_indices.json for WebShop)"
)
# {module: the package to install}
PACKAGES = {"Stemmer": "PyStemmer==3.1.0", "rapidfuzz": "rapidfuzz==3.14.6"}
# spaCy's models, the best first: that of ETO, and that of WebShop.
MODELS = ["en_core_web_lg", "en_core_web_sm"]
OFFICIAL = f"for the official ones: pip install spacy && python -m spacy download {MODELS[0]}"

DETAILS = ["Description", "Features", "Reviews"]
# WebShop's list. A text counts as the first of these that it contains: "c1-black" as "black".
COLOURS = (
    "alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown "
    "burgundy camel camo caramel champagne charcoal cheetah chestnut chocolate christmas coffee "
    "cognac copper coral cranberry cream crystal dark denim eggplant elephant espresso fuchsia "
    "gold granite grape graphite grass gray green grey heather indigo ivory ivy khaki lavender "
    "lemon leopard light lilac lime magenta maroon mauve merlot midnight mint mocha multicolor "
    "mushroom mustard natural navy nude olive orange peach pewter pink plum purple rainbow red "
    "rose royal rust sand sapphire seashell silver skull slate steel stone stonewash sunflower tan "
    "taupe teal tiger turquoise violet walnut wheat white wine yellow"
)
# Lucene's.
STOP_WORDS = (
    "a an and are as at be but by for if in into is it no not of on or such that the their then "
    "there these they this to was will with"
)
# What Lucene takes for one word: "7.5", "don't" and a pictograph, but not "t-shirt".
WORD = re.compile(
    r"\w+(?:(?<=\d)[.,](?=\d)\w+|(?<=[^\W\d_])[.:'’](?=[^\W\d_])\w+)*"
    "|[\u2600-\u27bf\U0001f300-\U0001faff]"
)


@dataclass(slots=True)
class Product:
    """path: "Home & Kitchen › Furniture › ...". tag: the price as shown, as in "$9.0 to $12.0"."""

    asin: str
    name: str
    description: str
    features: list[str]
    category: str
    path: str
    query: str
    options: dict[str, list[str]]
    tag: str
    price: float
    attributes: list[str]


@dataclass(slots=True)
class ShoppingGoal:
    # What the instruction was written about.
    product: Product
    text: str
    attributes: list[str]
    # what a person asks for; of a synthetic goal (option, value)
    options: list[str] | list[tuple[str, str]]
    price_upper: float


def read_product(row: dict, attributes: list[str]) -> Product:
    """Without a price, a product costs 100 as in WebShop; with a price range, a draw from it."""
    amounts = (row.get("pricing") or "").split("$")[1:]
    prices = [float(re.sub(r"[^\d.]", "", amount)) for amount in amounts][:2] or [100.0]
    features = row.get("small_description") or []
    options = {}
    for name, choices in (row.get("customization_options") or {}).items():
        if choices is not None:
            values = [choice["value"].strip().replace("/", " | ").lower() for choice in choices]
            options[name.lower()] = values
    return Product(
        asin=row["asin"],
        name=row["name"],
        description=row.get("full_description") or "",
        features=[features] if isinstance(features, str) else features,
        category=row["category"],
        path=row["product_category"],
        query=row["query"].lower().strip(),
        options=options,
        tag=" to ".join(f"${price}" for price in prices),
        price=random.Random(f"webshop:{row['asin']}").uniform(prices[0], prices[-1]),
        attributes=attributes,
    )


def make_goal(product: Product, number: int, text: str, request: dict, options) -> ShoppingGoal:
    """Adds a price bound, the larger of two draws from the next four tens below 1,000."""
    above = [bound * 10.0 for bound in range(1, 100) if bound * 10.0 > product.price][:4]
    upper = 1e6
    if len(above) >= 2:
        upper = max(random.Random(f"webshop:{product.asin}:{number}").sample(above, 2))
        text += f", and price lower than {upper:.2f} dollars"
    return ShoppingGoal(
        product, text, list(request["instruction_attributes"]), list(options), upper
    )


def human_goals(product: Product, requests: list[dict]) -> list[ShoppingGoal]:
    goals = []
    for number, request in enumerate(requests):
        if request["instruction_attributes"]:
            text = request["instruction"].strip(".")
            goals.append(make_goal(product, number, text, request, request["instruction_options"]))
    return goals


def synthetic_goals(product: Product, request: dict) -> list[ShoppingGoal]:
    """The product's instruction, if it has one, with each combination of its options."""
    if not request.get("instruction"):
        return []
    goals = []
    names = sorted(product.options)
    for values in itertools.product(*[product.options[name] for name in names]):
        options = list(zip(names, values))
        wishes = ", and ".join(f"{name}: {value}" for name, value in options)
        text = f"{request['instruction']} with {wishes}" if wishes else request["instruction"]
        goals.append(make_goal(product, 0, text, request, options))
    return goals


def webshop_reward(bought: Product, chosen: dict[str, str], goal: ShoppingGoal) -> float:
    """WebShop's reward of a purchase (its section 3.1 and goal.py), in [0, 1].

    r_type * (attributes hit + options hit + price kept) / (attributes + options + 1)
    """
    texts = [bought.name.lower(), " ".join(bought.features).lower(), bought.description.lower()]
    hits = int(bought.price <= goal.price_upper)
    for wanted in goal.attributes:
        listed = any(is_similar(attribute, wanted) for attribute in bought.attributes)
        hits += listed or any(wanted in text for text in texts)
    for wish in map(colour_of, goal.options):
        hits += any(is_similar(colour_of(value), wish) for value in chosen.values())
    return type_reward(bought, goal.product) * hits / (len(goal.attributes) + len(goal.options) + 1)


def type_reward(bought: Product, wanted: Product) -> float:
    """By the share of the wanted title's nouns, repeats counted, that the bought one has, too."""
    nouns = title_nouns(wanted.name)
    shared = set(nouns) & set(title_nouns(bought.name))
    overlap = len(shared) / len(nouns) if nouns else 0.2
    if overlap < 0.1:
        return 0.1 if overlap else 0.0
    parts = {part.strip() for part in bought.path.split("›")}
    parts &= {part.strip() for part in wanted.path.split("›")}
    alike = overlap > 0.2 or bought.query == wanted.query or len(parts) >= 2
    return 1.0 if alike else 0.5


@functools.lru_cache(maxsize=1 << 17)
def title_nouns(title: str) -> list[str]:
    """Those that spaCy finds. Deviation: without its model all words but the emptiest."""
    _, tagger = load_tagger()
    if tagger:
        return [token.text.lower() for token in tagger(title) if token.pos_ in ("NOUN", "PROPN")]
    words = re.findall(r"\b[a-z]\w*", title.lower())
    return [word for word in words if word not in STOP_WORDS.split() and word != "s"]


@functools.cache
def load_tagger() -> tuple:
    """(name, model) of the first of MODELS that is installed; ("", None) without one."""
    for name in MODELS if importlib.util.find_spec("spacy") else ():
        if importlib.util.find_spec(name):
            import spacy

            # Parts of speech need no more.
            return name, spacy.load(name, exclude=["parser", "ner", "lemmatizer"])
    return "", None


def colour_of(option: str | tuple[str, str]) -> str | tuple[str, str]:
    """The colour that a text contains; of an (option, value) pair, only if it is one of the two."""
    return next((colour for colour in COLOURS.split() if colour in option), option)


def is_similar(text: str, other: str | tuple[str, str]) -> bool:
    """WebShop's fuzzy match: thefuzz's token_set_ratio above 85, computed as thefuzz does.

    As there, a pair is compared as Python writes it, and characters of Latin-1 count for nothing.
    """
    from rapidfuzz import fuzz, utils

    plain_texts = [re.sub("[\x80-\xff]", "", str(each)) for each in (text, other)]
    return round(fuzz.token_set_ratio(*plain_texts, processor=utils.default_process)) > 85


# ---------------------------------------------------------------------------- search


class SearchIndex:
    """BM25 as WebShop has it from Lucene: k1 0.9, b 0.4, equal scores in the order of the texts."""

    def __init__(self, texts: Iterable[str]):
        # {stem: [a text's number, how often it is there, the next text's number, ...]}
        self.places: dict[str, array] = {}
        lengths = []
        for number, text in enumerate(texts):
            stems = search_stems(text)
            lengths.append(len(stems))
            for stem, count in Counter(stems).items():
                self.places.setdefault(stem, array("i")).extend((number, count))
        relative = np.array([byte_length(length) for length in lengths]) * len(lengths)
        # [texts]
        self.norms = 0.9 * (0.6 + 0.4 * relative / max(1, sum(lengths)))

    def best(self, words: str, most: int) -> list[int]:
        """The numbers of the texts that fit best."""
        scores = np.zeros(len(self.norms))
        for stem in search_stems(words):
            if stem in self.places:
                numbers, counts = np.array(self.places[stem]).reshape(-1, 2).T
                rarity = np.log(1 + (len(scores) - len(counts) + 0.5) / (len(counts) + 0.5))
                scores[numbers] += rarity * counts / (counts + self.norms[numbers])
        best = (-scores).argsort(kind="stable")[:most]
        return best[scores[best] > 0].tolist()


def search_stems(text: str) -> list[str]:
    """A text as Lucene's English analyser reads it."""
    return [stem for stem in map(stem_of, WORD.findall(text.lower())) if stem]


@functools.cache
def stem_of(word: str) -> str:
    """Porter's stem; "" for a stop word. Lucene leaves words of two letters as they are."""
    import Stemmer

    word = word.removesuffix("'s").removesuffix("’s")
    if word in STOP_WORDS.split():
        return ""
    return word if len(word) < 3 else Stemmer.Stemmer("porter").stemWord(word)


def byte_length(length: int) -> int:
    """A text's length as Lucene keeps it in a byte: what is above 24, in four binary digits."""
    above = max(0, length - 24)
    shift = max(0, above.bit_length() - 4)
    return length - above + (above >> shift << shift)


# ---------------------------------------------------------------------------- pages


@dataclass(frozen=True)
class Page:
    """What is on the screen; each button leads to another Page. chosen: {option: value}."""

    # "search", "results", "product", one of DETAILS, or "end" after a purchase
    name: str
    # of the page of results, from 0
    number: int = 0
    product: Product | None = None
    chosen: dict[str, str] = field(default_factory=dict)


def results_page(page: Page, found: list[Product]) -> tuple[list[str], dict[str, Page]]:
    """(the parts of the text, {button: the page it leads to})"""
    first = 10 * page.number
    buttons = {"< Prev": Page("results", page.number - 1)} if page.number else {}
    # On the last page, too, as in WebShop: an empty one follows.
    buttons["Next >"] = Page("results", page.number + 1)
    parts = [f"Page {page.number + 1} (Total results: {len(found)})", *buttons]
    for product in found[first : first + 10]:
        parts += [product.asin, product.name, product.tag]
        buttons[product.asin] = Page("product", page.number, product)
    return parts, buttons


def product_page(page: Page) -> tuple[list[str], dict[str, Page]]:
    parts, buttons = ["< Prev"], {}
    for option, values in page.product.options.items():
        parts += [option, *values]
        for value in values:
            buttons[value] = replace(page, chosen={**page.chosen, option: value})
    # An option of the same text cannot be chosen, as in WebShop.
    buttons |= {"< Prev": Page("results", page.number), "Buy Now": replace(page, name="end")}
    buttons |= {detail: replace(page, name=detail) for detail in DETAILS}
    price = f"Price: {page.product.tag}"
    return [*parts, page.product.name, price, "Rating: N.A.", *DETAILS, "Buy Now"], buttons


def detail_page(page: Page) -> tuple[list[str], dict[str, Page]]:
    # As in WebShop, reviews are left out, and an empty feature keeps its place.
    texts = {
        "Description": [page.product.description],
        "Features": [f" {feature}" for feature in page.product.features],
        "Reviews": [],
    }
    return ["< Prev", *texts[page.name]], {"< Prev": replace(page, name="product")}


class WebShopEpisode:
    """One shopping trip, on the pages of WebShop's text mode. buttons: {lower-case text: Page}."""

    def __init__(self, shop: WebShop, goal: ShoppingGoal):
        self.shop = shop
        self.goal = goal
        self.found: list[Product] = []
        self.reward = 0.0
        self.done = False
        self.open(Page("search"))

    def open(self, page: Page) -> None:
        self.buttons = {}
        if page.name == "search":
            self.observation = f"WebShop [SEP] Instruction: [SEP] {self.goal.text} [SEP] Search"
            return
        if page.name == "end":
            self.done = True
            self.reward = webshop_reward(page.product, page.chosen, self.goal)
            self.observation = (
                f"Thank you for shopping with us! [SEP] Your score: {self.reward:.2f}"
            )
            return
        if page.name == "results":
            parts, buttons = results_page(page, self.found)
        elif page.name == "product":
            parts, buttons = product_page(page)
        else:
            parts, buttons = detail_page(page)
        header = ["Instruction:", self.goal.text, "Back to Search"]
        self.observation = " [SEP] ".join(part.strip() for part in header + parts if part)
        for button, target in {**buttons, "Back to Search": Page("search")}.items():
            self.buttons[button.lower()] = target

    def step(self, text: str) -> tuple[str, float, bool, dict]:
        """Plays one turn. Search works on every page, as in WebShop."""
        # As WebShop reads it: brackets do not nest.
        match = re.match(r"(.+)\[(.+)\]", parse_action(text) or "")
        verb, value = (match[1], match[2].lower()) if match else ("", "")
        valid = True
        if verb == "search" and not self.done:
            self.found = self.shop.find(value)
            self.open(Page("results"))
        elif verb == "click" and value in self.buttons:
            self.open(self.buttons[value])
        else:
            valid = False
        info = {"valid": valid, "spacy_nouns": float(bool(load_tagger()[0]))}
        return self.observation, self.reward, self.done, info


# ---------------------------------------------------------------------------- the environment


class WebShop:
    """Task ids are numbers into the goals, shuffled as in WebShop (seed 233).

    data: the folder of the official files.
    Full set (1.18 million products): the 12,087 human goals. train and test are ETO's lists, train
    without the 21 goals that are also in test. dev is the first 200 goals of neither.
    Small set (1,000 products): the synthetic goals, split by product: sha1(asin) mod 10 is 0 for
    test, 1 for dev, else train. "human" is the 13 human goals, whose products are in test.
    Deviations: prices and price bounds depend on the product alone (WebShop draws them anew in each
    process); without spaCy's model, types are compared by all words of the titles.
    """

    # Table 1
    paper = {"train": 1938, "dev": None, "test": 200, "turns": 4.9}
    instruction = (
        "You shop on a web site. Find a product that fits the instruction, choose the options that "
        "it asks for, and buy. You read each page as text, its parts separated by [SEP].\n"
        "Your actions:\n"
        "search[words]: look for products; the words are up to you\n"
        "click[text]: press something that the page offers: a product by its code, such as "
        "B07XYZ1234; an option, such as large; Description, Features, Reviews; < Prev, Next >, "
        "Back to Search; or Buy Now, which ends the task\n"
        "A click on what the page does not offer does nothing. You have 10 actions; without a "
        "purchase you earn nothing.\n"
        "Reply each time with:\nThought: your reasoning\nAction: your action"
    )

    def __init__(self, data: str | None = None):
        folder = benchmark_folder("webshop", data, FILES)
        full = os.path.exists(os.path.join(folder, FULL_FILES[0]))
        check_installed(folder, FULL_FILES + ETO_FILES if full else SMALL_FILES)
        human, synthetic = self._read(folder, full)
        goals = human if full else synthetic
        need(bool(goals), folder, "has products, but no instruction for any; download them again")
        name, _ = load_tagger()
        by = f"the nouns that {name} finds" if name else f"all words of the titles; {OFFICIAL}"
        print(f"webshop: type scores by {by}", file=sys.stderr)
        self.asins = sorted(self.products)
        self.index = SearchIndex(map(searched_text, map(self.products.get, self.asins)))
        random.Random(233).shuffle(goals)
        self.goals = {str(i): goal for i, goal in enumerate(goals)}
        self.splits: dict[str, list[str]] = {"train": [], "dev": [], "test": []}
        if full:
            self._split_as_eto(folder)
        else:
            held_out = {goal.product.asin for goal in human}
            for task_id, goal in self.goals.items():
                digest = hashlib.sha1(goal.product.asin.encode()).hexdigest()
                fold = 0 if goal.product.asin in held_out else int(digest, 16) % 10
                self.splits[{0: "test", 1: "dev"}.get(fold, "train")].append(task_id)
            self.splits["human"] = [f"human-{i}" for i in range(len(human))]
            self.goals |= zip(self.splits["human"], human)

    def _read(self, folder: str, full: bool) -> tuple[list[ShoppingGoal], list[ShoppingGoal]]:
        """Fills self.products. Returns the human goals and, in the small set, synthetic ones."""
        names = FULL_FILES if full else SMALL_FILES
        paths = [os.path.join(folder, name) for name in names]
        requests, human_requests = load_json(paths[1]), load_json(paths[2])
        are_objects = isinstance(requests, dict) and isinstance(human_requests, dict)
        problem = "is not a JSON object {asin: ...}; download it again"
        need(are_objects, f"{paths[1]} or {names[2]}", problem)
        self.products: dict[str, Product] = {}
        human, synthetic = [], []
        for number, (row, _, _) in enumerate(stream_json(paths[0])):
            try:
                asin = row["asin"]
                # WebShop skips these too.
                if asin in self.products or asin == "nan" or len(asin) > 10:
                    continue
                request = requests.get(asin, {})
                product = read_product(row, request.get("attributes", []))
                self.products[asin] = product
                human += human_goals(product, human_requests.get(asin, []))
                synthetic += [] if full else synthetic_goals(product, request)
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise InputError(
                    f"{folder}: product {number}, counted from 0, is not as WebShop writes it in "
                    f"one of {', '.join(names)} ({type(error).__name__}: {error}); download again"
                ) from None
        return human, synthetic

    def _split_as_eto(self, folder: str) -> None:
        for split, name in zip(("train", "test"), ETO_FILES):
            path = os.path.join(folder, name)
            indices = load_json(path)
            fits = isinstance(indices, list) and {str(i) for i in indices} <= set(self.goals)
            problem = f"is not a list of numbers below {len(self.goals)}, the number of goals"
            need(fits, path, f"{problem}; is it the one for these products?")
            self.splits[split] = list(dict.fromkeys(str(i) for i in indices))
        train, test = set(self.splits["train"]), set(self.splits["test"])
        self.splits["train"] = [i for i in self.splits["train"] if i not in test]
        self.splits["dev"] = [i for i in self.goals if i not in train | test][:200]

    def find(self, words: str) -> list[Product]:
        """The best 50 products, best first; among equals, in the order of their codes."""
        return [self.products[self.asins[number]] for number in self.index.best(words, 50)]

    @functools.cached_property
    def example(self) -> str:
        return shortest_play(self, 20)

    def max_steps(self, task_id: str) -> int:
        return 10

    def task_type(self, task_id: str) -> str:
        return self.goal(task_id).product.category

    def goal(self, task_id: str) -> ShoppingGoal:
        known = f"0 .. {len(self.goals) - 1}{' and human-0 ..' if 'human' in self.splits else ''}"
        need(task_id in self.goals, "webshop", f"there is no task {task_id!r}; tasks are {known}")
        return self.goals[task_id]

    def task_of(self, expert: Trajectory) -> str | None:
        """ETO names a goal by its number, AgentGym as in webshop_6; the text must be that goal's.

        The small and the full set have other goals under the same numbers.
        """
        task_id = expert.task_id.removeprefix("webshop_")
        if task_id not in self.goals:
            return None
        wanted = self.goals[task_id].text.split(", and price lower than")[0]
        said = expert.steps[0].observation
        return task_id if " ".join(wanted.split()) in " ".join(said.split()) else None

    def start(self, task_id: str) -> tuple[WebShopEpisode, str]:
        episode = WebShopEpisode(self, self.goal(task_id))
        return episode, episode.observation

    def expert(self, task_id: str) -> Trajectory | None:
        """Searches for the instruction's words, pages to the goal's product and buys it.

        It knows which product that is, and the rest from the pages. None if 10 steps are too few.
        """
        episode, _ = self.start(task_id)
        goal, product = episode.goal, episode.goal.product
        asin = product.asin
        trajectory = Trajectory(task_id)

        def act(thought: str, action: str) -> None:
            turn = f"Thought: {thought}\nAction: {action}"
            trajectory.steps.append(Step(episode.observation, turn))
            _, trajectory.reward, _, _ = episode.step(turn)

        words = goal.text.split(", and price lower than")[0]
        act("I search with the words of the instruction.", f"search[{words}]")
        if product not in episode.found:
            return None
        while asin.lower() not in episode.buttons:
            act("Nothing on this page fits well, so I look at the next one.", "click[Next >]")
        options = choose_options(product.options, goal.options)
        # What is left: to open the product, to choose each option, to buy.
        steps = len(trajectory.steps) + 1 + len(options) + 1
        if steps > self.max_steps(task_id):
            return None
        bound = ""
        if goal.price_upper < 1e6:
            bound = f" (it costs {product.tag}, and I may spend up to {goal.price_upper:g} dollars)"
        act(f"{asin} fits best of what I have read{bound}, so I open it.", f"click[{asin}]")
        for option, value in options.items():
            why = f"The instruction asks for {value}, which is offered as {option}"
            act(f"{why}, so I choose it.", f"click[{value}]")
        fits = "The product fits and the options are chosen" if options else "The product fits"
        act(f"{fits}, so I buy it.", "click[Buy Now]")
        return trajectory


def check_installed(folder: str, names: list[str]) -> None:
    missing = [name for name in names if not os.path.exists(os.path.join(folder, name))]
    need(not missing, folder, f"lacks {', '.join(missing)}; webshop needs {FILES}")
    for module, package in PACKAGES.items():
        problem = f"the package {package} is missing; install it: pip install {package}"
        need(importlib.util.find_spec(module) is not None, "webshop", problem)


def searched_text(product: Product) -> str:
    """What WebShop indexes."""
    options = [f"{name}: {', '.join(values)}" for name, values in product.options.items()]
    return " ".join([product.name, product.description, *product.features[:1], *options])


def choose_options(options: dict[str, list[str]], wishes: list) -> dict[str, str]:
    """{option: value} for each option that fits a wish: an equal value, or else a similar one."""
    chosen = {}
    for option, values in options.items():
        fits = [value for value in values if value in wishes or (option, value) in wishes]
        if not fits:
            pairs = itertools.product(map(colour_of, wishes), values)
            fits = [value for wish, value in pairs if is_similar(colour_of(value), wish)]
        if fits:
            chosen[option] = fits[0]
    return chosen
