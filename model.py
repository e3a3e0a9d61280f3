"""A small GPT whose attention is one of seven, chosen by one flag: from multi-head attention to multi-head latent
attention (MLA). Read it from the top.

Symbols, as in the papers: d = n_embd, H = n_head, h = d/H (the width of a head), r = round(rank * d) (the width of a
latent), R = rope_dim. B sequences of T new tokens attend to S tokens, the cached ones included. x is (B, T, d).

| attn          | positions                 | keys                                   | cached  | absorbs      |
|---------------|---------------------------|----------------------------------------|---------|--------------|
| mha           | learned table             | k = x W_K                              | 2d      |              |
| mha_rope      | RoPE on q and k           | k = RoPE(x W_K)                        | 2d      |              |
| gqa           | RoPE on q and k           | rank*H key/value heads shared by all H | 2d rank |              |
| mla           | learned table             | c = x W_DK, k = c W_UK                 | 2r      | keys, values |
| mla_rope      | RoPE after expansion      | k = RoPE(c W_UK)                       | 2r      | values       |
| mla_prerope   | RoPE before compression   | c = RoPE(x W_K) W_DK, k = c W_UK       | 2r      | keys, values |
| mla_decoupled | RoPE on a part of its own | k = c W_UK, and k^R = RoPE(x W_KR)     | 2r + R  | keys, values |

"cached" counts numbers per token per layer. A latent c is a narrow summary of a token, r numbers for all heads
together, made by W_D (down) and cached instead of keys and values; W_U (up) expands it into them. To absorb is to
decode without expanding: since q.(c W_UK) = (q W_UK^T).c, the query comes down to the latents instead. In mla_rope a
rotation that is another one for each token stands between the two, so its keys cannot be absorbed. In mla_prerope the
rotation is inside the latent; the price is that scores no longer depend on the distance of two tokens alone. In
mla_decoupled the score is q.k + q^R.k^R, with q^R = RoPE(x W_QR) for each head and one k^R for all of them.

Values in every mla variant: c_v = x W_DV, v = c_v W_UV. With joint=True one latent feeds keys and values (W_DV is gone,
and the cache holds r instead of 2r).

Sources: Vaswani et al. 2017 (mha); Su et al. 2021 (RoPE); Ainslie et al. 2023 (gqa); DeepSeek-AI 2024, arXiv 2405.04434
(MLA, absorption, the decoupled key); Mehta et al. 2025, arXiv 2506.09342 (mla and mla_rope in small models); Jha and
Reagen 2025, arXiv 2507.09394 (mla_prerope).
"""

import math
import os
import warnings
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

ATTN = ("mha", "mha_rope", "gqa", "mla", "mla_rope", "mla_prerope", "mla_decoupled")
ROTARY = ("mha_rope", "gqa", "mla_rope", "mla_prerope", "mla_decoupled")  # the others learn a table of positions
ABSORBS = ("mla", "mla_prerope", "mla_decoupled")
JOINS = ("mla", "mla_rope", "mla_decoupled")  # mla_prerope compresses rotated keys: nothing that a value could share
SIZES = {  # fields of GPTConfig, by the name of a size
    "tiny": dict(n_layer=4, n_head=4, n_embd=256, block_size=320),
    "30m": dict(n_layer=9, n_head=8, n_embd=512, block_size=512),
    "124m": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024),
    "200m": dict(n_layer=12, n_head=16, n_embd=1024, block_size=1024),
}


