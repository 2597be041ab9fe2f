"""The embedded world: a shop in which every script of this repository runs for real on a laptop.

A customer wants an article with four wishes (size, colour, material, kind) and opens with one of them; the
assistant proposes an article and may ask one question a turn; the reward looks at the last proposal only. A good
question pays turns later: exactly what last-turn training cannot see and a regression to the relative future can.

    user       something red please
    assistant  try the large red wool hat . which size ?
    user       small please
    assistant  try the small red silk scarf . anything else ?
    user       go on

The tokenizer, its chat template, the Llama and the checkpoint folder are of the real kinds, only small; nothing
downstream knows that this is a toy. Everything is seeded; the base policy is trained once and kept. A world gives texts:
what becomes of them as tokens is simulator.py's.
"""
import machinery  # noqa: F401  (first: it sets what torch reads when it is imported)

import contextlib
import fcntl
import functools
import json
import os
import random
import re

import torch
from tqdm import tqdm

from machinery.data import Logged, Prompt
from machinery.files import read_json, write_folder
from machinery.settings import SETTINGS, seed_for

WISHES = {
    "size": ("tiny", "small", "medium", "large"),
    "colour": ("red", "blue", "green", "black"),
    "material": ("wool", "cotton", "silk", "leather"),
    "kind": ("scarf", "hat", "coat", "shirt"),
}
ATTRIBUTE = {value: name for name, values in WISHES.items() for value in values}
WORDS = [*ATTRIBUTE, *WISHES, *"something please not sure again go on try the . which ? anything else".split()]
POOL = {"train": 16_384, "test": 4096}  # customers
FOLDER = os.path.join("runs", "toy_base")  # where the base policy is kept
PROPOSAL = re.compile(r"try the (\w+) (\w+) (\w+) (\w+) \.")
QUESTION = re.compile(r"which (\w+) \?")

# ---------------------------------------------------------------------------------------------------------------
# The customer, what it wants, and the reward
# ---------------------------------------------------------------------------------------------------------------


@functools.lru_cache
def load_prompts(split, n=None):
    """The split's customers: an opening that states one wish, and all four wishes as the secret that the policy never sees."""
    return [new_customer(random.Random(seed_for("customer", split, row))) for row in range(n or POOL[split])]


def new_customer(rng):
    wishes = {name: rng.choice(values) for name, values in WISHES.items()}
    return Prompt(f"something {wishes[rng.choice(list(WISHES))]} please", wishes)


def stated(messages):
    """The wishes that the user has said so far: {attribute: value}."""
    words = " ".join(m["content"] for m in messages if m["role"] == "user").split()
    return {ATTRIBUTE[word]: word for word in words if word in ATTRIBUTE}


class Customer:
    """The scripted user: answers what is asked, now and then does not know, volunteers nothing.

    insists: the people of the offline logs, who answer a missing question by all that they have said so far, half the
    time with one wish more, and half the time with one wish changed."""

    def __init__(self, insists=False):
        self.insists = insists

    def reply(self, dialogues):
        return [self.one_reply(d.messages, d.secret, random.Random(d.seed("user"))) for d in dialogues]

    def one_reply(self, messages, wishes, rng):
        known = stated(messages)
        asked = QUESTION.search(messages[-1]["content"])
        if asked and asked[1] in WISHES:
            value = wishes[asked[1]]
            if asked[1] in known:
                return f"{value} again"
            return "not sure" if rng.random() < 0.15 else f"{value} please"
        if not self.insists:
            return "go on"
        unknown = [name for name in WISHES if name not in known]
        if unknown and rng.random() < 0.5:
            name = rng.choice(unknown)
            known[name] = wishes[name]
        if rng.random() < 0.5:
            name = rng.choice(list(known))
            known[name] = rng.choice(WISHES[name])
        return " ".join([*known.values(), "please"])


class Reward:
    """The share of the four wishes that the user has stated and the last proposal meets, in {0, 1/4, ..., 1}.

    Unstated wishes do not count, so a lucky guess earns nothing: counting them would bury the signal in luck. The
    question itself earns nothing either, else last-turn training would learn to ask for the question's own sake."""

    def __call__(self, dialogues):
        return [self.one_reward(d.messages) for d in dialogues]

    def one_reward(self, messages):
        proposal = PROPOSAL.match(messages[-1]["content"])
        known = stated(messages)
        return sum(known.get(n) == v for n, v in zip(WISHES, proposal.groups())) / 4 if proposal else 0.0

    def malformed(self, dialogues):
        """How many answers of each dialogue propose nothing: a sign that a policy comes apart."""
        return [sum(not PROPOSAL.match(m["content"]) for m in d.messages if m["role"] == "assistant") for d in dialogues]


