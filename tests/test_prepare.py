"""The preparation of data: from stories, files and TinyStories to tokens."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken

from data import prepare as prep
from data.common import END, InputError, load_data, load_tokenizer
from data.prepare import prepare
from data.stories import Author

ROOT = Path(__file__).parent.parent
TOKENIZER = load_tokenizer("stories")
STORIES = ["One day.\nIt rained.", 'Two "cats" sat.', f"Three is not {END} the end.", "Vier Bären, 猫.", "Five."]


def own(path, **options):
    """Prepare a file, in the folder where it lies."""
    return prepare(str(path), tokenizer="stories", root=path.parent, **options)


def texts(tokens, tokenizer=TOKENIZER):
    ends = np.flatnonzero(tokens == tokenizer.eot_token)
    return [tokenizer.decode(story[1:].tolist()) for story in np.split(np.asarray(tokens), ends)[1:-1]]


def write_jsonl(path, stories):
    path.write_text("".join(json.dumps({"text": story, "id": i}) + "\n" for i, story in enumerate(stories)))
    return path


def write_parquet(path, stories, column="text"):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({column: stories}), path)
    return path


@pytest.fixture
def datasets():
    """The real package, or the test is skipped."""
    return pytest.importorskip("datasets")


@pytest.fixture
def stand_in(monkeypatch):
    """A module in the place of `datasets`. It reads whatever is in `rows`, and raises exceptions in it."""
    rows = {}

    def load_dataset(path, split, streaming, **_):
        assert streaming
        for row in rows[split]:
            if isinstance(row, Exception):
                raise row
            yield row

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare(stories=300, root=tmp_path_factory.mktemp("data"))


def test_prepared_stories_hold_what_their_authors_wrote(folder):
    meta, train, val = load_data(folder)
    assert meta["tokenizer"] == TOKENIZER.name and meta["end"] == TOKENIZER.eot_token
    assert train[0] == train[-1] == val[0] == val[-1] == TOKENIZER.eot_token
    stories = [Author(0, index) for index in range(300)]
    assert texts(train) + texts(val) == [story.text for story in stories]
    assert not set(texts(train)) & set(texts(val))
    assert meta["val_stories"] == len(texts(val)) == 15
    assert meta["val_nats"] == pytest.approx([story.nats for story in stories[285:]])
    assert meta["floor"] == pytest.approx(sum(meta["val_nats"]) / (len(val) - 1))
    assert meta["val_bytes"] == sum(len(story.text.encode()) for story in stories[285:])


def test_another_seed_gives_other_stories(folder, tmp_path):
    _, train, _ = load_data(prepare(stories=40, seed=1, root=tmp_path))
    assert texts(train)[0] == Author(1, 0).text


def test_preparing_again_does_nothing(tmp_path, capsys):
    made = prepare(stories=40, root=tmp_path)
    before = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    assert prepare(stories=40, root=tmp_path) == made and "is ready" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in made.iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["stories"]


@pytest.mark.parametrize("other", [dict(stories=41), dict(seed=1), dict(tokenizer="gpt2")])
def test_other_arguments_under_a_taken_name_are_refused(tmp_path, monkeypatch, other):
    made = prepare(stories=40, root=tmp_path)
    monkeypatch.setattr(prep, "load_tokenizer", lambda name: SimpleNamespace(name=name))  # gpt2 needs a network
    before = {path: path.read_bytes() for path in made.iterdir()}
    with pytest.raises(InputError) as error:
        prepare(**{"stories": 40, "root": tmp_path} | other)
    for part in (str(made), "source=stories", "stories=40", "tokenizer=", "seed=0", "delete or rename"):
        assert part in str(error.value)
    assert before == {path: path.read_bytes() for path in made.iterdir()}


def test_a_world_that_has_changed_since_is_named(tmp_path):
    made = prepare(stories=40, root=tmp_path)
    meta = json.loads((made / "meta.json").read_text())
    (made / "meta.json").write_text(json.dumps(meta | {"world": "of old"}))
    with pytest.raises(InputError, match="made by another version of the world"):
        prepare(stories=40, root=tmp_path)


def test_a_file_that_has_changed_since_is_refused(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("One.\n\nTwo.")
    own(file)
    file.write_text("One.\n\nThree.")
    with pytest.raises(InputError, match="source=mine.txt.*made from another text.*delete or rename"):
        own(file)


def test_all_formats_give_the_same_bytes(tmp_path, datasets):
    stories = [story for story in STORIES if END not in story]
    made = []
    for suffix in ("txt", "jsonl", "parquet"):
        (tmp_path / suffix).mkdir()
        file = tmp_path / suffix / "a[1] *.txt"  # a name that could be taken for a pattern
        file = file.with_suffix("." + suffix)
        if suffix == "txt":
            file.write_text("\n\n".join(stories), encoding="utf-8")
        else:
            padded = ["", *(f"\n{story} " for story in stories), "  "]
            (write_jsonl if suffix == "jsonl" else write_parquet)(file, padded)
        made.append(own(file))
    for name in ("train.bin", "val.bin"):
        assert len({(folder / name).read_bytes() for folder in made}) == 1
    assert texts(load_data(made[0])[1]) + texts(load_data(made[0])[2]) == stories


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_become_stories(tmp_path, stand_in, suffix):
    stand_in["train"] = [{"text": text, "other": 1} for text in ("", *STORIES, " \n")]
    (tmp_path / "mine").with_suffix(suffix).write_text("read by the stand-in")
    meta, train, val = load_data(own((tmp_path / "mine").with_suffix(suffix)))
    assert texts(train) + texts(val) == STORIES  # even the one that has <|endoftext|> in its text
    assert meta["val_stories"] == 1 and meta["val_bytes"] == len(STORIES[-1].encode())
    assert meta["floor"] is None and meta["val_nats"] is None


@pytest.mark.parametrize("row", [{"words": "One."}, {"text": None}, {"text": 3}, ValueError("bad"), OSError("bad")])
def test_rows_without_text_are_an_input_error(tmp_path, stand_in, row):
    stand_in["train"] = [{"text": "One."}, {"text": "Two."}, row]
    (tmp_path / "mine.jsonl").write_text("read by the stand-in")
    with pytest.raises(InputError, match="bad" if isinstance(row, Exception) else "mine.jsonl.*row 3.*`text`"):
        own(tmp_path / "mine.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.jsonl"]


@pytest.mark.parametrize("damage", ["cut", "middle", "no text", "numbers", "empty"])
def test_an_unusable_parquet_is_an_input_error(tmp_path, datasets, damage):
    file = write_parquet(tmp_path / "mine.parquet", STORIES, "words" if damage == "no text" else "text")
    content = file.read_bytes()
    if damage == "numbers":
        write_parquet(file, [1, 2, 3])
    elif damage != "no text":
        file.write_bytes({"cut": content[:-9], "middle": content[:4] + bytes(40) + content[44:], "empty": b""}[damage])
    with pytest.raises(InputError, match="mine.parquet"):
        own(file)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.parquet"]


@pytest.mark.parametrize("content", [b'{"t": "a"}\n', b'{"text": 1}\n', b'{"text":\n', b'{"text": "\xff"}\n', b""])
def test_an_unusable_jsonl_is_an_input_error(tmp_path, datasets, content):
    (tmp_path / "mine.jsonl").write_bytes(content)
    with pytest.raises(InputError, match="mine.jsonl"):
        own(tmp_path / "mine.jsonl")


def test_without_datasets_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets"):
        own(write_jsonl(tmp_path / "mine.jsonl", STORIES))


@pytest.mark.parametrize(
    "text", ["One day.\n\nTwo cats.\r\n \r\nThree.", "One day.<|endoftext|>\nTwo cats.<|endoftext|>Three.<|endoftext|>"]
)
def test_your_own_text_is_split_into_stories(tmp_path, text):
    (tmp_path / "mine.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())  # with a byte-order mark
    _, train, val = load_data(own(tmp_path / "mine.txt"))
    assert texts(train) == ["One day.", "Two cats."] and texts(val) == ["Three."]


def test_blank_lines_belong_to_a_story_where_end_of_text_separates(tmp_path):
    (tmp_path / "mine.txt").write_text(f"One.\n\nStill one.\n{END}\nTwo.")
    _, train, val = load_data(own(tmp_path / "mine.txt"))
    assert texts(train) == ["One.\n\nStill one."] and texts(val) == ["Two."]


def test_a_single_long_text_is_cut_near_its_end(tmp_path):
    text = " ".join(f"word{i}" for i in range(100))
    (tmp_path / "book.txt").write_text(text)
    _, train, val = load_data(own(tmp_path / "book.txt"))
    assert texts(train)[0] + texts(val)[0] == text and texts(val)[0].startswith(" word")
    assert len(val) < len(train) / 10


def test_no_more_stories_are_read_than_asked_for(tmp_path):
    (tmp_path / "mine.txt").write_text("\n\n".join(f"Story {i}." for i in range(100)))
    meta, train, val = load_data(own(tmp_path / "mine.txt", stories=40))
    assert texts(train) + texts(val) == [f"Story {i}." for i in range(40)] and meta["val_stories"] == 2


def test_a_txt_is_never_in_memory_as_a_whole(tmp_path):
    """Of 20 MB, all stories are read, with 2 MB of memory."""
    (tmp_path / "mine.txt").write_text("\n\n".join(f"Story {i}." + "x" * 20_000 for i in range(1000)))
    tracemalloc.start()
    try:
        count = sum(1 for _ in prep.read_stories(str(tmp_path / "mine.txt")))
        assert count == 1000 and tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("end", ["\n\n", f"\n{END}\n"])
def test_text_that_is_not_utf8_is_an_input_error_with_its_line(tmp_path, end):
    (tmp_path / "mine.txt").write_bytes(f"One.{end}Two.{end}".encode() + b"caf\xe9\n")
    line = 1 + f"One.{end}Two.{end}".count("\n")
    with pytest.raises(InputError, match=f"mine.txt: line {line} is not UTF-8"):
        own(tmp_path / "mine.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "name, content", [("none.txt", None), ("utf16.txt", b"\xff\xfe\x00"), ("short.txt", b"Word"), ("empty.txt", b""),
                      ("table.csv", b"a,b"), ("story", None)]
)  # fmt: skip
def test_an_unusable_file_is_an_input_error_that_names_it(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        own(tmp_path / name)


@pytest.mark.parametrize("name", ["..txt", "...txt", "stories.txt", "tinystories.jsonl"])
def test_names_that_would_reach_other_folders_are_refused(tmp_path, name):
    (tmp_path / name).write_text("One.\n\nTwo.")
    with pytest.raises(InputError, match="rename"):
        own(tmp_path / name)


@pytest.mark.parametrize("count", [1, 0, -5])
def test_too_few_stories_are_refused(tmp_path, count):
    with pytest.raises(InputError, match=f"--stories={count}"):
        prepare(stories=count, root=tmp_path)


def test_a_tokenizer_with_too_many_tokens_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: SimpleNamespace(n_vocab=100_277, name=name))
    with pytest.raises(InputError, match="cl100k_base.*65,536"):
        prepare(stories=40, tokenizer="cl100k_base", root=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_whose_endoftext_is_not_its_last_token_works(tmp_path, monkeypatch):
    """Also one whose <|endoftext|> is not its last token."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    special = {END: 300, "<|other|>": 301}
    other = tiktoken.Encoding("p50k_edit", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: other)
    meta, train, _ = load_data(prepare(stories=40, tokenizer="p50k_edit", root=tmp_path))
    assert (meta["tokenizer"], meta["end"], meta["vocab_size"]) == ("p50k_edit", 300, 302)
    assert texts(train, other)[0] == Author(0, 0).text


