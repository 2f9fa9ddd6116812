"""Carried pages: references, encode orders and what happens when there is no room, over a real ledger and arena."""

import pytest
import torch

from ganglion.layout import PageKind, PageLayout, PoolLayout
from ganglion.memory.arena import Arena
from ganglion.memory.carried import CarriedPages, CarryRule
from ganglion.memory.codec.carry import encode_carried, gather_carried
from ganglion.memory.codec.int8 import Int8Codec
from ganglion.memory.ledger import Ledger
from ganglion.memory.retention.history import HistoryConfig

CODEC = Int8Codec()
WHOLE = PageLayout(name="memory", kind=PageKind.FEATURE, shape=(2, 30), dtype="float32", slots=1)
POOL = PoolLayout(large_page_bytes=480, layouts=(WHOLE, CODEC.encoded(WHOLE)))
RULE = CarryRule(
    stage="memory",
    layout="memory",
    history=HistoryConfig(num_whole=1, num_encoded=2),
    encoded_layout="memory@int8",
)


class Stage:
    """Writes one page an observation and has it carried."""

    def __init__(self, rule: CarryRule = RULE, *, num_large_pages: int = 8) -> None:
        self.ledger = Ledger(POOL, num_large_pages)
        self.arena = Arena(POOL, num_large_pages)
        self.carried = CarriedPages(self.ledger, (rule,), owner="arm")

    def write(self, seq: int, value: float) -> None:
        (page,) = self.ledger.reserve("memory", 1, owner="arm")
        self.arena.scatter("memory", [[page]], torch.full((1, 1, 2, 30), value))
        self.ledger.commit("memory", (page,), None)
        orders = self.carried.keep("memory", page, seq=seq)
        encode_carried(self.arena, CODEC, orders)
        self.ledger.release("memory", (page,))
        self.ledger.check_integrity()

    def values(self) -> list[float]:
        """First number of each place, oldest first; 0 where there is none."""
        rows = [self.carried.earlier("memory")]
        return gather_carried(self.arena, CODEC, "memory", rows, depth=4)[0, :, 0, 0].tolist()


def test_pages_go_from_whole_to_encoded_to_gone_and_back_to_the_pool() -> None:
    stage = Stage()
    assert stage.values() == [0.0] * 4
    for seq in range(5):
        stage.write(seq, seq + 1.0)
    assert stage.values() == pytest.approx([0.0, 3.0, 4.0, 5.0], rel=1e-2)
    assert stage.carried.num_pages() == {"memory": 1, "memory@int8": 2}
    stage.carried.close()
    assert not any(stage.ledger.stats().num_used_pages.values())


def test_what_is_attended_to_stays() -> None:
    stage = Stage()
    stage.write(0, 1.0)
    for seq in range(1, 9):
        stage.carried.note("memory", {seq - 1: 0.01, 0: 0.8}, now=seq)
        stage.write(seq, seq + 1.0)
    kept = {item.seq: item.layout for item in stage.carried.earlier("memory")}
    assert kept[0] == "memory"  # the one whole place
    assert len(kept) == 3


def test_an_observation_from_the_past_changes_nothing() -> None:
    stage = Stage()
    stage.write(4, 4.0)
    stage.write(4, 9.0)
    stage.write(2, 9.0)
    assert stage.values() == [0.0, 0.0, 0.0, 4.0]


def test_a_recurrent_state_is_the_newest_alone() -> None:
    rule = CarryRule(
        stage="memory", layout="memory", history=HistoryConfig(num_whole=1, num_encoded=0)
    )
    stage = Stage(rule)
    for seq in range(4):
        stage.carried.note("memory", {seq - 1: 1.0}, now=seq)
        stage.write(seq, seq + 1.0)
        assert stage.values()[-1] == seq + 1.0
    assert stage.carried.num_pages() == {"memory": 1}
    stage.carried.reset("memory")
    assert stage.values() == [0.0] * 4


def test_without_room_to_encode_pages_stay_whole() -> None:
    stage = Stage(num_large_pages=1)  # room for two pages of one layout
    for seq in range(2):
        stage.write(seq, seq + 1.0)
    assert stage.carried.num_pages() == {"memory": 2}
    assert stage.values() == [0.0, 0.0, 1.0, 2.0]


def test_encoded_places_need_a_layout() -> None:
    with pytest.raises(ValueError, match="6 encoded places need an encoded_layout"):
        CarryRule(stage="memory", layout="memory", history=HistoryConfig())
