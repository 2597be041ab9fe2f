"""A dialogue and who speaks next: roll-out, reset, the engines, the users (sections 2 and 4.2).

    python simulator.py --setting toy --policy runs/toy/iter_2/policy --show 3      look at dialogues and resets

Token ids are the truth and text is a view: what the policy sampled is what is trained on. A dialogue is never decoded
and tokenised again between turns. Roll-in and roll-out are one function, `rollout`; a reset is a slice.

Dimension key: B dialogues, T tokens, V vocabulary, H turns.
"""
import contextlib
import copy
import functools
import glob
import hashlib
import http.client
import importlib.util
import json
import math
import os
import re
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from tqdm import tqdm


class BadInput(ValueError):
    """Something the user of the program can mend: shown as one line, exit code 2, no traceback."""


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
        return Dialogue(self.ids[:tokens], self.spans[:answers], copy.deepcopy(self.messages[:messages]),
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
# The policy's engines: ids in, sampled ids out
# ---------------------------------------------------------------------------------------------------------------


class Engine:
    """A checkpoint that samples: temperature only, no top-p, no top-k, no repetition penalty.

    generate(prompts, seeds, limits) -> [(ids, truncated, logp)]    ids end with the end token unless truncated
    sleep()                     leaves the GPU until the next update
    update(weights)             new weights in place: an iterable of (name, tensor) in the checkpoint's names
    tokens                      what was computed: prefill (padding included), decode; and cached, what was not
    """

    def __init__(self, path, max_new_tokens, temperature, max_length):
        self.tokenizer = load_tokenizer(path)
        self.max_new_tokens, self.temperature, self.max_length = max_new_tokens, temperature, max_length
        self.stop, self.tokens = stop_tokens(path, self.tokenizer), Counter()

    def answer(self, dialogues):
        """One assistant turn for each dialogue; None where prompt and answer might not fit the context."""
        limits = [min(d.limit or self.max_new_tokens, self.max_new_tokens) for d in dialogues]
        fits = [len(d.ids) + n <= self.max_length for d, n in zip(dialogues, limits)]
        rows = [(d.ids, d.seed("policy"), n) for d, n, fit in zip(dialogues, limits, fits) if fit]
        answers = iter(self.generate(*zip(*rows)) if rows else ())
        return [next(answers) if fit else None for fit in fits]


class TransformersEngine(Engine):
    """transformers' generate: runs everywhere, slowly. Left-padded batches, sorted by length.

    The keys and values of the last batch are kept: dialogues that all go on from it, as they do turn by turn within a
    wave, compute only what is new to them."""

    def __init__(self, path, max_new_tokens, temperature, max_length, batch=512):
        super().__init__(path, max_new_tokens, temperature, max_length)
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        cuda = torch.cuda.is_available()
        self.device, self.batch = torch.device("cuda", local_rank()) if cuda else torch.device("cpu"), batch
        dtype = torch.bfloat16 if cuda else torch.float32
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=False)
        self.model = self.model.to(self.device).eval()
        # a checkpoint's own sampling habits (top-p, penalties, forced tokens) must not leak into the behaviour policy
        self.model.generation_config = GenerationConfig()
        self.past = None

    def generate(self, prompts, seeds, limits):
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        answers = {}
        for start in range(0, len(order), self.batch):
            rows = order[start : start + self.batch]
            answers.update(zip(rows, self.generate_batch(*([x[i] for i in rows] for x in (prompts, seeds, limits)))))
        return [answers[i] for i in range(len(prompts))]

    def generate_batch(self, prompts, seeds, limits):
        import torch
        from transformers import GenerationConfig, LogitsProcessorList

        held, held_BT, cache = self.continued(prompts)
        fresh, pad = [p[n:] for p, n in zip(prompts, held)], self.stop[0]
        length = max(map(len, fresh))
        ids_BT = torch.tensor([[pad] * (length - len(p)) + p for p in fresh], device=self.device)
        mask_BT = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in fresh], device=self.device)
        mask_BT = torch.cat([held_BT, mask_BT], dim=1)
        sampler = SeededSampler(seeds, self.temperature)
        with torch.no_grad():
            out = self.model.generate(
                input_ids=ids_BT, attention_mask=mask_BT, past_key_values=cache,
                logits_processor=LogitsProcessorList([sampler]),
                generation_config=GenerationConfig(max_new_tokens=max(limits), do_sample=False, eos_token_id=self.stop,
                                                   pad_token_id=pad, return_dict_in_generate=True),
            )  # fmt: skip
        logp_BT = torch.stack(sampler.logps, 1).tolist()
        self.tokens.update(prefill=ids_BT.numel(), decode=len(prompts) * (len(sampler.logps) - 1))
        answers = []
        for ids, logps, limit in zip(out.sequences[:, length:].tolist(), logp_BT, limits):
            end = next((t + 1 for t, i in enumerate(ids[:limit]) if i in self.stop), None)
            answers.append((ids[: end or limit], end is None, sum(logps[: end or limit])))
        said_BT = torch.tensor([[t + 1 < len(ids) for t in range(len(sampler.logps) - 1)] for ids, _, _ in answers],
                               dtype=mask_BT.dtype, device=self.device)  # fmt: skip  (the last token was not fed)
        rows = {tuple(p + ids[:-1]): i for i, (p, (ids, _, _)) in enumerate(zip(prompts, answers))}
        self.past = rows, torch.cat([mask_BT, said_BT], dim=1), out.past_key_values
        return answers

    def continued(self, prompts):
        """How many ids of each prompt the last batch has computed, their mask (left-padded), and their keys and values;
        none unless every prompt goes on from one of its rows."""
        import torch
        from transformers.cache_utils import DynamicLayer

        (rows, mask_BT, cache), self.past = self.past or ({}, None, None), None
        lengths = sorted(set(map(len, rows)), reverse=True)
        found = [next((p[:n] for n in lengths if n < len(p) and tuple(p[:n]) in rows), []) for p in prompts]
        if not all(found) or any(type(layer) is not DynamicLayer for layer in cache.layers):
            return [0] * len(prompts), torch.zeros(len(prompts), 0, dtype=torch.long, device=self.device), None
        index_B = torch.tensor([rows[tuple(ids)] for ids in found], device=self.device)
        held, held_BT = list(map(len, found)), mask_BT[index_B]
        column_BT = held_BT.argsort(dim=1, stable=True)[:, -max(held) :]  # what is padding goes to the left
        for layer in cache.layers:
            for name in ("keys", "values"):
                old = getattr(layer, name)
                where = column_BT[:, None, :, None].expand(-1, old.shape[1], -1, old.shape[3])
                setattr(layer, name, old[index_B].gather(2, where))
        return held, held_BT.gather(1, column_BT), cache

    def sleep(self):
        self.past = None
        self.model.to("cpu")

    def update(self, weights):
        import torch

        self.past = None
        self.model.to(self.device)
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in weights:
                if name in parameters:  # a tied lm_head.weight is its embedding
                    parameters[name].copy_(tensor)


