"""Read stories of the world back and score them as a strict reader would: python data/judge.py FILE --explain

A story is matched against the tellings of world.txt, and what it mentions is compared with what it said before:

    grammar       0 to 10: the share of words in sentences of the world, capitals and punctuation included
    consistency   0 to 10: the share of checkable statements that agree with what was told: somebody or something
                  mentioned again, a pronoun, a colour, a fact recalled. A story without statements gets 0
    copied        0 to 1: the longest run of words from one training story, as a share of the story. A copy gets 1

Mehta et al. 2025 asked GPT-4 for such scores; "copied" takes the place of its creativity. Repetition costs nothing.
"""

import re
import sys
from collections import defaultdict, namedtuple
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))  # where the package `data` is found

from data import stories as world
from data.common import DATA, InputError, Parser, load_data, load_tokenizer, read_txt, run
from data.stories import LISTS, PEOPLE, PRONOUNS, role_of, words_of

CHANGING = {"friend", "thing", *map(role_of, re.findall(r"\{\+(\w+)", world.WORLD))}  # roles that can be cast again
SENTENCE_END = re.compile(r'(?<=[.!?]) (?=["A-Z])|(?<=[.!?]") (?=["A-Z])')  # in a story; below, in a template
TEMPLATE_END = re.compile(r'(?<=[.!?]) (?=["A-Z{[])|(?<=\.") |(?<=[!?]") (?=["A-Z]|\{(?:hero|friend|child)\})')
CHILD = {str(name): child for child in PRONOUNS for name in LISTS[child]}

# A slot in a telling. attribute: what it tells about the slot, "" for its name; values: {as written: value}
Mention = namedtuple("Mention", "slot attribute group values")


class Telling:
    """One way to tell an event, or a sentence of one (event None), as a regular expression."""

    def __init__(self, event, facts, template):
        self.event, self.facts, self.mentions, self.anew = event, facts, [], set()
        self.regex = re.compile(self.pattern([world.parse(template)]) + "(?= |$)")

    def pattern(self, part):
        if type(part) is str:
            return re.escape(part)
        if type(part) is tuple:
            return self.slot_pattern(*part)
        return "(?:" + "|".join("".join(map(self.pattern, option)) for option in part) + ")"

    def slot_pattern(self, slot, form, anew):
        self.anew |= {slot} if anew else set()
        if form == "article":
            return "[Aa](?:n(?= [aeiou])|(?= [^aeiou]))"
        if category := world.category_of(slot, form):
            attribute, form = (form, "") if category == form else ("", form)
            values = {str(word.form(form)): str(word) for word in words_of(category)}
        elif form == "surname":  # Tom the fox; or Tom alone, a child
            attribute, values = "kind", {f" the {kind}": str(kind) for kind in LISTS["kind"]} | {"": ""}
        else:  # a pronoun of a girl, of a boy, or of both
            attribute, of = "child", {child: forms[form] for child, forms in PRONOUNS.items()}
            values = {word: {child for child in of if of[child] == word} for word in of.values()}
        values = {world.capitalise(word): value for word, value in values.items()} | values  # it may begin a sentence
        self.mentions.append(Mention(slot, attribute, f"g{len(self.mentions)}", values))
        return f"(?P<{self.mentions[-1].group}>{'|'.join(map(re.escape, values))})"

    def introduces(self, slot):
        """Can this be its first mention? Heroes, friends and things must come with a kind or quality."""
        if role_of(slot) not in ("hero", "friend", "thing", "fragile"):
            return True
        return self.event == "open" or any(m.slot == slot and m.attribute in ("kind", "quality") for m in self.mentions)


@cache
def tellings():
    """All tellings of all events; and all their sentences, for stories that hold only a part of a telling."""
    lines = {line for _, lines in world.EVENTS.values() for line in lines}
    sentences = sorted({sentence for line in lines for sentence in TEMPLATE_END.split(line)})
    whole = [Telling(event, facts, line) for event, (facts, lines) in world.EVENTS.items() for line in lines]
    return whole, [Telling(None, [], sentence) for sentence in sentences]


# Something that can be checked, in words; source: the number of the passage that it agrees with or contradicts, or None
Statement = namedtuple("Statement", "says agrees source")


