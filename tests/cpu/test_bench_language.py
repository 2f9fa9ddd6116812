"""The language benches in their quick form, and what they do with engines that fail."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ganglion.bench import concurrency, decode, prefill, prefix
from ganglion.bench.baselines.peer import PeerGenerator, installed_peers
from ganglion.bench.foreign import ForeignLoad
from ganglion.bench.generators import OurGenerator, check_counts
from ganglion.bench.shapes import TOY_DENSE, shape_folder
from ganglion.bench.speed import Case, Pair, Speeds, decode_rate
from ganglion.clock import SimulatedClock
from ganglion.errors import GanglionError
from ganglion.types import RequestId


@pytest.fixture(autouse=True)
def _as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def test_decode_in_short() -> None:
    result = decode.run(quick=True, seed=0)
    for prefix_ in ("", "moe_"):
        for rows in (1, 8):
            name = f"{prefix_}decode_{rows}"
            assert result.metrics[f"{name}_ratio_transformers"] > 0
            assert result.metrics[f"{name}_tokens_per_s"] > 0
    assert not any("best_peer" in name for name in result.metrics)
    assert [plot.title for plot in result.plots] == ["Dense", "Mixture of experts"]
    json.dumps(result.detail)


def test_prefill_in_short() -> None:
    result = prefill.run(quick=True, seed=0)
    assert result.metrics["prefill_128_ratio_transformers"] > 0
    assert result.metrics["moe_prefill_64_ratio_transformers"] > 0


def test_prefix_in_short() -> None:
    result = prefix.run(quick=True, seed=0)
    assert result.metrics["cached_share"] > 0.9
    assert 0 < result.metrics["warm_ttft_ratio"] < 1


def test_concurrency_in_short() -> None:
    result = concurrency.run(quick=True, seed=0)
    assert result.metrics["admitted_ratio"] > 1
    assert result.metrics["mean_length_share"] == pytest.approx(0.3, abs=0.1)


def test_long_sequences_weigh_more_than_their_number() -> None:
    same, mixed = np.full(100, 300), np.repeat([20, 580], 50)
    assert concurrency.mean_held(same) == pytest.approx(0.85 * 300)
    assert concurrency.mean_held(mixed) > 1.8 * concurrency.mean_held(same)


def test_models_are_made_once(tmp_path: Path) -> None:
    first = shape_folder(TOY_DENSE, seed=0)
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert shape_folder(TOY_DENSE, seed=0) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    assert shape_folder(TOY_DENSE, seed=1) != first


def pairs(ours: list[float], theirs: list[float]) -> tuple[Pair, ...]:
    return tuple(
        Pair(ours=mine, theirs=other, foreign_cores=mine / 100)
        for mine, other in zip(ours, theirs, strict=True)
    )


def test_ratios_are_taken_within_a_round() -> None:
    ours = [10.0, 20.0, 30.0]
    others = {
        "transformers": pairs(ours, [5.0, 20.0, 60.0]),
        "slow": pairs(ours, [1.0, 1.0, 1.0]),
        "fast": pairs(ours, [40.0, 40.0, 60.0]),
    }
    speeds = Speeds(pairs={"decode_1": others}, facts={})
    metrics = speeds.metrics("moe_")
    assert metrics["moe_decode_1_ratio_transformers"] == 1.0
    assert metrics["moe_decode_1_ratio_best_peer"] == 0.5
    assert metrics["moe_decode_1_best_peer_tokens_per_s"] == 40.0
    assert metrics["moe_decode_1_tokens_per_s"] == 20.0
    assert speeds.rates()["slow"] == {"decode_1": 1.0}
    assert speeds.worst_foreign_cores == 0.3


def test_the_time_of_the_first_token_is_not_decode() -> None:
    class Fixed:
        name = "fixed"

        def generate(self, prompts: list[list[int]], num_tokens: int) -> float:
            assert len(prompts) == 4
            return 2.0 + 0.5 * (num_tokens - 1)

        def close(self) -> None: ...

    case = Case(name="decode_4", num_rows=4, num_prompt=3, num_new=8)
    assert decode_rate(Fixed(), case, np.random.default_rng(0), 10) == pytest.approx(8.0)  # type: ignore[arg-type]

    class Busy(Fixed):
        def generate(self, prompts: list[list[int]], num_tokens: int) -> float:
            return 1.0 / num_tokens

    with pytest.raises(GanglionError, match=r"9 tokens took 0\.111 s, 1 took 1\.000 s"):
        decode_rate(Busy(), case, np.random.default_rng(0), 10)  # type: ignore[arg-type]


def test_foreign_load_is_what_others_take(tmp_path: Path) -> None:
    def say(busy: int, own: int, child: int) -> None:
        (tmp_path / "stat").write_text(f"cpu {busy} 0 0 99 99 0 0 0 0 0\ncpu0 1\n")
        for pid, ticks, born in ((7, own, "8"), (8, child, "")):
            task = tmp_path / str(pid) / "task" / str(pid)
            task.mkdir(parents=True, exist_ok=True)
            (task / "children").write_text(born)
            (tmp_path / str(pid) / "stat").write_text(
                f"{pid} (a) b) S {'0 ' * 10}{ticks} 0 {'0 ' * 20}"
            )

    clock = SimulatedClock()
    say(1000, 100, 50)
    load = ForeignLoad(clock, (7,), proc=tmp_path)
    say(1500, 300, 150)  # 500 ticks in all, 300 of them ours
    clock.sleep_until(clock.now_s() + 2.0)
    assert load.cores() == pytest.approx(200 / os.sysconf("SC_CLK_TCK") / 2.0)
    assert ForeignLoad(clock, (7,), proc=tmp_path / "none").cores() == 0.0


def test_our_generator_makes_what_is_asked_for() -> None:
    ours = OurGenerator(shape_folder(TOY_DENSE, seed=0), max_rows=3, max_tokens=40)
    assert ours.generate([[1, 2, 3], [4, 5, 6], [7, 8, 9]], 5) > 0
    ours.close()
    with pytest.raises(GanglionError, match=r"made \[4\] tokens a row, 5 were asked for"):
        check_counts("x", {RequestId(1): 4, RequestId(2): 5}, 5)


PEER = """
import json, sys
print("words of its own")
print(json.dumps({"ganglion_peer": "x", "version": "1"}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    counts = [request["num_tokens"] for _ in request["prompts"]]
    if request["num_tokens"] == 9:
        sys.exit("no room")
    if request["num_tokens"] == 8:
        counts[0] -= 1
    print("{ not json")
    print(json.dumps({"ganglion_peer": "x", "seconds": 0.25, "num_tokens": counts}), flush=True)
"""


def test_a_peer_answers_line_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_peer.py").write_text(PEER)
    monkeypatch.setattr("ganglion.bench.peers.__file__", str(tmp_path / "__init__.py"))
    peer = PeerGenerator("mine", Path(sys.executable), tmp_path, max_rows=2, max_tokens=8)
    assert peer.loaded["version"] == "1"
    assert peer.generate([[1], [2]], 3) == 0.25
    with pytest.raises(GanglionError, match="mine made"):
        peer.generate([[1], [2]], 8)
    with pytest.raises(GanglionError, match="peer mine ended with 1: no room"):
        peer.generate([[1]], 9)
    peer.close()


def test_only_finished_peers_count(tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    assert installed_peers(tmp_path) == {}
    (tmp_path / "vllm" / ".installed").touch()
    assert installed_peers(tmp_path) == {"vllm": tmp_path / "vllm" / "bin" / "python"}
