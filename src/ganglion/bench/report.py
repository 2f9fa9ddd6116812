"""Report: all results as docs/results/README.md with plots, and the README's table. Called by cli.

Owns the registry of benches and their bars (what the project promised). Knows JSON files, not benchmarks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BENCHES: dict[str, str] = {
    "control": "ganglion.bench.control:run",
    "wire": "ganglion.bench.wire:run",
    "fleet": "ganglion.bench.fleet:run",
    "pool": "ganglion.bench.pool:run",
    "start": "ganglion.bench.start:run",
    "pipeline": "ganglion.bench.pipeline:run",
    "moving": "ganglion.bench.moving:run",
    "reaction": "ganglion.bench.reaction:run",
    "delay": "ganglion.bench.delay:run",
    "ladder": "ganglion.bench.ladder:run",
    "robots": "ganglion.bench.robots:run",
    "memory": "ganglion.bench.memory:run",
    "gate": "ganglion.bench.gate:run",
    "decode": "ganglion.bench.decode:run",
    "prefill": "ganglion.bench.prefill:run",
    "prefix": "ganglion.bench.prefix:run",
    "concurrency": "ganglion.bench.concurrency:run",
    "layered": "ganglion.bench.layered:run",
    "mixed": "ganglion.bench.mixed:run",
    "speculate": "ganglion.bench.speculate:run",
}
TITLES: dict[str, str] = {
    "control": "Four simulated arms, closed loop in real time",
    "wire": "What the server adds to the model's time",
    "fleet": "Batching across robots",
    "pool": "The page pool",
    "start": "From the command to a moving arm, and to a first token",
    "pipeline": "Chunks of one robot that overlap",
    "moving": "Success on moving goals",
    "reaction": "From a change in the picture to the first action that has seen it",
    "delay": "Ways to execute chunks that come late",
    "ladder": "What fewer flow steps save and lose",
    "robots": "How many robots one server keeps in time",
    "memory": "Bytes of a session",
    "gate": "Perception that is not computed again",
    "decode": "New tokens of language models, against other engines",
    "prefill": "Prompt tokens of language models, against other engines",
    "prefix": "The first token behind a prefix that is in pages",
    "concurrency": "Sequences under way at equal bytes",
    "layered": "Long prompts cut by layers, against cut by tokens",
    "mixed": "Robots beside a stream of long prompts",
    "speculate": "Tokens drafted ahead, against plain decoding",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One promised figure: `metric` of the result `bench`, its bar, and the baseline's metric if there is one."""

    bench: str
    metric: str
    text: str
    bar: float
    is_lower_better: bool
    unit: str = ""
    baseline: str = ""

    def is_met(self, value: float) -> bool:
        """Does `value` clear the bar?"""
        return value <= self.bar if self.is_lower_better else value >= self.bar


