"""What attention costs: the KV cache in bytes, decoding and training in tokens per second, and how near that comes to
what the machine can do.

    python bench.py                                      every variant, freshly initialised, in the 30m shape
    python bench.py out/ckpt.pt out/joint/ckpt.pt        trained models: their loss beside their cost; runs that differ
                                                         only in their seed share a row, with standard errors
    python bench.py --attn mha mla_decoupled --batch 1 8 64 --context 512 8192
    python bench.py --train                              training as well
    python bench.py --table bench.json                   the tables of an earlier run once more, in Markdown

A decode step has to read all weights and the cache once, and to multiply with them. The time that the slower of the two
would take at this machine's own speed, measured in the same run, is the roofline; "roofline" is its share of the time
that was taken. "expanded" makes keys and values of all cached latents at every step; "absorbed" attends to the latents
(mla_rope cannot). Tokens per second are those of all sequences of the batch together.
"""

import json
import math
import os
import platform
import sys
import time
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data.common import DATA, InputError, Parser, check_device, fast_bfloat16, load_data, load_tokenizer, run
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
COLUMNS = {  # key of a row: heading, format, what it is
    "parameters": ("params", "{:,.1f}M", "parameters, in millions, without a table of positions"),
    "kv_bytes": ("KV B/tok", "{:,.0f}", "bytes of cache per token, as allocated"),
    "cut": ("cut", "{:.0%}", "of the cache, against mha"),
    "expanded": ("expanded", "{:,.0f}", "decoded tokens/s, making keys and values of all latents at every step"),
    "absorbed": ("absorbed", "{:,.0f}", "decoded tokens/s, attending to latents"),
    "spread": (
        "spread",
        "±{:.0%}",
        "half the distance between the fastest and the slowest round; this and what follows "
        "is of the faster of the two ways",
    ),
    "to_mha": ("/ mha", "{:.2f}", "tokens/s over those of mha"),
    "to_full": ("/ rank 1", "{:.2f}", "tokens/s over those of the same variant at rank 1"),
    "gb": ("GB/s", "{:.1f}", "weights and cache, read once a step"),
    "gflop": ("GFLOP/s", "{:,.0f}", "of matrix products"),
    "roofline": ("roofline", "{:.0%}", "share of what this machine could do"),
    "train": ("train", "{:,.0f}", "trained tokens/s, with --train"),
    "to_float32": ("/ float32", "{:.2f}", "trained tokens/s over those in plain float32"),
    "runs": ("seeds", "{}", "runs that differ in nothing else: means, ± standard errors between runs"),
    "val_loss": ("val", "{:.4f}", "validation loss, nats per token"),
    "excess": ("excess", "{:.4f}", "of it over the floor"),
    "loss_to_mha": ("vs mha", "{:+.1%}", "of it against mha"),
    "grammar": (
        "grammar",
        "{:.1f}",
        "with --judge: of sampled stories, 0 to 10; of a single run, ± is between stories",
    ),
    "consistency": ("consist.", "{:.1f}", "likewise"),
    "copied": ("copied", "{:.0%}", "longest run of words from a training story, as a share of the sampled story"),
    "recall": (
        "recall",
        "{:.1%}",
        "with --judge: probability of the right word, among all of its kind, where an unseen story recalls a fact and "
        "has used two such words or more",
    ),
    "chance": ("chance", "{:.1%}", "recall of a guess among all words of the kind"),
    "copying": ("copying", "{:.1%}", "recall of a guess among those that the story has used"),
    "lost": ("forgotten", "{:.4f}", "excess at words that the story decides, in the first 300 unseen stories"),
}
GROUP = ("device", "dtype", "batch", "context")  # rows that share these stand in one table
DISTANCES = (0, 16, 32, 64, 128)  # tokens: where the bins of the recall curve begin


# What the machine can do ----------------------------------------------------------------------------------------------


def seconds(function, device, repeats=3):
    """Times of `repeats` calls after a warm-up; of one without it where that takes over half a second."""
    on_cuda = device.startswith("cuda")
    times = []
    while len(times) < repeats + 3 * on_cuda + 1:  # on CUDA a graph is compiled, recorded and replayed first
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
            times.append(time.perf_counter() - begin)
            if times[0] > 0.5:
                break
    return np.array(times[-repeats:])


