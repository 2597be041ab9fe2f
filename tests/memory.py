"""python tests/memory.py RANKS: the trainer's peak memory against --plan's, for a random Llama of 106 M parameters or, on
GPUs, of 1.2 B.

Each phase's peak beyond what the process had before the model; the largest of all ranks. On a GPU it is the allocator's
own, on a CPU that of anonymous resident memory, sampled every 2 ms; MALLOC_MMAP_THRESHOLD_ gives freed tensors back at
once, so that the peak is what is in use."""
import os
import subprocess
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]

import machinery  # noqa: E402, F401  (first: it sets what torch reads when it is imported)

import torch  # noqa: E402

from usage import arguments  # noqa: E402


class Peak(threading.Thread):
    """RssAnon of this process, and its maximum since the last `read`."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak = 0
        self.start()

    def now(self):
        with open("/proc/self/status") as file:
            return 1024 * int(next(line for line in file if line.startswith("RssAnon")).split()[1])

    def run(self):
        while True:
            self.peak = max(self.peak, self.now())
            time.sleep(0.002)

    def read(self):
        peak, self.peak = max(self.peak, self.now()), 0
        return peak


class Allocated:
    """The same of torch's allocator on this rank's GPU."""

    def now(self):
        return torch.cuda.memory_allocated()

    def read(self):
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak


def measure(path, flags):
    from helpers import random_pairs, with_logps
    from machinery import ranks
    import refuel
    import torch.distributed as dist

    cfg = refuel.read_config([*flags.split(), "--policy", path])
    ranks.start_processes()
    small = os.path.join(path, "small")  # the same once before, so that nothing is imported while it is measured
    model = refuel.load_policy(small, cfg)
    refuel.regress(model, refuel.make_optimizer(model, cfg), random_pairs(4), cfg)
    pairs = [p._replace(prefix=[7] * 480, y=[8] * 240, y2=[9] * 240) for p in random_pairs(4)]
    peak = Allocated() if torch.cuda.is_available() else Peak()
    before = peak.read()
    model = refuel.load_policy(path, cfg)
    found = {"collect": peak.now()}
    peak.read()
    pairs = with_logps(model, pairs, cfg)
    found["log-probs"] = peak.read()
    refuel.regress(model, refuel.make_optimizer(model, cfg), pairs, cfg)
    found["train"] = peak.read()
    row = torch.tensor([found[k] - before for k in found], dtype=torch.float64, device=ranks.device())
    dist.all_reduce(row, dist.ReduceOp.MAX)
    return dict(zip(found, row.tolist())), cfg, ranks.world()


def main():
    from machinery import plan
    from machinery.ranks import rank

    for checkpointing in ("none", "selective", "full"):
        flags = f"--setting toy --batch-size 2 --num-prompts 4 --micro-tokens 2048 --activation-checkpointing {checkpointing}"
        found, cfg, ranks = measure(sys.argv[2], flags)
        planned = plan.trainer(plan.shape(sys.argv[2]), cfg, ranks, ranks, (960, 480), c=2 if torch.cuda.is_available() else 4)
        if rank() == 0:
            for phase, value in found.items():
                print(f"| {ranks} | {checkpointing} | {phase} | {value / 2**20:.0f} | {planned[phase] / 2**20:.0f} | "
                      f"{100 * (planned[phase] / value - 1):+.0f} % |", flush=True)  # fmt: skip


if __name__ == "__main__":
    if arguments(__doc__, ranks=dict(type=int), folder=dict(nargs="?", help="of the processes it starts"))[1] is None:
        from transformers import LlamaConfig, LlamaForCausalLM

        with tempfile.TemporaryDirectory() as folder:
            small = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
            large = dict(vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12)
            if torch.cuda.is_available():
                large = dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                             num_attention_heads=32, num_key_value_heads=8)  # fmt: skip
            LlamaForCausalLM(LlamaConfig(**large)).save_pretrained(folder)
            LlamaForCausalLM(LlamaConfig(**small)).save_pretrained(os.path.join(folder, "small"))
            print("| ranks | activation checkpointing | phase | measured, MiB | plan, MiB | |\n|---|---|---|---|---|---|")
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", sys.argv[1]]
            done = subprocess.run([*command, os.path.abspath(__file__), sys.argv[1], folder], timeout=900,
                                  env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"})  # fmt: skip
            sys.exit(done.returncode)
    main()
