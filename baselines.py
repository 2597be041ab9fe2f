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
from machinery import files, page, plan, watch, worlds
from machinery.files import BadInput, iteration_folder, policy_folder
from machinery.held_out import best_look, looks
from machinery.ranks import barrier, one_line, rank, start_processes, world
from machinery.report import footer, markdown, methods_figure, methods_table, whole_dialogues
from machinery.run import open_folder
from machinery.settings import check, did_you_mean, is_hh, read_config, typed
from refuel import from_the_start, refuel_loss
from simulator import hybrid_prompts, load_cast, made_of, offline_prompts, prepare, train_prompts

# ---------------------------------------------------------------------------------------------------------------
# Losses: of (logp_2B, old_logp_2B, reward_2B, eta), the mean over B pairs
# ---------------------------------------------------------------------------------------------------------------


def dpo_loss(logp_2B, old_logp_2B, reward_2B, beta):
    """DPO with the pair ordered by reward: -ln sigmoid(beta (log-ratio of the chosen - log-ratio of the rejected)).

    A tie has no chosen one: it adds ln 2 and no gradient."""
    log_ratio_2B = logp_2B - old_logp_2B
    sign_B = (reward_2B[0] - reward_2B[1]).sign()
    return -F.logsigmoid(beta * sign_B * (log_ratio_2B[0] - log_ratio_2B[1])).mean()


def rloo_loss(logp_2B, old_logp_2B, reward_2B, eta):
    """REINFORCE leave-one-out with two responses: each one's baseline is the other's return.

    At pi = pi_t the gradient is RLOO's, -1/2 sum_i (r_i - r_j) grad ln pi(y_i). An iteration takes many steps on one
    data set; in later ones the ratio pi/pi_t corrects for it, unclipped, as RLOO has no clip (PPO's, at 0.2 of a whole
    response's ratio, silences most pairs after a few steps). The camera-ready names RLOO rows without saying how; eta
    is not used."""
    ratio_2B = (logp_2B - old_logp_2B).exp()
    advantage_2B = (reward_2B - reward_2B.flip(0)).to(ratio_2B.dtype)
    return -(ratio_2B * advantage_2B).mean()


# ---------------------------------------------------------------------------------------------------------------
# Roll-ins: (where the first roll-out begins, h, H). Offline prompts are finished dialogues
# ---------------------------------------------------------------------------------------------------------------


def online_last(prompts, cfg, rng):
    """LT-ONLINE: s_H by the policy with the user, only the last turn trained; H as REFUEL's."""
    _, _, H = from_the_start(prompts, cfg, rng)
    return prompts, H, H


def offline_last(prompts, cfg, rng):
    """LT-MIXED: s_H from the data, both responses the policy's."""
    H = np.array([len(d.spans) for d in prompts])
    return [d.reset(n) for d, n in zip(prompts, H)], H, H


def offline_uniform(prompts, cfg, rng):
    """MT-MIXED: s_h from the data, h ~ U(H), both roll-outs the policy's with the user."""
    H = np.array([len(d.spans) for d in prompts])
    h = rng.integers(1, H + 1)
    return [d.reset(n) for d, n in zip(prompts, h)], h, H


def hybrid(prompts, cfg, rng):
    """REFUEL with a share of MT-MIXED's roll-ins, which the paper calls straightforward: finished dialogues among the
    prompts are reset as in MT-MIXED, the others begin at s_1."""
    starts, h, H = list(prompts), np.zeros(len(prompts), int), np.zeros(len(prompts), int)
    by_data = np.array([bool(d.spans) for d in prompts])
    for mine, roll_in in ((by_data, offline_uniform), (~by_data, from_the_start)):
        rows = np.flatnonzero(mine)
        if len(rows):
            begun, h[rows], H[rows] = roll_in([prompts[row] for row in rows], cfg, rng)
            for row, d in zip(rows, begun, strict=True):
                starts[row] = d
    return starts, h, H


def collect_offline(prompts, policy, user, reward, cfg, rng, dropped):
    """LT-OFFLINE: s_H and both responses from the data; nobody speaks. prompts: (dialogue, same with another answer)."""
    return refuel.make_pairs([(d, d2, len(d.spans)) for d, d2 in prompts], reward, cfg.max_dialogue, dropped)


