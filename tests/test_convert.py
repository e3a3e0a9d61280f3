"""--init_from: weights of a trained model, taken over as they are, or converted to another attention."""

import itertools
import json
import re
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import build, call
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from data.prepare import prepare
from model import GPTConfig, load_checkpoint
from spectrum import second_moments

SMALL = "--n_layer=2 --n_head=4 --n_embd=64 --block_size=64 --batch_size=8 --device=cpu".split()
SMALL += ["--grad_accum=1", "--dtype=float32"]
CONVERSIONS = [("mha", "mla"), ("mha_rope", "mla_rope"), ("gqa", "mla_rope"), ("mla", "mla"), ("mla_rope", "mla_rope")]
KNOWN = "mha to mla; mha_rope, gqa to mla_rope"


@pytest.fixture(scope="module")
def trained(stories, tmp_path_factory):
    """{attention: folder of a model}; all but gqa have learnt which words follow which."""
    folders = {}
    for attn in ("mha", "mha_rope", "gqa"):
        folders[attn] = tmp_path_factory.mktemp(attn)
        flags = [
            *SMALL,
            f"--attn={attn}",
            "--steps=300" if attn != "gqa" else "--steps=20",
            "--eval_interval=300",
            f"--data={stories}",
            f"--out={folders[attn]}",
        ]
        train.Run(train.parse_arguments(flags)).train()
    return folders


def double(attn, **options):
    return build(GPTConfig(n_layer=2, n_head=4, n_embd=32, block_size=24, vocab_size=50, attn=attn, **options))


def logits(model, idx):
    return model(idx, torch.zeros_like(idx))[0]


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("source, target", CONVERSIONS)
def test_full_rank_keeps_the_logits(source, target, joint):
    model = double(source, **({"rank": 0.5} if source in ("gqa", "mla", "mla_rope") else {}))
    idx = torch.randint(50, (8, 24))
    moments = second_moments(model, idx)
    new = train.convert(model, replace(model.config, attn=target, rank=1.0, joint=joint), moments)
    assert new.config.attn == target and new.config.joint == joint
    unseen = torch.randint(50, (3, 24))
    torch.testing.assert_close(logits(new, unseen), logits(model, unseen), rtol=0, atol=1e-6)
    torch.testing.assert_close(new.generate(unseen[:, :5], 10, 0), model.generate(unseen[:, :5], 10, 0))


@pytest.mark.parametrize("rank", [0.25, 0.5, 1.0])
def test_gqa_is_an_mla_rope_of_the_same_rank_and_the_same_cache(rank):
    model = double("gqa", rank=rank)
    idx = torch.randint(50, (8, 24))
    new = train.convert(model, replace(model.config, attn="mla_rope"), second_moments(model, idx))
    torch.testing.assert_close(logits(new, idx), logits(model, idx), rtol=0, atol=1e-6)
    assert new.kv_bytes_per_token(torch.float32) == model.kv_bytes_per_token(torch.float32)
    separate = double("mla_rope", rank=rank)
    assert [w.shape for w in new.state_dict().values()] == [w.shape for w in separate.state_dict().values()]


def test_a_joint_latent_of_twice_the_rank_holds_separate_ones():
    """And the other way round: a joint latent, copied, is two."""
    model = double("mla", rank=0.5)
    idx = torch.randint(50, (8, 24))
    joint = train.convert(model, replace(model.config, rank=1.0, joint=True), second_moments(model, idx))
    assert joint.kv_bytes_per_token(torch.float32) == model.kv_bytes_per_token(torch.float32)
    torch.testing.assert_close(logits(joint, idx), logits(model, idx), rtol=0, atol=1e-6)
    model = double("mla", rank=0.5, joint=True)
    separate = train.convert(model, replace(model.config, joint=False), second_moments(model, idx))
    torch.testing.assert_close(logits(separate, idx), logits(model, idx), rtol=0, atol=1e-6)


def test_queries_from_a_latent_stay_as_they_are():
    model = double("mla", rank=0.5, q_rank=0.5)
    idx = torch.randint(50, (8, 24))
    new = train.convert(model, replace(model.config, rank=0.25), second_moments(model, idx))
    for old_block, new_block in zip(model.blocks, new.blocks, strict=True):
        for name in ("w_dq", "w_uq", "w_o"):
            assert torch.equal(getattr(old_block.attn, name).weight, getattr(new_block.attn, name).weight)
        assert torch.equal(old_block.mlp_up.weight, new_block.mlp_up.weight)


