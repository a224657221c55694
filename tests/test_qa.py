"""HotpotQA, 2WikiMultihopQA and MuSiQue on small files, and on the real ones in STEPAGENT_DATA."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from official import QA_FILES, hotpot_row, real_files, write_questions

from benchmarks.qa import BENCHMARKS, QA, Question, Titles, answer_f1, normalize_answer, parse_call
from envs import Lenient, load_trajectories, make_env, prompt_messages
from trajectory import InputError, Step, Trajectory, lenient_action, parse_action, render

NAMES = list(QA_FILES)
NO_QUESTION = Question("", [""], "", {}, [])


def open_world(folder, name, **options):
    return make_env(name, data=write_questions(folder, name, **options))


@pytest.fixture(scope="module", params=NAMES)
def env(request, tmp_path_factory):
    return open_world(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    return {name: open_world(tmp_path_factory.mktemp(name), name) for name in NAMES}


def all_tasks(env) -> list[str]:
    return env.splits["train"] + env.splits["dev"] + env.splits["test"]


# ---------------------------------------------------------------------------- splits and files


def test_splits_are_disjoint_and_follow_the_sha1_of_the_id(worlds):
    splits = worlds["hotpotqa"].splits
    assert [(split, len(ids)) for split, ids in splits.items()] == [
        ("train", 10),
        ("dev", 3),
        ("test", 4),
    ]
    assert set(splits["train"]) == {f"h{i}" for i in range(10)}
    # The order is from sha1sum and sort.
    assert splits["dev"] == ["h13", "h11", "h14"]
    assert splits["test"] == ["h12", "h15", "h10", "h16"]


def test_full_files_give_5000_500_and_500(tmp_path, monkeypatch):
    assert QA.SIZES == {"train": 5000, "dev": 500, "test": 500}
    monkeypatch.setattr(QA, "SIZES", {"train": 4, "dev": 2, "test": 2})
    splits = open_world(tmp_path, "hotpotqa").splits
    assert len(splits["train"]) == 4
    assert splits["dev"] == ["h13", "h11"]
    assert splits["test"] == ["h14", "h12"]


def test_samples_are_found_by_pattern_and_folders_by_variable(tmp_path, monkeypatch):
    folder = tmp_path / "hotpotqa"
    folder.mkdir()
    write_questions(folder, "hotpotqa", official=False)
    assert QA_FILES["hotpotqa"][0] not in os.listdir(folder)
    monkeypatch.setenv("STEPAGENT_DATA", str(tmp_path))
    assert len(make_env("hotpotqa").splits["train"]) == 10
    (folder / "hotpot_train_2.json").write_text("[]")
    with pytest.raises(InputError, match="2 files like hotpot_train"):
        make_env("hotpotqa")
    # The official name wins over others.
    write_questions(folder, "hotpotqa", train=range(5))
    assert len(make_env("hotpotqa").splits["train"]) == 5


@pytest.mark.parametrize("name", NAMES)
def test_absent_files_are_named_with_their_source(name, tmp_path, monkeypatch):
    monkeypatch.delenv("STEPAGENT_DATA", raising=False)
    for options in ({}, {"data": str(tmp_path)}):
        with pytest.raises(InputError) as error:
            make_env(name, **options)
        message = str(error.value)
        for words in (*QA_FILES[name], BENCHMARKS[name].source):
            assert words in message
        assert "\n" not in message


def test_a_dev_file_alone_gives_train_only_on_request(tmp_path):
    data = write_questions(tmp_path, "musique", train=None)
    with pytest.raises(InputError, match="train_from_dev=N"):
        make_env("musique", data=data)
    env = make_env("musique", data=data, train_from_dev=3)
    assert [len(ids) for ids in env.splits.values()] == [3, 2, 2]
    assert len(set(all_tasks(env))) == 7
    for wrong, says in ((7, "too few"), (-1, "whole number"), ("x", "whole number")):
        with pytest.raises(InputError, match=says):
            make_env("musique", data=data, train_from_dev=wrong)
    with pytest.raises(InputError, match="for want of"):
        make_env("musique", data=write_questions(tmp_path, "musique"), train_from_dev=3)


def edit(*path_and_value):
    """A change of the second dev row: the field at this path becomes the value; ... removes it."""
    *path, last, value = path_and_value

    def change(rows):
        part = rows[1]
        for key in path:
            part = part[key]
        if value is ...:
            del part[last]
        else:
            part[last] = value
        return rows

    return change


def text(content: str):
    """A dev file of this text."""
    return lambda rows: content


DECOMPOSITION = "question_decomposition"
MALFORMED = [
    ("hotpotqa", text("[{"), "broken JSON"),
    ("hotpotqa", text('{"a": 1}'), "is not a JSON list"),
    ("hotpotqa", text("[1]"), "entry 0: is not a JSON object"),
    ("hotpotqa", text(""), "broken JSON"),
    ("hotpotqa", text("[]"), "too few"),
    ("hotpotqa", lambda rows: rows[:1], "too few"),
    ("hotpotqa", lambda rows: rows + rows[:1], "entry 7: repeats the id 'h10' of entry 0"),
    ("hotpotqa", lambda rows: rows + [hotpot_row(0)], "entry 7: the id 'h0' is also in the other"),
    ("hotpotqa", edit("_id", ...), "entry 1: 'id' is missing"),
    ("hotpotqa", edit("_id", 3), "entry 1: '_id' is not text"),
    ("hotpotqa", edit("question", ...), "entry 1: 'question' is missing"),
    ("hotpotqa", edit("question", "\ud800"), "surrogate"),
    ("hotpotqa", edit("answer", None), "entry 1: 'answer' is not text"),
    ("hotpotqa", edit("answer", " "), "'answer' is empty"),
    ("hotpotqa", edit("level", ...), "entry 1: 'level' is missing"),
    ("hotpotqa", edit("context", {}), "'context' is missing or not"),
    ("hotpotqa", edit("context", 1, ["x"]), r"context\[1\] is not \[title, \[sentence"),
    ("hotpotqa", edit("context", 1, 1, "text"), r"context\[1\] is not"),
    ("hotpotqa", edit("context", 1, 1, 0, 7), r"context\[1\] is not"),
    (
        "hotpotqa",
        edit("supporting_facts", 0, ["x", "1"]),
        r"supporting_facts\[0\] is not \[title, sentence number",
    ),
    ("2wikimultihopqa", edit("evidences", ...), "'evidences' is missing or not"),
    ("2wikimultihopqa", edit("evidences", 0, ["a", "b"]), "'evidences' is missing or not"),
    ("2wikimultihopqa", edit("type", 1), "'type' is not"),
    ("musique", text('{"id": "2hop_1"}\n{'), "line 2: broken JSON"),
    ("musique", text("3"), "line 1: is not a JSON object"),
    ("musique", edit("id", "x"), "line 2: the id 'x' does not start with the number of hops"),
    ("musique", edit("answerable", False), "line 2: 'answerable' is not true"),
    ("musique", edit("paragraphs", 3), "'paragraphs' is missing"),
    (
        "musique",
        edit("paragraphs", 0, "title", ...),
        r"line 2, paragraphs\[0\]: 'title' is missing",
    ),
    (
        "musique",
        edit(DECOMPOSITION, 1, "paragraph_support_idx", 3),
        r"question_decomposition\[1\]: 'paragraph_support_idx'",
    ),
    (
        "musique",
        edit(DECOMPOSITION, 1, "paragraph_support_idx", None),
        "not the number of a paragraph",
    ),
    ("musique", edit("answer_aliases", [1]), "line 2: 'answer_aliases' is not a list of text"),
]


@pytest.mark.parametrize("name, change, says", MALFORMED)
def test_a_malformed_file_names_itself_and_the_entry(name, change, says, tmp_path):
    with pytest.raises(InputError, match=says) as error:
        open_world(tmp_path, name, change=change)
    assert "\n" not in str(error.value)
    assert says == "too few" or str(tmp_path / QA_FILES[name][1]) in str(error.value)


# ---------------------------------------------------------------------------- metrics


@pytest.mark.parametrize(
    "text, normal",
    [
        ("The  Beatles!", "beatles"),
        ("an A the", ""),
        ("U.S.A.", "usa"),
        ("Theatre", "theatre"),
        ("the-end", "theend"),
        ("a  b\tc", "b c"),
        ("“Ünï” – É", "“ünï” – é"),
        ("rock & roll", "rock roll"),
        ("İ", "i̇"),
    ],
)
def test_normalisation_is_the_official_one(text, normal):
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    "answer, gold, squad, f1",
    [
        ("the cat sat", "cat", False, 2 / 3),
        ("cat cat", "cat", False, 2 / 3),
        ("dog", "cat", False, 0),
        ("The Cat.", "cat", False, 1),
        ("yes", "yes", False, 1),
        ("yes it is", "yes", False, 0),
        ("no", "no way", False, 0),
        ("noanswer given", "noanswer", False, 0),
        ("yes it is", "yes", True, 0.5),
        ("the", "a", False, 0),
        ("the", "a", True, 1),
        ("the", "cat", True, 0),
        ("Zoë K.", "zoë", True, 2 / 3),
    ],
)
def test_f1_by_hand(answer, gold, squad, f1):
    assert answer_f1(answer, gold, squad) == pytest.approx(f1)
    assert answer_f1(gold, answer, squad) == pytest.approx(f1)


def finish(env, task, answer) -> tuple[float, bool, float]:
    """(reward, done, F1) of a valid answer."""
    episode, _ = env.start(task)
    _, reward, done, info = episode.step(f"Thought: x\nAction: Finish[{answer}]")
    assert set(info) == {"valid", "f1"}
    assert info["valid"]
    return reward, done, info["f1"]


def test_reward_is_exact_match_with_f1_beside_it(worlds):
    env = worlds["hotpotqa"]
    assert finish(env, "h4", "The 4 MILES.") == (1, True, 1)
    assert finish(env, "h4", "about 4 miles") == (0, True, pytest.approx(0.8))
    assert finish(env, "h1", "no, they are not") == (0, True, 0)
    assert finish(env, "h1", "No") == (1, True, 1)


def with_aliases(folder, aliases: str):
    """The second question of the dev file has an answer of Wikidata's, the third has not."""
    (folder / "id_aliases.json").write_text(aliases, encoding="utf-8")

    def identify(rows):
        rows[1]["answer_id"], rows[2]["answer_id"] = "Q7", None
        return rows

    return open_world(folder, "2wikimultihopqa", change=identify)


