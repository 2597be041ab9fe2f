"""python tests/rehearse.py [--layers N] [--out FILE] [flags of refuel.py]: one rank of eight trains the real 8B shape in bfloat16,
without a GPU, and --plan's column for the trainer is held against it.

Tensors are fake (shapes and types, no numbers) and so is the process group (rank 0 of 8; its collectives do nothing).
load_policy, FSDP2, pair_logps, refuel_loss, backward, AdamW and full_weights are the real ones. A peak is the most bytes
that live storages have; what is replaced is what reads numbers (files.check_finite, the comparison at the end of
families.check_forward, the filling of buffers) or a GPU (the device; bfloat16 is forced). What fakes do not see: types of
a mixed operation, the allocator's fragments, the work space of kernels, attention's kernel (it is a CPU's)."""
import os
import sys

if __name__ == "__main__":  # before anything asks for the rank
    os.environ |= {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8", "HF_HUB_OFFLINE": "1"}
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]

import machinery  # noqa: F401  (first: it sets what torch reads when it is imported)

import argparse
import contextlib
import json
import tempfile
import time
import weakref
from unittest import mock

import torch
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

import refuel
from helpers import in_bfloat16
from machinery import families, files, fsdp, logps, plan
from machinery.ranks import one_line

LLAMA = plan.LLAMA_8B | dict(model_type="llama", architectures=["LlamaForCausalLM"], max_position_embeddings=8192,
                             torch_dtype="bfloat16")  # fmt: skip
KINDS = ("none", "selective", "full")
RANKS = 8


class Peak(TorchDispatchMode):
    """Bytes of the storages that are alive: now, and the most since `begin`; FLOPs of matrix products."""

    def __init__(self, fake):
        super().__init__()
        self.fake, self.live, self.now, self.most, self.flops = fake, {}, 0, 0, 0

    def set(self, key, size):
        self.now += size - self.live.get(key, 0)
        self.live[key] = size
        self.most = max(self.most, self.now)

    def gone(self, key):
        self.set(key, 0)
        del self.live[key]

    def begin(self):
        self.most = self.now

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # its local tensors come again
        wait = func is torch.ops._c10d_functional.wait_tensor.default  # whose fake would be a copy
        out = args[0] if wait else func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        for tensor in tree_iter(out):
            if torch.is_tensor(tensor) and tensor.device.type != "meta" and active_fake_mode() is self.fake:
                storage = tensor.untyped_storage()
                if id(storage) not in self.live:
                    self.set(id(storage), storage.nbytes())
                    weakref.finalize(storage, self.gone, id(storage))
        return out


def watched(peak):
    """UntypedStorage.resize_ that tells the peak: FSDP2 frees by a resize to 0."""
    resize = torch.UntypedStorage.resize_

    def resized(storage, size):
        resize(storage, size)
        if id(storage) in peak.live:
            peak.set(id(storage), size)

    return resized


