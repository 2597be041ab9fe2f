"""What a run has written or read and somebody has changed: the same command says so in one line, and never mixes."""
import contextlib
import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
import refuel
import simulator
from helpers import ROOT, collected, equal_pairs, hh, on, random_pairs
from machinery import data, engines, files, fsdp, meter, ranks, rows, seams
from machinery.files import BadInput
from machinery.run import Run, open_folder
from refuel import refuel_loss
from simulator import Dialogue

FLAGS = "--setting toy --engine transformers --num-prompts 16 --batch-size 4 --wave 16 --iterations 1 --eval-dialogues 4"


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """A small run, whole."""
    out = str(tmp_path_factory.mktemp("finished") / "run")
    refuel.main([*FLAGS.split(), "--policy", base, "--checkpoint-steps", "2", "--out", out])
    return out


@pytest.fixture
def copy(finished, tmp_path, base):
    """The run's folder to change, and the same command again."""
    out = str(tmp_path / "run")
    shutil.copytree(finished, out)

    def again(*more):
        return refuel.main([*FLAGS.split(), "--policy", base, "--checkpoint-steps", "2", "--out", out, *more])

    return out, again


def one_line(work, capsys, *words):
    """work() ends with exit code 2 and one line on stderr that has all the words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        work()
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("refuel.py: ")]
    assert stop.value.code == 2 and len(said) == 1, said
    for word in words:
        assert word in said[0], said[0]


# --- rows that were changed by hand -----------------------------------------------------------------------------


def change(line):
    """Ways to change a line of pairs.jsonl: {name: the lines that take its place}."""
    row = json.loads(line)
    swapped = row | {"y": row["y2"], "y2": row["y"]}
    return {
        "another reward": [row | {"rewards": [9.0, 0.0]}], "another y": [row | {"y": [7, 2]}], "y and y' swapped": [swapped],
        "a row gone": [], "a row twice": [row, row], "another h": [row | {"h": 1 + row["h"] % row["H"]}],
        "another prefix": [row | {"prefix": row["prefix"][:-1]}], "no rewards": [{k: row[k] for k in row if k != "rewards"}],
        "a string for ids": [row | {"y": "red"}], "null": [None], "a list": [[1]], "no JSON": ["{"], "cut": [line[:40]],
        "an empty line": [""], "infinite": [row | {"rewards": [float("inf"), 0.0]}],
    }  # fmt: skip


@pytest.mark.parametrize("name", list(change('{"y": [], "y2": [], "h": 1, "H": 2, "prefix": [1]}')))
def test_a_row_of_pairs_jsonl_that_was_changed_is_noticed(name, copy, capsys):
    out, again = copy
    shutil.rmtree(os.path.join(out, "iter_1", "policy"))  # as if it had been stopped before its end
    path = os.path.join(out, "iter_1", "pairs.jsonl")
    lines = open(path).read().splitlines()
    rows = change(lines[1])[name]
    lines[1:2] = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    open(path, "w").write("\n".join(lines) + "\n")
    one_line(again, capsys, "pairs.jsonl", "checksum")


@pytest.mark.parametrize("file", ["iter_1/logps.jsonl", "eval/base.jsonl", "eval/iter_1.jsonl"])
def test_other_rows_that_were_changed_are_noticed_too(file, copy, capsys):
    out, again = copy
    if file.startswith("iter_1"):
        shutil.rmtree(os.path.join(out, "iter_1", "policy"))
    with open(os.path.join(out, file), "a") as rows:
        rows.write("[0.0, 0.0]\n")
    one_line(again, capsys, file, "checksum")


@pytest.mark.parametrize("content", ["", "{", "null", "[1]", '{"a": ', "\x00\x00", "[" * 100_000])
@pytest.mark.parametrize("file", ["config.json", "eval/base.json"])
def test_a_json_file_that_is_cut_or_another_is_one_line(file, content, copy, capsys):
    out, again = copy
    open(os.path.join(out, file), "w").write(content)
    one_line(again, capsys, os.path.join(out, file))


@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "another model's", "no step"])
def test_a_training_state_that_cannot_be_read_is_one_line(damage, base, cfg, tmp_path):
    model = refuel.load_policy(base, cfg)
    optimizer = refuel.make_optimizer(model, cfg)
    refuel.regress(model, optimizer, random_pairs(4), replace(cfg, batch_size=4))
    fsdp.save_training(str(tmp_path), model, optimizer, 0)
    file = tmp_path / "training" / "step_0_rank_0.safetensors"
    whole = file.read_bytes()
    if damage == "cut":
        file.write_bytes(whole[:1000])
    if damage == "empty":
        file.write_bytes(b"")
    if damage == "gone":
        file.unlink()
    if damage == "another model's":
        from safetensors.torch import save_file

        save_file({"x": torch.zeros(1)}, file)
    if damage == "no step":
        (tmp_path / "training" / "step.json").write_text('{"ranks": 1}')
    with pytest.raises(BadInput, match="training"):
        fsdp.load_training(str(tmp_path), model, optimizer)


# --- what a run reads, known by its content ---------------------------------------------------------------------


def test_a_base_policy_of_other_content_at_the_same_path_is_refused(finished, base, tmp_path, capsys):
    policy, out = str(tmp_path / "policy"), str(tmp_path / "run")
    shutil.copytree(base, policy)
    flags = [*FLAGS.split(), "--policy", policy, "--out", out]
    open_folder(simulator.prepare(refuel.read_config(flags)), simulator.made_of)
    files.HELD.clear()
    later = refuel.load_policy(base, refuel.read_config(flags))
    with torch.no_grad():
        later.lm_head.weight.to_local()[0, 0] += 1.0
    fsdp.save_policy(policy, later, base)
    one_line(lambda: refuel.main(flags), capsys, "another content of --policy", "content of --reference")


def test_a_data_set_of_other_content_at_the_same_path_has_another_fingerprint(cfg, tmp_path):
    path = tmp_path / "rows.jsonl"
    found = []
    for last in ("worse", "worst"):
        path.write_text(json.dumps(hh("a", "b", last=last)) + "\n")
        rows.content_hash.cache_clear()  # as another process
        found.append(data.fingerprint(replace(cfg, dataset=str(path))))
    assert found[0] != found[1]


@pytest.mark.parametrize("name, value", [("engine", "vllm"), ("torch", "1.0"), ("code", "0" * 64)])
def test_another_engine_version_or_code_is_refused(name, value, copy, capsys):
    out, again = copy
    path = os.path.join(out, "config.json")
    config = json.load(open(path))
    config["made_of"][name] = value
    open(path, "w").write(json.dumps(config))
    one_line(again, capsys, f"another {name}", "choose another --out")


def test_what_auto_became_is_part_of_the_configuration(cfg, monkeypatch):
    auto = replace(cfg, engine="auto")
    for there, expected in ((object(), "vllm"), (None, "transformers")):
        monkeypatch.setattr(engines.importlib.util, "find_spec", lambda _, there=there: there)
        assert simulator.made_of(auto)["engine"] == expected


def test_another_configuration_shows_both_values(copy, capsys):
    out, again = copy
    one_line(lambda: again("--eta", "7"), capsys, "another eta (100.0 there, 7.0 now)")


def test_an_evaluation_of_other_openings_is_refused(finished, base, cfg, tmp_path):
    """Row by row it would compare conversations that never met."""
    cfg = replace(cfg, max_turns=2, eval_dialogues=4)
    cast = simulator.load_cast(cfg)
    out = str(tmp_path)
    evaluate.evaluate({}, out, *cast, cfg, kl=False)
    path = os.path.join(out, "eval", "base.jsonl")
    rows = files.read_lines(path)
    rows[0]["messages"][0]["content"] = "something blue please"
    files.write_sealed(path, rows)
    with pytest.raises(BadInput, match="other openings"):
        evaluate.evaluate({}, out, *cast, cfg, kl=False)


def test_updates_whose_training_state_is_gone_are_not_begun_again(base, cfg):
    cfg = replace(cfg, policy_every=2, checkpoint_steps=2, iterations=9)
    model = refuel.load_policy(base, cfg)
    kept = files.policy_folder(cfg.out, 4)
    shutil.copytree(base, kept)
    with pytest.raises(BadInput, match="training/ is gone"):
        Run(cfg, model, refuel.make_optimizer(model, cfg))
    assert os.path.isdir(kept)


def test_the_toys_reward_on_other_data_is_refused(base, tmp_path):
    with pytest.raises(BadInput, match="--reward toy"):
        simulator.check_cast(refuel.read_config(["--setting", "toy", "--dataset", "hh", "--user", "dataset"]))


def test_a_first_wave_in_which_no_pairs_rewards_differ_stops(cfg, tmp_path):
    pairs = equal_pairs(16)
    os.makedirs(cfg.out)
    with pytest.raises(BadInput, match="nothing to learn"):
        collected(str(tmp_path / "i"), lambda rows, rng, dropped: pairs, list(range(16)), replace(cfg, wave=16))


def test_the_reference_is_the_policy_where_no_other_is_given():
    read = lambda *more: refuel.read_config(["--setting", "one", *more]).reference  # noqa: E731
    assert read("--policy", "a/b") == "a/b" and read("--policy", "a/b", "--reference", "c/d") == "c/d"
    assert read() == "meta-llama/Meta-Llama-3-8B-Instruct"


# --- one run at a time ------------------------------------------------------------------------------------------


def test_a_second_run_in_the_same_folder_is_one_line_and_the_lock_goes_with_the_process(copy, capsys, tmp_path):
    out, again = copy
    hold = "import fcntl, sys, time\nf = open(sys.argv[1], 'w')\nfcntl.flock(f, fcntl.LOCK_EX)\nprint(1, flush=True)\ntime.sleep(99)"
    other = subprocess.Popen([sys.executable, "-c", hold, os.path.join(out, ".lock")], stdout=subprocess.PIPE)
    other.stdout.readline()
    one_line(again, capsys, "in use by another run")
    other.kill()
    other.wait()
    again()


def test_the_lock_of_a_run_is_held_while_it_runs(cfg):
    open_folder(cfg, lambda cfg: {})
    with open(os.path.join(cfg.out, ".lock")) as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_of_two_ranks_that_start_together_one_alone_looks_at_the_folder(base, tmp_path):
    """Once in 200 starts a rank saw the folder that the other one had half made. What rank 0 refuses, both do."""
    script = tmp_path / "start.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {ROOT!r})
import machinery
import refuel
from machinery import ranks, run
ranks.start_processes()
cfg = refuel.read_config({[*FLAGS.split(), "--policy", base]!r} + ["--out", sys.argv[1]])
real = run.check_folder
run.check_folder = lambda *a: (real(*a), open(f"{tmp_path}/looked_{{ranks.rank()}}", "w"))
run.open_folder(cfg, lambda cfg: {{}})
try:
    run.open_folder(refuel.read_config({[*FLAGS.split(), "--policy", base, "--eta", "7"]!r} + ["--out", sys.argv[1]]), lambda cfg: {{}})
except refuel.files.BadInput:
    open(f"{tmp_path}/refused_{{ranks.rank()}}", "w")
ranks.barrier()
""".replace("refuel.files", "machinery.files"))
    done = subprocess.run([*on(2), str(script), str(tmp_path / "run")], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {name for name in os.listdir(tmp_path) if "_" in name}
    assert found == {"looked_0", "refused_0", "refused_1"}


# --- checkpoints ------------------------------------------------------------------------------------------------


def test_only_what_a_tokenizer_needs_is_copied_into_a_policy(base, cfg, tmp_path):
    start = tmp_path / "start"
    shutil.copytree(base, start)
    (start / "hf_token.txt").write_text("hf_secret")
    (start / "tokens").mkdir()
    model = refuel.load_policy(base, cfg)
    fsdp.save_policy(str(tmp_path / "policy"), model, str(start))
    names = set(os.listdir(tmp_path / "policy"))
    assert "tokenizer.json" in names and not names & {"hf_token.txt", "tokens"}


def test_a_dangling_link_in_a_checkpoint_is_found_before_the_training(base, tmp_path):
    start = tmp_path / "start"
    shutil.copytree(base, start)
    os.symlink("nowhere", start / "added_tokens.json")
    with pytest.raises(BadInput, match="added_tokens.json is a dangling link"):
        files.find_checkpoint(str(start))


def test_a_runs_folder_given_as_a_policy_names_its_last_policy(finished):
    with pytest.raises(BadInput, match="its last policy is .*iter_1/policy"):
        files.find_checkpoint(finished)


@pytest.mark.parametrize("name", ["a [b]*? x=y", " it's  \"q\" ünï "])
def test_paths_may_hold_any_character(name, base, tmp_path, capsys):
    policy, out = tmp_path / name / "policy", tmp_path / name / "run"
    shutil.copytree(base, policy)
    flags = [*FLAGS.split(), "--policy", str(policy), "--num-prompts", "8"]
    refuel.main([*flags, "--out", str(out)])
    evaluate.main("--setting toy --engine transformers --eval-dialogues 4 --reference".split()
                  + [str(policy), "--policy", str(out), "--out", str(out / "eval again")])  # fmt: skip
    assert len(files.read_json(out / "eval again" / "results.json")) == 2


# --- at the seams -----------------------------------------------------------------------------------------------


def dialogues(n):
    return [Dialogue(messages=[{"role": "user", "content": f"opening {i}"}]) for i in range(n)]


def fails_on_two(ds):
    return [1.0 / (d.messages[0]["content"] != "opening 2") for d in ds]


@pytest.mark.parametrize("reward, words", [
    (lambda ds: [1.0] * (len(ds) - 1), ("--reward", "2 values for 3 dialogues")),
    (lambda ds: 1.0, ("--reward", "a float for 3")),
    (lambda ds: [1.0, "2", 3.0], ("--reward", "'2'", "opening 1")),
    (lambda ds: [1.0, "", 3.0], ("--reward", "''", "opening 1")),
    (lambda ds: [1.0, [], 3.0], ("--reward", "[]", "opening 1")),
    (lambda ds: np.zeros((3, 2)), ("--reward", "opening 0")),
    (lambda ds: [1.0, 2.0, float("nan")], ("not finite", "opening 2")),
    (fails_on_two, ("--reward failed at", "test_run.py", "ZeroDivisionError", "opening 2")),
])  # fmt: skip
def test_what_a_reward_gives_is_checked_where_it_enters(reward, words):
    with pytest.raises(BadInput) as stop:
        simulator.score(reward, dialogues(3))
    for word in words:
        assert word in str(stop.value)


def number(d):
    return float(d.messages[0]["content"][8:])


@pytest.mark.parametrize("reward, words", [
    (lambda ds: [number(d) - sum(map(number, ds)) / len(ds) for d in ds], "gave -1 to a dialogue among others, and 0.0 to it alone"),
    (lambda ds: [sorted(map(number, ds)).index(number(d)) for d in ds], "gave 2 to .* 0 to it alone.*opening 2"),
    (lambda ds: [None if len(ds) == 1 else number(d) for d in ds], "None to it alone"),
    (lambda ds: [float("nan") if len(ds) == 1 else number(d) for d in ds], "nan to it alone"),
])  # fmt: skip
def test_a_reward_that_depends_on_the_batch_is_refused(reward, words, monkeypatch):
    monkeypatch.setattr(seams, "MET", set())
    with pytest.raises(BadInput, match=words):
        simulator.score(reward, dialogues(3))


@pytest.mark.parametrize("reward", [
    lambda ds: [number(d) * (1 + 0.01 * len(ds)) for d in ds],  # as a model's rounding
    lambda ds: [number(d) + random.random() for d in ds],  # a judge that draws
    lambda ds: [None if number(d) == 1 else 3.0 for d in ds],
])  # fmt: skip
def test_a_reward_that_is_rounded_or_drawn_is_not_refused_for_that(reward, monkeypatch):
    monkeypatch.setattr(seams, "MET", set())
    assert len(simulator.score(reward, dialogues(3))) == 3


class Says:
    def __init__(self, texts):
        self.texts = texts

    def reply(self, dialogues):
        return self.texts


class Forgetful:
    """Draws by the dialogue's own seeds alone."""

    def reply(self, dialogues):
        return [f"word {random.Random(d.seed('user')).random()}" for d in dialogues]


class Remembers(Forgetful):
    def __init__(self, **more):
        self.calls = 0
        vars(self).update(more)

    def reply(self, dialogues):
        self.calls += 1
        return [f"word {self.calls}" for _ in dialogues]


def test_a_user_with_a_memory_is_refused_and_a_server_may_draw(monkeypatch):
    """A conversation that is reset would meet what the user remembers of the first future."""
    for user, words in ((Forgetful(), None), (Remembers(threads=4), None), (Remembers(), "gave 'word 1', and 'word 2' when asked again")):
        monkeypatch.setattr(seams, "MET", set())
        with pytest.raises(BadInput, match=words) if words else contextlib.nullcontext():
            assert len(seams.ask(user, dialogues(3))) == 3
    assert len(seams.ask(user, dialogues(3))) == 3  # once in a process
    monkeypatch.setattr(seams, "MET", set())
    replies = iter([[None, "a"], ["b", None]])
    assert seams.ask(SimpleNamespace(reply=lambda ds: next(replies)), dialogues(2)) == [None, "a"]  # it may fail now and then


@pytest.mark.parametrize("texts, words", [
    (["a", "b"], ("--user", "2 values for 3")), (["a", "", "c"], ("--user", "''", "opening 1")),
    (["a", 5, "c"], ("--user", "5", "opening 1")), ("abc", ("--user", "3 values for 3")),
])  # fmt: skip
def test_what_a_user_gives_is_checked_where_it_enters(texts, words, monkeypatch):
    monkeypatch.setattr(seams, "MET", {(os.path.realpath(__file__), "--user")})
    with pytest.raises(BadInput) as stop:
        seams.ask(Says(texts), dialogues(3))
    for word in words:
        assert word in str(stop.value)
    assert seams.ask(Says(["a", None, "c"]), dialogues(3)) == ["a", None, "c"]


@pytest.mark.parametrize("counts, words", [
    (lambda ds: 1 / 0, "--reward's malformed failed at .*ZeroDivisionError"), (lambda ds: [0], "1 values for 2 dialogues"),
    (lambda ds: [0, 2], "gave 2 for a dialogue of 1 answers"), (lambda ds: [0, -1], "gave -1"), (lambda ds: [0, 0.5], "gave 0.5"),
    (lambda ds: [None, 0], "gave None"),
])  # fmt: skip
def test_what_a_rewards_malformed_gives_is_checked_where_it_enters(counts, words):
    said = [replace(d, spans=[(0, 1)]) for d in dialogues(2)]
    with pytest.raises(BadInput, match=words):
        seams.malformed(SimpleNamespace(malformed=counts), said)
    counted = SimpleNamespace(malformed=lambda ds: [1, 0])
    assert seams.malformed(counted, said) == (1, 2) and seams.malformed(None, said) == (0, 0)


def test_rewards_are_subtracted_in_float64():
    pairs = [random_pairs(1)[0]._replace(rewards=(30000.0001, 30000.0), logps=(0.0, 0.0))]
    old_2B, reward_2B = meter.as_tensors(pairs, "cpu")
    assert refuel_loss(old_2B, old_2B, reward_2B, 1.0).item() == pytest.approx(1e-8, rel=1e-3)
    assert refuel_loss(old_2B, old_2B, reward_2B, 1.0).dtype == torch.float32


def test_a_context_that_no_dialogue_fits_is_refused_before_anything_is_played(base, capsys):
    flags = ["--setting", "toy", "--engine", "transformers", "--policy", base, "--num-prompts", "32"]
    with pytest.raises(BadInput, match="--max-length 30 is too short"):
        simulator.prepare(refuel.read_config([*flags, "--max-length", "30"]))
    simulator.prepare(refuel.read_config([*flags, "--max-length", "70"]))
    assert "outgrow --max-length 70" in capsys.readouterr().out
    simulator.prepare(refuel.read_config(flags))
    assert "outgrow" not in capsys.readouterr().out


# --- the environment --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [["WORLD_SIZE"], ["RANK", "WORLD_SIZE"], ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"]])
def test_half_of_torchruns_environment_is_one_line(there, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name in there:
        monkeypatch.setenv(name, "1")
    with pytest.raises(BadInput, match="but not .*start with torchrun"):
        ranks.check_environment()


def test_more_processes_than_gpus_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "3", "MASTER_PORT": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    ranks.check_environment()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")  # said by those that have one, too: they would wait for the third
    with pytest.raises(BadInput, match="--nproc_per_node 3: this node has 2 GPUs"):
        ranks.check_environment()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has"),
                                   RuntimeError("CUDA Error: out of memory at csrc/cumem_allocator.cpp:62")])  # fmt: skip