class Method(NamedTuple):
    prefix: str  # offline, online or hybrid: who rolled in
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
LOSSES = {"dpo": dpo_loss, "rebel": refuel_loss, "rloo": rloo_loss}
# REBEL's loss is Eq. 1 on other data, so rebel-refuel is REFUEL. dpo-refuel and rloo-refuel are not in the paper: they
# tell what is due to the data from what is due to the loss.
METHODS = {f"{loss}-{data}": Method(*DATA[data], LOSSES[loss]) for loss in LOSSES for data in DATA}
METHODS["refuel"] = METHODS.pop("rebel-refuel")
METHODS["refuel-hybrid"] = Method("hybrid", "uniform", "online", refuel_loss)

ROLL_INS = {
    ("online", "uniform"): from_the_start,
    ("online", "last"): online_last,
    ("offline", "last"): offline_last,
    ("offline", "uniform"): offline_uniform,
    ("hybrid", "uniform"): hybrid,
}
PROMPTS = {"online": train_prompts, "offline": offline_prompts, "hybrid": hybrid_prompts}


def train(method, cfg, cast=None):
    """refuel.train with the row's prompts, roll-in and loss."""
    row = METHODS[method]
    if row.responses == "offline":
        prompts_of, collect = partial(offline_prompts, twice=True), collect_offline
    else:
        prompts_of, collect = PROMPTS[row.prefix], partial(refuel.collect, roll_in=ROLL_INS[row.prefix, row.turn])

    def in_beta(logp_2B, old_logp_2B, reward_2B, eta):
        return dpo_loss(logp_2B, old_logp_2B, reward_2B, cfg.beta)

    return refuel.train(cfg, cast, prompts_of, collect, in_beta if row.loss is dpo_loss else row.loss)


# ---------------------------------------------------------------------------------------------------------------
# Table 1
# ---------------------------------------------------------------------------------------------------------------

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
PAPER_TWO = {  # Table 2: win rate, reward, KL, by data set
    "hh": {"rebel-lt-mixed": (79.6, -4.79, 17.23), "rebel-lt-online": (80.2, -4.75, 15.91),
           "rebel-mt-mixed": (78.6, -5.03, 16.79), "refuel": (82.8, -4.68, 17.83)},
    "ultrainteract": {"rebel-lt-mixed": (70.4, 0.93, 121.7), "rebel-lt-online": (73.4, 0.82, 62.85),
                      "rebel-mt-mixed": (34.4, -0.25, 61.34), "refuel": (79.6, 0.87, 93.19)},
}  # fmt: skip
DIFFERENCES = [("refuel", "rebel-mt-mixed"), ("rebel-lt-online", "rebel-lt-mixed"), ("refuel", "rebel-lt-online"),
               ("rebel-lt-mixed", "rebel-lt-offline"), ("dpo-lt-online", "dpo-lt-mixed"),
               ("dpo-refuel", "dpo-mt-mixed"), ("dpo-refuel", "refuel")]  # fmt: skip


# What a row's training alone reads: the cast and the evaluation are the same for all rows.
OWN = set("""num_prompts hybrid reset_law max_dialogue eta beta gamma penalty train_layers lr warmup weight_decay batch_size
             epochs validation patience micro_tokens activation_checkpointing checkpoint_steps snapshot_steps""".split())


def method_config(method, cfg, given=frozenset()):
    """The run of one method: its folder, and the values that the world's file has for it (BASELINES), but for those given
    on the command line."""
    rows = worlds.baselines(cfg.dataset)
    for row in rows:
        if row != "all" and row not in METHODS:
            raise BadInput(f"--dataset {cfg.dataset}: BASELINES has the row {row}, which is none{did_you_mean(row, METHODS)}")
    own = typed(rows.get("all", {}) | rows.get(method, {}), f"--dataset {cfg.dataset}", "BASELINES")
    shared = sorted(own.keys() - OWN)
    if shared:
        raise BadInput(f"--dataset {cfg.dataset}: BASELINES has {shared[0]}, but all rows share one engine, user, reward and "
                       f"evaluation: a row can have its own {', '.join(sorted(OWN))}")  # fmt: skip
    free = {name: value for name, value in own.items() if name not in given}
    mine = replace(cfg, out=os.path.join(cfg.out, method), **free)
    check(mine, world())
    return mine


