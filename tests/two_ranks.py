"""torchrun --nproc_per_node 2 tests/two_ranks.py BASE OUT [FLAGS]: log-probs, gradients and three steps on FSDP ranks, saved
by rank 0 as OUT/ranks_{world}.safetensors, and a collection in OUT/ranks_{world}/, for test_refuel.py to compare."""
import os
import sys

sys.path[:0] = [os.path.dirname(os.path.abspath(__file__)), os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]

from dataclasses import replace
from functools import partial
from unittest import mock

from helpers import collected, in_bfloat16, random_pairs, with_logps
from usage import REST, arguments
import simulator
from machinery import ranks  # first: it sets what torch reads when it is imported

from machinery import fsdp
import refuel
import torch
from machinery.ranks import rank, world
from machinery.logps import pair_logps


def gradients(model, temperature):
    """{logp, grad/NAME: tensor} of a loss of random pairs."""
    model.train()
    logp_2B = pair_logps(model, random_pairs(9), temperature)
    (logp_2B * (1 + logp_2B.detach().sin())).sum().backward()
    found = {"logp": logp_2B.detach()}
    for name, p in model.named_parameters():
        found[f"grad/{name}"] = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
    return found


def load_in_bfloat16(base, cfg):
    """The policy as it is on a GPU, but for the place."""
    with mock.patch.object(fsdp, "shard", in_bfloat16(fsdp.shard)), \
         mock.patch.object(fsdp, "device", lambda: torch.device("cpu")), \
         mock.patch.object(fsdp, "dtype", lambda: torch.bfloat16):  # fmt: skip
        return refuel.load_policy(base, cfg)


def results(base, cfg):
    """{name: tensor}: log-probs and gradients for both temperatures with each checkpointing; trained weights."""
    found = {}
    for temperature in (1.0, 0.8):
        for checkpointing in ("none", "selective", "full"):
            model = refuel.load_policy(base, replace(cfg, activation_checkpointing=checkpointing))
            for name, tensor in gradients(model, temperature).items():
                found[f"{temperature}/{checkpointing}/{name}"] = tensor
    for name, tensor in gradients(load_in_bfloat16(base, cfg), 0.8).items():
        found[f"bfloat16/{name}"] = tensor
    model = refuel.load_policy(base, cfg)
    refuel.regress(model, refuel.make_optimizer(model, cfg), random_pairs(19), cfg)  # 8, 8 and a last batch of 3
    for name, whole in fsdp.full_weights(model):
        found[f"trained/{name}"] = whole
    last = replace(cfg, train_layers=1)
    model = refuel.load_policy(base, last)
    pi_0 = {name: p.clone() for name, p in fsdp.learned_weights(model).items()}
    refuel.regress(model, refuel.make_optimizer(model, last), random_pairs(19), last)
    with fsdp.exchanged(model, pi_0):
        found["pi_0"] = torch.tensor([p.logps for p in with_logps(model, random_pairs(9), last)]).T
    for name, whole in fsdp.full_weights(model):
        found[f"last/{name}"] = whole.clone()
    return {name: tensor.clone().contiguous() for name, tensor in found.items()}


if __name__ == "__main__":
    from safetensors.torch import save_file

    base, out, more = arguments(__doc__, base={}, out={}, flags=dict(nargs=REST))
    flags = f"--setting toy --policy {base} --batch-size 8 --micro-tokens 128 --lr 1e-3 --eta 1 --out {out}"
    flags += " --num-prompts 40 --wave 8 --engine transformers"
    cfg = refuel.read_config([*flags.split(), *more])
    ranks.start_processes()
    found = results(base, cfg)
    policy, user, reward = simulator.load_cast(cfg)
    collect = partial(refuel.collect, policy=policy, user=user, reward=reward, cfg=cfg)
    collected(os.path.join(out, f"ranks_{world()}"), collect, simulator.train_prompts(cfg, policy.tokenizer, 1), cfg, 1)
    if rank() == 0:
        save_file(found, os.path.join(out, f"ranks_{world()}.safetensors"))
    ranks.barrier()
