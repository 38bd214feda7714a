"""The program in the process of its test."""

import sys

import pytest

from sambalm.pretrain import cli
from tests.support.signals import restored_signals


@pytest.fixture
def sambalm(monkeypatch, capfd):
    """Runs the program in this process: exit code, stdout and stderr."""

    def run(*arguments):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["sambalm", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        return exit_info.value.code or 0, *capfd.readouterr()

    with restored_signals():
        yield run
