import gzip
import hashlib
import itertools
import tracemalloc
from pathlib import Path

import pytest
import zstandard

from nanogpt import corpus
from nanogpt.corpus import Source, cut, digests_of, find_sources, is_published, source_of
from nanogpt.errors import DataError
from nanogpt.prepare import standard_library


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.txt", "a.md", "sub/c.py", ".hidden", ".git/x.txt", "sub/d.jsonl.gz"):
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x" * 10)
    return tmp_path / "texts"


def names(sources: list[Source]) -> list[str]:
    return [Path(source.path).name for source in sources]


def test_files_folders_and_patterns_are_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert names(find_sources([str(folder)], 1)) == ["a.md", "b.txt", "c.py", "d.jsonl.gz"]
    assert names(find_sources([str(folder / "b.txt"), str(folder / "sub")], 1)) == ["b.txt", "c.py", "d.jsonl.gz"]
    assert names(find_sources([f"{folder}/**/*.py"], 1)) == ["c.py"]
    monkeypatch.chdir(folder)
    assert names(find_sources(["*.*"], 1)) == ["a.md", "b.txt"]
    assert [source.found for source in find_sources(["b.txt", "."], 1)] == [False, True, True, True, True]


@pytest.mark.parametrize("name", ["nothing.txt", "*.none", "empty", "~/nothing", "hf:", "/dev/zero"])
def test_what_leads_nowhere_is_named(name: str) -> None:
    Path("empty").mkdir()
    with pytest.raises(DataError, match=r"--input=.*: (there is no such file or folder|no file there|this is neither)"):
        find_sources([name], 1)


def test_names_of_published_data_sets_are_told_from_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_published("roneneldan/TinyStories")
    assert is_published("hf:wikitext:wikitext-2-raw-v1")
    assert not is_published("a/b/c.txt")
    Path("a").mkdir()
    Path("a/b").write_text("x")
    assert not is_published("a/b")


def test_a_published_data_set_is_the_files_of_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    Path("org/name").mkdir(parents=True)
    datasets.Dataset.from_dict({"text": ["one", "two"]}).to_parquet("org/name/train.parquet")
    [source] = find_sources(["hf:org/name"], 1)
    assert source.kind == "arrow"


def test_a_hub_that_cannot_be_reached_says_what_to_do_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host\nand much more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"no such file or folder, and as a data set .* \(no route to host\); give"):
        find_sources(["org/name"], 1)


@pytest.mark.parametrize(
    ("path", "kind", "packing"),
    [("a.txt", "text", ""), ("a.py", "text", ""), ("a", "text", ""), ("a.json", "text", ""), ("a.JSONL", "jsonl", ""),
     ("a.ndjson.zst", "jsonl", ".zst"), ("a.txt.gz", "text", ".gz"), ("a.parquet", "parquet", "")],
)  # fmt: skip
def test_the_name_says_what_a_file_is(path: str, kind: str, packing: str) -> None:
    assert (Source(path, 0).kind, Source(path, 0).packing) == (kind, packing)


def test_units_are_parts_of_large_files_and_groups_of_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "SPAN", 100)
    sources = [Source("a", 250), Source("b", 40), Source("c", 30), Source("d", 40), Source("e.gz", 500)]
    units = [[(span.source.path, span.start, span.stop) for span in unit] for unit in cut(sources)]
    assert units == [
        [("a", 0, 100)], [("a", 100, 200)], [("a", 200, 250), ("b", 0, 40)], [("c", 0, 30), ("d", 0, 40)],
        [("e.gz", 0, 500)],
    ]  # fmt: skip


def test_parquet_is_cut_between_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [chr(97 + n) * 1000 for n in range(20)]
    parquet.write_table(pa.table({"text": rows}), "x.parquet", row_group_size=2, compression="none")
    size = Path("x.parquet").stat().st_size
    monkeypatch.setattr(corpus, "SPAN", size // 4)
    spans = [span for unit in cut([Source("x.parquet", size)]) for span in unit]
    assert [spans[0].start, spans[-1].stop] == [0, 10]
    assert all(a.stop == b.start for a, b in itertools.pairwise(spans))
    assert len(spans) > 2


def test_digests_are_those_of_the_file_and_of_what_is_packed_in_it() -> None:
    Path("x").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert digests_of(Source("x", 3)) == (digest, digest)
    Path("x.gz").write_bytes(gzip.compress(b"abc"))
    packed, content = digests_of(Source("x.gz", 3))
    assert (packed, content) == (hashlib.sha256(Path("x.gz").read_bytes()).hexdigest(), digest)
    with pytest.raises(DataError, match="cannot read nothing"):
        digests_of(Source("nothing", 3))


def test_the_standard_library_is_large_sorted_and_without_tests() -> None:
    sources = standard_library()
    assert [source.path for source in sources] == sorted(source.path for source in sources)
    assert "argparse.py" in names(sources)
    assert not any("test" in Path(source.path).parts for source in sources)
    assert sum(source.size for source in sources) > 9_000_000


def test_what_is_packed_tightly_is_unpacked_piece_by_piece() -> None:
    Path("a.txt.zst").write_bytes(zstandard.compress(b"a" * 10**8))
    tracemalloc.start()
    _, digest = digests_of(source_of(Path("a.txt.zst")))
    assert tracemalloc.get_traced_memory()[1] < 80 * 2**20
    tracemalloc.stop()
    assert digest == hashlib.sha256(b"a" * 10**8).hexdigest()
