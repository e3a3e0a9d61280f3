"""Read stories of the world back and score them as a strict reader would: python data/judge.py FILE --explain

A story is matched against the tellings of world.txt, which also wrote it. What it mentions is compared with what it said
before. Three scores, as in Mehta et al. 2025, who asked GPT-4 for them:

    grammar       0 to 10: the share of words in sentences of the world, capitals and punctuation included
    consistency   0 to 10: the share of checkable statements that agree with what was told: somebody or something that is
                  mentioned again, a pronoun, a colour, a fact that is recalled. A story without statements has 0
    copied        the longest run of words that also stands in the training stories, as a share of the story: 100% is a
                  copy. (In place of creativity. It counts tokens, which are whole words)

Repeating oneself, or going on after the end, contradicts nothing.
"""

import re
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))  # where the package `data` is found

from data.common import DATA, END, InputError, Parser, load_data, load_tokenizer, run, split_stories
from data.stories import (
    EVENTS,
    FIRST_LETTERS,
    LISTS,
    PAIRS,
    PRONOUNS,
    Author,
    parse,
    questions,
    role_of,
    spell,
    words_of,
)

PEOPLE = ("hero", "friend", "child")
CHANGING = {slot for _, _, slots, _ in PAIRS.values() for slot in slots.split()} | {"friend", "thing", "fun", "food"}
# The fields that introduce somebody or something. Other roles are introduced by any.
INTRODUCE = dict(hero=(), friend=("full",), thing=("a", "full"), fragile=("a", "full"))
SENTENCE_END = re.compile(r'(?<=[.!?]) (?=["A-Z])|(?<=[.!?]") (?=["A-Z])')
TEMPLATE_END = re.compile(r'(?<=[.!?]) (?=["A-Z{[])|(?<=\.") |(?<=[!?]") (?=["A-Z]|\{(?:hero|friend|child)\})')
CHILD = {str(name): child for child in PRONOUNS for name in LISTS[child]}

# From templates to regular expressions --------------------------------------------------------------------------------


def capital(before, text):
    """text with the capitals that the writer gives it after `before`."""
    tail = before[-4:]  # as far as FIRST_LETTERS looks back
    return FIRST_LETTERS.sub(lambda m: m[1] + m[2].upper(), tail + text)[len(tail) :]


@dataclass
class Mention:
    """A slot in a telling."""

    slot: str
    anew: bool
    introduces: bool
    pieces: dict  # {what it says: (name of the group that matches it, {what is written: its value})}


class Telling:
    """One way to tell an event, or a sentence of one (event None), as a regular expression."""

    def __init__(self, event, facts, template):
        self.event, self.facts, self.mentions = event, facts, []
        self.regex = re.compile(self.pattern(parse(template), "\n") + "(?= |$)")

    def pattern(self, parts, before):
        out = ""
        for part in parts:
            if type(part) is str:
                out += re.escape(capital(before, part))
                before += part
                continue
            if type(part) is list:
                out += "(?:" + "|".join(self.pattern(option, before) for option in part) + ")"
            else:
                out += self.slot_pattern(*part, capital(before, "a") == "A")
            before += "x"
        return out

    def slot_pattern(self, slot, form, anew, first):
        """first: does a sentence begin here? The piece "" says who or what it is, the others what is said about it."""
        role, out, pieces = role_of(slot), "", {}
        for text, piece, kind, word_form in spell(role, form):
            out += text if out or not first else text.capitalize()
            if piece == "article":
                out += ("A" if first else "a") + "(?:n(?= [aeiou])|(?= [^aeiou]))"
            elif piece or kind:
                if kind:
                    values = {
                        str(getattr(word, word_form) if word_form else word): str(word) for word in words_of(kind)
                    }
                else:  # a pronoun: which children can it stand for?
                    piece, values = "child", defaultdict(set)
                    for child, forms in PRONOUNS.items():
                        values[forms[form]].add(child)
                if first and not out:
                    values = {word[0].upper() + word[1:]: value for word, value in values.items()}
                name = f"{piece}_{len(self.mentions)}"
                pieces[piece] = name, values
                out += f"(?P<{name}>{'|'.join(map(re.escape, values))})"
        if role in PEOPLE and form == "full":  # "Tom the fox", or Tom alone, who is a boy
            out = out.replace(" the ", "(?: the ") + ")?"
        self.mentions.append(Mention(slot, anew, form in INTRODUCE.get(role, (form,)), pieces))
        return out


@cache
def tellings():
    return [Telling(event, facts, line) for event, (facts, lines) in EVENTS.items() for line in lines]


@cache
def sentences():
    """Every sentence of every telling, alone."""
    lines = {s: None for _, lines in EVENTS.values() for line in lines for s in TEMPLATE_END.split(line)}
    return [Telling(None, [], line) for line in lines]


