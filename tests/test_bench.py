"""The byte and FLOP counts, the tables, and wrong command lines. No speed is asserted anywhere."""

import argparse
import json
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from conftest import call, save
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import bench
from data.common import load_data, load_tokenizer
from data.prepare import prepare
from model import ABSORBS, ATTN, GPT, GPTConfig

SHAPE = dict(n_layer=2, n_head=4, n_embd=32, vocab_size=16, block_size=64)
MACHINE = {"name": "a machine", "bytes_per_s": 1e9, "flop_per_s": 1e10}


def config_of(attn, rank=0.5, joint=False):
    ranks = {} if attn.startswith("mha") else {"rank": rank}
    return GPTConfig(attn=attn, joint=joint, **ranks, **SHAPE)


@given(
    attn=st.sampled_from(ATTN),
    rank=st.sampled_from([0.25, 0.5, 1.0]),
    joint=st.booleans(),
    batch=st.integers(1, 5),
    context=st.integers(2, 60),
)
@settings(max_examples=60)
def test_the_cost_of_a_step_is_what_it_reads_and_multiplies(attn, rank, joint, batch, context):
    """Bytes: weights and filled cache, as allocated. FLOPs: what PyTorch counts in the products of a real step."""
    config = config_of(attn, rank, joint and attn in ("mla", "mla_rope", "mla_decoupled"))
    model = GPT(config).eval()
    parameters = sum(p.numel() for name, p in model.named_parameters() if "position" not in name)
    for absorbed in (False, True) if attn in ABSORBS else (False,):
        cache = GPT(replace(config, block_size=context)).init_cache(batch, absorbed)
        cache.reserve(context)
        read, flops = bench.decode_cost(config, parameters, batch, context, 4, absorbed)
        assert read == 4 * parameters + cache.nbytes
        cache.pos = context - 1
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(batch, 1, dtype=torch.long), cache=cache)
        # decode_cost counts the gains of LayerNorm as products; and with the parameters, the new token's own expansion.
        gains = sum(p.numel() for p in model.parameters() if p.dim() == 1)
        assert flops == counter.get_total_flops() + 2 * batch * gains


@pytest.mark.parametrize("attn", ATTN)
def test_a_row_holds_the_allocated_bytes_and_medians_of_the_rounds(attn):
    model = GPT(config_of(attn)).eval()
    row = bench.measure(model, torch.float32, 2, 8, "cpu")
    assert row["kv_bytes"] == model.kv_bytes_per_token(torch.float32)
    assert row["expanded"] > 0 and (row.get("absorbed") is not None) == (attn in ABSORBS)
    slower = row | {way: row[way] / 2 for way in ("expanded", "absorbed") if way in row}
    found = bench.summarize([row, slower, slower], model.config, MACHINE)
    assert bench.speed(found) == pytest.approx(bench.speed(row) / 2) and found["spread"] == pytest.approx(0.5)
    work = {"memory": found["gb"], "arithmetic": found["gflop"] / 10}  # in seconds of MACHINE per second
    assert found["limit"] == max(work, key=work.get) and found["roofline"] == pytest.approx(work[found["limit"]])
    if "memory" in found:
        assert found["memory"] >= 4 * row["parameters"] + 2 * 8 * row["kv_bytes"] / 1e6


def test_temporary_memory_is_the_peak_of_a_step_alone():
    kept = []

    def step():
        kept.append(torch.ones(25_000_000))  # 100 MB
        (kept[-1] + kept[-1]).sum()  # and 100 MB more

    for _ in range(2):
        torch.ones(75_000_000).sum()  # a higher peak, but before
        if (found := bench.temporary_bytes(step, "cpu")) is None:
            pytest.skip("this system does not report peak memory")
        assert 190e6 < found < 230e6


