"""Versions of packages, installed or not."""

from importlib.metadata import version

from sambalm.pretrain.packages import installed_versions


def test_packages_that_are_not_installed_are_left_out():
    assert installed_versions(["torch", "no-such-package-anywhere"]) == {"torch": version("torch")}
