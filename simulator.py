"""A conversation: dialogue, reset, roll-out, both futures of a state; and the cast that a configuration names.

    python simulator.py --setting toy --policy runs/toy/iter_2/policy --show 3      look at dialogues and resets
    python simulator.py --world FILE.py --policy FOLDER --show 3                    the same of a world of your own
    python simulator.py --show 3 runs/one/iter_1/pairs.jsonl                        stored ones, or eval/NAME.jsonl

Sections 2 and 4.2. Token ids are the truth and text is a view: what the policy sampled is what is trained on. A dialogue
is never decoded and tokenised again between turns. Roll-in, roll-out and evaluation are one loop, `converse`; a reset is
a slice.

Dimension key: H turns.
"""
import machinery  # noqa: F401  (first: it sets what torch and vLLM read when they are imported)

import functools
import math
import os
import random
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from machinery import data, families, pace, pairs, rewards, rows, users, worlds
from machinery.engines import load_engine
from machinery.files import BadInput, check_positions, find_checkpoint, fingerprint, load_config, versions
from machinery.ranks import on_rank_0, one_line, rank, start_processes, told
from machinery.report import both_futures, show_stored
from machinery.seams import END, score
from machinery.settings import Parser, engine_name, read_config, seed_for
from machinery.template import (check_history, check_vocabulary, checked, encode, end_token, later_ids, load_tokenizer,
                                opening_ids, said, stop_tokens)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------
# The dialogue: state s_h, response y_h, user turn x_{h+1} (section 2)
# ---------------------------------------------------------------------------------------------------------------


@dataclass
class Dialogue:
    """A conversation as the policy sees it.

    ids        every token that the policy has seen or said
    spans      (start, end) in ids of each assistant turn's sampled tokens, the end token included if it was sampled
    messages   the same conversation as role/content text, for users, reward models and judges
    truncated  per assistant turn: cut at the token limit
    logps      per assistant turn: ln pi of the sampled tokens as the engine reports it (to watch engine and trainer)
    secret     what only the user knows; stream names this dialogue's randomness; failed says why it was given up
    limit      tokens of an answer, where they are fewer than the engine's own
    system     a system prompt: in ids and for the reward model, not among the messages

    >>> d = Dialogue.start(tokenizer, "hi").add_answer(tokenizer, [9, 4]).add_user(tokenizer, "go on")
    >>> d.ids[d.spans[0][0]:d.spans[0][1]], d.reset(1).ids == d.ids[:d.spans[0][0]]
    ([9, 4], True)
    """

    ids: list[int] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    messages: list[dict] = field(default_factory=list)
    truncated: list[bool] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    secret: Any = None
    stream: tuple = (0,)
    limit: int | None = None
    failed: str | None = None
    system: str | None = None

    @classmethod
    def start(cls, tokenizer, user_text, secret=None, stream=(0,), limit=None, system=None):
        """s_1: the opening as the chat template renders it, with the header that makes the assistant speak."""
        check_history(tokenizer)
        text = checked(user_text)
        message = {"role": "user", "content": text}
        return cls(opening_ids(tokenizer, text, system), messages=[message], secret=secret, stream=tuple(stream),
                   limit=limit, system=system)  # fmt: skip

    def add_answer(self, tokenizer, ids, truncated=False, logp=math.nan):
        """Append y_h exactly as it was sampled: no token is added, dropped or decoded and encoded again.

        Its message is what the others read of it (template.said): no thoughts, no end token, other control tokens as
        plain text. ids: of a policy behind a server (machinery/outside.py) its text, and then no token is known."""
        if self.messages[-1]["role"] != "user":
            raise BadInput("a dialogue must alternate: an answer follows a user's turn")
        text, ids = (ids, []) if isinstance(ids, str) else (None, [int(i) for i in ids])
        self.spans.append((len(self.ids), len(self.ids) + len(ids)))
        self.ids += ids
        self.messages.append({"role": "assistant", "content": said(tokenizer, ids, truncated) if text is None else text})
        self.truncated.append(bool(truncated))
        self.logps.append(float(logp))
        return self

    def add_user(self, tokenizer, user_text):
        """Append x_{h+1} by the template's own tokens: what stands between two answers in a rendered conversation.

        That piece begins with the end-of-turn token. If the answer was sampled with it, it is there already; if the
        answer was cut, the token goes into the context and not into the span: the policy is never credited with
        stopping where it did not (the released code appends it and trains on it)."""
        if self.messages[-1]["role"] != "assistant":
            raise BadInput("a dialogue must alternate: a user's turn follows an answer")
        text = checked(user_text)
        if tokenizer is not None:  # else no token is known
            ids = later_ids(tokenizer, text)
            ended = self.ids[-1] == ids[0]
            self.ids += ids[1:] if ended else ids
        self.messages.append({"role": "user", "content": text})
        return self

    def reset(self, h):
        """s_h: everything up to and including the user's turn h (1 <= h); a new dialogue, nothing is shared."""
        if not 1 <= h <= (len(self.messages) + 1) // 2:
            raise BadInput(f"cannot reset to turn {h}: the dialogue has {(len(self.messages) + 1) // 2} user turns")
        tokens = self.spans[h - 1][0] if h <= len(self.spans) else len(self.ids)
        return self.cut(tokens, h - 1, 2 * h - 1)

    def until(self, h):
        """The conversation of the first h turns, answer h included: what a reward model or a judge reads at turn h."""
        if not 1 <= h <= len(self.spans):
            raise BadInput(f"the dialogue has {len(self.spans)} answers, not {h}")
        return self.cut(self.spans[h - 1][1], h, 2 * h)

    def copy(self, **changes):
        """The same conversation as a dialogue of its own, in which `changes` (such as stream=...) differ."""
        return replace(self.cut(len(self.ids), len(self.spans), len(self.messages)), **changes)

    def cut(self, tokens, answers, messages):
        return Dialogue(self.ids[:tokens], self.spans[:answers], [m.copy() for m in self.messages[:messages]],
                        self.truncated[:answers], self.logps[:answers], self.secret, self.stream, self.limit,
                        system=self.system)  # fmt: skip

    def conversation(self):
        """All messages, a system prompt among them."""
        return [{"role": "system", "content": self.system}, *self.messages] if self.system else self.messages

    @property
    def turns(self):
        """How many answers there are."""
        return len(self.spans)

    def answer(self, h):
        """The sampled ids of y_h."""
        start, end = self.spans[h - 1]
        return self.ids[start:end]

    def tokens_said(self):
        """How many tokens the assistant has sampled, in all its turns."""
        return sum(end - start for start, end in self.spans)

    def seed(self, speaker):
        """The seed of the next turn: distinct for every row, branch, turn and speaker."""
        return seed_for(*self.stream, len(self.spans), speaker)

    @classmethod
    def from_json(cls, row):
        """A dialogue from its line on disk, which holds all of its fields."""
        return cls(**row | {"spans": [tuple(span) for span in row["spans"]], "stream": tuple(row["stream"])})


