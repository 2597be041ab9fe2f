"""Asking a language model for text, as users and judges are asked: at a server's URL, or in an engine of this process.

Both are called as ask(prompts, seeds, allowed) and yield (number of the prompt, reply, None) or (number, None, why) as
they come; a server's reply that was cut comes with a why too, and with `whole` without its text.
"""
import asyncio
import base64
import contextlib
import itertools
import json
import os
import re

import httpx2
from tqdm import tqdm

from machinery.files import BadInput, read_json
from machinery.ranks import world
from machinery.settings import seed_for
from machinery.template import checked, opening_ids, said, without_thoughts

FAILURES = 0.05  # the share of questions that may stay unanswered

# What servers say of a parameter that they do not take, in either order; the first parameter that is named is meant.
UNSUPPORTED = "unsupported|not support|unknown|unrecogni[sz]ed|unexpected|not permitted|not allowed|extra_forbidden"
PARAMETERS = "seed|max_tokens|temperature|top_p"
REFUSED = re.compile(rf"(?:{UNSUPPORTED})[^.]{{0,80}}?\b({PARAMETERS})\b|"
                     rf"\b({PARAMETERS})\b[^.]{{0,80}}?(?:{UNSUPPORTED})|"
                     r"\b(top_p)\b[^.]{0,20}? cannot both", re.IGNORECASE)  # fmt: skip
LEFT_OUT = {"seed": "it is left out, and the same question may get another reply next time",
            "max_tokens": "max_completion_tokens is sent instead",
            "temperature": "it is left out, and the replies come at the server's own temperature, which is another "
                           "distribution than was asked for",
            "top_p": "it is left out, and where the server has one of its own the replies come from another distribution"}  # fmt: skip


