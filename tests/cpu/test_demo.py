import pytest

from ganglion.cli.demo import dealt, spread
from ganglion.config import DemoConfig
from ganglion.errors import FieldError
from ganglion.types import Execution


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


def test_arms_that_are_compared_do_the_same_task() -> None:
    hands = spread(
        DemoConfig(
            num_arms=4,
            world="metaworld-moving",
            tasks=("push", "drawer-open"),
            executions=("naive", "prefix"),
        )
    )
    assert hands == [["metaworld-moving:push"]] * 2 + [["metaworld-moving:drawer-open"]] * 2
    modes = dealt((Execution.NAIVE, Execution.PREFIX), 4)
    assert modes == (Execution.NAIVE, Execution.PREFIX) * 2
