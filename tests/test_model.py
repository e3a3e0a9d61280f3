"""What model.py promises, as properties over random shapes, ranks, chunkings and seeds.

Weights are drawn larger than GPT's initialisation, so that attention is sharp, and a wrong position, scale or mask
cannot hide in an almost uniform softmax. Arithmetic is float64 except where another precision is the subject."""

import copy
import math
import os
import pickle
import warnings
from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
from conftest import build, save
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import ATTN, FORMAT, GPT, GPTConfig, KVCache, RoPE, attend, load_checkpoint

# The table of the design once more, so that a slip in model.py's own lists does not pass.
ABSORBS = ("mla", "mla_prerope", "mla_decoupled")
JOINS = ("mla", "mla_rope", "mla_decoupled")
VARIANTS = [(attn, False) for attn in ATTN] + [(attn, True) for attn in JOINS]
CONTEXT = 250  # more than any drawn text, and no multiple of the cache's step

seeds = st.integers(0, 2**32 - 1)


def over(variants, number):
    """Run a test(attn, joint, data) on that many random examples of each variant."""

    def wrap(test):
        test = settings(max_examples=number)(given(data=st.data())(test))
        return pytest.mark.parametrize(("attn", "joint"), variants)(test)

    return wrap


@st.composite
def configs(draw, attn, joint=False, **fixed):
    """A valid configuration: 8 to 48 wide, any rank, so that latents are both narrower and wider than a head; latents
    with or without a norm, queries compressed or not."""
    heads = draw(st.integers(1, 4))
    if attn == "gqa":
        heads, groups = draw(st.sampled_from([(H, g) for H in (1, 2, 3, 4, 6) for g in range(1, H + 1) if H % g == 0]))
    step = 2 if attn in ("mha_rope", "gqa", "mla_rope", "mla_prerope") else 1
    d = heads * draw(st.sampled_from([h for h in range(step, 49, step) if 8 <= h * heads <= 48]))
    rank = rope_dim = q_rank = None
    latent_norm = False
    if attn == "gqa":
        rank = groups / heads
    elif attn.startswith("mla"):
        rank = draw(st.integers(1, d)) / d
        q_rank = draw(st.sampled_from([None, draw(st.integers(1, d)) / d]))
        latent_norm = draw(st.booleans())
    if attn == "mla_decoupled":
        rope_dim = draw(st.sampled_from([None, 2, 4, 6, 16]))
    drawn = {"n_layer": draw(st.integers(1, 2)), "vocab_size": draw(st.integers(2, 40))}
    options = {"rank": rank, "joint": joint, "latent_norm": latent_norm, "q_rank": q_rank, "rope_dim": rope_dim}
    drawn |= {"block_size": CONTEXT, "rope_base": draw(st.sampled_from([100.0, 10000.0]))} | options
    return GPTConfig(**{**drawn, **fixed}, n_head=heads, n_embd=d, attn=attn)


@st.composite
def chunkings(draw, h):
    """Lengths of the calls that feed a text: one, single tokens, or mixed; calls of more than h are not absorbed."""
    lengths = draw(st.lists(st.sampled_from([1, 2, 3, 5, h, h + 1]), min_size=1, max_size=4))
    return draw(st.sampled_from([lengths, lengths, [sum(lengths)], [1] * min(sum(lengths), 12)]))


def text(config, seed, batch, length):
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def causal_mask(queries, keys):
    """What attention adds to the scores of queries at these positions: 0 up to their own position, then -inf."""
    visible = [[0.0 if key <= query else -math.inf for key in range(keys)] for query in queries]
    return torch.tensor(visible, dtype=torch.float64)


@torch.no_grad()
def full(model, idx):
    """The logits of every position, without a cache."""
    return model(idx, idx)[0]


@torch.no_grad()
def feed(model, cache, chunks):
    """The logits after each chunk: (B, number of chunks, V)"""
    return torch.cat([model(chunk, cache=cache)[0] for chunk in chunks], dim=1)


def paths(attn):
    """The ways in which a variant decodes: the values of `absorb`."""
    return (False, True) if attn in ABSORBS else (False,)


def close(a, b, tolerance=1e-9):
    """Equal up to rounding, relative to the largest number, or to 1 if all are smaller."""
    a, b = (torch.as_tensor(t, dtype=torch.float64) for t in (a, b))
    assert a.shape == b.shape
    error = (a - b).abs().max().item()
    assert error <= tolerance * max(1.0, b.abs().max().item()), f"differs by {error:.3g}"


def weights_of(model, layer=0):
    """The matrices of a layer's attention as the equations write them: w[name] is (d_in, d_out)."""
    layers = model.blocks[layer].attn.named_children()
    return {name: linear.weight.detach().T for name, linear in layers if name.startswith("w_")}


def put(model, layer, **matrices):
    """Set matrices of a layer's attention, given as (d_in, d_out)."""
    with torch.no_grad():
        for name, matrix in matrices.items():
            getattr(model.blocks[layer].attn, name).weight.copy_(matrix.T)


def twin(model, seed, **changes):
    """A model of another attention whose backbone has the same weights, where it has them."""
    other = build(replace(model.config, **changes), seed)
    own, theirs = other.state_dict(), model.state_dict()
    other.load_state_dict({n: theirs[n] if n in theirs and theirs[n].shape == own[n].shape else own[n] for n in own})
    return other


# The forward pass


@over(VARIANTS, 20)
def test_forward_equals_the_equations(attn, joint, data):
    """Logits and loss are those of the independent reference; targets of -1 do not count."""
    config, seed = data.draw(configs(attn, joint)), data.draw(seeds)
    model, idx = build(config, seed), text(config, seed, data.draw(st.integers(1, 2)), data.draw(st.integers(1, 10)))
    expected = reference.forward(model, idx)
    targets = text(config, seed + 1, *idx.shape)
    targets[torch.rand(idx.shape, generator=torch.Generator().manual_seed(seed)) < 0.3] = -1
    targets[0, -1] = 0
    with torch.no_grad():
        logits, loss = model(idx, targets)
        last, no_loss = model(idx)
    close(logits, expected)
    close(loss, reference.loss(expected, targets.numpy()))
    close(last, expected[:, -1:])
    assert no_loss is None


