"""Vision tower: tiles of a picture -> tokens of the decoder's width. SigLIP, a pixel shuffle, one linear map.

Made and filled by `vision_load`, driven by the engine as an ImageEncoder. Knows no page and no picture file. Dimension
names: tile, patch, token, width, high, wide (pixels), head, dim.
"""

from itertools import pairwise

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional

from ganglion.layout import PageKind, PageLayout
from ganglion.models.layers import Linear, attend
from ganglion.models.moe_spec import Activation
from ganglion.models.packing import pack
from ganglion.models.vision import TileState
from ganglion.models.vision_spec import VisionSpec

_MAX_SLOTS = 16
# Of one unit of work. Whole layers of 1,024 patches would be a seventh faster, and robots would wait for one six times
# as long.
_PROJECTED_PATCHES, _ATTENDED_PATCHES = 512, 128


class TowerLayer(nn.Module):
    """Pre-norm attention of every patch of a tile to every other, and a feed-forward layer."""

    def __init__(self, spec: VisionSpec, dtype: torch.dtype) -> None:
        super().__init__()
        self._num_heads = spec.num_heads
        self._approximate = "tanh" if spec.activation == Activation.GELU_TANH else "none"
        self._is_silu = spec.activation == Activation.SILU
        self.attention_norm = nn.LayerNorm(spec.width, eps=spec.norm_eps, dtype=dtype)
        self.qkv = Linear(spec.width, 3 * spec.width, dtype=dtype)
        self.out = Linear(spec.width, spec.width, dtype=dtype)
        self.mlp_norm = nn.LayerNorm(spec.width, eps=spec.norm_eps, dtype=dtype)
        self.mlp_in = Linear(spec.width, spec.mlp_width, dtype=dtype)
        self.mlp_out = Linear(spec.mlp_width, spec.width, dtype=dtype)

    def project(self, x: Float[Tensor, "tile patch width"]) -> Float[Tensor, "tile patch qkv"]:
        """Query, key and value of these patches."""
        rows: Tensor = self.qkv(self.attention_norm(x))
        return rows

    def finish(
        self,
        x: Float[Tensor, "tile part width"],
        rows: Float[Tensor, "tile patch qkv"],
        part: slice,
    ) -> Float[Tensor, "tile part width"]:
        """The layer's output for the patches `part` of each tile, which are `x`, of what all patches project to."""
        by_head = rows.view(*rows.shape[:2], 3, self._num_heads, -1)
        query, key, value = by_head[:, part, 0], by_head[:, :, 1], by_head[:, :, 2]
        x = self.out.forward_onto(attend(query, key, value), x)
        hidden = self.mlp_in(self.mlp_norm(x))
        if self._is_silu:
            hidden = functional.silu(hidden)
        else:
            hidden = functional.gelu(hidden, approximate=self._approximate)
        return self.mlp_out.forward_onto(hidden, x)


