"""Bench wire: what a request costs besides the model, at one robot with two 128 x 128 views on loopback.

Called by `ganglion bench wire`. Both servers are processes of their own with a policy that does nothing; one and the same
client, plain websockets and msgpack, asks them in turns. Overhead = round trip - model time as the server reports it,
from before the observation is packed until the reply is unpacked.
"""

import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from websockets.sync.client import ClientConnection, connect

from ganglion import wire
from ganglion.bench.baselines.openpi import OpenpiServer
from ganglion.bench.result import BenchResult, Plot, percentiles
from ganglion.client import Client
from ganglion.clock import RealClock
from ganglion.config import EngineConfig, MemoryConfig, ServeConfig
from ganglion.errors import InternalError
from ganglion.models.policies.plain import PlainModel
from ganglion.pipeline.local import LocalService
from ganglion.serve.app import Server
from ganglion.serve.app import run as run_server
from ganglion.serve.fake import fake_spec
from ganglion.types import Float32Array, Observation

VIEW_SIZE = 128
NUM_ROUNDS, NUM_REQUESTS = 40, 250
NUM_QUICK_ROUNDS, NUM_QUICK_REQUESTS = 6, 100
NUM_WARM_UP = 50
PACED_HZ, NUM_PACED = 20.0, 200
START_TIMEOUT_S = 60.0
REPLY_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Asked:
    """One request as the client saw it."""

    round_trip_ms: float
    model_ms: float

    @property
    def overhead_ms(self) -> float:
        """What was not the model."""
        return self.round_trip_ms - self.model_ms


def run(*, quick: bool, seed: int) -> BenchResult:
    """Interleaved rounds against our server and the openpi baseline."""
    num_rounds, num_requests = (
        (NUM_QUICK_ROUNDS, NUM_QUICK_REQUESTS) if quick else (NUM_ROUNDS, NUM_REQUESTS)
    )
    observation = _observation(np.random.default_rng(seed))
    ours: list[list[Asked]] = []
    theirs: list[list[Asked]] = []
    with _served(_serve_ours) as our_url, _served(_serve_openpi) as their_url:
        with _peer(our_url) as our_peer, _peer(their_url) as their_peer:
            _ask_many(our_peer, observation, NUM_WARM_UP)
            _ask_many(their_peer, observation, NUM_WARM_UP)
            for index in range(num_rounds):
                sides = [(ours, our_peer), (theirs, their_peer)]
                for rounds, peer in sides if index % 2 else reversed(sides):
                    rounds.append(_ask_many(peer, observation, num_requests))
            paced_ms = [] if quick else _ask_paced(our_peer, observation)
        own_client_ms = _ask_with_our_client(our_url, observation, num_requests)
    return _result(ours, theirs, paced_ms, own_client_ms, observation, seed)


def _result(
    ours: list[list[Asked]],
    theirs: list[list[Asked]],
    paced_ms: list[float],
    own_client_ms: list[float],
    observation: Mapping[str, Any],
    seed: int,
) -> BenchResult:
    our_ms = [asked.overhead_ms for one_round in ours for asked in one_round]
    their_ms = [asked.overhead_ms for one_round in theirs for asked in one_round]
    mine, other = percentiles(our_ms, prefix="{}"), percentiles(their_ms, prefix="{}")
    ratios = [
        float(np.median([a.overhead_ms for a in left]) / np.median([b.overhead_ms for b in right]))
        for left, right in zip(ours, theirs, strict=True)
    ]
    names = ("p50", "p95", "p99")
    return BenchResult(
        name="wire",
        metrics={
            "overhead_p50_ms": mine["p50"],
            "overhead_p95_ms": mine["p95"],
            "overhead_p99_ms": mine["p99"],
            "openpi_overhead_p50_ms": other["p50"],
            "openpi_overhead_p95_ms": other["p95"],
            "openpi_overhead_p99_ms": other["p99"],
            "overhead_ratio": mine["p50"] / other["p50"],
        },
        detail={
            "baseline": "openpi's websocket server loop, reimplemented in bench/baselines/openpi.py",
            "policy": "does nothing; ours runs behind sessions, scheduler and pages, openpi's inside its coroutine",
            "frame_bytes": len(wire.encode(observation)),
            "num_rounds": len(ours),
            "round_ratio_p10_p90": [float(np.percentile(ratios, q)) for q in (10, 90)],
            "overhead_max_ms": mine["max"],
            "openpi_overhead_max_ms": other["max"],
            "own_client_ms": percentiles(own_client_ms, prefix="{}"),
            f"paced_{PACED_HZ:g}_hz_ms": percentiles(paced_ms, prefix="{}") if paced_ms else None,
        },
        n=len(our_ms),
        seed=seed,
        plots=(
            Plot(
                title="Round trip minus model time, one robot, two 128 x 128 views",
                x_label="",
                y_label="ms",
                names=names,
                series={
                    "ganglion": tuple(mine[name] for name in names),
                    "openpi's server loop": tuple(other[name] for name in names),
                },
            ),
        ),
    )


