"""What it costs a rank to read a data set: CPU seconds and peak resident memory, each case in a process of its own.

    python tests/data_cost.py                              200,000 rows of UltraInteract's form, jsonl and parquet
    python tests/data_cost.py --rows 20000 --forms jsonl   fewer rows, one form

Cases: setting one, setting two (the data's own questions), and setting one with the logs of the baselines read too.
The rows are synthetic: pseudo-words, five rows for two first prompts, one to five turns, about 4 KB a row; the tokenizer
is a byte-level BPE of 8,000 tokens that is trained on them. The hash is of all prompts in their order: it is the same for
two versions of the reader that give the same data. "beyond the start" is without what imports and tokenizer take."""
import argparse
import hashlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]


def words_of(rng):
    letters = "etaoinshrdlucmfw"
    return ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(20000)]


def make_rows(size):
    """Rows of UltraInteract's form; a first prompt has several rows, whose conversations grow."""
    rng = random.Random(0)
    vocabulary = words_of(rng)

    def text(mean):
        return " ".join(rng.choices(vocabulary, k=max(3, int(rng.gauss(mean, mean / 3)))))

    made, number = 0, 0
    while made < size:
        number += 1
        said = [{"from": "user", "value": f"{number}: {text(110)}"}]
        for turn in range(rng.randint(1, 4)):
            if turn:
                said = said + [{"from": "assistant", "value": text(130)}, {"from": "user", "value": text(40)}]
            if made < size:
                yield {"task": "Math", "dataset": "synthetic", "trajectory": said, "chosen": text(150),
                       "rejected": text(150), "id": f"id_{made}", "parent_id": f"id_{number}"}  # fmt: skip
            made += 1


def make_files(folder, size):
    import pyarrow
    import pyarrow.parquet

    path = os.path.join(folder, "data.jsonl")
    with open(path, "w", encoding="utf-8") as file:
        for row in make_rows(size):
            file.write(json.dumps(row) + "\n")
    writer, rows = None, []
    for row in [*make_rows(size), None]:
        if row:
            rows.append(row)
        if len(rows) == 10000 or not row and rows:
            table, rows = pyarrow.Table.from_pylist(rows), []
            writer = writer or pyarrow.parquet.ParquetWriter(os.path.join(folder, "data.parquet"), table.schema)
            writer.write_table(table)
    writer.close()


def make_tokenizer(folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from helpers import LLAMA3

    special = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = []
    for row in make_rows(500):
        texts.append(row["chosen"])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8000, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=special[0], eos_token=special[1],
                                        chat_template=LLAMA3)  # fmt: skip
    tokenizer.save_pretrained(folder)


def cpu():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def memory():
    """The highest resident memory of this program so far, in bytes (ru_maxrss would count the parent's)."""
    with open("/proc/self/status") as file:
        return 1024 * int(next(line for line in file if line.startswith("VmHWM")).split()[1])


def read(path, tokenizer_path, case):
    """One case, in this process."""
    import refuel
    from machinery import data, template

    setting = "two" if case == "two" else "one"
    flags = f"--setting {setting} --policy {tokenizer_path} --dataset"
    cfg = refuel.read_config([*flags.split(), path])
    tokenizer = template.load_tokenizer(tokenizer_path)
    start, base = cpu(), memory()
    found = data.load_data(cfg, tokenizer)
    logged = len(found.logs)
    if case == "one, logs":
        assert found.logs[logged - 1].chosen
    texts = hashlib.sha256(repr((found.train, found.test)).encode()).hexdigest()[:12]
    row = {"cpu_s": round(cpu() - start, 1), "gb": round(memory() / 1e9, 2), "beyond_gb": round((memory() - base) / 1e9, 2),
           "train": len(found.train), "test": len(found.test), "logged": logged, "hash": texts}  # fmt: skip
    print(json.dumps(row))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--forms", nargs="+", default=["jsonl", "parquet"])
    parser.add_argument("--cases", nargs="+", default=["one", "two", "one, logs"])
    parser.add_argument("--folder", help="where the files are made and kept; otherwise a temporary one")
    parser.add_argument("--read", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        return read(*args.read)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or temporary
        os.makedirs(folder, exist_ok=True)
        if not os.path.exists(os.path.join(folder, "data.parquet")):
            make_tokenizer(os.path.join(folder, "tokenizer"))
            make_files(folder, args.rows)
        print("| file | setting | CPU s | peak GB | beyond the start | train | test | logged | hash |\n|---|---|---|---|---|---|---|---|---|")
        for form in args.forms:
            path = os.path.join(folder, f"data.{form}")
            for case in args.cases:
                command = [sys.executable, __file__, "--read", path, os.path.join(folder, "tokenizer"), case]
                env = os.environ | {"HF_DATASETS_CACHE": os.path.join(temporary, "cache"), "TOKENIZERS_PARALLELISM": "false"}
                done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
                row = json.loads(done.stdout.splitlines()[-1])
                cells = [f"{os.path.getsize(path) / 1e9:.2f} GB {form}", case, *row.values()]
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
