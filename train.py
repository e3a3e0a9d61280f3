"""Train a GPT with any attention on stories.

Runs on a CPU, on one GPU, or under torchrun on several. Into --out go ckpt.pt (the best so far by val loss), last.pt
(for --resume), log.jsonl, and spectrum.jsonl (about twenty snapshots of the spectrum of W_Q W_K^T). What a step does
depends on the options, the weights and the number of the step, never on the clock or on how often the run was stopped,
so that a resumed run is the same run.
"""

import itertools
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from argparse import SUPPRESS, BooleanOptionalAction
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data.common import (
    DATA,
    InputError,
    Parser,
    check_device,
    fast_bfloat16,
    load_data,
    load_tokenizer,
    run,
    wrap,
)
from data.judge import recall
from data.prepare import prepare
from model import ATTN, FORMAT, GPT, SIZES, GPTConfig, load_checkpoint, tell
from spectrum import snapshot

BUDGETS = {  # the training that suits a size
    "tiny": dict(batch_size=8, steps=450, lr=3e-3),
    "30m": dict(batch_size=64, steps=5000, lr=1e-3),
    "124m": dict(batch_size=64, steps=10000, lr=6e-4),
    "200m": dict(batch_size=64, steps=10000, lr=5e-4),
}
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bf16, datasheets


