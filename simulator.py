"""A conversation: dialogue, reset, roll-out, both futures of a state; and the cast that a configuration names.

    python simulator.py --setting toy --policy runs/toy/iter_2/policy --show 3      look at dialogues and resets

Sections 2 and 4.2. Token ids are the truth and text is a view: what the policy sampled is what is trained on. A dialogue
is never decoded and tokenised again between turns. Roll-in and roll-out are one function, `rollout`; a reset is a slice.

Dimension key: H turns.
"""
import machinery  # noqa: F401  (first: it sets what torch and vLLM read when they are imported)

import math
import os
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

import toy
from machinery import data, families, pairs, rewards, rows, users
from machinery.engines import load_engine
from machinery.files import BadInput, check_positions, find_checkpoint, fingerprint, load_config, versions
from machinery.ranks import barrier, one_line, rank, start_processes
from machinery.seams import ask, score
from machinery.settings import engine_name, read_config, seed_for
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
        plain text."""
        if self.messages[-1]["role"] != "user":
            raise BadInput("a dialogue must alternate: an answer follows a user's turn")
        ids = [int(i) for i in ids]
        self.spans.append((len(self.ids), len(self.ids) + len(ids)))
        self.ids += ids
        self.messages.append({"role": "assistant", "content": said(tokenizer, ids, truncated)})
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
# has reply(dialogues) -> [text, or None where it has none]. Both see whole batches.


def rollout(dialogues, policy, user, turns):
    """Let policy and user talk until each dialogue has its number of answers (section 2, roll-ins and roll-outs).

    dialogues: states s_h at which the assistant speaks next; turns: how many assistant turns each ends with.
    Returns new dialogues, each ending with an answer; one that user or policy had to give up carries `failed`."""
    dialogues = [d.copy() for d in dialogues]
    goals = list(zip(dialogues, turns, strict=True))
    active = [d for d, n in goals if len(d.spans) < n]
    while active:
        for d, answer in zip(active, policy.answer(active), strict=True):
            if answer is None:
                d.failed = "too long"
            else:
                d.add_answer(policy.tokenizer, *answer)
        active = [d for d, n in goals if len(d.spans) < n and not d.failed]
        for d, text in zip(active, ask(user, active), strict=True):
            if text is None:
                d.failed = "user"
            else:
                d.add_user(policy.tokenizer, text)
        active = [d for d in active if not d.failed]
    return dialogues


def futures(starts, h, H, streams, policy, user, dropped):
    """Line 3 of Algorithm 1: roll in and on to turn H, reset to s_h, and roll out from there a second time.

    starts: where the roll-ins begin; h, H: turns, one of each a start; streams: the starts' random numbers. The first
    roll-out continues the roll-in: the trajectory's own y_h is a sample of pi_t(.|s_h). The second one starts anew at s_h
    with its own noise, for policy and user alike, so that only the prefix is shared.
    Returns [(the first conversation, the second, h)]; those that failed are counted in `dropped`."""
    firsts = rollout([d.copy(stream=(s, 0)) for d, s in zip(starts, streams, strict=True)], policy, user, H)
    whole, resets = [], []
    for first, turn, last, stream in zip(firsts, h, H, streams, strict=True):
        if first.failed:
            dropped[first.failed] += 1
        else:
            whole.append((first, int(turn), int(last)))
            resets.append(first.reset(turn).copy(stream=(stream, 1)))
    seconds = rollout(resets, policy, user, [last for _, _, last in whole])
    found = []
    for (first, turn, _), second in zip(whole, seconds, strict=True):
        if second.failed:
            dropped[second.failed] += 1
        else:
            found.append((first, second, turn))
    return found


# ---------------------------------------------------------------------------------------------------------------
# The cast: what a configuration names, made real
# ---------------------------------------------------------------------------------------------------------------


def world(name):
    """The embedded world that --policy, --user, --reward or --dataset names, a module like toy.py; else None."""
    return toy if name == "toy" else None


def checkpoint(name):
    """A folder for a checkpoint; a world's own base policy is trained at its first use."""
    if not world(name):
        return find_checkpoint(name)
    if rank() == 0:
        world(name).build_policy()
    barrier()
    return world(name).FOLDER