class SeededSampler:
    """Samples inside greedy generate by the Gumbel-max trick, each row by its own generator.

    argmax(logp - ln E) with E ~ Exp(1) is a draw from softmax; generate's own sampling knows one seed a batch."""

    def __init__(self, seeds, temperature):
        import torch

        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.temperature, self.logps = temperature, []

    def __call__(self, ids_BT, logits_BV):
        import torch

        logp_BV = torch.log_softmax(logits_BV.float() / self.temperature, -1)
        noise_BV = torch.stack([torch.empty(logp_BV.shape[1]).exponential_(generator=g) for g in self.generators])
        choice_B = (logp_BV - noise_BV.log().to(logp_BV.device)).argmax(-1)
        self.logps.append(logp_BV.gather(1, choice_B[:, None])[:, 0])
        return torch.full_like(logits_BV, -math.inf).scatter_(1, choice_B[:, None], 0.0)


class VLLMEngine(Engine):
    """vLLM inside the training process, one engine a rank; weights are replaced in place, the prefix cache dropped.

    Paged KV cache with prefix caching: a later turn finds its dialogue cached, so only new tokens are computed."""

    def __init__(self, path, max_new_tokens, temperature, max_length, memory=None):
        super().__init__(path, max_new_tokens, temperature, max_length)
        import torch

        threads = torch.set_num_threads  # the CPU engine replaces it by a no-op
        from vllm import LLM

        if torch.cuda.is_available():
            options = dict(dtype="bfloat16", gpu_memory_utilization=memory, enable_sleep_mode=True)
            if world() > 1:  # takes LOCAL_RANK's device, the plain form device 0
                options["distributed_executor_backend"] = "external_launcher"
        else:  # seeded requests crash the CPU build when a prefill is cut into chunks
            room = max(128 << 20, 8 * max_length * cache_bytes(path))
            options = dict(dtype="float32", enforce_eager=True, kv_cache_memory_bytes=room, block_size=32,
                           enable_chunked_prefill=False, max_num_batched_tokens=max(max_length, 8192))  # fmt: skip
        self.asleep = False
        self.engine = LLM(str(path), max_model_len=max_length, max_num_seqs=256, seed=0, generation_config="vllm",
                          enable_prefix_caching=True, logprobs_mode="processed_logprobs", skip_tokenizer_init=True,
                          disable_log_stats=True, **options)  # fmt: skip
        torch.set_num_threads = threads

    def generate(self, prompts, seeds, limits):
        from vllm import SamplingParams

        # ignore_eos: only our own stop tokens end an answer, the same ones for both engines
        params = [SamplingParams(max_tokens=limit, temperature=self.temperature, seed=seed, logprobs=0,
                                 stop_token_ids=self.stop, ignore_eos=True, detokenize=False)
                  for seed, limit in zip(seeds, limits)]  # fmt: skip
        outputs = self.engine.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        answers = []
        for whole, out in ((o, o.outputs[0]) for o in outputs):
            cached = whole.num_cached_tokens
            self.tokens.update(prefill=len(whole.prompt_token_ids) - cached, cached=cached, decode=len(out.token_ids) - 1)
            logp = sum(step[i].logprob for i, step in zip(out.token_ids, out.logprobs))
            answers.append((list(out.token_ids), out.finish_reason == "length", logp))
        return answers

    def sleep(self):
        """Leave the GPU to the trainer, weights and cache dropped, until new weights come. (On a CPU: nothing.)"""
        import torch

        if torch.cuda.is_available() and not self.asleep:
            self.engine.sleep(level=2)
            self.asleep = True

    def update(self, weights):
        import torch

        if self.asleep:
            torch.cuda.empty_cache()  # what the trainer's allocator keeps is not the engine's yet
            self.engine.wake_up(tags=["weights"])
        self.engine.collective_rpc("reload_weights", kwargs=dict(weights_iterator=iter(weights)))
        if self.asleep:
            torch.cuda.empty_cache()
            self.engine.wake_up(tags=["kv_cache"])
            self.asleep = False
        self.engine.reset_prefix_cache()  # without it the next answers are computed from the old policy's cache


