"""Mind2Web on small recordings in the official format: pages, ranks, metrics by hand, bad files."""

import collections
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from official import PAGE, action, candidate, task, write_mind2web

from benchmarks.mind2web import PageElements, describe, operation_f1, web_action
from envs import Lenient, make_env, prompt_messages
from trajectory import InputError


def open_world(folder: Path, dev: int = 0, candidates: int = 20, **files):
    data = write_mind2web(folder, **files)
    return make_env("mind2web", data=data, dev=dev, candidates=candidates)


def play(world, name: str, *actions: str) -> list:
    episode, _ = world.start(name)
    return [episode.step(f"Thought: so.\nAction: {text}") for text in actions]


# ---------------------------------------------------------------------------- pages


def lines(page: str, wanted: set) -> list:
    return [describe(*element)[0] for element in PageElements(page, wanted).found.values()]


def test_elements_are_shown_by_tag_text_and_salient_attributes():
    assert lines(PAGE, {"40", "10", "20", "30"}) == [
        'button "Book a table" type=button',
        "input type=text placeholder=City & state input_value=Paris",
        'select "1 guest 2 guests" name=party',
        'a "Menu" aria_label=Open the menu',
    ]


def test_text_goes_to_every_open_element_and_only_to_those():
    page = (
        '<div backend_node_id="1">a<p backend_node_id="2">b<br>c</p>d'
        '<p backend_node_id="3"/>e</i></div>f'
    )
    assert lines(page, {"1", "2", "3"}) == ['div "a b c d e"', 'p "b c"', "p"]
    unclosed = '<div backend_node_id="1"><p backend_node_id="2">never closed'
    assert lines(unclosed, {"1", "2"}) == ['div "never closed"', 'p "never closed"']


RAW = ["script", "style", "textarea", "title", "iframe", "noembed", "noframes", "xmp", "plaintext"]


@pytest.mark.parametrize("tag", RAW)
def test_no_element_is_raw_text_whatever_the_python(monkeypatch, tag):
    """Python took script and style for it, then textarea and title, then iframe and others."""
    monkeypatch.setattr(HTMLParser, "CDATA_CONTENT_ELEMENTS", tuple(RAW))
    page = f'<{tag} backend_node_id="1"><p backend_node_id="2">a &amp; b</p></{tag}><i>c</i>'
    assert lines(page, {"1", "2"}) == [f'{tag} "a & b"', 'p "a & b"']


def test_a_value_of_several_lines_counts_to_the_end_of_the_first(tmp_path):
    typed = task("d0", [action("a", "TYPE", ["20"], "New York\nand Rome")])
    world = open_world(tmp_path, test=[typed])
    assert world.expert("d0").steps[0].action.endswith("Action: type [2] New York")
    assert play(world, "d0", "type [2] New York and Rome")[-1][3]["step_success"] == 0


def test_long_texts_are_cut_later_in_a_select():
    words = "w " * 60
    page = f'<a backend_node_id="1">{words}</a><select backend_node_id="2">{words}</select>'
    link, select = lines(page, {"1", "2"})
    assert link == f'a "{"w " * 15}..."'
    assert select == f'select "{"w " * 40}..."'


def test_a_person_s_name_for_an_element():
    found = PageElements(PAGE, {"10", "20", "2"}).found
    assert describe(*found["10"])[1] == "Book a table"
    assert describe(*found["20"])[1] == "City & state"
    assert describe("div", {}, [])[1] == "div"


# ---------------------------------------------------------------------------- episodes


def test_each_turn_shows_the_actions_before_the_elements_and_the_task(tmp_path):
    episode, first = open_world(tmp_path).start("d0")
    assert first == (
        "Web site: tables\n"
        "Previous actions: none\n"
        "Elements:\n"
        '[0] button "Book a table" type=button\n'
        '[1] text "Book a table"\n'
        "[2] input type=text placeholder=City & state input_value=Paris\n"
        '[3] select "1 guest 2 guests" name=party\n'
        '[4] a "Menu" aria_label=Open the menu\n'
        "Task: Book a table for 2 guests in New York"
    )
    # A wrong action: the recording goes on.
    second = episode.step("Action: click [4]")[0]
    so_far = "Web site: tables\nPrevious actions:\n- [x] thing -> a\nElements:\n[0] button"
    assert second.startswith(so_far)


