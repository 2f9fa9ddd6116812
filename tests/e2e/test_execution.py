"""How a robot executes its chunks, over a real socket to a real flow policy: every field good and bad, one connection."""

import asyncio

import numpy as np
import pytest

from ganglion.client import AsyncClient, Client, Reply, ReplyError
from ganglion.config import EngineConfig, MemoryConfig, PipelineConfig
from ganglion.errors import ErrorCode
from ganglion.metrics import Metrics
from ganglion.models.policies.flow_model import FlowModel
from ganglion.models.tiny import TINY_PROMPTS, tiny_flow
from ganglion.pipeline.local import LocalService
from ganglion.serve.app import ServerThread
from ganglion.types import Execution
from tests.e2e.edge_stage import ask, bare, read

SPEC = tiny_flow().spec
PREFIX = np.array([[0.1, -0.2, 0.3, 0.4], [0.0, 0.1, -0.1, 0.4], [-0.2, 0.2, 0.0, 0.4]], np.float32)
TIMEOUT_S = 20.0


def seen(**changes):
    rng = np.random.default_rng(3)
    views = {
        view.key: rng.integers(0, 256, (view.height, view.width, 3), dtype=np.uint8)
        for view in SPEC.views
    }
    state = rng.standard_normal(SPEC.state_dim).astype(np.float32) * 0.1
    fields = {**views, SPEC.state_key: state, "prompt": TINY_PROMPTS[0]}
    return fields | changes


@pytest.fixture(scope="module")
def metrics():
    return Metrics()


@pytest.fixture(scope="module")
def server(metrics):
    checkpoint = tiny_flow()
    model = FlowModel(checkpoint.policy, checkpoint.processor, checkpoint.spec)
    with (
        LocalService(
            model,
            engine=EngineConfig(),
            memory=MemoryConfig(arena_bytes=1 << 22, large_page_bytes=1 << 16),
            pipeline=PipelineConfig(),
            metrics=metrics,
        ) as service,
        ServerThread(service, metrics=metrics) as edge,
    ):
        yield edge


@pytest.fixture
def client(server, request):
    name = f"arm-{abs(hash(request.node.name))}"
    with Client(server.ws_url, robot_id=name, timeout_s=TIMEOUT_S) as robot:
        yield robot


def count(metrics, line_start: str) -> float:
    lines = metrics.render().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(line_start))


def test_metadata_lists_what_is_served(client):
    assert client.metadata["executions"] == [execution.value for execution in SPEC.executions]
    assert set(client.metadata["executions"]) == set(Execution)
    assert client.metadata["max_prefix"] == SPEC.max_prefix == 4


def test_an_old_client_is_answered_as_ever(client):
    reply = client.infer(seen(), seed=1)
    assert reply.context_seq == reply.seq
    assert reply.notes == ()


@pytest.mark.parametrize("execution", list(Execution))
def test_every_execution_is_served(client, execution):
    first = client.infer(seen(), execution=execution.value, executed_until=0, seed=1)
    second = client.infer(
        seen(), execution=execution.value, executed_until=3, inference_delay_hint=2, seed=2
    )
    assert (first.seq, second.seq, second.context_seq) == (0, 1, 1)
    assert np.abs(second.actions).max() <= 1.0


def test_a_chunk_continues_what_runs_anyway(client):
    hints = {"execution": "prefix", "executed_until": 5, "seed": 1}
    free = client.infer(seen(), **hints)
    held = client.infer(seen(), action_prefix=PREFIX, inference_delay_hint=3, **hints)
    assert held.actions[:3] == pytest.approx(PREFIX, abs=1e-3)
    assert np.abs(free.actions[:3] - PREFIX).max() > 0.05
    # what an arm does with the same words in naive execution is its own affair
    naive = client.infer(seen(), execution="naive", action_prefix=PREFIX, executed_until=5, seed=1)
    assert naive.actions == pytest.approx(free.actions, abs=1e-5)


def test_an_asyncio_robot_says_the_same(server):
    async def main() -> Reply:
        async with AsyncClient(server.ws_url, robot_id="async", timeout_s=TIMEOUT_S) as robot:
            return await robot.infer(
                seen(), execution="prefix", executed_until=5, action_prefix=PREFIX,
                inference_delay_hint=3, seed=1,
            )  # fmt: skip

    reply = asyncio.run(main())
    assert reply.actions[:3] == pytest.approx(PREFIX, abs=1e-3)
    assert reply.context_seq == reply.seq


