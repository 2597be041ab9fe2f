"""--plan: closed forms against enumeration, real models and a real collection; its memory against the real training of the
8B shape on tensors without numbers (tests/rehearse.py), measured memory on CPUs by `python tests/memory.py RANKS`."""
import os
import re
import subprocess
import sys
import weakref
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import simulator
import pytest
import torch

from machinery import engines
from machinery import logps
from machinery import plan
import refuel
import toy
from helpers import ROOT
from machinery.files import BadInput
from machinery.run import Run

DEFAULTS = {name: options.get("default", False) for name, options in plan.FLAGS.items()}


@pytest.mark.parametrize("max_turns, expected", [(1, (1, 1)), (5, (3, 2))])
def test_the_law_has_the_papers_means(max_turns, expected):
    assert plan.law(max_turns) == pytest.approx(expected)
    h, H = refuel.sample_resets(100_000, 7, np.random.default_rng(0))
    assert plan.law(7) == pytest.approx((H.mean(), h.mean()), rel=0.01)


@pytest.mark.parametrize("more", [{}, dict(num_key_value_heads=2, head_dim=16), dict(tie_word_embeddings=True)])
def test_parameters_and_cache_are_those_of_the_model(more, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, vocab_size=99,
                         **more)  # fmt: skip
    config.save_pretrained(tmp_path)
    m = plan.shape(str(tmp_path))
    model = LlamaForCausalLM(config)
    assert m.P == sum(p.numel() for p in model.parameters()) and m.layers * m.layer + m.root == m.P
    cache = model(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
    held = sum(x.numel() for layer in cache.layers for x in (layer.keys, layer.values))
    assert 3 * m.cache == 2 * held  # bytes in bfloat16


def test_the_papers_models_have_their_published_sizes_and_the_toy_its_own(base):
    sizes = [plan.shape(name).P / 1e9 for name in ("meta-llama/Meta-Llama-3-8B-Instruct", "meta-llama/Llama-3.1-70B-Instruct")]
    assert sizes == pytest.approx([8.0303, 70.5537], abs=1e-4) and plan.shape("toy") == plan.shape(base)


class Clerk:
    """A policy that needs no model, and counts."""

    def __init__(self):
        self.tokenizer, self.count, self.max_new_tokens = toy.make_tokenizer(), Counter(), 16

    def answer(self, dialogues):
        answers = []
        for d in dialogues:
            text = toy.clerk(d.messages, toy.random.Random(d.seed("policy")), 0.9, 0.9, 0.5) + " <|end|>"
            answers.append((self.tokenizer.encode(text, add_special_tokens=False), False, -1.0))
        self.count["policy: sampled"] += sum(len(ids) for ids, *_ in answers)
        return answers


def test_tokens_are_those_of_a_real_collection(cfg):
    clerk, n = Clerk(), 1500
    pairs = refuel.collect(simulator.train_prompts(replace(cfg, num_prompts=n), clerk.tokenizer, 1), clerk, toy.Customer(),
                           toy.Reward(), cfg, np.random.default_rng(0))  # fmt: skip
    answers = [end - start for p in pairs for d in p.dialogues for start, end in d.spans]
    questions = [start - before for p in pairs for d in p.dialogues
                 for (start, _), before in zip(d.spans, [0] + [end for _, end in d.spans])]  # fmt: skip
    count = clerk.count | Counter({
        "reward: read": sum(len(d.ids) for p in pairs for d in p.dialogues),
        "trainer: forward and backward": sum(logps.pair_length(p) for p in pairs),
        "policy: prefilled": sum(d.spans[h][0] - (d.spans[h - 1][1] if h else 0) for p in pairs for k, d in
                                 enumerate(p.dialogues) for h in range(p.h if k else 0, p.H)),
    })  # fmt: skip
    planned = plan.tokens(cfg, np.mean(answers), np.mean(questions), 0)
    for name in count:
        made = n if name == "policy: sampled" else len(pairs)  # identical responses were played and dropped
        assert count[name] / made == pytest.approx(planned[name], rel=0.05), name
    assert planned["user: sampled"] == 0  # a scripted customer


def test_a_plan_needs_no_model_and_says_what_does_not_fit(capsys, monkeypatch):
    monkeypatch.setattr(refuel, "start_processes", lambda: pytest.fail("something was started"))
    for setting in ("toy", "one", "two"):
        refuel.main(["--setting", setting, "--plan"])
        text = capsys.readouterr().out
        assert all(f"| {phase} |" in text for phase in ("collect", "train", "evaluate: KL")) and "hours" in text
    with pytest.raises(SystemExit) as stop:
        refuel.main("--setting one --plan --gpus 2".split())
    assert stop.value.code == 2 and "1 x 2 GPUs of 79.0 GiB" in (said := capsys.readouterr()).err
    assert "| train |" in said.out and "hours" not in said.out  # no tidy sum below what does not fit
    assert plan.machine(DEFAULTS | {"gpu": "l40s", "tflops": 5.0})["tflops"] == 5.0
    assert plan.machine(DEFAULTS | {"gpu": "l40s"})["gpu_memory"] == 44.4


def test_every_phase_of_setting_one_fits_80_gb_and_the_engines_get_all_that_is_left():
    cfg = refuel.read_config(["--setting", "one"])
    phases, held = plan.memory(cfg, DEFAULTS)
    sums = {phase: sum(row.values()) / plan.GIB for phase, row in phases.items()}
    assert max(sums.values()) <= 79 * (1 - plan.SPARE) and sums["collect"] == pytest.approx(79 * (1 - plan.MARGIN))
    assert cfg.wave <= held["policy"] < 1.1 * cfg.wave and held["user"] > 100
    wake = phases["wake"]  # the engine's weights beside the trainer's, without Adam's moments
    assert wake["policy's engine"] > 2 * 8.03e9 and wake["trainer"] < 4 * 8.03e9 / 8 + 6 * plan.GIB


@pytest.mark.parametrize("flags, machine, words", [
    ("--activation-checkpointing none", {}, "train: .* it fits with --activation-checkpointing selective or"),
    ("--micro-tokens 8192 --activation-checkpointing selective", {},
     "it fits with --micro-tokens 4096 or --activation-checkpointing full or --user URL"),
    ("--activation-checkpointing none --micro-tokens 8192", {"gpu_memory": 60.0},
     "it fits with --micro-tokens 4096 and --activation-checkpointing full and --user URL"),
    ("", {"gpus": 4}, "it fits with --user URL --user-model NAME or 8 GPUs a node"),
    ("", {"ranks": 1}, "with 1 process .* it fits with torchrun --nproc_per_node 8"),
    ("", {"gpu": "4090"}, "it needs more GPUs, larger ones, or smaller models"),
    ("", {"host_memory": 40.0}, "the host's memory: 1[0-9].. GiB are missing"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_with_the_flags_that_make_it_fit(flags, machine, words):
    cfg = refuel.read_config(["--setting", "one", *flags.split()])
    x = plan.machine(DEFAULTS | machine) | {k: v for k, v in machine.items() if k == "ranks"}
    with pytest.raises(BadInput, match=words) as refused:
        plan.check(cfg, x)
    for flag in re.findall(r"--(?:micro-tokens|activation-checkpointing) \w+", str(refused.value).partition("fits with")[2]):
        if " and " not in str(refused.value):
            plan.check(refuel.read_config(["--setting", "one", *flags.split(), *flag.split()]), x)


@pytest.fixture
def gpus(monkeypatch):
    """Eight processes on a machine that says it has eight H100s."""
    total = 79 * plan.GIB
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=total))
    monkeypatch.setattr(plan.os, "sysconf", lambda name: 2**20)  # 1 TiB
    return total


def test_vllm_is_told_the_bytes_of_the_plan_and_what_must_be_free(gpus, monkeypatch):
    cfg = refuel.read_config(["--setting", "one"])
    parts = plan.engine_parts(cfg, 8, 8, gpus)
    for name in ("policy", "user"):
        share = engines.gpu_share(cfg, name)
        assert share.cache == int(parts[name].cache) and share.utilization == parts[name].awake / gpus < 0.6
    monkeypatch.setenv("WORLD_SIZE", "4")  # of the processes that there are, not of the GPUs
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert engines.gpu_share(cfg, "policy").cache == int(plan.engine_parts(cfg, 8, 4, gpus)["policy"].cache) < parts["policy"].cache


def test_a_stranger_gets_the_place_of_the_engine_that_sleeps(gpus):
    cfg, m = refuel.read_config(["--setting", "one"]), plan.shape("meta-llama/Meta-Llama-3-8B-Instruct")
    policy = plan.engine_parts(cfg, 8, 8, gpus)["policy"]
    share = plan.engine_share(cfg, "other", cfg.policy)
    assert share.cache + sum(plan.engine_part(m)) <= policy.awake - policy.graphs < share.cache + sum(plan.engine_part(m)) + 2
    with pytest.raises(BadInput, match="does not fit into what the policy's engine leaves"):
        plan.engine_share(cfg, "other", cfg.policy, among=2)


def test_a_run_that_does_not_fit_its_gpus_is_refused_at_its_start(gpus, monkeypatch, cfg):
    plan.check(refuel.read_config(["--setting", "one"]))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="GiB are missing on 1 x 2 GPUs of 79.0 GiB with 2 processes"):
        plan.check(refuel.read_config(["--setting", "one"]))
    plan.check(cfg)  # the toy


def test_the_plan_is_the_real_training_of_the_8b_shape_on_eight_ranks():
    """Four of its layers; all 32: results/rehearsal.md."""
    done = subprocess.run([sys.executable, os.path.join(ROOT, "tests", "rehearse.py"), "--layers", "4"], capture_output=True,
                          text=True, timeout=600)  # fmt: skip
    rows = re.findall(r"^\| (\w+) \| (.+?) \| ([\d.]+) \| [\d.]+ \| ([-+][\d.]+) % \|$", done.stdout, re.M)
    phases = plan.memory(refuel.read_config(["--setting", "one"]), DEFAULTS)[0]
    assert {phase for _, phase, _, _ in rows} == set(phases), done.stderr[-2000:]
    assert [kind for kind, phase, _, _ in rows if phase == "train"] == ["none", "selective", "full"]
    for kind, phase, peak, off in rows:
        assert abs(float(off)) <= 5 and float(peak) > 0.5, (kind, phase, off)
    flops = dict(re.findall(r"(none|selective|full) (\S+) FLOPs", done.stdout))
    assert flops["none"] == flops["selective"] and 1.1 < float(flops["full"]) / float(flops["none"]) < 4 / 3


def test_the_moments_are_gone_when_the_engine_wakes(cfg, monkeypatch):
    """Freed by the loop itself: not by a collection of garbage that comes when it likes."""
    cast, moments, seen = simulator.load_cast(replace(cfg, num_prompts=8, batch_size=8)), [], []
    step = torch.optim.AdamW.step

    def watched(optimizer, *args):
        step(optimizer, *args)
        moments.extend(weakref.ref(state["exp_avg"]) for state in optimizer.state.values())

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    monkeypatch.setattr(cast[0], "update", lambda weights: seen.append([ref() is None for ref in moments]))
    refuel.train(replace(cfg, num_prompts=8, batch_size=8), cast)
    assert seen[0] == [] and len(seen) == 2 and len(seen[1]) > 20 and all(seen[1])


@pytest.mark.parametrize("more", [{}, dict(policy_every=2), dict(train_layers=1)])
def test_pi_0_is_planned_for_wherever_a_run_keeps_it(more, cfg):
    """Eq. 11 is not setting two's alone: --gamma keeps the first weights that learn in any setting."""
    cfg = replace(cfg, gamma=0.1, **more)
    run = Run(cfg, refuel.load_policy(cfg.policy, cfg), None)
    kept = sum(4 * p.numel() for p in run.pi_0.values())
    m = plan.shape(cfg.policy)
    without, planned = (plan.trainer(m, replace(cfg, gamma=gamma), 1, 1, (100, 50), c=4) for gamma in (0.0, 0.1))
    copies = {phase: round((planned[phase] - without[phase]) / kept, 3) for phase in planned}
    assert copies == {"collect": 1, "check": 0, "log-probs": 2, "train": 1, "save": 1, "wake": 1, "evaluate: KL": 0}


@pytest.mark.parametrize("heads, groups, gpus, expected", [
    (64, 8, 8, 8), (32, 8, 8, 8), (9, 3, 8, 3), (64, 8, 6, 4), (1, 1, 4, 1), (12, 12, 8, 6), (32, 8, 1, 1),
])  # fmt: skip
def test_tensor_parallelism_divides_the_heads(heads, groups, gpus, expected):
    assert plan.tensor_parallel(plan.Shape(1, 1, 1, heads, groups, 1, 1, 0), gpus) == expected


def test_a_layer_that_runs_again_as_a_whole_leaves_only_its_input():
    one, pair = refuel.read_config(["--setting", "one", "--micro-tokens", "3072"]), (2048, 1024)
    m = plan.shape(one.policy)
    train = {kind: plan.trainer(m, replace(one, activation_checkpointing=kind), 1, 1, pair)["train"]
             for kind in ("none", "selective", "full")}  # fmt: skip
    T, more = one.micro_tokens, 4 * m.D + 2 * m.groups * m.head_dim + 2 * m.I  # beside the input
    assert train["selective"] - train["full"] == pytest.approx(2 * T * more * m.layers, rel=0.02)
    assert train["none"] > train["selective"]


def test_host_memory_of_pairs_is_that_of_pairs(cfg):
    """Against the interpreter's own count, on pairs as a run reads them back."""
    import json
    import tracemalloc

    clerk = Clerk()
    prompts = simulator.train_prompts(replace(cfg, num_prompts=300), clerk.tokenizer, 1)
    pairs = refuel.collect(prompts, clerk, toy.Customer(), toy.Reward(), cfg, np.random.default_rng(0))
    lines = [json.dumps(pair.to_json()) for pair in pairs]
    unique = np.mean([logps.pair_length(pair) for pair in pairs])
    tracemalloc.start()
    held = [refuel.Pair.from_json(json.loads(line)) for line in lines]
    measured = tracemalloc.get_traced_memory()[0] / len(held)
    tracemalloc.stop()
    assert 0.6 * measured < 4 * unique + 1000 < 1.6 * measured


def test_an_unknown_model_is_named():
    with pytest.raises(BadInput, match="no-such/model"):
        plan.shape("no-such/model")


@pytest.mark.parametrize("command", re.findall(r"^python refuel.py (.*--plan.*)$", open(os.path.join(ROOT, "docs", "recipes.md")).read(), re.M))
def test_every_recipe_fits(command, tmp_path, monkeypatch, capsys):
    page = open(os.path.join(ROOT, "docs", "world.md")).read()
    (tmp_path / "tutor.py").write_text(re.findall(r"```python\n(.*?)```", page, re.S)[0])
    monkeypatch.chdir(tmp_path)
    refuel.main(command.split())
    text = capsys.readouterr().out
    assert "hours and the evaluation" in text and ("the user's server:" in text) == ("https" in command)


def test_what_a_paid_user_reads_and_writes_is_counted_request_by_request():
    cfg = refuel.read_config("--setting one --user http://localhost/v1 --user-model m --num-prompts 1000".split())
    x = plan.machine(DEFAULTS | dict(answer_tokens=10.0, question_tokens=4.0, justification_tokens=3.0))
    rng, total = np.random.default_rng(0), np.zeros(3)
    for law in ("paper", "uniform"):
        h, H = refuel.sample_resets(20_000, 5, rng, law)
        total[:] = 0
        for first, last in zip(h, H):
            for answers in [*range(1, last), *range(first, last)]:
                total += (answers * 14 + plan.INSTRUCTIONS, 7, 1)
        assert plan.asked_of_a_url(replace(cfg, reset_law=law), x) == pytest.approx(total / 20, rel=0.02)


@pytest.mark.parametrize("law", ["paper", "uniform"])
def test_a_waves_dialogues_in_flight_are_those_of_drawn_resets(law):
    h, H = refuel.sample_resets(200_000, 5, np.random.default_rng(0), law)
    now = [((H >= turn).astype(int) + ((h <= turn) & (turn <= H))).mean() for turn in range(1, 6)]
    most, turns = plan.in_flight(5, law)
    assert most == pytest.approx(max(now), abs=0.01)
    assert turns == pytest.approx(max(n * turn for turn, n in enumerate(now, 1)), abs=0.02)


@pytest.mark.parametrize("flags", ["--gpus 0", "--gpus x", "--mfu 0", "--answer-tokens 0", "--bandwidth -1", "--tflops nan"])
def test_a_number_of_the_plan_that_is_none_is_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        refuel.main(["--setting", "one", "--plan", *flags.split()])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "must be a positive number" in error


def test_setting_twos_training_is_planned_as_it_is():
    """Four layers learn, Eq. 11 reads pi_0 as well; PaLM's 6 FLOPs a parameter and token hold where all learn."""
    x = plan.machine(DEFAULTS)
    rows = {}
    for name, more in (("ultra", []), ("hh", ["--dataset", "hh"]), ("all", ["--train-layers", "0"])):
        cfg = refuel.read_config(["--setting", "two", "--iterations", "1", *more])
        rows[name] = plan.hours(cfg, x, plan.memory(cfg, x)[1])
    m = plan.shape("meta-llama/Meta-Llama-3-8B-Instruct")
    tokens, flops, _ = rows["all"]["trainer: forward and backward"]
    assert flops == pytest.approx(6 * m.P * tokens)
    tokens, flops, _ = rows["ultra"]["trainer: forward and backward"]
    assert flops == pytest.approx(2 * m.P * tokens + 4 * 4 * m.layer * tokens + 2 * m.V * m.D * tokens)
    once, twice = rows["ultra"]["trainer: forward for ln pi_t"], rows["hh"]["trainer: forward for ln pi_t, ln pi_0"]
    assert twice[1] == pytest.approx(2 * once[1])
