"""A chat template's own tokens: what it writes around a user's text, what ends an answer, and text that stays text."""
import functools
import os

from machinery.files import BadInput, brief, read_json


def load_tokenizer(path):
    """The tokenizer of a checkpoint, with a chat template that `Dialogue` can use."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} has no tokenizer that loads: {brief(error)}") from None
    template_pieces(tokenizer)
    return tokenizer


@functools.lru_cache(maxsize=8)
def template_pieces(tokenizer):
    """What the chat template writes around a user's text: (before the first, after it, before a later one, after it).

    Found by rendering marked texts, so that any template whose turns end in a special token will do."""
    from jinja2 import TemplateError

    name = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise BadInput(f"the tokenizer {name} has no chat template")
    user, answer = "\ue000user\ue000", "\ue000answer\ue000"
    first = [{"role": "user", "content": user}]
    later = [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}, *first]
    render = functools.partial(tokenizer.apply_chat_template, tokenize=False)
    try:
        before, after = render(first, add_generation_prompt=True).split(user)
        between, later_after = render(later, add_generation_prompt=True).split(answer)[1].split(user)
        prompted = render(first) != before + user + after
    except (TemplateError, LookupError, ValueError, TypeError, OverflowError) as error:
        raise BadInput(f"the chat template of {name} does not render a conversation: "
                       f"{type(error).__name__} {brief(error)}") from None  # fmt: skip
    if not prompted:
        raise BadInput(f"the chat template of {name} has no generation prompt")
    if encode(tokenizer, between)[0] not in tokenizer.all_special_ids + list(tokenizer.added_tokens_decoder):
        raise BadInput(f"the chat template of {name} does not end an answer with a special token")
    return before, after, between, later_after


def checked(text):
    """A user's turn as it enters a dialogue: a string that is not empty, without outer white space.

    Templates differ in whether they trim; a trimmed text is the same under all of them. Lone surrogates (broken
    UTF-16 in a JSON file) become question marks, since no tokenizer can encode them."""
    if not isinstance(text, str):
        raise BadInput(f"a turn must be text, not {type(text).__name__}")
    text = text.encode("utf-8", "replace").decode().strip()
    if not text:
        raise BadInput("an empty turn")
    return text


def opening_ids(tokenizer, text):
    """Ids of a conversation's first turn, with the header that makes the assistant speak."""
    before, after, _, _ = template_pieces(tokenizer)
    return encode(tokenizer, before, text, after)


def later_ids(tokenizer, text):
    """Ids of what stands between two answers: the end token, the user's next turn, the assistant's header."""
    _, _, before, after = template_pieces(tokenizer)
    return encode(tokenizer, before, text, after)


def encode(tokenizer, before, text="", after=""):
    """Ids of a piece of a rendered conversation; special tokens inside the user's text stay text.

    Without them the piece is encoded as a whole, which is what the template's own tokenisation gives. The template
    writes the BOS where it wants one, so the tokenizer must not add another (the released code sampled under two)."""
    ids_of = functools.partial(tokenizer.encode, add_special_tokens=False)
    if not any(str(token) in text for token in tokenizer.added_tokens_decoder.values()):
        return ids_of(before + text + after)
    return ids_of(before) + encode_plain(tokenizer, text) + ids_of(after)


def encode_plain(tokenizer, text):
    """Ids of a text in which the strings of control tokens are ordinary characters."""
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    added = tokenizer.added_tokens_decoder
    plain = []
    for i in ids:
        if i not in added:
            plain.append(i)
            continue
        for character in str(added[i]):  # an added token that is not special is still matched: spell it out
            plain += tokenizer.encode(character, add_special_tokens=False)
    return plain


def end_token(tokenizer):
    """The id that ends an assistant's turn in this template."""
    return encode(tokenizer, template_pieces(tokenizer)[2])[0]


def stop_tokens(path, tokenizer):
    """The ids that end an answer: the template's own first, then those of generation_config.json and the tokenizer."""
    stop = [end_token(tokenizer), tokenizer.eos_token_id]
    file = os.path.join(path, "generation_config.json")
    if os.path.exists(file):
        more = read_json(file).get("eos_token_id")
        stop += more if isinstance(more, list) else [more]
    return list(dict.fromkeys(i for i in stop if i is not None))
