"""What a configuration needs, before anything is loaded: memory by part and phase, model loads, tokens, FLOPs, hours.

    python refuel.py --setting one --plan                                    8 GPUs of 80 GB
    python refuel.py --setting one --plan --gpus 4 --gpu h200 --nodes 2

Only the config.json of each model is read; for the paper's models their shapes stand below, so that no hub is needed.
What the engines of a real run get is computed here as well (`engine_share`), and what does not fit is refused before
anything is loaded (`check`). tests/rehearse.py holds `trainer` against the real training on tensors without numbers.

P parameters, S shards, T tokens of a forward, N of them scored, c bytes of a number in the forward.
"""
import argparse
import math
import os
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from machinery import worlds
from machinery.files import BadInput, config_file, read_json
from machinery.ranks import device, local_world, world

# What the card shows in GiB, and its data sheet's TFLOP/s in bfloat16 (dense) and GB/s
GPUS = {"h100": (79.0, 989, 3350), "h200": (139.8, 989, 4800), "a100": (79.0, 312, 2039), "l40s": (44.4, 362, 864),
        "4090": (23.5, 165, 1008)}  # fmt: skip


def positive(text, kind=float):
    """A flag's number."""
    try:
        value = kind(text)
    except ValueError:
        value = 0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, not {text}")
    return value


FLAGS = {  # of --plan
    "plan": dict(action="store_true", help="say what the run needs, and load nothing"),
    "gpu": dict(choices=GPUS, default="h100", help="the GPUs [h100]"),
    "gpus": dict(type=partial(positive, kind=int), default=8, metavar="N", help="GPUs of a node [8]"),
    "nodes": dict(type=partial(positive, kind=int), default=1, metavar="N", help="nodes [1]"),
    "gpu_memory": dict(type=positive, default=None, metavar="GiB", help="of a GPU, in place of --gpu's"),
    "tflops": dict(type=positive, default=None, metavar="N", help="a GPU's TFLOP/s in bfloat16, dense, in place of --gpu's"),
    "bandwidth": dict(type=positive, default=None, metavar="GB/s", help="of a GPU's memory, in place of --gpu's"),
    "host_memory": dict(type=positive, default=None, metavar="GiB", help="of a node; if it is given, it must suffice"),
    "answer_tokens": dict(type=positive, default=350.0, metavar="N", help="of a mean answer [350]"),
    "question_tokens": dict(type=positive, default=125.0, metavar="N", help="of a mean question [125]"),
    "justification_tokens": dict(type=float, default=40.0, metavar="N", help="that the user writes before it [40]"),
    "mfu": dict(type=positive, default=0.2, metavar="SHARE", help="of it that is used [0.2; DPO of 8B models: 0.19 to 0.22]"),
}
LLAMA_8B = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                num_key_value_heads=8, vocab_size=128256)  # fmt: skip
KNOWN = {
    "meta-llama/Meta-Llama-3-8B-Instruct": LLAMA_8B,
    "meta-llama/Llama-3.1-70B-Instruct": LLAMA_8B | dict(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64),
    "meta-llama/Llama-3.2-1B-Instruct": LLAMA_8B | dict(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64, tie_word_embeddings=True),
    "meta-llama/Llama-3.2-3B-Instruct": LLAMA_8B | dict(
        hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, tie_word_embeddings=True),
    "Qwen/Qwen2.5-1.5B-Instruct": dict(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        vocab_size=151936, tie_word_embeddings=True),
    "RLHFlow/ArmoRM-Llama3-8B-v0.1": LLAMA_8B | dict(vocab_size=128257, head=False),
    "sfairXC/FsfairX-LLaMA3-RM-v0.1": LLAMA_8B | dict(head=False),
}  # fmt: skip
GIB = 2**30
INSTRUCTIONS = 90  # tokens of appendix C.2's instructions to the user
CONTEXTS = 2.0 * GIB  # CUDA contexts and NCCL of the run and of the server; assumed
GRAPHS = 1.0 * GIB  # an engine's CUDA graphs, which stay while it sleeps; assumed: vLLM's logs say 0.5 to 1 for an 8B
PROCESS = 3.0 * GIB  # of host memory: Python, CUDA and vLLM; assumed
MARGIN = 0.05  # of a GPU: not given to the engines' caches, for the allocator's fragments
SPARE = 0.02  # of a GPU: what no phase may need, since the plan is right to a few per cent
SEQUENCES, STEP_TOKENS = 256, 8192  # what an engine computes at once, at most: dialogues, tokens


