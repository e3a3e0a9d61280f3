"""The reader of stories and its scores: what was written is read back, and damage lowers the score that it should."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data import stories
from data.judge import (
    Reader,
    consistency,
    explain,
    far_recalls,
    fresh,
    grammar,
    judge,
    mean_and_error,
    questions,
    split_stories,
)
from data.prepare import load_data, load_tokenizer, prepare
from data.stories import Author

seeds = st.integers(0, 2**31)
TOKENIZER = load_tokenizer("stories")


def read(text):
    return Reader(text).passages


def tokens_of(text):
    return np.array(TOKENIZER.encode_ordinary(text), dtype=np.uint16)


@given(seed=seeds)
@settings(max_examples=300, deadline=None)
def test_reading_recovers_what_the_writer_wrote(seed):
    story = Author(seed, 0)
    passages = read(story.text)
    wrote = [(event, {slot: str(word) for slot, word in cast.items()}) for event, cast in story.events]
    assert [(passage.event, passage.cast) for passage in passages] == wrote
    assert " ".join(passage.text for passage in passages) == story.text
    assert grammar(passages) == consistency(passages) == 10 and not [*explain(passages)]
    far, right = far_recalls(passages)
    assert far == right


PASSAGES = [passage.text for index in range(30) for passage in read(Author(4, index).text)]


@given(text=st.text() | st.lists(st.sampled_from(PASSAGES) | st.text(max_size=9)).map(" ".join), cut=st.integers(0, 99))
@settings(max_examples=300, deadline=None)
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
@settings(max_examples=300, deadline=None)
def test_reading_never_raises_when_words_are_mistaken(seed, share):
    """As weak models do: somebody else's name, some other thing or place."""
    chance, names = random.Random(seed), "|".join(sorted(map(re.escape, ALIKE), key=len, reverse=True))
    text = re.sub(
        rf"\b({names})\b",
        lambda found: chance.choice(ALIKE[found[0]]) if chance.random() < share else found[0],
        Author(seed, 0).text,
    )
    passages = read(text)
    [*explain(passages)]
    assert grammar(passages) > 5 and 0 <= consistency(passages) <= 10


@given(seed=seeds)
@settings(max_examples=100, deadline=None)
def test_random_words_are_no_sentences(seed):
    words = [word for index in range(20) for word in Author(seed, index).text.split()]
    random.Random(seed).shuffle(words)
    assert grammar(read(" ".join(words[:200]))) < 1


def told_of(story):
    """The passages as the writer told them, with the capitals of their places."""
    return [passage.text for passage in read(story.text)]


@given(seed=seeds, data=st.data())
@settings(max_examples=100, deadline=None)
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
@settings(max_examples=100, deadline=None)
def test_swapped_words_cost_consistency_and_nothing_else(seed, data):
    """Another colour, holder or place where one is recalled, be it one of this story or not."""
    passages = read(Author(seed, 0).text)
    text = " ".join(passage.text for passage in passages)
    asked = [s for p in passages for s in p.statements if s.asked]
    assume(asked)
    swapped = data.draw(st.lists(st.sampled_from(asked), min_size=1, max_size=3, unique_by=lambda s: s.asked[0]))
    for statement in sorted(swapped, key=lambda statement: -statement.asked[0]):
        start, end, options = statement.asked
        vowel = text[start].lower() in "aeiou"  # a or an stays right
        others = [o for o in options if (o[0].lower() in "aeiou") == vowel and options[o] != options[text[start:end]]]
        known = [o for o in others if o in text]
        assume(others)
        text = text[:start] + data.draw(st.sampled_from(known or others) | st.sampled_from(others)) + text[end:]
    damaged = read(text)
    assert grammar(damaged) == 10
    wrong = sum(not s.agrees for p in damaged for s in p.statements)
    assert wrong and consistency(damaged) < 10


@given(seed=seeds, data=st.data())
@settings(max_examples=100, deadline=None)
def test_what_was_left_out_cannot_be_recalled(seed, data):
    """A passage that others recall is deleted: they contradict, every sentence still parses."""
    passages = read(Author(seed, 0).text)
    told = sorted({s.told for p in passages for s in p.statements if s.asked})
    assume(told)
    gone = data.draw(st.sampled_from(told))
    damaged = read(" ".join(passage.text for i, passage in enumerate(passages) if i != gone))
    assert grammar(damaged) == 10 and consistency(damaged) < 10


@given(seed=seeds, times=st.integers(1, 8))
@settings(max_examples=50, deadline=None)
def test_repetition_costs_creativity_in_proportion_and_no_grammar(seed, times):
    story = Author(seed, 0).text
    told = told_of(Author(seed, 0))
    longest = max(told, key=len)
    train = np.array([TOKENIZER.eot_token] * 2, dtype=np.uint16)
    repeated = " ".join([story, *[longest] * times])
    before, after = fresh([tokens_of(story), tokens_of(repeated)], train, TOKENIZER.eot_token)
    assert before > 0.9 and after < before and grammar(read(repeated)) == 10
    long, short = len(tokens_of(repeated)), len(tokens_of(story))
    assert after == pytest.approx(before * short / long, abs=0.05 + 8 / long)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_data(prepare(stories=3000, root=tmp_path_factory.mktemp("data")))


def test_line_breaks_are_not_creative(data):
    copy = Author(0, 7).text
    assert judge([copy.replace(" ", "\n", 40), f"\n {copy}  "], data)[0]["creativity"].tolist() == [0, 0]


def test_the_stories_of_a_stream():
    assert [story.tolist() for story in split_stories(np.array([9, 1, 2, 9, 3, 9]), 9)] == [[1, 2], [3]]


