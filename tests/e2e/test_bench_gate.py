"""Bench gate measures what it promises on rendered frames, and the gate it measures sees what it should."""

import math

from ganglion.bench.gate import CONFIGS, run
from ganglion.bench.gate_worlds import Scene


def test_every_figure_is_measured() -> None:
    result = run(quick=True, seed=0)
    assert all(math.isfinite(value) for value in result.metrics.values())
    expected = {
        f"{scene.value}_{view}encode_ratio" for scene in Scene for view in ("", "wrist_")
    } | {"gate_success_ratio", "static_perceive_ratio", "gate_view_p50_ms"}
    assert expected <= result.metrics.keys()
    assert result.metrics["jumps_seen_share"] == 1.0, (
        "a thing that jumps is seen in its first frame"
    )
    assert result.metrics["jumps_seen_by_similarity_share"] == 0.0, "the joints say nothing of it"
    scenes = result.detail["scenes"]
    assert scenes.keys() == {scene.value for scene in Scene}
    for facts in scenes.values():
        assert facts["configs"].keys() == CONFIGS.keys()
        assert facts["num_frames"] > 0
    static = scenes["static"]["configs"]
    assert static["gated"]["fixed"]["shares"]["skip"] >= 0.9, "noise alone is skipped"
    other_seed = static["full"]["chunk_drift_rms_of_another_noise_seed"]
    assert static["gated"]["chunk_drift_rms"] < 0.5 * other_seed
