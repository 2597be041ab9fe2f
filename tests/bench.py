"""Speed and memory of one training step, and how it grows, side by side with other layouts of the same work.

    python tests/bench.py step                              a Llama with Llama 3's vocabulary, on the CPU: minutes
    python tests/bench.py step --model 8b --device cuda --pairs 8 --micro-tokens 3072 2048 6144 12288
                                                            bfloat16 on one GPU of 140 GB (1b: 80 GB), a sweep of the
                                                            tokens a forward, flex attention beside ours
    python tests/bench.py growth                            tokens against time: pairs, prefix, ranks
    python tests/bench.py generation --policy FOLDER        tokens computed for each useful one; the two engines
    python tests/bench.py cache --policy runs/shop_base     vLLM on a CPU with a cache for eight dialogues, and for all
    python tests/bench.py waiting                           every dialogue at its own pace, or all turn by turn: a user at
                                                            a server that takes its time, and the toy's scripted one
    python tests/bench.py waiting --policy FOLDER           a checkpoint as policy and, served, as user
    python tests/bench.py lengths SHAREGPT.json --policy FOLDER
                                                            how tests/lengths.json was made

Every variant goes through old_logps and refuel.regress; only the layout functions, of refuel.py, logps.py
and fsdp.py, are exchanged, and the log-probs of all of them must agree to 1e-4 a token (bfloat16: 1e-1). FLOPs of matrix
products are counted in what ran, as multiples of those with the weights on unique tokens; the share of the matmul rate
is of those and attention's. Times are medians of repeats in which the variants
take turns; on the CPU they are CPU seconds, which a busy neighbour lengthens less than the clock. Memory is the
high-water mark of torch's own allocations (its CPU memory profiler, or max_memory_allocated) above weights and AdamW's
state, gradients included. Results go to results/bench.json and, as Markdown, to the terminal.
"""
import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from unittest import mock

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import evaluate  # noqa: E402  (first: it sets what torch reads)
import refuel  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from helpers import Scripted, peak_bytes, with_logps  # noqa: E402
from machinery import ask, engines, files, fsdp, logps, ranks, seams, template, users  # noqa: E402
import simulator  # noqa: E402

LENGTHS = os.path.join(ROOT, "tests", "lengths.json")
RESULTS = os.path.join(ROOT, "results", "bench.json")
HEADER = 5  # tokens of a chat template around a turn
MODELS = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "tiny": (64, 128, 2, 2, 2, 1000),
    "cpu": (512, 1536, 8, 8, 8, 128_256),
    "small": (256, 768, 4, 4, 4, 128_256),
    "1b": (2048, 8192, 16, 32, 8, 128_256),
    "8b": (4096, 14336, 32, 32, 8, 128_256),
}

# --- pairs and models -------------------------------------------------------------------------------------------


def make_lengths(path, tokenizer):
    """[[user's tokens, assistant's tokens] of up to five turns] of 600 ShareGPT conversations in random order, from the
    person's first turn on; the first answer has at most 1,024 tokens, 2,048 with its question."""
    text, rows, at = open(path, encoding="utf-8").read(), [], 1
    decoder = json.JSONDecoder()
    with contextlib.suppress(ValueError):  # the packaged file ends in the middle of a row
        while True:
            row, at = decoder.raw_decode(text, at + len(text[at:at + 9]) - len(text[at:at + 9].lstrip(" \n,")))
            rows.append(row["conversations"])
    random.Random(0).shuffle(rows)
    kept = []
    for row in rows:
        while row and row[0]["from"] != "human":
            row = row[1:]
        turns = []
        for user, answer in zip(row[::2], row[1::2]):
            both = user["value"].strip() and answer["value"].strip()
            if len(turns) == 5 or not both or (user["from"], answer["from"]) != ("human", "gpt"):
                break
            turns.append([len(tokenizer.encode(m["value"], add_special_tokens=False)) for m in (user, answer)])
        if turns and sum(turns[0]) <= 2048 and turns[0][1] <= 1024:
            kept.append(turns)
        if len(kept) == 600:
            return kept


def make_pairs(n, seed, vocabulary, scale=1.0, prefix=None):
    """Pairs of random ids with the lengths of real conversations and (H, h) by the law of section 4.2, within setting
    one's limits; y' is as long as the answer at turn h of another conversation. prefix: the same one for all."""
    rng, pairs = random.Random(seed), []
    conversations = json.load(open(LENGTHS))
    while len(pairs) < n:
        H = rng.randint(1, 5)
        h = rng.randint(1, H)
        turns, other = (rng.choice([c for c in conversations if len(c) >= h]) for _ in range(2))
        before = sum(u + HEADER for u, _ in turns[:h]) + sum(a + HEADER for _, a in turns[: h - 1])
        lengths = [prefix or before, turns[h - 1][1] + 1, other[h - 1][1] + 1]
        if max(lengths[1:]) <= 1024 and lengths[0] + max(lengths[1:]) <= 2048:
            ids = [[rng.randrange(vocabulary) for _ in range(max(1, int(k * scale)))] for k in lengths]
            pairs.append(refuel.Pair(*ids, (rng.random(), rng.random()), h, H))
    return pairs


def make_model(name, device):
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, layers, heads, kv, vocabulary = MODELS[name]
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, vocab_size=vocabulary,
                         num_attention_heads=heads, num_key_value_heads=kv, max_position_embeddings=8192,
                         initializer_range=hidden**-0.5)  # fmt: skip  (at 0.02 a wrong mask would hardly show)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    if device == "cuda":  # weights, gradients and AdamW's state in bfloat16: 8B then fits one card
        model = model.to(torch.bfloat16)
    fsdp.checkpoint_activations(model, "selective")
    return model


