"""What common random numbers add to a win rate: python tests/apart.py --world toy FOLDER FOLDER ...

In an evaluation all policies play an opening with the same draws of the sampler and of the user (docs/evaluation.md). A
folder holds the same policies' dialogues with another --seed, by evaluate.py: the same openings, other draws. Each policy
is compared with the base policy of its own folder, as evaluate.py does, and with the base policy of every other one."""
import argparse
import glob
import os
import sys

sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__))), os.path.dirname(os.path.abspath(__file__))]

import refuel  # noqa: F401  (first: it sets what torch reads when it is imported)

import numpy as np

import evaluate
from machinery import files, worlds
from machinery.ranks import one_line
from machinery.report import markdown
from simulator import Dialogue


def played(folder):
    """(its seed, {row: dialogues}, the rows without results); the base policy's are those of the first row."""
    found, seeds, unfinished = {}, set(), []
    for run in [folder, *sorted(glob.glob(os.path.join(glob.escape(folder), "*", "")))]:
        results = os.path.join(run, "results.json")
        finished = files.read_json(results) if os.path.exists(results) else {}
        for place in sorted(glob.glob(os.path.join(glob.escape(run), "eval", "*.jsonl"))):
            name = os.path.basename(place).removesuffix(".jsonl")
            if name in found:
                continue
            found[name] = [Dialogue.from_json(row) for row in files.read_sealed(place)]
            seeds.add(files.read_json(place.removesuffix("l"))["seed"])
            unfinished += [name] * (name not in finished and name != "base")
    if "base" not in found or len(seeds) > 1:
        raise files.BadInput(f"{folder}: " + (f"rows of seeds {sorted(seeds)}" if seeds else "no dialogues of a base policy"))
    openings = {name: [d.messages[0] for d in dialogues] for name, dialogues in found.items()}
    for name in found:
        if openings[name] != openings["base"]:
            raise files.BadInput(f"{folder}: {name} was played from other openings than base")
    return seeds.pop(), found, unfinished


def apart(played, reward, turns):
    """{row: [(its average win rate against its own base policy, against the base policy as the other seeds played it)], a
    seed each}: the latter with the same openings, but no draw of the sampler or the user in common.

    played: {seed: {row: dialogues}}"""
    openings = [[dialogue.messages[0] for dialogue in rows["base"]] for rows in played.values()]
    if len(openings) < 2 or any(one != openings[0] for one in openings):
        raise files.BadInput("two or more seeds are due, from the same openings")
    scores = {seed: {name: evaluate.scored(rows[name], reward, turns) for name in rows} for seed, rows in played.items()}
    found = {}
    for name in dict.fromkeys(name for rows in played.values() for name in sorted(rows) if name != "base"):
        found[name] = []
        for seed, rows in scores.items():
            if name in rows:
                win = {other: win_rate(rows[name], scores[other]["base"]) for other in scores}
                found[name].append((win.pop(seed), float(np.mean(list(win.values())))))
    return found


def win_rate(reward_NH, base_NH):
    return 100 * ((np.sign(reward_NH - base_NH) + 1) / 2).mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument("--world", default="toy", help="whose reward compares")
    parser.add_argument("--turns", type=int, default=5)
    flags = parser.parse_args()
    with one_line("tests/apart.py"):
        everything = {}
        for folder in flags.folders:
            seed, rows, _ = played(folder)
            if seed in everything:
                raise files.BadInput(f"{folder}: another folder is of --seed {seed}, too")
            everything[seed] = rows
        reward = worlds.load_reward(flags.world, "--world")
        lines = []
        for name, values in apart(everything, reward, flags.turns).items():
            common, others = np.mean(values, axis=0)
            lines.append([name, f"{common:.1f}", f"{others:.1f}", f"{common - others:+.1f}"])
        print("\n".join(markdown(["average win rate, %", "common draws", "draws apart", "difference"], lines)))


if __name__ == "__main__":
    main()
