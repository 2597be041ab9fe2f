"""Config, the settings with the source of every value, the flags that change them, and the seeds made of them."""
import argparse
import difflib
import hashlib
import importlib.util
import inspect
import math
import os
import re
from dataclasses import dataclass, fields

from machinery import worlds
from machinery.files import BadInput
from machinery.ranks import world


def seed_for(*key):
    """A 62-bit seed made from a key such as (stream, turn, speaker): equal keys, equal seeds, on any machine.

    The released code gives one seed to a whole batch and to every turn, so that all prompts share their noise
    (vLLM draws the same noise for equal seeds); here no two draws share a key."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 2


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on; every field is a flag (num_prompts is --num-prompts)."""

    setting: str  # toy, one (section 4.2), two (section 4.3), or world: a --world of your own, values for a small model
    policy: str  # pi_1: a checkpoint folder or a hub id
    reference: str  # what win rates and KL are measured against; where --policy alone is given, the same
    user: str  # who plays the user: FILE.py, toy, dataset (its own questions), serve:CHECKPOINT, CHECKPOINT, or a URL
    user_model: str  # the model's name at a URL
    user_temperature: float  # of a language model as the user
    user_tokens: int  # its whole reply; a question that is cut off does not count
    # share of dialogues, rounded up, that the user may leave without a turn, and in an evaluation that may not fit; above it
    max_failures: float  # the run stops
    reward: str  # r(s_{H+1}): a checkpoint folder, a hub id, FILE.py, or toy
    reward_tokens: int  # a conversation that is longer for the reward model is dropped and counted, never cut
    dataset: str  # the first prompts: FILE.py, toy, ultrainteract, hh, a file of rows, a folder or a hub id
    system: str  # a system prompt before every conversation whose data has none of its own; "": none
    pairs: str  # finished pairs to train on instead of collecting: a file, a folder or a hub id; empty: collect
    engine: str  # vllm, transformers, or auto: vllm where it is installed
    out: str  # the run's folder
    seed: int
    iterations: int  # T of Algorithm 1; 0, in setting two: as many as one pass over the training prompts has
    num_prompts: int  # prompts an iteration; each gives at most one pair. 0, setting one: all there are (the paper)
    # 0, setting one: every iteration is a training of its own and draws from all prompts. N, setting two: iterations
    # are the updates of one training (one optimiser, one schedule, prompts pass by pass) and every N-th policy is kept.
    policy_every: int
    max_turns: int  # H ~ U(max_turns), section 4.2
    reset_law: str  # of (h, H): paper, H ~ U(max_turns) and h ~ U(H); or uniform over all h <= H (docs/baselines.md)
    hybrid: float  # refuel-hybrid of baselines.py: the share of roll-ins that are the data's own
    max_new_tokens: int  # a turn of the assistant
    max_length: int  # the engine's context: a dialogue that may outgrow it is dropped and counted
    max_dialogue: int  # section 4.2: a finished dialogue of more tokens is dropped, y's and y''s by one rule
    temperature: float  # of sampling and of ln pi in the loss, which must agree; no top-p, no top-k
    eta: float  # Eq. 1
    beta: float  # DPO's, which has no unit; eta's is 1 / reward
    gamma: float  # Eq. 11: the weight of ln pi_t/pi_0 in the reward
    penalty: float  # Eq. 11's Gamma: the reward of a dialogue with an answer that was cut; 0: it keeps its score
    train_layers: int  # the last so many layers learn, all else is frozen; 0: everything learns
    lr: float
    warmup: float  # share of the steps; then a cosine to 0. Setting two: none, and linear to 0 over the updates
    weight_decay: float
    batch_size: int  # pairs a step, over all ranks
    epochs: int  # passes over an iteration's pairs; with --patience the most of them
    validation: int  # pairs of an iteration, at most an eighth, held out and looked at every checkpoint_steps steps;
    # fewer than 16 are not, and patience does nothing then
    # looks at the held-out pairs without a new best loss after which a training ends, with its best policy; 0: none,
    # a training ends with its last epoch
    patience: int
    micro_tokens: int  # tokens of one forward and backward on one rank
    activation_checkpointing: str  # what of a layer runs again in the backward: none, selective (no product), full
    replicas: int  # copies of the weights; 1: sharded over all ranks; the number of nodes: within each node
    checkpoint_steps: int  # steps (setting two: updates) between two saved training states
    snapshot_steps: int  # steps between two policies kept for Figure 2; 0: none
    wave: int  # prompts whose two conversations an engine plays at once: the unit of work, of seeds and of resuming
    eval_wave: int  # the same of the evaluation
    eval_dialogues: int  # section 4.2: 500, where a turn's interval is +-4.4 points; the toy has more
    eval_split: str  # test; or validation, training prompts that are then not trained on: what constants are chosen on
    eval_temperature: float  # of the policies in the evaluation; 0: --temperature, as in training

    @property
    def one_training(self):
        """Whether all iterations are updates of one training (setting two), or each is a training of its own (one)."""
        return self.policy_every > 0


