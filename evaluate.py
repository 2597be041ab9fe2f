"""Does it hold at turn h? Win rate per turn against a reference policy (section 4.2, Table 1, Figure 1).

    python evaluate.py --setting toy --policy runs/toy/iter_2/policy [more ...]

Every policy plays the same openings with the same user and the same random streams, for max_turns turns; the judge
compares, at each turn h, the conversations' first h turns. A tie counts half. Intervals are 95 % bootstraps over
dialogues, since the turns of one dialogue are not independent.

Dimension key: N dialogues, H turns.
"""
import json
import os
import sys

import numpy as np

from simulator import BadInput, Dialogue, barrier, in_waves, rank, read_weights, test_prompts, write_file

# ---------------------------------------------------------------------------------------------------------------
# Win rate per turn
# ---------------------------------------------------------------------------------------------------------------


def by_reward(reward):
    """A judge from a reward model: 1 where a's conversation earns more than b's, 1/2 where they earn the same."""

    def judge(a, b):
        difference = np.subtract(reward(a), reward(b))
        return (np.sign(difference) + 1) / 2

    return judge


def judged(a, b, judge):
    """The judge's verdicts on dialogues a against b, at each turn: (N, H) in {0, 1/2, 1}."""
    turns = min(len(d.spans) for d in [*a, *b])
    return np.stack([judge([d.until(h) for d in a], [d.until(h) for d in b]) for h in range(1, turns + 1)], axis=1)


def bootstrap(values_NH, samples=2000, seed=0):
    """95 % intervals (2, H) of the column means, resampling whole dialogues."""
    rows = np.random.default_rng(seed).integers(len(values_NH), size=(samples, len(values_NH)))
    return np.quantile(values_NH[rows].mean(1), (0.025, 0.975), axis=0)


def win_rate(a, b, judge):
    """Per cent of dialogues in which a beats b, judged on the first h turns: (H,), and its interval (2, H)."""
    verdict_NH = 100 * judged(a, b, judge)
    return verdict_NH.mean(0), bootstrap(verdict_NH)


def summary(dialogues, reference, judge, reward):
    """One row of results.json: a policy's dialogues against the reference's, from the same openings."""
    verdict_NH = 100 * judged(dialogues, reference, judge)
    win_H, (low_H, high_H) = verdict_NH.mean(0), bootstrap(verdict_NH)
    reward_NH = np.stack([reward([d.until(h + 1) for d in dialogues]) for h in range(len(win_H))], axis=1)
    avg_low, avg_high = bootstrap(verdict_NH.mean(1, keepdims=True))[:, 0]
    row = {"win": win_H, "low": low_H, "high": high_H, "avg": win_H.mean(), "avg_low": avg_low, "avg_high": avg_high,
           "reward": reward_NH.mean(0), "reward_error": reward_NH.std(0) / len(reward_NH) ** 0.5}  # fmt: skip
    return {k: np.round(v, 4).tolist() for k, v in row.items()} | {"dialogues": len(dialogues)}


# ---------------------------------------------------------------------------------------------------------------
# Playing
# ---------------------------------------------------------------------------------------------------------------


def play(file, path, prompts, policy, user, cfg):
    """cfg.max_turns turns of the checkpoint at `path` from each opening, kept in `file`; played once."""
    from simulator import rollout

    if not os.path.exists(file):
        policy.update(read_weights(path))

    def wave(rows, _):
        return [vars(d) for d in rollout(rows, policy, user, [cfg.max_turns] * len(rows))]

    rows = in_waves(file, prompts, cfg.wave, wave, f"evaluate {path}")
    return [Dialogue.from_json(row) for row in rows]


