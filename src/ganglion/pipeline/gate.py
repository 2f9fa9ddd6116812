"""Gate: which parts of an observation are perceived anew, by comparing each view with the image that its pages hold.

Called where an observation is admitted to the engine. Owns, per view, a *reference image*: the picture whose features
the session's pages hold. Pure numpy; knows no features, pages or models, only that tokens lie on a grid.

| action | when | reference image afterwards |
|---|---|---|
| skip | nothing but noise | the old one |
| patches | some patches changed, or are attended and due | the old one, with the new pixels of those patches |
| full | nothing old, refresh due, or changes all over the view | the new one |

The engine is handed the reference image instead of the camera's, so its features are exact and content-addressing does
the rest: a skipped view has the key of the pages that are there. What is lost is lost in the image, and bounded:
**every cell of the reference (4x4 pixels where a patch is 16x16) is within `change_rms` of the camera's image, root
mean square over its pixels and channels (cells that an attended token sees: `attended_rms`), and no part of it is older
than `refresh_ms`**. The difference is to the image that the pages hold and not to the last one, so slow motion cannot
creep past.

From: VLA-Cache (arXiv 2502.02175: reuse what is static, but not what the instruction attends to) and Alpha-Service (arXiv
2510.14359: skip, cheap or full, with hysteresis and a hard refresh). Dimensions: row and column of the token grid.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from math import sqrt

import numpy as np

from ganglion.config import PipelineConfig
from ganglion.errors import ConfigError, FieldError
from ganglion.pipeline.patch_grid import (
    BoolArray,
    cell_sums,
    crop_share,
    only_read_by,
    reading_tokens,
    seen_patches,
)
from ganglion.spec import ViewSpec
from ganglion.types import Float32Array, Observation, Renewal, UInt8Array

CELLS_PER_PATCH = (
    4  # a side: what moves a little moves cells of 4x4 pixels, noise is averaged out of them
)
# Noise on both images has a mean square of 2 std^2. Over a cell's 48 numbers it reaches 3.1 times that once in 1e11, 2.4
# times once in 5e6 (chi-squared).
CHANGE_RATIO = 3.1
SETTLE_RATIO = 2.4
SETTLE_SHARE = 0.7
UNASKED_IMAGES = (
    3  # in a busy scene comparing is time lost: one image in four is asked whether it is over
)


class Perceive(StrEnum):
    """What is done about one view."""

    SKIP = "skip"
    PATCHES = "patches"
    FULL = "full"


class Reason(StrEnum):
    """Why."""

    NOTHING_OLD = "nothing old"
    REFRESH_DUE = "refresh due"
    CHANGED_ALL_OVER = "changed all over"
    BUSY = "changed all over a moment ago"
    SOME_CHANGED = "some changed"
    ATTENDED_DUE = "attended due"
    UNCHANGED = "unchanged"


# with these the reference shows what it showed before, but for noise
_OLD_NEWS = (Reason.UNCHANGED, Reason.REFRESH_DUE, Reason.ATTENDED_DUE)


@dataclass(frozen=True, slots=True, kw_only=True)
class GateConfig:
    """How still a view must be to be skipped.

    `noise_std`: the camera's noise, in levels of 255. `motion_rms`: change beyond noise that a cell may hold unseen, in
    levels, root mean square; one pixel in 16 that changes by 80 makes 20. `refresh_ms`: a view is perceived whole at least that often; what
    the instruction attends to at least every `attended_refresh_ms` (0: in every frame, VLA-Cache's own rule).
    `state_change`: while all views are skipped, a state none of whose numbers differs by more, in the robot's units,
    counts as the last one, and nothing at all is perceived. `full_share`: a view is perceived whole when the crop around its changes is that large (the parts of a crop cost
    more than those of an image), and in parts again below `calm_share`.
    """

    noise_std: float = 2.0
    motion_rms: float = 0.0
    refresh_ms: float = 1000.0
    attended_refresh_ms: float = 500.0
    state_change: float = 0.0
    full_share: float = 0.75
    calm_share: float = 0.65

    def __post_init__(self) -> None:
        if not 0.25 <= self.noise_std <= 64.0:
            raise _bad("noise_std", "levels of 255 from 0.25 to 64", self.noise_std)
        if not 0.0 <= self.motion_rms <= 255.0:
            raise _bad("motion_rms", "levels of 255 from 0 to 255", self.motion_rms)
        if not self.state_change >= 0.0:
            raise _bad("state_change", "at least 0", self.state_change)
        if not self.refresh_ms > 0.0:
            raise _bad("refresh_ms", "more than 0", self.refresh_ms)
        if not 0.0 <= self.attended_refresh_ms <= self.refresh_ms:
            raise _bad(
                "attended_refresh_ms",
                f"0 to refresh_ms ({self.refresh_ms:g})",
                self.attended_refresh_ms,
            )
        if not 0.0 <= self.calm_share <= self.full_share <= 1.0:
            raise ConfigError(
                f"gate: expected 0 <= calm_share <= full_share <= 1, got {self.calm_share:g} and "
                f"{self.full_share:g}",
                next_step="raise full_share or lower calm_share",
            )

    @property
    def change_rms(self) -> float:
        """Levels of 255: a cell that differs by more than that has changed."""
        return sqrt(2.0 * CHANGE_RATIO * self.noise_std**2 + self.motion_rms**2)

    @property
    def settle_rms(self) -> float:
        """The same for patches that changed in the last image: they are seen through to the end of a motion."""
        return sqrt(2.0 * SETTLE_RATIO * self.noise_std**2 + (SETTLE_SHARE * self.motion_rms) ** 2)

    @property
    def attended_rms(self) -> float:
        """The same for what the instruction attends to: just above noise."""
        return self.noise_std * sqrt(2.0 * SETTLE_RATIO)


def gate_config(config: PipelineConfig) -> GateConfig | None:
    """What the settings of a server say; None: it has no gate."""
    if not config.gate_refresh_ms:
        return None
    return GateConfig(
        noise_std=config.gate_noise_std,
        motion_rms=config.gate_motion_rms,
        state_change=config.gate_state_change,
        refresh_ms=config.gate_refresh_ms,
        attended_refresh_ms=config.gate_refresh_ms / 2,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewDecision:
    """What is done about one view.

    `image`: what the pages are to hold, read-only. `tokens`: bool [row, column], which of them are computed anew; all
    others equal those of `base`, the image before (None: nothing to take over).
    """

    action: Perceive
    reason: Reason
    image: UInt8Array
    base: UInt8Array | None
    tokens: BoolArray


class ViewGate:
    """One camera of one session. A token at (row, column) sees patches (row - 1 .. row, column - 1 .. column).

    That is the reach of stride-2 3x3 convolutions (`models.layers.ConvStem`): every patch has at most four readers.
    """

    def __init__(self, config: GateConfig, *, height_px: int, width_px: int, patch_px: int) -> None:
        if patch_px % CELLS_PER_PATCH:
            raise FieldError(
                "patch_px", expected=f"a multiple of {CELLS_PER_PATCH}", got=str(patch_px)
            )
        self._config, self._shape, self._patch_px = config, (height_px, width_px, 3), patch_px
        self.grid = (-(-height_px // patch_px), -(-width_px // patch_px))
        self._cell_px = patch_px // CELLS_PER_PATCH
        # the difference, with a border of zeros up to whole patches
        whole = (self.grid[0] * patch_px, self.grid[1] * patch_px, 3)
        self._difference = np.zeros(whole, np.float32)
        self._inner = self._difference[:height_px, :width_px]
        self._in_cell = cell_sums(width_px, whole[1], self._cell_px)
        first_rows = np.arange(0, whole[0], self._cell_px)
        num_rows = np.clip(height_px - first_rows, 1, self._cell_px)
        self._row_weights = (1.0 / num_rows).astype(np.float32)[:, None]
        # squared levels, by patch: noise passes below them
        self._change = np.float32(config.change_rms**2)
        self._settle = np.float32(config.settle_rms**2)
        self._attended = np.float32(config.attended_rms**2)
        self.reset()

    def reset(self) -> None:
        """Forget the reference: the next image is perceived whole."""
        self._reference: UInt8Array | None = None
        self._reference_floats: Float32Array = np.zeros(self._shape, np.float32)
        self._is_moving = np.zeros(self.grid, np.bool_)  # patches that changed in the last image
        self._is_reference_new = False
        self._is_busy = False
        self._num_unasked = 0  # images left to perceive whole without comparing
        self._refreshed_s = self._attended_s = 0.0

    def decide(
        self, image: UInt8Array, *, now_s: float, attended: BoolArray | None = None
    ) -> ViewDecision:
        """Compare `image` uint8 [height, width, 3] with the reference and move the reference on.

        `attended`: bool [row, column], the tokens that matter under the present instruction. A clock that goes backwards
        makes a refresh due. Raises FieldError for another shape.
        """
        self._check(image, attended)
        old = self._reference
        if old is None:
            return self._full(image, now_s, Reason.NOTHING_OLD)
        if _is_due(now_s, self._refreshed_s, self._config.refresh_ms):
            return self._full(image, now_s, Reason.REFRESH_DUE)
        if self._num_unasked:
            self._num_unasked -= 1
            return self._full(image, now_s, Reason.BUSY)
        changed = self._is_moving = self._changed_patches(old, image, attended)
        reason = Reason.SOME_CHANGED if changed.any() else Reason.UNCHANGED
        if attended is not None and _is_due(
            now_s, self._attended_s, self._config.attended_refresh_ms
        ):
            self._attended_s = now_s
            if attended.any():
                changed = changed | seen_patches(attended)
                reason = Reason.ATTENDED_DUE if reason is Reason.UNCHANGED else reason
        if reason is Reason.UNCHANGED:
            self._is_busy = False
            return ViewDecision(
                action=Perceive.SKIP, reason=reason, image=old, base=old, tokens=changed
            )
        tokens = reading_tokens(changed)
        was_busy = self._is_busy
        limit = self._config.calm_share if was_busy else self._config.full_share
        self._is_busy = crop_share(tokens) >= limit
        if self._is_busy:
            self._num_unasked = UNASKED_IMAGES if was_busy else 0
            return self._full(image, now_s, Reason.CHANGED_ALL_OVER)
        return ViewDecision(
            action=Perceive.PATCHES,
            reason=reason,
            image=self._patched(old, image, tokens),
            base=old,
            tokens=tokens,
        )

    def _check(self, image: UInt8Array, attended: BoolArray | None) -> None:
        if image.shape != self._shape or image.dtype != np.uint8:
            raise FieldError(
                "image",
                expected=f"uint8 {self._shape} [height, width, 3]",
                got=f"{image.dtype} {image.shape}",
            )
        if attended is not None and attended.shape != self.grid:
            raise FieldError(
                "attended", expected=f"{self.grid} [row, column]", got=str(attended.shape)
            )

    def _changed_patches(
        self, old: UInt8Array, image: UInt8Array, attended: BoolArray | None
    ) -> BoolArray:
        """Bool [row, column]: patches with a cell that differs by more than noise does."""
        if self._is_reference_new:
            np.copyto(self._reference_floats, old)
            self._is_reference_new = False
        np.copyto(self._inner, image)
        np.subtract(self._inner, self._reference_floats, out=self._inner)
        by_row = self._difference.reshape(-1, self._cell_px, self._difference.shape[1] * 3)
        squares = np.einsum("ijk,ijk->ik", by_row, by_row)
        cells = (squares @ self._in_cell) * self._row_weights
        height, width = self.grid
        most = cells.reshape(height, CELLS_PER_PATCH, -1).max(axis=1)
        most = most.reshape(height, width, CELLS_PER_PATCH).max(axis=2)
        limit = np.where(self._is_moving, self._settle, self._change)
        if attended is not None:
            limit[seen_patches(attended)] = self._attended
        changed: BoolArray = most > limit
        return changed

    def _full(self, image: UInt8Array, now_s: float, reason: Reason) -> ViewDecision:
        self._refreshed_s = self._attended_s = now_s
        base, reference = self._reference, self._keep(image.copy())
        return ViewDecision(
            action=Perceive.FULL,
            reason=reason,
            image=reference,
            base=base,
            tokens=np.ones(self.grid, np.bool_),
        )

    def _patched(self, old: UInt8Array, image: UInt8Array, tokens: BoolArray) -> UInt8Array:
        """The old reference with the new pixels of every patch whose readers are all computed anew."""
        patched, px = old.copy(), self._patch_px
        for row, column in np.argwhere(only_read_by(tokens)).tolist():
            place = slice(row * px, row * px + px), slice(column * px, column * px + px)
            patched[place] = image[place]
        return self._keep(patched)

    def _keep(self, reference: UInt8Array) -> UInt8Array:
        reference.flags.writeable = False
        self._reference, self._is_reference_new = reference, True
        return reference


class Gate:
    """All cameras of one session, and what its instruction attends to. Views without patches pass as they are."""

    def __init__(self, config: GateConfig, views: Sequence[ViewSpec]) -> None:
        self._config = config
        self._views = {
            view.key: ViewGate(
                config, height_px=view.height, width_px=view.width, patch_px=view.patch_px
            )
            for view in views
            if view.patch_px
        }
        self.reset()

    def reset(self) -> None:
        """Forget everything: all views are perceived whole (the robot was moved, its session was reset)."""
        for view in self._views.values():
            view.reset()
        self._actions: dict[str, Perceive] = {}
        self._attended: dict[str, BoolArray] = {}
        self._heeded_s: float | None = None
        self._has_changed = False  # since `heed`
        self._prompt = ""
        self._state: Float32Array | None = None  # that the last prefill rests on

    def admit(
        self, observation: Observation, *, now_s: float
    ) -> tuple[Observation, dict[str, ViewDecision]]:
        """The observation that the engine shall perceive, and what was decided about each view that has patches.

        The instruction passes as it is. Raises FieldError for an image that is missing or of another shape than its view.
        """
        self.instruct(observation.prompt)
        missing = self._views.keys() - observation.images.keys()
        if missing:
            raise FieldError(min(missing), expected="an image", got="nothing")
        decisions = {
            key: self.decide(key, observation.images[key], now_s=now_s) for key in self._views
        }
        images = {key: decision.image for key, decision in decisions.items()}
        bases = {
            key: decision.base
            for key, decision in decisions.items()
            if decision.action is Perceive.PATCHES and decision.base is not None
        }
        is_all = decisions.keys() == observation.images.keys()
        state = self.state(observation.state) if is_all else observation.state
        renewal = Renewal(
            images=bases,
            tokens={key: decisions[key].tokens for key in bases},
            is_repeat=state is not observation.state,
        )
        gated = replace(
            observation,
            images={**observation.images, **images},
            state=state,
            renewal=renewal if bases or renewal.is_repeat else None,
        )
        return gated, decisions

    def instruct(self, prompt: str) -> None:
        """The instruction of the next observation: another one attends to other things."""
        if prompt != self._prompt:
            self._prompt, self._attended, self._heeded_s = prompt, {}, None
            self._state = None

    def decide(self, key: str, image: UInt8Array, *, now_s: float) -> ViewDecision:
        """`ViewGate.decide` for one view."""
        attended = self._attended.get(key)
        decision = self._views[key].decide(image, now_s=now_s, attended=attended)
        self._actions[key] = decision.action
        self._has_changed |= decision.reason not in _OLD_NEWS
        return decision

    def state(self, state: Float32Array) -> Float32Array:
        """After all views were decided: the last state, if nothing moved; else `state`, which is the last one from now on."""
        last = self._state
        if (
            last is not None
            and last.shape == state.shape
            and all(action is Perceive.SKIP for action in self._actions.values())
            and float(np.abs(state - last).max(initial=0.0)) <= self._config.state_change
        ):
            return last
        self._state = state.copy()
        return state

    def is_heed_due(self, now_s: float) -> bool:
        """Is it worth asking the model anew what it attends to?

        At most every `refresh_ms`; not while nothing changed, nor while all views are perceived whole anyway.
        """
        if all(action is Perceive.FULL for action in self._actions.values()):
            return False
        if self._heeded_s is None:
            return True
        return self._has_changed and _is_due(now_s, self._heeded_s, self._config.refresh_ms)

    def heed(self, attended: Mapping[str, BoolArray], *, now_s: float) -> None:
        """From now on these tokens matter: view key -> bool [row, column]."""
        self._attended, self._heeded_s, self._has_changed = dict(attended), now_s, False


def _is_due(now_s: float, last_s: float, period_ms: float) -> bool:
    """Exactly one period later counts; a clock that went backwards too."""
    return now_s < last_s or (now_s - last_s) * 1e3 >= period_ms


def _bad(name: str, expected: str, got: float) -> ConfigError:
    return ConfigError(f"gate.{name}: expected {expected}, got {got:g}", next_step=f"change {name}")