SETTINGS = {
    # eta: docs/baselines.md, where 300 was a point better, within noise; lr 5e-4 diverges. The world is described in toy.py.
    "toy": dict(
        policy="toy", reference="toy", user="toy", reward="toy", dataset="toy", pairs="", engine="auto",
        out="runs/toy", seed=0,
        user_model="", user_temperature=0.8, user_tokens=64, max_failures=0.05,
        reward_tokens=512, max_dialogue=512, max_length=512,  # room for 20 turns; the base policy has 512 positions
        iterations=2, num_prompts=2048, policy_every=0, max_turns=5, reset_law="paper", hybrid=0.5, max_new_tokens=16,
        temperature=1.0, system="", eta=100.0, beta=0.1, gamma=0.0, penalty=0.0, train_layers=0, lr=1e-4, warmup=0.1,
        weight_decay=1e-6, batch_size=32, epochs=4, validation=256, patience=2, micro_tokens=4096,
        activation_checkpointing="none", replicas=1, checkpoint_steps=32, snapshot_steps=0, wave=512, eval_wave=512,
        eval_dialogues=1000, eval_split="test", eval_temperature=0.0,
    ),
    "one": dict(
        policy="meta-llama/Meta-Llama-3-8B-Instruct",  # section 4.2; the reference is pi_1 itself
        reference="meta-llama/Meta-Llama-3-8B-Instruct",
        user="serve:meta-llama/Llama-3.1-70B-Instruct",  # C.2
        user_model="meta-llama/Llama-3.1-70B-Instruct",  # where --user is a URL
        user_temperature=0.8, user_tokens=1024,  # the released code; the paper is silent
        max_failures=0.05,  # ours: the released code takes any reply
        reward="RLHFlow/ArmoRM-Llama3-8B-v0.1", reward_tokens=4096,  # section 4.2; the length is the released code's
        dataset="ultrainteract", system="", pairs="", engine="auto", out="runs/one", seed=0,
        iterations=2, policy_every=0,  # section 4.2
        num_prompts=64_000,  # the released README's episodes, before what is dropped
        max_turns=5, reset_law="paper",  # section 4.2: H ~ U(5), h ~ U(H)
        hybrid=0.5,  # ours: the paper only mentions it
        max_new_tokens=1024, temperature=0.8,  # the released README
        max_length=8192,  # Llama 3's context: evaluation has no limit of its own
        # Sections 4.2 and C.4: 2,048. That drops pairs by the length which their own H gave: with answers of 350 and
        # questions of 125 tokens 71 % stay, P(H = 5) falls to .02 and P(h = 5) to .007 of 1/5 and 1/25, and hardly a
        # late turn is trained. (Released code: all roll to five turns and the first dialogue's length alone decides,
        # whatever H is: the law holds, 29 to 32 % stay, and y and y' are treated unlike.) At 3,072, 98.5 % stay and
        # P(H = 5) is .19.
        max_dialogue=3072,
        eta=1e3, lr=3e-7, warmup=0.1, weight_decay=1e-6, batch_size=128, epochs=1,  # the released README; C.3
        beta=0.1,  # ours: DPO's is not published; the middle of what is usual (0.01 to 0.5)
        validation=500, patience=0,  # the released code's; it trains its one epoch to the end, and so does this
        gamma=0.0, penalty=0.0, train_layers=0,  # C.1: Eq. 11 is setting two's, and all layers are trained
        micro_tokens=4096,  # ours: no pair is longer (3,072 and another answer); see --plan for the memory
        activation_checkpointing="full", replicas=1,  # ours: with selective 1.8 GiB would be left, within --plan's error
        checkpoint_steps=50, snapshot_steps=0,
        # ours: as many full-length dialogues as fit in the KV cache beside the user's part of an 80-GB GPU, see --plan
        wave=48, eval_wave=64,  # and 500 dialogues over 8 ranks in one round
        eval_dialogues=500, eval_split="test",  # section 4.2
        eval_temperature=0.0,  # ours: that of training; the paper is silent
    ),
    "two": dict(
        policy="meta-llama/Meta-Llama-3-8B-Instruct",  # section 4.3
        reference="meta-llama/Meta-Llama-3-8B-Instruct",
        user="dataset",  # section 4.3: the data's own questions, as many as there are
        user_model="", user_temperature=1.0, user_tokens=1024, max_failures=0.05,  # no model speaks for the user
        reward="sfairXC/FsfairX-LLaMA3-RM-v0.1", reward_tokens=4096,  # section 4.3; no dialogue reaches that length
        dataset="ultrainteract", system="", pairs="", engine="auto", out="runs/two", seed=0,
        num_prompts=32, batch_size=32,  # C.1: |D| = 32
        iterations=0,  # C.1: one pass over the data
        epochs=4,  # the released code: four steps on each |D|; the paper's one epoch is the pass over the data
        policy_every=500, checkpoint_steps=20,  # ours: a policy takes 32 GB, a training state 10
        max_turns=5, max_dialogue=3200,  # section 4.3; C.4 (section 4.3 itself says 2,048 tokens)
        reset_law="paper",  # H is the number of questions, h ~ U(H)
        hybrid=0.5, beta=0.1,  # ours, as in setting one
        validation=0, patience=0,  # an update has 32 pairs
        max_new_tokens=1024,  # Table 5; fewer for dialogues of more turns, see data.ULTRAINTERACT_CAPS
        max_length=4352,  # ours: 3,200 and the longest answer
        temperature=1.0,  # the released code
        eta=1.0, lr=3e-7, weight_decay=1e-6,  # the released README; linear to 0 as the released code
        gamma=0.0, penalty=-4.0,  # the released README for UltraInteract
        train_layers=4,  # C.1
        warmup=0.0, micro_tokens=8192, activation_checkpointing="selective", replicas=1, snapshot_steps=0,
        wave=4, eval_wave=64,  # ours: 8 ranks share 32 prompts, and 500 in the evaluation
        eval_dialogues=500, eval_split="test",  # section 4.3
        eval_temperature=0.0,  # ours: that of training, as KL needs; the released code evaluates at 0.01
    ),
    # Ours: a person's own task on a small model (--world FILE.py). What cannot be guessed is empty and asked for; the
    # rest is where to begin: eta for rewards in [0, 1], lr for a model of 0.1 to 1 billion parameters.
    "world": dict(
        policy="", reference="", user="", reward="", dataset="", system="", pairs="", engine="auto", out="runs/world", seed=0,
        user_model="", user_temperature=0.8, user_tokens=256, max_failures=0.05,
        reward_tokens=2048, max_dialogue=2048, max_length=2048,
        iterations=2, num_prompts=512, policy_every=0, max_turns=5, reset_law="paper", hybrid=0.5, max_new_tokens=256,
        temperature=1.0, eta=10.0, beta=0.1, gamma=0.0, penalty=0.0, train_layers=0, lr=5e-6, warmup=0.1,
        weight_decay=1e-6, batch_size=32, epochs=1, validation=64, patience=0, micro_tokens=4096,
        activation_checkpointing="selective", replicas=1, checkpoint_steps=50, snapshot_steps=0, wave=64, eval_wave=64,
        eval_dialogues=100, eval_split="test", eval_temperature=0.0,
    ),
}  # fmt: skip
# Where the data set's name says hh (a hub id or a path does as well), the values of setting two that differ: C.4 and
# the released README.
HH = {"two": dict(max_new_tokens=512, gamma=0.05, penalty=-10.0)}