CLAIMS: tuple[Claim, ...] = (
    Claim(
        bench="control",
        metric="success_rate",
        text="tasks solved, ten tasks, unseen seeds",
        bar=0.95,
        is_lower_better=False,
    ),
    Claim(
        bench="control",
        metric="worst_task_success_rate",
        text="the worst task of the ten",
        bar=0.8,
        is_lower_better=False,
    ),
    Claim(
        bench="control",
        metric="wrong_instruction_success_rate",
        text="solved when told the opposite (low is right)",
        bar=0.3,
        is_lower_better=True,
    ),
    Claim(
        bench="control",
        metric="deadline_miss_rate",
        text="control ticks without a fresh action (250 ms), 4 arms at 20 Hz",
        bar=0.01,
        is_lower_better=True,
    ),
    Claim(
        bench="control",
        metric="action_latency_p50_ms",
        text="observation sent to chunk received, one arm, p50",
        bar=20.0,
        is_lower_better=True,
        unit="ms",
    ),
    Claim(
        bench="wire",
        metric="overhead_p50_ms",
        text="round trip minus model time, two 128x128 views, p50",
        bar=1.0,
        is_lower_better=True,
        unit="ms",
        baseline="openpi_overhead_p50_ms",
    ),
    Claim(
        bench="wire",
        metric="overhead_p99_ms",
        text="the same, p99",
        bar=3.0,
        is_lower_better=True,
        unit="ms",
        baseline="openpi_overhead_p99_ms",
    ),
    Claim(
        bench="fleet",
        metric="speedup_16_sessions",
        text="chunks/s of 16 robots batched, against one by one",
        bar=1.7,
        is_lower_better=False,
        unit="x",
    ),
    Claim(
        bench="fleet",
        metric="share_of_bare_gain",
        text="share of the bare model's batching gain that is kept",
        bar=0.9,
        is_lower_better=False,
    ),
    Claim(
        bench="pool",
        metric="alloc_ns",
        text="allocate a page, pool of 1 M pages",
        bar=5000.0,
        is_lower_better=True,
        unit="ns",
        baseline="baseline_alloc_ns",
    ),
    Claim(
        bench="pool",
        metric="fork_ns",
        text="fork, per page of a 64-page table",
        bar=300.0,
        is_lower_better=True,
        unit="ns",
        baseline="baseline_fork_ns",
    ),
    Claim(
        bench="pool",
        metric="match_ns",
        text="match a prefix, per page",
        bar=5000.0,
        is_lower_better=True,
        unit="ns",
        baseline="baseline_match_ns",
    ),
    Claim(
        bench="start",
        metric="second_start_s",
        text="`make demo` to a moving arm, when all is installed",
        bar=10.0,
        is_lower_better=True,
        unit="s",
    ),
    Claim(
        bench="start",
        metric="first_token_s",
        text="`ganglion serve chat=FOLDER` to the first token over HTTP, 0.6 B in bfloat16 from the page cache",
        bar=5.0,
        is_lower_better=True,
        unit="s",
    ),
    Claim(
        bench="start",
        metric="peak_over_weights",
        text="the most memory of that process, less that of one without a model, over the sum of weights",
        bar=1.15,
        is_lower_better=True,
    ),
    Claim(
        bench="pipeline",
        metric="rate_ratio",
        text="decisions/s of one robot against sense-infer-act, all of the pipeline together",
        bar=2.5,
        is_lower_better=False,
        unit="x",
    ),
    Claim(
        bench="pipeline",
        metric="success_ratio",
        text="its success on moving goals against sense-infer-act's",
        bar=1.0,
        is_lower_better=False,
    ),
    Claim(
        bench="pipeline",
        metric="share_of_bound",
        text="share of the bound L / max(t_p, K t_g(n) / n)",
        bar=0.9,
        is_lower_better=False,
    ),
    Claim(
        bench="pipeline",
        metric="jitter",
        text="intervals between decisions, standard deviation / mean (baseline: threads)",
        bar=0.1,
        is_lower_better=True,
        baseline="jitter_threads",
    ),
    Claim(
        bench="moving",
        metric="success_ratio",
        text="success on moving goals of the fastest way that is as good as sense-infer-act, against it",
        bar=1.0,
        is_lower_better=False,
    ),
    Claim(
        bench="moving",
        metric="public_over_private",
        text="success with the public context against the private one, chunks overlapping",
        bar=1.0,
        is_lower_better=False,
    ),
    Claim(
        bench="reaction",
        metric="reaction_p50_ms",
        text="from a change in the picture to the first action that saw it, p50 (baseline: sense-infer-act)",
        bar=100.0,
        is_lower_better=True,
        unit="ms",
        baseline="b0_reaction_p50_ms",
    ),
    Claim(
        bench="delay",
        metric="success_at_8_share",
        text="success at 8 ticks of delay, share of that without (baseline: naive, a policy that never saw late chunks)",
        bar=0.9,
        is_lower_better=False,
        baseline="untuned_naive_success_at_8_share",
    ),
    Claim(
        bench="ladder",
        metric="lowest_rung_speedup",
        text="chunks of the lowest rung that keeps 95 % of the success, in the time of one",
        bar=1.3,
        is_lower_better=False,
        unit="x",
    ),
    Claim(
        bench="robots",
        metric="fleet_ratio",
        text="robots with under 1 % misses, against the better of sense-infer-act and LeRobot's scheme",
        bar=4.0,
        is_lower_better=False,
        unit="x",
    ),
    Claim(
        bench="memory",
        metric="bytes_saved_share",
        text="peak bytes of 16 sessions saved against contiguous buffers",
        bar=0.5,
        is_lower_better=False,
    ),
    Claim(
        bench="memory",
        metric="waste_share",
        text="bytes of pages in use that hold nothing",
        bar=0.05,
        is_lower_better=True,
    ),
    Claim(
        bench="gate",
        metric="static_encode_ratio",
        text="time to encode the fixed view of a still scene, all of it against gated",
        bar=3.0,
        is_lower_better=False,
        unit="x",
    ),
    Claim(
        bench="gate",
        metric="gate_success_ratio",
        text="success with the gate against without",
        bar=1.0,
        is_lower_better=False,
    ),
    Claim(
        bench="decode",
        metric="decode_1_ratio_transformers",
        text="decode of one row, dense 0.5 B, bfloat16, against transformers",
        bar=1.0,
        is_lower_better=False,
        unit="x",
    ),
    Claim(
        bench="decode",
        metric="decode_32_ratio_best_peer",
        text="decode of 32 rows, against the best peer",
        bar=0.6,
        is_lower_better=False,
        unit="x",
    ),
    Claim(
        bench="decode",
        metric="moe_decode_1_ratio_transformers",
        text="decode of one row, mixture of experts (0.3 of 1.8 B), against transformers",
        bar=1.0,
        is_lower_better=False,
        unit="x",
    ),
    Claim(
        bench="decode",
        metric="moe_decode_8_ratio_best_peer",
        text="decode of 8 rows, mixture of experts, against the best peer",
        bar=0.6,
        is_lower_better=False,
        unit="x",
    ),
    Claim(
        bench="prefill",
        metric="prefill_2048_ratio_best_peer",
        text="a prompt of 2048 tokens, dense, against the best peer",
        bar=0.6,
        is_lower_better=False,
        unit="x",
    ),
    Claim(
        bench="prefill",
        metric="moe_prefill_512_ratio_best_peer",
        text="a prompt of 512 tokens, mixture of experts, against the best peer",
        bar=0.6,
        is_lower_better=False,
        unit="x",
    ),
    Claim(
        bench="prefix",
        metric="warm_ttft_ratio",
        text="time to the first token behind 2048 tokens in pages, share of the cold one",
        bar=0.1,
        is_lower_better=True,
    ),
    Claim(
        bench="concurrency",
        metric="admitted_ratio",
        text="sequences at equal bytes, against buffers of the longest length",
        bar=3.0,
        is_lower_better=False,
        unit="x",
    ),
    Claim(
        bench="speculate",
        metric="worst_ratio_to_plain",
        text="tokens/s with drafts against plain decoding, the worst of acceptance 0.2 to 0.9",
        bar=0.97,
        is_lower_better=False,
    ),
    Claim(
        bench="layered",
        metric="expert_bytes_ratio",
        text="expert bytes read per prompt token beside 4 decodes, layered over chunked prefill",
        bar=0.7,
        is_lower_better=True,
    ),
    Claim(
        bench="layered",
        metric="tbt_p99_ratio",
        text="p99 time between tokens of those decodes, layered over chunked prefill",
        bar=1.0,
        is_lower_better=True,
    ),
    Claim(
        bench="mixed",
        metric="robot_miss_rate",
        text="robots' observations without a chunk in time (100 ms), two arms at 20 Hz beside prompts of 2,000 tokens",
        bar=0.01,
        is_lower_better=True,
        baseline="robot_miss_rate_unsliced",
    ),
    Claim(
        bench="mixed",
        metric="planner_kept_share",
        text="of the planner's tokens/s alone, kept beside those robots",
        bar=0.5,
        is_lower_better=False,
    ),
)

