"""From the words of a command line to the settings of a program, and to the program itself.

Defaults < config files < command line. Programs are imported when they run: --help and mistakes answer without torch.
"""

import argparse
import builtins
import difflib
import gc
import inspect
import logging
import os
import pkgutil
import re
import sys
import textwrap
import traceback
import types
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from nanogpt import __version__, config, settings
from nanogpt.errors import ConfigError, UserError
from nanogpt.metrics import show_log_lines

Config = TypeVar("Config", bound=config.Settings)
Class = type[config.Settings]
Values = dict[str, Any]
log = logging.getLogger(__name__)

# verb: its settings, its program, the setting that a word without dashes sets
VERBS: dict[str, tuple[Class, str, str]] = {
    "prepare": (settings.PrepareConfig, "nanogpt.prepare:prepare", "name"),
    "train": (config.TrainConfig, "nanogpt.train:train", "out_dir"),
    "sample": (settings.SampleConfig, "nanogpt.sample:sample", "out_dir"),
    "chat": (settings.ChatConfig, "nanogpt.chat:chat", "out_dir"),
    "serve": (settings.ServeConfig, "nanogpt.serve:serve", "out_dir"),
    "eval": (settings.EvalConfig, "nanogpt.evaluate:evaluate", "out_dir"),
    "export": (settings.ExportConfig, "nanogpt.export:export", "out_dir"),
    "bench": (settings.BenchConfig, "nanogpt.bench:bench", ""),
    "plan": (settings.PlanConfig, "nanogpt.plan:plan", "out_dir"),
    "plot": (settings.PlotConfig, "nanogpt.plot:plot", "out_dir"),
    "runs": (settings.RunsConfig, "nanogpt.plot:list_runs", "folder"),
    "inspect": (settings.InspectConfig, "nanogpt.inspect:inspect", "out_dir"),
}
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def parse(cls: type[Config], arguments: Sequence[str], usage: str, positional: str = "out_dir") -> Config:
    """Return the config that `[config.py …] [word] [--key=value | --key value | --flag] …` describes.

    positional: what a word without dashes sets. --help prints and exits. Raises `ConfigError` with all problems.
    """
    if "--help" in arguments or "-h" in arguments:
        print(help_text(cls, usage), flush=True)
        sys.exit(0)
    problems: list[str] = []
    values = asdict(cls())
    files, options = _read_words(cls, arguments, positional, problems)
    for file in files:
        found = _run_config_file(file, values, problems)
        if cls is settings.SampleConfig:  # It takes the recipe of a training run, and samples from that run.
            ignored = [name for name in found if name not in values and hasattr(config.TrainConfig, name)]
            if ignored:
                ignored += ["init_from"] * ("init_from" in found)
                log.info(f"{file}: ignored, for training only: {', '.join(ignored)}")
            found = {name: value for name, value in found.items() if name not in ignored}
        _assign(cls, values, found, file, problems)
    _assign(cls, values, options, "", problems)
    result = cls(**values)
    problems = list(dict.fromkeys([*problems, *result.problems()]))
    if problems:
        raise ConfigError("\n  - ".join(["these settings cannot work:", *problems]) if problems[1:] else problems[0])
    return result


