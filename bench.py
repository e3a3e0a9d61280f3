"""What attention costs: bytes of KV cache, decoded tokens per second, and how close that is to the machine's limit.

    python bench.py                                      every variant, freshly initialised, in the 30m shape
    python bench.py out/ckpt.pt out/joint/ckpt.pt        trained models: their loss beside their cost
    python bench.py --attn mha mla_decoupled --batch 1 8 64 --context 512 8192
    python bench.py --train                              the speed of train.py as well

A decode step reads all weights and the whole cache once, and multiplies with them. Whichever of the two takes longer at
the machine's peak sets the best possible speed, the roofline. Both peaks are measured in the same run. "expanded" makes
keys and values from all cached latents at every step; "absorbed" attends to the latents themselves (mla_rope cannot).
"""

import ctypes
import json
import math
import platform
import sys
import time
from dataclasses import asdict
from fractions import Fraction
from functools import partial
from itertools import product
from pathlib import Path
from subprocess import PIPE, Popen
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
    "cut": ("cut", "{:.0%}", "reduction relative to mha"),
    "expanded": ("expanded", "{:,.0f}", "decoded tokens/s if keys and values are made from all latents at every step"),
    "absorbed": ("absorbed", "{:,.0f}", "decoded tokens/s if queries attend to latents"),
    "spread": ("spread", "±{:.0%}", "half the range over the rounds; from here on, of the faster of the two"),
    "to_mha": ("/ mha", "{:.2f}", "tokens/s over mha's"),
    "to_full": ("/ rank 1", "{:.2f}", "tokens/s over those of the same variant at rank 1"),
    "gb": ("GB/s", "{:.1f}", "weights and cache read"),
    "gflop": ("GFLOP/s", "{:,.0f}", "in matrix products"),
    "roofline": ("roofline", "{:.0%}", "share of the speed that the machine allows"),
    "limit": ("limit", "{}", "what sets that speed: memory or arithmetic"),
    "memory": ("MB", "{:,.0f}", "memory in use at the peak of a step"),
    "overhead": ("over", "{:.0%}", "temporary memory as a share of weights and cache"),
    "train": ("train", "{:,.0f}", "with --train: tokens/s of train.py"),
    "runs": ("seeds", "{}", "how many runs differ only in their seed; columns are then means ± standard errors"),
    "val_loss": ("val", "{:.4f}", "validation loss, nats per token"),
    "excess": ("excess", "{:.4f}", "the part of it above the floor"),
    "loss_to_mha": ("vs mha", "{:+.1%}", "validation loss against mha's"),
    "grammar": ("grammar", "{:.1f}", "with --judge: 0 to 10, of sampled stories; ± between stories for a single run"),
    "consistency": ("consist.", "{:.1f}", "the same for consistency"),
    "copied": ("copied", "{:.0%}", "longest run of words from a training story, over the length of the sampled story"),
    "recall": ("recall", "{:.1%}", "with --judge: probability of the right word where a story asks for a fact"),
    "chance": ("chance", "{:.1%}", "recall by guessing among all words of the kind"),
    "copying": ("copying", "{:.1%}", "recall by guessing among those the story has used"),
    "lost": ("forgotten", "{:.4f}", "excess at words that the story determines"),
}
GROUP = ("device", "dtype", "batch", "context")  # one table per combination


# The machine ----------------------------------------------------------------------------------------------------------


def seconds(function, device, repeats=3):
    """Time `repeats` calls after a warm-up. On a CPU, if the first takes over half a second, return that one alone."""
    kind, times = device.split(":")[0], []
    warmup, calls = (1, 1) if kind == "cpu" else (4, 10)  # many calls in a row, to hide the launch overhead
    while len(times) < warmup + repeats and not (kind == "cpu" and sum(times[:1]) > 0.5):
        begin = time.perf_counter()
        for _ in range(calls):
            function()
        getattr(torch, kind).synchronize()
        times.append((time.perf_counter() - begin) / calls)
    return np.array(times[-repeats:])


def ceilings(device, dtype):
    """Bytes/s read from memory and FLOP/s of a matrix product, each the best of several tries."""
    numbers = torch.ones(2**27 if device == "cpu" else 2**30, device=device)
    size = 2048 if device == "cpu" else 8192
    a = torch.randn(size, size, device=device).to(dtype)
    bytes_per_s = numbers.nbytes / seconds(numbers.sum, device, 9).min()
    return {"bytes_per_s": bytes_per_s, "flop_per_s": 2 * size**3 / seconds(lambda: a @ a, device, 9).min()}


