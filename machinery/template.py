"""A chat template's own tokens: what it writes around a user's text, what ends an answer, and text that stays text."""
import bisect
import datetime
import functools
import json
import os
import resource
import subprocess
import sys

from machinery.files import BadInput, brief, read_json

PROBES = ("Wide  gaps,\n\nlines\tand (punctuation)!", "Na\u00efve: \u65e5\u672c\u8a9e \u2013 \U0001f642")
TODAY = datetime.date(2024, 7, 26)  # of templates that write one: Llama 3.1's own where it is told none
RENDER_SECONDS = 2  # of a processor; a real template needs a thousandth
RENDER_BYTES = 2**30  # of memory, the interpreter included
RENDER_CHARACTERS = 2**20  # of what comes out
BEYOND = 3  # the trial's exit code where a bound was passed; a signal where the system has stopped it

# ---------------------------------------------------------------------------------------------------------------
# Loading: what a tokenizer and its template must be able to do
# ---------------------------------------------------------------------------------------------------------------


def load_tokenizer(path):
    """The tokenizer of a checkpoint, with a chat template that `Dialogue` can use."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} has no tokenizer that loads: {brief(error)}") from None
    check_round_trip(tokenizer)
    template_pieces(tokenizer)
    return tokenizer


def check_round_trip(tokenizer):
    """Refuse a tokenizer that does not give back what it was given.

    Some releases of transformers read a byte-level file that is labelled LlamaTokenizerFast as a SentencePiece one: every
    space and line break is lost. Outer white space is free. A vocabulary of whole words that has none of the probe's,
    such as the toy's, is let pass, and so is one that lacks characters beyond ASCII."""
    unknown = tokenizer.unk_token_id
    for probe in PROBES:
        ids = tokenizer.encode(probe, add_special_tokens=False)
        known = [i for i in ids if i != unknown]
        lacks = len(known) < len(ids)
        if lacks and not (known and probe.isascii()):
            continue
        back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if back.strip() != probe:
            raise BadInput(f"the tokenizer {tokenizer.name_or_path} gives back {back!r} for {probe!r} (as "
                           f"{type(tokenizer).__name__}: is tokenizer_class in its tokenizer_config.json right?)")  # fmt: skip


@functools.lru_cache(maxsize=8)
def added_tokens(tokenizer):
    """{id: token} of the tokens that were added to the words. The tokenizer's own property makes its table anew whenever
    it is asked: 0.2 ms, of which a turn of a dialogue would need three."""
    return tokenizer.added_tokens_decoder


@functools.lru_cache(maxsize=8)
def control_tokens(tokenizer):
    """{id: its string} of the added tokens that no text may turn into: special ones, those that the template writes, and
    whatever looks like one (Qwen's <|fim_prefix|> is not special).

    The others are words like any other, which a text is made of: runs of spaces in GPT-NeoX's, HTML tags in Gemma's."""
    talk = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    written = tokenizer.get_chat_template() + render(tokenizer, talk, add_generation_prompt=True)
    found = {}
    for i, token in added_tokens(tokenizer).items():
        text = str(token)
        if token.special or text.startswith("<|") or text.strip() and text in written:
            found[i] = text
    return found


def check_vocabulary(tokenizer, vocab_size):
    """Refuse a tokenizer that can give the model an id that it has no embedding for: in the template or in a text."""
    used = set(opening_ids(tokenizer, "x") + later_ids(tokenizer, "x"))
    if tokenizer.eos_token_id is not None:
        used.add(tokenizer.eos_token_id)
    used |= set(tokenizer.get_vocab().values()) - control_tokens(tokenizer).keys()  # those that the template has are in
    if max(used) >= vocab_size:
        token = tokenizer.convert_ids_to_tokens(max(used))
        raise BadInput(f"the tokenizer {tokenizer.name_or_path} has {token!r} as id {max(used)}, but its model's "
                       f"vocab_size is {vocab_size}")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Rendering, bounded
# ---------------------------------------------------------------------------------------------------------------


def render(tokenizer, messages, **options):
    """A conversation as the chat template writes it, after one trial of the template in a process that can be stopped.

    A template that writes today's date (Llama 3.2's) is told the same one every day, else a run that is resumed tomorrow
    would go on under another system prompt."""
    template = tokenizer.get_chat_template()
    special = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    if not ends(template, json.dumps(special)):
        raise BadInput(f"the chat template of {tokenizer.name_or_path} does not end: more than {RENDER_SECONDS} seconds, "
                       f"{RENDER_BYTES >> 20} MB of memory or {RENDER_CHARACTERS} characters")  # fmt: skip
    return tokenizer.apply_chat_template(messages, tokenize=False, strftime_now=TODAY.strftime, **options)


