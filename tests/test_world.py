"""A world in one file: the page's example, what can be wrong with a file, how a user ends a dialogue, and the help."""
import json
import os
import random
import re
import runpy
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

import baselines
import evaluate
import refuel
import shop
import simulator
import toy
import usage
from helpers import ROOT, Talker, dialogue, last_number
from machinery import files, rewards, settings, template, worlds
from machinery.files import BadInput
from machinery.seams import END
from simulator import Dialogue

PAGE = open(os.path.join(ROOT, "docs", "world.md"), encoding="utf-8").read()
(TUTOR,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
SMALL = "--engine transformers --max-length 500 --max-dialogue 500 --max-turns 2 --max-new-tokens 8 --eval-dialogues 4"


@pytest.fixture
def world(tmp_path):
    """A function that writes the page's tutor with some of its text replaced, and gives the file's path."""

    def write(*changes, name="tutor.py"):
        text = TUTOR
        for old, new in changes:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def run(main, *flags):
    main([*flags, *SMALL.split()])


def refused(capsys, main, *flags):
    """The line with which a command ends, exit code 2."""
    with pytest.raises(SystemExit) as stop:
        run(main, *flags)
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if re.match(r"\w+\.py: ", line)]
    assert stop.value.code == 2 and len(lines) == 1 and "Traceback" not in error
    return lines[0]


# --- the page's example ------------------------------------------------------------------------------------------


def test_the_pages_example_runs_from_its_two_commands_and_a_changed_reward_is_refused(world, base, tmp_path, capsys):
    assert len(TUTOR.splitlines()) <= 35
    file, out = world(), str(tmp_path / "run")
    run(simulator.main, "--world", file, "--policy", base, "--show", "2")
    shown = capsys.readouterr().out
    assert shown.count("h = ") == 2 and "system     You are a tutor." in shown and "pupil" in shown
    train = ["--world", file, "--policy", base, "--num-prompts", "12", "--batch-size", "4", "--iterations", "1", "--out", out]
    run(refuel.main, *train)
    collected = files.read_lines(os.path.join(out, "metrics.jsonl"))[0]
    assert collected["pairs"] + sum(collected["dropped"].values()) == 12 and collected["pairs"] > 6
    assert set(files.read_json(f"{out}/results.json")) == {"base", "iter_1"}
    made_of = files.read_json(f"{out}/config.json")["made_of"]
    assert {"content of --user", "content of --reward", "prompts of --dataset"} <= set(made_of)
    run(evaluate.main, "--world", file, "--reference", base, "--policy", out, "--judge", "world", "--out", str(tmp_path / "e"))
    run(refuel.main, *train)  # finished: nothing is played again
    (tmp_path / "tutor.py").write_text(TUTOR.replace("/ 1000", "/ 999"))
    error = refused(capsys, refuel.main, *train)
    assert "was made with another content of --dataset, content of --reward, content of --user" in error


def test_the_prompts_are_in_the_hash_and_so_are_modules_beside_the_file(world, tmp_path):
    (tmp_path / "beside.py").write_text("import deeper\nSIZE = 256\n")
    (tmp_path / "deeper.py").write_text("")
    file = world(("import random\n", "import random\n\nfrom beside import SIZE\n"), ('"train": 256', '"train": SIZE'))
    names = [os.path.basename(path) for path in worlds.sources(worlds.world_file(file))]
    assert names[0] == "tutor.py" and sorted(names[1:]) == ["beside.py", "deeper.py"]
    before, prompts = worlds.fingerprint(file), worlds.prompts_hash(file)
    (tmp_path / "deeper.py").write_text("# changed")
    assert worlds.fingerprint(file) != before
    assert worlds.prompts_hash(world(('"test": 64', '"test": 65'), name="other.py")) != prompts
    assert worlds.sources(toy.__file__) == [toy.__file__]  # what is the program's own has a hash anyway
    assert set(worlds.sources(shop.__file__)) == {shop.__file__, usage.__file__, toy.__file__}  # but for a world of its own


