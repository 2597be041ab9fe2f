"""REFUEL: REgressing the RELative FUturE, Algorithm 1 of the paper (arXiv 2410.04612).

    Algorithm 1                                                     here
    input: T, eta, r, pi_1                                          Config, SETTINGS, load_cast, load_policy
    for t = 1 .. T                                                  train
        H ~ U(H_max), h ~ U(H)                                      sample_resets
        s_h ~ pi_t; y, y' ~ pi_t(.|s_h); on to s_{H+1}, s'_{H+1}    collect, with simulator.futures
        r(s_{H+1}), r(s'_{H+1})                                     make_pairs
        pi_{t+1} = argmin of Eq. 1 over the pairs                   regress, with pair_logps and refuel_loss

The policy talks with a user (roll-in), the conversation is reset to a turn h and continued a second time, and the policy
is fitted so that its log-ratio explains the difference of the two conversations' rewards.

    python refuel.py --setting toy                                          a laptop, minutes
    torchrun --nproc_per_node 2 refuel.py --setting toy                     the same on two processes
    torchrun --nproc_per_node 8 refuel.py --setting one                     section 4.2
    torchrun --nproc_per_node 8 refuel.py --setting two --dataset hh        section 4.3 (or ultrainteract)

Dimension key: B pairs of a batch, N pairs of an iteration, H turns; a leading 2 is the pair (y, y').
"""
import machinery  # noqa: F401  (first: it sets what torch and vLLM read when they are imported)

import math
import time
from array import array
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch

import evaluate
from machinery import plan, watch
from machinery.files import find_checkpoint, kept_policies
from machinery.fsdp import full_weights, gradient_norm, load_policy
from machinery.logps import batches, micro_batches, old_logps, pair_length, pair_logps
from machinery.meter import Meter, as_tensors, check_finite
from machinery.ranks import barrier, one_line, rank, start_processes
from machinery.run import Run, announce, log_data, open_folder, progress
from machinery.settings import SETTINGS, Config, read_config  # noqa: F401
from simulator import Dialogue, data_counts, futures, load_cast, longest, made_of, prepare, score, train_prompts


class Pair(NamedTuple):
    """One element of D: s_h, the two responses y_h and y'_h, and what the two finished conversations earned.

    y and y' are exchangeable: nothing in this file treats one unlike the other."""

    prefix: list  # ids of s_h
    y: list  # ids of y_h, the end token included if it was sampled
    y2: list  # ids of y'_h
    rewards: tuple  # r(s_{H+1}), r(s'_{H+1})
    h: int
    H: int  # turns; of the longer one, where a user has ended them at different turns
    dialogues: tuple = None  # the two finished conversations
    logps: tuple = None  # ln pi_t of y and y', by the trainer's own weights before the first step
    base_logps: tuple = None  # the same under pi_0, where Eq. 11 asks for it
    truncated: tuple = ((), ())  # of each conversation's answers, whether they were cut
    engine_logps: tuple = (math.nan, math.nan)  # ln pi_t of y and y' as the engine reported it
    opening: str = ""  # x_1, shortened, to name the pair by

    @classmethod
    def of(cls, first, second, h, rewards):
        """The pair of two finished conversations that part at turn h."""
        return cls(first.reset(h).ids, first.answer(h), second.answer(h), rewards, h, max(first.turns, second.turns),
                   (first, second), truncated=(tuple(first.truncated), tuple(second.truncated)),
                   engine_logps=(first.logps[h - 1], second.logps[h - 1]), opening=first.messages[0]["content"][:200])

    def to_json(self):
        """Ids and rewards for readers, and both conversations whole, of which all else is made again."""
        return {"prefix": self.prefix, "y": self.y, "y2": self.y2, "rewards": self.rewards, "h": self.h, "H": self.H,
                "dialogues": [vars(d) for d in self.dialogues]}  # fmt: skip

    @classmethod
    def from_json(cls, row):
        """What the regression needs of it, ids as int32: the conversations of 64,000 pairs stay on disk."""
        if "dialogues" not in row:  # a published one
            return cls(**row)
        first, second = map(Dialogue.from_json, row["dialogues"])
        pair = cls.of(first, second, row["h"], tuple(row["rewards"]))
        return pair._replace(prefix=array("i", pair.prefix), y=array("i", pair.y), y2=array("i", pair.y2), dialogues=None)


# ---------------------------------------------------------------------------------------------------------------
# Line 3: collect
# ---------------------------------------------------------------------------------------------------------------


def sample_resets(n, max_turns, rng, law="paper"):
    """H ~ U(max_turns), then h ~ U(H) (section 4.2): (h (n,), H (n,)) with 1 <= h <= H <= max_turns.

    So turn h sees P(H | h) ~ 1/H: what is optimised is sum_H J_H / H. Uniform over all h <= H: the plain sum of J_H."""
    lengths = np.arange(1, max_turns + 1)
    H = rng.choice(lengths, n, p=lengths / lengths.sum()) if law == "uniform" else rng.integers(1, max_turns + 1, size=n)
    h = rng.integers(1, H + 1)
    return h, H


