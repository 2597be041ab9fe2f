"""Data sets as texts: first prompts and logged conversations of UltraInteract_pair, Anthropic-HH and their like.

Sections 4.2 and 4.3, appendix C.4, Table 5. Dialogues are made of them in simulator.py.
"""
import functools
import glob
import importlib.util
import os
import random
import re
from collections import Counter
from typing import Any, NamedTuple

from machinery.files import BadInput, brief, fingerprint_files, from_hub
from machinery.ranks import rank
from machinery.settings import seed_for
from machinery.template import checked, encode, load_tokenizer, template_pieces


class Prompt(NamedTuple):
    """An opening x_1; what only the user (and a world's reward) may know: wishes, or the questions to come; and the
    tokens of an answer, where the data set sets a limit (Table 5)."""

    text: str
    secret: Any = None
    limit: int | None = None


class Logged(NamedTuple):
    """A conversation of a data set: x_1..x_H, y_1..y_{H-1}, and the two answers to x_H."""

    questions: tuple
    answers: tuple
    chosen: str
    rejected: str | None  # None where the data's second conversation has another history
    secret: Any = None


class Data(NamedTuple):
    train: list  # prompts
    test: list
    logs: list  # conversations that begin with a training prompt, for the baselines that roll in by the data
    dropped: Counter  # rows by reason


DATASETS = {"ultrainteract": "openbmb/UltraInteract_pair", "hh": "Anthropic/hh-rlhf"}
HELD_OUT = 1000  # first prompts: Table 3's 500 for tests and 500 for validation; a fifth of a set with fewer than 5,000
# Setting two, tokens of (a question with its header, an answer): appendix C.4 for HH, Table 5 by the number of turns
HH_CAPS = (128, 512)
ULTRAINTERACT_CAPS = {1: (1024, 1024), 2: (768, 768), 3: (512, 512), 4: (256, 512), 5: (128, 512)}


def load_data(cfg, tokenizer):
    """The data set that --dataset names, as this policy and this setting see it; a process reads it once."""
    longest = min(cfg.max_dialogue, cfg.max_length - cfg.max_new_tokens)
    return read_data(cfg.dataset, tokenizer.name_or_path, cfg.user == "dataset", cfg.max_turns, longest)


def draw(what, size, cfg, t):
    """Which cfg.num_prompts of `size` rows iteration t takes.

    Setting one draws from all of them in each iteration. Setting two goes through all of them (but the last few) before
    any comes again, pass after pass in another order."""
    iterations = size // cfg.num_prompts if cfg.one_training else 1
    done, part = divmod(t - 1, iterations)
    rows = random.Random(seed_for(cfg.seed, what, done + 1)).sample(range(size), iterations * cfg.num_prompts)
    return rows[part * cfg.num_prompts :][: cfg.num_prompts]


