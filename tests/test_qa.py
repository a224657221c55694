"""HotpotQA, 2WikiMultihopQA and MuSiQue on small files of our own; on the real ones where STEPAGENT_DATA names their folder."""
import json
import os
import threading

import pytest

from envs import (QA, QA_BENCHMARKS, Question, Titles, answer_f1, load_trajectories, make_env, normalize_answer, parse_action, parse_call,
                  prompt_messages, render)
from rollout import InputError, Step, Trajectory

FILES = {"hotpotqa": ("hotpot_train_v1.1.json", "hotpot_dev_distractor_v1.json"), "2wikimultihopqa": ("train.json", "dev.json"),
         "musique": ("musique_ans_v1.0_train.jsonl", "musique_ans_v1.0_dev.jsonl")}


def hotpot(i):
    """Towns and their rivers. Odd numbers compare two towns, even ones go from a town to its river."""
    context = [[f"Aville {i}", [f"Aville {i} is a town.", f" It lies on the Brook {i} (river)."]],
               [f"Brook {i} (river)", [f"Brook {i} is a river.", f" It is {i} miles long."]],
               [f"Rock &amp; Sand {i}", ["A beach."]], ["Shared", [f"Told by {i}."]]]
    if i % 2:
        return {"_id": f"h{i}", "question": f"Are Aville {i} and Rock & Sand {i} both towns?", "answer": "no", "type": "comparison",
                "level": "hard", "supporting_facts": [[f"Aville {i}", 0], [f"Rock &amp; Sand {i}", 0]], "context": context}
    return {"_id": f"h{i}", "question": f"How long is the river of Aville {i}?", "answer": f"{i} miles", "type": "bridge",
            "level": "easy", "supporting_facts": [[f"Brook {i} (river)", 1], [f"Aville {i}", 1]], "context": context}


def wiki(i):
    films = [[f"Film {i}{x}", "director", f"Ann {x}{i}"] for x in "ab"]
    births = [[f"Ann {x}{i}", "date of birth", f"{n} May 1950"] for x, n in (("a", 1), ("b", 2))]
    context = [[s, [f"{s} is here.", f"Its {r} is {o}."]] for s, r, o in films + births]
    chosen = [films[0], births[0]] if i % 2 else films + births
    return {"_id": f"w{i}", "type": "compositional" if i % 2 else "bridge_comparison", "question": f"Of Film {i}a and Film {i}b ..?",
            "context": context, "entity_ids": "Q1", "supporting_facts": [[s, 1] for s, _, _ in chosen], "evidences": chosen,
            "answer": "1 May 1950" if i % 2 else f"Film {i}b"}


def musique(i):
    paragraphs = [{"idx": 0, "title": "Capital", "paragraph_text": f"First of {i}.", "is_supporting": False},
                  {"idx": 1, "title": f"Land {i}", "paragraph_text": f"The capital of Land {i} is Town {i}.", "is_supporting": True},
                  {"idx": 2, "title": "Capital", "paragraph_text": f"Town {i} has the mayor Zoë {i}.", "is_supporting": True}]
    return {"id": f"2hop__{i}_{i}", "paragraphs": paragraphs, "question": f"Who is the mayor of the capital of Land {i}?",
            "question_decomposition": [{"id": 1, "question": f"Land {i} >> capital", "answer": f"Town {i}", "paragraph_support_idx": 1},
                                       {"id": 2, "question": "who is mayor of #1", "answer": f"Zoë {i}", "paragraph_support_idx": 2}],
            "answer": f"Zoë {i}", "answer_aliases": [f"Mayor {i}", f"Z. {i}"], "answerable": True}


MAKE = {"hotpotqa": hotpot, "2wikimultihopqa": wiki, "musique": musique}
NAMES = list(MAKE)


def write(folder, name, train=range(10), dev=range(10, 17), change=lambda rows: rows, official=True):
    """Both files in the benchmark's format; change(rows) makes the dev file's content from its rows."""
    for file, numbers, changed in zip(FILES[name], (train, dev), (lambda rows: rows, change)):
        rows = changed([MAKE[name](i) for i in numbers]) if numbers is not None else None
        if rows is None:
            continue
        if not isinstance(rows, str):
            rows = "\n".join(map(json.dumps, rows)) + "\n" if file.endswith("l") else json.dumps(rows)
        (folder / (file if official else file.replace(".json", "_sample.json"))).write_text(rows)
    return str(folder)


