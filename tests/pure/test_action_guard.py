"""No bad chunk leaves the server."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ganglion.errors import UnsafeActionError
from ganglion.pipeline.act import ActionGuard
from ganglion.spec import PolicySpec

SPEC = PolicySpec(
    name="p",
    family="plain",
    version="0",
    views=(),
    state_key="observation.state",
    state_dim=2,
    action_dim=2,
    horizon=3,
    num_flow_steps=1,
    control_hz=20.0,
    action_low=(-1.0, 0.0),
    action_high=(1.0, 0.5),
)


@given(
    hnp.arrays(
        np.float32, (3, 2), elements=st.floats(width=32, allow_nan=True, allow_infinity=True)
    )
)
def test_only_finite_actions_inside_the_bounds_pass(actions: np.ndarray) -> None:
    low, high = np.float32([-1, 0]), np.float32([1, 0.5])
    is_good = bool(
        np.isfinite(actions).all() and (actions >= low).all() and (actions <= high).all()
    )
    try:
        checked = ActionGuard(SPEC).check(actions.copy())
    except UnsafeActionError:
        assert not is_good
    else:
        assert is_good
        assert not checked.flags.writeable


def test_the_error_names_row_dimension_and_bounds() -> None:
    actions = np.zeros((3, 2), dtype=np.float32)
    actions[1, 1] = 0.75
    with pytest.raises(UnsafeActionError, match=r"action\[1, 1\] = 0.75 is outside \[0.0, 0.5\]"):
        ActionGuard(SPEC).check(actions)
