"""How data sets enter: forms of rows, files and folders, the data's own test rows, costs, and what is one line."""
import bz2
import contextlib
import csv
import gzip
import json
import lzma
import os
import random
import shutil
import string
import subprocess
import sys
import tempfile
from dataclasses import replace

import pytest

import machinery.rows
import simulator
from helpers import ROOT, hh, ultra
from machinery import data, rows, template
from machinery.files import BadInput


@pytest.fixture
def read(tokenizers, cfg, tmp_path):
    """A function that reads what lies at a path: setting one's limits, or setting two's with the data's own questions."""
    tokenizers["llama3"].save_pretrained(tmp_path / "tokenizer")
    tokenizer = template.load_tokenizer(str(tmp_path / "tokenizer"))

    def load(path, fixed=False):
        data.read_data.cache_clear()
        user = "dataset" if fixed else "http://localhost/v1"
        few = replace(cfg, dataset=str(path), user=user, max_length=4000, max_dialogue=4000, max_new_tokens=100)
        return data.load_data(few, tokenizer)

    return load


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lines(rows))
    return path


def said(role, text):
    return {"role": role, "content": text}


def texts(prompts):
    return {p.text for p in prompts}


ROWS = [ultra(f"question {i}") for i in range(20)]

# --- forms of rows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt, chosen, rejected, wanted", [
    ("q", "good", "bad", ("q",)),
    ("q", [said("assistant", "good")], [said("assistant", "bad")], ("q",)),
    ([said("user", "q")], "good", "bad", ("q",)),
    ([said("user", "q"), said("assistant", "a"), said("user", "r")], [said("assistant", "good")], [said("assistant", "bad")],
     ("q", "r")),
    ("q", [said("user", "q"), said("assistant", "good")], [said("user", "q"), said("assistant", "bad")], ("q",)),
    ("q", "\n\nHuman: q\n\nAssistant: good", "\n\nHuman: q\n\nAssistant: bad", ("q",)),
    ("\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:", " good", " bad", ("q", "r")),
    ([said("user", [{"type": "text", "text": "q"}])], [said("assistant", [{"type": "text", "text": "go"}, {"type": "text", "text": "od"}])],
     "bad", ("q",)),
], ids=range(8))  # fmt: skip
def test_a_prompt_with_two_answers_is_a_conversation_whatever_its_columns_hold(prompt, chosen, rejected, wanted):
    log = data.logged({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    assert (log.questions, log.chosen, log.rejected) == (wanted, "good", "bad")
    assert log.answers == ("a",) * (len(wanted) - 1) and log.secret == list(wanted[1:])


IMAGE = [{"type": "text", "text": "what is this?"}, {"type": "image", "text": "a caption"}]


@pytest.mark.parametrize("row, why", [
    ({"prompt": [said("user", IMAGE)], "chosen": "good", "rejected": "bad"}, "malformed"),
    ({"prompt": "q", "chosen": [said("assistant", IMAGE)], "rejected": "bad"}, "malformed"),
    ({"prompt": "q", "chosen": "", "rejected": "bad"}, "an empty turn"),
    ({"prompt": "", "chosen": "good", "rejected": "bad"}, "an empty turn"),
    ({"prompt": 7, "chosen": "good", "rejected": "bad"}, "malformed"),
    ({"prompt": [said("user", "q"), said("assistant", "a")], "chosen": "good", "rejected": "bad"}, "roles do not alternate"),
    ({"prompt": [said("system", 7), said("user", "q")], "chosen": "good", "rejected": "bad"}, "an empty turn"),
    ({"prompt": [said("system", "be kind")], "chosen": "good", "rejected": "bad"}, "roles do not alternate"),
    ({"prompt": [said("user", "q"), said("system", "x")], "chosen": "a", "rejected": "b"}, "roles do not alternate"),
], ids=range(9))  # fmt: skip
def test_a_row_that_a_dialogue_cannot_carry_is_dropped_for_a_reason(row, why):
    assert data.logged(row) == why


SYSTEM = [said("system", "be kind")]
TALK = [said("user", "q {}"), said("assistant", "a"), said("user", "then?")]
FORMS = {  # how people keep prompts; TRL's names: the first two are its prompt-only type, standard and conversational
    "a text": "q {}", "prompt": {"prompt": "q {}"}, "prompt of messages": {"prompt": [*SYSTEM, said("user", "q {}")]},
    "prompt and completion": {"prompt": "q {}", "completion": "a"}, "unpaired": {"prompt": "q {}", "completion": "a", "label": True},
    "messages": {"messages": [*SYSTEM, *TALK, said("assistant", "b")]}, "messages that end with the user": {"messages": TALK},
    "prompt beside messages": {"prompt": "q {}", "messages": TALK},
    "conversations": {"conversations": [{"from": "human", "value": "q {}"}, {"from": "gpt", "value": "a"}]},
    "explicit": {"prompt": "q {}", "chosen": "a", "rejected": "b"},
    "implicit": {"chosen": [*TALK, said("assistant", "a")], "rejected": [*TALK, said("assistant", "b")]},
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_prompts_without_two_answers_are_prompts_and_logs_where_there_is_an_answer(name, read, tmp_path):
    form = json.dumps(FORMS[name])
    rows = [json.loads(form.replace("{}", str(i))) for i in range(10)]
    found = read(write(tmp_path / "data.jsonl", rows))
    prompts = found.train + found.test
    assert texts(prompts) == {f"q {i}" for i in range(10)} and len(prompts) == 10 and not found.dropped
    assert {p.system for p in prompts} == {"be kind" if "be kind" in form else None}
    assert len(found.twice) == (8 if "rejected" in form else 0)
    assert len(found.logs) == (8 if len(found.twice) or name in ("messages", "conversations") else 0)
    asked = read(tmp_path / "data.jsonl", fixed=True).train  # with --user dataset
    assert all(p.secret == (["then?"] if "then?" in form else []) for p in asked)
    if name != "a text":
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "data.parquet"))
        assert read(tmp_path / "data.parquet")[:2] == found[:2]
    else:
        (tmp_path / "data.json").write_text(json.dumps(rows))
        assert read(tmp_path / "data.json")[:2] == found[:2]


def test_a_second_answer_that_is_missing_leaves_a_dialogue_to_roll_in_by(read, tmp_path):
    rows = [{"prompt": f"q {i}", "chosen": "good", "rejected": None} for i in range(10)]
    found = read(write(tmp_path / "data.jsonl", rows))
    assert len(found.train) == 8 and len(found.logs) == 8 and len(found.twice) == 0


@pytest.mark.parametrize("row", [
    {"prompt": [said("system", "be kind"), said("user", "q")], "chosen": "good", "rejected": "bad"},
    {"chosen": [said("system", "be kind"), said("user", "q"), said("assistant", "good")],
     "rejected": [said("system", "be kind"), said("user", "q"), said("assistant", "bad")]},
    ultra("q", chosen="good") | {"trajectory": [{"from": "system", "value": "be kind"}, {"from": "user", "value": "q"}]},
], ids=["prompt", "conversations", "trajectory"])  # fmt: skip
def test_a_system_turn_that_comes_first_is_the_dialogues(row, read, tmp_path, tokenizers):
    found = data.logged(row)
    assert (found.system, found.questions, found.chosen) == ("be kind", ("q",), "good")
    prompts = read(write(tmp_path / "data.jsonl", ROWS + [row]))
    (prompt,) = [p for p in prompts.train + prompts.test if p.text == "q"]
    tokenizer = tokenizers["chatml"]
    d = simulator.open_dialogue(tokenizer, prompt)
    expected = tokenizer.apply_chat_template([said("system", "be kind"), said("user", "q")], add_generation_prompt=True,
                                             return_dict=False)  # fmt: skip
    assert d.ids == expected and d.messages == [said("user", "q")] and d.conversation()[0] == said("system", "be kind")
    d.add_answer(tokenizer, tokenizer.encode("a<|im_end|>", add_special_tokens=False)).add_user(tokenizer, "b")
    for again in (d.reset(1), d.until(1), d.copy(), simulator.Dialogue.from_json(vars(d))):
        assert again.system == "be kind"
    assert d.reset(1).ids == expected


def test_a_template_that_takes_no_system_turn_says_so(tokenizers):
    tokenizer = tokenizers["chatml"]
    deaf = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>", chat_template=(
        "{% for m in messages if m['role'] != 'system' %}" + tokenizer.chat_template.split("%}", 1)[1]))  # fmt: skip
    simulator.Dialogue.start(deaf, "q")
    with pytest.raises(BadInput, match="takes no system prompt"):
        simulator.Dialogue.start(deaf, "q", system="be kind")