@pytest.fixture(scope="module", params=NAMES)
def env(request, tmp_path_factory):
    return make_env(request.param, data=write(tmp_path_factory.mktemp(request.param), request.param))


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    return {name: make_env(name, data=write(tmp_path_factory.mktemp(name), name)) for name in NAMES}


# ---- splits and files

def test_splits_are_disjoint_and_follow_the_sha1_of_the_id(worlds):
    splits = worlds["hotpotqa"].splits
    assert {split: len(ids) for split, ids in splits.items()} == {"train": 10, "dev": 3, "test": 4}
    assert set(splits["train"]) == {f"h{i}" for i in range(10)} and len(set(splits["dev"] + splits["test"])) == 7
    assert splits["dev"] + splits["test"] == ["h13", "h11", "h14", "h12", "h15", "h10", "h16"]     # by sha1sum and sort


def test_full_files_give_5000_500_and_500(tmp_path, monkeypatch):
    for attribute, sizes in (("train", 4), ("dev", 2), ("test", 2)):
        monkeypatch.setitem(QA.SIZES, attribute, sizes)
    splits = make_env("hotpotqa", data=write(tmp_path, "hotpotqa")).splits
    assert [len(splits[s]) for s in ("train", "dev", "test")] == [4, 2, 2] and splits["dev"] + splits["test"] == ["h13", "h11", "h14", "h12"]


def test_samples_are_found_by_pattern_and_folders_by_variable(tmp_path, monkeypatch):
    (tmp_path / "hotpotqa").mkdir()
    write(tmp_path / "hotpotqa", "hotpotqa", official=False)
    assert FILES["hotpotqa"][0] not in os.listdir(tmp_path / "hotpotqa")
    monkeypatch.setenv("STEPAGENT_DATA", str(tmp_path))
    assert len(make_env("hotpotqa").splits["train"]) == 10
    (tmp_path / "hotpotqa" / "hotpot_train_2.json").write_text("[]")
    with pytest.raises(InputError, match="2 files like hotpot_train"):
        make_env("hotpotqa")
    write(tmp_path / "hotpotqa", "hotpotqa", train=range(5))                    # the official name wins over others
    assert len(make_env("hotpotqa").splits["train"]) == 5


@pytest.mark.parametrize("name", NAMES)
def test_absent_files_are_named_with_their_source(name, tmp_path, monkeypatch):
    monkeypatch.delenv("STEPAGENT_DATA", raising=False)
    for options in ({}, {"data": str(tmp_path)}):
        with pytest.raises(InputError) as error:
            make_env(name, **options)
        assert all(file in str(error.value) for file in FILES[name]) and QA_BENCHMARKS[name][2] in str(error.value)
        assert "\n" not in str(error.value)


def test_a_dev_file_alone_gives_train_only_on_request(tmp_path):
    data = write(tmp_path, "musique", train=None)
    with pytest.raises(InputError, match="train_from_dev=N"):
        make_env("musique", data=data)
    env = make_env("musique", data=data, train_from_dev=3)
    assert [len(ids) for ids in env.splits.values()] == [3, 2, 2] and len(set(sum(env.splits.values(), []))) == 7
    for wrong, says in ((7, "too few"), (-1, "whole number"), ("x", "whole number")):
        with pytest.raises(InputError, match=says):
            make_env("musique", data=data, train_from_dev=wrong)
    with pytest.raises(InputError, match="for want of"):
        make_env("musique", data=write(tmp_path, "musique"), train_from_dev=3)


def edit(path, value):
    """A change of the second dev row: the field at `path` (keys and indices) becomes value; ... removes it."""
    def change(rows):
        place = rows[1]
        for key in path[:-1]:
            place = place[key]
        if value is ...:
            del place[path[-1]]
        else:
            place[path[-1]] = value
        return rows
    return change


