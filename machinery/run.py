"""A run's folder: what is finished is kept there, and the same command resumes from it.

    config.json              the configuration; another one is refused
    metrics.jsonl            one object a line; metrics.png: its curves
    iter_1/pairs.jsonl       pairs, then iter_1/logps.jsonl: ln pi_t (and ln pi_0) of both responses
    iter_1/training/         the training in progress; setting two: training/, since iterations are its updates
    iter_1/policy/           what the iteration ends with
"""
import contextlib
import json
import math
import os
import shutil
import time
from collections import Counter
from dataclasses import asdict

import numpy as np
import torch

from machinery import files, fsdp, plan, watch
from machinery.data import shares
from machinery.files import BadInput, iteration_folder, kept_policies, policy_folder
from machinery.held_out import HeldOut, remove_best
from machinery.logps import old_logps
from machinery.meter import describe
from machinery.pairs import read_pairs
from machinery.ranks import bar, barrier, beside_bar, dtype, in_waves, on_rank_0, rank, say, world
from machinery.seams import malformed
from machinery.settings import SETTINGS, engine_name
from machinery.template import load_tokenizer
from machinery.users import check_failures


STARTED = {"config.json.partial", "user_0.log", ".lock"}  # what may lie in a folder before it is a run's


def check_folder(cfg, made_of):
    """--out is new, or a run of this configuration, of the same inputs, on this number of processes."""
    path = os.path.join(cfg.out, "config.json")
    if os.path.exists(path):
        check_same(cfg, made_of, files.read_json(path))
        state = os.path.join(cfg.out, "training", "step.json")
        ranks = files.read_json(state)["ranks"] if os.path.exists(state) else world()
        if ranks != world():
            raise BadInput(f"{cfg.out} was trained by {ranks} processes: resume with as many")
    elif os.path.exists(cfg.out):
        if not os.path.isdir(cfg.out) or set(os.listdir(cfg.out)) - STARTED:
            raise BadInput(f"--out {cfg.out} exists and is not a run's folder")


def different(old, new, longest=math.inf):
    """What two mappings differ in, with both values where they are not longer than a person reads."""
    found = []
    for name in sorted(new.keys() | old.keys()):
        if old.get(name) != new.get(name):
            values = f"{old.get(name)} there, {new.get(name)} now"
            found.append(f"{name} ({values})" if len(values) < longest else name)
    return ", ".join(found)


def check_same(cfg, made_of, old):
    """A config.json against this command's configuration, then against what its inputs are now."""
    old, old_inputs = {k: v for k, v in old.items() if k != "made_of"}, old.get("made_of")
    other = different(old | {"out": cfg.out}, asdict(cfg))  # a folder may have been moved
    if other:
        raise BadInput(f"{cfg.out} is a run with another {other}: choose another --out")
    if old_inputs is None:
        raise BadInput(f"{cfg.out} does not say what it was made of: choose another --out")
    other = different(old_inputs, made_of, longest=60)  # a hash says nothing to a person
    if other:
        raise BadInput(f"{cfg.out} was made with another {other}: put back what has changed, or choose another --out")


def open_folder(cfg, made_of):
    """Make --out this run's by its config.json; made_of(cfg): {input: its fingerprint or version}.

    Rank 0 alone looks and writes: others would see a folder that is half made."""

    def claim():
        inputs = made_of(cfg)
        check_folder(cfg, inputs)
        os.makedirs(cfg.out, exist_ok=True)
        files.lock(cfg.out)
        check_folder(cfg, inputs)  # another process may have been quicker
        path = os.path.join(cfg.out, "config.json")
        if not os.path.exists(path):
            files.write_file(path, json.dumps(asdict(cfg) | {"made_of": inputs}, indent=1))

    on_rank_0(claim)


