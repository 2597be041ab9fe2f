"""REFUEL: REgressing the RELative FUturE, Algorithm 1 of the paper, and below it how a stopped run goes on.

    python refuel.py --setting toy                                  a laptop, minutes
    torchrun --nproc_per_node 2 refuel.py --setting toy             the same on two processes
    torchrun --nproc_per_node 8 refuel.py --setting one             section 4.2
    torchrun --nproc_per_node 8 refuel.py --setting two --dataset hh       section 4.3 (or ultrainteract)

The policy talks with a user (roll-in), the conversation is reset to a turn h and continued a second time, and the
policy is fitted so that its log-ratio explains the difference of the two conversations' rewards (Eq. 1).

Dimension key: B pairs of a batch, N pairs of an iteration, H turns; a leading 2 is the pair (y, y').
"""
# first: processes.py sets what torch and vLLM read when they are imported
from processes import log, log_data, one_line, open_run, prepare, start_processes

import argparse
import glob
import math
import os
import shutil
import time
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import data
import engines
import files
import plan
import rewards
import simulator
from files import BadInput, barrier, in_waves, rank, world
from fsdp import (add_up, exchanged, full_weights, gradient_norm, learned_weights, load_policy, load_training,
                  read_slices, remove_training, save_policy, save_training)  # fmt: skip
from packing import micro_batches, pair_length, pair_logps
from simulator import Dialogue, rollout


