import http.client
import json
import socket

import numpy as np
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from ganglion import wire
from ganglion.clock import RealClock
from ganglion.config import ServeConfig
from ganglion.errors import ConfigError
from ganglion.metrics import Metrics
from ganglion.serve.app import Server, ServerThread
from ganglion.serve.fake import FakeService
from tests.e2e.edge_stage import SPEC, WAIT_S, ask, bare, observation, read

KEY = "correct horse battery staple"


@pytest.fixture(scope="module")
def service():
    with FakeService(SPEC) as fake:
        yield fake


@pytest.fixture(scope="module")
def server(service):
    with ServerThread(service, config=ServeConfig(port=0, allowed_hosts=("Edge.Local",))) as thread:
        yield thread


@pytest.fixture(scope="module")
def locked(service):
    with ServerThread(service, config=ServeConfig(port=0, api_key=KEY)) as thread:
        yield thread


def get(server, path, *, method="GET", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT_S)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, headers=names)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response, body


# --- probes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/livez", "/healthz"])
def test_alive_from_the_start(server, path):
    response, body = get(server, path)
    assert (response.status, body) == (200, b"OK\n")


def test_ready_says_the_stage_until_it_is():
    with FakeService(SPEC, is_ready=False) as service, ServerThread(service) as server:
        response, body = get(server, "/readyz")
        assert response.status == 503
        assert json.loads(body) == {"is_ready": False, "stage": "loading weights", "sessions": 0}
        service.set_ready()
        response, body = get(server, "/readyz")
        assert response.status == 200
        assert json.loads(body)["stage"] == "serving"


def test_models_lists_the_policy_as_openai_lists_models(server):
    response, body = get(server, "/v1/models")
    listing = json.loads(body)
    assert response.status == 200
    assert listing["object"] == "list"
    model = listing["data"][0]
    assert (model["id"], model["object"]) == ("fake", "model")
    assert model["horizon"] == 50


def test_metrics_are_prometheus_text(service):
    metrics = Metrics()
    with ServerThread(service, metrics=metrics) as server, bare(server) as robot:
        read(robot)
        ask(robot, observation())
        response, body = get(server, "/metrics")
    assert response.getheader("content-type").startswith("text/plain")
    assert b'ganglion_connections{channel="robot"} 1.0' in body
    assert b'ganglion_frames_total{dialect="openpi"} 1.0' in body
    assert b"ganglion_sessions 1.0" in body
    assert b"ganglion_overhead_seconds_count 1.0" in body


def test_the_dashboard_is_mounted(server):
    response, body = get(server, "/")
    assert response.status == 200
    assert b"<html" in body


def test_unknown_paths_and_methods(server):
    assert get(server, "/nothing")[0].status == 404
    assert get(server, "/livez", method="POST")[0].status == 405
    assert get(server, "/livez", method="DELETE")[0].status == 405


def test_a_websocket_on_an_http_path_is_refused(server):
    with pytest.raises(InvalidStatus) as refused, bare(server, "/metrics"):
        pass
    assert refused.value.response.status_code == 404


def test_huge_headers_are_cut_off(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as sock:
        sock.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000)
        assert sock.recv(100).startswith(b"HTTP/1.1 400")


def test_half_a_header_is_cut_off_in_time(monkeypatch):
    monkeypatch.setattr("ganglion.serve.limits.REQUEST_TIMEOUT_S", 0.2)
    with (
        FakeService(SPEC) as service,
        ServerThread(service) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as slow,
    ):
        slow.sendall(b"GET /livez HTT")
        with bare(server) as robot:
            read(robot)
            assert slow.recv(1) == b""
            assert ask(robot, observation())["obs_seq"] == 1  # older than that and still welcome


# --- from where --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "127.0.0.1",
        "localhost:8000",
        "[::1]:8000",
        "192.168.1.5:8000",
        "edge.local",
        "EDGE.LOCAL:80",
    ],
)
def test_known_hosts(server, host):
    assert get(server, "/v1/models", Host=host)[0].status == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "evil.example:8000",
        "",
        "@localhost",
        "[evil]",
    ],
)
@pytest.mark.parametrize("path", ["/", "/metrics", "/livez", "/dashboard/app.js"])
def test_a_name_that_is_not_ours_is_refused(server, host, path):
    assert get(server, path, Host=host)[0].status == 403


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "null",
        "http://localhost:1",
        "file://",
        "http://127.0.0.1.evil.example",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS"])
def test_pages_of_others_are_refused_by_every_method(server, origin, method):
    assert get(server, "/v1/models", method=method, Origin=origin)[0].status == 403


def test_our_own_page_is_not(server):
    assert get(server, "/v1/models", Origin=server.url)[0].status == 200
    with bare(server, origin=server.url) as page:
        assert read(page)["policy"] == "fake"