def cache_bytes(path):
    """Bytes of keys and values of one token in float32."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    return 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


def gpu_share(cfg, who):
    """The part of a GPU's memory that vLLM may take for the policy or the user; plan.py computes it."""
    import plan
    import torch

    return plan.share(cfg, who) if torch.cuda.is_available() else None


def load_engine(path, cfg, who="policy"):
    """The engine that `cfg.engine` names, over one checkpoint; auto takes vLLM where it is installed."""
    name = cfg.engine
    if name == "auto":
        name = "vllm" if importlib.util.find_spec("vllm") else "transformers"
    if name == "vllm" and not importlib.util.find_spec("vllm"):
        raise BadInput("--engine vllm: vllm is not installed (pip install -r requirements-gpu.txt)")
    engine = {"vllm": VLLMEngine, "transformers": TransformersEngine}[name]
    more = dict(memory=gpu_share(cfg, who)) if name == "vllm" else {}
    return engine(path, cfg.max_new_tokens, cfg.temperature, cfg.max_length, **more)


# ---------------------------------------------------------------------------------------------------------------
# Asking a language model for text: a server, or a checkpoint in this process (users and judges)
# ---------------------------------------------------------------------------------------------------------------

FAILURES = 0.05  # the share of questions that may stay unanswered


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        """None: urllib would take the key along to wherever the server points."""


