"""report.html of a folder: results, curves, figures, configuration and dialogues, in one file without links to elsewhere.

Of a run's folder, a baselines' folder (a run in each of its folders) or an evaluation's, whatever of it is there. Only
files are read. What a policy or a user has said is data: it stands as JSON in which no < is left, is put on the page as
text only, and a policy of the page's own (CSP) lets no script run but the page's.
"""
import base64
import hashlib
import json
import os
import re
import time

import numpy as np

from machinery import files, watch
from machinery.files import BadInput
from machinery.settings import SETTINGS

PAIRS, OPENINGS = 200, 1000  # shown at most of an iteration, of an evaluation
ITERATIONS = 10  # whose pairs are shown at most: setting two has thousands
BUDGET = 6_000_000  # characters of an evaluation's dialogues, and of all pairs together
FIGURES = {"win_rate.png": "win rate and reward at each turn", "figure.png": "the methods beside each other",
           "metrics.png": "the run's metrics"}  # fmt: skip
TEMPLATE = os.path.join(os.path.dirname(os.path.realpath(__file__)), "page.html")


def write(folder):
    """Write report.html of a folder and return its path; BadInput where there is nothing to show."""
    data = collect(folder)
    if not (data["results"] or data["runs"] or data["openings"] or data["pairs"]):
        raise BadInput(f"{folder} is not a run's folder, nor an evaluation's: it has no metrics.jsonl, results.json or eval/")
    with open(TEMPLATE, encoding="utf-8") as file:
        page = file.read()
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    hashed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    path = os.path.join(folder, "report.html")
    files.write_file(path, page.replace("HASH", hashed, 1).replace('"DATA"', text, 1))
    return path


def collect(folder):
    """All that the page shows."""
    runs = {}
    for name in ["", *sorted(os.listdir(folder) if os.path.isdir(folder) else [])]:
        path = os.path.join(folder, name)
        if os.path.exists(os.path.join(path, "metrics.jsonl")):
            runs[name] = path
    return {"folder": os.path.basename(os.path.abspath(folder)), "made": time.strftime("%Y-%m-%d %H:%M"),
            "results": results(folder), "figures": figures(folder), "config": config(folder),
            "runs": {name: watch.curves(files.read_lines(os.path.join(path, "metrics.jsonl"), torn=True))
                     for name, path in runs.items()},
            "openings": openings(folder), "pairs": pairs(runs)}  # fmt: skip


def finite(value):
    """The same without numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def results(folder):
    path = os.path.join(folder, "results.json")
    return finite(files.read_json(path)) if os.path.exists(path) else {}


def figures(folder):
    """[(what it shows, its PNG as a data URL)]."""
    found = []
    for name, words in FIGURES.items():
        path = os.path.join(folder, name)
        if os.path.exists(path):
            with open(path, "rb") as file:
                found.append((words, "data:image/png;base64," + base64.b64encode(file.read()).decode()))
    return found


def config(folder):
    """[(name, value, the setting's value or None where it is that)] of config.json; what differs comes first."""
    path = os.path.join(folder, "config.json")
    found = files.read_json(path) if os.path.exists(path) else {}
    usual, rows = SETTINGS.get(found.get("setting"), {}), []
    for name, value in (found | found.pop("made_of", {})).items():
        changed = name in usual and usual[name] != value
        rows.append((name, str(value), str(usual[name]) if changed else None))
    return sorted(rows, key=lambda row: row[2] is None)


# ---------------------------------------------------------------------------------------------------------------
# Dialogues
# ---------------------------------------------------------------------------------------------------------------


def at_quantiles(values, most):
    """The places of at most `most` values that lie at equal steps of their order, both ends among them, in that order."""
    order = np.argsort(values, kind="stable")
    if len(order) <= most:
        return order.tolist()
    return order[np.linspace(0, len(order) - 1, most).round().astype(int)].tolist()


def room(size, most, budget):
    """How many texts of `size` characters may be shown: at most `most`, and no more than the budget has room for but 10."""
    return int(max(10, min(most, budget / max(1, size))))


def pairs(runs):
    """[{run, t, of, rule, pairs}] of the iterations whose pairs are there."""
    found = []
    for name, path in runs.items():
        numbers = sorted(int(inner[5:]) for inner in os.listdir(path) if re.fullmatch(r"iter_\d+", inner))
        kept = [t for t in numbers if os.path.exists(os.path.join(files.iteration_folder(path, t), "pairs.jsonl"))]
        for place in at_quantiles(kept, ITERATIONS):
            found.append((name, kept[place], os.path.join(files.iteration_folder(path, kept[place]), "pairs.jsonl")))
    return [{"run": name, "t": t} | chosen(path, BUDGET / len(found)) for name, t, path in found]


def chosen(path, budget):
    """Of a pairs.jsonl those at equal steps of the order of r(y) - r(y'): their texts, no ids. Two readings of the file: of
    64,000 pairs a list would take gigabytes."""
    differences, size = [], 0
    for row in files.read_sealed(path):
        if "rewards" in row:
            differences.append(row["rewards"][0] - row["rewards"][1])
            size += sum(len(m["content"]) for d in row["dialogues"] for m in d["messages"])
    most = room(size / max(1, len(differences)), PAIRS, budget)
    wanted, shown, number = set(at_quantiles(differences, most)), [], 0
    for row in files.read_sealed(path):
        if "rewards" in row:
            if number in wanted:
                shown.append(pair(row, number + 1))
            number += 1
    return {"of": len(differences), "pairs": shown}


def pair(row, number):
    h, (first, second) = row["h"], row["dialogues"]
    prefix = first["messages"][: 2 * h - 1]
    sides = []
    for d, y, reward in zip((first, second), (row["y"], row["y2"]), row["rewards"]):
        sides.append({"said": d["messages"][2 * h - 1 :], "cut": d["truncated"][h - 1 :], "tokens": len(y), "reward": reward})
    return {"n": number, "h": h, "H": row["H"], "system": first.get("system"), "prefix": prefix, "sides": sides}


def openings(folder):
    """{of, names, rewards, rows}: openings as all policies played them, the base first; those at equal steps of the order
    of the last policy's gain over the base, where rewards.json has it, else the first ones."""
    place = os.path.join(folder, "eval")
    names = [name.removesuffix(".jsonl") for name in sorted(os.listdir(place)) if name.endswith(".jsonl")] if os.path.isdir(place) else []
    order = list(results(folder))
    if order:  # others are an earlier evaluation's
        names = [name for name in order if name in names]
    if not names:
        return {}
    played = {name: [brief(row) for row in files.read_sealed(os.path.join(place, f"{name}.jsonl"))] for name in names}
    number = min(map(len, played.values()))
    size = sum(len(m["content"]) for rows in played.values() for d in rows for m in d["said"]) / max(1, number)
    path = os.path.join(folder, "rewards.json")
    earned = files.read_json(path) if os.path.exists(path) else {}
    gain = [0.0] * number
    if len(names) > 1 and {names[0], names[-1]} <= earned.keys():
        both = zip(earned[names[0]], earned[names[-1]])
        gain = [0.0 if before is None or after is None else after - before for before, after in both]
    rows = []
    for i in sorted(at_quantiles(gain[:number], room(size, OPENINGS, BUDGET))):
        sides = [played[name][i] | {"reward": earned[name][i] if name in earned else None} for name in names]
        rows.append({"n": i + 1, "sides": sides})
    return {"of": number, "names": names, "rows": rows}


def brief(row):
    return {"said": row["messages"], "cut": row["truncated"], "system": row.get("system"), "failed": row.get("failed")}
