"""Gating: the gates of all sessions, and when each learns what its robot's instruction attends to.

Called by `pipeline.dispatch` on the loop's thread, for every observation that goes into the engine and every chunk that
leaves it. Knows pages and models through `Attention` only.
"""

from collections.abc import Mapping
from typing import Protocol

from ganglion.metrics import Metrics
from ganglion.pipeline.gate import Gate, GateConfig
from ganglion.pipeline.patch_grid import BoolArray
from ganglion.spec import PolicySpec
from ganglion.types import Float32Array, Observation, SessionId


class Attention(Protocol):
    """Who can say what a chunk attended to: the engine."""

    def attended(
        self, session_id: SessionId, model: str, *, prompt: str, actions: Float32Array
    ) -> Mapping[str, BoolArray]:
        """View key -> bool [row, column] of its tokens; empty when nobody knows."""
        ...


class Gating:
    """One gate a session, or none at all when the service has no gate.

    The model is asked only where motion may pass unseen (`motion_rms`): otherwise everything that differs by more than
    noise is perceived anyway, attended to or not.
    """

    def __init__(
        self, config: GateConfig | None, spec: PolicySpec, attention: Attention, metrics: Metrics
    ) -> None:
        self._config, self._spec = config, spec
        self._attention, self._metrics = attention, metrics
        self._gates: dict[SessionId, Gate] = {}
        self._chunks: dict[SessionId, Float32Array] = {}  # the newest of each session

    def admit(self, observation: Observation, now_s: float) -> Observation:
        """What the engine shall perceive in its place."""
        if self._config is None:
            return observation
        gate = self._gates.get(observation.session_id)
        if gate is None:
            gate = self._gates[observation.session_id] = Gate(self._config, self._spec.views)
        gate.instruct(observation.prompt)
        if self._config.motion_rms:
            self._heed(gate, observation, now_s)
        gated, decisions = gate.admit(observation, now_s=now_s)
        for decision in decisions.values():
            self._metrics.gated_views.inc(action=decision.action)
        return gated

    def execute(self, session_id: SessionId, actions: Float32Array) -> None:
        """This chunk goes to the session's robot."""
        if session_id in self._gates:
            self._chunks[session_id] = actions

    def forget(self, session_id: SessionId) -> None:
        """The session was reset or closed."""
        self._gates.pop(session_id, None)
        self._chunks.pop(session_id, None)

    def _heed(self, gate: Gate, observation: Observation, now_s: float) -> None:
        chunk = self._chunks.get(observation.session_id)
        if chunk is None or not gate.is_heed_due(now_s):
            return
        attended = self._attention.attended(
            observation.session_id, self._spec.name, prompt=observation.prompt, actions=chunk
        )
        if attended:
            gate.heed(attended, now_s=now_s)
