"""Train a GPT with any attention on stories, from scratch or from a trained model, whose attention can be converted.

Runs on a CPU, a Mac, a GPU, or several GPUs under torchrun. Into --out go ckpt.pt (the best model so far by val loss),
last.pt (for --resume), log.jsonl, train.png, and spectrum.jsonl (snapshots of the spectrum of W_Q W_K^T). A step depends
only on the options, the weights and its number, so a run that was stopped and resumed is the same run.
"""

import copy
import itertools
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from argparse import SUPPRESS, BooleanOptionalAction, Namespace
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data.common import DATA, InputError, Parser, check_device, fast_bfloat16, load_data, load_tokenizer, run, wrap
from data.judge import recall
from data.prepare import prepare
from model import ATTN, FORMAT, GPT, LEARNED, MLA, SIZES, GPTConfig, load_checkpoint, tell
from spectrum import snapshot

BUDGETS = {  # the training that suits a size. Only tiny has been run
    "tiny": dict(batch_size=8, steps=1800, lr=dict(muon=8e-3, adamw=4e-3)),
    "30m": dict(batch_size=64, steps=5000, lr=dict(muon=4e-3, adamw=1e-3)),
    "124m": dict(batch_size=64, steps=10000, lr=dict(muon=3e-3, adamw=6e-4)),
    "200m": dict(batch_size=64, steps=10000, lr=dict(muon=2e-3, adamw=5e-4)),
}
FLAGS = {  # name: type or choices, default, help. resolve() replaces a default of None, as the help says
    "attn": (ATTN, "mha_rope", "attention"),
    "rank": (float, None, "latent width / n_embd; for gqa, key heads / n_head (default: 0.5 where it applies)"),
    "joint": (bool, False, "one latent for keys and values (mla, mla_rope, mla_decoupled)"),
    "latent_norm": (bool, False, "an RMSNorm on each latent (mla variants)"),
    "q_rank": (float, None, "width of a latent for queries / n_embd (mla variants; default: no such latent)"),
    "rope_dim": (int, None, "width of mla_decoupled's rotary key (default: half a head)"),
    "rope_base": (float, 10000.0, "base of RoPE's wavelengths"),
    "size": (tuple(SIZES), None, "shape of the model and a budget for it (default: tiny on a CPU, 30m elsewhere)"),
    "n_layer": (int, None, "layers (default: by size)"),
    "n_head": (int, None, "heads (default: by size)"),
    "n_embd": (int, None, "width (default: by size)"),
    "block_size": (int, None, "tokens of context (default: by size)"),
    "dropout": (float, 0.0, "share of activations that training sets to zero"),
    "data": (str, "stories", "a folder that data/prepare.py made: its name in data/, or a path"),
    "out": (str, "out", "folder for checkpoints and logs"),
    "init_from": (
        str,
        None,
        "start from this checkpoint, and convert its attention where --attn, --rank or --joint differ",
    ),
    "resume": (bool, False, "continue the run in --out where it stopped"),
    "steps": (int, None, "optimizer steps; 0 evaluates and saves (default: by size)"),
    "batch_size": (int, None, "sequences in a batch, all processes together (default: by size)"),
    "grad_accum": (int, 1, "batches per step"),
    "optimizer": (
        ("muon", "adamw"),
        "muon",
        "muon trains the matrices inside blocks, adamw the rest; or adamw trains all",
    ),
    "lr": (float, None, "peak of the learning rate (default: by size and optimizer)"),
    "warmup": (float, 0.05, "share of the steps until the peak; then the rate falls linearly to zero"),
    "weight_decay": (float, 0.1, "of matrices"),
    "grad_clip": (float, 1.0, "maximum norm of the gradient"),
    "eval_interval": (int, None, "steps between evaluations (default: a twentieth of all)"),
    "eval_steps": (int, 8, "batches of an evaluation; the last evaluation takes all validation data"),
    "seed": (int, 0, "of weights, batches and dropout"),
    "device": (str, None, "cpu, mps, cuda, cuda:1, ... (default: cuda if there is one, else mps, else cpu)"),
    "dtype": (("bfloat16", "float16", "float32"), None, "of matrix products (default: 16 bits where they are fast)"),
    "compile": (bool, None, "torch.compile the model (default: on cuda)"),
}
CONVERTS = {"mha": "mla", "mha_rope": "mla_rope", "gqa": "mla_rope", "mla": "mla", "mla_rope": "mla_rope"}
PEAK_TFLOPS = {"H100": (989, 495), "H200": (989, 495), "A100": (312, 156), "L40S": (362, 183), "T4": (65, 8)}


