"""The spectrum of W_Q W_K^T: what in it is chance, what is magnitude, and what is alignment.

Attention scores a pair of tokens by x M x'^T, with one M = W_Q W_K^T, (d, d), per head. Training writes structure into
M, and it shows as large eigenvalues of M M^T. Large compared with what? Three references answer:

    chain   the law of a product of Gaussian matrices with the shapes of W_Q, W_K and MLA's factors: chance
    mp      the law of Marchenko and Pastur, that of ONE Gaussian matrix: what the literature takes for chance
    haar    the model's own factors, with random rotations between them. What is left of a spike comes from the factors'
            own singular values (magnitude); what goes was how W_Q and W_K point at each other (alignment)

    python spectrum.py out/ckpt.pt         one model: tables, answers in words, spectrum.json, spectrum.png
    python spectrum.py out/a out/b         the learning dynamics of runs, side by side, from their spectrum.jsonl

Jha and Reagen 2025 (arXiv 2507.09394) brought the MP-gap, outlier count, outlier energy and soft rank to W_Q W_K^T.
Where their abstract leaves things open, this is our reading: the mp law has the ratio n/d for n eigenvalues; a law is
scaled so that its median is that of the eigenvalues; heads are looked at one by one, and whole layers beside them; RoPE
turns queries against keys, so each distance has an M of its own, and --distance chooses, 0 by default.

Sources: Burda, Jarosz, Livan, Nowak, Swiech 2010, arXiv 1007.3594 (chain); Roy and Vetterli 2007 (effective rank);
Martin and Mahoney 2021, arXiv 1810.01075 (soft and stable rank); Johnstone 2001 (the largest eigenvalue of chance).
"""

import json
import math
import os
import sys
import warnings
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize.elementwise import find_root
from scipy.special import entr
from scipy.stats import pearson3

from data.common import DATA, InputError, Parser, load_data, run
from model import GPT, LEARNED, MLA, GPTConfig, load_checkpoint

NULLS = ("chain", "mp")

# Null laws ------------------------------------------------------------------------------------------------------------


@cache
def chain_law(dims):
    """The law of the non-zero eigenvalues of M M^T, scaled to mean 1, for M a product of independent Gaussian matrices
    of shapes N_0 x N_1, N_1 x N_2, ...; dims = (N_0, N_1, ...). Exact as the dimensions grow in proportion (Burda et
    al. 2010). Two dimensions: Marchenko-Pastur. Raises ValueError unless dims are two or more whole numbers from 1."""
    if len(dims) < 2 or not all(n >= 1 and n % 1 == 0 for n in dims):
        raise ValueError(f"dims={dims}: must be two or more whole numbers from 1, the path of a product's shapes")
    return ChainLaw(dims)


