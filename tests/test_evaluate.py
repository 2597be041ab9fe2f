"""Win rates, intervals, length control, KL, and the whole command."""
import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
from helpers import CHATML, KEY, ROOT, dialogue, everything_in, last_number, make_bpe, on, sides
from machinery import report
import pytest
import torch

from machinery import engines
import evaluate
from machinery import files
from machinery import logps
from machinery import outside
from machinery import serve as machinery_serve
from machinery.ask import Server
import simulator
import toy
from evaluate import by_reward, dialogue_logps, length_controlled, win_rate
from machinery.files import BadInput
from simulator import Dialogue


# --- win rates and their intervals ------------------------------------------------------------------------------


def test_the_win_rate_at_h_compares_the_first_h_turns_and_ties_count_half():
    a = [dialogue("1", "5"), dialogue("2", "2"), dialogue("3", "0"), dialogue("4", "9")]
    b = [dialogue("0", "9"), dialogue("2", "2"), dialogue("3", "1"), dialogue("1", "9")]
    win, interval = win_rate(a, b, by_reward(last_number))
    assert win.tolist() == [75.0, 25.0] and interval.shape == (2, 2)
    assert (interval[0] <= win).all() and (win <= interval[1]).all()
    assert win_rate(b, a, by_reward(last_number))[0].tolist() == [25.0, 75.0]


def test_a_policy_against_itself_has_exactly_50_with_intervals_of_no_width():
    a = [dialogue("word " * i + "1", "7") for i in range(9)]
    row = evaluate.summary(a, a, by_reward(last_number), last_number)
    assert row["win"] == row["low"] == row["high"] == row["win_controlled"] == [50.0, 50.0]
    assert row["avg"] == row["avg_low"] == row["avg_high"] == row["avg_controlled"] == 50.0
    assert row["length"] == [5.0, 1.0]


def test_answers_that_were_cut_are_counted_and_named_below_the_table():
    a, b = [dialogue("1", "5"), dialogue("2", "2")], [dialogue("0", "9"), dialogue("2", "2")]
    a[1].truncated = [False, True]
    rows = {name: evaluate.summary(d, b, by_reward(last_number), last_number) for name, d in (("base", b), ("tuned", a))}
    assert [row["cut"] for row in rows.values()] == [0.0, 25.0]
    assert report.footer(rows).endswith("; answers cut at the token limit, %: tuned 25.0")
    assert "cut" not in report.footer({"base": rows["base"]})


def test_equal_conversations_are_a_tie_whatever_a_model_rounds():
    a, b = [dialogue("1", "5"), dialogue("2", "2")], [dialogue("1", "5"), dialogue("2", "1")]
    rounding = iter(range(9))
    judge = by_reward(lambda ds: [1e-6 * next(rounding) for _ in ds])
    assert judge(a, b).tolist() == [0.5, 0.0]
    b[0].truncated = [False, True]  # what the last token was is seen by a reward, too
    assert judge(a, b)[0] != 0.5


def test_dialogues_that_do_not_fit_are_named_and_refused_where_they_are_many(cfg):
    """The openings that are left would be those on which no policy says much."""
    played = {name: [dialogue("1", "5") for _ in range(20)] for name in ("base", "tuned")}
    played["tuned"][3].failed = "too long"
    kept, rows = evaluate.finished(played, last_number, cfg)
    assert 3 not in rows and [len(dialogues) for dialogues in kept.values()] == [19, 19]
    row = evaluate.summary(kept["tuned"], kept["base"], by_reward(last_number), last_number) | {"failed": 1}
    assert "; 1 openings left out" in report.footer({"base": row})
    for i in range(4, 9):
        played["tuned"][i].failed = "too long"
    with pytest.raises(BadInput, match="6 of 20 evaluation dialogues do not fit .*'base': 0, 'tuned': 6.*0.05[.] Raise the limits"):
        evaluate.finished(played, last_number, cfg)
    assert len(evaluate.finished(played, last_number, replace(cfg, max_failures=0.5))[1]) == 14
    brief = SimpleNamespace(fits_dialogue=lambda d: d.failed is None and d is not played["base"][0])
    with pytest.raises(BadInput, match="7 of 20 .*'base': 1, 'tuned': 6"):
        evaluate.finished(played, brief, cfg)


