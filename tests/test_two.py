"""Setting two (section 4.3, C.1): Eq. 11, the last layers, one training over all updates, the data's own questions."""
import json
import os
from dataclasses import replace

import numpy as np
from helpers import Talker, dialogue, hh, last_number, llama_config, random_pairs, row_logps, run_folder, ultra, with_logps
from machinery import report
from machinery.run import Run, open_folder
import pytest
import torch

import baselines
from machinery import data
import evaluate
from machinery import files
from machinery import fsdp
from machinery import logps
import refuel
from machinery import rewards
from machinery import seams
import simulator
from simulator import Dialogue

# --- Eq. 11 ------------------------------------------------------------------------------------------------------


def test_eq_11_by_hand(cfg):
    cfg = replace(cfg, gamma=0.5, penalty=-3.0)
    pair = random_pairs(1)[0]._replace(rewards=(2.0, 7.0), logps=(-10.0, -4.0), base_logps=(-8.0, -9.0))
    whole = pair._replace(truncated=((False, False), (False,)))
    assert refuel.regularised(whole, cfg).rewards == (2 - 0.5 * (-10 + 8), 7 - 0.5 * (-4 + 9))
    assert refuel.regularised(whole, replace(cfg, gamma=0.0)).rewards == (2.0, 7.0)
    before = pair._replace(h=2, truncated=((True, False), (True, True)))
    assert refuel.regularised(before, cfg).rewards == (3.0, -3.0)  # what was cut before the reset is common to both
    for cut in ((True, False), (False, True)):  # "any generation" from there on
        torn = pair._replace(truncated=(cut, (False,)))
        assert refuel.regularised(torn, cfg).rewards == (-3.0, 4.5)
        assert refuel.regularised(torn, replace(cfg, penalty=0.0)).rewards == (3.0, 4.5)
        mirrored = refuel.regularised(torn._replace(truncated=torn.truncated[::-1]), cfg)
        assert mirrored.rewards == (3.0, -3.0)


def trained(base, cfg, path, **more):
    """A policy of which only the last layer has learned, as it lives and as its folder."""
    cfg = replace(cfg, train_layers=1, lr=1e-3, **more)
    model = refuel.load_policy(base, cfg)
    pi_0 = {name: p.clone() for name, p in fsdp.learned_weights(model).items()}
    optimizer = refuel.make_optimizer(model, cfg)
    refuel.regress(model, optimizer, random_pairs(24), cfg)
    fsdp.save_policy(path, model, base)
    return model, pi_0, optimizer, cfg


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_pi_0_and_pi_t_are_those_of_two_models_loaded_apart(base, cfg, tmp_path, checkpointing):
    from transformers import LlamaForCausalLM

    path = str(tmp_path / "policy")
    model, pi_0, optimizer, cfg = trained(base, cfg, path, activation_checkpointing=checkpointing)
    pairs = random_pairs(9, seed=1)
    ours = lambda: torch.tensor([p.logps for p in with_logps(model, pairs, cfg)]).T  # noqa: E731
    with fsdp.exchanged(model, pi_0):
        first = ours()
    last = ours()
    for found, folder in ((first, base), (last, path)):
        alone = row_logps(LlamaForCausalLM.from_pretrained(folder), pairs, cfg.temperature)
        assert torch.allclose(found, alone, atol=1e-5)
    assert (first - last).abs().max() > 1e-2


def test_only_the_last_layers_change_and_only_they_have_a_state(base, cfg, tmp_path):
    path = str(tmp_path / "policy")
    model, _, optimizer, _ = trained(base, cfg, path)
    before, after = dict(files.read_weights(base)), dict(files.read_weights(path))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith("model.layers.2.")} and len(moved) == 9
    assert len(optimizer.state) == len(moved) and len(fsdp.training_state(model, optimizer)) == 4 * len(moved)
    assert all(p.grad is None for name, p in model.named_parameters() if name not in moved)


# --- one training over many updates ------------------------------------------------------------------------------


