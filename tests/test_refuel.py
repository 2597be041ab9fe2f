"""The algorithm, its log-probs against references that share no code with them, stopping and going, bad input."""
import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

import refuel
import simulator
import toy
from bench import peak_bytes
from conftest import ROOT, random_pairs
from refuel import Pair, collect, micro_batches, pair_logps, refuel_loss, regress, sample_resets
from simulator import Dialogue

# --- Eq. 1 and the law of the resets ----------------------------------------------------------------------------


def test_resets_follow_section_4_2():
    h, H = sample_resets(60_000, 5, np.random.default_rng(0))
    assert h.shape == H.shape == (60_000,) and 1 <= h.min() and (h <= H).all() and H.max() == 5
    for turns in range(1, 6):
        assert abs((H == turns).mean() - 1 / 5) < 0.01
        for turn in range(1, turns + 1):
            assert abs((h[H == turns] == turn).mean() - 1 / turns) < 0.02


def some_logps(n=7):
    return torch.randn(2, n, generator=torch.Generator().manual_seed(0)).double().requires_grad_()


def test_the_loss_is_zero_with_zero_gradient_at_its_minimiser():
    old, reward, eta = some_logps().detach(), torch.rand(2, 7).double(), 3.0
    logp = (old + eta * reward + torch.randn(7)).requires_grad_()  # ln pi_t + eta Q - ln Z, Eq. 3
    loss = refuel_loss(logp, old, reward, eta)
    loss.backward()
    assert loss < 1e-20 and logp.grad.abs().max() < 1e-9
    assert refuel_loss(logp + torch.tensor([[0.1], [0.0]]), old, reward, eta) > 1e-4


def test_the_loss_ignores_a_constant_in_the_rewards_and_the_order_of_a_pair():
    logp, old, reward = some_logps(), some_logps(9)[:, :7].detach(), torch.rand(2, 7).double()
    loss = refuel_loss(logp, old, reward, 2.0)
    assert torch.allclose(loss, refuel_loss(logp, old, reward + 5, 2.0))
    assert torch.equal(loss, refuel_loss(logp.flip(0), old.flip(0), reward.flip(0), 2.0))
    by_hand = [((a - c - (b - d)) / 2 - (r - s)) ** 2 for a, b, c, d, r, s in zip(*logp, *old, *reward)]
    assert loss.item() == pytest.approx(sum(by_hand).item() / 7)


# --- ln pi(y|s) -------------------------------------------------------------------------------------------------


@pytest.fixture
def model(model):
    return refuel.attend_in_pairs(model)


def plain_logits(model, ids):
    """(T, V), with transformers' own attention."""
    model.set_attn_implementation("eager")
    logits_TV = model(torch.tensor([ids])).logits[0]
    refuel.attend_in_pairs(model)
    return logits_TV


def slow_logps(model, pairs, temperature):
    """Token by token: one forward for each response token, on the plain causal sequence before it."""
    logp_2B = torch.zeros(2, len(pairs))
    for b, pair in enumerate(pairs):
        for row, response in enumerate((pair.y, pair.y2)):
            for t, token in enumerate(response):
                logits_V = plain_logits(model, pair.prefix + response[:t])[-1]
                logp_2B[row, b] += torch.log_softmax(logits_V / temperature, -1)[token]
    return logp_2B


