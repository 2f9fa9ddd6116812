"""Stage for the dashboard: a real server with a scripted Service, and scripted robots that send real JPEGs.

Used by test_dashboard and by `python -m tests.e2e.dashboard_camera --staged`. Everything shown is a script.
"""

import io
import math
import threading
import time
from collections import deque
from typing import Any

from PIL import Image, ImageDraw
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from ganglion.clock import RealClock
from ganglion.config import ServeConfig
from ganglion.errors import FieldError
from ganglion.serve.app import ServerThread
from ganglion.serve.dashboard.routes import SIDE_PATH
from ganglion.serve.fake_language import FakeLanguageService, fake_language_spec
from ganglion.service import OnDone
from ganglion.spec import PolicySpec
from ganglion.types import (
    Command,
    DegreeStats,
    Execution,
    LivePage,
    Observation,
    OverridePrompt,
    PaceStats,
    PageId,
    PieceRecord,
    PoolStats,
    RequestId,
    RobotId,
    RowRecord,
    ServiceStats,
    SessionId,
    SessionStats,
    SpanKind,
    StepRecord,
)
from ganglion.wire import decode, encode
from tests.e2e.dashboard_planners import MODEL, PLANNER_PAGES, ScriptedPlanners

HORIZON = 50
SPEC = PolicySpec(
    name="metaworld-ten",
    family="ganglion_flow",
    version="4f1c09b2d7aa51e0",
    views=(),
    state_key="observation.state",
    state_dim=4,
    action_dim=4,
    horizon=HORIZON,
    num_flow_steps=10,
    control_hz=20.0,
    action_low=(-1.0,) * 4,
    action_high=(1.0,) * 4,
)
TASKS = (
    ("drawer-open", "open the drawer"),
    ("button-press-topdown", "press the button from above"),
    ("window-close", "close the window"),
    ("pick-place", "pick up the puck and carry it to the goal"),
    ("faucet-open", "turn the faucet on"),
    ("door-close", "shut the door"),
    ("push", "push the puck to the goal"),
    ("handle-press", "press the handle down"),
)
PAGES_PER_LARGE = {"kv": 9, "feature": 36, "state": 64}
PAGES_PER_SESSION = {"kv": 5, "feature": 8, "state": 3}
STEP_PERIOD_S = 0.0125
DEGREE, STEPS_BETWEEN = 4, 3  # launches of one robot, in engine steps: one flow step each
REASON = "degree 4: 24.1 chunks/s a robot at 166 ms (degree 1: 11.8 at 85 ms; bound 250 ms)"
FORECASTS = (
    (1, 11.8, 85.0), (2, 17.9, 112.0), (3, 21.6, 139.0), (4, 24.1, 166.0), (5, 24.6, 203.0),
    (6, 25.0, 262.0),
)  # fmt: skip
PACE = PaceStats(
    degree=DEGREE,
    reason=REASON,
    max_age_ms=250.0,
    forecasts=tuple(
        DegreeStats(degree=degree, rate_hz=rate_hz, latency_ms=latency_ms)
        for degree, rate_hz, latency_ms in FORECASTS
    ),
)