# ---------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(message)

    def parse_args(self, argv=None):
        known, unknown = self.parse_known_args(argv)
        if unknown:
            flag = unknown[0].partition("=")[0]
            raise BadInput(f"unrecognized arguments: {' '.join(unknown)}{did_you_mean(flag, self._option_string_actions, 1)}")
        return known


def did_you_mean(word, names, most=3):
    """" (did you mean X?)" with the names that are near to a word; "" where none is."""
    near = difflib.get_close_matches(word, names, most, cutoff=0.5)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


# --help: which flags stand together; a field of Config that is in no list stands under "the run"
GROUPS = {
    "models": "policy reference user user_model user_temperature user_tokens max_failures reward reward_tokens engine",
    "data": "dataset system num_prompts",
    "sampling": "max_turns reset_law hybrid max_new_tokens max_length max_dialogue temperature wave",
    "loss": "eta beta gamma penalty",
    "optimiser": "lr warmup weight_decay batch_size epochs validation patience train_layers",
    "memory": "micro_tokens activation_checkpointing replicas",
    "evaluation": "eval_dialogues eval_wave eval_split eval_temperature",
}
WORLD = dict(metavar="FILE.py", help="your own prompts, user and reward in one file, short for --dataset FILE.py --user "
             "FILE.py --reward FILE.py, with its DEFAULTS (docs/world.md); without --setting: setting world")  # fmt: skip