def test_out_of_memory_is_one_line(error, capsys):
    with pytest.raises(SystemExit) as stop, ranks.one_line("refuel.py"):
        raise error
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and "refuel.py: out of memory" in said and "--plan" in said
    with pytest.raises(RuntimeError, match="another"), ranks.one_line("refuel.py"):
        raise RuntimeError("another")


def test_a_setting_that_is_missing_is_called_so():
    for flags, word in (([], "is missing"), (["--setting", "tree"], "none of them: tree")):
        with pytest.raises(BadInput, match=word):
            refuel.read_config(flags)


def test_what_the_flags_tell_by_themselves_is_checked_before_any_checkpoint_is_looked_for(monkeypatch):
    monkeypatch.setattr(simulator, "checkpoint", lambda name: pytest.fail("a checkpoint would have been downloaded"))
    for flags, word in (("--setting one --user http://h/v1 --user-model m --reward /no/where", "no checkpoint at /no/where"),
                        ("--setting two --user ftp://h --user-model m", "URL"), ("--setting toy --dataset hh", "knows nothing"),
                        ("--setting one --reward toy", "--reward toy")):  # fmt: skip
        with pytest.raises(BadInput, match=word):
            simulator.prepare(refuel.read_config(flags.split()))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 3}}',
                                     '{"weight_map": {"a": "../policy/model.safetensors"}}', '{"weight_map": {"a": "b.bin"}}'])