MALFORMED = [
    ("hotpotqa", lambda rows: "[{", "broken JSON"), ("hotpotqa", lambda rows: '{"a": 1}', "is not a JSON list"),
    ("hotpotqa", lambda rows: "[1]", "entry 0: is not a JSON object"), ("hotpotqa", lambda rows: "", "broken JSON"),
    ("hotpotqa", lambda rows: [], "too few"), ("hotpotqa", lambda rows: rows[:1], "too few"),
    ("hotpotqa", lambda rows: rows + rows[:1], "entry 7: repeats the id 'h10' of entry 0"),
    ("hotpotqa", lambda rows: rows + [hotpot(0)], "entry 7: the id 'h0' is also in the other file"),
    ("hotpotqa", edit(["_id"], ...), "entry 1: 'id' is missing"), ("hotpotqa", edit(["_id"], 3), "entry 1: '_id' is not text"),
    ("hotpotqa", edit(["question"], ...), "entry 1: 'question' is missing"), ("hotpotqa", edit(["question"], "\ud800"), "surrogate"),
    ("hotpotqa", edit(["answer"], None), "entry 1: 'answer' is not text"), ("hotpotqa", edit(["answer"], " "), "'answer' is empty"),
    ("hotpotqa", edit(["level"], ...), "entry 1: 'level' is missing"), ("hotpotqa", edit(["context"], {}), "'context' is missing or not"),
    ("hotpotqa", edit(["context", 1], ["x"]), "context\\[1\\] is not \\[title, \\[sentence"),
    ("hotpotqa", edit(["context", 1, 1], "text"), "context\\[1\\] is not"), ("hotpotqa", edit(["context", 1, 1, 0], 7), "context\\[1\\] is not"),
    ("hotpotqa", edit(["supporting_facts", 0], ["x", "1"]), "supporting_facts\\[0\\] is not \\[title, sentence number"),
    ("2wikimultihopqa", edit(["evidences"], ...), "'evidences' is missing or not"),
    ("2wikimultihopqa", edit(["evidences", 0], ["a", "b"]), "'evidences' is missing or not"), ("2wikimultihopqa", edit(["type"], 1), "'type' is not"),
    ("musique", lambda rows: '{"id": "2hop_1"}\n{', "line 2: broken JSON"), ("musique", lambda rows: "3", "line 1: is not a JSON object"),
    ("musique", edit(["id"], "x"), "line 2: the id 'x' does not start with the number of hops"),
    ("musique", edit(["answerable"], False), "line 2: 'answerable' is not true"), ("musique", edit(["paragraphs"], 3), "'paragraphs' is missing"),
    ("musique", edit(["paragraphs", 0, "title"], ...), "line 2, paragraphs\\[0\\]: 'title' is missing"),
    ("musique", edit(["question_decomposition", 1, "paragraph_support_idx"], 3), "question_decomposition\\[1\\]: 'paragraph_support_idx'"),
    ("musique", edit(["question_decomposition", 1, "paragraph_support_idx"], None), "not the number of a paragraph"),
    ("musique", edit(["answer_aliases"], [1]), "line 2: 'answer_aliases' is not a list of text"),
]


@pytest.mark.parametrize("name, change, says", MALFORMED)
def test_a_malformed_file_names_itself_and_the_entry(name, change, says, tmp_path):
    with pytest.raises(InputError, match=says) as error:
        make_env(name, data=write(tmp_path, name, change=change))
    assert "\n" not in str(error.value) and (says == "too few" or str(tmp_path / FILES[name][1]) in str(error.value))


# ---- metrics

@pytest.mark.parametrize("text, normal", [
    ("The  Beatles!", "beatles"), ("an A the", ""), ("U.S.A.", "usa"), ("Theatre", "theatre"), ("the-end", "theend"), ("a  b\tc", "b c"),
    ("“Ünï” – É", "“ünï” – é"), ("rock & roll", "rock roll"), ("İ", "i̇")])
def test_normalisation_is_the_official_one(text, normal):
    assert normalize_answer(text) == normal


@pytest.mark.parametrize("answer, gold, squad, f1", [
    ("the cat sat", "cat", False, 2 / 3), ("cat cat", "cat", False, 2 / 3), ("dog", "cat", False, 0), ("The Cat.", "cat", False, 1),
    ("yes", "yes", False, 1), ("yes it is", "yes", False, 0), ("no", "no way", False, 0), ("noanswer given", "noanswer", False, 0),
    ("yes it is", "yes", True, 0.5), ("the", "a", False, 0), ("the", "a", True, 1), ("the", "cat", True, 0), ("Zoë K.", "zoë", True, 2 / 3)])
