"""The story world, its tokenizer, and the preparation of data."""

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import prepare as prep
from data.prepare import load_data, load_tokenizer, prepare
from data.stories import EVENTS, LISTS, Author, learn_bpe

seeds = st.integers(0, 2**31)
ROOT = Path(__file__).parent.parent
TOKENIZER = load_tokenizer("stories")


class Forger(Author):
    """Makes the same choices as Author, but for one."""

    def __init__(self, seed, index, forge=None):
        self.made, self.forge, self.forged = 0, forge, False
        super().__init__(seed, index)

    def choose(self, options):
        choice, this = super().choose(options), self.made
        self.made += 1
        if this != self.forge or len(options) == 1:
            return choice
        self.forged = True
        return options[(list(options).index(choice) + 1) % len(options)]


@given(seed=seeds, index=seeds)
@settings(max_examples=50, deadline=None)
def test_a_story_depends_on_seed_and_index_alone(seed, index):
    story, again = Author(seed, index), Author(seed, index)
    assert (story.text, story.nats, story.events) == (again.text, again.nats, again.events)
    assert story.text not in (Author(seed, index + 1).text, Author(seed + 1, index).text)
    assert 0 < story.nats < math.inf


def test_a_story_is_the_same_in_another_process():
    """Python randomizes the order of sets of strings; stories must not notice."""
    command = [sys.executable, "data/stories.py", "tell", "3", "--seed=5"]
    told = [
        subprocess.run(
            command, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert told[0] == told[1] and " ".join(told[0].split()).startswith(Author(5, 0).text)


@given(seed=seeds, data=st.data())
@settings(max_examples=300, deadline=None)
def test_every_choice_shows_in_the_text(seed, data):
    """So different choices give different texts, and the sum of -log p is the information content of the text."""
    story = Forger(seed, 0)
    other = Forger(seed, 0, data.draw(st.integers(0, story.made - 1)))
    assert not other.forged or other.text != story.text


def test_a_sentence_is_told_by_one_event_only():
    """What is said has one meaning: the same words never come from two events, nor from one with different casts."""
    meanings = defaultdict(set)
    for index in range(3000):
        story = Author(0, index)
        for told, (event, cast) in zip(story.told, story.events, strict=True):
            event = "fun" if event == "play" else event  # the same, of something proposed before
            named = sorted((slot, str(word)) for slot, word in cast.items() if word in told)  # not by a pronoun
            meanings[told].add((event, *named))
    assert len(meanings) > 10_000
    assert [told for told, meaning in meanings.items() if len(meaning) > 1] == []


def test_words_are_listed_once():
    for name, words in LISTS.items():
        assert len(set(words)) == len(words), name
        forms = [word.past for word in words if hasattr(word, "past")]
        assert len(set(forms)) == len(forms), name
    assert not set(LISTS["girl"]) & set(LISTS["boy"])


def test_a_story_that_contradicts_its_state_is_not_told():
    story = Author(0, 0)
    story.cast.update(thing="drum", spot="under the bench", hero=story.cast["hero"])
    story.state["drum", "at"] = "behind the barn"
    with pytest.raises(AssertionError, match="drum at under the bench"):
        story.recall_or_set([("thing", "at", "spot", "?")])


def test_the_world_is_rich_and_its_stories_are_of_the_promised_length():
    stories = [Author(0, index) for index in range(5000)]
    words = Counter(word for story in stories for word in re.findall(r"[a-z]+", story.text.lower()))
    assert len(words) >= 1500
    lengths = [len(TOKENIZER.encode_ordinary(story.text)) for story in stories]
    assert 80 <= min(lengths) and max(lengths) <= 350 and 160 <= np.mean(lengths) <= 220
    assert len({story.text for story in stories}) == len(stories)


def test_most_stories_recall_something_from_long_ago():
    """A fact is recalled 50 words or more after it was told."""
    far = 0
    for index in range(500):
        story, told_at, words, longest = Author(1, index), {}, 0, 0
        for told, (event, cast) in zip(story.told, story.events, strict=True):
            for subject, relation, _, mode in EVENTS[event][0]:
                key = (cast.get(subject, subject), relation)
                if mode == "?" and key in told_at:
                    longest = max(longest, words - told_at[key])
                elif mode not in "?!":
                    told_at[key] = words
            words += len(told.split())
        far += longest >= 50
    assert far > 400


@given(text=st.text())
@settings(max_examples=200, deadline=None)
def test_the_tokenizer_gives_back_any_text(text):
    assert TOKENIZER.decode(TOKENIZER.encode_ordinary(text)) == text


def test_stories_are_mostly_whole_words():
    tokens = [token for index in range(200) for token in TOKENIZER.encode_ordinary(Author(2, index).text)]
    letters = [TOKENIZER.decode_single_token_bytes(token) for token in tokens]
    assert np.mean([bool(re.fullmatch(rb"( ?[A-Za-z]+| ?\W+)", piece)) for piece in letters]) > 0.99
    assert max(tokens) < TOKENIZER.eot_token == TOKENIZER.n_vocab - 1


@given(text=st.text("abc ", min_size=1, max_size=60))
@settings(max_examples=50, deadline=None)
def test_bpe_merges_until_every_piece_is_a_token(text):
    pieces = Counter(re.findall(r" ?[abc]+|\s+", text))
    ranks = learn_bpe(pieces, 10_000)
    assert sorted(ranks.values()) == list(range(len(ranks)))
    assert all(piece.encode() in ranks for piece in pieces)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare(stories=300, root=tmp_path_factory.mktemp("data"))


def test_prepared_stories_hold_what_their_authors_wrote(folder):
    meta, train, val = load_data(folder)
    assert meta["tokenizer"] == TOKENIZER.name
    texts = {}
    for name, tokens in (("train", train), ("val", val)):
        assert tokens[0] == tokens[-1] == TOKENIZER.eot_token
        texts[name] = TOKENIZER.decode(tokens[1:-1].tolist()).split(prep.END)
    stories = [Author(0, index) for index in range(300)]
    assert texts["train"] + texts["val"] == [story.text for story in stories]
    assert not set(texts["train"]) & set(texts["val"])
    assert meta["val_stories"] == len(texts["val"]) == 15
    assert meta["val_nats"] == pytest.approx([story.nats for story in stories[285:]])
    assert meta["floor"] == pytest.approx(sum(meta["val_nats"]) / (len(val) - 1))


def test_preparing_again_does_nothing_and_other_arguments_replace(folder, tmp_path):
    made = prepare(stories=40, root=tmp_path)
    before = (made / "train.bin").stat().st_mtime_ns
    assert prepare(stories=40, root=tmp_path) == made and (made / "train.bin").stat().st_mtime_ns == before
    prepare(stories=40, seed=1, root=tmp_path)
    assert json.loads((made / "meta.json").read_text())["seed"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["stories"]


@pytest.mark.parametrize(
    "text", ["One day.\n\nTwo cats.\n \nThree.", "One day.<|endoftext|>\nTwo cats.<|endoftext|>Three."]
)
def test_your_own_text_is_split_into_stories(tmp_path, text):
    (tmp_path / "mine.txt").write_text(text)
    meta, train, val = load_data(prepare(str(tmp_path / "mine.txt"), tokenizer="stories", root=tmp_path))
    assert TOKENIZER.decode(train.tolist()) == "<|endoftext|>One day.<|endoftext|>Two cats.<|endoftext|>"
    assert TOKENIZER.decode(val.tolist()) == "<|endoftext|>Three.<|endoftext|>"
    assert meta["floor"] is None


def test_a_single_long_text_is_cut_near_its_end(tmp_path):
    text = " ".join(f"word{i}" for i in range(100))
    (tmp_path / "book.txt").write_text(text)
    _, train, val = load_data(prepare(str(tmp_path / "book.txt"), tokenizer="stories", root=tmp_path))
    assert TOKENIZER.decode(train[1:-1].tolist()) + TOKENIZER.decode(val[1:-1].tolist()) == text
    assert len(val) < len(train) / 10


def test_tinystories_is_read_no_further_than_needed(tmp_path, monkeypatch):
    (tmp_path / "remote.txt").write_text(
        "One.\nTwo.\n<|endoftext|>\nThree.\n<|endoftext|>\nFour.\n<|endoftext|>\nFive."
    )
    monkeypatch.setattr(prep, "TINYSTORIES", (tmp_path / "remote.txt").as_uri())
    meta, train, val = load_data(prepare("tinystories", stories=2, tokenizer="stories", root=tmp_path))
    text = TOKENIZER.decode(np.concatenate((train, val)).tolist())
    assert text == "<|endoftext|>One.\nTwo.<|endoftext|><|endoftext|>Three.<|endoftext|>"
    assert meta["val_stories"] == 1


@pytest.mark.parametrize("text", ["One.\n<|endoftext|>\nTwo.", ""])
def test_a_download_that_breaks_off_leaves_nothing_behind(tmp_path, monkeypatch, text):
    (tmp_path / "remote.txt").write_text(text)
    monkeypatch.setattr(prep, "TINYSTORIES", (tmp_path / "remote.txt").as_uri())
    with pytest.raises(OSError, match="of 2 stories"):
        prepare("tinystories", stories=2, tokenizer="stories", root=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["remote.txt"]


@pytest.mark.parametrize("name", ["..txt", "...txt", "stories.txt"])
def test_names_that_would_reach_other_folders_are_refused(tmp_path, name):
    (tmp_path / name).write_text("One.\n\nTwo.")
    with pytest.raises(ValueError, match="rename"):
        prepare(str(tmp_path / name), tokenizer="stories", root=tmp_path)


def test_a_folder_with_other_files_is_never_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    source = tmp_path / "mine" / "mine.txt"
    source.write_text("One.\n\nTwo.")
    with pytest.raises(ValueError, match="mine.txt"):
        prepare(str(source), tokenizer="stories", root=tmp_path)
    assert source.exists()


@pytest.mark.parametrize("damage", ["{", "[]", None])
def test_a_damaged_folder_is_made_again(tmp_path, damage):
    folder = prepare(stories=20, root=tmp_path)
    whole = (folder / "train.bin").read_bytes()
    (folder / "meta.json").write_text(damage) if damage else (folder / "train.bin").unlink()
    assert (prepare(stories=20, root=tmp_path) / "train.bin").read_bytes() == whole
    load_data(folder)


def test_without_a_network_tinystories_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(prep, "TINYSTORIES", "http://127.0.0.1:9/nothing.txt")
    with pytest.raises(OSError):
        prepare("tinystories", tokenizer="stories", root=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_while_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("One.\n\nTwo.\n\nThree.")

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prep.json, "dumps", fail)
    with pytest.raises(OSError):
        prepare(str(tmp_path / "mine.txt"), tokenizer="stories", root=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "name, content", [("none.txt", None), ("bytes.txt", b"\xff\xfe\x00"), ("short.txt", b"Word"), ("empty.txt", b"")]
)
def test_unusable_text_is_a_value_error_that_names_the_file(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        prepare(str(tmp_path / name), tokenizer="stories", root=tmp_path)


@pytest.mark.parametrize(
    "damage", ["no meta", "meta is not JSON", "truncated", "odd length", "empty", "token out of range", "a story less"]
)
def test_a_damaged_data_folder_is_a_value_error_that_names_it(tmp_path, damage):
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
    with pytest.raises(ValueError, match=re.escape(str(folder))):
        load_data(folder)
