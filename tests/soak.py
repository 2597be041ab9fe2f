"""python tests/soak.py OUT [1|2] [KILLS] [SEED]: a run of the toy, killed at random moments of every phase, against an
undisturbed one. With 1 a plain process, with 2 torchrun and two ranks; the user is a server, which is killed as well.

A kill is SIGKILL, SIGTERM or SIGINT of the process (or a rank, or torchrun, or the server) at a random moment of a phase:
base policy, conversations, rewards, log-probs, training, saving, evaluation. After each: no process is left, every
file that has its final name is whole; the same command resumes. At the end: the same files (one process: bit for bit; two
ranks: equal pairs, log-probs to 1e-5), at most checkpoint_steps steps and one wave a rank done twice for a kill. Prints a
row a kill and a summary; exit code 1 where any of that fails."""
import hashlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from usage import REST, arguments

HERE = os.path.dirname(os.path.abspath(__file__))
PHASES = ["base policy", "conversations", "rewards", "log-probs", "training", "saving", "evaluation"]
MOMENTS = {"rewards": 0.02, "log-probs": 0.02, "saving": 0.02, "training": 0.1}  # seconds into a short phase
CHECKPOINT_STEPS = 3
FLAGS = f"""--setting toy --engine transformers --num-prompts 96 --wave 24 --batch-size 8 --iterations 2 --max-turns 3
            --checkpoint-steps {CHECKPOINT_STEPS} --eval-dialogues 16 --lr 1e-3 --user-model scripted --out run"""


def serve(port):
    """The served user: what it says depends on the question alone, and it takes its time."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            word = ("small", "red", "wool", "hat", "tiny", "blue")[hashlib.sha256(body).digest()[0] % 6]
            time.sleep(0.02)
            self.send_response(200)
            self.end_headers()
            text = f"Justification: none\nQuestion: {word} please"
            self.wfile.write(json.dumps({"choices": [{"message": {"content": text}}]}).encode())

        def log_message(self, *_):
            pass

    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


def run(argv):
    """refuel.py, which reports each phase, wave and step as it begins, and whose base policy is quick."""
    sys.path.insert(0, os.path.dirname(HERE))
    import evaluate
    import refuel
    import toy
    from machinery import fsdp, ranks, run

    def report(phase):
        with open(os.environ["SOAK"], "a") as file:
            file.write(f"{os.getpid()}\t{ranks.rank()}\t{phase}\n")

    def reporting(module, name, phase):
        real = getattr(module, name)

        def wrapped(*args, **more):
            report(phase(*args) if callable(phase) else phase)
            return real(*args, **more)

        setattr(module, name, wrapped)

    toy.RECIPE.update(steps=30, batch=16)
    reporting(toy, "base_policy", "base policy")
    reporting(refuel, "futures", "conversations")
    reporting(refuel, "make_pairs", "rewards")
    reporting(run, "old_logps", "log-probs")
    reporting(refuel, "regress", "training")
    reporting(fsdp, "save_training", "saving")
    reporting(fsdp, "save_policy", "saving")
    reporting(run, "log", lambda _, row: f"step {row['iteration']} {row['step']}" if row["phase"] == "regress" else "log")
    reporting(evaluate, "evaluate", "evaluation")
    reporting(evaluate, "rollout", "evaluation")
    keep = run.Run.after_step
    run.Run.after_step = lambda *a: (keep(*a), report("training"))  # saving is over
    refuel.main(argv)


def alive(mark):
    """Processes of the run: those that carry the path of its reports in their environment; zombies are none."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as environ, open(f"/proc/{pid}/stat") as stat:
                if f"SOAK={mark}\0".encode() in environ.read() and stat.read().rpartition(") ")[2][0] != "Z":
                    found.append(int(pid))
        except OSError:
            pass  # it has just ended
    return found


def reports(path):
    lines = open(path).read().splitlines() if os.path.exists(path) else []
    return [(int(pid), int(rank), phase) for pid, rank, phase in (line.split("\t") for line in lines)]


def torn(folder):
    """Files under their final names that are not whole."""
    from safetensors import SafetensorError, safe_open

    bad = []
    for where, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(where, name)
            try:
                if ".partial" in path:
                    continue
                if name.endswith(".jsonl"):  # a kill may tear the log's last line, which the next start drops
                    [json.loads(line) for line in open(path) if name != "metrics.jsonl" or line.endswith("\n")]
                elif name.endswith(".json"):
                    json.load(open(path))
                elif name.endswith(".safetensors"):
                    safe_open(path, "pt")
                elif name.endswith(".png") and not open(path, "rb").read().endswith(b"IEND\xaeB`\x82"):
                    bad.append(path)
            except (ValueError, SafetensorError):
                bad.append(path)
    return bad


class Command:
    """The run in a folder of its own, started anew after every kill."""

    def __init__(self, folder, ranks, port):
        os.makedirs(folder)
        self.folder, self.ranks, self.marks = folder, ranks, os.path.join(folder, "reports")
        self.flags = [*FLAGS.split(), "--user", f"http://127.0.0.1:{port}/v1"]
        self.environ = os.environ | {"SOAK": self.marks, "OMP_NUM_THREADS": "1", "no_proxy": "*"}

    def start(self):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(self.ranks)]
        command = [*(torchrun if self.ranks > 1 else [sys.executable]), os.path.join(HERE, "soak.py"), "run", *self.flags]
        self.log = open(os.path.join(self.folder, "log"), "a")
        self.process = subprocess.Popen(command, cwd=self.folder, env=self.environ, stdout=self.log, stderr=self.log)
        self.seen = len(reports(self.marks))

    def wait_for(self, phase, rank):
        """The pid of the rank when it begins the phase; None where the run ends before."""
        while self.process.poll() is None:
            for pid, r, p in reports(self.marks)[self.seen :]:
                if (p, r) == (phase, rank):
                    return pid
            time.sleep(0.002)

    def left(self, seconds=45):
        """Seconds until no process of the run is left; None where some are after all that time."""
        start = time.monotonic()
        while time.monotonic() - start < seconds:
            self.process.poll()
            if not alive(self.marks):
                return time.monotonic() - start
            time.sleep(0.05)


