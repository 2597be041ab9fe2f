"""The seams where a user's and a reward's own code enters: what it gives is checked there, once, for everybody."""
import copy
import math
import numbers
import os
import sys
import traceback

from machinery.files import ROOT, BadInput, brief

MET = set()  # (file, flag) whose function was asked before: first_met
END = object()  # a user's reply that ends the dialogue: it is finished with the turns that it has, and no failure
MISTAKES = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, NameError)


def ask(user, dialogues):
    """The user's turns: checked where they enter, since a reply too few would be given to another dialogue."""
    texts = of_each(user.reply, dialogues, "--user")
    for d, text in zip(dialogues, texts, strict=True):
        if text is not None and text is not END and not (isinstance(text, str) and text.strip()):
            raise BadInput(f"--user gave {text!r} as a turn (None would be no turn): {opening(d)}{of(user.reply)}")
    if not getattr(user, "threads", 0) and first_met(user.reply, "--user"):
        few = dialogues[:2]
        for d, text, again in zip(few, texts, of_each(user.reply, few, "--user")):
            if None not in (text, again) and text != again:  # it may fail now and then
                raise BadInput(f"--user gave {text!r}, and {again!r} when asked again: it must keep nothing between calls, and draw from "
                               f"d.seed(...) alone (one that asks a server says threads = N): {opening(d)}{of(user.reply)}")  # fmt: skip
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
            raise BadInput(f"--reward gave {r!r} where a number is due: {opening(d)}{of(reward)}")
        if r is not None and not math.isfinite(scores[-1]):
            raise BadInput(f"the --reward of a dialogue is not finite ({r}): {opening(d)}{of(reward)}")
    known = sorted((r, i) for i, r in enumerate(scores) if r is not None)
    if known and known[0][0] < known[-1][0] and first_met(reward, "--reward"):
        for r, i in (known[0], known[-1]):
            compare(reward, dialogues[i], r, known[-1][0] - known[0][0])
    return scores


def first_met(function, flag):
    """Whether a person's own file is asked as --user or --reward for the first time in this process: it is then asked about
    two dialogues once more."""
    who = source(function), flag
    first = who[0] is not None and who not in MET
    MET.add(who)
    return first


def compare(reward, dialogue, among_others, spread):
    """A person's own reward must not depend on what else is in the batch (ranks, a mean of 0): its wave would decide what a
    dialogue is worth. It is asked twice about it alone, since one that draws tells nothing; 5 % of the spread is a model's
    rounding."""
    alone, again = (of_each(reward, [dialogue], "--reward")[0] for _ in range(2))
    if repr(alone) == repr(again) and (alone is None or not abs(float(alone) - among_others) <= 0.05 * spread):
        raise BadInput(f"--reward gave {among_others:.4g} to a dialogue among others, and {alone} to it alone; it must not depend "
                       f"on the batch: {opening(dialogue)}{of(reward)}")  # fmt: skip


def malformed(reward, dialogues):
    """How many answers are malformed, by the reward's own malformed(dialogues), and of how many; (0, 0) if it has none."""
    function = getattr(reward, "malformed", None)
    if function is None:
        return 0, 0
    counts = of_each(function, dialogues, "--reward's malformed")
    for d, count in zip(dialogues, counts, strict=True):
        if not isinstance(count, numbers.Integral) or not 0 <= count <= d.turns:
            raise BadInput(f"--reward's malformed gave {count!r} for a dialogue of {d.turns} answers, how many of them is due: "
                           f"{opening(d)}{of(function)}")  # fmt: skip
    return int(sum(counts)), sum(d.turns for d in dialogues)


def of_each(function, dialogues, flag):
    """What a user's or a reward's function gives for a batch: as many values as dialogues.

    It is given copies, secrets too: a function that writes into its dialogues changes nobody else's."""
    if not dialogues:
        return []
    mistakes = Exception if source(function) else MISTAKES  # an error of a model's own code keeps its traceback
    try:
        values = function([own(d) for d in dialogues])
    except BadInput:
        raise
    except mistakes as error:
        raise BadInput(f"{flag} {failed_at(error, source(function))}; {culprit(function, dialogues)}") from error
    if not hasattr(values, "__len__") or isinstance(values, (str, bytes, dict, set, frozenset)) or len(values) != len(dialogues):
        given = f"{len(values)} values" if hasattr(values, "__len__") else f"a {type(values).__name__}"
        raise BadInput(f"{flag} gave {given} for {len(dialogues)} dialogues: a list with one for each is due{of(function)}")
    return list(values)


class Unknown(list):
    """ids or spans of a dialogue whose policy is behind a server: a number of tokens read from them would be 0."""

    def refuse(self, *_):
        raise BadInput("the tokens of a policy behind a server are not known: --user and --reward read its messages, not the "
                       "ids and spans of a dialogue")  # fmt: skip

    __getitem__ = __iter__ = refuse

    def __len__(self):
        return super().__len__() or self.refuse()  # spans has as many as there are answers


def own(dialogue):
    mine = dialogue.copy(secret=copy.deepcopy(dialogue.secret))
    if dialogue.spans and not dialogue.ids:
        mine.ids, mine.spans = Unknown(), Unknown(dialogue.spans)
    return mine


def source(function):
    """The file of a person's own code, None for the program's."""
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    file = os.path.realpath(getattr(module, "__file__", None) or ROOT)
    return None if file == ROOT or os.path.dirname(file) == os.path.join(ROOT, "machinery") else file


def of(function):
    """" (FILE)", where a person's own file is to blame."""
    return f" ({source(function)})" if source(function) else ""


def failed_at(error, file=None):
    """Where in a person's own file an error came up, else where it was raised, and what it is."""
    frames = traceback.extract_tb(error.__traceback__)
    where = ([frame for frame in frames if os.path.realpath(frame.filename) == file] or frames)[-1]
    return f"failed at {where.filename}:{where.lineno} with {type(error).__name__} {brief(error)}"


def culprit(function, dialogues):
    """The first dialogue with which the function fails alone."""
    for d in dialogues:
        try:
            function([own(d)])
        except Exception:
            return opening(d)
    return "with no dialogue alone"


def opening(dialogue):
    return f"the dialogue that begins with {dialogue.messages[0]['content'][:200]!r}"
