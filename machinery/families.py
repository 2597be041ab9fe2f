"""Whose ln pi is right here: what is refused by its configuration, and a check of all others against their own forward.

pair_logps goes another way than a model's own forward: an attention of its own, several dialogues in one row, the head
on the scored positions alone. What a model does besides on its own way would be left out without a word, so a model is
refused, in one line, unless both ways are known to end alike. docs/families.md lists who is who.

Dimension key: N scored tokens, V vocabulary.
"""
import re

import torch

from machinery import files
from machinery.files import BadInput, brief
from machinery.logps import Row, scored_tokens

NO_MODEL = "no language model is made of its config.json"
NOT_HERE = "whose ln pi is not computed here"
# whatever a family's own code makes of a configuration that does not fit, or of a forward that is not its own
BROKEN = AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError

# ---------------------------------------------------------------------------------------------------------------
# What configuration and weight files say, before anything is loaded
# ---------------------------------------------------------------------------------------------------------------


def check_policy(path):
    """A policy's folder is one that can be trained: looks at its configuration and at the headers of its weights."""
    check_stored(build(path), path)


def build(path):
    """The model of a checkpoint's configuration, on the meta device; one line if its ln pi is not computed here."""
    from transformers import AutoModelForCausalLM

    config = files.load_config(path)
    if config.get_text_config() is not config:
        raise BadInput(f"{path} is a {config.model_type}, and only models of text alone are trained here")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except BROKEN as error:
        raise BadInput(f"{path} is a {config.model_type}, and {NO_MODEL}: {brief(error)}") from None
    reason = why_not(model)
    if reason:
        raise BadInput(f"{path} is a {config.model_type}, and {reason}")
    return model


def why_not(model):
    """What is known against computing this model's ln pi here, in words; None if nothing is."""
    config, body, head = model.config, getattr(model, "model", None), getattr(model, "lm_head", None)
    settings = config.to_dict()
    if settings.get("quantization_config"):
        return "its weights are quantised: only plain ones are trained"
    if any(".experts." in name for name, _ in model.named_parameters()):
        return "mixtures of experts are not trained: transformers fuses their weights at load, here they are as stored"
    kinds = set(settings.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"its layers of the kind {', '.join(sorted(kinds))} would let y' see y: only plain attention is trained"
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv1d):
            return f"its convolution {name} would let y' see y: only plain attention is trained"
    if not (isinstance(head, torch.nn.Linear) and hasattr(body, "layers") and hasattr(body, "rotary_emb")):
        return "only policies of Llama's shape (model.layers, model.rotary_emb, lm_head) are trained here"
    if head.bias is not None:
        return "its lm_head has a bias, which ln pi leaves out"
    for name, value in settings.items():  # logits_scaling, logit_scale, final_logit_softcapping, ...
        if "logit" in name and isinstance(value, float | int) and value not in (0, 1):
            return f"its logits are changed behind lm_head or in attention ({name} {value}), which ln pi leaves out"
    return None


