"""Checkpoints made on the spot: nothing is fetched, nothing is random that is not seeded."""
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.dirname(os.path.abspath(__file__))]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import refuel  # noqa: E402  (first: it sets what torch and vLLM read when they are imported)

import pytest  # noqa: E402
import torch  # noqa: E402

from machinery import ranks  # noqa: E402
import toy  # noqa: E402
from simulator import Dialogue  # noqa: E402

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def make_bpe(template, special, bos, eos):
    """A byte-level BPE with real merges, as Llama 3 and ChatML models have; adds a BOS of its own where it has one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = ["the user asks the assistant a question , and the assistant answers the question \n\n again and again \n"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(text * 9, trainers.BpeTrainer(vocab_size=330, special_tokens=special,
                                                           initial_alphabet=alphabet, show_progress=False))  # fmt: skip
    if bos:  # the trap of Llama 3: the tokenizer adds a BOS to a text that the template has given one
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos, chat_template=template)


def make_asker(path):
    """A checkpoint that says "Question: go on" whatever it is asked, through its own chat template: a Llama whose layers
    add nothing, with a table of successors as its head."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|pad|>", "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|unknown|>"]
    vocab = {word: i for i, word in enumerate([*special, "Question:", "go", "on"])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<|unknown|>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|begin|>", eos_token="<|end|>", unk_token="<|unknown|>",
                            chat_template=toy.TEMPLATE).save_pretrained(path)  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(vocab), hidden_size=32, intermediate_size=32, head_dim=32,
                                         num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=2048,
                                         bos_token_id=1, eos_token_id=2))  # fmt: skip
    said = ["<|assistant|>", "Question:", "go", "on", "<|end|>"]
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(len(vocab), 32))
        model.lm_head.weight.zero_()
        for word, successor in zip(said, said[1:]):
            model.lm_head.weight[vocab[successor], vocab[word]] = 8.0  # of a state of norm 32 ** 0.5
    model.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def tokenizers():
    chatml = make_bpe(CHATML, ["<|im_start|>", "<|im_end|>"], None, "<|im_end|>")
    headers = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"]
    llama3 = make_bpe(LLAMA3, headers, "<|begin_of_text|>", "<|eot_id|>")
    return {"toy": toy.make_tokenizer(), "chatml": chatml, "llama3": llama3}


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A base policy of the toy that has seen a few batches: everything real but its skill."""
    path = str(tmp_path_factory.mktemp("base") / "policy")
    return toy.base_policy(path, toy.RECIPE | dict(steps=60, batch=16))


@pytest.fixture(scope="session", autouse=True)
def process_group():
    ranks.start_processes()


@pytest.fixture
def model(base):
    """The base policy as transformers loads it: no FSDP, none of our loading code."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(base)


@pytest.fixture
def cfg(base, tmp_path):
    flags = ["--setting", "toy", "--policy", base, "--reference", base, "--out", str(tmp_path / "run")]
    more = "--engine transformers --num-prompts 24 --batch-size 8 --wave 8 --iterations 1 --eval-dialogues 8 --eta 1"
    return refuel.read_config(flags + more.split())


def random_pairs(n, vocab=40, seed=0, longest=30):
    """Pairs of random ids with lengths as uneven as real ones, single-token responses among them."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high: torch.randint(low, high, (1,), generator=g).item()  # noqa: E731
    ids = lambda k: torch.randint(6, vocab, (k,), generator=g).tolist()  # noqa: E731
    return [refuel.Pair(ids(draw(2, longest)), ids(draw(1, 9)), ids(draw(1, 9)),
                        (draw(0, 5) / 4, draw(0, 5) / 4), 1, 1) for _ in range(n)]  # fmt: skip


def dialogue(*answers):
    """A dialogue with these answers as text; as many tokens as words."""
    d = Dialogue(messages=[], spans=[], ids=[])
    for answer in answers:
        n = len(answer.split())
        d.spans.append((len(d.ids) + 1, len(d.ids) + 1 + n))
        d.ids += [0] * (n + 1)
        d.messages += [{"role": "user", "content": "go on"}, {"role": "assistant", "content": answer}]
    return d