def test_aliases_of_the_answer_count_for_2wiki_where_their_file_lies_beside(tmp_path, worlds):
    """As since version 1.1 of its evaluation: aliases and demonyms of answer_id."""
    rows = [
        {"Q_id": "Q7", "aliases": ["May Day, 1950", "1/5"], "demonyms": ["Mayer"]},
        {"Q_id": "Q8", "aliases": ["Rome"], "demonyms": []},
    ]
    world = with_aliases(tmp_path, "".join(json.dumps(row) + "\n" for row in rows))
    for answer, right in (("1 May 1950", 1), ("may day 1950", 1), ("The Mayer", 1), ("Rome", 0)):
        assert finish(world, "w11", answer)[0] == right, answer
    assert finish(world, "w11", "May Day")[2] == pytest.approx(0.8)
    assert finish(world, "w12", "May Day, 1950")[0] == 0
    assert world.expert("w11").steps[-1].action.endswith("Finish[1 May 1950]")
    assert finish(worlds["2wikimultihopqa"], "w11", "may day 1950")[0] == 0


@pytest.mark.parametrize(
    "text, says",
    [
        ("[]", "line 1: is not a JSON object"),
        ('{"Q_id": "Q7", "aliases": "x", "demonyms": []}', "line 1: 'aliases' or 'demonyms' is"),
        ('{"Q_id": "Q7", "aliases": []}', "line 1: 'aliases' or 'demonyms' is not"),
        ('\n{"aliases": []}', "line 2: 'Q_id' is missing"),
    ],
)
def test_a_broken_file_of_aliases_is_named(tmp_path, text, says):
    with pytest.raises(InputError, match=f"id_aliases.json, {says}"):
        with_aliases(tmp_path, text)


