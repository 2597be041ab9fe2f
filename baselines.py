"""The paper's baselines (section 4.1) as rows of one table; the loop, the resets and the regression are refuel.py's.

    torchrun --nproc_per_node 2 baselines.py --method all --setting toy          Table 1 of the toy, with intervals
    torchrun --nproc_per_node 2 baselines.py --method rebel-lt-online --setting toy
    torchrun --nproc_per_node 2 baselines.py --method rebel,refuel --setting toy    every row of a loss, and REFUEL

A row says where the prefix comes from, which turn is trained, where the responses come from, and the loss. The run's
folder holds one run folder a method, so a method that failed loses no finished row and the same command goes on.
"""
import itertools
import json
import os
import shutil
import sys
from collections import Counter
from functools import partial
from typing import Callable, NamedTuple

# first: processes.py sets what torch and vLLM read when they are imported
from processes import one_line, open_run, prepare, start_processes

import numpy as np
import torch
import torch.nn.functional as F

import data
import evaluate
import files
import refuel
from files import BadInput, barrier, rank, world
from refuel import from_the_start, refuel_loss

# ---------------------------------------------------------------------------------------------------------------
# Losses: of (logp_2B, old_logp_2B, reward_2B, eta), the mean over B pairs
# ---------------------------------------------------------------------------------------------------------------


def dpo_loss(logp_2B, old_logp_2B, reward_2B, beta):
    """DPO with the pair ordered by reward: -ln sigmoid(beta (log-ratio of the chosen - log-ratio of the rejected)).

    A tie has no chosen one: it adds ln 2 and no gradient."""
    log_ratio_2B = logp_2B - old_logp_2B
    sign_B = (reward_2B[0] - reward_2B[1]).sign()
    return -F.logsigmoid(beta * sign_B * (log_ratio_2B[0] - log_ratio_2B[1])).mean()


def dpo_at(logp_2B, old_logp_2B, reward_2B, eta):
    """Both KL-regularised problems are one: DPO's beta is 1 / eta of Eq. 2, so one flag serves every row."""
    return dpo_loss(logp_2B, old_logp_2B, reward_2B, 1 / eta)


def rloo_loss(logp_2B, old_logp_2B, reward_2B, eta):
    """REINFORCE leave-one-out with two responses: each one's baseline is the other's return.

    At pi = pi_t the gradient is RLOO's, -1/2 sum_i (r_i - r_j) grad ln pi(y_i). An iteration takes many steps on one
    data set, so later steps are off-policy: the ratio pi/pi_t corrects them, clipped as PPO does, at 0.2. The
    camera-ready names RLOO rows without saying how; eta is not used."""
    ratio_2B = (logp_2B - old_logp_2B).exp()
    advantage_2B = reward_2B - reward_2B.flip(0)
    return -torch.minimum(ratio_2B * advantage_2B, ratio_2B.clamp(0.8, 1.2) * advantage_2B).mean()


# ---------------------------------------------------------------------------------------------------------------
# Roll-ins: (where the first roll-out begins, h, H). Offline prompts are (dialogue, same with another last answer)
# ---------------------------------------------------------------------------------------------------------------


def online_last(prompts, cfg, rng):
    """LT-ONLINE: s_H by the policy with the user, only the last turn trained; H as REFUEL's."""
    _, _, H = from_the_start(prompts, cfg, rng)
    return prompts, H, H


def offline_last(prompts, cfg, rng):
    """LT-MIXED: s_H from the data, both responses the policy's."""
    H = np.array([len(d.spans) for d, _ in prompts])
    return [d.reset(n) for (d, _), n in zip(prompts, H)], H, H


def offline_uniform(prompts, cfg, rng):
    """MT-MIXED: s_h from the data, h ~ U(H), both roll-outs the policy's with the user."""
    H = np.array([len(d.spans) for d, _ in prompts])
    h = rng.integers(1, H + 1)
    return [d.reset(n) for (d, _), n in zip(prompts, h)], h, H


