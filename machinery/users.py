"""Who speaks at x_{h+1}: appendix C.2's language model, or the data's own next question.

A user has reply(dialogues) -> [text, or None where it has no turn to give], and sees whole batches.
"""
import math
import os
import re
from collections import Counter
from dataclasses import replace

from tqdm import tqdm

from machinery import serve
from machinery.ask import Local, Server, longest_prompt
from machinery.engines import gpu_share, load_engine
from machinery.files import BadInput, find_checkpoint
from machinery.ranks import node
from machinery.template import load_tokenizer, without_thoughts

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
    question of more characters does not count; limit: share of unanswered prompts at which a server is left alone."""

    NO_QUESTION = "a reply without a question"

    def __init__(self, ask, longest, limit):
        self.ask, self.longest, self.limit = ask, longest, limit
        self.threads = getattr(ask, "threads", 0)  # a server's replies are waited for in threads; an engine of this process
        self.patient = not self.threads  # is asked when the policy's has nothing to do
        self.said = set()  # why dialogues got no turn; in threads each reason is told once, and the dialogues are counted
        self.tokens = ask.engine.tokens if hasattr(ask, "engine") else Counter()  # a server counts its own

    def stop(self):
        """End what threads are asking."""
        self.ask.stop()

    def reply(self, dialogues):
        texts, why = [None] * len(dialogues), {}
        rows = list(range(len(dialogues)))
        for k in range(USER_TRIES):
            if not rows:
                break
            prompts = [user_prompt(dialogues[i].messages) for i in rows]
            seeds = [dialogues[i].seed(f"user {k}") for i in rows]
            again = []
            for n, reply, reason in self.ask(prompts, seeds, math.ceil(self.limit * len(dialogues))):
                texts[rows[n]] = next_question(reply or "", self.longest)
                why[rows[n]] = self.NO_QUESTION if reply is not None and reason is None else reason
                if reply is not None and texts[rows[n]] is None:
                    again.append(rows[n])
            rows = again  # not those that a server has failed five times: one that hangs would cost three times as much
        failed = [i for i, text in enumerate(texts) if text is None]
        if failed:
            reason = next(filter(None, map(why.get, failed)))
            if not self.threads or reason not in self.said:
                more = " (told once)" if self.threads else ""
                tqdm.write(f"the user gave no turn to {len(failed)} of {len(dialogues)} dialogues: {reason}{more}")
            self.said.add(reason)
        return texts


def user_prompt(messages):
    """Appendix C.2 on a conversation.

    Paper: each message as it is. Here: its lines after the first are indented, because an answer or the data's own text
    that has a line "### user:" or "### Instructions:" would play the user or give orders. Only our own marks begin a line."""
    turns = []
    for m in messages:
        lines = m["content"].splitlines()
        turns.append(f"### {m['role']}: " + "\n    ".join(lines))
    return USER_PROMPT.format(dialogue="\n\n".join(turns))


MARK = re.compile(r"^[ \t]*\**Question\**:\**", re.MULTILINE)
INLINE = re.compile(r"(?<=[.!?])[ \t]+\**Question\**:\**")  # on the justification's own line, behind its sentence
OTHERS = "Justification|Answer|Response|Assistant|User"  # what stands behind them is not the question's
HEADING = rf"^[ \t]*###+[ \t]*\**(?:\w+(?: \w+)?\**[ \t]*:|(?:{OTHERS})\**[ \t]*$)"  # "### Instructions:", "### Answer"
LINE = rf"(?<=\n)[ \t]*\**(?:{OTHERS})\**:"  # "**Answer:**", not on the question's own line
BEHIND = re.compile(f"(?:{HEADING}|{LINE}).*", re.MULTILINE | re.DOTALL | re.IGNORECASE)
PLACEHOLDER = USER_PROMPT.rpartition("Question: ")[2]


def next_question(reply, longest):
    """What stands behind the last line of a user model's reply that begins with "Question:"; None where there is none
    or where the question is empty or too long. A question may have the word inside it.

    The released code cuts at the word wherever it stands, takes the whole reply, justification and all, where it is
    missing, and an empty turn where nothing follows it. A reasoning model's thoughts are not its reply, and a model that
    goes on behind its question is heard up to there: up to a later line that begins with "Justification:", "Answer:",
    "Response:", "Assistant:" or "User:", or a heading such as "### assistant:" or "### Instructions:". The prompt's own
    "<question to ask next>" is no question.

    >>> next_question("Justification: to know. **Question:** How far is it?", 100)
    'How far is it?'
    >>> next_question('Justification: unclear.\\nQuestion: what is "Question: 5"?', 100)
    'what is "Question: 5"?'
    >>> next_question("Question: How far is it?\\n\\nAssistant: 5 miles.\\n\\nUser: And by bus?", 100)
    'How far is it?'
    """
    reply = without_thoughts(reply)
    marks = list(MARK.finditer(reply)) or list(INLINE.finditer(reply))[:1]
    if not marks:
        return None
    text = BEHIND.sub("", reply[marks[-1].end() :]).strip()
    return text if 0 < len(text) <= longest and PLACEHOLDER not in text else None


class DataUser:
    """Setting two: the data set's own next question, whatever the policy said; secret lists x_2, x_3, ..."""

    def reply(self, dialogues):
        return [d.secret[len(d.spans) - 1] if len(d.spans) <= len(d.secret) else None for d in dialogues]