# ---------------------------------------------------------------------------------------------------------------
# The inputs of Algorithm 1
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on; every field is a flag (num_prompts is --num-prompts)."""

    setting: str  # toy, one (section 4.2) or two (section 4.3)
    policy: str  # pi_1: a checkpoint folder or a hub id
    reference: str  # what win rates and KL are measured against
    user: str  # who plays the user: toy, dataset (its own questions), serve:CHECKPOINT, CHECKPOINT, or a server's URL
    user_model: str  # the model's name at a URL
    user_temperature: float  # of a language model as the user
    user_tokens: int  # its whole reply; a question that is cut there is none
    max_failures: float  # share of dialogues that the user may leave without a turn; above it the run stops
    reward: str  # r(s_{H+1})
    reward_tokens: int  # a conversation that is longer for the reward model is dropped and counted, never cut
    dataset: str  # where the first prompts come from: toy, ultrainteract, hh, a file, a folder or a hub id
    engine: str  # vllm, transformers, or auto: vllm where it is installed
    out: str  # the run's folder
    seed: int
    iterations: int  # T of Algorithm 1; 0, in setting two: as many as one pass over the training prompts has
    num_prompts: int  # prompts an iteration; each gives at most one pair
    # 0, setting one: every iteration is a training of its own and draws from all prompts. N, setting two: iterations
    # are the updates of one training (one optimiser, one schedule, prompts pass by pass); every N-th policy is kept.
    policy_every: int
    max_turns: int  # H ~ U(max_turns), section 4.2
    max_new_tokens: int  # a turn of the assistant
    max_length: int  # the engine's context: a dialogue that may outgrow it is dropped and counted
    max_dialogue: int  # section 4.2: a finished dialogue of more tokens is dropped, y's and y''s by one rule
    temperature: float  # of sampling and of ln pi in the loss, which must agree; no top-p, no top-k
    eta: float  # Eq. 1
    gamma: float  # Eq. 11: the weight of ln pi_t/pi_0 in the reward
    penalty: float  # Eq. 11's Gamma: the reward of a dialogue with an answer that was cut; 0: it keeps its score
    train_layers: int  # the last so many layers learn, all else is frozen; 0: everything learns
    lr: float
    warmup: float  # share of the steps; then a cosine to 0. Setting two: none, and linear to 0 over the updates
    weight_decay: float
    batch_size: int  # pairs a step, over all ranks
    epochs: int  # passes over an iteration's pairs
    micro_tokens: int  # tokens of one forward and backward on one rank
    activation_checkpointing: str  # what of a layer runs again in the backward: none, selective (no product), full
    replicas: int  # copies of the weights; 1: sharded over all ranks; the number of nodes: within each node
    checkpoint_steps: int  # steps (setting two: updates) between two saved training states
    snapshot_steps: int  # steps between two policies kept for Figure 2; 0: none
    wave: int  # dialogues that an engine plays at once: the unit of work, of seeds and of resuming
    eval_wave: int  # the same of the evaluation
    eval_dialogues: int  # section 4.2: 500; more here, since one turn's interval is 4.4 points wide at 500


SETTINGS = {
    # eta is the best of baselines.GRID for REFUEL; lr 5e-4 diverges. The world is described in toy.py.
    "toy": dict(
        policy="toy", reference="toy", user="toy", reward="toy", dataset="toy", engine="auto", out="runs/toy", seed=0,
        user_model="", user_temperature=0.8, user_tokens=64, max_failures=0.05, reward_tokens=256, max_dialogue=256,
        iterations=2, num_prompts=2048, policy_every=0, max_turns=5, max_new_tokens=16, max_length=256, temperature=1.0,
        eta=30.0, gamma=0.0, penalty=0.0, train_layers=0, lr=1e-4, warmup=0.1, weight_decay=1e-6, batch_size=32,
        epochs=1, micro_tokens=4096, activation_checkpointing="none", replicas=1, checkpoint_steps=50,
        snapshot_steps=0, wave=512, eval_wave=512, eval_dialogues=1000,
    ),
    "one": dict(
        policy="meta-llama/Meta-Llama-3-8B-Instruct",  # section 4.2; the reference is pi_1 itself
        reference="meta-llama/Meta-Llama-3-8B-Instruct",
        user="serve:meta-llama/Llama-3.1-70B-Instruct",  # C.2
        user_model="meta-llama/Llama-3.1-70B-Instruct",  # where --user is a URL
        user_temperature=0.8, user_tokens=1024,  # the released code; the paper is silent
        max_failures=0.05,  # ours: the released code takes any reply
        reward="RLHFlow/ArmoRM-Llama3-8B-v0.1", reward_tokens=4096,  # section 4.2; the length is the released code's
        dataset="ultrainteract", engine="auto", out="runs/one", seed=0,
        iterations=2, policy_every=0,  # section 4.2
        num_prompts=64_000,  # the released README's episodes, before what is dropped
        max_turns=5,  # section 4.2: H ~ U(5)
        max_new_tokens=1024, temperature=0.8,  # the released README
        max_length=8192,  # Llama 3's context: evaluation has no limit of its own
        max_dialogue=2048,  # sections 4.2 and C.4
        eta=1e3, lr=3e-7, warmup=0.1, weight_decay=1e-6, batch_size=128, epochs=1,  # the released README; C.3
        gamma=0.0, penalty=0.0, train_layers=0,  # C.1: Eq. 11 is setting two's, and all layers are trained
        micro_tokens=3072,  # ours: no pair is longer (2,048 and another answer); see --plan for the memory
        activation_checkpointing="selective", replicas=1,
        checkpoint_steps=50, snapshot_steps=0,
        # ours: as many as the cache beside the user's part of an 80-GB GPU holds to their end, see --plan
        wave=64, eval_wave=64,
        eval_dialogues=500,  # section 4.2
    ),
    "two": dict(
        policy="meta-llama/Meta-Llama-3-8B-Instruct",  # section 4.3
        reference="meta-llama/Meta-Llama-3-8B-Instruct",
        user="dataset",  # section 4.3: the data's own questions, as many as there are
        user_model="", user_temperature=1.0, user_tokens=1024, max_failures=0.05,  # no model speaks for the user
        reward="sfairXC/FsfairX-LLaMA3-RM-v0.1", reward_tokens=4096,  # section 4.3; no dialogue reaches that length
        dataset="ultrainteract", engine="auto", out="runs/two", seed=0,
        num_prompts=32, batch_size=32,  # C.1: |D| = 32
        iterations=0,  # C.1: one pass over the data
        epochs=4,  # the released code: four steps on each |D|; the paper's one epoch is the pass over the data
        policy_every=500, checkpoint_steps=20,  # ours: a policy takes 32 GB, a training state 10
        max_turns=5, max_dialogue=3200,  # section 4.3; C.4 (section 4.3 itself says 2,048 tokens)
        max_new_tokens=1024,  # Table 5; fewer for dialogues of more turns, see data.ULTRAINTERACT_CAPS
        max_length=4352,  # ours: 3,200 and the longest answer
        temperature=1.0,  # the released code
        eta=1.0, lr=3e-7, weight_decay=1e-6,  # the released README; linear to 0 as the released code
        gamma=0.0, penalty=-4.0,  # the released README for UltraInteract
        train_layers=4,  # C.1
        warmup=0.0, micro_tokens=8192, activation_checkpointing="selective", replicas=1, snapshot_steps=0,
        wave=4, eval_wave=64,  # ours: 8 ranks share 32 prompts, and 500 in the evaluation
        eval_dialogues=500,  # section 4.3
    ),
}  # fmt: skip
# Where the data set's name says hh (a hub id or a path does as well), the values of setting two that differ: C.4 and
# the released README.
HH = {"two": dict(max_new_tokens=512, gamma=0.05, penalty=-10.0)}


class Pair(NamedTuple):
    """One element of D: s_h, the two responses y_h and y'_h, and what the two finished conversations earned.

    y and y' are exchangeable: nothing in this file treats one unlike the other."""

    prefix: list  # ids of s_h
    y: list  # ids of y_h, the end token included if it was sampled
    y2: list  # ids of y'_h
    rewards: tuple  # r(s_{H+1}), r(s'_{H+1})
    h: int
    H: int
    dialogues: tuple = None  # the two finished conversations, for inspection
    logps: tuple = None  # ln pi_t of y and y', by the trainer's own weights before the first step
    base_logps: tuple = None  # the same under pi_0, where Eq. 11 asks for it