def test_a_policy_plays_at_the_temperature_that_it_was_trained_at(tmp_path, cfg, capsys):
    policy = str(tmp_path / "run" / "iter_1" / "policy")
    os.makedirs(policy)
    then = {"temperature": 0.3, "max_turns": 9, "system": cfg.system}
    files.write_file(str(tmp_path / "run" / "config.json"), json.dumps(then))
    with pytest.raises(BadInput, match="trained at --temperature 0.3, not 1: give that"):
        evaluate.check_trained({"a": policy}, cfg)
    evaluate.check_trained({"a": policy + "/", "b": "http://x#y", "c": str(tmp_path)}, replace(cfg, temperature=0.3))
    assert capsys.readouterr().out == "a was trained with other settings than it plays with: max_turns 9\n"
    evaluate.check_trained({"a": policy}, replace(cfg, eval_temperature=0.7))  # without KL


def test_prompts_that_a_run_has_trained_on_are_no_validation(tmp_path, cfg):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "are there any holidays in march?"}\n' * 9)
    cfg = replace(cfg, dataset=str(rows))
    policy = str(tmp_path / "run" / "iter_1" / "policy")
    os.makedirs(policy)
    for split, refused in (("test", True), ("validation", False)):
        files.write_file(str(tmp_path / "run" / "config.json"), json.dumps({"dataset": cfg.dataset, "eval_split": split}))
        for judged_on in ("test", "validation"):
            with pytest.raises(BadInput, match="trained on the prompts") if refused and judged_on == "validation" else nullcontext():
                evaluate.check_unseen({"a": policy, "b": "http://x#y"}, replace(cfg, eval_split=judged_on))
            with pytest.raises(BadInput, match="trained on the prompts") if refused and judged_on == "validation" else nullcontext():
                evaluate.check_unseen({"a": policy}, replace(cfg, eval_split=judged_on, dataset=os.path.relpath(rows)))
    evaluate.check_unseen({"a": policy}, replace(cfg, eval_split="validation", dataset="toy"))
    for then, now in ((replace(cfg, dataset="toy"), os.path.join(ROOT, "toy.py")), (cfg, str(tmp_path / "copy.jsonl"))):
        shutil.copy(rows, tmp_path / "copy.jsonl")
        run = {"dataset": "its/old/place", "eval_split": "test", "made_of": simulator.made_of_dataset(then)}
        files.write_file(str(tmp_path / "run" / "config.json"), json.dumps(run))
        with pytest.raises(BadInput, match="trained on the prompts"):
            evaluate.check_unseen({"a": policy}, replace(cfg, eval_split="validation", dataset=now))


def test_a_run_trained_on_validation_prompts_is_found_by_whatever_path_and_behind_other_runs(tmp_path, cfg, monkeypatch):
    def run(name, **config):
        os.makedirs(tmp_path / name / "iter_1" / "policy")
        files.write_file(str(tmp_path / name / "config.json"), json.dumps({"dataset": "toy"} | config))
        return str(tmp_path / name / "iter_1" / "policy")

    careless = run("careless", eval_split="test", policy="no/run")
    child = run("child", eval_split="validation", policy=careless)
    grandchild = run("grandchild", eval_split="validation", policy=child)
    honest = run("honest", eval_split="validation", policy="no/run")
    os.symlink(careless, tmp_path / "link")
    moved = run("moved", eval_split="test")
    shutil.move(moved, tmp_path / "disk")
    os.symlink(tmp_path / "disk", moved)
    monkeypatch.chdir(careless)
    cfg = replace(cfg, eval_split="validation", dataset="toy", reference=honest)
    evaluate.check_unseen({"a": honest, "b": "no/run"}, cfg)
    for path in (careless, f"{careless}/", ".", str(tmp_path / "link"), moved, child, grandchild):
        with pytest.raises(BadInput, match="^--policy .* trained on the prompts"):
            evaluate.check_unseen({"a": honest, "b": path}, cfg)
    with pytest.raises(BadInput, match="^--reference .* trained on the prompts"):
        evaluate.check_unseen({"a": honest}, replace(cfg, reference=child))


def test_intervals_over_dialogues_cover_and_intervals_over_turns_would_not():
    """The turns of a dialogue share its luck: 95 % intervals must hold the truth in about 95 % of the experiments."""
    rng, covered, naive, runs = np.random.default_rng(0), 0, 0, 300
    for run in range(runs):
        luck_N1 = rng.random((100, 1)) < 0.6
        verdict_NH = (rng.random((100, 5)) < np.where(luck_N1, 0.9, 0.15)).astype(float)
        truth = 0.6 * 0.9 + 0.4 * 0.15
        low, high = evaluate.bootstrap(verdict_NH.mean(1, keepdims=True), samples=400, seed=run)[:, 0]
        covered += low <= truth <= high
        low, high = evaluate.bootstrap(verdict_NH.reshape(-1, 1), samples=400, seed=run)[:, 0]
        naive += low <= truth <= high
    assert 0.91 < covered / runs < 0.98 and naive / runs < 0.85