def flops(model, pairs, attention=True):
    """Of a step on unique tokens: one forward for the old log-probs, three for training; every multiply-add of a weight
    by a token that needs it, the head's only at responses, attention's only where a token may look."""
    body = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and p.dim() == 2)
    config, forward = model.config, 0
    for p in pairs:
        s, y, y2 = len(p.prefix), len(p.y), len(p.y2)
        seen = s * (s + 1) / 2 + sum(n * s + n * (n + 1) / 2 for n in (y, y2))
        forward += 2 * (body * (s + y + y2) + config.vocab_size * config.hidden_size * (y + y2))
        forward += 4 * config.num_hidden_layers * config.hidden_size * seen * attention
    return 4 * forward


# --- the layouts ------------------------------------------------------------------------------------------------


def two_rows(model, pairs, temperature=1.0):
    """The prefix once for each response."""
    halves = [p._replace(y2=[]) for p in pairs] + [p._replace(y=p.y2, y2=[]) for p in pairs]
    return refuel_pair_logps(model, halves, temperature)[0].view(2, -1)


def one_row(lengths):
    return [list(range(len(lengths)))]


def one_pair_a_row(lengths):
    return [[i] for i in range(len(lengths))]


def whose(lengths):
    """(2, T): the pair of each token of pack's row, and 0, 1 or 2 for its prefix, y or y'."""
    return torch.tensor([(i, b) for i, pair in enumerate(lengths) for b in range(3) for _ in range(pair[b])]).T


def dense(rows_of):
    """Pairs in rows that are padded to the longest of them, under a mask of each row; rows_of(lengths): which in which."""

    def pair_logps(model, pairs, temperature=1.0):
        device, rows = model.lm_head.weight.device, rows_of(list(map(logps.pair_length, pairs)))
        T = max(sum(logps.pair_length(pairs[i]) for i in row) for row in rows)
        ids_RT, position_RT, pair_RT, branch_RT, where_N, target_N, owner_N = ([] for _ in range(7))
        for r, row in enumerate(rows):
            ids_1T, position_1T, lengths, where, target, *owner = logps.pack([logps.pair_row(pairs[i]) for i in row])
            for rows_T, x, fill in zip((ids_RT, position_RT, pair_RT, branch_RT),
                                       (ids_1T[0], position_1T[0], *whose(lengths)), (0, 0, -1, 0)):  # fmt: skip
                rows_T.append(F.pad(x, (0, T - len(x)), value=fill))
            where_N.append(where + r * T), target_N.append(target)
            owner_N.append(torch.tensor(row)[owner[0]] + owner[1] * len(pairs))
        ids_RT, position_RT, pair_RT, branch_RT = (
            torch.stack(x).to(device) for x in (ids_RT, position_RT, pair_RT, branch_RT))  # fmt: skip
        where_N, target_N, owner_N = (torch.cat(x).to(device) for x in (where_N, target_N, owner_N))
        sees_RTT = (pair_RT[:, :, None] == pair_RT[:, None]) & torch.ones(T, T, dtype=torch.bool, device=device).tril()
        sees_RTT &= (branch_RT[:, None] == 0) | (branch_RT[:, None] == branch_RT[:, :, None])
        hidden_RTD = model.model(input_ids=ids_RT, attention_mask=sees_RTT[:, None], position_ids=position_RT,
                                 use_cache=False).last_hidden_state  # fmt: skip
        hidden_ND = hidden_RTD.flatten(0, 1).index_select(0, where_N)
        logp_N = logps.SelectedLogps.apply(hidden_ND, model.lm_head.weight, target_N, temperature)
        return torch.zeros(2 * len(pairs), device=device).index_add(0, owner_N, logp_N).view(2, -1)

    return pair_logps


def logits_everywhere(model, ids_1T, position_1T, lengths, where_N, target_N, temperature):
    """As logps.token_logps, but every position is projected onto the vocabulary."""
    out = model.model(input_ids=ids_1T, position_ids=position_1T, lengths=lengths, use_cache=False)
    hidden_1TD = out.last_hidden_state
    others = torch.ones(hidden_1TD.shape[1], dtype=torch.bool, device=ids_1T.device).index_fill(0, where_N, False)
    rows_MD = torch.cat([hidden_1TD[0, where_N], hidden_1TD[0, others]])
    targets_M = F.pad(target_N, (0, len(rows_MD) - len(target_N)))
    return logps.SelectedLogps.apply(rows_MD, model.lm_head.weight, targets_M, temperature)[: len(target_N)]


class InOnePiece:
    """SelectedLogps by autograd, with all logits of the responses at once."""

    @staticmethod
    def apply(hidden_ND, weight_VD, target_N, temperature):
        logp_NV = torch.log_softmax((hidden_ND @ weight_VD.T).float() / temperature, -1)
        return logp_NV.gather(1, target_N[:, None])[:, 0]


def padded(model, pairs, temperature=1.0, length=2048):
    """The released code's layout: two rows padded to 2,048, log_softmax of every position over the vocabulary."""
    rows = [p.prefix + r for r in ("y", "y2") for p in pairs for r in [getattr(p, r)]]
    device = model.lm_head.weight.device
    ids_BT = torch.tensor([r + [0] * (length - len(r)) for r in rows], device=device)
    real_BT = torch.tensor([[1] * len(r) + [0] * (length - len(r)) for r in rows], device=device)
    logits_BTV = model(ids_BT, attention_mask=real_BT, use_cache=False, output_hidden_states=True).logits[:, :-1]
    logp_BTV = F.log_softmax(logits_BTV / temperature, dim=-1)
    logp_BT = logp_BTV.gather(-1, ids_BT[:, 1:, None])[..., 0].float()
    mask_BT = torch.zeros_like(logp_BT)
    for mask_T, row, p in zip(mask_BT, rows, pairs * 2):
        mask_T[len(p.prefix) - 1 : len(row) - 1] = 1
    return (logp_BT * mask_BT).sum(-1).view(2, -1)


