"""From words on a command line to a typed config, and from a config to its `--help`.

A config is a dataclass derived from `Settings`. Its fields' comments are their help texts; a line
`# --- title ---` starts a group. Order of precedence: defaults < config files < command line. No torch here,
so that `--help` answers at once.
"""

import ast
import builtins
import dataclasses
import difflib
import inspect
import math
import re
import shutil
import sys
import textwrap
import traceback
import types
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from nanogpt.errors import ConfigError


@dataclass
class Settings:
    """What all configs share: they can say what is wrong with them."""

    @classmethod
    def implied(cls, name: str, value: object, before: object) -> dict[str, Any]:
        """What setting `name` to `value` sets as well, before anything else that is said in the same place."""
        return {}

    @classmethod
    def passed_over(cls, names: Collection[str]) -> set[str]:
        """Which of the names that a config file sets are another program's."""
        return set()

    def problems(self) -> Iterator[str]:
        """Everything that is inconsistent, one sentence each."""
        return iter(())


Config = TypeVar("Config", bound=Settings)


def parse(
    cls: type[Config],
    arguments: Sequence[str],
    usage: str,
    *,
    positional: str = "out_dir",
    notes: list[str] | None = None,
) -> Config:
    """Build a config from `[config.py …] [--key=value | --key value | --flag] …`.

    `positional` names the field that a bare word sets which is not a config file. Config files apply first, in
    their order, then the command line, wherever it stands. `--help` prints and exits. `notes` takes what is to be
    logged when that can be done.

    Raises `ConfigError` with all problems at once: unknown names, wrong types, values out of range.
    """
    if any(argument in ("--help", "-h") for argument in arguments):
        print(help_text(cls, usage, positional))
        sys.exit(0)
    problems: list[str] = []
    files, settings = _split_arguments(cls, arguments, positional, problems)
    values = dataclasses.asdict(cls())
    for file in files:
        _run_config_file(cls, file, values, problems, [] if notes is None else notes)
    _assign(cls, values, {name: (value, f"--{name}={value}") for name, value in settings.items()}, problems)
    config = cls(**values)
    problems.extend(config.problems())
    if problems:
        raise ConfigError("\n  - ".join(["these settings cannot work:", *problems]) if problems[1:] else problems[0])
    return config


def _split_arguments(
    cls: type[Config], arguments: Sequence[str], positional: str, problems: list[str]
) -> tuple[list[str], dict[str, Any]]:
    """Sort the words of a command line into config files and settings: the last text of each, of a list all."""
    # Not argparse: it stops at the first mistake, and takes the file in `--eval_only config/a.py` for a value.
    hints = get_type_hints(cls)
    files: list[str] = []
    settings: dict[str, Any] = {}
    words = list(arguments)

    def note(name: str, text: str) -> None:
        settings[name] = [*settings.get(name, []), text] if hints.get(name) == list[str] else text

    while words:
        word = words.pop(0)
        if not word.startswith("-") or word == "-":
            if word.endswith(".py"):
                files.append(word)
            elif not Path(word).is_dir() and (
                found := [p for p in (f"{word}.py", f"config/{word}.py") if Path(p).is_file()]
            ):
                other = f" If not, --{positional}={word}" if positional in hints else ""
                problems.append(f"{word}: did you mean the config file {found[0]}?{other}")
            elif word.partition("=")[0] in hints:
                problems.append(f"{word}: options begin with two dashes: --{word}")
            elif positional not in hints:
                problems.append(f"{word}: expected config files (*.py) and --key=value only")
            elif positional in ("out_dir", "folder") and (word.endswith(".pt") or Path(word).is_file()):
                what = "checkpoints go into --init_from" if word.endswith(".pt") else "config files end in .py"
                problems.append(f"{word}: {positional} is a folder, this a file; {what}")
            elif (first := settings.get(positional)) is not None and hints[positional] is str:
                other = f"; did you mean --input={word}?" if "input" in hints else "; options begin with --"
                problems.append(f"{word}: {positional} is {first} already, and takes one{other}")
            else:
                note(positional, word)
            continue
        name, equals, text = word.lstrip("-").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--"):
            problems.append(f"{word}: options begin with two dashes: --{name}=…")
        elif equals:
            note(name, text)
        elif hints.get(name) == list[str] and words and not words[0].startswith("--"):
            while words and not words[0].startswith("--"):
                note(name, words.pop(0))
        elif bool in (hints.get(name), *get_args(hints.get(name))):
            is_value = bool(words) and words[0].lower() in (*_BOOLEANS, "auto")
            note(name, words.pop(0) if is_value else "True")
        elif name in hints and words and not words[0].startswith("--"):
            note(name, words.pop(0))
        elif name in hints:
            problems.append(f"--{name}: a value is missing: --{name}=…")
        else:
            problems.append(_unknown(cls, name, word))
    return files, settings