def announce(cfg, track=None):
    """What runs, and where: first what differs from the setting's own values, then all the rest. track: what --track
    names, which is told every row from here on."""
    watch.TRACK["with"] = track
    if rank() > 0:
        return
    own, values = SETTINGS[cfg.setting], asdict(cfg)
    changed = [name for name in values if name in own and own[name] != values[name]]
    for title, names in (("differs from the setting:", changed), ("as in the setting:", values.keys() - changed)):
        print(title if names else f"nothing {title.removesuffix(':')}")
        for name in (name for name in values if name in names):
            print(f"  {name:26s}{values[name]}")
    found = ", ".join(f"{name} {version}" for name, version in files.versions().items() if name != "code")
    kind = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads a process"
    print(f"{world()} processes on {kind}, {dtype()}; engine {engine_name(cfg)}; {found}", flush=True)
    hours = plan.estimate(cfg)
    if hours:
        print(f"the plan: {hours}", flush=True)


LOGGED = {}  # of each metrics.jsonl the place and the number of this process's last line


def log(cfg, row):
    """One more line in metrics.jsonl. This process's first one writes the file anew, without what a stopped run left
    beyond its last saved state or torn; a full disk costs no other line."""
    path = os.path.join(cfg.out, "metrics.jsonl")

    def place(row):
        return row["iteration"], row["phase"], row.get("step", row.get("wave", math.inf))

    last, number = LOGGED.get(path, (None, 0))
    if os.path.exists(path) and last and last < place(row):
        files.append_line(path, row)
    else:
        old = [r for r in files.read_lines(path, torn=True) if place(r) < place(row)] if os.path.exists(path) else []
        files.write_lines(path, [*old, row])
        number = len(old)
    LOGGED[path] = place(row), number + 1
    watch.track(cfg.out, row, number + 1)