def test_tinystories_come_from_its_own_two_splits(tmp_path, stand_in):
    stand_in["train"] = ({"text": f"Train {i}."} for i in range(1000))
    stand_in["validation"] = ({"text": f"Official {i}. \ud800"} for i in range(1000))
    meta, train, val = load_data(prepare("tinystories", stories=60, tokenizer="stories", root=tmp_path))
    assert texts(train) == [f"Train {i}." for i in range(60)]
    assert texts(val) == [f"Official {i}. \ufffd" for i in range(3)]
    assert meta["val_bytes"] == sum(len(text.encode()) for text in texts(val))
    assert next(stand_in["train"])["text"] == "Train 60."  # read no further than needed


def test_tinystories_can_be_a_local_folder(tmp_path, datasets, monkeypatch):
    (tmp_path / "copy").mkdir()
    write_parquet(tmp_path / "copy" / "train-00000-of-00001.parquet", [f"Train {i}." for i in range(50)])
    write_parquet(tmp_path / "copy" / "validation-00000-of-00001.parquet", [f"Official {i}." for i in range(9)])
    monkeypatch.setattr(prep, "TINYSTORIES", str(tmp_path / "copy"))
    _, train, val = load_data(prepare("tinystories", stories=40, tokenizer="stories", root=tmp_path))
    assert texts(train) == [f"Train {i}." for i in range(40)] and texts(val) == ["Official 0.", "Official 1."]