def check_user(cfg):
    """Everything about --user that can be known before a model is loaded, beside its URL (simulator.check_names)."""
    if cfg.user == "dataset" or "://" in cfg.user:
        return
    load_tokenizer(find_checkpoint(cfg.user.removeprefix("serve:")))
    if cfg.user.startswith("serve:"):
        serve.check_vllm(f"--user {cfg.user}")


def reach_user(cfg):
    """One question to a user at a URL: a server that is not there is found before any model is loaded."""
    if "://" not in cfg.user:
        return
    hello = user_prompt([{"role": "user", "content": "Hello."}])
    _, reply, why = next(user_server(cfg, tries=3)([hello], [0]))
    if reply is None:
        raise BadInput(f"--user {cfg.user} does not answer as {cfg.user_model}: {why}")


def user_server(cfg, **options):
    if not cfg.user_model:
        raise BadInput("--user URL needs --user-model NAME")
    return Server(cfg.user, cfg.user_model, flag="--user", **user_options(cfg), **options)


def user_options(cfg):
    return dict(threads=256, temperature=cfg.user_temperature, max_tokens=cfg.user_tokens, whole=True)


def user_room(path, cfg):
    """Tokens of prompt and reply: the user's tokenizer may need more of them than the policy's."""
    return longest_prompt(path, 2 * cfg.max_length + cfg.user_tokens)


def user_log(cfg):
    return os.path.join(cfg.out, f"user_{node()}.log")


def load_user(cfg):
    """Who plays the user: `dataset`, the URL of a server, `serve:` and a checkpoint for a server of this node's own, or a
    checkpoint in an engine of this process."""
    if cfg.user == "dataset":
        return DataUser()
    if "://" in cfg.user:
        ask = user_server(cfg)
    else:
        path = find_checkpoint(cfg.user.removeprefix("serve:"))
        room = user_room(path, cfg)
        if cfg.user.startswith("serve:"):
            ask = serve.Served(path, user_log(cfg), room, gpu_share(cfg, "user"), **user_options(cfg))
        else:
            own = replace(cfg, temperature=cfg.user_temperature, max_new_tokens=cfg.user_tokens, max_length=room)
            ask = Local(load_engine(path, own, "user"), max(cfg.wave, cfg.eval_wave), whole=True)
    return LLMUser(ask, 8 * cfg.user_tokens, cfg.max_failures)


def check_failures(failed, dialogues, cfg, who=None):
    """A run in which the user (or `who`) fails too often, by a whole dialogue, is stopped: what is left would be others."""
    if failed > math.ceil(cfg.max_failures * dialogues):
        raise BadInput(f"{who or f'--user {cfg.user}'} failed in {failed} of {dialogues} dialogues; --max-failures is "
                       f"{cfg.max_failures:g} (finished waves are kept: run the same command again to resume)")  # fmt: skip
