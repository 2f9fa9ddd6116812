import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ganglion.bench.compare import compare, read
from ganglion.bench.report import (
    BENCHES,
    CLAIMS,
    TITLES,
    claims_table,
    fill,
    plot_name,
    results_page,
    trace_table,
)
from ganglion.bench.result import BenchResult, Plot, percentiles, read_all, write
from ganglion.errors import GanglionError


def result(**metrics: float) -> BenchResult:
    return BenchResult(
        name="wire",
        metrics=metrics
        or {"overhead_p50_ms": 0.4, "overhead_p99_ms": 4.5, "openpi_overhead_p50_ms": 0.8},
        detail={"samples": np.arange(3), "note": "measured beside a training run"},
        n=np.int64(2000),
        seed=7,
        plots=(Plot(title="t", x_label="x", y_label="y", x=(1.0, 2.0), series={"a": (1.0, 3.0)}),),
    )


def test_a_written_result_is_a_claim(tmp_path: Path) -> None:
    path = write(result(), tmp_path / "results", command="ganglion bench wire")
    document = json.loads(path.read_text())
    assert path.name == "wire.json"
    for key in ("commit", "hardware", "command", "seed", "n", "metrics", "detail", "date"):
        assert document[key] not in (None, ""), key
    assert document["hardware"]["num_cores"] >= 1
    assert document["n"] == 2000
    assert document["detail"]["samples"] == [0, 1, 2]
    assert document["versions"]["numpy"] == np.__version__
    assert read_all(tmp_path / "results") == [document]


def test_a_figure_that_is_no_number_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(GanglionError, match="not finite"):
        write(result(overhead_p50_ms=float("nan")), tmp_path, command="x")
    with pytest.raises(TypeError, match="cannot go into a result"):
        write(
            BenchResult(name="wire", metrics={"a": 1}, detail={"a": {1, 2}}, n=1, seed=0),
            tmp_path,
            command="x",
        )
    assert list(tmp_path.iterdir()) == []


def test_a_plot_needs_a_value_a_point() -> None:
    with pytest.raises(ValueError, match="'a' has 1 of 2 points"):
        Plot(title="t", x_label="x", y_label="y", x=(1.0, 2.0), series={"a": (1.0,)})


def test_percentiles_name_their_unit() -> None:
    found = percentiles(range(101), prefix="latency_{}_ms")
    assert found["latency_p50_ms"] == 50
    assert found["latency_p99_ms"] == 99
    assert found["latency_max_ms"] == 100
    with pytest.raises(ValueError, match="no samples"):
        percentiles([], prefix="latency_{}_ms")


def documents(folder: Path) -> list[dict[str, Any]]:
    write(result(), folder, command="ganglion bench wire")
    return read_all(folder)


def test_the_table_says_what_was_missed(tmp_path: Path) -> None:
    table = claims_table(documents(tmp_path))
    kept, missed = (line for line in table.splitlines() if "ms |" in line)
    assert "| 0.4 ms | <= 1 ms | 0.8 ms | 2000 |" in kept
    assert "| 4.5 ms **missed** | <= 3 ms | - | 2000 |" in missed
    assert "pool" not in table


def test_the_page_names_command_machine_and_note(tmp_path: Path) -> None:
    page = results_page(documents(tmp_path))
    assert "`ganglion bench wire`, seed 7, n = 2000" in page
    assert "measured beside a training run" in page
    assert f"![t]({plot_name('wire', 0)})" in page
    assert "| `overhead_p99_ms` | 4.5 |" in page


def test_every_claim_belongs_to_a_bench() -> None:
    assert {claim.bench for claim in CLAIMS} == set(BENCHES) == set(TITLES)


def test_the_trace_comes_from_bench_control() -> None:
    assert "Not measured yet" in trace_table([])
    document = {
        "name": "control",
        "detail": {"stages_ms": {"queue": {"p50": 0.5, "p99": 2.25}}},
        "hardware": {"cpu": "c", "num_cores": 2, "flags": [], "ram": "1 GiB", "gpus": []},
        **dict.fromkeys(("commit", "date", "command"), "x"),
    }
    assert "| queue | 0.50 | 2.25 |" in trace_table([document])


def test_fill_replaces_between_markers_only() -> None:
    text = "a\n<!-- x:begin -->\nold\n<!-- x:end -->\nb"
    once = fill(text, "x", "new")
    assert once == "a\n<!-- x:begin -->\nnew\n<!-- x:end -->\nb"
    assert fill(once, "x", "new") == once
    with pytest.raises(ValueError, match="y:begin"):
        fill(text, "y", "new")


def test_compare_two_results(tmp_path: Path) -> None:
    old = read(write(result(), tmp_path / "old", command="x"))
    new = read(write(result(overhead_p50_ms=0.2, extra=1.0), tmp_path / "new", command="x"))
    lines = compare(old, new).splitlines()
    assert any(line.split() == ["overhead_p50_ms", "0.4", "0.2", "0.500"] for line in lines)
    assert any(line.split() == ["extra", "-", "1", "-"] for line in lines)
    assert any(line.split() == ["overhead_p99_ms", "4.5", "-", "-"] for line in lines)
    with pytest.raises(GanglionError, match="cannot compare bench 'wire' with bench 'pool'"):
        compare(old, {**new, "name": "pool"})


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(GanglionError, match="lacks name"):
        read(tmp_path / "a.json")
    with pytest.raises(GanglionError, match="not a result file"):
        read(tmp_path / "absent.json")
