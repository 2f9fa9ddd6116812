"""Checking drafts against the target's logits, token by token. Called by `engine.language` when a batch is computed.

Knows choices' sampler states and logits; not where drafts come from (`engine.drafter`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ganglion.engine.sampler import Sampled, Sampler, SamplerState
from ganglion.errors import GanglionError


def verify(
    sampler: Sampler,
    logits: Tensor,
    firsts: Sequence[int],
    states: Sequence[SamplerState],
    drafts: Sequence[Sequence[int]],
) -> list[list[Sampled | GanglionError]]:
    """Each choice's next tokens, 1 to len(draft) + 1: those that it would have drawn without the draft.

    `logits` [line, vocab] float32: line firsts[i] + j is the target's of choice i after j tokens of its draft. Each place
    is drawn under the state that the tokens before it leave (penalties, grammar, minimum length, random numbers), until
    one departs from the draft, the grammar is complete or a line fails; an error is last. All choices' places of one
    number are drawn together.
    """
    taken: list[list[Sampled | GanglionError]] = [[] for _ in states]
    going, place = list(range(len(states))), 0
    while going:
        lines = [firsts[at] + place for at in going]
        is_all = lines == list(range(len(logits)))
        of_place = logits if is_all else logits[torch.tensor(lines, device=logits.device)]
        drawn = sampler.sample(of_place, [states[at] for at in going])
        still = []
        for at, one in zip(going, drawn, strict=True):
            taken[at].append(one)
            has_held = (
                not isinstance(one, GanglionError)
                and place < len(drafts[at])
                and one.token_id == drafts[at][place]
            )
            if has_held and not states[at].is_done:
                still.append(at)
        going, place = still, place + 1
    return taken
