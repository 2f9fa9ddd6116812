"""Well-formed messages of the side channel, to be sent as they are or broken by a test."""

from typing import Any

from ganglion.serve.side import Impair, Watch


def hello(robot_id: str = "arm-1", session_id: str = "s-1", **changes: Any) -> dict[str, Any]:
    body = {
        "robot_id": robot_id, "session_id": session_id, "world": "metaworld",
        "task": "drawer-open", "prompt": "open the drawer", "control_hz": 20.0,
    }  # fmt: skip
    return {"hello": {**body, **changes}}


def telemetry(**changes: Any) -> dict[str, Any]:
    body = {
        "tick": 7, "queue": [[0.1, -0.2], [0.3, 0.4]], "rate_hz": 20.0, "obs_age_ms": 48.0,
        "num_misses": 1, "num_holds": 2, "episode": 3, "num_episodes": 3, "num_successes": 2,
        "is_success": False,
    }  # fmt: skip
    return {"telemetry": {**body, **changes}}


class Ears:
    """What the hub told one robot."""

    def __init__(self) -> None:
        self.watches: list[Watch] = []
        self.impairs: list[Impair] = []
        self.num_take_overs = 0

    def tell(self, wish: Watch | Impair) -> None:
        if isinstance(wish, Watch):
            self.watches.append(wish)
        else:
            self.impairs.append(wish)

    def take_over(self) -> None:
        self.num_take_overs += 1
