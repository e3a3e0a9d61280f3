"""The null laws against simulation and closed forms, eigenvalues against full matrices, the diagnostics, the script."""

import json
import math
from functools import partial, reduce

import numpy as np
import pytest
import torch
from conftest import build, call, save
from hypothesis import given, settings
from hypothesis import strategies as st

import spectrum
import train
from model import ATTN, GPT, LEARNED, MLA, GPTConfig
from spectrum import NULLS, chain_law, diagnose, eigenvalues, haar, laws, logit_ranks, qk_factors, spectra, spiked

SMALL = dict(n_layer=2, n_head=2, n_embd=32, vocab_size=8, block_size=8)
TRAINING = "--n_layer=1 --n_head=2 --n_embd=32 --block_size=32 --batch_size=2 --eval_steps=1 --steps=25".split()
TRAINING += ["--device=cpu"]


def product(dims, rng):
    m = rng.standard_normal(dims[:2])
    for shape in zip(dims[1:], dims[2:], strict=False):
        m = m @ rng.standard_normal(shape) / shape[0] ** 0.5
    return m


def squared_singular_values(m):
    return np.linalg.svd(m, compute_uv=False) ** 2


# The laws


@pytest.mark.parametrize(
    "dims, upper",
    [((512, 512, 512), 27 / 4), ((300, 200), (1 + (2 / 3) ** 0.5) ** 2), ((7, 7), 4), ((5, 5, 5, 5), 256 / 27)],
)  # square ones: Fuss-Catalan, (m + 1)^(m + 1) / m^m
def test_upper_edges_match_closed_forms(dims, upper):
    assert chain_law(dims).upper == pytest.approx(upper, rel=1e-9)


@given(dims=st.lists(st.integers(2, 10000), min_size=2, max_size=5))
@settings(max_examples=30)
def test_edges_are_where_lambda_is_stationary(dims):
    """The edges once more, as extrema of a function of a real variable: polynomial roots."""
    dims = tuple(sorted(dims))
    others = dims[0] / np.array(dims[1:], dtype=float)
    numerator = np.poly1d([1, 1])
    for c in others:
        numerator *= np.poly1d([c, 1])
    slope = numerator.deriv() * np.poly1d([1, 0]) - numerator
    roots = slope.roots[np.abs(slope.roots.imag) < 1e-6 * np.abs(slope.roots)].real
    upper = min(numerator(x) / x for x in roots if x > 0)
    law = chain_law(dims)
    assert law.upper == pytest.approx(upper, rel=1e-6)
    if others.max() < 0.98:  # else the lower root is nearly double, and polynomial roots lose it
        lower = max(numerator(x) / x for x in roots if -1 / others.max() < x < -1)
        assert law.lower == pytest.approx(lower, rel=1e-4)
    assert 0 <= law.lower < law.quantile(0.25) < law.median < law.quantile(0.75) < law.upper


@given(n=st.integers(2, 10000), times=st.floats(1, 5000))
@settings(max_examples=30)
def test_one_factor_is_marchenko_pastur(n, times):
    law, N = chain_law((n, round(n * times))), round(n * times)
    c = n / N
    low, high = (1 - c**0.5) ** 2, (1 + c**0.5) ** 2
    assert (law.lower, law.upper) == pytest.approx((low, high), abs=1e-9)
    x = low + (high - low) * np.linspace(0.02, 0.98, 25)
    density = np.sqrt((high - x) * (x - low)) / (2 * np.pi * c * x)
    np.testing.assert_allclose(law.pdf(x), density, rtol=1e-5)
    assert law.pdf(np.array([low / 2 - 1, high * 1.01])).tolist() == [0, 0]