def row_logps(model, pairs, temperature):
    """Each response in a row of its own, unpadded, full logits, autograd's own log_softmax."""
    rows = []
    for response in (lambda p: p.y), (lambda p: p.y2):
        for p in pairs:
            ids = p.prefix + response(p)
            logp_TV = torch.log_softmax(plain_logits(model, ids)[:-1] / temperature, -1)
            rows.append(logp_TV.gather(1, torch.tensor(ids)[1:, None])[len(p.prefix) - 1 :].sum())
    return torch.stack(rows).view(2, -1)


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_pair_logps_equal_a_token_by_token_loop(model, temperature):
    """Bugs by name: shifted mask, end token outside the mask, log-probs at another temperature."""
    pairs = random_pairs(6, longest=12)
    assert torch.allclose(pair_logps(model, pairs, temperature), slow_logps(model, pairs, temperature), atol=1e-5)
    assert not torch.allclose(pair_logps(model, pairs, temperature), pair_logps(model, pairs, 0.9), atol=1e-2)


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_packed_rows_equal_separate_rows_gradients_too(model, temperature):
    pairs = random_pairs(12)
    weight = torch.randn(2, 12, generator=torch.Generator().manual_seed(3))
    packed, separate = pair_logps(model, pairs, temperature), row_logps(model, pairs, temperature)
    assert packed.dtype == torch.float32 and torch.allclose(packed, separate, atol=1e-5)
    parameters = list(model.parameters())
    one = torch.autograd.grad((packed * weight).sum(), parameters)
    two = torch.autograd.grad((separate * weight).sum(), parameters)
    for a, b in zip(one, two):
        assert (a - b).abs().max() <= 1e-5 * max(1, b.abs().max())


def test_a_response_is_blind_to_its_twin_and_to_its_neighbours_in_the_row(model):
    pairs = random_pairs(5)
    logp_2B = pair_logps(model, pairs)
    for row, name in ((0, "y2"), (1, "y")):
        changed = [p._replace(**{name: [7] * len(getattr(p, name))}) for p in pairs]
        assert torch.allclose(pair_logps(model, changed)[row], logp_2B[row], atol=1e-5)
    assert torch.allclose(pair_logps(model, [pairs[0]]), logp_2B[:, :1], atol=1e-5)


def test_attention_of_a_packed_row_equals_dense_attention_under_its_mask():
    """With fewer key-value heads than query heads, empty responses and gradients; the mask by one rule a token."""
    lengths, g = [(5, 3, 4), (2, 1, 0), (4, 0, 0), (1, 2, 6)], torch.Generator().manual_seed(0)
    owner = [(i, branch) for i, pair in enumerate(lengths) for branch in range(3) for _ in range(pair[branch])]
    T = len(owner)
    sees = torch.tensor([[t <= s and b == a and d in (0, c) for t, (b, d) in enumerate(owner)]
                         for s, (a, c) in enumerate(owner)])  # fmt: skip
    q, k, v = (torch.randn(1, heads, T, 16, generator=g).requires_grad_() for heads in (4, 2, 2))
    scores = (q @ k.repeat_interleave(2, 1).transpose(2, 3) * 0.3).masked_fill(~sees, -torch.inf)
    dense = (scores.softmax(-1) @ v.repeat_interleave(2, 1)).transpose(1, 2)
    ours, _ = refuel.pair_attention(None, q, k, v, None, lengths, scaling=0.3)
    assert torch.allclose(ours, dense, atol=1e-6)
    up = torch.randn(ours.shape, generator=g)
    for a, b in zip(*(torch.autograd.grad(x, (q, k, v), up) for x in (ours, dense))):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_model_with_another_attention_is_refused(model):
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="attend_in_pairs"):
        pair_logps(model, random_pairs(2))


def test_only_sampled_tokens_are_in_the_loss(model):
    """Bug by name: user tokens in the loss. Another prefix's tokens are conditioned on, never scored."""
    pair = random_pairs(1)[0]
    _, _, _, where, target, owner = refuel.pack([pair])
    assert target.tolist() == pair.y + pair.y2 and owner.tolist() == [0] * len(pair.y) + [1] * len(pair.y2)
    assert where.min() == len(pair.prefix) - 1


def test_blocked_logps_equal_autograds(monkeypatch):
    monkeypatch.setitem(refuel.SelectedLogps.BLOCK, "cpu", (3, 4))  # of 8 tokens and 11 words
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(8, 5, generator=g, requires_grad=True), torch.randn(11, 5, generator=g).requires_grad_()
    target, up = torch.randint(11, (8,), generator=g), torch.randn(8, generator=g)
    ours = refuel.SelectedLogps.apply(hidden, weight, target, 0.8)
    theirs = torch.log_softmax(hidden @ weight.T / 0.8, -1).gather(1, target[:, None])[:, 0]
    assert torch.allclose(ours, theirs, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight), up) for x in (ours, theirs))):
        assert torch.allclose(a, b, atol=1e-5)


