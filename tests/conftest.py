"""What several test files share."""

import contextlib
import io
import signal
import sys
from dataclasses import asdict

import pytest
import torch
from hypothesis import HealthCheck, settings

from data.common import run
from data.prepare import prepare
from model import FORMAT, GPT

settings.register_profile("nanomla", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("nanomla")  # no test fails because the machine is busy


@pytest.fixture(scope="session")
def stories(tmp_path_factory):
    """A folder of 400 prepared stories."""
    return prepare(stories=400, root=tmp_path_factory.mktemp("data"))


def build(config, seed=0):
    """A float64 model in eval mode whose every matrix keeps the size of what it multiplies."""
    torch.manual_seed(seed)
    model = GPT(config).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(std=weight.size(1) ** -0.5)
            else:
                weight.uniform_(0.5, 1.5)
    return model


def save(path, model, /, **entries):
    """Write a checkpoint of a model, with more entries -> its path."""
    checkpoint = {"format": FORMAT, "config": asdict(model.config), "model": model.state_dict(), "step": 7}
    torch.save(checkpoint | entries, path)
    return path


def call(main, *arguments):
    """Run a script's main as its command line would -> exit status, stdout, stderr."""
    argv, handler, out, err = sys.argv, signal.getsignal(signal.SIGTERM), io.StringIO(), io.StringIO()
    sys.argv = [main.__code__.co_filename, *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = run(main)
    except SystemExit as stop:
        status = stop.code
    finally:
        sys.argv = argv
        signal.signal(signal.SIGTERM, handler)
    return status or 0, out.getvalue(), err.getvalue()