def coverage(dialogues, p):
    """How often the interval of so many independent verdicts holds a win rate of p: over all numbers of wins, exactly."""
    held = 0
    for wins in range(dialogues + 1):
        low, high = evaluate.bootstrap(np.arange(dialogues)[:, None] < wins)[:, 0]
        held += math.comb(dialogues, wins) * p**wins * (1 - p) ** (dialogues - wins) * (low - 1e-9 <= p <= high + 1e-9)
    return held


@pytest.mark.parametrize("dialogues, p, least, most", [
    (12, 0.5, 0.87, 0.965), (12, 0.7, 0.87, 0.965), (16, 0.5, 0.87, 0.965), (16, 0.7, 0.87, 0.965),
    (100, 0.9, 0.91, 0.97), (12, 0.9, 0.0, 0.81), (100, 0.99, 0.0, 0.65),
])  # fmt: skip
def test_intervals_hold_the_truth_as_often_as_the_footer_says_and_hardly_ever_near_0_and_100(dialogues, p, least, most):
    assert least < coverage(dialogues, p) < most and least < coverage(dialogues, 1 - p) < most


def test_the_footer_names_the_rows_whose_intervals_are_too_narrow_at_any_number_of_dialogues():
    def rows(dialogues, *win):
        return {"base": dict(win=[50.0, 50.0], dialogues=dialogues), "tuned": dict(win=list(win), dialogues=dialogues)}

    narrow = "; too narrow near 0 and 100 %, with fewer than 5 wins or losses: tuned"
    for dialogues, wins in ((100, (60.0, 97.0)), (100, (3.0, 50.0)), (1000, (99.6, 99.0)), (12, (70.0, 60.0))):
        assert report.footer(rows(dialogues, *wins)).endswith(narrow)
    for dialogues, wins in ((100, (95.0, 60.0)), (1000, (99.5, 1.0)), (12, (50.0, 50.0))):
        assert "too narrow" not in report.footer(rows(dialogues, *wins))
    few = "12 dialogues, too few for that: such intervals hold the truth in 88 to 96 % of cases from 30 to 70 %"
    assert report.footer(rows(12, 50.0, 50.0)).endswith(few)
    assert "too few" not in report.footer(rows(100, 50.0, 50.0))


# --- length control ---------------------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_length_control_removes_a_pure_bias_and_keeps_a_real_effect():
    rng = np.random.default_rng(1)
    longer_N = rng.normal(30, 20, 20000)
    bias_N = 1.5 * np.tanh(longer_N / longer_N.std())
    judge = lambda merit: (rng.random(20000) < sigmoid(merit + bias_N)).astype(float)  # noqa: E731
    only_longer, better = judge(0.0), judge(0.8)
    assert 100 * only_longer.mean() > 65 and abs(length_controlled(only_longer, longer_N) - 50) < 2
    assert abs(length_controlled(better, longer_N) - 100 * sigmoid(0.8)) < 2
    unrelated = (rng.random(20000) < 0.7).astype(float)
    assert abs(length_controlled(unrelated, longer_N) - 100 * unrelated.mean()) < 1.5


def test_length_control_agrees_with_a_general_optimiser_and_is_antisymmetric():
    rng = np.random.default_rng(2)
    verdict_N, difference_N = rng.choice([0, 0.5, 1], 60, p=[0.2, 0.2, 0.6]), rng.normal(2, 5, 60)
    x_N = torch.tensor(np.tanh(difference_N / difference_N.std()))
    weight = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        logit_N = weight[0] + weight[1] * x_N
        value = torch.nn.functional.binary_cross_entropy_with_logits(logit_N, torch.tensor(verdict_N), reduction="sum")
        (value := value + 0.5e-2 * weight.square().sum()).backward()
        return value

    optimizer.step(loss)
    controlled = length_controlled(verdict_N, difference_N)
    assert abs(controlled - 100 * torch.sigmoid(weight[0]).item()) < 1e-4
    assert abs(length_controlled(1 - verdict_N, -difference_N) - (100 - controlled)) < 1e-9


@pytest.mark.parametrize("verdict", [0.0, 0.5, 1.0])
def test_length_control_stays_finite_when_one_side_sweeps_or_lengths_decide(verdict):
    verdict_N = np.full(40, verdict)
    swept = length_controlled(verdict_N, np.zeros(40))
    assert abs(swept - 100 * verdict) < 0.5 and np.isfinite(swept)
    signs_N = np.repeat([-1.0, 1.0], 20)  # the longer one always wins: nothing is left at equal length
    assert abs(length_controlled((1 + signs_N) / 2, signs_N) - 50) < 1e-6


