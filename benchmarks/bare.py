"""What a benchmark needs on a machine where nothing is installed but torch and numpy: this checkout, and data.

Importing it first makes `import nanogpt` mean this checkout, here and in every process that is started from here.
"""

import json
import os
import random
import sys
import sysconfig
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def random_ids(vocab_size: int, count: int = 1_000_000) -> np.ndarray[tuple[int], np.dtype[np.uint16]]:
    """Return `count` token ids below `vocab_size` and within GPT-2's vocabulary, which models pad to 50,304."""
    return np.random.default_rng(0).integers(min(vocab_size, 50257), size=count, dtype=np.uint16)


def python_sources(folder: Path, megabytes: int = 100) -> Path:
    """Write the bytes of this machine's Python sources as a data set, in a few seconds, and return its folder."""
    paths = {path for name in ("stdlib", "purelib") for path in Path(sysconfig.get_path(name)).rglob("*.py")}
    shuffled = sorted(paths)
    random.Random(0).shuffle(shuffled)
    folder.mkdir(parents=True)
    tokens = {"train": 0, "val": 0}
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        for n, path in enumerate(shuffled):
            ids = np.frombuffer(path.read_bytes(), np.uint8).astype("<u2")
            split, file = ("val", val) if n % 20 == 0 else ("train", train)
            file.write(ids.tobytes() + np.array([256], "<u2").tobytes())  # 256 ends a document
            tokens[split] += len(ids) + 1
            if sum(tokens.values()) > megabytes * 1e6:
                break
    description = {"version": 1, "dtype": "uint16", "tokenizer": {"kind": "byte"}, "tokens": tokens}
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder
