"""What makes it run; nobody needs it to understand the algorithm, and nothing in it imports a file of the top level.

Importing it sets what torch and vLLM read when they are imported themselves: every script begins with `import machinery`.
"""
import os
import shutil

PARENT = os.getppid()  # torchrun, if it started this process
# One thread a process: several are slower on a small, busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # toy.base_policy has several: they must not spin on a busy machine
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine lives in this process
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
if not shutil.which("nvidia-smi"):
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # vLLM's CPU engine would compile for minutes