def published(method, cfg, columns):
    """The paper's row: of Table 1 for five turns, of Table 2 for whole dialogues of the data sets there; else None."""
    if cfg.user == "dataset":
        known = "hh" if is_hh(cfg.dataset) else "ultrainteract"
        return PAPER_TWO[known].get(method) if known in cfg.dataset.lower() else None
    return PAPER.get(method) if columns == 5 else None


def add_costs(results, cfg):
    """To results.json's rows what the tables have beside: P(H) and P(h) of the pairs, weighted average, pairs, their tokens
    (the prefix once), minutes, the paper's row; held_out: of each iteration its held-out loss before the first step and at
    its best, None where nothing was held out.

    weighted: Table 6, by the lengths of the dialogues in each row's own data; the base policy has none. (Our reading: its
    numbers are lost. With the offline data's shares for all rows REBEL-LT-MIXED would be first, 57.8 to REFUEL's 55.3.)"""
    for method in METHODS.keys() & results.keys():
        row, log = results[method], files.read_lines(os.path.join(cfg.out, method, "metrics.jsonl"))
        collected = [line for line in log if line["phase"] == "collect" and "wave" not in line]
        trained = {line["iteration"]: line["seconds"] for line in log if line["phase"] == "regress"}  # the last step's
        row["minutes"] = round((sum(line["seconds"] for line in collected) + sum(trained.values())) / 60, 2)
        row["pairs"] = sum(line["pairs"] for line in collected)
        if all("pair_tokens" in line for line in collected):
            row["pair_tokens"] = sum(line["pair_tokens"] for line in collected)
        found = [looks(log, t) for t in trained]
        row["held_out"] = [[each[0], min(each.values())] if each else None for each in found] if any(found) else []
        for name in ("P(H)", "P(h)"):
            turns = max(len(line[name]) for line in collected)
            counts_TN = [line["pairs"] * np.pad(line[name], (0, turns - len(line[name]))) for line in collected]
            row[name] = np.round(np.sum(counts_TN, axis=0) / row["pairs"], 4).tolist()
        row["paper"] = published(method, cfg, len(row["win"]))
        if cfg.user != "dataset" and len(row["win"]) >= len(row["P(H)"]):
            row["weighted"] = round(float(np.dot(row["win"][: len(row["P(H)"])], row["P(H)"]) / sum(row["P(H)"])), 4)
    return results


def differences(played, reward, turns=None):
    """Paired differences of win rates, with intervals over dialogues: same openings, same users."""
    rows, judge = [], evaluate.by_reward(reward)
    for a, b in DIFFERENCES:
        if a in played and b in played:
            won = {name: evaluate.judged(played[name], played["base"], judge, turns) for name in (a, b)}
            d_NH = 100 * (won[a] - won[b])
            low, high = evaluate.bootstrap(d_NH.mean(1, keepdims=True))[:, 0]
            per_turn = ", ".join(f"{x:+.1f}" for x in d_NH.mean(0))
            rows.append([f"{a} - {b}", per_turn, f"{d_NH.mean():+.1f} [{low:+.1f}, {high:+.1f}]"])
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
        begin = [(0, 50.0)] if cfg.policy == cfg.reference else []  # pi_1 against itself
        found.setdefault(method, begin).append((int(step), results[name]["avg"]))
    return found


def snapshots(out, iterations):
    """{step from the beginning: policy folder} of what a run has kept. With --patience an iteration's policy is that of its
    best look: it stands at that step, the next iteration begins there, and what was trained after it is left out."""
    log = files.read_lines(os.path.join(out, "metrics.jsonl"))
    patience = files.read_json(os.path.join(out, "config.json"))["patience"]
    steps_of = Counter(r["iteration"] for r in log if r["phase"] == "regress")
    found, done = {}, 0
    for t in range(1, iterations + 1):
        folder = iteration_folder(out, t)
        names = os.listdir(folder) if os.path.isdir(folder) else []  # most updates of setting two leave none
        look = best_look(log, t) if patience else None
        kept = look[0] if look else steps_of[t]
        steps = sorted(int(name[5:]) for name in names if name.startswith("step_") and name[5:].isdigit())
        for step in steps:
            if step <= kept:
                found[done + step] = os.path.join(folder, f"step_{step}")
        done += kept
        if "policy" in names:
            found[done] = policy_folder(out, t)
    return found


