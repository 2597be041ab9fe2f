"""Held-out pairs: what a training says of pairs that it never sees, and where it ends.

Minibatch descent on one data set fits the pairs' own noise after a while: the loss on pairs that are held out of the
iteration turns, and behind the turn the policy gets worse, whatever the loss is called. (The released code looks at 500
held-out pairs every 100 updates, and trains on to the end.)
"""
import math
import os
import shutil

import numpy as np
import torch

from machinery import fsdp
from machinery.files import BadInput
from machinery.logps import batches, old_logps
from machinery.meter import as_tensors
from machinery.ranks import rank


FEWEST = 16  # pairs; fewer are not held out


class HeldOut:
    """The last --validation pairs of an iteration (an eighth at most), which are a random part: prompts are drawn in
    random order.

    A look is taken every --checkpoint-steps steps and after the last one; the one at step 0, of pi_t itself, needs no
    forward. looks: {steps done: the row's own loss}, rounded as it is logged. One rule for all methods: with --patience
    N, training ends after N looks in a row without a new best, or with the last epoch, and the policy is that of the
    best look, pi_t if none is better. Without patience it is that of the last step, and looks are logged alone."""

    def __init__(self, pairs, cfg, loss_fn, t):
        self.cfg, self.loss_fn, self.t = cfg, loss_fn, t
        number = min(cfg.validation, len(pairs) // 8)
        if number < FEWEST:
            number = 0
            if cfg.validation and rank() == 0:
                print(f"iteration {t}: none of {len(pairs)} pairs is held out: an eighth of them is less than {FEWEST}, too "
                      "few to tell anything", flush=True)  # fmt: skip
        first = len(pairs) - number
        self.training, self.pairs = pairs[:first], pairs[first:]
        self.steps = len(batches(len(self.training), cfg.batch_size, cfg.epochs, cfg.seed))
        self.looks = {}
        if self.pairs:
            start = self.measure(np.array([pair.logps for pair in self.pairs]))
            self.looks[0] = start["held_out_loss"]

    def measure(self, logps, steps=0):
        """Of the held-out pairs: the row's own loss, Eq. 1, and how far the log-ratios follow the rewards.

        logps: ln pi of y and y', one row a pair. held_out_share: the slope of the log-ratio's difference on eta times
        the reward's, 1 where Eq. 1 is solved."""
        old_logp_2B, reward_2B = as_tensors(self.pairs, "cpu")
        logp_2B = torch.tensor(logps, dtype=old_logp_2B.dtype).T
        ratio_2B = logp_2B - old_logp_2B
        difference_B, target_B = (ratio_2B[0] - ratio_2B[1]).double(), (reward_2B[0] - reward_2B[1])
        decided_B = target_B != 0
        agree = (difference_B.sign() == target_B.sign())[decided_B].double().mean()
        found = {
            "held_out_loss": self.loss_fn(logp_2B, old_logp_2B, reward_2B, self.cfg.eta),
            "held_out_eq1": (difference_B / self.cfg.eta - target_B).square().mean(),
            "held_out_sign_agreement": agree if decided_B.any() else torch.zeros(()),
            "held_out_share": (difference_B * target_B).sum() / (self.cfg.eta * target_B.square().sum().clamp(min=1e-12)),
        }
        found = {name: float(f"{value.item():.6g}") for name, value in found.items()}
        if not math.isfinite(sum(found.values())):  # RLOO's ratio has no bound, and a loss of -inf would be the best
            raise BadInput(f"iteration {self.t}: after {steps} steps the loss on held-out pairs is {found['held_out_loss']}, "
                           f"Eq. 1 {found['held_out_eq1']}: a smaller --lr, or rewards of a smaller scale")  # fmt: skip
        return found

    def resume(self, first_step, rows):
        """The looks of a training that was stopped, from its lines of metrics.jsonl before first_step; returns the step at
        which it resumes."""
        if self.pairs:
            self.looks |= looks(rows, self.t)
            every = self.cfg.checkpoint_steps
            absent = set(range(every, first_step + 1, every)) - self.looks.keys()
            if absent:  # with --patience they decide which policy is kept
                raise BadInput(f"metrics.jsonl lacks the held-out loss after {min(absent)} steps of iteration {self.t}, which was "
                               "trained further: put the line back, or remove the iteration's training/ to train it again")  # fmt: skip
        return self.steps if self.over() else first_step

    def due(self, step):
        return bool(self.pairs) and ((step + 1) % self.cfg.checkpoint_steps == 0 or step + 1 == self.steps)

    def look(self, model, step):
        """Measure the model after this step; every rank takes its share of the pairs."""
        found = self.measure(old_logps(model, self.pairs, self.cfg).numpy(), step + 1)
        model.train()
        self.looks[step + 1] = found["held_out_loss"]
        return found | {"held_out_start": self.looks[0]}

    def best(self):
        """The steps after which the held-out loss was least; the first of equal ones."""
        return min(self.looks, key=self.looks.get)

    def over(self):
        """Whether --patience looks have passed since the best one."""
        return bool(self.cfg.patience and self.pairs) and sum(step > self.best() for step in self.looks) >= self.cfg.patience

    # --- the best weights, kept until the iteration ends ----------------------------------------------------------

    def keep_best(self, folder, model, step):
        """Called after a look: the weights of the best one lie in best_STEP."""
        if self.cfg.patience and self.best() == step + 1:
            fsdp.save_policy(os.path.join(folder, f"best_{step + 1}"), model, self.cfg.policy)

    def forget_others(self, folder):
        """Called once the training state is safe: until then a stopped run may resume before the newest best."""
        remove_best(folder, {f"best_{self.best()}"} if self.looks else set())

    def take_best(self, folder, model, start):
        """Give the model its best weights; start: the checkpoint of pi_t."""
        if not (self.pairs and self.cfg.patience) or self.best() == max(self.looks):
            return
        fsdp.read_slices(model, os.path.join(folder, f"best_{self.best()}") if self.best() else start)


def looks(log, t):
    """{steps: held-out loss} of iteration t, 0 steps among them, from lines of metrics.jsonl; empty where nothing was held
    out."""
    found = {}
    for row in log:
        if "held_out_loss" in row and row["iteration"] == t:
            found |= {0: row["held_out_start"], row["step"] + 1: row["held_out_loss"]}
    return found


def best_look(log, t):
    """(the step of iteration t's least held-out loss, 0 where pi_t was kept; the last step); None where nothing was held
    out."""
    found = looks(log, t)
    return (min(found, key=found.get), max(found)) if found else None


def remove_best(folder, but=frozenset()):
    """An iteration's best_STEP folders, but for those named."""
    if rank() == 0:
        for name in os.listdir(folder):
            if name.startswith("best_") and name not in but:
                shutil.rmtree(os.path.join(folder, name))