def outcome(folder):
    """What must be equal: {file: value}, without seconds, speeds and the command line."""
    sys.path[:0] = [HERE, os.path.dirname(HERE)]

    from helpers import run_folder

    return run_folder(os.path.join(folder, "run"))


def close(a, b):
    """Equal pairs, and numbers to 1e-5 in log-probs; weights and results are those of other sums, and not compared."""
    pairs = [name for name in a if name.endswith("iter_1/pairs.jsonl")]
    numbers = lambda raw: [x for line in raw.decode().splitlines() for x in json.loads(line)]  # noqa: E731
    logps = [(numbers(a[n]), numbers(b[n])) for n in a if n.endswith("iter_1/logps.jsonl")]
    return (a.keys() == b.keys() and pairs and all(a[n] == b[n] for n in pairs)
            and all(abs(x - y) < 1e-5 for one, two in logps for x, y in zip(one, two, strict=True)))  # fmt: skip


def main(out, ranks=1, kills=20, seed=0):
    rng, failures = random.Random(seed), []
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serving = [sys.executable, os.path.join(HERE, "soak.py"), "serve", str(port)]
    start_server = lambda: subprocess.Popen(serving, stderr=subprocess.DEVNULL)  # noqa: E731
    server = start_server()
    whole, broken = (Command(os.path.join(out, name), ranks, port) for name in ("undisturbed", "killed"))
    began = time.monotonic()
    whole.start()
    assert whole.process.wait(900) == 0, open(whole.log.name).read()[-2000:]
    usual = time.monotonic() - began

    targets = ["process", "server"] if ranks == 1 else [*range(ranks), "torchrun", "server"]
    plan = [(PHASES[i * len(PHASES) // kills], rng.choice(("SIGKILL", "SIGTERM", "SIGINT")), targets[i % len(targets)])
            for i in range(kills)]  # fmt: skip
    done, began = [], time.monotonic()
    broken.start()
    for phase, name, target in plan:
        if target == "server" and phase not in ("conversations", "evaluation"):
            target = targets[0]  # nobody asks it then
        if target == 1 and phase == "base policy":
            target = 0  # which makes it alone
        rank = target if isinstance(target, int) else 0
        pid = broken.wait_for(phase, rank)
        if pid is None:
            done.append((phase, name, target, "the run had ended"))
            break
        time.sleep(rng.uniform(0, MOMENTS.get(phase, 0.4)))
        if target == "server":
            server.send_signal(getattr(signal, name))
            server.wait()
            time.sleep(0.5)
            server = start_server()
            broken.seen = len(reports(broken.marks))
            done.append((phase, name, target, "asked again"))
            continue
        at = reports(broken.marks)[-1][2]
        os.kill(broken.process.pid if target == "torchrun" else pid, getattr(signal, name))
        seconds, bad = broken.left(), torn(broken.folder)
        if seconds is None or bad:
            failures.append(f"{name} of {target} in {phase}: torn {bad}, left {alive(broken.marks)}")
        done.append((phase, name, target, f"gone in {seconds or 99:.1f} s; was at {at}"))
        broken.start()
    code = broken.process.wait(900)
    took = time.monotonic() - began
    server.kill()

    a, b = outcome(whole.folder), outcome(broken.folder)
    same = a == b if ranks == 1 else close(a, b)
    marks, before, steps, waves = reports(broken.marks), set(), 0, 0
    for attempt in sorted({pid for pid, _, _ in marks}, key=[pid for pid, _, _ in marks].index):
        mine = [p for pid, r, p in marks if pid == attempt and p.startswith("step")]
        steps, before = max(steps, len(before & set(mine))), before | set(mine)
    rolled = [sum(p == "conversations" for _, _, p in reports(c.marks)) for c in (whole, broken)]
    waves, stops = rolled[1] - rolled[0], sum("gone" in row[-1] for row in done)
    for row in done:
        print("| " + " | ".join(map(str, row)) + " |")
    if code or not same or steps > CHECKPOINT_STEPS or waves > stops * ranks or len(done) < kills:
        failures.append(f"exit code {code}; same files: {bool(same)}; kills {len(done)} of {kills}")
    errors = len(re.findall("Traceback", open(broken.log.name).read()))
    print(f"{len(done)} kills on {ranks} process(es); same files: {bool(same)}; steps done twice for a kill: at most {steps} "
          f"(checkpoint every {CHECKPOINT_STEPS}); waves done twice: {waves} for {stops} stops; {usual:.0f} s undisturbed, {took:.0f} s "
          f"with all kills; tracebacks in the log: {errors}; failures: {failures or 'none'}")  # fmt: skip
    return bool(failures)


if __name__ == "__main__":
    what, rest = arguments(__doc__, out={}, more=dict(nargs=REST, metavar="[1|2] [KILLS] [SEED]"))
    if what == "serve":
        serve(int(rest[0]))
    elif what == "run":
        run(rest)
    else:
        sys.exit(main(os.path.abspath(what), *map(int, rest)))
