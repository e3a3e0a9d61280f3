"""The reader of stories and its scores: what was written is read back, and damage lowers the score that it should."""

import random
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from conftest import call
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data import judge as judging
from data import stories
from data.common import END, load_data, load_tokenizer
from data.judge import Reader, consistency, copied, explain, grammar, judge, mean_and_error, recall
from data.prepare import prepare
from data.stories import Author, locate, words_of
from model import GPTConfig

seeds = st.integers(0, 2**31)
TOKENIZER = load_tokenizer("stories")


def read(text):
    return Reader(text).passages


def tokens_of(text):
    return np.array(TOKENIZER.encode_ordinary(text), dtype=np.uint16)


@given(seed=seeds)
@settings(max_examples=300)
def test_reading_recovers_what_the_writer_wrote(seed):
    story = Author(seed, 0)
    passages = read(story.text)
    wrote = [(event, {slot: str(word) for slot, word in cast.items()}) for event, cast in story.events]
    assert [(passage.event, passage.cast) for passage in passages] == wrote
    assert " ".join(passage.text for passage in passages) == story.text
    assert grammar(passages) == consistency(passages) == 10 and not [*explain(passages)]


PASSAGES = [passage.text for index in range(30) for passage in read(Author(4, index).text)]


@given(text=st.text() | st.lists(st.sampled_from(PASSAGES) | st.text(max_size=9)).map(" ".join), cut=st.integers(0, 99))
@settings(max_examples=300)
def test_reading_never_raises(text, cut):
    """Not of any characters, nor of passages from different stories, cut somewhere."""
    text = text[cut:]
    passages = read(text)
    assert 0 <= grammar(passages) <= 10 and 0 <= consistency(passages) <= 10
    assert bool([*explain(passages)]) == any(not p.parsed or not all(s.agrees for s in p.statements) for p in passages)
    assert "".join(text.split()) == "".join(passage.text.replace(" ", "") for passage in passages)


ALIKE = [words for name, words in stories.LISTS.items() if name != "small"]
ALIKE = {str(word): list(map(str, words)) for words in ALIKE for word in words} | {
    str(name): [str(other) for children in "girl boy".split() for other in stories.LISTS[children]]
    for children in "girl boy".split()
    for name in stories.LISTS[children]
}


@given(seed=seeds, share=st.floats(0, 1))
@settings(max_examples=300)
def test_reading_never_raises_when_words_are_mistaken(seed, share):
    """As weak models do: somebody else's name, some other thing or place."""
    rng, names = random.Random(seed), "|".join(sorted(map(re.escape, ALIKE), key=len, reverse=True))
    text = re.sub(
        rf"\b({names})\b",
        lambda found: rng.choice(ALIKE[found[0]]) if rng.random() < share else found[0],
        Author(seed, 0).text,
    )
    passages = read(text)
    [*explain(passages)]
    assert grammar(passages) > 5 and 0 <= consistency(passages) <= 10


@given(seed=seeds)
@settings(max_examples=100)
def test_random_words_are_no_sentences(seed):
    words = [word for index in range(20) for word in Author(seed, index).text.split()]
    random.Random(seed).shuffle(words)
    assert grammar(read(" ".join(words[:200]))) < 1


def told_of(story):
    """The passages of a story, with the capitals that they have in it."""
    return [passage.text for passage in read(story.text)]


@given(seed=seeds, data=st.data())
@settings(max_examples=100)
def test_shuffled_words_cost_grammar_in_proportion_and_nothing_else(seed, data):
    told = told_of(Author(seed, 0))
    count = data.draw(st.integers(1, len(told)))
    chosen = random.Random(seed).sample(range(len(told)), count)
    damaged = list(told)
    for i in chosen:
        words = told[i].split()
        damaged[i] = " ".join(sorted(words, key=lambda word: (word[::-1], word))).strip(".!?\"' ") + "."
    assume(all(damaged[i] != told[i] for i in chosen))
    passages = read(" ".join(damaged))
    lost = sum(len(told[i].split()) for i in chosen) / len(" ".join(told).split())
    # Where a damaged sentence ends in a word of its own, the reader is lost up to the next sentence at most.
    assert grammar(passages) == pytest.approx(10 * (1 - lost), abs=0.5 if count < len(told) else 0.3)
    # Who holds what may have changed in a damaged passage that says "they" or "it": one story in 200.
    assert sum(not statement.agrees for passage in passages for statement in passage.statements) <= 2