def test_no_tensor_of_all_tokens_by_the_vocabulary_lives(model, monkeypatch):
    monkeypatch.setitem(refuel.SelectedLogps.BLOCK, "cpu", (16, 30))
    pairs, kept = random_pairs(40), []
    tokens = sum(len(p.y) + len(p.y2) for p in pairs)

    def keep(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        pair_logps(model, pairs).sum().backward()
    assert tokens > 100 and (tokens, 96) in kept and not any(40 in shape and shape != (40, 96) for shape in kept)


def test_micro_batches_keep_to_the_budget_and_every_rank_has_as_many(monkeypatch):
    pairs = random_pairs(23)
    seen, counts = Counter(), set()
    for r in range(4):
        monkeypatch.setattr(refuel, "world", lambda: 4)
        monkeypatch.setattr(refuel, "rank", lambda r=r: r)
        micros = micro_batches(pairs, 100)
        counts.add(len(micros))
        for micro, share in micros:
            assert share in (0, len(micro) / 23)
            assert refuel.pack(micro)[0].numel() <= 100 or len(micro) == 1
            seen.update({id(p): 1 for p in micro if share})
    assert len(counts) == 1 and len(seen) == 23 and set(seen.values()) == {1}


def test_activation_checkpointing_saves_memory_and_computes_no_product_twice(base, cfg):
    """Nor does the backward go through layers that do not learn, or the forward keep anything of them."""
    from torch.utils.flop_counter import FlopCounterMode

    flops, peak = {}, {}
    for layers in (0, 1):
        for checkpointing in (False, True):
            model = refuel.load_policy(base, replace(cfg, train_layers=layers, activation_checkpointing=checkpointing))
            step = lambda: pair_logps(model.train(), random_pairs(150)).sum().backward()  # noqa: B023, E731
            with FlopCounterMode(display=False) as counter:
                step()
            flops[layers, checkpointing] = counter.get_total_flops()
            peak[layers, checkpointing] = peak_bytes("cpu", step)
    assert flops[0, True] == flops[0, False] and flops[1, True] == flops[1, False] < 0.7 * flops[0, False]
    assert peak[0, True] < 0.8 * peak[0, False] and peak[1, True] < 0.7 * peak[0, True]


@pytest.fixture(scope="module")
def on_ranks(base, tmp_path_factory):
    """tests/two_ranks.py's results on one and on two ranks, and plain transformers beside them."""
    from safetensors.torch import load_file

    out = str(tmp_path_factory.mktemp("ranks"))
    for n in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(n), "--master_port", "0"]
        done = subprocess.run([*command, "--standalone", os.path.join(ROOT, "tests", "two_ranks.py"), base, out],
                              capture_output=True, text=True, timeout=240)  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    pairs = [open(os.path.join(out, f"ranks_{n}", "pairs.jsonl")).read() for n in (1, 2)]
    return [load_file(os.path.join(out, f"ranks_{n}.safetensors")) | {"pairs": rows} for n, rows in zip((1, 2), pairs)]


def on_nodes(base, out, nodes, per_node, *flags):
    """tests/two_ranks.py on several nodes: one torchrun a node, which meet on the loopback interface."""
    from safetensors.torch import load_file
    from serve import free_port

    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(nodes), "--nproc_per_node", str(per_node),
               "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "nodes",
               os.path.join(ROOT, "tests", "two_ranks.py"), base, out, *flags]  # fmt: skip
    agents = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(nodes)]
    try:
        texts = [agent.communicate(timeout=240)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0] * nodes, texts[0][-3000:]
    ranks = nodes * per_node
    pairs = open(os.path.join(out, f"ranks_{ranks}", "pairs.jsonl")).read()
    return load_file(os.path.join(out, f"ranks_{ranks}.safetensors")) | {"pairs": pairs}