@given(d=st.integers(2, 8), n=st.integers(2, 9), seed=st.integers(0, 999), data=st.data())
@settings(max_examples=50)
def test_compression_is_the_best_of_its_rank(d, n, seed, data):
    """By the theorem of Eckart and Young, the error is that of the truncated SVD of the rows x W themselves."""
    rank = data.draw(st.integers(1, min(d, n)))
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(40, d)) * rng.uniform(0.01, 3, size=d), rng.normal(size=(d, n))
    down, up = train.compress(torch.tensor(w), torch.tensor(x.T @ x / 40), rank)
    assert down.shape == (d, rank) and up.shape == (rank, n)
    error = np.sum((x @ w - x @ down.numpy() @ up.numpy()) ** 2)
    best = np.sum(np.linalg.svd(x @ w, compute_uv=False)[rank:] ** 2)
    assert error == pytest.approx(best, rel=1e-6, abs=1e-9)


def test_second_moments_are_those_of_what_attention_sees():
    model = double("mha_rope")
    idx = torch.randint(50, (4, 24))
    x = model.blocks[0].attn_norm(model.token_embedding(idx)).flatten(0, 1)
    moments = second_moments(model, idx)
    model(idx)
    assert len(moments) == 2  # it no longer listens
    torch.testing.assert_close(moments[0], sum(torch.outer(row, row) for row in x) / len(x))


def test_loss_rises_as_the_rank_falls_and_less_than_with_the_plain_svd(trained, stories, tmp_path):
    for attn, target in (("mha", "mla"), ("mha_rope", "mla_rope")):
        source, _ = load_checkpoint(trained[attn] / "ckpt.pt")
        flags = [*SMALL, f"--data={stories}", f"--init_from={trained[attn]}/ckpt.pt", "--steps=0", f"--out={tmp_path}"]
        run = train.Run(train.parse_arguments(flags))
        rows = train.batch(run.train_tokens, run.starts[:64], run.config.block_size, "cpu")[0]
        moments = second_moments(source, rows)
        plain = [torch.eye(64, dtype=torch.float64)] * 2
        weighted_losses, plain_losses = (
            [
                run.evaluate(train.convert(source, replace(source.config, attn=target, rank=rank), weights))[0]
                for rank in (1.0, 0.75, 0.5, 0.25, 0.125)
            ]
            for weights in (moments, plain)
        )
        # What is dropped first hardly matters: without it the loss may even fall, by some 1e-4
        assert all(lower > higher - 1e-3 for higher, lower in itertools.pairwise(weighted_losses))
        assert weighted_losses[0] == pytest.approx(run.evaluate(source)[0], abs=1e-5)
        assert weighted_losses[-1] > weighted_losses[-2] > weighted_losses[0]
        assert weighted_losses[-1] > weighted_losses[0] + 0.02  # the model does use attention
        for weighted, other in zip(weighted_losses, plain_losses, strict=True):
            assert weighted < other + 1e-5


# On the command line


def test_no_steps_convert_evaluate_and_save(trained, stories, tmp_path):
    flags = ["--attn=mla_rope", "--rank=1", "--steps=0", f"--init_from={trained['mha_rope']}/ckpt.pt"]
    status, told, err = call(train.main, *flags, f"--data={stories}", f"--out={tmp_path}", "--device=cpu")
    assert status == 0 and not err, err
    new, checkpoint = load_checkpoint(tmp_path / "ckpt.pt")
    old, before = load_checkpoint(trained["mha_rope"] / "ckpt.pt")
    assert (new.config.attn, new.config.n_embd, checkpoint["step"]) == ("mla_rope", old.config.n_embd, 0)
    assert checkpoint["val_loss"] == pytest.approx(before["val_loss"], abs=5e-3)  # bfloat16, perhaps
    assert f"val loss {checkpoint['val_loss']:.4f}" in told and (tmp_path / "train.png").exists()


def test_a_gqa_becomes_an_mla_rope_of_its_own_rank_if_none_is_given(trained, stories, tmp_path):
    flags = ["--attn=mla_rope", "--steps=0", f"--init_from={trained['gqa']}/ckpt.pt", "--dtype=float32", "--device=cpu"]
    train.Run(train.parse_arguments([*flags, f"--data={stories}", f"--out={tmp_path}"])).train()
    new, old = (load_checkpoint(folder / "ckpt.pt")[1] for folder in (tmp_path, trained["gqa"]))
    assert new["config"]["rank"] == old["config"]["rank"] == 0.5
    assert new["val_loss"] == pytest.approx(old["val_loss"], abs=1e-5)