def test_f1_by_hand(answer, gold, squad, f1):
    assert answer_f1(answer, gold, squad) == pytest.approx(f1) == pytest.approx(answer_f1(gold, answer, squad))


def finish(env, task, answer):
    return env.start(task)[0].step(f"Thought: x\nAction: Finish[{answer}]")


def test_reward_is_exact_match_with_f1_beside_it(worlds):
    env = worlds["hotpotqa"]
    assert finish(env, "h4", "The 4 MILES.")[1:] == (1.0, True, {"valid": True, "f1": 1.0})
    assert finish(env, "h4", "about 4 miles")[1:] == (0.0, True, {"valid": True, "f1": pytest.approx(0.8)})
    assert finish(env, "h1", "no, they are not")[1:] == (0.0, True, {"valid": True, "f1": 0.0})
    assert finish(env, "h1", "No")[1] == 1.0


def test_aliases_count_for_musique(worlds):
    env = worlds["musique"]
    for answer, right in (("Zoë 3", 1), ("mayor 3", 1), ("Z 3", 1), ("Zoe 3", 0), ("Mayor 4", 0)):
        assert finish(env, "2hop__3_3", answer)[1] == right, answer
    assert finish(env, "2hop__3_3", "the Mayor 3 of town")[3]["f1"] == pytest.approx(2 * 2 / (4 + 2))


# ---- actions

@pytest.mark.parametrize("action, call", [
    ("Search[Rush]", ("search", "Rush")), ("search [ Rush ]", ("search", "Rush")), ("FINISH[yes]", ("finish", "yes")),
    ("Finish[a [b] c] and so on]", ("finish", "a [b] c")), ("Search[[Rush]]", ("search", "[Rush]")), ("Search[Rush", ("search", "Rush")),
    ("Search[Rush [band]", ("search", "Rush [band]")), ("Search[A], Search[B]", ("search", "A")), ("**Search[Rush]**", ("search", "Rush")),
    ("`finish[Rush]`.", ("finish", "Rush")), ("Finish[U.S.].", ("finish", "U.S.")), ("Search[]", None), ("Finish[ ", None), ("Finish", None),
    ("Lookup[x]", None), ("Research[x]", None), ("Search(x)", None), ("I search[x]", None), ("", None)])
def test_what_models_write_is_understood(action, call):
    assert parse_call(parse_action(f"Thought: t\nAction: {action}")) == call


def test_invalid_actions_change_nothing_and_play_goes_on(env):
    task = env.splits["train"][0]
    episode, _ = env.start(task)
    for text in ("", "no action", "Action: fly", "Action: Search[]", "Finish[x]"):
        observation, reward, done, info = episode.step(text)
        assert "Search[entity]" in observation and (reward, done, info) == (0.0, False, {"valid": False, "f1": 0.0})
    reached = [episode.step(s.action) for s in env.expert(task).steps][-1]
    assert reached[1:] == (1.0, True, {"valid": True, "f1": 1.0})
    again = episode.step("Action: Finish[wrong]")
    assert again[1:] == (1.0, True, {"valid": False, "f1": 1.0})


# ---- search

def search(env, task, name):
    return env.start(task)[0].step(f"Action: Search[{name}]")[0]


def test_titles_are_found_in_spite_of_case_accents_and_punctuation(worlds):
    env = worlds["hotpotqa"]
    for name in ("Rock & Sand 3", "rock & sand 3", "  ROCK  &  sand 3", "Rock Sand 3", "Róck-Sand 3", '"Rock & Sand 3"', "[Rock & Sand 3]"):
        assert search(env, "h8", name) == "A beach.", name
    assert search(env, "h8", "Aville 5") == "Aville 5 is a town. It lies on the Brook 5 (river)."


def test_exact_spelling_wins_over_loose(tmp_path):
    def add(rows):
        rows[0]["context"] += [["C", ["A letter."]], ["C++", ["A language."]], ["HALO", ["A code."]], ["Halo", ["A ring."]], ["c#", ["Another."]], ["!!!", ["A band."]]]
        return rows
    env = make_env("hotpotqa", data=write(tmp_path, "hotpotqa", change=add))
    assert [search(env, "h1", t) for t in ("c", "C++", "C#", "!!!", "c.", "HALO", "Halo")] == [
        "A letter.", "A language.", "Another.", "A band.", "A letter.", "A code.", "A ring."]


