"""A small story world: simple English, a state that later sentences must agree with, and a known entropy.

Story i of a seed is a pure function of (seed, i). It follows a plot, and every random choice of its author goes through
Author.choose, which adds up -log p. Different choices give different texts, so the sum is the exact information content
of the text, -log P(text). Its mean per token is the floor: the loss in nats that no model of these stories can beat.

world.txt holds the words, plots and sentences, for writing here and for reading in judge.py:
    @name = word, word, ...     a list of words; verb:past object gives two forms ("feed:fed the ducks")
    > plot: step step? a|b      steps: events, or names of other steps; `a|b` takes one, a step with `?` may be left out
            event*45 each:event     tell it 4 or 5 times, each time with a new cast; recall these casts in random order
    == event: FACT, FACT        an event, what it says about the state, and below it the ways to tell it, one a line
    {slot} or {slot.form}       somebody or something in the story, cast at the first mention; {+slot} casts it anew;
                                food2 is another food; {thing.a} is "a fine red drum"
    [this|that]                 one of them
A fact is `subject relation object`. It sets the state; `...?` recalls it, so it must be true; `...!` must be false.
"""

import base64
import math
import re
import sys
from bisect import bisect_left
from collections import Counter, defaultdict, namedtuple
from functools import cache
from itertools import product
from pathlib import Path
from random import Random

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))  # where the package `data` is found

from data.common import PATTERN, VOCABULARY, InputError, Parser, load_tokenizer, run, wrap

WORLD = re.sub(r"\n +", " ", (Path(__file__).parent / "world.txt").read_text(encoding="utf-8"))  # join indented lines
WORLD = re.sub(r"\{(\+?)((?:thing|fragile)\d?)\.a\}", r"{\1\2.article} {\2.quality} {\2.colour} {\2}", WORLD)


def capitalise(text):
    """Capitalise sentences: "Oh!" she said. But not a quotation after a comma: She said, "only a sock"."""
    return re.sub(r'(^|\n|[.!?] |\." |(?<!, )")([a-z])', lambda m: m[1] + m[2].upper(), text)


class Word(str):
    """A word or phrase, with its other forms as attributes (a, past, at, he, his, colour, ...)."""

    def __new__(cls, text, **forms):
        word = super().__new__(cls, text)
        word.__dict__.update(forms)
        return word

    def form(self, name):
        return getattr(self, name) if name else self


def a_or_an(noun):
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def entry(item):
    """One item of a list in world.txt -> Word."""
    if ":" in item:
        verb, past = item.split(":")
        return Word(verb + past[len(past.split()[0]) :], past=past)
    return Word(item, a=a_or_an(item))


@cache
def parse(template):
    """A way to tell an event -> its parts: str, (slot, form, anew), or [alternatives], each a list of parts."""
    tokens = re.findall(r"\[(.*?)\]|\{(\+?)(\w+)\.?(\w*)\}|([^\[{]+)", template)
    return [
        [parse(option) for option in options.split("|")] if options else text or (slot, form, anew == "+")
        for options, anew, slot, form, text in tokens
    ]


LISTS = dict(re.findall(r"^@(.+?) = (.*)", WORLD, re.M))
LISTS = {name: [entry(item) for item in re.split(r", +", items)] for name, items in LISTS.items()}
LISTS["place"] = [  # "spot in the park" makes "the park" a place, at which one is "in the park"
    Word("the " + name.split(" the ")[1], at=name.removeprefix("spot ")) for name in LISTS if name.startswith("spot ")
]
LISTS["home"] = [
    Word(f"{home} {where}", a=f"{a_or_an(home)} {where}", the=f"the {home} {where}")
    for home, where in product(LISTS["home"], LISTS["where"])
]
PLANS = dict(re.findall(r"^> (\w+): (.*)", WORLD, re.M))  # plots, and parts of plots
EVENTS = {}  # {name: (facts, tellings)}; a fact ends in "?", "!", or, if it sets the state, in any other letter
for name, facts, body in re.findall(r"^== (\w+):(.*)\n((?:[^=#\n].*\n)+)", WORLD, re.M):
    facts = [(*fact.rstrip("?!").split(), fact[-1]) for fact in facts.split(",") if fact.strip()]
    EVENTS[name] = facts, capitalise(body).splitlines()
PLOTS = [name for name in PLANS if f"moral_{name}" in EVENTS]
PRONOUNS = {
    "boy": dict(he="he", him="him", his="his", hers="his"),
    "girl": dict(he="she", him="her", his="her", hers="hers"),
}
LISTS["name"] = LISTS["girl"] + LISTS["boy"]
PEOPLE = ("hero", "friend", "child")


def role_of(slot):
    """What fills a slot: "food" for food2."""
    return slot.rstrip("23")


