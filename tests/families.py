"""Every family of transformers' causal language models, tiny and random: ln pi is right, or the family is refused.

    python tests/families.py                       the table of docs/families.md, on one core in under a minute
    python tests/families.py llama gemma3_text     these alone; under torchrun on as many processes as it starts

The reference shares nothing with what is tested: from_pretrained, eager attention, a row for each response, all logits.
"""
import os
import re
import sys
import tempfile
from types import SimpleNamespace

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import machinery  # noqa: F401, E402  (first: it sets what torch reads when it is imported)

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

from machinery import families  # noqa: E402
from machinery.files import BadInput  # noqa: E402
from machinery.fsdp import load_policy  # noqa: E402
from machinery.logps import pair_logps  # noqa: E402
from machinery.ranks import barrier, rank, start_processes, told  # noqa: E402
from refuel import Pair  # noqa: E402
from usage import arguments  # noqa: E402

WINDOW = 8  # tokens, where a family has one
LARGEST = 30e6  # parameters of what is still called tiny
RIGHT = 1e-4  # nats, of a response of a few tokens
CFG = SimpleNamespace(train_layers=0, activation_checkpointing="none", replicas=1)

# One value for each name that a configuration may have, whatever the family.
TINY = dict(
    vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    sliding_window=WINDOW, use_sliding_window=True, max_window_layers=0, query_pre_attn_scalar=8,
    d_model=32, n_embd=32, n_layer=4, n_layers=4, n_head=4, n_heads=4, n_inner=48, n_positions=256, max_seq_len=256,
    ffn_dim=48, word_embed_proj_dim=32, num_local_experts=4, num_experts=4, n_routed_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=16, shared_expert_intermediate_size=16, n_group=1, topk_group=1, first_k_dense_replace=1,
    qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, kv_lora_rank=8, q_lora_rank=8, hidden_size_per_layer_input=8,
    vocab_size_per_layer_input=99, laurel_rank=4, num_kv_shared_layers=0, mamba_n_heads=4, mamba_d_head=16,
    mamba_d_state=8, mamba_d_ssm=64,
)  # fmt: skip
# What a family wants besides; granite's factors are those of its checkpoints.
BESIDES = {
    "dots1": dict(n_shared_experts=1),
    "granite": dict(logits_scaling=8.0, embedding_multiplier=12.0, attention_multiplier=0.3, residual_multiplier=0.22),
    "lfm2": dict(layer_types=["conv", "conv", "full_attention", "conv"]),
    "lfm2_moe": dict(layer_types=["conv", "conv", "full_attention", "conv"]),
    "minicpm3": dict(num_key_value_heads=4),
    "reformer": dict(is_decoder=True),
    # from_pretrained sets youtu's row of the padding token to 0, whatever the file holds (transformers 5.19)
    "youtu": dict(num_key_value_heads=4, pad_token_id=None),
}


def tiny_config(name):
    """A family's smallest configuration, or its own where that does not fit; None if it has none of its own."""
    config_class = transformers.CONFIG_MAPPING[name]
    try:
        own = config_class()
    except Exception:
        return None
    values = {}
    for key, value in (TINY | BESIDES.get(name, {})).items():
        try:
            if hasattr(own, key):
                values[key] = value
        except Exception:  # some name is refused by some configuration, each in its own way
            continue
    try:
        return config_class(**values)
    except Exception:
        return own


@torch.no_grad()
def randomise(model):
    """Weights so large that nothing a model does is lost in rounding; norms and biases around what they begin with."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim == 1:
            p.add_(0.15 * noise)
        else:
            p.copy_(noise * (0.4 if "embed" in name or "lm_head" in name else 0.2))


def some_pairs(prefix):
    generator = torch.Generator().manual_seed(prefix)
    pairs = []
    for _ in range(3):
        ids = [torch.randint(3, 99, (n,), generator=generator).tolist() for n in (prefix, 3, 4)]
        pairs.append(Pair(*ids, rewards=(0.0, 1.0), h=1, H=1))
    return pairs


@torch.no_grad()
def plain_logps(model, pairs, temperature):
    """What pair_logps promises, (2, B): each response alone behind its prefix, all logits, a loop."""
    logps = []
    for pair in pairs:
        for response in (pair.y, pair.y2):
            ids_1T = torch.tensor([pair.prefix + response])
            logp_TV = torch.log_softmax(model(ids_1T, use_cache=False).logits[0].float() / temperature, dim=-1)
            total = 0.0
            for i, token in enumerate(response):
                total += logp_TV[len(pair.prefix) + i - 1, token].item()
            logps.append(total)
    return torch.tensor(logps).view(-1, 2).T


def worst_difference(folder, temperature=0.8):
    """Between pair_logps of load_policy and the plain forward: nats of a response, before and beyond the window."""
    ours, worst = load_policy(folder, CFG), 0.0
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    plain.eval()
    for prefix in (3, 5 * WINDOW):
        pairs = some_pairs(prefix)
        with torch.no_grad():
            logp_2B = pair_logps(ours, pairs, temperature)
        difference = (logp_2B - plain_logps(plain, pairs, temperature)).abs().max().item()
        worst = max(worst, difference) if difference == difference else difference
    return worst


def judge(name, folder):
    """(right, refused, WRONG or not built; and the difference in nats or the reason)."""
    config = tiny_config(name)
    if config is None:
        return "not built", "its configuration wants others' inside"
    if rank() == 0:
        config.save_pretrained(folder)
    barrier()
    try:
        size = sum(p.numel() for p in families.build(folder).parameters())
        if size > LARGEST:
            return "not built", f"its smallest has {size / 1e6:.0f} M parameters"
        if rank() == 0:
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            randomise(model)
            model.save_pretrained(folder)
        barrier()
        worst = worst_difference(folder)
    except BadInput as refusal:
        words = re.sub(r"^\S+ is a [\w-]+, (and )?", "", str(refusal))
        return ("not built" if families.NO_MODEL in words else "refused"), words
    return ("right" if worst < RIGHT else "WRONG"), f"{worst:.1g} nats"


def main(names):
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    start_processes()
    for name in names or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        with tempfile.TemporaryDirectory() as folder:
            verdict, words = judge(name, told(folder)[0])
            barrier()
        if rank() == 0:
            print(f"| {name} | {verdict} | {words} |", flush=True)


if __name__ == "__main__":
    main(*arguments(__doc__, names=dict(nargs="*", metavar="FAMILY")))