# ---------------------------------------------------------------------------------------------------------------
# Roll-in, reset, roll-out
# ---------------------------------------------------------------------------------------------------------------
# A policy has answer(dialogues) -> [(ids, truncated, ln pi), or None where the context is full] and its tokenizer; a user
# has reply(dialogues) -> [text, END where the conversation is over, or None where it failed]. How each is asked without
# anybody waiting: machinery/pace.py.

OVER = "over before turn h"


def converse(starts, policy, user, turns, h=None, streams=None):
    """Policy and user talk, every dialogue at its own pace: roll-in, reset, roll-out and evaluation (section 2).

    starts: states at which the assistant speaks next; turns: how many assistant turns each ends with, or fewer where the
    user ends it; h, streams: as soon as the n-th dialogue is at s_h, h = h[n], a second one parts from it, with streams[n]
    for its own noise.
    Returns the dialogues and the second ones (None where s_h was not reached), as they ended; one that user or policy
    had to give up carries `failed`."""
    firsts, seconds = [d.copy() for d in starts], [None] * len(starts)
    speaking, asking = pace.policy_side(policy, len(starts)), pace.user_side(user, len(starts))

    def go_on(n, d):
        """In d, the n-th dialogue or the one that has parted from it, the assistant speaks next."""
        if h is not None and seconds[n] is None and len(d.spans) >= h[n] - 1:
            seconds[n] = d.reset(h[n]).copy(stream=streams[n])
            go_on(n, seconds[n])
        if len(d.spans) < turns[n] and not firsts[n].failed:  # without the first the second one is no use
            speaking.put(n, d)

    try:
        for n, d in enumerate(firsts):
            go_on(n, d)
        while speaking or asking:
            for n, d, answer in speaking.take(idle=not asking):
                if answer is None:
                    d.failed = getattr(policy, "failure", "too long")
                    continue
                d.add_answer(policy.tokenizer, *answer)
                if len(d.spans) < turns[n]:
                    asking.put(n, d)
            for n, d, text in asking.take(idle=not speaking):
                if text is None:
                    d.failed = "user"
                elif text is not END:
                    d.add_user(policy.tokenizer, text)
                    go_on(n, d)
    finally:
        speaking.leave()
        asking.leave()
    return firsts, seconds


