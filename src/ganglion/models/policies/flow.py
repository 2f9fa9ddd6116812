"""FlowPolicy: a small vision-language-action policy of today's shape (pi0, SmolVLA) with a flow-matching action expert.

Owns the network only. Called by the engine's executor (stage by stage), by `train` and by tests. Knows nothing of
pages, requests, units of the robot or words: images are uint8, states and actions normalised, text is token ids.

What attends to what, per layer (trunk layers 0..L-1; the expert has one block per trunk layer):

| tokens | attend to |
|---|---|
| text (T) | text: so its KV depends on the instruction alone and robots with one instruction share it |
| observation (O = views x 25 + 1 state) | text KV, observation |
| action (H) | text KV, observation KV of the same layer, action |

Flow time tau runs from 0 (noise) to 1 (data), one per action token: x_tau = (1 - tau) noise + tau action. A token with
tau = 1 is a committed action: it is read, never changed (training-time real-time chunking).

Dimension names: b batch row, view, h and w (pixels), token, text (T tokens), obs (O tokens), context (T + O), layer,
head, dim, horizon, action, state, width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional

from ganglion.models.layers import Block, ConvStem, attend, time_features
from ganglion.models.policies.guidance import Aim, Guide, Pull, denoise_guided

KEY_MULTIPLE = 16  # keys in one vector of a CPU's fused attention: 128 take less time than 115


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowConfig:
    """Sizes of a FlowPolicy; they stand in config.json."""

    vocab_size: int
    num_text_tokens: int = 16
    view_keys: tuple[str, ...] = ("observation.images.corner", "observation.images.gripper")
    view_height_px: int = 80
    view_width_px: int = 80
    conv_channels: tuple[int, ...] = (32, 64, 128, 256)  # the last is the trunk's width
    state_dim: int = 4
    action_dim: int = 4
    horizon: int = 48
    max_prefix: int = 20
    num_layers: int = 4
    num_heads: int = 4
    head_dim: int = 64
    trunk_mlp_width: int = 512
    expert_width: int = 192
    expert_mlp_width: int = 384
    num_time_features: int = 64
    num_flow_steps: int = 5

    @property
    def trunk_width(self) -> int:
        return self.conv_channels[-1]

    @property
    def num_views(self) -> int:
        return len(self.view_keys)

    @property
    def patch_px(self) -> int:
        """Pixels from one token of a view to the next."""
        return int(2 ** len(self.conv_channels))

    @property
    def num_view_tokens(self) -> int:
        """Tokens of one view: each convolution halves both sides, rounding up."""
        height_px, width_px = self.view_height_px, self.view_width_px
        for _ in self.conv_channels:
            height_px, width_px = -(-height_px // 2), -(-width_px // 2)
        return height_px * width_px

    @property
    def num_observation_tokens(self) -> int:
        return self.num_views * self.num_view_tokens + 1

    @property
    def num_context_tokens(self) -> int:
        return self.num_text_tokens + self.num_observation_tokens


class FlowPolicy(nn.Module):
    """The network, in stages that a server batches and schedules one by one."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        width, expert_width = config.trunk_width, config.expert_width
        heads = {"num_heads": config.num_heads, "head_dim": config.head_dim}
        kv_width = config.num_heads * config.head_dim
        self.stems = nn.ModuleList(
            ConvStem(channels=config.conv_channels) for _ in config.view_keys
        )
        self.view_position = nn.Parameter(
            torch.randn(config.num_views, config.num_view_tokens, width) * 0.1
        )
        self.word = nn.Embedding(config.vocab_size, width)
        self.text_position = nn.Parameter(torch.randn(config.num_text_tokens, width) * 0.1)
        self.state_in = nn.Linear(config.state_dim, width)
        self.trunk = nn.ModuleList(
            Block(width=width, mlp_width=config.trunk_mlp_width, **heads)
            for _ in range(config.num_layers - 1)
        )
        # Nothing reads the last trunk layer's output, so it is a key and value projection only.
        self.last_norm = nn.LayerNorm(width)
        self.last_kv = nn.Linear(width, 2 * kv_width)
        self.action_in = nn.Linear(config.action_dim, expert_width)
        self.action_position = nn.Parameter(torch.randn(config.horizon, expert_width) * 0.1)
        self.time_in = nn.Linear(config.num_time_features, expert_width)
        self.action_mix = nn.Linear(expert_width, expert_width)
        self.expert = nn.ModuleList(
            Block(width=expert_width, mlp_width=config.expert_mlp_width, **heads)
            for _ in range(config.num_layers)
        )
        self.action_norm = nn.LayerNorm(expert_width)
        self.action_out = nn.Linear(expert_width, config.action_dim)
        nn.init.normal_(self.word.weight, std=0.5)
        nn.init.zeros_(self.action_out.weight)
        nn.init.zeros_(self.action_out.bias)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it computes in."""
        return self.action_in.weight.dtype

    @property
    def _trunk_blocks(self) -> Iterable[Block]:
        return cast("Iterable[Block]", self.trunk)

    @property
    def _expert_blocks(self) -> Iterable[Block]:
        return cast("Iterable[Block]", self.expert)

    # --- perceive ----------------------------------------------------------------------------------------------------

    def encode_view(
        self, view_index: int, images: UInt8[Tensor, "b h w 3"]
    ) -> Float[Tensor, "b token width"]:
        """Features of one view."""
        features: Tensor = self.stems[view_index](images)
        return features + self.view_position[view_index]

    def encode_views(self, images: UInt8[Tensor, "b view h w 3"]) -> Float[Tensor, "b token width"]:
        """Features of all views, in the order of `config.view_keys`."""
        views = [
            self.encode_view(index, images[:, index]) for index in range(self.config.num_views)
        ]
        return torch.cat(views, dim=1)

    def prefill_text(
        self, token_ids: Int[Tensor, "b text"]
    ) -> Float[Tensor, "b layer 2 text head dim"]:
        """Keys and values of the instruction, all layers; they depend on nothing else."""
        x = self.word(token_ids) + self.text_position
        layers = []
        for block in self._trunk_blocks:
            query, key_value = block.project(x)
            layers.append(key_value)
            x = block.finish(x, attend(query, *key_value.unbind(2)))
        layers.append(self._last_kv(x))
        return torch.stack(layers, dim=1).transpose(2, 3)

    def prefill_observation(
        self,
        features: Float[Tensor, "b token width"],
        state: Float[Tensor, "b state"],
        text_kv: Float[Tensor, "b layer 2 text head dim"],
    ) -> Float[Tensor, "b layer 2 obs head dim"]:
        """Keys and values of the observation, all layers."""
        observation_kv, _ = self.observe(features, state, text_kv)
        return observation_kv

    def observe(
        self,
        features: Float[Tensor, "b token width"],
        state: Float[Tensor, "b state"],
        text_kv: Float[Tensor, "b layer 2 text head dim"],
    ) -> tuple[Float[Tensor, "b layer 2 obs head dim"], Float[Tensor, "b obs width"]]:
        """`prefill_observation`, and the trunk's last hidden state (for training's auxiliary head)."""
        x = torch.cat([features, self.state_in(state.to(features.dtype))[:, None]], dim=1)
        layers = []
        # the last layer's text KV goes to the expert only
        for block, layer_kv in zip(self._trunk_blocks, text_kv.unbind(1)[:-1], strict=True):
            query, key_value = block.project(x)
            layers.append(key_value)
            keys_values = torch.cat([layer_kv.transpose(1, 2), key_value], dim=1)
            x = block.finish(x, attend(query, *keys_values.unbind(2)))
        layers.append(self._last_kv(x))
        return torch.stack(layers, dim=1).transpose(2, 3), x

    def _last_kv(self, x: Float[Tensor, "b token width"]) -> Float[Tensor, "b token 2 head dim"]:
        key_value: Tensor = self.last_kv(self.last_norm(x))
        return key_value.view(*x.shape[:-1], 2, self.config.num_heads, self.config.head_dim)

    # --- generate ----------------------------------------------------------------------------------------------------

    def velocity(
        self,
        x: Float[Tensor, "b horizon action"],
        tau: Float[Tensor, "b horizon"],
        context_kv: Float[Tensor, "b layer 2 context head dim"],
    ) -> Float[Tensor, "b horizon action"]:
        """d x / d tau: the differentiable form, for training and guidance.

        A float32 x enters and leaves the network's dtype where `denoise` does.
        """
        hidden = self._embedded(x, tau)
        for block, layer_kv in zip(self._expert_blocks, context_kv.unbind(1), strict=True):
            query, key_value = block.project(hidden)
            keys_values = torch.cat([layer_kv.transpose(1, 2), key_value], dim=1)
            hidden = block.finish(hidden, attend(query, *keys_values.unbind(2)))
        return functional.linear(
            self.action_norm(hidden).to(x.dtype),
            self.action_out.weight.to(x.dtype),
            self.action_out.bias.to(x.dtype),
        )

    @torch.inference_mode()
    def denoise(
        self,
        x: Float[Tensor, "b horizon action"],
        tau: Float[Tensor, "b horizon"],
        dtau: Float[Tensor, " b"],
        context_kv: Float[Tensor, "b layer 2 context head dim"],
        num_steps: int,
        aims: Sequence[Aim | None] = (),
    ) -> Float[Tensor, "b horizon action"]:
        """`num_steps` Euler steps of width `dtau`; rows may stand at different times.

        Tokens with tau = 1 are committed actions and stay as they are. x, tau and dtau are float32: only the network
        runs in the weights' dtype, so the steps add up exactly. `aims`: what each row is guided to, None for not at all.
        """
        size = (self.config.horizon, self.config.action_dim)
        pulls = [None if aim is None else aim.pull for aim in aims]
        guide = Guide.of(aims, Pull.IDENTITY, *size) if Pull.IDENTITY in pulls else None
        if Pull.JACOBIAN not in pulls:
            return self._denoise(x, tau, dtau, context_kv, num_steps, guide)
        rows = [row for row, pull in enumerate(pulls) if pull is Pull.JACOBIAN]
        others = [row for row, pull in enumerate(pulls) if pull is not Pull.JACOBIAN]
        out = torch.empty_like(x)
        if others:
            out[others] = self._denoise(
                x[others],
                tau[others],
                dtau[others],
                context_kv[others],
                num_steps,
                None if guide is None else guide.rows(others),
            )
        guide = Guide.of([aims[row] for row in rows], Pull.JACOBIAN, *size)
        out[rows] = self._denoise_guided(
            x[rows], tau[rows], dtau[rows], context_kv[rows], num_steps, guide
        )
        return out

    @torch.inference_mode(mode=False)
    def _denoise_guided(
        self, x: Tensor, tau: Tensor, dtau: Tensor, context_kv: Tensor, num_steps: int, guide: Guide
    ) -> Tensor:
        """With the network's Jacobian. Inference tensors take no part in a backward pass, hence the clones."""
        context_kv = context_kv.clone()

        def velocity(x: Tensor, tau: Tensor) -> Tensor:
            return self.velocity(x, tau, context_kv)

        return denoise_guided(velocity, x.clone(), tau.clone(), dtau.clone(), num_steps, guide)

    def _denoise(
        self,
        x: Float[Tensor, "b horizon action"],
        tau: Float[Tensor, "b horizon"],
        dtau: Float[Tensor, " b"],
        context_kv: Float[Tensor, "b layer 2 context head dim"],
        num_steps: int,
        guide: Guide | None,
    ) -> Float[Tensor, "b horizon action"]:
        num_context = context_kv.shape[3]
        rows, horizon = x.shape[:2]
        heads = (self.config.num_heads, self.config.head_dim)
        num_keys = num_context + horizon
        num_places = -(-num_keys // KEY_MULTIPLE) * KEY_MULTIPLE
        # [0, num_context) the context, written once; [num_context, num_keys) the actions' own, written every step;
        # [num_keys, num_places) zero and masked
        keys_values = context_kv.new_empty((len(self.expert), rows, num_places, 2, *heads))
        keys_values[:, :, :num_context] = context_kv.permute(1, 0, 3, 2, 4, 5)
        keys_values[:, :, num_keys:] = 0.0
        mask = context_kv.new_zeros((1, 1, 1, num_places))
        mask[..., num_keys:] = -torch.inf
        layers = [
            (block, whole[:, num_context:num_keys], whole[:, :, 0], whole[:, :, 1])
            for block, whole in zip(self._expert_blocks, keys_values, strict=True)
        ]
        # 4 numbers in or out are too few for the matrix units, so there float32 is faster as well as exact
        weight_in, weight_out = self.action_in.weight.float(), self.action_out.weight.float()
        bias_out = self.action_out.bias.float()
        step = (tau < 1.0).to(x.dtype) * dtau[:, None]
        for at, place in enumerate(self._places(tau, step, num_steps)):
            mixed = functional.silu(functional.linear(x, weight_in).add_(place))
            hidden = self.action_mix(mixed.to(self.dtype))
            for block, own, keys, values in layers:
                query, key_value = block.project(hidden)
                own.copy_(key_value)
                hidden = block.finish(hidden, attend(query, keys, values, mask))
            velocity = functional.linear(self.action_norm(hidden).float(), weight_out, bias_out)
            if guide is not None:
                velocity = guide.identity(x, tau + at * step, velocity)
            x = torch.addcmul(x, step[..., None], velocity)
        return x

    def _places(
        self, tau: Float[Tensor, "b horizon"], step: Float[Tensor, "b horizon"], num_steps: int
    ) -> tuple[Float[Tensor, "b horizon width"], ...]:
        """What `_embedded` adds to the action at each flow step: it depends on no result, so all steps go in one batch."""
        taus = torch.stack([tau + at * step for at in range(num_steps)])
        features = time_features(taus.flatten(0, 1), self.config.num_time_features)
        time: Tensor = self.time_in(features.to(self.dtype))
        constant = self.action_position.float() + self.action_in.bias.float()
        return (time.float() + constant).view(num_steps, *tau.shape, -1).unbind(0)

    def _embedded(
        self, x: Float[Tensor, "b horizon action"], tau: Float[Tensor, "b horizon"]
    ) -> Float[Tensor, "b horizon width"]:
        """Action, flow time and place in the chunk of every action token, mixed (as in pi0)."""
        time: Tensor = self.time_in(
            time_features(tau, self.config.num_time_features).to(self.dtype)
        )
        weight, bias = self.action_in.weight.to(x.dtype), self.action_in.bias.to(x.dtype)
        mixed = functional.linear(x, weight, bias) + time + self.action_position
        embedded: Tensor = self.action_mix(functional.silu(mixed).to(self.dtype))
        return embedded