@over(VARIANTS, 8)
def test_a_later_token_changes_no_earlier_logit(attn, joint, data):
    """Causality: new tokens from place t on leave all logits before t as they were, and change those at t."""
    config, seed = data.draw(configs(attn, joint)), data.draw(seeds)
    model, idx = build(config, seed), text(config, seed, 2, data.draw(st.integers(2, 12)))
    t = data.draw(st.integers(1, idx.size(1) - 1))
    other = idx.clone()
    other[:, t:] = (other[:, t:] + 1) % config.vocab_size
    a, b = full(model, idx), full(model, other)
    close(a[:, :t], b[:, :t], 1e-12)
    assert (a[:, t] - b[:, t]).abs().max() > 1e-6


@over(VARIANTS, 8)
def test_rows_of_a_batch_never_influence_each_other(attn, joint, data):
    """Each row of a batch gets the logits that it gets alone, with and without a cache."""
    config, seed = data.draw(configs(attn, joint)), data.draw(seeds)
    chunks = data.draw(chunkings(config.head_dim))
    model, idx = build(config, seed), text(config, seed, 3, sum(chunks))
    close(full(model, idx), torch.cat([full(model, row) for row in idx.split(1)]))
    for absorb in paths(attn):
        together = feed(model, model.init_cache(3, absorb), idx.split(chunks, 1))
        alone = [feed(model, model.init_cache(1, absorb), row.split(chunks, 1)) for row in idx.split(1)]
        close(together, torch.cat(alone))