# --- the client --------------------------------------------------------------------------------------------------


def _observation(rng: np.random.Generator) -> dict[str, Any]:
    spec = fake_spec(size=VIEW_SIZE)
    views = {
        view.key: rng.integers(0, 256, (view.height, view.width, 3), dtype=np.uint8)
        for view in spec.views
    }
    state = rng.standard_normal(spec.state_dim).astype(np.float32)
    return {**views, spec.state_key: state, "prompt": "open the drawer"}


@contextmanager
def _peer(url: str) -> Iterator[ClientConnection]:
    with connect(url, compression=None, max_size=None, ping_interval=None, proxy=None) as peer:
        peer.recv(timeout=REPLY_TIMEOUT_S)  # metadata
        yield peer


def _ask(peer: ClientConnection, encoder: wire.Encoder, observation: Mapping[str, Any]) -> Asked:
    clock = RealClock()
    start_ns = clock.now_ns()
    peer.send(encoder.encode(observation))
    reply = wire.decode(peer.recv(timeout=REPLY_TIMEOUT_S, decode=False))
    round_trip_ms = (clock.now_ns() - start_ns) * 1e-6
    # ours: sessions, scheduler, pages and hand-overs are overhead, and a policy that does nothing takes no time
    model_ms = 0.0 if "timing" in reply else reply["server_timing"]["infer_ms"]
    return Asked(round_trip_ms, model_ms)


def _ask_many(peer: ClientConnection, observation: Mapping[str, Any], count: int) -> list[Asked]:
    encoder = wire.Encoder()
    return [_ask(peer, encoder, observation) for _ in range(count)]


def _ask_paced(peer: ClientConnection, observation: Mapping[str, Any]) -> list[float]:
    """As a robot asks: once a tick, on a machine that sleeps in between."""
    clock, encoder = RealClock(), wire.Encoder()
    start_s = clock.now_s()
    overheads_ms = []
    for tick in range(NUM_PACED):
        clock.sleep_until(start_s + tick / PACED_HZ)
        overheads_ms.append(_ask(peer, encoder, observation).overhead_ms)
    return overheads_ms


def _ask_with_our_client(url: str, observation: Mapping[str, Any], count: int) -> list[float]:
    with Client(url, robot_id="bench") as client:
        for _ in range(NUM_WARM_UP):
            client.infer(observation)
        return [client.infer(observation).round_trip_ms for _ in range(count)]


# --- the servers, each in a process of its own -------------------------------------------------------------------


def _serve_ours(port_to: Connection) -> None:
    def tell(server: Server) -> None:
        port_to.send(server.port)

    with LocalService(
        PlainModel(_NoPolicy()), engine=EngineConfig(), memory=MemoryConfig()
    ) as service:
        run_server(service, config=ServeConfig(port=0), on_bound=tell)


class _NoPolicy:
    """Answers zeros at once; the engine, its sessions and its pages are the real ones."""

    def __init__(self) -> None:
        self.spec = fake_spec(size=VIEW_SIZE)
        self._actions = np.zeros((1, self.spec.horizon, self.spec.action_dim), np.float32)

    def __call__(self, observations: Sequence[Observation]) -> Float32Array:
        return np.repeat(self._actions, len(observations), axis=0)


def _serve_openpi(port_to: Connection) -> None:
    spec = fake_spec(size=VIEW_SIZE)
    actions = np.zeros((spec.horizon, spec.action_dim), np.float32)

    def policy(observation: Mapping[str, Any]) -> dict[str, Any]:
        return {"actions": actions, "policy_timing": {"infer_ms": 0.0}}

    server = OpenpiServer(policy, metadata=spec.metadata())
    server.serve_forever("127.0.0.1", 0, port_to.send)


@contextmanager
def _served(serve: Any) -> Iterator[str]:
    context = multiprocessing.get_context("spawn")
    port_from, port_to = context.Pipe(duplex=False)
    process = context.Process(target=serve, args=(port_to,), daemon=True)
    process.start()
    try:
        if not port_from.poll(START_TIMEOUT_S):
            raise InternalError(f"{serve.__name__}: no server within {START_TIMEOUT_S:g} s")
        yield f"ws://127.0.0.1:{port_from.recv()}"
    finally:
        process.terminate()
        process.join()
