"""What several test files share."""

import sys
from dataclasses import asdict

import pytest
import torch

from data.common import run
from data.prepare import prepare
from model import FORMAT


@pytest.fixture(scope="session")
def stories(tmp_path_factory):
    """A folder of 400 prepared stories."""
    return prepare(stories=400, root=tmp_path_factory.mktemp("data"))


def save(path, model, /, **entries):
    """Write a checkpoint of a model, with more entries -> its path."""
    torch.save({"format": FORMAT, "config": asdict(model.config), "model": model.state_dict(), **entries}, path)
    return path


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
