"""Does it hold at turn h? Win rate per turn and KL against a reference policy (section 4, Tables 1 and 2, Figure 1).

    python evaluate.py --setting toy --policy runs/toy/iter_2/policy [more ...]
    python evaluate.py --setting one --policy runs/one NAME=org/model --judge URL --judge-model gpt-4-0613
    python evaluate.py --page runs/one                  report.html of a folder, once more, from what lies there

A policy is a run's folder (its last iteration), a Hugging Face folder or a hub id; or a model behind a server, which is
played and judged by its texts: NAME=serve:ORG/MODEL, NAME=URL#MODEL (machinery/outside.py). Every policy plays the same
openings with the same user and the same random streams, for max_turns turns or until the user ends it; the judge
compares, at each turn h, the conversations' first h turns. Where the data asks its own questions (setting two) a dialogue
has as many turns as questions, and whole dialogues are compared (section 4.3). A tie counts half. Intervals are 95 %
bootstraps over dialogues, since the turns of one dialogue are not independent. Judges: the reward model, a world's own
reward, or a language model that is asked in both orders, at an OpenAI-compatible URL (key: OPENAI_API_KEY) or from a checkpoint in
this process.

Dimension key: N dialogues, H turns.
"""
import machinery  # noqa: F401  (first: it sets what torch and vLLM read when they are imported)

import json
import math
import os
import re
import sys
from collections import Counter
from dataclasses import replace

import numpy as np

import simulator
from machinery import engines, families, files, fsdp, outside, page, plan, worlds
from machinery.ask import Server
from machinery.files import BadInput, brief, read_weights, write_file
from machinery.judges import ANTHROPIC_HH, ULTRAINTERACT, LLMJudge, LocalJudge, context_of
from machinery.logps import dialogue_logps
from machinery.ranks import barrier, in_waves, on_rank_0, one_line, rank, start_processes
from machinery.report import footer, side_by_side, table, turns_figure
from machinery.rewards import shared
from machinery.settings import Parser, is_hh, read_config
from machinery.template import encode, load_tokenizer, tokens_read
from machinery.users import check_failures
from simulator import Dialogue, rollout


# ---------------------------------------------------------------------------------------------------------------
# Win rate per turn
# ---------------------------------------------------------------------------------------------------------------


def by_reward(reward):
    """A judge from a reward model: 1 where a's conversation earns more than b's, 1/2 where they earn the same. Equal ones
    earn the same, though a model reads them in batches of other shapes and rounds them otherwise."""

    def judge(a, b):
        sign_N = np.sign(np.subtract(reward(a), reward(b)))
        equal_N = [(x.conversation(), x.truncated) == (y.conversation(), y.truncated) for x, y in zip(a, b, strict=True)]
        return (np.where(equal_N, 0, sign_N) + 1) / 2

    return judge


def stages(dialogues, turns=None):
    """What is judged and scored, a list of conversations a column: the first h turns, h = 1..turns, or (turns 0) the
    dialogues as they ended. One that its user ended before turn h is compared as it ended; None: all turns there are."""
    if turns == 0:
        return [dialogues]
    if turns is None:
        turns = max(len(d.spans) for d in dialogues)
    return [[d.until(min(h, len(d.spans))) for d in dialogues] for h in range(1, turns + 1)]


def judged(a, b, judge, turns=None):
    """The judge's verdicts on dialogues a against b, at each turn: (N, H) in {0, 1/2, 1}; (N, 1) of whole dialogues."""
    if turns is None:
        turns = max(len(d.spans) for d in (*a, *b))
    columns = [judge(x, y) for x, y in zip(stages(a, turns), stages(b, turns), strict=True)]
    return np.stack(columns, axis=1)


