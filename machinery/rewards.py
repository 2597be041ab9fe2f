"""r(s_{H+1}): the reward models of the two settings, ArmoRM (section 4.2) and FsfairX (section 4.3).

A reward model is reward(dialogues) -> [float, or None where a dialogue does not fit it]; it sees whole batches.

Dimension key: B dialogues, T tokens, D hidden, O objectives.
"""
import os
import re
from collections import Counter

import torch

from machinery.files import BadInput, find_checkpoint, read_json, read_weights, weight_names
from machinery.ranks import add_up, bar, device, dtype, rank, world
from machinery.seams import opening, score
from machinery.template import check_round_trip, control_tokens, encode, encode_plain, render


def conversation_ids(tokenizer, messages):
    """A finished conversation as the reward model's own chat template renders it, with the BOS that the template writes
    and no other. The strings of control tokens inside a text stay text: an answer that spells out an end token must
    not move the place where a score is read."""
    names = control_tokens(tokenizer).values()
    mark = "\ue000"
    while any(mark in m["content"] for m in messages):  # until no text can contain a place of another's
        mark += "\ue000"
    held, shown = {}, []
    for i, m in enumerate(messages):
        if any(name in m["content"] for name in names):
            place = f"{mark}{i}{mark}"
            held[place] = m["content"].strip()
            m = m | {"content": place}
        shown.append(m)
    ids = []
    for piece in re.split(f"({mark}\\d+{mark})", render(tokenizer, shown)):
        if piece in held:
            ids += encode_plain(tokenizer, held[piece])
        elif piece:
            ids += encode(tokenizer, piece)
    return ids