class Server:
    """An OpenAI-compatible server, asked a few questions at a time; bounded in tries, time and bytes.

    Tried again: time-outs, broken connections, replies that are not what they should be, 429 and 5xx. Any other status
    fails at once, redirects too. The model that a reply names is not compared: servers answer with dated names and
    aliases, and one that lies could lie there too. The key comes from the environment and goes nowhere but into the
    request's header."""

    BYTES = 1 << 20
    FAULTS = (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError, LookupError, TypeError, RecursionError)
    trust_env = True  # the proxies of the environment

    def __init__(self, url, model, timeout=120, tries=5, pause=1.0, threads=16, flag="--judge", **options):
        """options: temperature (0), max_tokens (512), whole: a reply that was cut (its finish_reason is not "stop") is
        given as empty; else as it is, with why it was cut beside it."""
        if not re.fullmatch(r"https?://[^/@?#\s]+(/[^?#\s]*)?", url):
            raise BadInput(f"{flag}: a URL is http(s)://HOST[:PORT]/v1, and the key stands in OPENAI_API_KEY only")
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not (self.key.isascii() and self.key.isprintable()):
            raise BadInput("OPENAI_API_KEY has characters that no key has")
        self.url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.model, self.timeout, self.tries, self.pause, self.flag = model, timeout, tries, pause, flag
        self.threads = max(1, threads // world())
        self.options = dict(temperature=0, max_tokens=512, whole=False) | options
        self.refused = set()  # the parameters that this server does not take
        self.certificates, self.loops = None, set()  # what is being asked, in whatever threads
        placeholder = re.fullmatch(r".{,7}|[A-Za-z _-]{,20}", self.key)  # EMPTY, not-needed: no secret, but a reply's words
        self.echo = None if placeholder else echo(self.key)

    def __call__(self, prompts, seeds=None, allowed=None):
        """(number, reply, None) or (number, None, why) as they come; given up after `allowed` failures, and what was
        not asked then has None as its why. A prompt is a text, or {"messages": a conversation, and its own max_tokens}.

        Each call has an event loop of its own, so that several threads can ask at once; it runs while the caller waits
        for the next reply."""
        allowed = FAILURES * len(prompts) if allowed is None else allowed
        seeds = [None] * len(prompts) if seeds is None else seeds
        questions = zip(itertools.count(), prompts, seeds)
        client, loop = self.client(), asyncio.new_event_loop()
        open_tasks, failed, gave_up = set(), 0, asyncio.Event()
        self.loops.add(loop)
        try:
            while True:
                for number, prompt, seed in itertools.islice(questions, self.threads - len(open_tasks)):
                    open_tasks.add(loop.create_task(self.answer(client, gave_up, number, prompt, seed)))
                if not open_tasks:
                    break
                first = asyncio.wait(open_tasks, return_when=asyncio.FIRST_COMPLETED)
                done, open_tasks = loop.run_until_complete(first)
                for task in done:
                    number, reply, why = task.result()
                    failed += reply is None
                    if failed > allowed:
                        gave_up.set()
                    yield number, reply, why
        finally:
            self.loops.discard(loop)
            loop.run_until_complete(close(client))
            loop.close()

    def stop(self):
        """End what other threads are asking: there it is a CancelledError."""
        for loop in list(self.loops):
            with contextlib.suppress(RuntimeError):  # it has ended by itself
                loop.call_soon_threadsafe(cancel, loop)

    def client(self):
        """The time-outs of a client are of single operations; ours, of a whole request, is in `post`."""
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        limits = httpx2.Limits(max_connections=None)  # there are as many as open tasks
        try:
            if self.certificates is None:  # 0.1 s to read: once, not for each question of a thread
                self.certificates = httpx2.create_ssl_context(trust_env=self.trust_env)
            return httpx2.AsyncClient(headers=headers, timeout=None, limits=limits, trust_env=self.trust_env,
                                      verify=self.certificates)  # fmt: skip
        except (ImportError, *self.FAULTS) as error:
            why = self.one_line(str(error))
            raise BadInput(f"{self.flag}: the environment's proxy or certificates: {why}") from None

    async def answer(self, client, gave_up, number, prompt, seed):
        """(number, reply, None), or (number, None, why there is none); why is None where nobody asks any more."""
        why = None
        for k in range(self.tries):
            if k > 0:
                await asyncio.sleep(self.pause * 2 ** (k - 1))
            if gave_up.is_set():
                break
            try:
                status, data = await self.request(client, prompt, seed)
                if status == 200:
                    reply, cut = self.read(data)
                    return number, self.hidden(reply), cut
                why = self.one_line(f"HTTP {status} {data.decode(errors='replace')}")
                if status != 429 and status < 500:
                    break
            except self.FAULTS as error:
                why = self.one_line(f"{type(error).__name__} {error}")
        return number, None, why

    async def request(self, client, prompt, seed):
        """(status, body) of the server's reply, asked again without each parameter that it does not take."""
        while True:
            body = self.body(prompt, seed)
            status, data = await self.post(client, json.dumps(body).encode())
            found = REFUSED.search(data.decode(errors="replace")) if status in (400, 422) else None
            name = next(filter(None, found.groups())) if found else None
            if name not in body:
                return status, data
            if name not in self.refused:  # else another question has said so meanwhile
                self.refused.add(name)
                said = self.one_line(data.decode(errors="replace"))
                tqdm.write(f"{self.flag} {self.model} does not take {name}: {LEFT_OUT[name]} ({said})")

    def body(self, prompt, seed):
        asked = self.options | (prompt if isinstance(prompt, dict) else {"messages": [{"role": "user", "content": prompt}]})
        body = {"model": self.model, "messages": asked["messages"]}
        if "temperature" not in self.refused:
            body["temperature"] = asked["temperature"]
        if asked["temperature"] and "top_p" not in self.refused:
            body["top_p"] = 1  # else vLLM takes what the checkpoint's generation_config.json says
        if "max_tokens" in self.refused:
            body["max_completion_tokens"] = asked["max_tokens"]
        else:
            body["max_tokens"] = asked["max_tokens"]
        if seed is not None and "seed" not in self.refused:
            body["seed"] = (seed ^ seed >> 31) & 0x7FFFFFFF  # some servers take no more than 31 bits
        return body

    async def post(self, client, body):
        """(status, body) of one request."""
        data = bytearray()
        try:
            async with asyncio.timeout(self.timeout), client.stream("POST", self.url, content=body) as response:
                async for chunk in response.aiter_raw():
                    data += chunk
                    if len(data) > self.BYTES:
                        raise ValueError("a reply of more than 1 MB")
        except TimeoutError:
            raise TimeoutError("the reply takes too long") from None
        return response.status_code, data

    def read(self, data):
        """(text, None) of a reply, or ("", why it was cut); ValueError in the server's words where there is no text."""
        reply = json.loads(data)
        if "choices" not in reply and "error" in reply:
            raise ValueError(f"error {json.dumps(reply['error'], ensure_ascii=False)}")
        choice = reply["choices"][0]
        message, finish = dict(choice["message"]), choice.get("finish_reason")
        text = message.get("content")
        said = ""
        if not isinstance(text, str):  # a refusal, a call of a tool, reasoning alone
            said = json.dumps({k: v for k, v in message.items() if v and k != "role"}, ensure_ascii=False)
        cut = None
        if finish not in (None, "stop"):
            cut = self.one_line(f"a reply that was cut, finish_reason {finish} {said}")
        if self.options["whole"] and cut:
            return "", cut
        if not isinstance(text, str):
            raise ValueError(f"a reply without text, finish_reason {finish}: {said}")
        if finish not in (None, "stop", "length"):  # half an answer, and no token limit that it met
            raise ValueError(cut)
        return without_thoughts(text), cut

    def hidden(self, text):
        """The text without the key, should the server echo it."""
        return self.echo.sub("***", text) if self.echo else text

    def one_line(self, text):
        return " ".join(self.hidden(text).encode("utf-8", "replace").decode().split())[:200]


def echo(key):
    """What a key looks like when it comes back: as it is, escaped for JSON or a URL (once or inside each other), or in
    base64, in whichever of its three alignments and two alphabets."""
    forms = [key]
    for skip, first in enumerate((0, 2, 3)):  # first: the characters that depend on what stands before the key
        encoded = base64.b64encode(b"\0" * skip + key.encode()).decode()
        last = len(encoded) if (skip + len(key)) % 3 == 0 else encoded.index("=") - 1
        forms.append(encoded[first:last])
    patterns = []
    for form in forms:
        pattern = ""
        for c in form:
            plain = {"+": "[+-]", "/": "[/_]"}.get(c, re.escape(c)) if form is not key else re.escape(c)
            pattern += rf"(?:\\{{0,4}}{plain}|\\{{1,4}}u(?i:{ord(c):04x})|%(?:25){{0,3}}(?i:{ord(c):02x}))"
        patterns.append(pattern)
    return re.compile("|".join(patterns))


def cancel(loop):
    for task in asyncio.all_tasks(loop):
        task.cancel()


async def close(client):
    """End what is still asked: Ctrl-C and a generator that is left alone do not wait for a server that stalls."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await client.aclose()


class Local:
    """A checkpoint that is asked like a Server, in an engine of this process.

    wave: questions that the engine answers at once; whole: a reply that was cut is given as empty."""

    def __init__(self, engine, wave, whole=False):
        self.engine, self.wave, self.whole = engine, wave, whole

    def __call__(self, prompts, seeds=None, allowed=None):
        seeds = seeds or prompts
        for start in range(0, len(prompts), self.wave):
            part = slice(start, start + self.wave)
            rows = []
            for prompt, seed in zip(prompts[part], seeds[part], strict=True):
                rows.append((opening_ids(self.engine.tokenizer, checked(prompt)), seed_for("ask", seed, 0, "policy")))
            for i, answer in enumerate(self.engine.answer_ids(rows), start):
                yield i, *self.read(answer)

    def read(self, answer):
        """(reply, None), or (None, why there is none)."""
        if answer is None:
            return None, "a prompt longer than the model's context"
        ids, cut, _ = answer
        if self.whole and cut:
            return "", None
        return said(self.engine.tokenizer, ids, cut), None


def longest_prompt(path, room):
    """`room`, or what the checkpoint's positions allow."""
    return min(read_json(os.path.join(path, "config.json")).get("max_position_embeddings") or room, room)
