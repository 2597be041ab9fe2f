"""What waiting costs on GPUs, by a discrete-event model: one of the eight GPUs of setting one, engine step by engine step.

    python tests/waiting.py                     64, 128 and 256 prompts in flight on each GPU; a minute
    python tests/waiting.py --prompts 64 --waves 1

A GPU has its own policy (8B) and an eighth of the user (70B, tensor parallel), which serves as many dialogues of each
other GPU. A step gives one token to each of an engine's requests and reads the prompts of new ones: it takes the longer
of reading (weights, keys and values) and computing, and a fixed time beside. Prefixes are cached. Lengths are lognormal
with machinery/plan.py's means, (H, h) by section 4.2's law.

    turn by turn        all wait for the longest answer, then for the slowest user; second futures after all first ones
    its own pace        simulator.converse, a wave at a time
    and no waves        the same where a new prompt begins as soon as one has ended: what waves still cost

How two engines at work at once slow each other down decides, and is an assumption:

    slices              each has the GPU half the time: two processes without MPS
    needs               one that reads and one that computes hinder each other as far as their needs add up to more than 1
    apart               not at all: as many GPUs of the user's own
"""
import argparse
import heapq
import os
import random
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from machinery import plan  # noqa: E402

GPUS = 8
READS, COMPUTES = 0.7 * 3.35e12, 0.5 * 989e12  # bytes and FLOPs a second: an H100's, by shares that kernels reach (assumed)
BESIDE = 2e-3  # seconds of a step for launches, scheduling, sums over GPUs (assumed)
ANSWER, QUESTION, WHY = (plan.FLAGS[f"{name}_tokens"]["default"] for name in ("answer", "question", "justification"))
SPREAD = 0.45, 0.35  # standard deviation of the logarithm of an answer's and of a question's length
PROMPT = 90  # tokens of appendix C.2's own words
POLICY, USER = "meta-llama/Meta-Llama-3-8B-Instruct", "meta-llama/Llama-3.1-70B-Instruct"


class Engine:
    """A GPU's part of a model that `parts` GPUs share; what it is asked is asked by as many others too."""

    def __init__(self, name, parts):
        m = plan.shape(name)
        self.weights, self.flops, self.cache = 2 * m.P / parts, 2 * m.P, m.cache  # parts users, each a part of the work
        self.left, self.new, self.busy = {}, 0, False  # tokens that each dialogue still has to say; tokens to read
        self.needs = 0.0, 0.0  # of the step in progress: shares of its time in which it reads and computes

    def begin(self, talk, reads, says):
        self.left[talk] = max(1, round(says))
        self.new += reads

    def step(self):
        """Seconds of the next step, alone on the GPU."""
        tokens, self.new = len(self.left) + self.new, 0
        seen = sum(talk.context for talk in self.left)
        reading, computing = (self.weights + seen * self.cache) / READS, tokens * self.flops / COMPUTES
        whole = max(reading, computing) + BESIDE
        self.needs = reading / whole, computing / whole
        return whole

    def end_step(self):
        for talk in self.left:
            talk.context += 1
            self.left[talk] -= 1
        done = [talk for talk, left in self.left.items() if left <= 0]
        for talk in done:
            del self.left[talk]
        return done


class Talk:
    """A dialogue: tokens so far, answers said, and where it ends; h: where a second one parts from it, if it does."""

    def __init__(self, context, said, H, h=None):
        self.context, self.said, self.H, self.h = context, said, H, h


class Gpu:
    """Both engines, the clock, and who waits for whom: `together` is turn by turn."""

    def __init__(self, together, sharing, rng):
        self.together, self.sharing, self.rng, self.now = together, sharing, rng, 0.0
        self.engines = self.policy, self.user = Engine(POLICY, 1), Engine(USER, GPUS)
        self.held, self.later, self.events, self.count = [], [], [], 0  # held: finished, but the turn is not

    def says(self, mean, spread):
        return mean * self.rng.lognormvariate(-spread**2 / 2, spread)

    def go_on(self, talk):
        """The assistant speaks next; at s_h the second dialogue parts, at once or after all first ones."""
        if talk.h == talk.said + 1:
            second = Talk(talk.context, talk.said, talk.H)
            talk.h = None
            if self.together:
                self.later.append(second)
            else:
                self.go_on(second)
        self.policy.begin(talk, QUESTION, self.says(ANSWER, SPREAD[0]))

    def finished(self, engine, talk):
        if engine is self.user:
            self.go_on(talk)
            return
        talk.said += 1
        if talk.said < talk.H:
            self.user.begin(talk, ANSWER + QUESTION + PROMPT, self.says(QUESTION + WHY, SPREAD[1]))

    def open(self):
        H = self.rng.randint(1, 5)
        self.go_on(Talk(QUESTION, 0, H, self.rng.randint(1, H)))

    def begin_step(self, engine, other):
        lasts = engine.step()
        if other.busy:
            needs = max(1.0, *(a + b for a, b in zip(engine.needs, other.needs)))
            lasts *= {"slices": 2.0, "needs": needs, "apart": 1.0}[self.sharing]
        engine.busy = True
        self.count += 1
        heapq.heappush(self.events, (self.now + lasts, self.count, engine))

    def run(self, inflight=0, queue=0):
        """Until nobody has anything to say; queue: prompts that begin when others have ended, `inflight` at once."""
        while True:
            while queue and len(self.policy.left) + len(self.user.left) < inflight:
                self.open()
                queue -= 1
            for engine, other in (self.engines, self.engines[::-1]):
                if engine.left and not engine.busy:
                    self.begin_step(engine, other)
            if not self.events:
                if not self.later:
                    return self.now
                seconds, self.later = self.later, []
                for talk in seconds:
                    self.go_on(talk)
                continue
            self.now, _, engine = heapq.heappop(self.events)
            engine.busy = False
            self.held += engine.end_step()
            if not self.together or not engine.left:
                held, self.held = self.held, []
                for talk in held:
                    self.finished(engine, talk)


def wave_seconds(prompts, waves, together, in_waves, sharing):
    """Seconds a wave of so many prompts, on the mean of several."""
    gpu = Gpu(together, sharing, random.Random(0))
    if not in_waves:  # with as many dialogues on their way as a wave has at its best
        return gpu.run(round(1.5 * prompts), prompts * waves) / waves
    for _ in range(waves):
        for _ in range(prompts):
            gpu.open()
        gpu.run()
    return gpu.now / waves


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--waves", type=int, default=4)
    args = parser.parse_args()
    print("| prompts in flight on a GPU | sharing | turn by turn, s | its own pace | times | and no waves | times |")
    print("|---" * 7 + "|")
    for prompts in args.prompts:
        for sharing in ("slices", "needs", "apart"):
            ways = (True, True), (False, True), (False, False)
            before, pace, flow = (wave_seconds(prompts, args.waves, *way, sharing) for way in ways)
            times = f"{pace:.0f} | {before / pace:.2f} | {flow:.0f} | {before / flow:.2f}"
            print(f"| {prompts} | {sharing} | {before:.0f} | {times} |")


if __name__ == "__main__":
    main()
