"""Training: rows of stories, the loop, its checkpoints, and wrong command lines."""

import argparse
import copy
import json
import re
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from conftest import call, save
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import model
import train
from data import prepare as prep
from data.common import load_data, load_tokenizer
from data.prepare import prepare
from model import ATTN, load_checkpoint, tell

END = 9
SMALL = "--n_layer=1 --n_head=2 --n_embd=32 --block_size=64 --batch_size=4 --grad_accum=1".split()
SMALL += ["--eval_steps=2", "--device=cpu"]


@pytest.fixture
def start(stories, tmp_path):
    """Train a small model on a few stories, into tmp_path/out; returns that folder."""

    def start(*flags):
        train.Run(train.parse_arguments([f"--data={stories}", f"--out={tmp_path / 'out'}", *flags])).train()
        return tmp_path / "out"

    return start


def log_of(out):
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k != "tokens_per_second"} for entry in entries]


def test_every_flag_is_explained_with_its_default(capsys):
    with pytest.raises(SystemExit):
        train.parse_arguments(["--help"])
    helps = dict(re.findall(r"^  --(\w+)(.*?)(?=^  --|\Z)", capsys.readouterr().out, re.M | re.S))
    assert helps.keys() == train.FLAGS.keys()
    assert all("default" in text for text in helps.values())


# Devices