@pytest.mark.parametrize("thought", ["<think>hm {}</think>", "<think>\nhm {}\n</think>\n\n"])
@pytest.mark.parametrize("control", [[], ["<think>", "</think>"]])  # spelled, or tokens of their own
def test_thoughts_that_no_judge_reads_are_no_length_and_still_a_cost(thought, control):
    tokenizer = make_bpe(CHATML, ["<|im_start|>", "<|im_end|>", *control], None, "<|im_end|>")
    silent, thinking = [], []
    for i in range(40):
        for dialogues, text in ((silent, ""), (thinking, thought.format("the user asks " * (1 + i % 7)))):
            ids = tokenizer.encode(f"{text}it is {i} miles<|im_end|>", add_special_tokens=False)
            dialogues.append(Dialogue.start(tokenizer, "how far?").add_answer(tokenizer, ids))
    assert [d.messages for d in silent] == [d.messages for d in thinking]
    judge, reward = lambda a, b: np.array([1.0, 1.0, 0.5, 0.0] * 10), lambda ds: np.zeros(len(ds))  # noqa: E731
    same = evaluate.summary(silent, silent, judge, reward, tokenizer=tokenizer)
    assert same == evaluate.summary(silent, silent, judge, reward)
    row = evaluate.summary(thinking, silent, judge, reward, tokenizer=tokenizer)
    assert row["win_controlled"] == pytest.approx(same["win_controlled"], abs=1) and row["length"] > same["length"]


# --- KL ---------------------------------------------------------------------------------------------------------

VOCAB, END = 5, 0


def tiny(seed):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
                         num_attention_heads=2, max_position_embeddings=32, initializer_range=0.7)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def every_conversation(turns=2):
    """All conversations of answers of at most two tokens, END among them, with a user who answers by a rule."""
    answers = [[END]] + [[i, j] for i in range(1, VOCAB) for j in range(VOCAB)]
    states = [Dialogue(ids=[1, 2])]
    for turn in range(turns):
        grown = []
        for d in states:
            for y in answers:
                ids, spans = d.ids + y, [*d.spans, (len(d.ids), len(d.ids) + len(y))]
                reply = [1 + (sum(y) + turn) % (VOCAB - 1), 3] if turn + 1 < turns else []
                grown.append(Dialogue(ids=ids + reply, spans=spans))
        states = grown
    return states


def exact_kl(model, base, temperature, turns=2):
    """KL of each turn (H,), from full next-token distributions at every state, one forward each."""

    def law(net, ids):
        with torch.no_grad():
            return (net(torch.tensor([ids])).logits[0, -1].double() / temperature).log_softmax(-1)

    kl, states = [], {(1, 2): 1.0}
    for turn in range(turns):
        kl.append(0.0)
        after = {}
        for s, p in states.items():
            first, base_first = law(model, s), law(base, s)
            kl[turn] += p * (first.exp() * (first - base_first)).sum().item()
            for i in range(VOCAB):
                p_i = p * first[i].exp().item()
                if i == END:
                    ends = [((i,), p_i)]
                else:
                    second, base_second = law(model, [*s, i]), law(base, [*s, i])
                    kl[turn] += p_i * (second.exp() * (second - base_second)).sum().item()
                    ends = [((i, j), p_i * second[j].exp().item()) for j in range(VOCAB)]
                for y, p_y in ends:
                    after[(*s, *y, 1 + (sum(y) + turn) % (VOCAB - 1), 3)] = p_y
        states = after
    return np.array(kl)


def in_pairs(model):
    return logps.attend_in_pairs(copy.deepcopy(model))


@pytest.fixture(scope="module", params=[1.0, 0.7])
def toy_kl(request):
    model, base, dialogues = tiny(0), tiny(1), every_conversation()
    logps = [dialogue_logps(in_pairs(m), dialogues, request.param, tokens=999) for m in (model, base)]
    return model, base, dialogues, logps, exact_kl(model, base, request.param), request.param


def test_both_kl_estimators_are_unbiased_by_enumeration(toy_kl):
    _, _, dialogues, (logp_NH, base_NH), exact_H, _ = toy_kl
    p_N = np.exp(logp_NH.sum(1))
    assert len(dialogues) == 21 * 21 and abs(p_N.sum() - 1) < 1e-5 and exact_H.min() > 0.05
    log_ratio_NH = logp_NH - base_NH
    for k_NH in (log_ratio_NH, np.exp(-log_ratio_NH) - 1 + log_ratio_NH):
        assert np.abs(p_N @ k_NH - exact_H).max() < 1e-5


