"""Data sets as texts: first prompts and logged conversations of UltraInteract_pair, Anthropic-HH and their like.

    trajectory, chosen, rejected      UltraInteract_pair: a list of messages, and two answers to the last of them
    chosen, rejected                  Anthropic-HH: two conversations, as text with its marks or as lists of messages
    prompt, chosen, rejected          a text or a list of messages, and two answers, each a text or a list of one message
    prompt                            a text or a list of messages; a file may also be a list of texts, or have one a line
    messages (or conversations)       a conversation

The last two are enough where the user is not the data set; other columns, such as TRL's completion, are not read.
Sections 4.2 and 4.3, appendix C.4, Table 5. Dialogues are made of them in simulator.py.
"""
import functools
import itertools
import json
import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from machinery.files import BadInput
from machinery.ranks import rank
from machinery.rows import PARTS, TEST, TRAIN, VALIDATION, content_hash, data_rows
from machinery.settings import seed_for
from machinery.template import checked, encode, load_tokenizer, template_pieces

# ---------------------------------------------------------------------------------------------------------------
# What a data set gives
# ---------------------------------------------------------------------------------------------------------------


class Prompt(NamedTuple):
    """An opening x_1; what only the user (and a world's reward) may know: wishes, or the questions to come; and the
    tokens of an answer, where the data set sets a limit (Table 5)."""

    text: str
    secret: Any = None
    limit: int | None = None
    system: str | None = None


class Logged(NamedTuple):
    """A conversation of a data set: x_1..x_H, y_1..y_{H-1}, and the two answers to x_H."""

    questions: tuple
    answers: tuple
    chosen: str | None  # None where the data has no answer to x_H
    rejected: str | None  # None where it has no second one, or one with another history
    secret: Any = None
    system: str | None = None
    limit: int | None = None  # tokens of an answer, as of a Prompt


class Logs(Sequence):
    """Logged conversations, of which only the number is known until somebody asks for one: most runs never do."""

    def __init__(self, size, read):
        self.size, self.read = size, read

    def __len__(self):
        return self.size

    def __getitem__(self, row):
        return self.rows[row]

    @functools.cached_property
    def rows(self):
        return self.read()


class Data(NamedTuple):
    train: list  # prompts
    test: list
    logs: Sequence  # conversations that begin with a training prompt, for the baselines that roll in by the data
    twice: Sequence  # those of them that have a second answer, for the baselines that take the data's answers
    dropped: Counter  # rows by reason


HELD_OUT = 1000  # first prompts: Table 3's 500 for tests and 500 for validation; a fifth of a set with fewer than 5,000
# Setting two, tokens of (a question with its header, an answer): appendix C.4 for HH, Table 5 by the number of turns
HH_CAPS = (128, 512)
ULTRAINTERACT_CAPS = {1: (1024, 1024), 2: (768, 768), 3: (512, 512), 4: (256, 512), 5: (128, 512)}
BATCH = 2048  # rows whose lengths are counted together


def load_data(cfg, tokenizer):
    """The data set that --dataset names, as this policy and this setting see it; a process reads it once."""
    longest = min(cfg.max_dialogue, cfg.max_length - cfg.max_new_tokens)
    return read_data(cfg.dataset, tokenizer.name_or_path, cfg.user == "dataset", cfg.max_turns, longest)


def draw(what, size, cfg, t):
    """Which cfg.num_prompts of `size` rows iteration t takes; all of them where it is 0.

    Setting one draws from all of them in each iteration. Setting two goes through all of them (but the last few) before
    any comes again, pass after pass in another order."""
    number = cfg.num_prompts or size
    iterations = size // number if cfg.one_training else 1
    done, part = divmod(t - 1, iterations)
    rows = random.Random(seed_for(cfg.seed, what, done + 1)).sample(range(size), iterations * number)
    return rows[part * number :][:number]


