# For scripts that say `exec(open("configurator.py").read())` after setting their defaults as global variables.
#
# Overrides those variables from `[config/file.py …] [--key=value …]`. New programs declare a dataclass in
# nanogpt/config.py instead. No docstring: it would take the place of the script's.

import sys

from nanogpt.errors import ConfigError
from nanogpt.settings import override_globals

try:
    override_globals(globals(), sys.argv[1:])
except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
