"""The engines that sample: token ids in, sampled ids out, by vLLM or by transformers (sections 2 and 4.2).

The policy's lives on each rank through the whole run; its weights are replaced in place after each iteration.

Dimension key: B dialogues, T tokens, V vocabulary.
"""
import functools
import gc
import importlib.util
import math
import os
from collections import Counter

import torch

from machinery import plan
from machinery.files import BadInput, brief
from machinery.ranks import device, dtype, local_world, world
from machinery.settings import engine_name
from machinery.template import load_tokenizer, stop_tokens


REFUSALS = AssertionError, RuntimeError, ValueError  # of vLLM, at its start, in words that a person can act on


class Engine:
    """A checkpoint that samples: temperature only, no top-p, no top-k, no repetition penalty.

    generate(prompts, seeds, limits) -> [(ids, truncated, logp)]    ids end with the end token unless truncated
    requests()                  vLLM's alone: takes dialogues while it works (machinery/pace.py)
    sleep()                     leaves the GPU until the next update
    update(weights)             new weights in place: an iterable of (name, tensor) in the checkpoint's names
    tokens                      what was computed: prefill (padding included), decode; and cached, what was not
    """

    def __init__(self, path, max_new_tokens, temperature, max_length):
        self.tokenizer = load_tokenizer(path)
        self.max_new_tokens, self.temperature, self.max_length = max_new_tokens, temperature, max_length
        self.stop, self.tokens = stop_tokens(path, self.tokenizer), Counter()

    def answer(self, dialogues):
        """One assistant turn for each dialogue; None where prompt and answer might not fit the context."""
        return self.answer_ids([(d.ids, d.seed("policy"), d.limit) for d in dialogues])

    def answer_ids(self, rows):
        """The same for rows of (ids, seed) or (ids, seed, most tokens of the answer)."""
        fitting = {}  # by the row's number
        for i, (ids, seed, *limit) in enumerate(rows):
            most = self.room(ids, *limit)
            if most:
                fitting[i] = ids, seed, most
        answers = self.generate(*zip(*fitting.values())) if fitting else []
        found = dict(zip(fitting, answers, strict=True))
        return [found.get(i) for i in range(len(rows))]

    def room(self, ids, limit=None):
        """The most tokens of an answer to `ids`; None where it might not fit the context."""
        most = min(self.max_new_tokens, limit) if limit else self.max_new_tokens
        return most if len(ids) + most <= self.max_length else None