def ceilings(device, dtype):
    """Bytes/s read from memory, and FLOP/s of a matrix product: the best of several tries."""
    numbers = torch.ones(2**27 if device == "cpu" else 2**30, device=device)
    bandwidth = numbers.nbytes / seconds(numbers.sum, device, 9).min()
    size = 2048 if device == "cpu" else 8192
    a = torch.randn(size, size, device=device).to(dtype)
    return bandwidth, 2 * size**3 / seconds(lambda: a @ a, device, 9).min()


def in_proc(file, key):
    """What Linux tells of this machine: the value in the first line of /proc/<file> with this key, or None."""
    try:
        lines = (line.partition(":") for line in Path("/proc", file).read_text().splitlines())
        return next((value.strip() for name, _, value in lines if name.strip() == key), None)
    except OSError:
        return None


def machine(device):
    """In words."""
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    name = in_proc("cpuinfo", "model name") or platform.processor() or platform.machine()
    return f"{torch.get_num_threads()} threads on {name}, torch {torch.__version__}"


# What a variant costs -------------------------------------------------------------------------------------------------


def decode_cost(config, parameters, batch, context, itemsize, absorbed):
    """Bytes that a decode step has to read, and FLOPs that it has to do, for `context` tokens attended to.

    Weights and cache count once; parameters are those without a table of positions, of which a step reads one row."""
    d, h, H, L = config.n_embd, config.head_dim, config.n_head, config.n_layer
    r, R = config.latent_dim, config.rope_dim or 0
    expand = 0  # FLOPs per cached token and layer, to make what is not cached of all but the new token
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
    """A rank in words: 1/2, or 0.3."""
    return f"1/{round(1 / row['rank'])}" if (1 / row["rank"]).is_integer() else str(row["rank"])


def name_of(row):
    name = row["attn"] + (f" {rank_of(row)}" if row["rank"] else "") + (" joint" if row["joint"] else "")
    return name + (" norm" if row.get("latent_norm") else "") + (f" q={row['q_rank']:g}" if row.get("q_rank") else "")


def speed(row):
    """Decoded tokens/s, the faster of the two ways."""
    return max(row["expanded"], row.get("absorbed") or 0)


def alike(rows, row, names):
    """Those of the rows that have the same as this one in the columns of these names."""
    return [r for r in rows if all(r.get(name) == row.get(name) for name in names)]


def check_memory(config, batch, context, dtype, device):
    """Raise InputError, before anything is allocated, if the weights, made in float32, and the cache will not fit."""
    with torch.device("meta"):
        model = GPT(config)
    weights = sum(p.numel() for p in model.parameters()) * (4 + dtype.itemsize)
    cache = batch * context * model.kv_bytes_per_token(dtype)
    made = 4 * batch * context * (config.n_embd + config.n_head * (config.rope_dim or 0)) * dtype.itemsize  # expanding
    needed = 1.2 * (weights + cache + made)
    if device.startswith("cuda"):
        free = torch.cuda.mem_get_info(device)[0]
    elif available := in_proc("meminfo", "MemAvailable"):  # what processes can have, in kB
        free = int(available.split()[0]) * 1024
    else:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free:
        raise InputError(
            f"--batch={batch} --context={context}: {config.attn} would need {needed / 1e9:.1f} GB on {device}, where "
            f"{free / 1e9:.1f} GB are free; choose less"
        )


@torch.no_grad()
def decode(model, batch, context, absorb, device):
    """Time a step that decodes one token for each sequence with `context` tokens cached: its seconds, and the cache's
    bytes per token. On CUDA the step is compiled into one graph, without Python in between."""
    cache = model.init_cache(batch, absorb)
    cache.reserve(context + 1)
    for layer in cache.layers:
        for tensor in layer.values():
            tensor.copy_(torch.randn(tensor.shape[-2:]))  # the same in all sequences and layers
            torch._dynamo.mark_static_address(tensor, guard=False)  # a promise: CUDA graphs write to fixed addresses
    token = torch.zeros(batch, 1, dtype=torch.long, device=device)
    positions = torch.tensor([context], device=device)
    hidden = model.hidden
    if device.startswith("cuda"):
        torch._dynamo.reset()  # a graph is compiled for each cache: forget those of caches that are gone
        hidden = torch.compile(model.hidden, mode="reduce-overhead", fullgraph=True)

    def step():
        logits = F.linear(hidden(token, positions, cache)[:, -1], model.token_embedding.weight)
        token.copy_(logits.argmax(-1, keepdim=True))

    return np.median(seconds(step, device)), cache.nbytes / (batch * cache.size)


