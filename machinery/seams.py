"""The seams where a user's and a reward's own code enters: what it gives is checked there, once, for everybody."""
import math
import traceback

from machinery.files import BadInput

MISTAKES = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, NameError)


def ask(user, dialogues):
    """The user's turns: checked where they enter, since a reply too few would be given to another dialogue."""
    texts = of_each(user.reply, dialogues, "--user")
    for d, text in zip(dialogues, texts, strict=True):
        if text is not None and not (isinstance(text, str) and text.strip()):
            raise BadInput(f"--user gave {text!r} as a turn (None would be no turn): {opening(d)}")
    return texts


def score(reward, dialogues):
    """Rewards as floats, None for a dialogue that is too long for the reward model; checked where they enter."""
    scores = []
    for d, r in zip(dialogues, of_each(reward, dialogues, "--reward"), strict=True):
        try:
            scores.append(None if r is None else float(r))
            number = not isinstance(r, (str, bytes))  # float("1") is one, and a mistake
        except (TypeError, ValueError):
            number = False
        if not number:
            raise BadInput(f"--reward gave {r!r} where a number is due: {opening(d)}")
        if r is not None and not math.isfinite(scores[-1]):
            raise BadInput(f"the reward of a dialogue is not finite ({r}): {opening(d)}")
    return scores


def of_each(function, dialogues, flag):
    """What a user's or a reward's function gives for a batch: as many values as dialogues."""
    try:
        values = function(dialogues)
    except BadInput:
        raise
    except MISTAKES as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise BadInput(f"{flag} failed at {where.filename}:{where.lineno} with {type(error).__name__} {error}; "
                       f"{culprit(function, dialogues)}") from error  # fmt: skip
    if not hasattr(values, "__len__") or isinstance(values, (str, bytes, dict)) or len(values) != len(dialogues):
        given = f"{len(values)} values" if hasattr(values, "__len__") else f"a {type(values).__name__}"
        raise BadInput(f"{flag} gave {given} for {len(dialogues)} dialogues: a list with one for each is due")
    return list(values)


def culprit(function, dialogues):
    """The first dialogue with which the function fails alone."""
    for d in dialogues:
        try:
            function([d])
        except MISTAKES:
            return opening(d)
    return "with no dialogue alone"


def opening(dialogue):
    return f"the dialogue that begins with {dialogue.messages[0]['content'][:200]!r}"
