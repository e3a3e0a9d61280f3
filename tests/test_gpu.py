"""What must hold on the device, run by tests/gpu.sh. Skipped where there is no GPU, unless DEVICE names a device."""

import os
import signal

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from model import ABSORBS, ATTN, GPT, GPTConfig, load_checkpoint

DEVICE = os.environ.get("DEVICE", "cuda" if torch.cuda.is_available() else "")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not DEVICE, reason="no GPU")]
SHAPE = dict(n_layer=2, n_head=4, n_embd=128, block_size=96, vocab_size=256)
SMALL = "--size=tiny --n_layer=1 --n_head=2 --n_embd=64 --block_size=64 --grad_accum=1 --eval_steps=2".split()


def losses(run):
    return [float(loss) for loss in run.losses]


@pytest.fixture(autouse=True)
def exact_products():
    """Full float32 products: train.py turns TF32 on for the whole process."""
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def make_run(stories, tmp_path):
    """A run of train.py on the device, into tmp_path/name."""

    def make_run(name, *flags):
        given = [*SMALL, "--steps=100", *flags, f"--data={stories}", f"--device={DEVICE}", f"--out={tmp_path / name}"]
        return train.Run(train.parse_arguments(given))

    return make_run


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("attn", ATTN)
@torch.no_grad()
def test_decoding_absorbed_or_expanded_is_the_full_forward(attn, dtype, error):
    torch.manual_seed(0)
    model = GPT(GPTConfig(attn=attn, **SHAPE)).to(DEVICE, dtype).eval()
    idx = torch.randint(256, (3, 96), device=DEVICE)
    full = model(idx)[0]  # without targets: the last token alone
    for absorb in (False, True) if attn in ABSORBS else (False,):
        cache = model.init_cache(3, absorb)
        for part in (idx[:, :40], *idx[:, 40:].split(1, 1)):
            logits = model(part, cache=cache)[0]
        assert (logits - full).abs().max() < error * full.abs().max()


@pytest.mark.parametrize("attn", ATTN)
def test_every_variant_trains_compiled_as_it_does_uncompiled(attn, make_run):
    ends = []
    for way in ["--no-compile"] + ["--compile"] * DEVICE.startswith("cuda"):
        torch._dynamo.reset()
        run = make_run("out", f"--attn={attn}", "--dtype=float32", way)
        for step in range(20):
            run.step(step)
        ends.append(losses(run))
    assert ends[0][-1] < ends[0][0] - 1
    assert ends[0] == pytest.approx(ends[-1], abs=0.02)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_train_like_float32(dtype, make_run):
    ends = []
    for one in ("float32", dtype):
        run = make_run("out", f"--dtype={one}", "--no-compile")
        kind, enabled = DEVICE.split(":")[0], one == "float16"  # too large at first: steps that overflow are skipped
        run.scaler = torch.amp.GradScaler(kind, init_scale=2.0**24, enabled=enabled)
        for step in range(60):
            run.step(step)
        ends.append(losses(run)[-1])
    assert abs(ends[0] - ends[1]) < 0.4 and (dtype != "float16" or run.scaler.get_scale() < 2.0**24)


def test_a_stopped_run_resumes(make_run, tmp_path, monkeypatch):
    flags = ["--steps=8", "--eval_interval=4", "--no-compile", "--dtype=float32"]
    make_run("whole", *flags).train()
    run = make_run("stopped", *flags)
    step = run.step
    run.step = lambda number: (step(number), number == 4 and signal.raise_signal(signal.SIGINT))
    assert run.train() == 130
    train.Run(train.parse_arguments([f"--out={tmp_path / 'stopped'}", "--resume"])).train()
    whole, stopped = (load_checkpoint(tmp_path / name / "last.pt")[1]["model"] for name in ("whole", "stopped"))
    for name in whole:
        torch.testing.assert_close(whole[name], stopped[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("attn", ABSORBS)
def test_greedy_decoding_does_not_depend_on_absorption(attn):
    torch.manual_seed(0)
    model = GPT(GPTConfig(attn=attn, **SHAPE)).to(DEVICE).eval()
    idx = torch.randint(256, (2, 5), device=DEVICE)
    told = [model.generate(idx, 40, temperature=0, absorb=absorb) for absorb in (False, True)]
    assert torch.equal(*told) and told[0].shape == (2, 45)


@pytest.mark.skipif(not DEVICE.startswith("cuda"), reason="no CUDA graphs")
@pytest.mark.parametrize("attn", ATTN)
@torch.no_grad()
def test_a_compiled_decode_step_is_a_cuda_graph_and_says_the_same(attn):
    """As bench.py --compile does it."""
    torch._dynamo.reset()
    counters["inductor"].clear()
    model = GPT(GPTConfig(attn=attn, **SHAPE)).to(DEVICE).eval()
    cache = model.init_cache(2)
    model(torch.randint(256, (2, 50), device=DEVICE), cache=cache)
    cache.reserve(96)
    for tensor in tree_leaves(cache.layers):
        torch._dynamo.mark_static_address(tensor, guard=False)
    compiled = torch.compile(model.hidden, mode="reduce-overhead", fullgraph=True)
    for token in torch.randint(256, (4, 2, 1), device=DEVICE):
        inputs = token, torch.tensor([50], device=DEVICE), cache
        torch.testing.assert_close(compiled(*inputs).clone(), model.hidden(*inputs), rtol=1e-3, atol=1e-3)
    assert not counters["inductor"]["cudagraph_skips"]


class Float64(TorchDispatchMode):
    """Collects operations that make float64 on the device: Apple's has none, and a GPU is slow at it."""

    found = ()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 and x.is_cuda for x in tree_leaves(out)):
            self.found += (str(function),)
        return out


@pytest.mark.parametrize("attn", ATTN)
def test_nothing_on_the_device_is_float64(attn, make_run):
    run = make_run("out", f"--attn={attn}", "--no-compile")
    with Float64() as seen:
        run.step(0)
        run.evaluate(run.model, 1)
        run.model.generate(torch.zeros(1, 1, dtype=torch.long, device=DEVICE), 3)
    assert not seen.found