def train(config, dtype, device, batch=32, context=128):
    """Trained tokens/s: forward, backward, AdamW."""
    model = GPT(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(config.vocab_size, (batch, context + 1), device=device)

    def step():
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(tokens[:, :-1], tokens[:, 1:])[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return batch * context / np.median(seconds(step, device))


def measure(model, dtype, batch, context, device, ceiling):
    """A row of the table: what one model costs at one batch and context."""
    config = model.config
    parameters = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("position"))
    row = {"attn": config.attn, "rank": config.rank, "joint": config.joint, "parameters": parameters / 1e6}
    row |= {"batch": batch, "context": context, "dtype": str(dtype)[6:], "device": device}
    shape = ("n_layer", "n_head", "n_embd", "vocab_size", "latent_norm", "q_rank")
    row |= {name: getattr(config, name) for name in shape}
    for way, absorb in (("expanded", False), ("absorbed", True))[: 1 + (config.attn in ABSORBS)]:
        taken, row["kv_bytes"] = decode(model, batch, context, absorb, device)
        row[way] = batch / taken
    row["speed"] = speed(row)
    taken, absorbed = batch / row["speed"], row["speed"] == row.get("absorbed")
    read, flops = decode_cost(config, parameters, batch, context + 1, dtype.itemsize, absorbed)
    row["gb"], row["gflop"] = read / taken / 1e9, flops / taken / 1e9
    row["roofline"] = max(read / ceiling["bytes_per_s"], flops / ceiling["flop_per_s"]) / taken
    if row["kv_bytes"] != model.kv_bytes_per_token(dtype):
        raise RuntimeError(f"{name_of(row)}: {row['kv_bytes']} bytes per token, not what the formula says")
    return row


# What trained models have learnt --------------------------------------------------------------------------------------


def sample(model, tokenizer, count, temperature=0.8, seed=0):
    """Stories that a model tells from their first word on, as texts."""
    end, texts = tokenizer.eot_token, []
    device = model.token_embedding.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    while len(texts) < count:
        idx = torch.full((min(64, count), 1), end, device=device)
        room = model.config.block_size - 1
        stories = model.generate(idx, room, temperature, generator=generator, stop=end)[:, 1:].tolist()
        texts += [tokenizer.decode(s[: s.index(end)] if end in s else s) for s in stories]
    return texts[:count]


def judged(loaded, count, device):
    """{path: (model, checkpoint)} -> {path: columns of a row}: scores of `count` stories of each, and its recall.

    Raises InputError if one was trained on something else than data/stories."""
    meta, *_ = data = load_data(DATA / "stories")
    same = ("source", "stories", "seed", "world", "tokenizer")
    for path, (_, checkpoint) in loaded.items():
        trained_on = checkpoint.get("meta")
        if type(trained_on) is not dict or any(trained_on.get(key) != meta[key] for key in same):
            raise InputError(f"--judge: {path} was not trained on what is in {DATA / 'stories'}; leave out --judge")
    tokenizer = load_tokenizer(meta["tokenizer"])
    told, rows = [], {}
    for path, (model, _) in (bar := tqdm(loaded.items(), leave=False)):
        bar.set_postfix_str(f"{path} tells {count} stories")
        told += sample(model.to(device), tokenizer, count)
        found, numbers = recall(model, data, 300)
        asked, bins = found["asked"], np.digitize(found["distance"], DISTANCES) - 1
        curve = []
        for i in range(len(DISTANCES)):
            here = asked & (bins == i)
            means = [mean_and_error(found[name][here])[0] for name in ("chance", "copying")]
            curve.append([int(here.sum()), *mean_and_error(found["p"][here], found["story"][here]), *means])
        del numbers["excess"]  # of these stories alone
        rows[path] = numbers | {"recall_curve": curve}
    for name, values in judge(told, data)[0].items():
        for path, of_one in zip(loaded, values.reshape(-1, count), strict=True):
            rows[path][name], rows[path][f"{name}_error"] = mean_and_error(of_one)
    return rows


# The comparison -------------------------------------------------------------------------------------------------------


def seeds_apart(loaded):
    """{path: (model, checkpoint)} -> lists of paths: those of runs that differ in nothing but their seed."""
    groups = {}
    for path, (model, checkpoint) in loaded.items():
        options = checkpoint.get("options")
        options = options if type(options) is dict else {"unknown": path}
        ways = [
            f"{k}={v}" for k, v in options.items() if k not in ("seed", "data", "out", "resume", "device", "compile")
        ]
        key, seed = repr((model.config, sorted(ways), checkpoint.get("meta"))), repr(options.get("seed"))
        if seed in groups.get(key, ()):  # the same run twice is no second sample
            key = path
        groups.setdefault(key, {})[seed] = path
    return [list(group.values()) for group in groups.values()]


def learnt(checkpoint):
    """Its loss, and its excess over the floor: columns of a row, as far as it says."""
    known = {name: checkpoint[name] for name in ("val_loss", "floor") if type(checkpoint.get(name)) is float}
    excess = known["val_loss"] - known["floor"] if len(known) == 2 else None
    return {"val_loss": known.get("val_loss"), "excess": excess}


def mean_of(runs):
    """Columns of several runs -> their means, and standard errors between runs. One run is left as it is."""
    if len(runs) == 1:
        return runs[0]
    row = {}
    for name in (name for name in runs[0] if not name.endswith("_error")):
        values = [one.get(name) for one in runs]
        if name == "recall_curve":
            columns = zip(*values, strict=True)
            row[name] = [
                [b[0][0], *mean_and_error([run[1] for run in b if run[1] is not None]), *b[0][3:]] for b in columns
            ]
        elif None not in values:
            row[name], row[f"{name}_error"] = mean_and_error(values)
    return row


def median(rounds):
    """One row of several of the same job: the median of each number, and how far apart the speeds are."""
    speeds = [row["speed"] for row in rounds]
    row = {k: float(np.median([r[k] for r in rounds])) if isinstance(v, float) else v for k, v in rounds[0].items()}
    return row | {"spread": (max(speeds) - min(speeds)) / 2 / row["speed"]}


def compare(rows):
    """Add the columns that relate rows to mha and to rank 1: to the first such of the same shape, batch, context, dtype
    and device."""
    same = (*GROUP, "n_layer", "n_head", "n_embd", "vocab_size")
    for row in rows:
        for r in reversed(alike(rows, row, same)):  # the first of several has the last word
            if r["attn"] == "mha":
                row["cut"] = 1 - row["kv_bytes"] / r["kv_bytes"]
                row["to_mha"] = speed(row) / speed(r)
                if row.get("val_loss") and r.get("val_loss"):
                    row["loss_to_mha"] = row["val_loss"] / r["val_loss"] - 1
                    row["loss_to_mha_error"] = None  # of an mha further down
                    if row is not r and None not in (row.get("val_loss_error"), r.get("val_loss_error")):
                        relative = math.hypot(*(one["val_loss_error"] / one["val_loss"] for one in (row, r)))
                        row["loss_to_mha_error"] = relative * row["val_loss"] / r["val_loss"]
            options = ("attn", "joint", "latent_norm", "q_rank")
            if row["rank"] and r["rank"] == 1.0 and all(r.get(name) == row.get(name) for name in options):
                row["to_full"] = speed(row) / speed(r)
    return rows


# What a reader sees ---------------------------------------------------------------------------------------------------


def cells(rows, columns):
    """Headings and rows as strings: the name of the variant, and the columns that hold anything."""
    columns = [c for c in columns if any(row.get(c) is not None for row in rows)]
    lines = [["attn", *(COLUMNS[c][0] for c in columns)]]
    for row in rows:
        told = [row.get("name") or name_of(row)]
        for c in columns:
            value, error, style = row.get(c), row.get(f"{c}_error"), COLUMNS[c][1]
            told.append("" if value is None else style.format(value))
            if error is not None:
                told[-1] += "±" + style.replace("+", "").format(error)
        lines.append(told)
    return lines


def tables(report, columns, markdown=False):
    """The report that bench.json holds, as text: a table for each device, dtype, batch and context."""
    text = []
    for group in dict.fromkeys(tuple(row[name] for name in GROUP) for row in report["rows"]):
        device, dtype, batch, context = group
        rows = alike(report["rows"], dict(zip(GROUP, group, strict=True)), GROUP)
        ceiling = report["machines"][f"{device} {dtype}"]
        text.append(
            f"{context:,} tokens cached, batch {batch}, {dtype}; {ceiling['name']}: "
            f"{ceiling['bytes_per_s'] / 1e9:.1f} GB/s, {ceiling['flop_per_s'] / 1e9:,.0f} GFLOP/s"
        )
        lines = cells(rows, columns)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
        if markdown:
            lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
            text.append("\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n")
        else:
            text.append("\n".join("  ".join(line) for line in lines) + "\n")
    return "\n".join(text)


def advice(rows):
    """What the longest context of the first device, dtype and batch says, in words."""
    longest = max(rows, key=lambda row: row["context"])
    rows = alike(rows, longest, GROUP)
    fastest, smallest = max(rows, key=speed), min(rows, key=lambda row: row["kv_bytes"])
    lines = []
    for what, row in (("fastest", fastest), ("smallest cache", smallest)):
        against = f", {row['to_mha']:.1f} times mha" if row.get("to_mha") else ""
        told = f"{speed(row):,.0f} tokens/s{against}, {row['kv_bytes']:,.0f} bytes per token"
        lines.append(f"{what}: {name_of(row)}, {told}")
    return f"with {longest['context']:,} tokens cached, batch {longest['batch']}:\n  " + "\n  ".join(lines)


def draw(path, report):
    """What was measured of the first device, dtype and batch: loss against cache, recall, speed against context."""
    from matplotlib.figure import Figure

    rows = alike(report["rows"], report["rows"][0], ("device", "dtype", "batch"))
    panels = [draw_loss] if any(r.get("val_loss") is not None for r in rows) else []
    panels += [draw_recall] if any(r.get("recall_curve") for r in rows) else []
    panels += [draw_speed] if len({r["context"] for r in rows}) > 1 or not panels else []
    figure = Figure(figsize=(9, 4.2 * len(panels)), layout="constrained")
    for panel, axes in zip(panels, figure.subplots(len(panels), 1, squeeze=False)[:, 0], strict=True):
        panel(axes, rows)
        axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)


