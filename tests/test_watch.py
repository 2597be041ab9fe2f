"""A run can be watched: the time left, the waves' lines, --track, metrics.png, stored dialogues, report.html."""
import json
import os
import re
import sys
import types

import numpy as np
import pytest

import evaluate
import refuel
import simulator
from helpers import dialogue
from machinery import files, page, plan, ranks, report, run, watch
from machinery.files import BadInput

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028<!--"


@pytest.fixture
def folder(tmp_path):
    """A run's folder with one iteration of 300 pairs and an evaluation of 30 openings; what is said is hostile."""
    rows = [{"dropped": {}, "malformed": [0, 0]}]
    for i in range(300):
        first, second = (vars(dialogue(f"{side} {i}", EVIL)) for side in "ab")
        ids = first["ids"]
        rows.append({"prefix": ids[:1], "y": [0], "y2": [0, 0], "rewards": [i / 10, 1.0], "h": 1, "H": 2, "dialogues": [first, second]})
    os.makedirs(tmp_path / "iter_1")
    files.write_sealed(str(tmp_path / "iter_1" / "pairs.jsonl"), rows)
    os.makedirs(tmp_path / "eval")
    for name in ("base", "iter_1"):
        files.write_sealed(str(tmp_path / "eval" / f"{name}.jsonl"), [vars(dialogue(f"{name} {i}", EVIL)) for i in range(30)])
    log = [{"iteration": 1, "phase": "collect", "wave": n, "reward": 0.1 * n} for n in range(3)]
    log += [{"iteration": 1, "phase": "collect", "reward": 0.1, "truncated": 0.0}]
    log += [{"iteration": 1, "phase": "regress", "step": n, "loss": 1 / (n + 1), "kl": float("nan")} for n in range(4)]
    files.write_lines(str(tmp_path / "metrics.jsonl"), log)
    files.write_file(str(tmp_path / "rewards.json"), json.dumps({"base": [0.0] * 30, "iter_1": [*range(29), None]}))
    return str(tmp_path)


def shown(path):
    """(the page, its data)"""
    text = open(path, encoding="utf-8").read()
    return text, json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_nothing_that_a_dialogue_says_is_html_of_the_page(folder):
    text, data = shown(page.write(folder))
    assert "alert(1)" in text and data["pairs"][0]["pairs"][0]["prefix"] == [{"role": "user", "content": "go on"}]
    assert EVIL in [m["content"] for m in data["pairs"][0]["pairs"][0]["sides"][0]["said"]]
    assert text.count("<script") == 2 and text.count("</script>") == 2 and "<img" not in text
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", text)
    assert not re.search(r"(src|href)=\"?http", text)  # nothing is fetched


def test_openings_are_ordered_by_the_last_evaluations_policy_and_an_earlier_ones_is_left_out(folder):
    files.write_sealed(os.path.join(folder, "eval", "older.jsonl"), [vars(dialogue(f"older {i}", EVIL)) for i in range(30)])
    files.write_file(os.path.join(folder, "results.json"), json.dumps({"base": {}, "iter_1": {}}))
    found = page.openings(folder)
    assert found["names"] == ["base", "iter_1"] and [side["reward"] for side in found["rows"][3]["sides"]] == [0.0, 3]


def test_the_page_shows_pairs_at_equal_steps_of_the_difference_and_says_how_many(folder):
    _, data = shown(page.write(folder))
    found, of = data["pairs"][0]["pairs"], data["pairs"][0]["of"]
    assert of == 300 and len(found) == page.PAIRS
    difference = np.array([p["sides"][0]["reward"] - p["sides"][1]["reward"] for p in found])
    assert difference.min() == -1.0 and difference.max() == pytest.approx(28.9)  # both ends
    assert max(abs(np.quantile(difference, q) - (29.9 * q - 1)) for q in (0.25, 0.5, 0.75)) < 0.2
    assert [p["sides"][1]["tokens"] for p in found] == [2] * page.PAIRS and found[0]["n"] == 1
    sides = data["openings"]["rows"][3]["sides"]
    assert [side["reward"] for side in sides] == [0.0, 3] and sides[1]["said"][1]["content"] == "iter_1 3"
    assert data["runs"][""]["reward"]["reward"] == [[0.3333, 0.0], [0.6667, 0.1], [1.0, 0.2]]  # waves, not their sum again
    assert "KL to pi_t, nats a response" not in data["runs"][""]  # not finite