def from_the_start(prompts, cfg, rng):
    """REFUEL's roll-in: from s_1 by the policy itself. Returns (where the first roll-out begins, h, H).

    Where the data asks the questions, H is the number of them (section 4.3), not drawn."""
    if cfg.user == "dataset":
        H = longest(prompts, cfg)
        return prompts, rng.integers(1, H + 1), H
    return (prompts, *sample_resets(len(prompts), cfg.max_turns, rng, cfg.reset_law))


def collect(prompts, policy, user, reward, cfg, rng, dropped=None, roll_in=from_the_start):
    """Line 3: one pair for each prompt that survives, by rolling in, resetting to s_h and rolling out again.

    prompts: dialogues at s_1. Only the prefix is shared by the two conversations, so the difference of their rewards is
    an unbiased estimate of Q(s_h, y_h) - Q(s_h, y'_h).
    dropped: a Counter of the reasons for which prompts gave no pair; roll_in: what the baselines change."""
    dropped = Counter() if dropped is None else dropped
    starts, h, H = roll_in(prompts, cfg, rng)
    streams = rng.integers(2**62, size=len(prompts)).tolist()
    return make_pairs(futures(starts, h, H, streams, policy, user, dropped), reward, cfg.max_dialogue, dropped)


def make_pairs(played, reward, max_dialogue, dropped):
    """Pairs from [(a finished dialogue, another one that parts from it at turn h, h)], with the rewards of both."""
    kept = []
    for first, second, h in played:
        if first.answer(h) == second.answer(h):  # a log-ratio of 0 under every pi: a constant in Eq. 1, no gradient
            dropped["identical"] += 1
        elif max(len(first.ids), len(second.ids)) > max_dialogue:
            dropped["over --max-dialogue"] += 1
        else:
            kept.append((first, second, h))
    pairs, scores = [], score(reward, [first for first, _, _ in kept] + [second for _, second, _ in kept])
    for (first, second, h), r, r2 in zip(kept, scores[: len(kept)], scores[len(kept) :], strict=True):
        if r is None or r2 is None:
            dropped["no reward"] += 1
            continue
        pairs.append(Pair.of(first, second, h, (r, r2)))
    return pairs


# ---------------------------------------------------------------------------------------------------------------
# Line 4: regress
# ---------------------------------------------------------------------------------------------------------------


def refuel_loss(logp_2B, old_logp_2B, reward_2B, eta):
    """Eq. 1: ((1/eta) (ln pi(y)/pi_t(y) - ln pi(y')/pi_t(y')) - (r(s) - r(s')))^2, the mean over B pairs.

    Row 0 is y, row 1 is y'. The released code minimises eta^2 times this, which has the same minimiser."""
    log_ratio_2B = logp_2B - old_logp_2B
    reward_difference_B = (reward_2B[0] - reward_2B[1]).to(log_ratio_2B.dtype)
    residual_B = (log_ratio_2B[0] - log_ratio_2B[1]) / eta - reward_difference_B
    return residual_B.square().mean()


def regularised(pair, cfg):
    """Eq. 11: the pair with r = RM - gamma (ln pi_t/pi_0) in place of RM, or r = Gamma where an answer was cut.

    The log-ratio is that of the response at turn h, the one that is trained: every turn pays for itself when it is
    drawn. Paper: "any generation" that exceeds the limit; here any from turn h on, since what was cut before is common
    to both and would hide their difference. (Released code: turn h alone is looked at, an answer that ends with its
    last permitted token counts as cut, and the KL term is added to Gamma as well.)"""
    rewards = []
    for r, logp, logp_0, truncated in zip(pair.rewards, pair.logps, pair.base_logps, pair.truncated, strict=True):
        cut = any(truncated[pair.h - 1 :])
        rewards.append(cfg.penalty if cut and cfg.penalty != 0 else r - cfg.gamma * (logp - logp_0))
    return pair._replace(rewards=tuple(rewards))