# Reading --------------------------------------------------------------------------------------------------------------


@dataclass
class Statement:
    """Something that can be checked, in words; told: the number of the passage that it agrees with or contradicts."""

    says: str
    agrees: bool
    told: int | None = None


@dataclass
class Passage:
    """A telling, with its event and who and what is in it; or a sentence that stands alone, or does not parse."""

    text: str
    parsed: bool
    event: str | None = None
    cast: dict = field(default_factory=dict)  # {slot: who or what}
    statements: list = field(default_factory=list)


def words_in(text):
    return set(re.findall(r"[\w']+", text.lower()))


class Reader:
    """Reads one story, passage by passage."""

    def __init__(self, text):
        self.text = " ".join(text.split())
        self.known = defaultdict(dict)  # {role: {who or what: {what is said about it: (value, passage)}}}
        self.cast = {}  # {slot: who or what}
        self.state = {}  # {(subject, relation): (object, passage)}
        self.unread = set()  # words of what did not parse
        self.passages = []
        place = 0
        while place < len(self.text):
            place = self.read(place) + 1

    def read(self, start):
        """Read the passage that begins there -> its end."""
        for options in (tellings(), sentences()):
            found = [(telling, match) for telling in options if (match := telling.regex.match(self.text, start))]
            if found:
                end = max(match.end() for _, match in found)
                self.tell([(telling, match) for telling, match in found if match.end() == end])
                return end
        match = SENTENCE_END.search(self.text, start)
        end = match.start() if match else len(self.text)
        self.passages.append(Passage(self.text[start:end], False))
        self.lose(self.text[start:end])
        return end

    def lose(self, text):
        """This was not understood. It may have said anything about those who are in it."""
        words = words_in(text)
        self.unread |= words
        self.state = {key: value for key, value in self.state.items() if not words_in(key[0]) <= words}

    def doubt(self, *words):
        """May something that was not understood have told about them? (About "feed the ducks" as "fed the ducks".)"""
        return any(words_in(word.partition(" ")[2] or word) <= self.unread for word in words)

    def check(self, *statement):
        self.passages[-1].statements.append(Statement(*statement))

    def known_as(self, slot):
        return self.known["person" if role_of(slot) in PEOPLE else role_of(slot)]

    def tell(self, found):
        """Take in a telling. The same words may introduce something or mention it again: the first that fits, or the last."""
        for telling, match in found:
            filled = [(mention, self.filled(mention, match)) for mention in telling.mentions]
            filled = [(mention, values) for mention, values in filled if values]
            if all(
                (values[""] in self.known_as(mention.slot)) != mention.anew
                for mention, values in filled
                if "" in values and (mention.anew or telling.event is None)
            ):
                break
        self.passages.append(Passage(match[0], True, telling.event))
        for mention, values in filled:
            if "" in values:
                self.who(mention, values)
        for mention, values in filled:
            for piece in values.keys() - {""}:
                self.what(mention.slot, piece, values[piece])
        for fact in telling.facts:
            self.recall_or_set(*fact)
        if telling.event is None:
            self.lose(match[0])

    def filled(self, mention, match):
        """{piece: value} of what was written; {} if the mention stands in an alternative that was not taken."""
        found = {piece: (match[name], values) for piece, (name, values) in mention.pieces.items()}
        return {piece: values[text] for piece, (text, values) in found.items() if text is not None}

    def what(self, slot, piece, value):
        """Something is said about somebody or something. Does it agree with what was said before?"""
        known, here, now = self.known_as(slot), self.passages[-1].cast, len(self.passages) - 1
        who = here.get(slot) or self.cast.get(slot)
        if who is None:
            if not self.unread:
                self.check(f"{slot}: nobody is known", False)
            return
        here[slot] = who
        if who not in known:  # the wrong one, which is a contradiction already
            return
        if piece not in known[who]:
            known[who][piece] = value, now
            if value not in PRONOUNS:
                return
            piece, value = "child", {value}  # a boy or a girl: the name must be one's
        old, told = known[who][piece]
        agrees = old in value if piece == "child" else old == value
        self.check(f"{who}: a {old}" if piece == "child" else f"{who}: {piece} {value}", agrees, told)

    def who(self, mention, values):
        """Somebody or something is named. Is it known, and is it the one that it must be?"""
        who, slot, role, now = values[""], mention.slot, role_of(mention.slot), len(self.passages) - 1
        known, here = self.known_as(slot), self.passages[-1].cast
        before = here.get(slot) or (None if role in CHANGING or mention.anew else self.cast.get(slot))
        here[slot] = who
        if before not in (None, who):
            self.check(f"{who}, not {before}", False, known[before]["since"][1] if before in known else now)
            return  # it is still the other
        elif who in known:
            if not mention.anew:
                self.check(who, role == "hero" or who != self.cast.get("hero"), known[who]["since"][1])
        elif not mention.introduces and self.passages[-1].event != "open" and not self.doubt(who):
            self.check(f"{who} was not in the story", False)
        elif role in ("spot", "helper", "fun") and self.cast.get("place"):
            place = self.cast["place"]
            at = next(word.at for word in LISTS["place"] if word == place)
            self.check(f"{who}: {at}", who in LISTS[f"{role} {at}"], self.known["place"][place]["since"][1])
        facts = known.setdefault(who, {"since": (None, now)})
        if role in PEOPLE:
            facts.setdefault("child", (CHILD[who], now))
        if "kind" in mention.pieces and "kind" not in values:  # Tom, not "Tom the fox"
            facts.setdefault("kind", (CHILD[who], now))
        self.cast[slot] = who

    def recall_or_set(self, slot, relation, value, mode):
        """As Author does, except that what is recalled is compared."""
        subject, (of, _, piece) = self.cast.get(slot, slot), value.partition(".")
        if piece:  # checked where it is mentioned
            return
        value = self.cast.get(of, of)
        if mode not in "?!":
            self.state[subject, relation] = value, len(self.passages) - 1
            return
        old, told = self.state.get((subject, relation), (None, None))
        if old is not None or not (mode == "!" or self.doubt(subject, value)):
            self.check(f"{subject}: {relation} {value}", (old == value) == (mode == "?"), told)