def test_long_dialogues_make_no_page_of_a_hundred_megabytes():
    assert page.room(100_000, 200, page.BUDGET) == 60 and page.room(10, 200, page.BUDGET) == 200
    assert page.at_quantiles([3, 1, 2], 5) == [1, 2, 0] and page.at_quantiles(range(100), 3) in ([0, 49, 99], [0, 50, 99])


def test_a_folder_without_anything_is_refused(tmp_path, capsys):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SystemExit):
            evaluate.main(["--page", str(path)])
        assert "is not a run's folder" in capsys.readouterr().err
    with pytest.raises(BadInput, match="stands alone"):
        evaluate.command(["--page", "x", "--setting", "toy"])


def test_stored_dialogues_are_shown_without_a_model(folder, capsys, monkeypatch):
    monkeypatch.setattr(simulator, "load_cast", None)
    simulator.main(["--show", "2", f"{folder}/iter_1/pairs.jsonl"])
    text = capsys.readouterr().out
    assert "line 3" in text and "line 4" not in text and "reward 0.100" in text and "b 1" in text
    simulator.main(["--show", "1", f"{folder}/eval/iter_1.jsonl"])
    assert "iter_1 0" in capsys.readouterr().out
    for words, why in ((["--show", "0", "x"], "positive"), (["--show", "1", f"{folder}/metrics.jsonl"], "no pairs"),
                       (["--show", "1", "nowhere"], "no file"), (["--show", "1", "x", "--setting", "toy"], "alone")):
        with pytest.raises(SystemExit):
            simulator.main(words)
        assert why in capsys.readouterr().err


def test_the_two_columns_show_whole_turns():
    before, after = dialogue("word " * 60, "short"), dialogue("a", "x" * 200 + " \x1b[31m end")
    text = report.side_by_side(before, after, width=80)
    assert text.count("word") == 60 and text.count("x") == 200 and "\x1b" not in text and "end" in text
    assert max(map(len, text.splitlines())) <= 80
    assert all(line[44:47] == "   " for line in text.splitlines() if len(line) > 47)  # the gap


def test_the_time_that_is_left_is_what_the_phases_have_taken():
    clock = watch.Clock(3)
    assert clock.left(1, "collect", 1, 3, 100.0) == "more than 18 min left"  # 300 s, and 400 s in each of two more
    clock.finished("collect", 400.0)
    clock.finished("logps", 100.0)
    assert clock.left(1, "regress", 5, 5, 50.0) == "21 min left"  # 50 s, and 600 s twice
    assert clock.left(3, "regress", 5, 5, 50.0) == "50 s left"
    rows = [{"phase": "regress", "seconds": 1.0}, {"phase": "regress", "seconds": 80.0}]
    assert watch.Clock(1, rows).left(1, "collect", 1, 1, 10.0) == "more than 2 min left"