def test_two_nodes_with_a_copy_of_the_weights_each_equal_one_node_with_two_shards(base, on_ranks, tmp_path):
    found, expected = on_nodes(base, str(tmp_path), 2, 1, "--replicas", "2"), on_ranks[1]
    assert found.keys() == expected.keys() and found.pop("pairs") == expected["pairs"]
    for name, tensor in found.items():
        assert (tensor - expected[name]).abs().max() <= 1e-5 * max(1, expected[name].abs().max()), name


def test_the_pairs_do_not_depend_on_the_number_of_ranks(on_ranks):
    one, two = on_ranks
    assert one["pairs"] == two["pairs"] and one["pairs"].count('"prefix"') > 30


def test_one_rank_and_two_equal_plain_rows_with_and_without_checkpointing(on_ranks, model):
    pairs = random_pairs(9)
    for found in on_ranks:
        for temperature in (1.0, 0.8):
            logp_2B = row_logps(model, pairs, temperature)
            model.zero_grad()
            (logp_2B * (1 + logp_2B.detach().sin())).sum().backward()
            for checkpointing in (False, True):
                key = f"{temperature}/{checkpointing}"
                assert torch.allclose(found[f"{key}/logp"], logp_2B, atol=1e-5)
                for name, p in model.named_parameters():
                    assert (found[f"{key}/grad/{name}"] - p.grad).abs().max() <= 1e-5 * max(1, p.grad.abs().max())


def test_training_on_two_ranks_equals_training_on_one(on_ranks):
    one, two = on_ranks
    trained = [name for name in one if name.startswith("trained/")]
    assert len(trained) == 30 and all(torch.allclose(one[n], two[n], atol=2e-5) for n in trained)


def test_with_frozen_layers_two_ranks_equal_one_and_pi_0_is_the_base(on_ranks, model):
    one, two = on_ranks
    weights, expected = model.state_dict(), row_logps(model, random_pairs(9), 1.0)
    for name, whole in weights.items():
        assert torch.allclose(one[f"last/{name}"], two[f"last/{name}"], atol=2e-5)
        for found in on_ranks:
            assert torch.equal(found[f"last/{name}"], whole) == (not name.startswith("model.layers.2."))
    assert all(torch.allclose(found["pi_0"], expected, atol=1e-5) for found in on_ranks)


# --- collect and regress ----------------------------------------------------------------------------------------


class Talker:
    """A policy of few words, all of them written down: which state it saw, and by which stream."""

    def __init__(self):
        self.tokenizer = toy.make_tokenizer()

    def answer(self, dialogues):
        words = ["wool", "silk", "hat", "coat"]
        return [([self.tokenizer.convert_tokens_to_ids(words[d.seed("policy") % 4]), 2], False, -1.0) for d in dialogues]

    def reply(self, dialogues):
        return [("not sure", "go on")[d.seed("user") % 2] for d in dialogues]


def length_reward(dialogues):
    return [float(len(d.ids)) + sum(d.ids) / 1000 for d in dialogues]


def test_a_pair_is_one_prefix_and_two_independent_futures(cfg):
    talker = Talker()
    prompts = [Dialogue.start(talker.tokenizer, "go on") for _ in range(400)]
    dropped = Counter()
    pairs = collect(prompts, talker, talker, length_reward, cfg, np.random.default_rng(0), dropped)
    assert len(pairs) + dropped["identical"] == 400 and abs(dropped["identical"] - 100) < 45  # 1 of 4 by chance
    assert {(p.h, p.H) for p in pairs} == {(h, H) for H in range(1, 6) for h in range(1, H + 1)}
    for p in pairs:
        for d, response, r in zip(p.dialogues, (p.y, p.y2), p.rewards):
            assert d.reset(p.h).ids == p.prefix and d.answer(p.h) == response and len(d.spans) == p.H
            assert r == length_reward([d])[0] and d.messages[-1]["role"] == "assistant"
    # after h the two go their own ways: users' words and later answers agree only by chance
    later = [[a["content"] == b["content"] for a, b in zip(*(d.messages[2 * p.h :] for d in p.dialogues))] for p in pairs]
    users, answers = (np.mean([x for row in later for x in row[k::2]]) for k in (0, 1))
    assert abs(users - 0.5) < 0.08 and abs(answers - 0.25) < 0.08