class Deadline:
    """A time-out of sockets is one of each read: a server that drips its header is cut off by a clock of our own."""

    def do_open(self, http_class, request, **options):
        class Connection(http_class):
            def getresponse(self):
                clock = threading.Timer(self.timeout, self.sock.shutdown, [socket.SHUT_RDWR])
                end = time.monotonic() + self.timeout
                clock.start()
                try:
                    return super().getresponse()
                except (OSError, http.client.HTTPException):
                    if time.monotonic() < end:
                        raise
                    raise TimeoutError("the reply takes too long") from None  # not a server that hung up
                finally:
                    clock.cancel()

        return super().do_open(Connection, request, **options)


class HTTP(Deadline, urllib.request.HTTPHandler):
    pass


class HTTPS(Deadline, urllib.request.HTTPSHandler):
    pass


class Server:
    """An OpenAI-compatible server, asked by a few threads; bounded in tries, time and bytes.

    Tried again: time-outs, broken connections, replies that are not what they should be, 429 and 5xx. Any other status
    fails at once. The model that a reply names is not compared: servers answer with dated names and aliases, and one
    that lies could lie there too. The key comes from the environment and goes nowhere but into the request's header."""

    BYTES = 1 << 20

    def __init__(self, url, model, timeout=120, tries=5, pause=1.0, threads=16, flag="--judge", **options):
        """options: temperature (0), max_tokens (512), whole: a reply that was cut at max_tokens is given as empty."""
        if not re.fullmatch(r"https?://[^/@?#\s]+(/[^?#\s]*)?", url):
            raise BadInput(f"{flag}: a URL is http(s)://HOST[:PORT]/v1, and the key stands in OPENAI_API_KEY only")
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not (self.key.isascii() and self.key.isprintable()):
            raise BadInput("OPENAI_API_KEY has characters that no key has")
        self.url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.model, self.timeout, self.tries, self.pause = model, timeout, tries, pause
        self.threads = max(1, threads // world())
        self.options = dict(temperature=0, max_tokens=512, whole=False) | options
        self.opener = urllib.request.build_opener(NoRedirect, HTTP, HTTPS)

    def __call__(self, prompts, seeds=None, allowed=None):
        """(number, reply, None) or (number, None, why) as they come; given up after `allowed` failures."""
        self.dead, self.failed = threading.Event(), []
        self.allowed = FAILURES * len(prompts) if allowed is None else allowed
        pool, asked = ThreadPoolExecutor(self.threads), zip(prompts, seeds or [None] * len(prompts), strict=True)
        futures = {pool.submit(self.answer, prompt, seed): i for i, (prompt, seed) in enumerate(asked)}
        try:
            for future in as_completed(futures):
                yield futures[future], *future.result()
        finally:
            self.dead.set()
            pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C does not wait for a server that stalls

    def answer(self, prompt, seed=None):
        """(reply, None), or (None, why there is none); why is None where nobody asks any more."""
        why = None
        for k in range(self.tries):
            if self.dead.wait(self.pause * 2 ** (k - 1) if k else 0):
                break
            try:
                return self.hidden(self.request(prompt, seed)), None
            except urllib.error.HTTPError as error:
                why = f"HTTP {error.code}"
                with contextlib.suppress(OSError, http.client.HTTPException), error:
                    why = self.one_line(f"{why} {error.fp.read1(300).decode(errors='replace')}")
                if error.code != 429 and error.code < 500:
                    break
            except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, RecursionError) as error:
                why = self.one_line(f"{type(error).__name__} {error}")
        self.failed.append(why)
        if len(self.failed) > self.allowed:
            self.dead.set()
        return None, why

    def request(self, prompt, seed):
        """One request, one reply's text."""
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}],
                "temperature": self.options["temperature"], "max_tokens": self.options["max_tokens"]}  # fmt: skip
        body |= {} if seed is None else {"seed": seed}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        data, deadline = b"", time.monotonic() + self.timeout
        with self.opener.open(request, timeout=self.timeout) as response:
            while chunk := response.read1(1 << 16):  # the time-out is per read: a server that drips is stopped here
                data += chunk
                if len(data) > self.BYTES:
                    raise ValueError("a reply of more than 1 MB")
                if time.monotonic() > deadline:
                    raise TimeoutError("the reply takes too long")
        choice = json.loads(data)["choices"][0]
        text = choice["message"]["content"]
        if not isinstance(text, str):
            raise ValueError("a reply without text")
        return "" if self.options["whole"] and choice.get("finish_reason") == "length" else text

    def hidden(self, text):
        """The text without the key, should the server echo it; a placeholder such as EMPTY is no secret."""
        return text.replace(self.key, "***") if len(self.key) > 7 else text

    def one_line(self, text):
        return " ".join(self.hidden(text).split())[:200]


