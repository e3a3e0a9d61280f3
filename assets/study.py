"""Score the runs of assets/study.sh, print the tables of assets/study.md, and draw its figures.

    python assets/study.py study/cpu

Reads and writes in that folder: scores.json beside each checkpoint (made once), study.json, tables.md and the figures.
"""

import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench import COLOURS, cells, draw_loss, judged, mean_of, name_of
from data.common import load_data
from data.judge import recall
from model import load_checkpoint
from spectrum import NULLS, diagnose, haar, laws, qk_factors, spectra, spiked

DISTANCES = (0, 16, 32, 64, 128)  # tokens since a word was last mentioned: from each to the next
STORIES = 50  # to judge, of each model
LEARNT = ("runs", "kv_bytes", "val_loss", "excess", "lost", "recall", "grammar", "consistency", "copied")
SPECTRA = {"effective rank": ".1f", "share of n": ".0%", "of the null's": ".0%", "spiked": ".0%", "MP-gap": ".3g"}
SPECTRA |= {"MP-gap rotated": ".3g", "beyond chain": ".0%", "beyond mp": ".0%"}
RECIPE = ("attn", "rank", "joint", "latent_norm", "q_rank", "kv_bytes", "optimizer", "lr", "steps", "source", "data")


def score(folder):
    """A finished run -> {name: number or list}: what it has learnt, and its spectra (lists: one number a layer)."""
    if (file := folder / "scores.json").exists():
        return json.loads(file.read_text())
    model, checkpoint = load_checkpoint(folder / "ckpt.pt")
    config, options, meta = model.config, checkpoint["options"], checkpoint["meta"]
    found = {name: options[name] for name in ("seed", "optimizer", "lr", "steps", "data")} | {"run": str(folder)}
    found |= {name: getattr(config, name) for name in ("attn", "rank", "joint", "latent_norm", "q_rank")}
    found |= {"source": options["init_from"], "kv_bytes": model.kv_bytes_per_token(torch.bfloat16)}
    found |= {"val_loss": checkpoint["val_loss"]}
    if checkpoint["floor"] is None:  # real text
        found["bits_per_byte"] = checkpoint["val_loss"] * meta["val_tokens"] / meta["val_bytes"] / math.log(2)
    else:
        words, numbers = recall(model, load_data("stories"))
        found |= numbers | {"excess": checkpoint["val_loss"] - checkpoint["floor"]}
        scores = judged({folder: (model, checkpoint)}, STORIES, "stories", "cpu")[folder]
        found |= {name: scores[name] for name in ("grammar", "consistency", "copied")}
        far = np.digitize(words["distance"], DISTANCES[1:])
        for name in ("p", "copying", "chance"):
            by_distance = [words[name][words["asked"] & (far == i)].mean() for i in range(len(DISTANCES))]
            found[f"{name} by distance"] = by_distance
    for part, values in spectra(model).items():
        chain, mp = (laws(config, null)[part] for null in NULLS)
        diagnosed = diagnose(values, chain)
        found[f"{part}: effective rank"] = diagnosed["effective_rank"].mean(1)
        found[f"{part}: share of n"] = diagnosed["effective_rank_share"].mean(1)
        if chain:
            found[f"{part}: of the null's"] = diagnosed["effective_rank_of_null"].mean(1)
            turned = [haar(qk_factors(block.attn)[part], 20) for block in model.blocks]
            found[f"{part}: spiked"] = spiked(diagnosed["p"]).astype(float)
            found[f"{part}: beyond chain"] = diagnosed["outlier_share"].mean(1)
            found[f"{part}: beyond mp"] = diagnose(values, mp)["outlier_share"].mean(1)
            found[f"{part}: MP-gap"] = diagnosed["mp_gap"].mean(1)
            found[f"{part}: MP-gap rotated"] = diagnose(np.stack(turned, 1), chain)["mp_gap"].mean((0, 2))
    file.write_text(json.dumps(found, default=lambda array: np.asarray(array).tolist()))
    return json.loads(file.read_text())


def group(runs):
    """Runs -> rows: means and standard errors of the runs that differ only in their seed."""
    groups = {}
    for run in runs:
        groups.setdefault(tuple(run[name] for name in RECIPE), []).append(run)
    rows = []
    for recipe, members in groups.items():
        numbers = [{k: v for k, v in run.items() if isinstance(v, float | int) and k not in RECIPE} for run in members]
        lists = {k: np.mean([run[k] for run in members], 0) for k, v in members[0].items() if isinstance(v, list)}
        row = {"bits_per_byte_error": math.nan} | dict(zip(RECIPE, recipe, strict=True)) | mean_of(numbers) | lists
        row |= {"runs": len(members), "name": name_of(row) + " adamw" * (row["optimizer"] == "adamw")}
        rows.append(row)
    return rows


def markdown(lines):
    first, *rest = lines
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [first, ["---"] * len(first), *rest]) + "\n"


def spectra_table(rows):
    """The spectra of each row, a line for each part and level; means over layers, heads and seeds."""
    lines = [["attn", "part", *SPECTRA]]
    for row in rows:
        for part in sorted({name.split(":")[0] for name in row if ": " in name}):
            found = [row.get(f"{part}: {name}") for name in SPECTRA]
            told = (
                "" if x is None else format(np.mean(x), style) for x, style in zip(found, SPECTRA.values(), strict=True)
            )
            lines.append([row["name"], part, *told])
    return markdown(lines)


