"""Which members of a grid run in `make test`; the others run in `make test-slow`, and all of them in CI."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_except(kept: Iterable[Any], values: Iterable[Any]) -> list[Any]:
    """Returns a grid's values for `parametrize`, all marked slow but for those kept, which must be among them."""
    kept, values = list(kept), list(values)
    assert [value for value in kept if value not in values] == []
    return [value if value in kept else _slow(value) for value in values]


def _slow(value: Any) -> Any:
    values = value if isinstance(value, tuple) else (value,)
    return pytest.param(*values, marks=pytest.mark.slow)