class ChainLaw:
    """The law that chain_law gives: lower and upper edge, median; pdf(x), cdf(x), quantile(q) of numbers or arrays.

    Where the equation comes from: S-transforms of free factors multiply. Let n be the smallest dimension, c_i = n/N_i,
    and psi(lambda) = sum_k (k-th moment) / lambda^k. A Gaussian factor has S = 1 / (1 + c psi). By the definition of S,
    their product satisfies

        lambda = prod_i (1 + c_i psi) / psi    over all m + 1 dimensions.

    Which of the many roots is the law's? Write psi = rho e^(i angle). Lambda is real and positive where the angles of
    the factors 1 + c_i psi add up to that of psi. Their sum grows with rho, so each angle in (0, pi) has one such rho.
    On this curve lambda falls from the upper edge, at angle 0, to the lower one, at pi. The density is
    Im psi / (pi lambda)."""

    def __init__(self, dims):
        self.dims, self.n = tuple(dims), min(dims)
        c = self.n / np.sort(np.array(dims, dtype=float))
        angle = np.pi / 2 + (np.pi / 2 - 1e-6) * np.cos(np.linspace(0, np.pi, 4001))  # dense at both edges
        part = angle / len(c)
        low = np.log(np.sin(part) / np.sin(angle - part))  # log rho if all c_i were 1; if all were the least: high

        def surplus(log_rho, angle):
            return np.angle(1 + np.multiply.outer(c, np.exp(log_rho + 1j * angle))).sum(axis=0) - angle

        rho = np.exp(find_root(surplus, (low - 1e-9, low - np.log(c[-1]) + 1e-9), args=(angle,)).x)
        self.psi = rho * np.exp(1j * angle)
        factors = 1 + np.multiply.outer(c, self.psi)
        self.x = (np.prod(factors, axis=0) / self.psi).real  # ascending
        # The share below is the integral of psi dlog(lambda) = (m - sum_i 1 / (1 + c_i psi)) dpsi
        antiderivative = (len(c) - 1) * self.psi - np.tensordot(1 / c, np.log(factors), axes=1)
        self.share, self.log_density = np.clip(1 + antiderivative.imag / np.pi, 0, 1), self.psi.imag / np.pi
        self.lower, self.upper = float(self.x[0]) if c[1] < 1 else 0.0, float(self.x[-1])
        self.median = float(self.quantile(0.5))
        x = self.quantile((np.arange(self.n) + 0.5) / self.n)
        self.effective_rank = float(np.exp(entr(x / x.sum()).sum()))  # of n eigenvalues that follow the law

    def pdf(self, x):
        return np.interp(x, self.x, self.log_density / self.x, left=0, right=0)

    def cdf(self, x):
        return np.interp(x, self.x, self.share, left=0, right=1)

    def quantile(self, q):
        return np.interp(q, self.share, self.x)


@cache
def chance(dims):
    """Mean and standard deviation of log(largest eigenvalue / median) over 200 products of Gaussian matrices of these
    shapes, from a fixed seed. Shapes of more than 128 eigenvalues are drawn smaller, in proportion. That is on the safe
    side: the smaller the matrix, the further the largest eigenvalue strays beyond the law's edge."""
    shrink = max(1, min(dims) / 128)
    dims = [round(n / shrink) for n in dims]
    generator = torch.Generator().manual_seed(0)
    shapes = zip(dims, dims[1:], strict=False)
    x = eigenvalues([torch.randn((200, *shape), generator=generator) for shape in shapes])
    logs = np.log(x.max(-1) / np.median(x, -1))
    return logs.mean(), logs.std(ddof=1)


def p_value(eigenvalues, law):
    """The probability that chance makes the largest of the eigenvalues (..., n) as large, compared with their median.

    The tail beyond the 200 draws is that of a Pearson III law with their mean and deviation, and with the skewness of
    the law of Tracy and Widom, which the largest eigenvalue of a large random matrix follows."""
    mean, deviation = chance(law.dims)
    logs = np.log(eigenvalues.max(-1) / np.median(eigenvalues, -1))
    return pearson3.sf((logs - mean) / deviation, 0.2935)


# From a model to eigenvalues ------------------------------------------------------------------------------------------


