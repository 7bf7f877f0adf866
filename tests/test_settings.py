from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from nanogpt.errors import ConfigError
from nanogpt.programs import RunsConfig
from nanogpt.settings import Settings, convert, help_text, out_of_range, override_globals, parse


@dataclass
class Example(Settings):
    """An example."""

    # --- first ---
    out_dir: str = "out"  # where it goes
    steps: int = 10  # how many
    # and a second line
    rate: float = 0.5

    # --- second ---
    fast: bool = False  # hurry
    compile: bool | Literal["auto"] = "auto"
    kind: Literal["red", "green"] = "red"
    start: str = "\n"

    def problems(self) -> Iterator[str]:
        yield from out_of_range(self, ">= 1", "steps")


def read(*words: str) -> Example:
    return parse(Example, words, "usage")


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--rate=1"], "rate", 1.0),
        (["--rate=1e-3"], "rate", 1e-3),
        (["--rate", "2"], "rate", 2.0),
        (["--rate", "-2"], "rate", -2.0),
        (["--steps=1e3"], "steps", 1000),
        (["--steps=1_000"], "steps", 1000),
        (["--steps=9007199254740993"], "steps", 9007199254740993),
        (["--start=a=b"], "start", "a=b"),
        (["--start=123"], "start", "123"),
        (["--start="], "start", ""),
        (["--start=--x"], "start", "--x"),
        (["--out-dir=x"], "out_dir", "x"),
        (["runs/a"], "out_dir", "runs/a"),
        (["--fast"], "fast", True),
        (["--fast", "no"], "fast", False),
        (["--fast=False"], "fast", False),
        (["--fast=0"], "fast", False),
        (["--fast", "runs/a"], "out_dir", "runs/a"),
        (["--compile=False"], "compile", False),
        (["--compile"], "compile", True),
        (["--compile", "auto"], "compile", "auto"),
        (["--kind=green"], "kind", "green"),
        (["--steps=1", "--steps=2"], "steps", 2),
    ],
)
def test_command_line_says_what_a_person_expects(words: list[str], name: str, value: object) -> None:
    found = getattr(read(*words), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--stepps=3", "--stepps=3: there is no setting 'stepps'; did you mean steps?"),
        ("--zzz=3", "there is no setting 'zzz'; --help lists all settings"),
        ("--steps=x", "--steps=x: expected a whole number"),
        ("--steps=1.5", "--steps=1.5: expected a whole number"),
        ("--steps=inf", "expected a whole number"),
        ("--steps=0", "steps=0: expected a value >= 1"),
        ("--steps", "--steps: a value is missing"),
        ("--rate=nan", "--rate=nan: expected a number"),
        ("--fast=maybe", "--fast=maybe: expected True or False"),
        ("--compile=always", "--compile=always: expected True or False or auto"),
        ("--kind=gren", "--kind=gren: expected red, green; did you mean green?"),
        ("-steps=3", "options begin with two dashes"),
        ("here/steps", "here/steps: did you mean the config file here/steps.py? If not, --out_dir=here/steps"),
        ("here/recipe", "here/recipe: out_dir is a folder, this a file; config files end in .py"),
        ("here/ckpt.pt", "here/ckpt.pt: out_dir is a folder, this a file; checkpoints go into --init_from"),
        ("missing.py", "there is no config file missing.py"),
        ("here/stepz.py", "there is no config file here/stepz.py; did you mean here/steps.py?"),
        ("steps=3", "steps=3: options begin with two dashes: --steps=3"),
    ],
)
def test_a_mistake_is_named(word: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "steps.py").touch()
    (tmp_path / "here" / "recipe").touch()
    with pytest.raises(ConfigError) as caught:
        read(word)
    assert message in str(caught.value)


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        read("--stepps=3", "--rate=x", "--steps=0", "missing.py", "also_missing.py")
    assert str(caught.value).count("\n  - ") == 5


def test_precedence_is_defaults_then_files_then_command_line(tmp_path: Path) -> None:
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text("steps = 20\nrate = 2")
    two.write_text("rate = rate * steps / 10")
    config = read("--steps=7", str(one), str(two))
    assert (config.steps, config.rate, config.start) == (7, 4.0, "\n")


def test_config_files_may_import_and_define_helpers(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("import time\nfrom math import sqrt\ndef f(x): return 2 * x\n_n = 8\nsteps = f(_n)\nrate = sqrt(4)")
    assert (read(str(file)).steps, read(str(file)).rate) == (16, 2.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepps = 3", "a.py: stepps = 3: there is no setting 'stepps'; did you mean steps?"),
        (
            "n = 3",
            "a.py: n = 3: there is no setting 'n'; --help lists all settings (a variable of the file's own begins "
            "with _: _n)",
        ),
        ("steps = 'many'", "a.py: steps = 'many': expected a whole number"),
        ("fast = 1", "a.py: fast = 1: expected True or False"),
        ("start = 3", "a.py: start = 3: expected text"),
        ("steps = True", "expected a whole number"),
        ("steps = = 3", "a.py: SyntaxError"),
        ("\nsteps = undefined", "a.py, line 2: NameError"),
        ("exit()", "a.py, line 1: SystemExit"),
    ],
)
def test_a_mistake_in_a_config_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "a.py"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read(str(file))
    assert message in str(caught.value)