@dataclass
class GPTConfig:
    """The shape of a model. Raises ValueError that names the field, what it got, and what it may be."""

    block_size: int = 512  # tokens of context, at most
    vocab_size: int = 4096
    n_layer: int = 9
    n_head: int = 8
    n_embd: int = 512
    attn: str = "mha_rope"  # one of ATTN
    rank: float | None = None  # latent width / n_embd; gqa: key/value heads / heads. 0.5, but None for mha*
    joint: bool = False  # one latent for keys and values
    rope_dim: int | None = None  # mla_decoupled: width of the rotary part, even; half a head by default
    rope_base: float = 10000.0
    dropout: float = 0.0

    def __post_init__(self):
        def check(ok, field, may_be):  # below, type() and not isinstance(): True is no number
            if not ok:
                raise ValueError(f"{field}={getattr(self, field)!r}: must be {may_be}")

        check(self.attn in ATTN, "attn", "one of " + ", ".join(ATTN))
        for field in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            check(type(getattr(self, field)) is int and getattr(self, field) > 0, field, "a whole number from 1")
        check(self.block_size <= 2**20, "block_size", "at most 2^20 tokens")
        check(self.vocab_size <= 65535, "vocab_size", "at most 65535: tokens are stored as uint16")
        check(self.n_embd % self.n_head == 0, "n_head", f"a divisor of n_embd={self.n_embd}")
        if self.attn in ROTARY and self.attn != "mla_decoupled":
            check(self.head_dim % 2 == 0, "n_head", f"such that n_embd={self.n_embd} / n_head is even, for RoPE")
        check(type(self.rope_base) in (int, float) and 1 < self.rope_base < math.inf, "rope_base", "a number above 1")
        check(type(self.dropout) in (int, float) and 0 <= self.dropout < 1, "dropout", "in [0, 1)")
        check(type(self.joint) is bool, "joint", "True or False")
        if self.attn not in JOINS:
            check(not self.joint, "joint", f"left out with attn={self.attn}: it goes with " + ", ".join(JOINS))

        if self.attn in ("mha", "mha_rope"):
            check(self.rank is None, "rank", f"left out with attn={self.attn}, which compresses nothing")
        else:
            self.rank = 0.5 if self.rank is None else self.rank
            check(type(self.rank) in (int, float) and 0 < self.rank <= 1, "rank", "a ratio in (0, 1]")
            check(self.latent_dim > 0, "rank", f"at least {1 / self.n_embd:.2g}, one number of n_embd={self.n_embd}")
        if self.attn == "gqa":
            kv_heads = self.rank * self.n_head
            whole = abs(kv_heads - self.kv_heads) < 0.01 and self.n_head % self.kv_heads == 0
            check(whole, "rank", f"k/{self.n_head} with k, the number of key/value heads, a divisor of {self.n_head}")
        if self.attn == "mla_decoupled":
            self.rope_dim = max(2, self.head_dim // 4 * 2) if self.rope_dim is None else self.rope_dim
            even = type(self.rope_dim) is int and self.rope_dim > 0 and self.rope_dim % 2 == 0
            check(even, "rope_dim", "an even whole number from 2")
        else:
            check(self.rope_dim is None, "rope_dim", f"left out with attn={self.attn}: it goes with mla_decoupled")

    @property
    def head_dim(self):  # h
        return self.n_embd // self.n_head

    @property
    def latent_dim(self):  # r
        return round(self.rank * self.n_embd)

    @property
    def kv_heads(self):
        """Heads in the cache: gqa shares them among groups, and a latent is one "head" for all."""
        if self.attn == "gqa":
            return max(1, round(self.rank * self.n_head))
        return 1 if self.attn.startswith("mla") else self.n_head

    @property
    def cache_width(self):
        """Numbers cached per token, layer and cached head."""
        if not self.attn.startswith("mla"):
            return 2 * self.head_dim
        return (1 if self.joint else 2) * self.latent_dim + (self.rope_dim or 0)


def rotary(positions, dim, base):
    """The cosines and sines, each (T, dim/2) in float64, of RoPE's angles: position * base^(-2i/dim)."""
    frequencies = base ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim)
    angles = positions.double()[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x, rope):
    """RoPE: turn each pair (x_i, x_{i + w/2}) of x (..., T, w) by the angles of its position; rope is rotary()'s, or
    None where positions are a learned table: nothing turns.

    The product q.k of two rotated vectors depends on their positions only through the difference."""
    if rope is None:
        return x
    (cos, sin), (a, b) = rope, x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


def future(S, places, device):
    """The mask (T, S) of what comes after each of the T queries, which stand at `places` among the S tokens."""
    index = torch.arange(S, device=device)
    return index > index[places][:, None]