def rollout(dialogues, policy, user, turns):
    """New dialogues: those given, let on until each has its number of answers (`converse`, without a reset)."""
    return converse(dialogues, policy, user, turns)[0]


def futures(starts, h, H, streams, policy, user, dropped):
    """Line 3 of Algorithm 1: roll in to s_h, and from there both futures on to turn H.

    starts: where the roll-ins begin; h, H: turns, one of each a start; streams: the starts' random numbers. The first
    future continues the roll-in: the trajectory's own y_h is a sample of pi_t(.|s_h). The second one has its own noise
    from s_h on, for policy and user alike, so that only the prefix is shared.
    Returns [(the first conversation, the second, h)]; those that failed are counted in `dropped`.

    A user may end a conversation before turn H. Then there may be no s_h: nothing is left to decide there, Eq. 1 has
    nothing to fit, and the prompt gives no pair. h is not drawn again among the turns that there are: it would then depend
    on what came after s_h, so that y, whose future chose h, would not be exchangeable with y'."""
    firsts, seconds = converse([d.copy(stream=(s, 0)) for d, s in zip(starts, streams, strict=True)], policy, user, H, h,
                               [(s, 1) for s in streams])  # fmt: skip
    found = []
    for first, second, turn in zip(firsts, seconds, h, strict=True):
        failed = first.failed or (second.failed if second else OVER)
        if failed:
            dropped[failed] += 1
        else:
            found.append((first, second, int(turn)))
    return found


# ---------------------------------------------------------------------------------------------------------------
# The cast: what a configuration names, made real
# ---------------------------------------------------------------------------------------------------------------


def checkpoint(name):
    """A folder for a checkpoint; a world's own base policy is made at its first use."""
    if worlds.world_file(name):
        name = on_rank_0(lambda: worlds.build_policy(name))
    return find_checkpoint(name)