class Local:
    """A checkpoint that is asked like a Server, in an engine of this process."""

    def __init__(self, path, cfg, temperature, max_tokens, room, whole=False):
        cfg = replace(cfg, temperature=temperature, max_new_tokens=max_tokens, max_length=longest_prompt(path, room))
        self.engine, self.wave, self.whole = load_engine(path, cfg, "user"), cfg.wave, whole

    def __call__(self, prompts, seeds=None, allowed=None):
        tokenizer, seeds = self.engine.tokenizer, seeds or prompts
        for start in range(0, len(prompts), self.wave):
            part = slice(start, start + self.wave)
            rows = [Dialogue.start(tokenizer, p, stream=("ask", s)) for p, s in zip(prompts[part], seeds[part])]
            for i, (row, answer) in enumerate(zip(rows, self.engine.answer(rows)), start):
                if answer is None:
                    yield i, None, "a prompt longer than the model's context"
                elif self.whole and answer[1]:  # it was cut
                    yield i, "", None
                else:
                    yield i, row.add_answer(tokenizer, *answer).messages[-1]["content"], None


def longest_prompt(path, room):
    """`room`, or what the checkpoint's positions allow."""
    return min(read_json(os.path.join(path, "config.json")).get("max_position_embeddings") or room, room)


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
            for n, reply, reason in self.ask(prompts, seeds, math.ceil(self.limit * len(dialogues))) if rows else ():
                texts[rows[n]] = next_question(reply or "", self.longest)
                why[rows[n]] = reason if reply is None else self.NO_QUESTION
            # a prompt that a server has failed five times is not sent again: one that hangs would cost three times as much
            rows = [i for i in rows if texts[i] is None and why[i] == self.NO_QUESTION]
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
# Checkpoints, files and ranks
# ---------------------------------------------------------------------------------------------------------------


def prepare_checkpoint(path):
    """A folder for what --policy or --reference names; `toy` is the toy's base policy, built on first use."""
    if path != "toy":
        return find_checkpoint(path)
    import toy

    if rank() == 0 and not toy.is_built(toy.FOLDER):
        toy.base_policy(toy.FOLDER)
    barrier()
    return toy.FOLDER