def test_aliases_count_for_musique(worlds):
    env = worlds["musique"]
    for answer, right in (("Zoë 3", 1), ("mayor 3", 1), ("Z 3", 1), ("Zoe 3", 0), ("Mayor 4", 0)):
        assert finish(env, "2hop__3_3", answer)[0] == right, answer
    _, _, f1 = finish(env, "2hop__3_3", "the Mayor 3 of town")
    assert f1 == pytest.approx(2 * 2 / (4 + 2))


# ---------------------------------------------------------------------------- actions


@pytest.mark.parametrize(
    "action, call, lenient",
    [
        ("Search[Rush]", ("search", "Rush"), True),
        ("search[ Rush ]", ("search", "Rush"), True),
        ("  finish[yes]", ("finish", "yes"), True),
        ("Finish[a [b] c]", ("finish", "a [b] c"), True),
        ("Search[A], Search[B]", ("search", "A], Search[B"), True),
        ("Finish[]", ("finish", ""), True),
        ("FINISH[yes]", None, True),
        ("**Search[Rush]**", None, True),
        ("`finish[Rush]`.", None, True),
        ("Finish[U.S.].", None, True),
        ("Search[Rush]\nObservation: A band.", None, True),
        ("Finish[a] and so on", None, False),
        ("search [Rush]", None, False),
        ("Search[Rush", None, False),
        ("Finish", None, False),
        ("Lookup[x]", None, False),
        ("Research[x]", None, False),
        ("I search[x]", None, False),
        ("", None, False),
    ],
)
def test_calls_are_read_as_react_reads_them(action, call, lenient):
    turn = f"Thought: t\nAction: {action}"
    assert parse_call(parse_action(turn)) == call
    assert bool(parse_call(lenient_action(turn))) == lenient