def regress(model, optimizer, pairs, cfg, loss_fn=refuel_loss, first_step=0, after_step=None, t=1):
    """Line 4: fit pi to the relative future by minibatch descent on the mean of loss_fn over the pairs.

    Every rank holds all pairs and takes its share of each batch; gradients are averaged by FSDP. Returns the last
    step's metrics (docs/metrics.md); after_step(step, metrics) is called after each step and ends the training where it
    returns True; one that was stopped resumes at first_step. t: the iteration, for the learning rate."""
    if pairs[0].logps is None:
        rows = zip(pairs, old_logps(model, pairs, cfg).tolist(), strict=True)
        pairs = [pair._replace(logps=tuple(row)) for pair, row in rows]
    model.train()
    steps = batches(len(pairs), cfg.batch_size, cfg.epochs, cfg.seed)
    metrics = {}
    for step, batch in progress(steps, first_step, f"iteration {t} of {cfg.iterations}: regress"):
        start, meter = time.monotonic(), Meter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, t, step / len(steps))
        for micro, share in micro_batches([pairs[i] for i in batch], cfg.micro_tokens):
            logp_2B = pair_logps(model, micro, cfg.temperature)
            old_logp_2B, reward_2B = as_tensors(micro, logp_2B.device)
            loss = loss_fn(logp_2B, old_logp_2B, reward_2B, cfg.eta)
            (loss * share).backward()  # shares make of FSDP's mean over ranks the mean over the batch
            meter.add(share, loss.detach(), logp_2B.detach() - old_logp_2B, reward_2B)
        metrics = meter.read() | {"gradient_norm": gradient_norm(model), "lr": optimizer.param_groups[0]["lr"]}
        check_finite(step, metrics, model, {i: pairs[i] for i in batch}, cfg, loss_fn)
        optimizer.step()
        optimizer.zero_grad()
        tokens = sum(pair_length(pairs[i]) for i in batch)
        metrics["tokens_per_second"] = round(tokens / max(1e-9, time.monotonic() - start))  # a clock may stand still
        if after_step and after_step(step, metrics):
            break
    return metrics


def learning_rate(cfg, t, progress):
    """Setting one: in every iteration a linear warm-up, then a cosine to 0; progress in [0, 1), and the first step
    already moves. Setting two: linear to 0 over the iterations, all steps of an iteration alike."""
    if cfg.one_training:
        return cfg.lr * (1 - (t - 1) / cfg.iterations)
    if progress < cfg.warmup:
        return cfg.lr * (progress + 1e-3) / (cfg.warmup + 1e-3)
    return cfg.lr * (0.5 + 0.5 * math.cos(math.pi * (progress - cfg.warmup) / (1 - cfg.warmup)))


def make_optimizer(model, cfg, loss_fn=refuel_loss):
    """AdamW as released, its epsilon scaled as Eq. 1's gradient is, by 1/eta^2: at eta = 1000 it would else be most of the
    denominator. fused: one pass over the weights instead of a dozen, a tenth of the time on a CPU."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    epsilon = 1e-8 / cfg.eta**2 if loss_fn is refuel_loss else 1e-8  # DPO and RLOO have no eta
    return torch.optim.AdamW(parameters, cfg.lr, (0.9, 0.95), epsilon, cfg.weight_decay, fused=True)


# ---------------------------------------------------------------------------------------------------------------
# Lines 1 to 5: train
# ---------------------------------------------------------------------------------------------------------------


def train(cfg, cast=None, prompts_of=train_prompts, collect=collect, loss_fn=refuel_loss):
    """T times collect and regress. A finished stage is read from the run's folder, not done again.

    The baselines are this loop with other prompts, another collect, another loss. In setting two an iteration is a
    small update, and all of them are one training with one optimiser. Returns the cast (policy's engine, user, reward),
    which lives on: an engine is started once."""
    known = cast is not None
    policy, user, reward = cast = cast if known else load_cast(cfg)
    model = load_policy(find_checkpoint(cfg.policy), cfg)
    run = Run(cfg, model, make_optimizer(model, cfg, loss_fn))
    if known or run.t:  # an engine that has just loaded pi_1 needs no other weights
        policy.update(full_weights(model))

    def play(prompts, rng, dropped):
        return collect(prompts, policy, user, reward, cfg, rng, dropped)

    for t in range(run.t + 1, cfg.iterations + 1):
        run.begin(t)
        speakers = {"policy": policy, "user": user, "reward": reward}
        pairs = run.pairs(() if cfg.pairs else prompts_of(cfg, policy.tokenizer, t), play, Pair.from_json, speakers)
        policy.sleep()
        pairs = run.hold_out([regularised(pair, cfg) for pair in run.with_logps(pairs)], loss_fn)
        regress(model, run.optimizer, pairs, cfg, loss_fn, run.first_step(), run.after_step, t)
        run.finish()
        if not cfg.one_training:  # the moments go before the engine wakes, which needs their memory
            run.optimizer = make_optimizer(model, cfg, loss_fn)
        policy.update(full_weights(model))
    return cast


def main(argv=None):
    with one_line("refuel.py"):
        cfg, extra = read_config(argv, __doc__, **plan.FLAGS, **watch.FLAGS)
        if extra["plan"]:
            return plan.show(cfg, extra)
        start_processes()
        cfg = prepare(cfg)
        plan.check(cfg)
        open_folder(cfg, made_of)
        announce(cfg, extra["track"])
        log_data(cfg, data_counts(cfg))
        cast = train(cfg)
        policies = {f"iter_{t}": path for t, path in kept_policies(cfg.out).items()}
        results, played = evaluate.evaluate(policies, cfg.out, *cast, cfg)
        if rank() == 0:
            evaluate.report(results, played, cast[2], cfg.out)
    barrier()  # the process group is left to the interpreter's end: vLLM's engine takes its own part down only there


if __name__ == "__main__":
    main()
