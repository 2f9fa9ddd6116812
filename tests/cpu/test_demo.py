import pytest

from ganglion.cli.demo import spread
from ganglion.config import DemoConfig
from ganglion.errors import FieldError


def test_tasks_are_dealt_out_to_the_arms() -> None:
    tasks = ("drawer-open", "drawer-close", "push")
    assert spread(DemoConfig(num_arms=2, tasks=tasks)) == [
        ["metaworld:drawer-open", "metaworld:push"],
        ["metaworld:drawer-close"],
    ]
    assert [len(hand) for hand in spread(DemoConfig(num_arms=5, tasks=tasks))] == [1] * 5
    assert sum(len(hand) for hand in spread(DemoConfig())) == 10


def test_a_task_that_does_not_exist_is_named() -> None:
    with pytest.raises(FieldError, match=r"task: expected one of .*, got 'fold-laundry'"):
        spread(DemoConfig(tasks=("fold-laundry",)))