# --- what can be wrong -------------------------------------------------------------------------------------------

PROMPTS = TUTOR[TUTOR.index("    rng = random") : TUTOR.index("\n\n\nclass User")]
REPLY = "return [self.one_reply(d.messages[-1][\"content\"].lower(), d.secret) for d in dialogues]"
SCORES = TUTOR[TUTOR.index("    return [(d.secret in text)") :].rstrip("\n")
DEFAULTS = re.search(r"DEFAULTS = .*", TUTOR)[0]
WRONG = {  # what is replaced: by what, and words of the line
    "a syntax error": ("rng = random.Random(split)", "rng = = random", ("--world", "line 12", "invalid syntax")),
    "an import that fails": ("import random\n", "import nothing_like_it\n", ("failed at", ":2", "No module named")),
    "an exit": ("import random\n", "raise SystemExit('no')\n", ("failed at", "SystemExit no")),
    "no User": ("class User", "class Pupil", ("--user", "no class User")),
    "another case": ("class User", "class user", ("no class User", "did you mean user?")),
    "no reply": ("def reply", "def answer", ("--user", "no reply(dialogues)")),
    "no reward": ("def reward", "def rewards", ("--reward", "no function reward(dialogues)", "did you mean rewards?")),
    "no prompts": ("def prompts", "def openings", ("--dataset", "no function prompts(split)")),
    "a User that wants arguments": ("    def reply", "    def __init__(self, x):\n        pass\n\n    def reply", ("TypeError", "'x'")),
    "async": ("def reward", "async def reward", ("--reward", "no coroutine")),
    "prompts of nothing": (PROMPTS, "    return []", ("prompts('train') gave nothing",)),
    "prompts of None": (PROMPTS, "    pass", ("prompts('train') gave a NoneType",)),
    "an opening too many": (PROMPTS, '    return ["a", ("b", 1, 2)]', ("prompts('train')[1] is ('b', 1, 2)",)),
    "an empty opening": (PROMPTS, '    return ["a", " "]', ("prompts('train')[1] is ' '",)),
    "a secret of another kind": (PROMPTS, '    return [("a", {1, 2})]', ("the secret of prompts('train')[0]", "JSON")),
    "no seed": ("random.Random(split)", "random", ("gives another list", "random.Random(0)")),
    "no test": ("{\"train\": 256, \"test\": 64}[split]", "{\"train\": 256}[split]", ("prompts('test')", "failed at", "KeyError")),
    "too few prompts": ('"train": 256', '"train": 1', ("--num-prompts 2", "only 1 training prompts")),
    "a field that is none": (DEFAULTS, "DEFAULTS = dict(max_turn=3)", ("DEFAULTS has 'max_turn'", "did you mean max_turns")),
    "a value of another type": (DEFAULTS, "DEFAULTS = dict(eta='much')", ("eta must be a float, not 'much'",)),
    "DEFAULTS of another type": (DEFAULTS, "DEFAULTS = [3]", ("DEFAULTS must be a dict",)),
    "a SYSTEM of another type": (re.search(r"SYSTEM = .*", TUTOR)[0], "SYSTEM = 3", ("system must be a str, not 3",)),
    "replies too few": (REPLY, "return ['a'] * (len(dialogues) - 1)", ("--user", "for 2 dialogues", "tutor.py")),
    "an empty reply": (REPLY, "return [''] * len(dialogues)", ("--user gave ''", "pupil", "tutor.py")),
    "an exception": (REPLY, "raise RuntimeError('out')", ("--user failed at", "tutor.py:21", "RuntimeError out", "pupil")),
    "one in a library": (SCORES, "    import json\n    return json.loads('{')", ("--reward failed at", "tutor.py:33", "JSONDecode")),
    "rewards too few": (SCORES, "    return [1.0]", ("--reward gave 1 values for", "tutor.py")),
    "a reward that is no number": (SCORES, "    return ['good' for d in dialogues]", ("--reward gave 'good'", "pupil", "tutor.py")),
    "one that is not finite": (SCORES, "    return [float('nan') for d in dialogues]", ("--reward", "not finite (nan)", "tutor.py")),
    "a dict of rewards": (SCORES, "    return {d.secret: 1.0 for d in dialogues}", ("--reward gave", "a list with one for each")),
    "a set of rewards": (SCORES, "    return {100.37 + i for i, d in enumerate(dialogues)}", ("--reward gave", "a list with one")),
    "rewards with a mean of 0": (SCORES, "    return [i - (len(dialogues) - 1) / 2 for i in range(len(dialogues))]",
                                 ("--reward gave", "alone", "must not depend on the batch", "tutor.py")),
    "the test's prompts for training": (PROMPTS, '    return [("a", "b"), ("c", "d")]', ("one list for 'train' and for 'test'",)),
    "yield": (SCORES, "    yield 1.0", ("--reward gave a generator",)),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_in_a_worlds_file_is_one_line_that_names_it(name, world, base, capsys):
    old, new, words = WRONG[name]
    file = world((old, new))
    line = refused(capsys, simulator.main, "--world", file, "--policy", base, "--show", "2")
    assert all(word in line for word in words) and "tutor.py" in line, line


def test_the_same_reward_of_both_conversations_has_nothing_to_learn_from(world, base, tmp_path, capsys):
    file = world((SCORES, "    return [1.0] * len(dialogues)"))
    line = refused(capsys, refuel.main, "--world", file, "--policy", base, "--num-prompts", "40", "--out", str(tmp_path / "run"))
    assert "nothing to learn" in line and file in line


@pytest.mark.parametrize("flags, words", [
    ("--world nothing.py", "no such file"), ("--world tutor", "FILE.py"), ("--setting world --user x", "--dataset is missing"),
    ("--setting ton", "did you mean two or toy"), ("--setting toy --engine vlm", "did you mean vllm?"),
    ("--setting toy --activation-checkpointing selected", "did you mean selective?"),
    ("--setting toy --sytem x", "did you mean --system?"), ("--setting toy --user other.py", "no such file"),
])  # fmt: skip
def test_a_word_that_is_near_a_right_one_is_told_the_right_one(flags, words):
    with pytest.raises(BadInput) as stop:
        simulator.check_names(refuel.read_config([*flags.split(), "--policy", "a/b", "--reward", "a/b"]))
    assert words in str(stop.value)


def test_a_method_that_is_near_a_right_one_is_told_the_right_one():
    with pytest.raises(BadInput, match="did you mean rebel-lt-online"):
        baselines.choose("rebel-lt-onlin")


def test_the_three_flags_of_one_file_are_its_world(world):
    """DEFAULTS go with BASELINES, which are of that file's --dataset."""
    file = world((DEFAULTS, "DEFAULTS = dict(eta=77.0, reference='a/sft')"))
    flags = ["--policy", "a/b", "--dataset", file, "--user", file, "--reward", file]
    long, short = refuel.read_config(flags), refuel.read_config(["--policy", "a/b", "--world", file])
    assert long == short and long.eta == 77.0 and long.system and long.setting == "world"
    assert long.reference == "a/sft"  # a world's own reference gives way to --reference alone
    assert refuel.read_config(["--world", file, "--policy", "a/b", "--reference", "a/c"]).reference == "a/c"
    assert refuel.read_config(["--setting", "toy", *flags[:4]]).eta != 77.0


def test_two_worlds_whose_helpers_have_one_name_are_refused(tmp_path, monkeypatch):
    """The second one's import would give it the first one's file, though its own is in the fingerprint."""
    for world, scale in (("wa", 2.0), ("wb", -5.0)):
        (tmp_path / world).mkdir()
        (tmp_path / world / "of_both.py").write_text(f"SCALE = {scale}\n")
        (tmp_path / world / f"{world}.py").write_text("from of_both import SCALE\n\n\ndef reward(dialogues):\n    return [SCALE] * len(dialogues)\n")
    monkeypatch.setattr(sys, "path", sys.path[:])
    first, second = (str(tmp_path / world / f"{world}.py") for world in ("wa", "wb"))
    try:
        assert worlds.load_reward(first)([1]) == [2.0]
        with pytest.raises(BadInput, match="its of_both is .*wb.of_both.py, but .*wa.of_both.py was imported by that name: rename"):
            worlds.load_reward(second)
    finally:
        for name in ("wa", "wb", "of_both"):
            sys.modules.pop(name, None)


def test_questions_of_the_data_are_asked_for_in_both_splits(monkeypatch):
    rows = {"train": [("a", ["b"])], "test": [("c", "abc")]}
    monkeypatch.setattr(worlds, "load_prompts", lambda name, split: rows[split])
    assert not worlds.has_questions("w.py")
    rows["test"] = [("c", ["abc"])]
    assert worlds.has_questions("w.py")


def test_max_turns_holds_for_a_world_whose_prompts_ask_their_own_questions(cfg, monkeypatch):
    """Of a data set such prompts are dropped and counted (machinery/data.py); a world's author can leave them out."""
    rows = {"train": [("a", ["b"])], "test": [("c", ["d", "e"])]}
    monkeypatch.setattr(worlds, "load_prompts", lambda name, split: rows[split])
    own = replace(cfg, user="dataset", reward="no.word", max_turns=3)
    simulator.check_names(own)
    with pytest.raises(BadInput, match="--max-turns 2: --dataset toy has a prompt of 3 questions: give --max-turns 3") as stop:
        simulator.check_names(replace(own, max_turns=2))
    assert "\n" not in str(stop.value)
    simulator.short_logs.cache_clear()
    monkeypatch.setattr(worlds, "load_logs", lambda name: [toy.load_logs()[row] for row in range(60)])
    rolled_in = simulator.offline_prompts(replace(own, max_turns=2, num_prompts=0), template.load_tokenizer(cfg.policy), 1)
    assert max(len(d.spans) for d in rolled_in[:]) == 2
    simulator.short_logs.cache_clear()


def test_a_worlds_longer_conversations_are_no_roll_ins(cfg, monkeypatch):
    logs = [toy.load_logs()[row] for row in range(60)]
    monkeypatch.setattr(worlds, "load_logs", lambda name: logs)
    simulator.short_logs.cache_clear()
    short = sum(len(log.questions) <= 2 for log in logs)
    assert 0 < short < 60
    rows = simulator.offline_prompts(replace(cfg, max_turns=2, num_prompts=short), template.load_tokenizer(cfg.policy), 1)
    assert len(rows) == short and max(len(d.spans) for d in rows[:]) == 2
    with pytest.raises(BadInput, match=f"only {short} dialogues"):
        simulator.offline_prompts(replace(cfg, max_turns=2, num_prompts=60), template.load_tokenizer(cfg.policy), 1)
    simulator.short_logs.cache_clear()


# --- what the flags mean -----------------------------------------------------------------------------------------


def test_a_flag_goes_before_the_worlds_values_and_these_before_the_settings(world):
    file = world()
    cfg = refuel.read_config(["--world", file, "--policy", "a/b", "--num-prompts", "40"])
    assert (cfg.setting, cfg.user, cfg.reward, cfg.dataset, cfg.reference) == ("world", file, file, file, "a/b")
    assert (cfg.num_prompts, cfg.max_turns, cfg.eta, cfg.out) == (40, 3, 10.0, os.path.join("runs", "tutor"))
    assert cfg.system.startswith("You are a tutor") and refuel.read_config(["--world", file, "--policy", "a/b", "--system", ""]).system == ""
    one = refuel.read_config(["--setting", "one", "--world", file, "--reward", "a/b"])
    assert (one.setting, one.eta, one.max_turns, one.reward, one.user) == ("one", 1000.0, 3, "a/b", file)
    alone = refuel.read_config(["--setting", "one", "--reward", file])
    assert alone.reward == file and alone.user.startswith("serve:") and alone.max_turns == 5 and alone.system == ""


def test_a_worlds_data_set_brings_its_own_values_below_the_worlds(world):
    flags = ["--setting", "two", "--policy", "a/b", "--reward", "a/b"]
    plain = refuel.read_config([*flags, "--dataset", "Anthropic/hh-rlhf"])
    file = world((DEFAULTS, 'DEFAULTS = dict(dataset="Anthropic/hh-rlhf", user="dataset", lr=2e-5)'))
    named = refuel.read_config([*flags, "--world", file])
    assert (plain.gamma, plain.penalty, plain.max_new_tokens) == (named.gamma, named.penalty, named.max_new_tokens) == (0.05, -10.0, 512)
    assert named.lr == 2e-5 != plain.lr
    own = world((DEFAULTS, "DEFAULTS = dict(gamma=0.7)"), name="hh.py")  # a file of that name is not Anthropic's
    assert refuel.read_config([*flags, "--world", own]).gamma == 0.7 and refuel.read_config([*flags, "--world", own]).penalty == -4


def test_the_toy_is_a_world_like_any_other(monkeypatch, tmp_path):
    known, named = refuel.read_config(["--setting", "toy"]), refuel.read_config(["--world", "toy"])
    assert named == replace(known, setting="world") and worlds.load_world("toy", "--user") is toy
    path = refuel.read_config(["--world", toy.__file__])
    assert worlds.load_user(path.user).__class__ is toy.Customer and worlds.load_reward(path.reward) is toy.reward
    assert simulator.first_prompts(path, "test", None)[:3] == toy.load_prompts("test")[:3]
    monkeypatch.setattr(toy, "FOLDER", str(tmp_path / "base"))
    monkeypatch.setattr(toy, "base_policy", lambda folder: os.makedirs(folder))
    with pytest.raises(BadInput, match="base is not a checkpoint"):  # it was made, and is looked at
        simulator.checkpoint("toy")


def test_a_system_prompt_is_said_before_every_conversation_that_has_none(tokenizers):
    tokenizer = tokenizers["chatml"]
    plain, own = worlds_prompt("hi"), worlds_prompt("hi")._replace(system="be brief")
    assert "be kind" in tokenizer.decode(simulator.open_dialogue(tokenizer, plain, system="be kind").ids)
    d = simulator.open_dialogue(tokenizer, own, system="be kind")
    assert d.system == "be brief" and "be kind" not in tokenizer.decode(d.ids)
    assert simulator.open_dialogue(tokenizer, plain, system="").system is None


def worlds_prompt(text):
    return simulator.data.Prompt(text)


# --- a user's and a reward's rights ------------------------------------------------------------------------------


def test_a_function_that_writes_into_its_dialogues_changes_nobody_elses():
    d = Dialogue.start(Talker().tokenizer, "go on", secret=["one", "two"])

    def reward(dialogues):
        dialogues[0].messages.clear()
        dialogues[0].secret.pop()
        return [1.0]

    assert simulator.score(reward, [d]) == [1.0] and d.messages and d.secret == ["one", "two"]
    assert simulator.score(lambda ds: pytest.fail("nothing was to be scored"), []) == []


def test_rewards_that_know_a_secret_are_not_shared_between_dialogues_of_equal_texts():
    a, b = dialogue("1"), dialogue("1")
    a.secret, b.secret = {"wish": 1}, {"wish": 2}
    scores = rewards.shared(lambda ds: [d.secret["wish"] for d in ds])
    assert scores([a, b]) == [1.0, 2.0]
    with pytest.raises(BadInput, match="--reward gave None"):
        rewards.shared(lambda ds: [None for _ in ds])([a])
    longer = a.copy(ids=[*a.ids, 5], spans=[(start, end + 1) for start, end in a.spans])  # the same words, by more tokens
    assert rewards.shared(lambda ds: [len(d.ids) for d in ds])([a, longer, a]) == [len(a.ids), len(a.ids) + 1, len(a.ids)]


def test_of_processes_that_want_a_base_policy_at_once_one_builds_it(tmp_path):
    """Two that built it in one folder could leave half of it there, for ever."""
    folder, built = str(tmp_path / "deep" / "base"), []

    def build(folder):
        built.append(folder)
        time.sleep(0.2)
        os.makedirs(folder)
        files.write_file(os.path.join(folder, "recipe.json"), '{"steps": 3}')

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(lambda _: toy.built(folder, {"steps": 3}, build), range(3))) == [folder] * 3
    assert built == [folder]