def style_of(row):
    """One colour for each variant, in all figures; joint ones are dashed, with squares."""
    return dict(color=COLOURS[row["attn"]]) | (dict(ls="--", marker="s") if row["joint"] else dict(ls="-", marker="o"))


def draw_loss(axes, rows):
    """A line for each variant, through its ranks; a row is there once for each context, with the same loss."""
    loss = "excess" if all(r.get("excess") is not None for r in rows) else "val_loss"
    least = min(r["context"] for r in rows)
    rows = sorted((r for r in rows if r["context"] == least and r.get(loss) is not None), key=lambda r: r["kv_bytes"])
    for attn, joint in sorted({(r["attn"], r["joint"]) for r in rows}, key=lambda way: (ATTN.index(way[0]), way[1])):
        mine = [r for r in rows if (r["attn"], r["joint"]) == (attn, joint)]
        columns = [[r[key] for r in mine] for key in ("kv_bytes", loss)]
        errors = [r.get(f"{loss}_error") or 0 for r in mine]
        style = style_of(mine[0])
        if len({r["rank"] for r in mine}) < len(mine):  # runs of one rank that differ in something else
            style["ls"] = "none"
        axes.errorbar(*columns, errors, **style, capsize=3, label=attn + (" joint" if joint else ""))
        for r in mine:
            if r["rank"]:
                axes.annotate(rank_of(r), (r["kv_bytes"], r[loss]), (4, 5), textcoords="offset points", fontsize=9)
    axes.set(xscale="log", xlabel=f"KV cache, bytes per token in {rows[0]['dtype']}")
    axes.set(ylabel=f"{'excess over the floor' if loss == 'excess' else 'loss'}, nats per token")
    ticks = sorted({r["kv_bytes"] for r in rows})
    for tick, after in zip(ticks[:-1], ticks[1:], strict=True):
        if after < 1.2 * tick:  # their numbers would run into each other
            ticks.remove(after)
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.minorticks_off()
    axes.set_title("Loss against cache: lower left is better", fontsize=10)