class Run:
    """A training and its folder; every rank calls each method.

    cfg, model, optimizer: the training, live
    t, folder: the iteration in progress; after __init__ t is the last one that is finished
    pi_0: this rank's part of the first weights that learn, where Eq. 11 asks for them"""

    def __init__(self, cfg, model, optimizer):
        self.cfg, self.model, self.optimizer = cfg, model, optimizer
        self.pi_0 = {name: p.clone() for name, p in fsdp.learned_weights(model).items()} if cfg.gamma else None
        self.t = self.resume()
        self.folder = None
        path = os.path.join(cfg.out, "metrics.jsonl")
        self.clock = watch.Clock(cfg.iterations, files.read_lines(path, torn=True) if os.path.exists(path) else ())

    def begin(self, t):
        self.t, self.folder = t, iteration_folder(self.cfg.out, t)

    def checkpoint_of(self, t):
        """The checkpoint that iteration t ended with; pi_1 for 0."""
        return policy_folder(self.cfg.out, t) if t else self.cfg.policy

    def resume(self):
        """Bring a stopped run's weights back, in setting two its optimiser too; returns the last finished iteration."""
        cfg = self.cfg
        kept = {t: path for t, path in kept_policies(cfg.out).items() if t <= cfg.iterations}
        done = max(kept, default=0)
        if cfg.one_training and done < cfg.iterations:
            saved = max(0, fsdp.load_training(cfg.out, self.model, self.optimizer) - 1)
            if done >= cfg.checkpoint_steps and not saved:
                raise BadInput(f"{cfg.out} has kept policies up to update {done}, but its training/ is gone, without which "
                               "it cannot be continued: put it back, or choose another --out")  # fmt: skip
            done = saved
            barrier()
            if rank() == 0:
                self.forget(done)
            barrier()
        elif done:
            fsdp.read_slices(self.model, kept[done])
            remove_best(iteration_folder(cfg.out, done))  # of a run that was stopped once its policy was written
            fsdp.remove_training(iteration_folder(cfg.out, done))
            fsdp.remove_training(cfg.out)
        return done

    def forget(self, done):
        """Setting two: what came after the saved state is done again, with data of its own."""
        if not os.path.isdir(self.cfg.out):
            return
        for name in os.listdir(self.cfg.out):
            prefix, _, t = name.rpartition("_")
            folder = os.path.join(self.cfg.out, name)
            if prefix == "iter" and (int(t) > done or not os.path.isdir(os.path.join(folder, "policy"))):
                shutil.rmtree(folder)

    # --- pairs ---------------------------------------------------------------------------------------------------

    def pairs(self, prompts, play, read, speakers):
        """The iteration's pairs, in waves: every rank plays its waves and keeps each on disk. A wave has its own random
        numbers, so the pairs do not depend on the number of ranks or on where a run was stopped.

        With --pairs they are read instead. play(prompts of a wave, rng, dropped) -> pairs; read: a pair from its line of
        pairs.jsonl; speakers: {name: who speaks}, whose `tokens`, if it has any, are logged."""
        cfg, start = self.cfg, time.monotonic()
        if cfg.pairs:
            os.makedirs(self.folder, exist_ok=True)
            pairs = [read(row) for row in read_pairs(cfg, load_tokenizer(cfg.policy), cfg.num_prompts)]
            if rank() == 0:
                self.report_pairs(pairs, len(pairs), Counter(), [0, 0], {}, round(time.monotonic() - start, 1), resumed=True)
            return pairs

        path = os.path.join(self.folder, "pairs.jsonl")
        if not on_rank_0(lambda: os.path.exists(path)):
            self.forget_computed()
        resumed = os.path.exists(path) or os.path.exists(f"{path}.parts")
        self.played = 0  # waves, by this process
        self.spent = (self.row_of(self.t, "collect") or {}).get("seconds", 0) if resumed else 0  # before the run was stopped
        asked = Counter()  # dialogues, by this process, and the user's failures
        tokens = {name: s.tokens for name, s in speakers.items() if hasattr(s, "tokens")}
        for counter in tokens.values():
            counter.clear()

        def wave(rows, number):
            dropped, began, sampled = Counter(), time.monotonic(), tokens.get("policy", {}).get("decode", 0)
            pairs = play(rows, np.random.default_rng([cfg.seed, self.t, number]), dropped)
            asked.update(dialogues=len(rows), failed=dropped["user"])
            check_failures(dropped["user"], len(rows), cfg)
            check_failures(asked["failed"], asked["dialogues"], cfg)  # many small waves round up to much
            broken = malformed(speakers.get("reward"), [d for pair in pairs for d in pair.dialogues])
            if number == 0 and len(pairs) >= 16 and all(p.rewards[0] == p.rewards[1] for p in pairs):
                raise BadInput(f"--reward {cfg.reward} gives both conversations of each of {len(pairs)} pairs the same "
                               "number: there is nothing to learn from it")  # fmt: skip
            sampled = tokens.get("policy", {}).get("decode", 0) - sampled
            if len(prompts) > cfg.wave and rank() == 0 and not cfg.one_training:
                speed = sampled / max(1e-9, time.monotonic() - began)
                self.report_wave(number, -(-len(prompts) // cfg.wave), pairs, dropped, speed, start)
            return [{"dropped": dropped, "malformed": broken}, *(pair.to_json() for pair in pairs)]

        rows = in_waves(path, prompts, cfg.wave, wave, f"iteration {self.t} of {cfg.iterations}: collect")
        pairs, dropped, broken = [], Counter(), np.zeros(2)
        for row in rows:
            if "dropped" in row:
                dropped.update(row["dropped"])
                broken += row["malformed"]
            else:
                pairs.append(read(row))
        if not pairs:
            raise BadInput(f"no pair is left of {len(prompts)} prompts: {dict(dropped)}")
        if rank() == 0:
            seconds = round(self.spent + time.monotonic() - start, 1)
            self.report_pairs(pairs, len(prompts), dropped, broken, tokens, seconds, resumed)
        return pairs

    def forget_computed(self):
        """What was computed of pairs that somebody has removed is not that of the new ones."""
        if rank() == 0 and os.path.isdir(self.folder):
            remove_best(self.folder)
            shutil.rmtree(os.path.join(self.folder, "logps.jsonl.parts"), ignore_errors=True)
            for name in ("logps.jsonl", "logps.jsonl.sha256"):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(self.folder, name))
        fsdp.remove_training(self.folder)
        barrier()

    def report_wave(self, number, waves, pairs, dropped, speed, start):
        """A line of metrics.jsonl for each wave of rank 0, before the wave is kept: one that is played again is logged again."""
        seconds = time.monotonic() - start
        row = {"iteration": self.t, "phase": "collect", "wave": number, "pairs": len(pairs), "dropped": dropped,
               "tokens_per_second": round(speed), "seconds": round(self.spent + seconds, 1)}  # fmt: skip
        words = f"iteration {self.t}, wave {number + 1} of {waves}: {len(pairs)} pairs"
        if pairs:
            row |= {"reward": float(np.mean([p.rewards for p in pairs])), "truncated": cut_answers(pairs)}
            words += f", reward {row['reward']:.4g}, cut {row['truncated']:.1%}"
        say(f"{words}, dropped {dict(dropped)}, {speed:.0f} tokens a second")
        log(self.cfg, row)
        self.played += 1
        left = self.clock.left(self.t, "collect", self.played, len(range(number + world(), waves, world())), seconds)
        beside_bar(f"reward {row['reward']:.4g}, {left}" if pairs else left)
        watch.redraw(self.cfg.out)

    def report_pairs(self, pairs, prompts, dropped, broken, tokens, seconds, resumed):
        """The collection's line of metrics.jsonl; resumed: an earlier start may have logged it."""
        if all(p.rewards[0] == p.rewards[1] for p in pairs):
            print(f"iteration {self.t}: in no pair do the two rewards differ; Eq. 1 then keeps the policy as it is", flush=True)
        below = np.mean([reward < self.cfg.penalty for p in pairs for reward in p.rewards])
        if self.cfg.penalty and below > 0.5:
            print(f"iteration {self.t}: {below:.0%} of the rewards lie below --penalty {self.cfg.penalty:g}, so that an answer "
                  "that is cut is better than they are", flush=True)  # fmt: skip
        known = self.row_of(self.t, "collect") if resumed else None
        if known and "wave" not in known:  # these seconds are of reading a file
            return
        reward_N = np.mean([p.rewards for p in pairs], axis=1)  # the two of a pair share a prefix: not independent
        row = {"iteration": self.t, "phase": "collect", "pairs": len(pairs), "dropped": dropped,
               "reward": float(reward_N.mean()), "reward_error": float(reward_N.std() / len(pairs) ** 0.5),
               "P(H)": shares([p.H for p in pairs]), "P(h)": shares([p.h for p in pairs]),
               "pair_tokens": sum(len(p.prefix) + len(p.y) + len(p.y2) for p in pairs), "tokens": tokens,
               "seconds": seconds}  # fmt: skip
        if any(truncated for p in pairs for truncated in p.truncated):  # published pairs do not say
            row["truncated"] = cut_answers(pairs)
        if broken[1]:
            row["malformed"] = round(broken[0] / broken[1], 5)
        print(f"{len(pairs)} pairs of {prompts} prompts; P(H) {row['P(H)']}, P(h) {row['P(h)']}; dropped: {dict(dropped)}",
              flush=True)  # fmt: skip
        before = self.row_of(self.t - 1, "collect")
        spoke = any(math.isfinite(logp) for p in pairs for logp in p.engine_logps)  # and not a data set
        if before and spoke and not self.cfg.one_training:  # two updates of 32 prompts differ by their prompts
            for line in gone_bad(row, before):
                print(line, flush=True)
        log(self.cfg, row)
        self.clock.finished("collect", seconds)
        watch.redraw(self.cfg.out, phase_ends=True)

    def row_of(self, t, phase):
        """The last line that metrics.jsonl has of an iteration's phase; None if there is none."""
        return next(reversed(self.rows_of(t, phase)), None)

    def rows_of(self, t, phase):
        path = os.path.join(self.cfg.out, "metrics.jsonl")
        rows = files.read_lines(path, torn=True) if t and os.path.exists(path) else []
        return [row for row in rows if (row["iteration"], row["phase"]) == (t, phase)]

    # --- ln pi_t and ln pi_0 -------------------------------------------------------------------------------------

    def with_logps(self, pairs):
        """The pairs with ln pi_t of both responses, and ln pi_0 for Eq. 11; from logps.jsonl if the iteration was stopped
        after they had been computed."""
        path = os.path.join(self.folder, "logps.jsonl")
        if not on_rank_0(lambda: os.path.exists(path)):
            start = time.monotonic()
            logps = self.compute_logps(pairs, f"{path}.parts")
            base = logps
            if self.cfg.gamma:
                with fsdp.exchanged(self.model, self.pi_0):
                    base = self.compute_logps(pairs, f"{path}.parts/pi_0", "ln pi_0")
            self.report_logps(pairs, logps, base, start)
            if rank() == 0:
                files.write_sealed(path, [[*new, *old] for new, old in zip(logps, base)])
            barrier()
        if rank() == 0:
            shutil.rmtree(f"{path}.parts", ignore_errors=True)
        found = []
        for pair, row in zip(pairs, files.read_sealed(path), strict=True):
            found.append(pair._replace(logps=tuple(row[:2]), base_logps=tuple(row[2:])))
        return found

    def compute_logps(self, pairs, folder, what="ln pi"):
        """ln pi_t or ln pi_0, the pairs of checkpoint_steps batches at a time, each part kept on disk until all are done: a kill
        costs no more here than in training."""
        size = self.cfg.batch_size * self.cfg.checkpoint_steps
        if len(pairs) <= size:
            return self.checked_logps(pairs)
        logps = []
        for start in bar(range(0, len(pairs), size), f"iteration {self.t} of {self.cfg.iterations}: {what}"):
            part = os.path.join(folder, f"{start:08d}.jsonl")
            if on_rank_0(lambda part=part: os.path.exists(part)):
                logps += files.read_sealed(part)
                continue
            new = self.checked_logps(pairs[start : start + size])
            logps += new
            if rank() == 0:
                os.makedirs(folder, exist_ok=True)
                files.write_sealed(part, new)
        return logps

    def checked_logps(self, pairs):
        logps = old_logps(self.model, pairs, self.cfg).tolist()
        for pair, row in zip(pairs, logps):
            if not math.isfinite(sum(row)):
                raise BadInput(f"ln pi is not finite: {describe(pair._replace(logps=tuple(row)))}")
        return logps

    def report_logps(self, pairs, logps, base, start):
        """How far the engine that sampled is from the weights that are trained; too far, and every rank stops."""
        row = {"iteration": self.t, "phase": "logps"}
        gap = engine_gap(pairs, logps)
        if gap is not None:
            row |= {"engine_gap": float(f"{gap:.3g}")} | self.moved(pairs, logps)
        if self.cfg.gamma:
            row["kl_0"] = float(np.mean(np.subtract(logps, base)))
        row["seconds"] = round(time.monotonic() - start, 1)
        self.clock.finished("logps", row["seconds"])
        if rank() == 0:
            print(", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
            log(self.cfg, row)
            watch.redraw(self.cfg.out, phase_ends=True)
        check_gap(gap, self.t)

    def moved(self, pairs, logps):
        """KL(pi_t, pi_{t-1}) of a response in nats, from pi_t's own samples, and its error: what the last iteration did.
        In training `kl` is known from pi_{t-1}'s samples alone, among which what only pi_t says hardly occurs. Of 500
        pairs; the model is the last iteration's for a moment."""
        if self.t == 1 or self.cfg.one_training:  # an update of setting two leaves no checkpoint
            return {}
        few = pairs[:500]
        fsdp.read_slices(self.model, self.checkpoint_of(self.t - 2))
        before = old_logps(self.model, few, self.cfg).numpy()
        fsdp.read_slices(self.model, self.checkpoint_of(self.t - 1))
        ratio_N2 = np.array(logps[: len(few)]) - before
        error = ratio_N2.mean(1).std() / len(few) ** 0.5
        return {"kl_own": float(f"{ratio_N2.mean():.4g}"), "kl_own_error": float(f"{error:.2g}")}

    # --- training ------------------------------------------------------------------------------------------------

    def hold_out(self, pairs, loss_fn):
        """The pairs that are trained on: all but the last --validation ones. Their rewards are Eq. 11's, whose penalty can
        make equal what the reward told apart."""
        differ = np.mean([pair.rewards[0] != pair.rewards[1] for pair in pairs])
        if self.cfg.penalty and differ < 0.1 and rank() == 0:
            print(f"iteration {self.t}: with --penalty for cut answers the two rewards differ in {differ:.1%} of the pairs; the "
                  "others teach nothing: more --max-new-tokens would leave more answers whole", flush=True)  # fmt: skip
        self.held_out = HeldOut(pairs, self.cfg, loss_fn, self.t)
        return self.held_out.training

    def first_step(self):
        """The step at which the iteration's training resumes."""
        self.start = time.monotonic()
        saved = fsdp.load_training(self.folder, self.model, self.optimizer)
        rows = on_rank_0(lambda: [r for r in self.rows_of(self.t, "regress") if r["step"] < saved]) if saved else []
        self.spent = rows[-1]["seconds"] if rows else 0  # before the run was stopped
        self.begun = self.held_out.resume(saved, rows)
        return self.begun

    def after_step(self, step, metrics):
        """Log a step's metrics; now and then look at the held-out pairs and save the training in progress. Returns
        whether the training is over before its last epoch is."""
        cfg, looks = self.cfg, self.held_out.due(step)
        if looks:
            metrics |= self.held_out.look(self.model, step)
        if rank() == 0:
            seconds = round(self.spent + time.monotonic() - self.start, 1)
            row = {"iteration": self.t, "phase": "regress", "step": step, "seconds": seconds}
            for name, value in metrics.items():
                row[name] = float(f"{value:.6g}") if isinstance(value, float) else value
            log(cfg, row)
            done = step + 1 - self.begun
            left = self.clock.left(self.t, "regress", done, self.held_out.steps - step - 1, time.monotonic() - self.start)
            beside_bar(f"loss {metrics['loss']:.4g}, agree {metrics['sign_agreement']:.0%}, KL {metrics['kl']:.3g}, {left}")
            watch.redraw(cfg.out)
        if looks:
            self.held_out.keep_best(self.folder, self.model, step)
        if cfg.snapshot_steps and (step + 1) % cfg.snapshot_steps == 0:
            fsdp.save_policy(os.path.join(self.folder, f"step_{step + 1}"), self.model, cfg.policy)
        if (step + 1) % cfg.checkpoint_steps == 0:
            fsdp.save_training(self.folder, self.model, self.optimizer, step)
            self.held_out.forget_others(self.folder)
        return self.held_out.over()

    def finish(self):
        """The end of an iteration: its policy, with --patience that of the best look, is kept. Of setting two's thousands
        only every policy_every-th and the last is, the training state of every checkpoint_steps-th replaces the one
        before, and other iterations leave no file."""
        cfg, last = self.cfg, self.t == self.cfg.iterations
        self.clock.finished("regress", time.monotonic() - self.start)
        if rank() == 0:
            watch.redraw(cfg.out, phase_ends=True, last=last)
        keep = last or not cfg.one_training or self.t % cfg.policy_every == 0
        if self.held_out.pairs and rank() == 0:
            print(f"iteration {self.t}: held-out loss {self.held_out.looks}; least after {self.held_out.best()} of "
                  f"{self.held_out.steps} steps", flush=True)  # fmt: skip
        self.held_out.take_best(self.folder, self.model, self.checkpoint_of(self.t - 1))
        if keep:
            fsdp.save_policy(policy_folder(cfg.out, self.t), self.model, cfg.policy)
            remove_best(self.folder)
        fsdp.remove_training(self.folder)
        if cfg.one_training and last:
            fsdp.remove_training(cfg.out)
        elif cfg.one_training and self.t % cfg.checkpoint_steps == 0:
            fsdp.save_training(cfg.out, self.model, self.optimizer, self.t)
        if not keep and rank() == 0:
            shutil.rmtree(self.folder)


def cut_answers(pairs):
    """The share of the responses at turn h that were cut at their limit."""
    return float(np.mean([truncated[p.h - 1] for p in pairs for truncated in p.truncated if truncated]))


def gone_bad(now, before):
    """What is worse about the policy that collected than about the one before it, beyond noise (two standard errors): its
    reward, from other prompts of one law, and the shares of its answers that are malformed or were cut. At most a line."""
    found, noise = [], 2 * math.hypot(now["reward_error"], before["reward_error"])
    if now["reward"] < before["reward"] - noise:
        found.append("mean reward")
    for name in ("malformed", "truncated"):
        old, new = before.get(name, 0), now.get(name, 0)
        if new > old + 2 * math.sqrt(2 * max(old, 1 / before["pairs"]) / now["pairs"]):
            found.append(f"{name} answers {old:.2%} to {new:.2%}")
    words = (f"iteration {before['iteration']} has made this worse: {'; '.join(found)} (mean reward {before['reward']:.3f} to "
             f"{now['reward']:.3f}, two errors {noise:.3f}; docs/metrics.md)")  # fmt: skip
    return [words] if found else []


# Nats a token. float32: two ways of summing differ by 1e-6 to 1e-5 (measured, both engines), and a hundred times that
# is no rounding. bfloat16: a logit of size 16 is rounded by 0.06; 0.01 to 0.05 in the mean is normal.
MOST_GAP = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def engine_gap(pairs, logps):
    """Mean difference a token between what the engine said of y and y' when it sampled them and ln pi_t; None where no
    engine did: responses of a data set."""
    gaps = []
    for pair, row in zip(pairs, logps, strict=True):
        for said, logp, y in zip(pair.engine_logps, row, (pair.y, pair.y2), strict=True):
            if math.isfinite(said):
                gaps.append(abs(said - logp) / max(1, len(y)))
    return float(np.mean(gaps)) if gaps else None


def check_gap(gap, t):
    """The pairs are pi_t's own: else Eq. 1 would fit ratios to a policy that never spoke."""
    most = MOST_GAP[dtype()]
    if gap is not None and gap > most:
        kind = str(dtype()).removeprefix("torch.")
        raise BadInput(f"iteration {t}: the engine that sampled differs from the weights in training by {gap:.2g} nats "
                       f"a token (at most {most:g} in {kind}): an engine that was not updated, a second weight file "
                       "beside the first, a temperature that the engine clamps, or another checkpoint")  # fmt: skip


def progress(steps, first, desc):
    """The steps that are left as (number, step), behind a bar on rank 0."""
    return bar(list(enumerate(steps))[first:], desc, first)


def log_data(cfg, counts):
    """The first line of metrics.jsonl: what the data set gave and what was dropped of it, by reason."""
    if rank() == 0 and counts and not os.path.exists(os.path.join(cfg.out, "metrics.jsonl")):
        log(cfg, {"iteration": 0, "phase": "data"} | counts)
