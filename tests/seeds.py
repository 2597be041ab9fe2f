"""Several seeds of one table: means, each seed's average, and the noise of training beside the intervals over dialogues.

    python tests/seeds.py results/toy/seed_0.json results/toy/seed_1.json --figure results/toy/figure.png

Reads the results.json of as many runs of baselines.py that differ in --seed alone, or their folders; a folder without
one stands for the rows of one seed that were run side by side, each in a folder of its own in it. A row that some
seeds lack is the mean of those that have it, and each seed's own number says which; a difference, printed or in the
figure, is over the seeds that both rows have. An interval over dialogues holds one policy's luck with customers; the
spread over seeds the luck of pairs, their order and the same test customers' noise. Of two or three seeds the standard
deviation itself is hardly known, so each seed's number is printed.
"""
import sys

sys.path.insert(0, ".")
import argparse
import glob
import itertools
import json
import os

import numpy as np

from machinery import files
from machinery.ranks import one_line
from machinery.report import markdown, methods_figure


def results(path):
    """{row: its results} of a results.json, of a run's folder, or of all FOLDER/*/results.json, rows that were run side by
    side and whose base policies must have played alike."""
    if not os.path.isdir(path):
        return files.read_json(path)
    if os.path.exists(os.path.join(path, "results.json")):
        return files.read_json(os.path.join(path, "results.json"))
    found = {}
    for place in sorted(glob.glob(os.path.join(glob.escape(path), "*", "results.json"))):
        row = files.read_json(place)
        if found and row["base"]["reward"] != found["base"]["reward"]:
            raise files.BadInput(f"{place}: its base policy has other rewards than the first row's: other customers?")
        for name in row.keys() & found.keys() - {"base"}:
            raise files.BadInput(f"{place}: {name} is in another folder of {path} as well")
        found |= row
    if not found:
        raise files.BadInput(f"{path}: no results.json in it or in the folders in it")
    return found


def merged(runs):
    """One row a method: the mean over the seeds that have it, and low and high as the least and most of them."""
    found = {}
    for name in dict.fromkeys(name for run in runs for name in run):
        rows = [run[name] for run in runs if name in run]
        if name == "base" and len(rows) < len(runs):
            raise files.BadInput(f"base is missing in {len(runs) - len(rows)} of {len(runs)} files")
        if len({(row["dialogues"] + row.get("failed", 0), len(row["win"])) for row in rows}) > 1:
            raise files.BadInput(f"{name}: its runs have not as many dialogues, or turns")
        if name == "base" and len({str(row["reward"]) for row in rows}) < len(rows):
            raise files.BadInput("two of the files are of one seed: their base policies have the same rewards")
        win = np.array([row["win"] for row in rows])
        average = np.array([row["avg"] for row in rows])
        one = {"win": win.mean(0), "low": win.min(0), "high": win.max(0), "avg": average.mean(),
               "seeds": [run[name]["avg"] if name in run else np.nan for run in runs],
               "sd": average.std(ddof=1) if len(rows) > 1 else np.nan, "reward": np.mean([row["reward"] for row in rows])}  # fmt: skip
        one["half"] = np.mean([(row["avg_high"] - row["avg_low"]) / 2 for row in rows])
        one["wins"] = {seed: run[name]["win"] for seed, run in enumerate(runs) if name in run}
        for key in ("weighted", "kl", "pairs", "pair_tokens", "minutes", "length_avg"):  # not known in one, not known of all
            one[key] = np.mean([row.get(key, np.nan) for row in rows])
        if name == "base":
            one["weighted"] = 50.0
        if all(row.get("held_out") and None not in row["held_out"] for row in rows):
            one["held_out"] = np.mean([row["held_out"] for row in rows], axis=0)
        found[name] = one | {"paper": rows[0].get("paper")}
    return found


def number(value, digits):
    """What is not known is no number.

    >>> number(2.345, 1), number(float("nan"), 1)
    ('2.3', '-')
    """
    return "-" if np.isnan(value) else f"{value:.{digits}f}"


def table(rows):
    heads = ["method", *(f"h = {h}" for h in range(1, len(rows["base"]["win"]) + 1)), "average", "each seed",
             "sd over seeds", "half interval over dialogues", "weighted", "reward", "KL", "paper's average"]  # fmt: skip
    lines = []
    for name, row in rows.items():
        seeds = ", ".join(number(x, 1) for x in row["seeds"])
        paper = f"{row['paper'][5]:.2f}" if row["paper"] else ""
        lines.append([name, *(f"{x:.1f}" for x in row["win"]), f"{row['avg']:.1f}", seeds, number(row["sd"], 1),
                      f"{row['half']:.1f}", number(row["weighted"], 1), f"{row['reward']:.3f}", number(row["kl"], 2), paper])  # fmt: skip
    return "\n".join(markdown(heads, lines))


def costs(rows):
    """What a seed of each row took, the length of its answers, and of each iteration its own held-out loss before the
    first step and at its best; without what no file knows."""
    heads = ["method", "pairs", "their tokens", "minutes", "tokens an answer", "held-out loss, by iteration"]
    lines = []
    for name, row in rows.items():
        looks = ", ".join(f"{start:.4f} to {best:.4f}" for start, best in row.get("held_out", ()))
        lines.append([name, number(row["pairs"], 0), number(row["pair_tokens"], 0), number(row["minutes"], 1),
                      number(row["length_avg"], 1), looks])  # fmt: skip
    known = [any(cell != "-" for cell in column) for column in zip(*lines)]
    heads, *lines = [list(itertools.compress(line, known)) for line in (heads, *lines)]
    return "\n".join(markdown(heads, lines))


def differences(rows):
    """REFUEL's average less each row's, over the seeds that both have. Such a difference has the noise of both trainings;
    baselines.differences has, for one seed, the noise of customers alone."""
    lines = []
    for name, row in rows.items():
        each = np.subtract(rows["refuel"]["seeds"], row["seeds"])
        each = each[~np.isnan(each)]
        if name in ("base", "refuel") or not len(each):
            continue
        error = each.std(ddof=1) / np.sqrt(len(each)) if len(each) > 1 else np.nan
        lines.append([name, f"{each.mean():+.1f}", number(error, 1), ", ".join(f"{x:+.1f}" for x in each)])
    return "\n".join(markdown(["REFUEL less", "mean over seeds", "its standard error", "each seed"], lines))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--figure", help="Figure 1 of the means; bands from the least to the most of the seeds")
    parser.add_argument("--curve", help="curve.json of one run, for Figure 2")
    flags = parser.parse_args()
    with one_line("tests/seeds.py"):
        rows = merged([results(path) for path in flags.files])
        print(table(rows))
        if any("held_out" in row for row in rows.values()):
            print(f"\n{costs(rows)}")
        if len(flags.files) > 1 and "refuel" in rows:
            print(f"\n{differences(rows)}")
        if flags.figure:
            curve = json.load(open(flags.curve)) if flags.curve else {}
            kinds = ["lt-offline", "lt-mixed", "lt-online", "mt-mixed", "refuel", "hybrid"]
            methods_figure(rows, curve, flags.figure, order=kinds)
            print(os.path.abspath(flags.figure))


if __name__ == "__main__":
    main()