@given(n=st.integers(2, 2000), ratios=st.lists(st.just(1) | st.floats(1.3, 5), min_size=1, max_size=4))
@settings(max_examples=12)
def test_mass_and_mean_are_one_and_cdf_is_the_integral_of_pdf(n, ratios):
    """Square or clearly not: between these the density has a peak at the lower edge that quadrature does not see."""
    dims = (n, *(math.ceil(n * ratio) for ratio in ratios))
    law = chain_law(dims)
    assert law.cdf(np.array([-1, law.lower, law.upper, 2 * law.upper])).tolist() == [0, 0, 1, 1]
    assert law.pdf(np.array([-1, 2 * law.upper])).tolist() == [0, 0]
    # Integrate over t, with x = upper u^k and u = start + (1 - start) (1 - cos t) / 2: this makes the density finite at
    # 0 and smooth at both edges
    k, t = len(dims), np.linspace(0, np.pi, 201)[1:-1]
    start = (law.lower / law.upper) ** (1 / k)
    u = start + (1 - start) * (1 - np.cos(t)) / 2
    x = law.upper * u**k
    density = law.pdf(x) * law.upper * k * u ** (k - 1) * (1 - start) / 2 * np.sin(t)
    assert density.sum() * np.pi / 200 == pytest.approx(1, abs=1e-4)
    assert (density * x).sum() * np.pi / 200 == pytest.approx(1, abs=1e-4)
    cdf = law.cdf(x)
    np.testing.assert_allclose(np.diff(cdf), (density[1:] + density[:-1]) / 2 * np.pi / 200, atol=1e-4)
    assert (np.diff(cdf) > -1e-12).all()
    q = np.array([0.01, 0.3, 0.5, 0.9])
    np.testing.assert_allclose(law.cdf(law.quantile(q)), q, atol=1e-5)


@given(
    n=st.integers(200, 260),
    others=st.lists(st.floats(1, 4), min_size=1, max_size=4),
    place=st.integers(0, 4),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=15)
def test_the_law_of_a_chain_is_that_of_its_simulation(n, others, place, seed):
    dims = [round(n * ratio) for ratio in others]
    dims.insert(place, n)
    x = np.sort(squared_singular_values(product(dims, np.random.default_rng(seed)))[: min(dims)])
    cdf, steps = chain_law(tuple(dims)).cdf(x / x.mean()), np.arange(len(x) + 1) / len(x)
    assert max(abs(cdf - steps[:-1]).max(), abs(cdf - steps[1:]).max()) < 0.03  # by chance, 0.02 happens


@pytest.mark.parametrize("dims", [(), (5,), (3, 0), (3, -1), (2.5, 3), (3, float("nan"))])
def test_a_chain_needs_two_or_more_positive_integer_dimensions(dims):
    with pytest.raises(ValueError, match="dims="):
        chain_law(dims)


# The factors of W_Q W_K^T


def full_matrices(model, layer):
    """{part: [M of each head]}, each (d, d), straight from the weights by their names."""
    attn, config = model.blocks[layer].attn, model.config
    w = {name: p.detach().double().numpy().T for name, p in attn.named_parameters()}
    w = {name.split(".")[0]: value for name, value in w.items()}
    for down, gain in (("w_dq", "norm_q"), ("w_dk", "norm_k")):
        if gain in w:
            w[down] = w[down] @ np.diag(w[gain])
    if "w_dq" in w:
        w["w_q"] = w["w_dq"] @ w["w_uq"]
        if "w_qr" in w:
            w["w_qr"] = w["w_dq"] @ w["w_qr"]
    h, R, found = config.head_dim, config.rope_dim, {"content": []}
    for head in range(config.n_head):
        mine = slice(head * h, (head + 1) * h)
        w_q = w["w_q"][:, mine]
        if config.attn in ("mha", "mha_rope"):
            w_k = w["w_k"][:, mine]
        elif config.attn == "gqa":
            group = head // (config.n_head // config.kv_heads)
            w_k = w["w_k"][:, group * h : (group + 1) * h]
        elif config.attn == "mla_prerope":
            w_k = w["w_k"] @ w["w_dk"] @ w["w_uk"][:, mine]
        else:
            w_k = w["w_dk"] @ w["w_uk"][:, mine]
        found["content"].append(w_q @ w_k.T)
        if R:
            found.setdefault("rotary", []).append(w["w_qr"][:, head * R : (head + 1) * R] @ w["w_kr"].T)
    if R:
        found["both"] = [c + r for c, r in zip(found["content"], found["rotary"], strict=True)]
    return found


