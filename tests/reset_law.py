"""Two laws of (H, h) in a shop where an early question costs something: what each of them optimises.

    python tests/reset_law.py --setting toy --engine transformers --num-prompts 1024 --seed 0 --out runs/reset_law_0

The paper draws H ~ U(K) and h ~ U(H), so that turn h sees P(H | h) ~ 1/H, and REFUEL climbs sum_H J_H / H; drawn uniformly
over all h <= H it climbs the plain sum of J_H, which is what an evaluation averages over turns. In the toy a question costs
nothing and both laws do the same. Here K = 2 and the customer is in a hurry: a first answer that asks is worth 1 if the
customer stays for a second one and nothing if not, one that does not ask is worth .6 if the talk ends with it and nothing
else. At turn 1 a question gains P(H = 2 | h = 1) - .6 P(H = 1 | h = 1): 1/3 - .6 x 2/3 = -.07 under the paper's law, 1/2 - .6 x
1/2 = +.2 under the uniform one. It is the exact world of theory/check_props.py (answer or ask), with the toy's policy in it.

Prints and keeps (reset_law.json): J_h and the share of answers that ask, by turn; sum_H J_H w_H under both weights, with the
paired difference of the laws and its 95 % interval over dialogues.
"""
import sys

sys.path.insert(0, ".")
import machinery  # noqa: F401, I001

import json
import os
from dataclasses import replace

import numpy as np

import evaluate
import refuel
import toy
from machinery.files import policy_folder, write_file
from machinery.ranks import one_line, start_processes
from machinery.run import open_folder
from machinery.settings import read_config
from simulator import load_cast, made_of, prepare

IN_TIME = 0.6  # what an answer that does not ask is worth where the talk ends with it


class HurriedReward(toy.Reward):
    def one_reward(self, messages):
        asked, ended = asks(messages[1]["content"]), len(messages) == 2
        return IN_TIME * (not asked) if ended else float(asked)


def asks(answer):
    return bool(toy.QUESTION.search(answer))


def main():
    with one_line("tests/reset_law.py"):
        cfg = read_config(None, __doc__)
        start_processes()
        cfg = prepare(replace(cfg, max_turns=2))
        open_folder(cfg, lambda cfg: made_of(cfg) | {"in time": IN_TIME})
        policy, user, _ = load_cast(cfg)
        cast, policies = (policy, user, HurriedReward()), {}
        for law in ("paper", "uniform"):
            mine = replace(cfg, reset_law=law, out=os.path.join(cfg.out, law))
            open_folder(mine, lambda cfg: made_of(cfg) | {"in time": IN_TIME})
            refuel.train(mine, cast)
            policies[law] = policy_folder(mine.out, cfg.iterations)
        results, played = evaluate.evaluate(policies, cfg.out, *cast, cfg, kl=False)
        reward_NH = {name: evaluate.scored(dialogues, cast[2]) for name, dialogues in played.items()}
        turns = np.arange(1, cfg.max_turns + 1)
        weights = {"uniform": np.ones(len(turns)) / len(turns), "paper": 1 / turns / (1 / turns).sum()}
        found = {"command": results["base"]["command"], "in time": IN_TIME, "J": {}, "asks": {}, "objective": {}}
        for name, dialogues in played.items():
            asked_NH = np.array([[asks(m["content"]) for m in d.messages[1::2]] for d in dialogues])
            found["J"][name], found["asks"][name] = (x.mean(0).round(4).tolist() for x in (reward_NH[name], asked_NH))
        for name, weight in weights.items():
            values = {law: round(float((reward_NH[law] @ weight).mean()), 4) for law in ("base", "paper", "uniform")}
            difference_N1 = ((reward_NH["uniform"] - reward_NH["paper"]) @ weight)[:, None]
            low, high = evaluate.bootstrap(difference_N1)[:, 0]
            values["uniform - paper"] = [round(float(x), 4) for x in (difference_N1.mean(), low, high)]
            found["objective"][f"weights of the {name} law"] = values
        write_file(os.path.join(cfg.out, "reset_law.json"), json.dumps(found, indent=1))
        print(json.dumps(found, indent=1), flush=True)


if __name__ == "__main__":
    main()
