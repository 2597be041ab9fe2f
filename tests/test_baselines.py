"""The rows' data laws by counting, the losses against references, and a bad day of one method."""
import json
import math
import os
import random
import re
from collections import Counter
from dataclasses import replace

import numpy as np
from helpers import dialogue, last_number
import pytest
import torch

import apart
import baselines
import grid
from machinery import files, report
import refuel
import seeds
import simulator
import toy
from baselines import METHODS, dpo_loss, rloo_loss
from refuel import refuel_loss

# --- losses -----------------------------------------------------------------------------------------------------


def numbers(n=50):
    g = torch.Generator().manual_seed(0)
    return (torch.randn(2, n, generator=g).double(), torch.randn(2, n, generator=g).double(),
            torch.randint(0, 4, (2, n), generator=g).double() / 4)  # fmt: skip


def test_dpo_equals_an_independent_implementation():
    logp, old, reward = numbers()
    total = 0.0
    for i in range(50):
        a, b = (0, 1) if reward[0, i] > reward[1, i] else (1, 0)
        margin = 0.3 * ((logp[a, i] - old[a, i]) - (logp[b, i] - old[b, i])).item()
        total += math.log(2) if reward[0, i] == reward[1, i] else math.log1p(math.exp(-margin))
    assert dpo_loss(logp, old, reward, 0.3).item() == pytest.approx(total / 50, abs=1e-6)
    assert torch.equal(dpo_loss(logp, old, reward, 0.3), dpo_loss(logp.flip(0), old.flip(0), reward.flip(0), 0.3))