@pytest.mark.parametrize("attn, deepseek", [(attn, False) for attn in ATTN] + [(attn, True) for attn in MLA])
@pytest.mark.parametrize("rank", [0.25, 0.5, 1.0])
def test_spectra_are_the_eigenvalues_of_the_full_matrices(attn, deepseek, rank):
    """With the options of DeepSeek-V2, too: W_DQ is one more factor, and the gains of the norms count."""
    options = {} if attn.startswith("mha") else {"rank": rank}
    options |= {"latent_norm": True, "q_rank": 0.75} if deepseek else {}
    model = GPT(GPTConfig(attn=attn, **SMALL | {"n_head": 4}, **options))
    for name, weight in model.named_parameters():
        if "attn.norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    found = spectra(model)
    for layer in range(2):
        for part, heads in full_matrices(model, layer).items():
            for level, matrices in (("heads", heads), ("layer", [sum(heads)])):
                for mine, m in zip(found[f"{part} {level}"][layer], matrices, strict=True):
                    n = len(mine)
                    everything = np.linalg.eigvalsh(m @ m.T)[::-1]
                    assert n == np.linalg.matrix_rank(m)
                    np.testing.assert_allclose(mine, everything[:n], atol=1e-12 * everything[0], rtol=1e-6)
                    assert (abs(everything[n:]) < 1e-12 * everything[0]).all()