def test_an_index_that_says_nothing_is_one_line(content, base, tmp_path):
    start = tmp_path / "start"
    shutil.copytree(base, start)
    (start / files.INDEX).write_text(content)
    with pytest.raises(BadInput, match=files.INDEX):
        files.find_checkpoint(str(start))


def test_a_pipe_in_the_place_of_a_weight_file_is_one_line(base, tmp_path):
    start = tmp_path / "start"
    shutil.copytree(base, start)
    os.remove(start / "model.safetensors")
    os.mkfifo(start / "model.safetensors")
    with pytest.raises(BadInput, match="no regular file"):
        files.find_checkpoint(str(start))


@pytest.mark.parametrize("content", ["{", "[]", '{"eos_token_id": "<|end|>"}', '{"eos_token_id": [2, "x"]}', '{"eos_token_id": 99999}'])
def test_generation_settings_that_make_no_sense_are_one_line(content, base, cfg, tmp_path):
    start = tmp_path / "start"
    shutil.copytree(base, start)
    (start / "generation_config.json").write_text(content)
    with pytest.raises(BadInput, match="generation_config.json"):
        simulator.prepare(replace(cfg, policy=str(start)))


def test_ranks_that_write_into_one_folder_at_once_do_not_meet(tmp_path):
    """Each wave is a file beside those of other ranks, which come and go under temporary names meanwhile."""

    def write(rank):
        for number in range(rank, 1000, 2):
            files.write_sealed(str(tmp_path / f"{number:05d}.jsonl"), [{"rank": rank}])

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(write, range(2)))
    assert len(os.listdir(tmp_path)) == 2000


def test_a_file_in_a_folder_called_blobs_is_hashed_unless_its_name_is_a_hash(tmp_path):
    (tmp_path / "blobs").mkdir()
    one, two = tmp_path / "blobs" / "model.safetensors", tmp_path / "blobs" / ("a" * 64)
    found = []
    for content in (b"x", b"yy"):
        one.write_bytes(content)
        two.write_bytes(content)
        found.append([files.fingerprint_files([str(path)]) for path in (one, two)])
    assert found[0][0] != found[1][0] and found[0][1] == found[1][1]


def test_a_collection_that_an_earlier_start_has_finished_keeps_its_line_and_one_that_it_began_its_seconds(cfg, tmp_path):
    """Until 2026-11-26 the line was written anew, with the seconds of reading the file."""
    cfg, path = replace(cfg, wave=2), os.path.join(cfg.out, "metrics.jsonl")
    os.makedirs(cfg.out)
    folder = str(tmp_path / "iter_1")

    def play(rows, rng, dropped):
        if not left:
            raise KeyboardInterrupt
        return left.pop(0)

    left = [equal_pairs(2)]
    with pytest.raises(KeyboardInterrupt):  # in the second wave
        collected(folder, play, list(range(4)), cfg)
    (row,) = files.read_lines(path)
    files.write_lines(path, [row | {"seconds": 1000.0}])
    left = [equal_pairs(2)]
    collected(folder, play, list(range(4)), cfg)
    *waves, whole = files.read_lines(path)
    assert [w["wave"] for w in waves] == [0, 1] and "wave" not in whole
    assert waves[1]["seconds"] >= 1000 and whole["seconds"] >= 1000
    files.write_lines(path, [*waves, whole | {"seconds": 2000.0}])
    collected(folder, play, list(range(4)), cfg)
    assert files.read_lines(path)[-1]["seconds"] == 2000
    shutil.rmtree(folder)  # an update of setting two that is done again: its line is not the old one's
    left = [equal_pairs(2), equal_pairs(1)]
    collected(folder, play, list(range(4)), cfg)
    assert files.read_lines(path)[-1]["seconds"] < 1000 and files.read_lines(path)[-1]["pairs"] == 3