@pytest.fixture
def updates(base, cfg, tmp_path):
    """Five updates of setting two's kind in the toy world; two of the first four leave a policy, two a state."""
    cfg = replace(cfg, iterations=5, num_prompts=8, batch_size=8, epochs=2, policy_every=3, checkpoint_steps=2,
                  train_layers=1, gamma=0.5, penalty=-1.0, lr=1e-3, eta=2.0, max_new_tokens=11)  # fmt: skip
    speakers = simulator.load_cast(cfg)

    def run(name, stop=None):
        own = replace(cfg, out=str(tmp_path / name))
        open_folder(own, simulator.made_of)
        speakers[0].update(files.read_weights(base))
        refuel.train(own, speakers)
        return own.out

    return run, cfg


def test_updates_are_one_training_as_written_down_once_more_with_plain_torch(base, updates, model, monkeypatch):
    """One AdamW over all updates, linear decay without warm-up, four decimals of the weights: no code of ours."""
    from transformers import LlamaForCausalLM

    run, cfg = updates
    seen, remember = [], Run.with_logps
    monkeypatch.setattr(Run, "with_logps", lambda *a: seen.append(remember(*a)) or seen[-1])
    out = run("run")
    learning = model.model.layers[-1].parameters()
    optimizer = torch.optim.AdamW(learning, betas=(0.9, 0.95), eps=1e-8 / 4, weight_decay=cfg.weight_decay)
    first = LlamaForCausalLM.from_pretrained(base)
    assert len(seen) == 5
    for t, pairs in enumerate(seen):
        with torch.no_grad():
            old, start = row_logps(model, pairs, cfg.temperature), row_logps(first, pairs, cfg.temperature)
        reward = torch.tensor([[p.rewards[k] - 0.5 * float(old[k, b] - start[k, b]) for b, p in enumerate(pairs)]
                               for k in range(2)])  # fmt: skip
        cut = [[any(p.truncated[k][p.h - 1 :]) for p in pairs] for k in range(2)]
        reward[torch.tensor(cut)] = -1.0
        for _ in range(2):
            ratio = row_logps(model, pairs, cfg.temperature) - old
            loss = (((ratio[0] - ratio[1]) / 2 - (reward[0] - reward[1])) ** 2).mean()
            model.zero_grad()
            loss.backward()
            optimizer.param_groups[0]["lr"] = 1e-3 * (1 - t / 5)
            optimizer.step()
    cut = [any(answers) for pairs in seen for p in pairs for answers in p.truncated]
    assert True in cut and False in cut
    end = dict(files.read_weights(os.path.join(out, "iter_5", "policy")))
    assert max((p - end[name]).abs().max() for name, p in model.named_parameters()) < 1e-4
    assert max((p - end[name]).abs().max() for name, p in first.named_parameters()) > 4e-3


def test_the_folder_stays_small_and_a_stopped_run_goes_on_exactly(updates, monkeypatch):
    run, cfg = updates
    whole = run("whole")
    assert {name for name in os.listdir(whole) if name.startswith(("iter", "train"))} == {"iter_3", "iter_5"}
    regress, calls = refuel.regress, []

    def stops(*args):  # in the fourth update: the second one's state is on disk, and the third one's policy
        calls.append(args[-1])
        if calls == [1, 2, 3, 4]:
            raise KeyboardInterrupt
        return regress(*args)

    monkeypatch.setattr(refuel, "regress", stops)
    with pytest.raises(KeyboardInterrupt):
        run("stopped")
    out = run("stopped")
    assert calls == [1, 2, 3, 4, 3, 4, 5]
    one, two = run_folder(whole), run_folder(out)
    assert one.keys() == two.keys() and all(one[name] == two[name] for name in one)
    rates = [row["lr"] for row in one["metrics.jsonl"] if row["phase"] == "regress"]
    assert rates == pytest.approx([1e-3 * (1 - t / 5) for t in range(5) for _ in range(2)])
    run("stopped")
    assert len(calls) == 7  # a finished run does nothing


def test_a_state_of_other_ranks_is_refused_before_anything_is_loaded(cfg):
    open_folder(cfg, simulator.made_of)
    os.makedirs(os.path.join(cfg.out, "training"))
    files.write_file(os.path.join(cfg.out, "training", "step.json"), json.dumps({"step": 2, "ranks": 8}))
    with pytest.raises(files.BadInput, match="by 8 processes"):
        open_folder(simulator.prepare(cfg), simulator.made_of)