# ---------------------------------------------------------------------------------------------------------------
# Algorithm 1
# ---------------------------------------------------------------------------------------------------------------


def sample_resets(n, max_turns, rng):
    """H ~ U(max_turns), then h ~ U(H) (section 4.2): (h (n,), H (n,)) with 1 <= h <= H <= max_turns."""
    H = rng.integers(1, max_turns + 1, size=n)
    h = rng.integers(1, H + 1)
    return h, H


def from_the_start(prompts, cfg, rng):
    """REFUEL's roll-in: from s_1 by the policy itself. Returns (where the first roll-out begins, h, H).

    Where the data asks the questions, H is the number of them (section 4.3), not drawn."""
    if cfg.user == "dataset":
        H = np.array([1 + len(p.secret) for p in prompts])
        return prompts, rng.integers(1, H + 1), H
    return (prompts, *sample_resets(len(prompts), cfg.max_turns, rng))


def collect(prompts, policy, user, reward, cfg, rng, dropped=None, roll_in=from_the_start):
    """Line 3: one pair for each prompt that survives, by rolling in, resetting to s_h and rolling out again.

    prompts: dialogues at s_1. The first roll-out goes on from the roll-in: the trajectory's own y_h is a sample of
    pi_t(.|s_h). The second one starts anew at s_h with its own noise, for policy and user alike: only the prefix is
    shared, so the difference of rewards is an unbiased estimate of Q(s_h, y_h) - Q(s_h, y'_h).
    dropped: a Counter of the reasons for which prompts gave no pair; roll_in: what the baselines change."""
    dropped = Counter() if dropped is None else dropped
    starts, h, H = roll_in(prompts, cfg, rng)
    streams = rng.integers(2**62, size=len(prompts)).tolist()
    first = rollout([replace(p, stream=(s, 0)) for p, s in zip(starts, streams)], policy, user, H)
    whole = [i for i, d in enumerate(first) if not d.failed]
    resets = [replace(first[i].reset(h[i]), stream=(streams[i], 1)) for i in whole]
    second = dict(zip(whole, rollout(resets, policy, user, H[whole])))
    dropped.update(d.failed for d in [*first, *second.values()] if d.failed)

    futures = [(first[i], d, h[i]) for i, d in second.items() if not d.failed]
    return make_pairs(futures, reward, cfg.max_dialogue, dropped)


def make_pairs(futures, reward, max_dialogue, dropped):
    """Pairs from [(a finished dialogue, another one that parts from it at turn h, h)], with the rewards of both."""
    # the same response twice has a log-ratio of 0 under every pi: a constant in Eq. 1, and no gradient
    distinct = [(d, d2, int(h)) for d, d2, h in futures if d.answer(h) != d2.answer(h)]
    dropped["identical"] += len(futures) - len(distinct)
    futures = [f for f in distinct if max(len(f[0].ids), len(f[1].ids)) <= max_dialogue]
    dropped.update(["over --max-dialogue"] * (len(distinct) - len(futures)))
    scores = reward([d for d, _, _ in futures] + [d2 for _, d2, _ in futures])
    pairs = []
    for (d, d2, h), r, r2 in zip(futures, scores[: len(futures)], scores[len(futures) :]):
        if r is None or r2 is None:
            dropped["reward: too long"] += 1
            continue
        if not (math.isfinite(r) and math.isfinite(r2)):
            raise BadInput(f"the reward of a dialogue is not finite ({r}, {r2}): {d.messages[0]['content']!r}")
        pairs.append(Pair(d.reset(h).ids, d.answer(h), d2.answer(h), (float(r), float(r2)), h, len(d.spans), (d, d2)))
    return pairs