def prepare(cfg, trains=True):
    """Check all inputs before any model is loaded; returns cfg with its checkpoints' folders and number of iterations.

    trains: False where a policy is only looked at or judged."""
    check_names(cfg)
    for name in ("policy", "reference"):
        cfg = replace(cfg, **{name: checkpoint(getattr(cfg, name))})
        check_positions(getattr(cfg, name), cfg)
    for path in {cfg.policy, cfg.reference}:
        families.check_policy(path)
    tokenizer = load_tokenizer(cfg.policy)
    check_vocabulary(tokenizer, load_config(cfg.policy).vocab_size)
    stop_tokens(cfg.policy, tokenizer)
    if trains and cfg.pairs:
        for _ in pairs.read_pairs(cfg, tokenizer, pairs.LOOK):
            pass
    elif trains:
        check_room(train_prompts(cfg, tokenizer, 1), cfg, tokenizer)
    check_room(test_prompts(cfg, tokenizer), cfg, tokenizer)
    if trains and not cfg.iterations:
        cfg = replace(cfg, iterations=len(first_prompts(cfg, "train", tokenizer)) // cfg.num_prompts)
    check_cast(cfg)
    users.reach_user(cfg)
    return cfg


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
    """What the flags' words tell by themselves: the cheapest look, before a checkpoint is downloaded."""
    if world(cfg.user) and cfg.dataset != cfg.user:
        raise BadInput(f"--user {cfg.user}: the toy's user knows nothing of --dataset {cfg.dataset}")
    if world(cfg.reward) and cfg.dataset != cfg.reward:
        raise BadInput(f"--reward {cfg.reward}: the toy's reward is 0 wherever --dataset {cfg.dataset} leads")
    if cfg.user == "dataset" and world(cfg.dataset):
        raise BadInput("--user dataset: the toy's data set holds no questions to come")
    if "://" in cfg.user:
        users.user_server(cfg)
    for name in ("policy", "reference", "reward", "user"):
        path = getattr(cfg, name)
        if os.path.isabs(path) and not os.path.isdir(path):
            raise BadInput(f"--{name}: no checkpoint at {path}")


def check_cast(cfg):
    """Everything about --user and --reward that can be known before a model is loaded."""
    check_names(cfg)
    if not world(cfg.user):
        users.check_user(cfg)
    if not world(cfg.reward):
        rewards.check_reward(cfg)


def load_cast(cfg):
    """(the policy's engine, the user, the reward); the user first: a server that does not start is found at once."""
    check_cast(cfg)
    user = world(cfg.user).Customer() if world(cfg.user) else users.load_user(cfg)
    policy = load_engine(cfg.policy, cfg)
    reward = world(cfg.reward).Reward() if world(cfg.reward) else rewards.load_reward(cfg)
    return policy, user, reward


def made_of(cfg):
    """What a run is made of beside its flags: {input: fingerprint of its content, or version}.

    A path names a file, not what is in it: a run that was stopped has to find what it began with."""
    found = {"engine": engine_name(cfg)}
    for name in ("policy", "reference", "reward", "user"):
        path = getattr(cfg, name).removeprefix("serve:")
        if not world(path) and "://" not in path and path != "dataset":
            found[f"content of --{name}"] = fingerprint(find_checkpoint(path))
    if not world(cfg.dataset):
        found["content of --dataset"] = data.fingerprint(cfg)
    if cfg.pairs:
        found["content of --pairs"] = rows.content_hash(cfg.pairs)
    return found | versions()


def first_prompts(cfg, split, tokenizer):
    """The first prompts, as texts, of a split: "train" or "test"."""
    if world(cfg.dataset):
        return world(cfg.dataset).load_prompts(split)
    return getattr(data.load_data(cfg, tokenizer), split)


def train_prompts(cfg, tokenizer, t):
    """The dialogues at s_1 of iteration t: cfg.num_prompts of the training split, drawn without replacement."""
    pool = first_prompts(cfg, "train", tokenizer)
    if cfg.num_prompts > len(pool):
        raise BadInput(f"--num-prompts {cfg.num_prompts}: {cfg.dataset} has only {len(pool)} training prompts")
    return Made(lambda i: open_dialogue(tokenizer, pool[i]), data.draw("prompts", len(pool), cfg, t))


def test_prompts(cfg, tokenizer):
    """The openings that every policy is evaluated from; the streams make users and noise common to all of them."""
    pool = first_prompts(cfg, "test", tokenizer)
    if cfg.eval_dialogues > len(pool):
        raise BadInput(f"--eval-dialogues {cfg.eval_dialogues}: {cfg.dataset} has only {len(pool)} test prompts")
    return [open_dialogue(tokenizer, p, (cfg.seed, "test", i)) for i, p in enumerate(pool[: cfg.eval_dialogues])]


def data_counts(cfg):
    """What a data set gave, and what was dropped of it by reason; None for a world's own prompts."""
    if world(cfg.dataset):
        return None
    found = data.load_data(cfg, load_tokenizer(cfg.policy))
    return {"train": len(found.train), "test": len(found.test), "logged": len(found.logs), "dropped": found.dropped}


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


def open_dialogue(tokenizer, prompt, stream=(0,)):
    return Dialogue.start(tokenizer, prompt.text, prompt.secret, stream, prompt.limit, prompt.system)


def offline_prompts(cfg, tokenizer, t):
    """The same for the baselines that roll in by the data: finished dialogues, each with a second last answer."""
    found = world(cfg.dataset)
    logs = found.load_logs() if found else data.load_data(cfg, tokenizer).logs
    if cfg.num_prompts > len(logs):
        raise BadInput(f"--num-prompts {cfg.num_prompts}: {cfg.dataset} has only {len(logs)} dialogues")
    return Made(lambda i: replay(tokenizer, logs[i]), data.draw("offline", len(logs), cfg, t))


def replay(tokenizer, log):
    """A logged conversation as the policy would see it, with the canonical ids of its answers: (the conversation with
    the chosen last answer, the same with the rejected one)."""

    def canonical(text):
        return encode(tokenizer, "", text) + [end_token(tokenizer)]

    first = Dialogue.start(tokenizer, log.questions[0], log.secret, system=log.system)
    for answer, question in zip(log.answers, log.questions[1:], strict=True):
        first.add_answer(tokenizer, canonical(answer)).add_user(tokenizer, question)
    second = first.copy()
    first.add_answer(tokenizer, canonical(log.chosen))
    return first, second.add_answer(tokenizer, canonical(log.rejected))


def longest(dialogues, cfg):
    """How many turns each dialogue can have: --max-turns, or one for each of the data's own questions (section 4.3)."""
    if cfg.user == "dataset":
        return np.array([1 + len(d.secret) for d in dialogues])
    return np.full(len(dialogues), cfg.max_turns)


# ---------------------------------------------------------------------------------------------------------------
# Looking at dialogues
# ---------------------------------------------------------------------------------------------------------------


def show(first, second, h, scores, tokenizer):
    """Both futures of one state as text: the prefix s_h, what of each is trained, and their rewards."""
    lines = [f"h = {h} of H = {len(first.spans)}, prefix of {len(first.reset(h).ids)} tokens"]
    for m in first.messages[: 2 * h - 1]:
        lines.append(f"   {m['role']:10s} {m['content']}")
    for name, d, earned in zip(("y ", "y'"), (first, second), scores, strict=True):
        ids = d.answer(h)
        lines.append(f"{name} {len(ids)} sampled tokens: {tokenizer.convert_ids_to_tokens(ids)}")
        for m in d.messages[2 * h - 1 :]:
            lines.append(f"   {m['role']:10s} {m['content']}")
        lines.append("   too long for the reward model" if earned is None else f"   reward {earned:.3f}")
        lines[-1] += "  (an answer was cut)" if any(d.truncated) else ""
    return "\n".join(lines)


def main(argv=None):
    with one_line("simulator.py"):
        cfg, extra = read_config(argv, __doc__, show=dict(type=int, default=3))
        start_processes()
        cfg = prepare(replace(cfg, reference=cfg.policy, num_prompts=extra["show"]))
        policy, user, reward = load_cast(cfg)
        rng, dropped = np.random.default_rng(cfg.seed), Counter()
        starts = train_prompts(cfg, policy.tokenizer, 1)
        H = longest(starts, cfg)
        h = rng.integers(1, H + 1)
        found = futures(starts, h, H, rng.integers(2**62, size=len(starts)).tolist(), policy, user, dropped)
        if not found:
            raise BadInput(f"no dialogue is left of {cfg.num_prompts} prompts: {dict(dropped)}")
        for first, second, turn in found:
            print(show(first, second, turn, score(reward, [first, second]), policy.tokenizer), end="\n\n")


if __name__ == "__main__":
    main()