class RewardModel:
    """A reward model on a causal body: raw scores, read in float32 at the last real token.

    Batches are sorted by length, bounded in tokens and padded on the right, by an eighth of a row at most, which no real
    token can see. A conversation of more than max_length tokens gets None; it is never cut, since a torn one would be
    scored as if it were whole."""

    def __init__(self, path, max_length, tokens=16384):
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        self.batch_tokens, self.tokens = tokens, Counter()
        if not self.tokenizer.chat_template:
            raise BadInput(f"--reward {path} has no chat template")
        check_round_trip(self.tokenizer)
        self.device = device()
        self.load(path, dtype())
        self.max_length = min(max_length, self.body.config.max_position_embeddings)

    def fits(self, ids):
        return len(ids) <= self.max_length

    def fits_dialogue(self, dialogue):
        return self.fits(conversation_ids(self.tokenizer, dialogue.conversation()))

    def __call__(self, dialogues):
        rows = [conversation_ids(self.tokenizer, d.conversation()) for d in dialogues]
        scores, order = [None] * len(rows), sorted((i for i, ids in enumerate(rows) if self.fits(ids)),
                                                   key=lambda i: len(rows[i]))  # fmt: skip
        batches = []
        while order:  # the longest first: a batch that does not fit the device fails at once
            longest = len(rows[order[-1]])
            batch = [i for i in order[-max(1, self.batch_tokens // longest) :] if len(rows[i]) >= 7 / 8 * longest]
            order = order[: -len(batch)]
            batches.append(batch)
        for batch in bar(batches, "score", delay=3):
            for i, r in zip(batch, self.read([rows[i] for i in batch])):
                scores[i] = r
        return scores

    def read(self, rows):
        T = len(rows[-1])
        self.tokens.update(prefill=len(rows) * T)
        ids_BT = torch.tensor([ids + [0] * (T - len(ids)) for ids in rows], device=self.device)
        mask_BT = torch.tensor([[1] * len(ids) + [0] * (T - len(ids)) for ids in rows], device=self.device)
        with torch.no_grad():
            hidden_BTD = self.body(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state
            return self.head(rows, hidden_BTD).tolist()


def check_unused(path, names, *free):
    """Refuse weights that the model has no place for: layers beyond its config.json's, a head's bias, an adapter. Without
    them scores would be finite, and another model's."""
    unused = [name for name in names if not name.startswith(free) and not name.endswith("rotary_emb.inv_freq")]
    if unused:
        raise BadInput(f"--reward {path} holds {len(unused)} weights that its config.json has no place for, {sorted(unused)[0]} "
                       "among them: does it name too few layers?")  # fmt: skip


def at(hidden_BTD, positions):
    """One token's hidden state of each row: (B, D) float32."""
    return hidden_BTD[torch.arange(len(positions)), torch.tensor(positions)].float()


class SequenceReward(RewardModel):
    """A sequence classifier with one label, such as FsfairX (setting two)."""

    def load(self, path, dtype):
        from transformers import AutoModelForSequenceClassification

        model, info = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=dtype, output_loading_info=True, trust_remote_code=False)  # fmt: skip
        if info["missing_keys"] or model.config.num_labels != 1 or not hasattr(model, "score"):
            raise BadInput(f"--reward {path} is not a sequence classifier with one label and a trained head")
        check_unused(path, info["unexpected_keys"], "lm_head.")
        self.body = model.base_model.to(self.device).eval()
        self.weight_1D = model.score.weight.detach().float().to(self.device)

    def head(self, rows, hidden_BTD):
        return (at(hidden_BTD, [len(ids) - 1 for ids in rows]) @ self.weight_1D.T)[:, 0]


class ArmoRM(RewardModel):
    """ArmoRM-Llama3-8B (setting one): 19 objectives read at the last token, mixed by a gate that is read where the last
    answer begins; score = sum over objectives of gate * (rewards @ transform).

    Its head is read from the safetensors by name and computed in float32: in bfloat16 scores between 1/8 and 1/4 come
    in steps of 0.001, which eta = 1000 turns into whole nats. Its remote code is never run."""

    # <|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n; the gate is read at the first of these five, the end
    # of the last question, so that it knows the question and not the answer
    PATTERN = [128009, 128006, 78191, 128007, 271]

    def load(self, path, dtype):
        from transformers import LlamaModel

        self.body, info = LlamaModel.from_pretrained(path, dtype=dtype, output_loading_info=True)
        if info["missing_keys"]:
            raise BadInput(f"--reward {path} lacks {len(info['missing_keys'])} weights of its Llama")
        self.body = self.body.to(self.device).eval()
        head = ("regression_layer.", "gating.", "reward_transform_matrix")
        check_unused(path, info["unexpected_keys"], "lm_head.", "score.", *head)
        self.weights = {k: v.float().to(self.device) for k, v in read_weights(path, head)}
        self.temperature = read_json(os.path.join(path, "config.json")).get("gating_temperature", 10)

    def fits(self, ids):
        return super().fits(ids) and self.gate_position(ids) is not None

    def gate_position(self, ids):
        n = len(self.PATTERN)
        return next((i for i in range(len(ids) - n, -1, -1) if ids[i : i + n] == self.PATTERN), None)

    def gate(self, x_BD):
        from torch.nn.functional import linear, relu

        layers = sorted({int(name.split(".")[2]) for name in self.weights if name.startswith("gating.layers.")})
        for layer in layers:
            weight, bias = (self.weights.get(f"gating.layers.{layer}.{kind}") for kind in ("weight", "bias"))
            x_BD = linear(x_BD if layer == 0 else relu(x_BD), weight, bias)
        return (x_BD / self.temperature).softmax(-1) * self.weights["gating.logit_scale"]   # (B, objectives)

    def head(self, rows, hidden_BTD):
        gate_BO = self.gate(at(hidden_BTD, [self.gate_position(ids) for ids in rows]))
        rewards_BO = at(hidden_BTD, [len(ids) - 1 for ids in rows]) @ self.weights["regression_layer.weight"].T
        return (gate_BO * (rewards_BO @ self.weights["reward_transform_matrix"])).sum(-1)


def check_reward(cfg):
    """The class and folder that --reward names, by the checkpoint's own files and before a model is loaded."""
    path = find_checkpoint(cfg.reward)
    names = set(weight_names(path))
    if {"regression_layer.weight", "reward_transform_matrix", "gating.layers.0.weight", "gating.logit_scale"} <= names:
        return ArmoRM, path
    architectures = read_json(os.path.join(path, "config.json")).get("architectures") or ()
    if any("SequenceClassification" in name for name in architectures):
        return SequenceReward, path
    raise BadInput(f"--reward {cfg.reward} is neither ArmoRM nor a sequence classifier")


def load_reward(cfg):
    kind, path = check_reward(cfg)
    return kind(path, cfg.reward_tokens)


def shared(reward):
    """The reward model with its work shared over the ranks and done once for each conversation; to be called by all
    ranks alike."""
    known = {}

    def scores(dialogues):
        keys = []
        for d in dialogues:  # all that a world's reward may look at
            seen = d.secret, d.stream, d.ids, d.spans, d.truncated
            keys.append((repr(seen), *(m["content"] for m in d.conversation())))
        new = {key: d for key, d in zip(keys, dialogues) if key not in known}
        mine = slice(rank(), None, world())
        score_N = torch.zeros(len(new), dtype=torch.float64)
        found = score(reward, list(new.values())[mine])
        if None in found:
            raise BadInput(f"--reward gave None: {opening(list(new.values())[mine][found.index(None)])}, and an evaluation "
                           "needs a number for each")  # fmt: skip
        score_N[mine] = torch.tensor(found, dtype=torch.float64)
        known.update(zip(new, add_up(score_N).tolist()))
        return [known[key] for key in keys]

    return scores