class Leaves(Talker):
    """A policy of two words, and a user who leaves at one of them."""

    def answer(self, dialogues):
        words = [self.tokenizer.convert_tokens_to_ids(("wool", "silk")[d.seed("policy") % 2]) for d in dialogues]
        return [([word, 2], False, -1.0) for word in words]

    def reply(self, dialogues):
        return [END if d.messages[-1]["content"] == "wool" else "go on" for d in dialogues]


def test_a_user_ends_a_dialogue_which_is_finished_and_no_failure():
    speaker = Leaves()
    starts = [Dialogue.start(speaker.tokenizer, "go on", stream=(i,)) for i in range(64)]
    done = simulator.rollout(starts, speaker, speaker, [4] * 64)
    assert {len(d.spans) for d in done} == {1, 2, 3, 4} and not any(d.failed for d in done)
    for d in done:
        said = [m["content"] for m in d.messages[1::2]]
        assert d.messages[-1]["role"] == "assistant" and "wool" not in said[:-1] and (len(said) == 4 or said[-1] == "wool")


def test_which_state_is_trained_does_not_depend_on_how_a_dialogue_goes_on(cfg):
    """y and y' are exchangeable given h: redrawing h among the turns of an ended dialogue would give y = "wool" two
    thirds of the pairs at h = 1, and y' one half."""
    speaker, dropped = Leaves(), Counter()
    starts = [Dialogue.start(speaker.tokenizer, "go on") for _ in range(2000)]
    two = replace(cfg, max_turns=2, user="b", max_dialogue=99)
    pairs = refuel.collect(starts, speaker, speaker, lambda ds: [float(len(d.spans)) for d in ds], two, np.random.default_rng(0), dropped)
    wool = speaker.tokenizer.convert_tokens_to_ids("wool")
    first = [p for p in pairs if p.h == 1 and p.y != p.y2]
    assert len(first) > 500 and abs(np.mean([p.y[0] == wool for p in first]) - 0.5) < 0.06
    assert dropped["over before turn h"] > 150 and dropped["user"] == 0 and len(pairs) + sum(dropped.values()) == 2000
    for p in pairs:
        assert p.H == max(len(d.spans) for d in p.dialogues) and p.h <= min(len(d.spans) for d in p.dialogues)
        assert p.rewards == tuple(float(len(d.spans)) for d in p.dialogues)
    again = refuel.Pair.from_json(json.loads(json.dumps(pairs[0].to_json())))
    assert (again.h, again.H, list(again.y2)) == (pairs[0].h, pairs[0].H, pairs[0].y2)


