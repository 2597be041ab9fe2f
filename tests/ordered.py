"""How often DPO steps to the side of Q - Q' in the toy, and how often the two rewards' laws are ordered; with controls.

    python tests/ordered.py                                 the toy's base policy
    python tests/ordered.py --states 150 --futures 64       fewer states, fewer futures of each response
    python tests/ordered.py --policy runs/NAME/iter_1/policy    another policy of the toy

A state s_h and two distinct responses are drawn as refuel.collect draws them. Then each response gets --futures
futures, every one with a stream of its own. Signs and correlations set one half of the futures against the other: the
noise of one sample is not what they share. At h = H the reward is known with the response: all futures are one.

p, q: the chances that y's reward is higher, and that of y'. DPO's step is eta ln(p/q), each count with 1/2 added.

Dimension key: N pairs of responses, 2 (y, y'), F futures of each, K values of the reward.
"""
import os
import sys
from collections import Counter
from dataclasses import replace

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import refuel  # noqa: E402  (first: it sets what torch reads)

import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

from machinery.ranks import one_line, start_processes  # noqa: E402
from machinery.report import markdown  # noqa: E402
from machinery.seams import ask, score  # noqa: E402
from simulator import futures, load_cast, prepare, rollout, train_prompts  # noqa: E402

GRID = np.arange(5) / 4  # the toy's rewards


def toy_rewards(cfg, states, F):
    """Rewards (N, 2, F) of F futures of two distinct responses at one state, and whether it is the last turn, (N,)."""
    policy, user, reward = load_cast(cfg)
    rng = np.random.default_rng(cfg.seed)
    h, H = refuel.sample_resets(states, cfg.max_turns, rng)
    streams = rng.integers(2**62, size=states).tolist()
    starts = train_prompts(replace(cfg, num_prompts=states), policy.tokenizer, 1)
    found, last = [], []
    for first, second, turn in tqdm(futures(starts, h, H, streams, policy, user, Counter()), unit="state"):
        if first.answer(turn) == second.answer(turn):
            continue
        goal = len(first.spans)
        rows = [d.until(turn).copy(stream=(*d.stream, "future", i)) for d in (first, second) for i in range(F)]
        if turn < goal:
            for d, text in zip(rows, ask(user, rows), strict=True):
                d.add_user(policy.tokenizer, text)
            rows = rollout(rows, policy, user, [goal] * len(rows))
        found.append(np.reshape(score(reward, rows), (2, F)))
        last.append(turn == goal)
    return np.array(found), np.array(last)


def drawn(rng, laws_N2K, values, F):
    """Rewards (N, 2, F) from two laws on `values` for each pair."""
    return np.array([[rng.choice(values, F, p=law) for law in pair] for pair in laws_N2K])


def controls(N, F, seed=0):
    """Pairs of laws, their answer known: the gamble of theory/check_props.py, whose order is against Q; two laws drawn
    at random; and the same with the second made the lower one, by the larger of the two distribution functions."""
    rng = np.random.default_rng(seed)
    gamble = np.array([[0, 1, 0], [0.4, 0, 0.6]])  # .5 for certain, or .6 in six cases of ten
    pairs = np.array([gamble[rng.permutation(2)] for _ in range(N)])
    free = rng.dirichlet(np.ones(5), size=(N, 2))
    below = np.diff(free.cumsum(-1).max(1), axis=-1, prepend=0)
    return {"control: the gamble": drawn(rng, pairs, [0, 0.5, 0.6], F),
            "control: laws at random": drawn(rng, free, GRID, F),
            "control: the same, ordered": drawn(rng, np.stack([free[:, 0], below], 1), GRID, F)}  # fmt: skip


def order(r_N2F):
    """p, q: how often y's reward is higher and how often that of y', (N,) each, and the standard error of p - q."""
    sign_NFF = np.sign(r_N2F[:, 0, :, None] - r_N2F[:, 1, None, :])
    error = np.sqrt((sign_NFF.mean(2).var(1, ddof=1) + sign_NFF.mean(1).var(1, ddof=1)) / r_N2F.shape[2])
    return (sign_NFF > 0).mean((1, 2)), (sign_NFF < 0).mean((1, 2)), error


def one_sided(r_N2F):
    """Both one-sided Kolmogorov statistics, (2, N): the largest F' - F and the largest F - F'."""
    values = np.unique(r_N2F)
    cdf_N2K = (r_N2F[..., None] <= values).mean(2)
    step_NK = cdf_N2K[:, 1] - cdf_N2K[:, 0]
    return np.stack([step_NK.max(1), -step_NK.min(1)]).clip(min=0)


def share(k, n):
    """k of n, with Wilson's 95 % interval in %."""
    if n == 0:
        return "none"
    z, p = 1.96, k / n
    middle, width = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = (100 * (middle + s * width) / (1 + z**2 / n) for s in (-1, 1))
    return f"{k} of {n} [{max(low, 0):.1f}, {high:.1f}]"


def measure(r_N2F):
    """What the table says of pairs of samples. clear, against: beyond three standard errors."""
    N, _, F = r_N2F.shape
    one, two = r_N2F[:, :, : F // 2], r_N2F[:, :, F // 2 :]
    gap, again = (half[:, 0].mean(1) - half[:, 1].mean(1) for half in (one, two))
    clear = np.abs(gap) > 3 * np.sqrt(one.var(2, ddof=1).sum(1) / one.shape[2])
    p, q, error = order(two)
    step = np.log((two.shape[2] * p + 0.5) / (two.shape[2] * q + 0.5))
    agrees, against = np.sign(p - q) == np.sign(gap), np.sign(gap) * (p - q) < -3 * error
    beyond = one_sided(r_N2F) > np.sqrt(np.log(20) / F)  # 5 % at most, each where its side of the order is true

    def cosine(a, b):  # the correlation over pairs in both orders, (y, y') and (y', y)
        return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))

    return {"pairs": N, "clear": int(clear.sum()), "agree": int((agrees & clear).sum()),
            "against": int((against & clear).sum()), "one side": int((beyond.sum(0) == 1).sum()),
            "both sides": int(beyond.all(0).sum()), "step": cosine(gap, step),
            "ceiling": cosine(gap, again)}  # fmt: skip


def main(argv=None):
    more = dict(states=dict(type=int, default=300), futures=dict(type=int, default=512))
    flags = ["--setting", "toy", "--engine", "transformers", *(sys.argv[1:] if argv is None else argv)]
    cfg, extra = refuel.read_config(flags, __doc__, **more)
    start_processes()
    r_N2F, last_N = toy_rewards(prepare(cfg, trains=False), extra["states"], extra["futures"])
    rows = {"toy, h < H": r_N2F[~last_N], "toy, h = H": r_N2F[last_N]} | controls(extra["states"], extra["futures"])
    table = []
    for name, rewards in rows.items():
        m = measure(rewards)
        table.append([name, m["pairs"], m["clear"], share(m["agree"], m["clear"]), m["against"], m["one side"],
                      share(m["both sides"], m["pairs"]), f"{m['step']:.3f}", f"{m['ceiling']:.3f}"])  # fmt: skip
    header = ["pairs of", "n", "Q - Q' clear", "p - q has its sign", "against it", "F, F' part on one side",
              "on both: not ordered", "ln(p/q) with Q - Q'", "Q - Q' with itself"]  # fmt: skip
    print("\n".join(markdown(header, [list(map(str, row)) for row in table])))


if __name__ == "__main__":
    with one_line("ordered.py"):
        main()
