"""The user's server lives as long as the run. The real one is started once here; `python tests/served.py OUT` ends a run
with it in every way."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

from helpers import KEY, ROOT, make_asker
from machinery import users
import pytest

from machinery import serve
import served
import simulator
from machinery.files import BadInput
from simulator import Dialogue


@pytest.fixture
def fake(monkeypatch):
    """A server that is no model, with a child that does not listen to SIGTERM, in the place of vLLM's."""
    script = os.path.join(ROOT, "tests", "served.py")
    monkeypatch.setattr(serve, "command", lambda path, port, name, *_: [sys.executable, script, "fake", str(port), name])
    serve.start.cache_clear()
    yield
    serve.start.cache_clear()


@pytest.fixture
def watchdogs(monkeypatch):
    """The watchdogs that a test has started, which end with it."""
    started, popen = [], subprocess.Popen

    def note(*args, **options):
        started.append(popen(*args, **options))
        return started[-1]

    monkeypatch.setattr(serve.subprocess, "Popen", note)
    yield started
    for watchdog in started:
        if watchdog.poll() is None:
            serve.stop(watchdog)


def server_and_child(processes):
    return [sum(word in line for line in processes.values()) for word in ("watchdog.py", "served.py fake", "SIG_IGN")]


def test_a_run_that_is_ended_in_any_way_leaves_no_process_behind(tmp_path):
    """By SIGINT, SIGTERM, SIGKILL, and its own end; the server's child does not listen to SIGTERM."""
    runs = {}
    for name in (*served.ENDS, "end"):
        os.makedirs(out := str(tmp_path / name))
        runs[out] = served.start("tests/served.py", "rank", out, mark=out, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    assert served.wait_for(lambda: all(os.path.exists(os.path.join(out, "rank_0.json")) for out in runs), 60)
    for out, process in runs.items():
        assert json.load(open(os.path.join(out, "rank_0.json")))[1] == [[0, "Question: go on", None]]
        assert server_and_child(served.alive(out)) == [1, 2, 1]  # the watchdog's line names the server too
        name = os.path.basename(out)
        process.send_signal(served.ENDS[name]) if name in served.ENDS else open(os.path.join(out, "end"), "w").close()
    assert served.wait_for(lambda: not any(map(served.alive, runs)), 60), {out: served.alive(out) for out in runs}
    assert [process.wait() for process in runs.values()] == [-signal.SIGINT, -signal.SIGTERM, -signal.SIGKILL, 0]


def test_both_ranks_ask_the_nodes_one_server_and_nothing_outlives_their_torchrun(tmp_path):
    out = str(tmp_path)
    process = served.start(*served.TORCHRUN, "tests/served.py", "rank", out, mark=out, stderr=subprocess.DEVNULL)
    paths = [tmp_path / f"rank_{r}.json" for r in (0, 1)]
    assert served.wait_for(lambda: all(path.exists() for path in paths), 90)
    (url, reply), other = (json.loads(path.read_text()) for path in paths)
    assert [url, reply] == other and reply == [[0, "Question: go on", None]]
    assert server_and_child(served.alive(out)) == [1, 2, 1]
    process.kill()
    process.wait()
    assert served.wait_for(lambda: not served.alive(out), 60), served.alive(out)


def test_a_server_that_does_not_start_is_one_line_and_the_end_of_its_log(tmp_path, monkeypatch, capsys, watchdogs):
    words = "print('loading'); raise MemoryError('no room for the user')"
    monkeypatch.setattr(serve, "command", lambda *_: [sys.executable, "-c", words])
    serve.start.cache_clear()
    with pytest.raises(BadInput, match="ended before it was ready: MemoryError: no room for the user; see .*log") as stop:
        serve.start("a model", str(tmp_path / "new" / "user_0.log"), 9, None)
    assert "\n" not in str(stop.value) and "    loading\n" in capsys.readouterr().err and watchdogs[0].wait(9) is not None


def test_a_server_that_is_never_ready_is_ended(tmp_path, monkeypatch, watchdogs):
    monkeypatch.setattr(serve, "command", lambda *_: [sys.executable, "-c", "import time; time.sleep(600)"])
    monkeypatch.setattr(serve, "START", 1)
    serve.start.cache_clear()
    with pytest.raises(BadInput, match="not ready after 1 seconds"):
        serve.start("a model", str(tmp_path / "user_0.log"), 9, None)
    assert watchdogs[0].poll() is not None


def test_another_runs_server_on_the_same_port_is_not_taken_for_the_runs_own(tmp_path, monkeypatch, watchdogs, request):
    words = "import time; time.sleep(2); raise OSError('address already in use')"
    monkeypatch.setattr(serve, "command", lambda *_: [sys.executable, "-c", words])
    other = request.getfixturevalue("serve")(None)
    monkeypatch.setattr(serve, "free_port", lambda: other.server.server_address[1])
    serve.start.cache_clear()
    with pytest.raises(BadInput, match="ended before it was ready: OSError: address already in use"):
        serve.start("a model", str(tmp_path / "user_0.log"), 9, None)


def test_the_node_asks_its_server_directly_and_keeps_the_key_to_itself(tmp_path, monkeypatch, fake, watchdogs):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("OPENAI_API_KEY", "a-secret-key")
    ask = serve.Served("a model", str(tmp_path / "user_0.log"), 9, None)
    again = serve.Served("a model", str(tmp_path / "user_0.log"), 9, None)
    assert list(ask(["hello"])) == [(0, "Question: go on", None)] and ask.key == ""
    assert again.url == ask.url and len(watchdogs) == 1  # all methods of baselines.py share one server


def test_vllm_plays_the_user_and_its_death_stops_the_run_in_one_line(cfg, tmp_path, tokenizers, watchdogs):
    pytest.importorskip("vllm")
    serve.start.cache_clear()
    cfg = replace(cfg, user=f"serve:{make_asker(tmp_path / 'asker')}", user_tokens=16)
    user = users.load_user(cfg)
    d = Dialogue.start(tokenizers["toy"], "something red please").add_answer(tokenizers["toy"], [2])
    assert user.reply([d, d]) == ["go on", "go on"] and user.ask.model.startswith("user-")
    children = subprocess.run(["ps", "-o", "pid=", "-g", str(watchdogs[0].pid)], capture_output=True, text=True).stdout
    assert len(children.split()) >= 3  # the watchdog, the server, its engine
    engine = max(map(int, children.split()))
    os.kill(engine, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(BadInput, match="has ended under the run.*same command again"):
        user.reply([d] * 30)
    assert time.monotonic() - began < 60 and watchdogs[0].wait(30) is not None
    serve.start.cache_clear()


def test_the_nodes_server_gets_no_key_and_its_replies_are_not_searched_for_one(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(serve, "start", lambda *_: ("http://127.0.0.1:9/v1", "m"))
    ask = serve.Served(str(tmp_path), str(tmp_path / "user_0.log"), 512, None)
    assert ask.key == "" and ask.hidden(f"is it {KEY} ?") == f"is it {KEY} ?"


def test_a_served_user_is_checked_before_anything_is_started(cfg, monkeypatch):
    with pytest.raises(BadInput, match="no checkpoint at nowhere"):
        simulator.check_cast(replace(cfg, user="serve:nowhere"))