def fits(reward, dialogues):
    """Whether the reward model can score each dialogue; one that is too long for it is left out for all policies."""
    if not hasattr(reward, "fits_dialogue"):
        return [True] * len(dialogues)
    return [reward.fits_dialogue(d) for d in dialogues]


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
    longer_N = np.tanh(difference_N / spread) if spread else np.zeros(len(difference_N))
    x_N2 = np.stack([np.ones(len(verdict_N)), longer_N], axis=1)
    weight_2 = np.zeros(2)
    for _ in range(50):
        p_N = 1 / (1 + np.exp(-x_N2 @ weight_2))
        hessian_22 = (x_N2 * (p_N * (1 - p_N))[:, None]).T @ x_N2 + ridge * np.eye(2)
        step_2 = np.linalg.solve(hessian_22, x_N2.T @ (verdict_N - p_N) - ridge * weight_2)
        weight_2 += step_2
        if abs(step_2).max() < 1e-10:
            break
    return 100 / (1 + np.exp(-weight_2[0]))


def lengths(dialogues, turns=None):
    """Tokens of all answers up to each stage: (N, H)."""
    columns = []
    for stage in stages(dialogues, turns):
        columns.append([d.tokens_said() for d in stage])
    return np.array(columns, dtype=float).T


def scored(dialogues, reward, turns=None):
    """Rewards at each stage: (N, H); the opening of a dialogue whose reward is not finite is named."""
    reward_NH = np.stack([reward(stage) for stage in stages(dialogues, turns)], axis=1)
    for d, row in zip(dialogues, reward_NH, strict=True):
        if not np.isfinite(row).all():
            raise BadInput(f"the reward of a dialogue is not finite: {d.messages[0]['content'][:200]!r}")
    return reward_NH


def as_read(dialogues, tokenizer):
    """The dialogues, each span without the answer's thoughts, which no judge reads."""
    shown = []
    for d in dialogues:
        spans = []
        for h, (_, end) in enumerate(d.spans, 1):
            spans.append((end - tokens_read(tokenizer, d.answer(h), d.messages[2 * h - 1]["content"]), end))
        shown.append(replace(d, spans=spans))
    return shown


def at_equal_length(dialogues, reference, verdict_NH, turns, tokenizer=None):
    """Tokens of answer h, for the turns that anybody has, and of an answer on average; the win rates at equal length; of
    dialogues whose tokens are known. With a tokenizer a thought is a cost, and no length to a judge."""
    said_NH = lengths(dialogues, turns)
    if tokenizer is not None:
        dialogues, reference = as_read(dialogues, tokenizer), as_read(reference, tokenizer)
    longer_NH = lengths(dialogues, turns) - lengths(reference, turns)  # of what the judge saw at turn h
    turns_N = np.array([len(d.spans) for d in dialogues])
    answer_NH = np.diff(said_NH, axis=1, prepend=0) if turns else said_NH / turns_N[:, None]  # tokens an answer
    there_NH = turns_N[:, None] > np.arange(turns) if turns else np.ones((len(dialogues), 1))  # who has an answer h
    length_H = answer_NH.sum(0)[there_NH.any(0)] / there_NH.sum(0)[there_NH.any(0)]
    controlled_H = np.array([length_controlled(v, x) for v, x in zip(verdict_NH.T / 100, longer_NH.T)])
    return {"win_controlled": controlled_H, "avg_controlled": controlled_H.mean(), "length": length_H,
            "length_avg": answer_NH.sum() / there_NH.sum()}  # fmt: skip


def summary(dialogues, reference, judge, reward, turns=None, earned=None, same_words=True, tokenizer=None):
    """One row of results.json: a policy's dialogues against the reference's, from the same openings; turns: see stages.
    earned: a list that takes each dialogue's reward as it ended; same_words: one vocabulary, so that tokens compare;
    tokenizer: that vocabulary's, where answers may have thoughts."""
    before = Counter(getattr(judge, "counts", ()))
    if turns is None:
        turns = max(len(d.spans) for d in (*dialogues, *reference))
    verdict_NH = 100 * judged(dialogues, reference, judge, turns)
    reward_NH = scored(dialogues, reward, turns)
    if earned is not None:
        earned += reward_NH[:, -1].tolist()
    win_H, (low_H, high_H) = verdict_NH.mean(0), bootstrap(verdict_NH)
    avg_low, avg_high = bootstrap(verdict_NH.mean(1, keepdims=True))[:, 0]
    row = {"win": win_H, "low": low_H, "high": high_H, "avg": win_H.mean(), "avg_low": avg_low, "avg_high": avg_high,
           "reward": reward_NH.mean(0), "reward_error": reward_NH.std(0) / len(reward_NH) ** 0.5}  # fmt: skip
    if same_words and all(d.ids for d in dialogues):
        row |= at_equal_length(dialogues, reference, verdict_NH, turns, tokenizer)
    if hasattr(judge, "counts"):
        for name in ("asked", "flips", "unparsable", "unanswered"):
            row[name] = judge.counts[name] - before[name]
        row["flip_rate"] = 100 * row["flips"] / max(1, row["asked"])
    row["turns"] = np.mean([len(d.spans) for d in dialogues])
    row["cut"] = 100 * np.mean([flag for d in dialogues for flag in d.truncated])  # answers that met the token limit, %
    return {k: np.round(v, 4).tolist() for k, v in row.items()} | {"dialogues": len(dialogues)}


