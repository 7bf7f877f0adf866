# Overrides the global variables of a script that calls exec(open("configurator.py").read()) after setting them:
# `python SCRIPT.py [config/file.py …] [--key=value …]`, in the order given. A config file is executed over the globals
# and may set anything; --key=value needs a variable that exists, and a value of its type. It has no docstring, which
# would replace the script's. New programs declare their settings in nanogpt/config.py instead.

import sys
from ast import literal_eval


def _override(variables, word):
    """Apply one word of the command line. Raises ValueError."""
    if not word.startswith("--"):
        print(f"Overriding config with {word}:")
        with open(word, encoding="utf-8-sig") as file:
            source = file.read()
        print(source)
        exec(compile(source, word, "exec"), variables)
        return
    key, _, text = word[2:].partition("=")
    if key.startswith("_") or key not in variables:
        raise ValueError(f"there is no setting {key!r}")
    wanted = type(variables[key])
    try:
        value = literal_eval(text)
    except (SyntaxError, ValueError):
        value = text
    if wanted is str or (wanted is float and type(value) is int):
        value = wanted(text)
    if type(value) is not wanted:
        raise ValueError(f"expected a value of type {wanted.__name__}")
    print(f"Overriding: {key} = {value}")
    variables[key] = value


for _word in sys.argv[1:]:
    try:
        _override(globals(), _word)
    except (OSError, ValueError) as _error:
        print(f"error: {_word}: {_error}", file=sys.stderr)
        sys.exit(2)