def test_help_shows_every_field_with_its_default_and_comment(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        read("--steps=3", "--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text == help_text(Example, "usage") + "\n"
    for piece in (
        "An example.",
        "variables begin with _",
        "first:",
        "--steps=10",
        "how many and a second line",
        r"--start='\n'",
        "hurry",
    ):
        assert piece in text


def test_convert_keeps_numbers_of_a_config_file_exact() -> None:
    assert convert(2**60 + 1, int) == 2**60 + 1
    assert convert(3, float) == 3.0


def test_configurator_overrides_the_globals_of_a_script(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("'Mine.'\nrate = 2\nhelper = 3")
    variables: dict[str, object] = {"steps": 1, "rate": 0.1, "name": "x", "on": True, "_hidden": 1, "os": pytest}
    variables["__doc__"] = "A script."
    override_globals(variables, [str(file), "--steps=5", "--name=7", "--on=False"])
    del variables["__builtins__"]
    assert variables.pop("__doc__") == "A script."
    expected = {"steps": 5, "rate": 2, "name": "7", "on": False, "_hidden": 1, "os": pytest, "helper": 3}
    assert variables == expected
    with pytest.raises(ConfigError, match="did you mean steps"):
        override_globals(variables, ["--step=5"])


def test_configurator_overrides_tuples_and_lists(capsys: pytest.CaptureFixture[str]) -> None:
    variables: dict[str, object] = {"betas": (0.9, 0.95), "layers": [1], "others": [pytest]}
    override_globals(variables, ["--betas=(0.8, 0.99)", "--layers", "[2, 3]"])
    assert variables == {"betas": (0.8, 0.99), "layers": [2, 3], "others": [pytest], "__doc__": None}
    for word in ("--betas=[1, 2]", "--betas=0.9, 0.95)", "--others=[1]"):
        with pytest.raises(ConfigError, match=r"expected a tuple, such as \(1, 2\)|no setting 'others'"):
            override_globals(variables, [word])
    with pytest.raises(SystemExit):
        override_globals(variables, ["--help"])
    text = capsys.readouterr().out
    assert "--layers=[2, 3]" in text
    assert "Script(" not in text  # what a dataclass says of itself


@dataclass
class Listing(Settings):
    """With a list."""

    name: str = ""  # what
    input: list[str] = field(default_factory=list)  # which


@pytest.mark.parametrize(
    ("words", "name", "expected"),
    [(["x", "--input=a"], "x", ["a"]), (["x", "--input=a", "--input=b"], "x", ["a", "b"]),
     (["x", "--input", "a.py", "b", "--name=y"], "y", ["a.py", "b"]), (["--input=a", "x"], "x", ["a"]),
     (["x"], "x", [])],
)  # fmt: skip
def test_a_list_is_repeated_or_written_in_a_row(words: list[str], name: str, expected: list[str]) -> None:
    config = parse(Listing, words, "usage", positional="name")
    assert (config.name, config.input) == (name, expected)


def test_the_command_lines_list_replaces_that_of_a_file() -> None:
    Path("c.py").write_text("input = ['from', 'file']")
    assert parse(Listing, ["c.py"], "usage", positional="name").input == ["from", "file"]
    assert parse(Listing, ["c.py", "--input=x"], "usage", positional="name").input == ["x"]
    Path("c.py").write_text("input = [1]")
    with pytest.raises(ConfigError, match="expected text, or a list of texts"):
        parse(Listing, ["c.py"], "usage", positional="name")


def test_a_run_may_be_named_like_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config").mkdir()
    Path("config/mine.py").touch()
    with pytest.raises(ConfigError, match=r"mine: did you mean the config file config/mine\.py\?"):
        parse(RunsConfig, ["mine"], "usage", positional="folder")
    Path("mine").mkdir()
    assert parse(RunsConfig, ["mine"], "usage", positional="folder").folder == "mine"


def test_two_words_for_one_setting_are_one_too_many() -> None:
    with pytest.raises(ConfigError, match="y: name is x already, and takes one; did you mean --input=y"):
        parse(Listing, ["x", "y"], "usage", positional="name")
    with pytest.raises(ConfigError, match="--input: a value is missing"):
        parse(Listing, ["x", "--input"], "usage", positional="name")