# ---------------------------------------------------------------------------------------------------------------
# KL(pi || pi_0), Table 2
# ---------------------------------------------------------------------------------------------------------------


def kl_estimates(logp_NH, base_NH):
    """KL(pi || pi_0) in nats from dialogues that pi has played: their answers' log-probs under pi and under pi_0.

    Two unbiased estimators (Schulman 2020), both a sum over turns with the mean over dialogues: k1 = ln pi/pi_0, and
    k3 = rho - 1 - ln rho with rho = pi_0/pi, never negative and quieter while pi is near pi_0 (below about a nat a turn).
    Beyond a few nats a turn k1 alone holds: k3 then waits for samples with a huge rho, which hardly ever come, and is
    far too small (at Table 2's 16 to 122 nats, of a turn or of a conversation, it is of no use). The user's words are
    the same under both policies and cancel. Table 2 names no estimator."""
    log_ratio_NH = logp_NH - base_NH
    k3_NH = np.exp(-log_ratio_NH) - 1 + log_ratio_NH
    row = {}
    estimates = {"kl": log_ratio_NH.sum(1), "kl_turn": log_ratio_NH, "kl_k3": k3_NH.sum(1), "kl_k3_turn": k3_NH}
    for name, value in estimates.items():
        row[name] = value.mean(0)
        row[f"{name}_error"] = value.std(0) / max(1, len(value) - 1) ** 0.5
    return {k: np.round(v, 6).tolist() for k, v in row.items()}


def is_kin(path, reference):
    """Whether a policy is of the reference's kind, so that one takes the other's weights."""
    return not outside.is_outside(path) and engines.kind(path) == engines.kind(reference)


def kl_to_reference(paths, played, cfg):
    """{name: kl_estimates} of every policy that is the same kind of model as the reference.

    Both log-probs come from one forward of the trainer's code, never from the engine; at the sampling temperature."""
    model = fsdp.load_policy(cfg.reference, cfg).eval()
    base = {}
    for name, path in paths.items():
        if name != "base" and is_kin(path, cfg.reference):
            base[name] = dialogue_logps(model, played[name], cfg.temperature)
    nothing_NH = np.zeros((len(played["base"]), cfg.max_turns))
    rows = {"base": kl_estimates(nothing_NH, nothing_NH)}
    for name, base_NH in base.items():
        fsdp.read_slices(model, paths[name])
        rows[name] = kl_estimates(dialogue_logps(model, played[name], cfg.temperature), base_NH)
    return rows


# ---------------------------------------------------------------------------------------------------------------
# Playing
# ---------------------------------------------------------------------------------------------------------------


PLAYED_WITH = ("setting", "user", "user_model", "user_temperature", "user_tokens", "dataset", "seed",
               "max_turns", "max_new_tokens", "max_length", "temperature", "eval_wave", "eval_dialogues", "eval_split",
               "eval_temperature")  # fmt: skip


def claim(folder, paths, cfg):
    """Note beside each policy's dialogues what they are made of; refuse those that are made of something else."""

    def note_all():
        os.makedirs(os.path.join(folder, "eval"), exist_ok=True)
        files.lock(folder)
        common = simulator.made_of(replace(cfg, policy=cfg.reference))
        for name in ("content of --policy", "content of --reward"):  # the reward does not play; weights are each policy's
            common.pop(name, None)
        for name in PLAYED_WITH:
            common[name] = getattr(cfg, name)
        for name, path in paths.items():
            note(folder, name, path, {"weights": outside.identity(path)} | common)

    on_rank_0(note_all)


