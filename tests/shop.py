"""The toy's shop in English, a world for a real language model (docs/small_model.md): the same wishes, customers, clerks
and reward, said in sentences. Who speaks of what is toy.py's; here is how they say it, and the policy to begin with.

    python tests/small.py                                             SmolLM2-135M-Instruct, into runs/small/policy
    python tests/shop.py                                              its base policy, into runs/shop_base: minutes
    python simulator.py --world tests/shop.py --show 3
    python baselines.py --world tests/shop.py --method all --out runs/shop

    user       Hello, I am looking for something. It should be made of silk.
    assistant  How about the small green silk shirt? Which colour would you like?
    user       It should be red, please.
    assistant  How about the small red silk shirt? Anything else?
    user       What else do you have?

Dimension key: B dialogues, T tokens.
"""
import functools
import os
import random
import re
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import refuel  # noqa: F401  (first: it sets what torch reads when it is imported)

import torch

import toy
from machinery.data import Logged
from machinery.files import BadInput
from machinery.ranks import device, one_line
from machinery.settings import seed_for
from machinery.template import load_tokenizer
from simulator import replay

# ---------------------------------------------------------------------------------------------------------------
# How things are said: the toy's words to English, and back
# ---------------------------------------------------------------------------------------------------------------

PHRASES = {"material": "made of {}", "kind": "a {}"}  # size and colour are said as they are
OPENINGS = ("Hello, I am looking for something. It should be {}.", "Hi! Do you have something that is {}?",
            "Good morning. I would like something that is {}.")  # fmt: skip
WISHES = "It should be {}, please.", "I would like it to be {}.", "Something that is {}, please."
AGAIN = "As I said, it should be {}.", "Still {}, please."
UNSURE = "I am not sure.", "I do not know yet."
GO_ON = "What else do you have?", "Hm. What else?", "Please go on."
PROPOSAL = re.compile(r"How about the (\w+) (\w+) (\w+) (\w+)\?")
QUESTION = re.compile(r"Which (\w+) would you like\?")


def customer_says(words, rng):
    """A line of toy.Customer as a sentence.

    >>> customer_says("small silk please", random.Random(1))
    'It should be small and made of silk, please.'
    """
    wishes = []
    for word in words.split():
        if word in toy.ATTRIBUTE:
            wishes.append(PHRASES.get(toy.ATTRIBUTE[word], "{}").format(word))
    listed = " and ".join([", ".join(wishes[:-1]), wishes[-1]] if wishes[1:] else wishes)
    if not wishes:
        forms = UNSURE if words == "not sure" else GO_ON
    elif words.startswith("something"):
        forms = OPENINGS
    else:
        forms = AGAIN if words.endswith("again") else WISHES
    return rng.choice(forms).format(listed)


def clerk_says(words):
    """A line of toy.clerk as a sentence.

    >>> clerk_says("try the small red silk hat . which size ?")
    'How about the small red silk hat? Which size would you like?'
    """
    proposal, question = words.removeprefix("try the ").split(" . ")
    asked = toy.QUESTION.match(question)
    return f"How about the {proposal}? " + (f"Which {asked[1]} would you like?" if asked else "Anything else?")


def in_toy_words(messages):
    """A conversation in the toy's words, as its customers and its reward read it. Of an answer there remains what is a
    proposal at its beginning, and a question anywhere."""
    found = []
    for message in messages:
        text = message["content"]
        if message["role"] == "user":
            words = [word for word in re.findall(r"\w+", text) if word in toy.ATTRIBUTE]
        else:
            proposal, question = PROPOSAL.match(text), QUESTION.search(text)
            words = ["try the", *proposal.groups(), "."] if proposal else []
            words += ["which", question[1], "?"] if question else []
        found.append({"role": message["role"], "content": " ".join(words)})
    return found


# ---------------------------------------------------------------------------------------------------------------
# The world
# ---------------------------------------------------------------------------------------------------------------

DEFAULTS = dict(iterations=2, num_prompts=512, max_turns=5, max_new_tokens=32, max_length=512, max_dialogue=512,
                reward_tokens=512, eta=100.0, beta=0.1, lr=1e-5, batch_size=16, epochs=2, validation=64, patience=2,
                checkpoint_steps=14, activation_checkpointing="none", wave=128, eval_wave=250, eval_dialogues=500)  # fmt: skip
# A row's own constants: the best average win rate on 300 validation customers after both iterations, seed 100, of what
# results/small/shop_grid.json lists under "second"; docs/small_model.md says which lie on an edge of what was tried.
BASELINES = {
    "rebel-lt-offline": {"eta": 3.0}, "rebel-lt-mixed": {"eta": 300.0}, "rebel-lt-online": {"eta": 10.0},
    "dpo-lt-offline": {"beta": 1.0, "lr": 1e-6}, "dpo-lt-online": {"beta": 1.0}, "dpo-refuel": {"beta": 0.03},
    "rloo-lt-online": {"lr": 3e-6}, "rloo-mt-mixed": {"lr": 3e-6}, "rloo-refuel": {"lr": 3e-6}}  # fmt: skip