def curves(rows):
    """Rows -> those of each name, by context; of many names, those with the rank 1/2 or none."""
    names = {}
    for r in sorted(rows, key=lambda r: r["context"]):
        names.setdefault(r.get("name") or name_of(r), []).append(r)
    usual = {n: mine for n, mine in names.items() if mine[0]["rank"] in (None, 0.5)}
    return usual if usual and len(names) > 8 else names


def draw_recall(axes, rows):
    for name, (row, *_) in curves(r for r in rows if r.get("recall_curve")).items():
        _, p, error, chance, copying = np.array(row["recall_curve"], dtype=float).T
        axes.errorbar(range(len(p)), p, np.nan_to_num(error), **style_of(row), capsize=3, label=name)
    axes.plot(copying, "k--", lw=1, label="copying")
    axes.plot(chance, "k:", lw=1, label="chance")
    bins = [f"{low}–{high - 1}" for low, high in zip(DISTANCES, DISTANCES[1:], strict=False)]
    axes.set_xticks(range(len(DISTANCES)), [*bins, f"{DISTANCES[-1]}–"])
    axes.set(xlabel="tokens since it was last said", ylabel="probability of the right word", ylim=(0, None))
    axes.set_title("Recall in unseen stories", fontsize=10)


def draw_speed(axes, rows):
    for name, mine in curves(rows).items():
        axes.plot([r["context"] for r in mine], [speed(r) for r in mine], **style_of(mine[0]), label=name)
    contexts = sorted({r["context"] for r in rows})
    axes.set(xscale="log", yscale="log", xlabel="tokens cached", ylabel="decoded tokens/s, the faster way")
    axes.set_xticks(contexts, [f"{c:,}" for c in contexts])
    axes.minorticks_off()
    axes.set_title(f"Decoding, batch {rows[0]['batch']}, {rows[0]['dtype']}: the cost of a long context", fontsize=10)


