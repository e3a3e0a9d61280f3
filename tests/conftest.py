"""Fixtures that several test files share."""

import sys

import pytest

from data.common import run


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a script's main as its command line would -> exit status, stdout, stderr."""

    def call(main, *arguments):
        monkeypatch.setattr(sys, "argv", [main.__code__.co_filename, *map(str, arguments)])
        capsys.readouterr()
        try:
            status = run(main)
        except SystemExit as stop:
            status = stop.code
        return status or 0, *capsys.readouterr()

    return call
