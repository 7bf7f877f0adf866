"""Imports run downwards only."""

import ast
from pathlib import Path

import nanogpt

PACKAGE = Path(nanogpt.__file__).parent
LAYERS = [
    "errors", "files", "settings", "shape", "config", "programs", "device", "data.pieces", "data.tokenizer",
    "data.tokenizer_json", "data.tokens", "data.download", "data.corpus", "data.documents", "data.workers",
    "data.batches", "data.plan", "data.build", "data.prepare", "loss", "cache", "model", "spread", "optim",
    "distributed", "infer.sampling", "infer.engine", "infer.packed", "infer.text", "interop.huggingface",
    "interop.gguf", "interop.flat", "sharded", "checkpoint", "trained", "report.log", "report.progress",
    "report.metrics", "report.runs", "report.plots", "report.inside", "tasks", "evaluate", "infer.sample",
    "infer.scheduler", "infer.protocol", "infer.guard", "infer.api", "infer.board", "infer.serve", "export", "start",
    "saver", "guards", "health", "signals", "train", "bench", "plan", "cli", "__main__",
]  # fmt: skip


def modules() -> dict[str, ast.Module]:
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    names = [".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in files]
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in zip(names, files, strict=True)}


def imports(tree: ast.Module) -> set[str]:
    """Modules of the package that are imported at the top of a file."""
    found = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "nanogpt":
            module = node.module.removeprefix("nanogpt").lstrip(".")
            members = {f"{module}.{alias.name}".lstrip(".") for alias in node.names}
            found |= members & set(LAYERS) or ({module} & set(LAYERS))
    return found


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


def test_the_sum_of_the_package_stays_small() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert sum(lines.values()) < 10500
    assert max(lines.values()) <= 400