def choose(text):
    """The methods that --method names: all, a row, a loss (all its rows), or several of these with commas."""
    chosen = []
    for name in text.split(","):
        found = [m for m in METHODS if name in ("all", m) or name in LOSSES and m.startswith(f"{name}-")]
        if not found:
            raise BadInput(f"--method is all, {', '.join(LOSSES)} or one of {', '.join(METHODS)}, not {name}"
                           f"{did_you_mean(name, [*METHODS, *LOSSES, 'all'])}")
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
        report(results, curve, differences(played, cast[2], evaluate.judged_turns(cfg)), cfg.out)
        openings(played, cast[2], cfg.out)
        print(f"all results, curves and dialogues, for a browser: {page.write(cfg.out)}", flush=True)
    barrier()
    return results, failed


def report(results, curve, paired, out):
    """Leave the table, the paired differences and the figure in the run's folder, and show them."""
    whole = len(results["base"]["win"]) == 1
    text = f"{methods_table(results)}\n\n{paired}\n\n{footer(results)}; the paper's Table {2 if whole else 1} in brackets"
    if not whole:
        text += "; weighted: by P(H), the lengths in each row's own data; reward: mean over the turns"
    figure = os.path.join(out, "figure.png")
    files.write_file(os.path.join(out, "table.md"), text + "\n")
    files.write_file(os.path.join(out, "results.json"), json.dumps(results, indent=1))
    files.write_file(os.path.join(out, "curve.json"), json.dumps(curve))
    methods_figure(results, curve, figure, order=[*DATA, "hybrid"])
    print(f"\n{text}\n\n{figure}", flush=True)


def openings(played, reward, out):
    """Appendix D: three openings as every policy played them, in dialogues.md: those at the quartiles of the last row's gain
    over the base policy, neither the best nor lucky ones."""
    scores = {name: reward(dialogues) for name, dialogues in played.items()}
    gain = np.subtract(scores[list(played)[-1]], scores["base"])
    order, text = np.argsort(gain, kind="stable"), []
    for number, quartile in enumerate(("the lower quartile", "the median", "the upper quartile"), 1):
        i = int(order[len(gain) * number // 4])
        chosen = {f"{name} (reward {scores[name][i]:.2f})": dialogues[i] for name, dialogues in played.items()}
        text.append(f"## At {quartile} of {list(played)[-1]}'s gain, {gain[i]:+.2f}\n{whole_dialogues(chosen)}\n")
    files.write_file(os.path.join(out, "dialogues.md"), "\n".join(text))


def main(argv=None):
    with one_line("baselines.py"):
        cfg, extra = read_config(argv, __doc__, method=dict(required=True, help="all, a loss or a row; several with commas"),
                                 **watch.FLAGS)  # fmt: skip
        methods, given = choose(extra["method"]), extra["given"]
        others = [name for name in methods if not name.endswith("refuel")]
        if cfg.pairs and others:
            raise BadInput(f"--pairs takes the place of REFUEL's own: --method refuel, dpo-refuel or rloo-refuel, not {others[0]}")
        if "out" not in given:
            cfg = replace(cfg, out=f"{cfg.out}_baselines")
        start_processes()
        cfg = prepare(cfg)
        plan.check(cfg)
        open_folder(cfg, made_of)
        watch.TRACK["with"] = extra["track"]
        for method in METHODS:  # what is finished will stand in the same table
            mine = method_config(method, cfg, given)
            if method in methods or os.path.isdir(policy_folder(mine.out, mine.iterations)):
                open_folder(mine, made_of)
        _, failed = run(methods, cfg, given)
        for method, error in failed.items():
            print(f"baselines.py: {method}: {error}", file=sys.stderr)
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