def one_by_one(pairs, tokens, length=None):
    return [([p], 1 / len(pairs)) for p in pairs]


def flex_logps(model, ids_1T, position_1T, lengths, where_N, target_N, temperature):
    """As logps.token_logps, by one call of flex attention a layer: blocks of the row that nobody sees are skipped."""
    from torch.nn.attention.flex_attention import create_block_mask

    T, device = ids_1T.shape[1], ids_1T.device
    pair_T, branch_T = whose(lengths).to(device)

    def sees(b, h, q, k):
        return (pair_T[q] == pair_T[k]) & (q >= k) & ((branch_T[k] == 0) | (branch_T[k] == branch_T[q]))

    block = create_block_mask(sees, None, None, T, T, device=device, _compile=ids_1T.is_cuda)
    out = model.model(input_ids=ids_1T, attention_mask=block, position_ids=position_1T, use_cache=False)
    hidden_ND = out.last_hidden_state[0].index_select(0, where_N)
    return logps.SelectedLogps.apply(hidden_ND, model.lm_head.weight, target_N, temperature)


def nothing_again(model, _):
    model.gradient_checkpointing_disable()


def products_kept(model, _, checkpoint=fsdp.checkpoint_activations):
    checkpoint(model, "selective")


def whole_layers_again(model, _, checkpoint=fsdp.checkpoint_activations):
    checkpoint(model, "full")


refuel_pair_logps = refuel.pair_logps
VARIANTS = {  # whose attention, and which functions are exchanged
    "ours": ("pairs", {}),
    "without the shared prefix": ("pairs", dict(pair_logps=two_rows)),
    "without packing": ("sdpa", dict(pair_logps=dense(one_pair_a_row))),
    "with a mask of the whole row": ("sdpa", dict(pair_logps=dense(one_row))),
    "attention piece by piece": ("pairs", dict(in_one_call=logps.piece_by_piece)),  # on a CPU it is ours
    "logits at every position": ("pairs", dict(token_logps=logits_everywhere)),
    "logits in one piece": ("pairs", dict(SelectedLogps=InOnePiece)),
    "no activation computed again": ("pairs", dict(checkpoint_activations=nothing_again)),
    "products kept": ("pairs", dict(checkpoint_activations=products_kept)),
    "whole layers computed again": ("pairs", dict(checkpoint_activations=whole_layers_again)),
    "the released layout": ("sdpa", dict(pair_logps=padded, micro_batches=one_by_one)),
}


@contextlib.contextmanager
def exchanged(parts):
    places = [vars(module) for module in (refuel, logps, fsdp)]
    assert all(any(name in place for place in places) for name in parts)
    kept = [{name: place[name] for name in parts if name in place} for place in places]
    for place, names in zip(places, kept):
        place.update((name, parts[name]) for name in names)
    try:
        yield
    finally:
        for place, names in zip(places, kept):
            place.update(names)


def run_step(model, optimizer, pairs, cfg, attention="pairs", parts={}):
    """Old log-probs, forward, backward, AdamW on one batch; returns the old log-probs (2, B)."""
    with exchanged(parts):
        logps.attend_in_pairs(model).set_attn_implementation(attention)
        # each time: TRL's trainer has its own way with the same model
        fsdp.checkpoint_activations(model, cfg.activation_checkpointing)
        old = with_logps(model, pairs, cfg)
        refuel.regress(model, optimizer, old, cfg)
    return torch.tensor([p.logps for p in old]).T


class Trl:
    """TRL's DPO step on the same ids: reference log-probs by the policy itself before it moves, then training_step.

    As TRL comes, whole layers are computed again in the backward; its default batch of 8 pairs would be one here."""

    def __init__(self, model):
        os.environ["TQDM_DISABLE"] = "1"
        import toy
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        words = {"prompt": ["something red"] * 4, "chosen": ["go on"] * 4, "rejected": ["not sure"] * 4}
        cuda = model.lm_head.weight.is_cuda
        options = DPOConfig(output_dir=os.path.join("runs", "trl"), precompute_ref_log_probs=True, max_length=2048,
                            gradient_checkpointing=True, bf16=cuda, use_cpu=not cuda,
                            report_to=[])  # fmt: skip
        self.trainer = DPOTrainer(model, args=options, train_dataset=Dataset.from_dict(words),
                                  processing_class=toy.make_tokenizer())  # fmt: skip

    def step(self, model, optimizer, pairs, size):
        model.set_attn_implementation("sdpa")
        fsdp.checkpoint_activations(model, "full")
        reference_logps = []
        batches = [self.trainer.data_collator(
            [dict(prompt_ids=p.prefix, chosen_ids=p.y, rejected_ids=p.y2) for p in pairs[i : i + size]])
            for i in range(0, len(pairs), size)]  # fmt: skip
        self.trainer.current_gradient_accumulation_steps = len(batches)
        for batch in batches:
            batch = {k: v.to(model.lm_head.weight.device) for k, v in batch.items()}
            reference = self.trainer.compute_ref_log_probs(model, batch)
            reference_logps.append(torch.stack(reference).cpu())
            batch |= dict(zip(("ref_chosen_logps", "ref_rejected_logps"), reference))
            self.trainer.training_step(model, batch)
        optimizer.step()
        optimizer.zero_grad()
        return torch.cat(reference_logps, 1)


