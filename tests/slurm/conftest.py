"""Marks the tests of this folder that run on the throw-away Slurm cluster, as `make test-slurm` does."""

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slurm)
