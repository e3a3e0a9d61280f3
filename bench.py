"""What attention costs: bytes of KV cache, decoded tokens per second, and how close that is to the machine's limit.

    python bench.py                                      every variant, freshly initialised, in the 30m shape
    python bench.py out/ckpt.pt out/joint/ckpt.pt        trained models: their loss beside their cost
    python bench.py --attn mha mla_decoupled --batch 1 8 64 --context 512 8192
    python bench.py --train                              the speed of train.py as well

A decode step reads all weights and the whole cache once, and multiplies with them. The roofline is the time that this
takes at the machine's full speed, measured in the same run, whichever of the two is slower. "expanded" makes keys and
values from all cached latents at every step; "absorbed" attends to the latents themselves (mla_rope cannot). Tokens per
second are summed over the batch.
"""

import ctypes
import json
import math
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data.common import InputError, Parser, check_device, fast_bfloat16, load_data, load_tokenizer, run
from data.judge import judge, mean_and_error, recall
from model import ABSORBS, ATTN, GPT, MLA, SIZES, GPTConfig, load_checkpoint

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
COLOURS = dict(zip(ATTN, ("k", "#999999", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00"), strict=True))
VARIANTS = (  # attn, rank, joint
    *(("mha", None, False), ("mha_rope", None, False)),
    *(("gqa", rank, False) for rank in (1 / 2, 1 / 4, 1 / 8)),
    *(("mla", 1.0, False), ("mla", 1 / 2, False), ("mla", 1 / 2, True)),
    *(("mla_rope", rank, False) for rank in (1.0, 1 / 2, 1 / 4, 1 / 8)),
    *(("mla_rope", 1 / 2, True), ("mla_prerope", 1.0, False), ("mla_prerope", 1 / 2, False)),
    *(("mla_decoupled", rank, joint) for joint in (False, True) for rank in (1.0, 1 / 2, 1 / 4, 1 / 8)),
)
COLUMNS = {  # key of a row: heading, format, meaning
    "parameters": ("params", "{:,.1f}M", "parameters in millions, without learned positions"),
    "kv_bytes": ("KV B/tok", "{:,.0f}", "bytes of cache per token, as allocated"),
    "cut": ("cut", "{:.0%}", "how much less that is than for mha"),
    "expanded": ("expanded", "{:,.0f}", "decoded tokens/s if keys and values are made from all latents at every step"),
    "absorbed": ("absorbed", "{:,.0f}", "decoded tokens/s if queries attend to latents"),
    "spread": ("spread", "±{:.0%}", "half the range over the rounds; this and later columns are of the faster way"),
    "to_mha": ("/ mha", "{:.2f}", "tokens/s over mha's"),
    "to_full": ("/ rank 1", "{:.2f}", "tokens/s over those of the same variant at rank 1"),
    "gb": ("GB/s", "{:.1f}", "weights and cache read"),
    "gflop": ("GFLOP/s", "{:,.0f}", "in matrix products"),
    "roofline": ("roofline", "{:.0%}", "share of the speed that the machine allows"),
    "limit": ("limit", "{}", "what that is set by: memory or arithmetic"),
    "memory": ("MB", "{:,.0f}", "memory in use at the peak of a step"),
    "overhead": ("over", "{:.0%}", "temporary memory as a share of weights and cache"),
    "train": ("train", "{:,.0f}", "with --train: tokens/s of train.py"),
    "runs": ("seeds", "{}", "runs that differ only in their seed: means ± standard errors"),
    "val_loss": ("val", "{:.4f}", "validation loss, nats per token"),
    "excess": ("excess", "{:.4f}", "the part of it above the floor"),
    "loss_to_mha": ("vs mha", "{:+.1%}", "validation loss against mha's"),
    "grammar": ("grammar", "{:.1f}", "with --judge: 0 to 10, of sampled stories; ± between stories for a single run"),
    "consistency": ("consist.", "{:.1f}", "the same for consistency"),
    "copied": ("copied", "{:.0%}", "longest run of words from a training story, over the length of the sampled story"),
    "recall": ("recall", "{:.1%}", "with --judge: words that an unseen story asks for, given two or more candidates"),
    "chance": ("chance", "{:.1%}", "recall by guessing among all words of the kind"),
    "copying": ("copying", "{:.1%}", "recall by guessing among those the story has used"),
    "lost": ("forgotten", "{:.4f}", "excess at words that the story determines"),
}
GROUP = ("device", "dtype", "batch", "context")  # one table for each


# The machine ----------------------------------------------------------------------------------------------------------


def seconds(function, device, repeats=3):
    """Time `repeats` calls after a warm-up. If the first call takes over half a second, return that one alone."""
    on_cuda, times = device.startswith("cuda"), []
    while len(times) < repeats + 3 * on_cuda + 1:  # torch.compile records a CUDA graph in the second call
        if on_cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1000)
        else:
            begin = time.perf_counter()
            function()
            if device.startswith("mps"):
                torch.mps.synchronize()
            times.append(time.perf_counter() - begin)
            if times[0] > 0.5:
                break
    return np.array(times[-repeats:])


def ceilings(device, dtype):
    """Bytes/s read from memory and FLOP/s of a matrix product, each the best of several tries."""
    numbers = torch.ones(2**27 if device == "cpu" else 2**30, device=device)
    size = 2048 if device == "cpu" else 8192
    a = torch.randn(size, size, device=device).to(dtype)
    bytes_per_s = numbers.nbytes / seconds(numbers.sum, device, 9).min()
    return {"bytes_per_s": bytes_per_s, "flop_per_s": 2 * size**3 / seconds(lambda: a @ a, device, 9).min()}


def in_proc(file, key):
    """The value of the first line in Linux' /proc/<file> with this key, or None."""
    try:
        lines = (line.partition(":") for line in Path("/proc", file).read_text().splitlines())
        return next((value.strip() for name, _, value in lines if name.strip() == key), None)
    except OSError:
        return None


def machine(device):
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    name = in_proc("cpuinfo", "model name") or platform.processor() or platform.machine()
    return f"{torch.get_num_threads()} threads on {name}, torch {torch.__version__}"


def temporary_bytes(step, device):
    """Peak memory of a step beyond what was in use before it; None if the system does not tell."""
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # otherwise the step could use freed memory that still counts as in use
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
    except (OSError, AttributeError):
        return None
    before = in_proc("self/status", "VmRSS")
    step()
    return 1024 * (int(in_proc("self/status", "VmHWM").split()[0]) - int(before.split()[0]))


# The cost of a variant ------------------------------------------------------------------------------------------------


def decode_cost(config, parameters, batch, context, itemsize, absorbed):
    """Bytes that a decode step reads and FLOPs that it takes, attending to `context` tokens, its own included.

    Weights and cache count once. Learned positions are not among the parameters: a step reads one of them."""
    d, h, H, L = config.n_embd, config.head_dim, config.n_head, config.n_layer
    r, R = config.latent_dim, config.rope_dim or 0
    expand = 0  # FLOPs per token and layer. The new token's own expansion counts with the parameters
    if config.attn not in MLA:
        attend = 2 * H * (h + h)
    elif not absorbed:
        attend, expand = 2 * H * (h + R + h), 2 * 2 * r * d
    else:
        attend = 2 * H * (r + R + r)
    cached = sum(map(math.prod, config.cache_shapes.values()))
    read = itemsize * (parameters + L * batch * context * cached)
    return read, 2 * parameters * batch + L * batch * (context * attend + (context - 1) * expand)


def rank_of(row):
    """A rank as text: 1/2, or 0.3."""
    return f"1/{round(1 / row['rank'])}" if (1 / row["rank"]).is_integer() else str(row["rank"])


def name_of(row):
    name = row["attn"] + (f" {rank_of(row)}" if row["rank"] else "") + (" joint" if row["joint"] else "")
    return name + (" norm" if row.get("latent_norm") else "") + (f" q={row['q_rank']:g}" if row.get("q_rank") else "")


def speed(row):
    """Decoded tokens/s, the faster of the two ways."""
    return max(row["expanded"], row.get("absorbed") or 0)


def alike(rows, row, names):
    """The rows that agree with `row` in the columns `names`."""
    return [r for r in rows if all(r.get(name) == row.get(name) for name in names)]


def check_memory(config, batch, context, dtype, device):
    """Raise InputError, before anything is allocated, if a model and its cache will not fit."""
    with torch.device("meta"):
        model = GPT(config)
    weights = sum(p.numel() for p in model.parameters()) * (4 + dtype.itemsize)  # they are made in float32
    cache = batch * context * model.kv_bytes_per_token(dtype)
    expanded = batch * context * config.n_embd * (2 * dtype.itemsize + 3 * 4)  # one layer's; RoPE computes in float32
    needed = 1.2 * (weights + cache + (expanded if config.attn in MLA else 0))
    if device.startswith("cuda"):
        free = torch.cuda.mem_get_info(device)[0]
    else:
        available = in_proc("meminfo", "MemAvailable")  # in kB
        free = int(available.split()[0]) * 1024 if available else math.inf
    if needed > free:
        what = f"{config.attn} needs {needed / 1e9:.1f} GB on {device}, but {free / 1e9:.1f} GB are free"
        raise InputError(f"--batch={batch} --context={context}: {what}; choose smaller values")


@torch.no_grad()
def decode(model, batch, context, absorb, device, compiled=False, memory=True):
    """A step that decodes one token for each sequence and attends to `context` tokens, the new one included.
    -> its seconds, bytes of the cache per token; if asked for, bytes of temporary memory of an uncompiled step"""
    torch._dynamo.reset()  # frees the CUDA graphs of earlier caches
    cache = model.init_cache(batch, absorb)
    cache.reserve(context)
    for layer in cache.layers:
        for tensor in layer.values():
            tensor.copy_(torch.randn(tensor.shape[-2:]))  # the same for all sequences
            torch._dynamo.mark_static_address(tensor, guard=False)  # CUDA graphs write to fixed addresses
    token = torch.zeros(batch, 1, dtype=torch.long, device=device)
    positions = torch.tensor([context - 1], device=device)

    def step(hidden):
        logits = F.linear(hidden(token, positions, cache)[:, -1], model.token_embedding.weight)
        token.copy_(logits.argmax(-1, keepdim=True))

    hidden = torch.compile(model.hidden, mode="reduce-overhead", fullgraph=True) if compiled else model.hidden
    taken = np.median(seconds(partial(step, hidden), device))
    temporary = temporary_bytes(partial(step, model.hidden), device) if memory else None
    return taken, cache.nbytes / (batch * cache.size), temporary


def train_speed(config, size, data, dtype, device):
    """Tokens/s that train.py reports for its steps 11 to 20, with its own optimizer, precision and batches."""
    flags = {"attn": config.attn, "size": size, "data": data, "dtype": str(dtype)[6:], "device": device}
    flags |= {"steps": 100_000, "eval_interval": 10, "eval_steps": 1} | ({"rank": config.rank} if config.rank else {})
    with TemporaryDirectory() as out, open(Path(out, "errors"), "w+") as errors:
        command = [sys.executable, Path(__file__).parent / "train.py", *(f"--{k}={v}" for k, v in flags.items())]
        command += [f"--out={out}", *["--joint"] * config.joint]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            for line in process.stdout:
                if line.split()[:1] == ["20"]:
                    process.kill()
                    return float(line.split()[4].replace(",", ""))
        errors.seek(0)
        raise (InputError if process.returncode == 2 else OSError)(f"--train: train.py stopped: {errors.read()}")


def measure(model, dtype, batch, context, device, *options):
    """Decode with one model at one batch and context, in each way it can -> a row, not yet compared with anything."""
    config = model.config
    parameters = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("position"))
    row = {"attn": config.attn, "rank": config.rank, "joint": config.joint, "parameters": parameters / 1e6}
    row |= {"batch": batch, "context": context, "dtype": str(dtype)[6:], "device": device}
    shape = ("n_layer", "n_head", "n_embd", "vocab_size", "latent_norm", "q_rank")
    row |= {name: getattr(config, name) for name in shape}
    for way, absorb in (("expanded", False), ("absorbed", True))[: 1 + (config.attn in ABSORBS)]:
        taken, row["kv_bytes"], row[f"{way}_temporary"] = decode(model, batch, context, absorb, device, *options)
        row[way] = batch / taken
    return row


def summarize(rounds, config, ceiling):
    """Rows of the same job, one for each round -> their medians, and how close to the ceilings the faster way is."""
    row = {k: float(np.median([r[k] for r in rounds])) if isinstance(v, float) else v for k, v in rounds[0].items()}
    if len(rounds) > 1:
        speeds = [speed(r) for r in rounds]
        row["spread"] = (max(speeds) - min(speeds)) / 2 / speed(row)
    size, batch, context = DTYPES[row["dtype"]].itemsize, row["batch"], row["context"]
    way = "absorbed" if speed(row) == row.get("absorbed") else "expanded"
    read, flops = decode_cost(config, row["parameters"] * 1e6, batch, context, size, way == "absorbed")
    taken = batch / speed(row)
    row |= {"gb": read / taken / 1e9, "gflop": flops / taken / 1e9}
    least = {"memory": read / ceiling["bytes_per_s"], "arithmetic": flops / ceiling["flop_per_s"]}
    row["limit"] = max(least, key=least.get)
    row["roofline"] = least[row["limit"]] / taken
    if row[f"{way}_temporary"] is not None:
        held = row["parameters"] * 1e6 * size + batch * context * row["kv_bytes"]
        row |= {"memory": (held + row[f"{way}_temporary"]) / 1e6, "overhead": row[f"{way}_temporary"] / held}
    return row


# What trained models have learnt --------------------------------------------------------------------------------------


def sample(model, tokenizer, count, temperature=0.8, seed=0):
    """Sample `count` stories from an empty prompt."""
    end, texts = tokenizer.eot_token, []
    device = model.token_embedding.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    while len(texts) < count:
        idx = torch.full((min(64, count), 1), end, device=device)
        room = model.config.block_size - 1
        stories = model.generate(idx, room, temperature, generator=generator, stop=end)[:, 1:].tolist()
        texts += [tokenizer.decode(s[: s.index(end)] if end in s else s) for s in stories]
    return texts[:count]


def judged(loaded, count, folder, device):
    """{path: (model, checkpoint)} -> {path: columns}: scores of `count` stories of each model, and its recall.

    Raises InputError if a model was trained on other data than that in the folder."""
    meta, *_ = data = load_data(folder)
    same = ("source", "stories", "seed", "world", "tokenizer")
    for path, (_, checkpoint) in loaded.items():
        if any(checkpoint["meta"].get(key) != meta[key] for key in same):
            raise InputError(f"--judge: {path} was not trained on what is in {folder}; leave out --judge")
    tokenizer = load_tokenizer(meta["tokenizer"])
    told, rows = [], {}
    for path, (model, _) in (bar := tqdm(loaded.items(), leave=False, disable=None)):
        bar.set_postfix_str(f"{path} tells {count} stories")
        told += sample(model.to(device), tokenizer, count)
        rows[path] = recall(model, data, 300)[1]
        del rows[path]["excess"]  # of these 300 stories alone
    for name, values in judge(told, data)[0].items():
        for path, of_one in zip(loaded, values.reshape(-1, count), strict=True):
            rows[path][name], rows[path][f"{name}_error"] = mean_and_error(of_one)
    return rows


# The comparison -------------------------------------------------------------------------------------------------------


def seeds_apart(loaded):
    """{path: (model, checkpoint)} -> lists of paths, one list for runs that differ only in their seed."""
    groups = {}
    for path, (model, checkpoint) in loaded.items():
        options = dict(checkpoint.get("options") or {"unknown": path})
        seed = options.pop("seed", None)
        ways = {k: v for k, v in options.items() if k not in ("data", "out", "resume", "device", "compile")}
        key = str((model.config, ways, checkpoint.get("meta")))
        if seed in groups.get(key, ()):  # the same run listed twice is not two seeds
            key = path
        groups.setdefault(key, {})[seed] = path
    return [list(group.values()) for group in groups.values()]


def learnt(checkpoint):
    """The columns that come from a checkpoint."""
    loss, floor = checkpoint["val_loss"], checkpoint["floor"]
    return {"val_loss": loss, "excess": None if None in (loss, floor) else loss - floor}


def mean_of(runs):
    """Columns of several runs -> their means, and standard errors between runs. A single run stays as it is."""
    if len(runs) == 1:
        return runs[0]
    row = {}
    for name in runs[0]:
        values = [one.get(name) for one in runs]
        if not name.endswith("_error") and None not in values:
            row[name], row[f"{name}_error"] = mean_and_error(values)
    return row


def compare(rows):
    """Add the columns that compare a row with mha and with rank 1, all else being equal."""
    for row in rows:
        same = alike(rows, row, (*GROUP, "n_layer", "n_head", "n_embd", "vocab_size"))
        if mha := next((r for r in same if r["attn"] == "mha"), None):
            row |= {"cut": 1 - row["kv_bytes"] / mha["kv_bytes"], "to_mha": speed(row) / speed(mha)}
            if row.get("val_loss") and mha.get("val_loss"):
                ratio = row["val_loss"] / mha["val_loss"]
                row["loss_to_mha"] = ratio - 1
                if row is not mha and row.get("val_loss_error") and mha.get("val_loss_error"):
                    relative = (r["val_loss_error"] / r["val_loss"] for r in (row, mha))
                    row["loss_to_mha_error"] = ratio * math.hypot(*relative)
        full = [r for r in alike(same, row, ("attn", "joint", "latent_norm", "q_rank")) if r["rank"] == 1]
        if full:
            row["to_full"] = speed(row) / speed(full[0])
    return rows


# Tables and figures ---------------------------------------------------------------------------------------------------


def cells(rows, columns):
    """Headings and rows as strings: the name of the variant, then the columns that are not empty."""
    columns = [c for c in columns if any(row.get(c) is not None for row in rows)]
    lines = [["attn", *(COLUMNS[c][0] for c in columns)]]
    for row in rows:
        lines.append([row.get("name") or name_of(row)])
        for c in columns:
            value, error, style = row.get(c), row.get(f"{c}_error"), COLUMNS[c][1]
            text = "" if value is None else style.format(value)
            lines[-1].append(text if error is None else f"{text}±{style.replace('+', '').format(error)}")
    return lines


def tables(report, columns):
    """The report in Markdown, a table for each device, dtype, batch and context."""
    text = []
    for group in dict.fromkeys(tuple(row[name] for name in GROUP) for row in report["rows"]):
        device, dtype, batch, context = group
        rows = alike(report["rows"], dict(zip(GROUP, group, strict=True)), GROUP)
        ceiling = report["machines"][f"{device} {dtype}"]
        speeds = f"{ceiling['bytes_per_s'] / 1e9:.1f} GB/s, {ceiling['flop_per_s'] / 1e9:,.0f} GFLOP/s"
        text.append(f"{context:,} tokens attended to, batch {batch}, {dtype}; {ceiling['name']}: {speeds}")
        lines = cells(rows, columns)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
        lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
        text.append("\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n")
    return "\n".join(text)


def advice(rows):
    """The fastest and the smallest variant of the first table with the longest context, in words."""
    longest = max(rows, key=lambda row: row["context"])
    rows, lines = alike(rows, longest, GROUP), []
    for title, row in (("fastest", max(rows, key=speed)), ("smallest cache", min(rows, key=lambda r: r["kv_bytes"]))):
        to_mha = f", {row['to_mha']:.2f} times mha's speed" if row.get("to_mha") else ""
        cost = f"{speed(row):,.0f} tokens/s{to_mha}, {row['kv_bytes']:,.0f} bytes of cache per token"
        lines.append(f"  {title}: {row.get('name') or name_of(row)}, {cost}")
    return "\n".join([f"{longest['context']:,} tokens, batch {longest['batch']}, {longest['dtype']}:", *lines])


def draw(path, report):
    """Plot loss against cache and speed against context, if there are several; of the first device, dtype and batch."""
    from matplotlib.figure import Figure

    rows = alike(report["rows"], report["rows"][0], ("device", "dtype", "batch"))
    panels = [draw_loss] if any(r.get("val_loss") is not None for r in rows) else []
    panels += [draw_speed] if len({r["context"] for r in rows}) > 1 or not panels else []
    figure = Figure(figsize=(9, 4.2 * len(panels)), layout="constrained")
    for panel, axes in zip(panels, figure.subplots(len(panels), 1, squeeze=False)[:, 0], strict=True):
        panel(axes, rows)
        axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)