def test_cuda_is_given_an_index(monkeypatch):
    """torch.cuda.set_device does not take "cuda"."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "check_device", lambda device: None)
    for flags, devices in (([], ["cuda:0"]), (["--device", "cpu", "cuda", "cuda:1"], ["cpu", "cuda:0", "cuda:1"])):
        monkeypatch.setattr("sys.argv", ["bench.py", *flags])
        assert bench.parse_arguments().device == devices


@pytest.mark.parametrize("size", bench.SIZES)
def test_every_size_has_its_variants(size):
    """gqa leaves out the ranks that do not divide the heads."""
    args = argparse.Namespace(context=None, attn=ATTN, size=size)
    models, contexts = bench.choose_models(args, {})
    assert contexts == [512, 4096] and {config.attn for _, _, config in models} == set(ATTN)


def test_a_timed_step_attends_to_exactly_context_tokens():
    model, seen = GPT(replace(config_of("mla"), block_size=256)).eval(), []
    hidden = model.hidden
    model.hidden = lambda token, positions, cache: (
        seen.append((positions.tolist(), cache.size)) or hidden(token, positions, cache)
    )
    bench.decode(model, 2, 128, True, "cpu")
    assert seen and all(one == ([127], 128) for one in seen)


class Allocations(TorchDispatchMode):
    """Records the bytes of each newly allocated tensor."""

    def __enter__(self):
        self.sizes = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                self.sizes.append(t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("attn", [attn for attn in ATTN if attn != "mla_rope"])
def test_decoding_copies_no_cache(attn):
    """Between two growths no step makes anything as large as a layer's cache: only scores, one per head and slot."""
    model = GPT(replace(config_of(attn), block_size=2048)).eval()
    cache, token = model.init_cache(2), torch.zeros(2, 1, dtype=torch.long)
    cache.reserve(2048)
    held = [tensor.data_ptr() for tensor in tree_leaves(cache.layers)]
    with torch.no_grad():
        for pos in (10, 1500, 2000):
            cache.pos = pos
            with Allocations() as made:
                model(token, cache=cache)
            assert max(made.sizes) <= 2 * 4 * 2048 * 4
    assert [tensor.data_ptr() for tensor in tree_leaves(cache.layers)] == held


@pytest.mark.parametrize("first, counted", [(0.4, [1.0, 1.0, 1.0]), (0.6, [0.6])])
def test_calls_are_timed_after_a_warm_up_unless_they_are_slow(first, counted, monkeypatch):
    clock, taken = [0.0], iter([first, *[1.0] * 10])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])

    def work():
        clock[0] += next(taken)

    assert bench.seconds(work, "cpu") == pytest.approx(counted)


def report():
    row = dict(
        batch=8, context=512, dtype="bfloat16", device="cpu", rank=None, joint=False, gb=5.0, gflop=20.0, roofline=0.4
    )
    row |= dict(latent_norm=False, q_rank=None)
    rows = [
        row | dict(attn="mha", parameters=30.4, kv_bytes=18432, expanded=300.0, spread=0.02, val_loss=2.0),
        row | dict(attn="mla", rank=1.0, parameters=35.1, kv_bytes=18432, expanded=80.0, absorbed=200.0, spread=0.01),
        row | dict(attn="mla", rank=0.5, parameters=30.4, kv_bytes=9216, expanded=90.0, absorbed=330.0, val_loss=2.1),
        row | dict(attn="mla", rank=0.5, parameters=30.4, kv_bytes=9216, expanded=9.0, absorbed=33.0, context=4096),
    ]
    rows = bench.compare([row | {"name": bench.name_of(row)} for row in rows])
    return {"command": "python bench.py", "machines": {"cpu bfloat16": MACHINE}, "rows": rows}


def test_rows_are_compared_with_mha_and_rank_one_of_their_own_group():
    mha, full, half, alone = report()["rows"]
    assert (mha["cut"], mha["to_mha"], mha["loss_to_mha"]) == (0, 1, 0)
    assert half["cut"] == 0.5 and half["to_mha"] == 1.1 and half["to_full"] == 1.65
    assert half["loss_to_mha"] == pytest.approx(0.05) and full["to_full"] == 1
    assert not {"cut", "to_mha", "to_full"} & alone.keys()


