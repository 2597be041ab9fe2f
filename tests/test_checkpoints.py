"""What may stand in a checkpoint's folder, and numbers beyond which AdamW or an engine does something else."""
import json
import math
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import families as every  # tests/families.py
import refuel
from helpers import broken_checkpoint, random_pairs
from machinery import engines, families, files, fsdp, run
from machinery.files import BadInput
from machinery.settings import ETA, LR

# ---------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------


def change_weights(change):
    def edit(path):
        file = os.path.join(path, "model.safetensors")
        weights = load_file(file)
        change(weights)
        save_file(weights, file, metadata={"format": "pt"})

    return edit


def change_config(**values):
    def edit(path):
        file = os.path.join(path, "config.json")
        files.write_file(file, json.dumps(files.read_json(file) | values))

    return edit


def beside(name):
    """Another state of the same weights in the folder."""

    def edit(path):
        weights = load_file(os.path.join(path, "model.safetensors"))
        for tensor in weights.values():
            tensor += 1
        save_file(weights, os.path.join(path, name), metadata={"format": "pt"})

    return edit


def indexed(path):
    names = load_file(os.path.join(path, "model.safetensors"))
    shard = "model-00001-of-00001.safetensors"
    index = {"weight_map": dict.fromkeys(names, shard)}
    os.rename(os.path.join(path, "model.safetensors"), os.path.join(path, shard))
    files.write_file(os.path.join(path, files.INDEX), json.dumps(index))


def set_one(name, value):
    return change_weights(lambda w: w[name].view(-1)[3:4].fill_(value))


NORM, HEAD, EMBEDDING = "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize("change, word", [
    (beside("ema.safetensors"), "both hold lm_head.weight"),
    (beside("consolidated.safetensors"), "both hold lm_head.weight"),
    (change_config(num_hidden_layers=2), "does it name too few layers"),
    (change_config(num_hidden_layers=4), "lacks 9 weights that its config.json asks for"),
    (change_config(intermediate_size=255), r"mlp.down_proj.weight is \[96, 256\]"),
    (change_weights(lambda w: w.pop(NORM)), "lacks 1 weights"),
    (change_weights(lambda w: w.update(extra=torch.ones(2))), "no place for, extra"),
])
def test_a_folder_that_leaves_doubt_is_refused_before_anything_is_loaded(base, tmp_path, change, word):
    path = broken_checkpoint(base, tmp_path / "broken", change)
    with pytest.raises(BadInput, match=word):
        families.check_policy(files.find_checkpoint(path))


def test_what_the_index_does_not_name_is_not_read(base, tmp_path):
    def both(path):
        beside("ema.safetensors")(path)
        indexed(path)

    path = files.find_checkpoint(broken_checkpoint(base, tmp_path / "both", both))
    assert files.weight_files(path) == [os.path.join(path, "model-00001-of-00001.safetensors")]
    want = load_file(os.path.join(base, "model.safetensors"))
    read = dict(files.read_weights(path))
    trained = dict(fsdp.full_weights(fsdp.load_policy(path, every.CFG)))
    for name, tensor in want.items():
        assert torch.equal(read[name], tensor) and torch.equal(trained[name], tensor)


def test_without_an_index_model_safetensors_alone_is_read(base, tmp_path):
    def adapter(path):
        save_file({"lora": torch.ones(2)}, os.path.join(path, "adapter.safetensors"))

    path = broken_checkpoint(base, tmp_path / "adapter", adapter)
    assert files.weight_files(files.find_checkpoint(path)) == [os.path.join(path, "model.safetensors")]


def test_the_run_itself_looks_at_policy_and_reference_first(base, tmp_path):
    path = broken_checkpoint(base, tmp_path / "broken", change_config(num_hidden_layers=2))
    for flag in ("--policy", "--reference"):
        flags = ["--setting", "toy", "--policy", base, "--out", str(tmp_path / "run"), flag, path]
        with pytest.raises(BadInput, match="too few layers"):
            refuel.prepare(refuel.read_config(flags))


def test_two_weights_that_are_tied_may_not_differ(tmp_path):
    config = every.tiny_config("qwen2")
    config.tie_word_embeddings = True
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    change_weights(lambda w: w.update({HEAD: w[EMBEDDING].clone()}))(tmp_path)
    fsdp.load_policy(str(tmp_path), every.CFG)
    set_one(HEAD, 2.0)(tmp_path)
    with pytest.raises(BadInput, match="ties"):
        fsdp.load_policy(str(tmp_path), every.CFG)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_neither_trained_nor_played_nor_measured(base, tmp_path, value):
    path, model = broken_checkpoint(base, tmp_path / "nan", set_one(NORM, value)), fsdp.load_policy(base, every.CFG)
    with pytest.raises(BadInput, match="norm.weight is not finite"):
        fsdp.load_policy(path, every.CFG)
    with pytest.raises(BadInput, match="norm.weight is not finite"):
        fsdp.read_slices(model, path)  # evaluation's KL
    with pytest.raises(BadInput, match="norm.weight is not finite"):
        dict(files.read_weights(path))  # an engine's new weights