def collect_offline(prompts, policy, user, reward, cfg, rng, dropped):
    """LT-OFFLINE: s_H and both responses from the data; nobody speaks."""
    return refuel.make_pairs([(d, d2, len(d.spans)) for d, d2 in prompts], reward, cfg.max_dialogue, dropped)


class Method(NamedTuple):
    prefix: str  # offline or online: who rolled in
    turn: str  # last, or uniform in 1..H
    responses: str  # offline: the data's two answers; online: two of the policy's
    loss: Callable


DATA = {
    "lt-offline": ("offline", "last", "offline"),
    "lt-mixed": ("offline", "last", "online"),
    "lt-online": ("online", "last", "online"),
    "mt-mixed": ("offline", "uniform", "online"),
    "refuel": ("online", "uniform", "online"),
}
LOSSES = {"dpo": dpo_at, "rebel": refuel_loss, "rloo": rloo_loss}
# REBEL's loss is Eq. 1 on other data, so rebel-refuel is REFUEL. dpo-refuel and rloo-refuel are not in the paper: they
# tell what is due to the data from what is due to the loss.
METHODS = {f"{loss}-{data}": Method(*DATA[data], LOSSES[loss]) for loss in LOSSES for data in DATA}
METHODS["refuel"] = METHODS.pop("rebel-refuel")

ROLL_INS = {
    ("online", "uniform"): from_the_start,
    ("online", "last"): online_last,
    ("offline", "last"): offline_last,
    ("offline", "uniform"): offline_uniform,
}


def train(method, cfg, speakers=None):
    """refuel.train with the row's prompts, roll-in and loss."""
    row = METHODS[method]
    prompts_of = data.train_prompts if row.prefix == "online" else data.offline_prompts
    collect = collect_offline if row.responses == "offline" else partial(
        refuel.collect, roll_in=ROLL_INS[row.prefix, row.turn])  # fmt: skip
    return refuel.train(cfg, speakers, prompts_of, collect, row.loss)


# ---------------------------------------------------------------------------------------------------------------
# Each row's own best of one small grid (results/toy/grid.md), the budget being the same for all
# ---------------------------------------------------------------------------------------------------------------

GRID = {"lr": (1e-4,), "eta": (10.0, 30.0)}  # --grid plays it
# else the setting's own
BEST = {"toy": dict.fromkeys(("rebel-lt-offline", "dpo-lt-offline", "dpo-lt-online"), {"eta": 10.0})}
SNAPSHOTS = {"toy": 32}  # steps between the points of Figure 2

PAPER = {  # Table 1: h = 1..5, average
    "dpo-lt-offline": (51.2, 46.8, 42.6, 41.4, 46.8, 45.76),
    "dpo-lt-mixed": (56.2, 51.0, 51.6, 50.6, 48.8, 51.64),
    "dpo-lt-online": (56.8, 52.2, 53.0, 54.0, 52.4, 53.68),
    "dpo-mt-mixed": (57.4, 54.6, 51.6, 50.8, 49.2, 52.72),
    "rebel-lt-offline": (51.6, 46.0, 45.4, 48.4, 42.2, 46.72),
    "rebel-lt-mixed": (60.0, 51.2, 51.6, 46.4, 48.4, 51.52),
    "rebel-lt-online": (55.2, 51.6, 54.2, 52.4, 57.8, 54.24),
    "rebel-mt-mixed": (58.3, 53.2, 53.8, 51.0, 54.6, 54.18),
    "refuel": (55.2, 53.4, 58.8, 57.2, 58.6, 56.64),
}
WEIGHTS = np.array([0.769, 0.121, 0.064, 0.032, 0.014])  # Table 6: shares of lengths in the offline data (Table 3)
DIFFERENCES = [("refuel", "rebel-mt-mixed"), ("rebel-lt-online", "rebel-lt-mixed"), ("refuel", "rebel-lt-online"),
               ("rebel-lt-mixed", "rebel-lt-offline"), ("dpo-lt-online", "dpo-lt-mixed"),
               ("dpo-refuel", "dpo-mt-mixed"), ("dpo-refuel", "refuel")]  # fmt: skip


