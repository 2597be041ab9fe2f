"""Checkpoints made on the spot: nothing is fetched, nothing is random that is not seeded."""
import helpers  # first: it finds the project and sets what torch and vLLM read when they are imported

import json

import pytest
import torch

import refuel
import toy
from helpers import CHATML, KEY, LLAMA3, NAMES, WORDS, Scripted, llama_config, make_bpe
from machinery import page, ranks, watch


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """metrics.png and report.html cost a run a second each, and nobody but test_watch looks at them."""
    if request.module.__name__ != "test_watch":
        monkeypatch.setattr(watch, "draw", lambda out: None)
        monkeypatch.setattr(page, "write", lambda folder: folder)


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


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "*")
    servers = []

    def start(script):
        servers.append(Scripted(script))
        return servers[-1]

    yield start
    for s in servers:
        s.server.shutdown()
        s.server.server_close()


@pytest.fixture(scope="session")
def llama3():
    """A tokenizer with Llama 3's template, its special tokens, "assistant" and two line breaks at their places, its BOS trap."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(letters)}
    merges, word = [("Ċ", "Ċ")], "a"
    vocab["ĊĊ"] = 271
    for i, letter in enumerate("ssistant"):
        merges.append((word, letter))
        word += letter
        vocab[word] = 78191 if word == "assistant" else 300 + i
    vocab |= {f"<unused {i}>": i for i in set(range(128000)) - set(vocab.values())}
    core = Tokenizer(models.BPE(vocab, merges))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]), decoders.ByteLevel()  # fmt: skip
    core.add_special_tokens([AddedToken(NAMES.get(i, f"<|reserved_special_token_{i}|>"), special=True, normalized=False)
                             for i in range(128000, 128257)])  # fmt: skip
    core.post_processor = processors.TemplateProcessing(single="<|begin_of_text|> $A",
                                                        special_tokens=[("<|begin_of_text|>", 128000)])  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>",
                                   chat_template=LLAMA3)  # fmt: skip


@pytest.fixture(scope="session")
def armo(llama3, tmp_path_factory):
    """A checkpoint of ArmoRM's shape: a Llama body, the head's tensors, a config that asks for remote code."""
    from safetensors.torch import save_file
    from transformers import LlamaModel

    path = tmp_path_factory.mktemp("armo")
    torch.manual_seed(0)
    body = LlamaModel(llama_config())
    state = {f"model.{k}": v.contiguous() for k, v in body.state_dict().items()}
    sizes = [16, 12, 12, 12, 19]
    for i in range(4):
        state[f"gating.layers.{i}.weight"] = torch.randn(sizes[i + 1], sizes[i])
        state[f"gating.layers.{i}.bias"] = torch.randn(sizes[i + 1])
    state |= {"regression_layer.weight": torch.randn(19, 16), "reward_transform_matrix": torch.randn(19, 19),
              "gating.logit_scale": torch.tensor([1.3])}  # fmt: skip
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    config = llama_config().to_dict() | {"architectures": ["LlamaForRewardModelWithGating"], "gating_temperature": 10,
                                         "auto_map": {"AutoModelForSequenceClassification": "modeling_custom.Gating"}}  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    (path / "modeling_custom.py").write_text("raise SystemError('remote code was run')")
    llama3.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def fsfairx(llama3, tmp_path_factory):
    from transformers import LlamaForSequenceClassification

    path = str(tmp_path_factory.mktemp("fsfairx"))
    torch.manual_seed(1)
    LlamaForSequenceClassification(llama_config()).save_pretrained(path)
    llama3.save_pretrained(path)
    return path