def prepare(cfg, trains=True):
    """Check all inputs before any model is loaded; returns cfg with its checkpoints' folders and number of iterations.

    trains: False where a policy is only looked at or judged."""
    check_names(cfg)
    if worlds.world_file(cfg.dataset) and len(set(told(worlds.prompts_hash(cfg.dataset)))) > 1:
        raise BadInput(f"--dataset {cfg.dataset}: processes get different prompts from it: draw with a seed, and sort sets")
    for name in ("policy", "reference"):
        cfg = replace(cfg, **{name: checkpoint(getattr(cfg, name))})
        check_positions(getattr(cfg, name), cfg)
    for path in {cfg.policy, cfg.reference}:
        families.check_policy(path)
    tokenizer = load_tokenizer(cfg.policy)
    check_vocabulary(tokenizer, load_config(cfg.policy).vocab_size)
    stop_tokens(cfg.policy, tokenizer)
    if trains and cfg.pairs:
        pairs.check_whose(cfg)
        for _ in pairs.read_pairs(cfg, tokenizer, pairs.LOOK):
            pass
    elif trains:
        check_room(train_prompts(cfg, tokenizer, 1), cfg, tokenizer)
    check_room(test_prompts(cfg, tokenizer), cfg, tokenizer)
    if trains and not cfg.iterations:
        cfg = replace(cfg, iterations=len(first_prompts(cfg, "train", tokenizer)) // cfg.num_prompts)
    if trains and not cfg.num_prompts:
        tell_all(len(first_prompts(cfg, "train", tokenizer)), cfg)
    check_cast(cfg)
    users.reach_user(cfg)
    return cfg


def tell_all(number, cfg):
    """What --num-prompts 0 comes to; and whether it is enough for a batch."""
    if number < cfg.batch_size:
        raise BadInput(f"--num-prompts 0: {cfg.dataset} has {number} training prompts, less than one --batch-size")
    if rank() == 0:
        steps = cfg.epochs * -(-(number - min(cfg.validation, number // 8)) // cfg.batch_size)
        print(f"all {number} prompts: at most {number} pairs an iteration, and {steps} steps of {cfg.batch_size} of them",
              flush=True)  # fmt: skip


def check_room(starts, cfg, tokenizer):
    """Whether the dialogues can reach their last turn within --max-length, before anything is played.

    The engine gives a dialogue up where an answer of --max-new-tokens might not fit. Refused: all of them will be, with
    answers and questions of one token. Said: some may be, with answers as long as they may get."""
    between = len(later_ids(tokenizer, "x"))
    hopeless, tight, most = 0, 0, 0
    for d in starts:
        (H,) = longest([d], cfg)
        most = max(most, H)
        answer = min(d.limit or cfg.max_new_tokens, cfg.max_new_tokens)
        least = len(d.ids) + (H - 1) * between + answer
        hopeless += least > cfg.max_length
        tight += least + (H - 1) * (answer - 1) > cfg.max_length
    if hopeless == len(starts):
        raise BadInput(f"--max-length {cfg.max_length} is too short for any dialogue to reach its last turn with "
                       f"--max-new-tokens {cfg.max_new_tokens} and {most} turns")  # fmt: skip
    if tight and rank() == 0:
        print(f"{tight} of {len(starts)} dialogues outgrow --max-length {cfg.max_length} if every answer has "
              f"--max-new-tokens {cfg.max_new_tokens}: those that do are dropped and counted", flush=True)  # fmt: skip


def check_names(cfg):
    """What the flags' words tell by themselves, a world's file among them: the cheapest look, before a checkpoint is
    downloaded."""
    if worlds.world_file(cfg.dataset):
        for split in ("train", "test"):
            worlds.load_prompts(cfg.dataset, split)
    for name, load in {"user": worlds.load_user, "reward": worlds.load_reward}.items():
        path = getattr(cfg, name)
        if not worlds.world_file(path):
            continue
        load(path)
        if worlds.is_closed(path, f"--{name}") and cfg.dataset != path:
            raise BadInput(f"--{name} {path}: it knows nothing of --dataset {cfg.dataset}, but only its own prompts")
    if cfg.user == "dataset" and worlds.world_file(cfg.dataset):
        if not worlds.has_questions(cfg.dataset):
            raise BadInput(f"--user dataset: --dataset {cfg.dataset} holds no questions to come: its secrets are no lists of "
                           "texts")  # fmt: skip
        most = worlds.most_questions(cfg.dataset)
        if most > cfg.max_turns:  # one turn is played for each question
            raise BadInput(f"--max-turns {cfg.max_turns}: --dataset {cfg.dataset} has a prompt of {most} questions: give "
                           f"--max-turns {most}, or leave longer prompts out in its prompts(split)")  # fmt: skip
    if "://" in cfg.user:
        users.user_server(cfg)
    for name in ("policy", "reference", "reward", "user"):
        path = getattr(cfg, name)
        if os.path.isabs(path) and not os.path.isdir(path) and not worlds.world_file(path):
            raise BadInput(f"--{name}: no checkpoint at {path}")


def check_cast(cfg):
    """Everything about --user and --reward that can be known before a model is loaded."""
    check_names(cfg)
    if not worlds.world_file(cfg.user):
        users.check_user(cfg)
    if not worlds.world_file(cfg.reward):
        rewards.check_reward(cfg)


def load_cast(cfg, beside=None):
    """(the policy's engine, the user, the reward); the user first: a server that does not start is found at once.

    beside: another served model that has the user's part of the GPUs, where the user has none."""
    check_cast(cfg)
    user = worlds.load_user(cfg.user) if worlds.world_file(cfg.user) else users.load_user(cfg)
    policy = load_engine(cfg.policy, replace(cfg, user=beside) if beside else cfg)
    reward = worlds.load_reward(cfg.reward) if worlds.world_file(cfg.reward) else rewards.load_reward(cfg)
    return policy, user, reward


def made_of(cfg):
    """What a run is made of beside its flags: {input: fingerprint of its content, or version}.

    A path names a file, not what is in it: a run that was stopped has to find what it began with."""
    found = {"engine": engine_name(cfg)}
    for name in ("policy", "reference", "reward", "user"):
        path = getattr(cfg, name).removeprefix("serve:")
        if worlds.world_file(path):
            found[f"content of --{name}"] = worlds.fingerprint(path)
        elif "://" not in path and path != "dataset":
            found[f"content of --{name}"] = fingerprint(find_checkpoint(path))
    if cfg.pairs:
        found["content of --pairs"] = rows.content_hash(cfg.pairs)
    return found | made_of_dataset(cfg) | versions()


def made_of_dataset(cfg):
    if not worlds.world_file(cfg.dataset):
        return {"content of --dataset": data.fingerprint(cfg)}
    code = worlds.fingerprint(cfg.dataset)  # load_logs is in it
    return {"prompts of --dataset": worlds.prompts_hash(cfg.dataset), "content of --dataset": code}


def first_prompts(cfg, split, tokenizer):
    """The first prompts, as texts, of a split: train, test, held back: the last fifth of the training prompts, on which no
    run with --eval-split validation trains; or validation: --eval-dialogues of them."""
    if split == "test" or cfg.eval_split == "test":
        return all_prompts(cfg, split, tokenizer)
    prompts = all_prompts(cfg, "train", tokenizer)
    first = len(prompts) - len(prompts) // 5
    while 0 < first and prompts[first - 1].text == prompts[first].text:  # one opening is on one side
        first -= 1
    if split == "train":
        return prompts[:first]
    return prompts[first:] if split == "held back" else prompts[first:][-cfg.eval_dialogues :]


def all_prompts(cfg, split, tokenizer):
    """The prompts that the data set or the world has for training or for the test."""
    if worlds.world_file(cfg.dataset):
        return [data.Prompt(*pair) for pair in worlds.load_prompts(cfg.dataset, split)]
    return getattr(data.load_data(cfg, tokenizer), split)


def train_prompts(cfg, tokenizer, t):
    """The dialogues at s_1 of iteration t: cfg.num_prompts of the training split, or all, drawn without replacement."""
    pool = first_prompts(cfg, "train", tokenizer)
    if cfg.num_prompts > len(pool):
        raise BadInput(f"--num-prompts {cfg.num_prompts}: {cfg.dataset} has only {len(pool)} training prompts")
    return Made(lambda i: open_dialogue(tokenizer, pool[i], system=cfg.system), data.draw("prompts", len(pool), cfg, t))


def test_prompts(cfg, tokenizer):
    """The openings that every policy is evaluated from; the streams make users and noise common to all of them."""
    pool = first_prompts(cfg, cfg.eval_split, tokenizer)
    if cfg.eval_dialogues > len(pool):
        raise BadInput(f"--eval-dialogues {cfg.eval_dialogues}: {cfg.dataset} has only {len(pool)} {cfg.eval_split} prompts")
    dialogues = []
    for i, prompt in enumerate(pool[: cfg.eval_dialogues]):
        dialogues.append(open_dialogue(tokenizer, prompt, (cfg.seed, cfg.eval_split, i), cfg.system))
    return dialogues


def data_counts(cfg):
    """What a data set gave, and what was dropped of it by reason; None for a world's own prompts."""
    if worlds.world_file(cfg.dataset):
        return None
    found = data.load_data(cfg, load_tokenizer(cfg.policy))
    return {"train": len(found.train), "test": len(found.test), "logged": len(found.logs), "twice": len(found.twice),
            "dropped": found.dropped}  # fmt: skip


class Made:
    """A sequence whose items are made when they are read: 64,000 open dialogues would take a gigabyte."""

    def __init__(self, make, keys):
        self.make, self.keys = make, keys

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, place):
        if isinstance(place, slice):
            return [self.make(key) for key in self.keys[place]]
        return self.make(self.keys[place])


def open_dialogue(tokenizer, prompt, stream=(0,), system=""):
    """s_1 of a prompt; the data's own system prompt takes the place of `system`, which is --system."""
    return Dialogue.start(tokenizer, prompt.text, prompt.secret, stream, prompt.limit, prompt.system or system or None)


@functools.lru_cache
def short_logs(name, most):
    """A world's conversations of others, but those with more turns than a dialogue may have."""
    logs = worlds.load_logs(name)
    rows = [row for row in range(len(logs)) if len(logs[row].questions) <= most]
    return logs if len(rows) == len(logs) else Made(logs.__getitem__, rows)


def offline_prompts(cfg, tokenizer, t, twice=False):
    """The same for the baselines that roll in by the data: finished dialogues; twice: each with a second last answer."""
    found = worlds.world_file(cfg.dataset)
    if found:
        logs = short_logs(cfg.dataset, cfg.max_turns)
    else:
        logs = getattr(data.load_data(cfg, tokenizer), "twice" if twice else "logs")
    rows = range(len(logs))
    if cfg.eval_split == "validation" and not found:
        held = {p.text for p in first_prompts(cfg, "held back", tokenizer)}
        rows = [row for row in rows if logs[row].questions[0] not in held]
    if cfg.num_prompts > len(rows):
        raise BadInput(f"--num-prompts {cfg.num_prompts}: {cfg.dataset} has only {len(rows)} dialogues to roll in by")
    return Made(lambda i: replay(tokenizer, logs[rows[i]], twice, cfg.system), data.draw("offline", len(rows), cfg, t))


def hybrid_prompts(cfg, tokenizer, t):
    """A share --hybrid of finished dialogues of the data, the others at s_1, in random order."""
    online, offline = train_prompts(cfg, tokenizer, t), offline_prompts(cfg, tokenizer, t)
    number = min(len(online), len(offline))
    by_data = random.Random(seed_for(cfg.seed, "hybrid", t)).sample(range(number), round(cfg.hybrid * number))
    by_data = set(by_data)
    return Made(lambda i: offline[i] if i in by_data else online[i], range(number))


def replay(tokenizer, log, twice=False, system=""):
    """A logged conversation as the policy would see it, with the canonical ids of its answers; twice: (the conversation
    with the chosen last answer, the same with the rejected one)."""

    def canonical(text):
        return encode(tokenizer, "", text) + [end_token(tokenizer)]

    first = Dialogue.start(tokenizer, log.questions[0], log.secret, limit=log.limit, system=log.system or system or None)
    for answer, question in zip(log.answers, log.questions[1:], strict=True):
        first.add_answer(tokenizer, canonical(answer)).add_user(tokenizer, question)
    second = first.copy()
    first.add_answer(tokenizer, canonical(log.chosen))
    return (first, second.add_answer(tokenizer, canonical(log.rejected))) if twice else first


def longest(dialogues, cfg):
    """How many turns each dialogue can have: --max-turns, or one for each of the data's own questions (section 4.3)."""
    if cfg.user == "dataset":
        return np.array([1 + len(d.secret) for d in dialogues])
    return np.full(len(dialogues), cfg.max_turns)


# ---------------------------------------------------------------------------------------------------------------
# Looking at dialogues
# ---------------------------------------------------------------------------------------------------------------


SHOW = dict(nargs="+", default=["3"], metavar="N [FILE]", help="pairs [3]; of a stored pairs.jsonl or eval/NAME.jsonl, "
            "without any model")  # fmt: skip


def stored(argv):
    """(number, file) of --show N FILE, else None."""
    own = Parser(add_help=False, allow_abbrev=False)
    own.add_argument("--show", nargs="+", default=[])
    own, rest = own.parse_known_args(argv)
    if len(own.show) < 2:
        return None
    if len(own.show) > 2 or rest:
        raise BadInput("--show N FILE stands alone: nothing else is loaded")
    return how_many(own.show[0]), own.show[1]


def how_many(text):
    if not text.isdecimal() or int(text) < 1:
        raise BadInput(f"--show must be positive, not {text}")
    return int(text)


def main(argv=None):
    with one_line("simulator.py"):
        file = stored(argv)
        if file:
            return show_stored(file[1], file[0], Dialogue.from_json)
        cfg, extra = read_config(argv, __doc__, show=SHOW)
        start_processes()
        cfg = prepare(replace(cfg, reference=cfg.policy, num_prompts=how_many(extra["show"][0]), eval_dialogues=1))
        policy, user, reward = load_cast(cfg)
        rng, dropped = np.random.default_rng(cfg.seed), Counter()
        starts = train_prompts(cfg, policy.tokenizer, 1)
        H = longest(starts, cfg)
        h = rng.integers(1, H + 1)
        found = futures(starts, h, H, rng.integers(2**62, size=len(starts)).tolist(), policy, user, dropped)
        if not found:
            raise BadInput(f"no dialogue is left of {cfg.num_prompts} prompts: {dict(dropped)}")
        if dropped:
            print(f"of {cfg.num_prompts} prompts these gave no pair: {dict(dropped)}\n")
        for first, second, turn in found:
            print(both_futures(first, second, turn, score(reward, [first, second]), policy.tokenizer), end="\n\n")


if __name__ == "__main__":
    main()
