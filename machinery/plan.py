"""What a configuration needs, before anything is loaded: memory by part and phase, model loads, tokens, FLOPs, hours.

    python refuel.py --setting one --plan                                    8 GPUs of 80 GB
    python refuel.py --setting one --plan --gpus 4 --gpu-memory 139 --nodes 2

Only the config.json of each model is read; for the paper's models their shapes stand below, so that no hub is needed.
The engines' shares of a GPU that a run really uses are computed here as well (`engine_share`). P parameters, S shards.
"""
import os
from typing import NamedTuple

from machinery import worlds
from machinery.files import BadInput, config_file, read_json
from machinery.ranks import world

FLAGS = {  # of --plan; rates: an H100's data sheet, and FACTS seen elsewhere (README)
    "plan": dict(action="store_true", help="say what the run needs, and load nothing"),
    "gpus": dict(type=int, default=8, metavar="N", help="GPUs of a node [8]"),
    "nodes": dict(type=int, default=1, metavar="N", help="nodes [1]"),
    "gpu_memory": dict(type=float, default=79.0, metavar="GiB", help="of a GPU [79: what an 80 GB card shows]"),
    "answer_tokens": dict(type=float, default=350.0, metavar="N", help="of a mean answer [350]"),
    "question_tokens": dict(type=float, default=125.0, metavar="N", help="of a mean question [125]"),
    "justification_tokens": dict(type=float, default=40.0, metavar="N", help="that the user writes before it [40]"),
    "tflops": dict(type=float, default=989.0, metavar="N", help="a GPU's TFLOP/s in bfloat16, dense [989]"),
    "mfu": dict(type=float, default=0.2, metavar="SHARE", help="of it that is used [0.2; DPO of 8B models: 0.19 to 0.22]"),
    "bandwidth": dict(type=float, default=3350.0, metavar="GB/s", help="of a GPU's memory [3350]"),
}
LLAMA_8B = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                num_key_value_heads=8, vocab_size=128256)  # fmt: skip
KNOWN = {
    "meta-llama/Meta-Llama-3-8B-Instruct": LLAMA_8B,
    "meta-llama/Llama-3.1-70B-Instruct": LLAMA_8B | dict(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64),
    "RLHFlow/ArmoRM-Llama3-8B-v0.1": LLAMA_8B | dict(vocab_size=128257, head=False),
    "sfairXC/FsfairX-LLaMA3-RM-v0.1": LLAMA_8B | dict(head=False),
}  # fmt: skip
GIB = 2**30
CONTEXTS = 2.0 * GIB  # CUDA contexts, NCCL and graphs of the run and of the server
MARGIN = 0.05  # of a GPU: the allocator's fragments


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
    if worlds.world_file(path):
        return None
    return None if "://" in path or ("/" not in path and not os.path.isdir(path)) else shape(path)


