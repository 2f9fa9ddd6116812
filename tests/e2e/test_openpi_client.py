"""openpi's own client from PyPI drives our server: the protocol is theirs, byte for byte."""

import numpy as np
import pytest

from ganglion.config import ServeConfig
from ganglion.serve.app import ServerThread
from ganglion.serve.fake import FakeService
from tests.e2e.edge_stage import CORNER, SPEC, observation

openpi = pytest.importorskip(
    "openpi_client.websocket_client_policy",
    reason="needs: pip install --no-deps openpi-client==0.1.2 dm-tree typing_extensions",
)
broker = pytest.importorskip("openpi_client.action_chunk_broker")

# The published client uses connect() without `with`, which websockets 17 calls deprecated, and has no close().
pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:connect\\(\\) must be used as a context manager:DeprecationWarning"
    ),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture
def service():
    with FakeService(SPEC) as fake:
        yield fake


@pytest.fixture
def server(service):
    with ServerThread(service) as thread:
        yield thread


@pytest.fixture
def policy(server):
    client = openpi.WebsocketClientPolicy("127.0.0.1", server.port)
    yield client
    client._ws.close()


def test_metadata_and_chunks(policy, service):
    assert policy.get_server_metadata()["policy"] == "fake"
    for number in range(1, 21):
        reply = policy.infer(observation())
        assert reply["actions"].shape == (50, 4)
        assert np.array_equal(reply["actions"], service.fake_actions(number))
        assert reply["server_timing"]["infer_ms"] > 0
        assert ("prev_total_ms" in reply["server_timing"]) == (number > 1)


def test_the_observation_arrives_as_it_was_sent(policy, service):
    image = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    policy.infer(observation(**{CORNER: image}, prompt="push the puck"))
    assert np.array_equal(service.received[-1].images[CORNER], image)
    assert service.received[-1].prompt == "push the puck"


def test_the_action_chunk_broker_slices_our_reply(policy, service):
    robot = broker.ActionChunkBroker(policy, action_horizon=10)
    expected = np.concatenate([service.fake_actions(1)[:10], service.fake_actions(2)[:10]])
    steps = [robot.infer(observation()) for _ in range(20)]
    assert np.array_equal(np.stack([step["actions"] for step in steps]), expected)
    assert {step["model_version"] for step in steps} == {"fake-1"}
    robot.reset()
    assert np.array_equal(robot.infer(observation())["actions"], service.fake_actions(3)[0])


def test_an_error_is_raised_with_our_text_and_the_next_request_works(policy):
    with pytest.raises(RuntimeError, match=rf"{CORNER}: expected uint8 \[16, 16, 3\], got nothing"):
        policy.infer(observation(**{CORNER: ...}))
    assert policy.infer(observation())["actions"].shape == (50, 4)


def test_what_droid_robots_send_besides_is_ignored(policy):
    extra = {
        "observation/joint_position": np.zeros(7),
        "observation/gripper_position": np.float32(0.5),
        "observation/exterior_image_1_left": np.zeros((224, 224, 3), np.uint8),
    }
    assert policy.infer(observation(**extra))["actions"].shape == (50, 4)


def test_two_robots_at_once(server, policy, service):
    other = openpi.WebsocketClientPolicy(f"ws://127.0.0.1:{server.port}/any/path")
    assert policy.infer(observation())["session_id"] != other.infer(observation())["session_id"]
    other._ws.close()


def test_the_key_as_its_client_sends_it(service):
    with ServerThread(service, config=ServeConfig(port=0, api_key="k1")) as server:
        client = openpi.WebsocketClientPolicy("127.0.0.1", server.port, api_key="k1")
        assert client.infer(observation())["actions"].shape == (50, 4)
        client._ws.close()