# ---------------------------------------------------------------------------------------------------------------
# The scripted clerk, whose dialogues the base policy imitates
# ---------------------------------------------------------------------------------------------------------------


def clerk(messages, rng, uses, remembers, asks):
    """A proposal that uses a wish just heard with probability `uses`, one heard earlier with probability `remembers`,
    and a question with probability `asks`, about an attribute drawn at random, known or not."""
    known, heard = stated(messages), stated(messages[-1:])
    keeps = {name: uses if name in heard else remembers for name in known}
    words = [known[n] if rng.random() < keeps.get(n, 0) else rng.choice(WISHES[n]) for n in WISHES]
    question = f"which {rng.choice(list(WISHES))} ?" if rng.random() < asks else "anything else ?"
    return f"try the {' '.join(words)} . {question}"


def clerk_dialogue(prompt, customer, rng, turns, **habits):
    """The messages of `turns` turns between a customer and the scripted clerk."""
    messages = [{"role": "user", "content": prompt.text}]
    for turn in range(1, turns + 1):
        messages.append({"role": "assistant", "content": clerk(messages, rng, **habits)})
        if turn < turns:
            messages.append({"role": "user", "content": customer.one_reply(messages, prompt.secret, rng)})
    return messages


# Who writes the data's two answers: a clerk of the shop's best, whose dialogue it is, and a novice. Pairs of real data
# come like this, from a better and a worse model with habits of their own: the better one here seldom asks.
EXPERT = dict(uses=0.95, remembers=0.95, asks=0.1)
NOVICE = dict(uses=0.5, remembers=0.5, asks=0.5)
LENGTHS = (0.769, 0.121, 0.064, 0.032, 0.014)  # H = 1..5 in the paper's offline data (its Table 3, LT-OFFLINE)


class Logs:
    """Logs of other people: an expert, and customers who insist. Their histories are not the policy's own: nothing that
    was said has to be remembered there, since it is said again, and what was said before may no longer hold. Each has a
    novice's second answer to its last turn. A sequence whose rows are made when they are read."""

    def __len__(self):
        return POOL["train"]

    def __getitem__(self, row):
        rng = random.Random(seed_for("offline", row))
        prompt = new_customer(rng)
        turns = rng.choices(range(1, 6), LENGTHS)[0]
        messages = clerk_dialogue(prompt, Customer(insists=True), rng, turns, **EXPERT)
        rejected = clerk(messages[:-1], rng, **NOVICE)
        texts = [m["content"] for m in messages]
        return Logged(tuple(texts[::2]), tuple(texts[1:-1:2]), texts[-1], rejected, prompt.secret)


def load_logs():
    return Logs()