def note(folder, name, path, now):
    dialogues, file = os.path.join(folder, "eval", f"{name}.jsonl"), os.path.join(folder, "eval", f"{name}.json")
    if os.path.exists(file):
        then = files.read_json(file)
        other = [field for field in now if now[field] != then.get(field)]
        if other:
            raise BadInput(f"{dialogues} was played with another {', '.join(other)}: choose another --out")
    elif os.path.exists(dialogues) or os.path.exists(f"{dialogues}.parts"):
        raise BadInput(f"{dialogues} does not say which checkpoint played it: remove it or choose another --out")
    else:
        place = path if outside.is_outside(path) else os.path.relpath(path, folder)
        write_file(file, json.dumps({"checkpoint": place} | now, indent=1))


def stranger(path, policy):
    """Whether a checkpoint is another kind of model than the engine's, which then cannot take its weights (Llama 3.1
    beside 3: equal shapes, other positions)."""
    return not outside.is_outside(path) and engines.kind(path) != engines.kind(policy.tokenizer.name_or_path)


def play(file, path, prompts, policy, user, cfg, among=1):
    """All turns of the checkpoint at `path` from each opening, cfg.max_turns or one for each of the data's own
    questions; kept in `file`, played once.

    `policy` is an engine that takes the checkpoint's weights; a stranger gets an engine of its own, one of `among`
    that share the place of the first, which sleeps from then on."""
    if not os.path.exists(file):
        if outside.is_outside(path):
            policy = outside.load(path, cfg)
            prompts = [p.copy(ids=[]) for p in prompts]
        elif not stranger(path, policy):
            policy.update(read_weights(path))
        else:
            for _ in read_weights(path):  # which are finite: an engine would play with any
                pass
            policy.sleep()
            policy = engines.load_engine(path, cfg, "other", among)
            prompts = [Dialogue.start(policy.tokenizer, p.messages[0]["content"], p.secret, p.stream, p.limit, p.system)
                       for p in prompts]  # fmt: skip

    policy.temperature = cfg.eval_temperature or cfg.temperature

    asked = Counter()  # dialogues, by this process, and who has failed in them

    def wave(rows, _):
        dialogues = rollout(rows, policy, user, simulator.longest(rows, cfg))
        failed = Counter(d.failed for d in dialogues)
        asked.update(failed, dialogues=len(rows))
        for counts, number in ((failed, len(rows)), (asked, asked["dialogues"])):  # many small waves round up to much
            check_failures(counts["user"], number, cfg)
            check_failures(counts["policy"], number, cfg, counts["policy"] and f"--policy {path} ({policy.why})")
        return [vars(d) for d in dialogues]

    dialogues = []
    for row in in_waves(file, prompts, cfg.eval_wave, wave, f"evaluate {path}"):
        dialogues.append(Dialogue.from_json(row))
    openings = [(d.system, d.messages[0]) for d in dialogues]
    if openings != [(p.system, p.messages[0]) for p in prompts]:  # else two conversations would be compared that never met
        raise BadInput(f"{file} begins with other openings than --dataset {cfg.dataset}: choose another --out")
    return dialogues


def finished(played, reward, cfg):
    """{name: dialogues} without the openings on which any policy's dialogue failed or cannot be scored, and which are left.

    Where many do not fit, what is left are the openings on which nobody says much: above --max-failures that is refused."""
    good = np.ones(len(next(iter(played.values()))), dtype=bool)
    fit, long = good.copy(), {}
    for name, dialogues in played.items():
        fit_N = np.array([d.failed != "too long" for d in dialogues]) & np.array(fits(reward, dialogues))
        good &= np.array([not d.failed for d in dialogues]) & fit_N
        fit &= fit_N
        long[name] = int((~fit_N).sum())
    if (~fit).sum() > math.ceil(cfg.max_failures * len(fit)):
        raise BadInput(f"{(~fit).sum()} of {len(fit)} evaluation dialogues do not fit --max-length or --reward-tokens ({brief(long)}) and "
                       f"would be left out for all policies; --max-failures is {cfg.max_failures:g}. Raise the limits; what is trained "
                       "is kept, and evaluate.py plays it with others")  # fmt: skip
    if not good.any():
        raise BadInput("every evaluation dialogue failed")
    kept, rows = {}, np.flatnonzero(good).tolist()
    for name, dialogues in played.items():
        kept[name] = [dialogues[i] for i in rows]
    return kept, rows