@torch.no_grad()
def shifted(config, seed, *positions):
    """One attention's output for the same six inputs, in the same order, as if they stood at other positions."""
    attention = build(replace(config, block_size=1100), seed).blocks[0].attn
    x = torch.randn(2, 6, config.n_embd, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    rotate, outputs = attention.rope.forward, []
    for at in positions:
        attention.rope.forward = lambda x, order, at=at: rotate(x, at[order])
        outputs.append(attention(x, torch.arange(6), causal_mask(range(6), 6)))
    return outputs


@over([v for v in VARIANTS if v[0] in ("mha_rope", "gqa", "mla_rope", "mla_decoupled")], 8)
def test_attention_depends_on_relative_positions_only(attn, joint, data):
    """Shifting all positions leaves attention unchanged; moving one token does not."""
    config, seed, shift = data.draw(configs(attn, joint)), data.draw(seeds), data.draw(st.integers(1, 1000))
    before, after = shifted(config, seed, torch.arange(6), torch.arange(6) + shift)
    close(before, after)
    before, after = shifted(config, seed, torch.arange(6), torch.tensor([0, 1, 2, 3, 4, 6]))
    assert (before - after).abs().max() > 1e-6


@given(seeds, st.integers(1, 5))
@settings(max_examples=20)
def test_prerope_attention_depends_on_absolute_positions(seed, shift):
    """mla_prerope rotates keys before it compresses them: W_DK W_UK does not commute with the rotation."""
    config = GPTConfig(n_embd=32, n_head=4, n_layer=1, vocab_size=9, attn="mla_prerope", rank=0.5)
    before, after = shifted(config, seed, torch.arange(6), torch.arange(6) + shift)
    assert (before - after).norm() > 0.01 * before.norm()


@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (4, 2), (3, 1)])
def test_attention_equals_the_reference_with_and_without_the_fused_kernel(heads, groups):
    """Many scores go to PyTorch's fused kernel, few to plain products: the same result, with and without a mask."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, 640, 8), (2, groups, 640, 8), (2, groups, 640, 6)]
    q, k, v = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
    expected = []
    for i in range(heads):
        j = i // (heads // groups)
        expected.append(reference.attend(q[1, i].numpy(), k[1, j].numpy(), v[1, j].numpy(), 8**-0.5))
    for first in (0, 100, 600):  # 640 and 540 queries are fused, 40 are not
        mask = causal_mask(range(first, 640), 640)
        close(attend(q[:, :, first:], k, v, mask, 0.0)[1], np.stack(expected)[:, first:])


# Decoding


@over(VARIANTS, 25)
def test_cached_decoding_equals_the_full_forward(attn, joint, data):
    """Absorbed or expanded, in any chunks, in a cache that grows by any number of slots.

    A call returns only its last token's logits. With two layers these depend on the chunk's other tokens, too."""
    config, seed = data.draw(configs(attn, joint, n_layer=2)), data.draw(seeds)
    chunks, step = data.draw(chunkings(config.head_dim)), data.draw(st.sampled_from([1, 3, 8, 128]))
    model, idx = build(config, seed), text(config, seed, 2, sum(chunks))
    expected = full(model, idx)[:, torch.tensor(chunks).cumsum(0) - 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KVCache, "STEP", step)
        for absorb in paths(attn):
            cache = model.init_cache(2, absorb)
            assert cache.pos == 0
            close(feed(model, cache, idx.split(chunks, 1)), expected)
            assert cache.pos == sum(chunks)


@over([v for v in VARIANTS if v[0] in ABSORBS], 25)
def test_absorbed_and_expanded_attention_are_the_same_function(attn, joint, data):
    """For arbitrary queries, latents and rotary keys, not only those that a model produces."""
    config, seed = data.draw(configs(attn, joint)), data.draw(seeds)
    attention, generator = build(config, seed).blocks[0].attn, torch.Generator().manual_seed(seed)
    T, S = data.draw(st.integers(1, 5)), data.draw(st.integers(5, 9))
    H, h, r, R = config.n_head, config.head_dim, config.latent_dim, config.rope_dim

    def drawn(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    q_r, k_r = (drawn(2, H, T, R), drawn(2, S, R)) if R else (None, None)
    mask = causal_mask(range(T), S)
    same = (drawn(2, H, T, h), q_r, drawn(2, S, r), drawn(2, S, r), k_r, mask)
    close(attention.absorbed(*same), attention.expanded(*same))


@pytest.mark.parametrize(("attn", "joint"), [v for v in VARIANTS if v[0] in ABSORBS])
def test_the_fast_path_is_the_default_and_expands_nothing(attn, joint):
    """By default, decoding never forms the cached keys and values; absorb=False does, and so does a prompt longer than
    a head is wide."""
    model = build(GPTConfig(n_embd=16, n_head=2, n_layer=1, vocab_size=9, attn=attn, joint=joint), 0)
    expanded = []
    for linear in (model.blocks[0].attn.w_uk, model.blocks[0].attn.w_uv):
        linear.register_forward_hook(lambda module, args, out: expanded.append(out))
    for absorb, chunks, times in ((None, [4, 1], 0), (True, [4, 1], 0), (False, [4, 1], 4), (None, [9], 2)):
        expanded.clear()  # heads are 8 wide: a prompt of 9 tokens is cheaper to expand
        feed(model, model.init_cache(1, absorb), text(model.config, 0, 1, sum(chunks)).split(chunks, 1))
        assert len(expanded) == times


# absorb, dtype, and the error allowed for rounding
WAYS = [(None, torch.float64, 1e-9), (False, torch.float64, 1e-9), (None, torch.float32, 1e-5)]
WAYS += [(None, torch.bfloat16, 0.05)]


def small(attn, joint=False, dtype=torch.float64, **options):
    """A small model for fixed examples, with attention as sharp as build() makes it."""
    shape = dict(n_layer=2, n_head=2, n_embd=16, vocab_size=11, block_size=12)
    return build(GPTConfig(attn=attn, joint=joint, **shape, **options), 0).to(dtype)


@pytest.mark.parametrize("attn, joint", VARIANTS)
@pytest.mark.parametrize("absorb, dtype, tolerance", WAYS)
def test_decoding_equals_the_full_forward_in_all_precisions(attn, joint, absorb, dtype, tolerance):
    """Against float64 with the same weights. What the empty slots of the cache hold must not matter."""
    model = small(attn, joint, dtype)
    exact = copy.deepcopy(model).double()
    idx = torch.randint(11, (3, 12), generator=torch.Generator().manual_seed(0))
    expected, cache = full(exact, idx), model.init_cache(3, absorb)
    cache.reserve(12)
    for tensor in tree_leaves(cache.layers):
        tensor.fill_(7.0)
    logits = feed(model, cache, idx.split([4] + [1] * 8, 1))
    close(logits, expected[:, 3:], tolerance)


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        assert all(t.dtype != torch.float64 for t in tree_leaves(out) if torch.is_tensor(t)), function
        return out


@pytest.mark.parametrize(("attn", "joint"), VARIANTS)
def test_no_operation_is_in_float64(attn, joint):
    """Not every device has it."""
    model = GPT(GPTConfig(n_embd=16, n_head=2, n_layer=1, vocab_size=9, block_size=100, attn=attn, joint=joint))
    assert all(buffer.dtype == torch.float32 for buffer in model.buffers())
    with NoFloat64(), torch.no_grad():
        model(torch.tensor([[1, 2]]), torch.tensor([[2, 3]]))
        model.generate(torch.tensor([[1, 2]]), 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rope_keeps_its_precision_whatever_the_model_is_converted_to(dtype):
    """Tables in bfloat16 would blur positions; in float64, tables rounded to float32 would show."""
    rope, positions = RoPE(8, 100, 10000.0).to(dtype), torch.tensor([0, 50, 99])
    x = torch.randn(3, 8, dtype=torch.promote_types(dtype, torch.float32), generator=torch.Generator().manual_seed(0))
    expected = reference.rope(x.double().numpy(), positions.numpy(), 10000.0)
    close(rope(x, positions), expected, 1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize(("attn", "joint"), VARIANTS)
def test_everything_is_on_the_device_of_the_model(attn, joint):
    """The meta device stands in for a GPU: an operation that mixes it with the CPU raises."""
    options = {"latent_norm": True, "q_rank": 0.5} if attn.startswith("mla") else {}
    model = small(attn, joint, torch.float32, **options).to("meta")
    idx = torch.zeros(2, 7, dtype=torch.long, device="meta")
    assert model(idx, idx)[1].device.type == "meta"
    for absorb in paths(attn):
        cache = model.init_cache(2, absorb)
        for length in (3, 1):
            assert model(idx[:, :length], cache=cache)[0].device.type == "meta"
        assert {tensor.device.type for tensor in tree_leaves((cache.layers, *model.buffers()))} == {"meta"}


@pytest.mark.parametrize(
    ("attn", "joint"), [("mha", False), ("gqa", False), ("mla_rope", False), ("mla_decoupled", True)]
)
def test_a_compiled_model_trains_and_decodes_as_an_eager_one(attn, joint):
    """Traced without graph breaks, as on a GPU: the same loss and gradients; and one graph for all steps of decoding
    between two growths of the cache."""
    options = {} if attn in ("mha", "gqa") else {"latent_norm": True, "q_rank": 0.5}
    model = small(attn, joint, **options).train()
    idx, graphs = torch.randint(11, (3, 12), generator=torch.Generator().manual_seed(0)), []
    losses, gradients = [], []
    torch._dynamo.reset()
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        loss = run(idx[:, :-1], idx[:, 1:])[1]
        loss.backward()
        losses.append(loss)
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    close(losses[1], losses[0].detach(), 1e-12)
    for compiled, eager in zip(*gradients, strict=True):
        close(compiled, eager, 1e-12)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    hidden = torch.compile(model.hidden, backend=backend, fullgraph=True)
    with torch.no_grad():
        expected, cache = model.hidden(idx, torch.arange(12)), model.init_cache(3)
        cache.reserve(12)
        for t in range(12):
            close(hidden(idx[:, t : t + 1], torch.tensor([t]), cache), expected[:, t : t + 1])
    assert len(graphs) == 1


@over(VARIANTS, 6)
def test_two_caches_of_one_model_never_touch_each_other(attn, joint, data):
    """Two texts decoded by turns, in any order, each get the logits of their own full forward."""
    config, seed = data.draw(configs(attn, joint)), data.draw(seeds)
    model = build(config, seed)
    turns = data.draw(st.lists(st.tuples(st.booleans(), st.integers(1, 4)), min_size=2, max_size=8))
    for absorb in paths(attn):
        caches = [model.init_cache(2, absorb) for _ in range(2)]
        texts = [text(config, seed + i, 2, 32) for i in range(2)]
        expected = [full(model, idx) for idx in texts]
        for which, length in turns:
            start = caches[which].pos
            logits = feed(model, caches[which], [texts[which][:, start : start + length]])
            close(logits, expected[which][:, start + length - 1 : start + length])


@over(VARIANTS, 6)
def test_a_reset_cache_is_as_good_as_new(attn, joint, data):
    """After reset, nothing of an earlier and longer text remains."""
    config, seed = data.draw(configs(attn, joint)), data.draw(seeds)
    chunks = data.draw(chunkings(config.head_dim))
    model, idx = build(config, seed), text(config, seed, 2, sum(chunks))
    for absorb in paths(attn):
        cache = model.init_cache(2, absorb)
        feed(model, cache, [text(config, seed + 1, 2, sum(chunks) + 3)])
        cache.reset()
        assert cache.pos == 0
        new = feed(model, model.init_cache(2, absorb), idx.split(chunks, 1))
        close(feed(model, cache, idx.split(chunks, 1)), new, 1e-12)


@over(VARIANTS, 6)
def test_greedy_generation_equals_repeated_full_forward(attn, joint, data):
    """temperature=0 appends the most likely next token of the full forward pass; so does top_k=1."""
    config, seed = data.draw(configs(attn, joint)), data.draw(seeds)
    new = data.draw(st.integers(0, 8))
    model, prompt = build(config, seed), text(config, seed, 2, data.draw(st.integers(1, 6)))
    expected = prompt
    for _ in range(new):
        expected = torch.cat((expected, full(model, expected)[:, -1:].argmax(-1)), dim=1)
    for absorb in (None, *paths(attn)):
        assert torch.equal(model.generate(prompt, new, temperature=0, absorb=absorb), expected)
    assert torch.equal(model.generate(prompt, new, top_k=1), expected)


def sampler(seed=0, **changes):
    """A small model for tests of sampling."""
    shape = {"n_embd": 16, "n_head": 2, "n_layer": 1, "vocab_size": 12, "block_size": 32, "attn": "mla"}
    return build(GPTConfig(**{**shape, **changes}), seed)


@pytest.mark.parametrize("attn", ["mha", "mla"])
@pytest.mark.parametrize("training", [True, False])
def test_dropout_acts_in_training_only(attn, training):
    model = sampler(attn=attn, dropout=0.5).train(training)
    idx, x, mask = text(model.config, 0, 2, 8), torch.randn(2, 8, 16, dtype=torch.float64), causal_mask(range(8), 8)
    for forward in (lambda: full(model, idx), lambda: model.blocks[0].attn(x, torch.arange(8), mask)):
        assert torch.equal(forward(), forward()) == (not training)


@given(seeds)
@settings(max_examples=10)
def test_the_same_generator_seed_gives_the_same_sample(seed):
    """All randomness comes from the generator: another seed, another sample."""
    model = sampler(seed)
    prompt = text(model.config, seed, 4, 2)

    def sample(generator_seed):
        return model.generate(prompt, 20, generator=torch.Generator().manual_seed(generator_seed))

    first = sample(seed)
    torch.rand(3)
    assert torch.equal(sample(seed), first)
    assert not torch.equal(sample(seed + 1), first)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (2.0, 4), (1.0, 100)])
def test_samples_follow_the_tempered_and_truncated_softmax(temperature, top_k):
    """Frequencies in 20,000 samples are within five standard errors of softmax(logits / temperature), cut at top_k."""
    model, n = sampler(), 20000
    prompt = text(model.config, 1, 1, 3)
    logits = full(model, prompt)[0, -1]
    if top_k:
        logits[logits.argsort(descending=True)[top_k:]] = -math.inf
    p = (logits / temperature).softmax(-1)
    out = model.generate(prompt.expand(n, -1), 1, temperature, top_k, generator=torch.Generator().manual_seed(0))
    frequency = out[:, -1].bincount(minlength=len(p)) / n
    assert ((frequency - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()


@given(seeds, st.integers(1, 3))
@settings(max_examples=20)
def test_stop_ends_as_soon_as_every_row_has_sampled_it(seed, batch):
    """The result with `stop` is the shortest beginning of the one without that has it in each row's new part."""
    model = sampler(seed, vocab_size=4)
    prompt = text(model.config, seed, batch, 3)

    def sample(stop=None):
        return model.generate(prompt, 24, stop=stop, generator=torch.Generator().manual_seed(seed))

    whole = sample()
    for stop in range(4):
        lengths = [n for n in range(4, 28) if (whole[:, 3:n] == stop).any(1).all()]
        assert torch.equal(sample(stop), whole[:, : min(lengths, default=27)])


