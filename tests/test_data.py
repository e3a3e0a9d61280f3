"""The story world: its entropy, its words, what a reader must remember, and its tokenizer."""

import itertools
import math
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from conftest import call
from hypothesis import given, settings
from hypothesis import strategies as st

from data import stories
from data.common import load_tokenizer
from data.stories import EVENTS, LISTS, Author, locate, parse, words_of

seeds = st.integers(0, 2**31)
ROOT = Path(__file__).parent.parent
TOKENIZER = load_tokenizer("stories")


class Forger(Author):
    """Makes the same choices as Author, except one."""

    def __init__(self, seed, index, forge=None):
        self.made, self.forge, self.forged = 0, forge, False
        super().__init__(seed, index)

    def choose(self, options, about="plot"):
        choice, this = super().choose(options, about), self.made
        self.made += 1
        if this != self.forge or len(options) == 1:
            return choice
        self.forged = True
        return options[(list(options).index(choice) + 1) % len(options)]


@given(seed=seeds, index=seeds)
@settings(max_examples=50)
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


# Entropy


class Open(Exception):
    """Raised where a script ends, with the options that may be chosen next."""


class Scripted(Author):
    """Follows a script of choices, then raises Open with the options that could still lead to the text."""

    def __init__(self, script, text):
        self.script, self.goal = iter(script), text
        super().__init__(0, 0)

    def choose(self, options, about="plot"):
        self.spent[about] += math.log(len(options))
        choice = next(self.script, None)
        if choice is not None:
            return options[choice]
        if not self.goal.lower().startswith(self.draft.replace("\n", " ").lower()):
            raise Open([])

        def shows(word):  # whatever is cast is told
            return not isinstance(word, stories.Word) or any(
                w.lower() in self.goal.lower() for w in (word, getattr(word, "past", word))
            )

        raise Open([i for i, option in enumerate(options) if about != "cast" or shows(option)])


@pytest.mark.parametrize("index", range(12))
def test_the_text_alone_gives_back_the_choices_and_their_probability(index):
    """Search for all sequences of choices that tell a text: there is one, with the nats that the author counted."""
    story = Author(3, index)
    scripts, nats = [[]], []
    while scripts:
        script = scripts.pop()
        try:
            told = Scripted(script, story.text)
        except Open as reached:
            scripts += [[*script, i] for i in reached.args[0]]
        else:
            nats += [told.nats] if told.text == story.text else []
    assert nats == [pytest.approx(story.nats)]


@given(seed=seeds, data=st.data())
@settings(max_examples=300)
def test_every_choice_shows_in_the_text(seed, data):
    """So different choices give different texts, and the sum of -log p is the information content of the text."""
    story = Forger(seed, 0)
    other = Forger(seed, 0, data.draw(st.integers(0, story.made - 1)))
    assert not other.forged or other.text != story.text


def test_all_options_of_a_choice_differ():
    def alternatives(parts):
        for part in parts:
            if type(part) is list:
                yield part
                for option in part:
                    yield from alternatives(option)

    for name, (_, lines) in EVENTS.items():
        assert len(set(lines)) == len(lines), name
        for options in itertools.chain.from_iterable(alternatives(parse(line)) for line in lines):
            assert all(one != other for one, other in itertools.combinations(options, 2)), (name, options)
    for name, words in LISTS.items():
        assert len(set(words)) == len(words), name
        forms = [word.past for word in words if hasattr(word, "past")]
        assert len(set(forms)) == len(forms), name
    assert not set(LISTS["girl"]) & set(LISTS["boy"])


def test_a_sentence_is_told_by_one_event_only():
    """What is said has one meaning: the same words never come from two events, nor from one with different casts."""
    meanings = defaultdict(set)
    for index in range(3000):
        story = Author(0, index)
        for told, (event, cast) in zip(story.draft.split("\n"), story.events, strict=True):
            event = "fun" if event == "replay" else event  # the same, of something proposed before
            named = sorted((slot, str(word)) for slot, word in cast.items() if word in told)  # not by a pronoun
            meanings[told].add((event, *named))
    assert len(meanings) > 10_000
    assert [told for told, meaning in meanings.items() if len(meaning) > 1] == []


def test_a_story_that_contradicts_its_state_is_not_told():
    story, tool, spot = Author(0, 0), LISTS["tool"][0], LISTS["spot in the park"][0]
    story.state[tool, "at"] = "behind the barn"
    with pytest.raises(AssertionError, match=f"{tool} at {spot}"):
        story.say("fetch_tool", tool=tool, spot=spot, child=story.cast["hero"], helper=LISTS["helper in the park"][0])