# ---------------------------------------------------------------------------------------------------------------
# Prompts, logs and the split
# ---------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def read_data(name, tokenizer_path, fixed, max_turns, longest):
    """Prompts of UltraInteract_pair, Anthropic-HH or a set of their form; what is dropped is counted.

    fixed: the questions to come are the data's own (setting two); then a prompt is a list of all questions, with the
    caps of that setting. Else it is a first prompt of at most `longest` tokens. Prompts are de-duplicated, and those
    with one first prompt are on one side of the split. Rows pass by and are not held: what stays is the questions.
    The baselines roll in by all conversations of at most max_turns turns, and in setting two by those of the prompts:
    REFUEL's conversations, caps and de-duplication."""
    tokenizer, dropped = load_tokenizer(tokenizer_path), Counter()
    size, firsts, usable = 0, set(), []  # first prompts; conversations to roll in by
    known, prompts = {}, {}  # the part of the data that a prompt is in; prompts by first prompt
    texts, untested = {}, set()  # first prompts of test rows that are dropped: not trained on either
    rows = data_rows(name)
    while batch := list(itertools.islice(rows, BATCH)):
        new, first_row = [], size
        size += len(batch)
        for number, (part, row) in enumerate(batch, first_row):
            log = logged(row)
            if isinstance(log, str):
                dropped[log] += 1
                if part != TRAIN:
                    untested.update(first_question(row))
                continue
            key = shared(texts, log.questions) if fixed else log.questions[0]
            place = Place(number, shared(texts, log.questions[:1])[0], len(log.questions), bool(log.rejected))
            firsts.add(place.opening)
            if not fixed and place.turns <= max_turns and log.chosen is not None:
                usable.append(place)
            if fixed and "trajectory" in row and max_turns > len(ULTRAINTERACT_CAPS):
                raise BadInput(f"--max-turns {max_turns}: Table 5 has limits for up to {len(ULTRAINTERACT_CAPS)} turns of "
                               f"--dataset {name}")  # fmt: skip
            if key in known:
                dropped["duplicate"] += 1
                known[key] = min(known[key], part)
            else:
                known[key] = part
                new.append((key, log, caps_of(row, log), place))
        second = [(log.rejected, caps[1]) if fixed and caps and log.rejected else ("", 0) for _, log, caps, _ in new]
        reasons = zip(new, too_long(tokenizer, new, fixed, max_turns, longest), longer_than(tokenizer, second), strict=True)
        for (key, log, caps, place), why, second_too_long in reasons:
            if why:
                dropped[why] += 1
                continue
            if fixed and log.chosen is not None:
                usable.append(place._replace(limit=caps[1], rejected=place.rejected and not second_too_long))
            prompt = Prompt(key[0], list(key[1:]), caps[1]) if fixed else Prompt(key)
            prompt = prompt._replace(system=log.system)
            prompts.setdefault(prompt.text, []).append(prompt)
    train, test, held_out, whose = split(firsts, known, untested, prompts, dropped, fixed)
    sizes = f"{name}: {size} rows, {len(train)} training and {len(test)} test prompts{whose}; dropped: {dict(dropped)}"
    if not (train and test):
        raise BadInput(f"--dataset {sizes}")
    places = [place for place in usable if place.opening not in held_out]
    twice = [place for place in places if place.rejected]
    if rank() == 0:
        by_turns, both = (", ".join(f"{share:.3f}" for share in shares([place.turns for place in kept])) or "none"
                          for kept in (places, twice))  # fmt: skip
        print(f"{sizes}; conversations of 1, 2, ... turns: {by_turns}, with two answers: {both}", flush=True)
    logs, pairs = (Logs(len(kept), functools.partial(read_logs, name, kept)) for kept in (places, twice))
    return Data(train, test, logs, pairs, dropped)


class Place(NamedTuple):
    """Where a conversation stands in the data set, and what of it decides who reads it."""

    row: int
    opening: str
    turns: int
    rejected: bool  # whether it has a second answer
    limit: int | None = None  # tokens of an answer, in setting two


def shares(turns):
    """The shares of 1, 2, ... turns, to three digits: Tables 3 and 4 of conversations, P(H) and P(h) of pairs."""
    return np.round(np.bincount(turns)[1:] / max(1, len(turns)), 3).tolist()