@pytest.mark.parametrize("training", [True, False])
def test_generate_is_without_dropout_and_restores_the_mode(training):
    """Dropout plays no part in generation, and a model in training goes on in training."""
    model = sampler(dropout=0.5)
    prompt = text(model.config, 0, 2, 4)
    expected = model.generate(prompt, 20, temperature=0)
    model.train(training)
    assert torch.equal(model.generate(prompt, 20, temperature=0), expected)
    assert model.training == training and model.blocks[0].dropout.training == training


# Identities between variants


def same_backbone(data, simpler, **changes):
    """A random model of the simpler variant, and the other one with the same backbone."""
    config, seed = data.draw(configs(simpler)), data.draw(seeds)
    model = build(config, seed)
    return model, twin(model, seed + 1, **changes), text(config, seed, 2, 9)


@given(st.data())
@settings(max_examples=15)
def test_gqa_of_rank_one_is_mha_rope(data):
    """As many key heads as query heads: the parameters have the same names and shapes, and mean the same."""
    mha, gqa, idx = same_backbone(data, "mha_rope", attn="gqa", rank=1.0)
    gqa.load_state_dict(mha.state_dict())
    close(full(gqa, idx), full(mha, idx), 1e-12)


@pytest.mark.parametrize(("mha", "mla"), [("mha", "mla"), ("mha_rope", "mla_rope")])
@given(data=st.data())
@settings(max_examples=15)
def test_mla_of_rank_one_with_identity_down_projections_is_mha(mha, mla, data):
    """A latent as wide as x that copies x compresses nothing."""
    full_rank, latent, idx = same_backbone(data, mha, attn=mla, rank=1.0)
    eye = torch.eye(full_rank.config.n_embd, dtype=torch.float64)
    for layer in range(full_rank.config.n_layer):
        w = weights_of(full_rank, layer)
        put(latent, layer, w_dk=eye, w_dv=eye, w_uk=w["w_k"], w_uv=w["w_v"])
    close(full(latent, idx), full(full_rank, idx), 1e-12)


