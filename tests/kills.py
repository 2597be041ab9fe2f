"""python tests/kills.py OUT FLAGS: run refuel.py into OUT, killed by SIGKILL around every single file that it writes.

Each attempt is a process that dies just before a rename (the file is there under its temporary name only), the next one
just after it. The same command is started again until it ends. Prints the number of kills."""
import os
import signal
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import matplotlib.pyplot  # noqa: F401  (imported here so that no attempt has to)
import torch.distributed.fsdp
import torch.distributed.tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM  # noqa: F401

import evaluate  # noqa: F401
import refuel


def attempt(argv, seen):
    """Run the command in a child that dies at its first rename that is not in the file `seen`; returns its status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    rename, before = os.replace, set(open(seen).read().split("\n"))

    def die(moment, target):
        if f"{moment} {target}" not in before:
            with open(seen, "a") as file:
                file.write(f"{moment} {target}\n")
            os.kill(os.getpid(), signal.SIGKILL)

    def replace(source, target):
        die("before", target)
        rename(source, target)
        die("after", target)

    os.replace = replace
    refuel.main(argv)
    os._exit(0)


if __name__ == "__main__":
    out, flags = sys.argv[1], sys.argv[2:]
    seen, kills = f"{out}.seen", 0
    open(seen, "w").close()
    while not os.WIFEXITED(status := attempt(["--out", out, *flags], seen)):
        kills += 1
    print(f"kills {kills}")
    sys.exit(os.WEXITSTATUS(status))
