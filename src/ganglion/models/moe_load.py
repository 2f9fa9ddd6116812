"""Where a checkpoint keeps the parameters of a mixture-of-experts layer. Called by `models.decoder_load`.

Reads no file: `moe_parts` lists tensors by name, the caller reads each and hands it to `Part.place`, so that no more than
one tensor of a folder is in memory besides the parameters. Names are below `model.layers.<n>.`:

| parameter of Moe | Mixtral | Qwen, OLMoE, DeepSeek, GLM4, dots1 | GPT-OSS | Granite |
|---|---|---|---|---|
| router.weight | block_sparse_moe.gate.weight | mlp.gate.weight | mlp.router.weight | block_sparse_moe.router.layer.weight |
| router.bias | | | mlp.router.bias | |
| router.correction | | mlp.gate.e_score_correction_bias | | |
| experts.gate_up_proj[e] | ...experts.e.w1.weight, w3 | mlp.experts.e.gate_proj.weight, up_proj | | |
| all of it | ...experts.gate_up_proj | mlp.experts.gate_up_proj | mlp.experts.gate_up_proj (*) | block_sparse_moe.input_linear.weight |
| experts.down_proj[e] | ...experts.e.w2.weight | mlp.experts.e.down_proj.weight | | |
| all of it | ...experts.down_proj | mlp.experts.down_proj | mlp.experts.down_proj (*) | block_sparse_moe.output_linear.weight |
| experts.gate_up_bias, down_bias | | | mlp.experts.gate_up_proj_bias (*), down_proj_bias | |
| shared.gate_up_proj.weight | | mlp.shared_expert(s).gate_proj.weight, up_proj | | |
| shared.down_proj.weight | | mlp.shared_expert(s).down_proj.weight | | |
| shared_gate.weight | | mlp.shared_expert_gate.weight | | |

(*) GPT-OSS multiplies from the left, x W, with gate and up interleaved: `place` turns both round. As published its
experts are MXFP4: ..._blocks (two numbers of 4 bits in a byte, the first in the low half) and ..._scales (an exponent for
32 numbers), in place of one tensor; both are exact in bfloat16. "mlp." in place of "block_sparse_moe." is how
transformers names Mixtral's in memory.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from ganglion.errors import CheckpointError
from ganglion.models.moe import Moe, MoeSpec

FP4_NUMBERS = (
    0.0,
    0.5,
    1.0,
    1.5,
    2.0,
    3.0,
    4.0,
    6.0,
)  # of the low three bits; the fourth is the sign
FP4_GROUP = 32  # numbers that share a scale
FP4_BIAS = 127


class Form(StrEnum):
    """How a tensor stands in a checkpoint."""

    PLAIN = "plain"  # (..., high, low), as here
    LEFT = "left"  # (expert, low, high)
    FP4 = "fp4"  # (expert, high, low / 32, 16) bytes
    FP4_SCALES = "fp4_scales"  # (expert, high, low / 32) bytes, placed after its FP4


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One tensor of a checkpoint: `name` below its layer, `shape` there, and where it goes.

    `parameter` is a name of Moe's state; `expert` an index into its first dimension (None: all); `row` where in the
    next one the tensor begins. `is_interleaved`: rows are gate, up, gate, up, ...
    """

    name: str
    shape: tuple[int, ...]
    parameter: str
    expert: int | None = None
    row: int = 0
    form: Form = Form.PLAIN
    is_interleaved: bool = False

    @torch.no_grad()
    def place(self, moe: Moe, tensor: Tensor) -> None:
        """Copy into the parameter, in its dtype. Raises CheckpointError for another shape or kind of number."""
        is_bytes = self.form in (Form.FP4, Form.FP4_SCALES)
        if tuple(tensor.shape) != self.shape or (tensor.dtype == torch.uint8) != is_bytes:
            raise CheckpointError(
                f"{self.name}: expected shape {self.shape}{' of bytes' if is_bytes else ''}, "
                f"got {tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}",
                next_step="check that config.json and the weights are of the same model",
            )
        target = _state(moe, self.parameter)
        if self.form is Form.LEFT:
            tensor = tensor.mT
        if self.expert is not None:
            target = target[self.expert]
        if not self.is_interleaved:
            self._write(target.narrow(0, self.row, tensor.shape[0]), tensor)
            return
        for half, rows in zip(
            target.chunk(2, dim=1), (tensor[:, 0::2], tensor[:, 1::2]), strict=True
        ):
            self._write(half, rows)

    def _write(self, target: Tensor, tensor: Tensor) -> None:
        if self.form is Form.FP4:
            numbers = torch.tensor(FP4_NUMBERS, dtype=target.dtype)
            numbers = torch.cat([numbers, -numbers])
            for expert, blocks in zip(target, tensor, strict=True):  # one at a time: small peak
                pairs = torch.stack([blocks & 15, blocks >> 4], dim=-1)
                expert.copy_(numbers[pairs.flatten(1).int()])
        elif self.form is Form.FP4_SCALES:
            scales = torch.exp2(tensor.float() - FP4_BIAS).to(target.dtype)
            for expert, scale in zip(target, scales, strict=True):
                expert.view(expert.shape[0], -1, FP4_GROUP).mul_(scale[..., None])
        else:
            target.copy_(tensor)