def method_config(method, cfg):
    """The run of one method: its folder, and its own best of the grid unless the command line says otherwise."""
    own = {k: v for k, v in BEST.get(cfg.setting, {}).get(method, {}).items()
           if getattr(cfg, k) == refuel.SETTINGS[cfg.setting][k]}  # fmt: skip
    snapshots = cfg.snapshot_steps or SNAPSHOTS.get(cfg.setting, 0)
    return refuel.replace(cfg, out=os.path.join(cfg.out, method), snapshot_steps=snapshots, **own)


def rows(results, cfg):
    """results.json's rows with what Table 1 has beside: weighted average, pairs, minutes, the paper's row."""
    for method, row in results.items():
        if method in METHODS:
            log = files.read_lines(os.path.join(cfg.out, method, "metrics.jsonl"))
            collected = [r for r in log if r["phase"] == "collect"]
            last = {r["iteration"]: r["seconds"] for r in log if r["phase"] == "regress"}
            row["pairs"] = sum(r["pairs"] for r in collected)
            row["minutes"] = round((sum(r["seconds"] for r in collected) + sum(last.values())) / 60, 2)
            row["paper"] = PAPER.get(method) if len(row["win"]) == len(WEIGHTS) else None
        if len(row["win"]) == len(WEIGHTS):
            row["weighted"] = round(float(np.dot(row["win"], WEIGHTS)), 4)
    return results


def table(results):
    """Table 1 as Markdown, the paper's numbers in brackets behind ours."""
    turns = range(1, len(results["base"]["win"]) + 1)
    heads = " | ".join(f"h = {h}" for h in turns) if len(turns) > 1 else "whole dialogue"
    lines = ["| method | " + heads + " | average | weighted | reward | KL | pairs | min |"]
    lines.append("|---" * (len(turns) + 7) + "|")
    for name, r in results.items():
        paper = r.get("paper") or [None] * (len(turns) + 1)
        cells = [(r["win"][i], r["low"][i], r["high"][i], paper[i]) for i in range(len(turns))]
        cells = [*cells, (r["avg"], r["avg_low"], r["avg_high"], paper[-1])]
        text = [f"{w:.1f} [{a:.1f}, {b:.1f}]" + (f" ({p:.1f})" if p else "") for w, a, b, p in cells]
        text += [f"{r.get('weighted', r['avg']):.1f}", f"{np.mean(r['reward']):.3f}", f"{r.get('kl', 0):.2f}"]
        lines.append(f"| {name} | " + " | ".join([*text, str(r.get("pairs", "")), str(r.get("minutes", ""))]) + " |")
    return "\n".join(lines)


def differences(played, reward, whole=False):
    """Paired differences of win rates, with intervals over dialogues: same openings, same users."""
    lines = ["| difference | per turn | average |", "|---|---|---|"]
    judge = evaluate.by_reward(reward)
    for a, b in DIFFERENCES:
        if a in played and b in played:
            against = [evaluate.judged(played[name], played["base"], judge, whole) for name in (a, b)]
            d_NH = 100 * (against[0] - against[1])
            low, high = evaluate.bootstrap(d_NH.mean(1, keepdims=True))[:, 0]
            turns = ", ".join(f"{x:+.1f}" for x in d_NH.mean(0))
            lines.append(f"| {a} - {b} | {turns} | {d_NH.mean():+.1f} [{low:+.1f}, {high:+.1f}] |")
    return "\n".join(lines)


