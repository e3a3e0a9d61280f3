"""The spectrum of W_Q W_K^T: how much of it is chance, how much is magnitude, how much is alignment.

A head scores two tokens by x M x'^T, where M = W_Q W_K^T is (d, d). Training shows as large eigenvalues of M M^T.
Large compared with what? There are three references:

    chain   the law for a product of Gaussian matrices with the shapes of W_Q, W_K and MLA's factors
    mp      the Marchenko-Pastur law, for ONE Gaussian matrix: the usual null in the literature
    haar    the model's own factors with random rotations between them. What survives of a large eigenvalue is due to
            the factors' singular values (magnitude), the rest to how neighbouring factors line up (alignment): W_Q
            with W_K, in MLA W_UK with W_DK. The split is not unique: W_Q A and W_K A^-T give the same M

    python spectrum.py out/ckpt.pt         one model: tables, answers in words, spectrum.json, spectrum.png
    python spectrum.py out/a out/b         learning dynamics of several runs, from their spectrum.jsonl

The diagnostics follow Jha and Reagen 2025, arXiv 2507.09394. Where their abstract is silent, we chose: the mp law has
aspect ratio n/d for n eigenvalues; a law is scaled to match the median eigenvalue; we analyse each head, and each layer
as a whole; with RoPE, M is taken at distance 0 unless --distance is given. Even with random weights, a longer product
has a lower effective rank (Roy and Vetterli 2007), so compare variants by its share of the null's.
"""

import json
import math
import os
import sys
import warnings
from dataclasses import asdict, replace
from functools import cache, partial, reduce
from pathlib import Path

import numpy as np
import torch
from scipy.optimize.elementwise import find_root
from scipy.special import entr, gammaincc

from data.common import InputError, Parser, load_data, run
from model import GPT, LEARNED, MLA, GPTConfig, load_checkpoint

NULLS = ("chain", "mp")


class ChainLaw:
    """The law of the non-zero eigenvalues of M M^T, scaled to mean 1, where M is a product of independent Gaussian
    matrices of shapes N_0 x N_1, N_1 x N_2, ...; dims = (N_0, ..., N_m). Exact in the limit where all dimensions grow
    in proportion (Burda et al. 2010, arXiv 1007.3594). Two dimensions give Marchenko-Pastur. Has lower, upper (the
    edges), median, and pdf(x), cdf(x), quantile(q). Raises ValueError unless dims are two or more positive integers.

    Where the equation comes from: S-transforms of free factors multiply. Let n be the smallest dimension, c_i = n/N_i,
    psi = sum_k (k-th moment) / lambda^k and S = (1 + psi) / (lambda psi). A Gaussian factor has S = 1 / (1 + c psi):

        lambda = prod_i (1 + c_i psi) / psi    over all m + 1 dimensions; the smallest has c = 1.

    Which of the many roots is the law's? Write psi = rho e^(i angle). Lambda is real and positive where the angles of
    the factors 1 + c_i psi add up to that of psi. Their sum grows with rho, so each angle in (0, pi) has one such rho;
    lambda falls from the upper edge, at angle 0, to the lower one, at pi. The density is Im psi / (pi lambda)."""

    def __init__(self, dims):
        if len(dims) < 2 or not all(n >= 1 and n % 1 == 0 for n in dims):
            raise ValueError(f"dims={dims}: must be two or more positive integers, N_0, N_1, ...")
        self.dims, n = dims, min(dims)
        c = n / np.sort(np.array(dims, dtype=float))  # descending from 1
        angle = np.pi / 2 + (np.pi / 2 - 1e-6) * np.cos(np.linspace(0, np.pi, 4001))  # dense at both edges
        part = angle / len(c)
        low = np.log(np.sin(part) / np.sin(angle - part))  # the root if all c_i were 1; ours is below low - log c[-1]
        bracket = low - 1e-9, low - np.log(c[-1]) + 1e-9
        outer = partial(np.multiply.outer, c)
        log_rho = find_root(lambda x, a: np.angle(1 + outer(np.exp(x + 1j * a))).sum(0) - a, bracket, args=(angle,)).x
        self.psi = np.exp(log_rho + 1j * angle)
        factors = 1 + outer(self.psi)
        self.x = (np.prod(factors, axis=0) / self.psi).real  # ascending
        self.density = self.psi.imag / np.pi / self.x
        self.pdf = partial(np.interp, xp=self.x, fp=self.density, left=0, right=0)
        # The CDF integrates psi dlog(lambda) = (m - sum_i 1 / (1 + c_i psi)) dpsi
        antiderivative = (len(c) - 1) * self.psi - np.tensordot(1 / c, np.log(factors), axes=1)
        mass = 1 + antiderivative.imag / np.pi  # below x
        mass[[0, -1]] = 0, 1  # without rounding
        self.cdf = partial(np.interp, xp=self.x, fp=mass, left=0, right=1)
        self.quantile = partial(np.interp, xp=mass, fp=self.x)
        self.lower, self.upper = float(self.x[0]) if c[1] < 1 else 0.0, float(self.x[-1])
        self.median = float(self.quantile(0.5))
        x = self.quantile((np.arange(n) + 0.5) / n)
        self.effective_rank = float(np.exp(entr(x / x.sum()).sum()))  # of n eigenvalues that follow the law