# ---------------------------------------------------------------------------------------------------------------
# The base policy
# ---------------------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer():
    """One word, one token; a chat template of its own."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|unknown|>"]
    vocab = {word: i for i, word in enumerate(special + WORDS)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<|unknown|>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|pad|>",
        unk_token="<|unknown|>", chat_template=TEMPLATE, clean_up_tokenization_spaces=False,
    )  # fmt: skip


RECIPE = dict(steps=350, batch=32, lr=3e-3, turns=5, uses=0.95, remembers=0.75, asks=0.5, hidden=96, layers=3, seed=0)
SHAPE = dict(hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=3, head_dim=32,
             vocab_size=40)  # so that --plan needs no base policy


def build_policy():
    """The base policy in FOLDER, trained unless it is there by this very recipe."""
    return built(FOLDER, RECIPE, base_policy)


def built(folder, recipe, build):
    """The folder, in which build(folder) has left a policy by this recipe; of several processes one builds it."""
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    path = os.path.join(folder, "recipe.json")
    with open(f"{folder}.lock", "w") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(path) or read_json(path) != recipe:
            build(folder)
    return folder


def base_policy(folder, recipe=RECIPE):
    """Train pi_1 by next-token prediction on the words of a clerk who listens well and asks badly; keep its folder.

    It hears what is said (0.95) and forgets what was said earlier (0.75): the paper's base model, tuned by RLHF on short
    dialogues, has little left to gain in a single turn. At uses=0.85 every method gains from each turn alone and their
    win rates per turn look alike.

    About 0.34 M parameters; heads of 32, which vLLM's CPU attention wants. A policy that has not learned to copy the
    customer's words cannot be improved by any method, so training runs until it does (steps were chosen for that)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(recipe["seed"])
    threads = torch.get_num_threads()
    torch.set_num_threads(min(4, os.cpu_count()))  # other ranks wait for this; the weights are the same bit for bit
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=recipe["hidden"], intermediate_size=256, head_dim=32,
        num_hidden_layers=recipe["layers"], num_attention_heads=3, num_key_value_heads=3,
        max_position_embeddings=512, tie_word_embeddings=False, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.1,  # 1 / sqrt(hidden): at the usual 0.02 this width needs five times the steps to copy
    ))  # fmt: skip
    rng = random.Random(recipe["seed"])
    habits = {k: recipe[k] for k in ("turns", "uses", "remembers", "asks")}

    def batch_of(prompts):
        rows = []
        for prompt in prompts:
            messages = clerk_dialogue(prompt, Customer(), rng, **habits)
            rows.append(tokenizer.apply_chat_template(messages, return_dict=False))
        return with_labels(rows, tokenizer)

    imitate(model, tokenizer, recipe, folder, load_prompts("base", recipe["steps"] * recipe["batch"]), batch_of)
    torch.set_num_threads(threads)
    return folder


def imitate(model, tokenizer, recipe, folder, examples, batch_of):
    """Next-token prediction on batch_of(some examples) = (ids_BT, labels_BT), each once; model, tokenizer and recipe are
    kept in the folder."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe["lr"], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe["lr"], recipe["steps"], pct_start=0.1)
    bar = tqdm(range(recipe["steps"]), desc="base policy", unit="step")
    for step in bar:
        ids_BT, labels_BT = batch_of(examples[step * recipe["batch"] : (step + 1) * recipe["batch"]])
        loss = model(input_ids=ids_BT, labels=labels_BT).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")

    def write(partial):
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        with open(os.path.join(partial, "recipe.json"), "w") as file:
            json.dump(recipe, file)

    write_folder(folder, write)


def with_labels(rows, tokenizer):
    """Padded ids (B, T), and labels that are the clerk's tokens, end token included: the user's words are not predicted."""
    begin, end = tokenizer.convert_tokens_to_ids("<|assistant|>"), tokenizer.eos_token_id
    length = max(map(len, rows))
    ids_BT = torch.full((len(rows), length), tokenizer.pad_token_id)
    labels_BT = torch.full((len(rows), length), -100)
    for i, ids in enumerate(rows):
        ids_BT[i, : len(ids)] = torch.tensor(ids)
        answering = False
        for t, token in enumerate(ids):
            if answering:
                labels_BT[i, t] = token
            answering = token == begin or (answering and token != end)
    return ids_BT, labels_BT


# ---------------------------------------------------------------------------------------------------------------
# What `--world toy.py` and `--setting toy` ask for by name, as of any world's file (docs/world.md); build_policy is above
# ---------------------------------------------------------------------------------------------------------------

User, reward = Customer, Reward()
DEFAULTS = SETTINGS["toy"]
# Each baseline's own best value on validation customers, and the steps between two points of Figure 2 (docs/baselines.md)
BASELINES = {
    "all": {"snapshot_steps": 32},
    "rebel-lt-offline": {"eta": 10.0},
    "rebel-lt-mixed": {"eta": 30.0},
    "rebel-lt-online": {"eta": 300.0},
    "dpo-lt-offline": {"beta": 10.0},
    "dpo-lt-mixed": {"beta": 0.01},
    "dpo-lt-online": {"beta": 0.01},
    "dpo-mt-mixed": {"beta": 0.3},
    "rloo-lt-offline": {"lr": 3e-5},
    "rloo-lt-online": {"lr": 3e-5},
    "rloo-mt-mixed": {"lr": 3e-5},
    "rloo-refuel": {"lr": 3e-5},
}
CLOSED = True  # its customers know nothing of other openings, and its reward is 0 wherever they lead


def prompts(split):
    return [(prompt.text, prompt.secret) for prompt in load_prompts(split)]