def qk_factors(attention, distance=0):
    """An attention module -> {circuit: {"heads": factors, "layer": factors}}, factors [(H or 1, N_0, N_1), ...].

    The product of "heads" is each head's W_Q W_K^T, (H, d, d); that of "layer" is their sum, (1, d, d).
    Queries, then keys: two factors for MHA and GQA, three for MLA, four for mla_prerope. With q_rank, W_DQ comes first.
    A query stands `distance` tokens after its key, which is at position 0. Of a latent norm, the gain is in M; the norm
    also divides by the size of each token's latent, which no matrix can do. Only mla_decoupled has more than "content".
    """
    config, h, R = attention.config, attention.config.head_dim, attention.config.rope_dim
    weights = {name: module.weight.detach() for name, module in attention.named_children() if hasattr(module, "weight")}
    w = {name: weight.T if weight.dim() == 2 else weight for name, weight in weights.items()}  # matrices and gains
    for down, gain in (("w_dq", "norm_q"), ("w_dk", "norm_k")):
        w |= {down: w[down] * w[gain]} if gain in w else {}

    def by_head(matrix, width):  # (d, n * width) -> (n, d, width)
        return matrix.unflatten(1, (-1, width)).transpose(0, 1)

    def turned(queries):
        return attention.rope(queries, torch.tensor([distance])) if distance else queries

    def levels(q, k, *behind):  # q (H, d, w), k (K, w, r): H/K heads share keys, so that the layer adds their queries
        together = q.unflatten(0, (len(k), -1)).sum(1).transpose(0, 1).flatten(1), k.flatten(0, 1)
        heads = [*front, q, k.repeat_interleave(len(q) // len(k), 0), *behind]
        return {"heads": heads, "layer": [*front, *(part[None] for part in together), *behind]}

    front = [w["w_dq"][None]] if config.q_rank is not None else []
    q = by_head(w["w_uq" if front else "w_q"], h)
    if config.attn in ("mha_rope", "gqa", "mla_rope", "mla_prerope"):
        q = turned(q)
    if config.attn not in MLA:
        return {"content": levels(q, by_head(w["w_k"], h).mT)}
    behind = [w["w_dk"].T[None]] + ([w["w_k"].T[None]] if config.attn == "mla_prerope" else [])
    found = {"content": levels(q, by_head(w["w_uk"], h).mT, *behind)}
    if config.attn == "mla_decoupled":
        found["rotary"] = levels(turned(by_head(w["w_qr"], R)), w["w_kr"].T[None])
        found["both"] = {}
        for level, (*_, q, k, latent) in found["content"].items():  # [q | q_r] [k 0; 0 1] [latent; k_r]
            *_, q_r, k_r = found["rotary"][level]
            k = F.pad(k, (0, R, 0, R)) + F.pad(torch.eye(R, device=k.device), (k.size(-1), 0, k.size(-2), 0))
            found["both"][level] = [*front, torch.cat((q, q_r), -1), k, torch.cat((latent, k_r[:1]), -2)]
    return found


def eigenvalues(factors):
    """The non-zero eigenvalues of M M^T, M = W_1 W_2 ... W_m, largest first: (..., n) float64, n the least dimension.

    factors: tensors (..., N_0, N_1), (..., N_1, N_2), ... M is cut where it is narrowest, M = L R, and the eigenvalues
    are those of the n x n product (L^T L)(R R^T): nothing of the size of M is formed. NaN where a factor is not
    finite."""
    factors = [factor.detach().cpu().double() for factor in factors]
    finite = math.prod(factor.isfinite().all(-1).all(-1) for factor in factors).bool()
    factors = [factor.nan_to_num(0, 0, 0) for factor in factors]
    dims = [factors[0].size(-2), *(factor.size(-1) for factor in factors)]
    cut = dims.index(min(dims))
    left = right = torch.eye(dims[cut], dtype=torch.float64)
    for i, w in enumerate(factors[:cut]):
        left = w.mT @ left @ w if i else w.mT @ w
    for i, w in enumerate(reversed(factors[cut:])):
        right = w @ right @ w.mT if i else w @ w.mT
    values, vectors = torch.linalg.eigh(left)
    root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)  # for a symmetric product with the same eigenvalues
    found = torch.linalg.eigvalsh(root.mT @ right @ root).clamp(min=0).flip(-1)
    return found.masked_fill(~finite.unsqueeze(-1), math.nan).numpy()


def haar(factors, draws=20):
    """The eigenvalues of W_1 O_1 W_2 O_2 ... W_m -> (draws, ..., n): each factor keeps its singular values, and random
    rotations O stand between them, from a fixed seed, the same for all heads."""
    generator, n = torch.Generator().manual_seed(0), min(size for factor in factors for size in factor.shape[-2:])
    values = [torch.from_numpy(eigenvalues([factor])).sqrt() for factor in factors]  # singular values
    product = torch.diag_embed(values[0]).expand(draws, *[-1] * (values[0].dim() + 1))
    for factor, before, after in zip(factors, values, values[1:], strict=False):
        shape = (draws, *[1] * (before.dim() - 1), factor.size(-1), before.size(-1))
        q, r = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64))
        rotation = (q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)).mT  # the rows of O that W leaves non-zero
        product = product @ rotation[..., : after.size(-1)] * after.unsqueeze(-2)
    return eigenvalues([product])[..., :n]