def test_fine_tuning_starts_from_the_weights_and_improves_them(trained, stories, tmp_path):
    start = trained["mha_rope"] / "ckpt.pt"
    flags = [f"--init_from={start}", "--steps=30", "--lr=1e-3", "--batch_size=16", f"--data={stories}", "--device=cpu"]
    train.Run(train.parse_arguments([*flags, f"--out={tmp_path / 'tuned'}", "--eval_interval=10"])).train()
    log = [json.loads(line) for line in (tmp_path / "tuned" / "log.jsonl").read_text().splitlines()]
    last = [json.loads(line) for line in (trained["mha_rope"] / "log.jsonl").read_text().splitlines()][-1]
    assert [entry["step"] for entry in log] == [0, 10, 20, 30]
    assert log[0]["val_loss"] == pytest.approx(last["val_loss"], abs=0.02)
    assert log[-1]["val_loss"] < log[0]["val_loss"]
    options = load_checkpoint(tmp_path / "tuned" / "ckpt.pt")[1]["options"]
    assert options["n_layer"] == 2 and options["init_from"] == str(start)
    longer = [*flags, "--block_size=96", "--steps=0", f"--out={tmp_path / 'longer'}"]  # RoPE allows it
    for attn in ("mha_rope", "mla_rope"):  # kept, and converted
        train.Run(train.parse_arguments([*longer, f"--attn={attn}"])).train()
        config = load_checkpoint(tmp_path / "longer" / "ckpt.pt")[0].config
        assert (config.block_size, config.attn) == (96, attn)


def test_a_converted_run_that_was_stopped_resumes(trained, stories, tmp_path, monkeypatch):
    flags = [f"--init_from={trained['mha_rope']}/ckpt.pt", "--attn=mla_rope", "--rank=0.25", "--steps=3", "--lr=1e-3"]
    flags += [f"--data={stories}", "--device=cpu"]
    train.Run(train.parse_arguments([*flags, f"--out={tmp_path}/whole"])).train()
    with monkeypatch.context() as patched:
        step = train.Run.step
        patched.setattr(
            train.Run, "step", lambda self, number: (step(self, number), signal.raise_signal(signal.SIGINT))
        )
        assert train.Run(train.parse_arguments([*flags, f"--out={tmp_path}/stopped"])).train() == 130
    train.Run(train.parse_arguments([f"--out={tmp_path}/stopped", "--resume"])).train()
    whole, stopped = (load_checkpoint(tmp_path / name / "last.pt")[1]["model"] for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


@pytest.mark.parametrize(
    "source, flags, says",
    [
        ("mha", "--attn=mla_rope", KNOWN),
        ("mha", "--attn=mha_rope", KNOWN),
        ("mha_rope", "--attn=mla", KNOWN),
        ("mha_rope", "--attn=mla_decoupled", KNOWN),
        ("mha_rope", "--attn=gqa", KNOWN),
        ("gqa", "--attn=mha_rope", KNOWN),
        ("gqa", "--rank=0.25", KNOWN),
        ("gqa", "--attn=mla_rope --rank=0.75", "to a lower rank"),
        ("mha_rope", "--n_layer=3", "has 2"),
        ("mha_rope", "--n_embd=32", "has 64"),
        ("mha", "--block_size=128", "has 64"),
        ("mha_rope", "--attn=mla_rope --latent_norm", "has False"),
        ("mha_rope", "--rank=0.5", KNOWN),
        ("mha_rope", "--resume", "last.pt"),
    ],
)
def test_what_cannot_be_taken_over_is_refused_in_one_line(source, flags, says, trained, stories, tmp_path):
    arguments = [f"--init_from={trained[source]}/ckpt.pt", *flags.split(), f"--data={stories}", f"--out={tmp_path}/out"]
    status, _, err = call(train.main, *arguments)
    assert status == 2 and err.count("\n") == 1 and says in err, err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changed", [{"tokenizer": "gpt2"}, {"vocab_size": 65536}])
def test_data_of_another_tokenizer_is_refused(changed, trained, tmp_path):
    data = prepare(stories=40, root=tmp_path)
    meta = json.loads((data / "meta.json").read_text())
    (data / "meta.json").write_text(json.dumps(meta | changed))
    status, _, err = call(train.main, f"--init_from={trained['mha']}/ckpt.pt", f"--data={data}", f"--out={tmp_path}/o")
    assert status == 2 and re.search("--data=.*tokenizer of .*stories", err) and err.count("\n") == 1