@given(st.data())
@settings(max_examples=15)
def test_mla_with_separate_latents_for_each_head_is_mha_with_thinner_heads(data):
    """If head i's keys and values read only its own r/H latents (W_UK and W_UV block-diagonal), the model is an MHA
    with heads r/H wide: W_UK folds into W_Q, and W_UV into W_O. The scale stays 1/sqrt(h), so the thin heads stand here
    in an MHA whose heads are h wide, with their other columns zero."""
    config, seed = data.draw(configs("mha")), data.draw(seeds)
    h, H = config.head_dim, config.n_head
    thin = data.draw(st.integers(1, h))  # r/H
    mha = build(config, seed)
    mla = twin(mha, seed + 1, attn="mla", rank=thin / h)
    for layer in range(config.n_layer):
        w = weights_of(mla, layer)
        folded = {name: torch.zeros(config.n_embd, config.n_embd, dtype=torch.float64) for name in ("q", "k", "v", "o")}
        w_uk, w_uv = torch.zeros_like(w["w_uk"]), torch.zeros_like(w["w_uv"])
        for i in range(H):
            head, own = slice(i * h, (i + 1) * h), slice(i * thin, (i + 1) * thin)
            place = slice(i * h, i * h + thin)  # the thin head in the first columns of the wide one
            w_uk[own, head], w_uv[own, head] = w["w_uk"][own, head], w["w_uv"][own, head]
            folded["q"][:, place] = w["w_q"][:, head] @ w["w_uk"][own, head].T
            folded["k"][:, place] = w["w_dk"][:, own]
            folded["v"][:, place] = w["w_dv"][:, own]
            folded["o"][place] = w["w_uv"][own, head] @ w["w_o"][head]
        put(mla, layer, w_uk=w_uk, w_uv=w_uv)
        put(mha, layer, **{f"w_{name}": matrix for name, matrix in folded.items()})
    idx = text(config, seed, 2, 9)
    close(full(mla, idx), full(mha, idx))


@given(st.data())
@settings(max_examples=10)
def test_joint_is_two_latents_with_the_same_down_projection(data):
    """--joint merges the latents; with W_DV = W_DK two of them hold the same numbers."""
    attn = data.draw(st.sampled_from(JOINS))
    config, seed = data.draw(configs(attn, joint=True)), data.draw(seeds)
    joint = build(config, seed)
    separate = twin(joint, seed + 1, joint=False)
    for one, two in zip(joint.blocks, separate.blocks, strict=True):
        two.attn.w_dv.weight, two.attn.norm_v = one.attn.w_dk.weight, one.attn.norm_k
    idx = text(config, seed, 2, 9)
    close(full(joint, idx), full(separate, idx), 1e-12)


def test_mqa_has_one_key_head():
    """gqa with rank=1/H keeps one key and one value, h wide, for any H: 1/H * H need not be 1 in floating point."""
    for H in range(1, 65):
        model = GPT(GPTConfig(n_embd=2 * H, n_head=H, n_layer=1, vocab_size=9, attn="gqa", rank=1 / H))
        assert model.blocks[0].attn.w_k.weight.shape == model.blocks[0].attn.w_v.weight.shape == (2, 2 * H)
        assert model.kv_bytes_per_token(torch.float32) == 2 * 2 * 4


# The cache's size