@pytest.mark.parametrize("distance", [0, 5])
@pytest.mark.parametrize("attn, deepseek", [(attn, False) for attn in ATTN] + [(attn, True) for attn in MLA])
def test_the_factors_are_what_attention_scores_with(attn, deepseek, distance):
    """A head's score of a query, `distance` after a key at position 0, is x M x'^T / sqrt(h + R); behind a norm, each
    token's share of it is divided by the size of its latent."""
    options = {"latent_norm": True, "q_rank": 0.75, "joint": attn != "mla_prerope"} if deepseek else {}
    config = GPTConfig(attn=attn, **SMALL | {"n_head": 4, "n_layer": 1}, **options)
    attention, x = build(config).blocks[0].attn, torch.randn(1, 7, 32, dtype=torch.float64)
    positions = torch.tensor([0] * 6 + [distance])  # the last token looks at the six others
    mask = torch.zeros(7, 7, dtype=torch.float64)
    mask[:, 6] = -torch.inf
    seen = {}
    for name, module in attention.named_children():
        module.register_forward_hook(lambda module, args, out, name=name: seen.update({name: (args[0], out)}))
    with torch.no_grad():
        if attn == "mla_rope":  # expanding takes keys to stand at 0, 1, 2, ...
            rope = attention.rope.forward
            attention.rope.forward = lambda x, at: rope(x, positions if len(at) == 7 else at)
        attention(x, positions, mask)
        if attn == "mla_rope":
            del attention.rope.forward
    size = {name: torch.ones(1, 7, 1) for name in ("norm_q", "norm_k")}
    if deepseek:
        size = {name: (seen[name][0] ** 2).mean(-1, keepdim=True).sqrt() for name in size}
    values = seen["w_uv" if attn in MLA else "w_v"][1][0].detach().unflatten(1, (-1, config.head_dim))
    factors, mixed = qk_factors(attention, distance), []
    for head in range(4):
        parts = [name for name in ("content heads", "rotary heads") if name in factors]
        content, *rotary = (reduce(torch.matmul, factors[name])[head] for name in parts)
        scores = x[0, 6] / size["norm_q"][0, 6] @ content @ (x[0, :6] / size["norm_k"][0, :6]).T
        if rotary:
            scores = scores + x[0, 6] / size["norm_q"][0, 6] @ rotary[0] @ x[0, :6].T
        p = (scores * (config.head_dim + (config.rope_dim or 0)) ** -0.5).softmax(-1)
        mixed.append(p @ values[:6, head * values.size(1) // 4])
    torch.testing.assert_close(seen["w_o"][0][0, 6].detach(), torch.cat(mixed), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attn", ATTN)
def test_both_parts_add_up_and_a_layer_is_the_sum_of_its_heads(attn):
    config = GPTConfig(attn=attn, **SMALL | {"n_head": 4}, q_rank=0.5 if attn == "mla_decoupled" else None)
    factors = qk_factors(GPT(config).blocks[0].attn)
    products = {name: reduce(torch.matmul, f) for name, f in factors.items()}
    for part in {name.split()[0] for name in products}:
        torch.testing.assert_close(products[f"{part} heads"].sum(0), products[f"{part} layer"][0])
    if attn == "mla_decoupled":
        torch.testing.assert_close(products["both heads"], products["content heads"] + products["rotary heads"])


@given(
    dims=st.lists(st.integers(1, 12), min_size=2, max_size=5),
    batch=st.lists(st.sampled_from([1, 3]), min_size=4, max_size=4),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=100)
def test_eigenvalues_of_any_chain(dims, batch, seed):
    rng = np.random.default_rng(seed)
    factors = [
        rng.standard_normal((b, *shape)) for b, shape in zip(batch, zip(dims, dims[1:], strict=False), strict=False)
    ]
    found = eigenvalues([torch.from_numpy(f) for f in factors])
    m = factors[0]
    for factor in factors[1:]:
        m = m @ factor
    expected = np.linalg.svd(m, compute_uv=False) ** 2
    np.testing.assert_allclose(found, expected[:, : min(dims)], atol=1e-10 * expected.max())


@pytest.mark.parametrize("attn, q_rank", [*((attn, None) for attn in ATTN), ("mla", 0.5), ("mla_decoupled", 0.5)])
def test_an_untrained_model_has_outliers_against_mp_but_not_against_chain(attn, q_rank):
    """The artefact: before any training, mp sees outliers, in every variant. The law of chain fits, at any scale."""
    config = GPTConfig(attn=attn, q_rank=q_rank, **SMALL | {"n_embd": 256, "n_head": 4, "n_layer": 20})
    torch.manual_seed(0)
    model, rng = GPT(config), np.random.default_rng(0)
    for weight in model.blocks.parameters():
        weight.data *= rng.uniform(0.1, 10)
    found = spectra(model)
    for null in NULLS:
        for name, law in laws(config, null).items():
            if law is None:
                continue
            said = diagnose(found[name], law)
            share = said["outlier_share"].mean()
            assert share < 0.01 if null == "chain" else share > 0.05, (name, null, share)
            if null == "chain":
                x = np.sort(found[name] / found[name].mean(-1, keepdims=True), axis=None)
                assert abs(law.cdf(x) - np.arange(len(x)) / len(x)).max() < 0.03, name
                assert said["effective_rank_of_null"].mean() == pytest.approx(1, abs=0.02)


def test_at_most_one_layer_in_twenty_spikes_by_chance():
    """Random weights of any scale, and shapes off the grid, heads of 16 to 64: 20 layers of each variant and shape."""
    rng, calls = np.random.default_rng(0), {}
    for head_dim, heads, rank in ((16, 4, 0.5), (24, 6, 1.0), (64, 2, 0.5)):
        for attn in ATTN:
            shape = {"n_embd": head_dim * heads, "n_head": heads, "rank": None if attn.startswith("mha") else rank}
            torch.manual_seed(int(rng.integers(2**31)))
            model = GPT(GPTConfig(attn=attn, **SMALL | shape | {"n_layer": 20}))
            for weight in model.blocks.parameters():
                weight.data *= rng.uniform(0.01, 30)
            found = spectra(model)
            for name, law in laws(model.config, "chain").items():
                said = spiked(diagnose(found[name], law)["p"]).tolist() if law else []
                calls.setdefault((head_dim, name.split()[1]), []).extend(said)
    for said in calls.values():  # 160 layers: by chance, 5% become 9% once in a hundred times
        assert len(said) == 160 and np.mean(said) < 0.09
    assert np.mean(sum(calls.values(), [])) <= 0.05


def test_rotations_keep_magnitude_and_lose_alignment():
    """W_Q and W_K that share their strong direction have a spike; with rotations between them it is gone. A factor
    that is strong in one direction by itself keeps it. And what is random stays as it was."""
    generator = torch.Generator().manual_seed(0)

    def gaussian(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    w_q, w_k, law = gaussian(1, 64, 16), gaussian(1, 16, 64), chain_law((64, 16, 64))
    chance = diagnose(haar([w_q, w_k]), law)
    assert chance["mp_gap"].shape == (20, 1) and chance["mp_gap"].mean() == pytest.approx(0.9, abs=0.2)
    q, k = w_q.clone(), w_k.clone()
    q[..., 0] *= 4
    k[:, 0] *= 4
    aligned, rotated = diagnose(eigenvalues([q, k]), law), diagnose(haar([q, k]), law)
    assert aligned["mp_gap"][0] > 3 * rotated["mp_gap"].mean() > 3 * chance["mp_gap"].mean()
    assert (aligned["mp_gap"] > rotated["mp_gap"]).all()
    torch.testing.assert_close(torch.from_numpy(haar([q])), torch.from_numpy(eigenvalues([q])).expand(20, 1, 16))
    three = haar([w_q, gaussian(1, 16, 32), gaussian(1, 32, 64)])
    assert three.shape == (20, 1, 16) and diagnose(three, chain_law((64, 16, 32, 64)))["ks"].mean() < 0.15


def test_ranks_of_scores_are_those_of_what_attention_sees():
    torch.manual_seed(0)
    model = GPT(GPTConfig(attn="mha", **SMALL)).double()
    idx = torch.randint(8, (4, 8))
    x = model.blocks[0].attn_norm(model.token_embedding(idx) + model.position_embedding.weight).flatten(0, 1).detach()
    m = reduce(torch.matmul, qk_factors(model.blocks[0].attn)["content heads"])
    scores = np.linalg.svd((x @ m @ x.T).numpy(), compute_uv=False) ** 2  # (H, tokens): each token against each
    p = scores / scores.sum(-1, keepdims=True)
    expected = np.exp(-(p * np.log(np.maximum(p, 1e-300))).sum(-1))
    np.testing.assert_allclose(logit_ranks(model, idx)[0], expected, rtol=1e-6)


# The diagnostics


@pytest.mark.parametrize("dims", [(400, 100, 400), (400, 100, 200, 400), (300, 300, 300), (200, 500)])
def test_a_planted_spike_is_found_above_the_threshold_only(dims):
    """M + strength u v^T has an outlier where strength^2 > lambda+ / ((1 + c_0 psi)(1 + c_m psi)), with psi at the edge
    and c of the outer dimensions (Benaych-Georges and Nadakuditi 2012, theorem 2.8)."""
    law, rng = chain_law(dims), np.random.default_rng(0)
    psi = law.psi[-1].real
    n = min(dims)
    threshold = (law.upper / ((1 + n / dims[0] * psi) * (1 + n / dims[-1] * psi))) ** 0.5
    counts = {}
    for times in (0.4, 2):
        counts[times] = []
        for _ in range(10):
            m = product(dims, rng)
            m /= squared_singular_values(m)[:n].mean() ** 0.5
            u, v = (x / np.linalg.norm(x) for x in (rng.standard_normal(dims[0]), rng.standard_normal(dims[-1])))
            found = diagnose(squared_singular_values(m + times * threshold * np.outer(u, v))[:n], law)
            counts[times].append(int(found["outliers"]))
            if times == 2:
                assert found["mp_gap"] > 1.1 and found["soft_rank"] < 1 / 1.1 and found["outlier_energy"] > 1 / n
    assert np.mean(counts[0.4]) < 0.5 and min(counts[2]) >= 1 and np.mean(counts[2]) < 1.5


@given(seed=st.integers(0, 2**32), n=st.integers(20, 200))
@settings(max_examples=15)
def test_growing_spikes_do_not_move_the_scale(seed, n):
    rng = np.random.default_rng(seed)
    values = np.sort(rng.exponential(size=(3, n)))
    law = chain_law((n, 2 * n))
    grown = values.copy()
    grown[:, -(n // 10) :] *= 100
    before, after = diagnose(values, law), diagnose(grown, law)
    np.testing.assert_array_equal(before["edge"], after["edge"])
    assert (after["outlier_energy"] > before["outlier_energy"]).all()


@given(seed=st.integers(0, 2**32), scale=st.floats(1e-4, 1e4))
@settings(max_examples=30)
def test_diagnostics_do_not_depend_on_scale_or_basis(seed, scale):
    rng = np.random.default_rng(seed)
    w_q, w_k = rng.standard_normal((2, 40, 10))
    w_q[:, 0] *= 5
    turns = [np.linalg.qr(rng.standard_normal((size, size)))[0] for size in (40, 10, 40)]
    law = chain_law((40, 10, 40))
    before, after = (
        diagnose(eigenvalues([torch.from_numpy(q), torch.from_numpy(k.T)]), law)
        for q, k in ((w_q, w_k), (scale * turns[0] @ w_q @ turns[1], turns[2] @ w_k @ turns[1] / 7))
    )
    for name in before.keys() - {"edge"}:
        np.testing.assert_allclose(before[name], after[name], rtol=1e-6, err_msg=name)


def test_diagnostics_by_hand():
    values = np.array([[1.0, 8.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [1.0, np.nan, 1.0, 1.0]])

    class Law:
        median, upper, effective_rank, dims = 0.5, 1.0, 2.0, (4, 8)
        cdf = staticmethod(lambda x: np.minimum(x, 1))  # uniform in 0..1

    found = diagnose(values, Law)
    assert found["ks"][1] == 0.5  # four values at the median
    assert found["edge"][:2].tolist() == [3, 2]  # medians 1.5 and 1
    assert found["mp_gap"][:2].tolist() == [8 / 3, 1 / 2]
    assert found["outliers"][:2].tolist() == [1, 0] and found["outlier_share"][:2].tolist() == [1 / 4, 0]
    assert found["outlier_energy"][:2].tolist() == [8 / 12, 0]
    assert found["soft_rank"][:2].tolist() == [3 / 8, 1]
    assert found["stable_rank"][:2].tolist() == [12 / 8, 4] and found["effective_rank_of_null"][1] == 2
    p = np.array([1, 8, 1, 2]) / 12
    assert found["effective_rank"][:2].tolist() == pytest.approx([np.exp(-(p * np.log(p)).sum()), 4])
    assert np.isnan(found["mp_gap"][2:]).all() and np.isnan(found["effective_rank"][2:]).all()
    assert np.isnan(found["outliers"][3]) and found["outliers"][2] == 0


# The script


script = partial(call, spectrum.main)


@pytest.mark.parametrize("attn", ATTN)
def test_a_checkpoint_of_every_variant_gives_a_complete_report(attn, tmp_path):
    path = save(tmp_path / "ckpt.pt", GPT(GPTConfig(attn=attn, **SMALL)))
    for null in NULLS if attn == "mla_decoupled" else ("chain",):
        distances = [0] if attn in LEARNED else [0, 5]
        status, out, err = script(path, f"--null={null}", "--distance", *distances)
        assert (status, err) == (0, "")
        for word in (
            "layer",
            "MP-gap",
            "fit  ",
            "spikes",
            "rank",
            f"{null} null",
            "eff. rank",
            *(f"distance {distance}" for distance in distances),
        ):
            assert word in out
    report = json.loads((tmp_path / "spectrum.json").read_text())
    for distance in (f"distance {distance}" for distance in distances):
        for name, law in laws(GPTConfig(attn=attn, **SMALL), "chain").items():
            rows = 2 if name.endswith("heads") else 1
            assert np.shape(report[distance]["spectra"][name])[:2] == (2, rows)
            diagnosed = report[distance]["diagnostics"][name]
            assert ("p" in diagnosed) == (law is not None)
            if law:  # whole layers, if large, get fewer random rotations
                assert np.shape(report[distance]["rotated"][name]["mp_gap"]) == (20, 2, rows)
            for values in diagnosed.values():
                assert np.isfinite(np.array(values, dtype=float)).all() and np.shape(values) == (1, 1, 2, rows)
    assert (tmp_path / "spectrum.png").stat().st_size > 10000


@pytest.fixture(scope="module")
def three_runs(stories, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, flags in {"a": ["--attn=mha_rope"], "b": ["--attn=mla_decoupled"], "c": ["--n_layer=3"]}.items():
        train.Run(train.parse_arguments([f"--data={stories}", f"--out={folder / name}", *TRAINING, *flags])).train()
    return folder


def test_training_leaves_snapshots_dense_at_the_start(three_runs):
    lines = [json.loads(line) for line in (three_runs / "a" / "spectrum.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps[0] == 0 and steps[-1] == 25 and 12 <= len(steps) <= 21
    assert np.all(np.diff(steps) > 0) and np.diff(steps)[-1] > np.diff(steps)[0]
    torch.manual_seed(0)  # train's default seed: the first snapshot is of the model as it was made
    model = GPT(GPTConfig(**lines[0]["config"]))
    np.testing.assert_allclose(lines[0]["spectra"]["content heads"], spectra(model)["content heads"], rtol=1e-4)


def test_runs_side_by_side_even_if_their_depths_differ(three_runs):
    for null in NULLS:
        status, out, err = script(*(three_runs / name for name in "abc"), f"--null={null}")
        assert (status, err) == (0, "") and out.count("fit   ") == 8  # 4 parts; heads and layers
        assert (three_runs / f"dynamics_{null}.png").stat().st_size > 10000
    report = json.loads((three_runs / "dynamics.json").read_text())
    assert [np.shape(r["diagnostics"]["content heads"]["mp_gap"])[2:] for r in report] == [(1, 2), (1, 2), (3, 2)]


def test_runs_that_differ_in_their_seed_alone_are_one_column(three_runs, stories, tmp_path):
    again = [f"--data={stories}", *TRAINING, "--attn=mha_rope", "--seed=1", f"--out={tmp_path / 'd'}"]
    train.Run(train.parse_arguments(again)).train()
    status, out, err = script(three_runs / "a", tmp_path / "d", three_runs / "b", f"--out={tmp_path}")
    assert (status, err) == (0, "") and "±" in out
    report = json.loads((tmp_path / "dynamics.json").read_text())
    assert [np.shape(r["diagnostics"]["content heads"]["mp_gap"])[0] for r in report] == [2, 1]


def test_wrong_input_is_refused_in_one_line(three_runs, tmp_path):
    path = save(tmp_path / "ckpt.pt", GPT(GPTConfig(attn="mla", **SMALL)))
    (tmp_path / "text.pt").write_text("hello")
    for arguments, says in (
        ([tmp_path / "nothing.pt"], "No such file"),
        ([tmp_path / "nowhere" / "ckpt.pt"], "No such file"),
        ([tmp_path / "text.pt"], "not a checkpoint"),
        ([tmp_path], "no complete snapshot"),
        ([path, path], "no complete snapshot"),
        ([three_runs / "a", path, f"--out={tmp_path}"], "no complete snapshot"),  # as `runs/*` may name
        ([path, "--data=nowhere"], "no such data folder"),
        ([path, "--distance", 8], "--distance"),
        ([path, "--distance", -1], "--distance"),
        ([path, "--null=wigner"], "invalid choice"),
        ([], "required"),
    ):
        status, out, err = script(*arguments)
        assert status == 2 and says in err and err.count("\n") == 1 and err.startswith("spectrum.py: "), err
    assert script(path, "--out=/dev/null")[0] == 1


def test_damaged_lines_of_a_run_are_skipped_with_a_warning(three_runs, tmp_path):
    whole = (three_runs / "a" / "spectrum.jsonl").read_text()
    (tmp_path / "spectrum.jsonl").write_text(whole[:-100] + "\n[]\n{}\n")
    status, out, err = script(tmp_path)
    assert status == 0 and err.count("skipped") == 3 == err.count("\n")
    (tmp_path / "spectrum.jsonl").write_text("{}")
    assert "no complete snapshot" in script(tmp_path)[2]


def test_only_heads_with_nan_are_left_out(tmp_path):
    model = GPT(GPTConfig(attn="mla", **SMALL))
    for weight in (model.blocks[1].attn.w_uk.weight[0], model.blocks[0].attn.w_q.weight):
        with torch.no_grad():  # at first one head of layer 1, then all of layer 0
            weight.fill_(float("nan"))
        status, out, err = script(save(tmp_path / "ckpt.pt", model))
        assert status == 0 and "layer 1 has weights that are not finite" in err
        text = (tmp_path / "spectrum.json").read_text()
        report = json.loads(text, parse_constant=pytest.fail)  # NaN is not JSON
        first, second = report["distance 0"]["diagnostics"]["content heads"]["mp_gap"][0][0][1]
        assert first is None and second > 0
    assert err.count("\n") == 2
    decoupled = GPT(GPTConfig(attn="mla_decoupled", **SMALL))
    with torch.no_grad():
        decoupled.blocks[0].attn.w_kr.weight.fill_(float("nan"))
    assert "layer 0 has weights that are not finite" in script(save(tmp_path / "ckpt.pt", decoupled))[2]


@pytest.mark.parametrize("value", [float("inf"), 0.0, 1e38])
def test_extreme_weights_give_a_report(value, tmp_path):
    model = GPT(GPTConfig(attn="mla", **SMALL))
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(value)
    assert script(save(tmp_path / "ckpt.pt", model))[0] == 0


def test_spikes_are_told_in_words():
    """Layer 1 spikes at the second snapshot and stays, and its rank falls; layer 0 has no spike."""
    p, rank = np.full((2, 4, 2, 3), 0.5), np.full((2, 4, 2, 3), 50.0)
    p[:, 1:, 1, 0], rank[:, 1:, 1] = 0.001, 40
    rank[:, 1:, 0] = 49
    found = {"p": p, "effective_rank": rank, "ks": p * 0 + 0.2, "outlier_share": p * 0 + 0.12, "outlier_energy": p * 0}
    found |= {"effective_rank_share": rank / 64, "effective_rank_of_null": rank / 50}
    text = "\n".join(spectrum.answers([0, 5, 20, 45], found))
    assert "null 0.20 ±0.00 -> 0.20 ±0.00" in text and "does not fit the null" in text
    assert "significant in layers: 1\n" in text and "steps 5 to 5; from then on in 100% of the snapshots" in text
    assert "first spikes: -20.0%, -18.0% against calm layers (n=2)" in text
    assert "rank      50.0 ±0.0 -> 44.5 ±0.0" in text
    text = "\n".join(spectrum.answers([0, 5, 20, 45], found | {"p": p * 0 + 0.5, "ks": p * 0 + 0.02}))
    assert "in layers: none\n" in text and "collapse" not in text and "not fit" not in text
