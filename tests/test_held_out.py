"""Held-out pairs: what is measured of them, where a training ends by them, and that a stop changes nothing."""
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import random_pairs, with_logps

import refuel
from baselines import rloo_loss
from machinery import files, fsdp
from machinery.files import BadInput
from machinery.held_out import HeldOut
from machinery.run import Run, gone_bad, open_folder
from refuel import refuel_loss


def with_rewards(pairs, seed=0):
    rng = np.random.default_rng(seed)
    return [p._replace(rewards=tuple(rng.random(2)), logps=tuple(rng.normal(size=2) - 9)) for p in pairs]


def test_the_last_pairs_are_held_out_an_eighth_at_most_and_none_of_a_few(cfg, capsys):
    pairs, cfg = with_rewards(random_pairs(200)), replace(cfg, epochs=2)
    held = HeldOut(pairs, replace(cfg, validation=20), refuel_loss, 1)
    assert held.training == pairs[:180] and held.pairs == pairs[180:] and held.steps == 2 * 23
    assert len(HeldOut(pairs, replace(cfg, validation=100), refuel_loss, 1).pairs) == 25
    assert not capsys.readouterr().out
    few = HeldOut(pairs[:100], replace(cfg, validation=100), refuel_loss, 1)
    assert few.training == pairs[:100] and not few.pairs and "none of 100 pairs is held out" in capsys.readouterr().out
    assert not few.due(11) and not few.over() and HeldOut(pairs, replace(cfg, validation=0), refuel_loss, 1).pairs == []


def test_what_a_look_measures_by_hand(cfg):
    """ln pi that explains a share of the rewards' difference: the slope is that share; then against plain sums."""
    cfg = replace(cfg, validation=50, eta=4.0)
    held = HeldOut(with_rewards(random_pairs(400)), cfg, lambda a, b, r, eta: (a - b).sum() + eta, 1)
    old, r = (np.array([getattr(p, name) for p in held.pairs]) for name in ("logps", "rewards"))
    start = held.measure(old)
    assert start["held_out_share"] == 0 and start["held_out_loss"] == held.looks[0] == 4.0
    assert start["held_out_eq1"] == pytest.approx(((r[:, 0] - r[:, 1]) ** 2).mean(), rel=1e-5)
    share = held.measure(old + 0.3 * cfg.eta * r)
    assert share["held_out_share"] == pytest.approx(0.3, rel=1e-4) and share["held_out_sign_agreement"] == 1
    noise = np.random.default_rng(1).normal(size=old.shape)
    found, total, agree, top, bottom = held.measure(old + noise), 0, 0, 0, 0
    for (d, e), (a, b) in zip(noise, r):
        total += ((d - e) / 4 - (a - b)) ** 2 / 50
        agree += ((d > e) == (a > b)) / 50
        top, bottom = top + (d - e) * 4 * (a - b), bottom + (4 * (a - b)) ** 2
    assert found["held_out_eq1"] == pytest.approx(total, rel=1e-4)
    assert found["held_out_sign_agreement"] == pytest.approx(agree) and found["held_out_share"] == pytest.approx(top / bottom, rel=1e-4)
    assert found["held_out_loss"] == pytest.approx(noise.sum() + 4, rel=1e-4)


@pytest.mark.parametrize("both, loss", [(False, "-inf"), (True, "nan")])
def test_a_look_that_is_not_finite_stops_the_run_and_is_no_best_one(both, loss, cfg, monkeypatch):
    """RLOO's ratio overflows in float32 from 89 nats on: of the better answers, of both."""
    pairs = [p._replace(logps=(-9.0, -9.0)) for p in with_rewards(random_pairs(160))]
    held = HeldOut(pairs, replace(cfg, validation=20, patience=2), rloo_loss, 1)
    reward_N2 = torch.tensor([p.rewards for p in held.pairs])
    grown_N2 = (reward_N2 == reward_N2.max(1, keepdim=True).values).float() + both
    monkeypatch.setattr("machinery.held_out.old_logps", lambda model, pairs, cfg: 200 * grown_N2 - 9)
    with pytest.raises(BadInput, match=f"iteration 1: after 4 steps the loss on held-out pairs is {loss}, .*--lr") as stop:
        held.look(torch.nn.Linear(1, 1), 3)
    assert "\n" not in str(stop.value) and list(held.looks) == [0]
    sane = held.measure((20 * grown_N2 - 9).numpy(), 4)
    assert all(map(np.isfinite, sane.values()))


@pytest.mark.parametrize("patience, looks, best, over", [
    (1, {0: 1.0, 2: 0.9}, 2, False), (1, {0: 1.0, 2: 0.9, 4: 0.95}, 2, True), (2, {0: 1.0, 2: 0.9, 4: 0.95}, 2, False),
    (2, {0: 1.0, 2: 0.9, 4: 0.95, 6: 0.9}, 2, True), (2, {0: 1.0, 2: 1.1, 4: 1.2}, 0, True),
    (0, {0: 1.0, 2: 1.1, 4: 1.2, 6: 2.0}, 0, False)])  # fmt: skip
def test_a_training_is_over_after_as_many_looks_without_a_new_best_as_there_is_patience(patience, looks, best, over, cfg):
    held = HeldOut(with_rewards(random_pairs(160)), replace(cfg, validation=20, patience=patience), refuel_loss, 1)
    held.looks = looks
    assert held.best() == best and held.over() == over


