"""A world in one file: a person's own prompts, user and reward (docs/world.md). Loading it, and what is wrong with it.

    prompts(split)      [(opening, secret)] or [opening] of "train" and of "test"
    User                a class without arguments, with reply(dialogues)
    reward(dialogues)   a number for each
    SYSTEM, DEFAULTS    a system prompt; values of Config instead of the setting's
    build_policy()      the folder of a policy of its own, made at its first use; SHAPE: that policy's, for --plan
    load_logs()         conversations of others, a sequence of data.Logged, for the offline baselines
    BASELINES           values of Config for single rows of baselines.py, and for "all" of them
    CLOSED              True where its user and its reward make sense of its own prompts only

A file has what it is named for: --world all of the first three, --user, --reward, --dataset one each, --policy
build_policy. What they give is checked where it enters: here, and in seams.py.
"""
import ast
import difflib
import functools
import hashlib
import importlib.util
import inspect
import json
import os
import sys

from machinery.files import ROOT, BadInput, brief, fingerprint_files, program_files
from machinery.seams import failed_at

EMBEDDED = {"toy": os.path.join(ROOT, "toy.py")}  # worlds that have a name
PARTS = {"prompts": "function prompts(split)", "User": "class User", "reward": "function reward(dialogues)",
         "build_policy": "function build_policy()", "load_logs": "function load_logs(), which offline baselines need"}  # fmt: skip


def world_file(name):
    """The file of a world that --policy, --user, --reward or --dataset names, None where it names something else."""
    if name in EMBEDDED:
        return EMBEDDED[name]
    return os.path.realpath(name) if name.endswith(".py") else None


def load_world(name, flag):
    """The module; its file is run once in a process. flag: who asks, for the error's line."""
    file = world_file(name)
    if not os.path.isfile(file):
        raise BadInput(f"{flag} {name}: there is no such file")
    stem = os.path.splitext(os.path.basename(file))[0]
    taken = sys.modules.get(stem)
    key = stem if taken is None or os.path.realpath(getattr(taken, "__file__", None) or "") == file else file
    if key in sys.modules:
        return sys.modules[key]
    if os.path.dirname(file) not in sys.path:
        sys.path.insert(1, os.path.dirname(file))  # for modules of its own beside it
    spec = importlib.util.spec_from_file_location(key, file)
    module = sys.modules[key] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        del sys.modules[key]
        raise BadInput(f"{flag} {name}: line {error.lineno} of {error.filename}: {error.msg}") from None
    except (Exception, SystemExit) as error:
        del sys.modules[key]
        raise BadInput(f"{flag} {name}: {failed_at(error, file)}") from None
    for place in sources(file)[1:]:
        folder = ROOT if os.path.dirname(place) == ROOT else os.path.dirname(file)
        helper = os.path.splitext(os.path.relpath(place, folder))[0].replace(os.sep, ".").removesuffix(".__init__")
        ran = os.path.realpath(getattr(sys.modules.get(helper), "__file__", None) or place)
        if ran != os.path.realpath(place):
            del sys.modules[key]
            raise BadInput(f"{flag} {name}: its {helper} is {place}, but {ran} was imported by that name: rename one of them")
    return module


def part(name, what, flag):
    """What a world's file calls `what`; one line where it has none."""
    module = load_world(name, flag)
    found = getattr(module, what, None)
    if found is None:
        near = difflib.get_close_matches(what.lower(), [each for each in vars(module) if each.islower()], n=1)
        near += [each for each in vars(module) if each.lower() == what.lower()]
        hint = f" (did you mean {near[-1]}?)" if near else ""
        raise BadInput(f"{flag} {name}: the file has no {PARTS[what]}{hint}: write one, or give another {flag}")
    if not callable(found):
        raise BadInput(f"{flag} {name}: {what} must be a {PARTS[what]}, not a {type(found).__name__}")
    if inspect.iscoroutinefunction(found):
        raise BadInput(f"{flag} {name}: {what} must be no coroutine: a whole batch goes in, a list comes out")
    return found


def call(function, arguments, name, flag):
    """function(*arguments) of a world's file; whatever it raises is one line."""
    try:
        return function(*arguments)
    except BadInput:
        raise
    except Exception as error:
        given = ", ".join(map(repr, arguments))
        raise BadInput(f"{flag} {name}: {function.__name__}({given}) {failed_at(error, world_file(name))}") from None


# ---------------------------------------------------------------------------------------------------------------
# Its parts
# ---------------------------------------------------------------------------------------------------------------


def load_user(name, flag="--user"):
    user = call(part(name, "User", flag), (), name, flag)
    if not callable(getattr(user, "reply", None)):
        raise BadInput(f"{flag} {name}: its class User has no reply(dialogues) -> [text or None]")
    if inspect.iscoroutinefunction(user.reply):
        raise BadInput(f"{flag} {name}: reply must be no coroutine: a whole batch goes in, a list comes out")
    return user


def load_reward(name, flag="--reward"):
    return part(name, "reward", flag)


