"""python tests/forked.py N SCRIPT ARGS: SCRIPT on N ranks, as `torchrun --standalone` starts them, but forks of one process
that has imported what takes seconds. The first rank that ends badly ends the others."""
import ctypes
import os
import runpy
import signal
import sys
import traceback

sys.path[:0] = [os.path.dirname(os.path.abspath(__file__)), os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]

from usage import REST, arguments
from machinery import ranks  # noqa: F401  (first: it sets what torch reads when it is imported)

import matplotlib.pyplot  # noqa: F401  (imported here so that no fork has to)
import torch._dynamo  # noqa: F401  (torch imports it at the first optimiser's step)
import torch.distributed.fsdp
import torch.distributed.tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM  # noqa: F401

import evaluate  # noqa: F401
import refuel  # noqa: F401
from machinery.serve import free_port


def run(rank, n, port, script, args):
    """This process as a rank; its exit code."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    sys.argv = [script, *args]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    n, script, args = arguments(__doc__, n=dict(type=int), script={}, args=dict(nargs=REST))
    port, left = free_port(), set()
    for rank in range(n):
        child = os.fork()
        if not child:
            code = run(rank, n, port, script, args)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        left.add(child)
    while left:
        child, status = os.wait()
        left.discard(child)
        if status:
            for other in left:
                os.kill(other, signal.SIGKILL)
            sys.exit(1)