def test_sampled_kl_is_within_its_stated_error_of_the_exact_value(toy_kl):
    _, _, _, (logp_NH, base_NH), exact_H, _ = toy_kl
    p_N = np.exp(logp_NH.sum(1))
    rows = np.random.default_rng(0).choice(len(p_N), 5000, p=p_N / p_N.sum())
    row = evaluate.kl_estimates(logp_NH[rows], base_NH[rows])
    for name in ("kl", "kl_k3"):
        assert abs(row[name] - exact_H.sum()) < 4 * row[f"{name}_error"] < 0.2 * exact_H.sum()
        errors_H = np.array(row[f"{name}_turn_error"])
        assert (np.abs(np.array(row[f"{name}_turn"]) - exact_H) < 4 * errors_H).all()
    # the stated error is the spread over repetitions
    repeated = [evaluate.kl_estimates(logp_NH[r], base_NH[r])["kl"] for r in rows.reshape(50, 100)]
    single = evaluate.kl_estimates(logp_NH[rows[:100]], base_NH[rows[:100]])["kl_error"]
    assert 0.7 < np.std(repeated) / single < 1.4


def test_dialogue_logps_equal_a_loop_over_tokens(toy_kl):
    model, _, dialogues, (logp_NH, _), _, temperature = toy_kl
    for n in (0, 17, 200, 440):
        for h, (start, end) in enumerate(dialogues[n].spans):
            expected = 0.0
            for t in range(start, end):
                with torch.no_grad():
                    logits = model(torch.tensor([dialogues[n].ids[:t]])).logits[0, -1].double()
                expected += (logits / temperature).log_softmax(-1)[dialogues[n].ids[t]].item()
            assert abs(logp_NH[n, h] - expected) < 1e-5


def test_dialogue_logps_do_not_depend_on_how_they_are_batched(toy_kl):
    model, _, dialogues, (logp_NH, _), _, temperature = toy_kl
    some = [d for i, d in enumerate(dialogues) if i % 7 == 0]
    assert np.abs(dialogue_logps(in_pairs(model), some, temperature, tokens=1) - logp_NH[::7]).max() < 1e-5


def test_the_kl_of_a_policy_with_itself_is_exactly_0(toy_kl):
    row = evaluate.kl_estimates(toy_kl[3][0], toy_kl[3][0])
    assert not np.any([np.any(value) for value in row.values()])


# --- the whole command ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """A run's folder with two iterations' policies, other weights each."""
    from transformers import LlamaForCausalLM

    run = tmp_path_factory.mktemp("runs") / "mine"
    for t in (2, 10):
        path = run / f"iter_{t}" / "policy"
        model = LlamaForCausalLM.from_pretrained(base)
        torch.manual_seed(t)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.02 * torch.randn_like(p))
        model.save_pretrained(path)
        files.copy_tokenizer(base, path)
    return str(run)


USUAL = "--setting toy --engine transformers --eval-dialogues 10 --max-turns 2 --eval-wave 4"


def run_main(flags, base):
    evaluate.main([*USUAL.split(), "--reference", base, *flags])


def test_the_command_judges_run_folders_and_checkpoints_and_keeps_their_dialogues(
    trained, base, tmp_path, capsys, monkeypatch, serve
):
    out = str(tmp_path / "out")
    flags = ["--policy", trained, f"{trained}/iter_2/policy", f"again={base}", "--out", out]
    run_main(flags, base)
    printed, results = capsys.readouterr().out, files.read_json(f"{out}/results.json")
    assert list(results) == ["base", "mine", "mine_iter_2", "again"] and os.path.exists(f"{out}/win_rate.png")
    assert results["again"]["win"] == [50.0, 50.0] and results["again"]["kl"] == results["base"]["kl"] == 0
    assert 0 < results["mine"]["kl"] != results["mine_iter_2"]["kl"] and len(results["mine"]["kl_turn"]) == 2
    for word in ("at equal length", "flips", "tokens an answer", "KL a conversation (k1)", "mine_iter_2"):
        assert word in printed
    # the newest iteration is the 10th, not the last name in the alphabet; its dialogues are not played twice
    assert files.read_json(f"{out}/eval/mine.json")["checkpoint"].endswith("mine/iter_10/policy")
    sizes = set()
    monkeypatch.setattr(evaluate, "in_waves", lambda file, _, size, *__: sizes.add(size) or files.read_lines(file))
    server = serve(lambda prompt, _: "Preferred: " + ("A" if len(sides(prompt)[0]) % 2 else "B"))
    run_main([*flags, "--judge", server.url, "--judge-model", "m"], base)
    judged = files.read_json(f"{out}/results.json")
    assert 0 < judged["mine"]["asked"] <= 20 and judged["again"]["asked"] == 0
    assert judged["mine"]["kl"] == results["mine"]["kl"] and sizes == {4}  # --eval-wave
    asked = len(server.requests)
    run_main([*flags, "--judge", server.url, "--judge-model", "m"], base)
    assert len(server.requests) == asked > 0 and KEY not in everything_in(out) + capsys.readouterr().out