def attend(q, k, v, scale, dropout=0.0, places=slice(None)):
    """Causal softmax attention: q (B, H, T, w); k and v (B, G, S, w) -> (B, H, T, w).

    places: where the T queries stand among the S tokens, slice(S - T, S); or, in a compiled decoder, a tensor of one
    place, with nothing in the cache behind it yet. Dropout is for training, where T = S."""
    (B, H, T, w), (G, S) = q.shape, k.shape[1:3]
    whole = T == S and not torch.is_tensor(places)
    if whole and T <= 1024 and q.device.type == "cpu" and torch.is_grad_enabled():
        # Training on a CPU: plain products take less time than the fused kernel's backward pass, but T x T numbers.
        q, k, v = q.unflatten(1, (G, -1)) * scale, k.unsqueeze(2), v.unsqueeze(2)  # (B, G, H/G or 1, T, w)
        scores = q @ k.mT
        scores = scores + torch.full((T, T), -math.inf, dtype=scores.dtype).triu(1)
        return (F.dropout(scores.softmax(-1).to(v.dtype), dropout) @ v).flatten(1, 2)
    if whole:  # training, or a whole prompt: fused kernels know this mask by themselves
        options = dict(dropout_p=dropout, is_causal=T > 1, scale=scale, enable_gqa=G < H)
        return F.scaled_dot_product_attention(q, k, v, **options)
    # Heads that share keys become more queries of one head, so that each key is read once for all of them.
    mask = ~future(S, places, q.device).repeat(H // G, 1) if T > 1 or torch.is_tensor(places) else None
    q = q.reshape(B, G, H // G * T, w)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).reshape(B, H, T, w)


class KVCache:
    """What every layer keeps of up to max_len tokens of batch_size sequences. Made by GPT.init_cache."""

    def __init__(self, config, batch_size, max_len, absorb, dtype, device, rope):
        shape = (config.n_layer, batch_size, config.kv_heads, max_len, config.cache_width)
        self.rows = torch.zeros(shape, dtype=dtype, device=device)
        self.rope = rope  # of all max_len positions
        self.absorb, self.max_len = absorb, max_len
        self.nbytes = self.rows.nbytes  # allocated
        self.pos = 0  # tokens held

    def reset(self):
        """Forget all tokens; the memory stays."""
        self.pos = 0

    @torch.no_grad()
    def append(self, layer, new, places):
        """Store the rows of T new tokens, (B, kv_heads, T, cache_width), at places. Return all rows up to there, S of
        them; for a compiled decoder, whose `places` is a tensor, those of the whole cache."""
        rows = self.rows[layer]
        rows[:, :, places] = new.to(rows.dtype)
        rows = rows if torch.is_tensor(places) else rows[:, :, : places.stop]
        return rows.to(new.dtype)  # a view, unless the cache is of another precision


class Attention(nn.Module):
    """All seven variants. A token asks (`queries`) and leaves something behind (`keep`), which later ones turn into
    keys and values (`expand`), or, in a cache, attend to as it is (`absorbed`, `half_absorbed`). See `forward`."""

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        d, h, H = config.n_embd, config.head_dim, config.n_head

        def linear(d_in, d_out):
            return nn.Linear(d_in, d_out, bias=False)

        self.w_q = linear(d, d)
        if not config.attn.startswith("mla"):
            self.w_k = linear(d, config.kv_heads * h)
            self.w_v = linear(d, config.kv_heads * h)
        else:
            r = config.latent_dim
            if config.attn == "mla_prerope":
                self.w_k = linear(d, d)
            self.w_dk = linear(d, r)  # D: down, to the latent
            self.w_uk = linear(r, d)  # U: up, to the heads
            if not config.joint:
                self.w_dv = linear(d, r)
            self.w_uv = linear(r, d)
            if config.attn == "mla_decoupled":
                self.w_qr = linear(d, H * config.rope_dim)
                self.w_kr = linear(d, config.rope_dim)
        self.w_o = linear(d, d)

    def heads(self, x):
        """(B, T, n * h) -> (B, n, T, h)"""
        return x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)

    def keep(self, x, rope):
        """What tokens x (B, T, d) leave behind: a list of (B, kv_heads, T, width), side by side a row of the cache.

        MHA and GQA: [v | k]. MLA: [c_v | c_k], or [c] if joint; mla_decoupled: and k^R behind. Why v comes first:
        see absorbed."""
        attn = self.config.attn
        if not attn.startswith("mla"):
            return [self.heads(self.w_v(x)), rotate(self.heads(self.w_k(x)), rope)]
        if attn == "mla_prerope":
            c_k = self.w_dk(rotate(self.heads(self.w_k(x)), rope).transpose(1, 2).flatten(2))
        else:
            c_k = self.w_dk(x)
        latents = [c_k] if self.config.joint else [self.w_dv(x), c_k]
        if attn == "mla_decoupled":
            latents.append(rotate(self.w_kr(x), rope))
        return [c.unsqueeze(1) for c in latents]

    def queries(self, x, rope):
        """(B, H, T, h); mla_decoupled appends its rotary part, R wide."""
        q = self.heads(self.w_q(x))
        if self.config.attn == "mla_decoupled":
            q_r = self.w_qr(x).unflatten(-1, (-1, self.config.rope_dim)).transpose(1, 2)
            return torch.cat((q, rotate(q_r, rope)), dim=-1)
        return rotate(q, rope)

    def expand(self, kept, rope):
        """What S tokens left behind -> their keys and values, each (B, heads, S, h); mla_decoupled: h + R."""
        attn = self.config.attn
        if not attn.startswith("mla"):
            v, k = kept
            return k, v
        c_v, c_k = (kept[0], kept[0]) if self.config.joint else kept[:2]
        k, v = self.heads(self.w_uk(c_k.squeeze(1))), self.heads(self.w_uv(c_v.squeeze(1)))
        if attn == "mla_rope":
            k = rotate(k, rope)
        if attn == "mla_decoupled":
            k = torch.cat((k, kept[-1].expand(-1, k.size(1), -1, -1)), dim=-1)  # one rotary key serves every head
            v = F.pad(v, (0, self.config.rope_dim))  # fused attention wants values as wide as keys; forward cuts it off
        return k, v

    def absorbed(self, q, rows, scale, places):
        """Attention on the latents themselves, by q.(c W_UK) = (q W_UK^T).c.

        q (B, H, T, h [+ R]); rows (B, 1, S, cache_width) -> the mean latent each query sees, (B, H, T, r). Keys are
        the last r [+ R] columns; values the first as many, c_v and what follows it, of which only c_v is wanted: two
        views of the cache, equally wide as fused attention wants them."""
        r, h = self.config.latent_dim, self.config.head_dim
        q_c = torch.einsum("bHth,Hhr->bHtr", q[..., :h], self.w_uk.weight.view(-1, h, r))
        q = torch.cat((q_c, q[..., h:]), dim=-1)  # (B, H, T, r [+ R])
        width = q.size(-1)
        return attend(q, rows[..., -width:], rows[..., :width], scale, places=places)[..., :r]

    def half_absorbed(self, q, cache, scale, places):
        """The same for mla_rope, which has to make all S keys again from their latents at every step, 256 at a time.

        q (B, H, T, h) -> (B, H, T, r). S is rounded up to whole pieces, with the empty places masked: tensors whose
        shape changes with every token would take new memory at every token."""
        r = self.config.latent_dim
        end = cache.max_len if torch.is_tensor(places) else math.ceil(places.stop / 256) * 256
        rows = cache.rows[self.layer, :, 0, :end].to(q.dtype)  # (B, S, cache_width)
        cos, sin = (table[:end].split(256) for table in cache.rope)
        pieces = zip(rows[..., -r:].split(256, dim=1), cos, sin, strict=True)
        scores = [q @ rotate(self.heads(self.w_uk(c_k)), (a, b)).mT for c_k, a, b in pieces]
        scores = torch.cat(scores, dim=-1) * scale  # (B, H, T, S)
        scores = scores.masked_fill(future(scores.size(-1), places, q.device), -math.inf)
        p = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        return (p.flatten(1, 2) @ rows[..., :r]).unflatten(1, p.shape[1:3])  # one latent for all heads

    def forward(self, x, rope, cache=None, places=slice(None)):
        """x (B, T, d), at `places` of the context -> (B, T, d). rope: rotary() of these places, or None."""
        h, T = self.config.head_dim, x.size(1)
        q, kept = self.queries(x, rope), self.keep(x, rope)
        scale = q.size(-1) ** -0.5  # 1/sqrt(h), or 1/sqrt(h + R): absorbing does not change the scores
        if cache is not None:
            rows = cache.append(self.layer, torch.cat(kept, dim=-1), places)
            kept = rows.split([part.size(-1) for part in kept], dim=-1)
            rope = cache.rope and [table[: rows.size(2)] for table in cache.rope]  # now of all S tokens
        # Expanding S latents costs S r h per head, and absorbing T S r more in the scores: so it pays while T < h.
        if cache is not None and cache.absorb and T <= h:
            half = self.config.attn == "mla_rope"
            c = self.half_absorbed(q, cache, scale, places) if half else self.absorbed(q, rows, scale, places)
            # sum_s p_s (c_s W_UV) = (sum_s p_s c_s) W_UV: values are absorbed by expanding what was gathered, once
            y = torch.einsum("bHtr,Hhr->bHth", c, self.w_uv.weight.unflatten(0, (-1, h)))
        else:
            k, v = self.expand(kept, rope)
            y = attend(q, k, v, scale, self.config.dropout if self.training else 0.0, places)[..., :h]
        return self.w_o(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.n_embd, bias=False)
        self.attn = Attention(config, layer)
        self.norm_2 = nn.LayerNorm(config.n_embd, bias=False)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope, cache, places):
        x = x + self.dropout(self.attn(self.norm_1(x), rope, cache, places))
        return x + self.dropout(self.mlp(self.norm_2(x)))