def field_comments():
    """{field: the comment that stands at it in Config, or above it}: what --help says."""
    found, above = {}, []
    for line in inspect.getsource(Config).splitlines():
        code, _, comment = line.partition("#")
        if not code.strip():
            above = [*above, comment.strip()] if comment else []
            continue
        name = code.partition(":")[0].strip()
        found[name] = " ".join([*above, comment.strip()]).strip()
        above = []
    return found


def help_for(name, comment):
    """A field's comment and its value in each setting."""
    values = [f"{setting}: {values[name]}" for setting, values in SETTINGS.items() if values.get(name, "") != ""]
    return f"{comment} [{'; '.join(values)}]".replace("%", "%%") if values else comment.replace("%", "%%")


def make_parser(description, more):
    parser = Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    if more:
        own = parser.add_argument_group("plan" if "plan" in more else "this script")
        for name, options in more.items():
            own.add_argument("--" + name.replace("_", "-"), **options)
    run = parser.add_argument_group("the run")
    groups, comments = {}, field_comments()
    for title, names in GROUPS.items():
        groups |= dict.fromkeys(names.split(), parser.add_argument_group(title))
    run.add_argument("--world", default=argparse.SUPPRESS, **WORLD)
    for f in fields(Config):
        groups.get(f.name, run).add_argument("--" + f.name.replace("_", "-"), type=f.type, default=argparse.SUPPRESS,
                                             metavar=f.type.__name__, help=help_for(f.name, comments[f.name]))  # fmt: skip
    return parser