def test_two_ranks_give_the_same_results_as_one(trained, base, tmp_path, serve):
    server = serve(lambda prompt, _: "Preferred: " + ("A" if len(sides(prompt)[0]) % 2 else "B"))
    judge = ["--judge", server.url, "--judge-model", "m", "--policy", trained]
    run_main([*judge, "--out", str(tmp_path / "one")], base)
    asked = len(server.requests)
    done = subprocess.run([*on(2), "evaluate.py", *USUAL.split(), "--reference", base, *judge, "--out", str(tmp_path / "two")],
                          cwd=ROOT, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = (files.read_json(tmp_path / out / "results.json") for out in ("one", "two"))
    for name in one:
        for key in one[name].keys() - {"command"}:
            assert np.abs(np.subtract(one[name][key], two[name][key])).max() < 1e-4, (name, key)
    assert len(server.requests) == 2 * asked and len(os.listdir(tmp_path / "two" / "verdicts")) == 2
    assert done.stdout.count("mean reward") == 1


def test_dialogues_of_another_checkpoint_or_configuration_are_never_reused(trained, base, tmp_path, capsys):
    out = str(tmp_path / "out")
    run_main(["--policy", f"x={trained}", "--out", out], base)
    capsys.readouterr()
    for flags, word in ((["--policy", f"x={trained}/iter_2/policy"], "weights"),
                        (["--policy", f"x={trained}", "--temperature", "0.5"], "temperature")):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            run_main([*flags, "--out", out], base)
        assert stop.value.code == 2 and word in (error := capsys.readouterr().err) and error.count("\n") == 1
    os.remove(f"{out}/eval/x.json")
    with pytest.raises(SystemExit):
        run_main(["--policy", f"x={trained}", "--out", out], base)
    assert "does not say" in capsys.readouterr().err


def test_a_judge_that_dies_loses_no_finished_row(trained, base, cfg, tmp_path):
    cfg = replace(cfg, max_turns=2, eval_dialogues=6)
    cast = simulator.load_cast(cfg)
    calls = []

    def dying(a, b):
        calls.append(1)
        if len(calls) > 4:  # base and the first policy, two turns each
            raise BadInput("the judge failed")
        return np.full(len(a), 0.5)

    paths = {"first": f"{trained}/iter_2/policy", "second": f"{trained}/iter_10/policy"}
    with pytest.raises(BadInput):
        evaluate.evaluate(paths, str(tmp_path), *cast, cfg, judge=dying, kl=False)
    assert list(files.read_json(tmp_path / "results.json")) == ["base", "first"]


def test_a_checkpoint_of_another_kind_gets_its_own_engine_and_no_kl(trained, base, cfg, tmp_path, monkeypatch):
    """Llama 3 and 3.1 have equal shapes and other positions: weights alone would go in, and speak nonsense."""
    odd = str(tmp_path / "odd")
    files.write_folder(odd, lambda partial: [open(os.path.join(partial, f), "wb").write(
        open(os.path.join(base, f), "rb").read()) for f in os.listdir(base)])  # fmt: skip
    config = files.read_json(os.path.join(odd, "config.json"))
    config["rope_parameters"] = dict(rope_type="default", rope_theta=10.0)
    files.write_file(os.path.join(odd, "config.json"), json.dumps(config))
    cfg = replace(cfg, max_turns=2, eval_dialogues=6)
    engine, user, reward = simulator.load_cast(cfg)
    order, load = [], engines.load_engine
    for name in ("sleep", "update"):
        monkeypatch.setattr(engine, name, lambda *x, name=name, real=getattr(engine, name): (order.append(name), real(*x)))
    monkeypatch.setattr(engines, "load_engine", lambda path, cfg, *who: (order.append(who), load(path, cfg, *who))[1])
    results, played = evaluate.evaluate({"odd": odd, "same": base}, str(tmp_path), engine, user, reward, cfg)
    assert order == ["update", "update", "sleep", ("other", 1), "sleep"]  # in the place of one that sleeps, and last
    assert list(results) == ["base", "odd", "same"] and "kl" not in results["odd"] and results["same"]["kl"] == 0
    assert results["odd"]["length"] and results["same"]["length"]
    monkeypatch.setattr(engines, "vocabulary", lambda path: path)  # two vocabularies: numbers of tokens say nothing
    again, _ = evaluate.evaluate({"odd": odd, "same": base}, str(tmp_path), engine, user, reward, cfg)
    assert not again["odd"].keys() & {"length", "win_controlled", "avg_controlled"} and again["odd"]["win"] == results["odd"]["win"]
    own = engines.load_engine(odd, cfg)
    alone = simulator.rollout(simulator.test_prompts(cfg, own.tokenizer), own, user, [2] * 6)
    assert [d.ids for d in played["odd"]] == [d.ids for d in alone] != [d.ids for d in played["base"]]
    assert [d.ids for d in played["same"]] == [d.ids for d in played["base"]]
    assert "| odd |" in report.table(results)


# --- policies behind a server -----------------------------------------------------------------------------------


def clerk_at(serve, fails=lambda body: False):
    """A server that plays the clerk of the toy: it proposes and asks; cut where it may say fewer than 16 tokens."""
    server = serve(None)

    def reply(body):
        if fails(body):
            return 500, b"overloaded"
        finish = "stop" if body["max_tokens"] == 16 else "length"
        said = "try the small red wool hat . which " + ("size ?", "kind ?")[body["seed"] % 2]
        return 200, json.dumps({"choices": [{"message": {"content": said}, "finish_reason": finish}]}).encode()

    server.reply = reply
    return server


def test_a_policy_behind_a_url_is_played_by_its_texts_and_what_it_cannot_tell_is_a_dash(base, tmp_path, capsys, serve):
    server, out = clerk_at(serve), str(tmp_path / "out")
    run_main(["--policy", f"clerk={server.url}#org/clerk", f"again={base}", "--out", out], base)
    results, printed = files.read_json(f"{out}/results.json"), capsys.readouterr().out
    assert list(results) == ["base", "clerk", "again"] and results["again"]["win"] == [50.0, 50.0]
    assert {"win", "low", "avg", "reward", "dialogues"} <= results["clerk"].keys() and results["clerk"]["failed"] == 0
    assert not results["clerk"].keys() & {"kl", "kl_turn", "length", "win_controlled", "avg_controlled"}
    assert re.search(r"^\| clerk \| [\d.]+ \| - \| - \| - \| - \| - \| - \| - \|$", printed, re.M)
    played = [Dialogue.from_json(row) for row in files.read_sealed(f"{out}/eval/clerk.jsonl")]
    bodies = [body for _, _, body in server.requests[1:]]  # after the one that looks whether it is there
    assert len(bodies) == 20 == len({body["seed"] for body in bodies}) and {b["model"] for b in bodies} == {"org/clerk"}
    sent = sorted(json.dumps(body["messages"]) for body in bodies)
    assert sent == sorted(json.dumps(d.messages[:n]) for d in played for n in (1, 3))
    assert {(b["temperature"], b["max_tokens"]) for b in bodies} == {(1.0, 16)} and not any(d.ids for d in played)
    asked = len(server.requests)
    run_main(["--policy", f"clerk={server.url}#org/clerk", f"again={base}", "--out", out, "--judge", "world"], base)
    assert len(server.requests) == asked  # what is played is kept
    with pytest.raises(SystemExit):
        run_main(["--policy", f"clerk={server.url}#org/other", f"again={base}", "--out", out], base)
    assert "another weights" in capsys.readouterr().err


def test_answers_that_are_cut_or_absent_are_counted_and_too_many_stop_the_command(cfg, serve, capsys, base, tmp_path):
    lost = simulator.test_prompts(cfg, toy.make_tokenizer())[3].messages[0]["content"]
    server = clerk_at(serve, lambda body: body["messages"][0]["content"] == lost and len(body["messages"]) > 1)
    cfg = replace(cfg, max_turns=2, max_new_tokens=9, max_failures=0.3)
    policy = outside.OutsidePolicy(Server(server.url, "m", tries=2, pause=0.01, threads=4, max_tokens=9), cfg)
    prompts = [d.copy(ids=[]) for d in simulator.test_prompts(cfg, toy.make_tokenizer())]
    played = simulator.rollout(prompts, policy, toy.Customer(), [2] * 8)
    gone = [d.failed for d in played if d.messages[0]["content"] == lost]
    assert set(gone) == {"policy"} and [d.failed for d in played].count("policy") == len(gone) < 8
    assert all(d.truncated == [True, True] for d in played if not d.failed) and "500 overloaded" in policy.why
    path = f"{clerk_at(serve, lambda body: len(body['messages']) > 1).url}#m"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outside, "how", lambda cfg: dict(tries=1, temperature=1.0))
        with pytest.raises(SystemExit):
            run_main(["--policy", f"gone={path}", "--out", str(tmp_path / "out")], base)
    error = capsys.readouterr().err
    last = error.splitlines()[-1]  # behind the bars
    assert last.startswith(f"evaluate.py: --policy {path} (HTTP 500 overloaded) failed in ") and "Traceback" not in error


