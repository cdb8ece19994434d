"""A method is registered once: what the registry reads from factories, and that no other file lists them."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import types
from pathlib import Path

import pytest

import jaxprune as jp
from jaxprune import methods
from jaxprune.methods import METHODS
from jaxprune.methods.registry import register
from tests.tower import begin

ROOT = Path(__file__).parents[2]
# Names of adapters, of a function of NumPy, or common words too: counted where they stand as names of methods alone.
AMBIGUOUS = ("lora", "lorafa", "dora", "vera", "full", "squeeze")


def sources() -> dict[str, str]:
    """Return the code without its benchmarks, each of which is about certain methods; docstrings and comments are prose."""
    files = [*(ROOT / "jaxprune").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]
    found = {str(path.relative_to(ROOT)): code(path.read_text()) for path in files}
    return {path: text for path, text in found.items() if not path.startswith("experiments/bench/")}


@functools.cache
def code(text: str) -> str:
    """Return a file's code without docstrings and comments."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            stay = [x for x in body if not (isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant))]
            node.body = stay or [ast.Pass()]  # pyright: ignore[reportAttributeAccessIssue]
    return ast.unparse(tree)


def names_method(path: str, text: str, name: str) -> bool:
    """Tell whether a file names a method: in any word, or where the word has other meanings, as a text or in an import."""
    if name not in AMBIGUOUS:
        return re.search(rf"\b{name}\b", text) is not None
    for node in ast.walk(ast.parse(text)):
        # In adapters a text may be the name of an attribute.
        if (
            isinstance(node, ast.Constant)
            and node.value == name
            and path.startswith(("experiments/", "jaxprune/methods/"))
        ):
            return True
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("jaxprune.methods", "jaxprune")):
            of_methods = node.module in ("jaxprune", "jaxprune.methods") or node.module == f"jaxprune.methods.{name}"
            if of_methods and any(alias.name == name for alias in node.names):
                return True
        if isinstance(node, ast.Attribute) and node.attr == name and isinstance(node.value, ast.Name):
            if node.value.id in ("jp", "methods"):
                return True
    return False


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_is_named_in_four_files_at_most(name):
    """Its own, the two lists of exports, and its preset; a method that is built from another names that one too."""
    own = Path(inspect.getfile(inspect.unwrap(METHODS[name].factory))).relative_to(ROOT).as_posix()
    lists = {"jaxprune/__init__.py", "jaxprune/methods/__init__.py"}
    built_on_it = {path for path in (f"jaxprune/methods/{x}.py" for x in _built_on(name))}
    found = {path for path, text in sources().items() if names_method(path, text, name)} - built_on_it
    others = found - lists - {own}
    assert len(found) <= 4 and all(path.startswith("experiments/presets/") for path in others), sorted(found)


def _built_on(name: str) -> list[str]:
    texts = {path.stem: path.read_text() for path in (ROOT / "jaxprune" / "methods").glob("*.py")}
    return [
        stem
        for stem, text in texts.items()
        if re.search(rf"^from jaxprune\.methods\.\w+ import .*\b{name}\b", text, re.M)
    ]


def test_no_function_hides_its_module():
    for name, entry in METHODS.items():
        module = inspect.getmodule(entry.factory)
        assert isinstance(module, types.ModuleType) and getattr(jp, name) is entry.factory
        assert getattr(methods, module.__name__.rpartition(".")[2]) is module
        assert not inspect.isfunction(getattr(methods, name, None))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_entry_is_whole(name):
    entry = METHODS[name]
    assert entry.name == name and entry.summary and entry.paper
    assert len(entry.summary) < 110 and "\n" not in entry.summary and not re.search(r"[`.]$|``", entry.summary)
    for setting in entry.settings.values():
        assert setting.help and "`" not in setting.help and "\n" not in setting.help, setting.name
    parameters = inspect.signature(entry.factory).parameters
    own = {n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert set(entry.settings) == own | (set(entry.first.settings) if entry.first else set())
    assert set(entry.defaults) <= {"learning_rate", "rank"}
    if entry.components:
        assert set(entry.components.settings(8)) <= set(entry.settings)


def test_one_number_of_components():
    def meant(name, rank):
        components = METHODS[name].components
        assert components
        return components.settings(rank)

    assert meant("lora", 4) == {"rank": 4} and meant("oplora", 4) == {"ranks": range(5)}
    assert meant("dplora", 4) == {"ranks": range(5)} and meant("prunedlora", 5) == {"rank": 5, "target": 2}
    assert meant("adalora", 5) == {"init_rank": 8, "target_rank": 5} and meant("prunedlora", 1)["target"] == 1
    assert {name for name, entry in METHODS.items() if not entry.components} == {
        "full",
        "bitfit",
        "houlsby",
        "pfeiffer",
    }
    # The number that the help gives is the one of the defaults.
    for name, entry in METHODS.items():
        for setting, value in (entry.components.settings(entry.components.default) if entry.components else {}).items():
            assert entry.settings[setting].default == value, (name, setting)


def test_settings_of_the_method_that_is_continued_go_to_it():
    made = METHODS["dplora"].make({"total_steps": 24, "events": 3, "budget": 240, "solver": "DP"})
    assert made.events == (6, 12, 18)
    with pytest.raises(jp.UsageError, match="^budget 0 is out of range"):
        METHODS["dplora"].make({"total_steps": 24, "budget": 0})
    with pytest.raises(TypeError, match="budget"):
        jp.dplora(total_steps=24, budget=240)  # pyright: ignore


def test_what_a_docstring_says():
    def odd(*, first_one: int = 3, b: float | None = None, without: int = 1):
        """Do `this`: and that, at length
        over lines.

        Args:
          first_one: a text
            of two lines, `marked`.
          b: another; None for a third.

        Raises:
          UsageError: a setting is out of range.
        """

    try:
        register(paper="none")(odd)  # pyright: ignore
        entry = METHODS["odd"]
        assert entry.summary == "Do this" and entry.settings["first_one"].help == "a text of two lines, marked."
        assert entry.settings["b"].help == "another; None for a third." and entry.settings["without"].help == ""
    finally:
        METHODS.pop("odd", None)


def test_a_setting_of_both_goes_to_both():
    """On the command line one --solver is for the plan before training and for every event."""
    method = METHODS["dplora"].make({"total_steps": 24, "solver": "DP", "budget": 240, "target": 0.5, "events": 3})
    world = begin(method)
    state = world.state
    for _ in range(6):
        state, _ = world.step(world.params, state, world.batch)
    _, decision = jp.prune(state, method, world.optimizer, world.context)
    assert world.start.plan.solver == decision.report["solver"] == "DP"