def test_only_the_last_five_actions_are_shown(tmp_path):
    clicks = [action(f"u{i}", "CLICK", ["10"]) for i in range(8)]
    world = open_world(tmp_path, test=[task("d0", clicks)])
    last = play(world, "d0", *["click [0]"] * 7)[-1][0]
    assert [i for i in range(8) if f"> u{i}" in last] == [2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "actions, element, f1, success, valid",
    [
        ("click [0]; type [2] New York; select [3] 2 guests; click [4]", 1, 1, 1, True),
        # A nested right element.
        ("click [1]; type [2] York New; select [3] 2 guests; click [4]", 1, 1, 1, True),
        # {CLICK, please}: 2 / 3. As in the official evaluation, a click has no value.
        (
            "click [0]; type [2] New York; select [3] 2 guests; click [4] please",
            1,
            3.667 / 4,
            0.75,
            1,
        ),
        # {TYPE, York}: 2 * 2 / (2 + 3).
        ("click [1]; type [2] York; select [3] 2 guests; click [4]", 1, 3.8 / 4, 3 / 4, True),
        ("click [1]; click [2]; select [2] 2 guests; type [4] x", 3 / 4, 2 / 4, 1 / 4, True),
        ("hello; type [9] New York; select [3] 2 guests; I give up", 1 / 4, 1 / 4, 1 / 4, False),
    ],
)
def test_metrics_by_hand(tmp_path, actions, element, f1, success, valid):
    world = open_world(tmp_path)
    steps = play(world, "d0", *actions.split("; "))
    assert [done for _, _, done, _ in steps] == [False] * 3 + [True]
    assert world.max_steps("d0") == 4
    _, reward, _, info = steps[-1]
    assert reward == pytest.approx(element)
    assert info["valid"] == valid
    assert info["operation_f1"] == pytest.approx(f1, abs=1e-4)
    assert info["step_success"] == pytest.approx(success)
    assert set(info) == {"valid", "operation_f1", "step_success"}
    rewards = [reward for _, reward, _, _ in steps]
    assert rewards == sorted(rewards)


@pytest.mark.parametrize(
    "predicted, wanted, expected",
    [
        ("CLICK ", "CLICK ", 1),
        ("CLICK ", "TYPE x", 0),
        ("TYPE new york", "TYPE york new", 1),
        ("TYPE new new", "TYPE new", 1),
        ("TYPE a b", "TYPE a c d", 2 * 2 / (3 + 4)),
        ("TYPE New", "TYPE new", 0.5),
        ("", "", 1),
        ("", "CLICK", 0),
    ],
)
def test_operation_f1(predicted, wanted, expected):
    assert operation_f1(predicted, wanted) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Action: click [3]", ("CLICK", 3, "")),
        ("Action: click [3] the button", ("CLICK", 3, "the button")),
        ("Action: type [12] a b\nc", ("TYPE", 12, "a b")),
        ("Action: type [1] [a b]", ("TYPE", 1, "[a b]")),
        ("Action: type [1]", ("TYPE", 1, "")),
        ("Action: `click [3]`", None),
        ("Action: CLICK [3]", None),
        ("Action: click 3", None),
        ("Action: hover [1]", None),
        ("click [1]", None),
        ("Action: click [-1]", None),
        ("", None),
    ],
)
def test_actions_are_read_as_the_instruction_words_them(text, expected):
    assert web_action(text) == expected


def test_a_lenient_reader_takes_more(tmp_path):
    world = Lenient(open_world(tmp_path))
    last = play(
        world, "d0", "`Click [0]`.", "TYPE [2] New York.", "select [3] 2 guests", "click [4]"
    )
    assert last[-1][1] == 1 and last[-1][3]["step_success"] == 1


def test_after_the_end_nothing_changes(tmp_path):
    *_, last, after = play(open_world(tmp_path), "d0", *["click [0]"] * 5)
    assert after[:3] == last[:3]
    assert after[3] == {**last[3], "valid": False}
    assert after[0] == "The task is over."


# ---------------------------------------------------------------------------- candidates


def ranked(*orders: str, name: str = "d0") -> dict:
    """The ranks of a task's four actions: for each the nodes, best first."""
    ranks = {}
    for uid, order in zip("abcd", orders):
        ranks[f"{name}_{uid}"] = {node: rank for rank, node in enumerate(order.split())}
    return ranks


def test_the_best_ranked_elements_are_shown_in_the_page_s_order(tmp_path):
    ranks = ranked("40 10 20", "40 10 20", "30 10 12", "40 10 12")
    world = open_world(tmp_path, ranks=ranks, candidates=2)
    _, first = world.start("d0")
    assert '[0] button "Book a table" type=button\n[1] a "Menu"' in first
    assert "[2]" not in first
    # The second page does not show the input, so this step is wrong in all three metrics.
    assert world.expert("d0") is None
    actions = ("click [0]", "type [1] New York", "select [1] 2 guests", "click [1]")
    steps = play(world, "d0", *actions)
    assert [reward for _, reward, _, _ in steps] == [0.25, 0.25, 0.5, 0.75]
    assert steps[-1][3] == {"valid": True, "operation_f1": 0.75, "step_success": 0.75}