def test_no_character_of_an_answer_is_lost(tmp_path):
    party = open_world(tmp_path, "hotpotqa", change=edit("answer", "Ba`ath Party"))
    for world in (party, Lenient(party)):
        assert finish(world, "h11", "Ba`ath Party") == (1, True, 1)
    assert party.expert("h11").reward == 1


def test_invalid_actions_change_nothing_and_play_goes_on(env):
    task = env.splits["train"][0]
    episode, _ = env.start(task)
    for turn in ("", "no action", "Action: fly", "Action: Search[x", "Finish[x]"):
        observation, *outcome = episode.step(turn)
        assert "Search[entity]" in observation
        assert outcome == [0.0, False, {"valid": False, "f1": 0.0}]
    for step in env.expert(task).steps:
        _, *outcome = episode.step(step.action)
    assert outcome == [1.0, True, {"valid": True, "f1": 1.0}]
    _, *outcome = episode.step("Action: Finish[wrong]")
    assert outcome == [1.0, True, {"valid": False, "f1": 1.0}]


# ---------------------------------------------------------------------------- search


def search(env, task, name) -> str:
    episode, _ = env.start(task)
    return episode.step(f"Action: Search[{name}]")[0]


@pytest.mark.parametrize(
    "name",
    [
        "Rock & Sand 3",
        "rock & sand 3",
        "  ROCK  &  sand 3",
        "Rock Sand 3",
        "Róck-Sand 3",
        '"Rock & Sand 3"',
        "[Rock & Sand 3]",
    ],
)
def test_titles_are_found_in_spite_of_case_accents_and_punctuation(worlds, name):
    assert search(worlds["hotpotqa"], "h8", name) == "A beach."


def test_exact_spelling_wins_over_loose(tmp_path):
    pages = {"C": "A letter.", "C++": "A language.", "HALO": "A code.", "Halo": "A ring."}
    pages |= {"c#": "Another.", "!!!": "A band."}

    def add(rows):
        rows[0]["context"] += [[title, [told]] for title, told in pages.items()]
        return rows

    env = open_world(tmp_path, "hotpotqa", change=add)
    for title, told in pages.items():
        assert search(env, "h1", title) == told
    for name, title in (("c", "C"), ("C#", "c#"), ("c.", "C")):
        assert search(env, "h1", name) == pages[title]


def test_the_question_s_own_paragraphs_come_first_then_the_first_in_the_files(worlds):
    hotpot, musique = worlds["hotpotqa"], worlds["musique"]
    assert search(hotpot, "h8", "Shared") == "Told by 8."
    assert search(hotpot, "h3", "shared") == "Told by 3."
    assert hotpot.search(NO_QUESTION, "Shared") == "Told by 0."
    river = "Aville 5 is a town. It lies on the Brook 5 (river)."
    assert search(hotpot, "h8", "Aville 5") == river
    film = worlds["2wikimultihopqa"].search(NO_QUESTION, "film 3A")
    assert film == "Film 3a is here. Its director is Ann a3."
    assert search(musique, "2hop__4_4", "Capital") == "First of 4.\nTown 4 has the mayor Zoë 4."
    assert search(musique, "2hop__4_4", "Land 12") == "The capital of Land 12 is Town 12."


