"""What training does to W_Q W_K^T: its eigenvalues against those that a matrix without structure would have.

Attention scores a pair of tokens by x M x'^T, with one M = W_Q W_K^T, (d, d), per head. Training writes structure into
M, and it shows as eigenvalues of M M^T beyond the range that chance explains. That range needs a null law. M is a
product of matrices, two for MHA and three or four for MLA, and the spectrum of a product of Gaussian matrices is known
exactly at large size: the null "chain". The literature takes the Marchenko-Pastur law, that of ONE Gaussian matrix (the
null "mp"), and so calls a tenth to a third of a head's eigenvalues outliers before any training.

    python spectrum.py out/ckpt.pt         one model: a table, answers in words, spectrum.json, spectrum.png
    python spectrum.py out/a out/b         the learning dynamics of runs, side by side, from their spectrum.jsonl

Sources: Marchenko and Pastur 1967 (mp); Burda, Jarosz, Livan, Nowak, Swiech 2010, arXiv 1007.3594 (chain); Roy and
Vetterli 2007 (effective rank); Martin and Mahoney 2021, arXiv 1810.01075 (soft and stable rank of weights); Jha and
Reagen 2025, arXiv 2507.09394 (the diagnostics, on W_Q W_K^T).
"""

import json
import math
import os
import sys
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np
import torch
from scipy.optimize.elementwise import find_root
from scipy.special import entr

from data.common import InputError, Parser, run
from model import MLA, GPTConfig, load_checkpoint

NULLS = ("chain", "mp")
CIRCUITS = ("content", "rotary", "both")  # which part of a head's key; only mla_decoupled has more than content
SPIKED = 1  # a layer has spikes if its heads average this many outliers; below lies chance

# Null laws ------------------------------------------------------------------------------------------------------------


def chain_law(dims):
    """The law of the non-zero eigenvalues of M M^T, scaled to mean 1, for M a product of independent Gaussian matrices
    of shapes N_0 x N_1, N_1 x N_2, ...; dims = (N_0, N_1, ...). Exact as the dimensions grow in proportion (Burda et
    al. 2010). Two dimensions: Marchenko-Pastur. Raises ValueError unless dims are two or more whole numbers from 1."""
    if len(dims) < 2 or not all(n >= 1 and n % 1 == 0 for n in dims):
        raise ValueError(f"dims={dims}: must be two or more whole numbers from 1, the path of a product's shapes")
    return ChainLaw(dims)


class ChainLaw:
    """The law that chain_law gives: lower and upper edge, median; pdf(x), cdf(x), quantile(q) of numbers or arrays.

    Let n be the smallest dimension, and c_i = n/N_i for all m + 1 of them. psi = sum_k (k-th moment) / lambda^k solves

        lambda = prod_i (1 + c_i psi) / psi.

    Which of the many roots is the law's? Write psi = rho e^(i angle). Lambda is real and positive where the angles of
    the factors 1 + c_i psi add up to that of psi. Their sum grows with rho, so that each angle in (0, pi) has one such
    rho. On this curve lambda falls from the upper edge, at angle 0, to the lower one, at pi, and the density is
    Im psi / (pi lambda)."""

    def __init__(self, dims):
        self.c = min(dims) / np.sort(np.array(dims, dtype=float))
        self.angles = np.pi / 2 - (np.pi / 2 - 1e-6) * np.cos(np.linspace(0, np.pi, 2001))  # dense at the edges
        self.table = self.curve(self.angles)
        # lambda is stationary at the edges: so near to them it is exact to 1e-12
        upper, lower = self.value(self.table[[0, -1]])
        self.upper, self.lower = float(upper), float(lower) if self.c[1] < 1 else 0.0
        self.median = float(self.quantile(0.5))

    def c_psi(self, psi):  # (m + 1, ...)
        return np.multiply.outer(self.c, psi)

    def value(self, psi):
        """lambda"""
        return (np.prod(1 + self.c_psi(psi), axis=0) / psi).real

    def share(self, psi):
        """The share of eigenvalues below lambda, by the antiderivative of psi dlog(lambda), which is
        (m - sum_i 1/(1 + c_i psi)) dpsi. Its imaginary part is 0 at the upper edge, and -pi at the lower one."""
        logs = np.tensordot(1 / self.c, np.log1p(self.c_psi(psi)), axes=1)
        return 1 + ((len(self.c) - 1) * psi - logs).imag / np.pi

    def curve(self, angle):
        """psi at these angles in (0, pi)."""
        part = angle / len(self.c)
        low = np.log(np.sin(part) / np.sin(angle - part))  # log rho if all c_i were 1; if all were the least: high
        high = low - np.log(self.c[-1])

        def surplus(log_rho, angle):
            return np.angle(1 + self.c_psi(np.exp(log_rho + 1j * angle))).sum(axis=0) - angle

        return np.exp(find_root(surplus, (low - 1e-9, high + 1e-9), args=(angle,)).x + 1j * angle)

    def find(self, function, goal):
        """psi on the curve where value, or share, is what is asked for; its angle to 1e-5."""
        return self.curve(np.interp(goal, function(self.table)[::-1], self.angles[::-1]))

    def pdf(self, x):
        return np.where((x > self.lower) & (x < self.upper), self.find(self.value, x).imag / (np.pi * np.asarray(x)), 0)

    def cdf(self, x):
        return np.select([x <= self.lower, x >= self.upper], [0, 1], self.share(self.find(self.value, x)))

    def quantile(self, q):
        return self.value(self.find(self.share, q))

    def log_density(self):
        """Points (x, density per unit of log x) along the whole law, to draw."""
        return self.value(self.table), self.table.imag / np.pi