def in_proc(file, key):
    """The value of the first line of /proc/<file> with this key; None on systems other than Linux."""
    lines = Path("/proc", file).read_text().splitlines() if Path("/proc", file).exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)


def machine(device):
    processor = in_proc("cpuinfo", "model name") or platform.processor() or platform.machine()
    on_cpu = f"{torch.get_num_threads()} threads on {processor}"
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else on_cpu
    return f"{name}, torch {torch.__version__}"


def temporary_bytes(step, device):
    """Peak memory of a step beyond what was in use before it; None if the system does not report it."""
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
    """Bytes read and FLOPs done by a decode step that attends to `context` tokens, the new one included.

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


def name_of(row):
    words = [row["attn"], str(Fraction(row["rank"]).limit_denominator(1000)) if row["rank"] else ""]
    words += ["joint" * row["joint"], "norm" * row["latent_norm"], f"q={row['q_rank']:g}" if row["q_rank"] else ""]
    return " ".join(filter(None, words))


def speed(row):
    """Decoded tokens/s, expanded or absorbed, whichever is faster."""
    return max(row["expanded"], row.get("absorbed", 0))


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
    available = in_proc("meminfo", "MemAvailable") or "inf"  # in kB
    free = float(available.split()[0]) * 1024 if "cuda" not in device else torch.cuda.mem_get_info(device)[0]
    if needed > free:
        reason = f"{config.attn} needs {needed / 1e9:.1f} GB on {device}, but only {free / 1e9:.1f} GB is free"
        raise InputError(f"--batch={batch} --context={context}: {reason}; choose smaller values")


@torch.no_grad()
def decode(model, batch, context, absorb, device, compiled=False, memory=True):
    """Time a step that decodes one token per sequence, attending to `context` tokens, the new one included.
    -> seconds, bytes of the cache per token, and if asked for, bytes of temporary memory of an uncompiled step"""
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


def train_speed(config, size, data, device, dtype):
    """Tokens/s that train.py reports for steps 11 to 20, with its own optimizer and batches but the given dtype."""
    flags = {"attn": config.attn, "size": size, "data": data, "dtype": dtype, "device": device}
    flags |= {"steps": 100_000, "eval_interval": 10, "eval_steps": 1} | ({"rank": config.rank} if config.rank else {})
    command = [sys.executable, Path(__file__).parent / "train.py", *(f"--{k}={v}" for k, v in flags.items())]
    command += ["--joint"] * config.joint
    with TemporaryDirectory() as out, Popen([*command, f"--out={out}"], stdout=PIPE, text=True) as process:
        if line := next((line for line in process.stdout if line.split()[:1] == ["20"]), None):
            process.kill()
            return float(line.split()[4].replace(",", ""))
    raise SystemExit(2) if process.returncode == 2 else OSError(f"--train: train.py ended with {process.returncode}")


def measure(model, dtype, batch, context, device, compiled=False, memory=True):
    """Decode with one model at one batch and context, in each way it can -> a row, not yet compared with anything."""
    config = model.config
    parameters = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("position"))
    row = asdict(config) | {"parameters": parameters / 1e6, "batch": batch, "context": context}
    row |= {"dtype": str(dtype)[6:], "device": device}
    for way, absorb in (("expanded", False), ("absorbed", True))[: 1 + (config.attn in ABSORBS)]:
        found = decode(model, batch, context, absorb, device, compiled, memory)
        taken, row["kv_bytes"], row[f"{way}_temporary"] = found
        row[way] = batch / taken
    return row


def summarize(rounds, config, ceiling):
    """Rows of the same job, one for each round -> their medians, and how close to the ceilings the faster way is."""
    row = {k: float(np.median([r[k] for r in rounds])) if isinstance(v, float) else v for k, v in rounds[0].items()}
    speeds = [speed(r) for r in rounds]
    row["spread"] = (max(speeds) - min(speeds)) / 2 / speed(row) if len(rounds) > 1 else None
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
    end, room, texts = tokenizer.eot_token, model.config.block_size - 1, []
    generator = torch.Generator(model.token_embedding.weight.device).manual_seed(seed)
    while len(texts) < count:
        idx = torch.full((min(64, count), 1), end, device=generator.device)
        stories = model.generate(idx, room, temperature, generator=generator, stop=end)[:, 1:].tolist()
        texts += [tokenizer.decode(s[: s.index(end)] if end in s else s) for s in stories]
    return texts[:count]


def judged(loaded, count, folder, device):
    """{path: (model, checkpoint)} -> {path: columns}: scores of `count` stories of each model, and its recall.

    Raises InputError if a model was trained on other data than that in the folder."""
    meta, *_ = data = load_data(folder)
    same = ("source", "stories", "seed", "world", "tokenizer")
    for path, (_, checkpoint) in loaded.items():
        if "world" not in meta or any(checkpoint["meta"].get(key) != meta[key] for key in same):
            raise InputError(f"--judge: {path} was not trained on the story world in {folder}; leave out --judge")
    tokenizer, told, rows = load_tokenizer(meta["tokenizer"]), [], {}
    for path, (model, _) in tqdm(loaded.items(), "stories and recall", leave=False, disable=None):
        told += sample(model.to(device), tokenizer, count)
        rows[path] = recall(model, data, 300)[1]
        del rows[path]["excess"]  # of these 300 stories only; val_loss is of all
    for name, values in judge(told, data)[0].items():
        for path, of_one in zip(loaded, values.reshape(-1, count), strict=True):
            rows[path][name], rows[path][f"{name}_error"] = mean_and_error(of_one)
    return rows


def group_by_recipe(loaded):
    """{path: (model, checkpoint)} -> lists of paths, one list for runs that differ only in their seed."""
    groups, changeable = {}, ("seed", "data", "out", "resume", "device", "compile")
    for path, (model, checkpoint) in loaded.items():
        options = checkpoint.get("options", {"out of": path})
        fixed = {k: v for k, v in options.items() if k not in changeable}
        key, seed = str((model.config, fixed, checkpoint.get("meta"))), options.get("seed")
        if seed in groups.get(key, ()):  # the same run listed twice is not two seeds
            key = path
        groups.setdefault(key, {})[seed] = path
    return [list(group.values()) for group in groups.values()]


def mean_of(runs):
    """Columns of several runs -> their means, and standard errors between runs. A single run stays as it is."""
    values = {name: [run.get(name) for run in runs] for name in runs[0] if not name.endswith("_error")}
    known = [(name, *mean_and_error(of_all)) for name, of_all in values.items() if None not in of_all]
    together = {name: mean for name, mean, _ in known} | {f"{name}_error": error for name, _, error in known}
    return runs[0] if len(runs) == 1 else together


def compare(rows):
    """Add the columns that compare a row with mha and with rank 1, all else being equal."""
    for row in rows:
        same = alike(rows, row, (*GROUP, "n_layer", "n_head", "n_embd", "vocab_size"))
        if mha := next((r for r in same if r["attn"] == "mha"), None):
            row |= {"cut": 1 - row["kv_bytes"] / mha["kv_bytes"], "to_mha": speed(row) / speed(mha)}
            if row.get("val_loss") and mha.get("val_loss"):
                errors = [r.get("val_loss_error", 0) / r["val_loss"] for r in (row, mha)]  # relative
                row["loss_to_mha"] = (ratio := row["val_loss"] / mha["val_loss"]) - 1
                row["loss_to_mha_error"] = ratio * math.hypot(*errors) if row is not mha and all(errors) else None
        if full := [r for r in alike(same, row, ("attn", "joint", "latent_norm", "q_rank")) if r["rank"] == 1]:
            row["to_full"] = speed(row) / speed(full[0])
    return rows


# Tables and figures ---------------------------------------------------------------------------------------------------


def cells(rows, columns):
    """Headings and rows as strings: the name of the variant, then the columns that are not empty."""
    columns = [c for c in columns if any(row.get(c) is not None for row in rows)]
    lines = [["attn", *(COLUMNS[c][0] for c in columns)]]
    for row in rows:
        lines.append([row["name"]])
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
        limits = report["machines"][f"{device} {dtype}"]
        speeds = f"{limits['bytes_per_s'] / 1e9:.1f} GB/s, {limits['flop_per_s'] / 1e9:,.0f} GFLOP/s"
        text.append(f"{context:,} tokens attended to, batch {batch}, {dtype}; {limits['name']}: {speeds}\n")
        lines = cells(alike(report["rows"], dict(zip(GROUP, group, strict=True)), GROUP), columns)
        first, *widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines = [[name.ljust(first), *map(str.rjust, line, widths)] for name, *line in lines]
        lines.insert(1, ["-" * first, *("-" * (width - 1) + ":" for width in widths)])
        text += ["| " + " | ".join(line) + " |" for line in lines] + [""]
    return "\n".join(text)


def advice(rows):
    """The fastest and the smallest variant of the first table with the longest context, in words."""
    longest = max(rows, key=lambda row: row["context"])
    rows = alike(rows, longest, GROUP)
    text = f"{longest['context']:,} tokens, batch {longest['batch']}, {longest['dtype']}:"
    for title, row in (("fastest", max(rows, key=speed)), ("smallest cache", min(rows, key=lambda r: r["kv_bytes"]))):
        to_mha = f", {row['to_mha']:.2f} times mha's speed" if row.get("to_mha") else ""
        text += f"\n  {title}: {row['name']}, {speed(row):,.0f} tokens/s{to_mha}, {row['kv_bytes']:,.0f} bytes/token"
    return text


def draw(path, report):
    """Plot loss against cache (trained models) and speed against context, for the first device, dtype and batch."""
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
    """A line for each variant, through its ranks, or points if it has several runs of one rank."""
    loss = "excess" if all(r.get("excess") is not None for r in rows) else "val_loss"
    rows = [r for r in alike(rows, rows[0], ("context",)) if r.get(loss)]  # the loss is the same for all contexts
    for attn, joint in dict.fromkeys((r["attn"], r["joint"]) for r in rows):
        mine = sorted(alike(rows, dict(attn=attn, joint=joint), ("attn", "joint")), key=lambda r: r["kv_bytes"])
        style = style_of(mine[0]) | (dict(ls="none") if len({r["rank"] for r in mine}) < len(mine) else {})
        x, y, errors = zip(*((r["kv_bytes"], r[loss], r.get(f"{loss}_error") or 0) for r in mine), strict=True)
        axes.errorbar(x, y, errors, **style, capsize=3, label=attn + " joint" * joint)
        for r in mine:
            axes.annotate(r["name"], (r["kv_bytes"], r[loss]), (4, 5), textcoords="offset points", fontsize=8)
    what = "excess over the floor" if loss == "excess" else "loss"
    axes.set(xscale="log", xlabel=f"KV cache, bytes per token in {rows[0]['dtype']}", ylabel=f"{what}, nats per token")
    axes.xaxis.set(major_formatter="{x:,.0f}", minor_formatter="{x:,.0f}")
    axes.set_title("Loss against cache: lower left is better")


def draw_speed(axes, rows):
    """A line for each name; with more than eight names, only for rank 1/2 and for variants without a rank."""
    names, contexts = list(dict.fromkeys(r["name"] for r in rows)), sorted({r["context"] for r in rows})
    for name in names:
        mine = sorted(alike(rows, dict(name=name), ("name",)), key=lambda r: r["context"])
        if len(names) <= 8 or mine[0]["rank"] in (None, 0.5):
            axes.plot([r["context"] for r in mine], [speed(r) for r in mine], **style_of(mine[0]), label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens attended to", ylabel="decoded tokens/s")
    axes.set_xticks(contexts, [f"{c:,}" for c in contexts])
    axes.minorticks_off()
    axes.set_title(f"Decoding, batch {rows[0]['batch']}, {rows[0]['dtype']}, the faster way")


def parse_arguments():
    example = "example: python bench.py --attn mha mla_decoupled --batch 1 8 --context 512 4096 8192"
    parser = Parser(description=__doc__.split("\n\n")[0], epilog=example)
    add = parser.add_argument
    add("checkpoints", nargs="*", help="checkpoints of train.py (default: every variant with random weights)")
    add("--attn", nargs="+", choices=ATTN, default=ATTN, metavar="ATTN", help="variants (default: all)")
    add("--size", choices=SIZES, default="30m", help="shape of fresh models (default: %(default)s)")
    add("--batch", nargs="+", type=int, default=[8], help="sequences decoded at once (default: 8)")
    add("--context", nargs="+", type=int, help="tokens attended to (default: 512 and 4096; a checkpoint's context)")
    text = f"precision of weights and cache: {', '.join(DTYPES)} (default: bfloat16 where it is fast, else float32)"
    add("--dtype", nargs="+", choices=DTYPES, metavar="DTYPE", help=text)
    add("--device", nargs="+", help="cpu, cuda, ... (default: cuda if there is one, else cpu)")
    add("--compile", action="store_true", help="compile the decode step into a CUDA graph (default: no)")
    add("--rounds", type=int, default=3, help="rounds of decoding; medians are reported (default: %(default)s)")
    add("--train", action="store_true", help="also time train.py, 20 steps at --size (default: no)")
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
    given = args.device or ["cuda" if torch.cuda.is_available() else "cpu"]
    args.device = ["cuda:0" if device == "cuda" else device for device in given]  # set_device needs an index
    for device in args.device:
        check_device(device)
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
    groups = [(paths, loaded[paths[0]][0].config) for paths in group_by_recipe(loaded)]
    names = [name_of(asdict(config)) for _, config in groups]
    unique = [name if names.count(name) == 1 else paths[0] for name, (paths, _) in zip(names, groups, strict=True)]
    return [(name, *group) for name, group in zip(unique, groups, strict=True)], contexts


def main():
    args = parse_arguments()
    loaded = {path: load_checkpoint(path) for path in args.checkpoints}
    models, contexts = choose_models(args, loaded)
    default = {device: ["bfloat16" if fast_bfloat16(device) else "float32"] for device in args.device}
    machines = [(device, dtype) for device in args.device for dtype in args.dtype or default[device]]
    for (device, dtype), (_, _, config) in product(machines, models):
        check_memory(config, max(args.batch), max(contexts), DTYPES[dtype], device)
    args.out.mkdir(parents=True, exist_ok=True)  # before measuring, so that a failure here loses nothing
    scores = judged(loaded, args.judge, args.data, args.device[0]) if args.judge else {}
    about = {}  # columns that are the same in every round
    for on, (name, paths, config) in tqdm([*product(machines, models)], "train.py", disable=not args.train or None):
        learnt = {path: (loaded[path][1]["val_loss"], loaded[path][1]["floor"]) for path in paths}
        runs = [dict(val_loss=v, excess=f and v - f) | scores.get(path, {}) for path, (v, f) in learnt.items()]
        about[on, name] = {"name": name} | (mean_of(runs) | {"paths": paths, "runs": len(runs)} if runs else {})
        if args.train:
            about[on, name]["train"] = train_speed(config, args.size, args.data, *on)
    # Measure in rounds, so that a busy minute does not slow down one variant alone
    peaks, rounds = {on: [] for on in machines}, {}
    jobs = [*product(range(args.rounds), machines, models)]
    for n, (device, dtype), (name, paths, config) in tqdm(jobs, "measuring", leave=False, disable=None):
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        if len(measured := peaks[device, dtype]) == n:
            measured.append(ceilings(device, DTYPES[dtype]))
        torch.manual_seed(0)
        with torch.device(device):
            model = (loaded[paths[0]][0] if paths else GPT(config)).to(device, DTYPES[dtype]).eval()
        for batch, context in product(args.batch, contexts):
            row = measure(model, DTYPES[dtype], batch, context, device, args.compile, memory=n == 0)
            row |= about[(device, dtype), name]
            rounds.setdefault((device, dtype, name, batch, context), (config, []))[1].append(row)
        del model
    report = {"command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]), "machines": {}, "rows": []}
    for (device, dtype), measured in peaks.items():
        medians = {name: float(np.median([peak[name] for peak in measured])) for name in measured[0]}
        report["machines"][f"{device} {dtype}"] = medians | {"name": machine(device)}
    for (device, dtype, *_), (config, rows) in rounds.items():
        report["rows"].append(summarize(rows, config, report["machines"][f"{device} {dtype}"]))
    compare(report["rows"])
    print(tables(report, args.columns), advice(report["rows"]), sep="\n")
    (args.out / "bench.json").write_text(json.dumps(report, indent=1, default=float))
    draw(args.out / "bench.png", report)
    print(f"wrote {args.out / 'bench.json'} and {args.out / 'bench.png'}")


if __name__ == "__main__":
    run(main)