# Scores ---------------------------------------------------------------------------------------------------------------


def grammar(passages):
    """0 to 10: the share of words in sentences of the world."""
    words = [len(passage.text.split()) for passage in passages]
    return 10 * sum(n for n, passage in zip(words, passages, strict=True) if passage.parsed) / max(1, sum(words))


def consistency(passages):
    """0 to 10: the share of checkable statements that agree with what was told."""
    agree = [statement.agrees for passage in passages for statement in passage.statements]
    return 10 * sum(agree) / max(1, len(agree))


def copied(stories, train):
    """For each story, an array of tokens: its longest run that also stands in train, as a share of the story.

    A run is found by its hash, the sum of tokens[i + k] * BASE**k modulo 2**64, and its length by bisection."""
    longest = max(len(train), *map(len, stories))
    powers = np.cumprod(np.full(longest, 0x9E3779B97F4A7C15, dtype=np.uint64))
    sums = [np.append(np.uint64(0), np.cumsum(tokens * powers[: len(tokens)])) for tokens in (train, *stories)]

    def runs(number, length):
        ends = sums[number][length:]
        return (ends - sums[number][: len(ends)]) * powers[::-1][: len(ends)]  # equal wherever the same run stands

    low, high = np.zeros(len(stories), dtype=int), np.minimum([len(story) for story in stories], len(train))
    while (open_ := low < high).any():
        middle = (low + high + 1) // 2
        for length in np.unique(middle[open_]):
            mine = {i: runs(i + 1, length) for i in np.flatnonzero(open_ & (middle == length))}
            every, there = np.unique(np.concatenate([*mine.values()])), runs(0, length)
            maybe = np.zeros(2**24, dtype=bool)  # most runs in train are in no story: leave them out before sorting
            maybe[every >> np.uint64(40)] = True
            there = np.intersect1d(there[maybe[there >> np.uint64(40)]], every)
            for i, hashes in mine.items():
                if np.isin(hashes, there).any():
                    low[i] = length
                else:
                    high[i] = length - 1
    return low / np.maximum(1, [len(story) for story in stories])


def judge(texts, data):
    """Score stories: {"grammar": array, "consistency": array, "copied": array}, and the readings.

    data: what load_data() gives for the stories that the author of the texts has read."""
    meta, train, _ = data
    encode = load_tokenizer(meta["tokenizer"]).encode_ordinary
    readings = [Reader(text).passages for text in texts]
    return {
        "grammar": np.array([grammar(passages) for passages in readings]),
        "consistency": np.array([consistency(passages) for passages in readings]),
        "copied": copied([np.array(encode(" ".join(text.split())), dtype=np.uint16) for text in texts], train),
    }, readings


def mean_and_error(values, groups=None):
    """The mean and its standard error, None where there is no telling; values of one group are not independent."""
    if len(values) == 0:
        return None, None
    groups = np.arange(len(values)) if groups is None else np.unique(groups, return_inverse=True)[1]
    count, mean = groups.max() + 1, float(np.mean(values))
    sums = np.bincount(groups, np.asarray(values) - mean)
    return mean, float(np.sqrt(np.sum(sums**2) * count / (count - 1)) / len(values)) if count > 1 else None