@over(VARIANTS, 12)
def test_the_cache_takes_the_bytes_that_the_table_says(attn, joint, data):
    """nbytes = batch * allocated slots * kv_bytes_per_token(dtype) = the formula, for any rank, precision and length;
    and allocated is what the tokens need, rounded up to whole steps, but never more than the context."""
    config = data.draw(configs(attn, joint))
    if attn.startswith("mla"):  # ranks that are no multiple of 1/d too: r is the nearest whole number
        rank = data.draw(st.floats(1 / config.n_embd, 1))
        config = replace(config, rank=rank)
    d, h, H, R = config.n_embd, config.n_embd // config.n_head, config.n_head, config.rope_dim
    r = round((config.rank or 0) * d)
    latents = r if joint else 2 * r
    numbers = {
        "mha": 2 * d,
        "mha_rope": 2 * d,
        "gqa": 2 * h * round((config.rank or 0) * H),
        "mla_decoupled": latents + (R or 0),
    }.get(attn, latents)

    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(0, CONTEXT))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    model = GPT(config)
    assert model.kv_bytes_per_token(dtype) == numbers * config.n_layer * dtype.itemsize
    for absorb in paths(attn):
        cache = model.init_cache(batch, absorb, dtype)
        assert cache.nbytes == 0 and tree_leaves(model.init_cache(batch, absorb).layers)[0].dtype == torch.float32
        cache.reserve(length)
        tensors = tree_leaves(cache.layers)
        assert cache.size == min(math.ceil(length / KVCache.STEP) * KVCache.STEP, CONTEXT)
        assert cache.nbytes == batch * cache.size * model.kv_bytes_per_token(dtype) == sum(t.nbytes for t in tensors)
        assert all(tensor.is_contiguous() and tensor.dtype == dtype for tensor in tensors)


@pytest.mark.parametrize(("attn", "joint"), [("mha", False), ("mla_decoupled", False), ("mla", True)])
def test_growing_copies_little_of_what_decoding_reads(attn, joint):
    """From an empty cache to a full context: bytes moved by growth, over bytes of cache that the steps attend to. What
    is held survives, and tensors move only when they grow."""
    model = GPT(GPTConfig(n_embd=8, n_head=2, n_layer=2, vocab_size=9, block_size=2000, attn=attn, joint=joint))
    cache, copied, read, before = model.init_cache(2), 0, 0, []
    for length in range(1, 2001):
        size, held = cache.size, cache.nbytes
        cache.reserve(length)
        now = [tensor.data_ptr() for tensor in tree_leaves(cache.layers)]
        assert (now == before) == (cache.size == size)
        copied += 2 * held if cache.size > size else 0  # read and written
        read, before = read + cache.nbytes, now
        for tensor in tree_leaves(cache.layers):
            tensor[..., length - 1, :] = length
    for tensor in tree_leaves(cache.layers):
        assert (tensor[..., 0] == torch.arange(1.0, 2001)).all()
    assert 0 < copied < 0.03 * read


def test_half_rank_halves_the_cache():
    """Half-rank MLA at h = 64 caches 50% less than MHA, 47% less with the rotary key; 75% and 72% less if joint."""
    shape = {"n_embd": 512, "n_head": 8, "n_layer": 1, "vocab_size": 9, "block_size": 4}

    def size(**options):
        return GPT(GPTConfig(**shape, **options)).kv_bytes_per_token(torch.float32)

    cuts = [
        round(100 * (1 - size(attn=attn, joint=joint) / size(attn="mha")))
        for attn, joint in (("mla", False), ("mla_decoupled", False), ("mla", True), ("mla_decoupled", True))
    ]
    assert cuts == [50, 47, 75, 72]


# What is refused

MLA, SIZES = {"attn": "mla"}, ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")


@pytest.mark.parametrize(
    ("field", "options"),
    [
        *(("attn", {"attn": bad}) for bad in ("mqa", "", "MLA")),
        *((field, {field: bad}) for field in SIZES for bad in (0, -1, 10**30)),
        ("vocab_size", {"vocab_size": 65537}),
        ("n_head", {"n_head": 7}),
        *(("n_head", {"attn": attn, "n_embd": 24, "n_head": 8}) for attn in ATTN[1:3] + ATTN[4:6]),  # odd heads, RoPE
        *(("rank", {"attn": attn, "rank": bad}) for attn in ATTN[2:] for bad in (0, -0.5, 1.01, math.nan)),
        *(("rank", {"attn": attn, "rank": rank}) for attn in ATTN[:2] for rank in (0, 0.5, 1.0)),
        ("rank", {**MLA, "rank": 0.0001}),  # no latent at all
        *(("rank", {"attn": "gqa", "rank": bad}) for bad in (0.3, 3 / 8, 1 / 16)),  # of 8 heads
        *(("q_rank", {**MLA, "q_rank": bad}) for bad in (0, -0.5, 1.01, math.nan, 0.0001)),
        *(("q_rank", {"attn": attn, "q_rank": 0.5}) for attn in ATTN[:3]),
        *(("latent_norm", {"attn": attn, "latent_norm": True}) for attn in ATTN[:3]),
        *(("joint", {"attn": attn, "joint": True}) for attn in ATTN if attn not in JOINS),
        *(("rope_dim", {"attn": "mla_decoupled", "rope_dim": bad}) for bad in (3, 0, -2)),
        *(("rope_dim", {"attn": attn, "rope_dim": 16}) for attn in ATTN[:-1]),
        *(("rope_base", {"rope_base": bad}) for bad in (0, 1.0, -5.0, math.inf, math.nan)),
        *(("dropout", {"dropout": bad}) for bad in (1, 1.0, -0.1, math.nan)),
    ],
)
def test_a_wrong_configuration_names_the_field(field, options):
    """ValueError in one line, with the field, the value that it got, and what it may be."""
    options = {"n_head": 8, "n_embd": 64} | options
    with pytest.raises(ValueError) as error:
        GPTConfig(**options)
    message = str(error.value)
    assert message.startswith(f"{field}={options[field]!r}: must be ") and "\n" not in message


def test_an_unknown_attention_lists_the_seven():
    """The seven names, in the order of the table."""
    assert ATTN == ("mha", "mha_rope", "gqa", "mla", "mla_rope", "mla_prerope", "mla_decoupled")
    with pytest.raises(ValueError, match=", ".join(ATTN)):
        GPTConfig(attn="mqa")