def style_of(row):
    """One colour for each variant; joint ones are dashed, with squares."""
    return dict(color=COLOURS[row["attn"]]) | (dict(ls="--", marker="s") if row["joint"] else dict(ls="-", marker="o"))


def draw_loss(axes, rows):
    """A line for each variant, through its ranks."""
    loss = "excess" if all(r.get("excess") is not None for r in rows) else "val_loss"
    shortest = min(r["context"] for r in rows)  # the loss is the same for all contexts
    rows = sorted((r for r in rows if r["context"] == shortest and r.get(loss)), key=lambda r: r["kv_bytes"])
    for attn, joint in dict.fromkeys((r["attn"], r["joint"]) for r in rows):
        mine = [r for r in rows if (r["attn"], r["joint"]) == (attn, joint)]
        x, y, style = [r["kv_bytes"] for r in mine], [r[loss] for r in mine], style_of(mine[0])
        errors = [r.get(f"{loss}_error") or 0 for r in mine]
        if len({r["rank"] for r in mine}) < len(mine):  # several runs of one rank: a line would mean nothing
            style["ls"] = "none"
        axes.errorbar(x, y, errors, **style, capsize=3, label=attn + (" joint" if joint else ""))
        for r in mine:
            if r["rank"]:
                axes.annotate(rank_of(r), (r["kv_bytes"], r[loss]), (4, 5), textcoords="offset points", fontsize=9)
    axes.set(xscale="log", xlabel=f"KV cache, bytes per token in {rows[0]['dtype']}")
    axes.set(ylabel=f"{'excess over the floor' if loss == 'excess' else 'loss'}, nats per token")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter("{x:,.0f}")
    axes.set_title("Loss against cache: lower left is better", fontsize=10)