def spectra(model, distance=0):
    """{circuit: {"heads": (L, H, n), "layer": (L, 1, n)}}: the eigenvalues of each head's W_Q W_K^T, and of each
    layer's, its heads together. NaN where weights are not finite."""
    layers = []
    for block in model.blocks:
        circuits = qk_factors(block.attn, distance)
        layers.append({c: {level: eigenvalues(f) for level, f in levels.items()} for c, levels in circuits.items()})
    return {c: {at: np.stack([layer[c][at] for layer in layers]) for at in levels} for c, levels in layers[0].items()}


@torch.no_grad()
def second_moments(model, idx):
    """For each layer, E[x x^T] (d, d), float64, where x is the input of its attention, averaged over idx (B, T)."""
    moments = []

    def add(attention, inputs):
        x = inputs[0].flatten(0, 1).cpu().double()
        moments.append(x.mT @ x / len(x))

    hooks = [block.attn.register_forward_pre_hook(add) for block in model.blocks]
    model(idx)
    for hook in hooks:
        hook.remove()
    return moments


def logit_ranks(model, idx):
    """The effective rank (L, H) of S M S, where S^2 is the second moment of what each layer's attention sees on tokens
    idx (B, T): the rank of the scores that the model really computes. Of M's directions, some never occur."""
    ranks = []
    for block, moment in zip(model.blocks, second_moments(model, idx), strict=True):
        values, vectors = torch.linalg.eigh(moment)
        root = (vectors * values.clamp(min=0).sqrt()) @ vectors.mT
        first, *rest = [*qk_factors(block.attn).values()][-1]["heads"]
        *rest, last = [root @ first.double(), *rest]
        ranks.append(diagnose(eigenvalues([*rest, last.double() @ root]), None)["effective_rank"])
    return np.stack(ranks)


def laws(config, null):
    """{circuit: {"heads": law, "layer": law}} of a GPTConfig; null is one of NULLS. None for mla_decoupled's two parts
    together: their sum has no law, for one part can be any size compared with the other."""
    with torch.device("meta"):  # shapes, no numbers
        circuits = qk_factors(GPT(config).blocks[0].attn)

    def law(circuit, factors):
        dims = (*(factor.size(-2) for factor in factors), factors[-1].size(-1))
        dims = (min(dims), config.n_embd) if null == "mp" else dims
        return None if circuit == "both" else chain_law(dims)

    return {c: {level: law(c, factors) for level, factors in levels.items()} for c, levels in circuits.items()}


def diagnose(eigenvalues, law):
    """Eigenvalues (..., n), in any order, against a null law -> a dict of arrays (...). Without a law, ranks only.

    The law is scaled so that its median is theirs: spikes, which training makes, do not move a median.
    edge: l+, the law's upper edge, so scaled. ks: the largest distance between the two distribution functions. mp_gap:
    l_1 / l+. outliers: how many lie above l+; outlier_share: of n. outlier_energy: their part of the sum. p: see
    p_value. soft_rank: min(1, l+ / l_1). stable_rank: sum / l_1. effective_rank: exp(entropy of l / sum), also as a
    share of n and of what the law has. NaN where the eigenvalues are NaN or all 0."""
    n = eigenvalues.shape[-1]
    total, largest, median = eigenvalues.sum(-1), eigenvalues.max(-1), np.median(eigenvalues, -1)
    with np.errstate(all="ignore"):
        rank = np.exp(entr(eigenvalues / total[..., None]).sum(-1))
        ranks = {"effective_rank": rank, "effective_rank_share": rank / n, "stable_rank": total / largest}
        if law is None:
            return ranks
        edge = median / law.median * law.upper
        outlying = eigenvalues > edge[..., None]
        below = law.cdf(np.sort(eigenvalues) / median[..., None] * law.median)
        steps = np.arange(n + 1) / n
        return ranks | {
            "edge": edge,
            "ks": np.maximum(below - steps[:-1], steps[1:] - below).max(-1),
            "mp_gap": largest / edge,
            "outliers": np.where(np.isnan(total), np.nan, outlying.sum(-1)),
            "outlier_share": np.where(np.isnan(total), np.nan, outlying.mean(-1)),
            "outlier_energy": (eigenvalues * outlying).sum(-1) / total,
            "p": p_value(eigenvalues, law),
            "soft_rank": np.minimum(1, edge / largest),
            "effective_rank_of_null": rank / law.effective_rank,
        }


