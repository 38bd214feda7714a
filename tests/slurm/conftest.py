"""A throw-away Slurm cluster for the tests of this folder, which `make test-slurm` runs."""

import pytest

from tests.support.slurm_client import Cluster, why_not


def pytest_collection_modifyitems(items):
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    if reason := why_not():
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("slurm") / "cluster")
    try:
        cluster.wait_until_up()
        yield cluster
    finally:
        cluster.stop()