def _read_words(cls: Class, arguments: Sequence[str], positional: str, problems: list[str]) -> tuple[list[str], Values]:
    """Return the config files on a command line, and for each option its text, or for a list its texts."""
    hints = get_type_hints(cls)
    # No value is required or converted here, because argparse would exit at the first mistake.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    flags, values = set(), (*_BOOLEANS, "auto")
    for name, hint in hints.items():
        names = {f"--{name}", f"--{name.replace('_', '-')}"}
        flags |= names if bool in (hint, *get_args(hint)) else set()
        many: dict[str, Any] = {"nargs": "*", "action": "extend"} if get_origin(hint) is list else {"nargs": "?"}
        parser.add_argument(*names, dest=name, **many)
    # A flag gets a value here, so that argparse does not take the file in `--eval_only config/a.py` for one.
    pairs = zip(arguments, [*arguments[1:], ""], strict=False)
    words = [f"{word}=True" if word in flags and after.lower() not in values else word for word, after in pairs]
    known, others = parser.parse_known_args(words)
    options, files = vars(known), []
    for word in others:
        name, equals, text = word.partition("=")
        if word.startswith("-"):
            options[name.removeprefix("--")] = text  # There is no such setting, as _assign reports.
        elif word.endswith(".py"):
            files.append(word)
        elif positional in hints and not (equals and name in hints):
            is_text = issubclass(cls, config.TrainConfig) and not os.path.isdir(word)
            key = "text" if is_text and (os.path.isfile(word) or word.endswith((".txt", ".md"))) else positional
            kinds = {path.suffix for path in Path(word).glob("*")}
            if cls is config.TrainConfig and kinds & {".txt", ".md"} and not kinds & {".json", ".jsonl", ".pt"}:
                problems.append(
                    f"{word} is a folder of texts: nanogpt prepare NAME --input={word}, then --dataset=NAME"
                )
            is_list = get_origin(hints[key]) is list
            if key in options and not is_list:
                problems.append(f"{word}: {key} is {options[key]} already, and takes one value")
            options[key] = [*options.get(key, []), word] if is_list else word
        else:
            problems.append(f"{word}: expected config files (*.py) and --key=value only")
    for name in [name for name, text in options.items() if text in (None, [])]:
        problems.append(f"--{name}: a value is missing: --{name}=…")
        del options[name]
    return files, options


def _run_config_file(path: str, values: Values, problems: list[str]) -> Values:
    """Execute a config file in which `values` can be read, and return the variables that it assigned."""
    # Values are readable like Python's builtins, so that `names` holds only what the file assigns.
    names: dict[str, Any] = {"__builtins__": {**vars(builtins), **values}}
    try:
        exec(compile(Path(path).read_text(encoding="utf-8-sig"), path, "exec"), names)
    except (Exception, SystemExit) as error:
        lines = [f", line {each.lineno}" for each in traceback.extract_tb(error.__traceback__) if each.filename == path]
        problems.append(f"config file {path}{''.join(lines)}: {type(error).__name__}: {error}")
        return {}
    return {
        name: value
        for name, value in names.items()
        if not (name.startswith("_") or isinstance(value, types.ModuleType) or callable(value))
    }


def _assign(cls: Class, values: Values, found: Values, file: str, problems: list[str]) -> None:
    """Set values from a config file, or from the command line where `file` is empty; first what they imply."""
    hints = get_type_hints(cls)
    if issubclass(cls, config.TrainConfig):
        values |= settings.implied_settings(found, values)
    for name, value in found.items():
        try:
            if name not in hints:
                near = difflib.get_close_matches(name, hints, n=1, cutoff=0)[0]
                raise ValueError(f"there is no setting {name!r}; the nearest is {near}")
            values[name] = convert(value, hints[name])
        except ValueError as error:
            problems.append((f"{file}: {name} = {value!r}" if file else f"--{name}={value}") + f": {error}")


def convert(value: Any, hint: Any) -> Any:
    """Return `value`, text of a command line or a value of a config file, as type `hint`. Raises `ValueError`."""
    members, text = get_args(hint), str(value)
    if get_origin(hint) is list:
        return [convert(each, members[0]) for each in (value if isinstance(value, list) else [value])]
    with suppress(ValueError, OverflowError):
        if hint in (int, float):
            number = int(text) if hint is int and re.fullmatch(r"[-+]?[\d_]+", text) else float(text)
            if number == hint(number):
                return hint(number)
    if hint is bool and text.lower() in _BOOLEANS:
        return _BOOLEANS[text.lower()]
    if (hint is str and isinstance(value, str)) or (get_origin(hint) is Literal and value in members):
        return value
    for member in members if get_origin(hint) is not Literal else []:
        with suppress(ValueError):
            return convert(value, member)
    raise ValueError(f"expected {_in_words(hint)}")


