"""Questions and answers about the Python library of this machine, from its docstrings; needs no network.

Writes train.bin, val.bin, their marks and dataset.json beside this file.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installing the package

from nanogpt.cli import run

if __name__ == "__main__":
    folder = Path(__file__).resolve().parent
    run("prepare", [folder.name, f"--data_dir={folder.parent}", *sys.argv[1:]])