def refuel_loss(logp_2B, old_logp_2B, reward_2B, eta):
    """Eq. 1: ((1/eta) (ln pi(y)/pi_t(y) - ln pi(y')/pi_t(y')) - (r(s) - r(s')))^2, the mean over B pairs.

    Row 0 is y, row 1 is y'. The released code minimises eta^2 times this, which has the same minimiser."""
    log_ratio_2B = logp_2B - old_logp_2B
    residual_B = (log_ratio_2B[0] - log_ratio_2B[1]) / eta - (reward_2B[0] - reward_2B[1])
    return residual_B.square().mean()


def regularised(pair, cfg):
    """Eq. 11: the pair with r = RM - gamma (ln pi_t/pi_0) in place of RM, or r = Gamma where an answer was cut.

    The log-ratio is that of the response at turn h, the one that is trained: every turn pays for itself when it is
    drawn. Paper: "any generation" that exceeds the limit; here any from turn h on, since what was cut before is common
    to both and would hide their difference. (Released code: turn h alone is looked at, an answer that ends with its
    last permitted token counts as cut, and the KL term is added to Gamma as well.)"""
    r = [s - cfg.gamma * (logp - logp_0) for s, logp, logp_0 in zip(pair.rewards, pair.logps, pair.base_logps)]
    cut = [cfg.penalty != 0 and any(d.truncated[pair.h - 1 :]) for d in pair.dialogues]
    return pair._replace(rewards=tuple(cfg.penalty if c else x for c, x in zip(cut, r)))


def regress(model, optimizer, pairs, cfg, loss_fn=refuel_loss, first_step=0, after_step=None, t=1):
    """Line 4: fit pi to the relative future by minibatch descent on the mean of loss_fn over the pairs.

    Every rank holds all pairs and takes its share of each batch; gradients are averaged by FSDP. Returns the last
    step's metrics (defined in the README); after_step(step, metrics) is called after each step, and a training that
    was stopped goes on from first_step. t: the iteration, for the learning rate."""
    if pairs[0].logps is None:
        pairs = with_old_logps(model, pairs, cfg)
    model.train()
    steps = list(batches(len(pairs), cfg))
    metrics = {}
    for step, batch in tqdm(list(enumerate(steps))[first_step:], desc="regress", disable=rank() > 0):
        start = time.time()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, t, step / len(steps))
        sums = torch.zeros(7)
        for micro, share in micro_batches([pairs[i] for i in batch], cfg.micro_tokens):
            logp_2B = pair_logps(model, micro, cfg.temperature)
            old_logp_2B = torch.tensor([p.logps for p in micro], device=logp_2B.device).T
            reward_2B = torch.tensor([p.rewards for p in micro], device=logp_2B.device).T
            loss = loss_fn(logp_2B, old_logp_2B, reward_2B, cfg.eta)
            (loss * share * world()).backward()  # FSDP takes the mean over ranks, Eq. 1 the mean over the batch
            sums += share * step_sums(loss.detach(), logp_2B.detach() - old_logp_2B, reward_2B)
        norm = gradient_norm(model)
        metrics = read_sums(add_up(sums)) | {"gradient_norm": norm, "lr": optimizer.param_groups[0]["lr"]}
        if not math.isfinite(metrics["loss"] + norm):
            raise BadInput(f"step {step}: loss {metrics['loss']}, gradient norm {norm}; the weights are those before "
                           f"it; {blame(model, pairs, batch, cfg, loss_fn)}")  # fmt: skip
        optimizer.step()
        optimizer.zero_grad()
        tokens = sum(pair_length(pairs[i]) for i in batch)
        metrics["tokens_per_second"] = round(tokens / (time.time() - start))
        if after_step:
            after_step(step, metrics)
    return metrics


