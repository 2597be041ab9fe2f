"""A run: its processes, its inputs, its folder, its log and its last words.

Imported before torch, since it sets what torch and vLLM read when they are imported.
"""
import os
import shutil

PARENT = os.getppid()  # torchrun, if it started this
# One thread a process: several are slower on a small, busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # toy.base_policy has several: they must not spin on a busy machine
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine lives in this process
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
if not shutil.which("nvidia-smi"):
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # vLLM's CPU engine would compile for minutes

import contextlib
import ctypes
import json
import signal
import sys
import time
from dataclasses import asdict, replace
from datetime import timedelta

import torch
import torch.distributed as dist

import data
import files
import rewards
import simulator
from files import BadInput, barrier, rank, world
from fsdp import device


def start_processes():
    """One process group for any start: torchrun's, or a group of one."""
    if dist.is_initialized():
        return
    if "RANK" in os.environ:
        if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
            # a rank whose torchrun was killed would wait for the others, and hold its GPU, until nobody knows when
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            if os.getppid() != PARENT:
                raise BadInput("torchrun is gone")
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=6))  # a rank without a wave waits for the others' last
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if torch.cuda.is_available():
        torch.cuda.set_device(device())


def first_to_fail():
    """Of several ranks the first that fails speaks: the others fail alike, or because it is gone."""
    if world() == 1 or not dist.is_initialized():
        return rank() == 0
    with contextlib.suppress(RuntimeError):  # the store dies with torchrun
        if dist.distributed_c10d._get_default_store().add("failed", 1) == 1:
            return True
        time.sleep(2)  # torchrun ends all ranks at the first exit: whoever speaks has its line out by then
    return False


@contextlib.contextmanager
def one_line(script):
    """What a person can mend, a full disk or a served model among it, is one line and exit code 2."""
    try:
        yield
    except KeyboardInterrupt:
        if first_to_fail():
            print(f"{script}: stopped; the same command goes on from here", file=sys.stderr, flush=True)
        os._exit(130)  # not waiting for threads that wait for a server
    except (BadInput, OSError) as error:
        if first_to_fail():
            hint = "" if isinstance(error, BadInput) else " (what was finished is kept: the same command goes on)"
            print(f"{script}: {' '.join(str(error).split())}{hint}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except RuntimeError:
        if first_to_fail():
            raise
        raise SystemExit(2) from None


def prepare(cfg):
    """Check the inputs and the run's folder before any model is loaded; returns cfg with its checkpoints' folders."""
    for name in ("policy", "reference"):
        cfg = replace(cfg, **{name: files.prepare_checkpoint(getattr(cfg, name))})
        files.check_positions(getattr(cfg, name), cfg)
    tokenizer = simulator.load_tokenizer(cfg.policy)
    data.train_prompts(cfg, tokenizer, 1)
    data.test_prompts(cfg, tokenizer)
    if not cfg.iterations:
        cfg = replace(cfg, iterations=len(data.load_split(cfg, "train", tokenizer)) // cfg.num_prompts)
    simulator.check_user(cfg), rewards.check_reward(cfg), simulator.reach_user(cfg)
    path = os.path.join(cfg.out, "config.json")
    if os.path.exists(path):
        old, new = files.read_json(path), asdict(cfg)
        other = [k for k in sorted(old.keys() | new.keys()) if k != "out" and old.get(k) != new.get(k)]
        if other:
            raise BadInput(f"{cfg.out} is a run with another {', '.join(other)}: choose another --out")
        state = os.path.join(cfg.out, "training", "step.json")
        if os.path.exists(state) and (ranks := files.read_json(state)["ranks"]) != world():
            raise BadInput(f"{cfg.out} was trained by {ranks} processes: go on with as many")
    elif os.path.exists(cfg.out) and (
        not os.path.isdir(cfg.out) or set(os.listdir(cfg.out)) - {"config.json.partial", "user_0.log"}
    ):
        raise BadInput(f"--out {cfg.out} exists and is not a run's folder")
    return cfg


def open_run(cfg):
    path = os.path.join(cfg.out, "config.json")
    if rank() == 0 and not os.path.exists(path):
        os.makedirs(cfg.out, exist_ok=True)
        files.write_file(path, json.dumps(asdict(cfg), indent=1))
    barrier()


LOGGED = {}  # of each metrics.jsonl the place of this process's last line


def log(cfg, row):
    """One line more in metrics.jsonl. This process's first one writes the file anew, without what a stopped run left
    beyond its last saved state or torn; a full disk costs no other line."""
    path = os.path.join(cfg.out, "metrics.jsonl")

    def place(row):
        return row["iteration"], row["phase"], row.get("step", 0)

    if os.path.exists(path) and path in LOGGED and LOGGED[path] < place(row):
        files.append_line(path, row)
    else:
        old = [r for r in files.read_lines(path, torn=True) if place(r) < place(row)] if os.path.exists(path) else []
        files.write_lines(path, [*old, row])
    LOGGED[path] = place(row)


def log_data(cfg):
    """The first line of metrics.jsonl: what the data set gave and what was dropped of it, by reason."""
    if rank() == 0 and cfg.dataset != "toy" and not os.path.exists(os.path.join(cfg.out, "metrics.jsonl")):
        found = data.load_data(*data.data_key(cfg, simulator.load_tokenizer(cfg.policy)))
        counts = {"train": len(found.train), "test": len(found.test), "logged": len(found.logs)}
        log(cfg, {"iteration": 0, "phase": "data"} | counts | {"dropped": found.dropped})
