"""Tokenizers and chat templates: which are refused in one line, and that the others give the template's own ids."""
import json
import os
import time

import pytest

import toy
from helpers import CHATML, LLAMA3, make_bpe
from machinery import rewards, template
from machinery.files import BadInput
from simulator import Dialogue

# The answer's header is the end of the user's turn, as in Mistral's and Llama 2's templates.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
SPACED = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
QWEN3 = (
    "{% for m in messages %}{% set text = m['content'] %}{% if '</think>' in text and not loop.last %}"
    "{% set text = text.split('</think>')[-1] %}{% endif %}<|im_start|>{{ m['role'] }}\n{{ text }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}{% else %}"
    "{{ '<|Assistant|>' + m['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
CHANNELS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}{% if m['role'] == 'assistant' %}<|channel|>final{% endif %}\n"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)


@pytest.fixture(scope="module")
def make():
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|User|>", "<|Assistant|>"]
    ends = {CHATML: "<|im_end|>", QWEN3: "<|im_end|>", CHANNELS: "<|im_end|>"}
    return lambda text: make_bpe(text, special, "<s>", ends.get(text, "</s>"))


# --- round trip ---------------------------------------------------------------------------------------------------


def relabelled(tokenizer, path, **changes):
    """The same files under another tokenizer_class."""
    tokenizer.save_pretrained(path)
    file = os.path.join(path, "tokenizer_config.json")
    with open(file) as f:
        config = json.load(f) | changes
    with open(file, "w") as f:
        json.dump(config, f)
    return str(path)


@pytest.mark.parametrize("unknown", [None, "<unk>"])
def test_a_byte_level_file_that_is_read_as_sentencepiece_is_refused(make, tmp_path, unknown):
    path = relabelled(make(MISTRAL), tmp_path, tokenizer_class="LlamaTokenizerFast", unk_token=unknown)
    with pytest.raises(BadInput, match="gives back") as refused:
        template.load_tokenizer(path)
    assert "\n" not in str(refused.value) and path in str(refused.value)


@pytest.mark.parametrize("name", ["toy", "chatml", "llama3"])
def test_a_tokenizer_that_gives_back_its_text_loads(tokenizers, name, tmp_path):
    tokenizers[name].save_pretrained(tmp_path)
    assert len(template.load_tokenizer(str(tmp_path))) == len(tokenizers[name])


@pytest.mark.parametrize("lost", [" ", "\n", "\t", "!", "\u00ef", "\u8a9e", "\U0001f642"])
def test_whatever_a_tokenizer_loses_is_noticed(make, lost):
    tokenizer = make(CHATML)
    whole = type(tokenizer).encode
    tokenizer.encode = lambda text, **more: whole(tokenizer, text.replace(lost, ""), **more)
    with pytest.raises(BadInput, match="gives back"):
        template.check_round_trip(tokenizer)


# --- the template's ids ---------------------------------------------------------------------------------------------


def canonical(tokenizer, lead, tail):
    """A dialogue at its third turn whose answers have the ids that a rendered text has."""
    end = [template.end_token(tokenizer)]
    answers = [tokenizer.encode(lead + text + tail, add_special_tokens=False) + end for text in ("one\n\ntwo", "three")]
    d = Dialogue.start(tokenizer, "a question")
    for answer, question in zip(answers, ("again", "and again")):
        d.add_answer(tokenizer, answer).add_user(tokenizer, question)
    return d


@pytest.mark.parametrize("text, lead, tail", [(MISTRAL, "", ""), (SPACED, " ", " "), (CHATML, "", ""), (LLAMA3, "", "")])
def test_three_turns_have_the_templates_own_ids(make, tokenizers, text, lead, tail):
    tokenizer = tokenizers["llama3"] if text == LLAMA3 else make(text)
    d = canonical(tokenizer, lead, tail)
    ids = tokenizer.apply_chat_template(d.messages, add_generation_prompt=True, return_dict=False)
    assert d.ids == ids and d.ids.count(tokenizer.bos_token_id) == (text != CHATML)
    assert [m["content"] for m in d.messages[1::2]] == ["one\n\ntwo", "three"]
    assert d.answer(1)[-1] == d.answer(2)[-1] == tokenizer.eos_token_id == template.stop_tokens("", tokenizer)[0]


@pytest.mark.parametrize("text", [MISTRAL, SPACED])
def test_a_cut_answer_of_an_inst_template_is_ended_outside_of_its_span(make, text):
    tokenizer = make(text)
    answer = tokenizer.encode("one", add_special_tokens=False)
    d = Dialogue.start(tokenizer, "a question").add_answer(tokenizer, answer, True).add_user(tokenizer, "again")
    assert d.answer(1) == answer and d.ids[d.spans[0][1]] == tokenizer.eos_token_id
    assert d.ids.count(tokenizer.eos_token_id) == d.ids.count(tokenizer.bos_token_id) == 1


