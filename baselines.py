"""The paper's baselines (section 4.1) as rows of one table; the loop, the resets and the regression are refuel.py's.

    torchrun --nproc_per_node 2 baselines.py --method all --setting toy          Table 1 of the toy, with intervals
    torchrun --nproc_per_node 2 baselines.py --method rebel-lt-online --setting toy
    torchrun --nproc_per_node 2 baselines.py --method rebel,refuel --setting toy    every row of a loss, and REFUEL

A row says where the prefix comes from, which turn is trained, where the responses come from, and the loss. The run's
folder holds one run folder a method: a method that failed loses no finished row, and the same command resumes.
"""
import machinery  # noqa: F401  (first: it sets what torch and vLLM read when they are imported)

import json
import os
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import evaluate
import refuel
from machinery import files, plan
from machinery.files import BadInput, iteration_folder, policy_folder
from machinery.ranks import barrier, one_line, rank, start_processes, world
from machinery.report import markdown, methods_figure, methods_table
from machinery.run import open_folder
from machinery.settings import read_config
from refuel import from_the_start, refuel_loss
from simulator import load_cast, made_of, offline_prompts, prepare, train_prompts

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
    advantage_2B = (reward_2B - reward_2B.flip(0)).to(ratio_2B.dtype)
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


def train(method, cfg, cast=None):
    """refuel.train with the row's prompts, roll-in and loss."""
    row = METHODS[method]
    prompts_of = train_prompts if row.prefix == "online" else offline_prompts
    if row.responses == "offline":
        collect = collect_offline
    else:
        collect = partial(refuel.collect, roll_in=ROLL_INS[row.prefix, row.turn])
    return refuel.train(cfg, cast, prompts_of, collect, row.loss)


# ---------------------------------------------------------------------------------------------------------------
# Table 1
# ---------------------------------------------------------------------------------------------------------------

# Each row's own better eta of 10 and 30, found with the same budget for all (docs/baselines.md); else the setting's own
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


def method_config(method, cfg, given=frozenset()):
    """The run of one method: its folder, and its own best values but for those given on the command line."""
    own = {"snapshot_steps": SNAPSHOTS.get(cfg.setting, 0)} | BEST.get(cfg.setting, {}).get(method, {})
    free = {name: value for name, value in own.items() if name not in given}
    return replace(cfg, out=os.path.join(cfg.out, method), **free)


def add_costs(results, cfg):
    """To results.json's rows what Table 1 has beside: weighted average, pairs, minutes, the paper's row."""
    for method, row in results.items():
        if method in METHODS:
            log = files.read_lines(os.path.join(cfg.out, method, "metrics.jsonl"))
            pairs, seconds = 0, {}
            for line in log:
                if line["phase"] in ("collect", "regress"):  # a training's last step has all of its seconds
                    seconds[line["iteration"], line["phase"]] = line["seconds"]
                pairs += line.get("pairs", 0)
            row["pairs"], row["minutes"] = pairs, round(sum(seconds.values()) / 60, 2)
            row["paper"] = PAPER.get(method) if len(row["win"]) == len(WEIGHTS) else None
        if len(row["win"]) == len(WEIGHTS):
            row["weighted"] = round(float(np.dot(row["win"], WEIGHTS)), 4)
    return results


def differences(played, reward, at_end=False):
    """Paired differences of win rates, with intervals over dialogues: same openings, same users."""
    rows, judge = [], evaluate.by_reward(reward)
    for a, b in DIFFERENCES:
        if a in played and b in played:
            won = {name: evaluate.judged(played[name], played["base"], judge, at_end) for name in (a, b)}
            d_NH = 100 * (won[a] - won[b])
            low, high = evaluate.bootstrap(d_NH.mean(1, keepdims=True))[:, 0]
            turns = ", ".join(f"{x:+.1f}" for x in d_NH.mean(0))
            rows.append([f"{a} - {b}", turns, f"{d_NH.mean():+.1f} [{low:+.1f}, {high:+.1f}]"])
    return "\n".join(markdown(["difference", "per turn", "average"], rows))


def curves(methods, cfg, cast):
    """Figure 2: {method: [(step, average win rate)]} from the policies that training kept on its way: snapshots within
    an iteration, and each iteration's own (in setting two every policy_every-th update's); of the rows with REFUEL's
    loss, as in the paper."""
    places = {}
    for method in methods:
        for step, path in snapshots(os.path.join(cfg.out, method), cfg.iterations).items():
            places[f"{method}.{step}"] = path
    if not places:
        return {}
    few = replace(cfg, eval_dialogues=min(250, cfg.eval_dialogues))
    results, _ = evaluate.evaluate(places, os.path.join(cfg.out, "curve"), *cast, few, kl=False)
    found = {}
    for name in places:
        method, step = name.rsplit(".", 1)
        found.setdefault(method, [(0, 50.0)]).append((int(step), results[name]["avg"]))
    return found


