"""Training: rows of stories, the loop, its checkpoints, and everything that can be typed wrongly."""

import json
import re
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import model
import train
from data import prepare as prep
from data.common import load_tokenizer
from data.prepare import prepare
from model import ATTN, load_checkpoint, tell

END = 9
SMALL = "--n_layer=1 --n_head=2 --n_embd=32 --block_size=64 --batch_size=4 --eval_steps=2 --device=cpu".split()


@pytest.fixture(scope="session")
def stories(tmp_path_factory):
    return prepare(stories=400, root=tmp_path_factory.mktemp("data"))


@pytest.fixture
def start(stories, tmp_path, monkeypatch):
    """Start a run of a small model on a few stories in tmp_path/out; returns that folder."""

    def start(*flags):
        train.Run(train.parse_arguments([f"--data={stories}", f"--out={tmp_path / 'out'}", *flags])).train()
        return tmp_path / "out"

    return start


def log_of(out):
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k != "tokens_per_second"} for entry in entries]


@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=30), length=st.integers(1, 25))
@settings(max_examples=200, deadline=None)
def test_rows_hold_every_token_once_and_begin_with_stories(lengths, length):
    tokens = np.array([END] + [token for n in lengths for token in [1] * n + [END]], dtype=np.uint16)
    starts, sizes = train.story_rows(tokens, END, length)
    assert starts[0] == 0 and (starts[1:] == (starts + sizes)[:-1]).all() and starts[-1] + sizes[-1] == len(tokens) - 1
    assert sizes.min() > 0 and sizes.max() <= length
    for begin in starts:
        if tokens[begin] != END:  # only a story too long for a row is cut
            assert begin >= length and END not in tokens[begin - length + 1 : begin + 1]