def spiked(p):
    """p-values (..., H) of heads -> (...): is a layer's largest spike more than chance? Corrected for H heads."""
    return np.nanmin(np.where(np.isnan(p), 1, p), -1) * p.shape[-1] < 0.05


# Runs -----------------------------------------------------------------------------------------------------------------


def plain(values):
    """Nested dicts of arrays -> of lists, for JSON: six significant digits, None for what is not finite."""
    if isinstance(values, dict):
        return {key: plain(value) for key, value in values.items()}
    if np.ndim(values):
        return [plain(value) for value in values]
    return float(f"{values:.6g}") if math.isfinite(values) else None


def snapshot(model, step):
    """A line of spectrum.jsonl."""
    return json.dumps({"step": step, "config": asdict(model.config), "spectra": plain(spectra(model))})


def read_run(folder):
    """The spectrum.jsonl of a run folder -> GPTConfig, steps (S of them), and spectra() with S in front. Says which
    lines are not whole snapshots of the run. Raises InputError if none is."""
    path, snapshots = folder / "spectrum.jsonl", {}
    if not path.is_file():
        raise InputError(f"{folder}: no run's folder: it has no spectrum.jsonl, which train.py writes into --out")
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        try:
            entry = json.loads(line)
            values = {c: {at: np.array(x, float) for at, x in levels.items()} for c, levels in entry["spectra"].items()}
            snapshots[int(entry["step"])] = GPTConfig(**entry["config"]), values
        except (ValueError, TypeError, KeyError):
            print(f"{path}: line {number} is not a whole snapshot; left out", file=sys.stderr)
    if not snapshots:
        raise InputError(f"{path}: holds no whole snapshot; train again")
    steps = sorted(snapshots)
    return snapshots[steps[0]][0], steps, stack([snapshots[step][1] for step in steps])


def stack(many):
    """[{circuit: {level: array}}] -> the same of arrays with one more axis in front"""
    return {c: {at: np.stack([one[c][at] for one in many]) for at in levels} for c, levels in many[0].items()}


def same_but_seed(folder):
    """What runs have in common that differ in nothing but their seed; for a run without a checkpoint, its folder."""
    try:
        options = load_checkpoint(folder / "ckpt.pt")[1]["options"]
    except (InputError, OSError):
        return str(folder)
    return str([item for item in options.items() if item[0] not in ("seed", "out", "resume", "device", "compile")])


# What a reader sees ---------------------------------------------------------------------------------------------------

DIAGNOSTICS = {  # heading in the table, format there, label in the figure
    "ks": ("KS", ".2f", "KS distance\nto the null"),
    "outlier_share": ("beyond", ".0%", "beyond the edge\nshare of n"),
    "mp_gap": ("MP-gap", ".3g", "MP-gap\nlargest / edge"),
    "outlier_energy": ("energy", ".0%", "their energy\nshare of the sum"),
    "soft_rank": ("soft rank", ".2f", "MP soft rank\nedge / largest"),
    "effective_rank": ("eff. rank", ".1f", "effective rank"),
    "effective_rank_share": ("of n", ".0%", None),
    "effective_rank_of_null": ("of null's", ".0%", "effective rank\nshare of the null's"),
}


def layer_list(chosen):
    if not any(chosen):
        return "no layer"
    layers = ", ".join(map(str, np.flatnonzero(chosen)))
    return f"layer {layers}" if sum(chosen) == 1 else f"layers {layers}"


def table(found, rotated):
    """A row per layer of diagnostics (L, H), the mean over heads; after >, that of rotated factors (draws, L, H)."""
    rows = [["layer", *(heading for name, (heading, _, _) in DIAGNOSTICS.items() if name in found)]]
    for layer in range(len(found["effective_rank"])):
        cells = [str(layer)]
        for name, (_, style, _) in DIAGNOSTICS.items():
            if name in found:
                after = f" > {np.nanmean(rotated[name][:, layer]):{style}}" if name in rotated else ""
                cells.append(f"{np.nanmean(found[name][layer]):{style}}{after}")
        rows.append(cells)
    return "\n".join(" ".join(cell.rjust(14 if i else 5) for i, cell in enumerate(row)) for row in rows)


