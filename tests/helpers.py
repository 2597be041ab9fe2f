"""What several tests share: small models and tokenizers, pairs, dialogues, servers, and a run's folder as values."""
import glob
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.dirname(os.path.abspath(__file__))]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # a core each: the threads of both would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import machinery  # noqa: E402, F401  (first: it sets what torch and vLLM read when they are imported)

import re  # noqa: E402
from unittest import mock  # noqa: E402

import torch  # noqa: E402

import refuel  # noqa: E402
import toy  # noqa: E402
from machinery import files, logps  # noqa: E402
from machinery.logps import old_logps  # noqa: E402
from machinery.run import Run  # noqa: E402
from simulator import Dialogue  # noqa: E402


def on(n):
    """The beginning of a command that runs a script on n ranks, from ROOT."""
    return [sys.executable, os.path.join("tests", "forked.py"), str(n)]


def source_files():
    """All Python files of the program: the top level and the machinery."""
    return glob.glob(os.path.join(ROOT, "*.py")) + glob.glob(os.path.join(ROOT, "machinery", "*.py"))


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


def in_bfloat16(shard):
    """fsdp.shard as it is on a GPU: bfloat16 compute, float32 weights and sums."""

    def sharded(*args):
        with mock.patch.object(torch.cuda, "is_available", lambda: True):
            shard(*args)

    return sharded


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
        d.truncated.append(False)
        d.messages += [{"role": "user", "content": "go on"}, {"role": "assistant", "content": answer}]
    return d


def plain_logits(model, ids):
    """(T, V), with transformers' own attention."""
    model.set_attn_implementation("eager")
    logits_TV = model(torch.tensor([ids])).logits[0]
    logps.attend_in_pairs(model)
    return logits_TV


def row_logps(model, pairs, temperature):
    """Each response in a row of its own, unpadded, full logits, autograd's own log_softmax."""
    rows = []
    for response in (lambda p: p.y), (lambda p: p.y2):
        for p in pairs:
            ids = p.prefix + response(p)
            logp_TV = torch.log_softmax(plain_logits(model, ids)[:-1] / temperature, -1)
            rows.append(logp_TV.gather(1, torch.tensor(ids)[1:, None])[len(p.prefix) - 1 :].sum())
    return torch.stack(rows).view(2, -1)


class Talker:
    """A policy of few words, all of them written down: which state it saw, and by which stream."""

    def __init__(self):
        self.tokenizer = toy.make_tokenizer()

    def answer(self, dialogues):
        words = ["wool", "silk", "hat", "coat"]
        return [([self.tokenizer.convert_tokens_to_ids(words[d.seed("policy") % 4]), 2], False, -1.0) for d in dialogues]

    def reply(self, dialogues):
        return [("not sure", "go on")[d.seed("user") % 2] for d in dialogues]


def length_reward(dialogues):
    return [float(len(d.ids)) + sum(d.ids) / 1000 for d in dialogues]


def run_folder(path):
    """What a run leaves behind, as comparable values: everything but seconds, tokens, speeds and the command line."""
    found = {}
    for folder, _, names in os.walk(path):
        for name in names:
            file = os.path.join(folder, name)
            key = os.path.relpath(file, path)
            if name == "metrics.jsonl":
                rows = files.read_lines(file)
                found[key] = [{k: v for k, v in r.items() if k not in ("seconds", "tokens", "tokens_per_second")} for r in rows]
            elif name == "results.json":
                found[key] = {n: {k: v for k, v in r.items() if k != "command"} for n, r in files.read_json(file).items()}
            elif name not in ("config.json", "win_rate.png", "metrics.png", "report.html"):
                found[key] = open(file, "rb").read()
    return found


def broken_checkpoint(base, path, change):
    import shutil

    shutil.copytree(base, path)
    change(path)
    return str(path)


def remove(*names):
    def change(path):
        for name in names:
            os.remove(os.path.join(path, name))

    return change