def build(config, dtype, device):
    torch.manual_seed(0)
    with torch.device(device):
        return GPT(config).to(device, dtype).eval()


def parse_arguments():
    example = "example: python bench.py --attn mha mla_decoupled --batch 1 8 --context 512 4096 8192"
    parser = Parser(description=__doc__.split("\n\n")[0], epilog=example)
    add = parser.add_argument
    add("checkpoints", nargs="*", help="of train.py; none: every variant, freshly initialised")
    add("--attn", nargs="+", choices=ATTN, default=ATTN, metavar="ATTN", help="variants (all)")
    add("--size", choices=SIZES, default="30m", help="shape of fresh models (%(default)s)")
    add("--batch", nargs="+", type=int, default=[8], help="sequences decoded at once (8)")
    add("--context", nargs="+", type=int, help="tokens cached (512 and 4096; a checkpoint's own)")
    text = f"of weights and cache: {', '.join(DTYPES)} (bfloat16 where it is fast)"
    add("--dtype", nargs="+", choices=DTYPES, metavar="DTYPE", help=text)
    add("--device", nargs="+", help="cpu, cuda, ... (cuda where there is one)")
    add("--rounds", type=int, default=3, help="through all that is measured; medians count (%(default)s)")
    add("--train", action="store_true", help="measure training too: batch 32, context 128")
    add("--judge", type=int, metavar="N", help="score N stories that each checkpoint tells, and its recall")
    text = "; ".join(f"{name}: {what}" for name, (_, _, what) in COLUMNS.items()).replace("%", "%%")
    add("--columns", nargs="+", choices=COLUMNS, default=COLUMNS, metavar="COLUMN", help=text)
    add("--out", type=Path, default=Path("."), help="folder for bench.json and bench.png (here)")
    add("--table", type=Path, metavar="FILE", help="print the tables of a bench.json in Markdown, and stop")
    args = parser.parse_args()
    if args.table:
        return args
    for name in ("batch", "context", "rounds", "judge"):
        given = getattr(args, name)
        if given is not None and np.min(given) < 1:
            raise InputError(f"--{name}: must be at least 1")
    if args.judge and not args.checkpoints:
        raise InputError("--judge: name the checkpoints whose stories shall be judged")
    if args.checkpoints and (args.attn is not ATTN or args.size != "30m"):
        raise InputError("--attn, --size: choose among fresh models; leave them out where checkpoints are given")
    if args.out.exists() and not args.out.is_dir():
        raise InputError(f"--out={args.out}: must be a folder")
    args.batch = list(dict.fromkeys(args.batch))
    args.device = args.device or ["cuda" if torch.cuda.is_available() else "cpu"]
    return args


