"""Imports run downwards only, and docs/architecture.md shows them as they are."""

import re

from docs.imports import ARCHITECTURE, LAYERS, PACKAGE, drawn, imports, modules


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


def test_the_sum_of_the_package_stays_small() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert sum(lines.values()) < 10500
    assert max(lines.values()) <= 400