@given(seed=seeds, data=st.data())
@settings(max_examples=100)
def test_a_swapped_word_costs_consistency_and_nothing_else(seed, data):
    """Another color, holder or place where a fact is recalled, whether it occurs in this story or not. One alone: two
    may make another true statement."""
    story = Author(seed, 0)
    asked = [word for word in story.determined if word.asked]
    assume(asked)
    word = data.draw(st.sampled_from(asked))
    old = story.text[word.start : word.end]
    options = [str(w.form(word.form)) for w in words_of(word.category)]
    options = [o[0].upper() + o[1:] if old[0].isupper() else o for o in options]
    vowel = old[0].lower() in "aeiou"  # a or an stays right
    others = [o for o in options if (o[0].lower() in "aeiou") == vowel and o != old]
    known = [o for o in others if o in story.text]
    assume(others)
    new = data.draw(st.sampled_from(known or others) | st.sampled_from(others))
    text = story.text[: word.start] + new + story.text[word.end :]
    damaged = read(text)
    assert grammar(damaged) == 10
    wrong = sum(not s.agrees for p in damaged for s in p.statements)
    assert wrong and consistency(damaged) < 10


@given(seed=seeds, data=st.data())
@settings(max_examples=100)
def test_what_was_left_out_cannot_be_recalled(seed, data):
    """A passage that sets a fact which others recall is deleted: they contradict, every sentence still parses."""
    story = Author(seed, 0)
    setters, needed = {}, set()
    for i, (event, cast) in enumerate(story.events):
        for subject, relation, _, mode in stories.EVENTS[event][0]:
            key = cast.get(subject, subject), relation
            if mode == "?" and key in setters and "colour" not in relation:
                needed.add(setters[key])
            elif mode not in "?!":
                setters[key] = i
    needed -= {0}
    assume(needed)
    gone = data.draw(st.sampled_from(sorted(needed)))
    passages = read(story.text)
    damaged = read(" ".join(passage.text for i, passage in enumerate(passages) if i != gone))
    assert len(story.events) == len(passages) and grammar(damaged) == 10 and consistency(damaged) < 10


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_data(prepare(stories=3000, root=tmp_path_factory.mktemp("data")))


def test_copied_is_one_for_copies_and_low_for_new_stories(data):
    copies = [Author(0, index).text for index in range(20)]
    new = [Author(1, index).text for index in range(60)]
    halves = [" ".join(copy.split()[:90] + fresh.split()[90:]) for copy, fresh in zip(copies, new, strict=False)]
    broken = copies[0].replace(" ", "\n", 40)  # line breaks make nothing new
    scores, _ = judge([*copies, broken, *new, *halves], data)
    assert (scores["copied"][:21] == 1).all()
    assert 0 < scores["copied"][21:81].mean() < 0.25
    assert 0.35 < scores["copied"][81:].mean() < 0.65
    assert (scores["grammar"][:81] == 10).all() and (scores["consistency"][:81] == 10).all()


@given(data=st.data())
@settings(max_examples=50)
def test_copied_equals_a_brute_force_search(data):
    letters = st.integers(0, 2)
    stories = st.lists(letters, min_size=1, max_size=20)
    train, told = (data.draw(st.lists(stories, min_size=1, max_size=size)) for size in (4, 5))

    def occurs(run):
        return any(other[k : k + len(run)] == run for other in train for k in range(len(other)))

    def longest(story):
        runs = (story[i:j] for i in range(len(story)) for j in range(i + 1, len(story) + 1))
        return max((len(run) for run in runs if occurs(run)), default=0)

    stream = [9] + [token for story in train for token in [*story, 9]]
    shares = copied([np.array(story) for story in told], np.array(stream, np.uint16), 9)
    assert shares.tolist() == [longest(story) / len(story) for story in told]


