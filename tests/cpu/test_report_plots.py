from pathlib import Path

from ganglion.bench.report import draw
from ganglion.bench.result import BenchResult, Plot, read_all, write


def test_plots_are_drawn_and_are_the_same_bytes_twice(tmp_path: Path) -> None:
    lines = Plot(
        title="lines", x_label="sessions", y_label="chunks/s", x=(1, 16), is_log_x=True,
        series={"batched": (10.0, 30.0), "one by one": (10.0, 11.0)},
    )  # fmt: skip
    bars = Plot(
        title="bars", x_label="task", y_label="success", names=("push", "door"),
        series={"right": (1.0, 0.9), "wrong": (0.1, 0.0)},
    )  # fmt: skip
    write(
        BenchResult(name="fleet", metrics={"a": 1}, detail={}, n=1, seed=0, plots=(lines, bars)),
        tmp_path,
        command="x",
    )
    first = [path.read_bytes() for path in draw(read_all(tmp_path), tmp_path)]
    second = [path.read_bytes() for path in draw(read_all(tmp_path), tmp_path)]
    assert len(first) == 2
    assert first == second
    assert b"one by one" in first[0]
    assert b"push" in first[1]
