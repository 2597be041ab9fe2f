"""The policy over all ranks (FSDP2): loading, sharding, its weights in and out, a training saved and brought back.

Every rank calls each of these functions; the callers then read as if there were one process.
"""
import contextlib
import json
import os
import shutil
from functools import partial
from types import MethodType

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from machinery import families, files
from machinery.files import BadInput
from machinery.logps import attend_in_pairs, token_logps
from machinery.ranks import bar, barrier, device, dtype, rank, world


def load_policy(path, cfg):
    """A checkpoint's policy for training: float32 weights sharded over all ranks (FSDP2), bfloat16 compute on GPUs.

    Built on the meta device; each rank then reads its own slice of every weight from the safetensors, so nobody ever
    holds the whole model."""
    model = families.build(path)
    families.check_stored(model, path)
    own_attention = model.config._attn_implementation
    attend_in_pairs(model)
    families.remove_dropout(model)
    if cfg.train_layers:  # Paper: the last four layers. (Released code: the last norm and lm_head besides.)
        model.requires_grad_(False)
        model.model.layers[-cfg.train_layers :].requires_grad_(True)
    if cfg.activation_checkpointing != "none":
        checkpoint_activations(model, cfg.activation_checkpointing)
    shard(model, cfg.replicas)
    model.to_empty(device=device())
    families.fill_buffers(model)
    read_slices(model, path)
    families.check_forward(model, path, own_attention, dtype())
    return model


PRODUCTS = {torch.ops.aten.mm.default} | {
    getattr(torch.ops.aten, f"_scaled_dot_product_{kind}").default
    for kind in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")}  # fmt: skip


def checkpoint_activations(model, kind):
    """selective: of a layer the results of matrix products and of attention are kept for the backward; norms, rotations
    and gates are computed again: half of the memory, and nothing that costs FLOPs runs twice. full: its input alone is
    kept, and its forward runs again: the least memory, and up to a third more FLOPs."""

    def keep_products(_, op, *args, **kwargs):
        product = op in PRODUCTS or getattr(op, "namespace", "") == "torch_attn"  # whose import would take two seconds
        return CheckpointPolicy.MUST_SAVE if product else CheckpointPolicy.PREFER_RECOMPUTE

    kept = {"context_fn": partial(create_selective_checkpoint_contexts, keep_products)} if kind == "selective" else {}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False} | kept)
    model.disable_input_require_grads()  # transformers would go back through layers that do not learn
    for layer in model.model.layers:  # one that does not learn keeps nothing by itself, but its products if told to
        layer.gradient_checkpointing = next(layer.parameters()).requires_grad


def shard(model, replicas=1):
    """FSDP2: one unit a layer, one for the rest; with replicas, sharded within groups of neighbouring ranks (torchrun
    numbers them node by node) and replicated across the groups."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    # The root, too, gives its weights back after a forward (FSDP2's default keeps them): a forward without backward
    # would else leave whole tensors in place of the sharded ones, and an optimiser made then would hold the wrong ones.
    grid = init_device_mesh(device().type, (replicas, world() // replicas), mesh_dim_names=("replicas", "shards"))
    options = dict(mesh=grid if replicas > 1 else grid["shards"], reshard_after_forward=True)
    if torch.cuda.is_available():
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, **options)
    # log-probs do not pass through model.forward, so FSDP is told which method needs the root's weights
    model.token_logps = MethodType(token_logps, model)
    fully_shard(model, **options)
    register_fsdp_forward_method(model, "token_logps")


def gradient_norm(model):
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()


# ---------------------------------------------------------------------------------------------------------------
# Weights in and out, a training saved and brought back
# ---------------------------------------------------------------------------------------------------------------


def learned_weights(model):
    """This rank's part of the weights that learn, live: {name: plain tensor}."""
    learned = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    return {name: p.to_local() if hasattr(p, "to_local") else p for name, p in learned.items()}


@contextlib.contextmanager
def exchanged(model, weights):
    """Within it the model is the one of these weights: pi_0 without a second model. What is frozen is common to both,
    so the price is a copy of what learns (one eighth of the last four layers, 0.4 GB, on each of 8 ranks), for a while
    two, and one more forward of an update's pairs."""
    live = learned_weights(model)
    own = {name: p.clone() for name, p in live.items()}
    for name, p in live.items():
        p.copy_(weights[name])
    yield
    for name, p in live.items():
        p.copy_(own[name])


