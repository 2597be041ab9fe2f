"""Every dialogue at its own pace: the same conversations as turn by turn, nobody waiting, and nothing left behind."""
import signal
import threading
import time
from collections import Counter

from helpers import Talker
import numpy as np
import pytest

import bench
import refuel
import toy
from machinery.ask import Server
from machinery.files import BadInput
from machinery.users import LLMUser
from simulator import Dialogue, futures, rollout

TOKENIZER = toy.make_tokenizer()


def starts(n):
    return [Dialogue.start(TOKENIZER, "something red please", stream=(i,)) for i in range(n)]


class Moody(Talker):
    """A policy and a user who now and then have nothing to say."""

    def answer(self, dialogues):
        return [None if d.seed("too long") % 9 == 0 else a for d, a in zip(dialogues, super().answer(dialogues))]

    def reply(self, dialogues):
        return [None if d.seed("silent") % 9 == 0 else r for d, r in zip(dialogues, super().reply(dialogues))]


@pytest.mark.parametrize("threads", [0, 3])
def test_both_futures_are_those_of_one_loop_after_the_other_turn_by_turn(threads):
    """Roll-ins that begin anywhere, dialogues that fail on either side of the reset, users asked in threads or not."""
    speaker, dropped, before = Moody(), Counter(), Counter()
    speaker.threads = threads
    begun = rollout(starts(60), Talker(), Talker(), [1 + i % 3 for i in range(60)])
    h, H = refuel.sample_resets(300, 5, np.random.default_rng(0))
    states = [*starts(240), *(d.reset(min(len(d.spans), int(n))) for d, n in zip(begun, h[240:]))]
    new, old = (loop(states, h, H, list(range(300)), speaker if loop is futures else Moody(), speaker, counter)
                for loop, counter in ((futures, dropped), (bench.one_then_the_other, before)))  # fmt: skip
    assert [(vars(a), vars(b), turn) for a, b, turn in new] == [(vars(a), vars(b), turn) for a, b, turn in old]
    assert dropped == before and min(dropped["user"], dropped["too long"]) > 9 and 50 < len(new) < 250
    assert all(a.stream == (s, 0) and b.stream == (s, 1) for (a, b, _) in new for s in (a.stream[0],))


class Working:
    """A policy like vLLM's engine: it takes requests while it works, and a dialogue of stream (i, ...) needs i + 1 steps."""

    def __init__(self):
        self.tokenizer, self.left, self.most = TOKENIZER, [], 0

    def requests(self):
        return self

    def __len__(self):
        return len(self.left)

    def put(self, n, d):
        self.left.append([d.stream[0] + 1, n, d])
        self.most = max(self.most, len(self.left))

    def take(self, idle):
        for row in self.left:
            row[0] -= 1
        done = [row for row in self.left if row[0] == 0]
        self.left = [row for row in self.left if row[0] > 0]
        return [(n, d, ([7, 2], False, -1.0)) for _, n, d in done]

    def leave(self):
        pass


def test_a_scripted_user_answers_while_the_policy_works_and_a_patient_one_waits_for_a_whole_batch():
    for patient, batches in ((False, [[0], [0], [1], [1]]), (True, [[0, 1], [0, 1]])):
        talker, asked = Talker(), []
        reply = talker.reply
        talker.reply = lambda dialogues: asked.append([d.stream[0] for d in dialogues]) or reply(dialogues)
        talker.patient = patient
        states = [d.copy(stream=(i * 9,)) for i, d in enumerate(starts(2))]
        done = rollout(states, Working(), talker, [3, 3])
        assert [len(d.spans) for d in done] == [3, 3] and [[i // 9 for i in batch] for batch in asked] == batches


def test_both_futures_of_a_state_begin_at_once():
    policy = Working()
    futures(starts(1), [1], [1], [0], policy, Talker(), Counter())
    assert policy.most == 2


def test_nobody_waits_for_the_slowest_reply():
    """The first question is answered only when all others are, of every turn: turn by turn that would never be."""
    others = threading.Semaphore(0)

    class User(Talker):
        threads = 4

        def reply(self, dialogues):
            (d,) = dialogues  # a dialogue at a time
            if d.stream == (0,) and len(d.spans) == 1:
                assert all(others.acquire(timeout=20) for _ in range(3 * 3))
            elif d.stream != (0,):
                others.release()
            return super().reply(dialogues)

    done = rollout(starts(4), Talker(), User(), [4] * 4)
    assert [len(d.spans) for d in done] == [4] * 4 and not any(d.failed for d in done)


def test_two_sides_in_threads_rest_while_both_wait():
    class Slow(Talker):
        threads = 4

        def answer(self, dialogues):
            time.sleep(0.1)
            return super().answer(dialogues)

        def reply(self, dialogues):
            time.sleep(0.1)
            return super().reply(dialogues)

    begun = time.thread_time()
    done = rollout(starts(6), Slow(), Slow(), [3] * 6)
    assert [len(d.spans) for d in done] == [3] * 6 and time.thread_time() - begun < 0.3  # of a second in all


# --- bad days ---------------------------------------------------------------------------------------------------


def asking():
    return [thread for thread in threading.enumerate() if thread.name.startswith("asks")]


def slow_user(url, limit=1.0, threads=16):
    return LLMUser(Server(url, "slow", timeout=120, tries=2, pause=0.01, threads=threads, whole=True), 500, limit)


def test_an_error_in_a_thread_stops_the_run_and_ends_what_the_others_ask(serve):
    """One reply is not what a server says and the user's own code fails on it; the others' stall."""
    server = serve(lambda prompt, n: None)
    user, begun = slow_user(server.url), time.monotonic()
    whole = user.reply

    def reply(dialogues):
        if dialogues[0].stream == (3,):
            time.sleep(0.5)
            raise ValueError("no such word")
        return whole(dialogues)

    user.reply = reply
    with pytest.raises(BadInput, match="--user failed at .*no such word.*something red please"):
        rollout(starts(8), Talker(), user, [2] * 8)
    assert time.monotonic() - begun < 5 and not asking() and len(server.requests) == 7


@pytest.fixture
def listening():
    """To SIGINT, which a suite that a shell has started in its background would not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_the_threads(serve, listening):
    main = threading.main_thread().ident
    server = serve(lambda prompt, n: signal.pthread_kill(main, signal.SIGINT) if n == 8 else None)  # nothing is answered
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        rollout(starts(8), Talker(), slow_user(server.url), [2] * 8)
    assert time.monotonic() - begun < 5 and not asking()


def test_a_server_that_fails_too_often_is_left_alone(serve):
    server = serve(lambda prompt, n: (404, b"no such model"))
    done = rollout(starts(40), Talker(), slow_user(server.url, limit=0.05, threads=1), [3] * 40)
    assert [d.failed for d in done] == ["user"] * 40 and len(server.requests) == 3
