"""Asking a language model for text, as users and judges are asked: at a server's URL, or in an engine of this process.

Both are called as ask(prompts, seeds, allowed) and yield (number of the prompt, reply, None) or (number, None, why) as
they come.
"""
import contextlib
import http.client
import json
import os
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed

from machinery.files import BadInput, read_json
from machinery.ranks import world
from machinery.settings import seed_for
from machinery.template import checked, opening_ids

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
        return self.engine.tokenizer.decode(ids, skip_special_tokens=True).strip(), None


def longest_prompt(path, room):
    """`room`, or what the checkpoint's positions allow."""
    return min(read_json(os.path.join(path, "config.json")).get("max_position_embeddings") or room, room)