def read_config(argv, description=None, **more):
    """The configuration of a command line: the setting's values, each replaced by the world's and then by its flag.

    more: other flags of a script, name=dict of add_argument's options; they are returned beside it as a dict, in which
    "given" names the fields of Config that stood on the command line."""
    given = vars(make_parser(description, more).parse_args(argv))
    extra = {}
    for name in more:
        if name in given:
            extra[name] = given.pop(name)
    file = given.pop("world", None)
    parts = {given.get(name) for name in ("dataset", "user", "reward")}
    if file is None and len(parts) == 1 and given.get("dataset", "").endswith(".py"):
        file = given["dataset"]  # what --world is short for: DEFAULTS go with BASELINES
    setting = given.pop("setting", "world" if file else None)
    if setting not in SETTINGS:
        found = "is missing" if setting is None else f"is none of them: {setting}{did_you_mean(setting, SETTINGS)}"
        raise BadInput(f"--setting {found}; it is one of {', '.join(SETTINGS)}")
    values = dict(SETTINGS[setting])
    own = world_values(file) if file else {}
    dataset = given.get("dataset", own.get("dataset", ""))
    if is_hh(dataset) and worlds.world_file(dataset) is None:
        values |= HH.get(setting, {})
    values |= own
    begin = given.get("policy", own.get("policy"))
    if begin and "reference" not in own:
        values["reference"] = begin  # win rates and KL are against where the training begins
    if given.get("pairs"):
        values["iterations"] = 1  # a second one would train pi_2 on what pi_1 has said
    values |= given
    values["policy"] = values["policy"] or values["reference"]
    for name in ("policy", "user", "reward", "dataset"):
        if not values[name]:
            other = " (of evaluate.py: --reference)" if name == "policy" else ""
            raise BadInput(f"--{name}{other} is missing: {field_comments()[name]}")
    cfg = Config(setting=setting, **values)
    check(cfg, extra["gpus"] * extra["nodes"] if extra.get("plan") else world())
    return (cfg, extra | {"given": frozenset(given)}) if more else cfg


def world_values(file):
    """What --world FILE.py stands for: its prompts, user and reward, its run's folder, and what it says itself."""
    if worlds.world_file(file) is None:
        raise BadInput(f"--world {file}: a Python file, FILE.py, is due (docs/world.md)")
    stem = os.path.splitext(os.path.basename(worlds.world_file(file)))[0]
    own = typed(worlds.defaults(file), f"--world {file}", "DEFAULTS")
    return {"user": file, "reward": file, "dataset": file, "out": os.path.join("runs", stem)} | own


def typed(values, flag, where):
    """Values of Config that a file has under the name `where`, in their fields' types."""
    types, found = {f.name: f.type for f in fields(Config)}, {}
    for name, value in values.items():
        if name not in types or name == "setting":
            raise BadInput(f"{flag}: {where} has {name!r}, which is no field of Config{did_you_mean(str(name), types)}")
        good = isinstance(value, types[name]) or (types[name] is float and isinstance(value, int))
        if not good or isinstance(value, bool):
            raise BadInput(f"{flag}: {name} must be a {types[name].__name__}, not {value!r}")
        found[name] = types[name](value)
    return found


def is_hh(name):
    """Whether a data set's name or path says that it is Anthropic-HH."""
    return re.search(r"(?i)(?<![a-z])hh(?![a-z])", name) is not None


def engine_name(cfg):
    """What --engine auto is here: vllm where it is installed."""
    if cfg.engine != "auto":
        return cfg.engine
    return "vllm" if importlib.util.find_spec("vllm") else "transformers"


POSITIVE = """max_turns max_new_tokens eta beta lr temperature epochs micro_tokens checkpoint_steps wave
              eval_wave eval_dialogues user_tokens reward_tokens max_dialogue user_temperature""".split()
NOT_NEGATIVE = """num_prompts weight_decay seed snapshot_steps policy_every train_layers gamma validation patience
                  eval_temperature""".split()  # fmt: skip
CHOICES = {"engine": ("auto", "vllm", "transformers"), "activation_checkpointing": ("none", "selective", "full"),
           "reset_law": ("paper", "uniform"), "eval_split": ("test", "validation")}  # fmt: skip