def test_setting_two_asks_the_questions_of_a_prompt_column(read, tmp_path):
    rows = []
    for i in range(10):
        prompt = [said("user", f"q {i}"), said("assistant", "a"), said("user", "then?")]
        rows.append({"prompt": prompt, "chosen": [said("assistant", "b")], "rejected": [said("assistant", "c")]})
    found = read(write(tmp_path / "data.jsonl", rows), fixed=True)
    assert len(found.train) == 8 and all(p.secret == ["then?"] and p.limit == 512 for p in found.train)


# --- files and folders -------------------------------------------------------------------------------------------

FLAT = [{"prompt": f"question {i}, \"so\"\nor so", "chosen": "good", "rejected": "bad"} for i in range(20)]


def write_csv(path, delimiter=","):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "chosen", "rejected"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(FLAT)


def write_file(path):
    """FLAT in the form that the path's name says."""
    import pyarrow
    import pyarrow.parquet

    name = path.name
    table = pyarrow.Table.from_pylist(FLAT)
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(table, path)
    elif name.endswith(".arrow"):
        with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    elif name.endswith((".csv", ".tsv")):
        write_csv(path, "\t" if name.endswith(".tsv") else ",")
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines(FLAT)))
    elif name.endswith(".bz2"):
        path.write_bytes(bz2.compress(lines(FLAT)))
    elif name.endswith(".xz"):
        path.write_bytes(lzma.compress(lines(FLAT)))
    elif name.endswith((".zst", ".lz4")):
        kind = {".zst": "zstd", ".lz4": "lz4"}[path.suffix]
        with pyarrow.CompressedOutputStream(str(path), kind) as file:
            file.write(lines(FLAT))
    elif name == "list.json":
        path.write_text(json.dumps(FLAT, indent=1))
    elif name == "one_line.json":
        path.write_text(json.dumps(FLAT))
    elif name == "bom.jsonl":
        path.write_bytes(b"\xef\xbb\xbf" + lines(FLAT))
    else:
        path.write_bytes(lines(FLAT))