@given(values=st.lists(st.floats(-5, 5), min_size=2, max_size=9))
def test_the_standard_error_of_the_mean(values):
    mean, error = mean_and_error(values)
    assert mean == pytest.approx(np.mean(values))
    assert error == pytest.approx(np.std(values, ddof=1) / len(values) ** 0.5, abs=1e-9)
    twice = mean_and_error(values * 2, [*range(len(values))] * 2)  # the same said twice is no further evidence
    assert twice == pytest.approx((mean, error), abs=1e-9)
    assert mean_and_error([]) == (None, None) and mean_and_error([1.0]) == (1.0, None)


def test_copies_are_not_creative_and_new_stories_are(data):
    copies = [Author(0, index).text for index in range(20)]
    new = [Author(1, index).text for index in range(100)]
    half = [" ".join(told_of(Author(0, i))[:8] + told_of(Author(1, i))[8:]) for i in range(20)]
    scores, _ = judge(copies + new + half, data)
    assert (scores["creativity"][:20] == 0).all()
    of_new = scores["creativity"][20:120]
    assert of_new.mean() > 9.7 and of_new.min() > 8 and of_new.max() <= 10
    assert 2 < scores["creativity"][120:].mean() < 7.5
    assert (scores["grammar"][:120] == 10).all() and (scores["consistency"][:120] == 10).all()


def test_the_nearest_story_is_found_by_brute_force_too():
    generator = np.random.default_rng(0)
    train = [generator.integers(3, size=40).astype(np.uint16) for _ in range(30)]
    asked = [generator.integers(3, size=25).astype(np.uint16) for _ in range(20)] + [train[3], train[4][:7]]
    stream = np.concatenate([[9], *[[*story, 9] for story in train]]).astype(np.uint16)

    def grams(story):
        return {tuple(story[i : i + 8]) for i in range(len(story) - 7)}

    for story, share in zip(asked, fresh(asked, stream, 9), strict=True):
        near = max(len(grams(story) & grams(other)) for other in train)
        assert share == pytest.approx((len(grams(story)) - near) / max(1, len(story) - 7))


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
            "This is the story of Tom, a small boy. He lived in a hut near the sea. Tom had an old red drum. It was a "
            'secret gift from his aunt. Suddenly Tom gasped. "My blue drum is gone!" he cried.',
            "colour blue",
        ),
        (
            "This is the story of Tom, a small boy. He lived in a hut near the sea. Tom had an old red drum. It was a "
            'secret gift from his aunt. A tear ran down his nose. "My uncle gave it to me," he said.',
            "uncle, not aunt",
        ),
        (  # the second half of a telling is missing
            "This is the story of Tom, a small boy. He lived in a hut near the sea. Tom had an old red drum. It was a "
            "secret gift from his aunt. Tom had an old green drum. The end.",
            "colour green",
        ),
        (
            "This is the story of Tom, a small boy. He lived in a hut near the sea. Kate was tempted. But she shook "
            'her head. "I still have to carry the groceries," she said.',
            "Kate, not Tom",
        ),
        (
            'The errand. "Take the rice and the figs to your cousin, who is ill," said his mom. "Have the rice," said '
            'Tom, and Victor ate happily. "What did you bring?" "The rice," said Tom. "I gave the rice to Victor, who '
            'was hungry."',
            "rice: at Victor",
        ),
    ],
)
def test_the_verdict_says_what_is_wrong(text, says):
    assert says in "\n".join(explain(read(text)))


@given(seed=seeds)
@settings(max_examples=50, deadline=None)
def test_questions_ask_for_words_that_were_told(seed):
    story = TOKENIZER.encode_ordinary(Author(seed, 0).text)
    (asked,) = questions([story], TOKENIZER)
    for question in asked:
        assert story[question.place : question.place + len(question.answer)] == question.answer
        assert question.candidates.count(question.answer) == 1 and len(question.candidates) > 5
        assert 0 < question.distance < question.place
        # The answer, or a form of it, ends where it was last said.
        before = TOKENIZER.decode(story[: question.place - question.distance]).lower().replace("swam", "swim")
        words = TOKENIZER.decode(question.answer).lower().split()
        assert words[-1][:4] in before or words[0][:4] in before


def test_there_are_questions_at_all_distances():
    stories = [TOKENIZER.encode_ordinary(Author(3, index).text) for index in range(200)]
    distances = [question.distance for asked in questions(stories, TOKENIZER) for question in asked]
    assert len(distances) > 600 and np.quantile(distances, 0.1) < 32 and np.quantile(distances, 0.9) > 100


def test_the_command_scores_a_file_and_explains(data, tmp_path, call):
    folder = Path(data[1].filename).parent
    wrong = Author(5, 0).text.replace(Author(5, 0).told[-1].split()[-1], "zzz")
    (tmp_path / "a.txt").write_text(f"{Author(5, 1).text}\n\n{wrong}")
    status, out, err = call(stories.main, "judge", tmp_path / "a.txt", "--explain", f"--data={folder}")
    assert status == 0 and "story 1: grammar 10.0, consistency 10.0" in out and "no such sentence" in out
    assert re.search(r"^grammar +9\.\d+ ± 0\.\d+$", out, re.M) and "recalled rightly" in out
    for file, says in (("none.txt", "cannot be read"), ("empty.txt", "empty")):
        (tmp_path / "empty.txt").write_text(" \n")
        status, out, err = call(stories.main, "judge", tmp_path / file, f"--data={folder}")
        assert status == 2 and says in err and err.count("\n") == 1
    status, out, err = call(stories.main, "judge", tmp_path / "a.txt", "--data=/nowhere")
    assert status == 2 and "/nowhere" in err
