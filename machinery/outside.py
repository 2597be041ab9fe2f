"""A policy that no engine of this process holds: evaluate.py plays and judges it by its texts, and never trains it.

    --policy NAME=serve:ORG/MODEL       a hub id or a folder, served over the node's GPUs as the user is (serve.py)
    --policy NAME=URL#MODEL             a model of an OpenAI-compatible server (key: OPENAI_API_KEY)

Table 1's reference rows, Llama-3.1-8B-it and 70B-it, are such policies. Tokens are the server's own affair: a dialogue
has messages and no ids, so there is no KL and no length in tokens.
"""
import math
import os
from dataclasses import replace

from machinery import plan, serve
from machinery.ask import Server
from machinery.engines import gpu_share
from machinery.files import BadInput, find_checkpoint, fingerprint
from machinery.ranks import node
from machinery.template import load_tokenizer
from machinery.users import user_log, user_room


class OutsidePolicy:
    """answer(dialogues) -> [(text, truncated, nan), or None where the server gave no answer]

    threads, limit, stop: as machinery/pace.py asks for; failure: what `failed` says of a dialogue without an answer."""

    tokenizer, failure = None, "policy"

    def __init__(self, ask, cfg):
        self.ask, self.threads, self.limit, self.most = ask, ask.threads, cfg.max_failures, cfg.max_new_tokens
        self.why = "no answer"

    def stop(self):
        """End what threads are asking."""
        self.ask.stop()

    def answer(self, dialogues):
        questions = []
        for d in dialogues:
            most = min(self.most, d.limit) if d.limit else self.most
            questions.append({"messages": d.conversation(), "max_tokens": most})
        answers = [None] * len(dialogues)
        for i, text, why in self.ask(questions, [d.seed("policy") for d in dialogues], len(dialogues)):
            if text is None:
                self.why = why
            else:
                answers[i] = text, why is not None, math.nan  # a why beside a text: it was cut
        return answers


def is_outside(path):
    return path.startswith("serve:") or "://" in path


def check(paths, cfg):
    """Everything about such policies that can be known before a model is loaded.

    Returns the checkpoint that the node serves for them beside the user's own, or None. There is room for one."""
    models = set()
    for path in filter(is_outside, paths):
        if "://" in path:
            server(path, cfg)
        else:
            load_tokenizer(find_checkpoint(path.removeprefix("serve:")))
            serve.check_vllm(f"--policy {path}")
            models.add(path)
    own = models - {cfg.user}
    if len(models | ({cfg.user} if plan.model_of(cfg.user) else set())) > 1 and own:
        raise BadInput(f"--policy {min(own)}: beside the reference the GPUs hold one more model, and that would be "
                       f"{', '.join(sorted(models | {cfg.user}))}: have one served elsewhere and give its URL")  # fmt: skip
    return next(iter(own), None)


def reach(policy, path):
    """One question: a server that is not there is found before anything is played."""
    policy.ask.tries = 3  # this object asks nothing else
    hello = {"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 16}
    _, reply, why = next(policy.ask([hello], [0], 0))
    if reply is None:
        raise BadInput(f"--policy {path} does not answer: {why}")


def server(path, cfg):
    """The server that URL#MODEL names."""
    url, _, model = path.partition("#")
    if not model:
        raise BadInput(f"--policy {path}: a policy at a server is URL#MODEL")
    return Server(url, model, flag="--policy", **how(cfg))


def how(cfg):
    return dict(threads=256, temperature=cfg.eval_temperature or cfg.temperature, max_tokens=cfg.max_new_tokens)


def load(path, cfg):
    """The policy that `path` names; one that is also the user is asked at the user's server."""
    if "://" in path:
        return OutsidePolicy(server(path, cfg), cfg)
    folder = find_checkpoint(path.removeprefix("serve:"))
    log = user_log(cfg) if cfg.user == path else os.path.join(cfg.out, f"policy_{node()}.log")
    share = gpu_share(replace(cfg, user=path), "user")
    return OutsidePolicy(serve.Served(folder, log, user_room(folder, cfg), share, flag="--policy", **how(cfg)), cfg)


def identity(path):
    """What `weights` says of it beside its dialogues: the content of a checkpoint, or a server's URL and model."""
    return path if "://" in path else f"serve:{fingerprint(find_checkpoint(path.removeprefix('serve:')))}"