# --- measuring --------------------------------------------------------------------------------------------------


def clock(device):
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def matmul_rate(model):
    """FLOP/s of one large square product in the model's type: what the machine gives."""
    device, dtype = model.lm_head.weight.device.type, model.lm_head.weight.dtype
    n = 8192 if device == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    torch.mm(a, a)
    start = clock(device)
    for _ in range(5):
        torch.mm(a, a)
    return 5 * 2 * n**3 / (clock(device) - start)


def in_place(sum_ik, a_ij, b_jk, **_):
    """FLOPs of addmm_, which torch's counter does not know, from shapes."""
    return 2 * a_ij[0] * a_ij[1] * b_jk[1]


# attention is not counted here, and torch 2.11's rule refuses key-value heads that are shared
COUNTED = {torch.ops.aten.addmm_: in_place} | {
    getattr(torch.ops.aten, f"_scaled_dot_product_{kind}_attention{back}"): lambda *_, **more: 0
    for kind in ("flash", "efficient", "cudnn") for back in ("", "_backward")}  # fmt: skip


def step_cfg(args, more=""):
    """Setting one at a learning rate at which all variants see one policy."""
    flags = f"--setting one --lr 1e-9 --micro-tokens {args.micro_tokens[0]} {more}"
    return refuel.read_config(flags.split())


def measure_step(args):
    """Variants by turns on the same pairs; each repeat draws new ones."""
    model = make_model(args.model, args.device)
    flags = f"--batch-size {args.pairs} --num-prompts {args.pairs} --temperature 1.0"  # TRL's temperature
    cfg = step_cfg(args, flags)
    optimizer = refuel.make_optimizer(model, cfg)
    variants = dict(VARIANTS)
    if args.device == "cuda":
        variants["flex attention"] = ("flex_attention", dict(token_logps=flex_logps))
        fsdp.PRODUCTS.add(torch.ops.higher_order.flex_attention)  # not to be computed again in the backward either
    run = {name: lambda pairs, how=how: run_step(model, optimizer, pairs, cfg, *how) for name, how in variants.items()}
    for tokens in args.micro_tokens[1:]:
        other = replace(cfg, micro_tokens=tokens)
        run[f"ours, forwards of {tokens:,} tokens"] = lambda pairs, cfg=other: run_step(model, optimizer, pairs, cfg)
    with contextlib.suppress(ImportError):
        import trl

        other = Trl(model)
        for size in (1, 2, 4):
            run[f"TRL {trl.__version__}'s DPO, {size} a batch"] = partial(other.step, model, optimizer, size=size)
    run = {name: f for name, f in run.items() if not args.only or name in args.only or name.split()[0] in args.only}
    vocabulary, scale = model.config.vocab_size, 0.05 if args.model == "tiny" else 1.0
    run_step(model, optimizer, make_pairs(1, 10**6, vocabulary, scale), cfg)  # AdamW's state, the libraries' start
    rates, rows = [], {name: dict(seconds=[], share=[], gap=0.0) for name in run}
    for repeat in range(args.repeats):
        pairs = make_pairs(args.pairs, args.seed + repeat, vocabulary, scale)
        work, found_logps = flops(model, pairs), {}
        rates.append(matmul_rate(model))
        for name, step in run.items():
            start = clock(args.device)
            found_logps[name] = step(pairs)
            rows[name]["seconds"].append(clock(args.device) - start)
            rows[name]["share"].append(work / rows[name]["seconds"][-1] / rates[-1])
            print(f"{repeat} {name}: {rows[name]['seconds'][-1]:.1f} s", file=sys.stderr, flush=True)
        tokens = torch.tensor([[len(p.y) for p in pairs], [len(p.y2) for p in pairs]])
        for name, logp_2B in found_logps.items():
            gap = ((logp_2B - found_logps["ours"]).abs() / tokens).max().item()
            rows[name]["gap"] = max(rows[name]["gap"], gap)
            assert gap < (1e-4 if args.device == "cpu" else 0.1), (name, gap)
    pairs = make_pairs(args.pairs, args.seed, vocabulary, scale)
    for name, step in run.items():
        part = pairs[:1] if name == "the released layout" else pairs  # pair by pair, each padded to the same length
        rows[name]["peak"] = peak_bytes(args.device, lambda step=step, part=part: step(part))
        counter = FlopCounterMode(display=False, custom_mapping=COUNTED)  # takes memory itself
        with contextlib.nullcontext() if "flex" in name else counter:  # compiled: not counted
            step(part)
        products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "mm" in str(op))
        rows[name]["flops"] = products * len(pairs) / len(part) / flops(model, pairs, attention=False)
    for row in rows.values():
        row["pairs_per_second"] = args.pairs / statistics.median(row["seconds"])
        row["ours_over_it"] = statistics.median(s / o for s, o in zip(row["seconds"], rows["ours"]["seconds"]))
        row["share"] = statistics.median(row["share"])
    unique = sum(map(logps.pair_length, pairs))
    return dict(rows=rows, matmul=statistics.median(rates), pairs=args.pairs, unique_tokens=unique, device=args.device,
                model=args.model)  # fmt: skip


def step_table(found):
    """On a GPU the share is also given of an H100's 989 TFLOP/s, which is what is called MFU."""
    lines = [f"matrix products: {found['matmul'] / 1e9:.0f} GFLOP/s", ""]
    lines += ["| layout | pairs a second | time | FLOPs | of the matmul rate | peak memory, GiB | log-probs differ by |"]
    lines.append("|---" * 7 + "|")
    for name, r in found["rows"].items():
        mfu = f", MFU {100 * r['share'] * found['matmul'] / 989e12:.0f} %" if found["device"] == "cuda" else ""
        lines.append(f"| {name} | {r['pairs_per_second']:.3f} | {r['ours_over_it']:.2f} | {r['flops']:.2f} | "
                     f"{100 * r['share']:.0f} %{mfu} | {r['peak'] / 2**30:.2f} | {r['gap']:.0e} |")  # fmt: skip
    return lines