def test_no_such_page_lists_the_five_most_similar(worlds):
    env = worlds["hotpotqa"]
    told = search(env, "h2", "Aville")
    assert told.startswith("There is no page Aville. Similar titles: Aville ")
    assert told.count(";") == 4
    assert told.count("Aville") == 6
    assert env.titles.similar("Sand of 7")[0] == "Rock & Sand 7"
    assert env.titles.similar("the brook (river) 16")[0] == "Brook 16 (river)"
    assert env.titles.similar("Avile")[0].startswith("Aville")
    assert len(env.titles.similar("qqq")) == 5
    assert search(env, "h2", "!?") == "There is no page !?. Similar titles: none."


def test_common_words_add_to_rare_ones_and_do_for_want_of_them(monkeypatch):
    titles = Titles(
        [
            "The Red Fox",
            "Red Hen",
            "The Owl",
            "The Red",
            "A Bee",
            "The Fox of the Red Hen",
            "Red Owl",
        ]
    )
    asked = ["Red Hens", "the red fox", "Red", "owl the"]
    before = [titles.similar(name) for name in asked]
    assert before[1][0] == "The Red Fox"
    assert set(before[2][:3]) == {"Red Hen", "The Red", "Red Owl"}
    assert all(len(found) >= 5 for found in before[:3])
    monkeypatch.setattr(Titles, "COMMON", 2)
    assert len(titles.similar("bee red")) == 5
    for name, found in zip(asked, before):
        assert titles.similar(name)[:2] == found[:2]


# ---------------------------------------------------------------------------- the expert


def test_the_expert_answers_every_question(env):
    for task in all_tasks(env):
        shown = env.expert(task)
        assert shown.reward == 1.0
        assert not shown.truncated
        assert len(shown.steps) <= env.max_steps(task)
        assert shown.prompt == []
        episode, observation = env.start(task)
        for step in shown.steps:
            assert step.observation == observation
            assert step.action.startswith("Thought: ")
            assert step.action.count("\n") == 1
            observation, reward, done, info = episode.step(step.action)
            assert info["valid"]
            assert "no page" not in observation
        assert (reward, done) == (1.0, True)


def turns(env, task) -> list[list[str]]:
    """[thought, action] of each of the expert's turns."""
    found = []
    for step in env.expert(task).steps:
        thought, action = step.action.split("\n")
        found.append([thought.removeprefix("Thought: "), action.removeprefix("Action: ")])
    return found


def test_the_expert_s_turns_read_as_they_should(worlds):
    town = "I read about Aville 4: It lies on the Brook 4 (river). I have read of Brook 4 (river)."
    river = "I read about Brook 4 (river): It is 4 miles long. So the answer is 4 miles."
    assert turns(worlds["hotpotqa"], "h4") == [
        ["The question names Aville 4.", "Search[Aville 4]"],
        [town, "Search[Brook 4 (river)]"],
        [river, "Finish[4 miles]"],
    ]
    compares = (
        "I read about Aville 3: Aville 3 is a town. I read about Rock & Sand 3: A beach. "
        "So the answer is no."
    )
    assert turns(worlds["hotpotqa"], "h3")[-1][0] == compares
    assert [action for _, action in turns(worlds["2wikimultihopqa"], "w4")] == [
        "Search[Film 4a]",
        "Search[Film 4b]",
        "Search[Ann a4]",
        "Search[Ann b4]",
        "Finish[Film 4b]",
    ]
    uses_an_answer = (
        "I have found this: Town 4. I want to know this: who is mayor of Town 4? "
        "The question names Capital."
    )
    assert turns(worlds["musique"], "2hop__4_4")[1][0] == uses_an_answer


def test_the_order_of_pages_is_one_that_a_reader_could_follow(tmp_path):
    town, river = "Aville 12", "Brook 12 (river)"

    def add(rows):
        rows[2]["context"] += [["Zed", ["Nobody names me."]]]
        facts = [["Zed", 0], [river, 0], [river, 1], [town, 0], [town, 1]]
        rows[2]["supporting_facts"] = facts
        return rows

    env = open_world(tmp_path, "hotpotqa", change=add)
    thoughts = [thought for thought, _ in turns(env, "h12")]
    actions = [action for _, action in turns(env, "h12")]
    expected = [f"Search[{town}]", f"Search[{river}]", "Search[Zed]", "Finish[12 miles]"]
    assert actions == expected
    assert "It lies on the Brook 12 (river). I have read of Brook" in thoughts[1]
    assert "Nothing so far names the page. I try Zed." in thoughts[2]