@functools.lru_cache(maxsize=64)
def ends(template, special):
    """Whether a template's rendering of nine short turns stays in its bounds; its other errors are not looked at here.

    An endless loop or 10 ** (10 ** 10) is stopped from outside of its process alone: hence one, with limits of its own."""
    command = [sys.executable, "-c", "from machinery.template import trial; trial()"]
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    try:
        done = subprocess.run(command, input=json.dumps([template, special]), cwd=root, capture_output=True, text=True,
                              timeout=20 * RENDER_SECONDS)  # fmt: skip
    except subprocess.TimeoutExpired:
        return False
    return 0 <= done.returncode != BEYOND  # a template's own error is 1, and the rendering itself reports it


def trial():
    """Render the template on stdin under limits of time and memory: the whole work of that process."""
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """transformers' {% generation %} block, which writes what it holds."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def raise_exception(message):
        raise ValueError(message)

    resource.setrlimit(resource.RLIMIT_CPU, (RENDER_SECONDS, RENDER_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (RENDER_BYTES, RENDER_BYTES))
    template, special = json.load(sys.stdin)
    messages = []
    for i in range(9):
        messages.append({"role": ("user", "assistant")[i % 2], "content": f"turn {i}"})
    try:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=[Generation, loopcontrols])  # fmt: skip
        environment.globals.update(raise_exception=raise_exception, strftime_now=str)
        text = environment.from_string(template).render(messages=messages, add_generation_prompt=True,
                                                        tools=None, documents=None, **json.loads(special))  # fmt: skip
    except MemoryError:
        sys.exit(BEYOND)
    if len(text) > RENDER_CHARACTERS:
        sys.exit(BEYOND)


# ---------------------------------------------------------------------------------------------------------------
# The template's own tokens
# ---------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def template_pieces(tokenizer):
    """What the chat template writes around a user's text: (before the first, after it, before a later one, after it).

    Found by rendering marked texts, so that any template whose turns end in a special token will do. The white space
    that Llama 2's template writes between an answer and its end token is the answer's to say. Where the generation
    prompt is the end of the user's turn ("[INST] x [/INST]"), add_generation_prompt adds nothing."""
    from jinja2 import TemplateError

    name = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise BadInput(f"the tokenizer {name} has no chat template")
    user, answer = "\ue000user\ue000", "\ue000answer\ue000"
    first = [{"role": "user", "content": user}]
    later = [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}, *first]
    try:
        before, after = render(tokenizer, first, add_generation_prompt=True).split(user)
        between, later_after = render(tokenizer, later, add_generation_prompt=True).split(answer)[1].split(user)
        unprompted = render(tokenizer, first) == before + user + after
    except BadInput:
        raise
    except (TemplateError, LookupError, ValueError, TypeError, ArithmeticError) as error:
        raise BadInput(f"the chat template of {name} does not render a conversation: "
                       f"{type(error).__name__} {brief(error)}") from None  # fmt: skip
    between = between.lstrip()
    closing = after.strip()
    if unprompted and (not closing or between.startswith(closing)):  # what ends an answer as well cannot open one
        raise BadInput(f"the chat template of {name} has no generation prompt")
    ids = encode(tokenizer, between)
    if not ids or ids[0] not in tokenizer.all_special_ids + list(added_tokens(tokenizer)):
        raise BadInput(f"the chat template of {name} does not end an answer with a special token")
    return before, after, between, later_after


@functools.lru_cache(maxsize=8)
def check_history(tokenizer):
    """Refuse a policy's template that writes earlier turns otherwise than they were said and heard.

    A dialogue's ids are what was sampled, thoughts included, and a reset is a slice of them. Qwen3's and DeepSeek-R1's
    templates drop an earlier answer's thoughts: at the next turn their policy would see another context than these ids.
    Users, reward models and judges are free to have such a template."""
    name = tokenizer.name_or_path
    pieces = template_pieces(tokenizer)
    if has_history(tokenizer, pieces, "y") and has_history(tokenizer, pieces, thought(pieces[1]) + "</think>y"):
        return
    if "</think>" in tokenizer.get_chat_template():
        raise BadInput(f"the chat template of {name} drops the thoughts (<think>...</think>) of earlier answers, so that a "
                       f"policy would not see what it said: give it a chat_template.jinja that keeps them")  # fmt: skip
    raise BadInput(f"the chat template of {name} writes an earlier turn otherwise than it was said: a policy needs one that "
                   f"keeps it, behind the same generation prompt")  # fmt: skip


def thought(header):
    """How a thoughtful answer begins behind this header: some open the thought themselves."""
    return "t" if header.rstrip().endswith("<think>") else "<think>t"


def has_history(tokenizer, pieces, answer, system=()):
    """Whether a rendered conversation of three turns is its pieces in a row, white space around an answer aside.
    system: the pieces around a system prompt and the first turn, if there is one."""
    before, after, between, later_after = pieces
    messages = [{"role": "user", "content": "x"}]
    expected = [before + "x" + after]
    if system:
        messages.insert(0, {"role": "system", "content": "s"})
        expected = [system[0] + "s" + system[1] + "x" + system[2]]
    for _ in range(2):
        messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": "x"})
        expected += [answer, between + "x" + later_after]
    text = render(tokenizer, messages, add_generation_prompt=True)
    for piece in expected:
        if not text.startswith(piece):
            text = text.lstrip()
        if not text.startswith(piece):
            return False
        text = text.removeprefix(piece)
    return not text


