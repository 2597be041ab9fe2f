"""The processes of a run: their start, who is who, sums over them, work shared in waves, and one line when it ends badly.

From `start_processes` on the code reads as for one process: every rank runs every line; rank 0 alone prints, and writes
all but the waves, shards and replies of others.
"""
import contextlib
import ctypes
import os
import shutil
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

from machinery import PARENT
from machinery.files import BadInput, read_sealed, write_sealed

# ---------------------------------------------------------------------------------------------------------------
# Who is who
# ---------------------------------------------------------------------------------------------------------------


def rank():
    return int(os.environ.get("RANK", 0))


def world():
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank():
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world():
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def node():
    return int(os.environ.get("GROUP_RANK", 0))  # torchrun's number of the node


def device():
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def dtype():
    """Of weights that do not learn, and of the forward: bfloat16 on GPUs, float32 on CPUs."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def check_environment():
    """What torchrun sets is there as a whole or not at all."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    absent = [name for name in names if name not in os.environ]
    if absent and len(absent) < len(names):
        there = ", ".join(name for name in names if name in os.environ)
        raise BadInput(f"the environment has {there}, but not {', '.join(absent)}: start with torchrun, or unset them")
    gpus, here = torch.cuda.device_count(), max(local_world(), local_rank() + 1)
    if gpus and here > gpus:  # on all processes alike: the others would wait for those that have none
        raise BadInput(f"--nproc_per_node {here}: this node has {gpus} GPUs, and each process needs its own")


def start_processes():
    """One process group for any start: torchrun's, or a group of one."""
    if dist.is_initialized():
        return
    check_environment()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ:
        if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
            # a rank whose torchrun was killed would wait for the others for hours, and hold its GPU
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            if os.getppid() != PARENT:
                raise BadInput("torchrun is gone")
        dist.init_process_group(backend, timeout=timedelta(hours=6))  # a rank without a wave waits for the others' last
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
        # cuDNN's attention builds a plan for each new shape, and no two pairs have the same lengths: a step of 16 pairs
        # of the 8B shape took 17.7 and 12.3 s with it (docs/speed.md)
        torch.backends.cuda.enable_cudnn_sdp(False)


# ---------------------------------------------------------------------------------------------------------------
# What they share
# ---------------------------------------------------------------------------------------------------------------


def barrier():
    if world() > 1:
        dist.barrier()


def add_up(tensor):
    """The sum over ranks."""
    if dist.is_initialized():
        tensor = tensor.to(device())
        dist.all_reduce(tensor)
    return tensor.cpu()


def told(mine):
    """What every rank says, on every rank."""
    everybody = [mine] * world()
    if world() > 1:
        dist.all_gather_object(everybody, mine)
    return everybody


def on_rank_0(work):
    """What work() returns or refuses on rank 0, on every rank: nobody looks at a folder while another one changes it."""
    found, refused = None, None
    if rank() == 0:
        try:
            found = work()
        except (BadInput, OSError) as error:
            refused = str(error)
    found, refused = told((found, refused))[0]
    if refused:
        raise BadInput(refused)
    return found


# ---------------------------------------------------------------------------------------------------------------
# Progress
# ---------------------------------------------------------------------------------------------------------------

SHOWN = []  # the bars of this process that are not at their end, the innermost last


def bar(items, desc, done=0, unit="it", delay=0):
    """The items one by one, behind a progress bar on rank 0; `done` of them are behind already. A bar with a delay is
    that of a short piece of work: it is not shown before so many seconds, and goes when it is at its end."""
    total = len(items) + done if hasattr(items, "__len__") else None
    shown = tqdm(desc=desc, total=total, initial=done, unit=unit, delay=delay, leave=not delay,
                 disable=rank() > 0, dynamic_ncols=True)  # fmt: skip
    SHOWN.append(shown)
    try:
        for item in items:
            yield item
            shown.update()
    finally:
        SHOWN.remove(shown)
        shown.close()


def beside_bar(text):
    """Words beside the outermost bar, which is the phase's own."""
    if SHOWN:
        SHOWN[0].set_postfix_str(text, refresh=False)


def say(line):
    """A line on rank 0's terminal, above the bars."""
    if rank() == 0:
        tqdm.write(line)
        sys.stdout.flush()


def in_waves(path, items, size, work, desc):
    """The rows of work(items of a wave, number of the wave) for all waves, in order and one by one, from the file at `path`.

    Ranks take turns at the waves and leave each on disk; a wave that is there is not played again. The folder must be
    one that all ranks see."""
    parts, starts = f"{path}.parts", range(0, len(items), size)
    if not on_rank_0(lambda: os.path.exists(path)):  # what follows, all ranks do or none
        os.makedirs(parts, exist_ok=True)
        names = [os.path.join(parts, f"{number:05d}.jsonl") for number in range(len(starts))]
        for number in bar(range(rank(), len(starts), world()), desc, unit="wave"):
            if not os.path.exists(names[number]):
                write_sealed(names[number], work(items[starts[number] : starts[number] + size], number))
        barrier()
        if rank() == 0:
            write_sealed(path, (row for name in names for row in read_sealed(name)))
        barrier()
    if rank() == 0:
        shutil.rmtree(parts, ignore_errors=True)
    return read_sealed(path)


# ---------------------------------------------------------------------------------------------------------------
# Last words
# ---------------------------------------------------------------------------------------------------------------


def first_to_fail():
    """Of several ranks the first that fails speaks: the others fail alike, or because it is gone."""
    if world() == 1 or not dist.is_initialized():
        return local_rank() == 0
    with contextlib.suppress(RuntimeError):  # the store dies with torchrun
        if dist.distributed_c10d._get_default_store().add("failed", 1) == 1:
            return True
        time.sleep(2)  # torchrun ends all ranks at the first exit: whoever speaks has its line out by then
    return False


OUT_OF_MEMORY = ("out of memory, though the plan says that it fits: is another process on the GPU? Then the same command "
                 "resumes from here; else --plan names flags that need less, and --out must be another one")  # fmt: skip


@contextlib.contextmanager
def one_line(script):
    """What a person can mend, a full disk or a served model among it, is one line and exit code 2."""
    try:
        yield
    except KeyboardInterrupt:
        if first_to_fail():
            print(f"{script}: stopped; the same command resumes from here", file=sys.stderr, flush=True)
        os._exit(130)  # not waiting for threads that wait for a server
    except (BadInput, OSError) as error:
        if first_to_fail():
            hint = "" if isinstance(error, BadInput) else " (what was finished is kept: the same command resumes)"
            print(f"{script}: {' '.join(str(error).split())}{hint}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):  # or, by vLLM's allocator, in words
            error = f"{script}: {OUT_OF_MEMORY}: {' '.join(str(error).split())[:200]}"
            if first_to_fail():
                print(error, file=sys.stderr, flush=True)
        elif first_to_fail():
            raise
        raise SystemExit(2) from None