NAMES = ["a.csv", "a.tsv", "a.parquet", "a.arrow", "a.jsonl", "a.ndjson", "a.jsonl.gz", "a.json.zst", "a.jsonl.bz2",
         "a.jsonl.xz", "a.jsonl.lz4", "list.json", "one_line.json", "bom.jsonl", "A.JSONL"]  # fmt: skip


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_file_gives_the_same_rows(name, folder, read, tmp_path):
    home = tmp_path / "data"
    home.mkdir()
    write_file(home / name)
    found = read(home if folder else home / name)
    assert texts(found.train + found.test) == {row["prompt"] for row in FLAT} and len(found.logs) == 16
    assert not found.dropped


def test_a_packed_csv_is_read_too(read, tmp_path):
    write_csv(tmp_path / "a.csv")
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    assert len(read(tmp_path / "a.csv.gz").train) == 16


ODD = ["a [b].jsonl", "a*.jsonl", "what?.jsonl", "split=1.jsonl", "with space.jsonl", "it's \"x\".jsonl", "a::b.jsonl",
       "zip:a.jsonl", "a#b%20c&d.jsonl", "~a.jsonl", "{a,b}.jsonl", "a\nb.jsonl", "\u00e9\u4e2d.jsonl"]  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_a_path_may_hold_any_character(name, read, tmp_path):
    other = [ultra(f"other {i}") for i in range(20)]
    for beside in ("a b.jsonl", "ab.jsonl", "whatx.jsonl"):  # what a pattern would find
        write(tmp_path / "file" / beside, other)
    wanted = {row["id"] for row in ROWS}
    assert texts(read(write(tmp_path / "file" / name, ROWS))[0]) < wanted
    folder = write(tmp_path / name / "inner" / name, ROWS).parent.parent
    assert texts(read(folder).train) < wanted


def test_a_new_file_of_the_same_name_size_and_time_gives_its_own_rows(read, tmp_path):
    path = write(tmp_path / "data.jsonl", ROWS)
    before = os.stat(path)
    old = read(path)
    write(path, [ultra(f"quastion {i}") for i in range(20)])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(path).st_size == before.st_size
    assert all(text.startswith("quastion") for text in texts(read(path).train)) and len(old.train) == 16


# --- test rows ---------------------------------------------------------------------------------------------------


def asked(*numbers):
    return [ultra(f"question {i}") for i in numbers]


PARTS = {"train": asked(*range(20)), "test": asked(18, 19, 30, 31), "validation": asked(0, 1, 40)}
LAYOUTS = ["{}.jsonl", "data/{}-00000-of-00001.jsonl", "{}/part.jsonl", "Prefs_{}.jsonl"]


def lay(home, layout, parts):
    for part, rows in parts.items():
        write(home / layout.format(part), rows)
    return home