chain_law = cache(ChainLaw)


@cache
def largest_p(dims):
    """A function from log(largest eigenvalue / median) to its p-value, for Gaussian products of these dimensions.

    The null: a gamma law with the skewness of Tracy-Widom (Johnstone 2001, for one matrix), fitted to 500 seeded draws.
    A Gaussian matrix is L Q, and multiplying the next one by Q leaves its law unchanged, so we draw only triangles L.
    Above 64 eigenvalues we draw smaller matrices: their largest eigenvalue scatters more, which is conservative."""
    rng, shrink = np.random.default_rng(0), max(1, min(dims) / 64)
    n, *others = sorted(round(size / shrink) for size in dims)  # the law is the same for dims in any order
    factors, i = [np.tril(rng.standard_normal((500, n, n)), -1) for _ in others], np.arange(n)
    for factor, size in zip(factors, others, strict=True):
        factor[:, i, i] = np.sqrt(rng.chisquare(size - i, (500, n)))
    product = reduce(np.matmul, factors)
    x = np.linalg.eigvalsh(product @ product.mT)
    logs = np.log(x[:, -1] / np.median(x, -1))
    mean, std, shape = logs.mean(), logs.std(ddof=1), 4 / 0.2935**2
    return lambda log: gammaincc(shape, np.maximum(0, shape + (log - mean) / std * shape**0.5))