def some_pairs(tokens, longest):
    """As many equal pairs as a forward of `tokens` holds; of a pair's tokens, 827 of 1,536 are of its responses."""
    count = -(-tokens // longest)
    length = tokens // count
    answer = round(length * 827 / 1536 / 2)
    pair = refuel.Pair([1] * (length - 2 * answer), [2] * answer, [3] * answer, (0.0, 1.0), 2, 3)
    return [pair] * count


def weights_out(model, peak):
    """The peak while all weights go out one by one, to a file or to the engine."""
    peak.begin()
    for _ in fsdp.full_weights(model):
        pass
    return peak.most


def rehearse(cfg, folder, whole=True):
    """({phase of --plan: peak in bytes}, FLOPs of a forward and backward but for attention's) of rank 0.

    whole: all phases; else only the training, which alone depends on --activation-checkpointing."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    peak, peaks = Peak(fake), {}
    pairs = some_pairs(cfg.micro_tokens, 1536)
    rows = families.random_rows(files.load_config(folder))
    empty = torch.nn.Module.to_empty

    def to_empty(model, **options):  # until here all is on the meta device: a mesh needs real numbers
        modes.enter_context(fake)
        modes.enter_context(peak)
        return empty(model, **options)

    def check_without_numbers(model, path, own_attention, dtype):
        if whole:
            families.both_forwards(model, path, own_attention)
        model.set_attn_implementation("pairs")

    replaced = [
        (fsdp, "device", lambda: torch.device("cpu")), (fsdp, "read_slices", lambda *_: None),
        (fsdp, "shard", in_bfloat16(fsdp.shard)), (torch.nn.Module, "to_empty", to_empty),
        (torch.UntypedStorage, "resize_", watched(peak)), (families, "fill_buffers", lambda model: None),
        (families, "check_forward", check_without_numbers), (families, "random_rows", lambda config: rows),
        (files, "check_finite", lambda path, name, tensor: tensor.isfinite().all()),
        (logps.SelectedLogps, "BLOCK", {"cpu": logps.SelectedLogps.BLOCK["cuda"]}),
    ]  # fmt: skip
    with contextlib.ExitStack() as modes:
        for owner, name, value in replaced:
            modes.enter_context(mock.patch.object(owner, name, value))
        model = fsdp.load_policy(folder, cfg)
        peaks["collect"], peaks["check"] = peak.now, peak.most
        if whole:
            peak.begin()
            with torch.no_grad():
                logps.pair_logps(model, pairs, cfg.temperature)
            peaks["log-probs"] = peak.most
        optimizer = refuel.make_optimizer(model, cfg)
        learned = optimizer.param_groups[0]["params"]
        for p in learned:
            p.grad = torch.zeros_like(p)
        optimizer.step()  # makes the moments
        optimizer.zero_grad()
        for p in learned:
            p.grad = torch.zeros_like(p)  # of an earlier micro-batch of the step
        peak.begin()
        peak.flops = 0
        logp_2B = logps.pair_logps(model, pairs, cfg.temperature)
        refuel.refuel_loss(logp_2B, torch.zeros(2, len(pairs)), torch.ones(2, len(pairs)), cfg.eta).backward()
        del logp_2B
        optimizer.step()
        optimizer.zero_grad()
        peaks["train"], flops = peak.most, peak.flops
        if whole:
            peaks["save"] = weights_out(model, peak)
            if not cfg.one_training:
                optimizer = refuel.make_optimizer(model, cfg)
            peaks["wake"] = weights_out(model, peak)
            del optimizer
            peak.begin()
            row = logps.Row([1] * 2048, [], [], [(300, 650), (775, 1125), (1250, 1600)])
            with torch.no_grad():
                logps.scored_tokens(model.eval(), [row] * 8, cfg.temperature)
            peaks["evaluate: KL"] = peak.most
    return peaks if whole else {"train": peaks["train"]}, flops


def compare(argv, layers):
    """Rows of (activation checkpointing, phase, rehearsed bytes, planned bytes), and {kind: FLOPs}."""
    rows, flops = [], {}
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            with open(os.path.join(folder, "config.json"), "w") as file:
                json.dump(LLAMA | {"num_hidden_layers": layers}, file)
            flags = ["--setting", "one", *argv, "--activation-checkpointing", kind, "--policy", folder]
            cfg, m = refuel.read_config(flags), plan.shape(folder)
            peaks, flops[kind] = rehearse(cfg, folder, whole=kind == KINDS[0])
        planned = plan.trainer(m, cfg, RANKS, RANKS, (1536, 827))
        rows += [(kind, phase, peak, planned[phase]) for phase, peak in peaks.items()]
    return rows, flops


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--out")
    own, rest = parser.parse_known_args()
    with one_line("tests/rehearse.py"):
        refuel.read_config(["--setting", "one", *rest])
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    with mock.patch.object(files, "check_weights", lambda path: None), \
         mock.patch.object(families, "check_stored", lambda model, path: None):  # fmt: skip
        rows, flops = compare(rest, own.layers)
    lines = [f"python {' '.join(sys.argv)} ({time.strftime('%Y-%m-%d')})", "",
             "| `--activation-checkpointing` | phase | rehearsed, GiB | plan, GiB | |", "|---|---|---|---|---|"]  # fmt: skip
    for kind, phase, peak, planned in rows:
        lines.append(f"| {kind} | {phase} | {peak / 2**30:.2f} | {planned / 2**30:.2f} | {100 * (planned / peak - 1):+.1f} % |")
    lines += ["", ", ".join(f"{kind} {n:.5g} FLOPs" for kind, n in flops.items())]
    text = "\n".join(lines) + "\n"
    print(text)
    if own.out:
        files.write_file(own.out, text)
    return rows, flops


if __name__ == "__main__":
    main()