def train(cfg, speakers=None, prompts_of=data.train_prompts, collect=collect, loss_fn=refuel_loss):
    """Lines 1 to 5: T times collect and regress. A finished stage is read from the run's folder, not done again.

    The baselines are this loop with other prompts, another collect, another loss. In setting two an iteration is a
    small update, and all of them are one training with one optimiser. Returns the speakers (policy's engine, user,
    reward), which live on: an engine is started once."""
    pi_1, stale = files.find_checkpoint(cfg.policy), speakers is not None
    policy, user, reward = speakers = speakers or load_speakers(pi_1, cfg)
    model = load_policy(pi_1, cfg)
    pi_0 = {name: p.clone() for name, p in learned_weights(model).items()} if cfg.gamma else None
    optimizer = make_optimizer(model, cfg)
    done = resume(model, optimizer, cfg)
    if stale or done:  # an engine that has just loaded pi_1 needs no other weights
        policy.update(full_weights(model))
    for t in range(done + 1, cfg.iterations + 1):
        folder = os.path.join(cfg.out, f"iter_{t}")
        if not cfg.policy_every:  # before the collection, which needs the memory of the last iteration's moments
            optimizer = make_optimizer(model, cfg)
        prompts = prompts_of(cfg, policy.tokenizer, t)
        pairs = collected(folder, partial(collect, policy=policy, user=user, reward=reward, cfg=cfg), prompts, cfg, t)
        policy.sleep()
        pairs = remembered_logps(folder, model, pi_0, pairs, cfg, t)
        first_step = load_training(folder, model, optimizer)
        regress(model, optimizer, [regularised(p, cfg) for p in pairs], cfg, loss_fn, first_step,
                Keeper(folder, model, optimizer, cfg, t), t)  # fmt: skip
        finish(folder, model, optimizer, cfg, t, pi_1)
        policy.update(full_weights(model))
    return speakers


def load_speakers(path, cfg):
    user = simulator.load_user(cfg)  # first: a server that does not start is found before a model is loaded
    return engines.load_engine(path, cfg), user, rewards.load_reward(cfg)


def batches(n, cfg):
    """Each step's pairs. The first pass takes them in the order of the prompts, which is random already."""
    for epoch in range(cfg.epochs):
        order = np.random.default_rng([cfg.seed, epoch]).permutation(n) if epoch else np.arange(n)
        yield from (order[i : i + cfg.batch_size].tolist() for i in range(0, n, cfg.batch_size))


def learning_rate(cfg, t, progress):
    """Setting one: in every iteration a linear warm-up, then a cosine to 0; progress in [0, 1), and the first step
    already moves. Setting two: linear to 0 over the iterations, all steps of an iteration alike."""
    if cfg.policy_every:
        return cfg.lr * (1 - (t - 1) / cfg.iterations)
    if progress < cfg.warmup:
        return cfg.lr * (progress + 1e-3) / (cfg.warmup + 1e-3)
    return cfg.lr * (0.5 + 0.5 * math.cos(math.pi * (progress - cfg.warmup) / (1 - cfg.warmup)))


def make_optimizer(model, cfg):
    """AdamW as released. Eq. 1's gradient is 1/eta^2 of the released loss's; Adam divides that out again but for its
    epsilon, which is scaled with it (eta = 1000 would otherwise leave most of the update to epsilon). fused: one pass
    over the weights instead of a dozen, a tenth of the time on a CPU."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, cfg.lr, (0.9, 0.95), 1e-8 / cfg.eta**2, cfg.weight_decay, fused=True)


METRICS = ("loss", "sign_agreement", "log_ratio", "kl", "drift")


def step_sums(loss, log_ratio_2B, reward_2B):
    """What a micro-batch adds to a step's metrics, as means over its pairs: METRICS, then two denominators."""
    difference_B, target_B = log_ratio_2B[0] - log_ratio_2B[1], reward_2B[0] - reward_2B[1]
    decided_B = target_B != 0
    agree = (decided_B & (difference_B.sign() == target_B.sign())).float().mean()
    # responses are pi_t's: E[rho - 1 - ln rho] with rho = pi/pi_t is KL(pi_t||pi), never negative
    kl = (log_ratio_2B.clamp(max=20).exp() - 1 - log_ratio_2B).mean()
    one = torch.ones(())
    return torch.stack([x.float().cpu() for x in (
        loss, agree, log_ratio_2B.mean(), kl, log_ratio_2B.abs().mean(), decided_B.float().mean(), one)])  # fmt: skip


def read_sums(sums):
    values = dict(zip(METRICS, (sums[:5] / sums[6]).tolist()))
    return values | {"sign_agreement": (sums[1] / sums[5].clamp(min=1e-9)).item()}