@given(values=st.lists(st.floats(-5, 5), min_size=2, max_size=9))
def test_the_standard_error_is_the_textbooks_and_repeats_do_not_lower_it(values):
    mean, error = mean_and_error(values)
    assert mean == pytest.approx(np.mean(values))
    assert error == pytest.approx(np.std(values, ddof=1) / len(values) ** 0.5, abs=1e-9)
    twice = mean_and_error(values * 2, [*range(len(values))] * 2)  # the same said twice is no further evidence
    assert twice == pytest.approx((mean, error), abs=1e-9)
    assert mean_and_error([]) == (None, None) and mean_and_error([1.0]) == (1.0, None)


@pytest.mark.parametrize(
    "text, says",
    [
        ("Tom lived in a hut near the sea.", "no such sentence"),
        ("This is the story of Tom, a small boy. She lived in a hut near the sea.", "Tom: a boy"),
        ("This is the story of Tom, a small girl. He lived in a hut near the sea.", "Tom: a boy"),
        ("This is the story of Tom, a small boy. He lived in a hut near the sea. Ben was very shy.", "Ben, not Tom"),
        (
            "This is the story of Tom, a small boy. He lived in a hut near the sea. Ida was very shy.",
            "no such sentence",
        ),
        (
            "This is the story of Tom, a small boy. He lived in a hut near the sea. Tom put the red drum under the "
            "bench and forgot about it.",
            "drum was not in the story",
        ),
        (
            "This is the story of Tom, a small boy. He lived in a hut near the sea. Tom had a new red drum. It was a "
            'secret gift from his aunt. Suddenly Tom gasped. "My blue drum is gone!" he cried.',
            "colour blue",
        ),
        (
            "This is the story of Tom, a small boy. He lived in a hut near the sea. Tom had a new red drum. It was a "
            'secret gift from his aunt. A tear ran down his nose. "My uncle gave it to me," he said.',
            "uncle, not aunt",
        ),
        (  # the second half of a telling is missing
            "This is the story of Tom, a small boy. He lived in a hut near the sea. Tom had a new red drum. It was a "
            "secret gift from his aunt. Tom had a new green drum. The end.",
            "colour green",
        ),
        (
            "This is the story of Tom, a small boy. He lived in a hut near the sea. Kate was tempted. But she shook "
            'her head. "I still have to carry the groceries," she said.',
            "Kate, not Tom",
        ),
        (
            'The errand. "Take the corn and the figs to your cousin, who is ill," said his mom. "Have the corn," said '
            'Tom, and Victor ate happily. "What did you bring?" "The corn," said Tom. "I gave the corn to Victor, who '
            'was hungry."',
            "corn: at Victor",
        ),
    ],
)
def test_the_verdict_says_what_is_wrong(text, says):
    assert says in "\n".join(explain(read(text)))


class Copier(torch.nn.Module):
    """In place of a GPT: equal probability to each of `answers`' words, wherever a story determines a word."""

    def __init__(self, vocab_size, answers):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = GPTConfig(vocab_size=vocab_size, block_size=4000)
        self.answers, self.number = answers, 0

    def forward(self, idx, targets):
        logits = torch.full((1, idx.shape[1], self.config.vocab_size), -50.0)
        for place, words in self.answers[self.number]:
            right = idx[0, place + 1 :].tolist() + [0] * 20
            for i in range(max(map(len, words))):
                begun = [word for word in words if word[:i] == right[:i] and len(word) > i]
                for token in {word[i] for word in begun}:
                    logits[0, place + i, token] = np.log(sum(word[i] == token for word in begun) / len(begun))
        self.number += 1
        return logits, torch.nn.functional.cross_entropy(logits[0], targets[0])


LETTERS = tiktoken.Encoding(
    "letters", pat_str="(?s:.)", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={END: 256}
)