def peak_bytes(device, work):
    """The most bytes that torch held during work(), above those it held before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    held = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


KEY = "sk-never-to-be-seen-0123456789"


class Scripted:
    """An OpenAI-compatible server: script(prompt, number of the request) -> text, (status, bytes), None to stall, or
    (status, bytes, seconds) to drip a byte at a time. Without a script, its attribute reply(body) says the same."""

    def __init__(self, script):
        self.requests = []
        scripted = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

            def do_GET(self):  # /health, /v1/models
                self.send_response(200)
                self.send_header("Content-Length", "29")
                self.end_headers()
                self.wfile.write(b'{"data": [{"id": "another"}]}')

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                scripted.requests.append((self.path, dict(self.headers), body))
                if script is None:
                    reply = scripted.reply(body)
                else:
                    reply = script(body["messages"][0]["content"], len(scripted.requests))
                if reply is None:
                    time.sleep(6)  # far above the client's time-out, on a busy machine too
                    self.close_connection = True
                    return
                if isinstance(reply, str):
                    message = {"model": "another-name", "choices": [{"message": {"content": reply}}]}
                    reply = 200, json.dumps(message).encode()
                self.send_response(reply[0])
                self.send_header("Content-Length", str(len(reply[1])))
                if 300 <= reply[0] < 400:
                    self.send_header("Location", reply[1].decode())
                self.end_headers()
                try:
                    if len(reply) == 2:
                        return self.wfile.write(reply[1])
                    for byte in reply[1]:
                        self.wfile.write(bytes([byte]))
                        time.sleep(reply[2])
                except OSError:
                    pass  # a client that has read enough

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads, self.server.block_on_close = True, False
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


HUGE = (200, b'{"choices": [{"message": {"content": "' + b"x" * 10_000_000 + b'"}}]}')


NULL = (200, b'{"choices": [{"message": {"content": null}}]}')


DRIP = (200, b'{"choices": [{"message": {"content": "Preferred: A"}}]}', 0.05)


def everything_in(folder):
    paths = (os.path.join(where, name) for where, _, names in os.walk(folder) for name in names)
    return "".join(open(path, errors="replace").read() for path in paths)


def sides(prompt):
    return re.findall(r"(?s)Dialogue [AB]:\n<quote \w+>\n(.*?)\n</quote \w+>", prompt)


def last_number(dialogues):
    return [float(d.messages[-1]["content"].split()[-1]) for d in dialogues]


NAMES = {128000: "<|begin_of_text|>", 128001: "<|end_of_text|>", 128006: "<|start_header_id|>",
         128007: "<|end_header_id|>", 128009: "<|eot_id|>", 128256: "[PAD]"}  # fmt: skip


# Llama 3's: unlike GPT-2's it keeps the line breaks in front of a word in one piece
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")  # fmt: skip


def llama_config(layers=2):
    from transformers import LlamaConfig

    return LlamaConfig(vocab_size=128257, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_labels=1,
                       num_attention_heads=2, max_position_embeddings=8192, initializer_range=0.3)  # fmt: skip


def ultra(first, *more, chosen="good", rejected="bad"):
    """A row of UltraInteract_pair: first question, then answers and questions in turn."""
    said = [{"from": ("user", "assistant")[i % 2], "value": t} for i, t in enumerate((first, *more))]
    return {"task": "t", "trajectory": said, "chosen": chosen, "rejected": rejected, "id": first}


def hh(*texts, last="worse"):
    text = lambda ts: "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {t}" for i, t in enumerate(ts))  # noqa: E731
    return {"chosen": text(texts), "rejected": text([*texts[:-1], last])}


def equal_pairs(n, words=(7, 8)):
    """Finished pairs of one turn whose two conversations earn the same."""
    tokenizer, pairs = toy.make_tokenizer(), []
    for _ in range(n):
        first, second = (Dialogue.start(tokenizer, "go on").add_answer(tokenizer, [word, 2]) for word in words)
        pairs.append(refuel.Pair.of(first, second, 1, (1.0, 1.0)))
    return pairs


def with_logps(model, pairs, cfg):
    """The pairs with ln pi_t of both responses, as a run gives them to the regression."""
    logps = old_logps(model, pairs, cfg).tolist()
    return [pair._replace(logps=tuple(row)) for pair, row in zip(pairs, logps, strict=True)]


def collected(folder, collect, prompts, cfg, t=1):
    """An iteration's pairs as a run collects and keeps them in `folder`; collect(prompts, rng=, dropped=) -> pairs."""
    run = Run(cfg, None, None)
    run.t, run.folder = t, folder

    def play(rows, rng, dropped):
        return collect(rows, rng=rng, dropped=dropped)

    return run.pairs(prompts, play, refuel.Pair.from_json, speakers={})