def test_swapping_the_streams_swaps_the_pair(cfg):
    """Exchangeability: y and y' are treated alike, so the law of the reward difference is symmetric."""
    talker = Talker()
    prompts = [Dialogue.start(talker.tokenizer, "go on") for _ in range(1500)]
    pairs = collect(prompts, talker, talker, length_reward, cfg, np.random.default_rng(1))
    difference = np.array([p.rewards[0] - p.rewards[1] for p in pairs])
    assert abs(difference.mean()) < 4 * difference.std() / len(difference) ** 0.5
    assert abs((difference > 0).sum() - (difference < 0).sum()) < 4 * len(difference) ** 0.5


def test_a_reward_that_is_not_finite_stops_with_the_dialogue_that_made_it(cfg):
    talker = Talker()
    prompts = [Dialogue.start(talker.tokenizer, "go on") for _ in range(9)]
    with pytest.raises(simulator.BadInput, match="not finite.*go on"):
        collect(prompts, talker, talker, lambda ds: [float("nan")] * len(ds), cfg, np.random.default_rng(0))


def test_at_step_0_every_residual_is_exactly_the_reward_difference(base, cfg):
    model = refuel.load_policy(base, cfg)
    pairs, rows, seen = random_pairs(20), [], []

    def loss_fn(logp_2B, old_logp_2B, reward_2B, eta):
        seen.append((logp_2B.detach(), old_logp_2B))
        return refuel_loss(logp_2B, old_logp_2B, reward_2B, eta)

    regress(model, refuel.make_optimizer(model, cfg), pairs, cfg, loss_fn, after_step=lambda s, m: rows.append(m))
    assert torch.equal(*seen[0]) and rows[0]["drift"] == 0.0 and rows[0]["kl"] == 0.0 and rows[1]["drift"] > 0
    targets = [(p.rewards[0] - p.rewards[1]) ** 2 for p in pairs[:8]]
    assert rows[0]["loss"] == pytest.approx(np.mean(targets), rel=1e-6)


def test_an_optimiser_made_after_a_forward_without_backward_trains_the_same_weights(base, cfg):
    """A forward under no_grad once left FSDP's root unsharded, and the optimiser then held tensors that were dropped."""
    pairs, trained = random_pairs(16), []
    for first in (True, False):
        model = refuel.load_policy(base, cfg)
        old = refuel.with_old_logps(model if first else refuel.load_policy(base, cfg), pairs, cfg)
        regress(model, refuel.make_optimizer(model, cfg), old, replace(cfg, lr=1e-3))
        trained.append({name: w.clone() for name, w in refuel.full_weights(model)})
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_regression_fits_the_relative_future(base, cfg):
    model, pairs = refuel.load_policy(base, cfg), random_pairs(8)
    first = regress(model, refuel.make_optimizer(model, cfg), pairs, replace(cfg, lr=1e-9))
    cfg = replace(cfg, lr=1e-3, epochs=60)
    last = regress(model, refuel.make_optimizer(model, cfg), pairs, cfg)
    assert last["loss"] < 0.05 * first["loss"] and last["sign_agreement"] == 1.0


