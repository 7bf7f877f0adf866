"""Conversations about the Python library of this machine, made from its docstrings: what they say needs no network."""

import ast
import hashlib
import inspect
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

LEFT_OUT = re.compile(r"(^|\.)(_|test|idlelib|lib2to3|turtledemo|(site|dist)-packages|ensurepip|encodings|this$)")
QUESTIONS = {
    "meaning": ["What does `{}` do?", "Explain `{}`.", "What is `{}` for?", "Tell me about `{}`.", "`{}`?"],
    "call": ["How do I call `{}`?", "Show me the signature of `{}`.", "Which arguments does `{}` take?"],
    "kind": ["What kind of object is `{}`?", "Is `{}` a function, a class or a method?", "Where is `{}` defined?"],
}


def pydoc_chats() -> Iterator[list[dict[str, str]]]:
    """Yield a conversation about each public function, class and method that has a docstring, in a fixed order.

    How questions are put, and their order, depends on the object's name alone.
    """
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        if LEFT_OUT.search(module):
            continue
        tree = ast.parse(path.read_bytes())
        for node in tree.body:
            yield from chats_about(node, module, f"the module {module}")
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                for member in node.body:
                    yield from chats_about(member, f"{module}.{node.name}", f"the class {module}.{node.name}")


def chats_about(node: ast.stmt, prefix: str, owner: str) -> Iterator[list[dict[str, str]]]:
    """Yield the conversation about a definition, if it is public and its docstring begins with a short paragraph."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
        return
    meaning = " ".join(inspect.cleandoc(ast.get_docstring(node) or "").partition("\n\n")[0].split())
    if not 20 <= len(meaning) <= 300 or meaning.startswith(">>>"):
        return
    name = f"{prefix}.{node.name}"
    kind = "class" if isinstance(node, ast.ClassDef) else "function" if owner.startswith("the module") else "method"
    answers = {"meaning": meaning, "kind": f"`{node.name}` is a {kind} of {owner}."}
    if not isinstance(node, ast.ClassDef):
        answers["call"] = f"`{node.name}({ast.unparse(node.args)})`"
    draw = random.Random(hashlib.sha256(name.encode()).digest())
    messages = []
    for topic in draw.sample(sorted(answers), len(answers)):
        messages.append({"role": "user", "content": draw.choice(QUESTIONS[topic]).format(name)})
        messages.append({"role": "assistant", "content": answers[topic]})
    yield messages