def evaluate(policies, folder, policy, user, reward, cfg, judge=None, kl=True):
    """results.json in `folder`: each policy {name: checkpoint} against cfg.reference, and everybody's dialogues;
    rewards.json: {name: the reward of each line of eval/NAME.jsonl, null where it was left out}.

    Returns (results, {name: dialogues}). Openings on which any policy's dialogue failed are left out for all. The file
    is written after each row: a judge that dies costs no finished one. judge: by the reward, unless one is given."""
    prompts = simulator.test_prompts(cfg, policy.tokenizer)
    paths = {"base": cfg.reference, **policies}
    claim(folder, paths, cfg)
    played = {}
    asked = getattr(judge, "ask", None)  # of a language model
    late = isinstance(asked, LocalJudge)
    among = sum(stranger(path, policy) for path in paths.values()) + late
    for name in sorted(paths, key=lambda name: stranger(paths[name], policy)):  # strangers last
        file = os.path.join(folder, "eval", f"{name}.jsonl")
        played[name] = play(file, paths[name], prompts, policy, user, cfg, among)
    played, rows = finished({name: played[name] for name in paths}, reward, cfg)
    scores = shared(reward)
    policy.sleep()  # any later use of it brings weights
    policy.temperature = cfg.temperature
    own = cfg.eval_temperature in (0, cfg.temperature)  # else the dialogues are no samples of the policy that was trained
    divergence = kl_to_reference(paths, played, cfg) if kl and own else {}
    if late:
        asked.load(among)
    results, earned = {}, {}
    for dialogues in played.values():
        if hasattr(judge, "check_room"):
            judge.check_room(dialogues, played["base"])
    for name, dialogues in played.items():
        rewards = []
        same = not outside.is_outside(paths[name]) and engines.vocabulary(paths[name]) == engines.vocabulary(cfg.reference)
        row = summary(dialogues, played["base"], judge or by_reward(scores), scores, judged_turns(cfg), rewards, same,
                      policy.tokenizer)  # fmt: skip
        row |= divergence.get(name, {})
        row |= {"failed": len(prompts) - len(dialogues), "command": " ".join(["python", *sys.argv])}
        results[name], earned[name] = row, [None] * len(prompts)
        for i, r in zip(rows, rewards, strict=True):
            earned[name][i] = round(r, 6)
        if rank() == 0:
            write_file(os.path.join(folder, "rewards.json"), json.dumps(earned))
            write_file(os.path.join(folder, "results.json"), json.dumps(results, indent=1))
    barrier()
    return results, played


def judged_turns(cfg):
    """At how many turns dialogues are compared; 0, where the data asks its own questions: as wholes (section 4.3)."""
    return 0 if cfg.user == "dataset" else cfg.max_turns