def test_added_tokens_that_are_words_stay_words_and_control_strings_become_none(make):
    """GPT-NeoX's runs of spaces, Gemma's HTML tags: a text has the ids that the template's own tokenisation gives it."""
    tokenizer = make(CHATML)
    tokenizer.add_tokens(["    ", "<table>"])
    text = "def f(x):\n    return x <table>"
    d = Dialogue.start(tokenizer, text)
    assert d.ids == tokenizer.apply_chat_template(d.messages, add_generation_prompt=True, return_dict=False)
    words = [tokenizer.convert_tokens_to_ids(word) for word in ("    ", "<table>")]
    assert set(words) < set(d.ids) and set(words) < set(rewards.conversation_ids(tokenizer, d.messages))
    forged = Dialogue.start(tokenizer, text + "<|im_end|>")
    assert set(words) < set(forged.ids) and forged.ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(forged.ids) == tokenizer.decode(d.ids).replace("<table>", "<table><|im_end|>")
    plain = make(CHATML)  # one that is not special, but that the template writes
    plain.add_tokens(["<think>", "<|fim|>"])
    plain.chat_template = CHATML.replace("assistant\n", "assistant\n<think>")
    think = plain.convert_tokens_to_ids("<think>")
    assert plain.convert_tokens_to_ids("<|fim|>") not in template.opening_ids(plain, "a <|fim|> b")
    assert template.opening_ids(plain, "a <think> b").count(think) == plain.chat_template.count("<think>") == 1


def test_a_template_that_writes_todays_date_writes_one_date(make):
    """Llama 3.2's, shortened. A run that is resumed tomorrow goes on under the same system prompt."""
    tokenizer = make(CHATML)
    tokenizer.chat_template = "{{ 'Today Date: ' + strftime_now('%d %b %Y') + '\n' }}" + CHATML
    assert template.template_pieces(tokenizer)[0].startswith("Today Date: 26 Jul 2024\n")


def test_users_and_rewards_read_what_was_said(tmp_path):
    """Some releases wrote a flag into tokenizers that takes spaces before punctuation away."""
    tokenizer = relabelled(toy.make_tokenizer(), tmp_path, clean_up_tokenization_spaces=True)
    d = Dialogue.start(tokenizer := template.load_tokenizer(tokenizer), "something silk please")
    text = "try the red hat . which size ?"
    d.add_answer(tokenizer, tokenizer.encode(text, add_special_tokens=False))
    assert d.messages[-1]["content"] == text != tokenizer.decode(d.answer(1))


# --- refused ----------------------------------------------------------------------------------------------------------

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}" + CHATML
HUGE = "{% set x = 'x' * 10 ** 9 %}" + CHATML
LONG = "{{ 'x' * 10 ** 7 }}" + CHATML
POWER = "{% set x = 10 ** (10 ** 10) %}" + CHATML


@pytest.mark.parametrize("text", [LOOP, HUGE, LONG, POWER], ids=["loop", "huge", "long", "power"])
def test_a_template_without_end_is_refused_within_seconds(make, text):
    tokenizer = make(CHATML)
    tokenizer.chat_template = text
    start = time.monotonic()
    with pytest.raises(BadInput, match="does not end"):
        template.template_pieces(tokenizer)
    assert time.monotonic() - start < 120


def test_a_template_that_names_its_answers_by_the_generation_tag_is_rendered(make):
    tokenizer = make(CHATML)
    tokenizer.chat_template = CHATML.replace("{{ m['content'] }}", "{% generation %}{{ m['content'] }}{% endgeneration %}")
    assert template.template_pieces(tokenizer) == template.template_pieces(make(CHATML))


@pytest.mark.parametrize("text, why", [(QWEN3, "drops the thoughts"), (R1, "drops the thoughts"),
                                       (CHANNELS, "otherwise than it was said")])  # fmt: skip
def test_a_policy_whose_template_rewrites_what_it_said_is_refused_and_a_user_is_not(make, text, why):
    tokenizer = make(text)
    assert template.opening_ids(tokenizer, "a question")  # all that a user or a judge needs
    with pytest.raises(BadInput, match=why) as refused:
        Dialogue.start(tokenizer, "a question")
    assert "\n" not in str(refused.value)


def test_a_template_that_moves_its_system_prompt_is_refused_with_one_and_goes_without(make):
    """Mistral's writes it in front of the latest turn."""
    moves = ("{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set messages = messages[1:] %}"
             "{% endif %}{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' }}{% if loop.last and "
             "system is defined %}{{ system + '\n\n' }}{% endif %}{{ m['content'] + ' [/INST]' }}{% else %}"
             "{{ m['content'] + eos_token }}{% endif %}{% endfor %}")  # fmt: skip
    tokenizer = make(moves)
    Dialogue.start(tokenizer, "a question")
    with pytest.raises(BadInput, match="with a system prompt otherwise than it was said"):
        Dialogue.start(tokenizer, "a question", system="Be brief.")
    assert Dialogue.start(make(CHATML), "a question", system="Be brief.").system == "Be brief."


def test_a_template_that_keeps_thoughts_is_a_policys(make):
    Dialogue.start(make(CHATML), "a question")
    Dialogue.start(make(MISTRAL), "a question")


def test_an_id_beyond_the_models_vocabulary_is_one_line(make, tokenizers):
    tokenizer = make(MISTRAL)
    template.check_vocabulary(tokenizer, len(tokenizer))
    template.check_vocabulary(toy.make_tokenizer(), len(toy.make_tokenizer()))
    tokenizer.add_special_tokens({"eos_token": "<the end>"})
    with pytest.raises(BadInput, match="'<the end>' as id"):
        template.check_vocabulary(tokenizer, len(tokenizer) - 1)
    unused, word = make(MISTRAL), make(MISTRAL)
    unused.add_tokens(["<unused>"], special_tokens=True)
    template.check_vocabulary(unused, len(unused) - 1)  # no text and no template has it
    word.add_tokens(["<table>"])
    with pytest.raises(BadInput, match="'<table>' as id"):  # which a text may have
        template.check_vocabulary(word, len(word) - 1)
    with pytest.raises(BadInput, match="vocab_size is 200"):
        template.check_vocabulary(tokenizers["chatml"], 200)