@pytest.mark.parametrize("tokenizer, baseline", [*product([TOKENIZER], ["copying", "chance", None]), (LETTERS, None)])
def test_a_model_that_copies_or_guesses_has_the_recall_of_its_baseline(tokenizer, baseline, monkeypatch):
    """And one that knows the right word has 1, and loses nothing; letters, because there "cap" begins like "cape"."""
    monkeypatch.setattr(judging, "load_tokenizer", lambda name: tokenizer)
    meta = dict(seed=3, stories=30, val_stories=30, tokenizer=tokenizer.name, end=tokenizer.eot_token)
    answers, val = [], [meta["end"]]
    for number in range(30):
        story = Author(3, number)
        tokens, positions = locate(story, tokenizer)
        val += [*tokens, meta["end"]]
        answers.append([])
        for word, (place, _) in zip(story.determined, positions, strict=True):
            old, space = story.text[word.start : word.end], story.text[word.start - 1] == " "
            every = [str(w.form(word.form)) for w in words_of(word.category)]
            every = [w[0].upper() + w[1:] for w in every] if old[0].isupper() else every
            others = [w for w in every if w != old]
            words = [old] + others[: {"copying": word.used - 1, "chance": len(others), None: 0}[baseline]]
            answers[-1].append((place, [tokenizer.encode_ordinary(" " * space + w) for w in words]))
    found, told = recall(Copier(tokenizer.n_vocab, answers), (meta, None, np.array(val)))
    expected = found[baseline] if baseline else np.ones_like(found["p"])
    assert found["p"] == pytest.approx(expected, rel=1e-6)
    assert told["recall"] == pytest.approx(told[baseline] if baseline else 1, rel=1e-6)
    assert told["lost"] == pytest.approx(-np.log(expected).sum() / (len(val) - 1), abs=1e-9)


def test_a_question_has_as_many_candidates_as_the_story_has_used():
    """Three children bring something: each question has three foods, and three names or more, to choose from."""

    class Picnic(Author):
        def write_story(self):
            for name, kind, food in zip(("Tom", "Ann", "Ben"), ("boy", "girl", "boy"), foods, strict=True):
                self.given = {"child": stories.Word(name, kind=kind), "food": food}
                self.say("bring")
            self.given = {}
            self.say("ask_dish", child=self.events[1][1]["child"], food=foods[1])

        def appear(self, slot):
            self.cast[slot] = self.given[slot] if slot in self.given else super().appear(slot) or self.cast[slot]

    foods = stories.LISTS["food"][:3]
    for index in range(20):
        story = Picnic("picnic", index)
        asked = {story.text[w.start : w.end]: (w.category, w.used) for w in story.determined if w.asked}
        assert asked.keys() == {"Ann", str(foods[1])} and asked[foods[1]] == ("food", 3)
        assert asked["Ann"] in (("name", 3), ("name", 4), ("name", 5))  # hero and friend may be named before


def test_recall_refuses_stories_of_another_world(data):
    meta, train, val = data
    model = Copier(meta["vocab_size"], [])
    with pytest.raises(ValueError, match="another version"):
        recall(model, (meta | {"seed": 1}, train, val))


def test_the_command_scores_a_file_and_explains(data, tmp_path):
    folder = Path(data[1].filename).parent
    wrong = " ".join([*Author(5, 0).text.split()[:-1], "zzz"])
    (tmp_path / "a.txt").write_text(f"{Author(5, 1).text}\n\n{wrong}")
    status, out, err = call(judging.main, tmp_path / "a.txt", "--explain", f"--data={folder}")
    assert status == 0 and "story 1: grammar 10.00" in out and "no such sentence" in out
    assert re.search(r"^grammar +9\.\d+ ± 0\.\d+$", out, re.M) and re.search(r"^copied +0\.\d+", out, re.M)
    for file, says in (("none.txt", "no such file"), ("empty.txt", "no stories")):
        (tmp_path / "empty.txt").write_text(" \n")
        status, out, err = call(judging.main, tmp_path / file, f"--data={folder}")
        assert status == 2 and says in err and err.count("\n") == 1
    status, out, err = call(judging.main, tmp_path / "a.txt", "--data=/nowhere")
    assert status == 2 and "/nowhere" in err