def category_of(slot, form):
    """The list that a form of a slot draws from. None for articles, pronouns and surnames: a word has those."""
    if form in ("article", "surname", *PRONOUNS["boy"]):
        return None
    if form in ("colour", "quality", "kind"):
        return form
    return "name" if role_of(slot) in PEOPLE else role_of(slot)


@cache
def words_of(category):
    """All words of a category, such as "name", "colour" or "spot" (at every place)."""
    if category == "kind":
        return [*LISTS["kind"], *map(Word, PRONOUNS)]
    return LISTS.get(category) or [word for place in LISTS["place"] for word in LISTS[f"{category} {place.at}"]]


# A word that the story so far determines, because it mentions somebody or something again. start, end: in the text;
# used: how many words of its category the story has used, this one included; last: where its last mention ended; asked:
# does this telling recall a fact about it?
Determined = namedtuple("Determined", "start end category form used last asked")


class Author:
    """Writes one story. text; nats: its information content; spent: nats by type of choice; determined: words that a
    reader must remember; events: [(name, {slot: word})]."""

    def __init__(self, seed, index):
        self.random = Random(f"{seed} {index}").random
        self.spent = Counter()
        self.draft, self.events, self.determined = "", [], []
        self.cast, self.used = {}, set()  # who and what is in the story, by slot; all words cast so far
        self.state = {}  # {(subject, relation): object}
        self.introduced = set()  # {(subject, category of word)}
        self.mentions = defaultdict(dict)  # {category: {word: the end of its last mention}}
        self.casts = self.open_casts = []  # not yet recalled; those that this telling could still mean
        self.write_story()
        self.text, self.nats = capitalise(self.draft).replace("\n", " "), sum(self.spent.values())

    # Choices

    def choose(self, options, about="plot"):
        """The only source of randomness: one of options (all different), each equally likely."""
        self.spent[about] += math.log(len(options))
        return options[int(self.random() * len(options))]

    def pick(self, options):
        """One of options that is not in the story yet."""
        word = self.choose([option for option in options if option not in self.used], "cast")
        self.used.add(word)
        return word

    def appear(self, slot):
        """Cast somebody or something new for a slot."""
        role = role_of(slot)
        if role in PEOPLE:
            child = self.choose(("boy", "girl"), "cast")
            name, kind, surname = self.pick(LISTS[child]), Word(child), ""
            if role != "child" and self.choose((True, False), "cast"):
                kind = self.pick(LISTS["kind"])
                surname = f" the {kind}"
            word = Word(name, kind=kind, surname=surname, **PRONOUNS[child])
        elif role in ("thing", "fragile"):
            quality, colour = self.choose(LISTS["quality"], "cast"), self.pick(LISTS["colour"])
            word = Word(self.pick(LISTS[role]), quality=quality, colour=colour, article=a_or_an(quality).split()[0])
        else:  # every place has spots, helpers, and fun of its own
            word = self.pick(LISTS[role if role in LISTS else f"{role} {self.cast['place'].at}"])
        self.cast[slot] = word

    # Sentences

    def say(self, event, **cast):
        """Tell an event in one of its ways. Facts that it recalls must hold; the others are set. -> {slot: new word}"""
        self.cast.update(cast)
        facts, tellings = EVENTS[event]
        recalled = {slot for s, _, o, mode in facts if mode == "?" for slot in (s, o.partition(".")[0])}
        self.asked = recalled - {"hero"}  # named in most sentences anyway
        self.draft += "\n" if self.draft else ""
        self.events.append((event, {}))
        new = {}
        self.render(parse(self.choose(tellings, "telling")), new)
        self.open_casts = []
        for subject, relation, value, mode in facts:
            subject = self.cast.get(subject, subject)
            slot, _, form = value.partition(".")
            value = self.cast[slot].form(form) if form else self.cast.get(slot, slot)
            if mode not in "?!":
                self.state[subject, relation] = value
            elif (self.state.get((subject, relation)) == value) != (mode == "?"):
                raise AssertionError(f"{event}: {subject} {relation} {value}{mode} in {self.state}")
        return new

    def render(self, parts, new):
        for part in parts:
            if type(part) is str:
                self.draft += part
            elif type(part) is list:
                self.render(self.choose(part, "wording"), new)
            else:
                slot, form, anew = part
                if anew or slot not in self.cast:
                    self.appear(slot)
                word = self.events[-1][1][slot] = self.cast[slot]
                new |= {slot: word} if anew else {}
                if category := category_of(slot, form):
                    self.write(slot, category, form)
                else:
                    self.draft += word.form(form)

    def write(self, slot, category, form):
        """Write a word, and record it if the story so far determines it."""
        subject, start, last = self.cast[slot], len(self.draft), self.mentions[category]
        word, form = (subject.form(form), "") if category == form else (subject, form)
        self.draft += word.form(form)
        end, asked = len(self.draft), slot in self.asked
        free_choice = len({cast.get(slot) for cast in self.open_casts}) > 1  # the word tells which of them
        if (subject, category) in self.introduced and not free_choice:
            self.determined.append(Determined(start, end, category, form, len(last), last[word], asked))
        self.introduced.add((subject, category))
        last[word] = end
        self.open_casts = [cast for cast in self.open_casts if cast.get(slot, subject) == subject]

    def write_story(self):
        self.say("open")
        self.play("trait|hobby?")
        self.plot = self.choose(PLOTS)
        self.play(PLANS[self.plot])
        ends = [slot for slot in ("home", "trait", "hobby") if slot in self.cast]
        if ends := ends[self.plot == "promise" :]:  # there, the hero is at home already
            self.say(f"end_{self.choose(ends)}")
        self.say(f"moral_{self.plot}")
        self.play("the_end?")

    def play(self, steps):
        """Tell a plot, or a part of one."""
        for step in steps.split():
            if step.endswith("?") and not self.choose((True, False)):
                continue
            options, _, times = step.removeprefix("each:").rstrip("?").partition("*")
            if times:
                self.casts = [self.say(options) for _ in range(int(self.choose(times)))]
            elif step.startswith("each:"):
                while self.casts:
                    event, cast = self.choose(options.split("|")), self.choose(self.casts)
                    self.open_casts = self.casts
                    self.say(event, **cast)
                    self.casts = [other for other in self.casts if other is not cast]
            else:
                name = self.choose(options.split("|"))
                self.say(name) if name in EVENTS else self.play(PLANS[name])


