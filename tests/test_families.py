"""ln pi of every family is right or refused; each guard by itself, the check at load, buffers and dropout."""
import os
import re
import subprocess
from types import SimpleNamespace

import pytest
import torch
import transformers

import families as every  # tests/families.py: the enumeration
from helpers import ROOT, on, random_pairs
from machinery import families, fsdp, logps
from machinery.files import BadInput
from machinery.logps import pair_logps, visible

RIGHT = """arcee bitnet cwm diffllama ernie4_5 exaone4 gemma gemma3_text glm glm4 helium hunyuan_v1_dense hyperclovax
           jais2 llama ministral ministral3 mistral olmo olmo2 olmo3 persimmon phi3 qwen2 qwen3 seed_oss smollm3
           starcoder2 youtu""".split()


def saved(name, folder, **more):
    """A tiny random checkpoint of a family."""
    config = every.tiny_config(name)
    for key, value in more.items():
        setattr(config, key, value)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    every.randomise(model)
    model.save_pretrained(folder)
    return str(folder)


def test_every_family_is_right_or_refused_in_one_line(tmp_path):
    """All of transformers' causal language models, about 180, in ten seconds."""
    names = every.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    verdicts = {name: every.judge(name, str(tmp_path / name)) for name in names}
    right = [name for name, (verdict, _) in verdicts.items() if verdict == "right"]
    assert set(right) >= set(RIGHT) & set(names)
    for name, (verdict, words) in verdicts.items():
        assert verdict in ("right", "refused", "not built") and "\n" not in words, (name, verdict, words)
    assert sum(verdict == "not built" for verdict, _ in verdicts.values()) < 15
    page = open(os.path.join(ROOT, "docs", "families.md"), encoding="utf-8").read()
    assert set(re.findall(r"^\| ([\w-]+) \| right", page, re.M)) >= set(RIGHT)


@pytest.mark.parametrize("name, word", [
    ("mixtral", "mixtures of experts"),
    ("granite", "logits_scaling 8.0"),
    ("cohere", "logit_scale"),
    ("gemma2", "final_logit_softcapping"),
    ("phi", "lm_head has a bias"),
    ("qwen3_5_text", "linear_attention would let y' see y"),
    ("bamba", "conv1d would let y' see y"),
    ("gpt2", "Llama's shape"),
    ("gemma3", "models of text alone"),
    ("apertus", "holds more than weights"),
    ("nemotron", "is not told the lengths"),
    ("stablelm", "is not told the lengths"),
    ("granite_swa", "wants s_aux"),
    ("doge", "wants attention_mask"),
    ("minicpm3", "nats a token from the model's own forward"),
])
def test_a_refusal_names_the_true_reason(tmp_path, name, word):
    verdict, words = every.judge(name, str(tmp_path))
    assert verdict == "refused" and word in words


def test_quantised_weights_are_refused(tmp_path):
    path = saved("llama", tmp_path, quantization_config=dict(quant_method="fp8"))
    with pytest.raises(BadInput, match="quantised"):
        families.check_policy(path)


@pytest.mark.parametrize("name", ["phi", "granite", "nanochat", "bamba", "gemma2", "qwen3_5_text"])
def test_the_check_at_load_finds_what_is_on_no_list(tmp_path, monkeypatch, name):
    monkeypatch.setattr(families, "why_not", lambda model: None)
    monkeypatch.setattr(families, "check_stored", lambda model, path: None)
    with pytest.raises(BadInput, match="whose ln pi is not computed here"):
        fsdp.load_policy(saved(name, tmp_path), every.CFG)


@pytest.mark.parametrize("window", [8, 300])
def test_the_check_at_load_walks_beyond_the_window(tmp_path, monkeypatch, window):
    path = saved("mistral", tmp_path, sliding_window=window, max_position_embeddings=512)
    monkeypatch.setattr(logps, "visible", lambda n, total, window, device: visible(n, total, None, device))
    with pytest.raises(BadInput, match="nats a token from the model's own forward"):
        fsdp.load_policy(path, every.CFG)


def test_the_check_at_load_sees_another_pair_of_the_row(tmp_path, monkeypatch):
    """With y' that sees y: one shifted mask, and no family is right."""
    monkeypatch.setattr(logps, "visible", lambda n, total, window, device: visible(n, total, window, device).roll(1, 1))
    with pytest.raises(BadInput, match="nats a token"):
        fsdp.load_policy(saved("llama", tmp_path), every.CFG)


@pytest.mark.parametrize("kind, layers", [("none", 2), ("selective", 0), ("full", 2)])
def test_a_model_is_checked_as_it_will_be_trained(tmp_path, kind, layers):
    cfg = SimpleNamespace(train_layers=layers, activation_checkpointing=kind, replicas=1)
    model = fsdp.load_policy(saved("gemma3_text", tmp_path), cfg)
    pair_logps(model, every.some_pairs(20)).sum().backward()
    learned = [name for name, p in model.named_parameters() if p.grad is not None]
    assert model.training and len(learned) == sum(p.requires_grad for p in model.parameters())
    assert model.config._attn_implementation == "pairs"


@pytest.mark.parametrize("window", [1, 3, 8, 50, None])
def test_what_a_token_sees_is_itself_and_what_lies_before_it_within_the_window(window):
    n, total = 5, 12
    for i, row in enumerate(visible(n, total, window, "cpu").tolist()):
        place = total - n + i
        for t in range(total):
            assert row[t] == (t <= place and (window is None or place - t < window))


def test_dropout_of_a_configuration_is_left_out(tmp_path):
    path = saved("seed_oss", tmp_path, attention_dropout=0.3, residual_dropout=0.3)
    model, pairs = fsdp.load_policy(path, every.CFG).train(), every.some_pairs(10)
    assert torch.equal(pair_logps(model, pairs), pair_logps(model, pairs))


def test_a_buffer_that_a_model_forgets_to_fill_is_refused(tmp_path, monkeypatch):
    path = saved("gemma3_text", tmp_path)
    kind = type(families.build(path))
    fill = kind._init_weights

    def forgetful(self, module):
        if "Embedding" not in type(module).__name__:
            fill(self, module)

    for owner in kind.__mro__:
        if "_init_weights" in vars(owner):
            monkeypatch.setattr(owner, "_init_weights", forgetful)
    with pytest.raises(BadInput, match="how to fill"):
        fsdp.load_policy(path, every.CFG)


def test_two_ranks_load_and_check_what_one_does():
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    command = [*on(2), os.path.join("tests", "families.py"), "gemma3_text", "mistral"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.count(" | right |") == 2, done.stderr[-2000:]


def test_llamas_ln_pi_is_that_of_plain_rows(base, model):
    ours, pairs = fsdp.load_policy(base, every.CFG), random_pairs(5)
    with torch.no_grad():
        logp_2B = pair_logps(ours, pairs, 0.7)
    assert torch.allclose(logp_2B, every.plain_logps(model, pairs, 0.7), atol=1e-4)
