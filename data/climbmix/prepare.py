"""ClimbMix in GPT-2's tokens: 400 billion tokens, shuffled, so that its beginning is a sample of all.

Writes train.bin (about 800 GB), val.bin and dataset.json beside this file: take a part, as with --limit=1000000.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installing the package

from nanogpt.cli import run

if __name__ == "__main__":
    folder = Path(__file__).resolve().parent
    run("prepare", [folder.name, f"--data_dir={folder.parent}", *sys.argv[1:]])