def test_tables_are_markdown_and_line_up():
    text = bench.tables(report(), bench.COLUMNS)
    first, second = text.split("4,096 tokens attended to")
    assert first.startswith("512 tokens attended to, batch 8, bfloat16; a machine: 1.0 GB/s, 10 GFLOP/s\n\n|")
    lines = first.strip().split("\n")[2:]
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1
    assert "train" not in first and "excess" not in first  # no column without a number
    half = "mla 1/2 | 30.4M | 9,216 | 50% | 90 | 330 | | 1.10 | 1.65 | 5.0 | 20 | 40% | 2.1000 | +5.0%"
    assert [cell.strip() for cell in lines[4].strip("|").split("|")] == [cell.strip() for cell in half.split("|")]
    lines = bench.tables(report(), ["kv_bytes", "cut"]).split("\n")
    assert lines[2:6] == [
        "| attn    | KV B/tok | cut |",
        "| ------- | -------: | --: |",
        "| mha     |   18,432 |  0% |",
        "| mla 1   |   18,432 |  0% |",
    ]


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Run bench.py on small shapes -> exit status, stdout, stderr."""
    monkeypatch.setitem(bench.SIZES, "30m", dict(n_layer=1, n_head=8, n_embd=64))
    monkeypatch.setitem(bench.SIZES, "tiny", dict(n_layer=1, n_head=2, n_embd=16))
    monkeypatch.setattr(bench, "ceilings", lambda device, dtype: {"bytes_per_s": 1e10, "flop_per_s": 1e11})
    return partial(call, bench.main, f"--out={tmp_path}")


def test_all_variants_are_measured(script, tmp_path):
    status, out, err = script("--context", 4, 8, "--batch", 2, "--rounds=2", "--dtype", "float32")
    assert status == 0 and "fastest" in out and "smallest cache" in out
    report = json.loads((tmp_path / "bench.json").read_text())
    assert len(report["rows"]) == 2 * len(bench.VARIANTS) and {r["attn"] for r in report["rows"]} == set(ATTN)
    joint = next(r for r in report["rows"] if r["attn"] == "mla_decoupled" and r["joint"] and r["rank"] == 0.5)
    assert joint["cut"] == pytest.approx(1 - (32 + 4) / 128)
    assert (tmp_path / "bench.png").stat().st_size > 10000
    assert out.count("\n| mla_decoupled 1/2 joint ") == 2


def test_training_is_measured_by_train_itself(script, stories, tmp_path, monkeypatch):
    flags = ["--attn=mla_rope", "--size=tiny", "--context=4", "--batch=2", "--dtype=float32", "--rounds=1", "--train"]
    monkeypatch.setattr(bench, "VARIANTS", (("mla_rope", 0.5, True),))
    status, out, err = script(*flags, f"--data={stories}", "--device=cpu")
    (row,) = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert status == 0 and row["train"] > 0 and " train" in out
    assert script(*flags, f"--data={tmp_path / 'nothing'}")[0] == 2  # train.py says why


def trained(path, attn, val_loss, **entries):
    return save(path, GPT(config_of(attn)), **{"step": 3, "val_loss": val_loss, "floor": 0.5} | entries)


def test_checkpoints_bring_their_loss(script, tmp_path):
    paths = [trained(tmp_path / f"{attn}.pt", attn, loss) for attn, loss in (("mha", 1.0), ("mla", 1.25))]
    status, out, err = script(*paths, "--dtype", "float32", "--rounds=1")
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert status == 0 and [row["excess"] for row in rows] == [0.5, 0.75] and rows[1]["loss_to_mha"] == 0.25
    assert rows[0]["context"] == SHAPE["block_size"] and "mla 1/2" in out


def test_runs_that_differ_only_in_their_seed_share_a_row(script, tmp_path):
    """With means and standard errors. A run of another learning rate, or of a seed already seen, has its own row."""
    runs = [("mha", 0, 1e-3, 1.0), ("mha", 1, 1e-3, 1.2), ("mla", 0, 1e-3, 1.5), ("mla", 1, 1e-3, 1.8)]
    runs += [("mla", 2, 1e-3, 2.1), ("mla", 2, 1e-3, 9.0), ("mla", 1, 2e-3, 8.0)]
    paths = [
        trained(tmp_path / f"{i}.pt", attn, loss, options={"seed": seed, "lr": lr, "out": f"out/{i}"})
        for i, (attn, seed, lr, loss) in enumerate(runs)
    ]
    status, out, err = script(*paths, "--dtype", "float32", "--rounds=1")
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [len(row["paths"]) for row in rows] == [row["runs"] for row in rows] == [2, 3, 1, 1]
    mha, mla, *_ = rows
    assert mha["val_loss"] == pytest.approx(1.1) and mha["excess_error"] == pytest.approx(0.1)
    assert mla["val_loss"] == pytest.approx(1.8) and mla["val_loss_error"] == pytest.approx(0.3 / 3**0.5)
    assert mla["loss_to_mha"] == pytest.approx(1.8 / 1.1 - 1)
    assert [rows[0]["name"], rows[3]["name"]] == ["mha", str(paths[6])]
    assert "+63.6%" in out and "1.8000±0.1732" in out


def test_stories_of_a_checkpoint_are_judged(script, stories, tmp_path):
    meta, train, _ = load_data(stories)
    torch.manual_seed(0)
    model = GPT(replace(config_of("mla_decoupled"), vocab_size=meta["vocab_size"], block_size=300))
    path = trained(tmp_path / "a.pt", "mla", 1.0, config=asdict(model.config), model=model.state_dict(), meta=meta)
    status, out, err = script(path, "--judge=3", "--context=8", "--rounds=1", f"--data={stories}")
    (row,) = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert status == 0 and "grammar" in out and "recall" in out
    assert row["grammar"] < 2 and row["copied"] < 0.2 and 0 < row["recall"] < 0.2  # it has learnt nothing yet
    assert 0 < row["chance"] < row["copying"] < 0.5 and row["lost"] > 0.1
    assert bench.sample(model, load_tokenizer("stories"), 3) == bench.sample(model, load_tokenizer("stories"), 3)
    path = trained(path, "mla", 1.0, config=asdict(model.config), model=model.state_dict(), meta=meta | {"seed": 1})
    (tmp_path / "mine.txt").write_text("One day.\n\n" * 40)
    mine = prepare(str(tmp_path / "mine.txt"), tokenizer="stories", root=tmp_path)
    for data in (stories, mine):
        status, out, err = script(path, "--judge=3", f"--data={data}")
        assert status == 2 and "was not trained on the story world" in err and err.count("\n") == 1
    status, out, err = script("--judge=3")
    assert status == 2 and "name the checkpoints to judge" in err


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--attn=mlx"], "invalid choice"),
        (["--columns=speed"], "invalid choice"),
        (["--device=tpu"], "--device=tpu"),
        (["--batch=0"], "--batch: must be at least 1"),
        (["--batch=100000000", "--context=1000000"], "smaller values"),
        (["--out=/dev/null"], "--out=/dev/null: must be a folder"),
        (["nothing.pt"], "No such file"),
        (["--rounds=x"], "invalid int"),
        (["--rounds=0"], "--rounds: must be at least 1"),
        (["--judge=0"], "--judge: must be at least 1"),
        (["--compile", "--device=cpu"], "--compile: for cuda only"),
    ],
)
def test_wrong_input_ends_in_one_line(arguments, says, script):
    status, out, err = script(*arguments)
    assert status == 2 and says in err and err.count("\n") == 1 and err.startswith("bench.py: ")


def test_flags_that_contradict_a_checkpoint_are_refused(script, tmp_path):
    status, out, err = script(trained(tmp_path / "a.pt", "mla", 1.0), "--context=65")
    assert status == 2 and "has a context of 64" in err
    status, out, err = script(tmp_path / "a.pt", "--attn=mha")
    assert status == 2 and "leave them out" in err