# --- how cost grows ---------------------------------------------------------------------------------------------


def timed_steps(model, batches, repeats, base_cfg):
    """[median seconds] of a step on each batch, by turns."""
    optimizer = refuel.make_optimizer(model, base_cfg)
    seconds = [[] for _ in batches]
    for repeat in range(repeats + 1):  # the first round warms up
        for batch, found in zip(batches, seconds):
            cfg = replace(base_cfg, batch_size=len(batch))
            start = clock(model.lm_head.weight.device.type)
            run_step(model, optimizer, batch, cfg)
            found.append(clock(model.lm_head.weight.device.type) - start)
    return [statistics.median(found[1:]) for found in seconds]


def one_rank(args):
    """This process's part of a step on --pairs pairs, under torchrun; rank 0 prints all ranks' seconds."""
    model = logps.attend_in_pairs(make_model(args.model, args.device))
    fsdp.shard(model)
    pairs = make_pairs(args.pairs, args.seed, model.config.vocab_size)
    seconds = timed_steps(model, [pairs], args.repeats, step_cfg(args))
    total = ranks.add_up(torch.tensor(seconds))[0].item()
    if ranks.rank() == 0:
        print(json.dumps(total))
    ranks.barrier()  # gloo aborts a process that leaves while another one still talks to it


def measure_growth(args):
    """Seconds of a step for each 1,000 unique tokens: with more pairs, with longer prefixes, on one and two ranks."""
    model = make_model(args.model, args.device)
    words, rows = model.config.vocab_size, []
    some, many = make_pairs(args.pairs, args.seed, words), make_pairs(8 * args.pairs, args.seed, words)
    batches = {f"{k} times {args.pairs} pairs": [p._replace(h=p.h) for _ in range(k) for p in some] for k in (1, 2, 4, 8)}
    ends = [p for p in many if max(len(p.y), len(p.y2)) <= 256][: args.pairs]  # with room for the longest prefix
    for length in (128, 512, 1024, 1792):
        ids = [i % words for i in range(length)]
        batches[f"{len(ends)} pairs, a prefix of {length}"] = [p._replace(prefix=ids) for p in ends]
    for name, batch, seconds in zip(batches, batches.values(), timed_steps(model, list(batches.values()), args.repeats,
                                                                           step_cfg(args))):  # fmt: skip
        tokens = sum(map(logps.pair_length, batch))
        rows.append(dict(what=name, tokens=tokens, seconds=seconds, flops=flops(model, batch)))
    del model
    for processes in (1, 2) if args.device == "cpu" else ():
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command += [__file__, "rank", "--model", args.model, "--repeats", str(args.repeats), "--pairs", str(4 * args.pairs)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=True)
        batch = make_pairs(4 * args.pairs, args.seed, words)
        rows.append(dict(what=f"{len(batch)} pairs on {processes} ranks", tokens=sum(map(logps.pair_length, batch)),
                         seconds=json.loads(done.stdout.splitlines()[-1])))  # fmt: skip
    return dict(rows=rows, model=args.model)


def growth_table(found):
    lines = ["| batch | unique tokens | seconds, all ranks | ms a token | ps a FLOP |", "|---" * 5 + "|"]
    for r in found["rows"]:
        work = f"{1e12 * r['seconds'] / r['flops']:.1f}" if "flops" in r else "-"
        lines.append(f"| {r['what']} | {r['tokens']} | {r['seconds']:.2f} | {1000 * r['seconds'] / r['tokens']:.2f} | "
                     f"{work} |")  # fmt: skip
    return lines


# --- generation -------------------------------------------------------------------------------------------------


class Oracle:
    """Watches an engine: what it is asked, and what one would compute that never forgets and may look anywhere.

    Of a prompt that is what follows its longest beginning seen before, at least its last token; of an answer all but
    the last token, which nobody feeds until it stands in a prompt. In `count`: prompts (all of their tokens), prefill
    and decode (of these what must be computed), turns."""

    def __init__(self, engine):
        self.engine, self.seen, self.count, self.tokens, self.asked = engine, {}, Counter(), engine.tokens, {}
        if hasattr(engine, "requests"):  # vLLM's way is one request at a time
            self.begin, self.step = engine.begin, engine.step
            engine.begin, engine.step = self.one_begins, self.some_end
        else:
            self.generate = engine.generate
            engine.generate = self.a_batch

    def learn(self, ids):
        node, known = self.seen, 0
        for i in ids:
            known += i in node
            node = node.setdefault(i, {})
        return known

    def reads(self, ids):
        self.count.update(prompts=len(ids), prefill=max(1, len(ids) - self.learn(ids)), turns=1)

    def says(self, ids, answer):
        self.learn([*ids, *answer[:-1]])
        self.count.update(decode=len(answer) - 1)

    def a_batch(self, prompts, seeds, limits):
        for ids in prompts:
            self.reads(ids)
        answers = self.generate(prompts, seeds, limits)
        for ids, (answer, _, _) in zip(prompts, answers):
            self.says(ids, answer)
        return answers

    def one_begins(self, ids, seed, limit):
        number = self.begin(ids, seed, limit)
        self.reads(ids)
        self.asked[number] = list(ids)
        return number

    def some_end(self):
        answers = self.step()
        for number, (answer, _, _) in answers:
            self.says(self.asked.pop(number), answer)
        return answers


