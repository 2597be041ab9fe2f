"""Two laws of (H, h) in a shop where an early question costs something: what each of them optimises.

    python tests/reset_law.py --setting toy --engine transformers --seed 0 --out runs/reset_law_0

The paper draws H ~ U(K) and h ~ U(H), so that turn h sees P(H | h) ~ 1/H, and REFUEL climbs sum_H J_H / H; drawn uniformly
over all h <= H it climbs the plain sum of J_H, which is what an evaluation averages over turns. In the toy a question costs
nothing and both laws do the same. Here the customer is hasty: a conversation that ends with a question earns PRICE less.
At turn 1 of K = 5 a question is the last word with P(H = 1 | h = 1) = .44 under the paper's law and .20 under the uniform
one, and pays about .2 (a wish more of four, heard with .8) wherever the talk goes on: expected gains of .56 x .2 - .44 x .4 =
-.06 and of .80 x .2 - .20 x .4 = +.08. PRICE was set by this sum, before anything was run.

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

PRICE = 0.4


class HastyReward(toy.Reward):
    """The toy's reward, less PRICE where the last answer asks."""

    def one_reward(self, messages):
        return super().one_reward(messages) - PRICE * asks(messages[-1]["content"])


def asks(answer):
    return bool(toy.QUESTION.search(answer))


def main():
    with one_line("tests/reset_law.py"):
        cfg = read_config(None, __doc__)
        start_processes()
        cfg = prepare(cfg)
        open_folder(cfg, lambda cfg: made_of(cfg) | {"price": PRICE})
        policy, user, _ = load_cast(cfg)
        cast, policies = (policy, user, HastyReward()), {}
        for law in ("paper", "uniform"):
            mine = replace(cfg, reset_law=law, out=os.path.join(cfg.out, law))
            open_folder(mine, lambda cfg: made_of(cfg) | {"price": PRICE})
            refuel.train(mine, cast)
            policies[law] = policy_folder(mine.out, cfg.iterations)
        results, played = evaluate.evaluate(policies, cfg.out, *cast, cfg, kl=False)
        reward_NH = {name: evaluate.scored(dialogues, cast[2]) for name, dialogues in played.items()}
        turns = np.arange(1, cfg.max_turns + 1)
        weights = {"uniform": np.ones(len(turns)) / len(turns), "paper": 1 / turns / (1 / turns).sum()}
        found = {"command": results["base"]["command"], "price": PRICE, "J": {}, "asks": {}, "objective": {}}
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
