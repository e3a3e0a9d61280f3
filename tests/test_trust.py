"""Crashes, several processes, hostile files, command lines. TRIES=2000 python -m pytest tests/test_trust.py: more."""

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from conftest import call
from hypothesis import given, settings
from hypothesis import strategies as st

import bench
import model
import spectrum
import train
from data import judge
from data import prepare as prep
from data import stories as world
from data.common import load_data
from model import load_checkpoint

ROOT = Path(__file__).parent.parent
TRIES = int(os.environ.get("TRIES", 25))
SMALL = "--n_layer=1 --n_head=2 --n_embd=32 --block_size=64 --batch_size=4 --grad_accum=1".split()
SMALL += ["--eval_steps=1", "--device=cpu"]


@pytest.fixture(scope="module")
def out(stories, tmp_path_factory):
    """The folder of a run that has ended."""
    out = tmp_path_factory.mktemp("out")
    flags = [*SMALL, "--attn=mla", "--steps=2", "--eval_interval=1"]
    train.Run(train.parse_arguments([*flags, f"--data={stories}", f"--out={out}"])).train()
    return out


def losses(folder):
    return [json.loads(line)["val_loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


# Crashes


def test_killed_runs_lose_nothing_that_was_saved():
    ended = subprocess.run(
        [sys.executable, "tests/kill.py", "2"], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert ended.returncode == 0 and "killed 2 times: nothing lost" in ended.stdout, ended.stderr[-2000:]


@pytest.mark.parametrize("trouble", ["disk", "removed", "nowhere"])
def test_a_disk_that_fails_ends_in_one_line_and_keeps_the_last_checkpoint(trouble, stories, tmp_path, monkeypatch):
    """A file system that takes no more than 100 KB in a file; a folder that is gone; one that cannot be made."""
    out = tmp_path / "out"
    flags = [*SMALL, "--steps=6", "--eval_interval=2", f"--data={stories}"]
    flags += [f"--out={out if trouble != 'nowhere' else '/proc/out'}"]
    assert trouble == "nowhere" or told(train.main, *flags)[0] == 0
    before = trouble == "disk" and (out / "ckpt.pt").read_bytes()
    limits, step = resource.getrlimit(resource.RLIMIT_FSIZE), train.Run.step

    def step_and_remove(self, number):
        step(self, number)
        if trouble == "removed" and number == 2:
            shutil.rmtree(out)

    monkeypatch.setattr(train.Run, "step", step_and_remove)
    if trouble == "disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        status, err = told(train.main, *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1 and err.count("\n") == 1 and "/out" in err, err
    if trouble == "disk":
        assert "cannot be written" in err and (out / "previous-1" / "ckpt.pt").read_bytes() == before
        assert not list(out.glob("*.tmp"))


# Several processes


def free_port():
    """A port below those that the system gives to outgoing connections: one of these could take it before we do."""
    for port in random.sample(range(10000, 30000), 100):
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return port


def two_processes(rank, ports, stories, folder):
    """One of two processes: they train a run; then another, stopped by a signal to one of them; then resume that."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    flags = [*SMALL, "--steps=6", "--eval_interval=2", "--dtype=float32", "--grad_accum=2", f"--data={stories}"]
    runs = [("whole", flags, False), ("stopped", flags, True), ("stopped", ["--resume"], False)]
    for port, (name, given_flags, stop) in zip(ports, runs, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        run = train.Run(train.parse_arguments([*given_flags, f"--out={folder}/{name}"]))
        step = run.step
        if stop and rank == 1:
            run.step = lambda number, step=step: (step(number), number == 2 and os.kill(os.getpid(), signal.SIGINT))
        assert run.train() == (130 if stop else None)


def test_two_processes_are_as_one_and_resume_exactly(stories, tmp_path):
    mp.spawn(two_processes, ([free_port() for _ in range(3)], stories, tmp_path), nprocs=2)
    whole, stopped = (load_checkpoint(tmp_path / name / "last.pt")[1] for name in ("whole", "stopped"))
    assert all(torch.equal(whole["model"][name], stopped["model"][name]) for name in whole["model"])
    assert losses(tmp_path / "whole") == losses(tmp_path / "stopped")
    flags = [*SMALL, "--steps=6", "--eval_interval=2", "--dtype=float32", "--grad_accum=2", f"--data={stories}"]
    train.Run(train.parse_arguments([*flags, f"--out={tmp_path}/one"])).train()
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "whole"), abs=2e-4)  # rounding


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_if_one_process_dies_all_end(stories, tmp_path):
    flags = [*SMALL, "--steps=1000000", "--eval_interval=5", f"--data={stories}", f"--out={tmp_path}"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", *flags]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ranks, deadline = [], time.monotonic() + 120
    try:
        while not (tmp_path / "last.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        ranks = [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        assert run.wait(timeout=120) != 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    finally:
        run.kill()
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    load_checkpoint(tmp_path / "last.pt")


LEADER_FAILS = """
import os, resource, sys
from data.common import run
import train
if os.environ["RANK"] == "0":
    if os.environ["TROUBLE"] == "disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    else:
        train.Run.evaluate = lambda *_: (float("nan"), None)
run(train.main)
"""


@pytest.mark.parametrize("trouble, said", [("disk", "cannot be written"), ("nan", "loss is nan")])
def test_if_the_first_process_fails_alone_all_end_with_one_line(trouble, said, stories, tmp_path):
    processes = []
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    for rank in "01":
        command = [sys.executable, "-c", LEADER_FAILS, *SMALL, f"--data={stories}", f"--out={tmp_path}"]
        environment = os.environ | there | {"RANK": rank, "LOCAL_RANK": rank, "TROUBLE": trouble}
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        errors = [process.communicate(timeout=100)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [1, 1], errors
    assert [error.count("\n") for error in errors] == [1, 1], errors
    assert said in errors[0] and "another process failed" in errors[1], errors


# Checkpoints: what made them, and hostile ones


def test_a_checkpoint_says_what_made_it(out):
    checkpoint = load_checkpoint(out / "ckpt.pt")[1]
    assert checkpoint["made_by"]["torch"] == str(torch.__version__)
    assert re.fullmatch(r"([0-9a-f]{40}(-dirty)?)?", checkpoint["made_by"]["revision"])
    assert checkpoint["options"]["seed"] == 0 and checkpoint["meta"]["floor"] > 0
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert entries[0]["gradient_norm"] is None and entries[-1]["gradient_norm"] > 0


def loads(path):
    """Does it load? What does not must raise ValueError, and nothing else."""
    try:
        load_checkpoint(path)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return False
    return True


@given(place=st.floats(0, 1), bit=st.integers(0, 7))
@settings(max_examples=TRIES)
def test_flipped_bits_give_one_line_or_a_model(out, tmp_path_factory, place, bit):
    content = bytearray((out / "ckpt.pt").read_bytes())
    content[int(place * (len(content) - 1))] ^= 1 << bit
    path = tmp_path_factory.getbasetemp() / "flipped.pt"
    path.write_bytes(content)
    loads(path)


@given(share=st.floats(0, 0.9999))
@settings(max_examples=TRIES)
def test_truncated_files_do_not_load(out, tmp_path_factory, share):
    content = (out / "ckpt.pt").read_bytes()
    path = tmp_path_factory.getbasetemp() / "cut.pt"
    path.write_bytes(content[: int(share * len(content))])
    assert not loads(path)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


def told(main, *arguments):
    """Run a script's main as its command line would -> exit status, stderr. No other exception may escape."""
    status, _, err = call(main, *arguments)
    assert status in (0, 1, 2), err
    assert not status or err.splitlines()[-1].startswith(f"{Path(main.__code__.co_filename).name}: "), err
    return status, err


@given(
    key=st.sampled_from(["source", "tokenizer", "vocab_size", "floor", "val_nats", "train_tokens", "val_stories"]),
    value=values | st.integers(1, 65535),
)
@settings(max_examples=TRIES)
def test_a_hostile_meta_is_refused_or_harmless(stories, tmp_path_factory, key, value):
    folder = tmp_path_factory.mktemp("hostile") / "data"
    shutil.copytree(stories, folder)
    meta = json.loads((folder / "meta.json").read_text()) | {key: value}
    (folder / "meta.json").write_text(json.dumps(meta))
    try:
        load_data(folder)
    except ValueError as error:
        assert str(folder) in str(error)
    else:
        status, err = told(train.main, *SMALL, "--steps=1", f"--data={folder}", f"--out={folder.parent}")
        assert status == 0 or key in ("tokenizer", "vocab_size", "val_stories"), err


# Command lines

WORDS = [
    "",
    "0",
    "-1",
    "1",
    "2",
    "16",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "0.5",
    "x",
    "None",
    "½",
    "9" * 30,
    "=",
    "cpu",
]
WORDS += ["float32", "mps", "/", "..", "stories", "mla", "gqa", "-h", "--help", "True"]
MAINS = [module.main for module in (train, model, spectrum, bench, prep, world, judge)]


def flags_of(main):
    """The flags that --help shows, and one that does not exist."""
    shown = set(re.findall(r"--([a-z_]+)\b(?!-)", call(main, "--help")[1]))
    return [*sorted(shown - {"help", "train"}), "nothing"]  # bench.py --train takes too long


@pytest.mark.parametrize("main", MAINS, ids=lambda main: main.__module__)
def test_no_command_line_ends_in_a_traceback(main, stories, out, tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("fuzz")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(prep, "TINYSTORIES", "http://127.0.0.1:9/nothing.txt")
    monkeypatch.setattr(prep, "prepare", partial(prep.prepare, root=folder))
    monkeypatch.setattr(train, "prepare", partial(train.prepare, stories=20, root=folder))
    (folder / "mine.txt").write_text("One.\n\nTwo.\n\nThree.")
    monkeypatch.setattr(bench, "ceilings", lambda device, dtype: {"bytes_per_s": 1e10, "flop_per_s": 1e11})
    monkeypatch.setattr(bench, "SIZES", {size: dict(n_layer=1, n_head=2, n_embd=16) for size in bench.SIZES})
    base = {
        train.main: [*SMALL, "--steps=1", f"--data={stories}", "--out=run"],
        model.main: [out / "ckpt.pt", "--tokens=1"],
        spectrum.main: [out / "ckpt.pt", "--out=."],
        bench.main: ["--attn=mla", "--context=4", "--batch=1", "--rounds=1", "--dtype=float32"],
        prep.main: ["mine.txt", "--tokenizer=stories"],
        world.main: [],
        judge.main: [__file__],
    }[main]
    words = [*WORDS, out / "ckpt.pt", out, __file__, *(["tell", "floor"] if main is world.main else [])]
    flag = st.sampled_from(flags_of(main)).map("--{}".format)
    word = st.sampled_from(words)
    pair = st.tuples(flag, word).map(lambda pair: f"{pair[0]}={pair[1]}")
    argument = st.one_of(*[pair] * 8, flag, word)  # most are well-formed, or nothing gets further than the parser

    @given(arguments=st.lists(argument, min_size=1, max_size=3))
    @settings(max_examples=TRIES)
    def fuzz(arguments):
        told(main, *base, *arguments)

    fuzz()


@pytest.mark.parametrize("bug", [ValueError("wrong shape"), RuntimeError("out of memory?"), KeyError("name")])
def test_a_bug_shows_as_a_traceback(bug):
    """Only what the user gave wrong, and what the machine lacks, is told in a line: the fuzz above would see a bug."""

    def main():
        raise bug

    with pytest.raises(type(bug)):
        told(main)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_too_little_memory_is_one_line(error):
    def main():
        raise error

    status, err = told(main)
    assert status == 1 and "not enough memory" in err and err.count("\n") == 1


def test_what_the_allocator_of_the_cpu_cannot_have_is_one_line():
    status, err = told(lambda: torch.empty(2**60, dtype=torch.uint8))
    assert status == 1 and "not enough memory" in err