# Recall ---------------------------------------------------------------------------------------------------------------


def recall(model, data, stories=None):
    """How well a model recalls, in unseen stories, the words that the story so far decides.

    Returns a dict of arrays, one number a word: story, distance (tokens since it was last said), p (the probability that
    the model gives to the word among all of its kind), chance (that of a guess among all of the kind), copying (of one
    among those that the story has used), asked (is a fact recalled, with two candidates or more in the story?); and
    tokens, the number of tokens scored. Stories longer than the context are left out."""
    import torch  # here, because reading stories needs no torch

    meta, _, val = data
    tokenizer, device = load_tokenizer(meta["tokenizer"]), next(model.parameters()).device
    rows, tokens = [], 0
    for number, story in enumerate(split_stories(val, meta["end"])[:stories]):
        written, asked = questions(Author(meta["seed"], meta["stories"] - meta["val_stories"] + number), tokenizer)
        if written != story.tolist():
            raise InputError("the validation stories are of another version of the world; make data/stories again")
        if len(story) >= model.config.block_size:
            continue
        tokens += len(story) + 1
        idx = torch.tensor([[meta["end"], *written]], device=device)
        with torch.no_grad():
            logits = model(idx, idx)[0][0].double().cpu()
        for question in asked:
            p, left = 1.0, question.candidates
            for i, token in enumerate(question.answer):
                nexts = sorted({candidate[i] for candidate in left if len(candidate) > i})
                p *= logits[question.place + i, nexts].softmax(0)[nexts.index(token)].item()
                left = [candidate for candidate in left if candidate[i : i + 1] == [token]]
            fair = question.asked and question.said > 1
            rows.append((number, question.distance, p, 1 / len(question.candidates), 1 / question.said, fair))
    columns = np.array(rows).reshape(-1, 6).T
    found = dict(zip(("story", "distance", "p", "chance", "copying", "asked"), columns, strict=True))
    return found | {"asked": found["asked"].astype(bool), "tokens": tokens}


def summary(found):
    """What recall() found, in a few numbers: recall with its standard error and baselines, over the words asked for; and
    lost, the nats per token that the model loses at decided words, where a perfect model loses none."""
    asked = found["asked"]
    mean, error = mean_and_error(found["p"][asked], found["story"][asked])
    chance, copying = (mean_and_error(found[name][asked])[0] for name in ("chance", "copying"))
    lost = -np.log(np.maximum(found["p"], 1e-300)).sum() / max(1, found["tokens"])
    return {"recall": mean, "recall_error": error, "chance": chance, "copying": copying, "lost": float(lost)}


# The command ----------------------------------------------------------------------------------------------------------


def explain(passages):
    """What is wrong with a story: each passage that does not parse or contradicts, and below it what it contradicts."""
    for passage in passages:
        wrong = [statement for statement in passage.statements if not statement.agrees]
        if wrong or not passage.parsed:
            yield ("contradiction: " if wrong else "no such sentence: ") + passage.text
        for statement in wrong:
            told = None if statement.told is None else passages[statement.told]
            yield f"    {statement.says}" + (f"; it was told: {told.text}" if told and told is not passage else "")


def main():
    parser = Parser(description="Score stories: grammar, consistency, and how much is copied.")
    parser.add_argument("file", type=Path, help="stories with <|endoftext|> or blank lines between them")
    parser.add_argument("--explain", action="store_true", help="say what is wrong with each story")
    text = "what they must not be copied from (default: data/stories)"
    parser.add_argument("--data", type=Path, default=DATA / "stories", help=text)
    args = parser.parse_args()
    try:
        text = args.file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{args.file}: cannot be read as text: {error}") from error
    text = re.sub(r"(?m)^\([\d.]+ nats\)$", "", text)  # behind a story of stories.py tell
    texts = [text for text in (text.split(END) if END in text else re.split(r"\n\s*\n", text)) if text.strip()]
    if not texts:
        raise InputError(f"{args.file}: no stories to judge: the text is empty")
    scores, readings = judge(texts, load_data(args.data))
    styles = {"grammar": "{:.2f}", "consistency": "{:.2f}", "copied": "{:.1%}"}
    for i, passages in enumerate(readings if args.explain else ()):
        print(f"story {i + 1}: " + ", ".join(f"{name} {styles[name].format(v[i])}" for name, v in scores.items()))
        print("".join(f"    {line}\n" for line in explain(passages)), end="")
    for name, values in scores.items():
        numbers = [styles[name].format(number) for number in mean_and_error(values) if number is not None]
        print(f"{name:<12}{' ± '.join(numbers)}")


if __name__ == "__main__":
    run(main)
