"""Checking a draft against the target's logits, token by token. Called by the engine for a choice that speculates.

Knows a choice's sampler state and its logits; not where drafts come from (`models.speculate`).
"""

from collections.abc import Sequence

from torch import Tensor

from ganglion.engine.sampler import Sampled, Sampler, SamplerState
from ganglion.errors import GanglionError


def verify(
    sampler: Sampler, logits: Tensor, state: SamplerState, draft: Sequence[int]
) -> list[Sampled | GanglionError]:
    """The choice's next tokens, 1 to len(draft) + 1: those that it would have drawn without the draft.

    `logits` [draft + 1, vocab] float32: row i is the target's after i tokens of the draft. Each place is drawn under the state that the
    tokens before it leave (penalties, grammar, minimum length, random numbers), until one departs from the draft, the grammar is
    complete or a row fails; an error is last. The draft's tokens but for the last returned one have valid pages.
    """
    assert len(logits) == len(draft) + 1, f"{len(logits)} rows for {len(draft)} drafted tokens"
    taken: list[Sampled | GanglionError] = []
    for place in range(len(logits)):
        (drawn,) = sampler.sample(logits[place : place + 1], [state])
        taken.append(drawn)
        if isinstance(drawn, GanglionError) or state.is_done:
            break
        if place == len(draft) or drawn.token_id != draft[place]:
            break
    return taken