# AdamW squares the gradient, which Eq. 1 divides by eta^2, and compares its root with epsilon / eta^2. At 1e5 the
# square of the smallest gradient that epsilon lets through, (1e-8 / eta^2)^2 = 1e-36, is a normal float32 (1.2e-38 or
# more); at 1e-5 one of 1e9 still has a square (3.4e38). Beyond, weights become NaN or move by far more than lr.
ETA = 1e-5, 1e5
# AdamW moves each weight by about lr: less than 1e-9 is lost in the rounding of a weight of 0.02, and 0.1 is more than
# most weights of a language model are.
LR = 1e-9, 0.1
VLLM_TEMPERATURE = 0.01  # vLLM samples at this one where a lower one is asked for


def check(cfg, processes):
    """Everything about a configuration that can be known to be wrong before anything is loaded.

    processes: those that run, or those that --plan is asked about."""

    def demand(good, name, words):
        if not good:
            raise BadInput(f"--{name.replace('_', '-')} must be {words}, not {getattr(cfg, name)}")

    for name in POSITIVE:
        demand(0 < getattr(cfg, name) < math.inf, name, "positive")
    for name in NOT_NEGATIVE:
        demand(0 <= getattr(cfg, name) < math.inf, name, "0 or more")
    for name, (*most, last) in CHOICES.items():
        near = did_you_mean(getattr(cfg, name), (*most, last))
        demand(getattr(cfg, name) in (*most, last), name, f"{', '.join(most)} or {last}{near}")
    for name, (low, high) in {"eta": ETA, "lr": LR}.items():
        demand(low <= getattr(cfg, name) <= high, name, f"in [{low:g}, {high:g}], where AdamW works in float32")
    demand(cfg.lr * cfg.weight_decay < 1, "weight_decay", f"less than 1 / --lr {cfg.lr:g}")
    demand(cfg.temperature >= VLLM_TEMPERATURE or engine_name(cfg) != "vllm", "temperature",
           f"at least {VLLM_TEMPERATURE:g}, below which vLLM samples at another one (or take --engine transformers)")
    one_pass = cfg.iterations == 0 and cfg.one_training
    demand(cfg.iterations > 0 or one_pass, "iterations", "positive (in setting two, 0 is one pass)")
    demand(math.isfinite(cfg.penalty), "penalty", "a number")
    alone = cfg.iterations == 1 and not cfg.one_training
    demand(not cfg.pairs or alone, "pairs", "left out in setting two, and with more than one iteration")
    divides = cfg.replicas > 0 and processes % cfg.replicas == 0
    demand(divides, "replicas", f"a divisor of {processes}, the number of processes")
    demand(0 <= cfg.max_failures <= 1, "max_failures", "a share of the dialogues, in [0, 1]")
    demand(0 <= cfg.warmup < 1, "warmup", "a share of the steps, in [0, 1)")
    longer = cfg.max_length > cfg.max_new_tokens
    demand(longer, "max_length", f"more than --max-new-tokens {cfg.max_new_tokens}")
    demand(cfg.num_prompts > 0 or not cfg.one_training, "num_prompts", "positive: an update of setting two has a number")
    fits = 0 < cfg.batch_size <= (cfg.num_prompts or math.inf)
    demand(fits, "batch_size", f"in 1..{cfg.num_prompts}, the number of prompts")
    demand(0 <= cfg.hybrid <= 1, "hybrid", "a share of the roll-ins, in [0, 1]")
    paper = cfg.reset_law == "paper" or cfg.user != "dataset"
    demand(paper, "reset_law", "paper where the data asks the questions: H is their number")
    held_out = cfg.validation == 0 or not cfg.one_training
    demand(held_out, "validation", f"0 in setting two, whose updates have {cfg.num_prompts} pairs")
    demand(cfg.validation > 0 or cfg.patience == 0, "patience", "0 without --validation pairs to look at")
    cold = cfg.eval_temperature == 0 or cfg.eval_temperature >= VLLM_TEMPERATURE or engine_name(cfg) != "vllm"
    demand(cold, "eval_temperature", f"0 (as --temperature) or at least {VLLM_TEMPERATURE:g}, below which vLLM samples "
           "at another one")