def qk_factors(attention, distance=0):
    """An attention module -> {"content heads": factors, "content layer": factors}, [(H or 1, N_0, N_1), ...] each.

    The product of "heads" is each head's W_Q W_K^T, (H, d, d); that of "layer" is their sum, (1, d, d). They run from
    query to key: two for MHA and GQA, three for MLA, four for mla_prerope; with q_rank, W_DQ comes first. The key is at
    position 0, the query `distance` tokens later. M includes the gain of a latent norm, but not its division by each
    token's RMS, which is not linear. mla_decoupled also has the parts "rotary" and "both", the sum of the other two."""
    config, h, R = attention.config, attention.config.head_dim, attention.config.rope_dim
    w = {name: module.weight.detach().t() for name, module in attention.named_children() if hasattr(module, "weight")}
    for down, gain in (("w_dq", "norm_q"), ("w_dk", "norm_k")):
        if gain in w:
            w[down] = w[down] * w[gain]
    prefix, at = [w["w_dq"][None]] if "w_dq" in w else [], torch.tensor([distance])

    def by_head(matrix, width):  # (d, n * width) -> (n, d, width)
        return matrix.unflatten(1, (-1, width)).transpose(0, 1)

    def levels(part, q, k, *suffix):  # q (H, ., w), k (K, w, .): H/K query heads share a key; a layer sums its heads
        summed = q.unflatten(0, (len(k), -1)).sum(1).transpose(0, 1).flatten(1), k.flatten(0, 1)
        heads = [*prefix, q, k.repeat_interleave(len(q) // len(k), 0), *suffix]
        return {f"{part} heads": heads, f"{part} layer": [*prefix, *(matrix[None] for matrix in summed), *suffix]}

    q = by_head(w["w_uq" if prefix else "w_q"], h)
    if config.attn in ("mha_rope", "gqa", "mla_rope", "mla_prerope"):
        q = attention.rope(q, at)
    if config.attn not in MLA:
        return levels("content", q, by_head(w["w_k"], h).mT)
    suffix = [w[name].T[None] for name in ("w_dk", "w_k") if name in w]  # only mla_prerope has w_k here
    found = levels("content", q, by_head(w["w_uk"], h).mT, *suffix)
    if config.attn == "mla_decoupled":
        found |= levels("rotary", attention.rope(by_head(w["w_qr"], R), at), w["w_kr"].T[None])
        for level in ("heads", "layer"):  # [q | q_r] [k 0; 0 1] [latent; k_r]
            (*_, q, k, latent), (*_, q_r, k_r) = (found[f"{part} {level}"] for part in ("content", "rotary"))
            k = torch.stack([torch.block_diag(matrix, torch.eye(R, device=k.device)) for matrix in k])
            found[f"both {level}"] = [*prefix, torch.cat((q, q_r), -1), k, torch.cat((latent, k_r[:1]), -2)]
    return found


def eigenvalues(factors):
    """The non-zero eigenvalues of M M^T, M = W_1 W_2 ... W_m, largest first: (..., n) float64, n = min(N_i).

    factors: tensors (..., N_0, N_1), (..., N_1, N_2), ... M is split at its narrowest dimension, M = L R. With the QR
    decomposition L = Q T, the n x n matrix (T R) (T R)^T has the same eigenvalues, so M is never formed. NaN where a
    factor is not finite."""
    factors = [factor.detach().cpu().double() for factor in factors]
    finite = math.prod(factor.isfinite().all(-1).all(-1) for factor in factors).bool()
    factors = [factor.nan_to_num(0, 0, 0) for factor in factors]
    dims = [factors[0].size(-2), *(factor.size(-1) for factor in factors)]
    cut, eye = dims.index(min(dims)), torch.eye(min(dims), dtype=torch.float64)
    multiply = partial(torch.einsum, "...ij,...jk->...ik")  # unlike @, it does not copy a factor that heads share
    left = reduce(multiply, [factor.mT for factor in reversed(factors[:cut])], eye)  # L^T, (..., n, N_0)
    right = reduce(multiply, factors[cut:], eye)  # R, (..., n, N_m)
    half = torch.linalg.qr(left.mT, mode="r").R @ right if cut else right
    return torch.linalg.eigvalsh(half @ half.mT).clamp(min=0).flip(-1).where(finite.unsqueeze(-1), math.nan).numpy()


@cache
def rotations(draws, seed, size, rows):  # the first rows of random rotations, (draws, 1, rows, size)
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn((draws, 1, size, rows), generator=generator, dtype=torch.float64)).Q.mT


def haar(factors, draws=20):
    """The eigenvalues() of W_1 O_1 W_2 O_2 ... W_m, (draws, H or 1, n). The O_i are random rotations from fixed seeds,
    the same for all heads; each factor keeps its singular values."""
    values = [torch.from_numpy(eigenvalues([factor])).sqrt() for factor in factors]  # singular values
    rotated = [torch.diag_embed(values[0]).expand(draws, -1, -1, -1)]
    for seed, (factor, before, after) in enumerate(zip(factors, values, values[1:], strict=False)):
        rotation = rotations(draws, seed, factor.size(-1), before.size(-1))
        rotated.append(rotation[..., : after.size(-1)] * after.unsqueeze(-2))
    return eigenvalues(rotated)


def stack(many):
    """[{name: array}] -> one such dict, its arrays stacked along a new first axis"""
    return {name: np.stack([one[name] for one in many]) for name in many[0]}


def spectra(model, distance=0):
    """{"content heads": (L, H, n), "content layer": (L, 1, n), ...}: eigenvalues() of each head's W_Q W_K^T, and of its
    sum over a layer's heads."""
    layers = [qk_factors(block.attn, distance) for block in model.blocks]
    return stack([{name: eigenvalues(factors) for name, factors in layer.items()} for layer in layers])


def laws(config, null):
    """{"content heads": law, ...} of a GPTConfig; null is one of NULLS. None for "both" of mla_decoupled: the law of a
    sum depends on the relative size of its parts, which training changes."""
    found = {}
    for name, factors in qk_factors(GPT(replace(config, n_layer=1, vocab_size=1, block_size=1)).blocks[0].attn).items():
        dims = (*(factor.size(-2) for factor in factors), factors[-1].size(-1))
        dims = (min(dims), config.n_embd) if null == "mp" else dims
        found[name] = None if name.startswith("both") else chain_law(dims)
    return found


@np.errstate(all="ignore")
def diagnose(values, law):
    """Eigenvalues l (..., n), in any order, against a null law -> a dict of arrays (...). Without a law, ranks only.

    The law is scaled to match the median, which spikes do not move; l+ is its upper edge, l_1 the largest eigenvalue.
    edge: l+. ks: the Kolmogorov-Smirnov distance. mp_gap: l_1 / l+. outliers: how many exceed l+; outlier_share: of n;
    outlier_energy: of the sum. p: the p-value of l_1 / median. soft_rank: min(1, l+ / l_1). stable_rank: sum / l_1.
    effective_rank: exp(entropy of l / sum); _share: of n; _of_null: of the law's. NaN if l has a NaN, or median 0."""
    n, total, largest, median = values.shape[-1], values.sum(-1), values.max(-1), np.median(values, -1)
    rank = np.exp(entr(values / total[..., None]).sum(-1))
    ranks = {"effective_rank": rank, "effective_rank_share": rank / n, "stable_rank": total / largest}
    if law is None:
        return ranks
    median = np.where(median < 1e-10 * largest, np.nan, median)  # zero up to rounding: the heads share few directions
    edge = median / law.median * law.upper
    outlying = np.where(np.isnan(edge[..., None]), np.nan, values > edge[..., None])
    cdf, steps = law.cdf(np.sort(values) / median[..., None] * law.median), np.arange(n + 1) / n
    found = {"edge": edge, "ks": np.maximum(cdf - steps[:-1], steps[1:] - cdf).max(-1), "mp_gap": largest / edge}
    found |= {"outliers": outlying.sum(-1), "outlier_share": outlying.mean(-1)}
    found |= {"outlier_energy": (values * outlying).sum(-1) / total, "soft_rank": np.minimum(1, edge / largest)}
    p = largest_p(law.dims)(np.log(largest / median))
    return ranks | found | {"p": p, "effective_rank_of_null": rank / law.effective_rank}


def spiked(p):
    """p-values (..., H) of a layer's heads -> (...): is any below 0.05 / H (Bonferroni)?"""
    return np.nan_to_num(p, nan=1).min(-1) * p.shape[-1] < 0.05


@torch.no_grad()
def second_moments(model, idx):
    """For each layer, E[x x^T] (d, d), float64, where x is the input of its attention, averaged over idx (B, T)."""
    moments = []

    def add(_, inputs):
        x = inputs[0].flatten(0, 1).cpu().double()
        moments.append(x.mT @ x / len(x))

    hooks = [block.attn.register_forward_pre_hook(add) for block in model.blocks]
    model(idx)
    for hook in hooks:
        hook.remove()
    return moments


def logit_ranks(model, idx):
    """The effective rank (L, H) of S M S, where S^2 is the second moment of the attention's input on tokens idx (B, T):
    directions of M that inputs never take do not count. RoPE's rotations are left out (distance 0)."""
    ranks = []
    for block, moment in zip(model.blocks, second_moments(model, idx), strict=True):
        values, vectors = torch.linalg.eigh(moment.nan_to_num(0, 0, 0))  # eigh fails on NaN
        root, factors = vectors * values.clamp(min=0).sqrt(), qk_factors(block.attn)
        whole = factors.get("both heads", factors["content heads"])
        ranks.append(diagnose(eigenvalues([root.mT, *whole, root]), None)["effective_rank"])
    return np.stack(ranks)


rounded = np.vectorize(lambda x: float(f"{x:.6g}") if math.isfinite(x) else None, otypes=[object])  # JSON has no NaN
to_json = partial(json.dumps, default=lambda array: rounded(array).tolist())


def snapshot(model, step, options):
    """A line of spectrum.jsonl. options: the run's flags, the seed among them."""
    return to_json({"step": step, "config": asdict(model.config), "options": options, "spectra": spectra(model)})


def read_run(folder):
    """A run's spectrum.jsonl -> (its options without the seed, as text; its GPTConfig), S steps, and spectra() with a
    first axis S. Skips damaged lines with a warning. InputError if none are left."""
    path, snapshots = folder / "spectrum.jsonl", {}
    for number, line in enumerate(path.read_text(errors="replace").splitlines() if path.is_file() else (), start=1):
        try:
            entry = json.loads(line)
            values = {name: np.array(x, float) for name, x in entry["spectra"].items()}
            same = str(entry["options"] | {"seed": 0})
            snapshots[int(entry["step"])] = (same, GPTConfig(**entry["config"])), values
        except (ValueError, TypeError, KeyError, AttributeError):
            print(f"{path}: line {number} is damaged or of an older version; skipped", file=sys.stderr)
    if not snapshots:
        raise InputError(f"{path}: no complete snapshot; name the --out folder of a run of train.py")
    about, found = zip(*snapshots.values(), strict=True)
    return about[0], [*snapshots], stack(found)


DIAGNOSTICS = {  # table heading, format, figure label
    "ks": ("KS", ".2f", "KS distance\nto the null"),
    "outlier_share": ("beyond", ".0%", "beyond the edge\nshare of n"),
    "mp_gap": ("MP-gap", ".3g", "MP-gap\nlargest / edge"),
    "outlier_energy": ("energy", ".0%", "outlier energy\nshare of the sum"),
    "soft_rank": ("soft rank", ".2f", "MP soft rank\nedge / largest"),
    "effective_rank": ("eff. rank", ".1f", "effective rank"),
    "effective_rank_share": ("/ n", ".0%", None),
    "effective_rank_of_null": ("/ null's", ".0%", "effective rank\nshare of the null's"),
}


def table(diagnosed, rotated):
    """One row per layer, means over heads: diagnosed (L, H or 1), or "diagnosed -> rotated" (draws, L, H or 1)."""
    shown = {name: row for name, row in DIAGNOSTICS.items() if name in diagnosed}
    lines = [" ".join(["layer", *(heading.rjust(14) for heading, _, _ in shown.values())])]
    for layer in range(len(diagnosed["effective_rank"])):
        lines.append(f"{layer:5}")
        for name, (_, style, _) in shown.items():
            after = f" -> {np.nanmean(rotated[name][:, layer]):{style}}" if name in rotated else ""
            lines[-1] += f" {np.nanmean(diagnosed[name][layer]):{style}}{after}".rjust(15)
    return "\n".join(lines)


def answers(steps, diagnosed):
    """Jha and Reagen's questions, answered in lines of text. diagnosed: (R, S, L, H), R seeds and S snapshots."""

    def trend(name):  # from the first snapshot to the last, mean ± standard deviation over seeds
        values, style = np.nanmean(diagnosed[name], (2, 3)), DIAGNOSTICS[name][1]  # (R, S)
        ends = values.T[sorted({0, len(steps) - 1})]
        return " -> ".join(f"{x.mean():{style}}" + (f" ±{x.std(ddof=1):{style}}" if len(x) > 1 else "") for x in ends)

    lines = [f"fit       KS distance to the null {trend('ks')}"]
    n = np.nanmean(diagnosed["effective_rank"] / diagnosed["effective_rank_share"])
    if np.nanmean(diagnosed["ks"][:, -1]) > 0.1 + 1 / n:  # random matrices stay below this
        lines += ["          The bulk does not fit the null, so eigenvalues beyond its edge need not be outliers"]
    lines += [f"beyond    the edge: {trend('outlier_share')} of the eigenvalues, {trend('outlier_energy')} of the sum"]
    spikes, rank = spiked(diagnosed["p"]), np.nanmean(diagnosed["effective_rank"], -1)  # (R, S, L)
    layers = ", ".join(map(str, np.flatnonzero(spikes[:, -1].mean(0) > 0.5)))
    lines += [f"spikes    significant in layers: {layers or 'none'}"]
    first = (spikes & (spikes.cumsum(1) == 1))[:, 1:]  # a layer's first spike, unless it starts with one
    change, calm = rank[:, 1:] / rank[:, :-1] - 1, ~spikes[:, 1:]
    if first.any():
        when, stay = np.array(steps[1:])[first.nonzero()[1]], spikes[spikes.cumsum(1) > 0].mean()
        lines += [f"          first at steps {when.min()} to {when.max()}; from then on in {stay:.0%} of the snapshots"]
        lines += [f"collapse  effective rank changes when a layer first spikes: {np.nanmean(change[first]):+.1%}, "]
        both = np.argwhere(first.any(-1) & calm.any(-1))  # seeds and snapshots with layers of both kinds
        gaps = [change[i, j][first[i, j]].mean() - change[i, j][calm[i, j]].mean() for i, j in both]
        lines[-1] += f"{np.mean(gaps):+.1%} against calm layers (n={len(gaps)})" if gaps else "no calm layers left"
    share, of_null = trend("effective_rank_share"), trend("effective_rank_of_null")
    return [*lines, f"rank      {trend('effective_rank')}: {share} of n; {of_null} of the null's"]


def draw_model(path, title, config, found, rotated, null):
    """Histograms of heads' eigenvalues (L, H, n), before and after rotation (draws, L, H, n), in up to four layers."""
    from matplotlib.figure import Figure

    layers = sorted({round(x) for x in np.linspace(0, config.n_layer - 1, 4)})
    figure = Figure(figsize=(max(8, 1 + 4 * len(rotated)), 1.5 + 1.6 * len(layers)), layout="constrained")
    figure.suptitle(f"{title}: eigenvalues of M M^T, against the {null} null")
    axes = figure.subplots(len(layers), len(rotated), squeeze=False, sharex="col")
    for name, column in zip(rotated, axes.T, strict=True):
        chain, mp, chosen = (laws(config, one)[name] for one in (*NULLS, null))
        before, after = (np.log10(x / np.median(x, -1, keepdims=True)) for x in (found[name], rotated[name]))
        top = np.max(before, where=np.isfinite(before), initial=3)
        for layer, ax in zip(layers, column, strict=True):
            hist = partial(ax.hist, bins=np.linspace(-3, top, 49), density=True)
            x, turned = (logs[~np.isnan(logs)].clip(-3, top) for logs in (before[layer], after[:, layer]))
            hist(x, color="#BBBBBB", label="eigenvalues")
            hist(turned, color="#D55E00", histtype="step", label="random rotations (haar)")
            for law, style, label in ((chain, "k-", "Gaussian product (chain)"), (mp, "k:", "Marchenko-Pastur (mp)")):
                ax.plot(np.log10(law.x / law.median), law.x * law.density * np.log(10), style, linewidth=1, label=label)
            ax.axvline(np.log10(chosen.upper / chosen.median), color="k", linewidth=0.7)
            ax.set(xlim=(-3, top), yticks=[], title=f"{name}, layer {layer}")
        column[-1].set_xlabel("log10(eigenvalue / median); vertical line: edge of the null")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)