def draw_recall(path, rows):
    """Recall against distance, with what copying and guessing give."""
    axes = Figure(figsize=(9, 4.5), layout="constrained").subplots()
    labels = [f"{a}-{b - 1}" for a, b in zip(DISTANCES, DISTANCES[1:], strict=False)] + [f"{DISTANCES[-1]}+"]
    for row in rows:
        dashes = ":" if row["optimizer"] == "adamw" else "--" if row["joint"] else "-"
        axes.plot(labels, row["p by distance"], "o", color=COLOURS[row["attn"]], ls=dashes, ms=4, label=row["name"])
    for name, style in (("copying", "k--"), ("chance", "k:")):
        axes.plot(labels, rows[0][f"{name} by distance"], style, linewidth=1, label=name)
    axes.set(xlabel="tokens since the word was last mentioned", ylabel="recall", ylim=(0, 1))
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.figure.savefig(path, dpi=120)


def draw_conversions(path, rows, converted):
    """Loss against rank: converted, after a short training, and trained from scratch; a panel for each source."""
    sources = sorted({row["source"] for row in converted}, reverse=True)
    panels = Figure(figsize=(9, 3.8), layout="constrained").subplots(1, len(sources), squeeze=False, sharey=True)[0]
    for axes, source in zip(panels, sources, strict=True):
        mine = [row for row in converted if row["source"] == source]
        for joint, steps in sorted({(row["joint"], row["steps"]) for row in mine}):
            line = [(r["rank"], r["bits_per_byte"]) for r in mine if (r["joint"], r["steps"]) == (joint, steps)]
            label = ("joint, " if joint else "separate, ") + (f"{steps} more steps" if steps else "converted")
            axes.plot(*zip(*sorted(line), strict=True), "s" if joint else "o", ls="-" if steps else "--", label=label)
        scratch = [r for r in rows if r["attn"] == mine[0]["attn"] and r["optimizer"] == "muon" and not r["joint"]]
        x, y, error = zip(*((r["rank"], r["bits_per_byte"], r["bits_per_byte_error"]) for r in scratch), strict=True)
        axes.errorbar(x, y, error, fmt="k^", capsize=3, label="trained from scratch")
        axes.set(xscale="log", xlabel="rank", title=f"{Path(source).parent.name.split('-')[0]} to {mine[0]['attn']}")
        axes.set_xticks([1, 3 / 4, 1 / 2, 1 / 4, 1 / 8], ["1", "3/4", "1/2", "1/4", "1/8"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("bits per byte")
    panels[-1].legend(fontsize=8)
    panels[0].figure.savefig(path, dpi=120)


def draw_cache(path, rows, ylabel):
    """Loss against cache bytes, of rows trained with Muon."""
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    draw_loss(axes := figure.subplots(), [row | {"context": 0, "dtype": "bfloat16"} for row in rows])
    sizes = sorted({row["kv_bytes"] for row in rows})
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=45)
    axes.minorticks_off()
    axes.set_ylabel(ylabel)
    for label in axes.texts:
        if label.get_text() == "mla_rope 1/2":  # beside gqa's
            label.set(position=(-4, -12), ha="right")
    axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)


def main(out):
    done = [path.parent for path in sorted(out.glob("*/printed")) if "\nnext:" in path.read_text()]
    runs = [score(folder) for folder in tqdm(done, disable=None)]
    rates = Counter((r["optimizer"], r["lr"]) for r in runs).most_common()
    usual = {optimizer: lr for (optimizer, lr), _ in reversed(rates)}  # the most common one
    stories, text, rates, converted = [], [], [], []
    for row in group(runs):
        other_rate = row["lr"] != usual[row["optimizer"]]
        kind = converted if row["source"] else stories if row["data"] == "stories" else rates if other_rate else text
        kind.append(row)
    for rows in (stories, text, rates):
        order = [*COLOURS].index
        rows.sort(key=lambda row: (row["optimizer"] != "muon", order(row["attn"]), row["joint"], -(row["rank"] or 0)))
    lines = [["attn", "KV B/tok", "seeds", "bits per byte", "vs mha_rope"]]
    reference = next(row for row in text if row["name"] == "mha_rope")
    for row in text:
        loss, error, base = row["bits_per_byte"], row["bits_per_byte_error"], reference["bits_per_byte"]
        scatter = math.hypot(error, reference["bits_per_byte_error"]) / base
        compared = "" if row is reference else f"{loss / base - 1:+.1%} ± {scatter:.1%}"
        lines.append([row["name"], f"{row['kv_bytes']:,}", row["runs"], f"{loss:.4f} ± {error:.4f}", compared])
    tables = [markdown(lines), spectra_table(text), markdown(cells(stories, LEARNT)), spectra_table(stories)]
    if converted:
        lines = [[r["source"], r["name"], r["steps"], f"{r['bits_per_byte']:.4f}"] for r in converted]
        tables += [markdown([["from", "to", "more steps", "bits per byte"], *lines])]
        draw_conversions(out / "conversions.png", text, converted)
    if rates:
        lines = [[r["name"], r["lr"], f"{r['bits_per_byte']:.4f}"] for r in rates]
        tables += [markdown([["attn", "lr", "bits per byte"], *lines])]
    (out / "study.json").write_text("[\n" + ",\n".join(map(json.dumps, runs)) + "\n]\n")
    (out / "tables.md").write_text("\n".join(tables))
    print(*tables, sep="\n")
    muon = [row | {"val_loss": row["bits_per_byte"], "val_loss_error": row["bits_per_byte_error"]} for row in text]
    draw_cache(out / "study.png", [row for row in muon if row["optimizer"] == "muon"], "bits per byte")
    draw_recall(out / "recall.png", stories)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
