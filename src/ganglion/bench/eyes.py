"""Eyes: the perception of one robot in process, with or without a gate, and what each part of it took.

Called by `bench.gate`. Does what the server does with a session's pages, without the server, so that perception is all that
is timed. Milliseconds are CPU time of the calling thread, which does all the work (one torch thread).
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ganglion.models.policies.flow_checkpoint import FlowCheckpoint
from ganglion.models.policies.patches import (
    attended,
    encode_patches,
    refill_observation,
    view_attention,
)
from ganglion.pipeline.gate import Gate, GateConfig, Perceive, ViewDecision
from ganglion.types import Float32Array, UInt8Array


@dataclass(frozen=True, slots=True, kw_only=True)
class EyesConfig:
    """`gate`: None perceives every view whole. `heeds_instruction`: VLA-Cache's rule. `reuses_trunk`: its keys and values too."""

    gate: GateConfig | None = None
    heeds_instruction: bool = False
    reuses_trunk: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One observation perceived. `encode_ms`: by view, the gate's own time counted; empty `decisions` without a gate."""

    context_kv: Tensor  # [1, layer, 2, context, head, dim]
    decisions: Mapping[str, ViewDecision]
    gate_ms: Mapping[str, float]
    encode_ms: Mapping[str, float]
    prefill_ms: float


class Eyes:
    """One robot's newest features, keys and values, and how they come up to date."""

    def __init__(self, checkpoint: FlowCheckpoint, config: EyesConfig) -> None:
        self._policy, self._processor = checkpoint.policy, checkpoint.processor
        self._config = config
        sizes = checkpoint.policy.config
        self._keys = sizes.view_keys
        patch_px = sizes.patch_px
        self._grid = (-(-sizes.view_height_px // patch_px), -(-sizes.view_width_px // patch_px))
        self._gate = None if config.gate is None else Gate(config.gate, checkpoint.spec.views)
        self._features: dict[str, Tensor] = {}
        self._observation_kv: Tensor | None = None
        self._prefilled_s = -np.inf
        self._text: tuple[str, Tensor] | None = None

    @torch.inference_mode()
    def look(
        self, images: Mapping[str, UInt8Array], state: Float32Array, prompt: str, *, now_s: float
    ) -> Look:
        """Perceive one observation; `now_s` is the world's time."""
        text_kv = self._text_kv(prompt)
        if self._gate is not None:
            self._gate.instruct(prompt)
        decisions: dict[str, ViewDecision] = {}
        gate_ms: dict[str, float] = {}
        encode_ms: dict[str, float] = {}
        for index, key in enumerate(self._keys):
            start_ns = time.thread_time_ns()
            if self._gate is not None:
                decisions[key] = self._gate.decide(key, images[key], now_s=now_s)
                gate_ms[key] = (time.thread_time_ns() - start_ns) * 1e-6
                self._see(index, decisions[key])
            else:
                self._features[key] = self._encode(index, images[key])
            encode_ms[key] = (time.thread_time_ns() - start_ns) * 1e-6
        start_ns = time.thread_time_ns()
        observation_kv = self._prefill(state, text_kv, decisions, now_s)
        return Look(
            context_kv=torch.cat([text_kv, observation_kv], dim=3),
            decisions=decisions,
            gate_ms=gate_ms,
            encode_ms=encode_ms,
            prefill_ms=(time.thread_time_ns() - start_ns) * 1e-6,
        )

    def is_heed_due(self, now_s: float) -> bool:
        """Whether `heed` wants the chunk that rests on the last look."""
        if self._gate is None or not self._config.heeds_instruction:
            return False
        return self._gate.is_heed_due(now_s)

    @torch.inference_mode()
    def heed(self, look: Look, latents: Tensor, tau: float, *, now_s: float) -> float:
        """Ask which tokens the chunk `latents` [1, horizon, action] attended to, from now on; how many ms that took."""
        assert self._gate is not None, "without a gate nobody asks"
        start_ns = time.thread_time_ns()
        shares = view_attention(
            self._policy, latents, torch.full(latents.shape[:2], tau), look.context_kv
        )
        masks = {
            key: tokens.reshape(self._grid)
            for key, tokens in zip(self._keys, attended(shares)[0], strict=True)
        }
        self._gate.heed(masks, now_s=now_s)
        return (time.thread_time_ns() - start_ns) * 1e-6

    def _text_kv(self, prompt: str) -> Tensor:
        """Of the instruction: made once, as the server's shared pages are."""
        if self._text is None or self._text[0] != prompt:
            self._text = (prompt, self._policy.prefill_text(self._processor.tokens([prompt])))
            self._observation_kv = None
        return self._text[1]

    def _see(self, index: int, decision: ViewDecision) -> None:
        key = self._keys[index]
        if decision.action is Perceive.FULL:
            self._features[key] = self._encode(index, decision.image)
        elif decision.action is Perceive.PATCHES:
            self._features[key] = encode_patches(
                self._policy,
                index,
                _pixels(decision.image),
                self._features[key],
                decision.tokens[None],
            )

    def _encode(self, index: int, image: UInt8Array) -> Tensor:
        return self._policy.encode_view(index, _pixels(image))

    def _prefill(
        self,
        state: Float32Array,
        text_kv: Tensor,
        decisions: Mapping[str, ViewDecision],
        now_s: float,
    ) -> Tensor:
        policy, gate, old_kv = self._policy, self._config.gate, self._observation_kv
        if self._gate is not None:
            still = self._gate.state(state)
            if still is not state and old_kv is not None:
                return old_kv
        features = torch.cat([self._features[key] for key in self._keys], dim=1)
        normalised = self._processor.state(state[None]).to(policy.dtype)
        is_due = gate is None or (now_s - self._prefilled_s) * 1e3 >= gate.refresh_ms
        if self._config.reuses_trunk and not is_due and old_kv is not None:
            tokens = np.concatenate([decisions[key].tokens.ravel() for key in self._keys])
            observation_kv = refill_observation(
                policy, features, normalised, text_kv, old_kv, tokens[None]
            )
        else:
            observation_kv = policy.prefill_observation(features, normalised, text_kv)
            self._prefilled_s = now_s
        self._observation_kv = observation_kv
        return observation_kv


def _pixels(image: UInt8Array) -> Tensor:
    """uint8 [1, height, width, 3]. The gate's references are read-only, which torch does not know how to be."""
    if not image.flags.writeable:
        image = image.copy()
    return torch.from_numpy(image)[None]
