"""The GPT of model.py once more, straight from the equations: numpy, one sequence, head by head, query by query.

It shares no code with model.py, and reads nothing of it but the configuration and the weights by their names. Slow, and
short enough to check against the table of variants by eye. Symbols as there; x is one sequence (T, d)."""

import math

import numpy as np

erf = np.vectorize(math.erf, otypes=[float])


def softmax(s):
    e = np.exp(s - s.max())
    return e / e.sum()


def norm(x, gain):
    centred = x - x.mean(-1, keepdims=True)
    return gain * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)


def rms_norm(x, gain):
    return gain * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def rope(x, positions, base):
    """RoPE as multiplication of complex numbers: x_i + j x_{i + w/2} turns by position * base^(-2i/w)."""
    w = x.shape[-1]
    z = x[..., : w // 2] + 1j * x[..., w // 2 :]
    z = z * np.exp(1j * np.outer(positions, float(base) ** (-2 * np.arange(w // 2) / w)))
    return np.concatenate((z.real, z.imag), axis=-1)


def attend(q, k, v, scale):
    """One head: token t attends to tokens 0..t. q and k (T, w), v (T, u) -> (T, u)"""
    return np.stack([softmax(scale * k[: t + 1] @ q[t]) @ v[: t + 1] for t in range(len(q))])


def attention(config, w, x, positions):
    """The attention of one block. w[name] is the matrix of the equations, (d_in, d_out), or the gain of a norm."""
    d, H, R, attn, base = config.n_embd, config.n_head, config.rope_dim, config.attn, config.rope_base
    h = d // H

    def latent(source, name):
        c = source @ w[f"w_d{name}"]
        return rms_norm(c, w[f"norm_{name}"]) if config.latent_norm else c

    if attn == "mla_prerope":
        keys = x @ w["w_k"]
        turned = [rope(keys[:, i * h : (i + 1) * h], positions, base) for i in range(H)]
        c_k = latent(np.concatenate(turned, axis=1), "k")
    elif attn.startswith("mla"):
        c_k = latent(x, "k")
    if attn.startswith("mla"):
        c_v = c_k if config.joint else latent(x, "v")
    c_q, w_q = (x, w["w_q"]) if config.q_rank is None else (latent(x, "q"), w["w_uq"])

    y = []
    for i in range(H):
        head = slice(i * h, (i + 1) * h)
        q = c_q @ w_q[:, head]
        if attn.startswith("mla"):
            k, v = c_k @ w["w_uk"][:, head], c_v @ w["w_uv"][:, head]
        else:
            groups = round(config.rank * H) if attn == "gqa" else H
            j = i // (H // groups)
            k, v = x @ w["w_k"][:, j * h : (j + 1) * h], x @ w["w_v"][:, j * h : (j + 1) * h]

        if attn in ("mha_rope", "gqa", "mla_rope"):
            q, k = rope(q, positions, base), rope(k, positions, base)
        if attn == "mla_prerope":
            q = rope(q, positions, base)
        scale = 1 / math.sqrt(h)
        if attn == "mla_decoupled":
            q_r = rope(c_q @ w["w_qr"][:, i * R : (i + 1) * R], positions, base)
            k_r = rope(x @ w["w_kr"], positions, base)
            q, k = np.concatenate((q, q_r), axis=1), np.concatenate((k, k_r), axis=1)
            scale = 1 / math.sqrt(h + R)
        y.append(attend(q, k, v, scale))
    return np.concatenate(y, axis=1) @ w["w_o"]


def logits_of(config, state, tokens):
    """The logits (T, V) of one sequence of tokens (T,); state: name -> array, the model's state_dict."""
    positions = np.arange(len(tokens))
    x = state["token_embedding.weight"][tokens]
    if config.attn in ("mha", "mla"):
        x = x + state["position_embedding.weight"][positions]
    for layer in range(config.n_layer):
        block = f"blocks.{layer}."
        prefix = block + "attn."
        w = {name[len(prefix) : -len(".weight")]: a.T for name, a in state.items() if name.startswith(prefix)}
        x = x + attention(config, w, norm(x, state[block + "attn_norm.weight"]), positions)
        u = norm(x, state[block + "mlp_norm.weight"]) @ state[block + "mlp_up.weight"].T
        x = x + (u * (1 + erf(u / math.sqrt(2))) / 2) @ state[block + "mlp_down.weight"].T
    return norm(x, state["final_norm.weight"]) @ state["token_embedding.weight"].T


def forward(model, tokens):
    """The logits (B, T, V) of tokens (B, T), in float64."""
    state = {name: weight.double().numpy() for name, weight in model.state_dict().items()}
    return np.stack([logits_of(model.config, state, row) for row in tokens.numpy()])


def loss(logits, targets):
    """Mean -log p of the targets in nats; a target of -1 does not count."""
    pairs = [(z, t) for z, t in zip(logits.reshape(-1, logits.shape[-1]), targets.flatten(), strict=True) if t >= 0]
    return np.mean([-math.log(softmax(z)[t]) for z, t in pairs])
