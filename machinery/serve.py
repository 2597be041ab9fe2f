"""The user's model as a server that lives exactly as long as the run: vLLM over all GPUs of a node (section 4.2, C.2).

`--user serve:ORG/MODEL` (a hub id or a folder; evaluate.py's --policy takes it, too): local rank 0 of each node starts
the server that `vllm serve` starts, on a free port of the loopback interface, and waits until it is ready; the node's
other ranks are told where it is. Between the run and the server stands watchdog.py, which ends the server with the run.
"""
import atexit
import contextlib
import functools
import importlib.util
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time

import httpx2
from tqdm import tqdm

from machinery import plan, watchdog
from machinery.ask import Server
from machinery.files import BadInput
from machinery.ranks import local_rank, node, told

START = 1500  # seconds until the server must be ready: a 70B is read from a slow disk in minutes


def check_vllm(flag):
    if not importlib.util.find_spec("vllm"):
        raise BadInput(f"{flag}: vllm is not installed (pip install -r requirements-gpu.txt)")


@functools.lru_cache(maxsize=1)
def start(path, log, room, share):
    """The server's URL and its model's name, on every rank of the node; one server however often it is asked for.

    path: a checkpoint folder; log: where the server writes; room: tokens of prompt and reply; share: what the server gets
    of each GPU (plan.Share). A server that does not start is BadInput with the end of its log, on all ranks of all nodes."""
    place, why = None, None
    if local_rank() == 0:
        try:
            place = launch(path, log, room, share)
        except BadInput as error:
            why = str(error)
    places = told((node(), place, why))
    if why:
        raise BadInput(why)
    for number, _, other in places:
        if other:
            raise BadInput(f"the {who(log)}'s server did not start on node {number}")
    port, name = next(place for number, place, _ in places if number == node() and place)
    return f"http://127.0.0.1:{port}/v1", name


class Served(Server):
    """The node's own server, asked like any other. Once it has ended, the run stops in one line, and
    its own command starts both again and resumes at the last finished wave."""

    trust_env = False  # no proxy knows this machine's loopback interface

    def __init__(self, path, log, room, share, flag="--user", **options):
        super().__init__(*start(path, log, room, share), timeout=1800, tries=3, flag=flag, **options)
        self.path, self.log, self.key, self.echo = path, log, "", None

    def __call__(self, prompts, seeds=None, allowed=None):
        for i, reply, why in super().__call__(prompts, seeds, allowed):
            if reply is None and ended(self.log):
                raise BadInput(report(self.log, self.path, "has ended under the run (finished waves are kept: run the "
                                                           "same command again to resume)"))  # fmt: skip
            yield i, reply, why


def launch(path, log, room, share):
    """Start the server behind its watchdog and return its port and its model's name when it is ready. The name is drawn for
    it alone: another run may have taken the port in between, and its server must not be taken for this one."""
    port, name = free_port(), f"{who(log)}-{secrets.token_hex(8)}"
    os.makedirs(os.path.dirname(log), exist_ok=True)
    with open(log, "wb") as out:
        guard = subprocess.Popen(
            [sys.executable, os.path.abspath(watchdog.__file__), str(os.getpid()), *command(path, port, name, room, share)],
            stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment(), start_new_session=True)  # fmt: skip
    atexit.register(stop, guard)
    print(f"serving {path} to the node (log: {log})", flush=True)
    began = time.monotonic()
    with tqdm(desc=f"{who(log)}'s server", bar_format="{desc}: {elapsed} {postfix}", disable=node() > 0) as bar:
        while not ready(port, name):
            if guard.poll() is not None or ended(log):
                raise BadInput(report(log, path, "ended before it was ready"))
            if time.monotonic() - began > START:
                stop(guard)
                raise BadInput(report(log, path, f"was not ready after {START} seconds"))
            bar.set_postfix_str((tail(log, 1) or [""])[0][-80:])
            time.sleep(0.5)
    return port, name


def command(path, port, name, room, share):
    """What `vllm serve` runs. By module, since vLLM's CPU build lacks the metadata that the script itself looks up."""
    import torch

    words = f"""--host 127.0.0.1 --port {port} --served-model-name {name} --dtype bfloat16 --max-model-len {room}
                --generation-config vllm --seed 0 --disable-uvicorn-access-log"""  # vllm: no top-p of the checkpoint's
    if torch.cuda.is_available():
        split = plan.tensor_parallel(plan.shape(path), torch.cuda.device_count())
        words += f""" --tensor-parallel-size {split} --kv-cache-memory-bytes {share.cache}
                     --gpu-memory-utilization {share.utilization:.3f} --max-num-seqs {plan.SEQUENCES}
                     --max-num-batched-tokens {plan.STEP_TOKENS}"""
    else:  # seeded requests crash the CPU build when a prefill is cut into chunks
        words += f""" --enforce-eager --block-size 32 --kv-cache-memory-bytes {1 << 30} --no-enable-chunked-prefill
                     --max-num-batched-tokens {max(room, 8192)}"""
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", path, *words.split()]


def environment():
    """The run's environment without what would make the server's processes take themselves for ranks of the run."""
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
    own = ("VLLM_LOGGING_LEVEL", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_API_KEY")
    env = {k: v for k, v in os.environ.items() if k not in ranks + own and not k.startswith(("TORCHELASTIC", "ROLE_"))}
    return {"VLLM_CPU_OMP_THREADS_BIND": "nobind"} | env  # the CPU build would take every core for itself


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ready(port, name):
    """Whether a server there has this model; vLLM listens once it can answer."""
    try:
        return f'"{name}"' in httpx2.get(f"http://127.0.0.1:{port}/v1/models", timeout=10, trust_env=False).text
    except httpx2.HTTPError:
        return False


def who(log):
    """Whose server writes this log: user_0.log is the user's."""
    return os.path.basename(log).partition("_")[0]


def tail(log, lines):
    """The last lines of a log that are not empty."""
    with open(log, "rb") as file:
        file.seek(max(0, os.path.getsize(log) - 100_000))
        text = file.read().decode(errors="replace")
    return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()][-lines:]


def ended(log):
    """The watchdog's last words, if the server that writes this log has ended."""
    return next((line for line in tail(log, 50) if line.startswith(watchdog.ENDED)), None)


def report(log, path, what):
    """One line that names the server, what happened to it and the first error of its log; the rank that has started it shows
    the log's end before."""
    lines = tail(log, 400)
    errors = [line for line in lines if re.search(r"\b\w*(Error|Exception): ", line) and "WARNING" not in line]
    if local_rank() == 0:
        print("\n".join(["", *(f"    {line[:300]}" for line in lines[-15:])]), file=sys.stderr, flush=True)
    return f"the {who(log)}'s server, vLLM with {path}, {what}{f': {errors[0][-300:].strip()}' if errors else ''}; see {log}"


def stop(guard):
    """Ask the watchdog to end the server, and wait until it has; should somebody have killed it, end its group here."""
    guard.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        guard.wait(30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(guard.pid, signal.SIGKILL)
    guard.wait()