def answers(steps, found):
    """What Jha and Reagen ask, answered from the diagnostics (R, S, L, H) of R seeds and S snapshots -> lines."""
    seeds, ends = len(found["p"]), sorted({0, len(steps) - 1})

    def told(name):  # at the first and the last snapshot, mean ± deviation between seeds
        values, style = np.nanmean(found[name], (2, 3)), DIAGNOSTICS[name][1]  # (R, S)
        spread = [f" ±{x:{style}}" if seeds > 1 else "" for x in values.std(0)]
        return ", then ".join(f"{values[:, i].mean():{style}}{spread[i]}" for i in ends)

    lines = [f"fit       KS distance to the null {told('ks')}"]
    if np.nanmean(found["ks"][:, -1]) > 0.1:
        lines += ["          The bulk is not the null's any more: beyond its edge is a wider spectrum, not outliers"]
    lines += [f"beyond    {told('outlier_share')} of the eigenvalues, with {told('outlier_energy')} of the sum"]
    spikes, rank = spiked(found["p"]), np.nanmean(found["effective_rank"], -1)  # (R, S, L)
    lines += [f"spikes    more than chance in {layer_list(spikes[:, -1].mean(0) > 0.5)}"]
    drops, others = [], []  # changes of effective rank: where a layer first spikes, and in those that do not yet
    for r, layer in np.ndindex(seeds, spikes.shape[-1]):
        first = spikes[r, :, layer].argmax()
        if first:  # not from the start, and not never
            change = rank[r, first] / rank[r, first - 1] - 1
            drops.append((steps[first], change[layer], spikes[r, first:, layer].mean()))
            others += change[~spikes[r, first]].tolist()
    if drops:
        since, drop, stay = np.array(drops).T
        other = f"by {np.mean(others):+.1%} ({len(others)})" if others else "is not known: all have some"
        lines += [
            f"          first at steps {since.min():.0f} to {since.max():.0f}; in {stay.mean():.0%} of snapshots since",
            f"collapse  when a layer first spikes, its effective rank changes by {drop.mean():+.1%} ({len(drop)});",
            f"          that of layers without spikes, over the same steps, {other}",
        ]
    share, of_null = told("effective_rank_share"), told("effective_rank_of_null")
    return [*lines, f"rank      {told('effective_rank')}: {share} of n; {of_null} of the null's"]


