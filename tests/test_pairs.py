"""Training on finished pairs: the published form and a run's own file give the policy that the run itself gave."""
import copy
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

import baselines
import refuel
import simulator
from machinery import files, pairs
from machinery.files import BadInput, read_weights
from machinery.run import open_folder


def published(line, tokenizer, length=256):
    """A line of a run's pairs.jsonl as the authors would have published it: ordered by reward, padded."""
    sides = sorted(zip(line["rewards"], line["dialogues"], (line["y"], line["y2"])), key=lambda side: -side[0])
    row = {}
    for name, (reward, dialogue, answer) in zip(("chosen", "reject"), sides):
        ids = line["prefix"] + answer
        row |= {name: dialogue["messages"], f"{name}_reward": reward,
                f"{name}_token": ids + [len(tokenizer)] * (length - len(ids)),
                f"{name}_mask": [int(len(line["prefix"]) <= i < len(ids)) for i in range(length)]}  # fmt: skip
    return row


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """(configuration, its cast) of a small run that has collected and trained."""
    out = str(tmp_path_factory.mktemp("run") / "out")
    flags = f"--setting toy --policy {base} --out {out} --engine transformers --num-prompts 16 --batch-size 8 --wave 16"
    cfg = refuel.read_config(f"{flags} --iterations 1 --eta 1 --eval-dialogues 8".split())
    return cfg, refuel.train(cfg)


def lines_of(cfg):
    return [line for line in files.read_lines(f"{cfg.out}/iter_1/pairs.jsonl") if "dropped" not in line]


def test_finished_pairs_train_the_policy_that_their_own_run_has_trained(run, tmp_path):
    import pyarrow
    import pyarrow.parquet

    cfg, cast = run
    rows = [published(line, cast[0].tokenizer) for line in lines_of(cfg)]
    (tmp_path / "set").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "set" / "train.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:3]), tmp_path / "set" / "test.parquet")
    expected = dict(read_weights(f"{cfg.out}/iter_1/policy"))
    start = dict(read_weights(cfg.policy))
    for name, source in {"published": str(tmp_path / "set"), "own": f"{cfg.out}/iter_1/pairs.jsonl"}.items():
        again = simulator.prepare(replace(cfg, pairs=source, out=str(tmp_path / name)))
        (tmp_path / name).mkdir()
        cast[0].update(read_weights(cfg.policy))
        refuel.train(again, cast)
        for key, tensor in read_weights(f"{again.out}/iter_1/policy"):
            assert np.allclose(tensor, expected[key], atol=1e-6), (name, key)
        log = files.read_lines(f"{again.out}/metrics.jsonl")
        assert log[0]["pairs"] == len(rows) and ("truncated" in log[0]) == (name == "own")
    assert max((expected[key] - start[key]).abs().max().item() for key in start) > 1e-5
    assert "content of --pairs" in simulator.made_of(again) and again.pairs == source
    (tmp_path / "dpo").mkdir()
    baselines.train("dpo-refuel", replace(again, out=str(tmp_path / "dpo")), cast)  # another loss on the same pairs
    other = dict(read_weights(str(tmp_path / "dpo" / "iter_1" / "policy")))
    assert max((other[key] - expected[key]).abs().max().item() for key in other) > 1e-6


@pytest.mark.parametrize("column, change, words", [
    ("reject", lambda row: row.pop("reject"), "is missing"),
    ("chosen", lambda row: row["chosen"].pop(), "in turn"),
    ("reject", lambda row: row.update(reject=row["chosen"]), "does not part"),
    ("chosen_token", lambda row: row["chosen_token"].__setitem__(0, 10**6), "no id of a vocabulary"),
    ("chosen_token", lambda row: row["chosen_token"].__setitem__(row["chosen_mask"].index(1), 9), "another tokenizer"),
    ("reject_token", lambda row: row["reject_token"].__setitem__(0, 9), "the prefix of chosen_token"),
    ("chosen_mask", lambda row: row["chosen_mask"].__setitem__(-1, 1), "one piece of ones"),
    ("chosen_mask", lambda row: row["chosen_mask"].pop(), "as long as chosen_token"),
    ("reject_reward", lambda row: row.update(reject_reward=float("nan")), "must be a number"),
    ("reject_reward", lambda row: row.update(reject_reward=-99999), "could not be scored"),
])  # fmt: skip
def test_a_published_row_that_is_wrong_is_named_with_its_column(run, tmp_path, column, change, words):
    cfg, cast = run
    rows = [published(line, cast[0].tokenizer) for line in lines_of(cfg)[:3]]
    change(rows[2])
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = pairs.read_pairs(replace(cfg, pairs=str(tmp_path / "pairs.jsonl")), cast[0].tokenizer, 99)
    assert next(found)["h"] >= 1 and next(found)["H"] >= 1
    with pytest.raises(BadInput, match=f"pairs.jsonl, row 3: {column} .*{words}"):
        next(found)


def test_a_pair_whose_user_ended_one_of_its_dialogues_earlier_is_taken(run, tmp_path):
    cfg, cast = run
    line = copy.deepcopy(next(line for line in lines_of(cfg) if line["H"] > line["h"]))
    end = line["dialogues"][1]["spans"][line["h"] - 1][1]
    d = line["dialogues"][1]
    for name in ("spans", "truncated", "logps"):
        d[name] = d[name][: line["h"]]
    d["ids"], d["messages"] = d["ids"][:end], d["messages"][: 2 * line["h"]]
    (tmp_path / "pairs.jsonl").write_text(json.dumps(line) + "\n")
    (found,) = pairs.read_pairs(replace(cfg, pairs=str(tmp_path / "pairs.jsonl")), cast[0].tokenizer, 99)
    assert found["H"] == line["H"]


@pytest.mark.parametrize("column, change", [
    ("dialogues", lambda line: line["y"].append(7)), ("dialogues", lambda line: line.update(H=9)),
    ("h", lambda line: line.pop("h")), ("rewards", lambda line: line["rewards"].__setitem__(0, "1")),
    ("dialogues", lambda line: line["dialogues"].pop()),
])  # fmt: skip
def test_a_line_of_ones_own_that_was_edited_is_named_and_a_seal_is_read(run, tmp_path, column, change):
    cfg, cast = run
    line = copy.deepcopy(lines_of(cfg)[0])
    change(line)
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(BadInput, match=f"row 1: {column}"):
        list(pairs.read_pairs(replace(cfg, pairs=str(path)), cast[0].tokenizer, 99))
    (tmp_path / "pairs.jsonl.sha256").write_text("0  pairs.jsonl\n")
    with pytest.raises(BadInput, match="checksum is another"):
        list(pairs.read_pairs(replace(cfg, pairs=str(path)), cast[0].tokenizer, 99))


def test_another_policys_pairs_are_refused_by_content(run, base, tmp_path):
    """Of a GPU's engine_gap a policy that has moved by 0.03 nats a token is noise."""
    cfg, _ = run
    open_folder(replace(cfg, out=str(tmp_path / "out")), simulator.made_of)
    shutil.copytree(f"{cfg.out}/iter_1", tmp_path / "out" / "iter_1")
    own, trained = f"{tmp_path}/out/iter_1/pairs.jsonl", f"{tmp_path}/out/iter_1/policy"
    pairs.check_whose(replace(cfg, pairs=own))
    with pytest.raises(BadInput, match="were sampled by its own --policy, which is not --policy .*iter_1/policy"):
        simulator.prepare(replace(cfg, pairs=own, policy=trained))
    shutil.copytree(tmp_path / "out" / "iter_1", tmp_path / "out" / "iter_2")
    second = own.replace("iter_1", "iter_2")
    pairs.check_whose(replace(cfg, pairs=second, policy=trained))
    with pytest.raises(BadInput, match=f"were sampled by {trained}, which is not --policy {base}"):
        simulator.prepare(replace(cfg, pairs=second))


def test_pairs_are_for_one_iteration_and_for_refuels_row_alone(capsys):
    assert refuel.read_config("--setting one --pairs org/set".split()).iterations == 1
    for flags in ("--setting one --pairs org/set --iterations 2", "--setting two --pairs org/set"):
        with pytest.raises(BadInput, match="--pairs must be left out in setting two, and with more than one"):
            refuel.read_config(flags.split())
    with pytest.raises(SystemExit):
        baselines.main("--method rebel-lt-online --setting toy --pairs org/set".split())
    assert "--method refuel, dpo-refuel or rloo-refuel, not rebel-lt-online" in capsys.readouterr().err
    with pytest.raises(BadInput, match="--pairs no/where/file: no parquet"):
        next(pairs.stored("no/where/file"))