CLOSED = True  # its customers know nothing of other openings


class Translated:
    """A dialogue in the toy's words."""

    def __init__(self, dialogue):
        self.messages, self.secret, self.seed = in_toy_words(dialogue.messages), dialogue.secret, dialogue.seed


class User:
    def reply(self, dialogues):
        lines = toy.Customer().reply([Translated(d) for d in dialogues])
        return [customer_says(words, random.Random(d.seed("words"))) for d, words in zip(dialogues, lines, strict=True)]


class Reward:
    """toy.Reward: the share of the four wishes that have been stated and that the last proposal meets."""

    def __call__(self, dialogues):
        return toy.Reward()([Translated(d) for d in dialogues])

    def malformed(self, dialogues):
        return toy.Reward().malformed([Translated(d) for d in dialogues])


reward = Reward()


@functools.lru_cache
def prompts(split):
    found = []
    for row, prompt in enumerate(toy.load_prompts(split)):
        rng = random.Random(seed_for("words", split, row))
        found.append((customer_says(prompt.text, rng), prompt.secret))
    return found


def in_english(log, rng):
    """A conversation of the toy's logs."""
    return log._replace(questions=tuple(customer_says(words, rng) for words in log.questions),
                        answers=tuple(map(clerk_says, log.answers)), chosen=clerk_says(log.chosen),
                        rejected=clerk_says(log.rejected))  # fmt: skip


class Logs(toy.Logs):
    """Other people's conversations: the toy's, with its expert, its novice and its customers who insist."""

    def __getitem__(self, row):
        return in_english(super().__getitem__(row), random.Random(seed_for("offline words", row)))


def load_logs():
    return Logs()


# ---------------------------------------------------------------------------------------------------------------
# The base policy
# ---------------------------------------------------------------------------------------------------------------

START = os.path.join("runs", "small", "policy")
FOLDER = os.path.join("runs", "shop_base")
# The clerk is the one whom the toy's base policy imitates. Steps and lr are those of one trial, after which 97 of 100 answers
# were proposals; others were not tried, and nothing of it was compared by what a method makes of it.
RECIPE = dict(start="SmolLM2-135M-Instruct", steps=60, batch=8, lr=2e-4, turns=5, uses=0.95, remembers=0.75, asks=0.5, seed=0)


def build_policy():
    """SmolLM2, fine-tuned on the clerk's answers; kept in FOLDER."""
    return toy.built(FOLDER, RECIPE, base_policy)


def smollm2():
    """(its tokenizer, the model to be fine-tuned)."""
    from transformers import AutoModelForCausalLM

    if not os.path.isdir(START):
        raise BadInput(f"no {START}: python tests/small.py makes it")
    model = AutoModelForCausalLM.from_pretrained(START, dtype=torch.float32, trust_remote_code=False)
    return load_tokenizer(START), model.to(device()).train()


def base_policy(folder):
    tokenizer, model = smollm2()
    rng = random.Random(RECIPE["seed"])
    people = toy.load_prompts("base", RECIPE["steps"] * RECIPE["batch"])
    toy.imitate(model, tokenizer, RECIPE, folder, people, lambda few: with_labels([clerk_dialogue(tokenizer, p, rng) for p in few]))


def clerk_dialogue(tokenizer, prompt, rng):
    """A talk between the scripted clerk and a customer, as the policy would see it."""
    habits = {name: RECIPE[name] for name in ("turns", "uses", "remembers", "asks")}
    texts = [m["content"] for m in toy.clerk_dialogue(prompt, toy.Customer(), rng, **habits)]
    log = Logged(tuple(texts[::2]), tuple(texts[1:-1:2]), texts[-1], texts[-1], prompt.secret)
    return replay(tokenizer, in_english(log, rng))


def with_labels(dialogues):
    """Ids (B, T), padded on the right, where nothing before it sees it; labels: the clerk's tokens, the end token with
    them, and -100 elsewhere."""
    length = max(len(d.ids) for d in dialogues)
    ids_BT, labels_BT = torch.zeros(len(dialogues), length, dtype=torch.long), torch.full((len(dialogues), length), -100)
    for i, dialogue in enumerate(dialogues):
        ids_BT[i, : len(dialogue.ids)] = torch.tensor(dialogue.ids)
        for start, end in dialogue.spans:
            labels_BT[i, start:end] = ids_BT[i, start:end]
    return ids_BT.to(device()), labels_BT.to(device())


if __name__ == "__main__":
    from usage import arguments

    arguments(__doc__)
    with one_line("tests/shop.py"):
        print(build_policy())