# Options --------------------------------------------------------------------------------------------------------------


def parse_arguments(arguments=None):
    """The flags that were given, and only those: {name: value}."""
    example = "example: python train.py --attn=mla_decoupled --rank=0.25 --out=out/quarter"
    parser = Parser(usage="train.py [FLAGS]", description=__doc__, epilog=example, argument_default=SUPPRESS)
    for name, (kind, default, text) in FLAGS.items():
        how = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        how = {"action": BooleanOptionalAction} if kind is bool else how
        parser.add_argument(f"--{name}", help=text if default is None else f"{text} (default: {default})", **how)
    return vars(parser.parse_args(arguments))


def resolve(given):
    """Flags as given -> every option with its value, the GPTConfig (but for vocab_size), the checkpoint to start from.
    Raises InputError for a flag that is out of range, or does not fit another flag or the checkpoint."""
    checkpoint, given = read_start(given)
    device = given.get("device") or (
        "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    )
    kind = device.split(":")[0]
    size = given.get("size") or ("tiny" if kind == "cpu" else "30m")
    defaults = {name: default for name, (_, default, _) in FLAGS.items()} | SIZES[size] | BUDGETS[size]
    o = Namespace(**defaults | given | {"device": device, "size": size})
    o.lr = o.lr[o.optimizer] if isinstance(o.lr, dict) else o.lr
    o.eval_interval = max(1, o.steps // 20) if o.eval_interval is None else o.eval_interval
    o.compile = kind == "cuda" if o.compile is None else o.compile
    o.dtype = o.dtype or ("bfloat16" if fast_bfloat16(device) else "float16" if kind == "cuda" else "float32")
    for name in ("batch_size", "grad_accum", "eval_interval", "eval_steps", "lr", "grad_clip"):
        if not 0 < getattr(o, name) < 2**32:
            raise InputError(f"--{name}={getattr(o, name)}: must be above 0")
    for name in ("steps", "warmup", "weight_decay", "seed"):
        if not 0 <= getattr(o, name) < 2**32:
            raise InputError(f"--{name}={getattr(o, name)}: must be from 0 to {2**32 - 1}")
    config = GPTConfig(**{name: value for name, value in vars(o).items() if name in GPTConfig.__dataclass_fields__})
    if config.block_size < 16:
        raise InputError(f"--block_size={config.block_size}: must be at least 16, to hold the beginning of a story")
    vars(o).update({name: value for name, value in asdict(config).items() if name in FLAGS})
    return o, config, checkpoint


def read_start(given):
    """The checkpoint of --resume or --init_from, or None; and the flags, with those that the checkpoint decides."""
    if given.get("resume"):
        path = Path(given.get("out", "out")) / "last.pt"
        if not path.exists():
            raise InputError(f"--resume: there is no {path}; start the run without --resume")
        checkpoint = load_checkpoint(path)[1]
        free, saved = ("resume", "out", "device", "compile"), checkpoint["options"]
        for name, value in given.items():
            if name not in free and value != saved[name]:
                raise InputError(f"--resume: the run has --{name}={saved[name]}, not {value}; leave that flag out")
        return checkpoint, saved | ({"compile": None} if "device" in given else {}) | given
    if not given.get("init_from"):
        return None, given
    checkpoint, path = load_checkpoint(given["init_from"])[1], given["init_from"]
    old = {name: value for name, value in checkpoint["config"].items() if name in FLAGS and name != "dropout"}
    new = old | given
    changed = {name for name in old if new[name] != old[name]}
    fixed = changed - {"attn", "rank", "joint", *(() if old["attn"] in LEARNED else ("block_size",))}
    for name in fixed:
        raise InputError(f"--{name}={new[name]}: the model in {path} has {old[name]}; leave that flag out")
    if changed & {"attn", "rank", "joint"} and (new["attn"] != CONVERTS.get(old["attn"]) or old["latent_norm"]):
        raise InputError(
            f"--init_from: cannot convert {old['attn']} like that. It converts mha to mla, mha_rope and gqa to mla_rope, "
            "mla and mla_rope to a lower rank or to joint, all without latent_norm"
        )
    return checkpoint, new


# Devices and processes ------------------------------------------------------------------------------------------------


def set_up_device(o):
    """Take this process's device, and meet the other processes if torchrun started several.
    -> device (on cuda, with an index), number of this process, number of processes"""
    processes, device = int(os.environ.get("WORLD_SIZE", 1)), o.device
    if o.batch_size % processes:
        raise InputError(f"--batch_size={o.batch_size}: must be a multiple of the {processes} processes")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    check_device(device)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    if processes > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    return device, int(os.environ.get("RANK", 0)), processes


def agree(flag):
    """Is the flag true in any process? The processes wait for each other here, but not for their devices."""
    if not dist.is_initialized():
        return flag
    count = torch.tensor(float(flag))
    dist.all_reduce(count)
    return count.item() > 0


# Data -----------------------------------------------------------------------------------------------------------------


def open_data(name, leader):
    """-> meta, train tokens, val tokens. The default data is made if it is not there."""
    folder = DATA / name if (DATA / name / "meta.json").exists() or name == "stories" else Path(name)
    if leader and name == "stories" and not folder.exists():
        prepare()
    agree(False)  # the others wait
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
    positions = np.minimum(starts[:, None] + np.arange(block_size + 1), len(tokens) - 1)
    rows = torch.from_numpy(tokens[positions].astype(np.int64))
    targets = rows[:, 1:].clone()
    targets[torch.arange(block_size) >= torch.from_numpy(lengths)[:, None]] = -1
    pair = rows[:, :-1].contiguous(), targets
    if device.startswith("cuda"):  # copied while the GPU computes
        return tuple(tensor.pin_memory().to(device, non_blocking=True) for tensor in pair)
    return tuple(tensor.to(device) for tensor in pair)


# Conversion -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def second_moments(model, idx):
    """E[x x^T] (d, d), in float64, of the input x of each layer's attention on the tokens (B, T)."""
    moments = []

    def add(attention, inputs):
        x = inputs[0].flatten(0, 1).cpu().double()
        moments.append(x.mT @ x / len(x))

    hooks = [block.attn.register_forward_pre_hook(add) for block in model.blocks]
    model(idx)
    for hook in hooks:
        hook.remove()
    return moments


def factor(w, moment, rank):
    """W (d, n) -> W_D (d, rank), W_U (rank, n) that minimise E|x W - x W_D W_U|^2, where moment = E[x x^T].

    If E[x x^T] = S^T S, this is |S W - S W_D W_U|^2. So S W_D W_U is the truncated SVD of S W."""
    variance, directions = torch.linalg.eigh(moment)
    scale = variance.clamp(min=0).sqrt()[:, None]  # S = scale * directions^T
    u, s, vt = torch.linalg.svd(scale * (directions.mT @ w), full_matrices=False)
    u, s, vt = u[:, :rank], s[:rank].sqrt(), vt[:rank]
    inverse = torch.where(scale > 1e-7 * scale.max(), 1 / scale, 0.0)  # LayerNorm leaves one direction without variance
    return directions @ (inverse * u) * s, s[:, None] * vt


def keys_and_values(attention):
    """W_K and W_V (d, d), in float64, as if each head had its own."""
    a, c = copy.deepcopy(attention).cpu().double(), attention.config
    one = torch.eye(c.n_embd, dtype=torch.float64)
    if c.attn in MLA:
        return a.w_uk(a.w_dk(one)), a.w_uv((a.w_dk if c.joint else a.w_dv)(one))
    heads = (w(one).unflatten(1, (c.kv_heads, c.head_dim)) for w in (a.w_k, a.w_v))
    return tuple(w.repeat_interleave(c.n_head // c.kv_heads, dim=1).flatten(1) for w in heads)


@torch.no_grad()
def convert(model, config, moments):
    """A model with the mla or mla_rope of `config` that does what `model` does, as nearly as the rank allows.

    moments: what second_moments says of `model` on training rows. A gqa becomes an mla_rope of the same rank, and the
    same cache, exactly: its few heads are a latent, and W_UK and W_UV copy them to all heads. MLA contains GQA."""
    new = GPT(config).to(model.token_embedding.weight)
    old, weights = model.state_dict(), new.state_dict()
    new.load_state_dict(weights | {n: w for n, w in old.items() if n in weights and w.shape == weights[n].shape})
    for block, new_block, moment in zip(model.blocks, new.blocks, moments, strict=True):
        (w_k, w_v), attn = keys_and_values(block.attn), new_block.attn
        if config.joint:
            w_dk, w_u = factor(torch.cat((w_k, w_v), dim=1), moment, config.latent_dim)
            w_uk, w_uv = w_u.chunk(2, dim=1)
        else:
            w_dk, w_uk = factor(w_k, moment, config.latent_dim)
            w_dv, w_uv = factor(w_v, moment, config.latent_dim)
            attn.w_dv.weight.copy_(w_dv.mT)
        for layer, w in ((attn.w_dk, w_dk), (attn.w_uk, w_uk), (attn.w_uv, w_uv)):
            layer.weight.copy_(w.mT)
    return new


# Optimizer ------------------------------------------------------------------------------------------------------------


def make_optimizers(model, o):
    """Muon makes the update of a matrix orthogonal, which suits the maps inside blocks. Embeddings are lists of vectors
    and gains are vectors: those stay with AdamW. match_rms_adamw gives both updates of one size, so one lr does."""
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    embeddings = [p for name, p in model.named_parameters() if "embedding" in name]
    gains = [p for p in model.parameters() if p.dim() == 1]
    muon = o.optimizer == "muon"
    decayed = {"params": embeddings if muon else embeddings + matrices, "weight_decay": o.weight_decay}
    adamw = torch.optim.AdamW([decayed, {"params": gains, "weight_decay": 0.0}], betas=(0.9, 0.95), fused=True)
    if not muon:
        return [adamw]
    return [torch.optim.Muon(matrices, weight_decay=o.weight_decay, adjust_lr_fn="match_rms_adamw"), adamw]


def learning_rate(step, o):
    """A linear rise to lr, then a linear fall to zero."""
    rise = round(o.warmup * o.steps)
    return o.lr * min((step + 1) / max(1, rise), (o.steps - step) / max(1, o.steps - rise))


def utilisation(model, tokens_per_second, device, dtype):
    """MFU: the model's FLOPs per second as a share of the GPU's peak, or None if that is not known.

    A token takes 6 FLOPs for each weight (the embedding is the output head), and 12 for each number of the keys that it
    attends to, on average half the context (Chowdhery et al. 2022, appendix B)."""
    name, c = torch.cuda.get_device_name(device) if device.startswith("cuda") else "", model.config
    peak = next((peaks[dtype == "float32"] for gpu, peaks in PEAK_TFLOPS.items() if gpu in name), None)
    flops = 6 * sum(p.numel() for p in model.parameters()) + 6 * c.n_layer * c.n_embd * c.block_size
    return peak and tokens_per_second * flops / (peak * 1e12)


def write(path, checkpoint):
    """Replace a file in one move, so that its name always leads to a whole file, the old or the new one."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # RuntimeError is PyTorch's, of a write that failed
        raise OSError(
            f"{path}: cannot be written; what was there is still whole: {error.__context__ or error}"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def provenance():
    """What made a checkpoint, besides its options: versions, and the git revision of this code."""
    git = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        revision = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git here
        revision = None
    return {"python": platform.python_version(), "torch": str(torch.__version__), "revision": revision}


def make_folder(out):
    """Make the folder of a new run. Files of an older run move to out/previous-1, -2, ..."""
    out.mkdir(parents=True, exist_ok=True)
    names = ("ckpt.pt", "last.pt", "log.jsonl", "spectrum.jsonl", "train.png")
    if files := [out / name for name in names if (out / name).exists()]:
        previous = next(path for i in itertools.count(1) if not (path := out / f"previous-{i}").exists())
        previous.mkdir()
        for file in files:
            os.replace(file, previous / file.name)


def shorten_logs(out, step):
    """A run that was killed may have logged more than it saved. Leave the lines up to the step that was saved."""
    for log in out.glob("*.jsonl"):
        lines = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
        log.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))


def draw(out, floor):
    """log.jsonl -> train.png: loss and val loss against tokens, and the floor, which is a perfect model's loss."""
    from matplotlib.figure import Figure  # here, because it takes a second to import

    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, style, label in (
        ("loss", "C0o--", "training, mean since the last point"),
        ("val_loss", "C1o-", "validation"),
    ):
        points = [(entry["tokens"] / 1e6, entry[name]) for entry in entries if entry[name] is not None]
        axes.plot(*zip(*points), style, markersize=3, label=label)
    if floor:
        axes.axhline(floor, color="k", linewidth=1, label=f"floor, {floor:.3f}")
    axes.set(xlabel="million tokens", ylabel="loss, nats per token", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(out / "train.png", dpi=130)


class Run:
    """A training run, as its flags describe it."""

    def __init__(self, given):
        self.options, self.config, start = resolve(given)  # wrong flags are told before any data is made
        o, config, self.out = self.options, self.config, Path(self.options.out)
        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"--out={o.out}: is a file; name a folder")
        self.device, self.process, self.processes = set_up_device(o)
        self.leader = self.process == 0  # it alone reports and writes

        self.meta, self.train_tokens, self.val_tokens = open_data(o.data, self.leader)
        self.facts = {key: value for key, value in self.meta.items() if key != "val_nats"}
        self.tokenizer = load_tokenizer(self.meta["tokenizer"])
        config.vocab_size, end = self.tokenizer.n_vocab, self.tokenizer.eot_token
        if config.vocab_size != self.meta["vocab_size"]:
            raise InputError(f"--data={o.data}: tokens and meta.json do not fit together; make it with data/prepare.py")
        if o.resume and start["meta"] != self.facts:
            raise InputError(f"--resume: --data={o.data} is not what the run was trained on")
        if start and start["meta"]["tokenizer"] != self.meta["tokenizer"]:
            raise InputError(f"--data={o.data}: needs the tokens of {o.init_from}, {start['meta']['tokenizer']}")
        if (there := len(self.train_tokens) - 1) < config.block_size:
            raise InputError(f"--block_size={config.block_size}: there are only {there} tokens to train on")
        self.starts, _ = story_rows(self.train_tokens, end, config.block_size)
        self.val_rows = story_rows(self.val_tokens, end, config.block_size)
        self.val_ends = np.flatnonzero(self.val_tokens == end)
        self.tokens_per_step = o.batch_size * o.grad_accum * config.block_size

        torch.manual_seed(o.seed)
        kind = self.device.split(":")[0]
        self.autocast = torch.autocast(kind, getattr(torch, o.dtype), enabled=o.dtype != "float32")
        self.scaler = torch.amp.GradScaler(kind, enabled=o.dtype == "float16")
        self.model = GPT(config).to(self.device)
        if o.init_from and not o.resume:
            self.start_from(load_checkpoint(o.init_from, self.device)[0])
        self.optimizers = make_optimizers(self.model, o)
        self.first, self.best, self.losses, self.norm, self.made_by = 0, math.inf, [], None, provenance()
        if o.resume:
            self.model.load_state_dict(start["model"])
            for optimizer, state in zip(self.optimizers, start["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            self.scaler.load_state_dict(start["scaler"])
            self.first, self.best = start["step"], start["best"]
            self.losses = list(torch.tensor(start["losses"], device=self.device))
        self.ddp = DistributedDataParallel(self.model) if self.processes > 1 else None
        self.net = torch.compile(self.ddp or self.model, disable=not o.compile)

    def start_from(self, source):
        """Take the weights of a trained model, and convert its attention if ours is another."""
        if all(getattr(source.config, name) == getattr(self.config, name) for name in ("attn", "rank", "joint")):
            self.model.load_state_dict(source.state_dict())
        else:
            rows = np.random.default_rng(self.options.seed).integers(len(self.starts), size=64)
            self.model = convert(source, self.config, second_moments(source, self.train_batch(rows)[0]))

    def train_batch(self, rows):
        starts, size = self.starts[rows], self.config.block_size  # rows are full here: their last story may break off
        return batch(
            self.train_tokens, starts, np.minimum(size, len(self.train_tokens) - 1 - starts), size, self.device
        )

    def step(self, step):
        """Forward, backward and update on the batches of this step. Only float16 waits for the device."""
        o = self.options
        torch.manual_seed(o.seed + step * self.processes + self.process)  # dropout
        rows = np.random.default_rng((o.seed, step)).integers(len(self.starts), size=(o.grad_accum, o.batch_size))
        total = 0.0
        for i, chosen in enumerate(rows[:, self.process :: self.processes]):
            wait = self.ddp and i < o.grad_accum - 1  # processes add their gradients once
            with self.ddp.no_sync() if wait else nullcontext():
                with self.autocast:
                    loss = self.net(*self.train_batch(chosen))[1] / o.grad_accum
                self.scaler.scale(loss).backward()
            total += loss.detach()
        if self.ddp:
            dist.all_reduce(total, dist.ReduceOp.AVG)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, o)
        self.norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), o.grad_clip)
        for optimizer in self.optimizers:
            if o.dtype != "float16" or self.norm.isfinite():  # else the scale was too large: skip this step
                optimizer.step()
            optimizer.zero_grad()
        self.scaler.update()
        self.losses.append(total)

    @torch.no_grad()
    def evaluate(self, model, batches=None):
        """Loss on the first batches of the validation data, or on all of it -> nats per token, and what a perfect model
        would lose there (None where nobody knows)."""
        model.eval()
        total, count, size = 0.0, 0, self.options.batch_size
        for i in range(0, len(self.val_rows[0]), size)[:batches]:
            starts, lengths = (column[i : i + size] for column in self.val_rows)
            with self.autocast:
                loss = model(*batch(self.val_tokens, starts, lengths, self.config.block_size, self.device))[1]
            total, count = total + loss * int(lengths.sum()), count + int(lengths.sum())
        model.train()
        if not self.meta["val_nats"]:
            return float(total) / count, None
        nats = np.cumsum([0.0, *self.meta["val_nats"]])  # up to each end of a story
        return float(total) / count, float(np.interp(count, self.val_ends, nats)) / count

    def over(self, val_loss, floor):
        """Excess over the floor; of text without one, bits per byte, which do not depend on the tokenizer."""
        meta = self.meta
        return val_loss - floor if floor else val_loss * meta["val_tokens"] / meta["val_bytes"] / math.log(2)

    def check(self, losses, step):
        """Raise FloatingPointError if one of the losses before this step is not finite."""
        for i, loss in enumerate(losses, start=step - len(losses)):
            if not math.isfinite(loss):
                best = self.out / "ckpt.pt"
                kept = f"the best model so far is in {best}" if best.exists() else "there was no model to keep yet"
                raise FloatingPointError(f"step {i}: loss is {loss}; {kept}; try a lower --lr than {self.options.lr}")

    def save(self, step, losses=(), val_loss=None, floor=None):
        """Write last.pt; and if val_loss is given and the best so far, ckpt.pt."""
        facts = dict(step=step, val_loss=val_loss, floor=floor, meta=self.facts, made_by=self.made_by, format=FORMAT)
        checkpoint = {"model": self.model.state_dict(), "config": asdict(self.config), "options": vars(self.options)}
        if val_loss is not None and val_loss < self.best:
            self.best = val_loss
            write(self.out / "ckpt.pt", checkpoint | facts)
        state = dict(best=self.best, losses=list(losses), scaler=self.scaler.state_dict())
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        write(self.out / "last.pt", checkpoint | facts | state)

    def start_clock(self, step):
        if self.losses:
            self.losses[-1].item()  # waits for the device
        self.clock, self.clocked = time.perf_counter(), step

    def report(self, step):
        """Every eval_interval, and at the end: evaluate, print a line, log it, save. At times, snap the spectrum."""
        o = self.options
        if step in {round(o.steps * (i / 20) ** 2) for i in range(21)}:  # dense at the start, where spectra change most
            with open(self.out / "spectrum.jsonl", "a") as file:
                file.write(snapshot(self.model, step) + "\n")
        if step % o.eval_interval and step != o.steps:
            return
        losses = [float(loss) for loss in self.losses]  # waits for the device
        self.check(losses, step)
        rate = (step - self.clocked) * self.tokens_per_step / (time.perf_counter() - self.clock) or None
        mfu = rate and utilisation(self.model, rate / self.processes, self.device, o.dtype)
        left = rate and f"{(o.steps - step) * self.tokens_per_step / rate / 60:.1f} min"
        val_loss, floor = self.evaluate(self.model, o.eval_steps)
        self.check([val_loss], step + 1)
        loss, over = sum(losses) / len(losses) if losses else None, self.over(val_loss, floor)
        row = zip((loss, val_loss, over, rate, mfu, left), (".4f", ".4f", ".4f", ",.0f", ".0%", ""), strict=True)
        tqdm.write(f"{step:7}" + "".join(("-" if x is None else format(x, style)).rjust(10) for x, style in row))
        entry = {"step": step, "tokens": step * self.tokens_per_step, "loss": loss, "val_loss": val_loss}
        entry |= {"excess": over if floor else None, "bits_per_byte": None if floor else over}
        entry |= {"gradient_norm": self.norm and float(self.norm), "tokens_per_second": rate}
        with open(self.out / "log.jsonl", "a") as log:
            log.write(json.dumps(entry) + "\n")
        self.losses = []
        self.save(step, val_loss=val_loss, floor=floor)
        self.start_clock(step)

    def train(self):
        """All steps, with a report every eval_interval. Ctrl-C and SIGTERM stop after the step that they meet.

        Returns the exit status: None if done, 130 if stopped."""
        o, stop = self.options, []
        if self.leader:
            (shorten_logs(self.out, self.first) if o.resume else make_folder(self.out))
            size = f"{sum(p.numel() for p in self.model.parameters()):,} parameters"
            print(f"{self.config.attn}, {size}; {self.device}, {o.dtype}; {self.tokens_per_step:,} tokens a step")
            over = "excess" if self.meta["val_nats"] else "bits/byte"
            print("   step" + "".join(word.rjust(10) for word in ("loss", "val loss", over, "tokens/s", "MFU", "left")))
        handlers = {s: signal.signal(s, lambda s, _: stop.append(s)) for s in (signal.SIGINT, signal.SIGTERM)}
        # disable=None: only on terminals
        bar = tqdm(total=o.steps, initial=self.first, unit=" steps", leave=False, disable=None if self.leader else True)
        self.start_clock(self.first)
        try:
            for step in range(self.first, o.steps + 1):
                if self.leader and not (o.resume and step == self.first):  # that was saved after its report
                    self.report(step)
                if agree(bool(stop)) or step == o.steps:
                    break
                self.step(step)
                bar.update()
                if step == self.first:  # the first step compiles
                    self.start_clock(step + 1)
        finally:
            bar.close()
            for s, handler in handlers.items():
                signal.signal(s, handler)
        if not self.leader:
            return 130 if step < o.steps else None
        if step < o.steps:
            losses = [float(loss) for loss in self.losses]
            self.check(losses, step)
            self.save(step, losses)
            print(f"stopped after {step} of {o.steps} steps; go on: python train.py --resume --out={self.out}")
        draw(self.out, self.meta["floor"])
        if step < o.steps:
            return 130
        self.finish()

    def finish(self):
        """Last words: the best model on all of the validation data, its cache, a story, and what to try next."""
        path, config = self.out / "ckpt.pt", self.config
        model, checkpoint = load_checkpoint(path, self.device)
        loss, floor = self.evaluate(model)
        write(path, checkpoint | {"val_loss": loss, "floor": floor})
        print(f"\nval loss {loss:.4f} nats per token on all {self.meta['val_stories']:,} validation stories")
        if floor:
            print(f"excess   {loss - floor:.4f} over the {floor:.4f} that the stories hold; a perfect model has 0")
            self.report_recall(model.eval())
        else:
            print(f"         {self.bits_per_byte(loss):.4f} bits per byte of text")
        cached = model.kv_bytes_per_token(torch.bfloat16)
        of_mha = config.n_layer * 2 * config.n_embd * torch.bfloat16.itemsize
        change = cached / of_mha - 1
        compared = f"{abs(change):.0%} {'less' if change < 0 else 'more'} than" if change else "as many as"
        print(f"KV cache {cached:,} bytes per token in bfloat16, {compared} the {of_mha:,} of mha")
        print(f"\n{wrap(tell(model, self.tokenizer, 'Once upon a time'))}\n")
        other = "mla_decoupled" if config.attn != "mla_decoupled" else "mha_rope"
        print(f'next: python model.py {path} --prompt="One sunny day" --seed=1')
        print(f"      python spectrum.py {path}")
        print(f"      python train.py --attn={other} --out={self.out}/{other}")

    def report_recall(self, model, stories=300):
        """How much of the excess is forgetting, and the words that are recalled, on some of the validation stories."""
        try:
            words, found = recall(model, (self.meta, self.train_tokens, self.val_tokens), stories)
        except InputError as error:  # the stories are of an older world
            print(f"recall   is not known: {error}")
            return
        if found["recall"] is None:
            print("recall   is not known: no story fits into the context")
            return
        count, lost = len(np.unique(words["story"])), found["lost"]  # stories that fit into the context
        print(f"         in {count} stories {lost:.4f} is lost at words that the story decides, ", end="")
        print(f"{found['excess'] - lost:.4f} elsewhere")
        print(
            "recall   {recall:.1%} where a story asks for something; guessing has {chance:.1%}, ".format(**found),
            end="",
        )
        print(f"copying such words {found['copying']:.1%}")


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