def test_a_dialogue_that_has_ended_is_compared_as_it_ended():
    a, b = [dialogue("5"), dialogue("1", "1 1 1")], [dialogue("1", "9"), dialogue("1", "1", "0")]
    row = evaluate.summary(a, b, evaluate.by_reward(last_number), last_number, turns=3)
    assert row["win"] == [75.0, 25.0, 50.0] and row["turns"] == 1.5  # 5 > 1, 5 < 9, 5 < 9; 1 = 1, 1 = 1, 1 > 0
    assert row["length"] == [1.0, 3.0] and row["length_avg"] == 1.6667 and row["reward"] == [3.0, 3.0, 3.0]  # nobody has an answer 3


# --- help --------------------------------------------------------------------------------------------------------


def test_the_help_has_every_flag_in_its_group_with_its_comment_and_values(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as stop:
        refuel.main(["--help"])
    text = capsys.readouterr().out
    for group in ("plan:", "the run:", *(f"{name}:" for name in settings.GROUPS)):
        assert f"\n{group}\n" in text
    assert re.search(r"--eta float +Eq. 1 \[toy: [\d.]+; one: 1000.0; two: 1.0; world: 10.0\]", text) and stop.value.code == 0
    fields = refuel.Config.__dataclass_fields__
    named = " ".join(settings.GROUPS.values()).split()
    assert len(named) == len(set(named)) and set(named) <= set(fields)
    for name in fields:
        assert re.search(rf"--{name.replace('_', '-')} \w+\s+[^\s-]", text), name


SCRIPTS = sorted(path for folder in ("", "tests", "theory") for path in os.listdir(os.path.join(ROOT, folder) or ROOT)
                 if path.endswith(".py") and not path.startswith("test_") and "__main__" in open(os.path.join(ROOT, folder, path), encoding="utf-8").read())  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_answers_help_and_does_nothing_else(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (path,) = [p for p in (os.path.join(ROOT, folder, script) for folder in ("", "tests", "theory")) if os.path.exists(p)]
    monkeypatch.setattr(sys, "path", [os.path.dirname(path), *sys.path])
    monkeypatch.setattr(os, "environ", dict(os.environ))  # rehearse.py says that it is one of eight ranks
    for flag, code in (("--help", 0), ("--no-such-flag", 2)):
        monkeypatch.setattr(sys, "argv", [path, flag])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(path, run_name="__main__")
        assert stop.value.code == code and os.listdir() == []
        told = capsys.readouterr()
        assert ("usage: " in told.out) == (code == 0) and "Traceback" not in told.err


# --- the shop in English -----------------------------------------------------------------------------------------


def test_the_english_shop_means_what_the_toy_says():
    questions = {"", *toy.WISHES}
    for row, prompt in enumerate(toy.load_prompts("base", 200)):
        rng = random.Random(row)
        words = toy.clerk_dialogue(prompt, toy.Customer(insists=row % 2 == 0), rng, 5, uses=0.8, remembers=0.6, asks=0.5)
        english = []
        for m in words:
            say = shop.clerk_says(m["content"]) if m["role"] == "assistant" else shop.customer_says(m["content"], rng)
            english.append({"role": m["role"], "content": say})
        back = shop.in_toy_words(english)
        assert toy.stated(back) == toy.stated(words) and toy.Reward().one_reward(back) == toy.Reward().one_reward(words)
        for a, b in zip(words[1::2], back[1::2], strict=True):
            asked = [(toy.QUESTION.search(m["content"]) or ["", ""])[1] for m in (a, b)]
            assert asked[0] == asked[1] in questions and toy.PROPOSAL.match(b["content"])


def test_an_english_answer_that_proposes_nothing_is_malformed_and_may_still_ask():
    messages = [{"role": "user", "content": "Hi! Do you have something that is a hat?"},
                {"role": "assistant", "content": "Sure. How about the small red silk hat? Which size would you like?"}]  # fmt: skip
    assert [m["content"] for m in shop.in_toy_words(messages)] == ["hat", "which size ?"]
    d = Dialogue(messages=messages, spans=[(0, 1)])
    assert shop.reward([d]) == [0.0] and shop.reward.malformed([d]) == [1]
    replies = [shop.User().reply([replace(d, secret={"size": "tiny"}, stream=(row,))])[0] for row in range(20)]
    assert all("tiny" in text or text in shop.UNSURE for text in replies) and any("tiny" in text for text in replies)