def find_checkpoint(path):
    """A local folder for a checkpoint that is given as a folder or as a hub id; one line if there is none."""
    if os.path.isdir(path):
        if not os.path.exists(os.path.join(path, "config.json")):
            raise BadInput(f"{path} is not a checkpoint: it has no config.json")
        check_weights(path)
        return path
    if os.path.exists(path) or path.count("/") != 1 or path.startswith((".", "/", "~", "runs/")):
        raise BadInput(f"no checkpoint at {path}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "tokenizer*", "*.jinja"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BadInput(f"no folder {path}, and the hub does not give it ({type(error).__name__})") from None


def check_weights(path):
    """Every weight file of a checkpoint is there and whole: a copy that was cut short is found before it is loaded."""
    from safetensors import SafetensorError

    index = os.path.join(path, "model.safetensors.index.json")
    if os.path.exists(index):
        absent = set(read_json(index)["weight_map"].values()) - set(os.listdir(path))
        if absent:
            raise BadInput(f"{path} lacks {', '.join(sorted(absent))}")
    try:
        list(weight_names(path))
    except SafetensorError as error:
        raise BadInput(f"{path} has a weight file that is not whole: {error}") from None


def check_positions(path, cfg):
    """A policy's configuration loads, without any code of its own, and its context holds --max-length."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} has no config.json that loads: {' '.join(str(error).split())[:200]}") from None
    positions = getattr(config, "max_position_embeddings", math.inf)
    if cfg.max_length > positions:
        raise BadInput(f"--max-length {cfg.max_length}: {path} has {positions} positions")


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


def read_weights(path, prefixes=("",)):
    """(name, tensor) of every weight of a checkpoint folder whose name begins so, one at a time; safetensors only,
    never a pickle."""
    from safetensors import safe_open

    tied = read_json(os.path.join(path, "config.json")).get("tie_word_embeddings")
    for file in weight_files(path):
        with safe_open(file, "pt") as weights:
            for name in filter(lambda name: name.startswith(prefixes), weights.keys()):
                yield name, weights.get_tensor(name)
                if tied and name == "model.embed_tokens.weight":
                    yield "lm_head.weight", weights.get_tensor(name)  # vLLM keeps its old head unless it is named


def weight_names(path):
    from safetensors import safe_open

    for file in weight_files(path):
        with safe_open(file, "pt") as weights:
            yield from weights.keys()


def weight_files(path):
    files = sorted(glob.glob(os.path.join(path, "*.safetensors")))
    if not files:
        raise BadInput(f"{path} has no safetensors; other weight files can carry code and are not read")
    return files


def copy_tokenizer(source, target):
    """Everything of a checkpoint folder but its weights and its model's configuration."""
    for file in glob.glob(os.path.join(source, "*")):
        if "token" in os.path.basename(file) or os.path.basename(file) in ("chat_template.jinja", "vocab.json",
                                                                           "merges.txt", "generation_config.json"):  # fmt: skip
            shutil.copy(file, target)


def rank():
    return int(os.environ.get("RANK", 0))


def world():
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank():
    return int(os.environ.get("LOCAL_RANK", 0))


def barrier():
    if world() > 1:
        import torch.distributed as dist

        dist.barrier()


def in_waves(path, items, size, work, desc):
    """The rows of work(items of a wave, number of the wave) for all waves, in order, from the file at `path`.

    Ranks take turns at the waves and leave each on disk; a wave that is there is not played again. The folder must be
    one that all ranks see."""
    parts, starts = f"{path}.parts", range(0, len(items), size)
    if not os.path.exists(path):
        os.makedirs(parts, exist_ok=True)
        names = [os.path.join(parts, f"{number:05d}.jsonl") for number in range(len(starts))]
        for number in tqdm(range(rank(), len(starts), world()), desc=desc, unit="wave", disable=rank() > 0):
            if not os.path.exists(names[number]):
                write_lines(names[number], work(items[starts[number] : starts[number] + size], number))
        barrier()
        if rank() == 0:
            write_lines(path, (row for name in names for row in read_lines(name)))
        barrier()
    if rank() == 0:
        shutil.rmtree(parts, ignore_errors=True)
    return read_lines(path)


def read_json(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def read_lines(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@contextlib.contextmanager
def writing(path):
    """Yields a temporary name, which takes the name `path` at the end: a reader finds the whole file or none."""
    from safetensors import SafetensorError

    try:
        yield f"{path}.partial"
        os.replace(f"{path}.partial", path)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"cannot write {path} ({getattr(error, 'strerror', None) or error}); what was finished is kept: "
                       "make room and run the same command again to go on") from None  # fmt: skip


def write_file(path, text):
    with writing(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_lines(path, rows):
    write_file(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_folder(path, fill):
    """The same for a folder: fill(partial) writes into a temporary folder, which then takes its name."""
    with writing(path) as partial:
        shutil.rmtree(partial, ignore_errors=True)
        os.makedirs(partial)
        fill(partial)
        shutil.rmtree(path, ignore_errors=True)


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

    import data
    import refuel

    with refuel.one_line("simulator.py"):
        cfg, extra = refuel.read_config(sys.argv[1:], __doc__, show=dict(type=int, default=3))
        refuel.start_processes()
        cfg = refuel.replace(cfg, policy=prepare_checkpoint(cfg.policy), num_prompts=4 * extra["show"])
        policy, user, reward = refuel.load_speakers(cfg.policy, cfg)
        rng = refuel.np.random.default_rng(cfg.seed)
        pairs = refuel.collect(data.train_prompts(cfg, policy.tokenizer, 0), policy, user, reward, cfg, rng)
        print("\n\n".join(show(pair, policy.tokenizer) for pair in pairs[: extra["show"]]))


if __name__ == "__main__":
    from simulator import main  # as the module that everybody imports, not as a second copy

    main()
