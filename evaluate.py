"""Does it hold at turn h? Win rate per turn and KL against a reference policy (section 4, Tables 1 and 2, Figure 1).

    python evaluate.py --setting toy --policy runs/toy/iter_2/policy [more ...]
    python evaluate.py --setting one --policy runs/one NAME=org/model --judge URL --judge-model gpt-4-0613

A policy is a run's folder (its last iteration), a Hugging Face folder or a hub id. Every policy plays the same openings
with the same user and the same random streams, for max_turns turns; the judge compares, at each turn h, the
conversations' first h turns. Where the data asks its own questions (setting two) a dialogue has as many turns as
questions, and whole dialogues are compared (section 4.3). A tie counts half. Intervals are 95 % bootstraps over
dialogues, since the turns of one dialogue are not independent. Judges: the reward model, the toy world's own reward, or
a language model that is asked in both orders, at an OpenAI-compatible URL (key: OPENAI_API_KEY) or from a checkpoint in
this process.

Dimension key: N dialogues, H turns.
"""
import processes  # first: it sets what torch and vLLM read when they are imported

import functools
import glob
import hashlib
import json
import os
import re
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import torch

import data
import engines
import files
import fsdp
import rewards
import simulator
from ask import Server
from files import BadInput, barrier, in_waves, rank, read_weights, world, write_file
from judges import ANTHROPIC_HH, ULTRAINTERACT, LLMJudge, local_judge
from packing import token_logps
from simulator import Dialogue, rollout


# ---------------------------------------------------------------------------------------------------------------
# Win rate per turn
# ---------------------------------------------------------------------------------------------------------------


def by_reward(reward):
    """A judge from a reward model: 1 where a's conversation earns more than b's, 1/2 where they earn the same."""

    def judge(a, b):
        difference = np.subtract(reward(a), reward(b))
        return (np.sign(difference) + 1) / 2

    return judge


def stages(dialogues, whole=False):
    """What is judged and scored, a list of conversations a column: the first h turns, h = 1..H, or (whole) dialogues of
    any lengths as they ended."""
    turns = min(len(d.spans) for d in dialogues)
    return [dialogues] if whole else [[d.until(h) for d in dialogues] for h in range(1, turns + 1)]


def judged(a, b, judge, whole=False):
    """The judge's verdicts on dialogues a against b, at each turn: (N, H) in {0, 1/2, 1}; (N, 1) of whole ones."""
    return np.stack([judge(x, y) for x, y in zip(stages(a, whole), stages(b, whole))], axis=1)


def fits(reward, dialogues):
    """Whether the reward model can score each dialogue; one that is too long for it is left out for all policies."""
    return [getattr(reward, "fits_dialogue", lambda _: True)(d) for d in dialogues]


def bootstrap(values_NH, samples=2000, seed=0):
    """95 % intervals (2, H) of the column means, resampling whole dialogues."""
    rows = np.random.default_rng(seed).integers(len(values_NH), size=(samples, len(values_NH)))
    return np.quantile(values_NH[rows].mean(1), (0.025, 0.975), axis=0)


def win_rate(a, b, judge):
    """Per cent of dialogues in which a beats b, judged on the first h turns: (H,), and its interval (2, H)."""
    verdict_NH = 100 * judged(a, b, judge)
    return verdict_NH.mean(0), bootstrap(verdict_NH)


def length_controlled(verdict_N, difference_N, ridge=1e-2):
    """Win rate in per cent at equal length: the preference's logistic model on an intercept and tanh of the
    standardised length difference, read at difference 0 (AlpacaEval 2; its term for hard instructions is left out).

    Newton's method on the likelihood with half-wins as half a win; the ridge keeps a clean sweep finite."""
    spread = difference_N.std()
    x_N2 = np.stack([np.ones(len(verdict_N)), np.tanh(difference_N / spread if spread else 0.0 * difference_N)], axis=1)
    weight_2 = np.zeros(2)
    for _ in range(50):
        p_N = 1 / (1 + np.exp(-x_N2 @ weight_2))
        hessian_22 = (x_N2 * (p_N * (1 - p_N))[:, None]).T @ x_N2 + ridge * np.eye(2)
        step_2 = np.linalg.solve(hessian_22, x_N2.T @ (verdict_N - p_N) - ridge * weight_2)
        weight_2 += step_2
        if abs(step_2).max() < 1e-10:
            break
    return 100 / (1 + np.exp(-weight_2[0]))