def draw_dynamics(path, columns, title):
    """columns: (name, steps, diagnostics (R, S, L, H)). One line per layer, the mean over heads and seeds."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    labels = {name: label for name, (_, _, label) in DIAGNOSTICS.items() if label}
    figure = Figure(figsize=(1 + 3.4 * len(columns), 1 + 1.5 * len(labels)), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(len(labels), len(columns), squeeze=False, sharex="col", sharey="row")
    for column, (heading, steps, diagnosed) in zip(axes.T, columns, strict=True):
        for ax, (name, label) in zip(column, labels.items(), strict=True):
            for layer, line in enumerate(lines := np.nanmean(diagnosed[name], (0, 3)).T):
                ax.plot(steps, line, color=colormaps["turbo"]((layer + 0.5) / len(lines)), label=f"layer {layer}")
            ax.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
            ax.set_xticks([steps[i] for i in (0, len(steps) // 4, len(steps) // 2, -1)])
            ax.set(yscale="log" if name == "mp_gap" else "linear", ylabel=label)
            ax.grid(alpha=0.3)
            ax.label_outer()
        column[0].set_title(heading, fontsize=10)
        column[-1].set_xlabel("step (square-root scale)")
    deepest = max(axes[0], key=lambda ax: len(ax.lines))
    figure.legend(*deepest.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=120)


def show(title, config, steps, found, null):
    """Print answers about the spectra() (R, S, L, H, n) of R seeds and S snapshots -> {name: diagnostics}"""
    diagnosed, when = {}, f"step {steps[-1]}" + f", {len(steps)} snapshots" * (len(steps) > 1)
    print(f"{title}: {config.attn}, {config.n_layer} x {config.n_head} heads, {when}")
    for name, law in laws(config, null).items():
        diagnosed[name], (part, level) = diagnose(found[name], law), name.split()
        rank = np.nanmean(diagnosed[name]["effective_rank"][:, -1])
        lines = answers(steps, diagnosed[name]) if law else [f"rank      {rank:.1f} at the last snapshot"]
        against = f"against the {null} null" if law else "content + rotary, which has no null law"
        print(f"\n{part}, W_Q W_K^T of each {level.removesuffix('s')}, {against}:", *lines, sep="\n  ")
    return diagnosed


def analyse_model(path, args):
    """Tables, answers and a figure for one checkpoint."""
    model, checkpoint = load_checkpoint(path)
    config, out, length = model.config, args.out or path.parent, model.config.block_size
    report = {"path": str(path), "config": asdict(config), "step": checkpoint["step"], "null": args.null}
    if max(args.distance) > (longest := 0 if config.attn in LEARNED else length - 1) or min(args.distance) < 0:
        raise InputError(f"--distance: must be from 0 to {longest} for this model")
    if args.data:
        meta, _, tokens = load_data(args.data)
        if meta["vocab_size"] != config.vocab_size or len(tokens) < length:
            raise InputError(f"--data={args.data}: needs the model's tokenizer and {length:,} validation tokens")
        rows = torch.from_numpy(tokens[: 32 * length].astype(np.int64)).unfold(0, length, length)
        report["logit_ranks"] = ranks = logit_ranks(model, rows)
        print(f"effective rank of M on inputs from {args.data}, by layer:", *np.nanmean(ranks, 1).round(1), end="\n\n")
    for distance in args.distance:
        found, rotated, title = spectra(model, distance), {}, f"{path}, distance {distance}"
        for layer in np.flatnonzero(np.isnan(found.get("both heads", found["content heads"])).any((1, 2))):
            print(f"{path}: layer {layer} has weights that are not finite; those heads are skipped", file=sys.stderr)
        diagnosed = show(title, config, [checkpoint["step"]], stack([stack([found])]), args.null)  # R = S = 1
        report[f"distance {distance}"] = {"spectra": found, "diagnostics": diagnosed, "rotated": {}}
        for name, law in laws(config, args.null).items():
            before, after = {diagnostic: x[0, 0] for diagnostic, x in diagnosed[name].items()}, {}
            print(f"\n{name}, distance {distance}{', mean over heads' * name.endswith('heads')}")
            if law:
                draws = 20 if name.endswith("heads") else max(2, min(20, 1280 // config.n_embd))  # large: less scatter
                rotated[name] = np.stack([haar(qk_factors(b.attn, distance)[name], draws) for b in model.blocks], 1)
                report[f"distance {distance}"]["rotated"][name] = after = diagnose(rotated[name], law)
                above = np.mean(before["mp_gap"] > after["mp_gap"].max(0))
                print(f"a -> b: before and after random rotations. {above:.0%} exceed the MP-gap of all {draws} draws")
            print(table(before, {x: after[x] for x in ("outlier_share", "mp_gap", "effective_rank") if law}))
    heads = {name: x for name, x in rotated.items() if name.endswith("heads")}
    draw_model(out / "spectrum.png", title, config, found, heads, args.null)
    (out / "spectrum.json").write_text(to_json(report))
    print(f"wrote {out / 'spectrum.json'} and {out / 'spectrum.png'}")


def analyse_runs(paths, args):
    """Answers and a figure for runs; runs that differ only in their seed share a column."""
    groups, columns, report = {}, [], []
    for path in dict.fromkeys(paths):
        (key, config), steps, found = read_run(path)
        groups.setdefault((key, *steps), []).append((path, config, found))
    for (_, *steps), runs in groups.items():
        names, config = " ".join(str(path) for path, _, _ in runs), runs[0][1]
        diagnosed = show(names, config, steps, stack([found for _, _, found in runs]), args.null)
        title = runs[0][0].name[:32] + (f", {len(runs)} seeds" if len(runs) > 1 else "") + f"\n{config.attn}, "
        shown = diagnosed.keys() & {"content heads", "rotary heads"}
        columns += [(title + name, steps, diagnosed[name]) for name in sorted(shown)]
        report.append(dict(runs=names, null=args.null, config=asdict(config), steps=steps, diagnostics=diagnosed))
    print("\nNulls differ between variants. To compare variants, use effective rank as a share of the null's.")
    out = args.out or Path(os.path.commonpath([path.absolute() for path in paths]))
    figure = out / f"dynamics_{args.null}.png"
    draw_dynamics(figure, columns, f"Each head's W_Q W_K^T in training, against the {args.null} null")
    (out / "dynamics.json").write_text(to_json(report))
    print(f"wrote {out / 'dynamics.json'} and {figure}")


def main():
    example = "example: python spectrum.py out out/mla_decoupled --null=mp"
    parser = Parser(description=__doc__.split("\n\n")[0], epilog=example)
    add = parser.add_argument
    add("paths", nargs="+", type=Path, help="a checkpoint; or run folders, to compare their dynamics")
    add("--null", choices=NULLS, default="chain", help="null law to measure against (default: %(default)s)")
    add("--distance", type=int, nargs="+", help="checkpoint only: tokens from key to query (default: 0)")
    add("--data", help="checkpoint only: data folder; adds the effective rank of the scores on it (default: none)")
    add("--out", type=Path, help="folder for JSON and figure (default: the checkpoint's or the runs' common folder)")
    args = parser.parse_args()
    runs = len(args.paths) > 1 or args.paths[0].is_dir()
    if runs and (args.distance or args.data):
        raise InputError("--distance and --data go with a checkpoint, not with the folders of runs")
    args.distance = args.distance or [0]
    (args.out or Path(".")).mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # zero or non-finite weights give 0/0
        analyse_runs(args.paths, args) if runs else analyse_model(args.paths[0], args)


if __name__ == "__main__":
    run(main)