def split(firsts, known, untested, prompts, dropped, fixed):
    """(training prompts, test prompts, the first prompts that are not trained on, a word on where the test is from).

    A data set's own test rows, or else its validation rows, are the test, and no first prompt of either is trained on.
    Where it has none the split depends on the texts alone, neither on the order of the rows nor on any length or
    tokenizer, so that no other flag can bring a training prompt into the test. (The released code splits rows, without
    a seed, and shares first prompts between training and test.)"""
    order = sorted(firsts, key=lambda text: seed_for("split", text))
    parts = set(known.values())
    own = TRAIN in parts and (len(parts) > 1 or bool(untested))
    where = dict.fromkeys(order, TRAIN)
    if own:
        for key, part in known.items():
            first = key[0] if fixed else key
            where[first] = min(where[first], part)
        for first in untested & where.keys():
            where[first] = min(where[first], VALIDATION)
    else:
        for text in order[: min(HELD_OUT, len(order) // 5)]:
            where[text] = TEST
    test_part = min(where.values(), default=TEST)
    train, test = [], []
    for text in order:
        for prompt in prompts.get(text, ()):
            key = (text, *prompt.secret) if fixed else text
            if where[text] == TRAIN:
                train.append(prompt)
            elif where[text] == test_part and (not own or known[key] == test_part):
                test.append(prompt)
            else:
                dropped["held out"] += 1
    held_out = {text for text, part in where.items() if part != TRAIN}
    whose = f" (of its own {PARTS[test_part]} rows)" if own else ""
    return train, test, held_out, whose


def read_logs(name, places):
    """The conversations that the baselines roll in by; texts that several of them share are held once."""
    found, texts, wanted = [], {}, {place.row: place for place in places}
    for number, (_, row) in enumerate(data_rows(name)):
        if number not in wanted:
            continue
        log, place = logged(row), wanted.pop(number)
        if isinstance(log, str) or (log.questions[0], len(log.questions)) != place[1:3] or place.rejected and not log.rejected:
            wanted[number] = place
            break
        questions, answers = shared(texts, log.questions), shared(texts, log.answers)
        chosen, rejected = shared(texts, (log.chosen, log.rejected))
        found.append(Logged(questions, answers, chosen, rejected, list(questions[1:]), log.system, place.limit))
    if wanted:
        raise BadInput(f"--dataset {name} was changed while it was read: start again")
    return found


def shared(texts, row):
    """The same texts as a tuple, each the one object that `texts` holds of it."""
    return tuple(texts.setdefault(text, text) for text in row)


# ---------------------------------------------------------------------------------------------------------------
# A row
# ---------------------------------------------------------------------------------------------------------------

ROLES = {"Human": "user", "human": "user", "Assistant": "assistant", "gpt": "assistant"}


def logged(row):
    """Parse a row, or return why it was rejected."""
    try:
        if "trajectory" in row:
            history, chosen, rejected = turns_of(row["trajectory"]), row["chosen"], row["rejected"]
        elif only_opens(row):
            (history, chosen), rejected = opened(row), None
        else:
            *history, (role, chosen) = conversation(row, row["chosen"])
            *other, (other_role, rejected) = conversation(row, row["rejected"])
            rejected = rejected if other == history else None
            if not role == other_role == "assistant":
                return "roles do not alternate"
    except (ValueError, TypeError, KeyError):
        return "malformed"
    system = None
    if history and history[0][0] == "system":
        system, history = history[0][1], history[1:]
    roles = ["user", *["assistant", "user"] * (len(history) // 2)]  # of an odd number of turns
    if [role for role, _ in history] != roles:
        return "roles do not alternate"
    try:
        texts = [checked(text) for _, text in history]
        rejected = rejected and checked(rejected)
        chosen = None if chosen is None and only_opens(row) else checked(chosen)
        system = system and checked(system)
        return Logged(tuple(texts[::2]), tuple(texts[1::2]), chosen, rejected, texts[2::2], system)
    except BadInput:
        return "an empty turn"


def first_question(row):
    """The text of a dropped row's first user turn, as a list that is empty where there is none."""
    try:
        if "trajectory" in row:
            turns = turns_of(row["trajectory"])
        else:
            turns = opened(row)[0] if only_opens(row) else conversation(row, row["chosen"])
        return [checked(next(text for role, text in turns if role == "user"))]
    except (ValueError, TypeError, KeyError, StopIteration):  # BadInput, of an empty turn, is a ValueError
        return []


def conversation(row, answer):
    """[(role, text)] of a row without trajectory: `answer` is the whole conversation (HH), or what follows `prompt`."""
    prompt = row.get("prompt")
    if prompt is None or is_whole(row["chosen"]) and is_whole(row["rejected"]):
        return turns_of(answer)
    turns = prompt_turns(prompt)
    if isinstance(answer, list) and answer:
        return turns + turns_of(answer)
    return [*turns, ("assistant", answer if answer else None)]


def prompt_turns(prompt):
    """[(role, text)] of a prompt: a list of messages, a text with HH's marks up to where the answer begins, or a text."""
    if not isinstance(prompt, str):
        return turns_of(prompt)
    if is_whole(prompt) and prompt.rstrip().endswith("\n\nAssistant:"):
        return turns_of(prompt)[:-1]
    return [("user", prompt)]


def only_opens(row):
    """Whether a row has no two answers, as those of the other forms do."""
    return not row.keys() & {"trajectory", "chosen", "rejected"}


def opened(row):
    """([(role, text)] up to the last user's turn, the answer to it or None) of a row that has no two answers."""
    whole = row.get("messages") or row.get("conversations")
    turns = turns_of(whole) if whole else prompt_turns(row["prompt"])
    if turns and turns[-1][0] == "assistant":
        return turns[:-1], turns[-1][1]
    return turns, None


def is_whole(value):
    """Whether a column holds a conversation from its first turn on, and not the answer alone."""
    if isinstance(value, str):
        return value.lstrip().startswith("Human:")
    return isinstance(value, list) and bool(value) and turns_of(value[:1])[0][0] != "assistant"


def turns_of(value):
    """[(role, text)] of a list of messages, or of a text with the marks of Anthropic-HH."""
    if isinstance(value, str):
        before, *parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + value.lstrip())
        if before.strip():
            raise ValueError("a text that does not begin with a speaker")
        pairs = list(zip(parts[::2], parts[1::2]))
    else:
        pairs = [(m["from"], m["value"]) if "from" in m else (m["role"], m["content"]) for m in value]
    return [(ROLES.get(role, role), text_of(content)) for role, content in pairs]


def text_of(content):
    """A message's text, which may be given in parts; a part that is an image makes the row malformed."""
    if not isinstance(content, list) or not content or not isinstance(content[0], dict):
        return content
    if any(part["type"] != "text" for part in content):
        raise ValueError("a part that is no text")
    return "".join(part["text"] for part in content)


# ---------------------------------------------------------------------------------------------------------------
# Lengths
# ---------------------------------------------------------------------------------------------------------------


def caps_of(row, log):
    """Setting two's tokens of (a question, an answer); None where a conversation has more turns than any cap is for."""
    return ULTRAINTERACT_CAPS.get(len(log.questions)) if "trajectory" in row else HH_CAPS


def too_long(tokenizer, new, fixed, max_turns, longest):
    """For each (key, conversation, caps, place) the reason why it cannot be a prompt, or None."""
    before, after, between, later = template_pieces(tokenizer)
    first, more = len(encode(tokenizer, before + after)), len(encode(tokenizer, between + later))
    if not fixed:
        over = longer_than(tokenizer, [(log.questions[0], longest - first) for _, log, *_ in new])
        return ["prompt too long" if each else None for each in over]
    reasons = [f"more than {max_turns} turns" if len(log.questions) > max_turns else None for _, log, *_ in new]

    def drop(why, limits_of):
        asked, limits = [], []
        for row, (_, log, caps, _) in enumerate(new):
            if reasons[row] is None:
                found = limits_of(log, caps)
                asked += [row] * len(found)
                limits += found
        for row, over in zip(asked, longer_than(tokenizer, limits), strict=True):
            if over:
                reasons[row] = why

    def questions(log, caps):
        return [(text, caps[0] - (more if h else first)) for h, text in enumerate(log.questions)]

    def answers(log, caps):
        return [(text, caps[1]) for text in (*log.answers, log.chosen) if text is not None]

    drop("question too long", questions)
    drop("answer too long", answers)  # of what is left: an answer costs most to tokenise
    return reasons


def longer_than(tokenizer, limits):
    """Of each (text, limit) whether the text has more tokens; a text is tokenised, once, where a bound cannot tell."""
    factor = tokens_per_byte(tokenizer)
    asked = []
    for text, limit in limits:
        if most_tokens(text, factor) > limit:
            asked.append(text)
    asked = list(dict.fromkeys(asked))
    counts = {}
    for start in range(0, len(asked), 256):  # the tokenizer holds a hundred bytes a token meanwhile
        part = asked[start : start + 256]
        ids = tokenizer(part, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False,
                        return_token_type_ids=False, verbose=False)["input_ids"]  # fmt: skip
        counts.update(zip(part, map(len, ids), strict=True))
    return [counts.get(text, limit) > limit for text, limit in limits]


def most_tokens(text, factor):
    """A bound that needs no tokenizer; plain ASCII passes NFC as it is."""
    if text.isascii() and factor < math.inf:
        return len(text)
    return len(text.encode()) * factor


@functools.lru_cache(maxsize=8)
def tokens_per_byte(tokenizer):
    """The most tokens that a byte of text can become: 1 for a byte-level BPE; infinity where nothing is known.

    Each token of a byte-level BPE stands for one byte or more of what the normaliser leaves. NFC makes three bytes of
    one at most (Unicode annex 15). With a space put before each text, or another normaliser, there is no bound."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None or type(core.model).__name__ != "BPE" or core.pre_tokenizer is None:
        return math.inf
    state = json.loads(core.pre_tokenizer.__getstate__())
    steps = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    spaces = any(step.get("add_prefix_space") for step in steps)
    kinds = {step["type"] for step in steps}
    if spaces or "ByteLevel" not in kinds or kinds - {"ByteLevel", "Split", "Digits", "Punctuation"}:
        return math.inf
    normalizer = None if core.normalizer is None else type(core.normalizer).__name__
    return {None: 1, "NFC": 3}.get(normalizer, math.inf)


def fingerprint(cfg):
    """A hash of the content of all files that --dataset names, wherever they lie; of a hub id the commit that was read.

    Files are hashed once in a process, in chunks."""
    return content_hash(cfg.dataset)
