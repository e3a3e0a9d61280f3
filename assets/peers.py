"""Decoding speed of nanoMLA, of transformers' DeepSeek-V2 in the same shape, and of a GPT without a cache: peers.md.

pip install transformers && python assets/peers.py
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.append(str(Path(__file__).parents[1]))
from bench import decode, machine  # noqa: E402
from model import GPT, SIZES, GPTConfig  # noqa: E402

BATCH, ROUNDS, VOCAB = 8, 3, 4096


def deepseek(dtype, context):
    """A step of transformers' DeepSeek-V2 (no experts): joint latent of rank 1/2, rotary keys of half a head."""
    config = transformers.DeepseekV2Config(
        vocab_size=VOCAB,
        hidden_size=512,
        intermediate_size=1365,  # three matrices, with as many weights as our two
        num_hidden_layers=9,
        num_attention_heads=8,
        num_key_value_heads=8,
        q_lora_rank=None,
        kv_lora_rank=256,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        first_k_dense_replace=9,
        max_position_embeddings=8192,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    cache, token = transformers.DynamicCache(config=config), torch.zeros(BATCH, 1, dtype=torch.long)
    model(token, past_key_values=cache)
    for layer in cache.layers:
        layer.keys = torch.randn(*layer.keys.shape[:2], context - 1, layer.keys.size(-1)).to(dtype)
        layer.values = torch.randn(*layer.values.shape[:2], context - 1, layer.values.size(-1)).to(dtype)

    def step():
        model(token, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return timed(step)


def without_cache(dtype, context):
    """A plain GPT that computes the whole context again for every token."""
    shape = SIZES["30m"] | dict(block_size=context, vocab_size=VOCAB)
    model = GPT(GPTConfig(attn="mha", **shape)).to(dtype).eval()
    idx = torch.zeros(BATCH, context, dtype=torch.long)
    return timed(lambda: model(idx), 1)


def timed(step, repeats=3):
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    return np.median(times[1:])


def ours(absorb, **options):
    def measure(dtype, context):
        shape = SIZES["30m"] | dict(block_size=context, vocab_size=VOCAB)
        model = GPT(GPTConfig(**options, **shape)).to(dtype).eval()
        return decode(model, BATCH, context, absorb, "cpu")[0]

    return measure


PEERS = {
    "nanoMLA mla_decoupled 1/2 joint, absorbed": ours(True, attn="mla_decoupled", rank=0.5, joint=True),
    "nanoMLA mla_decoupled 1/2 joint, expanded": ours(False, attn="mla_decoupled", rank=0.5, joint=True),
    "nanoMLA mha": ours(False, attn="mha"),
    "transformers DeepSeek-V2": deepseek,
    "GPT without a cache": without_cache,
}


@torch.no_grad()
def main():
    print(
        f"{machine('cpu')}, transformers {transformers.__version__}; batch {BATCH}, tokens/s, median of {ROUNDS} rounds"
    )
    for dtype in (torch.bfloat16, torch.float32):
        for context in (512, 4096):
            peers = [name for name in PEERS if context == 512 or "without" not in name]
            found = [{name: BATCH / PEERS[name](dtype, context) for name in peers} for _ in range(ROUNDS)]
            print(f"\n| {str(dtype)[6:]}, {context:,} tokens | tokens/s | absorbed is faster |\n| --- | ---: | ---: |")
            medians = {name: np.median([one[name] for one in found]) for name in peers}
            for name, rate in medians.items():
                print(f"| {name} | {rate:,.1f} | {next(iter(medians.values())) / rate:.1f} times |", flush=True)


if __name__ == "__main__":
    main()