def _run_config_file(
    cls: type[Config], path: str, values: dict[str, Any], problems: list[str], notes: list[str]
) -> None:
    """Execute a config file with the values set so far, and take over what it assigned."""
    if not Path(path).is_file():
        there = [str(each) for folder in {Path(path).parent, Path("config")} for each in sorted(folder.glob("*.py"))]
        near = difflib.get_close_matches(path, there, n=1)
        problems.append(f"there is no config file {path}" + (f"; did you mean {near[0]}?" if near else ""))
        return
    # the values can be read like Python's own functions, and what is assigned lies in `names` alone
    names: dict[str, Any] = {"__builtins__": {**vars(builtins), **values}}
    try:
        exec(compile(Path(path).read_text(encoding="utf-8"), path, "exec"), names)
    except (Exception, SystemExit) as error:  # a config file is a program: anything can go wrong in it
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        where = f", line {lines[-1]}" if lines else ""
        problems.append(f"config file {path}{where}: {type(error).__name__}: {error}")
        return
    settings = {
        name: (value, f"{path}: {name} = {value!r}")
        for name, value in names.items()
        if not (name.startswith("_") or isinstance(value, types.ModuleType) or callable(value))
    }
    if others := cls.passed_over(settings):
        notes.append(
            f"{path}: passed over, not for this program: {', '.join(name for name in settings if name in others)}"
        )
    _assign(cls, values, {name: each for name, each in settings.items() if name not in others}, problems)


def _assign(
    cls: type[Config], values: dict[str, Any], settings: dict[str, tuple[object, str]], problems: list[str]
) -> None:
    """Set values, each given with the place it stands at, or say what is wrong with them."""
    hints = get_type_hints(cls)
    for name, (value, _) in settings.items():
        values |= cls.implied(name, value, values.get(name))
    for name, (value, where) in settings.items():
        if name not in hints:
            problems.append(_unknown(cls, name, where))
            continue
        try:
            values[name] = convert(value, hints[name])
        except ValueError as error:
            problems.append(f"{where}: {error}")


def _unknown(cls: type[Config], name: str, where: str) -> str:
    nearest = difflib.get_close_matches(name, get_type_hints(cls), n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]}?" if nearest else "; --help lists all settings"
    helper = "" if where.startswith("-") else f" (a variable of the file's own begins with _: _{name})"
    return f"{where}: there is no setting {name!r}{hint}{helper}"


_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def convert(value: object, hint: Any) -> Any:
    """`value` as the type `hint`: text from a command line is read, a value from a config file is checked.

    Raises `ValueError` with what was expected.
    """
    if get_origin(hint) in (Union, types.UnionType):
        expected = []
        for member in get_args(hint):
            try:
                return convert(value, member)
            except ValueError as error:
                expected.append(str(error).removeprefix("expected "))
        raise ValueError(f"expected {' or '.join(expected)}")
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        if value in choices:
            return value
        nearest = difflib.get_close_matches(str(value), choices, n=1)
        raise ValueError(f"expected {', '.join(choices)}" + (f"; did you mean {nearest[0]}?" if nearest else ""))
    if hint == list[str]:
        values = [value] if isinstance(value, str) else value
        if isinstance(values, list) and all(isinstance(item, str) for item in values):
            return values
        raise ValueError("expected text, or a list of texts")
    if hint is str:
        if isinstance(value, str):
            return value
        raise ValueError("expected text")
    if hint is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in _BOOLEANS:
            return _BOOLEANS[value.lower()]
        raise ValueError("expected True or False")
    if hint in (tuple, list):  # of a script with the old configurator
        with suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value) if isinstance(value, str) else value
        if isinstance(value, hint):
            return value
        raise ValueError(f"expected a {hint.__name__}, such as {hint((1, 2))}")
    assert hint in (int, float), hint
    kind = "a whole number" if hint is int else "a number"
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"expected {kind}")
    try:
        if hint is int and isinstance(value, str) and not re.search(r"[.eE]", value):
            return int(value)  # exact, also beyond 2**53
        number = float(value) if hint is float or isinstance(value, str) else value
    except (ValueError, OverflowError):
        raise ValueError(f"expected {kind}") from None
    if not math.isfinite(number) or (hint is int and number != int(number)):
        raise ValueError(f"expected {kind}{'' if hint is int else ' that is finite'}")
    return hint(number)