@dataclass
class Passage:
    """A part of a story: a telling of an event, a single sentence of one, or text that does not parse."""

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
        self.unread = set()  # words of passages that did not parse
        self.passages = []
        position = 0
        while position < len(self.text):
            position = self.read(position) + 1

    def read(self, start):
        """Read the passage that begins at `start` -> its end."""
        for options in tellings():
            found = [(telling, match) for telling in options if (match := telling.regex.match(self.text, start))]
            found = [(telling, match) for telling, match in found if world.capitalise(match[0]) == match[0]]
            if found:
                end = max(match.end() for _, match in found)
                self.take_in([(telling, match) for telling, match in found if match.end() == end])
                return end
        match = SENTENCE_END.search(self.text, start)
        end = match.start() if match else len(self.text)
        self.passages.append(Passage(self.text[start:end], False))
        self.forget(self.text[start:end])
        return end

    def forget(self, text):
        """Forget the state of everybody named in a passage that did not parse."""
        words = words_in(text)
        self.unread |= words
        self.state = {key: value for key, value in self.state.items() if not words_in(key[0]) <= words}

    def may_have_read(self, *words):
        """Could an unread passage have mentioned them? Verbs do not count: it may have "fed the ducks"."""
        return any(words_in(word.partition(" ")[2] or word) <= self.unread for word in words)

    def check(self, says, agrees, source=None):
        self.passages[-1].statements.append(Statement(says, agrees, source))

    def known_as(self, slot):
        return self.known["person" if role_of(slot) in PEOPLE else role_of(slot)]

    def take_in(self, found):
        """Take in the first telling whose new names are unknown (and, in a lone sentence, whose others are known)."""
        for telling, match in found:
            filled = [(m, m.values[match[m.group]]) for m in telling.mentions if match[m.group] is not None]
            named = [(m.slot in telling.anew, name in self.known_as(m.slot)) for m, name in filled if not m.attribute]
            if all(anew != known for anew, known in named if anew or telling.event is None):
                break
        self.passages.append(Passage(match[0], True, telling.event))
        for m, value in sorted(filled, key=lambda mention: mention[0].attribute != ""):  # names first
            self.describe(m.slot, m.attribute, value) if m.attribute else self.mention(m.slot, value, telling)
        for fact in telling.facts:
            self.recall_or_set(*fact)
        if telling.event is None:
            self.forget(match[0])

    def mention(self, slot, name, telling):
        """Somebody or something is named. Is it known, and is it the right one?"""
        known, here, now, role = self.known_as(slot), self.passages[-1].cast, len(self.passages) - 1, role_of(slot)
        place, anew = self.cast.get("place"), slot in telling.anew
        before = here.get(slot) or (None if role in CHANGING or anew else self.cast.get(slot))
        here[slot] = name
        if before not in (None, name):
            self.check(f"{name}, not {before}", False, known[before]["since"][1] if before in known else now)
            return  # the slot keeps what it had
        if name in known and not anew:
            two = role != "hero" and name == self.cast.get("hero")
            self.check(f"{name}: the hero" if two else name, not two, known[name]["since"][1])
        elif not telling.introduces(slot) and not self.may_have_read(name):
            self.check(f"{name} was not in the story", False)
        elif role in ("spot", "helper", "fun") and place:
            at = next(word.at for word in LISTS["place"] if word == place)
            self.check(f"{name}: {at}", name in LISTS[f"{role} {at}"], self.known["place"][place]["since"][1])
        known.setdefault(name, {"since": (None, now)})
        self.cast[slot] = name

    def describe(self, slot, attribute, value):
        """Something is said about somebody or something. Does it agree with what was said before?"""
        known, here = self.known_as(slot), self.passages[-1].cast
        name = here.get(slot) or self.cast.get(slot)
        if name is None and not self.unread:
            self.check(f"{slot}: nobody is known", False)
        if name is not None:
            here[slot] = name
        if name not in known:  # nobody, or the wrong one, which is a contradiction already
            return
        value = value or CHILD[name]  # Tom, not "Tom the fox"
        if attribute == "child" or value in PRONOUNS and attribute not in known[name]:  # does the name agree?
            agrees = CHILD[name] in value if attribute == "child" else CHILD[name] == value
            self.check(f"{name}: a {CHILD[name]}", agrees, known[name]["since"][1])
        if attribute in known[name]:
            old, source = known[name][attribute]
            self.check(f"{name}: {attribute} {value}", old == value, source)
        elif attribute != "child":
            known[name][attribute] = value, len(self.passages) - 1

    def recall_or_set(self, slot, relation, value, mode):
        """Like Author.say, but a recalled fact that does not hold is a statement that disagrees, not an error."""
        subject, (of, _, attribute) = self.cast.get(slot, slot), value.partition(".")
        if attribute:  # checked where it is mentioned
            return
        value = self.cast.get(of, of)
        if mode not in "?!":
            self.state[subject, relation] = value, len(self.passages) - 1
            return
        old, source = self.state.get((subject, relation), (None, None))
        if old is not None or not (mode == "!" or self.may_have_read(subject, value)):
            self.check(f"{subject}: {relation} {value}", (old == value) == (mode == "?"), source)