class CrossEntropy(torch.autograd.Function):
    """Mean of -log softmax(logits)[target] in nats over the targets that are not -1: logits (N, V), targets (N).

    As F.cross_entropy, in less time and memory: the gradient is made along with the loss, 256 rows at a time in float32
    (or float64), and is the only other tensor of the logits' size, in their precision."""

    @staticmethod
    def forward(ctx, logits, targets):
        count = (targets >= 0).sum().clamp(min=1)
        total = 0.0
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        for i in range(0, len(logits), 256):
            part = slice(i, i + 256)
            asked, wanted = (targets[part] >= 0)[:, None], targets[part].clamp(min=0)[:, None]
            log_p = logits[part].log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
            total = total - (log_p.gather(1, wanted) * asked).sum()
            if gradient is not None:
                p = log_p.exp_()
                p.scatter_add_(1, wanted, -torch.ones_like(wanted, dtype=p.dtype))
                gradient[part] = p.mul_(asked / count)
        ctx.save_for_backward(gradient)
        return total / count

    @staticmethod
    def backward(ctx, outer):
        return ctx.saved_tensors[0] * outer, None


class GPT(nn.Module):
    """Embedding, blocks, and the embedding again as output head: the shape of GPT-2, without biases."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd)
        if config.attn not in ROTARY:
            self.positions = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd, bias=False)
        self.compiled_step = None  # see decoder
        self.init_weights()

    def init_weights(self):
        """GPT-2's: normal with deviation 0.02, or 0.02/sqrt(2 n_layer) where a projection adds to the residual stream.

        Each entry of a product W_D W_U gets the variance that the full matrix in its place would have, so that latent
        attention does not start with fainter keys and values than MHA. In mla_prerope the pair for keys follows a full
        W_K, and is to keep the size of what it is given: entries of variance 1/d."""
        d = self.config.n_embd
        for name, weight in self.named_parameters():
            std = 0.02
            if name.endswith(("w_o.weight", "down.weight")):
                std /= math.sqrt(2 * self.config.n_layer)
            elif name.endswith(("w_dk.weight", "w_uk.weight", "w_dv.weight", "w_uv.weight")):
                after_w_k = self.config.attn == "mla_prerope" and name.endswith("k.weight")
                std_of_product = d**-0.5 if after_w_k else std
                std = math.sqrt(std_of_product / math.sqrt(self.config.latent_dim))  # r std^4 = std_of_product^2
            if weight.dim() == 2:  # the rest are the gains of LayerNorm, which start at 1
                nn.init.normal_(weight, std=std)

    def rope(self, length):
        """rotary() of the positions from 0, in the weights' precision, float32 at least; None with a learned table."""
        config, weight = self.config, self.tokens.weight
        if config.attn not in ROTARY:
            return None
        width = config.rope_dim or config.head_dim
        tables = rotary(torch.arange(length, device=weight.device), width, config.rope_base)
        return [table.to(torch.promote_types(weight.dtype, torch.float32)) for table in tables]

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) int64 -> logits, loss.

        With targets (B, T), -1 where none is asked for: logits (B, T, V) and the mean cross-entropy in nats per token.
        Without: logits (B, 1, V) of the last position, and None. With a cache, idx continues the tokens that it holds.
        Raises ValueError if the tokens overrun the context or the cache."""
        if targets is not None and cache:
            raise ValueError("give targets or a cache, not both: a cache is for decoding")
        if cache and cache.rows.size(1) != idx.size(0):
            raise ValueError(f"{idx.size(0)} sequences do not fit a cache for {cache.rows.size(1)}")
        T, start = idx.size(1), cache.pos if cache else 0
        if T == 0:
            raise ValueError("no tokens: idx must hold at least one")
        limit, what = (cache.max_len, "a cache") if cache else (self.config.block_size, "a context")
        if start + T > limit:
            raise ValueError(f"{start + T} tokens do not fit into {what} of {limit}")
        x = self.hidden(idx, cache, slice(start, start + T))
        if cache:
            cache.pos += T
        if targets is None:
            return F.linear(x[:, -1:], self.tokens.weight), None
        logits = F.linear(x, self.tokens.weight)
        return logits, CrossEntropy.apply(logits.flatten(0, 1), targets.flatten())

    def hidden(self, idx, cache, places):
        """idx (B, T), at places of the context -> what the output head reads, (B, T, d)."""
        x = self.tokens(idx)
        if self.config.attn not in ROTARY:
            x = x + self.positions.weight[places]
        rope = self.rope(idx.size(1)) if cache is None else cache.rope and [table[places] for table in cache.rope]
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, rope, cache, places)
        return self.norm(x)

    def init_cache(self, batch_size, max_len=None, absorb=None, dtype=None):
        """An empty KVCache for batch_size sequences of max_len tokens (block_size by default), in dtype (the weights').

        absorb=None: as much as the variant can, of mla_rope the values only. True: keys and values, or ValueError.
        False: expand all latents at every step. Raises ValueError, too, if max_len is more than block_size."""
        attn, weight = self.config.attn, self.tokens.weight
        max_len = self.config.block_size if max_len is None else max_len
        if max_len > self.config.block_size:
            raise ValueError(f"max_len={max_len}: must be at most {self.config.block_size}, the context of this model")
        if absorb and attn == "mla_rope":
            raise ValueError("absorb=True: mla_rope rotates its keys between W_UK and W_Q, so these two do not merge")
        if absorb and attn not in ABSORBS:
            raise ValueError(f"absorb=True: {attn} has no latent to absorb into; these have: " + ", ".join(ABSORBS))
        absorb = attn.startswith("mla") if absorb is None else absorb
        rope = self.rope(max_len)
        return KVCache(self.config, batch_size, max_len, absorb, dtype or weight.dtype, weight.device, rope)

    def kv_bytes_per_token(self, dtype):
        """Bytes that a token takes in the cache of one sequence, all layers together: the table on top as a formula."""
        return self.config.n_layer * self.config.kv_heads * self.config.cache_width * dtype.itemsize

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, absorb=None, generator=None, stop=None):
        """Continue idx (B, T) by sampling: (B, T + max_new_tokens), or fewer if every row has sampled the token `stop`.

        temperature=0 takes the most likely token; top_k samples among the k most likely. What follows `stop` in a row
        means nothing. generator: a torch.Generator on the model's device. Raises ValueError if idx is empty or the
        result would not fit into block_size."""
        if idx.size(1) == 0:
            raise ValueError("the prompt has no tokens: give at least one")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature={temperature}: must be a number from 0")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k={top_k}: must be at least 1")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens={max_new_tokens}: must be at least 0")
        length = idx.size(1) + max_new_tokens
        if length > self.config.block_size:
            raise ValueError(
                f"{length} tokens ({max_new_tokens} of them new) overrun the context of {self.config.block_size}"
            )
        cache = self.init_cache(idx.size(0), length, absorb)
        training = self.training
        self.eval()
        out = F.pad(idx, (0, max_new_tokens))
        stopped = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
        decode, new = self.decoder(cache), idx
        for place in range(idx.size(1), length):
            logits = decode(new).float()
            if temperature < 1e-5:  # the limit, without dividing by next to nothing
                new = logits.argmax(-1, keepdim=True)
            else:
                if top_k is not None:
                    least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                    logits = logits.masked_fill(logits < least, -math.inf)
                new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            out[:, place : place + 1] = new
            if stop is not None:
                stopped |= new == stop
                if stopped.all():
                    out = out[:, : place + 1]
                    break
        self.train(training)
        return out

    def decoder(self, cache, compiled=None):
        """A function that takes the next tokens, (B, T), to the logits after them, (B, V), and grows the cache by them.

        compiled (by default on CUDA): a step of one token as one graph without Python in between. For its shapes to
        stay the same, it attends to all places of the cache, with the empty ones masked."""

        def uncompiled(idx):
            return self(idx, cache=cache)[0][:, -1]

        if not (cache.rows.is_cuda if compiled is None else compiled):
            return uncompiled
        if self.compiled_step is None:  # one for all caches: each new function would be compiled anew
            mode = "reduce-overhead" if cache.rows.is_cuda else None
            self.compiled_step = torch.compile(GPT.step, fullgraph=True, mode=mode)
        torch._dynamo.mark_static_address(cache.rows, guard=False)  # a promise: CUDA graphs write to fixed addresses
        places = torch.zeros(1, dtype=torch.long, device=cache.rows.device)

        def decode(idx):
            if idx.size(1) != 1 or cache.pos == cache.max_len:  # a prompt; or one token too many, which forward refuses
                return uncompiled(idx)
            places.fill_(cache.pos)
            cache.pos += 1
            return self.compiled_step(self, idx, cache, places).clone()

        return decode

    def step(self, idx, cache, places):
        return F.linear(self.hidden(idx, cache, places)[:, -1], self.tokens.weight)

    def qk_chains(self, layer, head):
        """The factors whose product is this head's W_Q W_K^T (d, d), in {"content": [...], "rotary": [...]}.

        Two factors for MHA and GQA, three for MLA, four for mla_prerope; "rotary" for mla_decoupled alone. RoPE is left
        out."""
        attn, config = self.blocks[layer].attn, self.config
        h = config.head_dim

        def of_head(linear, index, width):  # the columns of W (d_in, heads * width) that belong to one head
            return linear.weight.detach().T[:, index * width : (index + 1) * width]

        w_q = of_head(attn.w_q, head, h)
        if not config.attn.startswith("mla"):
            return {"content": [w_q, of_head(attn.w_k, head * config.kv_heads // config.n_head, h).T]}
        content = [w_q, of_head(attn.w_uk, head, h).T, attn.w_dk.weight.detach()]
        if config.attn == "mla_prerope":
            content.append(attn.w_k.weight.detach())
        if config.attn != "mla_decoupled":
            return {"content": content}
        return {"content": content, "rotary": [of_head(attn.w_qr, head, config.rope_dim), attn.w_kr.weight.detach()]}


# Checkpoints and the command line -------------------------------------------------------------------------------------

FORMAT = "nanoMLA checkpoint 1"


def check_device(device):
    """Raise ValueError if there is no such device on this machine."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device={device}: not available: {str(error).splitlines()[0]}") from error


