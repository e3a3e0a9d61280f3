"""Kill training at random moments, again and again, and look at what is left: python tests/kill.py [HOW_OFTEN]

After each SIGKILL both checkpoints must load, nothing that was saved may be lost, and the run resumes. When a run
reaches its end, its weights, optimizer state and log must be those of a run that was never killed, bit for bit.
"""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch._dynamo  # AdamW would import it in every child

import train
from data.common import Parser, run
from data.prepare import prepare
from model import load_checkpoint

FLAGS = "--n_layer=1 --n_head=2 --n_embd=32 --block_size=64 --batch_size=4 --steps=100 --eval_interval=5 --eval_steps=1"
FLAGS += " --device=cpu"  # where a resumed run is the same, bit for bit


def start(data, out):
    """Fork a process that trains, or resumes if it can -> its process id."""
    pid = os.fork()
    if pid == 0:  # forked, because starting Python and PyTorch anew would take most of the time
        try:
            torch.set_num_threads(1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            flags = [*FLAGS.split(), f"--data={data}", f"--out={out}"]
            flags += ["--resume"] if (out / "last.pt").exists() else []
            os._exit(train.Run(train.parse_arguments(flags)).train() or 0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return pid


def log_of(out):
    """Steps and losses of the complete lines."""
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True) if (out / "log.jsonl").exists() else []
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    return [(entry["step"], entry["loss"], entry["val_loss"]) for entry in entries]


def kill(times, seed=0, folder=None):
    """Kill `times` times -> how many runs reached their end. AssertionError if anything was lost or differs."""
    rng, ended = random.Random(seed), 0
    folder = Path(folder or tempfile.mkdtemp())
    data = prepare(stories=100, root=folder)
    whole, out, killed, saved = folder / "whole", folder / "run-0", 0, -1
    assert os.waitpid(start(data, whole), 0)[1] == 0
    while killed < times:
        pid, death, gone = start(data, out), time.monotonic() + rng.uniform(0.02, 1), (0, 0)
        while time.monotonic() < death and not (gone := os.waitpid(pid, os.WNOHANG))[0]:
            time.sleep(0.001)
        if gone[0]:
            assert gone[1] == 0, f"training failed with status {gone[1]}"
            ours, theirs = (load_checkpoint(run / "last.pt")[1] for run in (out, whole))
            assert all(torch.equal(ours["model"][name], theirs["model"][name]) for name in theirs["model"])
            for mine, other in zip(ours["optimizers"], theirs["optimizers"], strict=True):
                for i, state in other["state"].items():
                    assert all(torch.equal(mine["state"][i][name], state[name]) for name in state)
            assert log_of(out) == log_of(whole)
            shutil.rmtree(out)
            ended, saved, out = ended + 1, -1, folder / f"run-{ended + 1}"
            continue
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        killed += 1
        steps = [load_checkpoint(path)[1]["step"] for path in (out / "ckpt.pt", out / "last.pt") if path.exists()]
        if (out / "last.pt").exists():
            assert steps[-1] >= max([saved, *(step for step, *_ in log_of(out))]), "something was lost"
            saved = steps[-1]
    return ended


def main():
    parser = Parser(description=__doc__.split(":")[0])
    parser.add_argument("times", nargs="?", type=int, default=100, help="how many times to kill (default: 100)")
    times = parser.parse_args().times
    print(f"killed {times} times: nothing lost; {kill(times)} runs reached their end, each as if never killed")


if __name__ == "__main__":
    run(main)