def draw_speed(axes, rows):
    """A line for each name; of more than eight names, those with rank 1/2 or none."""
    names = {}
    for r in sorted(rows, key=lambda r: r["context"]):
        names.setdefault(r.get("name") or name_of(r), []).append(r)
    for name, mine in names.items():
        if len(names) <= 8 or mine[0]["rank"] in (None, 0.5):
            axes.plot([r["context"] for r in mine], [speed(r) for r in mine], **style_of(mine[0]), label=name)
    contexts = sorted({r["context"] for r in rows})
    axes.set(xscale="log", yscale="log", xlabel="tokens attended to", ylabel="decoded tokens/s")
    axes.set_xticks(contexts, [f"{c:,}" for c in contexts])
    axes.minorticks_off()
    axes.set_title(f"Decoding, batch {rows[0]['batch']}, {rows[0]['dtype']}, the faster way", fontsize=10)


def parse_arguments():
    example = "example: python bench.py --attn mha mla_decoupled --batch 1 8 --context 512 4096 8192"
    parser = Parser(description=__doc__.split("\n\n")[0], epilog=example)
    add = parser.add_argument
    add("checkpoints", nargs="*", help="checkpoints of train.py (default: every variant with random weights)")
    add("--attn", nargs="+", choices=ATTN, default=ATTN, metavar="ATTN", help="variants (default: all)")
    add("--size", choices=SIZES, default="30m", help="shape of fresh models (default: %(default)s)")
    add("--batch", nargs="+", type=int, default=[8], help="sequences decoded at once (default: 8)")
    add("--context", nargs="+", type=int, help="tokens attended to (default: 512 and 4096; a checkpoint's context)")
    text = f"of weights and cache: {', '.join(DTYPES)} (default: bfloat16 where it is fast, else float32)"
    add("--dtype", nargs="+", choices=DTYPES, metavar="DTYPE", help=text)
    add("--device", nargs="+", help="cpu, cuda, ... (default: cuda if there is one, else cpu)")
    add("--compile", action="store_true", help="compile the decode step into a CUDA graph (default: no)")
    add(
        "--rounds",
        type=int,
        default=3,
        help="how often to repeat everything; medians are reported (default: %(default)s)",
    )
    add("--train", action="store_true", help="run 20 steps of train.py too, at --size (default: no)")
    add("--judge", type=int, metavar="N", help="score N stories of each checkpoint, and its recall (default: no)")
    add("--data", default="stories", help="data for --train and --judge (default: %(default)s)")
    text = "; ".join(f"{name}: {what}" for name, (_, _, what) in COLUMNS.items()).replace("%", "%%")
    add("--columns", nargs="+", choices=COLUMNS, default=COLUMNS, metavar="COLUMN", help=f"(default: all) {text}")
    add("--out", type=Path, default=Path("."), help="folder for bench.json and bench.png (default: this one)")
    args = parser.parse_args()
    for name in ("batch", "context", "rounds", "judge"):
        given = getattr(args, name)
        if given is not None and np.min(given) < 1:
            raise InputError(f"--{name}: must be at least 1")
    if args.judge and not args.checkpoints:
        raise InputError("--judge: name the checkpoints to judge")
    if args.checkpoints and (args.attn is not ATTN or args.size != "30m" or args.train):
        raise InputError("--attn, --size, --train: for fresh models; leave them out with checkpoints")
    if args.out.exists() and not args.out.is_dir():
        raise InputError(f"--out={args.out}: must be a folder")
    args.batch = list(dict.fromkeys(args.batch))
    args.device = args.device or ["cuda" if torch.cuda.is_available() else "cpu"]
    if args.compile and not all(device.startswith("cuda") for device in args.device):
        raise InputError("--compile: for cuda only")
    return args