def test_train_pages_always_show_the_annotated_element(tmp_path):
    ranks = {}
    for name in ("t0", "t1", "t2", "t3", "d0"):
        ranks |= ranked("40 12 20", "40 10 20", "10 12 20", "10 12 20", name=name)
    world = open_world(tmp_path, ranks=ranks, candidates=2)
    expert = world.expert("t0")
    assert expert.reward == 1
    assert world.expert("d0") is None
    assert [step.observation.count("\n[") for step in expert.steps] == [2, 2, 2, 2]
    # An element within the annotated one counts, so nothing is replaced here.
    assert '[0] text "Book' in expert.steps[0].observation


def test_without_ranks_the_annotated_element_is_among_others_drawn_alike_each_time(tmp_path):
    many = action("a", "CLICK", ["10"])
    many["neg_candidates"] += [candidate(str(node)) for node in range(100, 200)]
    one = open_world(tmp_path, test=[task("d0", [many])], candidates=5)
    two = open_world(tmp_path, test=[task("d0", [many])], candidates=5)
    _, first = one.start("d0")
    assert two.start("d0")[1] == first
    assert first.count("\n[") == 5
    nodes = list(one.candidates("d0", many))
    other_nodes = list(one.candidates("d0", {**many, "action_uid": "z"}))
    assert nodes != other_nodes
    for shown in (nodes, other_nodes):
        assert shown[0] == "10"
        assert len(set(shown)) == 5
    assert one.expert("d0").reward == 1


@pytest.mark.parametrize("number", [int, np.int64, np.int32])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_score_files_with_numpy_numbers_are_read(tmp_path, number, protocol):
    ranks = collections.defaultdict(dict)
    for key, nodes in ranked("12 10", "20", "30", "10 40").items():
        ranks[key].update({node: number(rank) for node, rank in nodes.items()})
    scores = {"d0_a": {"12": np.float32(0.5), "10": np.float64(-1)}}
    data = pickle.dumps({"scores": scores, "ranks": ranks}, protocol=protocol)
    world = open_world(tmp_path, ranks=data, candidates=1)
    assert world.ranked == {"d0_a": ["12"], "d0_b": ["20"], "d0_c": ["30"], "d0_d": ["10"]}


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps({"ranks": Evil()}),
        b"",
        b"\x80\x04nonsense",
        pickle.dumps([1]),
        pickle.dumps({"scores": {}}),
        pickle.dumps({"ranks": {"a": 1}}),
        pickle.dumps({"ranks": {"a": {"1": "x"}}}),
        pickle.dumps({"ranks": np.zeros(3)}),
        pickle.dumps({"ranks": ranked("12")})[:-20],
    ],
)
def test_other_pickles_are_refused_and_run_nothing(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="scores_all_data.pkl: not Mind2Web's score file") as error:
        open_world(tmp_path, ranks=data)
    assert not (tmp_path / "evil").exists()
    assert "\n" not in str(error.value)


def test_ranks_of_other_tasks_are_refused(tmp_path):
    world = open_world(tmp_path, ranks=ranked("10"))
    with pytest.raises(InputError, match="has no ranks for t0_a"):
        world.start("t0")


# ---------------------------------------------------------------------------- splits and the expert


def test_splits_are_the_folders_and_dev_a_fixed_part_of_train(tmp_path):
    more = {
        "test_task/test_task_0.json": [task("k0")],
        "test_website/a.json": [task("w0")],
        "test_website/b.json": [task("w1")],
    }
    world = open_world(tmp_path, dev=1, **more)
    splits = dict(world.splits)
    train, dev = splits.pop("train"), splits.pop("dev")
    assert splits == {"test": ["d0"], "test_task": ["k0"], "test_website": ["w0", "w1"]}
    assert sorted(train + dev) == ["t0", "t1", "t2", "t3"]
    assert len(dev) == 1
    assert open_world(tmp_path, dev=1).splits == world.splits
    assert open_world(tmp_path, dev=0).splits["train"] == ["t0", "t1", "t2", "t3"]
    assert world.task_type("t1") == "Café"
    assert world.task_type("t0") == "Travel"