class TransformersEngine(Engine):
    """transformers' generate: runs everywhere, slowly. Left-padded batches, sorted by length.

    The keys and values of the last batch are kept: dialogues that all continue it, as they do turn by turn within a
    wave, compute only what is new to them."""

    def __init__(self, path, max_new_tokens, temperature, max_length, batch=1024):
        super().__init__(path, max_new_tokens, temperature, max_length)
        from transformers import AutoModelForCausalLM, GenerationConfig

        self.device, self.batch = device(), batch
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype(), trust_remote_code=False)
        self.model = self.model.to(self.device).eval()
        # a checkpoint's own sampling habits (top-p, penalties, forced tokens) must not leak into the behaviour policy
        self.model.generation_config = GenerationConfig()
        self.past = None

    def generate(self, prompts, seeds, limits):
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        answers = {}
        for start in range(0, len(order), self.batch):
            rows = order[start : start + self.batch]
            answers.update(zip(rows, self.generate_batch(*([x[i] for i in rows] for x in (prompts, seeds, limits)))))
        return [answers[i] for i in range(len(prompts))]

    def generate_batch(self, prompts, seeds, limits):
        from transformers import GenerationConfig, LogitsProcessorList

        held, held_BT, cache = self.continued(prompts) or self.read(prompts)
        ids_BT, mask_BT = self.padded([p[n:] for p, n in zip(prompts, held)])
        length, mask_BT = ids_BT.shape[1], torch.cat([held_BT, mask_BT], dim=1)
        sampler = SeededSampler(seeds, self.temperature, self.device)
        with torch.no_grad():
            out = self.model.generate(
                input_ids=ids_BT, attention_mask=mask_BT, past_key_values=cache,
                logits_processor=LogitsProcessorList([sampler]),
                generation_config=GenerationConfig(max_new_tokens=max(limits), do_sample=False, eos_token_id=self.stop,
                                                   pad_token_id=self.stop[0], return_dict_in_generate=True),
            )  # fmt: skip
        logp_BT = torch.stack(sampler.logps, 1).tolist()
        self.tokens.update(prefill=ids_BT.numel(), decode=len(prompts) * (len(sampler.logps) - 1))
        answers = []
        for ids, logps, limit in zip(out.sequences[:, length:].tolist(), logp_BT, limits):
            end = next((t + 1 for t, i in enumerate(ids[:limit]) if i in self.stop), None)
            answers.append((ids[: end or limit], end is None, sum(logps[: end or limit])))
        said_BT = torch.tensor([[t + 1 < len(ids) for t in range(len(sampler.logps) - 1)] for ids, _, _ in answers],
                               dtype=mask_BT.dtype, device=self.device)  # fmt: skip  (the last token was not fed)
        rows = {tuple(p + ids[:-1]): i for i, (p, (ids, _, _)) in enumerate(zip(prompts, answers))}
        self.past = rows, torch.cat([mask_BT, said_BT], dim=1), out.past_key_values
        return answers

    def padded(self, rows):
        """Ids and mask of rows of several lengths, (B, T), padded on the left."""
        length = max(map(len, rows))
        ids_BT = torch.tensor([[self.stop[0]] * (length - len(row)) + row for row in rows], device=self.device)
        return ids_BT, torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=self.device)

    def continued(self, prompts):
        """How many ids of each prompt the last batch has computed, their mask (left-padded), and their keys and values;
        None unless every prompt continues one of its rows."""
        from transformers.cache_utils import DynamicLayer

        (rows, mask_BT, cache), self.past = self.past or ({}, None, None), None
        lengths = sorted(set(map(len, rows)), reverse=True)
        found = [next((p[:n] for n in lengths if n < len(p) and tuple(p[:n]) in rows), []) for p in prompts]
        if not all(found) or any(type(layer) is not DynamicLayer for layer in cache.layers):
            return None
        index_B = torch.tensor([rows[tuple(ids)] for ids in found], device=self.device)
        held, held_BT = list(map(len, found)), mask_BT[index_B]
        column_BT = held_BT.argsort(dim=1, stable=True)[:, -max(held) :]  # what is padding goes to the left
        for layer in cache.layers:
            for name in ("keys", "values"):
                old = getattr(layer, name)
                where = column_BT[:, None, :, None].expand(-1, old.shape[1], -1, old.shape[3])
                setattr(layer, name, old[index_B].gather(2, where))
        return held, held_BT.gather(1, column_BT), cache

    def read(self, prompts, lot=64):
        """The same of new prompts: all ids but the last, in lots of like lengths (prompts are sorted), so that after a
        reset a dialogue of one turn is not padded to five."""
        from torch.nn.functional import pad
        from transformers.cache_utils import DynamicLayer

        lots, masks, width = [], [], max(map(len, prompts)) - 1
        for start in range(0, len(prompts), lot):
            ids_BT, mask_BT = self.padded([p[:-1] for p in prompts[start : start + lot]])
            position_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
            with torch.no_grad():
                cache = self.model.base_model(input_ids=ids_BT, attention_mask=mask_BT, position_ids=position_BT,
                                              use_cache=True).past_key_values  # fmt: skip
            self.tokens.update(prefill=ids_BT.numel())
            if any(type(layer) is not DynamicLayer for layer in cache.layers):  # a window's cache cannot be put together
                return [0] * len(prompts), mask_BT.new_zeros(len(prompts), 0), None
            lots.append(cache.layers)
            masks.append(pad(mask_BT, (width - mask_BT.shape[1], 0)))
        for same in zip(*lots):
            for name in ("keys", "values"):
                parts = [getattr(layer, name) for layer in same]
                setattr(same[0], name, torch.cat([pad(x, (0, 0, width - x.shape[2], 0)) for x in parts]))
        cache.layers = lots[0]
        return [len(p) - 1 for p in prompts], torch.cat(masks), cache

    def sleep(self):
        self.past = None
        self.model.to("cpu")

    def update(self, weights):
        self.past = None
        self.model.to(self.device)
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in weights:
                if name in parameters:  # a tied lm_head.weight is its embedding
                    parameters[name].copy_(tensor)