def choose_models(args, loaded):
    """-> [(name, paths of its checkpoints, GPTConfig), ...], contexts"""
    if not loaded:
        contexts = args.context or [512, 4096]
        shape = SIZES[args.size] | dict(block_size=max(contexts), vocab_size=4096)
        chosen = [v for v in VARIANTS if v[0] in args.attn and (v[0] != "gqa" or shape["n_head"] % (1 / v[1]) == 0)]
        configs = [GPTConfig(attn=attn, rank=rank, joint=joint, **shape) for attn, rank, joint in chosen]
        return [(name_of(asdict(config)), [], config) for config in configs], contexts
    contexts = args.context or [min(model.config.block_size for model, _ in loaded.values())]
    for path, (model, _) in loaded.items():
        if max(contexts) > (most := model.config.block_size):
            raise InputError(f"--context={max(contexts)}: {path} has a context of {most}")
    groups = [(paths, loaded[paths[0]][0].config) for paths in seeds_apart(loaded)]
    names = [name_of(asdict(config)) for _, config in groups]
    unique = [name if names.count(name) == 1 else paths[0] for name, (paths, _) in zip(names, groups, strict=True)]
    return [(name, *group) for name, group in zip(unique, groups, strict=True)], contexts


def main():
    args = parse_arguments()
    for device in args.device:
        check_device(device)
    loaded = {path: load_checkpoint(path) for path in args.checkpoints}
    models, contexts = choose_models(args, loaded)
    dtypes = {device: args.dtype or ["bfloat16" if fast_bfloat16(device) else "float32"] for device in args.device}
    jobs = [(device, DTYPES[dtype], *model) for device in args.device for dtype in dtypes[device] for model in models]
    for device, dtype, _, _, config in jobs:
        check_memory(config, max(args.batch), max(contexts), dtype, device)
    args.out.mkdir(parents=True, exist_ok=True)  # now: a failure later would lose the measurements
    scores = judged(loaded, args.judge, args.data, args.device[0]) if args.judge else {}
    # In rounds, so that a busy minute does not slow down one variant alone
    rows, limits = {}, {}
    training = {}
    if args.train:
        for i, (device, dtype, _, _, config) in enumerate(tqdm(jobs, "train.py", leave=False, disable=None)):
            training[i] = {"train": train_speed(config, args.size, args.data, dtype, device)}
    for n, (i, job) in (bar := tqdm([*product(range(args.rounds), enumerate(jobs))], leave=False, disable=None)):
        device, dtype, name, paths, config = job
        measured, about = limits.setdefault(f"{device} {str(dtype)[6:]}", []), training.get(i, {})
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        if len(measured) == n:
            measured.append(ceilings(device, dtype))
        if paths:
            model = loaded[paths[0]][0].to(device, dtype)
            about = {"paths": paths, "name": name, "runs": len(paths)}
            about |= mean_of([learnt(loaded[path][1]) | scores.get(path, {}) for path in paths])
        else:
            torch.manual_seed(0)
            with torch.device(device):
                model = GPT(config).to(device, dtype).eval()
        for batch, context in product(args.batch, contexts):
            bar.set_postfix_str(f"{name} {context}")
            row = measure(model, dtype, batch, context, device, args.compile, n == 0) | about
            rows.setdefault((i, batch, context), []).append(row)
        del model
    report = {"command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]), "machines": {}}
    for key, found in limits.items():
        middle = {name: float(np.median([one[name] for one in found])) for name in found[0]}
        report["machines"][key] = middle | {"name": machine(key.split()[0])}
    ceiling = [report["machines"][f"{device} {str(dtype)[6:]}"] for device, dtype, *_ in jobs]
    report["rows"] = compare([summarize(of_one, jobs[i][-1], ceiling[i]) for (i, *_), of_one in rows.items()])
    print(tables(report, args.columns))
    print(advice(report["rows"]))
    (args.out / "bench.json").write_text(json.dumps(report, indent=1, default=float))
    draw(args.out / "bench.png", report)
    print(f"wrote {args.out / 'bench.json'} and {args.out / 'bench.png'}")


if __name__ == "__main__":
    run(main)