def _state(moe: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    tensor = getattr(moe.get_submodule(path), leaf)
    assert isinstance(tensor, Tensor), f"{name} is a {type(tensor).__name__}"
    return tensor


def moe_parts(spec: MoeSpec, names: Collection[str]) -> tuple[Part, ...]:
    """Every tensor of one layer, in the order in which to place them.

    `names`: what there is below `model.layers.<n>.`; it decides between forms (experts apart or stacked, MXFP4 or not).
    Where neither is there, the published form is listed, so that the caller reports what is missing.
    """
    if spec.family == "gpt_oss":
        return tuple(_gpt_oss(spec, names))
    if spec.family == "granitemoe":
        return tuple(_granite(spec, names))
    return tuple(_usual(spec, names))


def _usual(spec: MoeSpec, names: Collection[str]) -> Iterator[Part]:
    """Mixtral, and all who name their experts gate_proj, up_proj, down_proj."""
    gate, up, down, root = "gate_proj", "up_proj", "down_proj", "mlp"
    if spec.family == "mixtral":
        gate, up, down = "w1", "w3", "w2"
        root = "mlp" if "mlp.gate.weight" in names else "block_sparse_moe"
    num_experts, width, inner = spec.router.num_experts, spec.width, spec.inner
    yield Part(name=f"{root}.gate.weight", shape=(num_experts, width), parameter="router.weight")
    if spec.router.has_correction:
        yield Part(
            name=f"{root}.gate.e_score_correction_bias",
            shape=(num_experts,),
            parameter="router.correction",
        )
    if f"{root}.experts.gate_up_proj" in names:
        yield from _stacked(spec, f"{root}.experts.gate_up_proj", f"{root}.experts.down_proj")
    else:
        for expert in range(num_experts):
            below = f"{root}.experts.{expert}"
            for name, row in ((gate, 0), (up, inner)):
                yield Part(
                    name=f"{below}.{name}.weight",
                    shape=(inner, width),
                    parameter="experts.gate_up_proj",
                    expert=expert,
                    row=row,
                )
            yield Part(
                name=f"{below}.{down}.weight",
                shape=(width, inner),
                parameter="experts.down_proj",
                expert=expert,
            )
    if spec.shared_inner:
        yield from _shared(spec, f"{root}.shared_expert" + ("" if spec.is_shared_gated else "s"))


def _shared(spec: MoeSpec, below: str) -> Iterator[Part]:
    width, inner = spec.width, spec.shared_inner
    for name, row in (("gate_proj", 0), ("up_proj", inner)):
        yield Part(
            name=f"{below}.{name}.weight",
            shape=(inner, width),
            parameter="shared.gate_up_proj.weight",
            row=row,
        )
    yield Part(
        name=f"{below}.down_proj.weight",
        shape=(width, inner),
        parameter="shared.down_proj.weight",
    )
    if spec.is_shared_gated:
        yield Part(name=f"{below}_gate.weight", shape=(1, width), parameter="shared_gate.weight")


def _stacked(spec: MoeSpec, gate_up: str, down: str) -> Iterator[Part]:
    num_experts, width, inner = spec.router.num_experts, spec.width, spec.inner
    yield Part(
        name=gate_up, shape=(num_experts, 2 * inner, width), parameter="experts.gate_up_proj"
    )
    yield Part(name=down, shape=(num_experts, width, inner), parameter="experts.down_proj")


def _granite(spec: MoeSpec, names: Collection[str]) -> Iterator[Part]:
    root = "block_sparse_moe"
    shape = (spec.router.num_experts, spec.width)
    if f"{root}.experts.gate_up_proj" in names:
        yield Part(name=f"{root}.router.weight", shape=shape, parameter="router.weight")
        yield from _stacked(spec, f"{root}.experts.gate_up_proj", f"{root}.experts.down_proj")
    else:
        yield Part(name=f"{root}.router.layer.weight", shape=shape, parameter="router.weight")
        yield from _stacked(spec, f"{root}.input_linear.weight", f"{root}.output_linear.weight")


def _gpt_oss(spec: MoeSpec, names: Collection[str]) -> Iterator[Part]:
    num_experts, width, inner = spec.router.num_experts, spec.width, spec.inner
    yield Part(name="mlp.router.weight", shape=(num_experts, width), parameter="router.weight")
    yield Part(name="mlp.router.bias", shape=(num_experts,), parameter="router.bias")
    for what, high, low in (("gate_up", 2 * inner, width), ("down", width, inner)):
        below, is_interleaved = f"mlp.experts.{what}_proj", what == "gate_up"
        if below in names:
            forms: tuple[tuple[str, tuple[int, ...], Form], ...] = (
                (below, (num_experts, low, high), Form.LEFT),
            )
        else:
            groups = low // FP4_GROUP
            forms = (
                (f"{below}_blocks", (num_experts, high, groups, FP4_GROUP // 2), Form.FP4),
                (f"{below}_scales", (num_experts, high, groups), Form.FP4_SCALES),
            )
        for name, shape, form in forms:
            yield Part(
                name=name,
                shape=shape,
                parameter=f"experts.{what}_proj",
                form=form,
                is_interleaved=is_interleaved,
            )
        yield Part(
            name=f"{below}_bias",
            shape=(num_experts, high),
            parameter=f"experts.{what}_bias",
            is_interleaved=is_interleaved,
        )
