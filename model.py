"""A small GPT with seven kinds of attention behind one flag, from multi-head attention (MHA) to the multi-head latent
attention (MLA) of DeepSeek-V2. Read it from top to bottom.

Symbols, as in the papers: d = n_embd, H = n_head, h = d/H (width of a head), r = round(rank * d) (width of a latent),
R = rope_dim, V = vocab_size; B sequences, T new tokens each, S positions to attend to (T without a cache); x (B, T, d).

| attn          | positions               | keys                                   | cached  | absorbs |
|---------------|-------------------------|----------------------------------------|---------|---------|
| mha           | learned table           | k = x W_K                              | 2d      |         |
| mha_rope      | RoPE on q and k         | k = RoPE(x W_K)                        | 2d      |         |
| gqa           | RoPE on q and k         | as mha_rope, but only rank*H key heads | 2d*rank |         |
| mla           | learned table           | c = x W_DK, k = c W_UK                 | 2r      | yes     |
| mla_rope      | RoPE after expansion    | c = x W_DK, k = RoPE(c W_UK)           | 2r      | no      |
| mla_prerope   | RoPE before compression | c = RoPE(x W_K) W_DK, k = c W_UK       | 2r      | yes     |
| mla_decoupled | RoPE on an extra key    | as mla, plus k^R = RoPE(x W_KR)        | 2r + R  | yes     |

"cached" counts numbers per token per layer. MHA caches the keys and values of every head. MLA caches latents instead: a
down-projection W_D squeezes a token into r numbers that all heads share, and up-projections W_U expand them into keys
and values when they are needed. Values take one path in all four: c_v = x W_DV, v = c_v W_UV.

To absorb is to decode without expanding. A score is q.(c W_UK) = (q W_UK^T).c, so the new query can go down to the
latents instead of all cached latents going up to the query. Values work the same way: expand the weighted sum of the
latents, not each latent. This fails in mla_rope: RoPE stands between q and W_UK, a different rotation for each cached
token, so no single projected query fits them all. mla_prerope rotates before it compresses, which takes a full W_K; and
W_DK W_UK now stands between the two rotations, so scores depend on more than distance. mla_decoupled leaves the latents
unrotated and adds a second score for position, q^R.k^R: q^R = RoPE(x W_QR) has one vector per head, k^R is one small
key per token for all heads. With joint, latent_norm and q_rank (see GPTConfig), it is the attention of DeepSeek-V2.

Sources: Vaswani et al. 2017 (mha); Su et al. 2021 (RoPE); Ainslie et al. 2023 (gqa); DeepSeek-AI 2024, arXiv 2405.04434
(MLA); Mehta et al. 2025, arXiv 2506.09342 (small MLA); Jha and Reagen 2025, arXiv 2507.09394 (mla_prerope).
"""

import math
import warnings
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.common import InputError, Parser, load_tokenizer, run, wrap

ATTN = ("mha", "mha_rope", "gqa", "mla", "mla_rope", "mla_prerope", "mla_decoupled")
MLA = ATTN[3:]
LEARNED = ("mha", "mla")  # learn a table of positions; the others use RoPE
ABSORBS = ("mla", "mla_prerope", "mla_decoupled")
JOINS = ("mla", "mla_rope", "mla_decoupled")  # not mla_prerope, where values would come from rotated keys
ALLOWED_WITH = dict(rank=("gqa", *MLA), joint=JOINS, latent_norm=MLA, q_rank=MLA, rope_dim=("mla_decoupled",))
FORMAT = "nanoMLA checkpoint 3"
Linear = partial(nn.Linear, bias=False)
SIZES = {
    "tiny": dict(n_layer=4, n_head=2, n_embd=128, block_size=320),
    "30m": dict(n_layer=9, n_head=8, n_embd=512, block_size=512),
    "124m": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024),
    "200m": dict(n_layer=12, n_head=16, n_embd=1024, block_size=1024),
}