# ---------------------------------------------------------------------------------------------------------------
# ln pi_t before the first step, and whose fault it is if a number is none
# ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def with_old_logps(model, pairs, cfg):
    """The pairs with ln pi_t of both responses, each rank computing its share in the batches that training will use,
    by the trainer's own forward: at step 0 the log-ratio is exactly 0 and every residual the reward difference."""
    model.train()  # the same code path as in training; there is no dropout to switch off
    logp_N2 = torch.zeros(len(pairs), 2)
    for batch in list(batches(len(pairs), replace(cfg, epochs=1))):
        index = {id(pairs[i]): i for i in batch}
        for micro, share in micro_batches([pairs[i] for i in batch], cfg.micro_tokens):
            logp_2B = pair_logps(model, micro, cfg.temperature).cpu()
            if share:
                logp_N2[[index[id(p)] for p in micro]] = logp_2B.T
    pairs = [p._replace(logps=tuple(row)) for p, row in zip(pairs, add_up(logp_N2).tolist())]
    for p in pairs:
        if not math.isfinite(sum(p.logps)):
            raise BadInput(f"ln pi is not finite: {describe(p)}")
    return pairs


def kept_logps(folder, model, pairs, cfg):
    """with_old_logps, the pairs of checkpoint_steps batches at a time, each lot kept on disk until all are done: a kill
    costs no more here than in training."""
    size, done = cfg.batch_size * cfg.checkpoint_steps, []
    if len(pairs) <= size:
        return with_old_logps(model, pairs, cfg)
    for start in range(0, len(pairs), size):
        path, lot = os.path.join(folder, f"{start:08d}.jsonl"), pairs[start : start + size]
        if os.path.exists(path):  # or not, on all ranks alike: it is written after all of them have been here
            done += [p._replace(logps=tuple(row)) for p, row in zip(lot, files.read_lines(path), strict=True)]
            continue
        done += (lot := with_old_logps(model, lot, cfg))
        if rank() == 0:
            os.makedirs(folder, exist_ok=True)
            files.write_lines(path, [p.logps for p in lot])
    return done


def describe(pair):
    opening = pair.dialogues[0].messages[0]["content"] if pair.dialogues else pair.prefix
    return f"h = {pair.h} of {pair.H}, rewards {pair.rewards}, ln pi_t {pair.logps}, first prompt {str(opening)[:200]!r}"


def blame(model, pairs, batch, cfg, loss_fn):
    """The pairs of a batch whose own loss or gradient is not finite, in words; every rank looks at all of them."""
    found = []
    for i in batch:
        model.zero_grad()
        logp_21 = pair_logps(model, [pairs[i]], cfg.temperature)
        old_21, reward_21 = (torch.tensor([x], device=logp_21.device).T for x in (pairs[i].logps, pairs[i].rewards))
        (loss := loss_fn(logp_21, old_21, reward_21, cfg.eta)).backward()
        if not math.isfinite(loss.item() + gradient_norm(model)):
            found.append(i)
    if not found:
        return "no pair alone, but the batch as a whole"
    more = f" and {len(found) - 1} more of this batch" if len(found) > 1 else ""
    return f"pair {found[0] + 1} of pairs.jsonl{more}: {describe(pairs[found[0]])}"


# ---------------------------------------------------------------------------------------------------------------
# Stages: what is finished is kept, and a stopped run goes on from there
# ---------------------------------------------------------------------------------------------------------------


class Keeper:
    """Called after every step: logs its metrics and, now and then, saves the training in progress."""

    def __init__(self, folder, model, optimizer, cfg, t):
        self.folder, self.model, self.optimizer, self.cfg, self.t = folder, model, optimizer, cfg, t
        self.start = time.time()

    def __call__(self, step, metrics):
        if rank() == 0:
            row = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in metrics.items()}
            seconds = round(time.time() - self.start, 1)
            log(self.cfg, {"iteration": self.t, "phase": "regress", "step": step, "seconds": seconds} | row)
        if self.cfg.snapshot_steps and (step + 1) % self.cfg.snapshot_steps == 0:
            save_policy(os.path.join(self.folder, f"step_{step + 1}"), self.model, self.cfg.policy)
        if (step + 1) % self.cfg.checkpoint_steps == 0:
            save_training(self.folder, self.model, self.optimizer, step)


