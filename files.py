"""Checkpoints, files and ranks: what a run finds, keeps and shares.

Weights are safetensors, never a pickle, and no code of a checkpoint is run. A file has its final name only when it is
whole; metrics.jsonl alone grows by its lines.
"""
import contextlib
import glob
import json
import math
import os
import shutil

from tqdm import tqdm


class BadInput(ValueError):
    """Something the user of the program can mend: shown as one line, exit code 2, no traceback."""


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------


def prepare_checkpoint(path):
    """A folder for what --policy or --reference names; `toy` is the toy's base policy, built on first use."""
    if path != "toy":
        return find_checkpoint(path)
    import toy

    if rank() == 0 and not toy.is_built(toy.FOLDER):
        toy.base_policy(toy.FOLDER)
    barrier()
    return toy.FOLDER


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
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "tokenizer*", "*.jinja"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BadInput(f"no folder {path}, and the hub does not give it ({type(error).__name__})") from None


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
        raise BadInput(f"{path} has no config.json that loads: {' '.join(str(error).split())[:200]}") from None
    positions = getattr(config, "max_position_embeddings", math.inf)
    if cfg.max_length > positions:
        raise BadInput(f"--max-length {cfg.max_length}: {path} has {positions} positions")


def read_weights(path, prefixes=("",)):
    """(name, tensor) of every weight of a checkpoint folder whose name begins so, one at a time; safetensors only,
    never a pickle."""
    from safetensors import safe_open

    tied = read_json(os.path.join(path, "config.json")).get("tie_word_embeddings")
    for file in weight_files(path):
        with safe_open(file, "pt") as weights:
            for name in filter(lambda name: name.startswith(prefixes), weights.keys()):
                yield name, weights.get_tensor(name)
                if tied and name == "model.embed_tokens.weight":
                    yield "lm_head.weight", weights.get_tensor(name)  # vLLM keeps its old head unless it is named


def weight_names(path):
    from safetensors import safe_open

    for file in weight_files(path):
        with safe_open(file, "pt") as weights:
            yield from weights.keys()


def weight_files(path):
    files = sorted(glob.glob(os.path.join(path, "*.safetensors")))
    if not files:
        raise BadInput(f"{path} has no safetensors; other weight files can carry code and are not read")
    return files


def copy_tokenizer(source, target):
    """Everything of a checkpoint folder but its weights and its model's configuration."""
    for file in glob.glob(os.path.join(source, "*")):
        name = os.path.basename(file)
        if "token" in name or name in ("chat_template.jinja", "vocab.json", "merges.txt", "generation_config.json"):
            shutil.copy(file, target)


# ---------------------------------------------------------------------------------------------------------------
# Files
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
    """Yields a temporary name, which takes the name `path` at the end: a reader finds the whole file or none."""
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


# ---------------------------------------------------------------------------------------------------------------
# Ranks
# ---------------------------------------------------------------------------------------------------------------


def rank():
    return int(os.environ.get("RANK", 0))


def world():
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank():
    return int(os.environ.get("LOCAL_RANK", 0))


def barrier():
    if world() > 1:
        import torch.distributed as dist

        dist.barrier()


def in_waves(path, items, size, work, desc):
    """The rows of work(items of a wave, number of the wave) for all waves, in order, from the file at `path`.

    Ranks take turns at the waves and leave each on disk; a wave that is there is not played again. The folder must be
    one that all ranks see."""
    parts, starts = f"{path}.parts", range(0, len(items), size)
    if not os.path.exists(path):
        os.makedirs(parts, exist_ok=True)
        names = [os.path.join(parts, f"{number:05d}.jsonl") for number in range(len(starts))]
        for number in tqdm(range(rank(), len(starts), world()), desc=desc, unit="wave", disable=rank() > 0):
            if not os.path.exists(names[number]):
                write_lines(names[number], work(items[starts[number] : starts[number] + size], number))
        barrier()
        if rank() == 0:
            write_lines(path, (row for name in names for row in read_lines(name)))
        barrier()
    if rank() == 0:
        shutil.rmtree(parts, ignore_errors=True)
    return read_lines(path)