class SeededSampler:
    """Samples inside greedy generate by the Gumbel-max trick, each row by its own generator.

    argmax(logp - ln E) with E ~ Exp(1) is a draw from softmax; generate's own sampling knows one seed a batch. The noise
    is drawn on the model's device: 512 rows of 49,152 words are 0.2 s a token on a CPU's core, and milliseconds on a GPU."""

    def __init__(self, seeds, temperature, device="cpu"):
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.temperature, self.logps = temperature, []

    def __call__(self, ids_BT, logits_BV):
        logp_BV = torch.log_softmax(logits_BV.float() / self.temperature, -1)
        noise_BV = torch.empty_like(logp_BV)
        for noise_V, generator in zip(noise_BV, self.generators, strict=True):
            noise_V.exponential_(generator=generator)
        choice_B = (logp_BV - noise_BV.log_()).argmax(-1)
        self.logps.append(logp_BV.gather(1, choice_B[:, None])[:, 0])
        return torch.full_like(logits_BV, -math.inf).scatter_(1, choice_B[:, None], 0.0)


class VLLMEngine(Engine):
    """vLLM inside the training process, one engine a rank; weights are replaced in place, the prefix cache dropped.

    Paged KV cache with prefix caching: a later turn finds its dialogue cached, so only new tokens are computed."""

    def __init__(self, path, max_new_tokens, temperature, max_length, share=None, sleeps=True, dialogues=8):
        """share: what of a GPU it gets, exactly; sleeps: whether it can leave the GPU, as one engine of a process can;
        dialogues: how many it answers in turn, whose keys and values a CPU's cache should hold."""
        super().__init__(path, max_new_tokens, temperature, max_length)
        from transformers import AutoConfig

        self.tied = AutoConfig.from_pretrained(path, trust_remote_code=False).tie_word_embeddings
        threads = torch.set_num_threads  # the CPU engine replaces it by a no-op
        from vllm import LLM

        if torch.cuda.is_available():
            gc.collect()  # of a trainer that has done its work
            torch.cuda.empty_cache()
            options = dict(dtype="bfloat16", kv_cache_memory_bytes=share.cache, gpu_memory_utilization=share.utilization,
                           max_num_batched_tokens=plan.STEP_TOKENS, enable_sleep_mode=sleeps)  # fmt: skip
            if world() > 1:  # takes LOCAL_RANK's device, the plain form device 0
                options["distributed_executor_backend"] = "external_launcher"
        else:  # seeded requests crash the CPU build when a prefill is cut into chunks
            room = cache_room(dialogues, max_length * cache_bytes(path))
            options = dict(dtype="float32", enforce_eager=True, kv_cache_memory_bytes=room, block_size=32,
                           enable_chunked_prefill=False, max_num_batched_tokens=max(max_length, 8192))  # fmt: skip
        self.sleeps, self.asleep, self.begun = sleeps, False, 0
        try:
            self.engine = LLM(str(path), max_model_len=max_length, max_num_seqs=plan.SEQUENCES, seed=0,
                              generation_config="vllm", enable_prefix_caching=True, logprobs_mode="processed_logprobs",
                              skip_tokenizer_init=True, disable_log_stats=True, **options)  # fmt: skip
        except REFUSALS as error:
            if isinstance(error, (torch.OutOfMemoryError, torch.distributed.DistError)):
                raise
            raise BadInput(f"vLLM does not start with {path}: {type(error).__name__} {brief(error)}") from error
        torch.set_num_threads = threads

    def generate(self, prompts, seeds, limits):
        numbers = [self.begin(*row) for row in zip(prompts, seeds, limits, strict=True)]
        answers = {}
        while len(answers) < len(numbers):
            answers.update(self.step())
        return [answers[number] for number in numbers]

    def begin(self, ids, seed, limit):
        """A request of its own, beside those that are being answered: its number."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        # ignore_eos: only our own stop tokens end an answer, the same ones for both engines
        params = SamplingParams(max_tokens=limit, temperature=self.temperature, seed=seed, logprobs=0,
                                stop_token_ids=self.stop, ignore_eos=True, detokenize=False,
                                output_kind=RequestOutputKind.FINAL_ONLY)  # fmt: skip
        self.begun += 1
        self.engine.llm_engine.add_request(str(self.begun), {"prompt_token_ids": ids}, params)
        return self.begun

    def step(self):
        """One token more for every request; [(number, answer)] of those that end with it."""
        answers = []
        for request in self.engine.llm_engine.step():
            out = request.outputs[0]
            cached, read = request.num_cached_tokens, len(request.prompt_token_ids)
            self.tokens.update(prefill=read - cached, cached=cached, decode=len(out.token_ids) - 1)
            logp = sum(step[i].logprob for i, step in zip(out.token_ids, out.logprobs))
            answers.append((int(request.request_id), (list(out.token_ids), out.finish_reason == "length", logp)))
        return answers

    def requests(self):
        """Who answers dialogues as they come (machinery/pace.py)."""
        return Requests(self)

    def sleep(self):
        """Leave the GPU to the trainer, weights and cache dropped, until new weights come. (On a CPU: nothing.)"""
        if torch.cuda.is_available() and self.sleeps and not self.asleep:
            self.engine.sleep(level=2)
            self.asleep = True

    def update(self, weights):
        def named(weights):
            for name, tensor in weights:
                yield name, tensor
                if self.tied and name == "model.embed_tokens.weight":
                    yield "lm_head.weight", tensor  # else vLLM's tied head silently stays the old one

        self.sleep()  # one that is awake, too: a whole weight in float32 needs the room of the old cache
        if self.asleep:
            torch.cuda.empty_cache()  # what the trainer's allocator keeps is not the engine's yet
            self.engine.wake_up(tags=["weights"])
        self.engine.collective_rpc("reload_weights", kwargs=dict(weights_iterator=named(weights)))
        if self.asleep:
            torch.cuda.empty_cache()
            self.engine.wake_up(tags=["kv_cache"])
            self.asleep = False
        if self.engine.reset_prefix_cache() is False:  # the next answers would be computed from the old policy's cache
            raise BadInput("vLLM did not give up its prefix cache, which is the old policy's: run the same command again")


class Requests:
    """pace.py's put, take and leave by vLLM: it takes new requests while it works, and each take is a step."""

    def __init__(self, engine):
        self.engine, self.asked, self.too_long = engine, {}, []

    def __len__(self):
        return len(self.asked) + len(self.too_long)

    def put(self, n, dialogue):
        most = self.engine.room(dialogue.ids, dialogue.limit)
        if most is None:
            self.too_long.append((n, dialogue, None))
        else:
            self.asked[self.engine.begin(dialogue.ids, dialogue.seed("policy"), most)] = n, dialogue

    def take(self, idle):
        found, self.too_long = self.too_long, []
        for number, answer in self.engine.step() if self.asked else ():
            found.append((*self.asked.pop(number), answer))
        return found

    def leave(self):
        if self.asked:
            self.engine.engine.llm_engine.abort_request([str(number) for number in self.asked])


