"""The house stays as it is: the paper upstairs, the machinery downstairs, no circle; read from the imports themselves."""
import ast
import os

import pytest

from helpers import ROOT, source_files

FLOORS = ["toy", "simulator", "evaluate", "refuel", "baselines"]  # from the ground up; all of them on the machinery
HEAVY = {"torch", "transformers", "vllm", "datasets", "pyarrow", "matplotlib", "huggingface_hub", "safetensors", "tokenizers",
         "jinja2", "wandb"}  # fmt: skip


def name_of(path):
    """machinery/files.py is machinery.files, refuel.py is refuel, machinery/__init__.py is machinery."""
    parts = os.path.relpath(path, ROOT).removesuffix(".py").removesuffix("/__init__").split(os.sep)
    return ".".join(parts)


TREES = {name_of(path): ast.parse(open(path, encoding="utf-8").read()) for path in source_files()}


def imported(node):
    """The modules that one import statement names, as far as they can be: `from machinery import files` is machinery.files."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    assert node.level == 0, "a relative import hides where it leads"
    inner = [f"{node.module}.{alias.name}" for alias in node.names]
    return [name if name in TREES else node.module for name in inner]


def imports(tree):
    return [name for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)) for name in imported(node)]


def below(name):
    """Every module of the project that `name` imports, directly or through others."""
    found, todo = set(), [name]
    while todo:
        for other in imports(TREES[todo.pop()]):
            if other in TREES and other not in found:
                found.add(other)
                todo.append(other)
    return found


def test_the_top_level_is_the_paper_and_nothing_else():
    assert sorted(name for name in TREES if not name.startswith("machinery")) == sorted(FLOORS)


@pytest.mark.parametrize("name", sorted(TREES))
def test_no_module_imports_itself_through_others(name):
    assert name not in below(name)


@pytest.mark.parametrize("name", [name for name in sorted(TREES) if name.startswith("machinery")])
def test_the_machinery_imports_nothing_from_upstairs(name):
    assert not below(name) & set(FLOORS)


@pytest.mark.parametrize("floor", range(len(FLOORS)))
def test_each_floor_stands_on_those_below_it(floor):
    assert below(FLOORS[floor]) & set(FLOORS) <= set(FLOORS[:floor])


@pytest.mark.parametrize("name", sorted(TREES))
def test_imports_inside_functions_are_of_heavy_packages_only(name):
    for function in ast.walk(TREES[name]):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for module in imports(function):
                assert module.split(".")[0] in HEAVY, (function.name, module)


@pytest.mark.parametrize("name", FLOORS)
def test_a_script_first_sets_what_torch_and_vllm_read(name):
    first = next(node for node in TREES[name].body if isinstance(node, (ast.Import, ast.ImportFrom)))
    assert imported(first) == ["machinery"]


def depth(node):
    """How deep loops and conditions are nested in a function."""
    nested = [depth(child) for child in ast.iter_child_nodes(node)]
    return max(nested, default=0) + isinstance(node, (ast.For, ast.While, ast.If, ast.With, ast.Try))


def test_refuel_is_the_algorithm():
    """About 250 lines, depth 3, in the order of the paper, without distributed calls, engines or argument parsing."""
    text = open(os.path.join(ROOT, "refuel.py"), encoding="utf-8").read()
    assert len(text.splitlines()) <= 275
    for word in ("dist", "vllm", "argparse", "transformers"):
        assert not [name for name in imports(TREES["refuel"]) if word in name.split(".")]
    functions = [node for node in TREES["refuel"].body if isinstance(node, ast.FunctionDef)]
    assert max(map(depth, functions)) <= 3
    order = [f.name for f in functions if f.name in ("sample_resets", "collect", "refuel_loss", "regress", "train")]
    assert order == ["sample_resets", "collect", "refuel_loss", "regress", "train"]


def test_the_lines_of_algorithm_1_are_listed_with_functions_that_are_there():
    import refuel
    import simulator

    listed = refuel.__doc__.split("    Algorithm 1 ")[1].split("\n\n")[0]
    for name in ("sample_resets", "collect", "make_pairs", "regress", "refuel_loss", "pair_logps", "train", "load_policy"):
        assert name in listed and callable(getattr(refuel, name))
    assert "simulator.futures" in listed and callable(simulator.futures)
