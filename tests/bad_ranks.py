"""torchrun --nproc_per_node N tests/bad_ranks.py BASE OUT: collections and batches that are smaller than the ranks, numbers
that are not finite, then a full disk on the last rank alone; for test_bad_days.py. What was found: OUT/found_{N}_{rank}.json."""
import json
import os
import resource
import sys
from functools import partial

sys.path[:0] = [os.path.dirname(os.path.abspath(__file__)), os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]

from helpers import collected, random_pairs
from usage import arguments
import simulator
from machinery import ranks  # first: it sets what torch reads when it is imported

from machinery import fsdp
import refuel
from machinery.files import BadInput
from machinery.ranks import rank, world

FLAGS = "--setting toy --engine transformers --eta 1 --lr 1e-3 --weight-decay 0 --max-turns 2 --wave 8 --num-prompts 20 --epochs 1"


def read(base, out, *more):
    flags = [*FLAGS.split(), "--policy", base, "--reference", base, "--out", os.path.join(out, f"run_{world()}"), *more]
    return refuel.read_config([*flags, "--batch-size", "4"])


def complaint(work):
    """The one line with which it stops, None if it does not."""
    try:
        work()
    except BadInput as error:
        return str(error)


def huge(logp_2B, old_2B, reward_2B, eta):
    """A loss of 0 whose gradient overflows where a reward is not 0."""
    return (reward_2B[0] * 1e38 * (logp_2B - logp_2B.detach()).sum(0)).mean()


def numbers(base, out):
    """{name: what came of it}; every rank computes all of it."""
    cfg, found, pairs = read(base, out), {}, [p._replace(rewards=(1.0, 0.0)) for p in random_pairs(9)]
    policy, user, reward = simulator.load_cast(cfg)
    prompts = simulator.train_prompts(cfg, policy.tokenizer, 1)
    collect = partial(refuel.collect, policy=policy, user=user, reward=reward, cfg=cfg)
    folder = lambda name: os.path.join(cfg.out, name)  # noqa: E731
    os.makedirs(cfg.out, exist_ok=True)
    for name, some in (("three waves", prompts), ("one prompt", prompts[:1])):
        found[name] = [[*p.prefix, *p.y, *p.y2, *p.rewards, p.h, p.H] for p in collected(folder(name), collect, some, cfg, 1)]

    if world() > 2:
        return found

    def identical(rows, rng, dropped):
        dropped["identical"] += len(rows)
        return []

    found["identical"] = complaint(lambda: collected(folder("identical"), identical, prompts, cfg, 1))

    def regress(pairs, loss_fn=refuel.refuel_loss):
        model, losses = refuel.load_policy(base, cfg), []
        before = {name: w.clone() for name, w in fsdp.full_weights(model)}
        optimizer = refuel.make_optimizer(model, cfg)
        told = complaint(lambda: refuel.regress(model, optimizer, pairs, cfg, loss_fn,
                                                after_step=lambda _, m: losses.append(m["loss"])))  # fmt: skip
        return told, losses, max((w - before[name]).abs().max().item() for name, w in fsdp.full_weights(model))

    found["batches of 4, 4 and 1"] = regress(pairs)
    found["one pair"] = regress(pairs[:1])
    found["equal rewards"] = regress([p._replace(rewards=(0.5, 0.5)) for p in pairs])
    bad = [*pairs[:2], pairs[2]._replace(rewards=(float("nan"), 0.0)), *pairs[3:]]
    found["nan"] = regress(bad)
    found["infinite gradient"] = regress([p._replace(rewards=(float(i == 3), 0.0)) for i, p in enumerate(pairs)], huge)
    return found


if __name__ == "__main__":
    base, out = arguments(__doc__, base={}, out={})
    ranks.start_processes()
    found = numbers(base, out)
    with open(os.path.join(out, f"found_{world()}_{rank()}.json"), "w") as file:
        json.dump(found, file)
    ranks.barrier()
    if rank() == world() - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # this rank's disk is full; the others wait for it
    with ranks.one_line("bad_ranks.py"):
        ranks.in_waves(os.path.join(out, f"waves_{world()}"), list(range(world())), 1, lambda rows, n: [rows], "waves")
