"""Nobody waits for the slowest: whoever speaks is given dialogues as they come and gives answers as they are finished.

    put(n, dialogue)            one more dialogue to answer; n is the caller's number for it
    take(idle) -> [(n, dialogue, answer), ...]      what is finished; idle: nobody else has work, so it may wait
    len(speaker)                how many dialogues have no answer yet
    leave()                     nobody wants the answers that are left

Three kinds: Batches (any object with a function of a batch), Threads (whose function waits for a server) and
engines.Requests (vLLM, which takes new requests while it works).
"""
import math
import queue
import threading
import time
from collections import deque
from functools import partial

from machinery.seams import ask


def policy_side(policy, dialogues):
    """The policy at its own pace: vLLM's requests, a server's threads, else all that wait as a batch."""
    if hasattr(policy, "requests"):
        return policy.requests()
    if getattr(policy, "threads", 0):
        return Threads(policy.answer, policy, dialogues, pause=0.01)  # else two sides in threads would never rest
    return Batches(policy.answer)


def user_side(user, dialogues):
    """A user who is asked in threads says in how many (`threads`); one whom a batch costs as much as a single dialogue
    says so (`patient`), and is asked when nobody else has work; any other one is asked at once."""
    reply = partial(ask, user)
    if getattr(user, "threads", 0):
        return Threads(reply, user, dialogues)
    return Batches(reply, getattr(user, "patient", False))


class Batches:
    """Answers all that wait at once, while the caller waits. patient: not before the others have nothing to do."""

    def __init__(self, answer, patient=False):
        self.answer, self.patient, self.waiting = answer, patient, []

    def __len__(self):
        return len(self.waiting)

    def put(self, n, dialogue):
        self.waiting.append((n, dialogue))

    def take(self, idle):
        if not self.waiting or (self.patient and not idle):
            return []
        batch, self.waiting = self.waiting, []
        answers = self.answer([d for _, d in batch])
        return [(n, d, answer) for (n, d), answer in zip(batch, answers, strict=True)]

    def leave(self):
        self.waiting = []


class Threads:
    """Each dialogue is asked about in a thread of its own, at most who.threads at once.

    who.limit, if there is one: the share of the dialogues that may fail; beyond it the server is left alone and those
    that still wait are given up. who.stop(), if there is one, ends what is being asked."""

    PATIENCE = 5  # seconds for the threads to end once they are stopped

    def __init__(self, answer, who, dialogues, pause=0):
        self.answer, self.who, self.pause = answer, who, pause  # pause: seconds to wait while others have work
        self.waiting, self.answered, self.asking = deque(), queue.SimpleQueue(), 0
        self.failed, self.allowed = set(), math.ceil(getattr(who, "limit", 1) * dialogues)

    def __len__(self):
        return len(self.waiting) + self.asking

    def put(self, n, dialogue):
        self.waiting.append((n, dialogue))
        self.start()

    def start(self):
        while self.waiting and self.asking < self.who.threads:
            self.asking += 1
            # daemons: a run that has failed does not wait at its end for a server
            threading.Thread(target=self.one, args=self.waiting.popleft(), name="asks", daemon=True).start()

    def one(self, n, dialogue):
        try:
            (answer,) = self.answer([dialogue])
            self.answered.put((n, dialogue, answer, None))
        except BaseException as error:  # the caller's to raise
            self.answered.put((n, dialogue, None, error))

    def take(self, idle):
        found, wait = [], None if idle else self.pause
        while self.asking:
            try:
                n, dialogue, answer, error = self.answered.get(wait != 0, wait)
            except queue.Empty:
                break
            self.asking, wait = self.asking - 1, 0
            if error:
                raise error
            found.append((n, dialogue, answer))
            if answer is None:
                self.failed.add(n)
        if len(self.failed) > self.allowed:
            found += [(n, dialogue, None) for n, dialogue in self.waiting]
            self.waiting.clear()
        self.start()
        return found

    def leave(self):
        self.waiting.clear()
        stop = getattr(self.who, "stop", None)
        deadline = time.monotonic() + self.PATIENCE
        while stop and self.asking and time.monotonic() < deadline:
            stop()
            try:
                self.answered.get(timeout=0.1)
                self.asking -= 1
            except queue.Empty:
                pass  # a thread that was between two questions
