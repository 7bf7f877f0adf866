"""OpenWebText in GPT-2's tokens: 9 billion for training, 4 million for validation.

Writes train.bin (18 GB), val.bin and dataset.json beside this file. For a first look: --limit=10000. From parquet
or jsonl files that are here already: --input=FOLDER.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without installing the package

from nanogpt.cli import run

if __name__ == "__main__":
    folder = Path(__file__).resolve().parent
    run("prepare", [folder.name, f"--data_dir={folder.parent}", *sys.argv[1:]])