@given(lengths=st.lists(st.integers(1, 30), min_size=2, max_size=20), block_size=st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_batches_ask_for_each_validation_token_once(lengths, block_size):
    tokens = np.array([END] + [token for n in lengths for token in [*range(10, 10 + n), END]], dtype=np.uint16)
    idx, targets = train.batch(tokens, *train.story_rows(tokens, END, block_size), block_size, "cpu")
    assert idx.shape == targets.shape and idx.size(1) == block_size
    assert targets[targets >= 0].tolist() == tokens[1:].tolist()
    inner = targets[:, :-1] >= 0
    assert (idx[:, 1:][inner] == targets[:, :-1][inner]).all()


def test_the_floor_is_what_the_evaluated_stories_hold(start, stories):
    flags = [f"--data={stories}", "--block_size=350", "--batch_size=2", *SMALL[:3], "--steps=1", "--device=cpu"]
    run = train.Run(train.parse_arguments(flags))
    _, floor = run.evaluate(run.model, batches=3)
    count = int(run.val_rows[1][:6].sum())
    held = int((run.story_ends <= count).sum()) - 1
    assert run.story_ends[held] == count  # rows end with stories
    assert floor == pytest.approx(sum(run.meta["val_nats"][:held]) / count)
    assert run.evaluate(run.model)[1] == pytest.approx(run.meta["floor"])


def test_the_last_lines_split_the_excess_and_compare_recall_with_guesses(start, capsys, monkeypatch):
    training, measure = [], train.recall
    monkeypatch.setattr(train, "recall", lambda model, *rest: training.append(model.training) or measure(model, *rest))
    start(*SMALL, "--block_size=320", "--steps=1", "--dropout=0.5", "--device=cpu")
    printed = capsys.readouterr().out
    assert training == [False]  # without dropout
    split = re.search(r"in 20 stories ([\d.]+) is lost at words .*, ([\d.]+) elsewhere", printed)
    lost, rest = map(float, split.groups())
    excess = float(re.search(r"^excess +([\d.]+) over", printed, re.M)[1])
    assert lost > 0.2 and lost + rest == pytest.approx(excess, abs=0.02)  # both are of all 20 validation stories
    recall, chance, copying = (float(n) for n in re.findall(r"([\d.]+)%", re.search("^recall .*", printed, re.M)[0]))
    assert 0 < chance < copying < 50 and recall < 10


def test_recall_is_not_told_where_it_cannot_be(start, stories, capsys, tmp_path):
    """No story fits into the context; the stories are of another world. The rest is printed all the same."""
    start(*SMALL, "--block_size=16", "--steps=1", "--device=cpu")
    printed = capsys.readouterr().out
    assert "no story fits into the context" in printed and "KV cache" in printed
    shutil.copytree(stories, tmp_path / "older")
    meta = json.loads((tmp_path / "older" / "meta.json").read_text())
    (tmp_path / "older" / "meta.json").write_text(json.dumps(meta | {"seed": 1}))
    start(*SMALL, "--block_size=320", "--steps=1", "--device=cpu", f"--data={tmp_path / 'older'}")
    printed = capsys.readouterr().out
    assert "another version of the world" in printed and "KV cache" in printed


def test_text_without_a_floor_is_told_in_bits_per_byte(start, tmp_path, capsys):
    text = "\n\n".join(f"The {i}th day was as long as the day before it, and as cold." for i in range(200))
    (tmp_path / "mine.txt").write_text(text)
    data = prepare(str(tmp_path / "mine.txt"), tokenizer="stories", root=tmp_path)
    out = start(*SMALL, "--block_size=64", "--steps=1", "--device=cpu", f"--data={data}")
    (entry, *_), meta = log_of(out), json.loads((data / "meta.json").read_text())
    validation = text.split("\n\n")[-meta["val_stories"] :]
    assert entry["excess"] is None and meta["val_bytes"] == sum(len(story.encode()) for story in validation)
    bits = entry["val_loss"] / np.log(2) * meta["val_tokens"]
    assert entry["bits_per_byte"] == pytest.approx(bits / meta["val_bytes"])
    printed = capsys.readouterr().out
    assert "bits/B" in printed and "bits per byte of text" in printed and "recall" not in printed


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


@given(data=st.data())
@settings(max_examples=4, deadline=None)
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(stories, tmp_path_factory, data):
    """Stop by Ctrl-C at any step, resume: bit for bit the weights, optimizer, log, spectra of a run that is not."""
    steps, interval = 7, data.draw(st.integers(1, 8))
    stop_at = data.draw(st.integers(0, steps - 1))
    accumulate = data.draw(st.integers(1, 2))
    ends = {}
    for name in ("whole", "stopped"):
        out = tmp_path_factory.mktemp(name)
        flags = [
            f"--data={stories}",
            f"--out={out}",
            *SMALL,
            "--dropout=0.2",
            f"--grad_accum={accumulate}",
            "--attn=mla_rope",
        ]
        run = train.Run(train.parse_arguments([*flags, f"--steps={steps}", f"--eval_interval={interval}"]))
        if name == "stopped":
            real_step = run.step

            def step_and_stop(step, real_step=real_step):
                real_step(step)
                if step == stop_at:
                    signal.raise_signal(signal.SIGINT)

            run.step = step_and_stop
        run.train()
        if name == "stopped" and stop_at < steps - 1:
            assert torch.load(out / "last.pt", weights_only=True)["step"] == stop_at + 1
            train.Run(train.parse_arguments([f"--out={out}", "--resume"])).train()
        ends[name] = torch.load(out / "last.pt", weights_only=True), (log_of(out), (out / "spectrum.jsonl").read_text())
    (whole, whole_log), (stopped, stopped_log) = ends["whole"], ends["stopped"]
    assert whole_log == stopped_log
    assert whole["step"] == stopped["step"] == steps and whole["best"] == stopped["best"]
    assert all(torch.equal(whole["model"][name], weight) for name, weight in stopped["model"].items())
    for i, moments in whole["optimizer"]["state"].items():
        assert all(torch.equal(moments[name], stopped["optimizer"]["state"][i][name]) for name in moments)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_best_model(start, tmp_path):
    out = start(*SMALL, "--steps=4", "--eval_interval=2")
    best = (out / "ckpt.pt").read_bytes()
    with pytest.raises(FloatingPointError, match="step .*gradient norm.*--lr"):
        start(*SMALL, "--steps=40", "--eval_interval=100", "--lr=1e20", "--warmup=0", "--grad_clip=1e30")
    assert (out / "previous-1" / "ckpt.pt").read_bytes() == best  # of the run before
    assert all(weight.isfinite().all() for weight in load_checkpoint(out / "ckpt.pt")[1]["model"].values())


def test_a_crash_while_saving_leaves_the_old_checkpoint(start, monkeypatch):
    out = start(*SMALL, "--steps=2")
    before = (out / "last.pt").read_bytes()

    def full_disk(checkpoint, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError):
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
        ("--rank=0", "rank"),
        ("--attn=mla --rank=1.5", "(0, 1]"),
        ("--attn=mha --rank=0.5", "rank"),
        ("--attn=mla --rank=half", "rank"),
        ("--attn=mha --joint", "joint"),
        ("--attn=mla_prerope --joint", "mla_decoupled"),
        ("--n_head=3", "n_head"),
        ("--attn=mla_decoupled --rope_dim=3", "rope_dim"),
        ("--attn=gqa --rank=0.3", "rank"),
        ("--steps=0", "steps"),
        ("--lr=nan", "lr"),
        ("--lr=-1", "lr"),
        ("--dropout=1", "dropout"),
        ("--size=7b", "30m"),
        ("--step=10", "--step"),
        ("--device=warp", "warp"),
        ("--device=cuda:77", "cuda:77"),
        ("--data=/nowhere", "/nowhere"),
        ("--block_size=10000000", "block_size"),
        ("--block_size=4", "block_size"),
        ("--seed=10000000000000000000000000", "seed"),
        ("--device=meta", "meta"),
        ("--resume", "last.pt"),
    ],
)
def test_wrong_flags_end_in_one_line_and_status_2(flags, says, stories, tmp_path, call):
    out = tmp_path / "out"
    arguments = [f"--data={stories}", f"--out={out}", "--n_layer=1", *flags.split()]
    status, _, line = call(train.main, *arguments)
    assert status == 2 and line.count("\n") == 1 and says in line and not out.exists()