OPENINGS = ["How do I keep basil alive indoors?", "Why is the sky dark at night?", "Plan a weekend in Lisbon, please.",
            "What is a good first programming language?", "Explain compound interest.", "How does a heat pump work?",
            "Suggest a name for a grey cat.", "What should I cook with leeks?"]  # fmt: skip


def measure_generation(args):
    """One iteration's collection, --pairs prompts, by each engine: tokens computed for each needed one, and speed.

    The toy without --policy; else that checkpoint as policy and as user, on openings of this file, and --reward."""
    from machinery import rewards
    import toy
    from simulator import Dialogue

    rows = []
    for engine in (args.engine,) if args.engine else ("vllm", "transformers"):
        path = args.policy or simulator.checkpoint("toy")
        cfg = refuel.read_config(f"--setting toy --policy {path} --engine {engine}".split())
        user, reward = toy.Customer(), toy.Reward()
        if args.policy:
            cfg = replace(cfg, user=path, dataset="bench", max_new_tokens=48, max_length=1024, max_dialogue=1024,
                          user_tokens=96, max_failures=1.0, reward=args.reward or "toy", reward_tokens=4096)  # fmt: skip
            user = users.load_user(cfg)
            reward = lambda dialogues: [float(len(d.ids)) for d in dialogues]  # noqa: E731
            reward = rewards.load_reward(cfg) if args.reward else reward
        policy = engines.load_engine(path, cfg)
        if args.policy:
            prompts = [Dialogue.start(policy.tokenizer, text) for text in (OPENINGS * args.pairs)[: args.pairs]]
        else:
            prompts = simulator.train_prompts(replace(cfg, num_prompts=args.pairs), policy.tokenizer, 1)
        refuel.collect(prompts[:2], policy, user, reward, cfg, np.random.default_rng(9))  # the libraries' start
        policy.update(files.read_weights(path))  # an iteration begins with an empty cache
        speakers = {"policy": Oracle(policy)} | ({"user": Oracle(user.ask.engine)} if args.policy else {})
        for speaker in (policy, *(user.ask.engine for _ in speakers if args.policy), reward):
            getattr(speaker, "tokens", Counter()).clear()
        start, dropped = time.process_time(), Counter()
        pairs = refuel.collect(prompts, policy, user, reward, cfg, np.random.default_rng(0), dropped)
        seconds = time.process_time() - start
        row = dict(engine=engine, prompts=len(prompts), pairs=len(pairs), seconds=seconds, dropped=dropped)
        whole = [d for p in pairs for d in p.dialogues]
        turns = sum(len(d.spans) for d in whole)
        answers = sum(end - start for d in whole for start, end in d.spans)
        row["a"], row["u"] = answers / turns, sum(d.spans[-1][1] for d in whole) / turns - answers / turns
        row["law"] = sum(2 * p.H - p.h + 1 for p in pairs), sum(2 * p.H - p.h - 1 for p in pairs)
        row["speakers"] = {name: dict(needed=oracle.count, computed=Counter(oracle.tokens))
                           for name, oracle in speakers.items()}  # fmt: skip
        if args.reward:
            read = sum(len(rewards.conversation_ids(reward.tokenizer, d.messages)) for d in whole)
            row["speakers"]["reward"] = dict(needed=dict(prompts=read, prefill=read), computed=Counter(reward.tokens))
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    return dict(rows=rows, model=args.policy and os.path.basename(args.policy) or "toy")


def generation_table(found):
    """Beside the counts the closed forms of a pair by the law of section 4.2: 5 answers and 3 questions; the policy
    reads 4u with every prefix cached (one token a turn more, the last sampled one) and 12.3u + 7.3a with none."""
    lines = ["| engine | speaker | turns a pair | prefill: without a cache | needed | computed | decode: needed | computed "
             "| sampled tokens a CPU second |", "|---" * 9 + "|"]  # fmt: skip
    for r in found["rows"]:
        for name, s in r["speakers"].items():
            n, c = Counter(s["needed"]), Counter(s["computed"])
            speed = f"{(n['decode'] + n['turns']) / r['seconds']:.0f}" if name == "policy" else ""
            lines.append(f"| {r['engine']} | {name} | {n['turns'] / r['pairs']:.2f} | {n['prompts']} | {n['prefill']} | "
                         f"{c['prefill']} | {n['decode']} | {c['decode']} | {speed} |")  # fmt: skip
        a, u, n = r["a"], r["u"], r["pairs"]
        lines.append(f"| {r['engine']} | policy, by the law | 5 | {n * (12.3 * u + 7.3 * a):.0f} | {n * (4 * u + 5):.0f} | "
                     f"| {n * 5 * (a - 1):.0f} | | |")  # fmt: skip
        lines.append(f"| | {n} pairs of {r['prompts']} prompts, dropped {dict(r['dropped'])}; a = {a:.1f}, u = {u:.1f}; "
                     f"these (h, H) ask for {r['law'][0] / n:.2f} answers, {r['law'][1] / n:.2f} questions a pair |"
                     + " |" * 7)  # fmt: skip
    return lines


# --- a CPU's cache -----------------------------------------------------------------------------------------------