def test_the_question_s_own_paragraphs_come_first_then_the_first_in_the_files(worlds):
    hot, mus = worlds["hotpotqa"], worlds["musique"]
    assert search(hot, "h8", "Shared") == "Told by 8." and search(hot, "h3", "shared") == "Told by 3."
    assert worlds["2wikimultihopqa"].search(Question("", [""], "", {}, []), "film 3A") == "Film 3a is here. Its director is Ann a3."
    assert hot.search(Question("", [""], "", {}, []), "Shared") == "Told by 0."
    assert search(mus, "2hop__4_4", "Capital") == "First of 4.\nTown 4 has the mayor Zoë 4."
    assert search(mus, "2hop__4_4", "Land 12") == "The capital of Land 12 is Town 12."


def test_no_such_page_lists_the_five_most_similar(worlds):
    env = worlds["hotpotqa"]
    told = search(env, "h2", "Aville")
    assert told.startswith("There is no page Aville. Similar titles: Aville ") and told.count(";") == 4 and told.count("Aville") == 6
    assert env.titles.similar("Sand of 7")[0] == "Rock & Sand 7" and env.titles.similar("the brook (river) 16")[0] == "Brook 16 (river)"
    assert len(env.titles.similar("qqq")) == 5 and env.titles.similar("Avile")[0].startswith("Aville")
    assert search(env, "h2", "!?") == "There is no page !?. Similar titles: none."


def test_common_words_add_to_rare_ones_and_do_for_want_of_them(monkeypatch):
    titles = Titles(["The Red Fox", "Red Hen", "The Owl", "The Red", "A Bee", "The Fox of the Red Hen", "Red Owl"])
    asked = ["Red Hens", "the red fox", "Red", "owl the"]
    before = [titles.similar(name) for name in asked]
    assert before[1][0] == "The Red Fox" and set(before[2][:3]) == {"Red Hen", "The Red", "Red Owl"} and all(len(found) >= 5 for found in before[:3])
    monkeypatch.setattr(Titles, "COMMON", 2)
    assert len(titles.similar("bee red")) == 5
    assert [titles.similar(name)[:2] for name in asked] == [found[:2] for found in before]


# ---- the expert

def test_the_expert_answers_every_question(env):
    for task in sum(env.splits.values(), []):
        shown = env.expert(task)
        assert shown.reward == 1.0 and not shown.truncated and len(shown.steps) <= env.max_steps(task) and shown.prompt == []
        episode, observation = env.start(task)
        for step in shown.steps:
            assert step.observation == observation and step.action.startswith("Thought: ") and step.action.count("\n") == 1
            observation, reward, done, info = episode.step(step.action)
            assert info["valid"] and "no page" not in observation
        assert (reward, done) == (1.0, True)


def test_the_expert_s_plays_read_as_they_should(worlds):
    def plays(name, task):
        return [s.action.split("\n") for s in worlds[name].expert(task).steps]
    assert plays("hotpotqa", "h4") == [
        ["Thought: The question names Aville 4.", "Action: Search[Aville 4]"],
        ["Thought: I read about Aville 4: It lies on the Brook 4 (river). I have read of Brook 4 (river).", "Action: Search[Brook 4 (river)]"],
        ["Thought: I read about Brook 4 (river): It is 4 miles long. So the answer is 4 miles.", "Action: Finish[4 miles]"]]
    assert plays("hotpotqa", "h3")[-1][0] == ("Thought: I read about Aville 3: Aville 3 is a town. I read about Rock & Sand 3: A beach. "
                                              "So the answer is no.")
    assert [p[1] for p in plays("2wikimultihopqa", "w4")] == [f"Action: Search[{t}]" for t in ("Film 4a", "Film 4b", "Ann a4", "Ann b4")] + [
        "Action: Finish[Film 4b]"]
    assert plays("musique", "2hop__4_4")[1][0] == ("Thought: I have found this: Town 4. I want to know this: who is mayor of Town 4? "
                                                   "The question names Capital.")