def test_a_sentence_with_the_answer_is_quoted_rather_than_the_first(tmp_path):
    def mark(rows):
        river = "Brook 12 (river)"
        rows[2]["supporting_facts"] = [["Aville 12", 1], [river, 0], [river, 1]]
        return rows

    thought, _ = turns(open_world(tmp_path, "hotpotqa", change=mark), "h12")[-1]
    assert thought.startswith("I read about Brook 12 (river): It is 12 miles long. So")


def test_a_page_is_read_once_and_later_questions_use_every_earlier_answer(tmp_path):
    part = {"question": "what joins #1 and #2?", "answer": "Rail", "paragraph_support_idx": 0}

    def add(rows):
        rows[0][DECOMPOSITION] += [part]
        return rows

    shown = turns(open_world(tmp_path, "musique", change=add), "2hop__10_10")
    assert len(shown) == 3
    wanted = "I want to know this: what joins Town 10 and Zoë 10? I have found this: Rail. So"
    assert wanted in shown[-1][0]


def test_where_a_marked_page_is_missing_there_is_no_expert(tmp_path):
    elsewhere = edit("supporting_facts", 0, 0, "Elsewhere")
    env = open_world(tmp_path, "hotpotqa", change=elsewhere)
    assert env.expert("h11") is None
    assert env.expert("h12").reward == 1


def test_a_sentence_number_out_of_range_is_borne(tmp_path):
    env = open_world(tmp_path, "hotpotqa", change=edit("supporting_facts", 0, 1, 99))
    assert env.expert("h11").reward == 1


# ---------------------------------------------------------------------------- the protocol


def test_example_instruction_types_and_statistics(env):
    prompt = prompt_messages(env)[0]["content"]
    assert "Search[entity]" in prompt
    assert "Finish[answer]" in prompt
    assert "\nAction: Finish[" in env.example
    assert env.example in [render(env.expert(task)) for task in env.splits["train"]]
    kinds = {
        "hotpotqa": {"bridge easy", "comparison hard"},
        "2wikimultihopqa": {"compositional", "bridge_comparison"},
        "musique": {"2hop"},
    }
    assert {env.task_type(task) for task in all_tasks(env)} == kinds[env.name]
    assert set(env.paper) == {"train", "dev", "test", "turns"}
    assert env.max_steps(env.splits["dev"][0]) == 12
    for call in (env.start, env.expert, env.task_type):
        with pytest.raises(InputError, match="no task 'x'"):
            call("x")


def test_experts_are_deterministic_also_from_several_threads(env):
    tasks = all_tasks(env) * 5
    alone = [env.expert(task) for task in tasks]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(env.expert, tasks)) == alone
    assert env.start(tasks[0])[1].startswith("Question: ")


def test_several_paragraphs_of_a_title_are_read_together(worlds):
    world = worlds["musique"]
    told = world.search(world.question("2hop__1_1"), "Capital")
    assert told == "First of 1.\nTown 1 has the mayor Zoë 1."
    assert "the paragraphs of a page that are at hand" in world.instruction
    assert "first paragraph" in worlds["hotpotqa"].instruction


def says(answer: str) -> list[Step]:
    return [Step("Question: ..", f"Thought: so.\nAction: Finish[{answer}]")]


def test_of_an_expert_file_only_exact_matches_are_right(worlds):
    world = worlds["hotpotqa"]
    given = [
        Trajectory(world.question("h2").text, [], says("The 2 Miles."), 0.0),
        Trajectory("h4", [], says("4 miles"), 0.0),
        Trajectory("h6", [], says("6"), 1.0),
        Trajectory("not in the files", [], says("x"), 1.0),
        Trajectory("nor this", [], says("x"), 0.0),
        Trajectory("h8", [], [Step("Question: ..", "Action: Search[8 miles]")], 1.0),
    ]
    kept = [(trajectory.task_id, trajectory.reward) for trajectory in world.right(given)]
    assert kept == [("h2", 1.0), ("h4", 1.0), ("not in the files", 1.0)]


# ---------------------------------------------------------------------------- FireAct's file

PLAY = (
    "Thought: I look it up.\nAction: search[Rush [band]]\n"
    "Observation: A band.\nIt has a drummer.\n"
    "Thought: I have it.\nAction: finish[Neil Peart]\n"
    "Observation: Episode finished, reward = True\n"
)