def said(tokenizer, ids, truncated):
    """An answer's text for users, reward models and judges: without its thoughts and without the token that ended it.

    A control token anywhere else is shown as plain text: the policy reads a turn of its own making behind it, so the
    others must see it too, and what is text to them opens no turn (encode, conversation_ids, user_prompt).
    A thought that begins the answer, or that the header began, and that never ends has no answer behind it."""
    ids = list(ids)
    last = added_tokens(tokenizer).get(ids[-1]) if ids else None
    if last and (ids[-1] == end_token(tokenizer) or last.special and not truncated):
        ids.pop()
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False).strip()
    opened = template_pieces(tokenizer)[1].rstrip().endswith("<think>")
    if opened or text.startswith("<think>"):
        text = without_thoughts("<think>" + text)
    return text


def without_thoughts(text):
    """What stands behind the last </think>; nothing where a thought has begun and not ended.

    >>> without_thoughts("<think>far?</think> 5 miles"), without_thoughts("<think>far")
    ('5 miles', '')
    """
    text = text.rpartition("</think>")[2].strip()
    return "" if text.startswith("<think>") else text


def tokens_read(tokenizer, ids, text):
    """How many of an answer's ids are in its text (`said`): all, or those behind its thoughts."""
    if not text:
        return min(1, len(ids))  # it ended at once, or within its thoughts
    if "</think>" in text or "</think>" not in tokenizer.decode(ids):  # what a thought began is not in the text
        return len(ids)
    return len(ids) - bisect.bisect_left(range(len(ids)), True, key=lambda n: "</think>" not in tokenizer.decode(ids[n:]))


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


def opening_ids(tokenizer, text, system=None):
    """Ids of a conversation's first turn, behind a system prompt if there is one, with the header that makes the
    assistant speak."""
    if system is not None:
        first, before, after = system_pieces(tokenizer)
        return encode(tokenizer, first, system, before, text, after)
    before, after, _, _ = template_pieces(tokenizer)
    return encode(tokenizer, before, text, after)


@functools.lru_cache(maxsize=8)
def system_pieces(tokenizer):
    """What the template writes around a system prompt and the first user's text: (before, between, after).

    A template that moves the prompt to the latest turn (Mistral's) is refused: a policy would see it at the first."""
    from jinja2 import TemplateError

    system, user = "\ue000system\ue000", "\ue000user\ue000"
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    try:
        first, rest = render(tokenizer, messages, add_generation_prompt=True).split(system)
        before, after = rest.split(user)
    except (TemplateError, LookupError, ValueError, TypeError, ArithmeticError):
        raise BadInput(f"the chat template of {tokenizer.name_or_path} takes no system prompt") from None
    if not has_history(tokenizer, template_pieces(tokenizer), "y", (first, before, after)):
        raise BadInput(f"the chat template of {tokenizer.name_or_path} writes a conversation with a system prompt otherwise than "
                       f"it was said (some move the prompt to the latest turn): leave it out, or put it into a template "
                       f"that keeps it at the first")  # fmt: skip
    return first, before, after


def later_ids(tokenizer, text):
    """Ids of what stands between two answers: the end token, the user's next turn, the assistant's header."""
    _, _, before, after = template_pieces(tokenizer)
    return encode(tokenizer, before, text, after)


def encode(tokenizer, *pieces):
    """Ids of a piece of a rendered conversation: by turns what the template wrote and somebody's text, in which special
    tokens stay text.

    Without them the pieces are encoded as a whole, which is what the template's own tokenisation gives. The template
    writes the BOS where it wants one, so the tokenizer must not add another (the released code sampled under two)."""
    ids_of = functools.partial(tokenizer.encode, add_special_tokens=False)
    texts = "\0".join(pieces[1::2])
    if not texts or not any(token in texts for token in control_tokens(tokenizer).values()):
        return ids_of("".join(pieces))
    ids = []
    for i, piece in enumerate(pieces):
        ids += encode_plain(tokenizer, piece) if i % 2 else ids_of(piece)
    return ids


def encode_plain(tokenizer, text):
    """Ids of a text in which the strings of control tokens are ordinary characters."""
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    control = control_tokens(tokenizer)
    plain = []
    for i in ids:
        if i not in control:
            plain.append(i)
            continue
        for character in control[i]:  # one that is not special is still matched: spell it out
            plain += tokenizer.encode(character, add_special_tokens=False)
    return plain


@functools.lru_cache(maxsize=8)
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
        if not all(i is None or (isinstance(i, int) and 0 <= i < len(tokenizer)) for i in stop):
            raise BadInput(f"{file}: eos_token_id {more!r} is no id of the tokenizer, nor a list of them")
    return list(dict.fromkeys(i for i in stop if i is not None))