Result = dict[str, Any]


def _number(value: float, unit: str = "") -> str:
    shown = f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{shown} {unit}".strip()


def claims_table(results: Sequence[Result]) -> str:
    """The README's table: every promised figure that has been measured, misses said."""
    found = {result["name"]: result for result in results}
    lines = ["| what | measured | bar | baseline | n |", "|---|---|---|---|---|"]
    for claim in CLAIMS:
        result = found.get(claim.bench)
        if result is None or claim.metric not in result["metrics"]:
            continue
        value = result["metrics"][claim.metric]
        sign = "<=" if claim.is_lower_better else ">="
        verdict = "" if claim.is_met(value) else " **missed**"
        base = result["metrics"].get(claim.baseline)
        lines.append(
            f"| {claim.text} | {_number(value, claim.unit)}{verdict} | {sign} {_number(claim.bar, claim.unit)} "
            f"| {'-' if base is None else _number(base, claim.unit)} | {result['n']} |"
        )
    return "\n".join(lines)


def trace_table(results: Sequence[Result]) -> str:
    """docs/architecture.md's times: the stages of a request as `bench control` saw them."""
    control = next((result for result in results if result["name"] == "control"), None)
    stages = control["detail"].get("stages_ms") if control is not None else None
    if control is None or not stages:
        return "Not measured yet: `ganglion bench control`."
    lines = ["| from, to | p50 ms | p99 ms |", "|---|---|---|"]
    lines += [
        f"| {name} | {times['p50']:.2f} | {times['p99']:.2f} |" for name, times in stages.items()
    ]
    return "\n".join([*lines, "", provenance([control])])