@dataclass
class GPTConfig:
    """The shape of a model. Raises InputError naming the field, its value and what is allowed."""

    block_size: int = 512  # longest context, in tokens
    vocab_size: int = 4096
    n_layer: int = 9
    n_head: int = 8
    n_embd: int = 512
    attn: str = "mha_rope"
    rank: float | None = None  # latent width / n_embd; for gqa, key heads / n_head. Default 0.5
    joint: bool = False  # one latent for both keys and values, so that r numbers are cached, not 2r
    latent_norm: bool = False  # an RMSNorm on each latent
    q_rank: float | None = None  # width of a latent for queries / n_embd; it is not cached. None: no such latent
    rope_dim: int | None = None  # width of mla_decoupled's rotary key, even. Default: half a head
    rope_base: float = 10000.0
    dropout: float = 0.0

    def __post_init__(self):
        def check(ok, field, allowed):
            if not ok:
                raise InputError(f"{field}={getattr(self, field)!r}: must be {allowed}")

        check(self.attn in ATTN, "attn", "one of " + ", ".join(ATTN))
        limits = dict(block_size=2**20, vocab_size=2**16, n_layer=2**10, n_head=2**10, n_embd=2**16)
        for field, limit in limits.items():  # tokens are stored as uint16; the other limits only catch typos
            check(1 <= getattr(self, field) <= limit, field, f"from 1 to {limit}")
        check(self.n_embd % self.n_head == 0, "n_head", f"a divisor of n_embd={self.n_embd}")
        self.head_dim = self.n_embd // self.n_head  # h
        even = self.head_dim % 2 == 0 or self.attn in (*LEARNED, "mla_decoupled")
        check(even, "n_head", f"such that n_embd={self.n_embd} / n_head is even, for RoPE")
        check(1 < self.rope_base < math.inf, "rope_base", "a number above 1")
        check(0 <= self.dropout < 1, "dropout", "in [0, 1)")
        for field, variants in ALLOWED_WITH.items():
            only = f"left out with attn={self.attn}: it goes with {', '.join(variants)}"
            check(self.attn in variants or getattr(self, field) is getattr(GPTConfig, field), field, only)  # or unset
        self.rank = 0.5 if self.rank is None and self.attn in ALLOWED_WITH["rank"] else self.rank
        for field, ratio in (("rank", self.rank), ("q_rank", self.q_rank)):
            check(ratio is None or 0 < ratio <= 1 <= round(ratio * self.n_embd), field, "in (0, 1], at least 1 wide")
        self.latent_dim = round((self.rank or 0) * self.n_embd)  # r
        self.q_dim = round((self.q_rank or 1) * self.n_embd)  # width of what queries are made from
        self.kv_heads = max(1, round(self.rank * self.n_head)) if self.attn == "gqa" else self.n_head
        whole = abs((self.rank or 1) * self.n_head - self.kv_heads) < 0.01 and self.n_head % self.kv_heads == 0
        check(whole or self.attn != "gqa", "rank", f"k/{self.n_head} for some k that divides {self.n_head}")
        if self.attn == "mla_decoupled":
            self.rope_dim = max(2, self.head_dim // 4 * 2) if self.rope_dim is None else self.rope_dim
            check(0 < self.rope_dim <= 2**16 and self.rope_dim % 2 == 0, "rope_dim", "even, from 2 to 65536")

    @property
    def cache_shapes(self):
        """The tensors that a layer caches for each token: {name: shape}."""
        if self.attn not in MLA:
            return dict.fromkeys(("k", "v"), (self.kv_heads, self.head_dim))
        latents = dict.fromkeys(("c_k",) if self.joint else ("c_k", "c_v"), (self.latent_dim,))
        return latents | ({"k_r": (self.rope_dim,)} if self.attn == "mla_decoupled" else {})


class RoPE(nn.Module):
    """Rotary positions: the pair (x_i, x_{i + w/2}) turns by the angle position * base^(-2i/w). The product of two
    rotated vectors then depends on their positions only through the difference."""

    def __init__(self, width, length, base):
        super().__init__()
        frequencies = base ** (-torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width)
        angles = torch.outer(torch.arange(length, dtype=torch.float64, device="cpu"), frequencies)
        self.exact = angles.cos().repeat(1, 2), torch.cat((-angles.sin(), angles.sin()), dim=-1)  # (length, w)
        self.register_buffer("cos", self.exact[0].float(), persistent=False)
        self.register_buffer("sin", self.exact[1].float(), persistent=False)

    def _apply(self, fn, recurse=True):  # called by .to(), .bfloat16(), ...: bfloat16 tables would blur positions
        super()._apply(fn, recurse)
        device, dtype = self.cos.device, torch.promote_types(self.cos.dtype, torch.float32)
        self.cos, self.sin = (table.to(dtype).to(device) for table in self.exact)
        return self

    def forward(self, x, positions):
        """x (..., T, w), positions (T,) -> x rotated, of the same shape and precision."""
        swapped = x.roll(x.size(-1) // 2, dims=-1)  # x = (a, b) -> (b, a); returned: (a cos - b sin, b cos + a sin)
        return (x * self.cos[positions] + swapped * self.sin[positions]).to(x.dtype)


class KVCache:
    """The cached keys and values (or latents, and the rotary key) of all layers. Made by GPT.init_cache.
    Each is one contiguous tensor (B, ..., size, width), as a CPU can be 8 times slower with a slice of a larger one.
    When full, it grows by STEP slots, so growing copies 1/STEP of what decoding reads. Empty slots are masked."""

    STEP = 128

    def __init__(self, config, batch_size, absorb, dtype, device):
        self.absorb, self.max_size = absorb, config.block_size
        self.pos = self.size = self.nbytes = 0  # tokens held, slots and bytes allocated
        empty = partial(torch.empty, dtype=dtype, device=device)
        tensors = {name: empty(batch_size, *heads, 0, width) for name, (*heads, width) in config.cache_shapes.items()}
        self.layers = [dict(tensors) for _ in range(config.n_layer)]

    def reset(self):  # forgets the tokens, keeps the memory
        self.pos = 0

    def reserve(self, length):  # makes room for `length` tokens
        size = min(math.ceil(length / self.STEP) * self.STEP, self.max_size)
        if size > self.size:
            for layer in self.layers:
                for name, tensor in layer.items():
                    layer[name] = F.pad(tensor, (0, 0, 0, size - self.size))
            self.size, self.nbytes = size, sum(t.nbytes for layer in self.layers for t in layer.values())

    @torch.no_grad()
    def append(self, layer, positions, new):
        """Write T new tokens to a layer: {name: (B, ..., T, width)} -> all slots: {name: (B, ..., size, width)}"""
        held = self.layers[layer]
        for name, tensor in new.items():
            held[name].index_copy_(-2, positions, tensor.to(held[name].dtype))
        return {name: held[name].to(tensor.dtype) for name, tensor in new.items()}


def split_heads(x, width):
    """(B, T, n * width) -> (B, n, T, width)"""
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


def attend(q, k, v, mask, dropout):
    """Softmax attention: q (B, H, T, w), k (B, G, S, w), v (B, G, S, h) -> (B, H, T, h). H/G query heads share a key.
    mask (T, S) is added to the scores: 0 where a query may look, -inf elsewhere."""
    (B, H, T, w), (G, S), mask = q.shape, k.shape[1:3], mask.to(q.dtype)
    if T * S > 2**18 or (T == S and q.is_cuda):  # a fused kernel for many scores, or to train on a GPU
        return F.scaled_dot_product_attention(q, k, v, None if T == S else mask, dropout, T == S, enable_gqa=G < H)
    q = (q * w**-0.5).reshape(B, G, H // G * T, w)
    p = ((q @ k.mT).view(B, H, T, S) + mask).softmax(-1)
    p = F.dropout(p, dropout).to(v.dtype)
    return (p.view(B, G, H // G * T, S) @ v).view(B, H, T, -1)


class RMSNorm(nn.RMSNorm):
    def forward(self, x):  # under autocast, x has another precision than the gain
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class MultiHeadAttention(nn.Module):
    """mha, mha_rope and gqa: keys and values for every head, or for every group of heads."""

    def __init__(self, config, layer, rope):
        super().__init__()
        self.config, self.layer, self.rope = config, layer, rope
        self.w_q = Linear(config.n_embd, config.n_embd)
        self.w_k = Linear(config.n_embd, config.kv_heads * config.head_dim)
        self.w_v = Linear(config.n_embd, config.kv_heads * config.head_dim)
        self.w_o = Linear(config.n_embd, config.n_embd)

    def forward(self, x, positions, mask, cache=None):
        """x (B, T, d) at positions (T,), mask (T, S) -> (B, T, d)"""
        q, k, v = (split_heads(w(x), self.config.head_dim) for w in (self.w_q, self.w_k, self.w_v))
        if self.rope is not None:
            q, k = self.rope(q, positions), self.rope(k, positions)
        if cache is not None:
            k, v = cache.append(self.layer, positions, {"k": k, "v": v}).values()
        y = attend(q, k, v, mask, self.config.dropout if self.training else 0.0)  # (B, H, T, h)
        return self.w_o(y.transpose(1, 2).flatten(2))


class LatentAttention(nn.Module):
    """mla, mla_rope, mla_prerope and mla_decoupled: keys and values from latents that all heads share."""

    def __init__(self, config, layer, rope):
        super().__init__()
        self.config, self.layer, self.rope = config, layer, rope
        d, r, q = config.n_embd, config.latent_dim, config.q_dim
        norm = partial(RMSNorm, eps=1e-6) if config.latent_norm else nn.Identity
        if config.q_rank is None:
            self.w_q = Linear(d, d)
        else:
            self.w_dq, self.norm_q, self.w_uq = Linear(d, q), norm(q), Linear(q, d)
        if config.attn == "mla_prerope":
            self.w_k = Linear(d, d)
        self.w_dk, self.norm_k, self.w_uk = Linear(d, r), norm(r), Linear(r, d)
        if not config.joint:
            self.w_dv, self.norm_v = Linear(d, r), norm(r)
        self.w_uv = Linear(r, d)
        if config.attn == "mla_decoupled":
            self.w_qr, self.w_kr = Linear(q, config.n_head * config.rope_dim), Linear(d, config.rope_dim)
        self.w_o = Linear(d, d)

    def forward(self, x, positions, mask, cache=None):
        """x (B, T, d) at positions (T,), mask (T, S) -> (B, T, d)"""
        attn, h, q_r = self.config.attn, self.config.head_dim, None
        # Queries (B, H, T, h), from x or from a latent
        c_q = x if self.config.q_rank is None else self.norm_q(self.w_dq(x))
        q = split_heads(self.w_q(x) if self.config.q_rank is None else self.w_uq(c_q), h)
        if attn in ("mla_rope", "mla_prerope"):
            q = self.rope(q, positions)
        # Latents (B, T, r), from x or from rotated keys
        source = x
        if attn == "mla_prerope":
            source = self.rope(split_heads(self.w_k(x), h), positions).transpose(1, 2).flatten(2)
        cache_entry = {"c_k": self.norm_k(self.w_dk(source))}
        if not self.config.joint:
            cache_entry["c_v"] = self.norm_v(self.w_dv(x))
        # A second score for position: rotary queries (B, H, T, R), and one key (B, T, R) for all heads
        if attn == "mla_decoupled":
            q_r = self.rope(split_heads(self.w_qr(c_q), self.config.rope_dim), positions)
            cache_entry["k_r"] = self.rope(self.w_kr(x), positions)
        if cache is not None:
            cache_entry = cache.append(self.layer, positions, cache_entry)  # now for all S positions
        c_k, c_v, k_r = cache_entry["c_k"], cache_entry.get("c_v", cache_entry["c_k"]), cache_entry.get("k_r")
        # Per head, expanding S keys costs S r h multiplications, but saves T S (r - h) in scores: long prompts expand.
        absorb = cache is not None and cache.absorb and x.size(1) <= h
        y = (self.absorbed if absorb else self.expanded)(q, q_r, c_k, c_v, k_r, mask)
        return self.w_o(y.transpose(1, 2).flatten(2))

    def expanded(self, q, q_r, c_k, c_v, k_r, mask):
        """Expand all S latents, then attend as MHA does: q (B, H, T, h), c_k and c_v (B, S, r) -> (B, H, T, h).
        q_r (B, H, T, R) and k_r (B, S, R) belong to mla_decoupled, and are None elsewhere."""
        h = self.config.head_dim
        k, v = split_heads(self.w_uk(c_k), h), split_heads(self.w_uv(c_v), h)  # (B, H, S, h)
        if self.config.attn == "mla_rope":
            k = self.rope(k, torch.arange(k.size(2), device=k.device))
        if q_r is not None:  # q.k + q^R.k^R is the product of [q | q^R] and [k | k^R]
            q, k = torch.cat((q, q_r), -1), torch.cat((k, k_r.unsqueeze(1).expand(-1, k.size(1), -1, -1)), -1)
        return attend(q, k, v, mask, self.config.dropout if self.training else 0.0)

    def absorbed(self, q, q_r, c_k, c_v, k_r, mask):
        """The same result without expanding: the queries go down to the latents instead. Not for mla_rope."""
        (B, H, T, h), R = q.shape, self.config.rope_dim or 0
        w_uk, w_uv = (w.weight.unflatten(0, (H, h)) for w in (self.w_uk, self.w_uv))  # (H, h, r): Linear stores W^T
        q_c = torch.einsum("bHth,Hhr->bHtr", q, w_uk).flatten(1, 2).contiguous()  # q W_UK^T, (B, H T, r)
        scores = c_k @ q_c.mT  # (B, S, H T). On a CPU, q_c @ c_k.mT is 4 times slower for one sequence
        if q_r is not None:
            scores = scores + k_r @ q_r.flatten(1, 2).mT
        scores = scores.mT.reshape(B, H, T, -1) * (h + R) ** -0.5
        p = (scores + mask).softmax(-1).to(c_v.dtype)
        c = (p.flatten(1, 2) @ c_v).view(B, H, T, -1)  # each query's weighted sum of latents
        return torch.einsum("bHtr,Hhr->bHth", c, w_uv)


class Block(nn.Module):
    def __init__(self, config, layer, rope):
        super().__init__()
        self.attn_norm = nn.LayerNorm(config.n_embd, bias=False)
        self.attn = (LatentAttention if config.attn in MLA else MultiHeadAttention)(config, layer, rope)
        self.mlp_norm = nn.LayerNorm(config.n_embd, bias=False)
        self.mlp_up, self.mlp_down = Linear(config.n_embd, 4 * config.n_embd), Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, positions, mask, cache):
        x = x + self.dropout(self.attn(self.attn_norm(x), positions, mask, cache))
        return x + self.dropout(self.mlp_down(F.gelu(self.mlp_up(self.mlp_norm(x)))))


class GPT(nn.Module):
    """Embedding, blocks, and the embedding again as output head: GPT-2 without biases."""

    def __init__(self, config):
        super().__init__()
        self.config, rope = config, None
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        if config.attn in LEARNED:
            self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        else:
            rope = RoPE(config.rope_dim or config.head_dim, config.block_size, config.rope_base)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer, rope) for layer in range(config.n_layer))
        self.final_norm = nn.LayerNorm(config.n_embd, bias=False)
        self.init_weights()

    def init_weights(self):
        """As in GPT-2, but latents have variance 1, so MLA starts with keys and values as large as those of MHA."""
        config, d = self.config, self.config.n_embd
        for name, weight in self.named_parameters():
            matrix = name.split(".")[-2]
            std = 0.02 * math.sqrt(d / weight.size(-1))
            if matrix.startswith("w_d") or (matrix == "w_k" and config.attn == "mla_prerope"):
                std = d**-0.5
            elif matrix in ("w_o", "mlp_down"):  # these add to the residual stream
                std = 0.02 / math.sqrt(2 * config.n_layer)
            if weight.dim() == 2:  # the gains of norms start at 1
                nn.init.normal_(weight, std=std)

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) int64 -> logits, loss. With a cache, for inference, idx continues its tokens.
        With targets (B, T), -1 where a token does not count: logits (B, T, V), mean cross-entropy in nats per token.
        Without: logits (B, 1, V) of the last position, None. ValueError if the context cannot hold the tokens."""
        T, start, limit = idx.size(1), cache.pos if cache else 0, self.config.block_size
        if not 0 < T <= limit - start:
            raise ValueError(f"{start + T} tokens, {T} of them new: must be at least 1 new, and at most {limit} in all")
        if cache:
            cache.reserve(start + T)
            cache.pos += T
        x = self.hidden(idx, torch.arange(start, start + T, device=idx.device), cache)
        if targets is None:
            return F.linear(x[:, -1:], self.token_embedding.weight), None
        logits = F.linear(x, self.token_embedding.weight)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        # Row by row on a CPU, where one row stays in the processor's cache: 10% of a step
        rows = zip(logits, targets, strict=True) if logits.is_cpu else [(logits.flatten(0, 1), targets.flatten())]
        total = sum(F.cross_entropy(row.to(dtype), t, ignore_index=-1, reduction="sum") for row, t in rows)
        return logits, total / (targets >= 0).sum()

    def hidden(self, idx, positions, cache=None):
        """idx (B, T) at positions (T,), after the cache's tokens -> input of the output head (B, T, d)"""
        x = self.token_embedding(idx)
        if self.config.attn in LEARNED:
            x = x + self.position_embedding(positions)
        x = self.dropout(x)
        masked = torch.arange(cache.size if cache else idx.size(1), device=idx.device) > positions[:, None]
        mask = torch.zeros_like(masked, dtype=x.dtype).masked_fill(masked, -math.inf)  # (T, S)
        for block in self.blocks:
            x = block(x, positions, mask, cache)
        return self.final_norm(x)

    def init_cache(self, batch_size, absorb=None, dtype=None):
        """An empty KVCache, in the weights' dtype unless another is given. absorb=None absorbs where the variant can,
        True raises ValueError where it cannot, False expands all latents at every step."""
        attn, weight = self.config.attn, self.token_embedding.weight
        if absorb and attn not in ABSORBS:
            why = "rotates its keys after W_UK" if attn == "mla_rope" else "has no latents"
            raise ValueError(f"absorb=True: {attn} {why}; these variants absorb: " + ", ".join(ABSORBS))
        absorb = attn in ABSORBS if absorb is None else absorb
        return KVCache(self.config, batch_size, absorb, dtype or weight.dtype, weight.device)

    def kv_bytes_per_token(self, dtype):
        """Bytes that one token of one sequence takes in the cache, all layers together."""
        return self.config.n_layer * sum(map(math.prod, self.config.cache_shapes.values())) * dtype.itemsize

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, absorb=None, generator=None, stop=None):
        """Continue idx (B, T) by sampling: (B, T + max_new_tokens), or fewer if every row has sampled the token `stop`.
        temperature=0 takes the most likely token, top_k samples among the k most likely. Ignore tokens after `stop`.
        Raises InputError if an option is out of range, idx is empty, or the result would not fit into block_size."""
        if not (0 <= temperature < math.inf and max_new_tokens >= 0 and (top_k is None or top_k >= 1)):
            raise InputError(f"{temperature=} and {max_new_tokens=} must be at least 0, {top_k=} at least 1")
        length, limit = idx.size(1) + max_new_tokens, self.config.block_size
        if not max_new_tokens < length <= limit:  # or the prompt is empty
            raise InputError(f"{length} tokens, {max_new_tokens} of them new: over a context of {limit}, or no prompt")
        cache, new, was_training = self.init_cache(idx.size(0), absorb), idx, self.training
        stopped = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
        self.eval()
        while idx.size(1) < length and (stop is None or not stopped.all()):
            logits = self(new, cache=cache)[0][:, -1].float()
            if top_k is not None:
                least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < least, -math.inf)
            new = logits.argmax(-1, keepdim=True)
            if temperature > 1e-5:  # less counts as 0
                new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            idx = torch.cat((idx, new), dim=1)
            stopped |= new == (-1 if stop is None else stop)  # no token is -1
        self.train(was_training)
        return idx