def locate(story, tokenizer):
    """-> a story's tokens; and for each determined word, its first token, and how far that is from its last mention."""
    tokens = tokenizer.encode_ordinary(story.text)
    starts = tokenizer.decode_with_offsets(tokens)[1]
    positions = [bisect_left(starts, word.start - (story.text[word.start - 1] == " ")) for word in story.determined]
    lasts = [bisect_left(starts, word.last) for word in story.determined]
    return tokens, [(position, position - last) for position, last in zip(positions, lasts, strict=True)]


def floor_report(seed, count, tokenizer, far=128):
    """Yield lines of text: the floor by type of choice, and the loss of models that recall less, in nats per token."""
    spent, gains, lengths = Counter(), Counter(), []
    for index in range(count):
        story = Author(seed, index)
        tokens, positions = locate(story, tokenizer)
        lengths.append(len(tokens) + 1)  # with <|endoftext|>
        spent.update(story.spent)
        for word, (_, distance) in zip(story.determined, positions, strict=True):
            nats, apart = math.log(len(words_of(word.category))), math.log(word.used)
            gains.update(recall=nats, apart=apart, asked=apart * word.asked, distant=nats * (distance >= far))
    total = sum(lengths)
    floor, (recall, apart, asked, distant) = spent.total() / total, (gain / total for gain in gains.values())
    yield f"{count:,} stories of {total / count:.1f} tokens on average, {max(lengths)} at most"
    yield f"{floor:.4f} nats per token is the floor: " + ", ".join(f"{k} {v / total:.4f}" for k, v in spent.items())
    yield f"{floor + recall:.4f} for a model that knows the world and recalls no determined word"
    yield f"{floor + apart:.4f} for one that copies any word of the category that the story has used"
    yield f"{apart:.4f} is the gain from telling such words apart, {asked:.4f} of it where a fact is recalled"
    yield f"{distant:.4f} is the gain from recalling words last mentioned {far} or more tokens ago"


def main():
    example = "example: python data/stories.py tell 5 --seed=3"
    parser = Parser(description="Tell stories of the world, measure it, or make its vocabulary.", epilog=example)
    about = f"tell: print stories and their nats; floor: explain the floor; vocabulary: rewrite {VOCABULARY.name}"
    parser.add_argument("command", choices=("tell", "floor", "vocabulary"), help=about)
    parser.add_argument("count", nargs="?", type=int, default=1, help="stories to tell or to measure (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the corpus (default: 0)")
    args = parser.parse_args()
    if args.count < 1:
        raise InputError(f"{args.count} stories: must be at least 1")
    if args.command == "tell":
        for index in range(args.count):
            story = Author(args.seed, index)
            print(f"{wrap(story.text)}\n({story.nats:.1f} nats)\n")
    elif args.command == "floor":
        print(*floor_report(args.seed, args.count, load_tokenizer("stories")), sep="\n")
    else:
        stories = (Author("vocabulary", index).text for index in range(20_000))
        words = Counter(piece.encode() for text in stories for piece in re.findall(PATTERN, text))
        tokens = [bytes([byte]) for byte in range(256)]  # so that any text has tokens
        tokens += sorted(words.keys() - set(tokens), key=lambda word: (-words[word], word))
        lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
        VOCABULARY.write_text("".join(lines), encoding="ascii")
        print(f"{len(tokens)} tokens in {VOCABULARY}")


if __name__ == "__main__":
    run(main)
