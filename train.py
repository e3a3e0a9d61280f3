"""Train a GPT with any of the seven attention variants, from scratch or from a checkpoint, converted if need be.

Runs on a CPU, a Mac, a GPU, or several GPUs under torchrun. Writes to --out: ckpt.pt (the best model so far), last.pt
(for --resume), log.jsonl, train.png, and spectrum.jsonl (snapshots of the spectrum of W_Q W_K^T). The batches
and dropout of a step depend only on its number, the seed, and the number of processes, so a resumed run ends like an
uninterrupted one.
"""

import itertools
import json
import math
import os
import shutil
import signal
import time
from argparse import SUPPRESS, BooleanOptionalAction, Namespace
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from subprocess import getoutput

import numpy as np
import torch
import torch.distributed as dist

from data.common import DATA, InputError, Parser, check_device, fast_bfloat16, load_data, load_tokenizer, run, wrap
from data.judge import recall
from data.prepare import prepare
from model import ATTN, FORMAT, GPT, LEARNED, SIZES, GPTConfig, load_checkpoint, tell
from spectrum import second_moments, snapshot

BUDGETS = {  # a training budget for each size. Only tiny has been run
    "tiny": dict(batch_size=8, grad_accum=2, steps=1400, lr=dict(muon=12e-3, adamw=4e-3)),
    "30m": dict(batch_size=16, grad_accum=4, steps=5000, lr=dict(muon=4e-3, adamw=1e-3)),
    "124m": dict(batch_size=16, grad_accum=4, steps=10000, lr=dict(muon=3e-3, adamw=6e-4)),
    "200m": dict(batch_size=16, grad_accum=4, steps=10000, lr=dict(muon=2e-3, adamw=5e-4)),
}
FLAGS = {  # name: type, choices or action; default; help. None: no value, or one that resolve() fills in
    "attn": (ATTN, "mha_rope", "attention variant"),
    "rank": (float, None, "latent width / n_embd; for gqa, key heads / n_head (default: 0.5 where it applies)"),
    "joint": (BooleanOptionalAction, False, "one latent for keys and values (mla, mla_rope, mla_decoupled)"),
    "latent_norm": (BooleanOptionalAction, False, "an RMSNorm on each latent (mla variants)"),
    "q_rank": (float, None, "width of the query latent / n_embd (mla variants; default: no query latent)"),
    "rope_dim": (int, None, "width of mla_decoupled's rotary key (default: half a head)"),
    "rope_base": (float, 10000.0, "base of the RoPE frequencies"),
    "size": (tuple(SIZES), None, "model shape and training budget (default: tiny on a CPU, 30m elsewhere)"),
    "n_layer": (int, None, "layers (default: by size)"),
    "n_head": (int, None, "heads (default: by size)"),
    "n_embd": (int, None, "width (default: by size)"),
    "block_size": (int, None, "context length in tokens (default: by size)"),
    "dropout": (float, 0.0, "dropout probability"),
    "data": (str, "stories", "data made by data/prepare.py: its name in data/, or a path"),
    "out": (str, "out", "folder for checkpoints and logs"),
    "init_from": (str, None, "start from a checkpoint, converted if --attn, --rank or --joint differ (default: none)"),
    "resume": (BooleanOptionalAction, False, "continue the run in --out where it stopped"),
    "steps": (int, None, "optimizer steps; 0 only evaluates and saves (default: by size)"),
    "batch_size": (int, None, "sequences per batch, summed over processes (default: by size)"),
    "grad_accum": (int, None, "batches per step (default: by size)"),
    "optimizer": (("muon", "adamw"), "muon", "muon: Muon inside blocks, AdamW elsewhere; adamw: AdamW everywhere"),
    "lr": (float, None, "peak learning rate (default: by size and optimizer)"),
    "warmup": (float, 0.02, "fraction of the steps to warm up for; then the rate falls linearly to zero"),
    "weight_decay": (float, 0.0, "weight decay on matrices"),
    "grad_clip": (float, 1.0, "maximum norm of the gradient"),
    "eval_interval": (int, None, "steps between evaluations (default: steps / 20)"),
    "eval_steps": (int, 8, "batches per evaluation; the one after training uses all validation data"),
    "seed": (int, 0, "seed of weights, batches and dropout"),
    "device": (str, None, "cpu, mps, cuda, cuda:1, ... (default: cuda if there is one, else mps, else cpu)"),
    "dtype": (("bfloat16", "float16", "float32"), None, "precision of matrix products (default: 16 bits where fast)"),
    "compile": (BooleanOptionalAction, None, "torch.compile the model (default: on cuda, if there is a C compiler)"),
}
MINIMUM = dict(batch_size=1, grad_accum=1, eval_interval=1, eval_steps=1, block_size=16, grad_clip=1e-9)
MINIMUM |= dict(steps=0, lr=0, warmup=0, weight_decay=0, seed=0)
CONVERTS = {"mha": "mla", "mha_rope": "mla_rope", "gqa": "mla_rope", "mla": "mla", "mla_rope": "mla_rope"}
REVISION = f'git -C "{Path(__file__).parent}" describe --always --dirty --abbrev=40 --exclude="*" 2>/dev/null'
PEAK_TFLOPS = {"H100": (989, 495), "H200": (989, 495), "A100": (312, 156), "L40S": (362, 183), "T4": (65, 8)}


def parse_arguments(arguments=None):
    """The flags that were given, and only those: {name: value}."""
    example = "example: python train.py --attn=mla_decoupled --rank=0.25 --out=out/quarter"
    parser = Parser(usage="train.py [FLAGS]", description=__doc__, epilog=example, argument_default=SUPPRESS)
    for name, (kind, default, text) in FLAGS.items():
        how = "choices" if isinstance(kind, tuple) else "action" if kind is BooleanOptionalAction else "type"
        text += "" if default is None else f" (default: {default})"
        parser.add_argument(f"--{name}", help=text, **{how: kind})
    return vars(parser.parse_args(arguments))


def resolve(given):
    """Fill in what was not given -> all options, the GPTConfig (its vocab_size comes with the data), and the checkpoint
    to start from or None. Raises InputError for a flag out of range, or at odds with another or with the checkpoint."""
    start, saved, changeable = None, {}, {"attn", "rank", "joint"}
    if given.get("resume"):
        start = load_checkpoint(Path(given.get("out", "out")) / "last.pt")[1]
        if "lines" not in start:
            raise InputError("--resume: last.pt is of an older version or holds no run; use --init_from")
        saved, changeable = start["options"] | {"out": "out"}, {"resume", "out", "data", "device", "compile"}
    elif given.get("init_from"):
        start = load_checkpoint(given["init_from"])[1]
        saved = {name: start["options"][name] for name in FLAGS.keys() & {"size", *start["config"]} - {"dropout"}}
        changeable |= set() if saved["attn"] in LEARNED else {"block_size"}
    for name in (given.keys() & saved.keys()) - changeable:
        if given[name] != saved[name]:
            raise InputError(f"--{name}={given[name]}: the checkpoint has {saved[name]}; leave that flag out")
    new = saved | given
    if start and any(new[name] != saved[name] for name in ("attn", "rank", "joint")):
        known = "mha to mla; mha_rope, gqa to mla_rope; mla, mla_rope to a lower rank or joint; none with latent_norm"
        max_rank = (saved["rank"] or 1) * (2 if new["joint"] and not saved["joint"] else 1)
        if new["attn"] != CONVERTS.get(saved["attn"]) or (new["rank"] or 0) > max_rank or saved["latent_norm"]:
            raise InputError(f"--init_from: no such conversion from {saved['attn']}. Possible: {known}")

    best_device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = new.get("device", best_device)
    kind = device.split(":")[0]
    size = new.get("size", "tiny" if kind == "cpu" else "30m")
    o = Namespace(**{name: default for name, (_, default, _) in FLAGS.items()} | SIZES[size] | BUDGETS[size] | new)
    o.device, o.size, o.lr = device, size, new.get("lr", BUDGETS[size]["lr"][o.optimizer])
    o.eval_interval = new.get("eval_interval", max(1, o.steps // 20))
    o.dtype = o.dtype or ("bfloat16" if fast_bfloat16(device) else "float16" if kind == "cuda" else "float32")
    o.compile = new.get("compile", kind == "cuda" and any(map(shutil.which, ("gcc", "clang"))))
    for name, least in MINIMUM.items():
        most = 1 if name == "warmup" else 2**32 - 1
        if not least <= getattr(o, name) <= most:
            raise InputError(f"--{name}={getattr(o, name)}: must be from {least} to {most}")
    config = GPTConfig(**{name: value for name, value in vars(o).items() if name in GPTConfig.__dataclass_fields__})
    o.rank, o.rope_dim = config.rank, config.rope_dim  # their defaults depend on the variant
    return o, config, start


def set_up_device(o):
    """Join torchrun's processes, if any -> this process's device (cuda with an index), its rank, how many there are."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if o.batch_size % processes or (processes > 1 and ":" in o.device):
        raise InputError(f"{processes} processes need a --batch_size that they divide, and a --device without an index")
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if o.device == "cuda" else o.device
    check_device(device)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    if processes > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    return device, int(os.environ.get("RANK", 0)), processes


def all_reduce(tensor):
    """Sum a tensor over all processes, in place. One on the CPU waits for the processes, but not for their GPUs."""
    try:
        if dist.is_initialized():
            dist.all_reduce(tensor)
    except RuntimeError as error:
        raise OSError("another process failed, see its message") from error
    return tensor


def story_rows(tokens, end, length):
    """Split tokens into rows of at most `length` targets: one for each story, or several if the story is longer.
    -> the rows' starts and lengths (int64). A row starts with the <|endoftext|> before its story."""
    ends = np.flatnonzero(tokens == end)
    starts = np.concatenate([np.arange(*story, length) for story in itertools.pairwise(ends)])
    return starts, np.diff(starts, append=ends[-1])


def batch(tokens, starts, lengths, device):
    """Rows of tokens, by starts and lengths (or one length) -> idx, targets (B, longest) int64, -1 past a row's end."""
    offsets, lengths = np.arange(np.max(lengths) + 1), np.reshape(lengths, (-1, 1))
    rows = tokens[np.minimum(starts[:, None] + offsets, len(tokens) - 1)].astype(np.int64)
    pair = torch.from_numpy(np.stack((rows[:, :-1], np.where(offsets[:-1] < lengths, rows[:, 1:], -1))))
    on_gpu = device.startswith("cuda")  # from pinned memory, copying overlaps with computing
    return (pair.pin_memory() if on_gpu else pair).to(device, non_blocking=on_gpu)


def compress(w, moment, rank):
    """W (d, n) -> W_D (d, rank), W_U (rank, n) that minimize E|x W - x W_D W_U|^2, where moment = E[x x^T].

    They project x W onto its principal directions: the eigenvectors V of E[(x W)^T x W], so W_D = W V, W_U = V^T. The
    plain SVD of W would minimize |W - W_D W_U|^2, as if x had the same variance in all directions."""
    directions = torch.linalg.eigh(w.mT @ moment @ w).eigenvectors[:, -rank:]  # eigenvalues ascend
    return w @ directions, directions.mT


def convert(model, config, moments):
    """Convert `model` to the mla or mla_rope of `config`, as closely as the rank allows.

    moments: second_moments of `model` on training rows. gqa becomes an mla_rope of the same rank and cache, exactly:
    the latents hold its key and value heads, and W_UK and W_UV copy them to all query heads. MLA contains GQA."""
    new, weights = GPT(config).to(model.token_embedding.weight), dict(model.state_dict())
    for layer, moment in enumerate(moments):
        old = {name.split(".")[0]: w.cpu().double() for name, w in model.blocks[layer].attn.state_dict().items()}
        if "w_dk" in old:
            w_k, w_v = (old["w_uk"] @ old["w_dk"]).mT, (old["w_uv"] @ old.get("w_dv", old["w_dk"])).mT
        else:  # each head has a copy of its group's keys and values
            heads = (old[name].unflatten(0, (-1, config.head_dim)) for name in ("w_k", "w_v"))
            w_k, w_v = (w.repeat_interleave(config.n_head // len(w), 0).flatten(0, 1).mT for w in heads)
        latents = [torch.cat((w_k, w_v), 1)] if config.joint else [w_k, w_v]
        down, up = zip(*(compress(w, moment, config.latent_dim) for w in latents), strict=True)
        w_uk, w_uv = torch.cat(up, 1).split(config.n_embd, 1)
        found = dict(w_dk=down[0], w_dv=down[-1], w_uk=w_uk, w_uv=w_uv)
        weights |= {f"blocks.{layer}.attn.{name}.weight": w.mT for name, w in found.items()}
    new.load_state_dict({name: weights[name] for name in new.state_dict()})
    return new


def make_optimizers(model, o):
    """Muon, which makes its updates orthogonal, for the matrices inside blocks; AdamW for embeddings and the gains of
    norms. match_rms_adamw scales Muon's updates to the size of AdamW's, so that both can share one lr."""
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    embeddings = [p for name, p in model.named_parameters() if "embedding" in name]
    gains = [p for p in model.parameters() if p.dim() == 1]
    options = dict(weight_decay=o.weight_decay, momentum=0.8, adjust_lr_fn="match_rms_adamw")
    muon = [torch.optim.Muon(matrices, **options)] if o.optimizer == "muon" else []
    groups = [{"params": embeddings if muon else embeddings + matrices}, {"params": gains, "weight_decay": 0.0}]
    return [*muon, torch.optim.AdamW(groups, weight_decay=o.weight_decay, betas=(0.9, 0.99), fused=True)]


def learning_rate(step, o):
    """A linear rise to lr, then a linear fall to zero."""
    rise = round(o.warmup * o.steps)
    return o.lr * min((step + 1) / max(1, rise), (o.steps - step) / max(1, o.steps - rise))


def utilization(tokens_per_second, model, device, dtype):
    """MFU: the share of a GPU's peak FLOP/s; None if the peak is unknown. A token costs 6 FLOPs per weight, and
    12 n_layer n_embd per token it attends to (Chowdhery et al. 2022, appendix B); causally that is half the context."""
    words = torch.cuda.get_device_name(device).replace("-", " ").split() if device.startswith("cuda") else []
    peak = next((peaks[dtype == "float32"] * 1e12 for gpu, peaks in PEAK_TFLOPS.items() if gpu in words), None)
    c, weights = model.config, sum(p.numel() for p in model.parameters())
    return peak and tokens_per_second * 6 * (weights + c.n_layer * c.n_embd * c.block_size) / peak


def write(path, content):
    """Write a checkpoint or text to a temporary file, then rename it: a crash leaves the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(content) if isinstance(content, str) else torch.save(content, temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError if a write fails
        raise OSError(f"{path}: cannot be written ({error}); the previous file is intact") from error
    finally:
        temporary.unlink(missing_ok=True)


def new_folder(out):
    """Make the folder of a new run. Move files of an older run to out/previous-1, -2, ..."""
    out.mkdir(parents=True, exist_ok=True)
    previous = next(path for i in itertools.count(1) if not (path := out / f"previous-{i}").exists())
    for name in ("ckpt.pt", "last.pt", "log.jsonl", "spectrum.jsonl", "train.png"):
        if (out / name).exists():
            os.renames(out / name, previous / name)


def draw(log, path):
    """Plot loss and val loss against tokens, and the floor, which is a perfect model's loss."""
    from matplotlib.figure import Figure  # here, because it takes a second to import

    axes = Figure(figsize=(8, 5), layout="constrained").subplots()
    for name, label in (("loss", "training, mean since the last point"), ("val_loss", "validation")):
        axes.plot([e["tokens"] / 1e6 for e in log], [e[name] or math.nan for e in log], "o-", ms=3, label=label)
    if "excess" in log[0]:
        floor = log[0]["val_loss"] - log[0]["excess"]
        axes.axhline(floor, color="k", linewidth=1, label=f"floor, {floor:.3f}")
    axes.set(xlabel="million tokens", ylabel="loss, nats per token", yscale="log")
    axes.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    axes.figure.savefig(path, dpi=130)


class Run:
    """A training run: data, model and optimizers, as the flags describe them."""

    def __init__(self, given):
        self.options, self.config, start = resolve(given)  # wrong flags fail here, before data is made
        o, config, size, self.out = self.options, self.config, self.config.block_size, Path(self.options.out)
        self.made_by = dict(revision=getoutput(REVISION), torch=str(torch.__version__))  # at the start: code may change
        self.device, self.process, self.processes = set_up_device(o)
        self.leader = self.process == 0  # only this process reports and writes
        if self.leader and o.data == "stories" and not (DATA / "stories").exists():
            prepare()
        all_reduce(torch.zeros(1))  # a barrier: wait until the data is there
        self.meta, self.train_tokens, self.val_tokens = load_data(o.data)
        self.val_nats = self.meta.pop("val_nats")  # not for checkpoints: a number for each story
        if o.resume and start["meta"] != self.meta:
            raise InputError(f"--resume: --data={o.data} is not what the run was trained on")
        metas = [start["meta"], self.meta] if start else [self.meta]
        self.tokenizer = tokenizer = load_tokenizer(metas[0]["tokenizer"])
        config.vocab_size, end = tokenizer.n_vocab, self.meta["end"]
        if any((meta["tokenizer"], meta["vocab_size"]) != (tokenizer.name, tokenizer.n_vocab) for meta in metas):
            needed = f"the tokenizer of {o.init_from or 'this version'}, {tokenizer.name}"
            raise InputError(f"--data={o.data}: needs {needed}; make it again with data/prepare.py")
        self.starts, _ = story_rows(self.train_tokens, end, size)
        self.starts = self.starts[self.starts + size < len(self.train_tokens)]  # where a whole row fits
        if not len(self.starts):
            raise InputError(f"--block_size={size}: the training data has only {len(self.train_tokens) - 1} tokens")
        self.val_rows, self.val_ends = story_rows(self.val_tokens, end, size), np.flatnonzero(self.val_tokens == end)
        self.to_bits_per_byte = self.meta["val_tokens"] / self.meta["val_bytes"] / math.log(2)  # from nats per token

        torch.manual_seed(o.seed)
        kind = self.device.split(":")[0]
        self.autocast = lambda: torch.autocast(kind, getattr(torch, o.dtype), enabled=o.dtype != "float32")
        self.scaler = torch.amp.GradScaler(kind, enabled=o.dtype == "float16")
        self.model = GPT(config).to(self.device)
        if start and GPTConfig(**start["config"]).cache_shapes == config.cache_shapes:
            self.model.load_state_dict(start["model"])
        elif start:
            source = load_checkpoint(o.init_from, self.device)[0]
            rows = np.random.default_rng(o.seed).choice(self.starts, 64)
            idx, _ = batch(self.train_tokens, rows, min(size, source.config.block_size), self.device)
            self.model = convert(source, config, second_moments(source, idx))
        self.optimizers = make_optimizers(self.model, o)
        state = start if o.resume else dict(step=0, best=math.inf, losses=[], lines={"log": [], "spectrum": []})
        self.first_step, self.best_val_loss, self.lines = state["step"], state["best"], state["lines"]
        self.losses, self.norm = list(torch.tensor(state["losses"], device=self.device)), None
        if o.resume:
            self.scaler.load_state_dict(start["scaler"])
            for optimizer, saved in zip(self.optimizers, start["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        self.compiled = torch.compile(self.model, disable=not o.compile)
        # On a CPU, running both batches of a step in parallel, each on half the cores, is 9 to 16% faster. Gradients
        # add up to the same sum in either order. Not with dropout: the order of its random numbers would vary
        threads, self.map = torch.get_num_threads() // 2, map
        if threads and kind == "cpu" and o.grad_accum == 2 and not (o.dropout or o.compile or self.processes > 1):
            self.map = ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(threads,)).map

    def backward(self, starts):
        """Backpropagate this process's rows of a batch -> their share of the step's loss. They may span stories."""
        idx, targets = batch(self.train_tokens, starts, self.config.block_size, self.device)
        with self.autocast():
            loss = self.compiled(idx, targets)[1] / (self.options.grad_accum * self.processes)
        self.scaler.scale(loss).backward()
        return loss.detach()

    def step(self, step):
        """Forward, backward and update on the batches of this step. Does not wait for the device, except in float16."""
        o = self.options
        self.model.train()
        torch.manual_seed(o.seed + step * self.processes + self.process)  # dropout
        starts = np.random.default_rng((o.seed, step)).choice(self.starts, (o.grad_accum, o.batch_size))
        self.losses.append(sum(self.map(self.backward, starts[:, self.process :: self.processes])))
        for share in (self.losses[-1], *(p.grad for p in self.model.parameters())):
            all_reduce(share)  # data parallelism; DistributedDataParallel would hide some of it behind the last batch
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, o)
        self.norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), o.grad_clip)
        for optimizer in self.optimizers:
            # scaler.step would skip only the optimizer whose gradients overflowed; both must skip
            if o.dtype != "float16" or self.norm.isfinite():
                optimizer.step()
            optimizer.zero_grad()
        self.scaler.update()

    @torch.no_grad()
    def evaluate(self, model, batches=None):
        """Return the validation loss in nats per token, and the floor: a perfect model's loss on the same tokens, or
        None if unknown. batches=None uses all data."""
        model.eval()
        total, count, size = 0.0, 0, self.options.batch_size // self.processes  # rows per process
        for i in range(0, len(self.val_rows[0]), size)[: batches and batches * self.processes]:  # all on the leader
            starts, lengths = (column[i : i + size] for column in self.val_rows)
            with self.autocast():
                loss = model(*batch(self.val_tokens, starts, lengths, self.device))[1]
            total, count = total + loss * int(lengths.sum()), count + int(lengths.sum())
        nats = np.cumsum([0.0, *(self.val_nats or [])])  # information up to the end of each story
        floor = float(np.interp(count, self.val_ends, nats)) / count if self.val_nats else None
        return float(total) / count, floor

    def save(self, step, val_loss=None, floor=None):
        """Write last.pt and the logs, and ckpt.pt if val_loss is the best so far."""
        # If training was stopped, there is no loss, but any weight that is not finite shows in their sum
        value = float(sum(p.detach().sum() for p in self.model.parameters())) if val_loss is None else val_loss
        if not math.isfinite(value):
            raise FloatingPointError(f"by step {step} the loss is {value}; lower --lr. Older checkpoints: {self.out}")
        checkpoint = dict(format=FORMAT, made_by=self.made_by, config=asdict(self.config), options=vars(self.options))
        checkpoint |= dict(meta=self.meta, model=self.model.state_dict(), step=step, val_loss=val_loss, floor=floor)
        if val_loss is not None and val_loss < self.best_val_loss:
            self.best_val_loss = val_loss
            write(self.out / "ckpt.pt", checkpoint)
        state = dict(best=self.best_val_loss, losses=[float(loss) for loss in self.losses], lines=self.lines)
        state |= dict(optimizers=[x.state_dict() for x in self.optimizers], scaler=self.scaler.state_dict())
        write(self.out / "last.pt", checkpoint | state)
        self.write_logs()

    def write_logs(self):
        for name, lines in self.lines.items():
            write(self.out / f"{name}.jsonl", "".join(line + "\n" for line in lines))

    def report(self, step):
        """Evaluate, log, save, and print a line."""
        o, tokens = self.options, self.options.batch_size * self.options.grad_accum * self.config.block_size
        loss = sum(map(float, self.losses)) / len(self.losses) if self.losses else None  # waits for the device
        seconds, steps_timed = time.perf_counter() - self.clock[0], step - self.clock[1]
        rate = steps_timed * tokens / seconds if steps_timed else None
        mfu = rate and utilization(rate / self.processes, self.model, self.device, o.dtype)
        left = rate and (o.steps - step) * tokens / rate / 60
        val_loss, floor = self.evaluate(self.model, o.eval_steps)
        over = val_loss - floor if floor else val_loss * self.to_bits_per_byte
        entry = dict(step=step, tokens=step * tokens, loss=loss, val_loss=val_loss, tokens_per_second=rate)
        entry["excess" if floor else "bits_per_byte"] = over
        entry["gradient_norm"] = None if self.norm is None else float(self.norm)
        self.lines["log"].append(json.dumps(entry))
        self.losses = []
        self.save(step, val_loss, floor)
        cells = (loss, ".4f"), (val_loss, ".4f"), (over, ".4f"), (rate, ",.0f"), (mfu, ".0%"), (left, ".1f")
        print(f"{step:6}", *(f"{'-' if x is None else format(x, style):>9}" for x, style in cells), flush=True)
        self.clock = time.perf_counter(), step

    def train(self):
        """Take all steps. Ctrl-C and SIGTERM stop after the current one. -> status: None if done, 130 if stopped."""
        o, stop, self.clock = self.options, [], (time.perf_counter(), self.first_step)
        if self.leader:
            self.write_logs() if o.resume else new_folder(self.out)
            print(f"{o.attn}, {sum(p.numel() for p in self.model.parameters()):,} parameters; {self.device}, {o.dtype}")
            over = "excess" if self.val_nats else "bits/byte"
            print(f"  step      loss  val loss {over:>9}  tokens/s       MFU  min left")
        recipe = {name: value for name, value in vars(o).items() if name not in ("out", "resume", "device", "compile")}
        handlers = {s: signal.signal(s, lambda s, _: stop.append(s)) for s in (signal.SIGINT, signal.SIGTERM)}
        snapshots = {round(o.steps * (i / 20) ** 2) for i in range(21)}  # dense at the start, where spectra change most
        for step in range(self.first_step, o.steps + 1):
            if self.leader and not (o.resume and step == self.first_step):  # that step was reported before it was saved
                if step in snapshots:
                    self.lines["spectrum"].append(snapshot(self.model, step, recipe))
                if step % o.eval_interval == 0 or step == o.steps:
                    self.report(step)
            if all_reduce(torch.tensor(len(stop))) or step == o.steps:
                break
            self.step(step)
            if step == self.first_step:  # the first step compiles: do not time it
                float(self.losses[-1])
                self.clock = time.perf_counter(), step + 1
        if self.leader:
            if step < o.steps:
                self.save(step)
                print(f"stopped after {step} of {o.steps} steps. Continue: python train.py --resume --out={self.out}")
            draw([json.loads(line) for line in self.lines["log"]], self.out / "train.png")
        all_reduce(torch.zeros(1))  # a barrier: once one process exits with an error, torchrun kills the others
        if dist.is_initialized():
            dist.destroy_process_group()
        for s, handler in handlers.items():  # only now: a second Ctrl-C must not interrupt saving
            signal.signal(s, handler)
        if self.leader and step == o.steps:
            self.finish()
        return 130 if step < o.steps else None

    def finish(self):
        """Print the best model's loss on all validation data, its recall, its cache, a story, and what to try next."""
        path, o = self.out / "ckpt.pt", self.options
        model, checkpoint = load_checkpoint(path, self.device)
        loss, floor = self.evaluate(model)
        write(path, checkpoint | {"val_loss": loss, "floor": floor})
        on = f"on all {self.meta['val_stories']:,} validation stories, after {checkpoint['step']} steps"
        print(f"\nval loss {loss:.4f} nats per token {on}")
        if not floor:
            print(f"         {loss * self.to_bits_per_byte:.4f} bits per byte of text")
        else:
            print(f"excess   {loss - floor:.4f} above the floor of {floor:.4f}, the loss of a perfect model")
            try:
                found = recall(model, (self.meta, self.train_tokens, self.val_tokens))[1]
                print("         {lost:.4f} of it at words that the story has already determined".format(**found))
                print("recall   {recall:.1%}, the mean probability of the words that a story asks for".format(**found))
                print("         {chance:.1%} by guessing, {copying:.1%} by copying any such word".format(**found))
            except InputError as error:  # stories of another version of the world, or longer than the context
                print(f"recall   unknown: {error}")
        cached, of_mha = model.kv_bytes_per_token(torch.bfloat16), o.n_layer * 2 * o.n_embd * 2
        print(f"KV cache {cached:,} bytes per token in bfloat16, {cached / of_mha:.0%} of mha's {of_mha:,}")
        print(f"\n{wrap(tell(model, self.tokenizer, 'Once upon a time'))}\n")
        other = "mla_decoupled" if o.attn != "mla_decoupled" else "mha_rope"
        print(f'next: python model.py {path} --prompt="One sunny day" --seed=1')
        print(f"      python train.py --attn={other} --data={o.data} --out={self.out}/{other}")


def main():
    if status := Run(parse_arguments()).train():
        raise SystemExit(status)


if __name__ == "__main__":
    run(main)