def test_the_order_of_pages_is_one_that_a_reader_could_follow(tmp_path):
    def add(rows):
        rows[2]["context"] += [["Zed", ["Nobody names me."]]]
        rows[2]["supporting_facts"] = [["Zed", 0], ["Brook 12 (river)", 0], ["Brook 12 (river)", 1], ["Aville 12", 0], ["Aville 12", 1]]
        return rows
    env = make_env("hotpotqa", data=write(tmp_path, "hotpotqa", change=add))
    plays = [s.action for s in env.expert("h12").steps]
    assert [p.split("Action: ")[1] for p in plays] == ["Search[Aville 12]", "Search[Brook 12 (river)]", "Search[Zed]", "Finish[12 miles]"]
    assert "It lies on the Brook 12 (river). I have read of Brook" in plays[1] and "Nothing so far names the page. I try Zed." in plays[2]


def test_a_sentence_with_the_answer_is_quoted_rather_than_the_first(tmp_path):
    facts = [["Aville 12", 1], ["Brook 12 (river)", 0], ["Brook 12 (river)", 1]]
    env = make_env("hotpotqa", data=write(tmp_path, "hotpotqa", change=lambda rows: rows[:2] + [rows[2] | {"supporting_facts": facts}] + rows[3:]))
    assert "Thought: I read about Brook 12 (river): It is 12 miles long. So" in env.expert("h12").steps[-1].action


def test_a_page_is_read_once_and_later_questions_use_every_earlier_answer(tmp_path):
    def add(rows):
        rows[0]["question_decomposition"] += [{"question": "what joins #1 and #2?", "answer": "Rail", "paragraph_support_idx": 0}]
        return rows
    env = make_env("musique", data=write(tmp_path, "musique", change=add))
    [*_, last] = shown = env.expert("2hop__10_10").steps
    assert len(shown) == 3 and "I want to know this: what joins Town 10 and Zoë 10? I have found this: Rail. So" in last.action


def test_where_a_marked_page_is_missing_there_is_no_expert(tmp_path):
    env = make_env("hotpotqa", data=write(tmp_path, "hotpotqa", change=edit(["supporting_facts", 0, 0], "Elsewhere")))
    assert env.expert("h11") is None and env.expert("h12").reward == 1


def test_a_sentence_number_out_of_range_is_borne(tmp_path):
    env = make_env("hotpotqa", data=write(tmp_path, "hotpotqa", change=edit(["supporting_facts", 0, 1], 99)))
    assert env.expert("h11").reward == 1


# ---- the protocol

def test_example_instruction_types_and_statistics(env):
    prompt = prompt_messages(env)[0]["content"]
    assert "Search[entity]" in prompt and "Finish[answer]" in prompt and "\nAction: Finish[" in env.example
    assert any(render(env.expert(t)) == env.example for t in env.splits["train"])
    kinds = {env.task_type(t) for t in sum(env.splits.values(), [])}
    assert kinds == {"hotpotqa": {"bridge easy", "comparison hard"}, "2wikimultihopqa": {"compositional", "bridge_comparison"},
                     "musique": {"2hop"}}[env.name]
    assert set(env.paper) == {"train", "dev", "test", "turns"} and env.max_steps(env.splits["dev"][0]) == 12
    for call in (env.start, env.expert, env.task_type):
        with pytest.raises(InputError, match="no task 'x'"):
            call("x")