def choose_models(args, loaded):
    """What is to be measured -> [(its name, paths of its checkpoints, GPTConfig), ...], and the contexts."""
    if loaded:
        contexts = args.context or [min(model.config.block_size for model, _ in loaded.values()) - 1]
        for path, (model, _) in loaded.items():
            if max(contexts) >= (most := model.config.block_size):
                raise InputError(f"--context={max(contexts)}: {path} has a context of {most}, the new token included")
        groups = [(paths, loaded[paths[0]][0].config) for paths in seeds_apart(loaded)]
        names = [name_of(asdict(config)) for _, config in groups]
        return [
            (name if names.count(name) == 1 else paths[0], paths, config)
            for name, (paths, config) in zip(names, groups, strict=True)
        ], contexts
    contexts = args.context or [512, 4096]
    shape = SIZES[args.size] | dict(block_size=max(contexts) + 1, vocab_size=4096)
    configs = [
        GPTConfig(attn=attn, rank=rank, joint=joint, **shape)
        for attn, rank, joint in VARIANTS
        if attn in args.attn and not (attn == "gqa" and rank * shape["n_head"] < 1)
    ]
    return [(name_of(asdict(config)), [], config) for config in configs], contexts


def main():
    args = parse_arguments()
    if args.table:
        try:
            print(tables(json.loads(args.table.read_text()), args.columns, markdown=True))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise InputError(f"--table={args.table}: cannot be read as a bench.json: {error!r}") from error
        return
    for device in args.device:
        check_device(device)
    loaded = {path: load_checkpoint(path) for path in args.checkpoints}
    models, contexts = choose_models(args, loaded)
    dtypes = {device: args.dtype or ["bfloat16" if fast_bfloat16(device) else "float32"] for device in args.device}
    jobs = [(device, DTYPES[dtype], *model) for device in args.device for dtype in dtypes[device] for model in models]
    for device, dtype, _, _, config in jobs:
        check_memory(config, max(args.batch), max(contexts), dtype, device)

    args.out.mkdir(parents=True, exist_ok=True)  # now, lest a failure lose what was measured
    command = " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    report = {"command": command, "machines": {}}
    scores = judged(loaded, args.judge, args.device[0]) if args.judge else {}
    # In rounds, so that minutes in which the machine is busy with something else do not fall on one variant.
    rounds = [{} for _ in range(args.rounds)]
    for rows, (i, job) in (bar := tqdm([*product(rounds, enumerate(jobs))], leave=False)):
        device, dtype, name, paths, config = job
        key = f"{device} {str(dtype)[6:]}"
        if key not in report["machines"]:
            bytes_per_s, flop_per_s = ceilings(device, dtype)
            report["machines"][key] = {"name": machine(device), "bytes_per_s": bytes_per_s, "flop_per_s": flop_per_s}
        model = loaded[paths[0]][0].to(device, dtype) if paths else build(config, dtype, device)
        about = {}
        if paths:
            about = {"paths": paths, "name": name, "runs": len(paths)}
            about |= mean_of([learnt(loaded[path][1]) | scores.get(path, {}) for path in paths])
        if args.train:
            short = replace(config, block_size=128)
            about["train"] = train(short, dtype, device)
            about["to_float32"] = about["train"] / train(short, torch.float32, device)
        for batch, context in product(args.batch, contexts):
            bar.set_postfix_str(f"{name} {context}")
            rows[i, batch, context] = measure(model, dtype, batch, context, device, report["machines"][key]) | about
        del model
    report["rows"] = compare([median([rows[job] for rows in rounds]) for job in rounds[0]])
    print(tables(report, args.columns))
    print(advice(report["rows"]))
    (args.out / "bench.json").write_text(json.dumps(report, indent=1, default=float))
    draw(args.out / "bench.png", report)
    print(f"wrote {args.out / 'bench.json'} and {args.out / 'bench.png'}")


if __name__ == "__main__":
    run(main)