def test_steps_without_an_element_are_skipped_in_train_and_wrong_in_test(tmp_path):
    found = action("a", "CLICK", ["10"])
    lost = action("b", "CLICK", [])
    typed = action("c", "TYPE", ["20"], "x")
    actions = [found, lost, typed]
    train = [task("t0", actions), task("t1", [lost])]
    world = open_world(tmp_path, train=train, test=[task("d0", actions)])
    assert "t1" not in world.splits["train"]
    assert world.max_steps("t0") == 2
    assert world.max_steps("d0") == 3
    expert = world.expert("t0")
    assert expert.reward == 1
    assert "- [x] thing -> b" in expert.steps[1].observation
    assert world.expert("d0") is None
    last = play(world, "d0", "click [0]", "click [0]", "type [2] x")[-1]
    assert last[1] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "value",
    [
        "New York.",
        "a  b\n c",
        "\nc",
        "[x] y",
        "`code`",
        '"quoted"',
        "* star *",
        "",
        "4.50",
        ": x",
        "2",
    ],
)
def test_the_annotated_actions_earn_everything_whatever_their_value(tmp_path, value):
    typed = task("d0", [action("a", "TYPE", ["20"], value)])
    expert = open_world(tmp_path, test=[typed]).expert("d0")
    assert expert.reward == 1
    assert expert.info == {"valid": True, "operation_f1": 1, "step_success": 1}


def test_the_expert_s_turns(tmp_path):
    world = open_world(tmp_path)
    thoughts, actions = [], []
    for step in world.expert("t0").steps:
        thought, acted = step.action.split("\n")
        thoughts.append(thought)
        actions.append(acted)
    assert thoughts == [
        "Thought: To go on with the task I click the 'Book a table' element.",
        "Thought: The task says 'New York'. Into the 'City & state' element I type 'New York'.",
        "Thought: The task says '2 guests'. In the '1 guest 2 guests' element I select '2 guests'.",
        "Thought: To go on with the task I click the 'Menu' element.",
    ]
    assert actions == [
        "Action: click [0]",
        "Action: type [2] New York",
        "Action: select [3] 2 guests",
        "Action: click [4]",
    ]
    assert world.example in prompt_messages(world)[0]["content"]
    assert world.example.count("Action: ") == 4


def test_episodes_side_by_side_do_not_mix(tmp_path):
    train = [task(f"t{i + 10}", confirmed_task=f"task {i}") for i in range(20)]
    world = open_world(tmp_path, train=train)
    alone = [world.expert(name) for name in world.tasks]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(world.expert, world.tasks)) == alone


# ---------------------------------------------------------------------------- bad input


def without(key: str) -> dict:
    return {name: value for name, value in task("t0").items() if name != key}


def one_action(uid: str = "a", operation: str = "CLICK", **changes) -> list:
    return [task("t0", [{**action(uid, operation, ["10"]), **changes}])]


@pytest.mark.parametrize(
    "train, words",
    [
        ("", "broken JSON"),
        ("[{", "broken JSON"),
        (json.dumps([task("t0")])[:-1], "broken JSON"),
        ("[1]", "broken JSON"),
        ([without("annotation_id")], "annotation_id"),
        ([task("t0"), without("confirmed_task")], "task 1, counted from 0"),
        ([task("t0"), task("t0")], "another task's id"),
        ([task("t2")], "another task's id"),
        ([task("t0", action_reprs=[])], "0 action_reprs"),
        (one_action(operation="DRAG"), "DRAG"),
        ([task("t0", [{"action_uid": "a"}])], "operation"),
        (one_action(cleaned_html=None), "None where text should be"),
        (one_action(pos_candidates=[{"tag": "a"}]), "backend_node_id"),
        ([task("t0", domain=3)], "3 where text should be"),
        ([{**task("t0"), "actions": "none"}], "TypeError"),
    ],
)
def test_broken_files_are_refused_in_one_line(tmp_path, train, words):
    folder = write_mind2web(tmp_path)
    text = train if isinstance(train, str) else json.dumps(train)
    (tmp_path / "train" / "train_0.json").write_text(text)
    with pytest.raises(InputError) as error:
        make_env("mind2web", data=folder)
    assert words in str(error.value)
    assert ".json: " in str(error.value)
    assert "\n" not in str(error.value)


def test_absent_files_unknown_tasks_and_bad_options(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPAGENT_DATA", str(tmp_path))
    source = "mind2web/train: has no .json files; .* osunlp/Mind2Web, its test.zip"
    with pytest.raises(InputError, match=source):
        make_env("mind2web")
    (tmp_path / "mind2web").mkdir()
    write_mind2web(tmp_path / "mind2web")
    with pytest.raises(InputError, match="no task 'x'"):
        make_env("mind2web", dev=0).start("x")
    for options in ({"candidates": 0}, {"dev": -1}, {"dev": "x"}, {"dev": 4}):
        with pytest.raises(InputError):
            make_env("mind2web", **options)