def snapshots(out, iterations):
    """{step from the beginning: policy folder} of what a run has kept."""
    log = files.read_lines(os.path.join(out, "metrics.jsonl"))
    steps_of = Counter(r["iteration"] for r in log if r["phase"] == "regress")
    found, done = {}, 0
    for t in range(1, iterations + 1):
        folder = iteration_folder(out, t)
        names = os.listdir(folder) if os.path.isdir(folder) else []  # most updates of setting two leave none
        steps = sorted(int(name[5:]) for name in names if name.startswith("step_") and name[5:].isdigit())
        for step in steps:
            found[done + step] = os.path.join(folder, f"step_{step}")
        done += steps_of[t]
        if "policy" in names:
            found[done] = policy_folder(out, t)
    return found


def choose(text):
    """The methods that --method names: all, a row, a loss (all its rows), or several of these with commas."""
    chosen = []
    for name in text.split(","):
        found = [m for m in METHODS if name in ("all", m, m.split("-")[0])]
        if not found:
            raise BadInput(f"--method is all, {', '.join(LOSSES)} or one of {', '.join(METHODS)}, not {name}")
        chosen += [m for m in found if m not in chosen]
    return chosen


def run(methods, cfg, given=frozenset()):
    """Train each method, then judge all that are finished; returns (results, the failures by method)."""
    cast, failed = None, {}
    for method in methods:
        try:
            cast = train(method, method_config(method, cfg, given), cast)
        except BadInput as error:  # one method's bad day is not the others'
            if world() > 1:  # but other ranks may not have it, and wait
                raise
            failed[method] = str(error)
    done = {}
    for method in METHODS:
        path = policy_folder(os.path.join(cfg.out, method), cfg.iterations)
        if os.path.isdir(path):
            done[method] = path
    if not done:
        raise BadInput(f"no method is finished: {failed}")
    cast = cast or load_cast(cfg)
    results, played = evaluate.evaluate(done, cfg.out, *cast, cfg)
    add_costs(results, cfg)
    curve = curves([m for m in done if METHODS[m].loss is refuel_loss], cfg, cast)
    if rank() == 0:
        report(results, curve, differences(played, cast[2], cfg.user == "dataset"), cfg.out)
    barrier()
    return results, failed


def report(results, curve, paired, out):
    """Leave the table, the paired differences and the figure in the run's folder, and show them."""
    text = f"{methods_table(results)}\n\n{paired}\n"
    text += ("\nWin rate against base in %, ties half, 95 % bootstrap intervals over "
             f"{results['base']['dialogues']} dialogues, the paper's Table 1 in brackets; weighted: by the offline "
             "data's shares of lengths, 76.9, 12.1, 6.4, 3.2 and 1.4 %; reward: mean over the turns.\n")  # fmt: skip
    figure = os.path.join(out, "figure.png")
    files.write_file(os.path.join(out, "table.md"), text)
    files.write_file(os.path.join(out, "results.json"), json.dumps(results, indent=1))
    files.write_file(os.path.join(out, "curve.json"), json.dumps(curve))
    methods_figure(results, curve, figure, order=list(DATA))
    print(f"\n{text}\n{figure}", flush=True)


def main(argv=None):
    with one_line("baselines.py"):
        cfg, extra = read_config(argv, __doc__, method=dict(required=True))
        methods, given = choose(extra["method"]), extra["given"]
        others = [name for name in methods if not name.endswith("refuel")]
        if cfg.pairs and others:
            raise BadInput(f"--pairs takes the place of REFUEL's own: --method refuel, dpo-refuel or rloo-refuel, not {others[0]}")
        if "out" not in given:
            cfg = replace(cfg, out=os.path.join("runs", f"{cfg.setting}_baselines"))
        start_processes()
        cfg = prepare(cfg)
        plan.check(cfg)
        open_folder(cfg, made_of)
        for method in methods:
            open_folder(method_config(method, cfg, given), made_of)
        _, failed = run(methods, cfg, given)
        for method, error in failed.items():
            print(f"baselines.py: {method}: {error}", file=sys.stderr)
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