def measure_cache(args):
    """--pairs test customers of the English shop, five turns each, by vLLM with a cache for eight dialogues and for all."""
    import shop

    cfg = refuel.read_config(["--world", os.path.join(ROOT, "tests", "shop.py"), "--policy", args.policy])
    cfg = simulator.prepare(replace(cfg, engine="vllm", eval_dialogues=args.pairs), trains=False)
    rows, said = [], []
    for dialogues in (8, args.pairs):
        engine = engines.VLLMEngine(cfg.policy, cfg.max_new_tokens, cfg.temperature, cfg.max_length, dialogues=dialogues)
        prompts, start = simulator.test_prompts(cfg, engine.tokenizer), time.process_time()
        played = simulator.rollout(prompts, engine, shop.User(), [cfg.max_turns] * len(prompts))
        rows.append(dict(room=dialogues, seconds=time.process_time() - start) | engine.tokens)
        said.append([d.ids for d in played])
        print(rows[-1], file=sys.stderr, flush=True)
    return dict(rows=rows, model="shop", dialogues=args.pairs, same=float(np.mean([a == b for a, b in zip(*said)])))


def cache_table(found):
    lines = ["| a cache for | CPU seconds | prompt tokens computed | found in the cache | decoded |", "|---" * 5 + "|"]
    for r in found["rows"]:
        lines.append(f"| {r['room']} of {found['dialogues']} dialogues | {r['seconds']:.0f} | {r['prefill']} | {r['cached']} | "
                     f"{r['decode']} |")  # fmt: skip
    return [*lines, f"{found['same']:.0%} of the dialogues are the same to the id"]


# --- waiting ----------------------------------------------------------------------------------------------------


def turn_by_turn(dialogues, policy, user, turns):
    """simulator.rollout as it was: at each turn all wait for the longest answer, then for the slowest user."""
    dialogues = [d.copy() for d in dialogues]
    goals = list(zip(dialogues, turns, strict=True))
    active = [d for d, n in goals if len(d.spans) < n]
    while active:
        for d, answer in zip(active, policy.answer(active), strict=True):
            if answer is None:
                d.failed = "too long"
            else:
                d.add_answer(policy.tokenizer, *answer)
        active = [d for d, n in goals if len(d.spans) < n and not d.failed]
        for d, text in zip(active, seams.ask(user, active), strict=True):
            if text is None:
                d.failed = "user"
            else:
                d.add_user(policy.tokenizer, text)
        active = [d for d in active if not d.failed]
    return dialogues


def one_then_the_other(starts, h, H, streams, policy, user, dropped):
    """simulator.futures as it was: all first conversations to their ends, then all second ones."""
    firsts = turn_by_turn([d.copy(stream=(s, 0)) for d, s in zip(starts, streams)], policy, user, H)
    whole = [i for i, first in enumerate(firsts) if not first.failed]
    resets = [firsts[i].reset(h[i]).copy(stream=(streams[i], 1)) for i in whole]
    seconds = turn_by_turn(resets, policy, user, [H[i] for i in whole])
    dropped.update(d.failed for d in (*firsts, *seconds) if d.failed)
    return [(firsts[i], second, int(h[i])) for i, second in zip(whole, seconds) if not second.failed]


class SlowServer(Scripted):
    """A server that plays the user: each reply takes a time of its own, lognormal, median 1 s, sigma 0.8; the same one
    for the same question, so that both loops wait for the same replies."""

    def __init__(self):
        super().__init__(None)

    def reply(self, body):
        rng = random.Random(str(body))
        time.sleep(rng.lognormvariate(0.0, 0.8))
        return f"Question: {rng.choice(['go on', 'not sure', 'small please', 'red again'])}"


def cpu_seconds():
    """Of this process and all below it, the user's server among them."""
    parents, seconds = {}, {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as stat:  # one may have ended
            fields = stat.read().rpartition(") ")[2].split()
            parents[int(pid)], seconds[int(pid)] = int(fields[1]), int(fields[11]) + int(fields[12])
    mine = {os.getpid()}
    while True:
        more = {pid for pid, parent in parents.items() if parent in mine} - mine
        if not more:
            return sum(seconds[pid] for pid in mine) / os.sysconf("SC_CLK_TCK")
        mine |= more


def waiting_casts(args):
    """{name: (cfg, policy, user, prompts)}: who talks with whom."""
    if args.policy:
        flags = f"--setting toy --policy {args.policy} --user serve:{args.policy} --dataset bench --engine vllm"
        flags += " --max-new-tokens 32 --user-tokens 64 --max-length 1024 --max-turns 2 --max-failures 1"
        cfg = refuel.read_config([*flags.split(), "--out", "runs/bench"])
        policy, user = engines.load_engine(args.policy, cfg), users.load_user(cfg)
        prompts = [simulator.Dialogue.start(policy.tokenizer, text) for text in (OPENINGS * args.pairs)[: args.pairs]]
        return {"a checkpoint as policy and as served user": (cfg, policy, user, prompts)}
    import toy

    path = simulator.checkpoint("toy")
    cfg = refuel.read_config(f"--setting toy --policy {path} --engine {args.engine or 'transformers'}".split())
    policy = engines.load_engine(path, cfg)
    slow = users.LLMUser(ask.Server(SlowServer().url, "slow", threads=256, whole=True, flag="--user"), 500, 1.0)
    prompts = {n: simulator.train_prompts(replace(cfg, num_prompts=n), policy.tokenizer, 1)[:] for n in (64, 512)}
    return {"a server that takes its time, 64 dialogues": (cfg, policy, slow, prompts[64]),
            "the toy's scripted user, 512 dialogues": (cfg, policy, toy.Customer(), prompts[512])}  # fmt: skip


def measure_waiting(args):
    """Seconds by the clock of line 3 for the same (h, H) and noise, both loops by turns; tokens that the policy computed."""
    os.environ["no_proxy"] = "*"
    loops, rows = {"turn by turn": one_then_the_other, "each at its own pace": simulator.futures}, []
    for name, (cfg, policy, user, prompts) in waiting_casts(args).items():
        weights = partial(files.read_weights, policy.tokenizer.name_or_path)
        found = {loop: dict(what=name, loop=loop, seconds=[], cpu=[], tokens=[], pairs=[]) for loop in loops}
        for repeat in range(args.repeats):
            rng = np.random.default_rng(args.seed + repeat)
            h, H = refuel.sample_resets(len(prompts), cfg.max_turns, rng)
            streams = rng.integers(2**62, size=len(prompts)).tolist()
            talks = {}
            for loop in list(loops)[:: 1 - 2 * (repeat % 2)]:  # each is the first as often
                policy.update(weights())  # an iteration begins with an empty cache
                policy.tokens.clear()
                start, cpu = time.monotonic(), cpu_seconds()
                talks[loop] = loops[loop](prompts, h, H, streams, policy, user, Counter())
                found[loop]["seconds"].append(time.monotonic() - start)
                found[loop]["cpu"].append(cpu_seconds() - cpu)
                found[loop]["tokens"].append(dict(policy.tokens))
                found[loop]["pairs"].append(len(talks[loop]))
                print(repeat, name, loop, *(found[loop][k][-1] for k in ("seconds", "cpu", "tokens", "pairs")),
                      file=sys.stderr, flush=True)  # fmt: skip
            ids = [[(a.ids, b.ids) for a, b, _ in talk] for talk in talks.values()]
            assert args.policy or ids[0] == ids[1]  # a scripted user: the same conversations, in the same order
        rows += found.values()
    rows += [] if args.policy else toy_commands(args, loops)
    return dict(rows=rows, model=os.path.basename(args.policy) if args.policy else "toy")


def toy_commands(args, loops):
    """The same of whole commands, refuel.py's of the toy with its training and evaluation."""
    flags = "--setting toy --engine transformers --iterations 1 --num-prompts 512 --epochs 1 --eval-dialogues 250"
    rollouts = {"turn by turn": turn_by_turn, "each at its own pace": simulator.rollout}
    found = {loop: dict(what="the toy's whole command", loop=loop, seconds=[], cpu=[], tokens=[], pairs=[]) for loop in loops}
    simulator.checkpoint("toy")  # the base policy is made once
    for repeat in range(args.repeats):
        counted = []
        for loop in list(loops)[:: 1 - 2 * (repeat % 2)]:
            start, cpu = time.monotonic(), cpu_seconds()
            with (tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(sys.stderr),
                  mock.patch.object(refuel, "futures", loops[loop]),
                  mock.patch.object(evaluate, "rollout", rollouts[loop])):  # fmt: skip
                refuel.main([*flags.split(), "--seed", str(args.seed + repeat), "--out", out])
                row = next(r for r in files.read_lines(os.path.join(out, "metrics.jsonl")) if "P(H)" in r)
                counted.append(row["pairs"])
            found[loop]["seconds"].append(time.monotonic() - start)
            found[loop]["cpu"].append(cpu_seconds() - cpu)
            found[loop]["tokens"].append(row["tokens"]["policy"])
            found[loop]["pairs"].append(row["pairs"])
        assert counted[0] == counted[1]
    return list(found.values())


def waiting_table(found):
    lines = ["| who | loop | seconds | turn by turn / this | CPU seconds | pairs | policy: prefill | cached | decode |",
             "|---" * 9 + "|"]  # fmt: skip
    before = {}
    for r in found["rows"]:
        before.setdefault(r["what"], r["seconds"])
        ratios = [a / b for a, b in zip(before[r["what"]], r["seconds"])]
        sums = {k: sum(t.get(k, 0) for t in r["tokens"]) for k in ("prefill", "cached", "decode")}
        lines.append(f"| {r['what']} | {r['loop']} | {', '.join(f'{x:.1f}' for x in r['seconds'])} | "
                     f"{', '.join(f'{x:.2f}' for x in ratios)} | {', '.join(f'{x:.1f}' for x in r['cpu'])} | "
                     f"{sum(r['pairs'])} | "
                     f"{' | '.join(str(n) for n in sums.values())} |")  # fmt: skip
    return lines


# --- the command ------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "growth", "generation", "cache", "waiting", "lengths", "rank"])
    parser.add_argument("file", nargs="?")
    parser.add_argument("--model", choices=list(MODELS), default="cpu")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--micro-tokens", type=int, nargs="+", default=[3072], help="of setting one; more: more rows")
    parser.add_argument("--only", nargs="*", default=[], help="layouts by name or first word")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policy")
    parser.add_argument("--reward")
    parser.add_argument("--engine")
    parser.add_argument("--out", default=RESULTS)
    args = parser.parse_args()
    if args.what == "lengths":
        rows = make_lengths(args.file, template.load_tokenizer(args.policy))
        files.write_file(LENGTHS, "[\n" + ",\n".join(json.dumps(r, separators=(",", ":")) for r in rows) + "\n]\n")
        return
    ranks.start_processes()
    if args.what == "rank":
        return one_rank(args)
    measure, table = {"step": (measure_step, step_table), "growth": (measure_growth, growth_table),
                      "generation": (measure_generation, generation_table), "cache": (measure_cache, cache_table),
                      "waiting": (measure_waiting, waiting_table)}[args.what]  # fmt: skip
    found = measure(args) | {"command": " ".join(["python", *sys.argv]), "date": time.strftime("%Y-%m-%d")}
    print("\n".join(table(found)))
    kept = files.read_json(args.out) if os.path.exists(args.out) else {}
    key = f"{args.what} {found['model']} {args.device}" + f" {' '.join(args.only)}" * bool(args.only)
    files.write_file(args.out, json.dumps(kept | {key: found}, indent=1))


if __name__ == "__main__":
    main()