def test_the_defaults_of_a_configuration():
    """Rank is a half and rope_dim half a head where they mean something, and None elsewhere."""
    for attn in ATTN:
        config = GPTConfig(attn=attn)
        assert config.rank == (None if attn in ("mha", "mha_rope") else 0.5)
        assert config.rope_dim == (config.n_embd // config.n_head // 2 if attn == "mla_decoupled" else None)
    assert GPTConfig(n_embd=24, n_head=4, attn="mla_decoupled").rope_dim == 2  # even, for h = 6
    assert GPTConfig(vocab_size=65536).vocab_size == 65536


@pytest.mark.parametrize("attn", [attn for attn in ATTN if attn not in ABSORBS])
def test_a_variant_that_cannot_absorb_says_why(attn):
    """absorb=True: a ValueError that names the variant and the reason; a model in training goes on in training."""
    model = sampler(attn=attn).train()
    why = f"{attn} rotates" if attn == "mla_rope" else f"{attn} has no latent"
    with pytest.raises(ValueError, match=why):
        model.init_cache(1, absorb=True)
    with pytest.raises(ValueError, match=why):
        model.generate(text(model.config, 0, 1, 2), 2, absorb=True)
    assert model.training


@pytest.mark.parametrize("attn", ATTN)
def test_overrunning_the_context_names_both_lengths(attn):
    """It is refused before anything is written, so that decoding can go on."""
    model = sampler(attn=attn, block_size=11)
    idx = text(model.config, 0, 2, 12)
    cache = model.init_cache(2)
    feed(model, cache, idx[:, :9].split([8, 1], 1))
    overruns = [
        ((12, 11), lambda: model(idx[:, 9:12], cache=cache)),
        ((12, 11), lambda: model(idx)),
        ((12, 11), lambda: model(idx, idx)),
        ((13, 11), lambda: model.generate(idx[:, :9], 4)),
    ]
    for lengths, overrun in overruns:
        with pytest.raises(ValueError) as error:
            overrun()
        words = str(error.value).replace(":", " ").replace("=", " ").replace(",", " ").split()
        assert all(str(length) in words for length in lengths)
    close(feed(model, cache, [idx[:, 9:11]]), full(model, idx[:, :11])[:, -1:])


def test_generate_refuses_what_it_cannot_continue():
    """An empty prompt and options out of range are each a ValueError that names it."""
    model = sampler()
    prompt = text(model.config, 0, 1, 3)
    for match, call in (
        ("no prompt", lambda: model.generate(prompt[:, :0], 3)),
        ("temperature=-1", lambda: model.generate(prompt, 3, temperature=-1)),
        ("temperature=nan", lambda: model.generate(prompt, 3, temperature=math.nan)),
        ("top_k=0", lambda: model.generate(prompt, 3, top_k=0)),
        ("max_new_tokens=-1", lambda: model.generate(prompt, -1)),
    ):
        with pytest.raises(ValueError, match=match):
            call()


# Initialisation, precision, gradients

RANKED = [(*v, rank, None) for v in VARIANTS for rank in ([None] if v[0] in ("mha", "mha_rope") else [0.125, 0.5, 1.0])]
RANKED += [(*v, 0.5, 0.25) for v in VARIANTS if v[0].startswith("mla")]


@pytest.mark.parametrize(("attn", "joint", "rank", "q_rank"), RANKED)
def test_every_matrix_or_product_starts_with_the_deviation_of_gpt2(attn, joint, rank, q_rank):
    """0.02 for each entry of what stands before scores and values, factored or not, so that latent attention starts as
    MHA does; residual projections have it divided by sqrt(2 n_layer), and gains are 1."""
    torch.manual_seed(0)
    shape = {"n_layer": 3, "n_head": 8, "n_embd": 384, "vocab_size": 999, "block_size": 99}
    model = GPT(GPTConfig(**shape, attn=attn, rank=rank, joint=joint, q_rank=q_rank))
    plain, residual = [p for name, p in model.named_parameters() if "embedding" in name], []
    assert len(plain) == (2 if attn in ("mha", "mla") else 1)
    for layer, block in enumerate(model.blocks):
        w = weights_of(model, layer)
        keys = w.get("w_k", torch.eye(384))
        if attn.startswith("mla"):
            keys, values = keys @ w["w_dk"] @ w["w_uk"], w["w_dk" if joint else "w_dv"] @ w["w_uv"]
        else:
            values = w["w_v"]
        queries = [w["w_q"]] if q_rank is None else [w["w_dq"] @ w["w_uq"]]
        if attn == "mla_decoupled":
            queries += [w["w_qr"] if q_rank is None else w["w_dq"] @ w["w_qr"], w["w_kr"]]
        plain += [*queries, keys, values, block.mlp_up.weight]
        residual += [w["w_o"], block.mlp_down.weight]
    assert [m.std().item() for m in plain] == pytest.approx([0.02] * len(plain), rel=0.03)
    assert [m.std().item() for m in residual] == pytest.approx([0.02 / math.sqrt(6)] * len(residual), rel=0.03)
    assert all((gain == 1).all() for gain in model.parameters() if gain.dim() == 1)


@pytest.mark.parametrize(("attn", "joint"), [v for v in VARIANTS if v[0].startswith("mla")])
def test_behind_a_norm_keys_values_and_queries_start_as_large_as_those_of_mha(attn, joint):
    """Their entries have the deviation 0.02 sqrt(d), that of x W for x of size 1, at any rank."""
    torch.manual_seed(0)
    options = dict(attn=attn, joint=joint, rank=0.25, latent_norm=True, q_rank=0.5)
    attention = GPT(GPTConfig(n_embd=384, n_head=8, n_layer=1, vocab_size=9, **options)).blocks[0].attn
    outputs = {}
    for name, layer in attention.named_children():
        layer.register_forward_hook(lambda module, args, out, name=name: outputs.update({name: out}))
    order = torch.arange(64)
    attention(torch.randn(2, 64, 384), order, causal_mask(range(64), 64).float())
    for name in ("w_uq", "w_uk", "w_uv", "w_qr")[: 4 if attn == "mla_decoupled" else 3]:
        assert outputs[name].std().item() == pytest.approx(0.02 * 384**0.5, rel=0.05)


@over(VARIANTS, 5)
def test_gradients_reach_every_parameter(attn, joint, data):
    """No gradient is zero, and together they give the loss's slope in a random direction (central difference)."""
    config, seed = data.draw(configs(attn, joint, vocab_size=20)), data.draw(seeds)
    model, idx, targets = build(config, seed), text(config, seed, 2, 8), text(config, seed + 1, 2, 8)
    model(idx, targets)[1].backward()
    assert all(weight.grad.abs().max() > 0 for weight in model.parameters())

    weights, losses, step = list(model.parameters()), [], 1e-5
    directions = [torch.randn_like(weight) / sum(w.numel() for w in weights) ** 0.5 for weight in weights]
    slope = sum((w.grad * direction).sum() for w, direction in zip(weights, directions, strict=True))
    for move in (step, -2 * step):
        with torch.no_grad():
            for weight, direction in zip(weights, directions, strict=True):
                weight += move * direction
            losses.append(model(idx, targets)[1])
    close((losses[0] - losses[1]) / (2 * step), slope, 1e-7)


@pytest.mark.parametrize(("attn", "joint"), VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_lower_precisions_only_round(attn, joint, dtype, tolerance):
    """Loss, gradients, and logits from a cache of either precision, against float64 with the same weights."""
    model = small(attn, joint, dtype)
    exact = copy.deepcopy(model).double()
    idx = torch.randint(11, (2, 12), generator=torch.Generator().manual_seed(0))
    losses = [one(idx[:, :-1], idx[:, 1:])[1] for one in (model, exact)]
    sum(loss.double() for loss in losses).backward()
    close(losses[0].detach(), losses[1].detach(), tolerance)
    for rounded, weight in zip(model.parameters(), exact.parameters(), strict=True):
        close(rounded.grad, weight.grad, tolerance)
    for absorb in paths(attn):
        for cached in (torch.float32, torch.bfloat16):
            logits = feed(model, model.init_cache(2, absorb, cached), idx.split(4, 1))
            assert logits.dtype == dtype
            close(logits, full(exact, idx)[:, 3::4], 0.05 if cached == torch.bfloat16 else tolerance)


# Checkpoints


@pytest.mark.parametrize(("attn", "joint"), VARIANTS)
def test_a_checkpoint_round_trip_keeps_the_logits(attn, joint, tmp_path):
    """The model comes back in eval mode, with all entries of the file beside it."""
    model = sampler(attn=attn, joint=joint, dropout=0.5).float()
    save(tmp_path / "ckpt.pt", model, step=7)
    loaded, checkpoint = load_checkpoint(tmp_path / "ckpt.pt", "cpu")
    assert loaded.config == model.config and not loaded.training and checkpoint["step"] == 7
    idx = text(model.config, 0, 2, 9)
    assert torch.equal(full(loaded, idx), full(model, idx))
    assert torch.equal(loaded.generate(idx, 5, temperature=0), model.generate(idx, 5, temperature=0))
    assert all(weight.requires_grad for weight in loaded.parameters())


def refused(path):
    """The message: one line that names the file, and no warning beside it."""
    with warnings.catch_warnings(record=True) as said, pytest.raises(ValueError) as error:
        warnings.simplefilter("always")
        load_checkpoint(path, "cpu")
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert [str(warning.message) for warning in said] == []
    return str(error.value)


@pytest.mark.parametrize("content", [b"", b"Once upon a time", b"\x80\x02.", b"PK\x03\x04", b"\0" * 999])
def test_a_file_of_another_kind_is_refused(content, tmp_path):
    """Empty, text, the beginning of a pickle or a zip, zeros: ValueError."""
    (tmp_path / "file").write_bytes(content)
    refused(tmp_path / "file")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_of_something_else_is_refused(protocol, tmp_path):
    """Also one that holds only plain values: ValueError."""
    (tmp_path / "file").write_bytes(pickle.dumps({"format": FORMAT, "config": {}}, protocol))
    refused(tmp_path / "file")


def test_a_missing_file_a_folder_and_an_older_format_are_refused(tmp_path):
    assert "No such file" in refused(tmp_path / "missing.pt")
    assert "directory" in refused(tmp_path)
    save(tmp_path / "ckpt.pt", sampler(), format="nanoMLA checkpoint 1")
    assert "other versions do not load" in refused(tmp_path / "ckpt.pt")


class Bomb:
    """Unpickling this makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("kind", ["pickle", "zip", "legacy"])
def test_a_checkpoint_that_would_execute_code_is_refused(kind, tmp_path):
    """Nothing in it runs, though it would if unpickled freely."""
    path, crater = tmp_path / "bomb.pt", tmp_path / "crater"
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"format": FORMAT, "model": Bomb(crater)}))
    else:
        checkpoint = {"format": FORMAT, "config": {}, "model": {}, "extra": Bomb(crater)}
        torch.save(checkpoint, path, _use_new_zipfile_serialization=kind == "zip")
    refused(path)
    assert not crater.exists()
    if kind == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert crater.exists()


@pytest.mark.parametrize("content", [[], torch.zeros(3), {}, {"config": {}}], ids=str)
def test_a_file_of_tensors_that_is_no_checkpoint_is_refused(content, tmp_path):
    """It loads as tensors and plain values, but they are not a model."""
    torch.save(content, tmp_path / "other.pt")
    refused(tmp_path / "other.pt")