class SampledLaw:
    """The same for eigenvalues drawn from a null without a formula, scaled to mean 1."""

    def __init__(self, eigenvalues):
        self.x = np.sort(np.ravel(eigenvalues) / np.mean(eigenvalues))
        self.lower, self.upper, self.median = float(self.x[0]), float(self.x[-1]), float(np.median(self.x))

    def cdf(self, x):
        return np.searchsorted(self.x, x, side="right") / len(self.x)

    def quantile(self, q):
        return np.quantile(self.x, q)

    def log_density(self):
        mass, bins = np.histogram(np.log(self.x), bins=40, density=True)
        return np.exp((bins[1:] + bins[:-1]) / 2), mass

    def pdf(self, x):
        at, density = self.log_density()
        return np.interp(x, at, density / at, left=0, right=0)


@cache
def decoupled_law(d, width, r, rope_dim, strength, q=None):
    """The law of content and rotary part together: queries (d, width + R), keys [W_DK^T W_UK | W_KR], where the entries
    of the rotary part's M are `strength` times what they are if all weights are alike. Simulated: 4 draws from a fixed
    seed, at a multiple of the shape that has at least 256 eigenvalues, or is 2,048 wide."""
    times = max(1, min(math.ceil(256 / min(d, width + rope_dim, r + rope_dim, q or d)), 2048 // d))
    d, width, r, rope_dim, q = (times * size for size in (d, width, r, rope_dim, q or 0))
    generator = torch.Generator().manual_seed(0)

    def gaussian(*shape):
        return torch.randn(shape, generator=generator)

    def draw():
        front = [gaussian(d, q) * q**-0.5] if q else []  # the queries' latent
        content = [*front, gaussian(q or d, width), gaussian(width, r) * r**-0.5, gaussian(r, d)]
        rotary = [*front, strength * gaussian(q or d, rope_dim), gaussian(rope_dim, d)]
        return eigenvalues(both([content], [rotary])[0])

    return SampledLaw([draw() for _ in range(4)])


def paths(config):
    """{circuit: {"heads": dims, "layer": dims}}: the shapes along a head's W_Q W_K^T, and along a layer's."""
    d, h, R = config.n_embd, config.head_dim, config.rope_dim
    heads = (config.kv_heads if config.attn == "gqa" else config.n_head) * h  # heads that share keys add up to one
    front, behind = (d,) if config.q_rank is None else (d, config.q_dim), (d,)
    if config.attn in MLA:
        behind = (config.latent_dim, d, d) if config.attn == "mla_prerope" else (config.latent_dim, d)
    found = {"content": {"heads": (*front, h, *behind), "layer": (*front, heads, *behind)}}
    if R:
        found["rotary"] = {"heads": (*front, R, d), "layer": (*front, R, d)}
        r = config.latent_dim
        found["both"] = {"heads": (*front, h + R, r + R, d), "layer": (*front, d + R, r + R, d)}
    return found


def rotary_strength(config, spectra, level):
    """How much larger the entries of the rotary part are than the content's, by the medians of spectra() (S, L, H, n),
    in steps of 2^(1/4) -> (S, L). Training moves it away from 1; a null without it would call that structure."""
    size = {}
    for circuit in ("content", "rotary"):
        dims = paths(config)[circuit][level]
        width = dims[1 if config.q_rank is None else 2]
        unit = chain_law(dims).median * dims[0] ** 2 * width / min(dims)  # the median, if entries have variance 1
        size[circuit] = np.median(np.median(spectra[circuit][level], -1), -1) / unit
    with np.errstate(all="ignore"):  # eigenvalues are squares: twice their log2 is four times that of the entries
        quarters = np.round(2 * np.log2(size["rotary"] / size["content"]))
    return 2 ** (np.nan_to_num(quarters, posinf=0, neginf=0).clip(-24, 24) / 4)


class LawPerLayer:
    """The laws each[step][layer] as one, for diagnose(): medians and edges (S, L, 1)."""

    def __init__(self, each):
        self.each = each
        self.median = np.array([[law.median for law in step] for step in each])[..., None]
        self.upper = np.array([[law.upper for law in step] for step in each])[..., None]


def laws(config, null, spectra):
    """{circuit: {"heads": law, "layer": law}} for the spectra() (S, L, H, n) of a GPTConfig; null is one of NULLS."""
    d, R = config.n_embd, config.rope_dim

    def law(circuit, level, dims):
        if null == "mp":
            return chain_law((min(dims), d))
        if circuit != "both":
            return chain_law(dims)
        strengths = rotary_strength(config, spectra, level)
        width, q = (config.head_dim if level == "heads" else d), config.q_rank and config.q_dim
        return LawPerLayer([[decoupled_law(d, width, config.latent_dim, R, s, q) for s in step] for step in strengths])

    return {c: {level: law(c, level, dims) for level, dims in levels.items()} for c, levels in paths(config).items()}


# Eigenvalues and diagnostics ------------------------------------------------------------------------------------------


def eigenvalues(factors):
    """The non-zero eigenvalues of M M^T, M = W_1 W_2 ... W_m, largest first: (..., n) float64, n the least dimension.

    factors: tensors (..., N_0, N_1), (..., N_1, N_2), ... M is cut where it is narrowest, M = L R, and the eigenvalues
    are those of the n x n product (L^T L)(R R^T): nothing of the size of M is formed. NaN where a factor is not
    finite."""
    factors = [factor.detach().cpu().double() for factor in factors]
    sizes = [factor.abs().amax((-2, -1), keepdim=True) for factor in factors]  # taken out, lest Grams overflow
    finite = math.prod(sizes).isfinite().squeeze((-2, -1))
    factors = [(factor / size).nan_to_num(0, 0, 0) for factor, size in zip(factors, sizes, strict=True)]
    dims = [factors[0].size(-2), *(factor.size(-1) for factor in factors)]
    cut = dims.index(min(dims))
    left = right = None
    for w in factors[:cut]:
        left = w.mT @ w if left is None else w.mT @ left @ w
    for w in reversed(factors[cut:]):
        right = w @ w.mT if right is None else w @ right @ w.mT
    if left is None or right is None:
        product = right if left is None else left
    else:  # as a symmetric matrix
        values, vectors = torch.linalg.eigh(left)
        root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
        product = root.mT @ right @ root
    found = torch.linalg.eigvalsh(product).clamp(min=0).flip(-1) * math.prod(sizes).squeeze(-1) ** 2
    return found.masked_fill(~finite.unsqueeze(-1), math.nan).numpy()


def diagnose(eigenvalues, law):
    """Eigenvalues (..., n), in any order, against a null law -> a dict of arrays (...).

    The law is scaled so that its median is theirs: spikes, which training makes, do not move a median.
    edge: l+, the law's upper edge, so scaled. mp_gap: l_1 / l+. outliers: how many lie above l+; outlier_share: of n.
    outlier_energy: their part of the sum. soft_rank: min(1, l+ / l_1). stable_rank: sum / l_1. effective_rank:
    exp(entropy of l / sum). The last two also as a share of n. NaN where the eigenvalues are NaN or all 0."""
    n = eigenvalues.shape[-1]
    total, largest = eigenvalues.sum(-1), eigenvalues.max(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        edge = np.median(eigenvalues, -1) / law.median * law.upper
        outlying = eigenvalues > edge[..., None]
        found = {
            "edge": edge,
            "mp_gap": largest / edge,
            "outliers": np.where(np.isnan(total), np.nan, outlying.sum(-1)),
            "outlier_energy": (eigenvalues * outlying).sum(-1) / total,
            "soft_rank": np.minimum(1, edge / largest),
            "stable_rank": total / largest,
            "effective_rank": np.exp(entr(eigenvalues / total[..., None]).sum(-1)),
        }
    shares = {"outlier_share": "outliers", "stable_rank_share": "stable_rank", "effective_rank_share": "effective_rank"}
    return found | {share: found[name] / n for share, name in shares.items()}


def against_nulls(config, spectra):
    """{null: {circuit: {"heads": diagnostics (S, L, H), "layer": (S, L, 1)}}} of spectra() (S, L, H, n)."""
    return {
        null: {
            circuit: {level: diagnose(spectra[circuit][level], law) for level, law in levels.items()}
            for circuit, levels in laws(config, null, spectra).items()
        }
        for null in NULLS
    }


def qk_chains(model, layer):
    """For each head the factors whose product is its W_Q W_K^T (d, d): {"content": [...], "rotary": [...]}.

    Queries, then keys: two factors for MHA and GQA, three for MLA, four for mla_prerope. With q_rank, W_DQ comes first.
    "rotary" is there for mla_decoupled alone. RoPE is left out, and of a latent norm all but its gain."""
    attn, config = model.blocks[layer].attn, model.config
    weights = {name: module.weight.detach() for name, module in attn.named_children() if hasattr(module, "weight")}
    w = {name: weight.T if weight.dim() == 2 else weight for name, weight in weights.items()}  # matrices and gains
    for down, gain in (("w_dq", "norm_q"), ("w_dk", "norm_k")):
        if gain in w:
            w[down] = w[down] * w[gain]

    def of_head(matrix, head, width):  # the columns of W (d_in, heads * width) that belong to one head
        return matrix[:, head * width : (head + 1) * width]

    h, chains = config.head_dim, []
    front = [w["w_dq"]] if config.q_rank is not None else []
    for head in range(config.n_head):
        query = of_head(w["w_uq" if front else "w_q"], head, h)
        if config.attn not in MLA:
            key = of_head(w["w_k"], head * config.kv_heads // config.n_head, h)
            chains.append({"content": [query, key.T]})
            continue
        content = [*front, query, of_head(w["w_uk"], head, h).T, w["w_dk"].T]
        chains.append({"content": content + ([w["w_k"].T] if config.attn == "mla_prerope" else [])})
        if config.attn == "mla_decoupled":
            chains[-1]["rotary"] = [*front, of_head(w["w_qr"], head, config.rope_dim), w["w_kr"].T]
    return chains


def whole_layer(chains, at):
    """The chains of a layer's heads -> the factors of the sum of their products; `at`: where queries stand in a chain.
    Heads that share keys (gqa; the rotary part) add their queries, the others stand side by side."""
    queries, keys = {}, {}
    for chain in chains:
        query, key = chain[at : at + 2]
        shared = key.data_ptr()
        queries[shared] = queries[shared] + query if shared in queries else query
        keys[shared] = key
    front, behind = chains[0][:at], chains[0][at + 2 :]
    return [*front, torch.cat([*queries.values()], dim=1), torch.cat([*keys.values()]), *behind]


def both(content, rotary):
    """The chains of mla_decoupled's heads, twice -> of their sums: queries side by side, keys below each other."""
    latent = torch.cat((content[0][-1], rotary[0][-1]))  # (r + R, d), shared by the heads
    identity = torch.eye(rotary[0][-1].size(0))
    return [
        [*front, torch.cat((q, q_r), dim=1), torch.block_diag(w_uk, identity.to(w_uk)), latent]
        for (*front, q, w_uk, _), (*_, q_r, _) in zip(content, rotary, strict=True)
    ]


def stacked(chains):
    """The chains of heads -> factors (H, ., .), or (1, ., .) where all heads share one."""
    return [torch.stack(w[:1] if len({part.data_ptr() for part in w}) == 1 else w) for w in zip(*chains, strict=True)]


def spectra(model):
    """{circuit: {"heads": (L, H, n), "layer": (L, 1, n)}}: the eigenvalues of each head's W_Q W_K^T, and of each
    layer's, its heads together. NaN where weights are not finite."""
    layers = []
    for layer in range(model.config.n_layer):
        heads = qk_chains(model, layer)
        chains = {}
        for circuit in heads[0]:
            of_heads = [head[circuit] for head in heads]
            at = 0 if model.config.q_rank is None else 1
            chains[circuit] = {"heads": of_heads, "layer": [whole_layer(of_heads, at)]}
        if "rotary" in chains:
            content, rotary = chains["content"], chains["rotary"]
            chains["both"] = {level: both(content[level], rotary[level]) for level in content}
        layers.append({c: {at: eigenvalues(stacked(f)) for at, f in levels.items()} for c, levels in chains.items()})
    return {c: {at: np.stack([layer[c][at] for layer in layers]) for at in levels} for c, levels in layers[0].items()}


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


def read_model(path):
    """A checkpoint -> its GPTConfig, [step], and spectra() with a 1 in front. Says which layers are not finite."""
    model, checkpoint = load_checkpoint(path)
    step = checkpoint.get("step")
    if type(step) is not int:
        raise InputError(f"{path}: does not say of which step it is; was it written by train.py?")
    found = spectra(model)
    finite = np.all([np.isfinite(levels["heads"]).all((1, 2)) for levels in found.values()], axis=0)
    for layer in np.flatnonzero(~finite):
        print(f"{path}: layer {layer} has weights that are not finite; the rest is analysed", file=sys.stderr)
    return model.config, [step], {c: {at: values[None] for at, values in levels.items()} for c, levels in found.items()}


def read_run(folder):
    """The spectrum.jsonl of a run folder -> GPTConfig, steps (S of them), and spectra() with S in front. Says which
    lines are not whole snapshots of the run. Raises InputError if none is."""
    path = folder / "spectrum.jsonl"
    if not path.is_file():
        raise InputError(f"{folder}: no run's folder: it has no spectrum.jsonl, which train.py writes into --out")
    config, snapshots = None, {}
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        try:
            entry = json.loads(line)
            config = config or GPTConfig(**entry["config"])
            rows = {"heads": (config.n_layer, config.n_head), "layer": (config.n_layer, 1)}
            snapshots[int(entry["step"])] = {
                (c, level): np.array(entry["spectra"][c][level], dtype=float).reshape(*rows[level], min(dims))
                for c, levels in paths(config).items()
                for level, dims in levels.items()
            }
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            print(f"{path}: line {number} is not a whole snapshot; left out", file=sys.stderr)
    if not snapshots:
        raise InputError(f"{path}: holds no whole snapshot; train again")
    steps = sorted(snapshots)
    found = {
        c: {level: np.stack([snapshots[step][c, level] for step in steps]) for level in levels}
        for c, levels in paths(config).items()
    }
    return config, steps, found


# What a reader sees ---------------------------------------------------------------------------------------------------

DIAGNOSTICS = {  # heading in the table, format there, what the figure says
    "mp_gap": ("MP-gap", ".3g", "MP-gap\nlargest / edge"),
    "outliers": ("outliers", ".1f", "outliers\nper head"),
    "outlier_energy": ("energy", ".0%", "outlier energy\nshare of the sum"),
    "soft_rank": ("soft rank", ".2f", "MP soft rank\nedge / largest"),
    "stable_rank_share": ("stable rank", ".1%", "stable rank\nshare of n"),
    "effective_rank_share": ("eff. rank", ".1%", "effective rank\nshare of n"),
}


def table(found):
    """A row per layer of diagnostics (L, H): mean ± standard deviation over heads. Ranks are shares of full rank."""
    lines = ["layer" + "".join(f"{heading:>12}" for heading, _, _ in DIAGNOSTICS.values())]
    for layer in range(len(found["edge"])):
        line = f"{layer:5}"
        for name, (_, style, _) in DIAGNOSTICS.items():
            values = found[name][layer][np.isfinite(found[name][layer])]
            if len(values) == 0:
                line += f"{'-':>12}"
            else:
                shorter = style.replace("3", "2")  # of MP-gap's three digits
                spread = f" ±{values.std():{shorter}}" if len(found[name][layer]) > 1 else ""
                line += f" {values.mean():{style}}{spread}".rjust(12)
        lines.append(line)
    return "\n".join(lines)


def print_tables(levels, circuit, null, found):
    """For each head, and for the heads of a layer together."""
    for level, who in (("heads", "each head"), ("layer", "the heads of a layer together")):
        dims = levels[level]
        shape = "simulated" if circuit == "both" else " x ".join(map(str, dims))
        if null == "mp":
            shape = f"ratio {min(dims)}/{dims[0]}"
        print(f"\n{circuit}, {who}: {min(dims)} eigenvalues; null {null}: {shape}")
        print(table({name: values[0] for name, values in found[level].items()}))


def known_mean(values):
    """The mean over the last axis, the heads as a rule, of what is finite; NaN if nothing is."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(-1) / known.sum(-1)


def layer_list(chosen):
    if not any(chosen):
        return "no layer"
    layers = ", ".join(map(str, np.flatnonzero(chosen)))
    return f"layer {layers}" if sum(chosen) == 1 else f"layers {layers}"


def findings(steps, found):
    """What Jha and Reagen ask, answered from the diagnostics (S, L, H) of S snapshots: where there are spikes, since
    when, whether they stay, and whether rank falls with them -> lines."""
    from scipy.stats import spearmanr

    outliers, energy, rank = (
        known_mean(found[name]) for name in ("outliers", "outlier_energy", "effective_rank_share")
    )
    spiked = outliers >= SPIKED  # (S, L)
    most = np.nan_to_num(outliers[-1]).argmax()
    lines = [
        f"where    {layer_list(spiked[-1])}; most in layer {most}: {outliers[-1, most]:.1f} per head, with "
        f"{energy[-1, most]:.0%} of energy"
    ]
    if len(steps) > 1 and spiked.any():
        first = np.where(spiked.any(0), spiked.argmax(0), len(steps))
        since = [f"{layer_list(first == i)} from step {steps[i]}" for i in np.unique(first[first < len(steps)])]
        lines.append("when     " + "; ".join(since))
        later = spiked[np.arange(len(steps))[:, None] > first]
        if len(later):
            lines.append(f"persist  once in a layer, they are there in {later.mean():.0%} of the later snapshots")
    if len(steps) > 1:
        rank_at = (f"{known_mean(rank[i]):.0%} of full at step {steps[i]}" for i in (0, -1))
        lines.append("rank     effective rank " + ", ".join(rank_at))
    else:  # one model: heads tell what steps cannot
        energy, rank = found["outlier_energy"], found["effective_rank_share"]
        lines.append(f"rank     effective rank {known_mean(rank.ravel()):.0%} of full")
    known = np.isfinite(energy) & np.isfinite(rank)
    if known.sum() < 3 or np.ptp(energy[known]) == 0 or np.ptp(rank[known]) == 0:
        return lines
    correlation = spearmanr(energy[known], rank[known]).statistic
    verdict = "falls with" if correlation < -0.5 else "rises with" if correlation > 0.5 else "does not follow"
    over = "steps" if len(steps) > 1 else "heads"
    lines.append(f"         {verdict} outlier energy: rank correlation {correlation:.2f} over layers and {over}")
    return lines


def disagreement(steps, chain, mp):
    """Where the null laws differ on diagnostics (S, L, H) -> lines."""
    differ = np.mean((known_mean(chain["outliers"]) >= SPIKED) != (known_mean(mp["outliers"]) >= SPIKED))
    shares = [[known_mean(found["outlier_share"][i].ravel()) for i in range(len(steps))] for found in (mp, chain)]
    return [
        f"at step {steps[i]}, mp calls {shares[0][i]:.1%} of the eigenvalues outliers, chain {shares[1][i]:.1%}"
        for i in sorted({0, len(steps) - 1})
    ] + [f"in {differ:.0%} of all layers and snapshots only one of them sees spikes"]


def print_answers(steps, circuit, diagnosed):
    """In words, by both nulls, and where these disagree."""
    for null in NULLS:
        print(f"\nspikes in each head's W_Q W_K^T ({circuit}), null {null}:")
        print("  " + "\n  ".join(findings(steps, diagnosed[null])))
    print("\nwhere the nulls disagree:")
    print("  " + "\n  ".join(disagreement(steps, diagnosed["chain"], diagnosed["mp"])) + "\n")


def draw_model(path, config, spectra, diagnosed, title):
    """Histograms of spectra() (1, L, H, n) of a model, and both null laws: a row per layer, a column per circuit."""
    from matplotlib.figure import Figure

    columns = [(circuit, "heads") for circuit in spectra] + [([*spectra][-1], "layer")]
    figure = Figure(figsize=(0.6 + 3.4 * len(columns), 1.2 + 1.5 * config.n_layer), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(config.n_layer, len(columns), squeeze=False, sharex="col")
    both_laws = [laws(config, null, spectra) for null in NULLS]
    for column, (circuit, level) in enumerate(columns):
        found = {name: values[0] for name, values in diagnosed["chain"][circuit][level].items()}  # (L, H)
        chain, mp = (of_null[circuit][level] for of_null in both_laws)
        chains = chain.each[0] if circuit == "both" else [chain] * config.n_layer
        with np.errstate(all="ignore"):
            scaled = [
                law.upper * x / edge
                for law, x, edge in zip(chains, spectra[circuit][level][0], found["edge"][..., None], strict=True)
            ]
        scaled = [x[np.isfinite(x)] for x in scaled]
        seen = np.concatenate(scaled)
        seen = seen[seen > 0]
        low, high = (np.quantile(seen, 0.01), seen.max()) if len(seen) else (1, 1)
        bins = np.geomspace(min(0.05, low), max(20, 1.5 * high), 60)
        for layer, (ax, chain, values) in enumerate(zip(axes[:, column], chains, scaled, strict=True)):
            beyond = values > chain.upper
            weight = 1 / max(1, len(values)) / np.log(bins[1] / bins[0])
            for part, colour, label in ((~beyond, "#DDDDDD", "eigenvalues"), (beyond, "#0072B2", "outliers")):
                ax.stairs(weight * np.histogram(values[part], bins)[0], bins, fill=True, color=colour, label=label)
            for law, unit, style, label in (
                (chain, 1, "k-", "product of Gaussians"),
                (mp, chain.median / mp.median, "k:", "Marchenko-Pastur"),
            ):
                x, density = law.log_density()
                ax.plot(unit * x, density, style, linewidth=1, label=f"{label}, and its edge")
                ax.axvline(unit * law.upper, linestyle=style[1:], color="k", linewidth=1)
            count, energy = (known_mean(found[name][layer]) for name in ("outliers", "outlier_energy"))
            per_head = " a head" if level == "heads" else ""
            told = (
                f"{count:.1f} outliers{per_head}, {energy:.0%} of energy" if len(values) else "weights are not finite"
            )
            ax.set_title(f"layer {layer}: {told}", fontsize=10)
            ax.set(xscale="log", xlim=(bins[0], bins[-1]), yticks=[])
        who = "each head" if level == "heads" else "the heads of a layer together"
        axes[0, column].set_title(f"{circuit}, {who}\n" + axes[0, column].get_title(), fontsize=10)
        axes[-1, column].set_xlabel("eigenvalue, if the law's mean is 1")
    figure.supylabel("density per unit of log eigenvalue", fontsize=10)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(columns)))
    figure.savefig(path, dpi=120)


def draw_dynamics(path, runs, title):
    """runs: (name, steps, diagnostics (S, L, H)). A column per run: step across, layer up, heads' mean as colour."""
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 + 3.2 * len(runs), 1 + 1.5 * len(DIAGNOSTICS)), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(len(DIAGNOSTICS), len(runs), squeeze=False, sharex="col")
    for row, (name, (_, _, label)) in zip(axes, DIAGNOSTICS.items(), strict=True):
        grids = [known_mean(found[name]).T for _, _, found in runs]  # (L, S)
        seen = np.concatenate([grid[np.isfinite(grid)] for grid in grids])
        low, high = (seen.min(), seen.max()) if len(seen) else (1, 1)
        norm = LogNorm(low, high) if name == "mp_gap" else Normalize(low, high)
        for ax, grid, (_, steps, _) in zip(row, grids, runs, strict=True):
            image = ax.imshow(grid, norm=norm, origin="lower", aspect="auto", cmap="cividis", interpolation="nearest")
            ticks = np.unique(np.linspace(0, len(steps) - 1, 5).round().astype(int))
            ax.set_xticks(ticks, [f"{steps[tick]:,}" for tick in ticks])
            ax.yaxis.get_major_locator().set_params(integer=True)
        row[0].set_ylabel("layer")
        figure.colorbar(image, ax=row, label=label)
    for (name, _, found), top, bottom in zip(runs, axes[0], axes[-1], strict=True):
        spiked = known_mean(found["outliers"][-1]) >= SPIKED
        top.set_title(f"{name}\nat the end, spikes in {layer_list(spiked)}", fontsize=10)
        bottom.set_xlabel("step (one column a snapshot)")
    figure.savefig(path, dpi=120)


def main():
    example = "example: python spectrum.py out out/mla_decoupled --null=mp"
    parser = Parser(description=__doc__.split("\n\n")[0], epilog=example)
    parser.add_argument("paths", nargs="+", type=Path, help="a checkpoint; or run folders, to compare their dynamics")
    parser.add_argument("--null", choices=NULLS, default="chain", help="law to measure against (default: %(default)s)")
    parser.add_argument("--circuit", choices=CIRCUITS, help="part of mla_decoupled's key (default: both)")
    parser.add_argument("--out", type=Path, help="folder for JSON and figure (default: that of what is given)")
    args = parser.parse_args()
    dynamics = any(path.is_dir() for path in args.paths)
    if not dynamics and len(args.paths) > 1:
        raise InputError("give one checkpoint, or one or more run folders: " + " ".join(map(str, args.paths)))
    if args.out and args.out.exists() and not args.out.is_dir():
        raise InputError(f"--out={args.out}: must be a folder")

    runs, result = [], []
    for path in args.paths:
        try:
            config, steps, found = (read_run if dynamics else read_model)(path)
            circuit = args.circuit or [*found][-1]
            if circuit not in found:
                raise InputError(f"{path}: --circuit={circuit}: {config.attn} has only " + ", ".join(found))
        except InputError as error:
            if len(args.paths) == 1:
                raise
            print(f"{error}; left out", file=sys.stderr)
            continue
        diagnosed = against_nulls(config, found)
        many = f"{len(steps)} snapshots up to " if dynamics else ""
        print(f"{path}: {config.attn}, {config.n_layer} layers of {config.n_head} heads; {many}step {steps[-1]}")
        if not dynamics:
            for c in [args.circuit] if args.circuit else found:
                print_tables(paths(config)[c], c, args.null, diagnosed[args.null][c])
        chosen = {null: diagnosed[null][circuit]["heads"] for null in NULLS}
        print_answers(steps, circuit, chosen)
        runs.append((f"{path.name}: {config.attn}, {circuit}", steps, chosen[args.null]))
        result.append({"path": str(path), "config": asdict(config), "steps": steps, **plain(diagnosed)})
    if not runs:
        raise InputError("nothing to show: all of these runs were left out")
    out = args.out
    if out:
        out.mkdir(parents=True, exist_ok=True)
    if dynamics:
        out = out or Path(os.path.relpath(os.path.commonpath([path.absolute() for path in args.paths])))
        data, figure = out / "dynamics.json", out / f"dynamics_{args.null}.png"
        draw_dynamics(figure, runs, f"Spikes and rank of each head's W_Q W_K^T in training (null: {args.null})")
    else:
        out = out or args.paths[0].parent
        data, figure = out / "spectrum.json", out / "spectrum.png"
        result = result[0] | {"spectra": plain(found)}
        count, energy = (known_mean(chosen["chain"][name].ravel()) for name in ("outliers", "outlier_energy"))
        seen = f"{count:.1f} outliers per head ({circuit}), with {energy:.0%} of the energy"
        title = f"Eigenvalues of W_Q W_K^T of {config.attn} at step {steps[0]}\n{seen}"
        draw_model(figure, config, found, diagnosed, title)
    data.write_text(json.dumps(result))
    print(f"wrote {data} and {figure}")


if __name__ == "__main__":
    run(main)