@functools.lru_cache
def load_prompts(name, split, flag="--dataset"):
    """[(opening, secret)] of a split. A secret is what its JSON gives back, since dialogues are read from disk as well:
    a tuple is a list."""
    function = part(name, "prompts", flag)
    rows = call(function, (split,), name, flag)
    if not isinstance(rows, (list, tuple)) or not rows:
        given = "nothing" if isinstance(rows, (list, tuple)) else f"a {type(rows).__name__}"
        raise BadInput(f"{flag} {name}: prompts({split!r}) gave {given}: a list of openings, or of (opening, secret), is due")
    found = []
    for i, row in enumerate(rows):
        pair = (row, None) if isinstance(row, str) else row
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], str) or not pair[0].strip():
            raise BadInput(f"{flag} {name}: prompts({split!r})[{i}] is {brief(repr(row))}: an opening that is not empty, or "
                           "(opening, secret), is due")  # fmt: skip
        try:
            found.append((pair[0], json.loads(json.dumps(pair[1]))))
        except (TypeError, ValueError) as error:
            raise BadInput(f"{flag} {name}: the secret of prompts({split!r})[{i}] cannot be kept as JSON: {brief(error)}") from None
    again = call(function, (split,), name, flag)
    if list(again) != list(rows):
        raise BadInput(f"{flag} {name}: prompts({split!r}) gives another list when it is asked again: draw with a seed, "
                       "random.Random(0)")  # fmt: skip
    return found


def load_logs(name, flag="--dataset"):
    """Conversations of others, as a sequence of data.Logged, for the baselines that roll in by the data."""
    return call(part(name, "load_logs", flag), (), name, flag)


def has_questions(name):
    """Whether each secret of a world's prompts is a list of the user's further turns, as --user dataset asks them."""
    for _, secret in load_prompts(name, "train") + load_prompts(name, "test"):
        if not isinstance(secret, list) or not all(isinstance(text, str) and text.strip() for text in secret):
            return False
    return True


def most_questions(name):
    """The most questions of a prompt whose secret is a list of the user's further turns: its opening is one."""
    return 1 + max(len(secret) for _, secret in load_prompts(name, "train") + load_prompts(name, "test"))


def build_policy(name, flag="--policy"):
    """The folder of a world's own base policy, which it makes where there is none."""
    folder = call(part(name, "build_policy", flag), (), name, flag)
    if not isinstance(folder, str):
        raise BadInput(f"{flag} {name}: build_policy() gave a {type(folder).__name__}: the path of a folder is due")
    return folder


def policy_shape(name, flag="--policy"):
    """The shape of a world's own base policy, as a config.json has it, without making it."""
    shape = getattr(load_world(name, flag), "SHAPE", None)
    if shape is None:
        raise BadInput(f"--plan: {name} makes its policy at its first use and has no SHAPE: give the folder as {flag}")
    return shape


def is_closed(name, flag):
    return bool(getattr(load_world(name, flag), "CLOSED", False))


def defaults(name, flag="--world"):
    """What a world's file says of the configuration: {field: value}, its SYSTEM and its own policy among them."""
    module, found = load_world(name, flag), {}
    if hasattr(module, "build_policy"):
        found["policy"] = name
    if hasattr(module, "SYSTEM"):
        found["system"] = module.SYSTEM
    more = getattr(module, "DEFAULTS", {})
    if not isinstance(more, dict):
        raise BadInput(f"{flag} {name}: DEFAULTS must be a dict of values of Config, not a {type(more).__name__}")
    return found | more


def baselines(name):
    """What the file that --dataset names says of the rows of baselines.py: {row or "all": {field: value}}."""
    if not world_file(name):
        return {}
    found = getattr(load_world(name, "--dataset"), "BASELINES", {})
    if not isinstance(found, dict) or not all(isinstance(values, dict) for values in found.values()):
        raise BadInput(f"--dataset {name}: BASELINES must be a dict of dicts, {{row or \"all\": {{field: value}}}}")
    return found


# ---------------------------------------------------------------------------------------------------------------
# Which world it was
# ---------------------------------------------------------------------------------------------------------------


def fingerprint(name):
    """A hash of a world's file and of the modules beside it that it imports; files that these read are not in it."""
    return fingerprint_files(sources(world_file(name)))


def prompts_hash(name):
    """A hash of all prompts, whatever they were made of."""
    both = [load_prompts(name, split) for split in ("train", "test")]
    if both[0] == both[1]:
        raise BadInput(f"--dataset {name}: prompts(split) gives one list for 'train' and for 'test': policies would be judged on "
                       "what they were trained on")  # fmt: skip
    return hashlib.sha256(json.dumps(both).encode()).hexdigest()


def sources(file):
    """The file and all modules of its folder that it imports, directly or through one another, found by reading them, and
    the program's own worlds (toy.py); not the rest of the program, whose hash a run has anyway."""
    folder, found, todo = os.path.dirname(file), [], [file]
    program = set(program_files())
    while todo:
        path = todo.pop()
        if path in found or (path in program and path != file):
            continue
        found.append(path)
        with open(path, "rb") as code:
            tree = ast.parse(code.read())
        for node in ast.walk(tree):
            todo += modules_beside(node, folder, os.path.dirname(path))
            todo += [place for place in modules_beside(node, ROOT, ROOT) if os.path.dirname(place) == ROOT]
    return found


def modules_beside(node, folder, here):
    """The files in `folder` that an import statement of a file in `here` can mean."""
    names = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = [node.module] if node.module else []
        names = [".".join([*base, alias.name]) for alias in node.names]
        folder = os.path.normpath(os.path.join(here, *[os.pardir] * (node.level - 1))) if node.level else folder
    found = []
    for name in names:
        parts = name.split(".")
        for n in range(1, len(parts) + 1):
            path = os.path.join(folder, *parts[:n])
            found += [file for file in (f"{path}.py", os.path.join(path, "__init__.py")) if os.path.isfile(file)]
    return found