@pytest.mark.parametrize("layout", [*LAYOUTS, "saved"])
def test_a_data_sets_own_test_rows_are_the_test_and_no_first_prompt_of_them_is_trained_on(layout, read, tmp_path, capsys):
    home = tmp_path / "data"
    if layout == "saved":
        import datasets

        parts = {part: datasets.Dataset.from_list(rows) for part, rows in PARTS.items()}
        datasets.DatasetDict(parts).save_to_disk(str(home))
    else:
        lay(home, layout, PARTS)
    found = read(home)
    assert texts(found.test) == {"question 18", "question 19", "question 30", "question 31"}
    assert texts(found.train) == {f"question {i}" for i in range(2, 18)}
    assert {log.questions[0] for log in found.logs} == texts(found.train) and len(found.logs) == 16
    assert "of its own test rows" in capsys.readouterr().out
    assert found.dropped == {"duplicate": 4, "held out": 3}
    assert 27 == len(found.train) + len(found.test) + sum(found.dropped.values())


@pytest.mark.parametrize("word", ["validation", "valid", "dev", "eval"])
def test_without_test_rows_the_validation_rows_are_the_test(word, read, tmp_path, capsys):
    lay(tmp_path / "data", "{}.jsonl", {"train": PARTS["train"], word: PARTS["validation"]})
    found = read(tmp_path / "data")
    assert texts(found.test) == {"question 0", "question 1", "question 40"}
    assert not texts(found.train) & texts(found.test) and "of its own" in capsys.readouterr().out


def test_the_first_prompt_of_a_test_row_that_is_dropped_is_not_trained_on(read, tmp_path):
    last = {"prompt": [said("user", "question 5"), said("system", "x")], "chosen": "good", "rejected": "bad"}
    broken = [ultra("question 3", chosen=""), ultra("question 4", "an end"), last, {"prompt": 7}, ultra("")]
    lay(tmp_path / "data", "{}.jsonl", {"train": asked(*range(10)), "test": [*broken, *asked(30)]})
    found = read(tmp_path / "data")
    assert texts(found.test) == {"question 30"} and len(found.logs) == 7
    assert texts(found.train) == {f"question {i}" for i in (0, 1, 2, 6, 7, 8, 9)} and found.dropped["held out"] == 3


def test_in_setting_two_a_conversation_of_the_training_rows_is_no_test_prompt(read, tmp_path):
    train = [ultra("question 1", "a", "another end"), *asked(2, 3, 4)]
    lay(tmp_path / "data", "{}.jsonl", {"train": train, "test": [ultra("question 1", "a", "the end")]})
    found = read(tmp_path / "data", fixed=True)
    assert [p.secret for p in found.test] == [["the end"]] and texts(found.train) == {"question 2", "question 3", "question 4"}
    assert found.dropped == {"held out": 1}


@pytest.mark.parametrize("parts", [{"train": ROWS}, {"test": ROWS}, {"harmless": ROWS[:9], "latest": ROWS[9:]}],
                         ids=["train", "test", "others"])  # fmt: skip
def test_a_data_set_without_splits_of_its_own_is_split_by_the_texts(parts, read, tmp_path, capsys):
    lay(tmp_path / "data", "{}.jsonl", parts)
    one_file = read(write(tmp_path / "one.jsonl", ROWS[::-1]))
    found = read(tmp_path / "data")
    assert (found.train, found.test) == (one_file.train, one_file.test) and len(found.test) == 4
    assert "of its own" not in capsys.readouterr().out


def test_a_hub_id_brings_its_own_test_rows_and_its_commit(read, cfg, tmp_path, monkeypatch):
    import datasets

    files = {}
    for part, rows in PARTS.items():
        files[part] = str(write(tmp_path / f"{part}.jsonl", rows))
    parts = datasets.load_dataset("json", data_files=files, cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "load_dataset", lambda path: parts if path == "someone/something" else 1 / 0)
    found = read("someone/something")
    assert texts(found.test) == {"question 18", "question 19", "question 30", "question 31"}
    commit = os.path.basename(os.path.dirname(parts["train"].cache_files[0]["filename"]))
    assert data.fingerprint(replace(cfg, dataset="someone/something")) == commit
    machinery.rows.library.cache_clear()


@pytest.mark.parametrize("name, part", [
    ("train", "training"), ("test_prefs", "test"), ("latest", "training"), ("contest/a.jsonl", "training"),
    ("test/train.jsonl", "training"), ("train/test.jsonl", "test"), ("helpful-base/test.jsonl.gz", "test"),
    ("a/dev/b.jsonl", "validation"), ("EVAL.json", "test"),
])  # fmt: skip
def test_which_part_a_name_says(name, part):
    assert rows.PARTS[rows.part_of(name)] == part


# --- costs -------------------------------------------------------------------------------------------------------