def grammar(passages):
    """0 to 10: the share of words in sentences of the world."""
    words = [len(passage.text.split()) for passage in passages]
    return 10 * sum(n for n, passage in zip(words, passages, strict=True) if passage.parsed) / max(1, sum(words))


def consistency(passages):
    """0 to 10: the share of checkable statements that agree with what was told."""
    agree = [statement.agrees for passage in passages for statement in passage.statements]
    return 10 * sum(agree) / max(1, len(agree))


def copied(stories, train, end):
    """For each story, an array of tokens: its longest run that also occurs in one story of train, over its length.

    Starts from single tokens. Numbers the runs that stories share with train, and extends them, until none is left."""
    text = np.concatenate([train, *(np.append(story, end) for story in stories)]).astype(np.int64)
    owner = np.repeat(np.arange(len(stories) + 1), [len(train), *(len(story) + 1 for story in stories)])
    longest, starts = np.zeros(len(stories) + 1), np.flatnonzero(text != end)
    run = text[starts]
    for length in count(1):
        runs = np.unique(run[owner[starts] > 0])  # of the stories
        if not len(runs):
            return longest[1:] / np.maximum(1, [len(story) for story in stories])
        number = np.searchsorted(runs[:-1], run)
        shared = runs[number] == run
        in_train = np.zeros(len(runs), dtype=bool)
        in_train[number[shared & (owner[starts] == 0)]] = True
        shared &= in_train[number]
        starts, number = starts[shared], number[shared]
        longest[owner[starts]] = length
        more = text[starts + length] != end
        starts, run = starts[more], number[more] * 2**16 + text[starts[more] + length]


def judge(texts, data):
    """Score stories: {"grammar": array, "consistency": array, "copied": array}, and the readings.

    data: load_data() of the stories that the author of the texts was trained on."""
    meta, train, _ = data
    encode = load_tokenizer(meta["tokenizer"]).encode_ordinary
    tokens = [np.array(encode(" ".join(text.split()))) for text in texts]
    readings = [Reader(text).passages for text in texts]
    scores = {score.__name__: np.array([*map(score, readings)]) for score in (grammar, consistency)}
    return scores | {"copied": copied(tokens, train, meta["end"])}, readings


def mean_and_error(values, groups=None):
    """The mean and its standard error, None if undefined. Values with equal entries in groups are not independent."""
    if len(values) == 0:
        return None, None
    groups = np.arange(len(values)) if groups is None else np.unique(groups, return_inverse=True)[1]
    number, mean = groups.max() + 1, float(np.mean(values))
    sums = np.bincount(groups, np.asarray(values) - mean)
    return mean, float(np.sqrt(np.sum(sums**2) * number / (number - 1)) / len(values)) if number > 1 else None