def test_a_pass_shows_every_prompt_before_any_comes_again(cfg):
    once = replace(cfg, num_prompts=6, policy_every=1)
    for first in (1, 5):  # 25 rows: four iterations, one row is left over
        rows = [i for t in range(first, first + 4) for i in data.draw("prompts", 25, once, t)]
        assert len(rows) == len(set(rows)) == 24
    assert data.draw("prompts", 25, once, 1) != data.draw("prompts", 25, once, 5)
    each = replace(cfg, num_prompts=20)
    assert len(set(data.draw("prompts", 25, each, 1)) & set(data.draw("prompts", 25, each, 2))) >= 15


def test_lt_online_too_has_as_many_turns_as_the_data_has_questions(cfg):
    prompts = [Dialogue(secret=["next"] * n) for n in (0, 1, 4)]
    _, h, H = baselines.online_last(prompts, replace(cfg, user="dataset"), np.random.default_rng(0))
    assert h.tolist() == H.tolist() == [1, 2, 5]


# --- whole dialogues ---------------------------------------------------------------------------------------------


def test_dialogues_of_many_lengths_are_judged_as_wholes():
    a = [dialogue("9", "a long answer 5"), dialogue("2"), dialogue("1", "1", "7")]
    b = [dialogue("0", "9"), dialogue("2"), dialogue("1", "1", "6")]
    row = evaluate.summary(a, b, evaluate.by_reward(last_number), last_number, turns=0)
    assert row["win"] == [50.0] and row["avg"] == 50.0 and row["reward"] == [pytest.approx(14 / 3, abs=1e-4)]
    assert row["length"] == [pytest.approx(np.mean([5 / 2, 1, 1]), abs=1e-4)]
    assert report.table({"base": row}).splitlines()[0] == "| win rate, % | whole dialogue | average |"


def test_log_probs_of_dialogues_of_many_lengths_are_those_of_each_alone(model):
    tokenizer = Talker().tokenizer
    some = [Dialogue.start(tokenizer, "go on").add_answer(tokenizer, [7, 2])]
    some.append(some[0].until(1).add_user(tokenizer, "not sure").add_answer(tokenizer, [9, 9, 2]))
    logp_NH = logps.dialogue_logps(logps.attend_in_pairs(model), some, 0.8)
    for d, row in zip(some, logp_NH):
        pairs = [refuel.Pair(d.reset(h).ids, d.answer(h), [2], (0, 0), h, h) for h in range(1, len(d.spans) + 1)]
        assert np.allclose(row[: len(d.spans)], row_logps(model, pairs, 0.8)[0].detach(), atol=1e-5)
    assert logp_NH.shape == (2, 2) and logp_NH[0, 1] == 0.0


def test_a_reward_is_computed_once_for_each_conversation(monkeypatch):
    calls = []
    monkeypatch.setattr(seams, "MET", {(os.path.realpath(__file__), "--reward")})  # two of the first are asked alone
    scores = evaluate.shared(lambda ds: calls.extend(ds) or last_number(ds))
    some = [dialogue("1"), dialogue("2"), dialogue("1")]
    assert scores(some) == [1.0, 2.0, 1.0] and scores(some[:2]) == [1.0, 2.0] and len(calls) == 2


# --- the command -------------------------------------------------------------------------------------------------


def test_setting_two_parses_with_each_data_sets_values():
    two = lambda name: refuel.read_config(["--setting", "two", "--dataset", name])  # noqa: E731
    for name in ("hh", "Anthropic/hh-rlhf", "runs/small/hh.jsonl"):
        assert (two(name).gamma, two(name).penalty, two(name).max_new_tokens) == (0.05, -10.0, 512)
    cfg = two("ultrainteract")
    assert (cfg.gamma, cfg.penalty, cfg.eta, cfg.lr, cfg.epochs, cfg.train_layers) == (0.0, -4.0, 1.0, 3e-7, 4, 4)
    assert (cfg.num_prompts, cfg.batch_size, cfg.temperature, cfg.user) == (32, 32, 1.0, "dataset")