def check_stored(model, path):
    """The weight files hold each of the model's weights in its shape, and nothing that the model does not know.

    A config.json with fewer layers than the weights would else train, and save, a smaller model."""
    wanted = {name: list(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    tied = wanted.keys() - dict(model.named_parameters())  # stored or not, as lm_head.weight beside its embedding
    stored = dict(files.weight_shapes(path))
    buffers = model.state_dict().keys() - wanted.keys()
    if buffers:
        raise BadInput(f"{path} is a {model.config.model_type}, whose checkpoint holds more than weights "
                       f"({sorted(buffers)[0]}): these are not trained here")  # fmt: skip
    missing = wanted.keys() - tied - stored.keys()
    if missing:
        raise BadInput(f"{path} lacks {len(missing)} weights that its config.json asks for, {sorted(missing)[0]} "
                       "among them")  # fmt: skip
    ignored = ["rotary_emb.inv_freq", *(model._keys_to_ignore_on_load_unexpected or ())]
    unknown = [name for name in sorted(stored.keys() - wanted.keys()) if not any(re.search(x, name) for x in ignored)]
    if unknown:
        raise BadInput(f"{path} holds {len(unknown)} weights that its config.json has no place for, {unknown[0]} among "
                       "them: does it name too few layers?")  # fmt: skip
    for name in sorted(wanted.keys() & stored.keys()):
        if wanted[name] != stored[name]:
            raise BadInput(f"{path}: {name} is {stored[name]}, and its config.json asks for {wanted[name]}")


# ---------------------------------------------------------------------------------------------------------------
# What no checkpoint holds
# ---------------------------------------------------------------------------------------------------------------


def fill_buffers(model):
    """Rotary frequencies, the scale of Gemma's embedding and the like, which no file holds and to_empty left as
    garbage, are set by the model's own _init_weights, as from_pretrained does. One that it forgets stays NaN and is refused."""
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.fill_(torch.nan)
    for p in model.parameters():
        p._is_hf_initialized = True  # these are read from the files
    for module in model.modules():
        module._is_hf_initialized = False  # on the meta device they were set, to nothing
    model.initialize_weights()
    for name, buffer in model.named_buffers():
        if not buffer.isfinite().all():
            raise BadInput(f"a {model.config.model_type} does not say how to fill {name}, which no checkpoint holds")


def remove_dropout(model):
    """ln pi is a number, not a draw: at step 0 the log-ratio is 0."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):  # attention_dropout, residual_dropout
                setattr(module, name, 0.0)


# ---------------------------------------------------------------------------------------------------------------
# The net for what nobody listed: our forward against the model's own
# ---------------------------------------------------------------------------------------------------------------

# The mean difference of a token, in nats. float32: two orders of summation differ by 4e-6 to 9e-6 in 30 random layers.
# bfloat16: a logit of size 16 is rounded by up to 0.06, and 30 random layers differ by 0.05 to 0.1; what a family
# leaves out has cost 0.2 to 4.
LIMIT = {torch.float32: 1e-4, torch.bfloat16: 0.2}
TEMPERATURE = 0.8  # that of setting one; at 1 nobody would miss it
FAR = 4096  # tokens: longer windows are not walked through, their mask is the same line of code


def random_rows(config):
    """A short pair of random ids, and one a few tokens longer than the model's windows, or of a few hundred tokens."""
    windows = [256]
    for name, value in config.to_dict().items():
        if ("window" in name or "chunk" in name) and isinstance(value, int) and value <= FAR:
            windows.append(value)
    most = getattr(config, "max_position_embeddings", None) or FAR
    generator = torch.Generator().manual_seed(0)

    def ids(n):
        return torch.randint(config.vocab_size, (n,), generator=generator).tolist()

    rows = []
    for prefix, y, y2 in ((3, 4, 5), (min(max(windows), most - 12), 12, 10)):
        ends = prefix, prefix + y, prefix + y + y2
        rows.append(Row(ids(prefix), ids(y), ids(y2), [ends[:2], ends[1:]]))
    return rows


def own_logps(model, rows, device):
    """ln pi of y and y' of each row by the model's own forward, each behind its prefix in a row of its own: (N,)."""
    found = []
    for row in rows:
        for response in (row.y, row.y2):
            ids_1T = torch.tensor([row.prefix + response], device=device)
            n = len(response)
            logits_NV = model(input_ids=ids_1T, use_cache=False, logits_to_keep=n + 1).logits[0, -n - 1 : -1]
            logp_NV = torch.log_softmax(logits_NV.float() / TEMPERATURE, dim=-1)
            found.append(logp_NV.gather(1, torch.tensor(response, device=device)[:, None])[:, 0])
    return torch.cat(found)


@torch.no_grad()
def both_forwards(model, path, own_attention):
    """ln pi of the random rows as it is trained and by the model's own forward, two of (N,), or BadInput."""
    rows, device = random_rows(model.config), next(model.parameters()).device
    try:
        model.train()
        logp_N, _, _ = scored_tokens(model, rows, TEMPERATURE)
        model.eval()
        model.set_attn_implementation(own_attention)
        own_N = own_logps(model, rows, device)
    except (torch.OutOfMemoryError, torch.distributed.DistError):  # RuntimeErrors that say nothing of the family
        raise
    except BROKEN as error:
        raise BadInput(f"{path} is a {model.config.model_type}, {NOT_HERE}: {brief(error)}") from None
    model.set_attn_implementation("pairs")
    model.train()
    return logp_N, own_N


def check_forward(model, path, own_attention, dtype):
    """ln pi as it is trained equals the model's own: same weights, but its own attention, its own end, no packing.

    Every rank runs it on the sharded model; it costs five short forwards. Ours runs in training mode, so that dropout
    of any kind shows."""
    logp_N, own_N = both_forwards(model, path, own_attention)
    difference = (logp_N - own_N).abs().mean().item()
    if not difference <= LIMIT[dtype]:  # so that NaN is refused, too
        raise BadInput(f"{path} is a {model.config.model_type}, {NOT_HERE}: it differs by {difference:.2g} nats a token "
                       f"from the model's own forward (at most {LIMIT[dtype]:g} in {str(dtype).removeprefix('torch.')})")