def cost(path, tokenizer_path):
    command = [sys.executable, os.path.join(ROOT, "tests", "data_cost.py"), "--read", str(path), str(tokenizer_path), "one"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_rows_pass_by_and_are_not_held(tokenizers, tmp_path):
    """40 MB of rows whose prompts are few and short take next to no memory."""
    tokenizers["llama3"].save_pretrained(tmp_path / "tokenizer")
    rows = [ultra(f"question {i % 50}", chosen="a" * 2000) for i in range(20000)]
    found = cost(write(tmp_path / "data.jsonl", rows), tmp_path / "tokenizer")
    assert found["beyond_gb"] < 0.03 and found["train"] == 40 and found["logged"] == 16000


def test_logs_are_read_when_somebody_asks_for_one(read, tmp_path):
    path = write(tmp_path / "data.jsonl", ROWS)
    found = read(path)
    assert len(found.logs) == 16 and "rows" not in vars(found.logs)
    assert found.logs[3].chosen == "good" and texts(found.train) == {log.questions[0] for log in found.logs}


def test_logs_of_a_file_that_changed_meanwhile_are_one_line(read, tmp_path):
    path = write(tmp_path / "data.jsonl", ROWS)
    found = read(path)
    write(path, ROWS[:9])
    with pytest.raises(BadInput, match="was changed while it was read"):
        found.logs[0]


def test_texts_that_conversations_share_are_held_once(read, tmp_path):
    rows = [ultra(f"question {i % 10}", "an answer", f"and {i}?") for i in range(40)]
    found = read(write(tmp_path / "data.jsonl", rows))
    by_text = {}
    for log in found.logs:
        for text in (*log.questions, *log.answers, log.chosen, log.rejected, *log.secret):
            assert by_text.setdefault(text, text) is text


ALPHABET = string.printable + "\u00e9\u4e2d\U0001f600\u0958\u1e9b\u0323\ufb01\u0390 \u2003" + "aaee"


@pytest.mark.parametrize("normalizer", [None, "NFC"])
def test_no_text_has_more_tokens_than_the_bound_says(normalizer, tokenizers):
    from tokenizers import normalizers

    from helpers import LLAMA3, make_bpe

    tokenizer = make_bpe(LLAMA3, ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
                         "<|begin_of_text|>", "<|eot_id|>")  # fmt: skip
    if normalizer:
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    factor = data.tokens_per_byte(tokenizer)
    assert factor == (3 if normalizer else 1)
    rng = random.Random(0)
    samples = ["\u0958" * 9, "\u0390" * 9, "<|eot_id|>" * 3, "", "a"]
    for _ in range(300):
        samples.append("".join(rng.choices(ALPHABET, k=rng.randint(1, 40))))
    for text in samples:
        count = len(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
        assert count <= data.most_tokens(text, factor) <= factor * len(text.encode())
    for limit in range(0, 60, 3):
        limits = [(text, limit) for text in samples]
        wanted = []
        for text in samples:
            wanted.append(len(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]) > limit)
        assert data.longer_than(tokenizer, limits) == wanted


def test_a_tokenizer_of_another_kind_has_no_bound(tokenizers):
    from helpers import LLAMA3, make_bpe
    from tokenizers import normalizers, pre_tokenizers

    assert data.tokens_per_byte(tokenizers["toy"]) == float("inf")
    for change in ("prefix space", "NFKC", "no bytes", "a step before"):
        tokenizer = make_bpe(LLAMA3, ["<|begin_of_text|>", "<|eot_id|>"], "<|begin_of_text|>", "<|eot_id|>")
        core = tokenizer.backend_tokenizer
        if change == "prefix space":
            core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        elif change == "NFKC":
            core.normalizer = normalizers.NFKC()
        elif change == "no bytes":
            core.pre_tokenizer = pre_tokenizers.Whitespace()
        else:  # it writes a space as three bytes
            steps = [pre_tokenizers.Metaspace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            core.pre_tokenizer = pre_tokenizers.Sequence(steps)
        assert data.tokens_per_byte(tokenizer) == float("inf"), change


# --- fingerprints ------------------------------------------------------------------------------------------------


def mark(cfg, path):
    rows.content_hash.cache_clear()
    return data.fingerprint(replace(cfg, dataset=str(path)))


def test_a_fingerprint_is_of_the_content_and_not_of_place_or_time(cfg, tmp_path):
    path = write(tmp_path / "data.jsonl", ROWS)
    first, before = mark(cfg, path), os.stat(path)
    other = shutil.copy(path, tmp_path / "copy.jsonl")
    assert mark(cfg, other) == first
    path.write_bytes(path.read_bytes().replace(b"question 7", b"quastion 7"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert mark(cfg, path) != first


def test_the_fingerprint_of_a_folder_is_of_all_its_files(cfg, tmp_path):
    for home in ("here", "there [1]"):
        lay(tmp_path / home, "{}.jsonl", PARTS)
    first = mark(cfg, tmp_path / "here")
    assert mark(cfg, tmp_path / "there [1]") == first
    (tmp_path / "here" / "README.md").write_text("no data")
    assert mark(cfg, tmp_path / "here") == first
    write(tmp_path / "here" / "more.jsonl", ROWS)
    assert mark(cfg, tmp_path / "here") != first


def test_the_fingerprint_of_a_saved_data_set_is_of_its_rows(cfg, tmp_path):
    import datasets

    for home, rows in (("a", ROWS), ("b", ROWS), ("c", ROWS[1:])):
        datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / home))
    first, same, other = (mark(cfg, tmp_path / home) for home in "abc")
    assert first == same != other


# --- one line ----------------------------------------------------------------------------------------------------

CSV = b"prompt,chosen,rejected\n"
CUT = {"a.jsonl.gz": gzip.compress(lines(ROWS))[:-20], "a.jsonl.xz": lzma.compress(lines(ROWS))[:-20],
       "a.jsonl.bz2": bz2.compress(lines(ROWS))[:-20], "a.jsonl": lines(ROWS)[:-20], "a.json": json.dumps(ROWS).encode()[:-20],
       "a.csv": CSV + b'q,good,"bad', "b.csv": CSV + b"q,good,bad\nq,go"}  # fmt: skip
WRONG = {  # file: content, a word of the line
    "a.csv": (b"", "holds no rows"), "b.csv": (CSV, "holds no rows"), "c.csv": (CSV + "q,\xe9,b\n".encode("latin-1"), "not UTF-8"),
    "d.csv": (CSV + b"a,b,c,d\n", "as many fields"), "e.csv": (b"a,b\n1,2\n", "no column chosen and no column rejected, nor prompt"),
    "a.jsonl": (lines(ROWS) + b"\0" * 100, "line 21"), "b.jsonl": ("\ufeff".join("ab").encode("utf-16"), "not UTF-8"),
    "c.jsonl": (b"\n" * 9, "holds no rows"), "d.jsonl.gz": (lines(ROWS), "cannot be read"), "e.jsonl.zst": (b"", "cannot be read"),
    "f.jsonl.zst": (lines(ROWS), "cannot be read"), "g.jsonl.xz": (lines(ROWS), "cannot be read"), "a.arrow": (b"ARROW1", "cannot be read"),
    "h.json": (b"[" * 100_000, "cannot be read"), "i.json": (b'{"chosen": 1' + b"0" * 5000 + b"}", "cannot be read"),
    "b.arrow": (b"", "cannot be read"), "a.parquet.gz": (b"", "cannot be read"), "c.arrow": (os.urandom(999), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside"])
@pytest.mark.parametrize("name, content, word", [(n, c, "cannot be read") for n, c in CUT.items()]
                         + [(n, c, w) for n, (c, w) in WRONG.items()])  # fmt: skip
def test_a_file_that_cannot_be_read_is_one_line_with_its_name(name, content, word, beside, read, tmp_path):
    home = tmp_path / "data"
    home.mkdir()
    (home / name).write_bytes(content)
    path = home / name
    if beside and "column" not in word and not name.endswith("parquet.gz"):  # among good files of its kind
        write_file(home / f"good{rows.suffix(name)[0]}")
        path = home
    with pytest.raises(BadInput, match=word) as stop:
        read(path)
    assert "\n" not in str(stop.value) and name in str(stop.value) and str(stop.value).startswith("--dataset ")


def test_rows_of_another_type_are_dropped_and_the_others_are_there(read, tmp_path):
    odd = [ultra("x") | {"chosen": 5}, ultra("x") | {"trajectory": "text"}, ultra("x") | {"chosen": {"a": [1]}},
           {"prompt": 1, "chosen": "2024-01-01", "rejected": True}, {"chosen": [[1]], "rejected": {}}]  # fmt: skip
    found = read(write(tmp_path / "data.jsonl", ROWS + odd + [{}, {"more": 1}]))
    assert len(found.train + found.test) == 20 and sum(found.dropped.values()) == 7


def test_a_text_that_looks_like_a_time_is_a_text():
    assert data.logged(ultra("2024-01-01", chosen="12:30")).questions == ("2024-01-01",)


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 300, "/dev/null", "./nothing", "nothing"])
def test_a_name_of_nothing_is_one_line(name, read):
    with pytest.raises(BadInput, match="--dataset") as stop:
        read(name)
    assert "\n" not in str(stop.value)


def test_a_hub_id_that_cannot_be_had_is_one_line(read, monkeypatch):
    import datasets

    def fail(path):
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(BadInput, match="is the name right, and is the hub within reach") as stop:
        read("no/such")
    assert "\n" not in str(stop.value) and "no/such" in str(stop.value)


def test_a_folder_in_a_circle_of_links_is_read_once(read, tmp_path):
    write(tmp_path / "data" / "a.jsonl", ROWS)
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data")
    assert not read(tmp_path / "data").dropped


def test_a_link_to_nothing_is_one_line(read, tmp_path):
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nothing.jsonl")
    write(tmp_path / "good.jsonl", ROWS)
    with pytest.raises(BadInput, match="gone.jsonl"):
        read(tmp_path)


@contextlib.contextmanager
def nobody():
    """Root may read everything; nobody may not."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("closed", ["file", "folder", "inner", "above"])
def test_what_may_not_be_opened_is_one_line_that_says_so(closed, read, tmp_path):
    read(write(tmp_path / "before.jsonl", ROWS))  # whatever is imported lazily is there
    with tempfile.TemporaryDirectory() as home:
        os.chmod(home, 0o755)
        file = os.path.join(home, "data", "inner", "a.jsonl")
        os.makedirs(os.path.dirname(file))
        shutil.copy(tmp_path / "before.jsonl", file)
        shutil.copy(tmp_path / "before.jsonl", os.path.join(home, "data", "b.jsonl"))
        where = {"file": file, "folder": os.path.join(home, "data"), "inner": os.path.dirname(file), "above": os.path.join(home, "data")}
        path = file if closed == "above" else os.path.join(home, "data")
        os.chmod(where[closed], 0)
        with nobody(), pytest.raises(BadInput, match="no permission: make it readable") as stop:
            list(rows.data_rows(path))
        os.chmod(where[closed], 0o755)
    assert "\n" not in str(stop.value) and str(stop.value).startswith("--dataset ")


def test_the_baselines_draw_the_same_dialogues_of_lazy_logs(read, cfg, tmp_path):
    path = write(tmp_path / "data.jsonl", [ultra(f"question {i}", "one", "and two?") for i in range(20)])
    read(path)
    few = replace(cfg, dataset=str(path), user="http://localhost/v1", num_prompts=6)
    tokenizer = template.load_tokenizer(str(tmp_path / "tokenizer"))
    pairs = simulator.offline_prompts(few, tokenizer, 1, twice=True)
    assert len(pairs) == 6 and all(len(first.spans) == 2 for first, _ in pairs)


def test_in_setting_two_the_baselines_roll_in_by_refuels_own_conversations(read, cfg, tmp_path, capsys):
    """Same questions, limits and de-duplication; a second answer is asked for by LT-OFFLINE alone."""
    rows = [hh(f"question {i}", "an answer", "and two?", "two") for i in range(20)]
    rows += [hh(f"question {i}", "another", "and two?", "2") for i in range(5)]  # the same questions again
    rows += [hh(f"alone {i}", "an answer") | {"rejected": hh(f"elsewhere {i}", "x")["chosen"]} for i in range(10)]
    rows += [hh("long", "word " * 600), hh("q " * 200, "short")]
    path = write(tmp_path / "hh.jsonl", rows)
    found = read(path, fixed=True)
    assert len(found.twice) > 3
    endless = [row | {"rejected": row["rejected"].replace("worse", "worse " * 600)} for row in rows]
    assert len(read(write(tmp_path / "endless.jsonl", endless), fixed=True).twice) == 0  # both answers have the limit
    capsys.readouterr()
    found = read(path, fixed=True)
    prompts = {(p.text, *p.secret) for p in found.train}
    assert {log.questions for log in found.logs} == prompts and len(found.logs) == len(found.train) == 24
    assert {log.questions for log in found.twice} == {key for key in prompts if len(key) == 2}
    assert all(log.rejected == "worse" and log.answers == ("an answer",) for log in found.twice)
    assert {log.limit for log in found.logs} == {512}  # Table 5's, for what the policy says after it
    share = len(found.twice) / 24
    said = f"turns: {1 - share:.3f}, {share:.3f}, with two answers: 0.000, 1.000"
    assert said in capsys.readouterr().out
    few = replace(cfg, dataset=str(path), user="dataset", max_length=4000, max_dialogue=4000, max_new_tokens=100, num_prompts=6)
    tokenizer = template.load_tokenizer(str(tmp_path / "tokenizer"))
    assert {d.limit for d in simulator.offline_prompts(few, tokenizer, 1)} == {512}


def test_more_turns_than_table_5_has_limits_for_act_or_are_refused(read, cfg, tmp_path):
    long = [hh(f"question {i}", *["a", "more?"] * 6, "end") for i in range(10)]  # seven turns
    few = replace(cfg, user="dataset", max_length=4000, max_dialogue=4000, max_new_tokens=100)
    read(write(tmp_path / "x.jsonl", ROWS))
    tokenizer = template.load_tokenizer(str(tmp_path / "tokenizer"))
    path = str(write(tmp_path / "hh.jsonl", long + [hh(f"short {i}", "a") for i in range(10)]))
    assert data.load_data(replace(few, dataset=path), tokenizer).dropped["more than 5 turns"] == 10
    seven = data.load_data(replace(few, dataset=path, max_turns=7), tokenizer)
    assert not seven.dropped and max(len(p.secret) for p in seven.train) == 6
    path = str(write(tmp_path / "ultra.jsonl", ROWS))
    with pytest.raises(BadInput, match="--max-turns 7: Table 5 has limits for up to 5 turns"):
        data.load_data(replace(few, dataset=path, max_turns=7), tokenizer)


def test_validation_prompts_are_of_the_last_fifth_and_nobody_trains_on_that_however_many_are_played(read, cfg, tmp_path):
    path = str(write(tmp_path / "d.jsonl", [ultra(f"question {i % 60}", *["a", f"{i}?"] * (i > 59)) for i in range(80)]))
    read(path)
    few = replace(cfg, dataset=path, user="http://localhost/v1", user_model="m", max_length=4000, max_dialogue=4000,
                  max_new_tokens=100, eval_dialogues=8, num_prompts=0)  # fmt: skip
    tokenizer = template.load_tokenizer(str(tmp_path / "tokenizer"))
    tuned = replace(few, eval_split="validation")
    openings = lambda dialogues: {d.messages[0]["content"] for d in dialogues}  # noqa: E731
    judged = openings(simulator.test_prompts(tuned, tokenizer))
    trained = openings(simulator.train_prompts(tuned, tokenizer, 1))
    every = openings(simulator.train_prompts(few, tokenizer, 1))
    assert len(judged) == 8 and not judged & trained and judged | trained <= every  # --num-prompts 0: all of them
    assert len(trained) == len(every) - len(every) // 5
    fewer = replace(tuned, eval_dialogues=3)
    assert openings(simulator.train_prompts(fewer, tokenizer, 1)) == trained
    assert len(openings(simulator.test_prompts(fewer, tokenizer)) & judged) == 3
    assert not judged & openings(simulator.test_prompts(few, tokenizer))
    rolled_in = openings(simulator.offline_prompts(tuned, tokenizer, 1))
    assert rolled_in and rolled_in <= trained and openings(simulator.offline_prompts(few, tokenizer, 1)) & judged


def test_openings_held_back_for_validation_cost_an_offline_row_no_prompt(read, cfg, tmp_path):
    path = str(write(tmp_path / "d.jsonl", [ultra(f"question {i}") for i in range(100)]))
    read(path)
    few = replace(cfg, dataset=path, user="http://localhost/v1", user_model="m", max_length=4000, max_dialogue=4000,
                  max_new_tokens=100, eval_dialogues=8, num_prompts=60)  # fmt: skip
    tokenizer = template.load_tokenizer(str(tmp_path / "tokenizer"))
    tuned = replace(few, eval_split="validation")
    online = simulator.train_prompts(replace(tuned, num_prompts=0), tokenizer, 1)
    logs = data.load_data(few, tokenizer).logs
    assert len(online) == 64 and len(logs) == 80  # a fifth is held back
    for twice in (False, True):
        assert len(simulator.offline_prompts(tuned, tokenizer, 1, twice)) == 60
    assert len(simulator.hybrid_prompts(tuned, tokenizer, 1)) == 60
    drawn = [logs[row].questions[0] for row in data.draw("offline", 80, few, 1)]
    assert [d.messages[0]["content"] for d in simulator.offline_prompts(few, tokenizer, 1)[:]] == drawn
    with pytest.raises(BadInput, match="has only 64 dialogues to roll in by"):
        simulator.offline_prompts(replace(tuned, num_prompts=65), tokenizer, 1)


def test_hh_text_is_read_as_before():
    log = data.logged(hh("q", "a", "r", "b"))
    assert (log.questions, log.answers, log.chosen, log.rejected) == (("q", "r"), ("a",), "b", "worse")


def test_what_only_describes_a_folder_or_is_hidden_is_no_data(read, tmp_path):
    home = write(tmp_path / "data" / "a.jsonl", ROWS).parent
    for name in ("dataset_infos.json", "config.json", ".hidden.jsonl", ".cache/b.jsonl"):
        write(home / name, [{"no": "data"}])
    assert len(read(home).train) == 16 and not read(home).dropped