def test_weights_that_are_not_finite_are_never_saved(base, tmp_path, cfg):
    model = fsdp.load_policy(base, cfg)
    optimizer = refuel.make_optimizer(model, cfg)
    with torch.no_grad():
        model.model.norm.weight.to_local()[0] = math.nan
    with pytest.raises(BadInput, match="norm.weight is not finite"):
        fsdp.save_policy(str(tmp_path / "policy"), model, base)
    with pytest.raises(BadInput, match="norm.weight/weight is not finite"):
        fsdp.save_training(str(tmp_path), model, optimizer, 0)
    assert not os.path.exists(tmp_path / "policy") and os.listdir(tmp_path / "training") == []


@pytest.mark.parametrize("name", ["qwen2", "phi3", "olmo2", "llama"])
def test_a_cache_is_measured_without_head_dim(tmp_path, name):
    config = every.tiny_config(name)
    config.save_pretrained(tmp_path)
    assert engines.cache_bytes(str(tmp_path)) == 2 * 4 * 4 * 2 * 8  # keys and values, float32, layers, groups, head_dim


# ---------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, word", [
    ("--eta 1e19", "--eta must be in"),
    ("--eta 1e-6", "--eta must be in"),
    ("--lr 1e3", "--lr must be in"),
    ("--lr 1e-10", "--lr must be in"),
    ("--lr 0.1 --weight-decay 11", "--weight-decay must be less than"),
    ("--engine vllm --temperature 0.009", "--temperature must be at least 0.01"),
])
def test_a_number_beyond_which_something_else_happens_is_refused(base, flags, word):
    with pytest.raises(BadInput, match=word):
        refuel.read_config(["--setting", "toy", "--policy", base, *flags.split()])


def test_transformers_samples_at_any_temperature(base):
    refuel.read_config(["--setting", "toy", "--policy", base, *"--engine transformers --temperature 0.009".split()])


def furthest_step(eta, sizes=(0.0, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-4, 1e-2, 1.0)):
    """The furthest that AdamW moves a weight in its first steps, in units of lr; gradients of these sizes in the
    released loss, which Eq. 1 divides by eta^2."""
    weight = torch.zeros(len(sizes), requires_grad=True)
    model = SimpleNamespace(parameters=lambda: [weight])
    optimizer = refuel.make_optimizer(model, SimpleNamespace(lr=1.0, eta=eta, weight_decay=0.0))
    furthest = 0.0
    for _ in range(3):
        before = weight.detach().clone()
        weight.grad = (torch.tensor(sizes, dtype=torch.float64) / eta**2).float()
        optimizer.step()
        step = (weight.detach() - before).abs().max().item()
        furthest = max(furthest, step) if math.isfinite(step) else math.inf
    return furthest


@pytest.mark.parametrize("eta", [ETA[0], 1.0, 1e3, ETA[1]])
def test_within_the_bounds_of_eta_adamw_moves_no_weight_by_more_than_lr(eta):
    assert 0.9 < furthest_step(eta) < 1.01


@pytest.mark.parametrize("eta", [1e12, 1e19])
def test_beyond_them_it_does(eta):
    assert furthest_step(eta) > 100


def test_within_the_bounds_of_lr_a_step_is_neither_lost_nor_larger_than_a_weight():
    weight = torch.tensor([0.02])
    assert weight + LR[0] != weight and weight + LR[0] / 10 == weight
    assert LR[1] <= 0.1


# ---------------------------------------------------------------------------------------------------------------
# Engine and trainer
# ---------------------------------------------------------------------------------------------------------------


def pairs_said(gap):
    """Pairs whose engine is `gap` nats a token away from the log-probs beside them."""
    pairs, logps = [], []
    for pair in random_pairs(6):
        logp = [-2.0 * len(pair.y), -3.0 * len(pair.y2)]
        said = (logp[0] + gap * len(pair.y), logp[1] - gap * len(pair.y2))
        pairs.append(pair._replace(engine_logps=said))
        logps.append(logp)
    return pairs, logps


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_an_engine_that_is_too_far_from_the_trainer_stops_the_run(monkeypatch, kind):
    monkeypatch.setattr(run, "dtype", lambda: kind)
    run.check_gap(run.engine_gap(*pairs_said(0.9 * run.MOST_GAP[kind])), 1)
    with pytest.raises(BadInput, match="was not updated, a second weight file .* clamps, or another checkpoint"):
        run.check_gap(run.engine_gap(*pairs_said(1.1 * run.MOST_GAP[kind])), 1)


def test_responses_of_a_data_set_have_no_engine_and_stop_nothing():
    pairs, logps = pairs_said(0.0)
    pairs = [pair._replace(engine_logps=(math.nan, math.nan)) for pair in pairs]
    assert run.engine_gap(pairs, logps) is None
    run.check_gap(None, 1)


def test_an_engine_that_never_updates_stops_the_second_iteration(cfg, monkeypatch):
    monkeypatch.setattr(engines.TransformersEngine, "update", lambda self, weights: list(weights) and None)
    cfg = replace(cfg, iterations=2, lr=1e-3)
    refuel.open_folder(cfg, lambda cfg: {})
    with pytest.raises(BadInput, match="iteration 2: the engine that sampled differs"):
        refuel.train(cfg)
    assert not os.path.exists(os.path.join(cfg.out, "iter_2", "logps.jsonl"))  # the same command stops again
