"""A dialogue and who speaks next: roll-out, reset, the users (sections 2 and 4.2). Who samples is in engines.py.

    python simulator.py --setting toy --policy runs/toy/iter_2/policy --show 3      look at dialogues and resets

Token ids are the truth and text is a view: what the policy sampled is what is trained on. A dialogue is never decoded
and tokenised again between turns. Roll-in and roll-out are one function, `rollout`; a reset is a slice.

Dimension key: H turns.
"""
import functools
import hashlib
import importlib.util
import math
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tqdm import tqdm

from files import BadInput, find_checkpoint, prepare_checkpoint, read_json


def seed_for(*key):
    """A 62-bit seed made from a key such as (stream, turn, speaker): equal keys, equal seeds, on any machine.

    The released code gives one seed to a whole batch and to every turn, so that all prompts share their noise
    (vLLM draws the same noise for equal seeds); here no two draws share a key."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 2


# ---------------------------------------------------------------------------------------------------------------
# The dialogue: state s_h, response y_h, user turn x_{h+1} (section 2)
# ---------------------------------------------------------------------------------------------------------------


class Prompt(NamedTuple):
    """An opening x_1; what only the user (and the toy's reward) may know: wishes, or the questions to come; and the
    tokens of an answer, where the data set sets a limit (Table 5)."""

    text: str
    secret: Any = None
    limit: int | None = None


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

    @classmethod
    def start(cls, tokenizer, user_text, secret=None, stream=(0,), limit=None):
        """s_1: the opening as the chat template renders it, with the header that makes the assistant speak."""
        before, after, _, _ = template_pieces(tokenizer)
        text = checked(user_text)
        ids = encode(tokenizer, before, text, after)
        return cls(ids, [], [{"role": "user", "content": text}], [], [], secret, tuple(stream), limit)

    def add_answer(self, tokenizer, ids, truncated=False, logp=math.nan):
        """Append y_h exactly as it was sampled: no token is added, dropped or decoded and encoded again."""
        if self.messages[-1]["role"] != "user":
            raise BadInput("a dialogue must alternate: an answer follows a user's turn")
        ids = [int(i) for i in ids]
        self.spans.append((len(self.ids), len(self.ids) + len(ids)))
        self.ids += ids
        self.messages.append({"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True).strip()})
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
        _, _, before, after = template_pieces(tokenizer)
        text = checked(user_text)
        ids = encode(tokenizer, before, text, after)
        self.ids += ids[self.ids[-1] == ids[0] :]
        self.messages.append({"role": "user", "content": text})
        return self

    def reset(self, h):
        """s_h: everything up to and including the user's turn h (1 <= h); a new dialogue, nothing is shared."""
        if not 1 <= h <= (len(self.messages) + 1) // 2:
            raise BadInput(f"cannot reset to turn {h}: the dialogue has {(len(self.messages) + 1) // 2} user turns")
        cut = self.spans[h - 1][0] if h <= len(self.spans) else len(self.ids)
        return self.cut(cut, h - 1, 2 * h - 1)

    def until(self, h):
        """The conversation of the first h turns, answer h included: what a reward model or a judge reads at turn h."""
        if not 1 <= h <= len(self.spans):
            raise BadInput(f"the dialogue has {len(self.spans)} answers, not {h}")
        return self.cut(self.spans[h - 1][1], h, 2 * h)

    def cut(self, tokens, answers, messages):
        return Dialogue(self.ids[:tokens], self.spans[:answers], [m.copy() for m in self.messages[:messages]],
                        self.truncated[:answers], self.logps[:answers], self.secret, self.stream, self.limit)  # fmt: skip

    def answer(self, h):
        """The sampled ids of y_h."""
        return self.ids[slice(*self.spans[h - 1])]

    def seed(self, speaker):
        """The seed of the next turn: distinct for every row, branch, turn and speaker."""
        return seed_for(*self.stream, len(self.spans), speaker)

    @classmethod
    def from_json(cls, row):
        return cls(**row | {"spans": [tuple(s) for s in row["spans"]], "stream": tuple(row["stream"])})


def checked(text):
    """A user's turn as it enters a dialogue: a string that is not empty, without outer white space.

    Templates differ in whether they trim; a trimmed text is the same under all of them. Lone surrogates (broken
    UTF-16 in a JSON file) become question marks, since no tokenizer can encode them."""
    if not isinstance(text, str):
        raise BadInput(f"a turn must be text, not {type(text).__name__}")
    text = text.encode("utf-8", "replace").decode().strip()
    if not text:
        raise BadInput("an empty turn")
    return text


@functools.lru_cache(maxsize=8)
def template_pieces(tokenizer):
    """What the chat template writes around a user's text: (before the first, after it, before a later one, after it).

    Found by rendering marked texts, so that any template whose turns end in a special token will do."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise BadInput(f"the tokenizer {tokenizer.name_or_path} has no chat template")
    user, answer = "\ue000user\ue000", "\ue000answer\ue000"
    first = [{"role": "user", "content": user}]
    later = [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}, *first]
    render = functools.partial(tokenizer.apply_chat_template, tokenize=False)
    try:
        before, after = render(first, add_generation_prompt=True).split(user)
        between, later_after = render(later, add_generation_prompt=True).split(answer)[1].split(user)
        prompted = render(first) != before + user + after
    except (TemplateError, LookupError, ValueError, TypeError, OverflowError) as error:
        raise BadInput(f"the chat template of {tokenizer.name_or_path} does not render a conversation: "
                       f"{type(error).__name__} {' '.join(str(error).split())[:200]}") from None  # fmt: skip
    if not prompted:
        raise BadInput(f"the chat template of {tokenizer.name_or_path} has no generation prompt")
    if encode(tokenizer, between)[0] not in tokenizer.all_special_ids + list(tokenizer.added_tokens_decoder):
        raise BadInput(f"the chat template of {tokenizer.name_or_path} does not end an answer with a special token")
    return before, after, between, later_after


def encode(tokenizer, before, text="", after=""):
    """Ids of a piece of a rendered conversation; special tokens inside the user's text stay text.

    Without them the piece is encoded as a whole, which is what the template's own tokenisation gives. The template
    writes the BOS where it wants one, so the tokenizer must not add another (the released code sampled under two)."""
    whole = functools.partial(tokenizer.encode, add_special_tokens=False)
    if not any(str(token) in text for token in tokenizer.added_tokens_decoder.values()):
        return whole(before + text + after)
    return whole(before) + encode_plain(tokenizer, text) + whole(after)


def encode_plain(tokenizer, text):
    """Ids of a text in which the strings of control tokens are ordinary characters."""
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    if set(ids) & set(tokenizer.added_tokens_decoder):  # an added token that is no special token is still matched
        pieces = [[i] if i not in tokenizer.added_tokens_decoder else
                  [j for c in str(tokenizer.added_tokens_decoder[i]) for j in
                   tokenizer.encode(c, add_special_tokens=False)] for i in ids]  # fmt: skip
        ids = [i for piece in pieces for i in piece]
    return ids


def end_token(tokenizer):
    """The id that ends an assistant's turn in this template."""
    return encode(tokenizer, template_pieces(tokenizer)[2])[0]


def load_tokenizer(path):
    """The tokenizer of a checkpoint, with a chat template that `Dialogue` can use."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} has no tokenizer that loads: {' '.join(str(error).split())[:200]}") from None
    template_pieces(tokenizer)
    return tokenizer


def stop_tokens(path, tokenizer):
    """The ids that end an answer: the template's own first, then those of generation_config.json and the tokenizer."""
    stop = [end_token(tokenizer), tokenizer.eos_token_id]
    file = os.path.join(path, "generation_config.json")
    if os.path.exists(file):
        more = read_json(file).get("eos_token_id")
        stop += more if isinstance(more, list) else [more]
    return list(dict.fromkeys(i for i in stop if i is not None))


def rollout(dialogues, policy, user, turns):
    """Let policy and user talk until each dialogue has its number of answers (section 2, roll-ins and roll-outs).

    dialogues: states s_h at which the assistant speaks next; turns: how many assistant turns each ends with.
    Returns new dialogues, each ending with an answer; one that user or policy had to give up carries `failed`."""
    dialogues = [d.reset(len(d.spans) + 1) if len(d.spans) < n else d for d, n in zip(dialogues, turns, strict=True)]
    active = [(d, n) for d, n in zip(dialogues, turns) if len(d.spans) < n]
    while active:
        for (d, _), answer in zip(active, policy.answer([d for d, _ in active])):
            if answer is None:
                d.failed = "too long"
            else:
                d.add_answer(policy.tokenizer, *answer)
        active = [(d, n) for d, n in active if not d.failed and len(d.spans) < n]
        for (d, _), text in zip(active, user.reply([d for d, _ in active])):
            if text is None:
                d.failed = "user"
            else:
                d.add_user(policy.tokenizer, text)
        active = [(d, n) for d, n in active if not d.failed]
    return dialogues


# ---------------------------------------------------------------------------------------------------------------
# Users: who speaks at x_{h+1}
# ---------------------------------------------------------------------------------------------------------------
# A user has reply(dialogues) -> [text or None], and sees whole batches.

# Appendix C.2 in the paper's wording; the line breaks and the speakers' marks, lost there, are the released code's.
USER_PROMPT = """Below is a dialogue between the user and the assistant. Pretend you are the user in this conversation. \
What question would you ask next?

### Dialogue:
{dialogue}

### Instructions:
FIRST provide a justification of the question you want to ask. SECOND, on a new line, state only the question. Your \
response should use the format:
Justification: <one-sentence justification>
Question: <question to ask next>"""

USER_TRIES = 3  # replies asked for, each with a seed of its own, before a dialogue is given up


class LLMUser:
    """Setting one: a language model that is asked what the user would say next (appendix C.2).

    ask: a Server or a Local, which sends the prompt as one user message of the model's own chat template; longest: a
    question of more characters is none; limit: share of unanswered prompts at which a server is left alone."""

    NO_QUESTION = "a reply without a question"

    def __init__(self, ask, longest, limit):
        self.ask, self.longest, self.limit = ask, longest, limit
        self.tokens = ask.engine.tokens if hasattr(ask, "engine") else Counter()  # a server counts its own

    def reply(self, dialogues):
        texts, rows, why = [None] * len(dialogues), list(range(len(dialogues))), {}
        for k in range(USER_TRIES):
            prompts = [user_prompt(dialogues[i].messages) for i in rows]
            seeds = [dialogues[i].seed(f"user {k}") for i in rows]
            again = []
            for n, reply, reason in self.ask(prompts, seeds, math.ceil(self.limit * len(dialogues))) if rows else ():
                texts[rows[n]] = next_question(reply or "", self.longest)
                why[rows[n]] = self.NO_QUESTION if reply is not None and reason is None else reason
                if reply is not None and texts[rows[n]] is None:
                    again.append(rows[n])
            # a prompt that a server has failed five times is not sent again: one that hangs would cost three times as much
            rows = again
        failed = [i for i, text in enumerate(texts) if text is None]
        if failed:
            reason = next(filter(None, map(why.get, failed)))
            tqdm.write(f"the user gave no turn to {len(failed)} of {len(dialogues)} dialogues: {reason}")
        return texts


def user_prompt(messages):
    dialogue = "\n\n".join(f"### {m['role']}: {m['content']}" for m in messages)
    return USER_PROMPT.format(dialogue=dialogue)


def next_question(reply, longest):
    """What stands behind the last "Question:" of a user model's reply; None where that is missing, empty or too long.

    The released code takes the whole reply, justification and all, where the mark is missing, and an empty turn where
    nothing follows it. A mark in bold type leaves its closing stars in front of the question.

    >>> next_question("Justification: to know. **Question:** How far is it?", 100)
    'How far is it?'
    """
    _, mark, text = reply.rpartition("Question:")
    text = text.strip().removeprefix("**").strip()
    return text if mark and 0 < len(text) <= longest else None


class DataUser:
    """Setting two: the data set's own next question, whatever the policy said; secret lists x_2, x_3, ..."""

    def reply(self, dialogues):
        return [d.secret[len(d.spans) - 1] if len(d.spans) <= len(d.secret) else None for d in dialogues]


def check_user(cfg):
    """Everything about --user that can be known before a model is loaded."""
    if cfg.user == "toy" and cfg.dataset != "toy":
        raise BadInput(f"--user toy: the toy's user knows nothing of --dataset {cfg.dataset}")
    if cfg.user == "dataset" and cfg.dataset == "toy":
        raise BadInput("--user dataset: the toy's data set holds no questions to come")
    if "://" in cfg.user:
        user_server(cfg)
    elif cfg.user not in ("toy", "dataset"):
        load_tokenizer(find_checkpoint(cfg.user.removeprefix("serve:")))
    if cfg.user.startswith("serve:") and not importlib.util.find_spec("vllm"):
        raise BadInput(f"--user {cfg.user}: vllm is not installed (pip install -r requirements-gpu.txt)")


def reach_user(cfg):
    """One question to a user at a URL: a server that is not there is found before any model is loaded."""
    if "://" in cfg.user:
        _, reply, why = next(user_server(cfg, tries=3)([user_prompt([{"role": "user", "content": "Hello."}])], [0]))
        if reply is None:
            raise BadInput(f"--user {cfg.user} does not answer as {cfg.user_model}: {why}")


def user_server(cfg, **options):
    if not cfg.user_model:
        raise BadInput("--user URL needs --user-model NAME")
    from ask import Server

    return Server(cfg.user, cfg.user_model, flag="--user", **user_options(cfg), **options)


def user_options(cfg):
    return dict(threads=256, temperature=cfg.user_temperature, max_tokens=cfg.user_tokens, whole=True)


def load_user(cfg):
    """Who plays the user: `toy`, `dataset`, the URL of a server, `serve:` and a checkpoint for a server of this node's
    own, or a checkpoint in an engine of this process."""
    check_user(cfg)
    if cfg.user == "toy":
        import toy

        return toy.Customer()
    if cfg.user == "dataset":
        return DataUser()
    from ask import Local, longest_prompt
    from engines import gpu_share

    if "://" in cfg.user:
        ask = user_server(cfg)
    else:
        path = find_checkpoint(cfg.user.removeprefix("serve:"))
        room = longest_prompt(path, 2 * cfg.max_length + cfg.user_tokens)  # its tokenizer may need more tokens
        if cfg.user.startswith("serve:"):
            import serve

            ask = serve.Served(path, os.path.join(cfg.out, f"user_{serve.node()}.log"), room,
                               gpu_share(cfg, "user"), **user_options(cfg))  # fmt: skip
        else:
            ask = Local(path, cfg, cfg.user_temperature, cfg.user_tokens, room, whole=True)
    return LLMUser(ask, 8 * cfg.user_tokens, cfg.max_failures)


def check_failures(failed, dialogues, cfg):
    """A run in which the user fails too often is stopped: what is left would be another distribution of dialogues."""
    if failed > math.ceil(cfg.max_failures * dialogues):
        raise BadInput(f"--user {cfg.user} failed in {failed} of {dialogues} dialogues; --max-failures is "
                       f"{cfg.max_failures:g} (finished waves are kept: run the same command again to go on)")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Looking at dialogues
# ---------------------------------------------------------------------------------------------------------------


def show(pair, tokenizer):
    """One pair as text: the prefix s_h, both futures, what of them is trained, and their rewards."""
    lines = [f"h = {pair.h} of H = {pair.H}, prefix of {len(pair.prefix)} tokens"]
    for name, dialogue, ids, reward in zip(("y ", "y'"), pair.dialogues, (pair.y, pair.y2), pair.rewards):
        if name == "y ":
            lines += [f"   {m['role']:10s} {m['content']}" for m in dialogue.messages[: 2 * pair.h - 1]]
        lines.append(f"{name} {len(ids)} sampled tokens: {tokenizer.convert_ids_to_tokens(ids)}")
        lines += [f"   {m['role']:10s} {m['content']}" for m in dialogue.messages[2 * pair.h - 1 :]]
        lines.append(f"   reward {reward:.3f}" + "  (an answer was cut)" * any(dialogue.truncated))
    return "\n".join(lines)


def main():
    import sys

    import processes  # first

    import data
    import refuel

    with processes.one_line("simulator.py"):
        cfg, extra = refuel.read_config(sys.argv[1:], __doc__, show=dict(type=int, default=3))
        processes.start_processes()
        cfg = refuel.replace(cfg, policy=prepare_checkpoint(cfg.policy), num_prompts=4 * extra["show"])
        policy, user, reward = refuel.load_speakers(cfg.policy, cfg)
        rng = refuel.np.random.default_rng(cfg.seed)
        dropped = Counter()
        pairs = refuel.collect(data.train_prompts(cfg, policy.tokenizer, 0), policy, user, reward, cfg, rng, dropped)
        if not pairs:
            raise BadInput(f"no pair is left of {cfg.num_prompts} prompts: {dict(dropped)}")
        print("\n\n".join(show(pair, policy.tokenizer) for pair in pairs[: extra["show"]]))


if __name__ == "__main__":
    from simulator import main  # as the module that everybody imports, not as a second copy

    main()