def test_a_stopped_training_goes_on_bit_for_bit(base, cfg, tmp_path):
    cfg, pairs = replace(cfg, lr=1e-3, batch_size=4), random_pairs(20)

    def train(until, first_step=0, model=None, optimizer=None):
        def stop(step, _):
            if step == until:
                refuel.save_training(str(tmp_path), model, optimizer, step)
                raise KeyboardInterrupt

        try:
            regress(model, optimizer, old, cfg, first_step=first_step, after_step=stop)
        except KeyboardInterrupt:
            pass
        return {name: w.clone() for name, w in refuel.full_weights(model)}

    def fresh():
        model = refuel.load_policy(base, cfg)
        return model, refuel.make_optimizer(model, cfg)

    old = refuel.with_old_logps(fresh()[0], pairs, cfg)
    whole, half = train(None, 0, *fresh()), train(1, 0, *fresh())
    model, optimizer = fresh()
    assert refuel.load_training(str(tmp_path), model, optimizer) == 2
    rest = train(None, 2, model, optimizer)
    assert all(torch.equal(whole[n], rest[n]) for n in whole) and any(not torch.equal(whole[n], half[n]) for n in whole)


def test_a_policy_folder_gives_back_the_weights_that_were_saved(base, cfg, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = refuel.load_policy(base, cfg)
    regress(model, refuel.make_optimizer(model, cfg), random_pairs(8), cfg)
    path = str(tmp_path / "policy")
    refuel.save_policy(path, model, base)
    again, plain = refuel.load_policy(path, cfg), AutoModelForCausalLM.from_pretrained(path).state_dict()
    for (name, a), (_, b) in zip(refuel.full_weights(model), refuel.full_weights(again)):
        assert torch.equal(a, b) and torch.equal(a, plain[name])
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer.chat_template == toy.make_tokenizer().chat_template


# --- stop and go ------------------------------------------------------------------------------------------------


def run_folder(path):
    """What a run leaves behind, as comparable values: everything but seconds, tokens, speeds and the command line."""
    found = {}
    for folder, _, names in os.walk(path):
        for name in names:
            file = os.path.join(folder, name)
            key = os.path.relpath(file, path)
            if name == "metrics.jsonl":
                rows = simulator.read_lines(file)
                found[key] = [{k: v for k, v in r.items() if k not in ("seconds", "tokens", "tokens_per_second")} for r in rows]
            elif name == "results.json":
                found[key] = {n: {k: v for k, v in r.items() if k != "command"} for n, r in simulator.read_json(file).items()}
            elif name not in ("config.json", "win_rate.png"):
                found[key] = open(file, "rb").read()
    return found


def test_killed_around_every_write_a_run_ends_with_the_same_files(base, tmp_path):
    flags = f"--setting toy --policy {base} --reference {base} --engine transformers --num-prompts 24 --batch-size 8"
    flags += " --wave 24 --iterations 2 --eval-dialogues 8 --checkpoint-steps 2 --lr 1e-3"
    out = [str(tmp_path / name) for name in ("undisturbed", "killed")]
    refuel_py, kills_py = (os.path.join(ROOT, *p) for p in (["refuel.py"], ["tests", "kills.py"]))
    for command in ([refuel_py, "--out", out[0]], [kills_py, "kill", out[1]]):
        done = subprocess.run([sys.executable, *command, *flags.split()], capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
    kills = int(re.search(r"stops (\d+):", done.stdout)[1])
    undisturbed, killed = map(run_folder, out)
    assert kills >= 30 and undisturbed.keys() == killed.keys()
    for name in undisturbed:
        assert undisturbed[name] == killed[name], name
    assert not [name for name in killed if ".partial" in name or ".parts" in name or "training" in name]


# --- bad input --------------------------------------------------------------------------------------------------


def broken_checkpoint(base, path, change):
    import shutil

    shutil.copytree(base, path)
    change(path)
    return str(path)


def remove(*names):
    def change(path):
        for name in names:
            os.remove(os.path.join(path, name))

    return change


BAD = [  # flags, and a word of the one line
    ("--etta 10", "etta"),
    ("--num 100", "--num"),
    ("--eta", "--eta"),
    ("--eta ten", "ten"),
    ("--eta 0", "eta"),
    ("--eta -1", "eta"),
    ("--eta nan", "eta"),
    ("--max-turns 0", "max-turns"),
    ("--max-turns 2.5", "2.5"),
    ("--iterations 0", "iterations"),
    ("--num-prompts -3", "num-prompts"),
    ("--lr 0", "lr"),
    ("--temperature 0", "temperature"),
    ("--epochs 0", "epochs"),
    ("--wave 0", "wave"),
    ("--warmup 1", "warmup"),
    ("--weight-decay -1", "weight-decay"),
    ("--seed -1", "seed"),
    ("--batch-size 64", "batch-size"),
    ("--replicas 2", "divisor of 1"),
    ("--max-length 10", "max-length"),
    ("--engine tgi", "tgi"),
    ("--activation-checkpointing maybe", "activation-checkpointing"),
    ("--setting three", "three"),
    ("--num-prompts 100000", "100000"),
    ("--eval-dialogues 100000", "100000"),
    ("--dataset nowhere", "nowhere"),
    ("--user nobody", "nobody"),
    ("--reward nothing", "nothing"),
    ("--policy nowhere/at/all", "nowhere/at/all"),
    ("--policy no-such/model", "no-such/model"),
    ("--reference runs/none", "runs/none"),
    ("--policy {tmp}", "config.json"),
    ("--policy {no_tokenizer}", "tokenizer"),
    ("--policy {no_template}", "chat template"),
    ("--policy {no_safetensors}", "safetensors"),
    ("--out {foreign}", "not a run"),
    ("--out {file}", "not a run"),
    ("--out {other} --eta 7", "eta"),
]


@pytest.fixture(scope="module")
def places(base, tmp_path_factory):
    """Folders that are wrong in one way each, and a run folder of another configuration."""
    tmp = tmp_path_factory.mktemp("places")
    (tmp / "foreign").mkdir()
    (tmp / "foreign" / "thesis.txt").write_text("mine")
    (tmp / "file").write_text("a file")
    (tmp / "other").mkdir()
    flags = ["--setting", "toy", "--policy", base, "--reference", base, "--out", str(tmp / "other"), "--eta", "3"]
    (tmp / "other" / "config.json").write_text(json.dumps(vars(refuel.read_config(flags))))
    tokenizer = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    return dict(
        tmp=tmp, foreign=tmp / "foreign", file=tmp / "file", other=tmp / "other",
        no_tokenizer=broken_checkpoint(base, tmp / "no_tokenizer", remove(*tokenizer)),
        no_template=broken_checkpoint(base, tmp / "no_template", remove("chat_template.jinja")),
        no_safetensors=broken_checkpoint(base, tmp / "no_safetensors", remove("model.safetensors")),
    )  # fmt: skip


@pytest.mark.parametrize("flags, word", BAD)
def test_bad_input_is_one_line_and_exit_code_2_before_a_model_is_loaded(
    flags, word, base, places, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(refuel, "train", lambda cfg: pytest.fail("a model would have been loaded"))
    usual = f"--setting toy --policy {base} --reference {base} --out {tmp_path / 'run'} --num-prompts 24 --batch-size 8"
    with pytest.raises(SystemExit) as stop:
        refuel.main((usual + " " + flags.format(**places)).split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and word in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_a_bad_flag_ends_the_command_itself_with_code_2():
    done = subprocess.run([sys.executable, "refuel.py", "--setting", "toy", "--eta", "-1"], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--eta must be positive" in done.stderr


def test_nothing_reads_a_pickle_or_swallows_every_error():
    for name in ("refuel.py", "simulator.py", "toy.py", "evaluate.py"):
        text = open(os.path.join(ROOT, name)).read()
        for word in ("torch.load", "import pickle", "pickle.load", "except:", "trust_remote_code=True", "except Exception"):
            assert word not in text, (name, word)


def test_lengths_of_a_pair_are_counted_once():
    assert refuel.pair_length(Pair([1, 2], [3], [4, 5], (0, 0), 1, 1)) == 5