def fireact(tmp_path, *rows) -> str:
    """A file of (question, output) rows."""
    path = tmp_path / "fireact.json"
    content = []
    for question, output in rows:
        content.append({"instruction": question, "input": "", "output": output})
    path.write_text(json.dumps(content))
    return str(path)


def test_fireact_plays_become_steps(tmp_path):
    [play] = load_trajectories(fireact(tmp_path, (" Who drums? ", PLAY)))
    assert (play.task_id, play.prompt, play.reward) == ("Who drums?", [], 1.0)
    assert play.steps == [
        Step("Question: Who drums?", "Thought: I look it up.\nAction: Search[Rush [band]]"),
        Step("A band.\nIt has a drummer.", "Thought: I have it.\nAction: Finish[Neil Peart]"),
    ]


def test_only_right_fireact_plays_are_kept(tmp_path, capsys):
    wrong = PLAY.replace("= True", "= False")
    unsaid = PLAY.split("Observation: Episode")[0]
    zero = PLAY.replace("True", "0")
    cut = PLAY.split("Thought: I have")[0]
    thinks = PLAY.replace("Action: search[Rush [band]]\n", "")
    bad = [wrong, unsaid, zero, cut, thinks, "nothing"]
    named = [(f"question {i}", output) for i, output in enumerate(bad)]
    rows = [("a", wrong), ("a", PLAY), *named, ("a", PLAY + "\n" + PLAY)]
    plays = load_trajectories(fireact(tmp_path, *rows))
    assert [(play.task_id, len(play.steps)) for play in plays] == [("a", 2)]
    said = capsys.readouterr().err
    assert "entry 8: repeats the id 'a' of entry 1; left out" in said
    assert "fireact.json: 7 plays that fail or do not act are left out" in said
    path = fireact(tmp_path, ("b", wrong))
    with pytest.raises(InputError, match="no play in it ends with the right answer"):
        load_trajectories(path)


def test_fireact_s_messages_are_its_plays(tmp_path):
    """The world may say its last word twice."""
    turns = PLAY.strip().replace("\nObservation:", "\n\nObservation:")
    turns = turns.replace("drummer.\nThought", "drummer.\n\nThought").split("\n\n")
    messages = [{"role": "user", "content": "Who drums?"}]
    for i, text in enumerate([*turns, turns[-1]]):
        messages.append({"role": ("assistant", "user")[i % 2], "content": text})
    path = tmp_path / "gpt.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n")
    assert load_trajectories(str(path)) == load_trajectories(
        fireact(tmp_path, ("Who drums?", PLAY))
    )


@pytest.mark.parametrize(
    "question, output, problem",
    [
        ("q", PLAY.replace("search[", "look["), "action 0 is neither"),
        ("q", 3, "'output' is not text"),
        ("", PLAY, "'instruction' is empty"),
    ],
)
def test_malformed_fireact_rows_are_named(question, output, problem, tmp_path):
    path = fireact(tmp_path, ("first", PLAY), (question, output))
    with pytest.raises(InputError, match=problem) as error:
        load_trajectories(path)
    assert str(error.value).startswith(f"{path}, entry 1")
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------- the real files


@pytest.mark.parametrize(
    "name, options",
    [("hotpotqa", {}), ("2wikimultihopqa", {}), ("musique", {"train_from_dev": 60})],
)
def test_the_expert_answers_every_real_question(name, options):
    env = make_env(name, data=str(real_files(name)), **options)
    assert len(all_tasks(env)) > 100
    for task in all_tasks(env):
        shown = env.expert(task)
        assert shown is not None and shown.reward == 1
        assert len(shown.steps) <= 12


def test_fireact_s_real_file_loads_and_its_answers_are_right():
    path = real_files("hotpotqa") / "fireact_react_trajectories_500.json"
    plays = load_trajectories(str(path))
    rows = json.loads(path.read_text())
    assert [len(play.steps) for play in plays] == [row["output"].count("Action: ") for row in rows]
    env = make_env("hotpotqa")
    tasks = {question.text: task for task, question in env.questions.items()}
    known = [play for play in plays if play.task_id in tasks]
    assert known
    for play in known:
        _, answer = parse_call(parse_action(play.steps[-1].action))
        reward, _, _ = finish(env, tasks[play.task_id], answer)
        assert reward == 1
