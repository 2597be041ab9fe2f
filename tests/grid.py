"""Each row's constants, chosen on validation customers: a whole training, all its iterations, for each value.

    python tests/grid.py --setting toy --engine transformers --seed 100 --eval-dialogues 500 --out runs/grid

A row has a grid of its own unit, the same number of values: eta for Eq. 1, beta for DPO, the learning rate for RLOO,
which has no other constant. Pairs and ln pi_t of the first iteration do not depend on a loss, so those of one kind of
data are collected once and copied. Writes grid.json and grid.md: average win rate against the base policy, its interval,
KL, and in each iteration the step of the held-out loss's best look.
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
from machinery import files, worlds
from machinery.files import policy_folder
from machinery.held_out import best_look
from machinery.ranks import one_line, start_processes
from machinery.report import markdown
from machinery.run import open_folder
from machinery.settings import read_config
from simulator import load_cast, made_of, prepare

GRID = {"rebel": ("eta", (10.0, 30.0, 100.0)), "dpo": ("beta", (0.03, 0.1, 0.3)), "rloo": ("lr", (3e-5, 1e-4, 3e-4))}
EPOCHS = (1, 2, 4)


COLLECTS = "num_prompts", "hybrid", "reset_law", "max_dialogue", "gamma"  # of a row's own values, what its pairs depend on


def collection(method, mine, cfg):
    """Where the first pairs of one kind of data are kept: rows share them unless their own values change them."""
    kind = "refuel" if method == "refuel" else method.split("-", 1)[1]
    own = [f"{name}_{getattr(mine, name)}" for name in COLLECTS if getattr(mine, name) != getattr(cfg, name)]
    return os.path.join(cfg.out, "_".join(["pairs", kind, *own]))


def rows(methods, vary, only, best):
    """[(name of the run, method, values)]: a row's own constants, or (vary epochs) epochs at its best ones.

    only: other values than the grid's; best: the world's BASELINES."""
    found = []
    for method in methods:
        loss = "rebel" if method.startswith("refuel") else method.split("-")[0]
        name, values = GRID[loss] if vary == "constants" else ("epochs", EPOCHS)
        own = best.get("all", {}) | best.get(method, {}) if vary == "epochs" else {}
        for value in only or values:
            value = int(value) if name == "epochs" else value
            found.append((f"{method}.{name}_{value:g}", method, own | {name: value}))
    return found


def main():
    with one_line("tests/grid.py"):
        cfg, extra = read_config(None, __doc__, method=dict(default="rebel,dpo,refuel"),
                                 vary=dict(default="constants", choices=("constants", "epochs")),
                                 values=dict(default=[], type=float, nargs="*"))  # fmt: skip
        start_processes()
        cfg = prepare(replace(cfg, eval_split="validation"))
        open_folder(cfg, made_of)
        cast, policies, values_of, own = load_cast(cfg), {}, {}, worlds.baselines(cfg.dataset)
        for name, method, values in rows(baselines.choose(extra["method"]), extra["vary"], extra["values"], own):
            mine = replace(cfg, out=os.path.join(cfg.out, name), **values)
            open_folder(mine, made_of)
            pairs = collection(method, mine, cfg)
            if os.path.isdir(pairs) and not os.path.isdir(os.path.join(mine.out, "iter_1")):
                shutil.copytree(pairs, os.path.join(mine.out, "iter_1"))
            cast = baselines.train(method, mine, cast)
            if not os.path.isdir(pairs):
                shutil.copytree(os.path.join(mine.out, "iter_1"), pairs, ignore=shutil.ignore_patterns("policy", "best_*"))
            policies[name], values_of[name] = policy_folder(mine.out, cfg.iterations), values
        results, _ = evaluate.evaluate(policies, cfg.out, *cast, cfg)
        table = []
        for name, values in values_of.items():
            log = files.read_lines(os.path.join(cfg.out, name, "metrics.jsonl"))
            best = [best_look(log, t) for t in range(1, cfg.iterations + 1)]
            row = results[name] | {"values": values, "best_looks": best}
            results[name] = row
            shown = f"{row['avg']:.1f} [{row['avg_low']:.1f}, {row['avg_high']:.1f}]"
            table.append([name, shown, f"{row['kl']:.1f}", ", ".join("{} of {}".format(*look) if look else "none" for look in best)])
        text = "\n".join(markdown(["row and value", "average win rate, %", "KL", "best look, by iteration"], table))
        files.write_file(os.path.join(cfg.out, "grid.md"), text + "\n")
        files.write_file(os.path.join(cfg.out, "grid.json"), json.dumps(results, indent=1))
        print(text, flush=True)


if __name__ == "__main__":
    main()
