"""The page of benchmarks is made of their results, and nothing else on it changes."""

import importlib.util
import json
import sys
from types import ModuleType

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_all", ROOT / "benchmarks" / "all.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def record(seconds: float, date: str = "2026-01-02") -> dict[str, object]:
    result = {"shape": "small", "shares": [seconds / 100, 0.02, 0.03]}
    return {"benchmark": "records", "date": date, "machine": "a machine", "seconds": 7.2, "result": result}


def test_the_tables_between_the_marks_are_rewritten(bench: ModuleType) -> None:
    page = "before\n<!-- bench:records -->\nold\n<!-- end -->\nafter <!-- bench:data -->\nkept\n<!-- end -->\n"
    once = bench.rewritten(page, [record(1)])
    assert once.startswith("before\n<!-- bench:records -->\n| shape |")
    assert "| small | 2.00 (1.00 to 3.00) |" in once
    assert "2026-01-02, a machine; `python benchmarks/records.py --rounds=5`, 7 s" in once
    assert once.endswith("<!-- end -->\nafter <!-- bench:data -->\nkept\n<!-- end -->\n")
    assert "old" not in once
    assert bench.rewritten(once, [record(1)]) == once
    assert "2.50 (2.00 to 3.00)" in bench.rewritten(page, [record(1), record(2.5)])


def test_a_page_without_the_mark_is_refused(bench: ModuleType) -> None:
    with pytest.raises(SystemExit, match="bench:records"):
        bench.rewritten("nothing", [record(1)])


def test_the_page_shows_the_newest_results(bench: ModuleType) -> None:
    """Nobody has written figures by hand, and every benchmark has a place."""
    page = bench.PAGE.read_text("utf-8")
    assert all(f"<!-- bench:{name} -->" in page for name in bench.BENCHMARKS)
    records = [json.loads(line) for line in bench.RESULTS.read_text("utf-8").splitlines()]
    assert bench.rewritten(page, records) == page


def test_an_unknown_benchmark_is_refused(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["all.py", "--only=speed"])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    assert stop.value.code == 2
    assert "no benchmark speed; there are throughput" in capsys.readouterr().err


def test_what_needs_the_original_says_so(bench: ModuleType) -> None:
    assert "--original=FOLDER" in bench.why_not(bench.BENCHMARKS["throughput"], None)
    assert not bench.why_not(bench.BENCHMARKS["records"], None)
