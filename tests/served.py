"""python tests/served.py OUT [END ...]: a run with a served user, ended in every way, with vLLM's real server; prints a table.

Each row starts `torchrun --nproc_per_node 2 refuel.py --user serve:...`, waits until it plays, ends it as its name says
and looks for what is left. After a server that dies under the run, the same command has to finish the run.

    python tests/served.py rank OUT     one process of a small run, with a server that is no model (for test_serve.py)
    python tests/served.py fake PORT NAME    that server
"""
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path[:0] = [HERE, ROOT]

from usage import arguments  # noqa: E402

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def start(*words, mark, **options):
    """A python process in the root folder; `mark` is in its environment and in that of all that it starts. It listens to
    SIGINT, which what a shell starts in the background does not."""
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, start_new_session=True, text=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                            env=os.environ | {"SERVED_TEST": mark}, **options)  # fmt: skip


def alive(mark):
    """The processes with `mark` in their environment: everything that a run has started carries it on."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as env, open(f"/proc/{pid}/cmdline", "rb") as line:
                if f"SERVED_TEST={mark}".encode() in env.read().split(b"\0"):
                    found[int(pid)] = line.read().replace(b"\0", b" ").decode()
        except OSError:
            pass  # it has ended meanwhile, or is a zombie
    return {pid: line for pid, line in found.items() if line}


def wait_for(condition, seconds):
    """How long it took, or None."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        if condition():
            return time.monotonic() - began
        time.sleep(0.1)
    return None


def fake(port, name):
    """Its models and one answer; its child, like an engine, does not listen to SIGTERM."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    subprocess.Popen([sys.executable, "-c", stubborn])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"data": [{"id": name}]}).encode())

        def do_POST(self):
            body = json.dumps({"choices": [{"message": {"content": "Question: go on"}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


def one_rank(out):
    """Ask the node's server, then play on until ended."""
    from machinery import serve
    from machinery.files import write_file
    from machinery.ranks import rank, world

    serve.command = lambda path, port, name, *_: [sys.executable, os.path.abspath(__file__), "fake", str(port), name]
    if world() > 1:
        from machinery import ranks

        ranks.start_processes()
    ask = serve.Served("a model", os.path.join(out, "user_0.log"), 99, None)
    replies = list(ask(["hello"]))
    write_file(os.path.join(out, f"rank_{rank()}.json"), json.dumps([ask.url, replies]))
    while not os.path.exists(os.path.join(out, "end")):
        time.sleep(0.1)


ENDS = {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM, "SIGKILL": signal.SIGKILL}  # of torchrun
WORDS = {"a rank": ("refuel.py --setting", "torch.distributed.run"), "the server": ("api_server --model", "watchdog.py"),
         "its engine": ("spawn_main", "\0"), "its watchdog": ("watchdog.py ", "\0")}  # in and not in the command line


def main(out, names):

    os.makedirs(out, exist_ok=True)
    from helpers import make_asker

    asker = make_asker(os.path.join(out, "asker"))
    flags = f"refuel.py --setting toy --user serve:{asker} --user-tokens 16 --engine transformers --num-prompts 512"
    flags += " --batch-size 32 --wave 16 --iterations 1 --eval-dialogues 16 --max-length 256 --out"
    print("| ended by | exit code | seconds until nothing is left | |\n|---|---|---|---|")
    for name in names or ["its own end", *ENDS, *(f"SIGKILL of {one}" for one in WORDS)]:
        folder = os.path.join(out, name.replace(" ", "_"))
        run = partial(start, *TORCHRUN, *flags.split(), folder, mark=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        process = run()
        parts = os.path.join(folder, "iter_1", "pairs.jsonl.parts")
        assert wait_for(lambda: os.path.isdir(parts) and len(os.listdir(parts)) > 2, 600), process.communicate()[0]
        processes = alive(folder)
        if name in ENDS:
            process.send_signal(ENDS[name])
        elif "SIGKILL" in name:
            word, other = WORDS[name.removeprefix("SIGKILL of ")]
            os.kill(min(pid for pid, line in processes.items() if word in line and other not in line), signal.SIGKILL)
        text, _ = process.communicate(timeout=900)
        seconds = wait_for(lambda: not alive(folder), 120)
        said = [line for line in text.splitlines() if "the user's server, vLLM" in line]
        note = f"`{said[0][:200]}`" if said else ""
        if seconds is None:
            note += f" LEFT: {alive(folder)}"
        if said:
            again = run()
            again.communicate(timeout=900)
            whole = os.path.exists(os.path.join(folder, "results.json"))
            note += f"; the same command again ends with {again.returncode}{', results.json' * whole}"
        print(f"| {name} | {process.returncode} | {'never' if seconds is None else f'{seconds:.1f}'} | {note} |", flush=True)


if __name__ == "__main__":
    mode, rest = arguments(__doc__, out={}, ends=dict(nargs="*", metavar="END"))
    {"fake": lambda: fake(int(rest[0]), rest[1]), "rank": lambda: one_rank(rest[0])}.get(mode, lambda: main(mode, rest))()
