"""README and docs/: every command parses, every file and place in the code is there, examples run, metrics are defined."""
import functools
import glob
import importlib
import os
import re
import shlex

import pytest

import baselines
import evaluate
import refuel
import simulator
from helpers import ROOT, source_files
from machinery import meter, plan, settings, watch

PAGES = {name: open(os.path.join(ROOT, name), encoding="utf-8").read()
         for name in ["README.md", *sorted(glob.glob("docs/*.md", root_dir=ROOT))]}  # fmt: skip
README = PAGES["README.md"]


def commands(text):
    """Every command of a page: in its blocks, and what stands in backticks and begins as one."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S))
    inline = [code for code in re.findall(r"`([^`\n]+)`", text) if code.startswith(("python ", "torchrun "))]
    found = re.findall(r"(?:torchrun|python3?) [^&\n;]+", "\n".join([blocks, *inline]).replace("; ", "\n"))
    return [command.strip() for command in found if ".py" in command]


COMMANDS = sorted({(page, command) for page, text in PAGES.items() for command in commands(text)})
FLAGS = {"baselines.py": dict(method={}), "simulator.py": dict(show=simulator.SHOW), "refuel.py": plan.FLAGS | watch.FLAGS}


@pytest.mark.parametrize("page, command", COMMANDS)
def test_a_command_parses(page, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").symlink_to(os.path.join(ROOT, "tests"))  # for --world tests/shop.py
    (tmp_path / "tutor.py").write_text(re.findall(r"```python\n(.*?)```", PAGES["docs/world.md"], re.S)[0])
    monkeypatch.setattr(watch, "PACKAGES", dict.fromkeys(watch.PACKAGES, "json"))  # as if both were installed
    if "--nnodes 2" in command:
        monkeypatch.setattr(settings, "world", lambda: 16)
    words = shlex.split(re.sub(r"\$eta", "10", re.sub(r"\b(S|NAME|DIR)\b", "0", command)))
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script, argv = words[place], words[place + 1 :]
    assert os.path.exists(os.path.join(ROOT, script)), page
    if script in FLAGS and not (script == "simulator.py" and simulator.stored(argv)):
        parsed = refuel.read_config(argv, **FLAGS[script])
        if script == "baselines.py":
            assert baselines.choose(parsed[1]["method"])
    if script == "evaluate.py":
        assert evaluate.command(argv)


def test_the_readme_has_the_two_commands_of_a_fresh_machine():
    installs = [line for line in README.splitlines() if "pip install -r requirements.txt &&" in line]
    assert len(COMMANDS) >= 20 and len(installs) == 2
    assert "refuel.py --setting toy" in installs[0] and "pytest -q -n 2 --dist loadfile tests" in installs[1]
    ci = open(os.path.join(ROOT, ".ci", "run")).read()
    assert "python -m pytest -q -n 2 --dist loadfile tests" in ci and "pip install -q -r requirements.txt" in ci


def test_the_readme_is_read_in_one_sitting_and_shows_the_algorithm_first():
    assert len(README.splitlines()) <= 200
    lines = re.findall(r"^\d\. .*(?:\n   .*)*", README.split("## The algorithm")[1].split("\n## ")[0], re.M)
    assert len(lines) == 5 and all(re.search(r"`refuel\.\w+`|`simulator\.\w+`", line) for line in lines)
    assert README.index("## The algorithm") < README.index("## Install")
    for link in ("https://arxiv.org/abs/2410.04612", "https://github.com/ZhaolinGao/REFUEL", "@article"):
        assert link in README


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page):
    text, folder = PAGES[page], os.path.dirname(os.path.join(ROOT, page))
    for name in re.findall(r"`((?:results|theory|tests|machinery|docs)/[\w./]+|\w+\.py)`", text):
        if name not in ("tutor.py", "FILE.py"):  # a world of your own
            assert os.path.exists(os.path.join(ROOT, name.replace("seed_S", "seed_0"))), name
    for name in re.findall(r"\]\(([\w/.]+)\)", text):
        assert os.path.exists(os.path.join(folder, name)), name


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_calls_a_place_in_the_code_is_one(page):
    modules = {os.path.basename(path).removesuffix(".py") for path in source_files()} - {"__init__"}
    for module, name in re.findall(r"`(\w+)\.([A-Za-z_][\w.]*)`", PAGES[page]):
        if module in modules and name not in ("py", "json", "jsonl", "html"):
            upstairs = os.path.exists(os.path.join(ROOT, f"{module}.py"))
            found = importlib.import_module(module if upstairs else f"machinery.{module}")
            functools.reduce(getattr, name.split("."), found)


def test_every_file_has_its_row():
    rows = re.findall(r"^\| `([\w/]+\.py)` \|", README + PAGES["docs/machinery.md"], re.M)
    expected = [os.path.relpath(path, ROOT) for path in source_files() if not path.endswith("__init__.py")]
    assert sorted(rows) == sorted(expected)


def test_every_page_of_docs_is_linked_from_the_readme():
    for page in PAGES:
        assert page == "README.md" or f"]({page})" in README, page


def test_every_metric_that_is_logged_is_defined_once():
    names = [*meter.METRICS, "gradient_norm", "lr", "tokens_per_second", "pairs", "dropped", "train", "test", "logged",
             "reward", "truncated", "engine_gap", "kl_0", "tokens", "seconds"]  # fmt: skip
    first_cells = [line.split("|")[1] for line in PAGES["docs/metrics.md"].splitlines() if line.startswith("| `")]
    for name in names:
        assert sum(f"`{name}`" in cell for cell in first_cells) == 1, name
