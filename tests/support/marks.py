"""Which members of a grid run in `make test`, which in CI besides, and which in `make test-slow` alone."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_except(kept: Iterable[Any], values: Iterable[Any], *, long: Iterable[Any] = ()) -> list[Any]:
    """Returns a grid's values for `parametrize`, all marked slow but for those kept; those marked long are not in CI.

    Both must be among the values.
    """
    kept, values, long = list(kept), list(values), list(long)
    assert [value for value in [*kept, *long] if value not in values] == []
    return [value if value in kept else _marked(value, "long" if value in long else "slow") for value in values]


def _marked(value: Any, mark: str) -> Any:
    values = value if isinstance(value, tuple) else (value,)
    return pytest.param(*values, marks=getattr(pytest.mark, mark))