def test_starts_are_deterministic_also_from_several_threads(env):
    tasks = sum(env.splits.values(), []) * 5
    alone, together = [render(env.expert(t)) for t in tasks], [""] * len(tasks)
    def play(numbers):
        for n in numbers:
            together[n] = render(env.expert(tasks[n]))
    threads = [threading.Thread(target=play, args=(range(k, len(tasks), 4),)) for k in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert alone == together
    assert env.start(tasks[0])[1].startswith("Question: ")


# ---- FireAct's file

PLAY = ("Thought: I look it up.\nAction: search[Rush [band]]\nObservation: A band.\nIt has a drummer.\nThought: I have it.\nAction: finish[Neil Peart]\n"
        "Observation: Episode finished, reward = True\n")


def fireact(tmp_path, *rows):
    path = tmp_path / "fireact.json"
    path.write_text(json.dumps([{"instruction": q, "input": "", "output": o} for q, o in rows]))
    return str(path)


def test_fireact_plays_become_steps(tmp_path):
    [t] = load_trajectories(fireact(tmp_path, (" Who drums? ", PLAY)))
    assert (t.task_id, t.prompt, t.reward) == ("Who drums?", [], 1.0)
    assert [(s.observation, s.action) for s in t.steps] == [
        ("Question: Who drums?", "Thought: I look it up.\nAction: Search[Rush [band]]"),
        ("A band.\nIt has a drummer.", "Thought: I have it.\nAction: Finish[Neil Peart]")]


def test_only_right_fireact_plays_are_kept(tmp_path):
    wrong = PLAY.replace("= True", "= False")
    assert [t.task_id for t in load_trajectories(fireact(tmp_path, ("a", PLAY), ("b", wrong)))] == ["a"]
    with pytest.raises(InputError, match="no play in it ends with the right answer"):
        load_trajectories(fireact(tmp_path, ("b", wrong)))
    unsaid = PLAY.split("Observation: Episode")[0]
    assert [t.task_id for t in load_trajectories(fireact(tmp_path, ("a", PLAY), ("b", unsaid), ("c", PLAY.replace("True", "0"))))] == ["a"]


def test_of_an_expert_file_only_exact_matches_are_right(worlds):
    world, say = worlds["hotpotqa"], lambda answer: [Step("Question: ..", f"Thought: so.\nAction: Finish[{answer}]")]
    asked = world.question("h2").text
    given = [Trajectory(asked, [], say("The 2 Miles."), 0.0), Trajectory("h4", [], say("4 miles"), 0.0), Trajectory("h6", [], say("6"), 1.0),
             Trajectory("not in the files", [], say("x"), 1.0), Trajectory("nor this", [], say("x"), 0.0),
             Trajectory("h8", [], [Step("Question: ..", "Action: Search[8 miles]")], 1.0)]
    assert [(t.task_id, t.reward) for t in world.right(given)] == [("h2", 1.0), ("h4", 1.0), ("not in the files", 1.0)]


def test_several_paragraphs_of_a_title_are_read_together(worlds):
    world = worlds["musique"]
    assert world.search(world.question("2hop__1_1"), "Capital") == "First of 1.\nTown 1 has the mayor Zoë 1."
    assert "the paragraphs of a page that are at hand" in world.instruction and "first paragraph" in worlds["hotpotqa"].instruction


@pytest.mark.parametrize("row, says", [
    (("q", PLAY.replace("search[", "look[")), "action 0 is neither"), (("q", "nothing"), "has no actions"),
    (("q", PLAY.split("Thought: I have")[0]), "does not end with finish"),
    (("q", PLAY.replace("Action: search[Rush [band]]\n", "")), "no action before observation 0"),
    (("q", 3), "'output' is not text"), (("", PLAY), "'instruction' is empty"), (("first", PLAY), "repeats the id 'first' of entry 0")])
def test_malformed_fireact_rows_are_named(row, says, tmp_path):
    path = fireact(tmp_path, ("first", PLAY), row)
    with pytest.raises(InputError, match=says) as error:
        load_trajectories(path)
    assert str(error.value).startswith(f"{path}, entry 1") and "\n" not in str(error.value)


# ---- the real files

REAL = os.environ.get("STEPAGENT_DATA")
real = pytest.mark.skipif(not REAL, reason="STEPAGENT_DATA names no folder of real data")


@real
@pytest.mark.parametrize("name, options", [("hotpotqa", {}), ("2wikimultihopqa", {}), ("musique", {"train_from_dev": 60})])
def test_the_expert_answers_every_real_question(name, options):
    if not os.path.isdir(os.path.join(REAL, name)):
        pytest.skip(f"{REAL} has no {name}")
    env = make_env(name, **options)
    shown = [env.expert(task) for task in sum(env.splits.values(), [])]
    assert len(shown) > 100 and all(t is not None and t.reward == 1 and len(t.steps) <= 12 for t in shown)


@real
def test_fireact_s_real_file_loads_and_its_answers_are_right():
    path = os.path.join(REAL, "hotpotqa", "fireact_react_trajectories_500.json")
    if not os.path.exists(path):
        pytest.skip(f"{path} is not there")
    plays, env = load_trajectories(path), make_env("hotpotqa")
    with open(path) as file:
        rows = json.load(file)
    assert [len(t.steps) for t in plays] == [row["output"].count("Action: ") for row in rows]
    tasks = {question.text: task for task, question in env.questions.items()}
    known = [t for t in plays if t.task_id in tasks]
    assert known and all(finish(env, tasks[t.task_id], parse_call(parse_action(t.steps[-1].action))[1])[1] == 1 for t in known)
