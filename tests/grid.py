"""Each row's constants, chosen on validation customers: one iteration for each value, all on the same pairs.

    python tests/grid.py --setting toy --engine transformers --seed 100 --eval-dialogues 500 --out runs/grid

A row has a grid of its own unit, the same number of values: eta for Eq. 1, beta for DPO; RLOO has none. Pairs and ln pi_t
of a first iteration do not depend on a loss, so those of one kind of data are collected once and copied. Writes grid.json
and grid.md: average win rate against the base policy, its interval, the held-out loss's best step.
"""
import sys

sys.path.insert(0, ".")
import machinery  # noqa: F401, I001

import json
import os
import shutil
from dataclasses import replace

import baselines
import evaluate
from machinery import files
from machinery.files import policy_folder
from machinery.ranks import one_line, start_processes
from machinery.report import markdown
from machinery.run import open_folder
from machinery.settings import read_config
from simulator import load_cast, made_of, prepare

GRID = {"rebel": ("eta", (10.0, 30.0, 100.0)), "dpo": ("beta", (0.03, 0.1, 0.3)), "rloo": ("lr", (1e-4,))}
EPOCHS = (1, 2, 4)


def kind(method):
    return "refuel" if method == "refuel" else method.split("-", 1)[1]


def rows(methods, vary):
    """[(name of the run, method, values)]: a row's own constants, or (vary epochs) epochs at its best ones."""
    found = []
    for method in methods:
        loss = "rebel" if method.startswith("refuel") else method.split("-")[0]
        name, values = GRID[loss] if vary == "constants" else ("epochs", EPOCHS)
        best = baselines.BEST["toy"].get(method, {}) if vary == "epochs" else {}
        found += [(f"{method}.{name}_{value:g}", method, best | {name: value}) for value in values]
    return found


def main():
    with one_line("tests/grid.py"):
        cfg, extra = read_config(None, __doc__, method=dict(default="rebel,dpo,refuel"),
                                 vary=dict(default="constants", choices=("constants", "epochs")))  # fmt: skip
        start_processes()
        cfg = prepare(replace(cfg, iterations=1, eval_split="validation"))
        open_folder(cfg, made_of)
        cast, policies, values_of = load_cast(cfg), {}, {}
        for name, method, values in rows(baselines.choose(extra["method"]), extra["vary"]):
            mine = replace(cfg, out=os.path.join(cfg.out, name), **values)
            open_folder(mine, made_of)
            pairs = os.path.join(cfg.out, f"pairs_{kind(method)}")
            if os.path.isdir(pairs) and not os.path.isdir(os.path.join(mine.out, "iter_1")):
                shutil.copytree(pairs, os.path.join(mine.out, "iter_1"))
            cast = baselines.train(method, mine, cast)
            if not os.path.isdir(pairs):
                shutil.copytree(os.path.join(mine.out, "iter_1"), pairs, ignore=shutil.ignore_patterns("policy", "best_*"))
            policies[name], values_of[name] = policy_folder(mine.out, 1), values
        results, _ = evaluate.evaluate(policies, cfg.out, *cast, cfg, kl=False)
        table = []
        for name, values in values_of.items():
            log = files.read_lines(os.path.join(cfg.out, name, "metrics.jsonl"))
            looks = {row["step"] + 1: row["held_out_loss"] for row in log if "held_out_loss" in row}
            steps = min(looks, key=looks.get)
            row = results[name] | {"values": values, "best_look": steps, "last_step": max(looks)}
            results[name] = row
            table.append([name, f"{row['avg']:.1f} [{row['avg_low']:.1f}, {row['avg_high']:.1f}]", f"{steps} of {max(looks)}"])
        text = "\n".join(markdown(["row and value", "average win rate, %", "best look after"], table))
        files.write_file(os.path.join(cfg.out, "grid.md"), text + "\n")
        files.write_file(os.path.join(cfg.out, "grid.json"), json.dumps(results, indent=1))
        print(text, flush=True)


if __name__ == "__main__":
    main()