def lengths(dialogues, whole=False):
    """Tokens of all answers that are seen at each stage: (N, H)."""
    tokens = lambda d: sum(end - start for start, end in d.spans)  # noqa: E731
    return np.array([[tokens(d) for d in stage] for stage in stages(dialogues, whole)], dtype=float).T


def summary(dialogues, reference, judge, reward, whole=False):
    """One row of results.json: a policy's dialogues against the reference's, from the same openings."""
    before = Counter(getattr(judge, "counts", ()))
    verdict_NH = 100 * judged(dialogues, reference, judge, whole)
    win_H, (low_H, high_H) = verdict_NH.mean(0), bootstrap(verdict_NH)
    reward_NH = np.stack([reward(stage) for stage in stages(dialogues, whole)], axis=1)
    bad = next((d for d, finite in zip(dialogues, np.isfinite(reward_NH).all(1)) if not finite), None)
    if bad:
        raise BadInput(f"the reward of a dialogue is not finite: {bad.messages[0]['content'][:200]!r}")
    avg_low, avg_high = bootstrap(verdict_NH.mean(1, keepdims=True))[:, 0]
    seen_NH = lengths(dialogues, whole)  # what the judge saw at turn h
    turns_N = np.array([len(d.spans) for d in dialogues])
    length_NH = seen_NH / turns_N[:, None] if whole else np.diff(seen_NH, axis=1, prepend=0)  # tokens an answer
    longer_NH = seen_NH - lengths(reference, whole)
    controlled_H = np.array([length_controlled(v, x) for v, x in zip(verdict_NH.T / 100, longer_NH.T)])
    row = {"win": win_H, "low": low_H, "high": high_H, "avg": win_H.mean(), "avg_low": avg_low, "avg_high": avg_high,
           "win_controlled": controlled_H, "avg_controlled": controlled_H.mean(), "length": length_NH.mean(0),
           "reward": reward_NH.mean(0), "reward_error": reward_NH.std(0) / len(reward_NH) ** 0.5}  # fmt: skip
    if hasattr(judge, "counts"):
        counts = {name: judge.counts[name] - before[name] for name in ("asked", "flips", "unparsable", "unanswered")}
        row |= counts | {"flip_rate": 100 * counts["flips"] / max(1, counts["asked"])}
    return {k: np.round(v, 4).tolist() for k, v in row.items()} | {"dialogues": len(dialogues)}


# ---------------------------------------------------------------------------------------------------------------
# KL(pi || pi_0), Table 2
# ---------------------------------------------------------------------------------------------------------------