class ScriptedService:
    """A Service whose statistics follow the clock; it keeps the commands that it gets."""

    def __init__(self, num_sessions: int, planners: ScriptedPlanners | None = None) -> None:
        self._planners, self._has_policy = planners, bool(num_sessions) or planners is None
        self._clock = RealClock()
        self._start_s = self._clock.now_s()
        self._prompts: dict[SessionId, str | None] = {
            session_id(at): None for at in range(num_sessions)
        }
        self._steps: deque[StepRecord] = deque(maxlen=400)
        self._num_steps = 0
        self._num_launches: dict[SessionId, int] = {}
        self._cursors: dict[RequestId, tuple[SessionId, int]] = {}  # chunks under way: flow steps
        self._next_request = 1
        self.commands: list[Command] = []

    @property
    def spec(self) -> PolicySpec:
        return SPEC

    def submit(self, observation: Observation, on_done: OnDone) -> RequestId:
        raise AssertionError("the dashboard submits nothing")

    def cancel(self, request_id: RequestId) -> None:
        raise AssertionError("the dashboard cancels nothing")

    def control(self, command: Command) -> None:
        self.commands.append(command)
        if command.session_id not in self._prompts:
            raise FieldError("session_id", expected="an open session", got=command.session_id)
        assert isinstance(command, OverridePrompt)
        self._prompts[command.session_id] = command.prompt

    def prompt(self, at: int) -> str:
        """What the session follows now."""
        return self._prompts.get(session_id(at)) or TASKS[at % len(TASKS)][1]

    def drop_session(self, at: int) -> None:
        """The robot closed its session."""
        del self._prompts[session_id(at)]

    def stats(self) -> ServiceStats:
        now_s = self._clock.now_s()
        while self._start_s + (self._num_steps + 1) * STEP_PERIOD_S < now_s:
            step = self._step(self._num_steps)
            self._num_steps += 1
            if step.pieces:
                self._steps.append(step)
            if self._planners is not None:
                end_s = step.start_s + step.run_us * 1e-6 if step.pieces else step.start_s
                self._planners.turn(end_s, until_s=step.start_s + STEP_PERIOD_S)
        age_s = now_s - self._start_s
        num_chunks = int(age_s * 24)
        sessions = tuple(
            SessionStats(
                session_id=key,
                robot_id=RobotId(f"arm-{at + 1}"),
                prompt=self.prompt(at),
                is_prompt_overridden=self._prompts[key] is not None,
                num_chunks=num_chunks,
                num_superseded=0,
                num_deadline_misses=0,
                num_errors=0,
                chunk_hz=24.0 + 0.4 * math.sin(age_s + at),
                last_infer_ms=160.0 + 12.0 * math.sin(3 * age_s + at),
                last_seq=num_chunks,
                context_version=self._num_launches.get(key, 0),
                num_pages=PAGES_PER_SESSION,
                in_flight=tuple(
                    request for request, (owner, _) in self._cursors.items() if owner == key
                ),
                execution=Execution.NAIVE if at == 3 else Execution.PREFIX,
                wait_ratio=0.31 if at == 3 else 0.04,
            )
            for at, key in self._open()
        )
        return ServiceStats(
            now_s=now_s,
            is_ready=True,
            stage="serving",
            sessions=sessions,
            pool=self._pool(num_chunks),
            language=None if self._planners is None else self._planners.stats(),
            steps=tuple(self._steps),
            num_requests=num_chunks * len(sessions),
            num_results=num_chunks * len(sessions),
            num_errors=0,
            num_cancelled=0,
            pace=PACE if self._has_policy else None,
            rung="10 flow steps, two views" if self._has_policy else None,
        )

    def _open(self) -> list[tuple[int, SessionId]]:
        return [(int(key.rpartition("-")[2]), key) for key in self._prompts]

    def _step(self, step: int) -> StepRecord:
        """Those whose turn it is perceive and launch a chunk; all chunks under way advance by one flow step."""
        start_s = self._start_s + step * STEP_PERIOD_S
        open_ = {key for _, key in self._open()}
        self._cursors = {
            request: (key, cursor)
            for request, (key, cursor) in self._cursors.items()
            if key in open_ and cursor < SPEC.num_flow_steps
        }
        launched = [key for at, key in self._open() if (step + at) % STEPS_BETWEEN == 0]
        new = []
        for key in launched:
            self._num_launches[key] = self._num_launches.get(key, 0) + 1
            request = RequestId(self._next_request)
            self._next_request += 1
            self._cursors[request] = (key, 0)
            new.append(self._row(request, 0, 1))
        pieces: list[PieceRecord] = []
        at_s = start_s + 0.0002
        flow = [self._row(request, cursor, 1) for request, (_, cursor) in self._cursors.items()]
        sorts = (
            ("vision", SpanKind.ENCODE, new, 2, 1700.0),
            ("trunk", SpanKind.PREFILL, new, 80, 1900.0),
            ("denoise", SpanKind.DENOISE, flow, 1, 6200.0),
        )
        for stage, kind, rows, units, run_us in sorts:
            if not rows:
                continue
            run_us *= 1 + 0.1 * math.sin(step * 1.7 + units)
            pieces.append(
                PieceRecord(
                    model=SPEC.name,
                    stage=stage,
                    kind=kind,
                    lane=0,
                    num_rows=len(rows),
                    num_units=units,
                    start_s=at_s,
                    run_us=run_us,
                    rows=tuple(rows),
                )
            )
            at_s += run_us * 1e-6
        self._cursors = {
            request: (key, cursor + 1) for request, (key, cursor) in self._cursors.items()
        }
        return StepRecord(
            step=step,
            start_s=start_s,
            run_us=(at_s - start_s) * 1e6 + 350.0,
            budget_us=20_000,
            num_waiting=len(self._cursors),
            pieces=tuple(pieces),
        )

    def _row(self, request: RequestId, cursor: int, num_units: int) -> RowRecord:
        key, _ = self._cursors[request]
        version = self._num_launches[key]
        num_since = -(-cursor // STEPS_BETWEEN)
        return RowRecord(
            session_id=key,
            request_id=request,
            seq=version - num_since,
            first_unit=cursor,
            num_left=SPEC.num_flow_steps - cursor - num_units,
            context_version=version,
            context_seq=version,
        )

    def _pool(self, num_chunks: int) -> PoolStats:
        live: list[LivePage] = []
        layouts = PAGES_PER_LARGE if self._has_policy else {}
        num_used = dict.fromkeys(layouts, 0)
        num_cached = dict.fromkeys(layouts, 0)
        next_large = 0
        if self._planners is not None:
            live, num_large = self._planners.pages(num_used, num_cached)
            next_large += num_large
        for layout, per_large in layouts.items():
            owners = [str(key) for _, key in self._open() for _ in range(PAGES_PER_SESSION[layout])]
            num_shared = 4 if layout == "kv" else 0
            num_old = 3 + num_chunks // 4 % 5
            owners = ["shared"] * num_shared + owners + ["cached"] * num_old
            for at, owner in enumerate(owners):
                live.append(
                    LivePage(
                        page_id=PageId((next_large + at // per_large) * per_large + at % per_large),
                        layout=layout,
                        kind=layout,
                        owner=owner,
                        num_refs={"shared": len(self._prompts), "cached": 0}.get(owner, 1),
                    )
                )
            num_used[layout], num_cached[layout] = len(owners) - num_old, num_old
            next_large += -(-len(owners) // per_large)
        return PoolStats(
            large_page_bytes=1 << 20,
            num_large_pages=128,
            num_free_large_pages=128 - next_large,
            pages_per_large=layouts if self._planners is None else layouts | PLANNER_PAGES,
            num_used_pages=num_used,
            num_cached_pages=num_cached,
            num_hits=3 * num_chunks,
            num_misses=num_chunks // 2 + 1,
            live_pages=tuple(live),
        )


def session_id(at: int) -> SessionId:
    """The session of the arm with this index."""
    return SessionId(f"session-{at}")


class ScriptedRobot:
    """One arm's end of the side channel: telemetry always, views while watched."""

    def __init__(self, at: int, port: int, service: ScriptedService) -> None:
        self._at, self._service = at, service
        self._url = f"ws://127.0.0.1:{port}{SIDE_PATH}"
        self._is_stopping = threading.Event()
        self.is_watched, self._max_view_hz = False, 1.0
        self.num_views = 0
        self.impairs: list[dict[str, Any]] = []
        self._delay_ms = 0.0
        self._thread = threading.Thread(target=self._run, name=f"robot-{at}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._is_stopping.set()
        self._thread.join(5)

    def _run(self) -> None:
        while not self._is_stopping.is_set():
            try:
                with connect(self._url, compression=None) as socket:
                    self._converse(socket)
            except (OSError, ConnectionClosed):
                self._is_stopping.wait(0.1)

    def _converse(self, socket: ClientConnection) -> None:
        task, prompt = TASKS[self._at % len(TASKS)]
        hello: dict[str, Any] = {
            "robot_id": f"arm-{self._at + 1}",
            "session_id": session_id(self._at),
            "world": "metaworld",
            "task": task,
            "prompt": prompt,
            "control_hz": 20.0,
        }
        if self._at != 2:  # this one cannot
            hello["impair"] = {"delay_ms": 0.0, "jitter_ms": 0.0, "loss": 0.0}
        socket.send(encode({"hello": hello}))
        start_s, view_s = time.monotonic(), 0.0
        while not self._is_stopping.is_set():
            self._read(socket)
            age_s = time.monotonic() - start_s + 7.3 * self._at
            socket.send(encode({"telemetry": self._telemetry(age_s)}))
            is_due = age_s - view_s >= 0.95 / self._max_view_hz
            if self.is_watched and is_due:
                view_s = age_s
                socket.send(encode({"jpeg": picture(self._at, age_s)}))
                self.num_views += 1
            self._is_stopping.wait(0.1)

    def _read(self, socket: ClientConnection) -> None:
        while True:
            try:
                message = decode(socket.recv(timeout=0, decode=False))
            except TimeoutError:
                return
            assert "error" not in message, message
            if message.get("type") == "impair":
                self.impairs.append(message)
                self._delay_ms = message["delay_ms"]
                continue
            self.is_watched, self._max_view_hz = message["watch"], message["max_view_hz"]

    def _telemetry(self, age_s: float) -> dict[str, Any]:
        tick = int(age_s * 20)
        num_left = HORIZON - tick % 8 - 3
        episode = int(age_s // 9)
        queue = [
            [
                0.8 * math.sin((tick + row) * (0.05 + 0.03 * dim) + dim + self._at)
                if dim < 3
                else (1.0 if (tick + row) % 120 > 60 else -0.6)
                for dim in range(4)
            ]
            for row in range(num_left)
        ]
        return {
            "tick": tick,
            "queue": queue,
            "rate_hz": 20.0 + 0.05 * math.sin(age_s),
            "obs_age_ms": 195.0 + 30 * math.sin(age_s * 2 + self._at) + 60 * (self._at == 3),
            "num_misses": 4 if self._at == 3 else 0,
            "num_holds": 1 if self._at == 3 else 0,
            "episode": episode,
            "num_episodes": episode,
            "num_successes": max(0, episode - (self._at == 3)),
            "is_success": age_s % 9 > 7,
            "reply_prompt": self._service.prompt(self._at),
            "latency_ms": 168.0 + 9 * math.sin(age_s) + self._delay_ms,
        }


def picture(at: int, age_s: float, size_px: int = 224) -> bytes:
    """A drawn arm over a table, as JPEG."""
    image = Image.new("RGB", (size_px, size_px), (34, 40, 48))
    pen = ImageDraw.Draw(image)
    for row in range(130):
        pen.line((0, row, size_px, row), fill=(38 + row // 5, 46 + row // 5, 56 + row // 4))
    pen.polygon([(0, 224), (30, 130), (194, 130), (224, 224)], fill=(134, 104, 78))
    hue = [(196, 74, 66), (222, 170, 60), (70, 140, 200), (90, 170, 110)][at % 4]
    pen.rectangle((128, 138, 176, 180), fill=hue, outline=(30, 30, 30))
    x = 80 + 46 * math.sin(age_s * 1.1 + at)
    y = 108 + 26 * math.sin(age_s * 0.8 + at)
    joints = [(60, 150), (48, 84), (x, y - 34), (x + 14, y)]
    pen.line(joints, fill=(214, 218, 224), width=13, joint="curve")
    for joint in joints:
        pen.ellipse((joint[0] - 8, joint[1] - 8, joint[0] + 8, joint[1] + 8), fill=(200, 62, 56))
    pen.line((x + 8, y, x + 8, y + 20), fill=(60, 64, 70), width=5)
    pen.line((x + 22, y, x + 22, y + 20), fill=(60, 64, 70), width=5)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=80)
    return out.getvalue()


class Stage:
    """Server and robots together; `with Stage(num_arms=4) as stage: stage.url`.

    `has_planners`: language models beside the robots; without arms and sessions: nothing but them.
    """

    def __init__(
        self, *, num_arms: int, num_sessions: int | None = None, has_planners: bool = False
    ) -> None:
        num_sessions = num_arms if num_sessions is None else num_sessions
        self.service = ScriptedService(num_sessions, ScriptedPlanners() if has_planners else None)
        self.language = (
            FakeLanguageService((fake_language_spec(MODEL),), step_s=0.02) if has_planners else None
        )
        self._is_language_only = has_planners and not num_sessions
        self.robots: list[ScriptedRobot] = []
        self._num_arms = num_arms
        self._server: ServerThread | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def __enter__(self) -> "Stage":
        if self.language is not None:
            self.language.__enter__()
        self.open_server()
        self.robots = [ScriptedRobot(at, self.port, self.service) for at in range(self._num_arms)]
        return self

    def __exit__(self, *_: object) -> None:
        for robot in self.robots:
            robot.close()
        self.close_server()
        if self.language is not None:
            self.language.__exit__(None, None, None)

    def open_server(self) -> None:
        """Serve, on the port of the last time if there was one."""
        self._server = ServerThread(
            self.service,
            config=ServeConfig(port=self.port),
            language=self.language,
            is_language_only=self._is_language_only,
        )
        self._server.start()
        self.port = self._server.port

    def close_server(self) -> None:
        """Stop serving; robots and page lose their sockets."""
        if self._server is not None:
            self._server.stop()
            self._server = None