def fast_bfloat16(device):
    """Does this device multiply matrices faster in bfloat16 than in float32?"""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def load_checkpoint(path, device="cpu"):
    """Read a checkpoint of train.py -> the model in eval mode, and the checkpoint's dict (its entries: see train.py).

    Only tensors and plain values are ever unpickled. Raises ValueError if the file is missing, truncated, of another
    format, or does not fit its own configuration."""
    if os.path.isdir(path):
        raise ValueError(f"{path}: is a folder; name a checkpoint in it, such as {os.path.join(path, 'ckpt.pt')}")
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file; python train.py writes checkpoints to out/ckpt.pt")
    check_device(device)
    try:
        with warnings.catch_warnings(action="ignore"):  # of PyTorch, about files that are no checkpoints
            checkpoint = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere between zip, pickle and tensor
        raise ValueError(f"{path}: not a checkpoint, or damaged: {type(error).__name__} while reading it") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise ValueError(f"{path}: not a checkpoint of this version ({FORMAT})")
    try:
        config, weights = GPTConfig(**checkpoint["config"]), checkpoint["model"]
        # A small file must not ask for a large model, by its configuration or by tensors that repeat their numbers.
        layers = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
        if len(layers) != config.n_layer:
            raise ValueError(f"n_layer={config.n_layer}, but weights of {len(layers)} layers")
        if sum(w.nbytes for w in weights.values()) > os.path.getsize(path):
            raise ValueError("the weights are larger than the file")
        if not all(w.is_floating_point() for w in weights.values()):
            raise ValueError("not all weights are floating-point numbers")
        with torch.device("meta"):  # shapes only: the memory is that of the tensors in the file
            model = GPT(config)
        # As a plain dict: load_state_dict(assign=True) leaves a mark in an OrderedDict, which later loads from it obey.
        model.load_state_dict(dict(weights), assign=True)
    except Exception as error:  # likewise: anything can stand in the file
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: weights and configuration do not fit together: {reason}") from error
    return model.eval(), checkpoint


