"""TinyStories in GPT-2's tokens: short stories by GPT-4, on which even tiny models learn to tell some.

Writes train.bin (about 1 GB), val.bin and dataset.json beside this file. For a first look: --limit=10000.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installing the package

from nanogpt.cli import run

if __name__ == "__main__":
    folder = Path(__file__).resolve().parent
    run("prepare", [folder.name, f"--data_dir={folder.parent}", *sys.argv[1:]])