def draw_model(path, config, found, rotated, null):
    """The eigenvalues (L, H, n) of each layer's heads, what rotations leave (draws, L, H, n), and the laws."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(8, 1 + 4 * len(rotated)), 1.5 + 1.6 * config.n_layer), layout="constrained")
    figure.suptitle(f"{config.attn}: eigenvalues of each head's M M^T, against {null}")
    axes = figure.subplots(config.n_layer, len(rotated), squeeze=False, sharex="col")
    for circuit, column in zip(rotated, axes.T, strict=True):
        chain, mp, chosen = (laws(config, name)[circuit]["heads"] for name in (*NULLS, null))
        for layer, ax in enumerate(column):
            scaled = [
                (chosen.median * x / np.median(x, -1, keepdims=True)).ravel()
                for x in (found[circuit]["heads"][layer], rotated[circuit][:, layer])
            ]
            values, turned = (x[np.isfinite(x)] for x in scaled)
            bins = np.geomspace(0.02, max(30, 1.5 * values.max(initial=0)), 50)
            beyond = values > chosen.upper
            for x, weight, how in (
                (values, len(values), {"fill": True, "color": "#BBBBBB", "label": "eigenvalues"}),
                (values[beyond], len(values), {"fill": True, "color": "#0072B2", "label": "beyond the null's edge"}),
                (turned, len(turned), {"color": "#D55E00", "label": "with random rotations (haar)"}),
            ):
                ax.stairs(np.histogram(x, bins)[0] / max(1, weight) / np.log(bins[1] / bins[0]), bins, **how)
            for law, style, label in ((chain, "k-", "Gaussian product (chain)"), (mp, "k:", "Marchenko-Pastur (mp)")):
                ax.plot(law.x * chosen.median / law.median, law.log_density, style, linewidth=1, label=label)
            ax.axvline(chosen.upper, color="k", linewidth=0.7)
            ax.set(xscale="log", xlim=(bins[0], bins[-1]), yticks=[])
            ax.set_title(f"{circuit}, layer {layer}: {np.mean(beyond):.0%} beyond the edge", fontsize=10)
        column[-1].set_xlabel("eigenvalue, scaled to the median of the null")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)


def draw_dynamics(path, columns, title):
    """columns: (name, steps, diagnostics (R, S, L, H)). A line per layer: the mean over heads and seeds."""
    from matplotlib.figure import Figure

    labels = {name: label for name, (_, _, label) in DIAGNOSTICS.items() if label}
    figure = Figure(figsize=(1 + 3.4 * len(columns), 1 + 1.5 * len(labels)), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(len(labels), len(columns), squeeze=False, sharex="col", sharey="row")
    for row, (name, label) in zip(axes, labels.items(), strict=True):
        for ax, (_, steps, found) in zip(row, columns, strict=True):
            for layer, line in enumerate(np.nanmean(found[name], (0, 3)).T):
                ax.plot(steps, line, linewidth=1.2, label=f"layer {layer}")
            ax.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
            ax.set_xticks([steps[i] for i in (0, len(steps) // 4, len(steps) // 2, -1)])
            ax.set_yscale("log" if name == "mp_gap" else "linear")
            ax.grid(alpha=0.3)
        row[0].set_ylabel(label)
    for (name, _, _), top, bottom in zip(columns, axes[0], axes[-1], strict=True):
        top.set_title(name, fontsize=10)
        bottom.set_xlabel("step (square-root scale)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=120)


def show(title, config, steps, found, null):
    """Print what the spectra() (R, S, L, H, n) of R seeds and S snapshots say -> {circuit: {level: diagnostics}}"""
    print(f"{title}: {config.attn}, {config.n_layer} layers of {config.n_head} heads, step {steps[-1]}")
    diagnosed = {}
    for circuit, levels in laws(config, null).items():
        diagnosed[circuit] = {level: diagnose(found[circuit][level], law) for level, law in levels.items()}
        for level, who in (("heads", "each head's"), ("layer", "each layer's")):
            print(f"\n{who} W_Q W_K^T ({circuit}), against the null {null}:")
            rank = np.nanmean(diagnosed[circuit][level]["effective_rank"][:, -1])
            unknown = [f"rank      {rank:.1f}; the sum of two parts has no null"]
            print("  " + "\n  ".join(answers(steps, diagnosed[circuit][level]) if levels[level] else unknown))
    return diagnosed


def analyse_model(path, args):
    """Tables, answers and a figure of one checkpoint."""
    model, checkpoint = load_checkpoint(path)
    config, step, out, report = model.config, checkpoint["step"], args.out or path.parent, {}
    longest = 0 if config.attn in LEARNED else config.block_size - 1
    if not all(0 <= distance <= longest for distance in args.distance):
        raise InputError(f"--distance: must be from 0 to {longest} for this model")
    for distance in args.distance:
        found = spectra(model, distance)
        for layer in np.flatnonzero(~np.all([np.isfinite(x["heads"]).all((1, 2)) for x in found.values()], axis=0)):
            print(f"{path}: layer {layer} has weights that are not finite; the rest is analysed", file=sys.stderr)
        at = f", query {distance} tokens after the key" if distance else ""
        diagnosed = show(f"{path}{at}", config, [step], stack([stack([found])]), args.null)
        factors, rotated = [qk_factors(block.attn, distance) for block in model.blocks], {}
        for circuit, levels in laws(config, args.null).items():
            heads, after = {name: x[0, 0] for name, x in diagnosed[circuit]["heads"].items()}, {}
            print(f"\neach head's {circuit}{at}; after >, with random rotations between the factors")
            if levels["heads"]:
                rotated[circuit] = np.stack([haar(of_layer[circuit]["heads"]) for of_layer in factors], 1)
                after = diagnose(rotated[circuit], levels["heads"])
                above = np.mean(heads["mp_gap"] > after["mp_gap"].max(0))
                print(f"(in {above:.0%} of heads, the largest eigenvalue is above that of all rotations)")
            names = after.keys() & {"outlier_share", "mp_gap", "effective_rank"}
            print(table(heads, {name: after[name] for name in names}))
        parts = {"spectra": found, "rotated": rotated, "diagnostics": diagnosed}
        report[f"distance {distance}"] = plain(parts)
    if args.data:
        _, _, tokens = load_data(DATA / args.data if (DATA / args.data).exists() else args.data)
        rows = torch.from_numpy(tokens[: 32 * config.block_size].astype(np.int64)).unfold(0, *[config.block_size] * 2)
        report["logit_ranks"] = plain(logit_ranks(model, rows))
        ranks = "; ".join(f"layer {layer} {np.mean(x):.1f}" for layer, x in enumerate(report["logit_ranks"]))
        print(f"\neffective rank of the scores on {args.data}: {ranks}")
    draw_model(out / "spectrum.png", config, found, rotated, args.null)
    report |= {"path": str(path), "config": asdict(config), "step": step, "null": args.null}
    (out / "spectrum.json").write_text(json.dumps(report))
    print(f"wrote {out / 'spectrum.json'} and {out / 'spectrum.png'}")


def analyse_runs(paths, args):
    """Answers and a figure of runs; those that differ in their seed alone count as one."""
    groups, columns, report = {}, [], []
    for path in paths:
        try:
            config, steps, found = read_run(path)
        except InputError as error:
            if len(paths) == 1:
                raise
            print(f"{error}; left out", file=sys.stderr)
            continue
        groups.setdefault((same_but_seed(path), *steps), []).append((path, config, found))
    if not groups:
        raise InputError("nothing to show: all of these runs were left out")
    for (_, *steps), runs in groups.items():
        names, config = " ".join(str(path) for path, _, _ in runs), runs[0][1]
        diagnosed = show(names, config, steps, stack([found for _, _, found in runs]), args.null)
        seeds = f", {len(runs)} seeds" if len(runs) > 1 else ""
        for circuit, levels in diagnosed.items():
            if circuit != "both":
                columns.append((f"{runs[0][0].name}{seeds}\n{config.attn}, {circuit}", steps, levels["heads"]))
        report.append({"runs": names, "null": args.null, "config": asdict(config), "steps": steps})
        report[-1]["diagnostics"] = plain(diagnosed)
    out = args.out or Path(os.path.relpath(os.path.commonpath([path.absolute() for path in paths])))
    data, figure = out / "dynamics.json", out / f"dynamics_{args.null}.png"
    draw_dynamics(figure, columns, f"Each head's W_Q W_K^T in training, measured against the null {args.null}")
    data.write_text(json.dumps(report))
    print(f"wrote {data} and {figure}")


def main():
    example = "example: python spectrum.py out out/mla_decoupled --null=mp"
    parser = Parser(description=__doc__.split("\n\n")[0], epilog=example)
    add = parser.add_argument
    add("paths", nargs="+", type=Path, help="a checkpoint; or run folders, to compare their dynamics")
    add("--null", choices=NULLS, default="chain", help="law to measure against (default: %(default)s)")
    add("--distance", type=int, nargs="+", default=[0], help="of a checkpoint: tokens from key to query (default: 0)")
    add("--data", help="of a checkpoint: a data folder, for the rank of the scores on its tokens (default: none)")
    add("--out", type=Path, help="folder for JSON and figure (default: that of what is given)")
    args = parser.parse_args()
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(), np.errstate(all="ignore"):  # of heads whose weights are zero or not finite
        warnings.filterwarnings("ignore", "Mean of empty slice")
        if any(path.is_dir() for path in args.paths):
            analyse_runs(args.paths, args)
        elif len(args.paths) > 1:
            raise InputError("give one checkpoint, or one or more run folders: " + " ".join(map(str, args.paths)))
        else:
            analyse_model(args.paths[0], args)


if __name__ == "__main__":
    run(main)