def curves(methods, cfg, speakers):
    """Figure 2: {method: [(step, average win rate)]} from the policies that training kept on its way: snapshots within
    an iteration, and each iteration's own (in setting two every policy_every-th update's); of the rows with REFUEL's
    loss, as in the paper."""
    few = refuel.replace(cfg, eval_dialogues=min(250, cfg.eval_dialogues))
    found, places = {}, {}
    for method in methods:
        log, done = files.read_lines(os.path.join(cfg.out, method, "metrics.jsonl")), 0
        steps_of = Counter(r["iteration"] for r in log if r["phase"] == "regress")
        for t in range(1, cfg.iterations + 1):
            folder = os.path.join(cfg.out, method, f"iter_{t}")
            names = os.listdir(folder) if os.path.isdir(folder) else []  # most updates of setting two leave none
            steps = sorted(int(n[5:]) for n in names if n.startswith("step_") and n[5:].isdigit())
            places |= {f"{method}.{done + s}": os.path.join(folder, f"step_{s}") for s in steps}
            done += steps_of[t]
            if "policy" in names:
                places[f"{method}.{done}"] = os.path.join(folder, "policy")
    if places:
        results, _ = evaluate.evaluate(places, os.path.join(cfg.out, "curve"), *speakers, few, kl=False)
        for name in places:
            method, step = name.rsplit(".", 1)
            found.setdefault(method, [(0, 50.0)]).append((int(step), results[name]["avg"]))
    return found