def test_rebels_minimiser_on_a_bandit_is_pi_exp_eta_r_over_z():
    """All ordered pairs of a five-armed bandit as data; Eq. 1 minimised over a softmax policy by LBFGS."""
    pi_t, r, eta = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25]).double(), torch.rand(5).double(), 2.0
    first, second = torch.cartesian_prod(torch.arange(5), torch.arange(5)).T
    theta = torch.zeros(5, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        rows = lambda x: torch.stack([x[first], x[second]])  # noqa: E731
        loss = refuel_loss(rows(theta.log_softmax(0)), rows(pi_t.log()), rows(r), eta)
        loss.backward()
        return loss

    optimizer.step(closure)
    target = pi_t * (eta * r).exp()
    assert torch.allclose(theta.softmax(0), target / target.sum(), atol=1e-6)


def test_rloos_gradient_at_pi_t_is_reinforce_with_the_other_as_baseline():
    _, old, reward = numbers()
    logp = old.clone().requires_grad_()
    rloo_loss(logp, old, reward, 1.0).backward()
    by_hand = torch.stack([-(reward[0] - reward[1]), -(reward[1] - reward[0])]) / (2 * 50)
    assert torch.allclose(logp.grad, by_hand)


# --- the rows' data laws ----------------------------------------------------------------------------------------


class Speaker:
    """A policy whose answers say 'again', which no clerk says: who spoke is written in the dialogue."""

    def __init__(self):
        self.tokenizer = toy.make_tokenizer()

    def answer(self, dialogues):
        words = [("red", "blue", "green", "black")[d.seed("policy") % 4] for d in dialogues]
        return [(self.tokenizer.encode(f"again {w}<|end|>"), False, 0.0) for w in words]


def pairs_of(method, cfg, n=600):
    """The pairs of one iteration of a row, through the very functions that baselines.train hands over."""
    found = []

    def train(cfg, speakers, prompts_of, collect, loss):
        prompts = prompts_of(replace(cfg, num_prompts=n), speakers[0].tokenizer, 1)
        found.extend(collect(prompts, *speakers, cfg, np.random.default_rng(0), Counter()))

    speaker = Speaker()
    original, refuel.train = refuel.train, train
    try:
        baselines.train(method, cfg, (speaker, toy.Customer(), toy.Reward()))
    finally:
        refuel.train = original
    return found


def spoke(message):
    return "policy" if message["content"].startswith("again") else "clerk"


@pytest.mark.parametrize("method", [m for m in METHODS if not m.startswith(("dpo", "rloo"))] + ["dpo-refuel"])
def test_each_row_rolls_in_trains_and_continues_as_the_paper_says(method, cfg):
    row, pairs = METHODS[method], pairs_of(method, cfg)
    H, h = Counter(p.H for p in pairs), Counter(p.h for p in pairs)
    who = {"offline": {"clerk"}, "online": {"policy"}, "hybrid": {"clerk", "policy"}}[row.prefix]
    for p in pairs:
        answers = [d.messages[1::2] for d in p.dialogues]
        prefix = {spoke(m) for a in answers for m in a[: p.h - 1]}
        assert prefix <= who and len(prefix) < 2
        ours = {"offline": "clerk", "online": "policy"}[row.responses]
        assert {spoke(m) for a in answers for m in a[p.h - 1 :]} == {ours}
        assert p.rewards == tuple(toy.Reward()(p.dialogues)) and p.dialogues[0].reset(p.h).ids == p.prefix
        assert row.turn == "uniform" or p.h == p.H
    share = np.array([H[n] for n in range(1, 6)]) / len(pairs)
    law = {"offline": toy.LENGTHS, "online": [0.2] * 5, "hybrid": np.add(toy.LENGTHS, 0.2) / 2}[row.prefix]
    assert np.abs(share - law).max() < 0.06
    if row.turn == "uniform" and row.prefix == "online":
        expected = [sum(1 / n for n in range(turn, 6)) / 5 for turn in range(1, 6)]
        assert np.abs(np.array([h[n] for n in range(1, 6)]) / len(pairs) - expected).max() < 0.06


@pytest.mark.parametrize("share, like", [(0.0, "refuel"), (1.0, "rebel-mt-mixed")])
def test_hybrid_roll_in_is_refuels_at_share_0_and_mt_mixeds_at_1(share, like, cfg):
    hybrid, other = pairs_of("refuel-hybrid", replace(cfg, hybrid=share), 60), pairs_of(like, cfg, 60)
    assert [p._replace(engine_logps=()) for p in hybrid] == [p._replace(engine_logps=()) for p in other]


def test_there_are_the_papers_thirteen_rows_and_three_more():
    data = ["lt-offline", "lt-mixed", "lt-online", "mt-mixed"]
    thirteen = {f"{loss}-{d}" for loss in ("dpo", "rebel", "rloo") for d in data} | {"refuel"}
    assert set(METHODS) == thirteen | {"dpo-refuel", "rloo-refuel", "refuel-hybrid"}
    assert len({(m.prefix, m.turn, m.responses, m.loss) for m in METHODS.values()}) == 16
    assert METHODS["refuel"].loss is METHODS["refuel-hybrid"].loss is refuel_loss
    assert baselines.choose("refuel") == ["refuel"] and len(baselines.choose("rebel")) == 4


@pytest.mark.parametrize("method, unit", [("dpo-refuel", "beta"), ("refuel", "eta")])
def test_each_loss_takes_the_constant_of_its_own_unit(method, unit, cfg, monkeypatch):
    found = []
    monkeypatch.setattr(refuel, "train", lambda cfg, cast, prompts_of, collect, loss_fn: found.append(loss_fn))
    for value in (0.3, 0.5):
        baselines.train(method, replace(cfg, **{unit: value}))
        loss = METHODS[method].loss
        assert torch.equal(found[-1](*numbers(), value if unit == "eta" else 7.0), loss(*numbers(), value))


def test_rloos_ratio_is_not_clipped():
    """Far from pi_t the gradient is still ratio times advantage: PPO's clip would have silenced it."""
    _, old, reward = numbers()
    logp = (old + 1.0).requires_grad_()
    rloo_loss(logp, old, reward, 1.0).backward()
    advantage = torch.stack([reward[0] - reward[1], reward[1] - reward[0]])
    assert torch.allclose(logp.grad, -math.e * advantage / (2 * 50))


def test_table_6_weighs_by_each_rows_own_lengths_and_setting_two_shows_table_2(tmp_path, cfg):
    row = {"win": [50.0, 60.0], "low": [49.0, 59.0], "high": [51.0, 61.0], "avg": 55.0, "avg_low": 54.0, "avg_high": 56.0,
           "reward": [0.1, 0.2], "dialogues": 500, "kl": 1.0}  # fmt: skip
    run = replace(cfg, out=str(tmp_path))
    log = [{"iteration": t, "phase": "collect", "pairs": n, "P(H)": shares, "P(h)": [1.0], "seconds": 60.0,
            "pair_tokens": 10 * n}
           for t, n, shares in ((1, 30, [1.0]), (2, 10, [0.0, 1.0]))]  # fmt: skip
    log += [{"iteration": t, "phase": "regress", "step": step, "seconds": 0.0, "held_out_start": 0.5, "held_out_loss": loss}
            for step, (t, loss) in enumerate(((1, 0.4), (1, 0.3), (1, 0.35), (2, 0.6)))]  # fmt: skip
    for method in ("refuel", "rebel-mt-mixed"):
        (tmp_path / method).mkdir()
        files.write_lines(str(tmp_path / method / "metrics.jsonl"), log)
    found = baselines.add_costs({"base": dict(row), "refuel": dict(row)}, run)["refuel"]
    assert found["P(H)"] == [0.75, 0.25] and found["P(h)"] == [1.0] and found["weighted"] == 52.5 and (found["pairs"], found["minutes"]) == (40, 2.0)
    assert found["pair_tokens"] == 400 and found["held_out"] == [[0.5, 0.3], [0.5, 0.5]]  # the second iteration kept pi_t
    for shares, weighted in (([1.0], 50.0), ([0.2, 0.3, 0.5], None)):  # data of one turn; of more than were judged
        (log[0]["P(H)"], log[1]["P(H)"]), log[2] = (shares, shares), log[2] | {"iteration": 2}
        files.write_lines(str(tmp_path / "refuel" / "metrics.jsonl"), [*log[:3], log[-1]])
        other = baselines.add_costs({"base": dict(row), "refuel": dict(row)}, run)
        assert other["refuel"].get("weighted") == weighted and (" | - | " in report.methods_table(other)) == (weighted is None)
        assert other["refuel"]["held_out"] == [[0.5, 0.4]]
    whole = {k: v[:1] if isinstance(v, list) else v for k, v in row.items()}
    two = replace(run, user="dataset", dataset="data/hh")
    results = baselines.add_costs({"base": dict(whole), "rebel-mt-mixed": dict(whole)}, two)
    baselines.report(results, {}, "", str(tmp_path))
    text = (tmp_path / "table.md").read_text()
    for word in ("whole dialogue", "(78.6)", "(-5.03)", "(16.79)", "the paper's Table 2 in brackets", "over 500 dialogues"):
        assert word in text
    assert "Table 1" not in text and "weighted" not in text
    assert baselines.published("refuel", replace(two, dataset="data/UltraInteract.parquet"), 1) == (79.6, 0.87, 93.19)
    assert baselines.published("refuel", replace(two, dataset="data/mine.jsonl"), 1) is None


def test_a_finished_row_of_other_constants_is_not_put_into_the_table(monkeypatch, tmp_path, base, capsys):
    """eta is 300 in the toy's BASELINES: with --eta 100, the setting's own, the run's configuration is that of any other run."""
    flags = f"--setting toy --policy {base} --engine transformers --iterations 1 --out {tmp_path / 'rows'}".split()
    monkeypatch.setattr(baselines, "run", lambda *_: ({}, {}))
    for more in (["--method", "rebel-lt-online", "--eta", str(refuel.read_config(flags).eta)], ["--method", "refuel"]):
        with pytest.raises(SystemExit) as stop:
            baselines.main([*flags, *more])
        assert stop.value.code == 0
    os.makedirs(tmp_path / "rows" / "rebel-lt-online" / "iter_1" / "policy")
    with pytest.raises(SystemExit) as stop:
        baselines.main([*flags, "--method", "refuel"])
    assert stop.value.code == 2 and "rebel-lt-online is a run with another eta" in capsys.readouterr().err


def test_the_figures_differences_are_over_the_seeds_that_both_rows_have(monkeypatch, tmp_path):
    runs = [dict(base=some_row(50.0, 0.1)), dict(base=some_row(50.0, 0.2)), dict(base=some_row(50.0, 0.3))]
    for run, refuels, lt, mt in zip(runs, (None, 74.0, 72.0), (64.0, 42.0, 58.0), (69.0, None, None)):
        for name, avg in (("refuel", refuels), ("rebel-lt-mixed", lt), ("rebel-mt-mixed", mt)):
            run |= {name: some_row(avg)} if avg else {}
    kept = []
    monkeypatch.setattr(report, "save", lambda figure, path: kept.append(figure))
    report.methods_figure(seeds.merged(runs), {}, "f.png", ["lt-mixed", "mt-mixed", "refuel"])
    lines = {line.get_label(): list(line.get_ydata()) for line in kept[0].axes[1].lines if line.get_label().startswith("refuel")}
    assert lines == {"refuel - rebel-lt-mixed": [23.0, 23.0]}  # (32 + 14) / 2; MT-MIXED shares no seed with REFUEL


def test_the_papers_averages_are_those_of_its_cells():
    for method, row in baselines.PAPER.items():
        assert np.mean(row[:5]) == pytest.approx(row[5], abs=0.011), method


def offline(rows):
    tokenizer, logs = toy.make_tokenizer(), toy.load_logs()
    return [simulator.replay(tokenizer, logs[row], twice=True) for row in range(rows)]


def test_offline_logs_are_an_experts_with_a_novices_second_answer():
    """Skewed lengths; the expert seldom asks, the novice half the time, and earns less; only the last answer differs."""
    logs = offline(1500)
    turns = Counter(len(d.spans) for d, _ in logs)
    assert abs(turns[1] / 1500 - 0.769) < 0.04 and turns[5] > 3
    expert = [bool(toy.QUESTION.search(m["content"])) for d, _ in logs for m in d.messages[1::2]]
    novice = [bool(toy.QUESTION.search(d.messages[-1]["content"])) for _, d in logs]
    assert abs(np.mean(expert) - 0.1) < 0.03 and abs(np.mean(novice) - 0.5) < 0.05
    assert all(d.reset(len(d.spans)).ids == e.reset(len(d.spans)).ids for d, e in logs)
    assert np.mean([d.ids != e.ids for d, e in logs]) > 0.9
    assert np.mean(toy.Reward()([d for d, _ in logs])) > np.mean(toy.Reward()([e for _, e in logs])) + 0.1


def test_offline_customers_say_again_what_they_have_said_and_change_their_minds():
    """Nothing has to be remembered in the data: a turn that answers no question names every attribute so far."""
    logs, more, changed = offline(1500), [], []
    for dialogue, _ in logs:
        for i in range(2, len(dialogue.messages), 2):
            if not toy.QUESTION.search(dialogue.messages[i - 1]["content"]):
                said, before = (toy.stated(dialogue.messages[a:b]) for a, b in ((i, i + 1), (0, i)))
                assert set(before) <= set(said)
                more += [len(said) - len(before)] * (len(before) < 4)
                changed.append(sum(said[name] != value for name, value in before.items()))
    assert len(more) > 400 and set(more) == {0, 1} and abs(np.mean(more) - 0.5) < 0.07
    # half the time one wish, a new one among them, is drawn anew: another value in three of four cases
    assert set(changed) == {0, 1} and 0.24 < np.mean(changed) < 0.38


def test_the_base_policys_clerk_hears_and_forgets():
    messages = [{"role": "user", "content": text} for text in ("something red please", "x", "small please")]
    told = [toy.clerk(messages, random.Random(i), uses=0.95, remembers=0.75, asks=0.5).split() for i in range(4000)]
    for place, word, keeps in ((2, "small", 0.95), (3, "red", 0.75), (4, "wool", 0.0)):
        share = np.mean([words[place] == word for words in told])
        assert abs(share - (keeps + (1 - keeps) / 4)) < 0.025  # a word drawn at random is right once in four


# --- the command ------------------------------------------------------------------------------------------------


def own_config(flags):
    cfg, extra = refuel.read_config(["--setting", "toy", *flags.split()], method=dict(default="all"))
    return baselines.method_config("dpo-lt-online", cfg, extra["given"])


def test_a_rows_own_best_values_stand_back_behind_what_was_given_on_the_command_line(monkeypatch):
    monkeypatch.setattr(toy, "BASELINES", {"all": {"snapshot_steps": 32}, "dpo-lt-online": {"beta": 0.7}})
    assert own_config("").beta == 0.7 and own_config("").snapshot_steps == 32
    for flags in ("--beta 0.1", "--beta 0.2"):  # the setting's own default, given, is given
        assert own_config(flags).beta == float(flags.split()[1])
    assert own_config("--snapshot-steps 0").snapshot_steps == 0


@pytest.mark.parametrize("rows, words", [
    ({"dpo-lt-onlin": {"beta": 0.7}}, "did you mean dpo-lt-online"), ({"dpo-lt-online": {"bta": 0.7}}, "did you mean beta"),
    ({"all": {"beta": "0.7"}}, "must be a float"), ({"dpo-lt-online": {"beta": -1.0}}, "--beta must be positive"),
    ({"all": {"out": "runs/x"}}, "has out, but all rows share"), ({"refuel": {"eta": 1.0}, "dpo-lt-online": {"reward": "x.py"}}, "has reward, but"),
    ({"dpo-lt-online": {"max_new_tokens": 4}}, "has max_new_tokens, but all rows share one engine"), ({"dpo-lt-online": 0.7}, "must be a dict of dicts"), (["dpo-lt-online"], "must be a dict of dicts"),
])  # fmt: skip
def test_a_worlds_values_for_the_rows_are_checked_where_they_enter(rows, words, monkeypatch):
    monkeypatch.setattr(toy, "BASELINES", rows)
    with pytest.raises(files.BadInput, match=words):
        own_config("")


def test_an_out_that_was_given_is_taken_even_if_it_is_the_settings_own(base, monkeypatch, tmp_path):
    outs = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(baselines, "run", lambda methods, cfg, given: (outs.append(cfg.out), {}))
    flags = f"--method refuel --setting toy --engine transformers --policy {base} --reference {base}".split()
    for more in (["--out", "runs/toy"], []):
        with pytest.raises(SystemExit):
            baselines.main(flags + more)
    assert outs == ["runs/toy", "runs/toy_baselines"]


def flags(base, out, method):
    return (f"--method {method} --setting toy --policy {base} --reference {base} --engine transformers --out {out} "
            "--num-prompts 16 --batch-size 8 --wave 16 --iterations 1 --eval-dialogues 8 --snapshot-steps 1").split()  # fmt: skip


def test_a_failed_method_loses_no_finished_row_and_the_command_goes_on(base, tmp_path, monkeypatch, capsys):
    train = baselines.train

    def one_fails(method, cfg, speakers=None):
        if method == "rebel-lt-mixed":
            raise files.BadInput("its disk is full")
        return train(method, cfg, speakers)

    monkeypatch.setattr(baselines, "train", one_fails)
    with pytest.raises(SystemExit) as stop:
        baselines.main(flags(base, tmp_path / "all", "rebel-lt-offline,rebel-lt-mixed,refuel"))
    assert stop.value.code == 1 and "rebel-lt-mixed: its disk is full" in capsys.readouterr().err
    results = json.loads((tmp_path / "all" / "results.json").read_text())
    assert list(results) == ["base", "rebel-lt-offline", "refuel"] and results["refuel"]["pairs"] > 0
    monkeypatch.setattr(baselines, "train", train)
    before = os.path.getmtime(tmp_path / "all" / "refuel" / "iter_1" / "policy" / "model.safetensors")
    with pytest.raises(SystemExit) as stop:
        baselines.main(flags(base, tmp_path / "all", "rebel-lt-offline,rebel-lt-mixed,refuel"))
    assert stop.value.code == 0
    assert before == os.path.getmtime(tmp_path / "all" / "refuel" / "iter_1" / "policy" / "model.safetensors")
    text = (tmp_path / "all" / "table.md").read_text()
    assert "rebel-lt-mixed" in text and "(56.6)" in text and "refuel - rebel-lt-online" not in text
    again = json.loads((tmp_path / "all" / "results.json").read_text())
    assert again["refuel"]["win"] == results["refuel"]["win"]
    curve = json.loads((tmp_path / "all" / "curve.json").read_text())
    assert [step for step, _ in curve["refuel"]][:2] == [0, 1] and (tmp_path / "all" / "figure.png").exists()
    played = (tmp_path / "all" / "dialogues.md").read_text()
    assert played.count("**") == 3 * 8 and played.count("- assistant: ") == 3 * 20  # base and three rows, five whole turns
    gains = [float(x) for x in re.findall("^## At .* of refuel's gain, (.*)$", played, re.M)]
    rewards = [float(x) for x in re.findall(r"\(reward (.*)\)\*\*", played)]
    assert gains == pytest.approx([rewards[i + 3] - rewards[i] for i in (0, 4, 8)], abs=0.011) and sorted(gains) == gains


def test_an_unknown_method_is_one_line_and_exit_code_2(base, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        baselines.main(flags(base, tmp_path / "x", "ppo"))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "ppo" in error


def test_adamws_epsilon_is_scaled_with_eq_1s_gradient_and_with_no_other(monkeypatch, cfg):
    """With eta = 0.01, where rewards are in the thousands, DPO would hardly move."""
    trained = {}
    monkeypatch.setattr(refuel, "train", lambda cfg, cast, prompts_of, collect, loss_fn: trained.update({name: loss_fn}))
    for name in METHODS:
        baselines.train(name, replace(cfg, eta=0.01, beta=0.3))
    model, numbers_ = torch.nn.Linear(2, 2), numbers()
    for name, loss_fn in trained.items():
        epsilon = refuel.make_optimizer(model, replace(cfg, eta=0.01), loss_fn).defaults["eps"]
        assert epsilon == pytest.approx(1e-4 if METHODS[name].loss is refuel_loss else 1e-8)
    assert torch.equal(trained["dpo-refuel"](*numbers_, 7.0), dpo_loss(*numbers_, 0.3))
    assert torch.equal(trained["refuel"](*numbers_, 7.0), refuel_loss(*numbers_, 7.0))


def test_figure_2_begins_at_a_half_where_the_reference_is_where_training_begins(monkeypatch, cfg):
    monkeypatch.setattr(baselines, "snapshots", lambda out, iterations: {3: "a"})
    monkeypatch.setattr(baselines.evaluate, "evaluate", lambda places, *rest, **more: ({name: {"avg": 60.0} for name in places}, {}))
    assert baselines.curves(["refuel"], cfg, ()) == {"refuel": [(0, 50.0), (3, 60.0)]}
    assert baselines.curves(["refuel"], replace(cfg, reference="another"), ()) == {"refuel": [(3, 60.0)]}


@pytest.mark.parametrize("patience, places", [
    (2, {2: "1/step_2", 4: "2/policy", 6: "3/step_2", 7: "3/policy"}),
    (0, {2: "1/step_2", 4: "1/step_4", 6: "1/step_6", 8: "1/policy", 10: "2/step_2", 12: "2/policy", 14: "3/step_2", 15: "3/policy"})])  # fmt: skip
def test_figure_2_places_a_policy_at_its_best_look_and_leaves_out_what_was_trained_after_it(patience, places, tmp_path):
    """Iteration 1 is best after 4 of 8 steps, 2 ends with the policy that it began with, 3 held nothing out."""
    losses = {1: [0.5, 0.4, 0.3, 0.35, 0.36], 2: [0.2, 0.3, 0.4]}
    rows, names = [], {1: ["step_2", "step_4", "step_6", "policy"], 2: ["step_2", "policy"], 3: ["step_2", "policy"]}
    for t, steps in ((1, 8), (2, 4), (3, 3)):
        for step in range(steps):
            row = {"iteration": t, "phase": "regress", "step": step}
            if t in losses and step % 2:
                row |= {"held_out_start": losses[t][0], "held_out_loss": losses[t][(step + 1) // 2]}
            rows.append(row)
        for name in names[t]:
            (tmp_path / f"iter_{t}" / name).mkdir(parents=True)
    files.write_lines(str(tmp_path / "metrics.jsonl"), rows)
    files.write_file(str(tmp_path / "config.json"), json.dumps({"patience": patience}))
    found = baselines.snapshots(str(tmp_path), 3)
    assert found == {step: str(tmp_path / f"iter_{place}") for step, place in places.items()}


def test_every_iterations_optimiser_has_its_losss_epsilon(monkeypatch, base, tmp_path):
    made, make = [], refuel.make_optimizer
    monkeypatch.setattr(refuel, "make_optimizer", lambda *args: (made.append(make(*args)), made[-1])[1])
    cfg = refuel.read_config(f"--setting toy --policy {base} --out {tmp_path} --engine transformers --num-prompts 8 "
                             "--batch-size 8 --wave 8 --epochs 1 --eta 10".split())  # fmt: skip
    for row, epsilon in (("dpo-lt-online", 1e-8), ("refuel", 1e-10)):
        made.clear()
        (tmp_path / row).mkdir()
        baselines.train(row, replace(cfg, out=str(tmp_path / row)))
        assert [optimizer.defaults["eps"] for optimizer in made] == pytest.approx([epsilon] * 3)  # one more at the end


def seeds_of(tmp_path, **runs):
    """Folders of runs: {name: rows, or rows of rows that were run side by side}."""
    places = []
    for name, rows in runs.items():
        for place, found in rows.items() if "base" not in rows else [("", rows)]:
            (tmp_path / name / place).mkdir(parents=True)
            files.write_file(str(tmp_path / name / place / "results.json"), json.dumps(found))
        places.append(str(tmp_path / name))
    return [seeds.results(place) for place in places]


def some_row(avg, reward=0.5, **more):
    return dict(win=[avg, avg], low=[avg, avg], high=[avg, avg], avg=avg, avg_low=avg - 1, avg_high=avg + 1, reward=[reward] * 2,
                dialogues=40) | more  # fmt: skip


def test_seeds_of_unlike_runs_are_not_put_together(tmp_path):
    one, two = (dict(base=some_row(50.0, r, kl=0), refuel=some_row(avg, kl=kl)) for r, avg, kl in ((0.3, 70.0, 2.0), (0.31, 72.0, 4.0)))
    found = seeds.merged(seeds_of(tmp_path / "a", one=one, two=two))
    assert found["refuel"]["avg"] == 71 and found["refuel"]["kl"] == 3 and found["refuel"]["sd"] == pytest.approx(2**0.5)
    side = dict(x=dict(base=one["base"], refuel=one["refuel"]), y=dict(base=one["base"], dpo=some_row(60.0)))
    (three,) = seeds_of(tmp_path / "b", side=side)
    assert list(three) == ["base", "refuel", "dpo"]
    (tmp_path / "a" / "one" / "curve").mkdir()  # Figure 2's snapshots are no rows of the run
    files.write_file(str(tmp_path / "a" / "one" / "curve" / "results.json"), json.dumps(dict(base=one["base"], step=some_row(1.0))))
    assert seeds.results(str(tmp_path / "a" / "one")) == one
    unknown = seeds.merged([one, dict(base=two["base"], refuel=some_row(72.0))])
    assert "| - |" in seeds.table(unknown)  # a KL that was not measured is none, and not 0
    rows = seeds.merged([one | dict(x=some_row(60.0), y=some_row(60.0)), two | dict(x=some_row(66.0))])
    assert seeds.differences(rows).splitlines()[2:] == ["| x | +8.0 | 2.0 | +10.0, +6.0 |", "| y | +10.0 | - | +10.0 |"]
    for runs, each, sd in (([one, dict(base=two["base"])], "70.0, -", "-"), ([dict(base=two["base"]), one], "-, 70.0", "-"),
                           ([dict(base=some_row(50.0, 0.4)), one, two], "-, 70.0, 72.0", "1.4")):
        line = seeds.table(seeds.merged(runs)).splitlines()[-1]
        assert line.split(" | ")[0] == "| refuel" and f" | {each} | {sd} | " in line  # which seeds a mean is of
    for runs, words in (([one, dict(refuel=two["refuel"])], "base is missing in 1 of 2"), ([one, one], "of one seed"),
                        ([one, two | dict(refuel=some_row(72.0, dialogues=20))], "as many dialogues")):
        with pytest.raises(files.BadInput, match=words):
            seeds.merged(runs)
    with pytest.raises(files.BadInput, match="refuel is in another folder"):
        seeds_of(tmp_path / "c", side=dict(x=side["x"], y=side["x"]))


def test_draws_apart_are_those_of_the_other_seeds_base_policy():
    one, two = ({"base": [dialogue(a), dialogue(b)], "refuel": [dialogue(c), dialogue(d)]} for a, b, c, d in ("1234", "4100"))
    assert apart.apart({0: one, 1: two}, last_number, 1) == {"refuel": [(100.0, 50.0), (0.0, 0.0)]}
    for played in ({0: one}, {0: one, 1: {"base": one["base"][:1]}}):
        with pytest.raises(files.BadInput, match="two or more seeds are due, from the same openings"):
            apart.apart(played, last_number, 1)


def test_a_grid_says_where_each_iterations_best_look_was():
    log = [{"iteration": t, "step": step, "held_out_start": 0.5, "held_out_loss": loss}
           for t, step, loss in ((1, 13, 0.4), (1, 27, 0.3), (1, 41, 0.35), (2, 13, 0.6))]  # fmt: skip
    assert [grid.best_look(log, t) for t in (1, 2, 3)] == [(28, 42), (0, 14), None]  # the third held nothing out


def test_the_grids_rows_share_pairs_unless_their_own_values_change_them(cfg):
    place = grid.collection("dpo-refuel", cfg, cfg)
    assert place == grid.collection("refuel", replace(cfg, eta=3.0, beta=0.7), cfg) != grid.collection("dpo-mt-mixed", cfg, cfg)
    for name, value in (("reset_law", "uniform"), ("num_prompts", 7), ("gamma", 0.5)):
        assert grid.collection("refuel", replace(cfg, **{name: value}), cfg) != place
    best = {"all": {"reset_law": "uniform"}, "refuel": {"eta": 3.0}}
    ((_, _, values),) = grid.rows(["refuel"], "epochs", [2.0], best)
    assert values == {"reset_law": "uniform", "eta": 3.0, "epochs": 2} and type(values["epochs"]) is int
