"""Imports run downwards only, docs/architecture.md shows them as they are, and the code stays small."""

import os
import re

import pytest

from docs.imports import ARCHITECTURE, LAYERS, PACKAGE, drawn, imports, modules
from tests.conftest import ROOT

# Lines at most. These numbers only ever go down.
TRAINING_STEP = 1726  # what a reader opens to understand one step
TRAINING = 3242  # the training story with everything around it, and the settings of all programs
WHOLE_PACKAGE = 7577  # Python and HTML together
TESTS = 6999


def lines_of(*names: str) -> int:
    return sum(len((PACKAGE / f"{name}.py").read_text(encoding="utf-8").splitlines()) for name in names)


def test_every_module_has_a_layer() -> None:
    assert set(modules()) == set(LAYERS)


def test_no_import_points_upwards() -> None:
    upward = [
        f"{name} imports {other}"
        for name, tree in modules().items()
        for other in imports(tree)
        if LAYERS.index(other) >= LAYERS.index(name)
    ]
    assert upward == []


def test_the_picture_is_of_this_code() -> None:
    text = ARCHITECTURE.read_text(encoding="utf-8")
    assert text == drawn(text), "python docs/imports.py draws it anew"


def test_every_file_has_its_place_in_the_plan() -> None:
    plan = ARCHITECTURE.read_text(encoding="utf-8").partition("## The plan")[2].partition("\nImports run")[0]
    words = set(re.findall(r"\w+", plan)) | {"__main__"}
    missing = [name for name in modules() if name.rpartition(".")[2] not in words]
    assert missing == []


@pytest.mark.skipif(not os.environ.get("CI"), reason="budgets bind this repository, not whoever changes a clone of it")
def test_the_code_stays_within_its_budgets() -> None:
    step = ["config", "model", "optim", "data", "distributed", "train"]
    assert lines_of(*step) <= TRAINING_STEP
    assert lines_of(*step, "cli", "errors", "metrics", "checkpoint", "files", "device", "settings") <= TRAINING
    files = [path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".html")]
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files) <= WHOLE_PACKAGE
    tests = list(ROOT.joinpath("tests").rglob("*.py"))
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in tests) <= TESTS