def shape(path):
    """A model's shape from its config.json or from the table above."""
    path = path.removeprefix("serve:")
    config = worlds.policy_shape(path) if worlds.world_file(path) else KNOWN.get(path)
    if config is None:
        config = read_json(config_file(path))
    D, heads, V = (config[k] for k in ("hidden_size", "num_attention_heads", "vocab_size"))
    scores = any("Reward" in a or "Classification" in a for a in config.get("architectures") or ())
    head = 0 if config.get("tie_word_embeddings") or scores or not config.get("head", True) else V * D
    return Shape(D, config["intermediate_size"], config["num_hidden_layers"], heads,
                 config.get("num_key_value_heads") or heads, config.get("head_dim") or D // heads, V, head)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Tokens: expectations under the law of (H, h)
# ---------------------------------------------------------------------------------------------------------------


def law(max_turns):
    """E[H] and E[h] for H ~ U(max_turns), h ~ U(H)."""
    return (max_turns + 1) / 2, (max_turns + 3) / 4


def tokens(cfg, answer, question, justification):
    """Tokens for one prompt, dropped ones aside. Prefixes are cached: a turn is computed once in each roll-out."""
    H, h = law(cfg.max_turns)
    asked = 1 if "://" in cfg.user or model_of(cfg.user) else 0
    return {
        "policy: sampled": (2 * H - h + 1) * answer,  # H turns, then h..H again
        "policy: prefilled": (2 * H - h) * question,
        "user: sampled": asked * (2 * H - h - 1) * (justification + question),
        "user: prefilled": asked * (2 * H - h - 1) * (answer + question + 90),  # 90: appendix C.2's instructions
        "reward: read": 2 * H * (answer + question),
        "trainer: forward and backward": h * question + (h + 1) * answer,  # the prefix once, both responses
    }


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
    passed = c * T * (9 * m.D + 2 * m.groups * m.head_dim + 4 * m.I)  # what one layer keeps for its backward
    held = {"none": passed, "full": c * T * m.D,  # of a layer, until its backward
            "selective": c * T * (5 * m.D + 2 * m.groups * m.head_dim + 2 * m.I)}[cfg.activation_checkpointing]  # fmt: skip
    kept = (cfg.train_layers or m.layers) * held + (c + 4) * N * m.D
    work = passed * 0.6  # a forward that keeps nothing
    gradients, moments = 4 * learned / shards, 8 * learned / shards
    gathered = c * R + 2 * c * m.layer
    copied = c * R * (1 if shards == 1 else 2)  # what is gathered lies in a buffer first
    # backward begins with the head, goes through the layers, and ends with the root's gradients, whole and unreduced;
    # gradients of an earlier micro-batch are there from the beginning
    head_step = c * R + kept + (4 + c % 4) * head
    layer_step = gathered + c * head + kept + passed - held + (c + 4) * m.layer
    root_step = 0 if cfg.train_layers else c * R + (c % 4 * R if shards == 1 else (c + 4) * R)
    earlier = gradients if mine > T else 0
    between = moments + gradients if cfg.policy_every else 0  # setting two's moments and pi_0 outlive an update
    return {
        "collect": 4 * P / shards + between,
        "log-probs": 4 * P / shards + between + max(copied, gathered + work + c * N * m.D),
        "train": 4 * P / shards + moments + max(earlier + max(head_step, layer_step), gradients + root_step),
        "save": 4 * P / shards + moments + 4 * m.V * m.D,
        "evaluate: KL": 4 * P / shards + max(copied, gathered + 2 * work),
    }


def reading(m, tokens=16384):
    """A reward model's part: its body in bfloat16 and a forward of rewards.RewardModel's batch."""
    return 2 * (m.P - m.head) + 2 * tokens * (6 * m.D + 3 * m.I) if m else 0


def engine_bytes(cfg, gpus, nodes, total):
    """Bytes of a GPU that the policy's and the user's engines may take, weights and cache: {"policy": .., "user": ..}.

    What is left of a GPU while pairs are collected, after all weights, is halved: the policy says four times as much
    as the user, whose cache of a token is 2.5 times as large and shared out over the node. In training the policy's
    engine sleeps, so that phase is not the narrow one."""
    policy, user, reward = shapes(cfg)
    served = cfg.user.startswith("serve:")
    weights = {"policy": 2 * policy.P, "user": 2 * user.P / (tensor_parallel(user, gpus) if served else 1) if user else 0}
    others = trainer(policy, cfg, gpus * nodes // cfg.replicas, gpus * nodes, (1, 1))["collect"] + reading(reward) + CONTEXTS
    room = total * (1 - MARGIN) - others - sum(weights.values())
    least = cfg.max_length * policy.cache
    if room / (1 + bool(user)) < least:
        raise BadInput(f"GPUs of {total / GIB:.0f} GiB leave {room / GIB:.1f} GiB for the engines' caches, less than one "
                       "dialogue of --max-length: see --plan; more GPUs a node, a smaller user or an URL as --user")
    return {name: size + room / (1 + bool(user)) if size else 0 for name, size in weights.items()}


def tensor_parallel(m, gpus):
    """The most of a node's GPUs over which a model's attention heads can be shared out evenly."""
    return max(n for n in range(1, gpus + 1) if m.heads % n == 0 and (m.groups % n == 0 or n % m.groups == 0))


def engine_share(cfg, name):
    """vLLM's gpu_memory_utilization of this run's engine, "policy" or "user"."""
    import torch

    gpus, total = torch.cuda.device_count(), torch.cuda.get_device_properties(0).total_memory
    return engine_bytes(cfg, gpus, -(-world() // gpus), total)[name] / total


# ---------------------------------------------------------------------------------------------------------------
# --plan
# ---------------------------------------------------------------------------------------------------------------


def memory(cfg, x):
    """{phase: {part: bytes}} on one GPU, and the dialogues that the caches hold."""
    policy, user, reward = shapes(cfg)
    total, ranks = x["gpu_memory"] * GIB, x["gpus"] * x["nodes"]
    t = tokens(cfg, x["answer_tokens"], x["question_tokens"], x["justification_tokens"])
    H, _ = law(cfg.max_turns)
    pair = t["trainer: forward and backward"], 2 * x["answer_tokens"]
    share = engine_bytes(cfg, x["gpus"], x["nodes"], total)
    phases = {}
    for phase, trained in trainer(policy, cfg, ranks // cfg.replicas, ranks, pair).items():
        rolls = phase == "collect"  # else the policy's engine sleeps and the reward model is idle
        phases[phase] = {"user": share["user"], "policy's engine": share["policy"] if rolls else 0,
                         "reward model": reading(reward, 16384 if rolls else 0), "trainer": trained,
                         "contexts": CONTEXTS}  # fmt: skip
    dialogue = H * (x["answer_tokens"] + x["question_tokens"])
    held = {"policy": (share["policy"] - 2 * policy.P) / policy.cache / dialogue}
    if user:
        tp = tensor_parallel(user, x["gpus"]) if cfg.user.startswith("serve:") else 1
        held["user"] = (share["user"] - 2 * user.P / tp) / (user.cache / min(tp, user.groups)) / dialogue
    return phases, held


def hours(cfg, x, held):
    """{work: (tokens of one iteration, FLOPs, hours)}: reading by arithmetic, sampling by the bandwidth of memory."""
    policy, user, reward = shapes(cfg)
    ranks, H = x["gpus"] * x["nodes"], law(cfg.max_turns)[0]
    dialogue = H * (x["answer_tokens"] + x["question_tokens"])
    rows = {}
    for name, n in tokens(cfg, x["answer_tokens"], x["question_tokens"], x["justification_tokens"]).items():
        who, what = name.split(": ")
        m = {"policy": policy, "user": user, "reward": reward, "trainer": policy}[who]
        if not (m and n):
            continue
        n *= cfg.num_prompts
        if who == "trainer":
            rows["trainer: forward for ln pi_t"] = n, 2 * m.P * n, 2 * m.P * n / (ranks * x["tflops"] * 1e12 * x["mfu"]) / 3600
            n *= cfg.epochs
        flops = (6 if who == "trainer" else 2) * m.P * n
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


def show(cfg, x):
    """The plan as Markdown."""
    phases, held = memory(cfg, x)
    policy, user, reward = shapes(cfg)
    H, h = law(cfg.max_turns)
    lines = [f"{x['nodes']} x {x['gpus']} GPUs of {x['gpu_memory']:g} GiB, bfloat16; parameters: " + ", ".join(
        f"{name} {m.P / 1e9:.4g}e9" for name, m in (("policy", policy), ("user", user), ("reward", reward)) if m), ""]
    parts = list(phases["collect"])
    lines += ["| GiB on a GPU | " + " | ".join(parts) + " | sum | free |", "|---" * (len(parts) + 3) + "|"]
    for phase, row in phases.items():
        total = sum(row.values())
        cells = [f"{v / GIB:.1f}" for v in (*row.values(), total, x["gpu_memory"] * GIB - total)]
        lines.append(f"| {phase} | " + " | ".join(cells) + " |")
    lines += ["", "the caches hold " + ", ".join(f"{n:.0f} mean dialogues ({who}'s engine)" for who, n in held.items()),
              f"models loaded a run: {2 + bool(user) + bool(reward)} (policy's engine, trainer"
              + ", user" * bool(user) + ", reward" * bool(reward) + "); one trainer more for the evaluation's KL",
              f"E[H] = {H:.3g}, E[h] = {h:.3g}; assumed tokens: answer {x['answer_tokens']:g}, question "
              f"{x['question_tokens']:g}, justification {x['justification_tokens']:g}; no prompt is dropped", ""]  # fmt: skip
    pairs, saved = host_memory(cfg, x)
    lines += [f"host memory: {pairs / GIB:.2f} GiB a process for an iteration's pairs, {saved / GIB:.1f} GiB on rank 0 while a "
              "policy is saved", ""]  # fmt: skip
    lines += ["| an iteration | tokens | FLOPs | hours |", "|---|---|---|---|"]
    rows = hours(cfg, x, held)
    for name, row in (rows | {"sum": [sum(column) for column in zip(*rows.values())]}).items():
        lines.append(f"| {name} | {row[0]:.3g} | {row[1]:.3g} | {row[2]:.2f} |")
    iterations = f"{cfg.iterations} iterations: " if cfg.iterations else "an update takes "
    whole = sum(row[2] for row in rows.values()) * max(1, cfg.iterations)
    lines += ["", f"{iterations}{whole:.2f} hours and the evaluation, at {x['tflops']:g} TFLOP/s with a use of {x['mfu']:g}, "
              f"{x['bandwidth']:g} GB/s"]  # fmt: skip
    print("\n".join(lines))