@pytest.mark.parametrize("failure", [ConnectionError("no network"), RuntimeError("of the HTTP client")])
def test_a_download_that_fails_is_an_os_error_and_leaves_nothing_behind(tmp_path, stand_in, failure):
    stand_in["train"] = [{"text": "One."}, failure]
    stand_in["validation"] = [{"text": "Two."}]
    with pytest.raises(OSError, match=str(failure)):
        prepare("tinystories", stories=2, tokenizer="stories", root=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_files_is_never_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    source = tmp_path / "mine" / "mine.txt"
    source.write_text("One.\n\nTwo.")
    with pytest.raises(InputError, match="mine.txt"):
        prepare(str(source), tokenizer="stories", root=tmp_path)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("damage", ["{", "[]", None])
def test_a_damaged_folder_is_made_again(tmp_path, damage):
    folder = prepare(stories=20, root=tmp_path)
    whole = (folder / "train.bin").read_bytes()
    (folder / "meta.json").write_text(damage) if damage else (folder / "train.bin").unlink()
    assert (prepare(stories=20, root=tmp_path) / "train.bin").read_bytes() == whole
    load_data(folder)


def test_a_failure_while_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("One.\n\nTwo.\n\nThree.")

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prep.json, "dumps", fail)
    with pytest.raises(OSError):
        own(tmp_path / "mine.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("stop, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_leaves_nothing_behind(tmp_path, stop, status):
    """Stopped, with its workers, as by Ctrl-C: no traceback, and no half-made folder."""
    code = f"from data.prepare import prepare, run; run(lambda: prepare(stories=10**6, root={str(tmp_path)!r}))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("train.bin")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.3)  # until the workers are at work
    os.killpg(process.pid, stop) if stop == signal.SIGINT else process.send_signal(stop)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "damage", ["no meta", "meta is not JSON", "truncated", "odd length", "empty", "token out of range", "a story less"]
)
def test_a_damaged_data_folder_is_an_input_error_that_names_it(tmp_path, damage):
    folder = prepare(stories=20, root=tmp_path)
    val = folder / "val.bin"
    if damage == "no meta":
        (folder / "meta.json").unlink()
    elif damage == "meta is not JSON":
        (folder / "meta.json").write_text("{")
    elif damage == "token out of range":
        val.write_bytes(b"\xff\xff" + val.read_bytes()[2:])
    elif damage == "a story less":
        tokens = np.fromfile(folder / "train.bin", np.uint16)
        tokens[-1] = 0
        tokens.tofile(folder / "train.bin")
    else:
        keep = {"truncated": -2, "odd length": -1, "empty": -val.stat().st_size}[damage]
        val.write_bytes(val.read_bytes()[:keep])
    with pytest.raises(InputError, match=re.escape(str(folder))):
        load_data(folder)
