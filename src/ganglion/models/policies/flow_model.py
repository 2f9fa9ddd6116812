"""FlowModel: a FlowPolicy as a Model, its keys, values and latents cut into pages. Called by the engine's executor.

The rows of a KV page are tokens, so that pages laid end to end are a sequence without a copy.

| stage | reads | writes | shared by content |
|---|---|---|---|
| view.i | the image | features | image bytes |
| text | the instruction | KV of its tokens | instruction |
| observation | view.*, text, the state | KV of view and state tokens | no |
| denoise | text, observation, its own latent | the latent x_tau | no |
"""

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ganglion.layout import PageKind, PageLayout
from ganglion.models.base import StageBatch
from ganglion.models.policies.flow import FlowPolicy
from ganglion.models.policies.guidance import Aim, Pull
from ganglion.models.policies.patches import attended, encode_patches, view_attention
from ganglion.models.policies.transforms import Processor
from ganglion.spec import PolicySpec, Stage
from ganglion.types import Execution, Float32Array, Observation, Row, SpanKind

KV_SLOTS = (
    4  # divides the 16 text tokens and leaves 1 of 52 slots empty behind the 51 observation tokens
)
PULLS = {Execution.RTC: Pull.JACOBIAN, Execution.RTC_IDENTITY: Pull.IDENTITY}
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class FlowModel:
    """Stages over pages for one checkpoint; `num_flow_steps` Euler steps from noise to actions."""

    def __init__(self, policy: FlowPolicy, processor: Processor, spec: PolicySpec) -> None:
        config = policy.config
        self._policy, self._processor, self.spec = policy, processor, spec
        self._dtype = next(policy.parameters()).dtype
        self._num_flow_steps = spec.num_flow_steps
        dtype = _DTYPE_NAMES[self._dtype]
        kv_shape = (KV_SLOTS, config.num_layers, 2, config.num_heads, config.head_dim)
        kv = PageLayout(name="kv", kind=PageKind.KV, shape=kv_shape, dtype=dtype, slots=KV_SLOTS)
        feature = PageLayout(
            name="feature",
            kind=PageKind.FEATURE,
            shape=(config.num_view_tokens, config.trunk_width),
            dtype=dtype,
            slots=config.num_view_tokens,
        )
        state = PageLayout(
            name="state",
            kind=PageKind.STATE,
            shape=(config.horizon, config.action_dim),
            dtype="float32",
            slots=config.horizon,
        )
        self.layouts = (kv, feature, state)
        self._view_of_stage = {f"view.{at}": key for at, key in enumerate(config.view_keys)}
        views = tuple(
            _stage(name, SpanKind.ENCODE, 1, feature, config.num_view_tokens, is_shared=True)
            for name in self._view_of_stage
        )
        num_text, num_seen = config.num_text_tokens, config.num_observation_tokens
        text = _stage("text", SpanKind.PREFILL, num_text, kv, num_text, is_shared=True)
        observation = _stage(
            "observation",
            SpanKind.PREFILL,
            num_seen,
            kv,
            num_seen,
            reads=(*self._view_of_stage, "text"),
            is_repeatable=True,
        )
        denoise = _stage(
            "denoise",
            SpanKind.DENOISE,
            spec.num_flow_steps,
            state,
            config.horizon,
            reads=("text", "observation"),
            is_divisible=True,
        )
        self.stages = (*views, text, observation, denoise)

    def key(self, stage: Stage, observation: Observation) -> bytes:
        digest = hashlib.blake2b(self.spec.version.encode(), digest_size=16)
        view = self._view_of_stage.get(stage.name)
        if view is not None:
            digest.update(np.ascontiguousarray(observation.images[view]).data)
        else:
            digest.update(observation.prompt.encode())
        return digest.digest()

    def run(self, stage: Stage, batch: StageBatch) -> Tensor:
        if stage.kind is SpanKind.ENCODE:
            return self._encode(stage, batch)
        if stage.kind is SpanKind.DENOISE:
            return self._denoise(stage, batch)
        return self._prefill_text(batch) if stage.name == "text" else self._prefill(batch)

    def emit(self, pages: Tensor, observations: tuple[Observation, ...]) -> Float32Array:
        return self._processor.actions(pages[:, 0])

    def attended(
        self, observation: Observation, reads: Mapping[str, Tensor], actions: Float32Array
    ) -> dict[str, Bool[np.ndarray, "row column"]]:
        """VLA-Cache's rule (arXiv 2502.02175): tokens with at least twice an even share of their view's attention."""
        config = self._policy.config
        latents = self._processor.prefix(actions[None])
        tau = torch.full(
            latents.shape[:2], 1.0 - 1.0 / self._num_flow_steps
        )  # of the last flow step
        shares = view_attention(self._policy, latents, tau, self._context(reads))
        grids = {
            view.key: (-(-view.height // config.patch_px), -(-view.width // config.patch_px))
            for view in self.spec.views
        }
        return {
            key: mask.reshape(grids[key])
            for key, mask in zip(config.view_keys, attended(shares)[0], strict=True)
        }

    def _context(self, reads: Mapping[str, Tensor]) -> Float[Tensor, "b layer 2 context head dim"]:
        pages = torch.cat([reads["text"], reads["observation"]], dim=1)
        return _from_pages(pages)[:, :, :, : self._policy.config.num_context_tokens]

    def _encode(self, stage: Stage, batch: StageBatch) -> Tensor:
        view = self._view_of_stage[stage.name]
        index = self._policy.config.view_keys.index(view)
        images = np.stack([observation.images[view] for observation in batch.observations])
        pixels = torch.from_numpy(images)
        if not batch.bases:
            return self._policy.encode_view(index, pixels)[:, None]
        whole = [at for at in range(len(pixels)) if at not in batch.bases]
        parts = list(batch.bases)
        features = torch.stack([batch.bases[at][0] for at in parts])
        tokens = np.stack([self._renewed(batch.observations[at], view) for at in parts])
        out = features.new_empty(len(pixels), *features.shape[1:])
        out[parts] = encode_patches(self._policy, index, pixels[parts], features, tokens)
        if whole:
            out[whole] = self._policy.encode_view(index, pixels[whole])
        return out[:, None]

    @staticmethod
    def _renewed(observation: Observation, view: str) -> Bool[np.ndarray, "row column"]:
        assert observation.renewal is not None, "the base of a renewal without the renewal"
        return observation.renewal.tokens[view]

    def _prefill_text(self, batch: StageBatch) -> Tensor:
        prompts = [observation.prompt for observation in batch.observations]
        return _to_pages(self._policy.prefill_text(self._processor.tokens(prompts)))

    def _prefill(self, batch: StageBatch) -> Tensor:
        features = torch.cat([batch.reads[name][:, 0] for name in self._view_of_stage], dim=1)
        state = self._processor.state(np.stack([o.state for o in batch.observations]))
        return _to_pages(
            self._policy.prefill_observation(
                features, state.to(self._dtype), _from_pages(batch.reads["text"])
            )
        )

    def _denoise(self, stage: Stage, batch: StageBatch) -> Tensor:
        config = self._policy.config
        widths = torch.tensor([self._width(row) for row in batch.rows], dtype=torch.float32)
        context = self._context(batch.reads)
        latents = batch.reads[stage.name][:, 0]
        tau = torch.tensor([row.first_unit for row in batch.rows], dtype=torch.float32) * widths
        taus = tau[:, None].repeat(1, config.horizon)
        for at, row in enumerate(batch.rows):
            latent = latents[at]
            if row.is_new:
                latent.copy_(self._begun(row))
            elif row.shift:
                _move_up(latent, row.shift)
            if row.plan is not None and row.observation.execution is Execution.PREFIX:
                num_committed = row.plan.num_committed
                latent[:num_committed] = self._processor.prefix(row.plan.actions[:num_committed])
                taus[at, :num_committed] = 1.0
        aims = tuple(self._aim(row) for row in batch.rows)
        latents = self._policy.denoise(latents, taus, widths, context, batch.num_units, aims)
        return latents[:, None]

    def _width(self, row: Row) -> float:
        """Of one flow step: a row may take fewer and wider ones than the checkpoint says."""
        return 1.0 / (row.num_units or self._num_flow_steps)

    def _aim(self, row: Row) -> Aim | None:
        pull = PULLS.get(row.observation.execution)
        if pull is None or row.plan is None:
            return None
        return Aim(
            pull=pull,
            known=self._processor.prefix(row.plan.actions),
            num_committed=row.plan.num_committed,
        )

    def _begun(self, row: Row) -> Float[Tensor, "horizon action"]:
        """Noise; for a warm start, mixed with what is being executed as far as its flow time says."""
        noise = self._noise(row.observation)
        if row.first_unit == 0 or row.plan is None:
            return noise
        known = self._processor.prefix(row.plan.actions[: len(noise)])
        rest = known[-1:].expand(len(noise) - len(known), -1)
        tau = row.first_unit * self._width(row)
        return (1 - tau) * noise + tau * torch.cat([known, rest])

    def _noise(self, observation: Observation) -> Float[Tensor, "horizon action"]:
        """Normal noise from the request's seed, else from its session and number: repeatable either way."""
        seed = observation.seed
        if seed is None:
            name = f"{observation.session_id}/{observation.seq}".encode()
            seed = int.from_bytes(hashlib.blake2b(name, digest_size=7).digest(), "little")
        generator = torch.Generator().manual_seed(seed)
        config = self._policy.config
        return torch.randn(config.horizon, config.action_dim, generator=generator)


def _move_up(latent: Float[Tensor, "horizon action"], shift: int) -> None:
    """Row i becomes row i - shift, in place; the last one fills what is left."""
    shift = min(shift, len(latent) - 1)
    latent[:-shift] = latent[shift:].clone()
    latent[-shift:] = latent[-shift - 1]


def _stage(
    name: str,
    kind: SpanKind,
    num_units: int,
    layout: PageLayout,
    num_slots: int,
    *,
    reads: tuple[str, ...] = (),
    is_shared: bool = False,
    is_divisible: bool = False,
    is_repeatable: bool = False,
) -> Stage:
    return Stage(
        name=name,
        kind=kind,
        num_units=num_units,
        reads=reads,
        layout=layout.name,
        num_pages=layout.num_pages(num_slots),
        num_slots=num_slots,
        is_shared=is_shared,
        is_divisible=is_divisible,
        is_repeatable=is_repeatable,
    )


def _to_pages(
    kv: Float[Tensor, "b layer 2 token head dim"],
) -> Float[Tensor, "b page slot layer 2 head dim"]:
    """Tokens into pages of KV_SLOTS; the slots behind the last token are zero."""
    by_token = kv.permute(0, 3, 1, 2, 4, 5)
    num_empty = -by_token.shape[1] % KV_SLOTS
    if num_empty:
        empty = by_token.new_zeros((by_token.shape[0], num_empty, *by_token.shape[2:]))
        by_token = torch.cat([by_token, empty], dim=1)
    return by_token.reshape(by_token.shape[0], -1, KV_SLOTS, *by_token.shape[2:])


def _from_pages(
    pages: Float[Tensor, "b page slot layer 2 head dim"],
) -> Float[Tensor, "b layer 2 token head dim"]:
    """A view, no copy: pages end to end are the sequence."""
    return pages.flatten(1, 2).permute(0, 2, 3, 1, 4, 5)