BAD = [
    ({"execution": "teleport"}, "execution"),
    ({"executed_until": -1}, "executed_until"),
    ({"executed_until": 2**63}, "executed_until"),
    ({"inference_delay_hint": -2}, "inference_delay_hint"),
    ({"inference_delay_hint": SPEC.horizon + 1}, "inference_delay_hint"),
    ({"action_prefix": np.zeros((5, 4), np.float32)}, "action_prefix"),
    ({"action_prefix": np.zeros((200, 4), np.float32)}, "action_prefix"),
    ({"action_prefix": np.full((2, 4), np.nan, np.float32)}, "action_prefix"),
    ({"action_prefix": np.full((2, 4), 1.5, np.float32)}, "action_prefix"),
    ({"action_prefix": np.zeros((2, 3), np.float32)}, "action_prefix"),
    ({"action_prefix": np.zeros((2, 4), np.int64)}, "action_prefix"),
    ({"obs_time_ns": -7}, "obs_time_ns"),
]


def test_bad_fields_are_refused_one_by_one_and_the_connection_lives_on(client, metrics):
    before = count(metrics, 'ganglion_refused_frames_total{reason="invalid_field"}')
    for changes, field in BAD:
        with pytest.raises(ReplyError) as error:
            client.infer(seen(), **changes)
        assert error.value.code is ErrorCode.INVALID_FIELD
        assert error.value.field == field
        assert error.value.expected
        assert error.value.got
        assert client.infer(seen(), execution="prefix", executed_until=1, seed=1).actions.size
    refused = count(metrics, 'ganglion_refused_frames_total{reason="invalid_field"}') - before
    assert refused == len(BAD)


def test_ticks_that_go_back_are_refused_until_a_reset(client, metrics):
    before = count(metrics, 'ganglion_errors_total{code="invalid_field"}')
    client.infer(seen(), executed_until=40)
    with pytest.raises(ReplyError, match="executed_until: expected at least 40") as error:
        client.infer(seen(), executed_until=39)
    assert "reset" in error.value.advice
    assert count(metrics, 'ganglion_errors_total{code="invalid_field"}') == before + 1
    assert client.infer(seen(), executed_until=40).seq == 2
    client.reset()
    assert client.infer(seen(), executed_until=0).actions.size


def test_a_clock_that_jumps_back_is_ignored_counted_and_said(client, metrics):
    before = count(metrics, "ganglion_clock_jumps_total")
    times_ns = (5_000_000_000, 2_000_000_000, 2_500_000_000, 2**62)
    replies = [client.infer(seen(), obs_time_ns=at_ns) for at_ns in times_ns]
    assert [reply.obs_time_ns for reply in replies] == list(times_ns)
    assert [bool(reply.notes) for reply in replies] == [False, True, False, False]
    assert "obs_time_ns ran back by 3000.000 ms" in replies[1].notes[0]
    assert count(metrics, "ganglion_clock_jumps_total") == before + 1


def test_an_overtaken_observation_is_no_clock_jump(server, metrics):
    before = count(metrics, "ganglion_clock_jumps_total")
    with bare(server) as socket:
        read(socket)
        for seq, at_ns in ((5, 500), (4, 400), (6, 600)):
            answer = ask(socket, seen(seq=seq, obs_time_ns=at_ns))
            assert answer.get("notes", []) == []
    assert count(metrics, "ganglion_clock_jumps_total") == before


def test_an_observation_older_than_the_newest_is_superseded_whatever_its_tick(server):
    with bare(server) as socket:
        read(socket)
        assert ask(socket, seen(seq=10, executed_until=10))["obs_seq"] == 10
        for seq in (10, 9):
            error = ask(socket, seen(seq=seq, executed_until=30))["error"]
            assert error["code"] == "superseded"
        assert ask(socket, seen(seq=11, executed_until=12))["context_seq"] == 11


def test_chunks_under_way_rest_on_the_newest_observation_they_could_read(client):
    """Sent without waiting; every request is answered once, with rows of a known observation."""
    newest, answers = -1, []
    for index in range(12):
        newest = client.request(
            seen(), execution="prefix", executed_until=3 * index, inference_delay_hint=3, seed=index
        )
        answers += [client.poll(timeout_s=0.004)]
    while len([answer for answer in answers if answer is not None]) < 12:
        answer = client.poll(timeout_s=TIMEOUT_S)
        assert answer is not None, "an observation was never answered"
        answers.append(answer)
    replies = [answer for answer in answers if isinstance(answer, Reply)]
    codes = {answer.code for answer in answers if isinstance(answer, ReplyError)}
    assert codes <= {ErrorCode.SUPERSEDED}
    assert replies
    assert all(reply.seq <= reply.context_seq <= newest for reply in replies)
