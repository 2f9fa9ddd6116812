"""Policies of language batches: which tokens of which rows, through which layers."""

from hypothesis import given
from hypothesis import strategies as st

from ganglion.engine.language_policy import (
    MAX_LAYER_TOKENS,
    MIN_CHUNK_TOKENS,
    POLICIES,
    STRETCH,
    BatchRoom,
    batch_room,
    chunked,
    layered,
    num_stages,
    stage_layers,
    whole,
)


@given(
    num_left=st.lists(st.integers(1, 3000), max_size=20),
    max_tokens=st.integers(1, 4000),
    is_stage_busy=st.booleans(),
    name=st.sampled_from(list(POLICIES)),
)
def test_every_policy_decodes_all_and_brings_some_prompt_forward(
    num_left: list[int], max_tokens: int, *, is_stage_busy: bool, name: str
) -> None:
    order = POLICIES[name](num_left, max_tokens, is_stage_busy=is_stage_busy)
    assert len(order.num_tokens) == len(num_left)
    for count, left in zip(order.num_tokens, num_left, strict=True):
        assert 0 <= count <= left
        assert left > 1 or count == 1
    prefills = [at for at, left in enumerate(num_left) if left > 1]
    if prefills and not (name == "layered" and is_stage_busy):
        assert order.num_tokens[prefills[0]] > 0
    assert all(order.num_tokens[at] > 0 and num_left[at] > 1 for at in order.staged)


def test_whole_takes_one_prompt_over_the_limit_but_no_second() -> None:
    order = whole([1, 900, 50, 1], 100, is_stage_busy=False)
    assert order.num_tokens == (1, 900, 0, 1)
    assert whole([40, 50, 20], 100, is_stage_busy=False).num_tokens == (40, 50, 0)


def test_chunks_fill_what_decoding_leaves_of_the_limit() -> None:
    order = chunked([1, 900, 1, 50], 102, is_stage_busy=False)
    assert order.num_tokens == (1, 100, 1, 0)
    assert chunked([30, 900], 100, is_stage_busy=False).num_tokens == (30, 70)


def test_a_prompt_comes_forward_however_small_the_limit() -> None:
    assert chunked([1] * 40 + [900], 1, is_stage_busy=False).num_tokens[-1] == MIN_CHUNK_TOKENS


def test_layered_stages_all_prompts_at_once_and_no_other_while_they_are_under_way() -> None:
    order = layered([1, 900, 300], 10, is_stage_busy=False)
    assert (order.num_tokens, order.staged) == ((1, 900, 300), {1, 2})
    assert order.num_stages == 4
    assert layered([1, 900], 10, is_stage_busy=True).num_tokens == (1, 0)


def test_longer_prompts_take_more_stages() -> None:
    lengths = (1, 512, 513, 1024, 2048, 4096, 100_000)
    assert [num_stages(length) for length in lengths] == [1, 1, 2, 2, 4, 8, 16]


@given(num_layers=st.integers(1, 100), count=st.integers(1, 20))
def test_stages_cut_the_layers_evenly(num_layers: int, count: int) -> None:
    groups = stage_layers(num_layers, count)
    assert [layer for group in groups for layer in group] == list(range(num_layers))
    sizes = [len(group) for group in groups]
    assert len(groups) == min(count, num_layers)
    assert max(sizes) - min(sizes) <= 1


def test_layered_cuts_what_one_layer_cannot_take() -> None:
    order = layered([1, 900, 300], 64, is_stage_busy=False, max_layer_tokens=1000)
    assert order.num_tokens == (1, 900, 100)
    assert order.staged == {1, 2}
    assert order.num_stages == num_stages(1000)


def layer_us(num_tokens: int) -> float:
    """Of 0.5 B on two cores: reading the weights, then 40 us a token."""
    return max(1250.0, 40.0 * num_tokens)


def test_a_batch_is_as_large_as_one_layer_may_be_long() -> None:
    """Not as the whole forward: of 28 layers none would fit into 10 ms, and prompts would go on 16 tokens at a time."""
    room = batch_room(layer_us, num_decoding=0, slice_us=10_000, most=2048)
    assert room == BatchRoom(num_tokens=250, num_layer_tokens=250)
    assert batch_room(layer_us, num_decoding=0, slice_us=10_000, most=100).num_tokens == 100
    unhurried = batch_room(layer_us, num_decoding=0, slice_us=1e9, most=2048)
    assert unhurried == BatchRoom(num_tokens=2048, num_layer_tokens=MAX_LAYER_TOKENS)


def test_rows_that_decode_wait_four_times_as_long_at_most() -> None:
    room = batch_room(layer_us, num_decoding=3, slice_us=10_000, most=2048)
    assert room == BatchRoom(num_tokens=125, num_layer_tokens=250)
    assert layer_us(room.num_tokens) <= STRETCH * layer_us(3)


@given(
    first_us=st.floats(1, 1e5),
    token_us=st.floats(0.1, 1e4),
    num_decoding=st.integers(0, 64),
    slice_us=st.floats(100, 1e6),
    most=st.integers(1, 4096),
)
def test_no_layer_is_longer_than_a_slice_unless_decoding_is(
    first_us: float, token_us: float, num_decoding: int, slice_us: float, most: int
) -> None:
    def cost(num_tokens: int) -> float:
        return first_us + token_us * num_tokens

    room = batch_room(cost, num_decoding=num_decoding, slice_us=slice_us, most=most)
    longest_us = max(slice_us, cost(max(1, num_decoding)))
    assert 1 <= room.num_tokens <= most
    for count in (room.num_tokens, room.num_layer_tokens):
        assert count == 1 or cost(count) <= longest_us