def out_of_range(config: object, bound: str, names: str) -> Iterator[str]:
    """A sentence for each of the blank-separated `names` whose value is not `bound`: `>= N` or `in [0, 1)`."""
    for name in names.split():
        value = getattr(config, name)
        good = 0 <= value < 1 if bound == "in [0, 1)" else value >= float(bound.removeprefix(">= "))
        if not good:
            yield f"{name}={value}: expected a value {bound}"


# ---------------------------------------------------------------------------------------------------
# From a config to text


def help_text(cls: type[Config], usage: str, positional: str = "out_dir") -> str:
    """What `--help` prints: each field with its default and the comment behind it, by group."""
    lines = [f"usage: {usage}", "", inspect.cleandoc(cls.__doc__ or "")]
    lines += ["", "A word that ends in .py is a config file: Python assignments; its own variables begin with _."]
    hints = get_type_hints(cls)
    if positional in hints:
        lines[-1] += f" Any other word without dashes sets {positional}."
    width = max(80, min(120, shutil.get_terminal_size().columns))
    groups: dict[str, list[str]] = {}
    defaults = dataclasses.asdict(cls())
    for owner in cls.__mro__[:-1]:
        for title, name, comment in _commented_fields(owner):
            if name not in defaults:
                continue  # a subclass has said it better
            default = defaults.pop(name)
            shown = repr(default) if default in ("", "\n") else default
            if hints[name] == list[str]:
                shown = " ".join(default) or "… …"
            setting = f"--{name}={shown}"
            text = textwrap.wrap(comment, width - 40) or [""]
            rows = [f"  {setting:36}  {text[0]}", *(" " * 40 + line for line in text[1:])]
            groups.setdefault(title, []).extend(row.rstrip() for row in rows)
    for title, rows in groups.items():
        lines += ["", f"{title}:", *rows]
    return "\n".join(lines)


def _commented_fields(cls: type) -> Iterator[tuple[str, str, str]]:
    """`(group, name, comment)` of each field that stands in the source of the class itself."""
    title, name, comment = "settings", "", ""
    try:
        source = inspect.getsource(cls).splitlines()
    except (OSError, TypeError):  # made at run time, for a script with the old configurator
        source = [f"    {field.name}: … = …" for field in dataclasses.fields(cls)]
    for line in [*source, "    # --- end ---"]:
        heading = re.match(r"    # --- (.+) ---$", line)
        field = re.match(r"    (\w+): .+? = .+?(?:  # (.+))?$", line)
        if (heading or field) and name:
            yield title, name, comment
            name = ""
        if heading:
            title = heading[1]
        elif field:
            name, comment = field[1], field[2] or ""
        elif name and (more := re.match(r"    # (.+)$", line)):
            comment += " " + more[1]


def override_globals(variables: dict[str, Any], arguments: Sequence[str]) -> None:
    """Serve scripts that `exec` configurator.py: override their own globals from files and `--key=value`.

    Files are executed over the globals and may set anything. On the command line, names that hold a bool, int,
    float or str, or a tuple or list of them, can be set, each to its own type. Raises `ConfigError` with all problems.
    """
    files = [word for word in arguments if word.endswith(".py") and not word.startswith("-")]
    docstring = variables.get("__doc__")
    for file in files:
        print(f"Overriding config with {file}")
        try:
            exec(compile(Path(file).read_text(encoding="utf-8"), file, "exec"), variables)
        except OSError as error:
            raise ConfigError(f"cannot read config file {file}: {error.strerror}") from error
    variables["__doc__"] = docstring  # of the script, not of a config file
    fields = [
        (name, type(value), dataclasses.field(default_factory=partial(copy, value)))
        for name, value in variables.items()
        for parts in [value if type(value) in (tuple, list) else [value]]
        if not name.startswith("_") and all(type(part) in (bool, int, float, str) for part in parts)
    ]
    namespace = {"__doc__": docstring or "Overrides the script's own variables."}
    script = dataclasses.make_dataclass("Script", fields, bases=(Settings,), namespace=namespace)
    words = [word for word in arguments if word not in files]
    config: Settings = parse(script, words, "python SCRIPT.py [config.py …] [--key=value …]")
    for name, value in vars(config).items():
        if value != variables[name]:
            print(f"Overriding: {name} = {value}")
            variables[name] = value
