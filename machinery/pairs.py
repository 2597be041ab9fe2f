"""Finished pairs to train on (`--pairs`): the authors' published sets, and the pairs.jsonl of a run of this program.

    chosen, reject                two conversations of H turns, as messages, that part at answer h
    chosen_token, reject_token    ids of s_h and the answer, padded behind it
    chosen_mask, reject_mask      1 where the answer is
    chosen_reward, reject_reward  r(s_{H+1}), r(s'_{H+1})

The published answers were decoded and encoded again and all end with the end token, cut or not: what is trained on here
is what was trained on there. Their order by reward says nothing to Eq. 1.
"""
import math
import os
import re
from array import array

from machinery import rows
from machinery.files import BadInput, fingerprint, policy_folder, read_json, read_sealed
from machinery.template import said

SIDES = ("chosen", "reject")
LOOK = 100  # rows whose ids are held against their text: another tokenizer shows in the first


def check_whose(cfg):
    """A run's own pairs are its pi_t's: --policy must be that policy. `engine_gap` alone would not tell on a GPU, where a
    policy that has moved by 0.03 nats a token is within bfloat16's noise."""
    folder, name = os.path.split(os.path.abspath(cfg.pairs))
    run, iteration = os.path.split(folder)
    config = os.path.join(run, "config.json")
    if name != "pairs.jsonl" or not re.fullmatch("iter_[1-9][0-9]*", iteration) or not os.path.exists(config):
        return
    t = int(iteration.removeprefix("iter_"))
    sampled_by = policy_folder(run, t - 1)
    if t == 1:
        sampled_by, then = "its own --policy", read_json(config).get("made_of", {}).get("content of --policy")
    else:  # of most updates of setting two no policy is kept
        then = fingerprint(sampled_by) if os.path.isdir(sampled_by) else None
    if then and then != fingerprint(cfg.policy):
        raise BadInput(f"--pairs {cfg.pairs} were sampled by {sampled_by}, which is not --policy {cfg.policy}")


class Wrong(Exception):
    """(column, what is wrong with it)."""


def read_pairs(cfg, tokenizer, most):
    """At most `most` pairs of --pairs as dictionaries {prefix, y, y2, rewards, h, H, opening} or, of a run's own, lines of
    its pairs.jsonl; BadInput names the row and the column of the first that is wrong."""
    size = 0
    for number, row in enumerate(stored(cfg.pairs), 1):
        if "dropped" in row:  # the first line of a wave of the run
            continue
        try:
            found = own(row, tokenizer) if "dialogues" in row else published(row, tokenizer, size < LOOK)
        except Wrong as wrong:
            raise BadInput(f"--pairs {cfg.pairs}, row {number}: {wrong.args[0]} {wrong.args[1]}") from None
        yield found
        size += 1
        if size == most:
            return
    if not size:
        raise BadInput(f"--pairs {cfg.pairs} holds no pairs")


def stored(name):
    """The rows as they are stored, of a hub id or folder with parts those of the training part; sealed or not."""
    if os.path.exists(f"{name}.sha256"):
        yield from read_sealed(name)
        return
    try:
        for part, _, read in rows.sources(name):
            if part == rows.TRAIN:
                yield from read()
    except BadInput as error:
        raise BadInput(str(error).replace("--dataset", "--pairs")) from None
    except rows.file_errors() as error:
        raise BadInput(f"--pairs {name} cannot be read: {type(error).__name__} {' '.join(str(error).split())[:200]}") from None


def column(row, name, kind):
    if not isinstance(row.get(name), kind):
        raise Wrong(name, "is missing" if row.get(name) is None else f"is a {type(row[name]).__name__}")
    return row[name]


def checked_ids(ids, name, tokenizer):
    if not all(type(i) is int and 0 <= i < len(tokenizer) for i in ids):
        raise Wrong(name, f"holds what is no id of a vocabulary of {len(tokenizer)}")


def number(value, name):
    if type(value) not in (int, float) or not math.isfinite(value):
        raise Wrong(name, f"is {value!r}, and must be a number")
    if value == -99999:
        raise Wrong(name, "is -99999, the released code's mark of a conversation that could not be scored")
    return float(value)


def published(row, tokenizer, look):
    """A row of the published form as {prefix, y, y2, rewards, h, H, opening}."""
    messages = {side: column(row, side, list) for side in SIDES}
    for side, said_there in messages.items():
        roles = [m.get("role") if isinstance(m, dict) and isinstance(m.get("content"), str) else None for m in said_there]
        if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
            raise Wrong(side, "is not messages of user and assistant in turn")
    if len(messages["chosen"]) != len(messages["reject"]):
        raise Wrong("reject", "has not as many turns as chosen")
    both = zip(*messages.values())
    parted = next((i for i, (one, two) in enumerate(both) if one["content"] != two["content"]), None)
    if parted is None or parted % 2 == 0:
        raise Wrong("reject", "does not part from chosen at an answer")
    pieces = []
    for side in SIDES:
        prefix, answer = masked(row, side, tokenizer)
        text = messages[side][parted]["content"]
        if look and said(tokenizer, answer, False).split() != text.split():
            raise Wrong(f"{side}_token", "is not the text of its answer: it was made by another tokenizer than --policy's")
        pieces.append((prefix, answer))
    (prefix, y), (other, y2) = pieces
    if prefix != other:
        raise Wrong("reject_token", "does not begin with the prefix of chosen_token")
    rewards = tuple(number(row.get(f"{side}_reward"), f"{side}_reward") for side in SIDES)
    return {"prefix": array("i", prefix), "y": array("i", y), "y2": array("i", y2), "rewards": rewards,
            "h": (parted + 1) // 2, "H": len(messages["chosen"]) // 2,
            "opening": messages["chosen"][0]["content"][:200]}  # fmt: skip


def masked(row, side, tokenizer):
    """(ids before the masked piece, the piece); what stands behind it is padding."""
    ids, mask = column(row, f"{side}_token", list), column(row, f"{side}_mask", list)
    ones = [i for i, m in enumerate(mask) if m == 1]
    if len(mask) != len(ids) or not set(mask) <= {0, 1} or not ones or ones[0] == 0 or len(ones) != ones[-1] - ones[0] + 1:
        raise Wrong(f"{side}_mask", f"is not one piece of ones behind a prefix, as long as {side}_token")
    checked_ids(ids[: ones[-1] + 1], f"{side}_token", tokenizer)  # their padding is an id that no model has
    return ids[: ones[0]], ids[ones[0] : ones[-1] + 1]


def own(row, tokenizer):
    """A line of a run's pairs.jsonl, whose ids are those of its two conversations."""
    h, both = column(row, "h", int), column(row, "dialogues", list)
    for name in ("prefix", "y", "y2"):
        checked_ids(column(row, name, list), name, tokenizer)
    for value in column(row, "rewards", list):
        number(value, "rewards")
    try:
        (start, end), (start2, end2) = (d["spans"][h - 1] for d in both)
        pieces = [both[0]["ids"][:start], both[1]["ids"][:start2], both[0]["ids"][start:end], both[1]["ids"][start2:end2]]
        turns = [len(d["spans"]) for d in both]
    except (KeyError, IndexError, TypeError, ValueError):
        raise Wrong("dialogues", f"are not two conversations with an answer {h}") from None
    if pieces != [row["prefix"], row["prefix"], row["y"], row["y2"]] or max(turns) != row.get("H") or len(row["rewards"]) != 2:
        raise Wrong("dialogues", "are not those of prefix, y, y2, rewards, h and H")
    return row
