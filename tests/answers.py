"""What the rows of the English shop say, counted: python tests/answers.py FOLDER ... [--out FILE]

A folder holds the rows of one seed, each played in a folder of its own in it (runs/shop_0/refuel), or baselines.py's
folder of all of them. Counted are the shares of answers that ask, ask again or repeat a proposal, and how much customers
have stated; beside them stand the paired differences of win rates over the dialogues (baselines.differences), and how far
the share of answers that ask goes with a row's average win rate over all trainings. Of several seeds also the win rates
against the base policy of the other ones."""
import argparse
import json
import os
import re
import sys

sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__))), os.path.dirname(os.path.abspath(__file__))]

import refuel  # noqa: F401  (first: it sets what torch reads when it is imported)

import numpy as np

import baselines
import evaluate
import shop
import toy
from apart import apart, played
from machinery import files
from machinery.ranks import one_line
from simulator import Dialogue

COLUMNS = {"asks": "answers with a question", "asks first": "first answers with one",
           "asks again": "answers that ask for an attribute that was asked for before in the dialogue",
           "malformed": "answers that do not begin with a proposal", "same": "answers 2 to 5 whose proposal is the one before",
           "stated": "wishes a customer has stated after five turns, mean"}  # fmt: skip
TURNS = shop.DEFAULTS["max_turns"]


def counted(dialogues):
    """{column: a row's value}, shares in % of its answers.

    >>> clerk = "How about the small red silk hat? Which size would you like?"
    >>> texts = ["Something that is red, please.", clerk] * 2
    >>> roles = ["user", "assistant"] * 2
    >>> talk = Dialogue(ids=[], messages=[{"role": r, "content": t} for r, t in zip(roles, texts)])
    >>> counted([talk])
    {'asks': 100.0, 'asks first': 100.0, 'asks again': 50.0, 'malformed': 0.0, 'same': 100.0, 'stated': 1.0}
    """
    asks, first, again, malformed, same, stated = [], [], [], [], [], []
    for dialogue in dialogues:
        answers = [m["content"] for m in dialogue.messages if m["role"] == "assistant"]
        questions = [shop.QUESTION.search(text) for text in answers]
        proposals = [shop.PROPOSAL.match(text) for text in answers]
        asked = [question and question[1] for question in questions]
        asks += [bool(name) for name in asked]
        first.append(bool(asked[0]))
        again += [name is not None and name in asked[:k] for k, name in enumerate(asked)]
        malformed += [not proposal for proposal in proposals]
        same += [bool(old and new and old.groups() == new.groups()) for old, new in zip(proposals, proposals[1:])]
        words = re.findall(r"\w+", " ".join(m["content"] for m in dialogue.messages if m["role"] == "user"))
        stated.append(len(toy.ATTRIBUTE.keys() & set(words)))
    shares = [round(100 * sum(found) / len(found), 1) for found in (asks, first, again, malformed, same)]
    return dict(zip(COLUMNS, [*shares, round(float(np.mean(stated)), 2)]))


def with_win_rate(found):
    """{which rows: Pearson's correlation, over their trainings, of the share that asks with the average win rate}.

    found: [(row, share, win rate)]; the rows of one kind of data have an entry of their own."""
    rows = {"all": found} | {data: [one for one in found if one[0].endswith(data)] for data in baselines.DATA}
    return {name: round(float(np.corrcoef(np.array([one[1:] for one in some]).T)[0, 1]), 3)
            for name, some in rows.items() if len(some) > 2}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument("--out", metavar="FILE", help="write it there instead of printing it")
    flags = parser.parse_args()
    with one_line("tests/answers.py"):
        everything, answers, differences, points, rest = {}, {}, {}, [], {}
        for folder in flags.folders:
            seed, rows, unfinished = played(folder)
            everything[seed] = rows
            answers[f"seed {seed}"] = {name: counted(rows[name]) for name in sorted(rows)}
            for name in rows.keys() - {"base"}:
                won = evaluate.judged(rows[name], rows["base"], evaluate.by_reward(shop.reward), TURNS)
                points.append((name, answers[f"seed {seed}"][name]["asks"], 100 * won.mean()))
            table = baselines.differences(rows, shop.reward, TURNS).splitlines()[2:]
            differences[f"seed {seed}"] = ["{}: {}; average {}".format(*line.strip("| ").split(" | ")) for line in table]
            for name in unfinished:
                one = evaluate.summary(rows[name], rows["base"], evaluate.by_reward(shop.reward), shop.reward, TURNS)
                one = {key: one[key] for key in ("win", "avg", "avg_low", "avg_high", "reward")}
                rest[f"{name}, seed {seed}, played and not finished"] = one
        asking = {"asks and average win rate, correlation over trainings": with_win_rate(points)}
        if len(everything) > 1:
            found = apart(everything, shop.reward, TURNS).items()
            rest["average win rate against the base policy of the other seeds, in each seed"] = {
                name: [round(against_others, 2) for _, against_others in values] for name, values in found}  # fmt: skip
        found = {"columns": COLUMNS, "answers": answers} | asking | {"differences": differences} | rest
        text = re.sub(r"[{\[][^{}\[\]]*[}\]]", lambda m: re.sub(r"\s*\n\s*", " ", m[0]), json.dumps(found, indent=1))
        if flags.out:
            files.write_file(flags.out, f"{text}\n")
        else:
            print(text)


if __name__ == "__main__":
    main()