def dialogue_logps(model, dialogues, temperature, tokens=16384):
    """ln pi of each answer's sampled tokens given all before it, summed over the answer: (N, H) float64, 0 where a
    dialogue has no such answer.

    One forward over a dialogue's ids gives all its turns, and dialogues share a forward of up to `tokens`. Ranks share
    the dialogues, and every rank runs the same number of forwards, else FSDP would wait for ever."""
    device, H = next(model.parameters()).device, max(len(d.spans) for d in dialogues)
    forward = getattr(model, "token_logps", None) or functools.partial(token_logps, model)
    groups, share = [], -(-len(dialogues) // world())
    for i in sorted(range(len(dialogues)), key=lambda i: -len(dialogues[i].ids)):
        if not groups or len(groups[-1]) == share or sum(len(dialogues[j].ids) for j in [*groups[-1], i]) > tokens:
            groups.append([])
        groups[-1].append(i)
    logp_NH = torch.zeros(len(dialogues), H, dtype=torch.float64)
    for number in range(rank(), -(-len(groups) // world()) * world(), world()):
        group = groups[number % len(groups)]  # a rank without a group repeats one and keeps nothing of it
        sizes = [len(dialogues[i].ids) for i in group]
        ids_1T = torch.tensor([sum((dialogues[i].ids for i in group), [])], device=device)
        position_1T = torch.cat([torch.arange(T, device=device) for T in sizes])[None]
        at = [(i, h, start + t) for i, start in zip(group, np.cumsum([0, *sizes]).tolist())
              for h, span in enumerate(dialogues[i].spans) for t in range(*span)]  # fmt: skip
        row, turn, where_N = (torch.tensor(x, device=device) for x in zip(*at))
        with torch.no_grad():
            lengths = [(T, 0, 0) for T in sizes]  # as pairs without responses
            logp_N = forward(ids_1T, position_1T, lengths, where_N - 1, ids_1T[0, where_N], temperature)
        if number < len(groups):
            logp_NH.index_put_((row.cpu(), turn.cpu()), logp_N.double().cpu(), accumulate=True)
    return fsdp.add_up(logp_NH).numpy()


def kl_estimates(logp_NH, base_NH):
    """KL(pi || pi_0) in nats from dialogues that pi has played: their answers' log-probs under pi and under pi_0.

    Two unbiased estimators (Schulman 2020), both a sum over turns with the mean over dialogues: k1 = ln pi/pi_0, and
    k3 = rho - 1 - ln rho with rho = pi_0/pi, never negative and quieter while pi is near pi_0, but heavy-tailed beyond
    a few nats a turn. The user's words are the same under both policies and cancel. Table 2 names no estimator."""
    log_ratio_NH = logp_NH - base_NH
    k3_NH = np.exp(-log_ratio_NH) - 1 + log_ratio_NH
    row = {}
    for name, k_NH in (("kl", log_ratio_NH), ("kl_k3", k3_NH)):
        for key, k in ((name, k_NH.sum(1)), (f"{name}_turn", k_NH)):
            row |= {key: k.mean(0), f"{key}_error": k.std(0) / max(1, len(k) - 1) ** 0.5}
    return {k: np.round(v, 6).tolist() for k, v in row.items()}


def kl_to_reference(paths, played, cfg):
    """{name: kl_estimates} of every policy that is the same kind of model as the reference.

    Both log-probs come from one forward of the trainer's code, never from the engine; at the sampling temperature."""
    names = [name for name in paths if kind(paths[name]) == kind(cfg.reference) and name != "base"]
    model = fsdp.load_policy(cfg.reference, cfg).eval()
    base = {name: dialogue_logps(model, played[name], cfg.temperature) for name in names}
    nothing_NH = np.zeros((len(played["base"]), cfg.max_turns))
    rows = {"base": kl_estimates(nothing_NH, nothing_NH)}
    for name in names:
        fsdp.read_slices(model, paths[name])
        rows[name] = kl_estimates(dialogue_logps(model, played[name], cfg.temperature), base[name])
    return rows


# ---------------------------------------------------------------------------------------------------------------
# Playing
# ---------------------------------------------------------------------------------------------------------------


PLAYED_WITH = ("setting", "user", "user_model", "user_temperature", "user_tokens", "dataset", "engine", "seed",
               "max_turns", "max_new_tokens", "max_length", "temperature", "eval_wave", "eval_dialogues")  # fmt: skip


@functools.lru_cache
def digest(file, size, changed):
    """A file's hash, computed once for each state of the file."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def fingerprint(path):
    """A checkpoint's identity wherever it lies: the hash of its weights, configuration and tokenizer."""
    found = sorted(files.weight_files(path) + glob.glob(os.path.join(path, "*.j*")))  # json and jinja
    parts = [digest(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in found]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def claim(folder, paths, cfg):
    """Note beside each policy's dialogues what they are made of; refuse those that are made of something else."""
    os.makedirs(os.path.join(folder, "eval"), exist_ok=True)
    for name, path in paths.items():
        dialogues, note = (os.path.join(folder, "eval", name + end) for end in (".jsonl", ".json"))
        now = {"weights": fingerprint(path)} | {field: getattr(cfg, field) for field in PLAYED_WITH}
        if os.path.exists(note):
            then = files.read_json(note)
            other = [field for field in now if now[field] != then.get(field)]
            if other:
                raise BadInput(f"{dialogues} was played with another {', '.join(other)}: choose another --out")
        elif os.path.exists(dialogues) or os.path.exists(f"{dialogues}.parts"):
            raise BadInput(f"{dialogues} does not say which checkpoint played it: remove it or choose another --out")
        elif rank() == 0:
            write_file(note, json.dumps({"checkpoint": os.path.relpath(path, folder)} | now, indent=1))
    barrier()


@functools.lru_cache
def kind(path):
    """What two checkpoints must share for one to take the other's weights: architecture, vocabulary, template."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=False).to_dict()
    tokenizer = simulator.load_tokenizer(path)
    names = ("_name_or_path", "dtype", "transformers_version", "architectures")
    return {k: v for k, v in config.items() if k not in names}, tokenizer.get_vocab(), tokenizer.chat_template


def shared(reward):
    """The reward model with its work shared over the ranks and done once for each conversation; to be called by all
    ranks alike."""
    known = {}

    def scores(dialogues):
        keys = [tuple(m["content"] for m in d.messages) for d in dialogues]
        new = dict((key, d) for key, d in zip(keys, dialogues) if key not in known)
        mine = slice(rank(), None, world())
        score_N = torch.zeros(len(new), dtype=torch.float64)
        score_N[mine] = torch.tensor(reward(list(new.values())[mine]), dtype=torch.float64)
        known.update(zip(new, fsdp.add_up(score_N).tolist()))
        return [known[key] for key in keys]

    return scores


def play(file, path, prompts, policy, user, cfg):
    """All turns of the checkpoint at `path` from each opening, cfg.max_turns or one for each of the data's own
    questions; kept in `file`, played once.

    `policy` is an engine that takes the checkpoint's weights; another kind of model (Llama 3.1 beside 3: equal shapes,
    other positions) gets an engine of its own."""
    if not os.path.exists(file):
        if kind(path) == kind(policy.tokenizer.name_or_path):
            policy.update(read_weights(path))
        else:
            policy = engines.load_engine(path, cfg)
            prompts = [Dialogue.start(policy.tokenizer, p.messages[0]["content"], p.secret, p.stream, p.limit)
                       for p in prompts]  # fmt: skip

    def wave(rows, _):
        turns = [1 + len(d.secret) if cfg.user == "dataset" else cfg.max_turns for d in rows]
        dialogues = rollout(rows, policy, user, turns)
        simulator.check_failures(sum(d.failed == "user" for d in dialogues), len(rows), cfg)
        return [vars(d) for d in dialogues]

    rows = in_waves(file, prompts, cfg.eval_wave, wave, f"evaluate {path}")
    return [Dialogue.from_json(row) for row in rows]


def evaluate(policies, folder, policy, user, reward, cfg, judge=None, kl=True):
    """results.json in `folder`: each policy {name: checkpoint} against cfg.reference, and everybody's dialogues.

    Returns (results, {name: dialogues}). Openings on which any policy's dialogue failed are left out for all. The file
    is written after each row: a judge that dies costs no finished one. judge: by the reward, unless one is given."""
    prompts = data.test_prompts(cfg, policy.tokenizer)
    paths = {"base": cfg.reference, **policies}
    claim(folder, paths, cfg)
    played = {}
    for name, path in paths.items():
        played[name] = play(os.path.join(folder, "eval", f"{name}.jsonl"), path, prompts, policy, user, cfg)
    bad = [[d.failed or not scored for d, scored in zip(ds, fits(reward, ds))] for ds in played.values()]
    whole = [i for i in range(len(prompts)) if not any(row[i] for row in bad)]
    if not whole:
        raise BadInput("every evaluation dialogue failed")
    played, scores = {name: [dialogues[i] for i in whole] for name, dialogues in played.items()}, shared(reward)
    policy.sleep()  # any later use of it brings weights
    divergence = kl_to_reference(paths, played, cfg) if kl else {}
    results = {}
    for name, dialogues in played.items():
        results[name] = summary(dialogues, played["base"], judge or by_reward(scores), scores, cfg.user == "dataset")
        results[name] |= divergence.get(name, {})
        results[name] |= {"failed": len(prompts) - len(whole), "command": " ".join(["python", *sys.argv])}
        if rank() == 0:
            write_file(os.path.join(folder, "results.json"), json.dumps(results, indent=1))
    barrier()
    return results, played


# ---------------------------------------------------------------------------------------------------------------
# Showing
# ---------------------------------------------------------------------------------------------------------------


def table(results):
    """The results as a Markdown table: win rate with its interval, and mean reward, for h = 1..H."""
    turns = range(1, len(next(iter(results.values()))["win"]) + 1)
    heads = " | ".join(f"h = {h}" for h in turns) if len(turns) > 1 else "whole dialogue"
    lines = [f"| win rate, % | {heads} | average |", "|---" * (len(turns) + 2) + "|"]
    for name, r in results.items():
        cells = [f"{w:.1f} [{a:.1f}, {b:.1f}]" for w, a, b in zip(r["win"], r["low"], r["high"])]
        cells.append(f"{r['avg']:.1f} [{r['avg_low']:.1f}, {r['avg_high']:.1f}]")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "| mean reward | " + lines[0].split("|", 2)[2], lines[1]]
    for name, r in results.items():
        lines.append(f"| {name} | " + " | ".join(f"{x:.3f}" for x in [*r["reward"], np.mean(r["reward"])]) + " |")
    return "\n".join(lines + [""] + details(results))


def details(results):
    """The lines that qualify a win rate: at equal length, under swapping, and how far from the reference it was won."""
    heads = "| average over turns | win rate | at equal length | tokens an answer | flips, % | unparsable | unanswered "
    lines = [heads + "| KL a conversation (k1) | KL (k3) |", "|---" * 9 + "|"]
    for name, r in results.items():
        cells = [f"{r['avg']:.1f}", f"{r['avg_controlled']:.1f}", f"{np.mean(r['length']):.1f}"]
        cells += [f"{r['flip_rate']:.1f}", str(r["unparsable"]), str(r["unanswered"])] if "asked" in r else ["-"] * 3
        cells += [f"{r[k]:.3f} +- {r[k + '_error']:.3f}" for k in ("kl", "kl_k3")] if "kl" in r else ["-"] * 2
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def draw(results, path):
    """Figure 1: win rate per turn with its band, and the mean reward behind it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for i, (name, r) in enumerate(results.items()):
        turns = np.arange(1, len(r["win"]) + 1)
        colour = "0.45" if name == "base" else f"C{i - 1}"
        left.plot(turns, r["win"], "o-", color=colour, label=name)
        left.fill_between(turns, r["low"], r["high"], color=colour, alpha=0.15, lw=0)
        right.errorbar(turns, r["reward"], 1.96 * np.array(r["reward_error"]), fmt="o-", color=colour, label=name)
    left.set(xlabel="turn h", ylabel="win rate against base, %", xticks=turns, title="win rate per turn")
    right.set(xlabel="turn h", ylabel="mean reward", xticks=turns, title="reward of the first h turns")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    with files.writing(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
    plt.close(figure)


def side_by_side(before, after, width=58):
    """Two dialogues from one opening, turn by turn."""
    lines = [f"{'before':{width + 12}s}after"]
    for a, b in zip(before.messages, after.messages):
        lines.append(f"{a['role']:10s}  {a['content'][:width]:{width}s}{b['content'][:width]}")
    return "\n".join(lines)


def report(results, played, reward, folder):
    """What a person sees at the end: the table, Figure 1, and one dialogue before and after."""
    last = list(played)[-1]
    draw(results, os.path.join(folder, "win_rate.png"))
    print(f"\n{table(results)}\n\nwin rates are against base, ties half, 95 % bootstrap intervals over "
          f"{results[last]['dialogues']} dialogues; figure: {os.path.join(folder, 'win_rate.png')}")  # fmt: skip
    gain = np.subtract(reward(played[last]), reward(played["base"]))
    i = int(np.argsort(gain, kind="stable")[len(gain) * 3 // 4])  # neither the best nor a lucky one
    print(f"\none opening, played by base and by {last} (the upper quartile of the gain, {gain[i]:+.2f}):\n")
    print(side_by_side(played["base"][i], played[last][i]), flush=True)


def after_training(cfg, policy, user, reward):
    """The end of refuel.py: every iteration's policy against the reference."""
    policies = {f"iter_{t}": os.path.join(cfg.out, f"iter_{t}", "policy") for t in range(1, cfg.iterations + 1)}
    policies = {name: path for name, path in policies.items() if os.path.isdir(path)}  # setting two keeps every N-th
    results, played = evaluate(policies, cfg.out, policy, user, reward, cfg)
    if rank() == 0:
        report(results, played, reward, cfg.out)


# ---------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------


def command(argv):
    """(cfg, the policies as they were given, --judge, --judge-model, --judge-tokens); several policies go where a Config
    has one."""
    import refuel

    own = refuel.Parser(add_help=False, allow_abbrev=False)
    own.add_argument("--policy", nargs="+", action="extend", default=[])
    own.add_argument("--out")
    own, rest = own.parse_known_args(argv)
    flags = dict(judge=dict(default="reward", metavar="reward|world|URL|FOLDER"), judge_model=dict(metavar="NAME"),
                 judge_tokens=dict(default=512, type=int, metavar="N"))  # room for its comparison and verdict
    cfg, extra = refuel.read_config(rest, __doc__, **flags)
    if not own.policy:
        raise BadInput("--policy names at least one run folder, checkpoint folder or hub id")
    if extra["judge_tokens"] < 1:
        raise BadInput(f"--judge-tokens must be positive, not {extra['judge_tokens']}")
    out = own.out or os.path.join("runs", "eval", cfg.setting)
    if os.path.exists(out) and not os.path.isdir(out):
        raise BadInput(f"--out {out} is not a folder")
    return replace(cfg, out=out), own.policy, extra["judge"], extra["judge_model"], extra["judge_tokens"]


def named(arguments):
    """{name: checkpoint folder} from PATH or NAME=PATH; a run's folder stands for its last iteration."""
    policies = {}
    for argument in arguments:
        name, path = re.fullmatch(r"(?:([\w.-]+)=)?(.*)", argument, re.DOTALL).groups()
        parts = (os.path.abspath(path) if os.path.isdir(path) else path).removesuffix("/policy").split("/")
        name = name or re.sub(r"[^\w.-]", "_", "_".join(parts[-2 if re.fullmatch(r"iter_\d+", parts[-1]) else -1 :]))
        if name in policies or name == "base":
            raise BadInput(f"two policies are called {name} (base is the reference): write NAME={path}")
        done = glob.glob(os.path.join(glob.escape(path), "iter_*", "policy"))
        last = max(done, key=lambda p: int(p.split(os.sep)[-2].removeprefix("iter_"))) if done else path
        policies[name] = files.find_checkpoint(last)
    return policies


def load_judge(name, model, cfg, judge_tokens):
    """The judge that --judge names, None for the reward; cfg.out keeps a language model's replies."""
    wording = ANTHROPIC_HH if data.is_hh(cfg.dataset) else ULTRAINTERACT
    folder = os.path.join(cfg.out, "verdicts")
    if name == "reward":
        return None
    if name == "world":
        if cfg.setting != "toy":
            raise BadInput("--judge world: only the toy's world knows what is right")
        import toy

        return by_reward(toy.Reward())
    if "://" in name:
        if not model:
            raise BadInput("--judge URL needs --judge-model NAME")
        return LLMJudge(Server(name, model, max_tokens=judge_tokens, whole=True), model, folder, wording)
    path = files.find_checkpoint(name)
    return LLMJudge(local_judge(path, cfg, judge_tokens), fingerprint(path), folder, wording)


def main(argv=None):
    with processes.one_line("evaluate.py"):
        cfg, policies, judge, judge_model, judge_tokens = command(argv)
        processes.start_processes()
        policies = named(policies)
        cfg = replace(cfg, reference=files.prepare_checkpoint(cfg.reference))
        for path in (cfg.reference, *policies.values()):
            files.check_positions(path, cfg)
        data.test_prompts(cfg, simulator.load_tokenizer(cfg.reference))
        simulator.check_user(cfg), rewards.check_reward(cfg)
        claim(cfg.out, {"base": cfg.reference, **policies}, cfg)
        user, reward = simulator.load_user(cfg), rewards.load_reward(cfg)
        judge = load_judge(judge, judge_model, cfg, judge_tokens)
        policy = engines.load_engine(cfg.reference, cfg)
        results, played = evaluate(policies, cfg.out, policy, user, reward, cfg, judge)
        if rank() == 0:
            report(results, played, reward, cfg.out)


if __name__ == "__main__":
    main()