@torch.no_grad()
def read_slices(model, path):
    from safetensors import safe_open

    read, names = {}, dict(model.named_parameters(remove_duplicate=False))  # a tied lm_head.weight is its embedding
    for file in files.weight_files(path):
        with safe_open(file, "pt") as weights:
            for name in sorted(names.keys() & weights.keys()):
                p, stored = names[name], weights.get_slice(name)
                if stored.get_shape() != list(p.shape):
                    raise BadInput(f"{path}: {name} is {stored.get_shape()}, and the model's is {list(p.shape)}")
                local, mesh, rows = p.to_local(), p.device_mesh, stored.get_shape()[0]
                n, i = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)  # shards, and which is this rank's
                start = min(i * -(-rows // n), rows)  # FSDP2 cuts dimension 0 as torch.chunk does
                mine = stored[start : start + len(local)].to(local)
                files.check_finite(path, name, mine)
                if p in read and not torch.equal(local, mine):
                    raise BadInput(f"{path} ties {name} to {read[p]} and holds another {name}")
                if len(local):
                    local.copy_(mine)
                read[p] = name
    missing = [name for name, p in names.items() if p not in read]
    if missing:
        raise BadInput(f"{path} lacks {len(missing)} weights, {sorted(missing)[0]} among them")


def full_weights(model):
    """(name, unsharded tensor) one at a time, in the checkpoint's names; every rank must go through all of them.
    Weights that are not finite go nowhere: neither into a file nor into an engine."""
    for name, p in model.named_parameters():
        full = p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach()
        files.check_finite("the policy in training", name, full)
        yield name, full


def save_policy(path, model, start):
    """A Hugging Face folder, float32 so that a run that continues from it continues exactly. `start` lends its
    tokenizer and generation settings."""
    from huggingface_hub import save_torch_state_dict

    state = {}
    for name, tensor in bar(full_weights(model), "save the policy", delay=3):
        if rank() == 0:
            state[name] = tensor.cpu().clone()

    def write(partial):
        save_torch_state_dict(state, partial)
        model.config.save_pretrained(partial)
        files.copy_tokenizer(start, partial)

    if rank() == 0:
        files.write_folder(path, write)
    barrier()


def training_state(model, optimizer):
    """This rank's part of weights and AdamW state as plain tensors {name: tensor}, aliasing the live ones."""
    state = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        moments = {k: v for k, v in optimizer.state.get(p, {}).items()} | {"weight": p.data}
        for key, value in moments.items():
            state[f"{name}/{key}"] = value.to_local() if hasattr(value, "to_local") else value
    return state


def save_training(folder, model, optimizer, step):
    """Weights and optimiser of the training in progress, each rank its own shard; then the step that names them."""
    from safetensors.torch import save_file

    folder = os.path.join(folder, "training")
    os.makedirs(folder, exist_ok=True)
    state = training_state(model, optimizer)
    for name, tensor in state.items():
        files.check_finite("the training in progress", name, tensor)
    with files.writing(os.path.join(folder, f"step_{step}_rank_{rank()}.safetensors")) as partial:
        save_file(state, partial)
    barrier()
    if rank() == 0:
        files.write_file(os.path.join(folder, "step.json"), json.dumps({"step": step, "ranks": world()}))
        for name in os.listdir(folder):
            if not name.startswith((f"step_{step}_", "step.json")):
                os.remove(os.path.join(folder, name))


@torch.no_grad()
def load_training(folder, model, optimizer):
    """Bring a stopped training back and return its next step; 0 if there is none, or it ran on other ranks."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = os.path.join(folder, "training")
    marker = os.path.join(folder, "step.json")
    if not os.path.exists(marker):
        return 0
    saved = files.read_json(marker)
    if not (isinstance(saved.get("step"), int) and isinstance(saved.get("ranks"), int)):
        raise BadInput(f"{marker} does not name a step and its ranks: remove {folder} to begin this training again")
    if saved["ranks"] != world():
        if rank() == 0:
            print(f"{folder} is the state of {saved['ranks']} processes, not of {world()}: this iteration's training "
                  "begins again, its pairs are kept", flush=True)  # fmt: skip
        barrier()
        remove_training(os.path.dirname(folder))  # its looks at held-out pairs leave the log with the first new step
        barrier()
        return 0
    file = os.path.join(folder, f"step_{saved['step']}_rank_{rank()}.safetensors")
    try:
        state = load_file(file)
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{file} cannot be read ({files.brief(error)}): put it back, or remove {folder} to begin this "
                       "training again") from None  # fmt: skip
    for p in optimizer.param_groups[0]["params"]:
        moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}  # where fused AdamW wants it
    live = training_state(model, optimizer)
    if {name: tensor.shape for name, tensor in live.items()} != {name: tensor.shape for name, tensor in state.items()}:
        raise BadInput(f"{file} is the state of another model: put its own back, or choose another --out")
    for name, tensor in live.items():
        tensor.copy_(state[name])
    return saved["step"] + 1


def remove_training(folder):
    if rank() == 0:
        shutil.rmtree(os.path.join(folder, "training"), ignore_errors=True)