def report(results, played, reward, folder):
    """What a person sees at the end: the table, Figure 1, one dialogue before and after, and where all else is."""
    last = list(played)[-1]
    turns_figure(results, os.path.join(folder, "win_rate.png"))
    print(f"\n{table(results)}\n\n{footer(results)}; figure: {os.path.join(folder, 'win_rate.png')}")
    gain = np.subtract(reward(played[last]), reward(played["base"]))
    i = int(np.argsort(gain, kind="stable")[len(gain) * 3 // 4])  # neither the best nor a lucky one
    print(f"\none opening, played by base and by {last} (the upper quartile of the gain, {gain[i]:+.2f}):\n")
    print(side_by_side(played["base"][i], played[last][i]))
    print(f"\nall results, curves and dialogues, for a browser: {page.write(folder)}", flush=True)


# ---------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------


def command(argv):
    """(cfg, the policies as they were given, the judge's flags by name); several policies go where a Config has one."""
    own = Parser(add_help=False, allow_abbrev=False)
    own.add_argument("--policy", nargs="+", action="extend", default=[])
    own.add_argument("--out")
    own.add_argument("--page", metavar="FOLDER")
    own, rest = own.parse_known_args(argv)
    flags = dict(judge=dict(default="reward", metavar="reward|world|URL|FOLDER", help="who compares [reward]"),
                 judge_model=dict(metavar="NAME", help="the judge's name at a URL"),
                 judge_tokens=dict(type=int, metavar="N", help="room for its comparison and verdict [512]"),
                 judge_context=dict(type=int, metavar="N", help="tokens of a prompt and its reply; else by its name"))
    if own.page is not None:
        if own.policy or own.out or rest:
            raise BadInput("--page FOLDER stands alone: report.html is made of what lies in the folder")
        return None, [], {"page": own.page}
    flags["page"] = dict(metavar="FOLDER", help="make report.html of a run's, a baselines' or an evaluation's folder, no more")
    cfg, extra = read_config(rest, __doc__, **flags)
    if not own.policy:
        raise BadInput("--policy names at least one run folder, checkpoint folder or hub id")
    served, speaks = "://" in extra["judge"], extra["judge"] not in ("reward", "world")
    for name, whom, is_one in (("model", "a URL", served), ("context", "a URL", served), ("tokens", "a language model", speaks)):
        if extra[f"judge_{name}"] is not None and not is_one:
            raise BadInput(f"--judge-{name} is for {whom}, and --judge {extra['judge']} is none")
    if extra["judge_tokens"] is None:
        extra["judge_tokens"] = 512
    if extra["judge_tokens"] < 1:
        raise BadInput(f"--judge-tokens must be positive, not {extra['judge_tokens']}")
    context = extra["judge_context"]
    if context is not None and context <= extra["judge_tokens"]:
        raise BadInput(f"--judge-context must be more than --judge-tokens {extra['judge_tokens']}, not {context}")
    out = own.out or os.path.join("runs", "eval", os.path.basename(cfg.out))
    if os.path.exists(out) and not os.path.isdir(out):
        raise BadInput(f"--out {out} is not a folder")
    return replace(cfg, out=out), own.policy, extra


def named(arguments):
    """{name: checkpoint folder} from PATH or NAME=PATH; a run's folder stands for its last iteration, and what is outside
    stays as it is."""
    policies = {}
    for argument in arguments:
        name, path = re.fullmatch(r"(?:([\w.-]+)=)?(.*)", argument, re.DOTALL).groups()
        name = name or name_of(path)
        if name in policies or name == "base":
            raise BadInput(f"two policies are called {name} (base is the reference): write NAME={path}")
        if outside.is_outside(path):
            policies[name] = path
            continue
        kept = on_rank_0(lambda path=path: files.kept_policies(path))  # of a run in progress each rank might see another last
        policies[name] = files.find_checkpoint(kept[max(kept)] if kept else path)
    return policies


def check_unseen(policies, cfg):
    """Validation prompts are training prompts: to a run that did not hold them back they are not unseen, by whatever name
    the data set goes; nor to a run that began with its policy. Asked of the reference as well."""
    if cfg.eval_split != "validation":
        return
    place, content = os.path.realpath(cfg.dataset), simulator.made_of_dataset(cfg)
    for flag, path in [("--reference", cfg.reference), *(("--policy", path) for path in policies.values())]:
        for run in runs_behind(path):
            same = os.path.realpath(run.get("dataset", "")) == place  # of a hub id: the same id
            same |= bool(content.items() & run.get("made_of", {}).items())
            if same and run.get("eval_split") != "validation":
                raise BadInput(f"{flag} {path}: its run, or one that this began from, was trained on the prompts of "
                               "--eval-split validation as well: only a run with that flag holds them back")  # fmt: skip


def runs_behind(path):
    """What is in the config.json of the run that made a checkpoint, of the run that made that one's --policy, and so on."""
    found, paths = {}, [path]
    while paths:
        path = paths.pop()
        for place in (os.path.abspath(path), os.path.realpath(path)):  # a link may lead to an iteration or out of its run
            file = os.path.join(os.path.dirname(os.path.dirname(place)), "config.json")
            if os.path.isdir(path) and os.path.exists(file) and file not in found:
                found[file] = files.read_json(file)
                paths.append(found[file].get("policy", ""))
    return found.values()


def check_trained(policies, cfg):
    """Refuse a policy that was trained at another temperature than it would play at, where its KL would be another's; say
    what else differs from its run's config.json, which may be meant."""
    for name, path in policies.items():
        run = next(iter(runs_behind(path)), {})
        then = run.get("temperature", cfg.temperature)
        if then != cfg.temperature and cfg.eval_temperature in (0, cfg.temperature):
            raise BadInput(f"--policy {path} was trained at --temperature {then:g}, not {cfg.temperature:g}: give that, or another "
                           "--eval-temperature, without KL")  # fmt: skip
        other = [f"{field} {run[field]!r}" for field in ("system", "max_turns", "max_new_tokens", "user", "reward")
                 if field in run and run[field] != getattr(cfg, field)]  # fmt: skip
        if other and rank() == 0:
            print(f"{name} was trained with other settings than it plays with: {', '.join(other)}", flush=True)


def name_of(path):
    """The last part of a path; of an iteration's policy the run's name, too."""
    parts = (os.path.abspath(path) if os.path.isdir(path) else path).removesuffix("/policy").split("/")
    first = -2 if re.fullmatch(r"iter_\d+", parts[-1]) else -1
    return re.sub(r"[^\w.-]", "_", "_".join(parts[first:]))


def load_judge(flags, cfg, count):
    """The judge that --judge names, None for the reward; cfg.out keeps a language model's replies.

    count: tokens of a text by the policy's tokenizer, which is near enough to a server's own."""
    name, model, judge_tokens = flags["judge"], flags["judge_model"], flags["judge_tokens"]
    wording = ANTHROPIC_HH if is_hh(cfg.dataset) and not worlds.world_file(cfg.dataset) else ULTRAINTERACT
    folder = os.path.join(cfg.out, "verdicts")
    if name == "reward":
        return None
    if name == "world":
        if not worlds.world_file(cfg.dataset):
            raise BadInput(f"--judge world: --dataset {cfg.dataset} is no world with a reward of its own")
        return by_reward(shared(worlds.load_reward(cfg.dataset, "--judge world")))
    if "://" in name:
        if not model:
            raise BadInput("--judge URL needs --judge-model NAME")
        room = (flags["judge_context"] or context_of(model) or math.inf) - judge_tokens
        ask = Server(name, model, max_tokens=judge_tokens, whole=True)
        return LLMJudge(ask, f"{name}#{model}", folder, wording, room, count)
    path = files.find_checkpoint(name)
    return LLMJudge(LocalJudge(path, cfg, judge_tokens), files.fingerprint(path), folder, wording)


def main(argv=None):
    with one_line("evaluate.py"):
        cfg, policies, flags = command(argv)
        if flags["page"] is not None:
            return print(page.write(flags["page"]))
        start_processes()
        policies = named(policies)
        cfg = simulator.prepare(replace(cfg, policy=cfg.reference), trains=False)
        beside = outside.check(policies.values(), cfg)
        check_unseen(policies, cfg)
        check_trained(policies, cfg)
        for path in policies.values():
            if not outside.is_outside(path):
                files.check_positions(path, cfg)
            if is_kin(path, cfg.reference):  # its KL will be measured
                families.check_policy(path)
        plan.check(cfg, only=("collect", "evaluate: KL"))
        claim(cfg.out, {"base": cfg.reference, **policies}, cfg)
        tokenizer = load_tokenizer(cfg.reference)
        judge = load_judge(flags, cfg, lambda text: len(encode(tokenizer, "", text)))
        for name, path in policies.items():
            if outside.is_outside(path) and not os.path.exists(os.path.join(cfg.out, "eval", f"{name}.jsonl")):
                outside.reach(outside.load(path, cfg), path)
        policy, user, reward = simulator.load_cast(cfg, beside)
        results, played = evaluate(policies, cfg.out, policy, user, reward, cfg, judge)
        if rank() == 0:
            report(results, played, reward, cfg.out)
    barrier()  # gloo aborts a process that leaves while another one still talks to it


if __name__ == "__main__":
    main()