def provenance(results: Sequence[Result]) -> str:
    """One line a distinct machine and commit: where the numbers come from."""
    lines: dict[str, list[str]] = {}
    for result in results:
        hardware = result["hardware"]
        gpus = f", {', '.join(hardware['gpus'])}" if hardware["gpus"] else ", no GPU"
        where = (
            f"{hardware['cpu']}, {hardware['num_cores']} cores ({' '.join(hardware['flags'])}), "
            f"{hardware['ram']} RAM{gpus}; commit {result['commit']}, {result['date']}"
        )
        lines.setdefault(where, []).append(f"`{result['command']}`")
    return "\n".join(f"{', '.join(commands)}: {where}." for where, commands in lines.items())


def results_page(results: Sequence[Result]) -> str:
    """docs/results/README.md."""
    lines = [
        "# Results",
        "",
        "Generated from the JSON files in this folder by `ganglion bench report`; do not edit. Each file is written by",
        "the command it names, with its baseline measured in the same run. A bar that was not reached says **missed**.",
        "",
        claims_table(results),
    ]
    for result in results:
        name = str(result["name"])
        lines += [
            "",
            f"## {TITLES.get(name, name)}",
            "",
            f"`{result['command']}`, seed {result['seed']}, n = {result['n']}. {provenance([result])}",
            "",
        ]
        lines += [
            f"![{plot['title']}]({plot_name(name, at)})" for at, plot in enumerate(result["plots"])
        ]
        note = result["detail"].get("note")
        if note:
            lines += ["", str(note)]
        lines += ["", "| metric | value |", "|---|---|"]
        lines += [
            f"| `{metric}` | {_number(value)} |" for metric, value in result["metrics"].items()
        ]
    return "\n".join(lines) + "\n"


def plot_name(bench: str, index: int) -> str:
    """File name of a result's picture."""
    return f"{bench}-{index}.svg"


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """Draw every plot of `results` into `folder`; the same numbers give the same bytes."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    written = []
    with mpl.rc_context({"svg.hashsalt": "ganglion", "svg.fonttype": "none"}):
        for result in results:
            for index, plot in enumerate(result["plots"]):
                figure, axes = plt.subplots(figsize=(7.2, 3.4), layout="constrained")
                for at, (label, values) in enumerate(plot["series"].items()):
                    if plot["names"]:
                        width = 0.8 / len(plot["series"])
                        places = [position + at * width for position in range(len(plot["names"]))]
                        axes.bar(places, values, width, label=label)
                    else:
                        axes.plot(plot["x"], values, marker="o", label=label)
                if plot["names"]:
                    middle = 0.4 - 0.4 / len(plot["series"])
                    places = [position + middle for position in range(len(plot["names"]))]
                    axes.set_xticks(places, plot["names"], rotation=30, ha="right")
                if plot["is_log_x"]:
                    axes.set_xscale("log")
                if plot["is_log_y"]:
                    axes.set_yscale("log")
                else:
                    axes.set_ylim(bottom=0)
                axes.set(title=plot["title"], xlabel=plot["x_label"], ylabel=plot["y_label"])
                axes.spines[["top", "right"]].set_visible(False)
                axes.grid(axis="y", alpha=0.3)
                if len(plot["series"]) > 1:
                    axes.legend(frameon=False)
                path = folder / plot_name(str(result["name"]), index)
                figure.savefig(path, metadata={"Date": None})
                plt.close(figure)
                written.append(path)
    return written


def fill(text: str, marker: str, content: str) -> str:
    """`text` with what stands between <!-- marker:begin --> and <!-- marker:end --> replaced."""
    begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
    before, found, rest = text.partition(begin)
    _, also_found, after = rest.partition(end)
    if not (found and also_found):
        raise ValueError(f"no {begin} ... {end} in a text of {len(text)} characters")
    return f"{before}{begin}\n{content}\n{end}{after}"
