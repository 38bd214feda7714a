"""A run under seeded chaos for a minute and a half; `make soak` goes on for as long as one likes."""

import pytest

from tests.support.soak import soak


@pytest.mark.long
def test_a_run_under_chaos_comes_to_the_bits_of_a_clean_one(tmp_path):
    report = soak(tmp_path, minutes=1.5, seed=3)
    print(report)
    rows = dict(line.strip("| ").split(" | ") for line in report.splitlines()[2:])
    assert int(rows["attempts that began"]) > 3
    assert rows["the newest checkpoint of both"].endswith("the same bytes")
