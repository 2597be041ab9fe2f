"""Every command of the README exists and its flags parse; every file it names is there."""
import functools
import glob
import importlib
import os
import re
import shlex

from helpers import ROOT
import pytest

import baselines
from machinery import plan
import refuel

README = open(os.path.join(ROOT, "README.md"), encoding="utf-8").read()
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S)) + "\n"
INLINE = "\n".join(c for c in re.findall(r"`([^`\n]+)`", README) if c.startswith(("python ", "torchrun ")))
COMMANDS = [c for c in re.findall(r"(?:torchrun|python3?) [^&\n;]+", BLOCKS + INLINE.replace("; ", "\n")) if ".py" in c]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_parses(command):
    words = shlex.split(re.sub(r"\b(S|NAME|DIR)\b", "0", command))
    script = next(i for i, w in enumerate(words) if w.endswith(".py"))
    assert os.path.exists(os.path.join(ROOT, words[script]))
    extra = {"baselines.py": dict(method={}, grid=dict(action="store_true")), "simulator.py": dict(show=dict(type=int)),
             "refuel.py": plan.FLAGS}
    if words[script] in ("refuel.py", "baselines.py", "simulator.py"):
        more = extra.get(words[script], {})
        parsed = refuel.read_config(words[script + 1 :], **more)
        if words[script] == "baselines.py":
            assert baselines.choose(parsed[1]["method"])


def test_the_readme_has_the_two_commands_of_a_fresh_machine():
    installs = [line for line in BLOCKS.splitlines() if "pip install -r requirements.txt" in line]
    assert len(COMMANDS) >= 3 and len(installs) == 2
    assert "refuel.py --setting toy" in installs[0] and "pytest -q tests" in installs[1]
    ci = open(os.path.join(ROOT, ".ci", "run")).read()
    assert "python -m pytest -q tests" in ci and "pip install -q -r requirements.txt" in ci


def test_files_that_the_readme_names_exist():
    for name in re.findall(r"`((?:results|theory|tests)/[\w./]+|\w+\.py)`", README) + re.findall(r"\]\(([\w/.]+)\)", README):
        assert os.path.exists(os.path.join(ROOT, name.replace("seed_S", "seed_0"))), name


def test_what_the_readme_calls_a_place_in_the_code_is_one_and_every_file_has_its_row():
    first = README.split("## The toy")[0]
    places = re.findall(r"`(\w+)\.([\w.]+)`", first)
    for module, name in [p for p in places if p[1] not in ("py", "txt")]:
        functools.reduce(getattr, name.split("."), importlib.import_module(module))
    rows = re.findall(r"^\| `(\w+\.py)` \|", first, re.M)
    assert sorted(rows) == sorted(os.path.basename(path) for path in glob.glob(os.path.join(ROOT, "*.py")))


def test_every_metric_that_is_logged_is_defined_once():
    names = [*refuel.METRICS, "gradient_norm", "lr", "tokens_per_second", "pairs", "dropped", "reward", "truncated", "tokens",
             "seconds"]  # fmt: skip
    section = README.split("## Metrics")[1].split("\n## ")[0]
    first_cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    for name in names:
        assert sum(f"`{name}`" in cell for cell in first_cells) == 1, name