def test_a_reward_that_counts_tokens_is_refused_for_a_policy_whose_tokens_are_not_known(cfg, serve):
    """They would cost nothing: each span would be (0, 0)."""
    policy = outside.OutsidePolicy(Server(clerk_at(serve).url, "m", tries=1, threads=2, max_tokens=16), cfg)
    prompts = [d.copy(ids=[]) for d in simulator.test_prompts(cfg, toy.make_tokenizer())]
    played = simulator.rollout(prompts, policy, toy.Customer(), [2] * 8)
    assert simulator.score(lambda ds: [d.turns + len(d.messages) for d in ds], played) == [6.0] * 8
    for count in (lambda d: len(d.ids), lambda d: sum(b - a for a, b in d.spans), lambda d: d.tokens_said()):
        with pytest.raises(BadInput, match="tokens of a policy behind a server are not known"):
            simulator.score(lambda ds: [count(d) for d in ds], played)  # noqa: B023


def test_the_node_serves_a_policy_as_it_serves_a_user(base, tmp_path, capsys, monkeypatch):
    script = os.path.join(ROOT, "tests", "served.py")
    serving = lambda path, port, name, *_: [sys.executable, script, "fake", str(port), name]  # noqa: E731
    monkeypatch.setattr(machinery_serve, "command", serving)
    monkeypatch.setattr(machinery_serve, "check_vllm", lambda flag: None)
    machinery_serve.start.cache_clear()
    out = str(tmp_path / "out")
    run_main(["--policy", f"big=serve:{base}", "--out", out], base)
    (row,) = {d["messages"][1]["content"] for d in files.read_sealed(f"{out}/eval/big.jsonl")}
    assert row == "Question: go on" and "kl" not in files.read_json(f"{out}/results.json")["big"]
    assert os.path.exists(f"{out}/policy_0.log")
    machinery_serve.start.cache_clear()