def load_checkpoint(path, device="cpu"):
    """A file of train.py -> its model in eval mode, and its whole dict. InputError if missing, damaged or not ours."""
    try:
        with warnings.catch_warnings(action="ignore"):  # PyTorch's, about files that are no checkpoints
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in zip, pickle or tensor code
        raise InputError(f"{path}: not a checkpoint ({getattr(error, 'strerror', type(error).__name__)})") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise InputError(f"{path}: not a {FORMAT}; those of other versions do not load: train the model again")
    try:
        model = GPT(GPTConfig(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: damaged ({type(error).__name__})") from error
    return model.to(device).eval(), checkpoint


def tell(model, tokenizer, prompt, tokens=math.inf, temperature=0.8, top_k=None, seed=0):
    """One story that begins with prompt, sampled until it ends, the context is full, or it has `tokens` new ones."""
    prompt = [tokenizer.eot_token, *tokenizer.encode_ordinary(prompt)]  # <|endoftext|> comes first, as in training
    room = max(1, model.config.block_size - len(prompt))  # with no room, generate raises
    idx = torch.tensor([prompt], device=model.token_embedding.weight.device)
    generator = torch.Generator(idx.device).manual_seed(seed % 2**63)
    out = model.generate(idx, min(tokens, room), temperature, top_k, None, generator, tokenizer.eot_token)
    return tokenizer.decode([token for token in out[0].tolist() if token != tokenizer.eot_token])


def main():
    parser = Parser(description="Tell a story with a trained model.")
    parser.add_argument("checkpoint", help="a file that train.py wrote, such as out/ckpt.pt")
    parser.add_argument("--prompt", default="Once upon a time", help="the story's first words (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=2**20, help="new tokens at most (default: to the story's end)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top_k", type=int, help="sample among the k most likely tokens (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another story (default: %(default)s)")
    options = vars(parser.parse_args())
    model, checkpoint = load_checkpoint(options.pop("checkpoint"))
    print(wrap(tell(model, load_tokenizer(checkpoint["meta"]["tokenizer"]), **options)))


if __name__ == "__main__":
    run(main)