def tell(model, tokenizer, prompt, tokens=None, temperature=0.8, top_k=None, seed=0):
    """One story that begins with prompt, sampled until it ends, or the context is full, or it has `tokens` new ones."""
    tokens_of_prompt = tokenizer.encode_ordinary(prompt)
    if not tokens_of_prompt:
        raise ValueError("the prompt has no tokens: give at least one word")
    # A story follows the end of another one, as in the training data.
    idx = torch.tensor([[tokenizer.eot_token, *tokens_of_prompt]], device=model.tokens.weight.device)
    room = model.config.block_size - idx.size(1)
    if room < 1:
        most = model.config.block_size
        raise ValueError(f"a prompt of {len(tokens_of_prompt)} tokens fills the context of {most}: shorten it")
    generator = torch.Generator(idx.device).manual_seed(seed)
    new = room if tokens is None else min(tokens, room)
    out = model.generate(idx, new, temperature, top_k, generator=generator, stop=tokenizer.eot_token)
    return tokenizer.decode([token for token in out[0, 1:].tolist() if token != tokenizer.eot_token])


def main():
    from data.prepare import Parser, load_tokenizer, wrap  # here, because the model itself needs nothing but torch

    example = 'example: python model.py out/ckpt.pt --prompt="One sunny day" --temperature=0.5 --seed=1'
    parser = Parser(description="Tell a story with a trained model.", epilog=example)
    parser.add_argument("checkpoint", help="a file that train.py wrote, such as out/ckpt.pt")
    parser.add_argument("--prompt", default="Once upon a time", help="the story's first words (default: %(default)s)")
    parser.add_argument("--tokens", type=int, help="new tokens, at most (default: as many as the context holds)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top_k", type=int, help="sample among the k most likely tokens (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another story (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: %(default)s)")
    args = parser.parse_args()
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed={args.seed}: must be from 0 to 2^63 - 1")
    model, checkpoint = load_checkpoint(args.checkpoint, args.device)
    meta = checkpoint.get("meta")
    tokenizer = load_tokenizer(meta.get("tokenizer") if type(meta) is dict else None)
    if tokenizer.n_vocab != model.config.vocab_size:
        raise ValueError(f"{args.checkpoint}: has {model.config.vocab_size} tokens, its tokenizer {tokenizer.n_vocab}")
    print(wrap(tell(model, tokenizer, args.prompt, args.tokens, args.temperature, args.top_k, args.seed)))


if __name__ == "__main__":
    from data.prepare import run

    run(main)