@functools.lru_cache(maxsize=4)
def read_data(name, tokenizer_path, fixed, max_turns, longest):
    """Prompts and logs of UltraInteract_pair, Anthropic-HH or a set of their form; what is dropped is counted.

    fixed: the questions to come are the data's own (setting two); then a prompt is a list of all questions, with the
    caps of that setting. Else it is a first prompt of at most `longest` tokens. Prompts are de-duplicated, and those
    with one first prompt are on one side of the split. The split depends on the texts alone, neither on the order of
    the rows nor on any length or tokenizer, so that no other flag can bring a training prompt into the test. (The
    released code splits rows, without a seed, and shares first prompts between training and test.)"""
    rows, tokenizer, dropped = read_rows(name), load_tokenizer(tokenizer_path), Counter()
    logs, distinct = [], {}
    for row in decoded(name, rows):
        log = logged(row)
        if isinstance(log, str):
            dropped[log] += 1
            continue
        logs.append(log)
        key = log.questions if fixed else log.questions[0]
        if key in distinct:
            dropped["duplicate"] += 1
        distinct.setdefault(key, log)

    caps = HH_CAPS if "trajectory" not in rows.column_names else None
    candidates = list(distinct.values())
    prompts = {}  # by first prompt
    for log, why in zip(candidates, too_long(tokenizer, candidates, fixed, max_turns, longest, caps)):
        if why:
            dropped[why] += 1
            continue
        prompt = Prompt(log.questions[0])
        if fixed:
            _, answer_cap = caps or ULTRAINTERACT_CAPS[len(log.questions)]
            prompt = Prompt(log.questions[0], log.secret, answer_cap)
        prompts.setdefault(prompt.text, []).append(prompt)

    order = sorted({log.questions[0] for log in logs}, key=lambda text: seed_for("split", text))
    cut = min(HELD_OUT, len(order) // 5)
    test = [prompt for text in order[:cut] for prompt in prompts.get(text, ())]
    train = [prompt for text in order[cut:] for prompt in prompts.get(text, ())]
    sizes = f"{name}: {len(rows)} rows, {len(train)} training and {len(test)} test prompts; dropped: {dict(dropped)}"
    if not (train and test):
        raise BadInput(f"--dataset {sizes}")
    if rank() == 0:
        print(sizes, flush=True)
    trained_on = set(order[cut:])
    kept = [log for log in logs
            if log.questions[0] in trained_on and log.rejected and len(log.questions) <= max_turns]  # fmt: skip
    return Data(train, test, kept, dropped)


def decoded(name, rows):
    try:
        yield from rows
    except UnicodeDecodeError:
        raise BadInput(f"--dataset {name} holds text that is not UTF-8") from None


def logged(row):
    """Parse a row, or return why it was rejected."""
    try:
        if "trajectory" in row:
            history, chosen, rejected = turns_of(row["trajectory"]), row["chosen"], row["rejected"]
        else:
            *history, (role, chosen) = turns_of(row["chosen"])
            *other, (other_role, rejected) = turns_of(row["rejected"])
            rejected = rejected if other == history else None
            if not role == other_role == "assistant":
                return "roles do not alternate"
    except (ValueError, TypeError, KeyError):
        return "malformed"
    roles = ["user", *["assistant", "user"] * (len(history) // 2)]  # of an odd number of turns
    if [role for role, _ in history] != roles:
        return "roles do not alternate"
    try:
        texts = [checked(text) for _, text in history]
        rejected = rejected and checked(rejected)
        return Logged(tuple(texts[::2]), tuple(texts[1::2]), checked(chosen), rejected, texts[2::2])
    except BadInput:
        return "an empty turn"


def turns_of(value):
    """[(role, text)] of a list of messages, or of a text with the marks of Anthropic-HH."""
    if isinstance(value, str):
        before, *parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + value.lstrip())
        if before.strip():
            raise ValueError("a text that does not begin with a speaker")
        pairs = list(zip(parts[::2], parts[1::2]))
    else:
        pairs = [(m["from"], m["value"]) if "from" in m else (m["role"], m["content"]) for m in value]
    names = {"Human": "user", "human": "user", "Assistant": "assistant", "gpt": "assistant"}
    return [(names.get(role, role), text) for role, text in pairs]


def too_long(tokenizer, logs, fixed, max_turns, longest, caps):
    """For each conversation the reason why it cannot be a prompt, or None."""
    before, after, between, later = template_pieces(tokenizer)
    first, more = len(encode(tokenizer, before + after)), len(encode(tokenizer, between + later))
    if not fixed:
        counts = token_counts(tokenizer, [d.questions[0] for d in logs])
        return ["prompt too long" if first + n > longest else None for n in counts]
    max_turns = min(max_turns, len(ULTRAINTERACT_CAPS))
    short = [d for d in logs if len(d.questions) <= max_turns]
    counts = iter(token_counts(tokenizer, [t for d in short for t in (*d.questions, *d.answers, d.chosen)]))
    reasons = []
    for d in logs:
        H = len(d.questions)
        if H > max_turns:
            reasons.append(f"more than {max_turns} turns")
            continue
        questions, answers = [next(counts) for _ in range(H)], [next(counts) for _ in range(H)]
        question_cap, answer_cap = caps or ULTRAINTERACT_CAPS[H]
        over = max(n + (more if h else first) for h, n in enumerate(questions)) > question_cap
        reasons.append("question too long" if over else "answer too long" if max(answers) > answer_cap else None)
    return reasons


def token_counts(tokenizer, texts):
    counts = []
    for start in range(0, len(texts), 4096):
        part = texts[start : start + 4096]
        counts += map(len, tokenizer(part, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    return counts


def read_rows(name):
    """All rows of a data set: a parquet, json or jsonl file, a folder of them or of save_to_disk, or a hub id."""
    if not importlib.util.find_spec("datasets"):
        raise BadInput(f"--dataset {name} needs the package datasets (pip install -r requirements.txt)")
    import datasets
    import pyarrow

    path = DATASETS.get(name, name)
    saved = any(os.path.exists(os.path.join(path, file)) for file in ("dataset_info.json", "dataset_dict.json"))
    files = [] if saved else data_files(path)
    if not saved and not files and (os.path.isdir(path) or path.count("/") != 1 or path[0] in "./~"):
        raise BadInput(f"--dataset {name}: no parquet, json or jsonl file there, and no hub id")
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it cannot read it says twice
    try:
        if saved:
            parts = datasets.load_from_disk(path)
        elif files:
            kind = "parquet" if files[0].endswith(".parquet") else "json"
            check_json(files if kind == "json" else [])
            parts = datasets.load_dataset(kind, data_files=files)
        else:
            parts = datasets.load_dataset(path)
        rows = datasets.concatenate_datasets(list(parts.values())) if isinstance(parts, dict) else parts
    except (datasets.exceptions.DatasetsError, pyarrow.ArrowException, OSError, ValueError, TypeError,
            StopIteration) as error:  # fmt: skip
        error = error.__cause__ or error
        why = brief(f"{type(error).__name__} {error}")  # StopIteration is what an empty file gives
        raise BadInput(f"--dataset {name} cannot be read: {why}") from None
    missing = {"chosen", "rejected"} - set(rows.column_names)
    if missing:
        raise BadInput(f"--dataset {name} has no column {' and no column '.join(sorted(missing))}")
    return rows


def data_files(path):
    """The parquet files of a folder, else its json and jsonl files; json beside parquet only describes it."""
    if os.path.isfile(path):
        return [path]
    for kind in ("parquet", "json*"):
        found = sorted(glob.glob(os.path.join(glob.escape(path), "**", f"*.{kind}"), recursive=True))
        if found:
            return found
    return []


def check_json(files):
    """A file that begins with null crashes pyarrow."""
    for file in files:
        with open(file, "rb") as content:
            if content.read(1000).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] not in (b"{", b"[", b""):
                raise ValueError(f"{os.path.basename(file)} holds no JSON objects")


def fingerprint(cfg):
    """What --dataset names, by content: a hash of its files, or the hub's own name of its state."""
    path = DATASETS.get(cfg.dataset, cfg.dataset)
    found = [path] if os.path.isfile(path) else []
    for folder, _, names in os.walk(path):
        found += [os.path.join(folder, name) for name in names if os.path.isfile(os.path.join(folder, name))]
    if found:
        return fingerprint_files(found)
    from huggingface_hub import HfApi

    with from_hub(f"no file or folder {path}"):
        return HfApi().dataset_info(path).sha