def recall(model, data, stories=None):
    """How well a model recalls the words that a story so far determines, in unseen stories of the world -> two dicts.

    Arrays, one entry per word: story, its number; distance from its last mention, in tokens; p, its probability by the
    model among all words of its category; chance, by a guess among all of them; copying, by a guess among those that
    the story has used; asked: is a fact recalled that copying cannot answer?
    Numbers: recall (with recall_error), chance and copying are means over the words asked for. excess is in nats per
    token over all stories that fit into the context; lost is the part of it at determined words, 0 if perfect."""
    import torch  # here, because reading stories needs no torch

    meta, _, val = data
    tokenizer, device = load_tokenizer(meta["tokenizer"]), next(model.parameters()).device
    rows, scored, excess = [], 0, 0.0

    @cache
    def candidates(category, form, space, capital):
        words = [word.form(form) for word in words_of(category)]
        return [tokenizer.encode_ordinary(" " * space + (world.capitalise(w) if capital else w)) for w in words]

    unseen = np.split(val, np.flatnonzero(val == meta["end"]))[1:-1]  # each with its <|endoftext|> in front
    for number, tokens in enumerate(unseen[:stories]):
        story = world.Author(meta["seed"], meta["stories"] - meta["val_stories"] + number)
        written, positions = world.locate(story, tokenizer)
        if written != tokens[1:].tolist():
            raise InputError("the validation stories are of another version of the world; make data/stories again")
        if len(tokens) > model.config.block_size:
            continue
        idx = torch.tensor([[*tokens.tolist(), meta["end"]]], device=device)
        with torch.no_grad():
            logits, loss = model(idx[:, :-1], idx[:, 1:])
        logits = logits[0].cpu().double()
        scored += len(tokens)
        excess += loss.item() * len(tokens) - story.nats
        for word, (position, distance) in zip(story.determined, positions, strict=True):
            before, capital = story.text[word.start - 1], story.text[word.start].isupper()
            every = left = candidates(word.category, word.form, before == " ", capital)
            p, i = 1.0, 0
            while nexts := sorted({option[i] for option in left if len(option) > i}):
                token = written[position + i]
                if i and token not in nexts:  # the word is complete; a longer one begins like it: cap, cape
                    break
                p *= logits[position + i, nexts].softmax(0)[nexts.index(token)].item()
                left = [option for option in left if option[i : i + 1] == [token]]
                i += 1
            rows.append((number, distance, p, 1 / len(every), 1 / word.used, word.asked and word.used > 1))
    if not any(asked for *_, asked in rows):
        raise InputError(f"no validation story of at most {model.config.block_size} tokens asks for a fact")
    found = dict(zip(("story", "distance", "p", "chance", "copying", "asked"), np.array(rows).T, strict=True))
    found["asked"] = asked = found["asked"].astype(bool)
    mean, error = mean_and_error(found["p"][asked], found["story"][asked])
    means = {name: mean_and_error(found[name][asked])[0] for name in ("chance", "copying")}
    lost = float(np.log(1 / np.maximum(found["p"], 1e-300)).sum())
    means |= {"excess": excess / scored, "lost": lost / scored}
    return found, means | {"recall": mean, "recall_error": error}


def explain(passages):
    """Yield lines: each passage that does not parse or contradicts the story, and below it what it contradicts."""
    for passage in passages:
        wrong = [statement for statement in passage.statements if not statement.agrees]
        if wrong or not passage.parsed:
            yield ("contradiction: " if wrong else "no such sentence: ") + passage.text
        for says, _, source in wrong:
            yield f"    {says}" + (f"; it was told: {passages[source].text}" if source is not None else "")


def main():
    parser = Parser(description="Score stories: grammar, consistency, and how much is copied.")
    parser.add_argument("file", type=Path, help="stories with <|endoftext|> or blank lines between them")
    parser.add_argument("--explain", action="store_true", help="say what is wrong with each story")
    parser.add_argument("--data", type=Path, default=DATA / "stories", help="data to look for copies in (%(default)s)")
    args = parser.parse_args()
    texts = [re.sub(r"(?m)^\([\d.]+ nats\)$", "", text).strip() for text in read_txt(args.file)]  # of stories.py tell
    if not (texts := [text for text in texts if text]):
        raise InputError(f"{args.file}: no stories to judge")
    scores, readings = judge(texts, load_data(args.data))
    for i, passages in enumerate(readings if args.explain else ()):
        print(f"story {i + 1}: " + ", ".join(f"{name} {values[i]:.2f}" for name, values in scores.items()))
        print("".join(f"    {line}\n" for line in explain(passages)), end="")
    for name, values in scores.items():
        print(f"{name:<12}" + " ± ".join(f"{number:.2f}" for number in mean_and_error(values) if number is not None))


if __name__ == "__main__":
    run(main)
