"""TemporalPolicy: pages of the past that do not mix, a recurrent state that is a page, and a trunk that stays as it was."""

import numpy as np
import pytest
import torch

from ganglion.kernels.cpu import why_not_packed
from ganglion.memory.codec.int8 import Int8Codec
from ganglion.memory.retention.history import HistoryConfig
from ganglion.models.packing import pack
from ganglion.models.policies.temporal import FROZEN, NUM_STAMPS, read_stamp, stamp
from ganglion.models.policies.temporal_checkpoint import TemporalCheckpoint
from ganglion.models.tiny import TINY_FLOW, TINY_PROMPTS, tiny_flow
from ganglion.train.temporal_actor import Roads, Sight, TemporalActor
from tests.cpu.temporal_stage import (
    TINY_MEMORY,
    Session,
    Tier,
    episode,
    model_of,
    moved,
    tiny_temporal,
)

WHOLE = HistoryConfig(num_whole=3, num_encoded=0)


@pytest.fixture(scope="module")
def tiny() -> TemporalCheckpoint:
    torch.set_num_threads(1)
    return tiny_temporal()


def random_kv(seed: int, num_tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    heads = (TINY_FLOW.num_heads, TINY_FLOW.head_dim)
    return torch.randn(2, TINY_FLOW.num_layers, 2, num_tokens, *heads, generator=generator)


def pages_of(tiny: TemporalCheckpoint, seqs: list[int]) -> torch.Tensor:
    """[2 rows, past, row, column], each page from another observation."""
    pages = [
        tiny.policy.remember(
            random_kv(seq + 10, TINY_FLOW.num_observation_tokens),
            torch.full((2, TINY_FLOW.state_dim), seq / 7),
            torch.full((2,), seq),
        )
        for seq in seqs
    ]
    return torch.stack(pages, dim=1)


def test_a_stamp_survives_bfloat16_and_int8() -> None:
    seq = torch.tensor([0, 1, 126, 127, 128, 4_711, 90_000_000, NUM_STAMPS - 1, NUM_STAMPS + 5])
    row = torch.zeros(len(seq), 32)
    row[:, :5] = stamp(seq).float()
    codec = Int8Codec()
    stored = codec.decode(codec.encode(row.to(torch.bfloat16)), torch.bfloat16)
    is_written, back = read_stamp(stored)
    assert bool(is_written.all())
    assert torch.equal(back, seq % NUM_STAMPS)
    assert not bool(read_stamp(torch.zeros(1, 32))[0])


def test_a_memory_page_holds_the_pooled_views_the_state_token_and_the_state(
    tiny: TemporalCheckpoint,
) -> None:
    kv = random_kv(3, TINY_FLOW.num_observation_tokens)
    state = torch.arange(8.0).view(2, 4)
    page = tiny.policy.remember(kv, state, torch.tensor([5, 6]))
    last = kv[:, -1].permute(0, 2, 1, 3, 4).flatten(2)
    assert page.shape == (2, 5, 32)
    assert torch.allclose(page[:, 0], last[:, :4].mean(1))
    assert torch.allclose(page[:, 1], last[:, 4:8].mean(1))
    assert torch.equal(page[:, 2], last[:, 8])
    assert torch.equal(page[:, 3, :4], state)


def test_the_trunk_is_the_bases_and_not_trained(tiny: TemporalCheckpoint) -> None:
    trained = tiny.policy.trained()
    assert any(name.startswith("flow.expert.") for name in trained)
    assert not any(name.startswith(FROZEN) for name in trained)
    names = set(tiny.policy.state_dict())
    assert all(any(name.startswith(prefix) for name in names) for prefix in FROZEN)


def test_a_page_changes_its_own_token_only(tiny: TemporalCheckpoint) -> None:
    pages, context = pages_of(tiny, [0, 1, 2]), random_kv(0, TINY_FLOW.num_context_tokens)
    hidden, seq = torch.randn(2, TINY_MEMORY.hidden_dim), torch.tensor([3, 3])
    before = tiny.policy.recall(pages, hidden, seq, context)
    pages[:, 1, 0, :5] += 1.0
    after = tiny.policy.recall(pages, hidden, seq, context)
    is_changed = (before - after).abs().amax((0, 1, 2, 4, 5)) > 1e-6
    assert is_changed.tolist() == [False, True, False, False]


def test_absent_pages_say_nothing_wherever_they_stand(tiny: TemporalCheckpoint) -> None:
    pages, context = pages_of(tiny, [0, 1, 2]), random_kv(0, TINY_FLOW.num_context_tokens)
    hidden, seq = torch.randn(2, TINY_MEMORY.hidden_dim), torch.tensor([3, 3])
    pages[:, 1] = 0.0
    kv = tiny.policy.recall(pages, hidden, seq, context)
    pages[:, 1, :2] = 9.0  # without a stamp it is nothing
    assert torch.equal(tiny.policy.recall(pages, hidden, seq, context), kv)
    swapped = tiny.policy.recall(pages[:, [1, 0, 2]], hidden, seq, context)
    assert torch.allclose(swapped[:, :, :, [1, 0, 2, 3]], kv, atol=1e-6)


def test_age_is_counted_in_observations_and_matters(tiny: TemporalCheckpoint) -> None:
    pages, context = pages_of(tiny, [0, 1, 2]), random_kv(0, TINY_FLOW.num_context_tokens)
    hidden = torch.zeros(2, TINY_MEMORY.hidden_dim)
    now = tiny.policy.recall(pages, hidden, torch.tensor([3, 3]), context)
    later = tiny.policy.recall(pages, hidden, torch.tensor([9, 9]), context)
    assert (now - later)[:, :, :, :3].abs().max() > 1e-4
    assert torch.equal(now[:, :, :, 3], later[:, :, :, 3])  # the recurrent state has no age


def test_the_recurrent_state_remembers_and_no_row_sees_another(tiny: TemporalCheckpoint) -> None:
    pages = pages_of(tiny, list(range(6)))

    def state_after(pages: torch.Tensor) -> torch.Tensor:
        hidden = torch.zeros(len(pages), TINY_MEMORY.hidden_dim)
        for page in pages.unbind(1):
            hidden = tiny.policy.advance(hidden, page)
        return hidden

    together = state_after(pages)
    assert together.dtype is torch.float32
    assert torch.allclose(state_after(pages[:1]), together[:1], atol=1e-6)
    other = pages.clone()
    other[:, 0] = pages[:, 5]
    assert (state_after(other) - together).abs().max() > 1e-4  # six observations later


def test_relevance_is_the_share_that_the_expert_pays(tiny: TemporalCheckpoint) -> None:
    num_memory, probe = TINY_MEMORY.num_memory_tokens(), tiny.policy.probe()
    context = random_kv(4, TINY_FLOW.num_context_tokens + num_memory)
    shares = tiny.policy.relevance(context, probe)
    expected = torch.zeros(2, num_memory)
    hidden = probe.expand(2, -1, -1)
    for layer, block in enumerate(tiny.policy.flow.expert):
        query, own = block.project(hidden)  # type: ignore[operator]
        keys, values = torch.cat([context[:, layer].transpose(1, 2), own], dim=1).unbind(2)
        scores = torch.einsum("bthd,bkhd->bhtk", query, keys) * query.shape[-1] ** -0.5
        weights = scores.softmax(-1)
        expected += weights[..., TINY_FLOW.num_context_tokens :][..., :num_memory].mean((1, 2))
        hidden = block.finish(hidden, torch.einsum("bhtk,bkhd->bthd", weights, values).flatten(2))  # type: ignore[operator]
    torch.testing.assert_close(shares, expected / TINY_FLOW.num_layers)


def test_pages_give_what_tensors_give(tiny: TemporalCheckpoint) -> None:
    """Stage by stage over carried pages equals the same policy called with tensors."""
    session, actor = Session(model_of(tiny), WHOLE), TemporalActor(tiny, num_flow_steps=5)
    memory = actor.new_memory()
    for seen in episode("arm", 6):
        sight = Sight(
            images=np.stack([seen.images[key] for key in TINY_FLOW.view_keys]),
            state=seen.state,
            prompt=seen.prompt,
            noise_seed=seen.seq,
        )
        dense = actor.act([sight], [memory])[0]
        np.testing.assert_allclose(session.act(seen), dense, atol=1e-5)
        assert session.items == memory.history.items


@pytest.mark.parametrize("forgotten", ["recurrent", "memory"])
def test_both_roads_lead_to_the_actions(tiny: TemporalCheckpoint, forgotten: str) -> None:
    whole, lame = Session(model_of(tiny), WHOLE), Session(model_of(tiny), WHOLE)
    *first, last = episode("arm", 4)
    for seen in first:
        whole.act(seen)
        lame.act(seen)
    lame.carried.reset(forgotten)
    assert np.abs(whole.act(last) - lame.act(last)).max() > 1e-4


def test_a_session_that_begins_again_is_a_new_session(tiny: TemporalCheckpoint) -> None:
    used, fresh = Session(model_of(tiny), WHOLE), Session(model_of(tiny), WHOLE)
    seen = episode("arm", 3)
    used.act(seen[0])
    first = fresh.act(seen[1])
    assert np.abs(used.act(seen[1]) - first).max() > 1e-4
    assert np.array_equal(Session(model_of(tiny), WHOLE).act(seen[1]), first)


def test_encoded_pages_cost_little(tiny: TemporalCheckpoint) -> None:
    config = HistoryConfig(num_whole=1, num_encoded=2)
    whole, encoded = Session(model_of(tiny), WHOLE), Session(model_of(tiny), config)
    for seen in episode("arm", 6):
        difference = np.abs(whole.act(seen) - encoded.act(seen)).max()
        assert difference < 0.02
    assert encoded.carried.num_pages()["memory@int8"] == 2
    assert difference > 0


def test_rows_of_other_sessions_change_nothing(tiny: TemporalCheckpoint) -> None:
    actor = TemporalActor(tiny, num_flow_steps=2, roads=Roads.BOTH)
    memories = [actor.new_memory() for _ in range(3)]
    alone = actor.new_memory()
    for seq in range(4):
        seen = [episode(f"arm-{at}", 4, seed=at)[seq] for at in range(3)]
        sights = [
            Sight(
                images=np.stack([item.images[key] for key in TINY_FLOW.view_keys]),
                state=item.state,
                prompt=TINY_PROMPTS[0],
                noise_seed=seq,
            )
            for item in seen
        ]
        together = actor.act(sights, memories)
        np.testing.assert_allclose(actor.act(sights[1:2], [alone])[0], together[1], atol=1e-5)


def test_a_session_may_count_from_anywhere(tiny: TemporalCheckpoint) -> None:
    low, high = Session(model_of(tiny), WHOLE), Session(model_of(tiny), WHOLE)
    for seen in episode("arm", 4):
        far = moved(seen, seq=seen.seq + NUM_STAMPS - 2)
        assert np.allclose(low.act(seen), high.act(far), atol=1e-6)


def test_carried_pages_survive_moves_and_go_back(tiny: TemporalCheckpoint) -> None:
    model, config = model_of(tiny), HistoryConfig(num_whole=1, num_encoded=2)
    quiet, moving = Session(model, config), Session(model, config)
    num_copied = 0
    for seen in episode("arm", 8):
        other = moving.tier.ledger.reserve("memory", 40, owner="other")
        moving.tier.ledger.commit("memory", other, None)
        np.testing.assert_array_equal(moving.act(seen), quiet.act(seen))
        moving.tier.ledger.release("memory", other[1:])
        num_copied += moving.tier.move()
        moving.tier.ledger.check_integrity()
    assert num_copied > 0
    moving.carried.close()
    used = moving.tier.ledger.stats().num_used_pages
    assert used == {**dict.fromkeys(used, 0), "memory": 8}  # the others'


def test_sessions_share_a_tier_and_nothing_else(tiny: TemporalCheckpoint) -> None:
    model, tier = model_of(tiny), Tier(model_of(tiny))
    ours, theirs, alone = (
        Session(model, WHOLE, tier),
        Session(model, WHOLE, tier),
        Session(model, WHOLE),
    )
    for mine, other in zip(episode("a", 4), episode("b", 4, seed=1), strict=True):
        theirs.act(other)
        np.testing.assert_array_equal(ours.act(mine), alone.act(mine))


def test_it_is_served_packed_in_bfloat16(tiny: TemporalCheckpoint) -> None:
    """What `registry` loads: packed weights have no names, and the memory must not ask for them."""
    served = tiny_temporal(tiny_flow(seed=1, dtype=torch.bfloat16))
    served.policy.to(torch.bfloat16)
    packed, plain = Session(model_of(served), WHOLE), Session(model_of(tiny), WHOLE)
    if not why_not_packed(torch.bfloat16):
        assert pack(served.policy) > 0
    for seen in episode("arm", 4):
        assert np.abs(packed.act(seen) - plain.act(seen)).max() < 0.15
