"""FineWeb-Edu in GPT-2's tokens: 10 billion tokens of web pages that teach, HuggingFaceFW's sample-10BT.

Writes train.bin (about 20 GB), val.bin and dataset.json beside this file. For a first look: --limit=10000.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installing the package

from nanogpt.cli import run

if __name__ == "__main__":
    folder = Path(__file__).resolve().parent
    run("prepare", [folder.name, f"--data_dir={folder.parent}", *sys.argv[1:]])