def option(default, help, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Options:
    """How to train. What is None is chosen by what else is known, so that afterwards nothing is.

    Raises InputError that names the option, what it got, and what it may be."""

    size: str = option(None, "shape of the model, and a budget that suits it (tiny on a CPU, 30m on a GPU)", SIZES)
    data: str = option("stories", "folder that data/prepare.py made: its name in data/, or a path")
    out: str = option("out", "folder for checkpoints and log")
    resume: bool = option(False, "continue the run in --out where it stopped")
    steps: int = option(None, "optimizer steps (by size)")
    batch_size: int = option(None, "sequences in a batch, all processes together (by size)")
    grad_accum: int = option(1, "batches per step")
    lr: float = option(None, "learning rate at its peak (by size)")
    warmup: float = option(0.05, "share of the steps until the peak; then a cosine down to a tenth of it")
    weight_decay: float = option(0.1, "of AdamW, for matrices")
    grad_clip: float = option(1.0, "maximum norm of the gradient")
    eval_interval: int = option(None, "steps between evaluations (a tenth of all)")
    eval_steps: int = option(8, "batches of an evaluation; the one at the end takes all validation data")
    seed: int = option(0, "of weights, batches and dropout")
    device: str = option(None, "cpu, cuda, cuda:1, ... (cuda where there is one)")
    dtype: str = option(None, "of matrix products (bfloat16 where it is fast)", ("bfloat16", "float32"))
    compile: bool = option(None, "torch.compile the model (on cuda)")

    def __post_init__(self):
        for f in fields(self):  # a checkpoint can hold anything
            value, choices = getattr(self, f.name), f.metadata["choices"]
            chosen_below = value is None is f.default
            right = type(value) is f.type or (type(value), f.type) == (int, float) or chosen_below
            if not right or value is not None and choices and value not in choices:
                raise InputError(f"--{f.name}={value!r}: must be " + (", ".join(choices or ()) or f.type.__name__))
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        on_cuda = self.device.startswith("cuda")
        self.size = self.size or ("30m" if on_cuda else "tiny")
        for name in ("steps", "batch_size", "lr"):
            if getattr(self, name) is None:
                setattr(self, name, BUDGETS[self.size][name])
        self.eval_interval = self.eval_interval if self.eval_interval is not None else max(1, self.steps // 10)
        self.compile = on_cuda if self.compile is None else self.compile
        self.dtype = self.dtype or ("bfloat16" if fast_bfloat16(self.device) else "float32")
        for name in ("steps", "batch_size", "grad_accum", "eval_interval", "eval_steps", "lr", "grad_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"--{name}={getattr(self, name)}: must be above 0")
        for name, most in (("warmup", 1), ("weight_decay", math.inf), ("seed", 2**32)):
            if not 0 <= getattr(self, name) < most:
                raise InputError(f"--{name}={getattr(self, name)}: must be at least 0 and below {most}")


MODEL_HELP = {
    "block_size": "tokens of context (by size)",
    "n_layer": "layers (by size)",
    "n_head": "heads (by size)",
    "n_embd": "width (by size)",
    "attn": "attention",
    "rank": "width of the latent / n_embd, or key/value heads / n_head for gqa (0.5, where it means something)",
    "joint": "one latent for keys and values: mla, mla_rope, mla_decoupled",
    "latent_norm": "an RMSNorm on each latent (mla variants)",
    "q_rank": "width of the latent for queries / n_embd (mla variants; none)",
    "rope_dim": "width of the rotary part of mla_decoupled (half a head)",
    "rope_base": "base of RoPE's wavelengths",
    "dropout": "probability",
}


def parse_arguments(arguments=None):
    """The flags that were given -> {field of GPTConfig or Options: value}."""
    usage, example = "train.py [FLAGS]", "example: python train.py --attn=mla_decoupled --rank=0.25 --out=out/quarter"
    parser = Parser(usage=usage, description=__doc__, epilog=example, argument_default=SUPPRESS)
    for source in (GPTConfig, Options):
        group = parser.add_argument_group("model" if source is GPTConfig else "training")
        for f in fields(source):
            if f.name == "vocab_size":  # the data's
                continue
            kind = (get_args(f.type) or (f.type,))[0]  # of `float | None`, float
            choices = ATTN if f.name == "attn" else f.metadata.get("choices")
            text = MODEL_HELP[f.name] if source is GPTConfig else f.metadata["help"]
            if "(" not in text and f.default is not False:
                text += f" ({f.default})"
            how = {"action": BooleanOptionalAction} if kind is bool else {"type": kind, "choices": choices}
            group.add_argument(f"--{f.name}", help=text, **how)
    return vars(parser.parse_args(arguments))


def load_last(path):
    """The checkpoint last.pt, from which a run can go on. InputError if it is not there, or not whole."""
    if not path.exists():
        raise InputError(f"--resume: there is no {path}; start the run without --resume")
    last = load_checkpoint(path)[1]
    if "optimizer" not in last:
        raise InputError(f"--resume: {path} holds a model, but not the state of a run")
    try:
        Options(**last["options"])
        names = [{f.name for f in fields(part)} for part in (Options, GPTConfig)]
        plain = all(type(value) in (str, int, float, type(None)) for value in last["meta"].values())
        if [last["options"].keys(), last["config"].keys()] != names or not plain:
            raise ValueError("options, config or meta are not whole")
    except Exception as error:  # anything can stand in the file
        raise InputError(f"--resume: {path} is damaged: {error!r}"[:300]) from error
    return last


def resolve(given):
    """Flags -> Options, GPTConfig (its vocab_size is the data's to say), and the checkpoint to resume, or None."""
    last = load_last(Path(given.get("out", "out")) / "last.pt") if given.get("resume") else None
    if last:
        saved = {k: v for k, v in (last["options"] | last["config"]).items() if k not in ("resume", "out")}
        for name, value in given.items():
            if name not in ("resume", "out", "device", "compile") and value != saved[name]:
                raise InputError(f"--resume: the run has --{name}={saved[name]}, not {value}; leave that flag out")
        if "device" in given:  # another machine, perhaps, where it may not pay
            saved["compile"] = None
        given = saved | given
    shape = {f.name for f in fields(GPTConfig)}
    options = Options(**{k: v for k, v in given.items() if k not in shape})
    return options, GPTConfig(**{k: v for k, v in (SIZES[options.size] | given).items() if k in shape}), last


def join_processes(batch_size, device):
    """Under torchrun: meet the other processes. -> the number of this one, how many there are, and its device."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if batch_size % processes:
        raise InputError(f"--batch_size={batch_size}: must be a multiple of the {processes} processes that share it")
    if processes > 1 and device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    check_device(device)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    if processes > 1:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return int(os.environ.get("RANK", 0)), processes, device


def together(work, device, stop=()):
    """Do this process's work, if it has any, and hear from the others -> has any of them been asked to stop?

    Work that fails in one process ends all of them: that one with its own error, the others with one line."""
    failure = None
    try:
        if work:
            work()
    except Exception as error:
        failure = error
    failed, asked = failure is not None, bool(stop)
    if dist.is_initialized():
        try:
            news = torch.tensor([float(failed), float(asked)], device=device)
            dist.all_reduce(news)
            failed, asked = news.bool().tolist()
        except RuntimeError as gone:
            failure = failure or gone
    if failure:
        raise failure
    if failed:
        raise OSError("another process failed, see its message")
    return asked


def open_data(name, leader, device):
    """-> meta, train tokens, val tokens. The default data is made if it is not there."""
    folder = DATA / name if (DATA / name / "meta.json").exists() or name == "stories" else Path(name)
    missing = name == "stories" and not folder.exists()
    together(prepare if leader and missing else None, device)
    return load_data(folder)


def story_rows(tokens, end, length):
    """Cut a stream of stories into rows of at most `length` tokens to predict -> their starts and lengths, int64.

    A row begins where a story does, and holds as many stories as fit: each is read from its first word on. Only a story
    that is longer than a row goes on in the next one."""
    ends = np.flatnonzero(tokens == end)
    starts, start, last = [0], 0, len(tokens) - 1
    while start + length < last:
        story = ends[np.searchsorted(ends, start + length, side="right") - 1]  # the last that begins within reach
        start = int(story) if story > start else start + length
        starts.append(start)
    return np.array(starts), np.diff([*starts, last])


def batch(tokens, starts, lengths, block_size, device):
    """-> idx, targets (B, block_size), int64; the targets behind the end of a row are -1."""
    places = np.minimum(starts[:, None] + np.arange(block_size + 1), len(tokens) - 1)
    rows = torch.from_numpy(tokens[places].astype(np.int64))
    idx, targets = rows[:, :-1], rows[:, 1:].clone()
    targets[torch.arange(block_size) >= torch.from_numpy(lengths)[:, None]] = -1
    return idx.to(device), targets.to(device)


def learning_rate(step, options):
    """Linear rise to lr, then a cosine to a tenth of it."""
    rise = round(options.warmup * options.steps)
    if step < rise:
        return options.lr * (step + 1) / rise
    return options.lr * (0.55 + 0.45 * math.cos(math.pi * (step - rise) / max(1, options.steps - rise)))


def write(path, checkpoint):
    """Write a file so that at any moment, under its name, there is either the old one or the new one, whole."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # RuntimeError is PyTorch's, of a write that failed
        reason = error.__context__ or error
        raise OSError(f"{path}: cannot be written, what was there before is still whole: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)


def provenance():
    """What made a checkpoint, besides its options: versions, and the revision of this code, if it is under git."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        revision = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        revision = None
    return {"python": platform.python_version(), "torch": str(torch.__version__), "revision": revision}


def peak_flops(device):
    """Of the GPU, by its datasheet; None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else ""
    return next((flops for gpu, flops in PEAK_FLOPS.items() if gpu in name), None)


def flops_per_token(model):
    """Of forward and backward: 6 for each weight (the embedding is the output head), and 12 for each number of the keys
    attended to, on average half the context (Chowdhery et al. 2022, appendix B)."""
    config = model.config
    return 6 * sum(p.numel() for p in model.parameters()) + 6 * config.n_layer * config.n_embd * config.block_size


def cell(value, width, style=""):
    return ("-" if value is None else format(value, style)).rjust(width)


def clear_folder(out, resumed_at):
    """Make the folder of a new run, and move an older run's files into out/previous-1, -2, ... Shorten the log of a
    resumed run: if it was killed, it may have logged more than it saved, the last line only in part."""
    out.mkdir(parents=True, exist_ok=True)
    files = [out / name for name in ("ckpt.pt", "last.pt", "log.jsonl", "spectrum.jsonl") if (out / name).exists()]
    if resumed_at is None and files:
        previous = next(path for i in itertools.count(1) if not (path := out / f"previous-{i}").exists())
        previous.mkdir()
        for file in files:
            os.replace(file, previous / file.name)
        return
    for log in (file for file in files if file.suffix == ".jsonl"):
        try:
            lines = log.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= resumed_at]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise InputError(f"--resume: {log} is damaged; move it away, and a new one begins: {error!r}") from error
        log.with_suffix(".tmp").write_text("".join(kept))
        os.replace(log.with_suffix(".tmp"), log)


class Run:
    """One training run: set up, or taken up again, by its flags."""

    def __init__(self, given):
        self.options, self.config, last = resolve(given)  # what is wrong with them is said before any data is made
        options, block_size = self.options, self.config.block_size
        if block_size < 16:
            raise InputError(f"--block_size={block_size}: must be at least 16, to hold the beginning of a story")
        self.out = Path(options.out)
        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"--out={options.out}: is a file; name a folder")
        self.process_index, self.world_size, self.device = join_processes(options.batch_size, options.device)
        self.leader = self.process_index == 0  # it alone reports and writes

        self.meta, self.train_tokens, self.val_tokens = open_data(options.data, self.leader, self.device)
        self.tokenizer = load_tokenizer(self.meta["tokenizer"])
        self.config.vocab_size = self.tokenizer.n_vocab
        if self.config.vocab_size != self.meta["vocab_size"]:
            raise InputError(
                f"--data={options.data}: tokens and meta.json do not fit together; make it with data/prepare.py"
            )
        self.facts = {key: value for key, value in self.meta.items() if key != "val_nats"}
        if last and last["meta"] != self.facts:
            raise InputError(f"--resume: --data={options.data} is not what the run was trained on")
        if (there := len(self.train_tokens) - 1) < block_size:
            raise InputError(f"--block_size={block_size}: there are only {there} tokens to train on")
        end = self.tokenizer.eot_token
        self.starts, _ = story_rows(self.train_tokens, end, block_size)
        self.val_rows = story_rows(self.val_tokens, end, block_size)
        self.story_ends = np.flatnonzero(self.val_tokens == end)
        self.tokens_per_step = options.batch_size * options.grad_accum * block_size

        torch.manual_seed(options.seed)
        torch.set_float32_matmul_precision("high")  # TF32 on GPUs
        self.model = GPT(self.config).to(self.device)
        matrices = [p for p in self.model.parameters() if p.dim() == 2]
        gains = [p for p in self.model.parameters() if p.dim() != 2]
        groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": gains, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
        self.first, self.best = 0, math.inf
        self.losses, self.seconds, self.norm = [], 0.0, None  # of the steps since the last report
        self.made_by = provenance()
        self.resumed = last is not None
        if last:
            try:
                self.restore(last)
            except Exception as error:  # anything can stand in the file
                raise InputError(f"--resume: {options.out}/last.pt is damaged: {error!r}"[:300]) from error
        net = torch.compile(self.model) if options.compile else self.model
        self.net = DistributedDataParallel(net) if self.world_size > 1 else net
        kind = torch.device(self.device).type
        self.autocast = torch.autocast(kind, torch.bfloat16, enabled=options.dtype == "bfloat16")

    def restore(self, last):
        """Take up the state that last.pt holds. Any exception, if it cannot be that of this run."""
        self.model.load_state_dict(last["model"])
        mine, state = self.optimizer.state_dict()["param_groups"], last["optimizer"]["state"]
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        if list(state) != list(range(len(weights) if last["step"] else 0)):
            raise ValueError("the optimizer's state is of other weights")
        for i in state:  # fused AdamW would write wherever the shapes lead it
            for name, shape in (("exp_avg", weights[i].shape), ("exp_avg_sq", weights[i].shape), ("step", ())):
                moment = state[i][name]
                right = moment.shape == shape and moment.dtype == torch.float32 and moment.is_contiguous()
                if not right or name == "step" and moment != last["step"]:
                    raise ValueError(f"the optimizer's {name} of weight {i} does not fit")
        self.optimizer.load_state_dict({"state": state, "param_groups": mine})
        self.first, self.best, self.losses, self.seconds = (last[k] for k in ("step", "best", "losses", "seconds"))
        numbers = [self.best, self.seconds, *self.losses]
        right = type(self.losses) is list and all(type(n) is float and n == n for n in numbers)
        right = right and 0 <= self.seconds < 1e9 and type(self.first) is int
        if not right or not 0 <= self.first <= self.options.steps:
            raise ValueError("step, best, losses or seconds are no numbers of this run")
        self.seconds = max(self.seconds, 1e-9)  # losses without time would be infinitely fast

    def step(self, step):
        """Forward, backward and update on the batches of this step. FloatingPointError if they are not finite."""
        options = self.options
        torch.manual_seed(options.seed + step * self.world_size + self.process_index)  # dropout
        chance = np.random.default_rng((options.seed, step))
        rows = chance.integers(len(self.starts), size=(options.grad_accum, options.batch_size))
        total = 0.0
        for i, chosen in enumerate(rows[:, self.process_index :: self.world_size]):
            starts, tokens, block_size = self.starts[chosen], self.train_tokens, self.config.block_size
            lengths = np.minimum(block_size, len(tokens) - 1 - starts)  # rows are full: their last story may break off
            idx, targets = batch(tokens, starts, lengths, block_size, self.device)
            wait = self.world_size > 1 and i < options.grad_accum - 1  # processes add their gradients once
            with self.net.no_sync() if wait else nullcontext():
                with self.autocast:
                    loss = self.net(idx, targets)[1] / options.grad_accum
                loss.backward()
            total += loss.detach()
        if self.world_size > 1:
            dist.all_reduce(total)
            total /= self.world_size
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), options.grad_clip)
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise FloatingPointError(f"step {step}: loss {total:.4g}, gradient norm {norm:.4g}; {self.rescue()}")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(float(total))
        self.norm = float(norm)

    def rescue(self):
        path = self.out / "ckpt.pt"
        kept = f"the best model so far is in {path}" if path.exists() else "there was no model to keep yet"
        return f"{kept}; try a lower --lr than {self.options.lr}"

    @torch.no_grad()
    def evaluate(self, model, batches=None):
        """Loss on the first batches of the validation data, or on all of it -> nats per token, and what a perfect model
        would lose there (None where nobody knows)."""
        model.eval()
        total = count = 0
        for i in range(0, len(self.val_rows[0]), self.options.batch_size)[:batches]:
            starts, lengths = (column[i : i + self.options.batch_size] for column in self.val_rows)
            with self.autocast:
                loss = model(*batch(self.val_tokens, starts, lengths, self.config.block_size, self.device))[1]
            total, count = total + loss.item() * int(lengths.sum()), count + int(lengths.sum())
        model.train()
        if not self.meta["val_nats"]:
            return total / count, None
        nats = np.cumsum([0.0, *self.meta["val_nats"]])  # up to each end of a story
        return total / count, float(np.interp(count, self.story_ends, nats)) / count

    def report_recall(self, model, stories=300):
        """How much of the excess is forgetting, and the words that are recalled, on some of the validation stories."""
        try:
            words, found = recall(model.eval(), (self.meta, self.train_tokens, self.val_tokens), stories)
        except InputError as error:  # the stories are of an older world
            print(f"recall   is not known: {error}")
            return
        if found["recall"] is None:
            print("recall   is not known: no story fits into the context")
            return
        lost, rest = found["lost"], found["excess"] - found["lost"]
        count = len(np.unique(words["story"]))  # those that fit into the context
        print(f"         in {count} stories {lost:.4f} is lost at words that the story decides, {rest:.4f} elsewhere")
        told = (
            "{recall:.1%} where a story asks for something; guessing has {chance:.1%}, copying such words {copying:.1%}"
        )
        print(f"recall   {told.format(**found)}")

    def bits_per_byte(self, val_loss):
        """Validation loss in a unit that does not depend on the tokenizer."""
        return val_loss * self.meta["val_tokens"] / self.meta["val_bytes"] / math.log(2)

    def save(self, step, val_loss=None, floor=None):
        """Write last.pt; and if val_loss is given and the best so far, ckpt.pt."""
        checkpoint = {
            "format": FORMAT,
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "options": asdict(self.options),
            "meta": self.facts,
            "step": step,
            "val_loss": val_loss,
            "floor": floor,
            "made_by": self.made_by,
        }
        if val_loss is not None and val_loss < self.best:
            self.best = val_loss
            write(self.out / "ckpt.pt", checkpoint)
        progress = {"best": self.best, "losses": self.losses, "seconds": self.seconds}
        write(self.out / "last.pt", checkpoint | progress | {"optimizer": self.optimizer.state_dict()})

    def report(self, step):
        """Every eval_interval, and at the end: evaluate, print a line, log it, save. At times, snap the spectrum."""
        # dense where training begins, for it is there that the spectrum changes most
        if step in {round(self.options.steps * (i / 20) ** 2) for i in range(21)}:
            with open(self.out / "spectrum.jsonl", "a") as file:
                file.write(snapshot(self.model, step) + "\n")
        if step % self.options.eval_interval and step != self.options.steps:
            return
        val_loss, floor = self.evaluate(self.model, self.options.eval_steps)
        if not math.isfinite(val_loss):
            raise FloatingPointError(f"step {step}: val loss is {val_loss}; {self.rescue()}")
        excess = floor and val_loss - floor
        bits_per_byte = None if floor else self.bits_per_byte(val_loss)
        loss = rate = mfu = left = None
        if self.losses:
            loss = sum(self.losses) / len(self.losses)
            rate = len(self.losses) * self.tokens_per_step / self.seconds
            left = (self.options.steps - step) * self.seconds / len(self.losses)
            left = str(timedelta(seconds=round(min(left, 1e9))))  # more than a timedelta holds is no forecast
            peak = peak_flops(self.device)
            mfu = peak and rate * flops_per_token(self.model) / (peak * self.world_size)
        tqdm.write(
            f"{step:6}{cell(loss, 8, '.4f')}{val_loss:8.4f}{cell(excess or bits_per_byte, 8, '.4f')}"
            f"{cell(rate, 10, ',.0f')}{cell(mfu, 6, '.0%')}{cell(left, 9)}"
        )
        entry = {"step": step, "loss": loss, "val_loss": val_loss, "excess": excess, "bits_per_byte": bits_per_byte}
        entry |= {"gradient_norm": self.norm, "tokens_per_second": rate}
        with open(self.out / "log.jsonl", "a") as log:
            log.write(json.dumps(entry) + "\n")
        self.losses, self.seconds = [], 0.0
        self.save(step, val_loss, floor)

    def train(self):
        """All steps, with a report every eval_interval. Ctrl-C and SIGTERM stop after the step that they meet.

        Returns the exit status: None if done, 130 if stopped."""
        stop = []
        signals = (signal.SIGINT, signal.SIGTERM)
        handlers = [signal.signal(number, lambda number, frame: stop.append(number)) for number in signals]
        try:
            step = self.steps(stop)
        finally:
            for number, handler in zip(signals, handlers, strict=True):
                signal.signal(number, handler)
        if step < self.options.steps:
            if self.leader:
                self.save(step)
                done = f"{step} of {self.options.steps} steps"
                print(f"stopped after {done}; go on: python train.py --resume --out={self.out}")
            return 130
        if self.leader:
            self.finish()

    def steps(self, stop):
        """Take steps until all are done, or `stop` holds something in any process -> the number of steps done."""
        options = self.options
        together(self.leader and partial(clear_folder, self.out, self.first if self.resumed else None), self.device)
        if self.leader:
            size = f"{sum(p.numel() for p in self.model.parameters()):,} parameters"
            print(f"{self.config.attn}, {size}; {self.device}, {options.dtype}; {self.tokens_per_step:,} tokens a step")
            over = "excess" if self.meta["val_nats"] else "bits/B"
            print(f"{'step':>6}{'loss':>8}{'val':>8}{over:>8}{'tokens/s':>10}{'MFU':>6}{'left':>9}")
        silent = None if self.leader else True  # None: tqdm shows its bar on terminals only
        bar = tqdm(total=options.steps, initial=self.first, unit=" steps", leave=False, disable=silent)
        for step in range(self.first, options.steps + 1):
            due = self.leader and not (self.resumed and step == self.first)  # a resumed run was saved after this
            stopping = together(due and partial(self.report, step), self.device, stop)
            if step == options.steps or stopping:
                break
            begun = time.perf_counter()
            self.step(step)
            self.seconds += time.perf_counter() - begun
            bar.update()
        bar.close()
        return step

    def finish(self):
        """Last words: the best model on all of the validation data, its cache, a story, and what to try next."""
        path, config = self.out / "ckpt.pt", self.config
        model, checkpoint = load_checkpoint(path, self.device)
        loss, floor = self.evaluate(model)
        write(path, checkpoint | {"val_loss": loss, "floor": floor})
        cached = model.kv_bytes_per_token(torch.bfloat16)
        of_mha = config.n_layer * 2 * config.n_embd * torch.bfloat16.itemsize
        print(f"\nval loss {loss:.4f} nats per token on all {self.meta['val_stories']:,} validation stories")
        if floor:
            print(f"excess   {loss - floor:.4f} over the {floor:.4f} that the stories hold; a perfect model has 0")
            self.report_recall(model)
        else:
            print(f"         {self.bits_per_byte(loss):.4f} bits per byte of text")
        change = cached / of_mha - 1
        compared = f"{abs(change):.0%} {'less' if change < 0 else 'more'} than" if change else "as many as"
        print(f"KV cache {cached:,} bytes per token in bfloat16, {compared} the {of_mha:,} of mha")
        story = tell(model.eval(), self.tokenizer, "Once upon a time")
        print(f"\n{wrap(story)}\n")
        other = "mla_decoupled" if config.attn != "mla_decoupled" else "mha_rope"
        print(f'next: python model.py {path} --prompt="One sunny day" --seed=1')
        print(f"      python train.py --attn={other} --out={self.out}/{other}")


def main():
    given = parse_arguments()
    try:
        sys.exit(Run(given).train())
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):  # nccl and gloo say so when the others are gone
            raise OSError(f"another process ended, see its message: {str(error)[:100]}") from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