def draw(results, curve, path):
    """Figure 1 (win rate per turn, with bands) and, where there are curves, Figure 2 (win rate against steps)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    losses = [loss for loss in ("rebel", "dpo", "rloo") if any(name.startswith(loss) for name in results)]
    figure, axes = plt.subplots(1, len(losses) + bool(curve), figsize=(4.2 * (len(losses) + bool(curve)), 3.6),
                                layout="constrained", squeeze=False)  # fmt: skip
    colours = {data: f"C{i}" for i, data in enumerate(DATA)}
    colour = lambda name: colours["refuel" if name == "refuel" else name.split("-", 1)[1]]  # noqa: E731
    for ax, loss in zip(axes[0], losses):
        for name, r in results.items():
            if name == "refuel" or name.startswith(loss):
                turns = np.arange(1, len(r["win"]) + 1)
                dashed = "--" if name == "refuel" and loss != "rebel" else "-"
                ax.plot(turns, r["win"], "o" + dashed, color=colour(name), label=name)
                ax.fill_between(turns, r["low"], r["high"], color=colour(name), alpha=0.15, lw=0)
        ax.axhline(50, color="0.6", lw=0.8)
        ax.set(xlabel="turn h", ylabel="win rate against base, %", xticks=turns, title=f"{loss.upper()} and REFUEL")
        ax.legend(frameon=False, fontsize=7)
    for name, points in curve.items():
        axes[0, -1].plot(*zip(*points), "o-", ms=3, color=colour(name), label=name)
    if curve:
        axes[0, -1].set(xlabel="steps", ylabel="average win rate, %", title="win rate against steps")
        axes[0, -1].legend(frameon=False, fontsize=7)
    with files.writing(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
    plt.close(figure)


def choose(text):
    """The methods that --method names: all, a row, a loss (all its rows), or several of these with commas."""
    chosen = []
    for name in text.split(","):
        found = [m for m in METHODS if name in ("all", m, m.split("-")[0])]
        if not found:
            raise BadInput(f"--method is all, {', '.join(LOSSES)} or one of {', '.join(METHODS)}, not {name}")
        chosen += [m for m in found if m not in chosen]
    return chosen


def run(methods, cfg):
    """Train each method, then judge all that are finished; returns (results, the failures by method)."""
    speakers, failed = None, {}
    for method in methods:
        try:
            speakers = train(method, method_config(method, cfg), speakers)
        except BadInput as error:  # one method's bad day is not the others'
            if world() > 1:  # but other ranks may not have it, and wait
                raise
            failed[method] = str(error)
    done = {m: os.path.join(cfg.out, m, f"iter_{cfg.iterations}", "policy") for m in METHODS}
    done = {m: path for m, path in done.items() if os.path.isdir(path)}
    if not done:
        raise BadInput(f"no method is finished: {failed}")
    speakers = speakers or refuel.load_speakers(cfg.reference, cfg)
    results, played = evaluate.evaluate(done, cfg.out, *speakers, cfg)
    rows(results, cfg)
    curve = curves([m for m in done if METHODS[m].loss is refuel_loss], cfg, speakers)
    if rank() == 0:
        paired = differences(played, speakers[2], cfg.user == "dataset")
        text = f"{table(results)}\n\n{paired}\n"
        text += ("\nWin rate against base in %, ties half, 95 % bootstrap intervals over "
                 f"{results['base']['dialogues']} dialogues, the paper's Table 1 in brackets; weighted: by the offline "
                 "data's shares of lengths, 76.9, 12.1, 6.4, 3.2 and 1.4 %; reward: mean over the turns.\n")  # fmt: skip
        files.write_file(os.path.join(cfg.out, "table.md"), text)
        files.write_file(os.path.join(cfg.out, "results.json"), json.dumps(results, indent=1))
        files.write_file(os.path.join(cfg.out, "curve.json"), json.dumps(curve))
        draw(results, curve, os.path.join(cfg.out, "figure.png"))
        print(f"\n{text}\n{os.path.join(cfg.out, 'figure.png')}", flush=True)
    barrier()
    return results, failed


def points_of():
    return list(itertools.product(GRID["lr"], GRID["eta"]))


def search(methods, cfg):
    """One iteration of each method at each point of GRID; prints and writes grid.md. Rows on the same data share the
    pairs of their first iteration, which are pi_1's whatever the loss."""
    speakers, lines = None, ["| method | " + " | ".join(f"lr {lr}, eta {eta:g}" for lr, eta in points_of()) + " |"]
    lines.append("|---" * (len(points_of()) + 1) + "|")
    places = {}
    for method in methods:
        for lr, eta in points_of():
            out = os.path.join(cfg.out, method, f"lr_{lr}_eta_{eta}")
            own = refuel.replace(cfg, out=out, lr=lr, eta=eta, iterations=1)
            shared = os.path.join(cfg.out, "pairs", method.split("-", 1)[-1])  # lt-mixed of rebel-lt-mixed
            open_run(own)
            if rank() == 0 and os.path.isdir(shared):
                shutil.copytree(shared, os.path.join(out, "iter_1"), dirs_exist_ok=True)
            barrier()
            speakers = train(method, own, speakers)
            if rank() == 0 and not os.path.isdir(shared):
                os.makedirs(shared)
                for name in ("pairs.jsonl", "logps.jsonl"):
                    shutil.copy(os.path.join(out, "iter_1", name), shared)
            places[f"{method}.{lr}.{eta}"] = os.path.join(out, "iter_1", "policy")
    results, _ = evaluate.evaluate(places, cfg.out, *speakers, cfg, kl=False)
    for method in methods:
        averages = [results[f"{method}.{lr}.{eta}"]["avg"] for lr, eta in points_of()]
        cells = [f"**{a:.1f}**" if a == max(averages) else f"{a:.1f}" for a in averages]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    if rank() == 0:
        files.write_file(os.path.join(cfg.out, "grid.md"), "\n".join(lines) + "\n")
        print("\n" + "\n".join(lines), flush=True)


def main(argv=None):
    with one_line("baselines.py"):
        flags = dict(method=dict(required=True), grid=dict(action="store_true"))
        cfg, extra = refuel.read_config(argv, __doc__, **flags)
        methods = choose(extra["method"])
        if cfg.out == refuel.SETTINGS[cfg.setting]["out"]:
            cfg = refuel.replace(cfg, out=os.path.join("runs", f"{cfg.setting}_baselines"))
        start_processes()
        cfg = prepare(cfg)
        open_run(cfg)
        if extra["grid"]:
            return search(methods, cfg)
        for method in methods:
            open_run(prepare(method_config(method, cfg)))
        _, failed = run(methods, cfg)
        for method, error in failed.items():
            print(f"baselines.py: {method}: {error}", file=sys.stderr)
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