# Memory


@given(seed=seeds, data=st.data())
@settings(max_examples=300)
def test_no_other_word_of_its_category_can_stand_in_for_a_determined_word(seed, data):
    """Change one choice: the text may go on differently at a determined word, but never with a rival of that word."""
    story = Forger(seed, 0)
    other = Forger(seed, 0, data.draw(st.integers(0, story.made - 1))).text
    same = len(os.path.commonprefix([story.text, other]))
    for word in story.determined:
        if word.start <= same < word.end:
            rest = other[word.start :].lower()
            rivals = [str(w.form(word.form)).lower() for w in words_of(word.category)]
            assert not any(re.match(re.escape(rival) + r"\b", rest) for rival in rivals), (story.text, other)


@given(seed=seeds)
@settings(max_examples=100)
def test_determined_words_were_told_before(seed):
    story = Author(seed, 0)
    tokens, places = locate(story, TOKENIZER)
    assert tokens == TOKENIZER.encode_ordinary(story.text) and len(places) == len(story.determined) > 0
    for word, (place, distance) in zip(story.determined, places, strict=True):
        written = story.text[word.start : word.end]
        assert TOKENIZER.decode(tokens[place:]).strip().startswith(written)
        assert written.lower() in {w.form(word.form).lower() for w in words_of(word.category)}
        assert not (word.asked and written == story.cast["hero"])  # who is named all the time
        if word.category == "name":  # counted in the text
            names = {str(name) for name in words_of("name")}
            assert word.used == len(names & set(re.findall(r"\w+", story.text[: word.end])))
        assert 0 < distance <= place and word.last <= word.start and 1 <= word.used <= len(words_of(word.category))
        # The word, or a form of it, ends where it was last said.
        before, answer = (text.lower().replace("swam", "swim") for text in (story.text[: word.last], written))
        assert before == TOKENIZER.decode(tokens[: place - distance]).lower().replace("swam", "swim")
        assert answer.split()[-1][:4] in before[-40:] or answer.split()[0][:3] in before[-40:]


def test_recall_is_worth_something_and_stories_keep_to_their_length():
    """What a study of caches needs, and what a context of 320 tokens holds."""
    said = "\n".join(stories.floor_report(0, 1000, TOKENIZER))
    mean, longest = map(int, re.search(r"of (\d+)\.\d tokens on average, (\d+) at most", said).groups())
    apart = float(re.search(r"^([\d.]+) is the gain from telling", said, re.M)[1])
    far = float(re.search(r"^([\d.]+) is the gain from recalling", said, re.M)[1])
    assert 160 <= mean <= 215 and longest <= 320 and apart >= 0.10 and far >= 0.03


def test_5000_stories_all_differ_and_use_1500_words_and_every_plot():
    told = [Author(0, index) for index in range(5000)]
    words = Counter(word for story in told for word in re.findall(r"[a-z]+", story.text.lower()))
    assert len(words) >= 1500 and len({story.text for story in told}) == len(told)
    lengths = [len(TOKENIZER.encode_ordinary(story.text)) for story in told]
    assert 80 <= min(lengths) and max(lengths) < 320
    assert {story.plot for story in told} == set(stories.PLOTS)


# The tokenizer


@given(text=st.text())
@settings(max_examples=200)
def test_the_tokenizer_gives_back_any_text(text):
    assert TOKENIZER.decode(TOKENIZER.encode_ordinary(text)) == text


def test_every_word_of_the_stories_is_a_token():
    for index in range(500):
        text = Author(2, index).text
        assert len(TOKENIZER.encode_ordinary(text)) == len(re.findall(r" ?[A-Za-z]+| ?[^\w\s]+", text))
    assert TOKENIZER.eot_token == TOKENIZER.n_vocab - 1


def test_the_vocabulary_is_what_its_command_makes(tmp_path, monkeypatch):
    made = tmp_path / "stories.tiktoken"
    monkeypatch.setattr(stories, "VOCABULARY", made)
    status, out, err = call(stories.main, "vocabulary")
    assert status == 0 and made.read_bytes() == (ROOT / "data" / "stories.tiktoken").read_bytes(), err


def test_the_parts_of_the_floor_are_printed():
    status, out, err = call(stories.main, "floor", "20")
    assert status == 0 and "is the floor: " in out and "telling such words apart" in out
    assert call(stories.main, "floor", "0")[0] == 2