BAD = [
    ("", "--policy"),
    ("--policy nowhere/at/all", "nowhere/at/all"),
    ("--policy {trained} {trained}", "NAME="),
    ("--policy base={trained}", "base is the reference"),
    ("--policy {trained} --judge http://localhost/v1", "--judge-model"),
    ("--policy {trained} --judge-model gpt-4-0613", "--judge-model is for a URL"),
    ("--policy {trained} --judge world --judge-context 9000", "--judge-context is for a URL"),
    ("--policy {trained} --judge world --judge-tokens 9", "--judge-tokens is for a language model"),
    ("--policy http://localhost/v1", "URL#MODEL"),
    ("--policy http://127.0.0.1:9/v1#m", "does not answer"),
    ("--policy ftp://localhost/v1#m", "http(s)"),
    ("--policy serve:no/such/policy", "no/such/policy"),
    ("--policy a=serve:{base} b=serve:{trained}/iter_2/policy", "one more model"),
    ("--policy {trained} --judge ftp://localhost/v1 --judge-model m", "http(s)"),
    ("--policy {trained} --judge no/such/judge", "no/such/judge"),
    ("--policy {trained} --judg reward", "--judg"),
    ("--policy {trained} --eval-dialogues 100000", "100000"),
    ("--policy {trained} --reference runs/none", "runs/none"),
    ("--policy {trained} --user nobody", "nobody"),
    ("--policy {trained} --out {file}", "not a folder"),
    ("--policy {trained} --setting three", "three"),
]


@pytest.mark.parametrize("flags, word", BAD)
def test_bad_input_is_one_line_and_exit_code_2_before_a_model_is_loaded(
    flags, word, trained, base, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(engines, "load_engine", lambda *_: pytest.fail("a model would have been loaded"))
    monkeypatch.setattr(machinery_serve, "check_vllm", lambda flag: None)
    monkeypatch.setattr(outside, "how", lambda cfg: dict(tries=1))
    (tmp_path / "file").write_text("a file")
    with pytest.raises(SystemExit) as stop:
        flags = flags.format(trained=trained, base=base, file=tmp_path / "file")
        run_main(["--out", str(tmp_path / "out"), *flags.split()], base)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and word in error and "Traceback" not in error


def test_a_policy_at_a_server_plays_at_the_evaluations_temperature(cfg):
    assert outside.server("http://h/v1#m", cfg).options["temperature"] == cfg.temperature
    assert outside.server("http://h/v1#m", replace(cfg, eval_temperature=0.01)).options["temperature"] == 0.01