def test_a_run_on_a_gpu_has_a_device_with_an_index(monkeypatch):
    """With stand-ins for a machine with two old GPUs: torch.cuda.set_device does not take "cuda"."""
    chosen = []
    monkeypatch.setattr(train.shutil, "which", lambda name: f"/usr/bin/{name}")  # a C compiler
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(train, "check_device", lambda device: None)
    monkeypatch.setattr(train.dist, "init_process_group", lambda backend: chosen.append(backend))
    options, *_ = train.resolve({})
    assert (options.device, options.size, options.dtype, options.compile) == ("cuda", "30m", "float16", True)
    assert train.set_up_device(options) == ("cuda:0", 0, 1) and chosen == ["cuda:0"]
    options.device = "cuda:1"
    assert train.set_up_device(options)[0] == "cuda:1"
    for name, value in {"WORLD_SIZE": "2", "RANK": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    options.device = "cuda"
    assert train.set_up_device(options) == ("cuda:1", 3, 2) and chosen[-1] == "cpu:gloo,cuda:nccl"


@pytest.mark.parametrize("bfloat16, dtype", [(True, "bfloat16"), (False, "float16")])
def test_sixteen_bits_on_a_gpu_and_float32_on_a_mac(bfloat16, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    options, *_ = train.resolve({})
    assert (options.device, options.size, options.dtype, options.compile) == ("mps", "30m", "float32", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bfloat16)
    assert train.resolve({})[0].dtype == dtype and train.resolve({"dtype": "float32"})[0].dtype == "float32"


class Waits(TorchDispatchMode):
    """Counts what makes a host wait for a GPU: reading a number out of a tensor."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_step_does_not_wait_for_the_device(optimizer, stories):
    flags = [*SMALL, f"--data={stories}", f"--optimizer={optimizer}", "--grad_accum=3", "--dtype=bfloat16"]
    run = train.Run(train.parse_arguments(flags))
    with Waits() as waits:
        run.step(0)
        assert waits.count == 0
        float(run.losses[-1])
    assert waits.count == 1


def test_the_rate_does_not_count_the_first_step(start, monkeypatch):
    """It compiles, for a minute perhaps. By a clock of our own it takes 1,000 s, and every other step 1 s."""
    clock, step = [0.0], train.Run.step
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock[0])

    def slow(self, number):
        step(self, number)
        clock[0] += 1 if number else 1000

    monkeypatch.setattr(train.Run, "step", slow)
    out = start(*SMALL, "--steps=6", "--eval_interval=3")
    rates = [json.loads(line)["tokens_per_second"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert rates == [None, 256, 256]  # 4 rows of 64 tokens a step


# Precision and optimizers


def test_a_batch_in_two_halves_is_the_same_batch(stories):
    """--grad_accum=2, whose halves run in parallel on a CPU, has the same loss and gradient."""
    found = []
    for split in (["--batch_size=4", "--grad_accum=1"], ["--batch_size=2", "--grad_accum=2"]):
        run = train.Run(train.parse_arguments([*SMALL, *split, f"--data={stories}", "--dtype=float32", "--steps=9"]))
        run.step(0)
        found.append((run.losses[0].item(), run.norm.item()))
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_a_float16_step_that_overflows_changes_nothing(stories):
    """GradScaler begins with a factor that is too large here, halves it, and trains on."""
    run = train.Run(train.parse_arguments([*SMALL, f"--data={stories}", "--dtype=float16", "--steps=99", "--warmup=0"]))
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = copy.deepcopy(run.model.state_dict())
    run.step(0)
    assert same(before, run.model.state_dict()) and run.scaler.get_scale() == 2.0**39
    for step in range(1, 60):
        run.step(step)
    assert run.losses[-1] < run.losses[0] - 1 and all(loss.isfinite() for loss in run.losses)


@pytest.mark.parametrize("attn", ATTN)
def test_each_weight_has_one_optimizer_and_muon_has_the_matrices_inside_blocks(attn):
    gpt = model.GPT(model.GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=50, attn=attn))
    names = {id(p): name for name, p in gpt.named_parameters()}
    for optimizer, kinds in (("muon", [torch.optim.Muon, torch.optim.AdamW]), ("adamw", [torch.optim.AdamW])):
        optimizers = train.make_optimizers(gpt, argparse.Namespace(optimizer=optimizer, weight_decay=0.1))
        assert [type(one) for one in optimizers] == kinds
        groups = [group for one in optimizers for group in one.param_groups]
        assert sorted(id(p) for group in groups for p in group["params"]) == sorted(names)
        assert all((p.dim() == 2) == (group["weight_decay"] == 0.1) for group in groups for p in group["params"])
    muon = train.make_optimizers(gpt, argparse.Namespace(optimizer="muon", weight_decay=0.1))[0]
    assert {names[id(p)] for p in muon.param_groups[0]["params"]} == {
        name for name in names.values() if name.startswith("blocks.") and "norm" not in name
    }


@given(steps=st.integers(1, 300), warmup=st.floats(0, 1))
def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero(steps, warmup):
    options = argparse.Namespace(lr=2.0, steps=steps, warmup=warmup)
    rates = [train.learning_rate(step, options) for step in range(steps)]
    top = rates.index(max(rates))
    assert 0 < min(rates) and max(rates) <= 2.0  # the last step still moves
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] <= 2.0 / max(1, steps - round(warmup * steps))
    assert steps < 20 or max(rates) > 1.8


# Rows


@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=30), length=st.integers(1, 25))
@settings(max_examples=200)
def test_rows_hold_every_token_once_and_begin_with_stories(lengths, length):
    tokens = np.array([END] + [token for n in lengths for token in [1] * n + [END]], dtype=np.uint16)
    starts, sizes = train.story_rows(tokens, END, length)
    assert starts[0] == 0 and (starts[1:] == (starts + sizes)[:-1]).all() and starts[-1] + sizes[-1] == len(tokens) - 1
    assert sizes.min() > 0 and sizes.max() <= length
    for begin, size in zip(starts, sizes, strict=True):
        assert END not in tokens[begin + 1 : begin + size]  # no row goes on after its story
        if tokens[begin] != END:  # only a story too long for a row is cut
            assert begin >= length and END not in tokens[begin - length + 1 : begin + 1]


@given(lengths=st.lists(st.integers(1, 30), min_size=2, max_size=20), block_size=st.integers(1, 40))
@settings(max_examples=100)
def test_each_validation_token_is_predicted_exactly_once(lengths, block_size):
    tokens = np.array([END] + [token for n in lengths for token in [*range(10, 10 + n), END]], dtype=np.uint16)
    starts, sizes = train.story_rows(tokens, END, block_size)
    idx, targets = train.batch(tokens, starts, sizes, "cpu")
    assert idx.shape == targets.shape == (len(starts), sizes.max())
    assert targets[targets >= 0].tolist() == tokens[1:].tolist()
    inner = targets[:, :-1] >= 0
    assert (idx[:, 1:][inner] == targets[:, :-1][inner]).all()


def test_the_floor_is_that_of_the_evaluated_stories(stories):
    flags = [f"--data={stories}", "--block_size=350", "--batch_size=2", *SMALL[:3], "--steps=1", "--device=cpu"]
    run = train.Run(train.parse_arguments(flags))
    meta, _, val = load_data(stories)
    ends = np.flatnonzero(val == meta["end"])  # from 0: each of these stories fits into one row
    _, floor = run.evaluate(run.model, batches=3)  # of two stories each
    assert floor == pytest.approx(sum(meta["val_nats"][:6]) / ends[6])
    assert run.evaluate(run.model)[1] == pytest.approx(meta["floor"])


def test_the_last_lines_split_the_excess_and_compare_recall_with_guesses(start, capsys, monkeypatch):
    measured, measure = [], train.recall

    def measure_and_note(model, data):
        found = measure(model, data)
        measured.append((model.training, found[1]))
        return found

    monkeypatch.setattr(train, "recall", measure_and_note)
    start(*SMALL, "--block_size=320", "--steps=1", "--dropout=0.5")
    printed, (training, found) = capsys.readouterr().out, measured[0]
    assert not training  # without dropout
    excess = float(re.search(r"^excess +([\d.]+) above", printed, re.M)[1])
    assert found["excess"] == pytest.approx(excess, abs=0.02)  # both are of all 20 validation stories
    assert f" {found['lost']:.4f} of it at words" in printed and 0.2 < found["lost"] < excess
    told = re.search("^recall .*\n.*", printed, re.M)[0]
    recall, chance, copying = (float(n) for n in re.findall(r"([\d.]+)%", told))
    assert 0 < chance < copying < 50 and recall == pytest.approx(100 * found["recall"], abs=0.06)


def test_where_recall_cannot_be_measured_the_rest_is_reported(start, stories, capsys, tmp_path):
    """Because no story fits into the context, or because the stories are of another world."""
    start(*SMALL, "--block_size=16", "--steps=1")
    printed = capsys.readouterr().out
    assert "no validation story of at most 16 tokens asks" in printed and "KV cache" in printed
    shutil.copytree(stories, tmp_path / "older")
    meta = json.loads((tmp_path / "older" / "meta.json").read_text())
    (tmp_path / "older" / "meta.json").write_text(json.dumps(meta | {"seed": 1}))
    start(*SMALL, "--block_size=320", "--steps=1", f"--data={tmp_path / 'older'}")
    printed = capsys.readouterr().out
    assert "another version of the world" in printed and "KV cache" in printed


def test_text_without_a_floor_is_measured_in_bits_per_byte(start, tmp_path, capsys):
    text = "\n\n".join(f"The {i}th day was as long as the day before it, and as cold." for i in range(200))
    (tmp_path / "mine.txt").write_text(text)
    data = prepare(str(tmp_path / "mine.txt"), tokenizer="stories", root=tmp_path)
    out = start(*SMALL, "--steps=1", f"--data={data}")
    (entry, *_), meta = log_of(out), json.loads((data / "meta.json").read_text())
    validation = text.split("\n\n")[-meta["val_stories"] :]
    assert "excess" not in entry and meta["val_bytes"] == sum(len(story.encode()) for story in validation)
    bits = entry["val_loss"] / np.log(2) * meta["val_tokens"]
    assert entry["bits_per_byte"] == pytest.approx(bits / meta["val_bytes"])
    printed = capsys.readouterr().out
    assert "bits/byte" in printed and "bits per byte of text" in printed and "recall" not in printed


def test_a_model_learns_more_than_how_often_words_occur(start, stories):
    out = start(*SMALL, "--n_embd=64", "--batch_size=16", "--steps=120", "--lr=1e-2", "--eval_steps=100")
    tokens = np.fromfile(stories / "train.bin", dtype=np.uint16)
    share = np.bincount(tokens) / len(tokens)
    unigram = -sum(p * np.log(p) for p in share if p)
    log = log_of(out)
    assert log[0]["val_loss"] > unigram + 1
    assert min(entry["val_loss"] for entry in log) < unigram - 1


@pytest.mark.parametrize("attn", ATTN)
def test_every_variant_trains_and_its_checkpoint_tells_a_story(start, attn, capsys):
    out = start(*SMALL, f"--attn={attn}", "--steps=12", "--lr=1e-2", "--eval_interval=6", "--dropout=0.1")
    log = log_of(out)
    assert [entry["step"] for entry in log] == [0, 6, 12] and log[-1]["val_loss"] < log[0]["val_loss"]
    assert all(entry["excess"] > 0 for entry in log)
    gpt, checkpoint = load_checkpoint(out / "ckpt.pt")
    assert checkpoint["config"]["attn"] == attn and checkpoint["meta"]["source"] == "stories"
    story = tell(gpt, load_tokenizer("stories"), "Once upon a time", tokens=20)
    assert story.startswith("Once upon a time") and len(story) > 30
    printed = capsys.readouterr().out
    assert f"KV cache {gpt.kv_bytes_per_token(torch.bfloat16):,} bytes" in printed and "Once upon a time" in printed


def same(a, b):
    """Are two checkpoints, or parts of them, equal bit for bit?"""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@given(data=st.data())
@settings(max_examples=5)
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(stories, tmp_path_factory, data):
    """Stop by Ctrl-C at any step, resume: bit for bit the weights, optimizers, log, spectra of a run that is not."""
    steps, interval = 7, data.draw(st.integers(1, 8))
    stop_at = data.draw(st.integers(0, steps - 1))
    flags = [f"--data={stories}", *SMALL, "--attn=mla_rope", f"--steps={steps}"]
    flags += [f"--dropout={data.draw(st.sampled_from([0.0, 0.2]))}"]  # without, two batches run in parallel
    flags += [f"--eval_interval={interval}", f"--grad_accum={data.draw(st.integers(1, 2))}"]
    flags += [f"--optimizer={data.draw(st.sampled_from(['muon', 'adamw']))}"]
    flags += [f"--dtype={data.draw(st.sampled_from(['bfloat16', 'float16', 'float32']))}"]
    ends = {}
    for name in ("whole", "stopped"):
        out = tmp_path_factory.mktemp(name)
        run = train.Run(train.parse_arguments([*flags, f"--out={out}"]))
        if name == "stopped":
            real_step = run.step

            def step_and_stop(step, real_step=real_step):
                real_step(step)
                if step == stop_at:
                    signal.raise_signal(signal.SIGINT)

            run.step = step_and_stop
        status = run.train()
        if name == "stopped" and stop_at < steps - 1:
            assert status == 130 and (out / "train.png").stat().st_size > 10000
            assert torch.load(out / "last.pt", weights_only=True)["step"] == stop_at + 1
            train.Run(train.parse_arguments([f"--out={out}", "--resume"])).train()
        ends[name] = torch.load(out / "last.pt", weights_only=True), (log_of(out), (out / "spectrum.jsonl").read_text())
    (whole, whole_log), (stopped, stopped_log) = ends["whole"], ends["stopped"]
    assert whole_log == stopped_log and whole["step"] == steps
    for part in ("step", "best", "model", "optimizers", "scaler", "losses"):
        assert same(whole[part], stopped[part]), part


def test_ckpt_is_the_best_model_and_last_is_the_last(start, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 1.0])  # at steps 0, 1, 2; then of the best model on all data
    monkeypatch.setattr(train.Run, "evaluate", lambda self, model, batches=None: (next(losses), None))
    out = start(*SMALL, "--steps=2", "--eval_interval=1")
    assert [load_checkpoint(out / name)[1]["step"] for name in ("ckpt.pt", "last.pt")] == [1, 2]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_best_model(start, tmp_path):
    out = start(*SMALL, "--steps=4", "--eval_interval=2")
    best = (out / "ckpt.pt").read_bytes()
    with pytest.raises(FloatingPointError, match="by step 20 the loss is .*--lr"):
        start(*SMALL, "--steps=40", "--eval_interval=20", "--lr=4e9", "--warmup=0", "--weight_decay=0")
    assert (out / "previous-1" / "ckpt.pt").read_bytes() == best  # of the run before
    for name in ("ckpt.pt", "last.pt"):
        assert all(weight.isfinite().all() for weight in load_checkpoint(out / name)[1]["model"].values())


def test_a_crash_while_saving_leaves_the_old_checkpoint(start, monkeypatch):
    out = start(*SMALL, "--steps=2")
    before = (out / "last.pt").read_bytes()

    def full_disk(checkpoint, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="last.pt: cannot be written"):
        train.write(out / "last.pt", {})
    assert (out / "last.pt").read_bytes() == before and not list(out.glob("*.tmp"))


def test_a_half_written_line_of_the_log_does_not_hinder_resuming(start):
    out = start(*SMALL, "--steps=2", "--eval_interval=1")
    log = log_of(out)
    spectra = (out / "spectrum.jsonl").read_text()
    for name in ("log.jsonl", "spectrum.jsonl"):
        with open(out / name, "a") as file:
            file.write('{"step": 3, "lo')
    start("--resume")
    assert log_of(out) == log and (out / "spectrum.jsonl").read_text() == spectra


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--attn=mhla", "mla_decoupled"),
        ("--rank=0", "left out with attn=mha_rope"),
        ("--attn=mla --rank=1.5", "(0, 1]"),
        ("--attn=mha --rank=0.5", "left out with attn=mha:"),
        ("--attn=mla --rank=half", "invalid float"),
        ("--attn=mha --joint", "left out with attn=mha:"),
        ("--attn=mla_prerope --joint", "mla_decoupled"),
        ("--n_head=3", "a divisor of n_embd"),
        ("--attn=mla_decoupled --rope_dim=3", "even, from 2"),
        ("--attn=gqa --rank=0.3", "for some k that divides"),
        ("--steps=-1", "from 0 to"),
        ("--grad_clip=0", "from 1e-09 to"),
        ("--init_from=nowhere.pt", "nowhere.pt"),
        ("--lr=nan", "from 0 to"),
        ("--lr=-1", "from 0 to"),
        ("--warmup=100", "from 0 to 1"),  # a share of the steps, not a number
        ("--dropout=1", "in [0, 1)"),
        ("--size=7b", "30m"),
        ("--step=10", "--step"),
        ("--device=warp", "not available"),
        ("--device=cuda:77", "not available"),
        ("--data=/nowhere", "/nowhere"),
        ("--block_size=10000000", "from 1 to 1048576"),
        ("--block_size=4", "from 16 to"),
        ("--seed=10000000000000000000000000", "from 0 to"),
        ("--device=meta", "not available"),
        ("--resume", "last.pt"),
    ],
)
def test_wrong_flags_end_in_one_line_and_status_2(flags, says, stories, tmp_path):
    out = tmp_path / "out"
    arguments = [f"--data={stories}", f"--out={out}", "--n_layer=1", *flags.split()]
    status, _, line = call(train.main, *arguments)
    assert status == 2 and line.count("\n") == 1 and says in line and not out.exists()


@pytest.mark.parametrize(
    "flags, says", [("--attn=mla", "has mha_rope"), ("--steps=9", "has 2"), ("--lr=1", "has 0.01")]
)
def test_resuming_with_another_configuration_is_refused(start, flags, says):
    out = start(*SMALL, "--steps=2")
    status, _, line = call(train.main, f"--out={out}", "--resume", *flags.split())
    assert status == 2 and line.count("\n") == 1 and says in line


def test_resuming_on_other_data_is_refused(start, stories, tmp_path):
    data = tmp_path / "copy"
    shutil.copytree(stories, data)
    out = start(*SMALL, f"--data={data}", "--steps=2")
    moved = data.rename(tmp_path / "moved")
    status, *_ = call(train.main, f"--out={out}", "--resume", f"--data={moved}")
    assert status == 0  # the same data in another place
    moved.rename(data)
    meta = json.loads((data / "meta.json").read_text())
    (data / "meta.json").write_text(json.dumps(meta | {"seed": 5}))
    status, _, line = call(train.main, f"--out={out}", "--resume", f"--data={data}")
    assert status == 2 and str(data) in line


@pytest.fixture
def untrained(tmp_path):
    """The checkpoint of a model of stories that has learnt nothing."""
    shape = dict(n_layer=1, n_head=2, n_embd=32, block_size=64, vocab_size=load_tokenizer("stories").n_vocab)
    return save(tmp_path / "ckpt.pt", model.GPT(model.GPTConfig(**shape)), meta={"tokenizer": "stories"})


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["nowhere.pt"], "nowhere.pt"),
        ([__file__], "not a checkpoint"),
        (["CKPT", "--prompt=" + "word " * 80], "over a context of 64"),
        (["CKPT", "--temperature=-1"], "temperature=-1.0"),
        (["CKPT", "--temperature=nan"], "temperature=nan"),
        (["CKPT", "--top_k=0"], "top_k=0"),
        (["CKPT", "--tokens=-1"], "max_new_tokens=-1"),
        (["CKPT", "--seed=one"], "seed"),
        (["CKPT", "--tokens=many"], "tokens"),
        ([], "checkpoint"),
    ],
)
def test_wrong_flags_of_model_py_end_in_one_line(untrained, arguments, says):
    arguments = [untrained if word == "CKPT" else word for word in arguments]
    status, _, line = call(model.main, *arguments)
    assert status == 2 and line.count("\n") == 1 and says in line


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["nowhere.txt"], "nowhere.txt"),
        (["--stories=1"], "--stories=1"),
        (["--stories=many"], "--stories"),
        (["--tokenizer=gpt5"], "gpt5"),
        (["tinystories", "--tokenizer=stories"], "pip install datasets"),
    ],
)
def test_wrong_flags_of_prepare_py_end_in_one_line(arguments, says, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # not installed
    status, _, err = call(prep.main, *arguments)
    assert status == 2 and says in err.splitlines()[-1]  # a progress bar may stand above it


def test_deepseek_v2_trains_and_tells_a_story_without_a_warning(stories, tmp_path):
    """With all options of the latents, under autocast, and with spectra."""
    options = ["--attn=mla_decoupled", "--joint", "--latent_norm", "--q_rank=0.5", "--steps=2", "--dtype=bfloat16"]
    status, told, err = call(train.main, *SMALL, *options, f"--data={stories}", f"--out={tmp_path}")
    assert status == 0 and "KV cache" in told and not err, err
    assert call(model.main, tmp_path / "ckpt.pt")[0] == 0


def test_model_py_tells_a_story_that_begins_with_the_prompt(untrained):
    for options in ([], ["--prompt="], ["--seed=-1", "--top_k=5"]):
        status, told, err = call(model.main, untrained, "--prompt=One day", "--tokens=5", *options)
        assert status == 0 and told.startswith("One day" if "--prompt=" not in options else "") and not err