@pytest.mark.parametrize("path", ["/", "/v1/dashboard", "/v1/robots/side"])
def test_websockets_of_other_pages_are_refused(server, path):
    with pytest.raises(InvalidStatus) as refused, bare(server, path, origin="http://evil.example"):
        pass
    assert refused.value.response.status_code == 403


def test_a_robot_may_call_the_machine_by_any_name(server):
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S)
    with connect("ws://arm-box.factory:8000/", sock=sock, proxy=None) as robot:
        assert read(robot)["policy"] == "fake"


# --- keys --------------------------------------------------------------------------------------------------------

OPEN = ("/livez", "/healthz")
CLOSED = (
    "/",
    "/readyz",
    "/metrics",
    "/v1/models",
    "/dashboard/app.js",
    "/nothing",
    "//livez",
    "/livez/",
    "/LIVEZ",
)
WRONG = (
    {},
    {"Authorization": "Api-Key wrong"},
    {"Authorization": f"Basic {KEY}"},
    {"Authorization": KEY},
    {"Authorization": "Api-Key "},
    {"Cookie": "ganglion_key=wrong"},
    {"Cookie": "ganglion_key"},
    {"Cookie": '"=;'},
)


@pytest.mark.parametrize("path", OPEN)
def test_probes_need_no_key(locked, path):
    assert get(locked, path)[0].status == 200


@pytest.mark.parametrize("path", CLOSED)
@pytest.mark.parametrize("headers", WRONG)
def test_everything_else_needs_the_key(locked, path, headers):
    assert get(locked, path, **headers)[0].status == 401


@pytest.mark.parametrize("scheme", ["Api-Key", "Bearer", "bearer"])
def test_the_key_opens(locked, scheme):
    assert get(locked, "/v1/models", Authorization=f"{scheme} {KEY}")[0].status == 200
    with bare(locked, additional_headers={"Authorization": f"{scheme} {KEY}"}) as robot:
        read(robot)
        assert ask(robot, observation())["actions"].dtype == np.float32


@pytest.mark.parametrize("path", ["/", "/any", "/v1/dashboard", "/v1/robots/side"])
@pytest.mark.parametrize("headers", [{}, {"Authorization": "Api-Key wrong"}])
def test_websockets_need_the_key(locked, path, headers):
    with pytest.raises(InvalidStatus) as refused, bare(locked, path, additional_headers=headers):
        pass
    assert refused.value.response.status_code == 401
    assert b"API key" in refused.value.response.body


def test_a_browser_trades_the_key_for_a_cookie(locked):
    response, _ = get(locked, f"/?a=1&key={KEY.replace(' ', '+')}")
    assert response.status == 303
    assert response.getheader("location") == "/?a=1"
    cookie = response.getheader("set-cookie")
    assert "HttpOnly" in cookie
    assert "samesite=strict" in cookie.lower()
    value = cookie.partition(";")[0]
    assert get(locked, "/", Cookie=value)[0].status == 200
    with bare(
        locked, "/v1/dashboard", origin=locked.url, additional_headers={"Cookie": value}
    ) as page:
        page.recv(timeout=WAIT_S)


def test_a_wrong_key_in_the_address_gets_no_cookie(locked):
    response, _ = get(locked, "/?key=wrong")
    assert (response.status, response.getheader("set-cookie")) == (401, None)


def test_signing_in_never_leaves_this_server(locked):
    response, _ = get(locked, f"//evil.example/?key={KEY.replace(' ', '+')}")
    assert response.status == 303
    assert response.getheader("location") == "/evil.example/"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "edge.local"])
def test_other_addresses_are_refused_without_a_key(service, host):
    with pytest.raises(ConfigError, match=r"serve\.api_key is not set"):
        Server.bind(service, config=ServeConfig(host=host, port=0))


def test_an_empty_key_is_no_key(service):
    with pytest.raises(ConfigError, match="empty"):
        Server.bind(service, config=ServeConfig(port=0, api_key=" "))


def test_a_taken_port_is_named(server, service):
    with pytest.raises(ConfigError, match=f"127.0.0.1:{server.port}"):
        Server.bind(service, config=ServeConfig(port=server.port))


# --- while a model is busy ---------------------------------------------------------------------------------------


def test_a_step_that_does_not_end_does_not_slow_the_probes(server, service):
    with bare(server) as robot:
        read(robot)
        service.block()
        robot.send(wire.encode(observation()))
        clock, waits_ms = RealClock(), []
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT_S)
        for _ in range(300):
            start_s = clock.now_s()
            connection.request("GET", "/livez")
            assert connection.getresponse().read() == b"OK\n"
            waits_ms.append((clock.now_s() - start_s) * 1e3)
        connection.close()
        service.unblock()
        assert read(robot)["obs_seq"] == 1
    assert np.percentile(waits_ms, 99) < 20