def _in_words(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(get_args(hint))
    words = {str: "text", bool: "True or False", int: "a whole number", float: "a number"}
    return words.get(hint) or " or ".join(_in_words(member) for member in get_args(hint))


def help_text(cls: Class, usage: str) -> str:
    """Return what --help prints: each setting with its default and the comment behind it, by group."""
    lines = [f"usage: {usage}", "", inspect.cleandoc(cls.__doc__ or ""), ""]
    lines += ["A word that ends in .py is a config file: Python assignments; its helper variables begin with _."]
    defaults = asdict(cls())
    groups: dict[str, list[str]] = {}
    for owner in cls.__mro__[:-1]:
        title = "settings"
        source = re.sub(r"\n    # (?!---)", " ", inspect.getsource(owner))  # A comment may continue below its field.
        for heading, name, comment in re.findall(r"(?m)^    (?:# --- (.+) ---|(\w+): .+? = .+?  # (.+))$", source):
            title = heading or title
            if name in defaults:  # not yet redefined by a subclass
                default = defaults.pop(name)
                shown = " ".join(default) if isinstance(default, list) else str(default).replace("\n", r"'\n'")
                setting = f"  {f'--{name}={shown}':36}  "
                text = textwrap.fill(comment, 120, initial_indent=setting, subsequent_indent=" " * 40)
                groups.setdefault(title, []).append(text)
    return "\n".join([*lines, *(line for title, rows in groups.items() for line in ("", f"{title}:", *rows))])


def run(verb: str, arguments: Sequence[str] | None = None, program: str = "") -> None:
    """Run a program with `arguments`, by default those of this process, and exit with its code.

    Exit codes: 0 done, 2 the user's mistake, 3 diverged, 75 stopped by a signal and resumable, 130 interrupted.
    """
    cls, location, positional = VERBS[verb]
    usage = f"{program or f'python {os.path.basename(sys.argv[0])}'} [config.py …] [{positional}]".removesuffix(" []")
    show_log_lines()
    code = 2
    try:
        chosen = parse(cls, sys.argv[1:] if arguments is None else arguments, f"{usage} [--key=value …]", positional)
        show_log_lines(getattr(chosen, "verbosity", "normal"))
        result = pkgutil.resolve_name(location)(chosen)
        sys.stdout.flush()
        gc.freeze()  # spares the interpreter 0.4 s of collecting torch's modules at its end
        sys.exit(result if isinstance(result, int) else 0)
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except BrokenPipeError:  # `sample.py | head` has read enough. What is still buffered must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (UserError, OSError) as error:
        message, code = str(error), getattr(error, "exit_code", 2)
    except ModuleNotFoundError as error:
        packages = "fastapi uvicorn" if error.name in ("fastapi", "uvicorn") else error.name
        message = f"{sys.executable} lacks {packages}: pip install {packages}, or activate the environment that has it"
    except Exception as error:
        if not isinstance(error, MemoryError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        message = f"out of memory; reduce batch_size, block_size or the model, or set --gradient_checkpointing: {error}"
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def main() -> None:
    """Run `nanogpt VERB [word …] [--key=value …]`."""
    verb, *arguments = sys.argv[1:] or ["--help"]
    if verb in VERBS:
        run(verb, arguments, program=f"nanogpt {verb}")
    elif verb == "--version":
        print(f"nanogpt {__version__}")
    elif verb in ("--help", "-h", "help"):
        print("usage: nanogpt VERB [run folder or config.py …] [--key=value …]\n")
        for name, (cls, _, _) in VERBS.items():
            print(f"  {name:9} {(cls.__doc__ or '').splitlines()[0]}")
        print("\nnanogpt VERB --help lists the settings of one.")
    else:
        print(f"error: unknown verb {verb!r}; known: {', '.join(VERBS)}", file=sys.stderr)
        sys.exit(2)
