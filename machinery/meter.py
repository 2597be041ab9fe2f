"""What a step of the regression measures, and which pair is to blame if a number is not finite.

Dimension key: B pairs; a leading 2 is the pair (y, y').
"""
import math

import torch

from machinery.files import BadInput
from machinery.fsdp import gradient_norm
from machinery.logps import pair_logps
from machinery.ranks import add_up

METRICS = ("loss", "sign_agreement", "log_ratio", "kl", "drift")  # defined in docs/metrics.md


class Meter:
    """The metrics of one step: means over its pairs, gathered micro-batch by micro-batch and rank by rank."""

    def __init__(self):
        self.sums = torch.zeros(7)  # METRICS, then two denominators: of decided pairs, of all pairs

    def add(self, share, loss, log_ratio_2B, reward_2B):
        difference_B, target_B = log_ratio_2B[0] - log_ratio_2B[1], reward_2B[0] - reward_2B[1]
        decided_B = target_B != 0
        agree = (decided_B & (difference_B.sign() == target_B.sign())).float().mean()
        # responses are pi_t's: E[rho - 1 - ln rho] with rho = pi/pi_t is KL(pi_t||pi), never negative
        kl = (log_ratio_2B.clamp(max=20).exp() - 1 - log_ratio_2B).mean()
        values = [loss, agree, log_ratio_2B.mean(), kl, log_ratio_2B.abs().mean(), decided_B.float().mean(), torch.ones(())]
        self.sums += share * torch.stack([x.float().cpu() for x in values])

    def read(self):
        """{metric: its mean over the step's pairs on all ranks}; to be called by all ranks."""
        sums = add_up(self.sums)
        values = dict(zip(METRICS, (sums[:5] / sums[6]).tolist()))
        return values | {"sign_agreement": (sums[1] / sums[5].clamp(min=1e-9)).item()}


def as_tensors(pairs, device):
    """What is known of a batch before its forward: ln pi_t, (2, B) float32, and rewards, (2, B) float64: their difference
    is what counts, and in float32 two rewards of 10,000 have none below 0.001."""
    old_logp_2B = torch.tensor([p.logps for p in pairs], device=device).T
    reward_2B = torch.tensor([p.rewards for p in pairs], device=device, dtype=torch.float64).T
    return old_logp_2B, reward_2B


def check_finite(step, metrics, model, batch, cfg, loss_fn):
    """Stop before a step whose loss or gradient is not finite, and name the pair; batch: {its place: pair}."""
    if math.isfinite(metrics["loss"] + metrics["gradient_norm"]):
        return
    raise BadInput(f"step {step}: loss {metrics['loss']}, gradient norm {metrics['gradient_norm']}; the weights are "
                   f"those before it; {blame(model, batch, cfg, loss_fn)}")  # fmt: skip


def blame(model, batch, cfg, loss_fn):
    """The pairs of a batch whose own loss or gradient is not finite, in words; every rank looks at all of them."""
    found = []
    for place, pair in batch.items():
        model.zero_grad()
        logp_21 = pair_logps(model, [pair], cfg.temperature)
        loss = loss_fn(logp_21, *as_tensors([pair], logp_21.device), cfg.eta)
        loss.backward()
        if not math.isfinite(loss.item() + gradient_norm(model)):
            found.append(place)
    if not found:
        return "no pair alone, but the batch as a whole"
    more = f" and {len(found) - 1} more of this batch" if len(found) > 1 else ""
    return f"pair {found[0] + 1} of pairs.jsonl{more}: {describe(batch[found[0]])}"


def describe(pair):
    opening = pair.opening or str(list(pair.prefix))[:200]
    return f"h = {pair.h} of {pair.H}, rewards {pair.rewards}, ln pi_t {pair.logps}, first prompt {opening!r}"
