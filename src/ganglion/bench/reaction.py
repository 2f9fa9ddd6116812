"""Bench reaction: from a change in the picture to the first control tick whose action has seen it.

Called by `ganglion bench reaction`. Real time, one robot at Meta-World's own 80 Hz, the large policy; the ways to serve and
what is read off them are `bench.stream`'s. A change may happen at any moment of the stream.
"""

import statistics

from ganglion.bench.baselines.bare import BareModel
from ganglion.bench.pipeline import LANES, LARGE, RATE_HZ, Way, stream_of
from ganglion.bench.result import BenchResult, Plot, percentiles
from ganglion.bench.stream import Frames, Stream, lerobot, merged, sense_infer_act, uncontrolled
from ganglion.config import PipelineConfig
from ganglion.models.registry import load_policy, policy_folder
from ganglion.plan.hardware import read_hardware

NUM_CHANGES = 500  # a stream
WAYS = (
    Way(name="ours, tuned", pipeline=PipelineConfig()),
    Way(name="ours, one at a time", pipeline=PipelineConfig(degree=1)),
    Way(name="ours, warm start 0.6, degree 2", pipeline=PipelineConfig(degree=2, warm_start=0.6)),
)


def run(*, quick: bool, seed: int) -> BenchResult:
    """Interleaved rounds; every side with its best split of the cores."""
    dtype = "bfloat16" if read_hardware().has_fast_bf16 else "float32"
    model = load_policy(policy_folder(LARGE), dtype=dtype)
    frames = Frames(model, rate_hz=RATE_HZ, seed=seed, world="metaworld:push")
    bare = BareModel(model)
    num_rounds, run_s = (1, 1.0) if quick else (5, 5.0)
    streams: dict[str, list[Stream]] = {}
    for _ in range(num_rounds):
        for threads in (1, 2):
            for name, serve in (("B0", sense_infer_act), ("B1", lerobot)):
                stream = serve(bare, frames, run_s=run_s, num_threads=threads)
                streams.setdefault(f"{name}, {threads} threads", []).append(stream)
        for loops in (2, 3):
            stream = uncontrolled(bare, frames, run_s=run_s, num_loops=loops, num_threads=1)
            streams.setdefault(f"B2, {loops} loops", []).append(stream)
        for way in WAYS[:1] if quick else WAYS:
            for lane_name, lanes in LANES.items():
                stream = stream_of(model, frames, way, lanes, run_s=run_s)
                streams.setdefault(f"{way.name}, {lane_name}", []).append(stream)
    samples = {
        name: merged(group, lambda s: s.reactions_ms(num_changes=NUM_CHANGES, seed=seed))
        for name, group in streams.items()
    }
    medians = {name: statistics.median(values) for name, values in samples.items() if values}

    def best(prefix: str) -> str:
        return min((name for name in medians if name.startswith(prefix)), key=medians.__getitem__)

    ours = best("ours")
    metrics = percentiles(samples[ours], prefix="reaction_{}_ms")
    for side in ("B0", "B1", "B2"):
        metrics |= percentiles(samples[best(side)], prefix=f"{side.lower()}_reaction_{{}}_ms")
        metrics[f"{side.lower()}_reaction_ratio"] = medians[best(side)] / medians[ours]
    metrics["reaction_ratio"] = metrics["b0_reaction_ratio"]
    sides = {"ours": ours, **{side: best(side) for side in ("B0", "B1", "B2")}}
    figures = {side: percentiles(samples[name], prefix="{}") for side, name in sides.items()}
    return BenchResult(
        name="reaction",
        metrics=metrics,
        detail={
            "policy": LARGE,
            "dtype": dtype,
            "rate_hz": RATE_HZ,
            "chosen": sides,
            "reaction_p50_ms": medians,
            "note": "From a change at any moment to the first control tick after a chunk that saw it. Every side is "
            "shown with the split of the cores that serves it best. B1 never sends before half of its chunk is used up.",
        },
        n=len(samples[ours]),
        seed=seed,
        plots=(
            Plot(
                title="Reaction to a change in the picture",
                x_label="way to serve",
                y_label="ms",
                names=tuple(sides),
                series={
                    quantile: tuple(figures[side][quantile] for side in sides)
                    for quantile in ("p50", "p99")
                },
            ),
        ),
    )