def collected(folder, collect, prompts, cfg, t):
    """An iteration's pairs, in waves: every rank plays its waves and keeps each on disk. A wave has its own random
    numbers, so the pairs do not depend on the number of ranks or on where a run was stopped."""

    def wave(rows, number):
        dropped = Counter()
        pairs = collect(rows, rng=np.random.default_rng([cfg.seed, t, number]), dropped=dropped)
        simulator.check_failures(dropped["user"], len(rows), cfg)
        return [{"dropped": dropped}, *map(pair_to_json, pairs)]

    start, tokens = time.time(), {}
    for name in ("policy", "user", "reward"):
        if hasattr(speaker := getattr(collect, "keywords", {}).get(name), "tokens"):
            tokens[name] = speaker.tokens
            speaker.tokens.clear()
    rows = in_waves(os.path.join(folder, "pairs.jsonl"), prompts, cfg.wave, wave, f"iteration {t}: collect")
    pairs = [pair_from_json(row) for row in rows if "prefix" in row]
    dropped = sum((Counter(row["dropped"]) for row in rows if "dropped" in row), Counter())
    if not pairs:
        raise BadInput(f"no pair is left of {len(prompts)} prompts: {dict(dropped)}")
    if rank() == 0 and all(p.rewards[0] == p.rewards[1] for p in pairs):
        print(f"iteration {t}: in no pair do the two rewards differ; Eq. 1 then keeps the policy as it is", flush=True)
    if rank() == 0 and not os.path.exists(os.path.join(folder, "logps.jsonl")):
        print(f"{len(pairs)} pairs of {len(prompts)} prompts; dropped: {dict(dropped)}", flush=True)
        log(cfg, {"iteration": t, "phase": "collect", "pairs": len(pairs), "dropped": dropped,
                  "reward": float(np.mean([p.rewards for p in pairs])),
                  "truncated": float(np.mean([d.truncated[p.h - 1] for p in pairs for d in p.dialogues])),
                  "tokens": tokens, "seconds": round(time.time() - start, 1)})  # fmt: skip
    return pairs


def pair_to_json(pair):
    keep = ("messages", "truncated", "logps")  # prefix, y and y2 hold the ids that matter
    return pair._asdict() | {"dialogues": [{k: getattr(d, k) for k in keep} for d in pair.dialogues]}


def pair_from_json(row):
    return Pair(**row | {"rewards": tuple(row["rewards"]), "dialogues": tuple(Dialogue(**d) for d in row["dialogues"])})


def remembered_logps(folder, model, pi_0, pairs, cfg, t):
    """The pairs with ln pi_t, and ln pi_0 for Eq. 11, from the file if the iteration was stopped after they had been
    computed."""
    path = os.path.join(folder, "logps.jsonl")
    if not os.path.exists(path):
        pairs = kept_logps(f"{path}.parts", model, pairs, cfg)
        base = pairs
        if cfg.gamma:
            with exchanged(model, pi_0):
                base = with_old_logps(model, pairs, cfg)
        # how far the engine that sampled is from the weights that are trained: 1e-5 in float32; stale weights show here
        gaps = [abs(d.logps[p.h - 1] - logp) / max(1, len(y)) for p in pairs
                for d, logp, y in zip(p.dialogues, p.logps, (p.y, p.y2))]  # fmt: skip
        if rank() == 0:
            row = {"iteration": t, "phase": "logps"}
            if math.isfinite(np.mean(gaps)):  # responses of a data set have no engine
                row["engine_gap"] = float(f"{np.mean(gaps):.3g}")
            if cfg.gamma:
                row["kl_0"] = float(np.mean([np.subtract(p.logps, b.logps) for p, b in zip(pairs, base)]))
            print(", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
            log(cfg, row)
            files.write_lines(path, [p.logps + b.logps for p, b in zip(pairs, base)])
        barrier()
    if rank() == 0:
        shutil.rmtree(f"{path}.parts", ignore_errors=True)
    rows = files.read_lines(path)
    return [p._replace(logps=tuple(r[:2]), base_logps=tuple(r[2:])) for p, r in zip(pairs, rows, strict=True)]


def resume(model, optimizer, cfg):
    """Bring a stopped run's weights back, in setting two its optimiser too; returns the last finished iteration."""
    done = max((t for t in range(1, cfg.iterations + 1)
                if os.path.isdir(os.path.join(cfg.out, f"iter_{t}", "policy"))), default=0)  # fmt: skip
    if cfg.policy_every and done < cfg.iterations:
        done = max(0, load_training(cfg.out, model, optimizer) - 1)
        barrier()
        if rank() == 0:  # what came after the saved state is done again, with data of its own
            for folder in glob.glob(os.path.join(glob.escape(cfg.out), "iter_*")):
                if int(folder.rpartition("_")[2]) > done or not os.path.isdir(os.path.join(folder, "policy")):
                    shutil.rmtree(folder)
        barrier()
    elif done:
        read_slices(model, os.path.join(cfg.out, f"iter_{done}", "policy"))
        remove_training(os.path.join(cfg.out, f"iter_{done}"))
        remove_training(cfg.out)
    return done


def finish(folder, model, optimizer, cfg, t, start):
    """The end of an iteration: its policy is kept. Of setting two's thousands only every policy_every-th and the last
    is, the training state of every checkpoint_steps-th replaces the one before, and other iterations leave no file."""
    last = t == cfg.iterations
    keep = last or not cfg.policy_every or t % cfg.policy_every == 0
    if keep:
        save_policy(os.path.join(folder, "policy"), model, start)
    remove_training(folder)
    if cfg.policy_every and last:
        remove_training(cfg.out)
    elif cfg.policy_every and t % cfg.checkpoint_steps == 0:
        save_training(cfg.out, model, optimizer, t)
    if not keep and rank() == 0:
        shutil.rmtree(folder)


# ---------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(message)


def read_config(argv, description=__doc__, **more):
    """The configuration of a command line: the setting's values, each replaced by its flag. more: other flags of a
    script, name=dict of add_argument's options, returned beside it."""
    parser = Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Config):
        name = "--" + f.name.replace("_", "-")
        parser.add_argument(name, type=f.type, default=argparse.SUPPRESS, metavar=f.type.__name__)
    for name, options in more.items():
        parser.add_argument("--" + name.replace("_", "-"), **options)
    given = vars(parser.parse_args(argv))
    extra = {name: given.pop(name) for name in more if name in given}
    setting = given.pop("setting", None)
    if setting not in SETTINGS:
        raise BadInput(f"--setting is one of {', '.join(SETTINGS)}, not {setting}")
    hh = HH.get(setting, {}) if data.is_hh(given.get("dataset", "")) else {}
    cfg = Config(setting=setting, **SETTINGS[setting] | hh | given)
    check(cfg)
    return (cfg, extra) if more else cfg


