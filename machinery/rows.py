"""The rows of a data set, whatever its files are: parquet, json, csv, arrow, packed or not; a folder of them, or a hub id.

Local files are read here and not by the datasets library, which looks for patterns in their names and keeps what it has
read under a file's name and time, and so gives old rows for a new file. What it wrote itself, and hub ids, it reads.
"""
import csv
import functools
import glob
import hashlib
import importlib.util
import io
import json
import lzma
import os
import re
import stat
import sys

from machinery.files import BadInput, brief

DATASETS = {"ultrainteract": "openbmb/UltraInteract_pair", "hh": "Anthropic/hh-rlhf"}
TEST, VALIDATION, TRAIN = range(3)
PARTS = ["test", "validation", "training"]
PART_WORDS = {"train": TRAIN, "training": TRAIN, "test": TEST, "testing": TEST, "eval": TEST, "evaluation": TEST,
              "validation": VALIDATION, "valid": VALIDATION, "val": VALIDATION, "dev": VALIDATION}  # fmt: skip
PAIR_COLUMNS = "reject", "chosen_token", "reject_token", "chosen_mask", "reject_mask", "chosen_reward", "reject_reward"
COLUMNS = ("trajectory", "prompt", "messages", "conversations", "chosen", "rejected", *PAIR_COLUMNS)  # what is read of a file
OPENINGS = {"prompt", "messages", "conversations"}  # columns that say how a conversation begins without two answers to it
KINDS = [(".parquet",), (".json", ".jsonl", ".ndjson"), (".csv", ".tsv"), (".arrow",)]  # a folder's first is read
PACKED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4", ".xz": "xz"}
DESCRIPTIONS = {"config.json", "dataset_infos.json"}  # json files that are no data


def data_rows(name):
    """All (part, row) of a data set, one at a time; what is wrong with a file is one line.

    Local files are read here and not by the library: it looks for patterns in their names, and it keeps what it has
    read under a file's name and time, and then gives old rows for a new file."""
    missing, size = COLUMNS, 0
    for part, place, read in sources(name):
        try:
            for row in read():
                size += 1
                if missing:
                    missing = [column for column in missing if column not in row]
                yield part, row
        except file_errors() as error:
            raise unreadable(name, place, error) from None
    if not size:
        raise BadInput(f"--dataset {name} cannot be read: it holds no rows")
    pair = [column for column in ("chosen", "rejected") if column in missing]
    if pair and OPENINGS <= set(missing):
        raise BadInput(f"--dataset {name} has no column {' and no column '.join(pair)}, nor prompt or messages")


def sources(name):
    """(part, where it is, a function that gives its rows) of all parts of a data set."""
    path = DATASETS.get(name, name)
    kind = look(name, path)
    if kind in ("saved", "hub"):
        for word, rows in library(name, path, kind).items():
            yield part_of(word), f"{path} {word}".strip(), functools.partial(dataset_rows, rows)
        return
    for file in data_files(name, path):
        part = TRAIN if kind == "file" else part_of(os.path.relpath(file, path))
        yield part, file, functools.partial(file_rows, file)