@pytest.mark.parametrize("flags, says", [("--attn=mla", "attn=mha_rope"), ("--steps=9", "steps=2"), ("--lr=1", "lr=")])
def test_resuming_with_another_configuration_is_refused(start, flags, says, call):
    out = start(*SMALL, "--steps=2")
    status, _, line = call(train.main, f"--out={out}", "--resume", *flags.split())
    assert status == 2 and line.count("\n") == 1 and says in line


def test_resuming_on_other_data_is_refused(start, stories, tmp_path, call):
    data = tmp_path / "copy"
    shutil.copytree(stories, data)
    out = start(*SMALL, f"--data={data}", "--steps=2")
    meta = json.loads((data / "meta.json").read_text())
    (data / "meta.json").write_text(json.dumps(meta | {"seed": 5}))
    status, _, line = call(train.main, f"--out={out}", "--resume")
    assert status == 2 and str(data) in line


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["nowhere.pt"], "nowhere.pt"),
        ([__file__], "not a checkpoint"),
        (["CKPT", "--prompt=" + "word " * 80], "over a context of 64"),
        (["CKPT", "--temperature=-1"], "temperature"),
        (["CKPT", "--temperature=nan"], "temperature"),
        (["CKPT", "--top_k=0"], "top_k"),
        (["CKPT", "--tokens=-1"], "tokens"),
        (["CKPT", "--seed=one"], "seed"),
        (["CKPT", "--tokens=many"], "tokens"),
        ([], "checkpoint"),
    ],
)
def test_wrong_questions_to_a_model_end_in_one_line(start, arguments, says, call):
    out = start(*SMALL, "--steps=1") if "CKPT" in arguments else None
    arguments = [out / "ckpt.pt" if word == "CKPT" else word for word in arguments]
    status, _, line = call(model.main, *arguments)
    assert status == 2 and line.count("\n") == 1 and says in line


@pytest.mark.parametrize(
    "arguments, says, expected",
    [
        (["nowhere.txt"], "nowhere.txt", 2),
        (["--stories=1"], "stories", 2),
        (["--stories=many"], "stories", 2),
        (["--tokenizer=gpt5"], "gpt2", 2),
        (["tinystories", "--tokenizer=stories"], "pip install datasets", 2),
    ],
)
def test_wrong_data_ends_in_one_line(arguments, says, expected, call, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # not installed
    status, _, err = call(prep.main, *arguments)
    assert status == expected and says in err.splitlines()[-1] and "Traceback" not in err


def test_deepseek_v2_trains_and_speaks_without_a_warning(stories, tmp_path, call):
    """All options of the latents, in bfloat16 by autocast, too: spectra are taken on the way."""
    options = ["--attn=mla_decoupled", "--joint", "--latent_norm", "--q_rank=0.5", "--steps=2", "--dtype=bfloat16"]
    status, told, err = call(train.main, *SMALL, *options, f"--data={stories}", f"--out={tmp_path}")
    assert status == 0 and "KV cache" in told and not err, err
    assert call(model.main, tmp_path / "ckpt.pt")[0] == 0


def test_a_script_speaks_without_error_if_nothing_is_wrong(start, call):
    out = start(*SMALL, "--steps=1")
    for options in ([], ["--prompt="], ["--seed=-1", "--top_k=5"]):
        status, told, err = call(model.main, out / "ckpt.pt", "--prompt=One day", "--tokens=5", *options)
        assert status == 0 and told.startswith("One day" if "--prompt=" not in options else "") and not err