def weights(path):
    from safetensors.torch import load_file

    return load_file(os.path.join(path, "model.safetensors"))


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("losses, steps, best", [((0.9, 1.0, 1.1), 9, 3), ((1e3, 1e4), 6, 0)])
def test_the_policy_is_that_of_the_best_look_to_the_bit_or_pi_t(losses, steps, best, base, tmp_path, monkeypatch, capsys):
    script = iter(losses)

    def look(held, model, step):
        held.looks[step + 1] = next(script)
        return {"held_out_loss": held.looks[step + 1]}

    monkeypatch.setattr(HeldOut, "look", look)
    monkeypatch.setattr(HeldOut, "measure", lambda *_: {"held_out_loss": 1.0})
    flags = f"--setting toy --policy {base} --reference {base} --engine transformers --out {tmp_path / 'run'} --lr 1e-3"
    flags += " --num-prompts 160 --batch-size 16 --wave 160 --iterations 1 --eval-dialogues 4 --checkpoint-steps 3 --epochs 2"
    refuel.main(f"{flags} --snapshot-steps 3 --patience 2".split())
    folder = tmp_path / "run" / "iter_1"
    rows = files.read_lines(str(tmp_path / "run" / "metrics.jsonl"))
    assert max(row.get("step", 0) for row in rows) == steps - 1 and f"least after {best} of 18 steps" in capsys.readouterr().out
    kept = weights(folder / "policy")
    for step in (0, 3, 6):
        assert equal(kept, weights(folder / f"step_{step}" if step else base)) == (step == best)
    assert not [name for name in os.listdir(folder) if name.startswith("best")]


def test_resumed_a_training_knows_the_looks_that_it_has_had_and_ends_where_it_had_ended(base, cfg, tmp_path):
    """Stopped after the look that ends it, before the policy is kept: no step more is trained, the best look is taken."""
    cfg = replace(cfg, validation=20, patience=1, checkpoint_steps=2, batch_size=8, epochs=3, lr=3e-2)
    open_folder(cfg, lambda cfg: {})
    model = refuel.load_policy(base, cfg)
    pairs = with_logps(model, random_pairs(160), cfg)

    def train():
        model = refuel.load_policy(base, cfg)
        run = Run(cfg, model, refuel.make_optimizer(model, cfg))
        run.begin(1)
        os.makedirs(run.folder, exist_ok=True)
        mine = run.hold_out(pairs, refuel_loss)
        first, steps = run.first_step(), []

        def after_step(step, metrics):
            steps.append(step)
            return run.after_step(step, metrics)

        refuel.regress(model, run.optimizer, mine, cfg, refuel_loss, first, after_step)
        return run, steps

    run, steps = train()
    assert len(steps) in (2, 4, 6) and run.held_out.over()
    path = os.path.join(cfg.out, "metrics.jsonl")
    *rows, last = files.read_lines(path)
    files.write_lines(path, [*rows, last | {"seconds": 1000.0}])
    again, more = train()
    assert not more and again.held_out.looks == run.held_out.looks and again.spent == 1000
    files.write_lines(path, [row for row in rows if "held_out_loss" not in row])
    with pytest.raises(BadInput, match="lacks the held-out loss after 2 steps of iteration 1"):
        train()
    again.held_out.take_best(again.folder, again.model, base)
    run.held_out.take_best(run.folder, run.model, base)
    kept = {name: w.clone() for name, w in fsdp.full_weights(run.model)}
    assert equal(kept, dict(fsdp.full_weights(again.model)))


# --- an iteration that goes bad -----------------------------------------------------------------------------------


def collected(**values):
    return {"iteration": 3, "pairs": 2000, "reward": 0.45, "reward_error": 0.004, "truncated": 0.0, "malformed": 0.01} | values


@pytest.mark.parametrize("now, words", [
    ({}, ()), ({"reward": 0.44}, ()), ({"reward": 0.43}, ("worse: mean reward (mean reward 0.450 to 0.430",)),
    ({"malformed": 0.012}, ()), ({"malformed": 0.04}, ("malformed answers 1.00% to 4.00%",)),
    ({"truncated": 0.001}, ()), ({"truncated": 0.02, "reward": 0.2}, ("worse: mean reward; truncated",)), ({"reward": 0.6}, ())])  # fmt: skip
def test_a_fall_beyond_noise_is_one_line(now, words):
    said = gone_bad(collected(iteration=4, **now), collected())
    assert len(said) == bool(words) and all(word in said[0] for word in words)
    assert not said or said[0].startswith("iteration 3 has made this worse: ") and "\n" not in said[0]


def test_the_next_collection_says_how_far_the_policy_has_moved_by_its_own_samples(base, tmp_path, capsys):
    """kl_own from a second iteration, against the mean of both log-probs read from the files."""
    flags = f"--setting toy --policy {base} --reference {base} --engine transformers --num-prompts 32 --batch-size 8 --lr 2e-3"
    out = tmp_path / "run"
    refuel.main(f"{flags} --wave 32 --iterations 2 --eval-dialogues 4 --out {out}".split())
    rows = files.read_lines(str(out / "metrics.jsonl"))
    first, second = (row for row in rows if row["phase"] == "logps")
    assert "kl_own" not in first and second["kl_own"] > 0.01
    pairs = [refuel.Pair.from_json(row) for row in files.read_sealed(str(out / "iter_2" / "pairs.jsonl")) if "dropped" not in row]
    cfg = refuel.read_config(flags.split())
    now, before = (with_logps(refuel.load_policy(path, cfg), pairs, cfg) for path in (str(out / "iter_1" / "policy"), base))
    ratio = np.array([p.logps for p in now]) - np.array([p.logps for p in before])
    assert second["kl_own"] == pytest.approx(ratio.mean(), rel=2e-3)
    assert second["kl_own_error"] == pytest.approx(ratio.mean(1).std() / len(pairs) ** 0.5, rel=0.05)
    collect = [row for row in rows if row["phase"] == "collect"]
    assert all(0 <= row["malformed"] <= 1 and sum(row["P(H)"]) == pytest.approx(1, abs=0.003) for row in collect)