def evaluate(policies, folder, policy, user, reward, cfg):
    """results.json in `folder`: each policy {name: checkpoint} against cfg.reference, and everybody's dialogues.

    Returns (results, {name: dialogues}). Openings on which any policy's dialogue failed are left out for all."""
    prompts = test_prompts(cfg, policy.tokenizer)
    os.makedirs(os.path.join(folder, "eval"), exist_ok=True)
    played = {}
    for name, path in {"base": cfg.reference, **policies}.items():
        played[name] = play(os.path.join(folder, "eval", f"{name}.jsonl"), path, prompts, policy, user, cfg)
    whole = [i for i in range(len(prompts)) if not any(dialogues[i].failed for dialogues in played.values())]
    if not whole:
        raise BadInput("every evaluation dialogue failed")
    played = {name: [dialogues[i] for i in whole] for name, dialogues in played.items()}
    results = {}
    for name, dialogues in played.items():
        results[name] = summary(dialogues, played["base"], by_reward(reward), reward)
        results[name] |= {"failed": len(prompts) - len(whole), "command": " ".join(["python", *sys.argv])}
    if rank() == 0:
        write_file(os.path.join(folder, "results.json"), json.dumps(results, indent=1))
        draw(results, os.path.join(folder, "win_rate.png"))
    barrier()
    return results, played


# ---------------------------------------------------------------------------------------------------------------
# Showing
# ---------------------------------------------------------------------------------------------------------------


def table(results):
    """The results as a Markdown table: win rate with its interval, and mean reward, for h = 1..H."""
    turns = range(1, len(next(iter(results.values()))["win"]) + 1)
    lines = ["| win rate, % | " + " | ".join(f"h = {h}" for h in turns) + " | average |", "|---" * (len(turns) + 2) + "|"]
    for name, r in results.items():
        cells = [f"{w:.1f} [{a:.1f}, {b:.1f}]" for w, a, b in zip(r["win"], r["low"], r["high"])]
        cells.append(f"{r['avg']:.1f} [{r['avg_low']:.1f}, {r['avg_high']:.1f}]")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "| mean reward | " + lines[0].split("|", 2)[2], lines[1]]
    for name, r in results.items():
        lines.append(f"| {name} | " + " | ".join(f"{x:.3f}" for x in [*r["reward"], np.mean(r["reward"])]) + " |")
    return "\n".join(lines)


def draw(results, path):
    """Figure 1: win rate per turn with its band, and the mean reward behind it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for i, (name, r) in enumerate(results.items()):
        turns = np.arange(1, len(r["win"]) + 1)
        colour = "0.45" if name == "base" else f"C{i - 1}"
        left.plot(turns, r["win"], "o-", color=colour, label=name)
        left.fill_between(turns, r["low"], r["high"], color=colour, alpha=0.15, lw=0)
        right.errorbar(turns, r["reward"], 1.96 * np.array(r["reward_error"]), fmt="o-", color=colour, label=name)
    left.set(xlabel="turn h", ylabel="win rate against base, %", xticks=turns, title="win rate per turn")
    right.set(xlabel="turn h", ylabel="mean reward", xticks=turns, title="reward of the first h turns")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def side_by_side(before, after, width=58):
    """Two dialogues from one opening, turn by turn."""
    lines = [f"{'before':{width + 12}s}after"]
    for a, b in zip(before.messages, after.messages):
        lines.append(f"{a['role']:10s}  {a['content'][:width]:{width}s}{b['content'][:width]}")
    return "\n".join(lines)


def report(results, played, reward, folder):
    """What a person sees at the end: the table, and one dialogue before and after."""
    last = list(played)[-1]
    print(f"\n{table(results)}\n\nwin rates are against base, ties half, 95 % bootstrap intervals over "
          f"{results[last]['dialogues']} dialogues; figure: {os.path.join(folder, 'win_rate.png')}")  # fmt: skip
    gain = np.subtract(reward(played[last]), reward(played["base"]))
    i = int(np.argsort(gain, kind="stable")[len(gain) * 3 // 4])  # neither the best nor a lucky one
    print(f"\none opening, played by base and by {last} (the upper quartile of the gain, {gain[i]:+.2f}):\n")
    print(side_by_side(played["base"][i], played[last][i]), flush=True)


def after_training(cfg, policy, user, reward):
    """The end of refuel.py: every iteration's policy against the reference."""
    policies = {f"iter_{t}": os.path.join(cfg.out, f"iter_{t}", "policy") for t in range(1, cfg.iterations + 1)}
    results, played = evaluate(policies, cfg.out, policy, user, reward, cfg)
    if rank() == 0:
        report(results, played, reward, cfg.out)


if __name__ == "__main__":
    sys.exit("the command line of evaluate.py follows")
