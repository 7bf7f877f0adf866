"""Who imports whom: the order of the modules, and the picture of it in architecture.md, drawn from the code.

`python docs/imports.py` draws it anew. tests/test_architecture.py holds code and picture to it.
"""

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "nanogpt"
ARCHITECTURE = Path(__file__).with_name("architecture.md")

# rooms from the lowest to the highest, and the modules within one likewise: each imports only what stands before it
ROOMS = {
    "settings": "errors files settings shape config programs device",
    "data": "pieces tokenizer tokenizer_json data download corpus documents workers prepare_plan build prepare",
    "model": "loss cache model",
    "training step": "spread optim distributed",
    "generation": "infer.sampling infer.engine infer.packed infer.text",
    "interop": "interop.huggingface interop.gguf interop.flat",
    "run on disk": "sharded checkpoint trained",
    "report": "report.log report.progress report.metrics report.runs report.plots report.inside",
    "evaluation": "tasks evaluate",
    "sample, serve": "infer.sample infer.scheduler infer.protocol infer.guard infer.api infer.board infer.serve",
    "export": "export",
    "training": "start saver guards health signals train",
    "bench, plan": "bench plan",
    "command line": "cli __main__",
}  # fmt: skip
LAYERS = " ".join(ROOMS.values()).split()


def modules() -> dict[str, ast.Module]:
    """The package's files, parsed, by name."""
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


def picture() -> str:
    """The rooms as a graph for Mermaid: an arrow for what a room imports, but where another way leads there, too."""
    room_of = {module: room for room, names in ROOMS.items() for module in names.split()}
    direct: dict[str, set[str]] = {room: set() for room in ROOMS}
    for name, tree in modules().items():
        direct[room_of[name]] |= {room_of[other] for other in imports(tree)} - {room_of[name]}
    reached: dict[str, set[str]] = {}  # from each room, by any way
    for room in ROOMS:
        reached[room] = direct[room].union(*(reached[other] for other in direct[room]))
    keys = {room: re.sub(r"\W+", "_", room) for room in ROOMS}
    lines = ["```mermaid", "flowchart TD"]
    for room in reversed(ROOMS):
        names = [name.rpartition(".")[2] for name in ROOMS[room].split()]
        rows = [", ".join(names[n : n + 4]) for n in range(0, len(names), 4)]
        lines.append(f'    {keys[room]}["<b>{room}</b><br>{",<br>".join(rows)}"]')
    for room in reversed(ROOMS):
        needless = set[str]().union(*(reached[other] for other in direct[room]))
        lines += [f"    {keys[room]} --> {keys[other]}" for other in ROOMS if other in direct[room] - needless]
    return "\n".join([*lines, "```"])


def drawn(text: str) -> str:
    """A page with the picture as it should be."""
    start, end = "<!-- imports -->\n", "\n<!-- end -->"
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    return before + start + picture() + end + after


if __name__ == "__main__":
    ARCHITECTURE.write_text(drawn(ARCHITECTURE.read_text(encoding="utf-8")), encoding="utf-8")