def test_a_wave_is_a_line_and_a_resumed_one_is_no_second(cfg, base):
    import dataclasses

    cfg = dataclasses.replace(cfg, iterations=1)
    out = refuel.main([f"--{k.replace('_', '-')}={v}" for k, v in dataclasses.asdict(cfg).items()])
    assert out is None
    rows = files.read_lines(os.path.join(cfg.out, "metrics.jsonl"))
    waves = [row for row in rows if "wave" in row]
    (whole,) = [row for row in rows if row["phase"] == "collect" and "wave" not in row]
    assert [row["wave"] for row in waves] == [0, 1, 2] and sum(row["pairs"] for row in waves) == whole["pairs"]
    assert np.average([r["reward"] for r in waves], weights=[r["pairs"] for r in waves]) == pytest.approx(whole["reward"])
    assert all(row["tokens_per_second"] > 0 and row["truncated"] <= 1 for row in waves)
    run.log(cfg, waves[1])  # a run that was stopped there plays it again
    again = files.read_lines(os.path.join(cfg.out, "metrics.jsonl"))
    assert again == rows[: rows.index(waves[1]) + 1]
    files.write_lines(os.path.join(cfg.out, "metrics.jsonl"), rows)
    for name in ("metrics.png", "report.html", "rewards.json"):
        assert os.path.getsize(os.path.join(cfg.out, name)) > 100
    earned, results = (files.read_json(os.path.join(cfg.out, name)) for name in ("rewards.json", "results.json"))
    assert np.mean(earned["iter_1"]) == pytest.approx(results["iter_1"]["reward"][-1], abs=1e-3)


def test_every_logged_number_reaches_the_tracker(tmp_path, monkeypatch):
    told = []
    fake = types.SimpleNamespace(init=lambda **options: types.SimpleNamespace(log=lambda v, step: told.append((step, v))))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setitem(watch.TRACK, "with", "wandb")
    cfg = types.SimpleNamespace(out=str(tmp_path))
    files.write_file(str(tmp_path / "config.json"), "{}")
    run.log(cfg, {"iteration": 1, "phase": "collect", "wave": 0, "reward": 0.5, "dropped": {}})
    run.log(cfg, {"iteration": 1, "phase": "regress", "step": 0, "loss": 0.25})
    assert told == [(1, {"collect/wave reward": 0.5}), (2, {"regress/loss": 0.25})]


def test_a_tracker_that_is_not_installed_is_a_line_at_the_start(monkeypatch):
    monkeypatch.setattr(watch.importlib.util, "find_spec", lambda name: None)
    for name, why in (("wandb", "pip install wandb"), ("mlflow", "tensorboard or wandb")):
        with pytest.raises(BadInput, match=why):
            refuel.read_config(["--setting", "toy", "--track", name], **watch.FLAGS)


def test_metrics_are_drawn_only_when_drawing_costs_a_hundredth(monkeypatch):
    drawn = []
    now = [1000.0]
    monkeypatch.setattr(watch, "draw", lambda out: (drawn.append(now[0]), now.__setitem__(0, now[0] + 0.5)))
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(watch, "DRAWN", {"at": 1000.0, "seconds": 0.5})
    for seconds, ends in ((49, True), (2, False), (0, True), (49, True), (12, False), (1, True)):
        now[0] += seconds
        watch.redraw("", ends)
    assert drawn == [1051.0, 1112.5]  # 51 s later at a phase's end; 61 s after that within one
    watch.redraw("", last=True)
    assert len(drawn) == 3


def test_short_work_shows_no_bar_and_words_stand_beside_the_outer_one(capsys):
    for _ in ranks.bar(range(2), "outer"):
        for _ in ranks.bar(range(2), "inner", delay=3):
            ranks.beside_bar("loss 0.5")
    error = capsys.readouterr().err
    assert "outer" in error and "loss 0.5" in error and "inner" not in error and not ranks.SHOWN


def test_the_plan_names_hours_where_there_are_gpus(monkeypatch):
    cfg = refuel.read_config(["--setting", "one"])
    assert plan.estimate(cfg) == ""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(plan, "machine", lambda: plan_machine)
    plan_machine = {name: options.get("default") for name, options in plan.FLAGS.items()} | {"ranks": 8, "gpu_memory": 79.0}
    x = dict(plan_machine, tflops=989, bandwidth=3350)
    hours = plan.hours(cfg, x, plan.memory(cfg, x)[1])
    assert plan.estimate(cfg) == plan.in_hours(cfg, x, hours) and "2 iterations: " in plan.estimate(cfg)