def cache_room(dialogues, size):
    """Bytes of a CPU engine's cache: of all its dialogues, `size` bytes each at most, in an eighth of the machine's memory,
    which its processes share; pages that are not used are not taken. In a smaller one dialogues wait for each other and
    are read again at every turn (docs/speed.md)."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(128 << 20, 8 * size, min(dialogues * size, memory // 8 // local_world()))


def cache_bytes(path):
    """Bytes of keys and values of one token in float32."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * 4 * config.num_hidden_layers * groups * head_dim


@functools.lru_cache
def kind(path):
    """What two checkpoints must share for one to take the other's weights: architecture, vocabulary, template."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=False).to_dict()
    tokenizer = load_tokenizer(path)
    names = ("_name_or_path", "dtype", "transformers_version", "architectures")
    return {k: v for k, v in config.items() if k not in names}, tokenizer.get_vocab(), tokenizer.chat_template


def vocabulary(path):
    """{token: id}: where two checkpoints differ in it, their answers' numbers of tokens cannot be compared."""
    return kind(path)[1]


def gpu_share(cfg, who, path="", among=1):
    """What of a GPU's memory vLLM gets for an engine; plan.engine_share computes it."""
    return plan.engine_share(cfg, who, path, among) if torch.cuda.is_available() else None


def load_engine(path, cfg, who="policy", among=1):
    """The engine that --engine names, over one checkpoint. Of vLLM's the policy's alone, whose weights are replaced,
    can sleep: that allocator is one a process, and a second engine with it fails an assertion. who: "policy", "user",
    which stays on the GPU, or "other", one of `among` that play or judge while the policy's sleeps."""
    name = engine_name(cfg)
    if name == "vllm" and not importlib.util.find_spec("vllm"):
        raise BadInput("--engine vllm: vllm is not installed (pip install -r requirements-gpu.txt)")
    engine = {"vllm": VLLMEngine, "transformers": TransformersEngine}[name]
    more = {}
    if name == "vllm":
        at_once = 2 * max(cfg.wave, cfg.eval_wave)  # both futures of a wave's pairs
        more = dict(share=gpu_share(cfg, who, path, among), sleeps=who == "policy", dialogues=at_once)
    return engine(path, cfg.max_new_tokens, cfg.temperature, cfg.max_length, **more)