class VisionTower(nn.Module):
    """An ImageEncoder. `levels` float32 [3, 256]: what each level of each colour counts for the tower.

    Weights are random until a loader fills them; `dtype` is that of pages too.
    """

    def __init__(
        self,
        spec: VisionSpec,
        levels: Float[Tensor, "3 256"],
        *,
        tile_px: int,
        name: str,
        dtype: torch.dtype,
        max_page_bytes: int,
    ) -> None:
        super().__init__()
        self._spec, self._side = spec, tile_px // spec.patch_px
        num_patches = self._side**2
        self._parts = tuple(
            [(True, part) for part in _parts(num_patches, _PROJECTED_PATCHES)]
            + [(False, part) for part in _parts(num_patches, _ATTENDED_PATCHES)]
        )
        self._layout = feature_layout(
            spec,
            name=name,
            dtype=str(dtype).removeprefix("torch."),
            max_page_bytes=max_page_bytes,
        )
        self._levels = levels
        with torch.device("cpu"):  # also where the weights are only promised
            self._positions = position_ids(self._side, spec.side)
        self.patches = Linear(spec.patch_values, spec.width, dtype=dtype)
        self.positions = nn.Parameter(torch.zeros(spec.side**2, spec.width, dtype=dtype))
        self.layers = nn.ModuleList(TowerLayer(spec, dtype) for _ in range(spec.num_layers))
        self.norm = nn.LayerNorm(spec.width, eps=spec.norm_eps, dtype=dtype)
        shuffled = spec.width * spec.shuffle**2
        self.connector = Linear(shuffled, spec.out_width, bias=False, dtype=dtype)

    @property
    def layout(self) -> PageLayout:
        """As ImageEncoder.layout."""
        return self._layout

    @property
    def num_units(self) -> int:
        """As ImageEncoder.num_units."""
        return self._spec.num_layers * len(self._parts)

    def pack(self) -> None:
        """Lay out the weights for this CPU, where that pays. Not to be saved or trained then."""
        pack(self)

    def begin(self, pixels: UInt8[Tensor, "tile high wide 3"]) -> TileState:
        """As ImageEncoder.begin; tiles are squares of `tile_px`."""
        values = self.normalised(pixels)
        side, patch_px = self._side, self._spec.patch_px
        by_patch = values.view(-1, 3, side, patch_px, side, patch_px).permute(0, 2, 4, 1, 3, 5)
        flat = by_patch.reshape(-1, side * side, self._spec.patch_values)
        hidden: Tensor = self.patches(flat.to(self.positions.dtype))
        hidden = hidden + self.positions[self._positions]
        rows = hidden.new_empty((*hidden.shape[:2], 3 * self._spec.width))
        return TileState(hidden=hidden, rows=rows)

    def normalised(
        self, pixels: UInt8[Tensor, "tile high wide 3"]
    ) -> Float[Tensor, "tile 3 high wide"]:
        """float32, what the tower sees."""
        planes = pixels.permute(3, 0, 1, 2).flatten(1).long()
        values = torch.gather(self._levels, 1, planes)
        return values.view(3, *pixels.shape[:3]).transpose(0, 1).contiguous()

    def run(self, state: TileState, units: range) -> None:
        """As ImageEncoder.run: per layer, all patches are projected, part by part, then attend and go on."""
        for unit in units:
            at, within = divmod(unit, len(self._parts))
            layer, (is_projected, part) = self.layers[at], self._parts[within]
            assert isinstance(layer, TowerLayer)
            if is_projected:
                state.rows[:, part] = layer.project(state.hidden[:, part])
            else:
                state.hidden[:, part] = layer.finish(state.hidden[:, part], state.rows, part)

    def encode(self, pixels: UInt8[Tensor, "tile high wide 3"]) -> Float[Tensor, "token out_width"]:
        """Features of tiles, in one go."""
        state = self.begin(pixels)
        self.run(state, range(self.num_units))
        return self.features(state)

    def features(self, state: TileState) -> Float[Tensor, "token out_width"]:
        """As ImageEncoder.features."""
        shuffle, width = self._spec.shuffle, self._spec.width
        side = self._side // shuffle
        by_square = self.norm(state.hidden).view(-1, side, shuffle, side, shuffle, width)
        flat = by_square.transpose(2, 3).reshape(-1, shuffle**2 * width)
        out: Tensor = self.connector(flat)
        return out


def _parts(num_patches: int, most: int) -> list[slice]:
    """Of even sizes, none with more than `most` patches."""
    count = -(-num_patches // most)
    bounds = [num_patches * at // count for at in range(count + 1)]
    return [slice(low, high) for low, high in pairwise(bounds)]


def num_tile_tokens(spec: VisionSpec, tile_px: int) -> int:
    """Tokens of the decoder that one tile becomes."""
    return (tile_px // spec.patch_px // spec.shuffle) ** 2


def feature_layout(spec: VisionSpec, *, name: str, dtype: str, max_page_bytes: int) -> PageLayout:
    """Pages "<name>.image" of features, as many tokens in one as `max_page_bytes` holds, at most 16.

    Raises ValueError where not even one fits.
    """
    slots = _MAX_SLOTS
    while True:
        layout = PageLayout(
            name=f"{name}.image",
            kind=PageKind.FEATURE,
            shape=(slots, spec.out_width),
            dtype=dtype,
            slots=slots,
        )
        if layout.page_bytes <= max_page_bytes:
            return layout
        if slots == 1:
            raise ValueError(
                f"features of one token take {layout.page_bytes} bytes, a page at most {max_page_bytes}"
            )
        slots //= 2


def position_ids(side: int, trained_side: int) -> Int[Tensor, " patch"]:
    """Which trained position each patch of a square of `side` x `side` has.

    Fractions of the picture sorted into `trained_side` equal parts, in float32: what rounds up there must round up here.
    """
    bounds = torch.arange(1 / trained_side, 1.0, 1 / trained_side)
    step = 1.0 / torch.tensor(side)
    places = torch.arange(side, dtype=torch.float32) * step
    along = torch.bucketize(torch.clamp(places, max=1.0 - 1e-6), bounds, right=True)
    return (along[:, None] * trained_side + along[None, :]).flatten()