@pytest.fixture
def two(llama3, fsfairx, tmp_path):  # noqa: F811
    """Setting two's command with every part real and small; returns a function of the rows of its data set."""
    from transformers import LlamaForCausalLM

    policy = str(tmp_path / "policy")
    torch.manual_seed(3)
    LlamaForCausalLM(llama_config(2)).save_pretrained(policy)
    llama3.save_pretrained(policy)
    small = """--setting two --engine transformers --iterations 0 --num-prompts 4 --batch-size 4 --train-layers 1 --lr 1e-3
               --eval-dialogues 3 --policy-every 2 --checkpoint-steps 1 --max-length 1000 --max-dialogue 600"""

    def flags(rows, name, more):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths = f"--policy {policy} --reference {policy} --reward {fsfairx} --dataset {tmp_path / name}"
        return [*small.split(), *paths.split(), "--out", str(tmp_path / "run"), *more.split()]

    return flags


def questions(i):
    return [f"question {i}", "and then?", "why so?", "since when?"][: 1 + i % 4]


def test_setting_two_runs_from_its_command_to_its_results(two, tmp_path, capsys):
    said = [[x for q in questions(i) for x in (q, "yes")] for i in range(18)]
    flags = two([hh(*row) for row in said] + [hh("x" * 200, "a")], "hh.jsonl", "--max-new-tokens 3 --penalty 0")
    refuel.main(flags)
    rows = files.read_lines(tmp_path / "run" / "metrics.jsonl")
    assert rows[0]["phase"] == "data" and rows[0]["dropped"] == {"question too long": 1}
    cfg = files.read_json(tmp_path / "run" / "config.json")
    assert cfg["iterations"] == rows[0]["train"] // 4 == 3  # one pass, whatever its size
    for t in (1, 2, 3):
        mine = {r["phase"]: r for r in rows if r["iteration"] == t}
        collect, logps = mine["collect"], mine["logps"]
        assert collect["pairs"] + sum(collect["dropped"].values()) == 4 and logps["engine_gap"] < 1e-4
        assert (logps["kl_0"] == 0.0) == (t == 1)
        steps = [r for r in rows if r["iteration"] == t and r["phase"] == "regress"]
        assert len(steps) == 4 and len({r["lr"] for r in steps}) == 1
    results = files.read_json(tmp_path / "run" / "results.json")
    assert set(results) == {"base", "iter_2", "iter_3"} and len(results["iter_3"]["win"]) == 1
    assert results["base"]["kl"] == 0.0 != results["iter_3"]["kl"]
    played = [Dialogue.from_json(r) for r in files.read_lines(tmp_path / "run" / "eval" / "iter_3.jsonl")]
    for d in played:
        asked = [m["content"] for m in d.messages[::2]]
        assert asked == questions(int(asked[0].split()[1])) and len(d.messages) == 2 * len(asked)
    assert len({len(d.spans) for d in played}) > 1
    reward = rewards.load_reward(refuel.read_config(flags))
    assert results["iter_3"]["reward"] == [pytest.approx(np.mean(reward(played)), abs=1e-3)]
    assert "whole dialogue" in capsys.readouterr().out


def test_an_answer_has_table_5s_limit_for_its_number_of_turns(two, monkeypatch):
    monkeypatch.setattr(data, "ULTRAINTERACT_CAPS", {1: (99, 7), 2: (99, 5), 3: (99, 4), 4: (99, 3), 5: (99, 3)})
    said = [[x for q in questions(i) for x in (q, "y")][:-1] for i in range(18)]
    cfg = refuel.read_config(two([ultra(*row, chosen="g") for row in said], "ultra.jsonl", "--max-new-tokens 6"))
    policy, user, _ = simulator.load_cast(cfg)
    prompts = simulator.train_prompts(replace(cfg, num_prompts=12), policy.tokenizer, 1)
    for d in simulator.rollout(prompts, policy, user, [1 + len(p.secret) for p in prompts]):
        limit = {1: 6, 2: 5, 3: 4, 4: 3}[len(d.spans)]
        lengths = [len(d.answer(h)) for h in range(1, len(d.spans) + 1)]
        assert max(lengths) <= limit and all((n == limit) >= cut for n, cut in zip(lengths, d.truncated))
        assert any(d.truncated)  # a random policy hardly ever ends
