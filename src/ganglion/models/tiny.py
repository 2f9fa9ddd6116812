"""Tiny: a seeded toy of every policy family, random weights, well under a millisecond a step. For tests and benches.

Called by tests and by `bench`. The toy has the very class of the real policy, so what holds here holds there.
"""

import torch

from ganglion.models.policies.flow import FlowConfig, FlowPolicy
from ganglion.models.policies.flow_checkpoint import TYPE, FlowCheckpoint
from ganglion.models.policies.transforms import STATE_KEY, MeanStd, Processor
from ganglion.models.tokenizer import WordTokenizer
from ganglion.spec import PolicySpec, ViewSpec

TINY_PROMPTS = ("open the drawer", "close the drawer", "push the puck")
TINY_FLOW = FlowConfig(
    vocab_size=16,
    view_height_px=32,
    view_width_px=32,
    conv_channels=(4, 8, 16, 32),
    horizon=12,
    max_prefix=4,
    num_layers=3,
    num_heads=2,
    head_dim=8,
    trunk_mlp_width=32,
    expert_width=24,
    expert_mlp_width=32,
    num_time_features=16,
)


def tiny_flow(
    *, seed: int = 0, config: FlowConfig = TINY_FLOW, dtype: torch.dtype = torch.float32
) -> FlowCheckpoint:
    """A flow policy of `config`'s sizes whose actions depend on every input."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        policy = FlowPolicy(config)
        # the real initialisation starts training at velocity zero, which would hide every mistake
        torch.nn.init.normal_(policy.action_out.weight, std=0.2)
        for block in (*policy.trunk, *policy.expert):
            torch.nn.init.normal_(block.attention_out.weight, std=0.2)
            torch.nn.init.normal_(block.mlp_out.weight, std=0.2)
    unit = MeanStd(mean=torch.zeros(config.state_dim), std=torch.ones(config.state_dim))
    small = MeanStd(mean=torch.zeros(config.action_dim), std=torch.full((config.action_dim,), 0.3))
    low, high = (-1.0,) * config.action_dim, (1.0,) * config.action_dim
    tokenizer = WordTokenizer.from_prompts(
        TINY_PROMPTS, num_tokens=config.num_text_tokens, vocab_size=config.vocab_size
    )
    spec = PolicySpec(
        name="tiny-flow",
        family=TYPE,
        version=f"tiny-{seed}",
        views=tuple(
            ViewSpec(
                key=key,
                height=config.view_height_px,
                width=config.view_width_px,
                patch_px=config.patch_px,
            )
            for key in config.view_keys
        ),
        state_key=STATE_KEY,
        state_dim=config.state_dim,
        action_dim=config.action_dim,
        horizon=config.horizon,
        num_flow_steps=config.num_flow_steps,
        control_hz=80.0,
        action_low=low,
        action_high=high,
        max_prefix=config.max_prefix,
        late_context_steps=config.num_flow_steps,
    )
    return FlowCheckpoint(
        policy=policy.to(dtype).eval().requires_grad_(requires_grad=False),
        processor=Processor(
            tokenizer=tokenizer, state=unit, action=small, action_low=low, action_high=high
        ),
        spec=spec,
    )
