"""The program behind `nanogpt prepare`: from text to a data set folder, and a look into one."""

import logging
import shutil
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanogpt.build import build
from nanogpt.corpus import Source, files_below, source_of
from nanogpt.data import SPLITS, open_dataset
from nanogpt.documents import Reading
from nanogpt.download import shakespeare
from nanogpt.errors import ConfigError, DataError
from nanogpt.prepare_plan import Recipe
from nanogpt.programs import PrepareConfig, unescaped

log = logging.getLogger(__name__)

OPENWEBTEXT_IDS = 18.1e9  # bytes
OPENWEBTEXT_CACHE = 70e9  # bytes: 24 GB of parquet and 40 GB of Arrow that the datasets library keeps, and a margin


def standard_library() -> list[Source]:
    """The Python sources of the standard library, sorted, without tests and installed packages."""
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    root = Path(sysconfig.get_path("stdlib"))
    files = (path.relative_to(root) for path in files_below(root) if path.suffix == ".py")
    return [source_of(root / path, found=True) for path in files if not skipped.intersection(path.parts)]


# one text, its last tenth for validation, as in the original
_SHAKESPEARE = Recipe(val_fraction=0.1, end_documents=False)
# what is known by name: where its text comes from, given the folder, and how it is prepared
DATASETS: dict[str, tuple[Callable[[Path], Sequence[str | Source]], Recipe]] = {
    "pystdlib": (lambda _: standard_library(), Recipe(tokenizer="byte")),
    "shakespeare_char": (lambda folder: [str(shakespeare(folder))], replace(_SHAKESPEARE, tokenizer="char")),
    "shakespeare": (lambda folder: [str(shakespeare(folder))], _SHAKESPEARE),  # in GPT-2's tokens, for finetuning
    # 8 million web pages, 9 billion of GPT-2's tokens (Gokaslan and Cohen 2019)
    "openwebtext": (lambda _: ["Skylion007/openwebtext"], Recipe(val_fraction=0.0005)),
}
NEEDS_NO_NETWORK = {"pystdlib"}


def prepare(config: PrepareConfig) -> None:
    """Build the data set `config.name`, or describe it.

    Raises `ConfigError` for settings that can't work, `DataError` for text that can't be used.
    """
    folder = Path(config.data_dir) / config.name
    if config.describe:
        if not folder.is_dir():
            raise DataError(f"there is no data set {folder}")
        try:
            describe(folder)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{folder / 'dataset.json'} is damaged: prepare the data set again") from error
        return
    if config.name not in DATASETS and not config.input:
        raise ConfigError(
            f"no data set is known as {config.name!r}; for your own text: nanogpt prepare {config.name} --input=PATH "
            f"(known without --input: {', '.join(DATASETS)})"
        )
    if config.name == "pystdlib" and config.input:
        raise ConfigError("pystdlib reads the Python library of this machine; --input does not apply")
    if config.name == "openwebtext" and not config.input and not config.limit:
        _check_room_for_openwebtext(folder)
    text_of, recipe = DATASETS.get(config.name, (None, Recipe()))
    recipe = replace(
        recipe,
        inputs=config.input or (text_of(folder) if text_of else []),
        tokenizer=config.tokenizer or recipe.tokenizer,
        val_fraction=recipe.val_fraction if config.val_fraction == "auto" else config.val_fraction,
        reading=Reading(config.field, unescaped(config.separator)),
        limit=config.limit,
    )
    description = build(folder, recipe, config.num_proc)
    for split in SPLITS:
        count = description["documents"][split]
        log.info(
            f"{split} has {description['tokens'][split]:,} tokens" + (f" in {count:,} documents" if count > 1 else "")
        )
    for reason, count in description["skipped"].items():
        log.info(f"passed over: {count:,} ({reason})")
    print(f"wrote {folder}/train.bin, val.bin and dataset.json")


def _check_room_for_openwebtext(folder: Path) -> None:
    """Say what it takes, and refuse a download that would fill the disk."""
    import datasets

    cache = Path(datasets.config.HF_DATASETS_CACHE)
    needs: dict[int, float] = {}  # bytes on each disk
    is_cached = any(cache.glob("*openwebtext*")) or (folder / ".preparing" / "plan.json").exists()
    for path, size in ((cache, 0 if is_cached else OPENWEBTEXT_CACHE), (folder, OPENWEBTEXT_IDS)):
        disk = _existing(path).stat().st_dev
        needs[disk] = needs.get(disk, 0) + size
    log.info(f"OpenWebText takes about {OPENWEBTEXT_CACHE / 1e9:.0f} GB in {cache}")
    log.info(f"and {OPENWEBTEXT_IDS / 1e9:.0f} GB in {folder}")
    for path in (cache, folder):
        free = shutil.disk_usage(_existing(path)).free
        if free < (need := needs[_existing(path).stat().st_dev]):
            raise DataError(
                f"the disk of {path} has {free / 1e9:.0f} GB left, and {need / 1e9:.0f} GB are needed there. Name "
                "another one in the variable HF_HOME or with --data_dir, try --limit=10000, or pass a folder of its "
                "parquet or jsonl files as --input=FOLDER"
            )


def _existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def describe(folder: Path) -> None:
    """Print what a data set is, where it comes from, and the beginning of its splits in tokens."""
    dataset = open_dataset(folder)
    description: dict[str, Any] = dataset.description
    print(f"{folder}: {dataset.tokenizer}, {description.get('dtype', 'uint16')}")
    for split in SPLITS:
        line = f"{split}: {len(dataset.split(split)):,} tokens"
        if size := description.get("bytes", {}).get(split):
            line += f", {description['documents'][split]:,} documents, {size:,} bytes of text, "
            line += f"{size / len(dataset.split(split)):.2f} bytes per token"
        print(line)
    for reason, count in description.get("skipped", {}).items():
        print(f"passed over: {count:,} ({reason})")
    sources = description.get("sources", [])
    for source in sources[:5]:
        print("source: " + ", ".join(f"{key} {value}" for key, value in source.items()))
    if (more := description.get("source_files", len(sources)) - len(sources[:5])) > 0:
        print(f"and {more:,} sources more")
    for split in SPLITS:
        ids = [int(i) for i in dataset.split(split)[:24]]
        print(f"{split} begins: " + " ".join(f"{i}:{dataset.tokenizer.decode([i])!r}" for i in ids))