def check(cfg):
    """Everything about a configuration that can be known to be wrong before anything is loaded."""
    positive = "num_prompts max_turns max_new_tokens eta lr temperature batch_size epochs micro_tokens"
    rules = {name: (lambda v: 0 < v < math.inf, "positive") for name in positive.split()}
    counts = "checkpoint_steps wave eval_wave eval_dialogues user_tokens reward_tokens max_dialogue"
    rules |= {name: (lambda v: v > 0, "positive") for name in counts.split()}
    rules |= {name: (lambda v: 0 <= v < math.inf, "0 or more") for name in (
        "weight_decay", "seed", "snapshot_steps", "policy_every", "train_layers", "gamma")}  # fmt: skip
    rules["iterations"] = (lambda v: v > 0 or v == 0 < cfg.policy_every, "positive (in setting two, 0 is one pass)")
    rules["penalty"] = (math.isfinite, "a number")
    rules["user_temperature"] = (lambda v: 0 < v < math.inf, "positive")
    rules["replicas"] = (lambda v: v > 0 and world() % v == 0, f"a divisor of {world()}, the number of processes")
    rules["max_failures"] = (lambda v: 0 <= v <= 1, "a share of the dialogues, in [0, 1]")
    rules["warmup"] = (lambda v: 0 <= v < 1, "a share of the steps, in [0, 1)")
    rules["engine"] = (lambda v: v in ("auto", "vllm", "transformers"), "auto, vllm or transformers")
    rules["activation_checkpointing"] = (lambda v: v in ("none", "selective", "full"), "none, selective or full")
    rules["max_length"] = (lambda v: v > cfg.max_new_tokens, f"more than --max-new-tokens {cfg.max_new_tokens}")
    rules["batch_size"] = (lambda v: 0 < v <= cfg.num_prompts, f"in 1..{cfg.num_prompts}, the number of prompts")
    for name, (good, words) in rules.items():
        if not good(getattr(cfg, name)):
            raise BadInput(f"--{name.replace('_', '-')} must be {words}, not {getattr(cfg, name)}")


def main(argv=None):
    with one_line("refuel.py"):
        cfg, extra = read_config(argv, **plan.FLAGS)
        if extra["plan"]:
            return plan.show(cfg, extra)
        start_processes()
        cfg = prepare(cfg)
        open_run(cfg)
        if rank() == 0:
            print("\n".join(f"{k:26s}{v}" for k, v in asdict(cfg).items()), flush=True)
        log_data(cfg)
        speakers = train(cfg)
        import evaluate

        evaluate.after_training(cfg, *speakers)
    barrier()  # the process group is left to the interpreter's end: vLLM's engine takes its own part down only there


if __name__ == "__main__":
    main()