def look(name, path):
    """What --dataset names: "file", "folder", "saved" (by save_to_disk) or "hub"."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            saved = {"dataset_info.json", "dataset_dict.json"} & set(os.listdir(path))
            return "saved" if saved else "folder"
        if stat.S_ISREG(mode):
            return "file"
    except (FileNotFoundError, NotADirectoryError):
        if path.count("/") == 1 and path[0] not in "./~":
            return "hub"
    except (OSError, ValueError) as error:
        raise unreadable(name, path, error) from None
    raise BadInput(f"--dataset {name}: no parquet, json, jsonl, csv or arrow file there, no folder and no hub id")


def part_of(name):
    """Training, validation or test, by the words of a split's or a file's name, then of the folders that it is in."""
    for piece in reversed(name.split(os.sep)):
        for word in re.split("[^a-z]+", piece.lower()):
            if word in PART_WORDS:
                return PART_WORDS[word]
    return TRAIN


@functools.lru_cache(maxsize=2)
def library(name, path, kind):
    """{split: rows} of a hub id or of what save_to_disk wrote, by the library."""
    if not importlib.util.find_spec("datasets"):
        raise BadInput(f"--dataset {name} needs the package datasets (pip install -r requirements.txt)")
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it cannot read it says twice
    try:
        parts = datasets.load_dataset(path) if kind == "hub" else datasets.load_from_disk(path)
    except (datasets.exceptions.DatasetsError, StopIteration, *file_errors()) as error:
        what = "is the name right, and is the hub within reach?" if kind == "hub" else WHOLE
        raise unreadable(name, path, error.__cause__ or error, what) from None
    return parts if isinstance(parts, dict) else {"": parts}


def wanted(names):
    """The columns that are read: two answers and what is before them, or else how a conversation begins."""
    found = [column for column in COLUMNS if column in names]
    return [column for column in found if column not in ("messages", "conversations") or "chosen" not in found]


def dataset_rows(dataset):
    columns = wanted(dataset.column_names)
    if not columns:
        yield from ({} for _ in range(len(dataset)))
        return
    for table in dataset.select_columns(columns).with_format("arrow").iter(1000):
        yield from table.to_pylist()


def data_files(name, path):
    """A file alone; the parquet files of a folder, else its json files and so on: json beside parquet describes it."""
    if os.path.isfile(path):
        return [path]

    def stop(error):
        raise unreadable(name, error.filename, error) from None

    files, seen = [], set()
    for folder, inner, names in os.walk(path, onerror=stop, followlinks=True):
        place = os.path.realpath(folder)
        if place in seen:  # a link to a folder above it
            inner.clear()
            continue
        seen.add(place)
        inner[:] = [each for each in inner if not each.startswith(".")]
        files += [os.path.join(folder, each) for each in names if not each.startswith(".") and each not in DESCRIPTIONS]
    for kinds in KINDS:
        found = sorted(file for file in files if suffix(file)[0] in kinds)
        if found:
            return found
    raise BadInput(f"--dataset {name} is a folder without data: no parquet, json, jsonl, csv or arrow file is in it")


def suffix(file):
    """(kind, packing) of a file by its name: data.jsonl.gz gives (".jsonl", ".gz")."""
    base, end = os.path.splitext(file.lower())
    packing = end if end in PACKED else ""
    return (os.path.splitext(base)[1] if packing else end), packing


def file_rows(file):
    """The rows of a file, as dictionaries; a file whose name says nothing is taken for json."""
    kind, packing = suffix(file)
    with open(file, "rb") as raw:
        stream = unpacked(raw, packing)
        if kind == ".parquet":
            yield from parquet_rows(stream)
        elif kind == ".arrow":
            yield from arrow_rows(stream)
        elif kind in (".csv", ".tsv"):
            yield from csv_rows(stream, "\t" if kind == ".tsv" else ",")
        else:
            yield from json_rows(stream)


def unpacked(raw, packing):
    if not packing:
        return raw
    if packing == ".xz":
        return lzma.open(raw)
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(raw, PACKED[packing]))


def parquet_rows(stream):
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(stream, pre_buffer=False)
    columns = wanted(file.schema_arrow.names)
    for batch in file.iter_batches(batch_size=1000, columns=columns):
        yield from batch.to_pylist() if columns else ({} for _ in range(batch.num_rows))


def arrow_rows(stream):
    import pyarrow

    try:
        batches = pyarrow.ipc.open_stream(stream)
    except pyarrow.ArrowInvalid:
        stream.seek(0)
        file = pyarrow.ipc.open_file(stream)
        batches = (file.get_batch(i) for i in range(file.num_record_batches))
    for batch in batches:
        columns = wanted(batch.schema.names)
        yield from batch.select(columns).to_pylist() if columns else ({} for _ in range(batch.num_rows))


def csv_rows(stream, delimiter):
    """Rows of a csv file whose first line names the columns; a quote that is never closed is where a file was cut."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), delimiter=delimiter, strict=True)
    size = 0
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(f"line {reader.line_num} has not as many fields as the first line")
        size += 1
        yield row
    if not size:
        raise ValueError("the file holds no rows")


def json_rows(stream):
    """Objects of a json file: one a line, or a list of them, or one that goes over several lines. A text is a prompt."""
    size = 0
    for number, line in enumerate(stream, 1):
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            if size:
                raise ValueError(f"line {number} is not JSON, {error.msg}") from None
            value = json.loads(text + stream.read().decode())
        if not isinstance(value, (dict, list, str)):
            raise ValueError(f"line {number} holds no JSON object")
        for row in value if isinstance(value, list) else [value]:
            row = {"prompt": row} if isinstance(row, str) else row
            size += bool(row)
            yield row if isinstance(row, dict) else {}
    if not size:
        raise ValueError("the file holds no rows")


def file_errors():
    """Whatever a file that cannot be read raises."""
    import pyarrow

    return (OSError, ValueError, TypeError, KeyError, EOFError, RecursionError, csv.Error, lzma.LZMAError,
            pyarrow.ArrowException)  # fmt: skip


WHOLE = "is it whole, and of the form that its name says?"


def unreadable(name, place, error, what=WHOLE):
    """One line: the data set, the file, what is wrong and what to do."""
    why = brief(f"{type(error).__name__} {error}")
    if isinstance(error, UnicodeError):
        why, what = "it holds text that is not UTF-8", "save it as UTF-8"
    elif isinstance(error, PermissionError):
        why, what = "no permission", "make it readable for who runs this"
    elif "holds no rows" in why:
        why, what = "it holds no rows", "fill it or take it away"
    return BadInput(" ".join(f"--dataset {name} cannot be read: {place}: {why}: {what}".split()))


# ---------------------------------------------------------------------------------------------------------------
# Which data it was
# ---------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def content_hash(name):
    path = DATASETS.get(name, name)
    kind = look(name, path)
    if kind == "hub":
        return hub_commit(name, path)
    if kind == "saved":
        files = sorted(glob.glob(os.path.join(glob.escape(path), "**", "*.arrow"), recursive=True))
    else:
        files = data_files(name, path)
    whole = hashlib.sha256()
    for file in files:
        try:
            with open(file, "rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
        except OSError as error:
            raise unreadable(name, file, error) from None
        whole.update(repr((os.path.relpath(file, path), digest)).encode())
    return whole.hexdigest()


def hub_commit(name, path):
    """The library keeps what it read of a hub id in a folder that is named by the commit."""
    folders = set()
    for rows in library(name, path, "hub").values():
        folders.update(os.path.basename(os.path.dirname(file["filename"])) for file in rows.cache_files)
    return " ".join(sorted(folders))