class Shape(NamedTuple):
    D: int
    I: int  # noqa: E741
    layers: int
    heads: int
    groups: int
    head_dim: int
    V: int
    head: int  # parameters of an untied lm_head

    @property
    def layer(self):
        return self.D * self.head_dim * 2 * (self.heads + self.groups) + 3 * self.D * self.I + 2 * self.D

    @property
    def root(self):
        return self.V * self.D + self.head + self.D  # what is no layer: embedding, head, last norm

    @property
    def P(self):
        return self.layers * self.layer + self.root

    @property
    def cache(self):
        """Bytes of keys and values of one token in bfloat16."""
        return 2 * 2 * self.layers * self.groups * self.head_dim


def shapes(cfg):
    """(policy, user, reward): shapes, or None for what is no model on these GPUs."""
    return shape(cfg.policy), model_of(cfg.user), model_of(cfg.reward)


def model_of(name):
    """The shape of a model that a flag names; None for a URL, a world's file or a bare word such as `dataset`."""
    path = name.removeprefix("serve:")
    no_model = worlds.world_file(path) or "://" in path or ("/" not in path and not os.path.isdir(path))
    return None if no_model else shape(path)


def shape(path):
    """A model's shape from its config.json or from the table above."""
    path = path.removeprefix("serve:")
    config = worlds.policy_shape(path) if worlds.world_file(path) else KNOWN.get(path)
    if config is None:
        config = read_json(config_file(path))
    for name in ("hidden_size", "num_attention_heads", "vocab_size", "intermediate_size", "num_hidden_layers"):
        if name not in config:
            raise BadInput(f"{path}: its config.json has no {name}, without which its memory cannot be planned")
    D, heads, V = (config[k] for k in ("hidden_size", "num_attention_heads", "vocab_size"))
    scores = any("Reward" in a or "Classification" in a for a in config.get("architectures") or ())
    head = 0 if config.get("tie_word_embeddings") or scores or not config.get("head", True) else V * D
    return Shape(D, config["intermediate_size"], config["num_hidden_layers"], heads,
                 config.get("num_key_value_heads") or heads, config.get("head_dim") or D // heads, V, head)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Tokens: expectations under the law of (H, h)
# ---------------------------------------------------------------------------------------------------------------


def law(max_turns, kind="paper"):
    """E[H] and E[h] for H ~ U(max_turns), h ~ U(H), or (uniform) for all h <= H alike."""
    if kind == "uniform":
        return (2 * max_turns + 1) / 3, (max_turns + 2) / 3
    return (max_turns + 1) / 2, (max_turns + 3) / 4


def in_flight(max_turns, kind="paper"):
    """Of one prompt, on average, if all go in step: the most dialogues at once, and the most turns that they have; one
    dialogue up to turn h, two from there to turn H."""
    dialogues, turns = [], []
    for turn in range(1, max_turns + 1):
        now = 0
        for H in range(turn, max_turns + 1):
            for h in range(1, H + 1):
                chance = 2 / (max_turns * (max_turns + 1)) if kind == "uniform" else 1 / (max_turns * H)
                now += chance * (2 if h <= turn else 1)
        dialogues.append(now)
        turns.append(now * turn)
    return max(dialogues), max(turns)


def tokens(cfg, answer, question, justification):
    """Tokens for one prompt, dropped ones aside. Prefixes are cached: a turn is computed once in each roll-out."""
    H, h = law(cfg.max_turns, cfg.reset_law)
    asked = 1 if "://" in cfg.user or model_of(cfg.user) else 0
    return {
        "policy: sampled": (2 * H - h + 1) * answer,  # H turns, then h..H again
        "policy: prefilled": (2 * H - h) * question,
        "user: sampled": asked * (2 * H - h - 1) * (justification + question),
        "user: prefilled": asked * (2 * H - h - 1) * (answer + question + INSTRUCTIONS),
        "reward: read": 2 * H * (answer + question),
        "trainer: forward and backward": h * question + (h + 1) * answer,  # the prefix once, both responses
    }


def asked_of_a_url(cfg, x):
    """(tokens read, tokens written, requests) of one iteration by a user behind a URL, who is paid by the token: each
    question is asked with the whole conversation before it, and every reading counts (a provider's cache may be cheaper)."""
    K, read, written, requests = cfg.max_turns, 0, 0, 0
    turn, reply = x["answer_tokens"] + x["question_tokens"], x["justification_tokens"] + x["question_tokens"]
    for H in range(1, K + 1):
        for h in range(1, H + 1):
            share = 2 / (K * (K + 1)) if cfg.reset_law == "uniform" else 1 / (K * H)
            for t in [*range(1, H), *range(h, H)]:  # the question after answer t, in both roll-outs
                read += share * (t * turn + INSTRUCTIONS)
                written += share * reply
                requests += share
    return [cfg.num_prompts * n for n in (read, written, requests)]


# ---------------------------------------------------------------------------------------------------------------
# Memory, in bytes on one GPU
# ---------------------------------------------------------------------------------------------------------------


def trainer(m, cfg, shards, ranks, pair, c=2):
    """The trainer's part in each phase: {phase: bytes}. pair: tokens of (s_h, y, y'), of (y, y'); c: bytes of a number
    in the forward, 2 on GPUs and 4 on CPUs, where nothing is cast."""
    P, R = m.P, m.root
    learned = cfg.train_layers * m.layer or P
    head = m.V * m.D if not cfg.train_layers else 0  # of the head that learns
    mine = -(-cfg.batch_size // ranks) * pair[0]
    T = min(cfg.micro_tokens, mine)
    N = T * pair[1] / pair[0]
    weights, gradients, moments = 4 * P / shards, 4 * learned / shards, 8 * learned / shards
    pi_0 = gradients if cfg.gamma else 0  # as many bytes, in every phase of a run with Eq. 11
    between = pi_0 + (moments if cfg.policy_every else 0)  # setting two's moments outlive an update
    # what one layer keeps for its backward; a norm casts its input to float32
    passed = c * T * (9 * m.D + 2 * m.groups * m.head_dim + 4 * m.I) + (8 * T * m.D if c == 2 else 0)
    held = {"none": passed, "full": c * T * m.D,  # of a layer, until its backward
            "selective": c * T * (5 * m.D + 2 * m.groups * m.head_dim + 2 * m.I)}[cfg.activation_checkpointing]  # fmt: skip
    kept = (cfg.train_layers or m.layers) * held + (c + 4) * N * m.D
    block = (4 + c) * 1024 * 32768 if c == 2 else 0  # of logits and of their gradient: SelectedLogps.BLOCK
    copies = 1 if shards == 1 else 2  # what is gathered lies in a buffer first, the root's until the first layer is there
    gathered = c * R + 2 * c * m.layer

    def forward(tokens):
        """Without a backward: the first layer is gathered beside the root's buffer, or a layer does its work."""
        begins = copies * c * (R + m.layer) + c * tokens * m.D
        return max(begins, gathered + c * tokens * (6 * m.D + 3 * m.I) + block)

    # backward begins with the head, goes through the layers, and ends with the root's gradients, whole and unreduced;
    # gradients of an earlier micro-batch are there from the beginning
    head_step = c * R + c * m.layer + kept + (4 + c % 4) * head + block
    layer_step = gathered + c * head + kept + passed - held + (c + 4) * m.layer
    root_step = 0 if cfg.train_layers else (2 * c * R if shards == 1 else (c + 4) * R)
    earlier = gradients if mine > T else 0
    whole = 11 * m.V * m.D  # one weight of full_weights in float32, and what tells whether it is finite
    return {
        "collect": weights + between,
        "check": weights + forward(300),
        "log-probs": weights + between + pi_0 + forward(T),  # the live weights lie beside it meanwhile
        "train": weights + moments + pi_0 + max(earlier + max(head_step, layer_step), gradients + root_step),
        "save": weights + moments + pi_0 + whole,
        "wake": weights + between + whole,
        "evaluate: KL": weights + forward(16384),
    }  # fmt: skip


def reading(m, tokens=16384):
    """A reward model's part: its body in bfloat16 and a forward of rewards.RewardModel's batch."""
    return 2 * (m.P - m.head) + 2 * tokens * (6 * m.D + 3 * m.I) if m else 0


class Part(NamedTuple):
    """An engine's part of a GPU, in bytes."""

    weights: float
    graphs: float
    work: float  # of its largest step, the logits of all dialogues among it
    cache: float  # keys and values: exactly what vLLM is told

    @property
    def awake(self):
        return sum(self)


def engine_part(m, split=1):
    """An engine over `split` GPUs, without its cache."""
    step = 2 * STEP_TOKENS * (4 * m.D + ((m.heads + 2 * m.groups) * m.head_dim + 3 * m.I) / split)
    return Part(2 * m.P / split, GRAPHS, step + 5 * 4 * SEQUENCES * m.V, 0)  # 5: logits, and what becomes of them, float32


def engine_parts(cfg, gpus, ranks, total):
    """{"policy": Part, "user": Part}, the second where the user's model is on these GPUs; gpus: of a node.

    What is left of a GPU while pairs are collected is halved between the caches: the policy says four times as much as
    the user, whose cache of a token is 2.5 times as large and shared out over the node. None is smaller than the
    longest prompt and answer: then the plan shows what is missing."""
    policy, user, reward = shapes(cfg)
    split = split_of(cfg, user, gpus)
    parts = {"policy": engine_part(policy)} | ({"user": engine_part(user, split)} if user else {})
    others = trainer(policy, cfg, ranks // cfg.replicas, ranks, (1, 1))["collect"] + reading(reward) + CONTEXTS
    room = (total * (1 - MARGIN) - others - sum(part.awake for part in parts.values())) / len(parts)
    for name, m in (("policy", policy), ("user", user)):
        if m:
            longest, over = (cfg.max_length, 1) if name == "policy" else (2 * cfg.max_length + cfg.user_tokens, split)
            parts[name] = parts[name]._replace(cache=max(room, longest * cache_of(m, over)))
    return parts


def split_of(cfg, user, gpus):
    """Over how many GPUs the user's model is: the served one over the node, an engine of each rank over one."""
    return tensor_parallel(user, gpus) if user and cfg.user.startswith("serve:") else 1


def tensor_parallel(m, gpus):
    """The most of a node's GPUs over which a model's attention heads can be shared out evenly."""
    return max(n for n in range(1, gpus + 1) if m.heads % n == 0 and (m.groups % n == 0 or n % m.groups == 0))


def cache_of(m, split=1):
    """Bytes of a token's keys and values on one of `split` GPUs."""
    return m.cache / min(split, m.groups)


class Share(NamedTuple):
    """What vLLM is told: kv_cache_memory_bytes, by which it goes, and gpu_memory_utilization, the share of the GPU that
    must be free when it starts and that the engine then has, weights, graphs and largest step included."""

    cache: int
    utilization: float


def engine_share(cfg, name, path="", among=1):
    """This run's engine's Share: "policy", "user", or "other" for a checkpoint that plays or judges at `path` while the
    policy's engine sleeps, one of `among` such in its place (vLLM cannot take an engine back)."""
    x = machine()
    total = x["gpu_memory"] * GIB
    parts = engine_parts(cfg, x["gpus"], x["ranks"], total)
    if name != "other":
        return Share(int(parts[name].cache), parts[name].awake / total)
    m = shape(path)
    part, room = engine_part(m), (parts["policy"].awake - GRAPHS) / among
    cache = room - part.awake
    if cache < cfg.max_length * m.cache:
        short = (cfg.max_length * m.cache - cache) / GIB
        raise BadInput(f"{path} does not fit into what the policy's engine leaves of a GPU when it sleeps: {short:.1f} GiB are "
                       "missing; serve it elsewhere (a URL), or compare fewer models of other kinds at once")  # fmt: skip
    return Share(int(cache), room / total)


# ---------------------------------------------------------------------------------------------------------------
# --plan
# ---------------------------------------------------------------------------------------------------------------


def machine(x=None):
    """The flags of --plan with what --gpu stands for; without flags those of the machine that this process runs on."""
    if x is not None:
        names = ("gpu_memory", "tflops", "bandwidth")
        given = {name: x[name] for name in names if x[name] is not None}
        return x | {"ranks": x["gpus"] * x["nodes"]} | dict(zip(names, GPUS[x["gpu"]])) | given
    import torch

    total = torch.cuda.get_device_properties(device()).total_memory / GIB
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    return {name: options.get("default") for name, options in FLAGS.items()} | {
        "gpus": torch.cuda.device_count(), "nodes": world() // local_world(), "ranks": world(), "gpu_memory": total,
        "host_memory": host}  # fmt: skip


def memory(cfg, x):
    """{phase: {part: bytes}} on one GPU, and the dialogues that the caches hold."""
    x = machine(x) if "ranks" not in x else x
    policy, user, reward = shapes(cfg)
    t = tokens(cfg, x["answer_tokens"], x["question_tokens"], x["justification_tokens"])
    pair = t["trainer: forward and backward"], 2 * x["answer_tokens"]
    parts = engine_parts(cfg, x["gpus"], x["ranks"], x["gpu_memory"] * GIB)
    own = parts["policy"]
    # the policy's engine sleeps while the trainer works; a check at load, and the new weights' way in, find it awake
    engine = {"collect": own.awake, "check": own.awake - own.work, "wake": own.weights + own.graphs}
    phases = {}
    for phase, trained in trainer(policy, cfg, x["ranks"] // cfg.replicas, x["ranks"], pair).items():
        phases[phase] = {"user": parts["user"].awake if user else 0, "policy's engine": engine.get(phase, own.graphs),
                         "reward model": reading(reward, 16384 if phase == "collect" else 0), "trainer": trained,
                         "contexts": CONTEXTS}  # fmt: skip
    dialogue = law(cfg.max_turns, cfg.reset_law)[0] * (x["answer_tokens"] + x["question_tokens"])
    held = {"policy": own.cache / policy.cache / dialogue}
    if user:
        held["user"] = parts["user"].cache / cache_of(user, split_of(cfg, user, x["gpus"])) / dialogue
    return phases, held


def hours(cfg, x, held):
    """{work: (tokens of one iteration, FLOPs, hours)}: reading by arithmetic, sampling by the bandwidth of memory."""
    policy, user, reward = shapes(cfg)
    ranks, H = x["ranks"], law(cfg.max_turns, cfg.reset_law)[0]
    dialogue = H * (x["answer_tokens"] + x["question_tokens"])
    rows = {}
    for name, n in tokens(cfg, x["answer_tokens"], x["question_tokens"], x["justification_tokens"]).items():
        who, what = name.split(": ")
        m = {"policy": policy, "user": user, "reward": reward, "trainer": policy}[who]
        if not (m and n) or (cfg.pairs and who != "trainer"):  # finished pairs are not collected
            continue
        n *= cfg.num_prompts
        if who == "trainer":
            before = n * (2 if cfg.gamma else 1)  # Eq. 11 reads pi_0 as well
            first = "trainer: forward for ln pi_t" + ", ln pi_0" * bool(cfg.gamma)
            rows[first] = before, 2 * m.P * before, 2 * m.P * before / (ranks * x["tflops"] * 1e12 * x["mfu"]) / 3600
            n *= cfg.epochs
            through = 4 * cfg.train_layers * m.layer + 2 * m.V * m.D if cfg.train_layers else 4 * m.P  # back to the first that learns
        flops = (2 * m.P + (through if who == "trainer" else 0)) * n
        if what == "sampled":  # every step reads the weights once and each dialogue's cache
            served = who == "user" and cfg.user.startswith("serve:")
            tp, engines_ = (tensor_parallel(m, x["gpus"]), x["nodes"]) if served else (1, ranks)
            rows_ = max(1, min(256, held[who], cfg.wave * (x["gpus"] if served else 1)))
            step = (2 * m.P + rows_ * dialogue * m.cache) / tp / (x["bandwidth"] * 1e9)
            seconds = n / engines_ / rows_ * step
        else:
            seconds = flops / (ranks * x["tflops"] * 1e12 * x["mfu"])
        rows[name] = n, flops, seconds / 3600
    return rows


def host_memory(cfg, x):
    """Bytes of a node's memory: (of each process, for its pairs as int32 ids; of rank 0, for the policy while it is saved)."""
    t = tokens(cfg, x["answer_tokens"], x["question_tokens"], x["justification_tokens"])
    pair = 4 * t["trainer: forward and backward"] + 1000  # ids, and what else a pair is; measured: 6.2 KB for 5.2 KB of ids
    return cfg.num_prompts * pair, 4 * shape(cfg.policy).P


# ---------------------------------------------------------------------------------------------------------------
# What does not fit
# ---------------------------------------------------------------------------------------------------------------


def too_much(cfg, x, only=None):
    """(phase, GiB that are missing) of the phase that needs most beyond what is there; None if all fit.

    only: the phases that are looked at; all of them and the host's memory if it is None."""
    missing = {}
    for phase, row in memory(cfg, x)[0].items():
        if only is None or phase in only:
            missing[phase] = sum(row.values()) / GIB - x["gpu_memory"] * (1 - SPARE)
    if x["host_memory"] and only is None:
        pairs, saved = host_memory(cfg, x)
        missing["the host's memory"] = (x["ranks"] // x["nodes"] * (pairs + PROCESS) + saved) / GIB - x["host_memory"]
    worst = max(missing, key=missing.get)
    return (worst, missing[worst]) if missing[worst] > 0 else None


def remedies(cfg, x):
    """[(words, configuration, machine)]: what needs less memory, the cheapest first."""
    found, longest = [], cfg.max_dialogue + cfg.max_new_tokens
    if cfg.micro_tokens > longest:
        found.append((f"--micro-tokens {longest}", dict(micro_tokens=longest), {}))
    for kind in ("selective", "full")[("none", "selective", "full").index(cfg.activation_checkpointing) :]:
        found.append((f"--activation-checkpointing {kind}", dict(activation_checkpointing=kind), {}))
    if model_of(cfg.user):
        found.append(("--user URL --user-model NAME", dict(user="https://"), {}))
    if x["ranks"] < x["gpus"] * x["nodes"]:
        found.append((f"torchrun --nproc_per_node {x['gpus']}", {}, {"ranks": x["gpus"] * x["nodes"]}))
    elif x["gpus"] < 8:
        found.append(("8 GPUs a node (--gpus 8)", {}, {"gpus": 8, "ranks": 8 * x["nodes"]}))
    return found


def check(cfg, x=None, only=None):
    """Refuse, before anything is loaded, what does not fit, and name what would make it fit. x: the machine; this
    process's own, if it has GPUs, where it is None."""
    import torch

    if x is None and not torch.cuda.is_available():
        return
    x = x or machine()
    worst = too_much(cfg, x, only)
    if worst is None:
        return
    alone, together, both, there = [], {}, cfg, x
    for words, change, more in remedies(cfg, x):
        if not too_much(replace(cfg, **change), x | more, only):
            alone.append(words)
        if too_much(both, there, only):
            both, there = replace(both, **change), there | more
            together[words.split()[0]] = words  # full checkpointing takes the place of selective
    if alone:
        advice = "it fits with " + " or ".join(alone)
    elif not too_much(both, there, only):
        advice = "it fits with " + " and ".join(together.values())
    else:
        advice = "it needs more GPUs, larger ones, or smaller models"
    raise BadInput(f"{worst[0]}: {worst[1]:.1f} GiB are missing on {x['nodes']} x {x['gpus']} GPUs of {x['gpu_memory']:.1f} GiB "
                   f"with {x['ranks']} process{'es' * (x['ranks'] > 1)} (refuel.py --plan has the table); {advice}")  # fmt: skip


def show(cfg, x):
    """The plan as Markdown; what does not fit is refused below the table."""
    if not cfg.num_prompts:
        raise BadInput("--plan reads no data set: say with --num-prompts how many prompts an iteration has")
    x = machine(x)
    phases, held = memory(cfg, x)
    policy, user, reward = shapes(cfg)
    H, h = law(cfg.max_turns, cfg.reset_law)
    lines = [f"{x['nodes']} x {x['gpus']} GPUs of {x['gpu_memory']:g} GiB, bfloat16; parameters: " + ", ".join(
        f"{name} {m.P / 1e9:.4g}e9" for name, m in (("policy", policy), ("user", user), ("reward", reward)) if m), ""]
    drawn = ", which the data's own lengths decide" if cfg.user == "dataset" else ""
    parts = list(phases["collect"])
    lines += ["| GiB on a GPU | " + " | ".join(parts) + " | sum | free |", "|---" * (len(parts) + 3) + "|"]
    for phase, row in phases.items():
        total = sum(row.values())
        cells = [f"{v / GIB:.1f}" for v in (*row.values(), total, x["gpu_memory"] * GIB - total)]
        lines.append(f"| {phase} | " + " | ".join(cells) + " |")
    most, turns = in_flight(cfg.max_turns, cfg.reset_law)
    lines += ["", "the caches hold " + ", ".join(f"{n:.0f} mean dialogues ({who}'s engine)" for who, n in held.items()),
              f"--wave {cfg.wave}: both futures counted, at most {cfg.wave * most:.0f} dialogues at once, as long as "
              f"{cfg.wave * turns / H:.0f} mean dialogues (less by the prefixes that they share)",
              f"models loaded a run: {2 + bool(user) + bool(reward)} (policy's engine, trainer"
              + ", user" * bool(user) + ", reward" * bool(reward) + "); one trainer more for the evaluation's KL",
              f"E[H] = {H:.3g}, E[h] = {h:.3g}{drawn}; assumed tokens: answer {x['answer_tokens']:g}, question "
              f"{x['question_tokens']:g}, justification {x['justification_tokens']:g}; no prompt is dropped", ""]  # fmt: skip
    pairs, saved = host_memory(cfg, x)
    lines += [f"host memory of a node: {(x['gpus'] * (pairs + PROCESS) + saved) / GIB:.0f} GiB: {pairs / GIB:.2f} a process for an "
              f"iteration's pairs, {PROCESS / GIB:g} a process for what runs it, {saved / GIB:.1f} on rank 0 while a policy is "
              "saved", ""]  # fmt: skip
    print("\n".join(lines), flush=True)
    check(cfg, x)
    lines = ["| an iteration | tokens | FLOPs | hours |", "|---|---|---|---|"]
    rows = hours(cfg, x, held)
    for name, row in (rows | {"sum": [sum(column) for column in zip(*rows.values())]}).items():
        lines.append(f"| {name} | {row[0]:.3g} | {row[1]:.3g} | {row[2]:.3g} |")
    if "://" in cfg.user and not cfg.pairs:
        read, written, requests = asked_of_a_url(cfg, x)
        lines += ["", f"the user's server: {read:.3g} tokens to read and {written:.3g} to write an iteration, in {requests:.3g} "
                  f"requests, and {cfg.eval_dialogues * (cfg.max_turns - 1)} requests for each policy that is evaluated"]  # fmt: skip
    print("\n".join([*lines, "", in_hours(cfg, x, rows)]))


def in_hours(cfg, x, rows):
    one = sum(row[2] for row in rows.values())
    took = f"{cfg.iterations} iterations: {one * cfg.iterations:.2f} hours" if cfg.iterations else f"an update takes {3600 * one:.1f} s"
    return (f"{took} and the evaluation, at {x['tflops']:g} TFLOP/s with a use of {x['mfu']:g}, "
            f"{x['bandwidth']:g} GB/s")  # fmt: skip


def estimate(cfg):
    """The hours of this run on the GPUs that are there, in words; "" without GPUs, or where --num-prompts 0 leaves open how
    much there is to do. Speeds are those of the card's data sheet, or of an H100 where the card is none that is known."""
    import torch

    if not torch.cuda.is_available() or not cfg.num_prompts:
        return ""
    name, x = torch.cuda.get_device_name().lower(), machine()
    card = next((card for card in GPUS if card in name), "h100")
    x |= {"tflops": GPUS[card][1], "bandwidth": GPUS[card][2]}
    return in_hours(cfg, x, hours(cfg, x, memory(cfg, x)[1]))
