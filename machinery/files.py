"""Files that are whole or not there, checkpoint folders, and BadInput.

Weights are safetensors, never a pickle, and no code of a checkpoint is run. A file has its final name only when it is
whole; metrics.jsonl alone grows by its lines.
"""
import contextlib
import functools
import glob
import hashlib
import json
import math
import os
import shutil


class BadInput(ValueError):
    """Something the user of the program can mend: shown as one line, exit code 2, no traceback."""


def brief(error):
    """An error's own words in one line."""
    return " ".join(str(error).split())[:200]


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def from_hub(what):
    """Whatever the hub answers instead of a file is one line."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BadInput(f"{what}, and the hub does not give it ({type(error).__name__})") from None


def find_checkpoint(path):
    """A local folder for a checkpoint that is given as a folder or as a hub id; one line if there is none."""
    if os.path.isdir(path):
        if not os.path.exists(os.path.join(path, "config.json")):
            raise BadInput(f"{path} is not a checkpoint: it has no config.json")
        check_weights(path)
        return path
    if os.path.exists(path) or path.count("/") != 1 or path.startswith((".", "/", "~", "runs/")):
        raise BadInput(f"no checkpoint at {path}")
    from huggingface_hub import snapshot_download

    with from_hub(f"no folder {path}"):
        return snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "tokenizer*", "*.jinja"])


def config_file(path):
    """A checkpoint's config.json alone, of a folder or a hub id."""
    if os.path.isdir(path):
        return os.path.join(path, "config.json")
    from huggingface_hub import hf_hub_download

    with from_hub(f"no config.json of {path}: no such folder"):
        return hf_hub_download(path, "config.json")


def check_weights(path):
    """Every weight file of a checkpoint is there and whole: a copy that was cut short is found before it is loaded."""
    from safetensors import SafetensorError

    index = os.path.join(path, "model.safetensors.index.json")
    if os.path.exists(index):
        absent = set(read_json(index)["weight_map"].values()) - set(os.listdir(path))
        if absent:
            raise BadInput(f"{path} lacks {', '.join(sorted(absent))}")
    try:
        list(weight_names(path))
    except SafetensorError as error:
        raise BadInput(f"{path} has a weight file that is not whole: {error}") from None


def check_positions(path, cfg):
    """A policy's configuration loads, without any code of its own, and its context holds --max-length."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} has no config.json that loads: {brief(error)}") from None
    positions = getattr(config, "max_position_embeddings", math.inf)
    if cfg.max_length > positions:
        raise BadInput(f"--max-length {cfg.max_length}: {path} has {positions} positions")


def read_weights(path, prefixes=("",)):
    """(name, tensor) of every weight of a checkpoint folder whose name begins so, one at a time."""
    from safetensors import safe_open

    for file in weight_files(path):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():
                if name.startswith(prefixes):
                    yield name, weights.get_tensor(name)


def weight_names(path):
    from safetensors import safe_open

    for file in weight_files(path):
        with safe_open(file, "pt") as weights:
            yield from weights.keys()


def weight_files(path):
    found = sorted(glob.glob(os.path.join(path, "*.safetensors")))
    if not found:
        raise BadInput(f"{path} has no safetensors; other weight files can carry code and are not read")
    return found


@functools.lru_cache
def digest(file, size, changed):
    """A file's hash, computed once for each state of the file."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def fingerprint(path):
    """A checkpoint's identity wherever it lies: the hash of its weights, configuration and tokenizer."""
    found = sorted(weight_files(path) + glob.glob(os.path.join(path, "*.j*")))  # json and jinja
    parts = [digest(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in found]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def copy_tokenizer(source, target):
    """What a checkpoint needs beside its weights and its model's configuration."""
    for file in glob.glob(os.path.join(source, "*")):
        name = os.path.basename(file)
        if "token" in name or name in ("chat_template.jinja", "vocab.json", "merges.txt", "generation_config.json"):
            shutil.copy(file, target)


# ---------------------------------------------------------------------------------------------------------------
# A run's folder
# ---------------------------------------------------------------------------------------------------------------


def iteration_folder(out, t):
    return os.path.join(out, f"iter_{t}")


def policy_folder(out, t):
    """Where iteration t's policy is kept: a Hugging Face folder."""
    return os.path.join(out, f"iter_{t}", "policy")


def kept_policies(out):
    """{t: folder} of the policies that a run has kept, in order."""
    found = {}
    for path in glob.glob(os.path.join(glob.escape(out), "iter_*", "policy")):
        found[int(path.split(os.sep)[-2].removeprefix("iter_"))] = path
    return dict(sorted(found.items()))


# ---------------------------------------------------------------------------------------------------------------
# Reading and writing
# ---------------------------------------------------------------------------------------------------------------


def read_json(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def read_lines(path, torn=False):
    """The rows of a jsonl file; torn: without what stands behind its last line break."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if not torn or line.endswith("\n")]


@contextlib.contextmanager
def writing(path):
    """Yields a temporary name, which becomes `path` at the end: a reader finds the whole file or none."""
    from safetensors import SafetensorError

    try:
        yield f"{path}.partial"
        os.replace(f"{path}.partial", path)
    except (OSError, SafetensorError) as error:
        raise not_written(path, error) from None


def not_written(path, error):
    why = getattr(error, "strerror", None) or error
    return BadInput(f"cannot write {path} ({why}); what was finished is kept: make room and run the same command again "
                    "to go on")  # fmt: skip


def write_file(path, text):
    with writing(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_lines(path, rows):
    write_file(path, "".join(json.dumps(row) + "\n" for row in rows))


def append_line(path, row):
    """A line at the end of a file: the whole of it or, where the disk is full, nothing."""
    size = os.path.getsize(path)
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        raise not_written(path, error) from None


def write_folder(path, fill):
    """The same for a folder: fill(partial) writes into a temporary folder, which then takes its name."""
    with writing(path) as partial:
        shutil.rmtree(partial, ignore_errors=True)
        os.makedirs(partial)
        fill(partial)
        shutil.rmtree(path, ignore_errors=True)
