"""Who imports whom: the order of the modules, and the picture of it in architecture.md, drawn from the code.

`python docs/imports.py` draws it anew. tests/test_architecture.py holds code and picture to it.
"""

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "nanogpt"
ARCHITECTURE = Path(__file__).with_name("architecture.md")

# Groups from the lowest to the highest, and the modules within one likewise: each imports only what stands before it.
GROUPS = {
    "settings": "errors files config settings",
    "data": "tokenizer chats data pydocs prepare",
    "model": "device model distributed optim",
    "formats": "huggingface gguf lora",
    "run on disk": "checkpoint metrics",
    "generation": "engine sample chat",
    "looking": "plot inspect",
    "evaluation": "evaluate",
    "serving": "serve",
    "export": "export",
    "training": "train",
    "bench, plan": "bench plan",
    "command line": "cli __main__",
}
LAYERS = " ".join(GROUPS.values()).split()


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
    """The groups as a graph for Mermaid: an arrow for what a group imports, but where another way leads there, too."""
    group_of = {module: group for group, names in GROUPS.items() for module in names.split()}
    direct: dict[str, set[str]] = {group: set() for group in GROUPS}
    for name, tree in modules().items():
        direct[group_of[name]] |= {group_of[other] for other in imports(tree)} - {group_of[name]}
    reached: dict[str, set[str]] = {}  # from each group, by any way
    for group in GROUPS:
        reached[group] = direct[group].union(*(reached[other] for other in direct[group]))
    keys = {group: re.sub(r"\W+", "_", group) for group in GROUPS}
    lines = ["```mermaid", "flowchart TD"]
    for group in reversed(GROUPS):
        names = [name.rpartition(".")[2] for name in GROUPS[group].split()]
        rows = [", ".join(names[n : n + 4]) for n in range(0, len(names), 4)]
        lines.append(f'    {keys[group]}["<b>{group}</b><br>{",<br>".join(rows)}"]')
    for group in reversed(GROUPS):
        needless = set[str]().union(*(reached[other] for other in direct[group]))
        lines += [f"    {keys[group]} --> {keys[other]}" for other in GROUPS if other in direct[group] - needless]
    return "\n".join([*lines, "```"])


def drawn(text: str) -> str:
    """A page with the picture as it should be."""
    start, end = "<!-- imports -->\n", "\n<!-- end -->"
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    return before + start + picture() + end + after


if __name__ == "__main__":
    ARCHITECTURE.write_text(drawn(ARCHITECTURE.read_text(encoding="utf-8")), encoding="utf-8")
