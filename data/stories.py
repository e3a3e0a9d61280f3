"""A small world in which stories happen: simple English, a state that later sentences must agree with, known entropy.

Story i of a seed is a pure function of (seed, i). It follows a plot, and every random choice of its author goes through
Author.choose, which adds up -log p. Different choices give different texts, so the sum is the exact information content
of the text, -log P(text). Its mean per token is the floor: the loss in nats that no model of these stories can beat.

world.txt holds the words, plots and sentences, for writing here and for reading in judge.py:
    @name = word, word, ...     a list of words; verb:past object gives two forms ("feed:fed the ducks")
    > plot: step step? a|b      steps: an event, or the name of other steps; `?` may be left out, `|` takes one of them
            event*45 each:event     tell it 4 or 5 times, each with new ones; then recall each of them, in another order
    == event: FACT, FACT        an event, what it says about the state, and below it the ways to tell it, one a line
    {slot} or {slot.form}       somebody or something in the story, cast at the first mention; {+slot} casts it anew
    [this|that]                 one of them
A fact is `subject relation object`. It sets the state; `...?` recalls it, so it must be true; `...!` must be false.
"""

import base64
import math
import re
import sys
from bisect import bisect_left
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from string import Formatter

WORLD = re.sub(r"\n +", " ", (Path(__file__).parent / "world.txt").read_text(encoding="utf-8"))  # join indented lines
FIRST_LETTERS = re.compile(r'(^|\n|[.!?] |\." |(?<!, )")([a-z])')  # of sentences, quoted ones too


class Word(str):
    """A word or phrase, with its other forms as attributes (a, past, at, he, his, colour, ...)."""

    def __new__(cls, text, **forms):
        word = super().__new__(cls, text)
        word.__dict__.update(forms)
        return word

    def form(self, name):
        return getattr(self, name) if name else self


def article(noun):
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def entry(item):
    """One item of a list in world.txt -> Word."""
    if ":" in item:
        verb, past = item.split(":")
        return Word(verb + past[len(past.split()[0]) :], past=past)
    return Word(item, a=article(item))


@cache
def parse(template):
    """A way to tell an event -> nested parts: str, (slot, form, anew), or [alternatives], each a list of parts."""

    def sequence():
        parts = []
        while tokens and tokens[-1] not in "]|":
            token = tokens.pop()
            if token == "[":
                parts.append([sequence()])
                while tokens.pop() == "|":
                    parts[-1].append(sequence())
            elif token[0] == "{":
                slot, _, form = token.strip("{+}").partition(".")
                parts.append((slot, form, token[1] == "+"))
            else:
                parts.append(token)
        return parts

    tokens = re.findall(r"\{\+?[\w.]+\}|[\[\]|]|[^{}\[\]|]+", template)[::-1]
    return sequence()


LISTS = {
    name: [entry(item) for item in re.split(r", +", items)]
    for name, items in re.findall(r"^@(.+?) = (.*)", WORLD, re.M)
}
LISTS["place"] = [  # "spot in the park" makes "the park" a place, at which one is "in the park"
    Word("the " + name.split(" the ")[1], at=name.removeprefix("spot ")) for name in LISTS if name.startswith("spot ")
]
LISTS["home"] = [
    Word(f"{home} {where}", a=f"{article(home)} {where}", the=f"the {home} {where}")
    for home in LISTS["home"]
    for where in LISTS["where"]
]
PLANS = dict(re.findall(r"^> (\w+): (.*)", WORLD, re.M))  # plots, and parts of plots
EVENTS = {
    name: ([(*fact.rstrip("?!").split(), fact[-1]) for fact in facts.split(",") if fact.strip()], body.splitlines())
    for name, facts, body in re.findall(r"^== (\w+):(.*)\n((?:[^=#\n].*\n)+)", WORLD, re.M)
}
PLOTS = [name for name in PLANS if f"moral_{name}" in EVENTS]
PRONOUNS = {
    "boy": dict(he="he", him="him", his="his", hers="his"),
    "girl": dict(he="she", him="her", his="her", hers="hers"),
}
# What takes several words to name: by role, then by form. A slot of any other role holds one word of a list.
NAMES = {
    "hero": {"": "{name}", "full": "{name} the {kind}", "kind": "{kind}"},
    "child": {"": "{name}"},
    "thing": {
        "": "{noun}",
        "full": "{quality} {colour} {noun}",
        "a": "{article} {quality} {colour} {noun}",
        "the": "the {colour} {noun}",
        "colour": "{colour}",
    },
}
NAMES |= {"friend": NAMES["hero"], "fragile": NAMES["thing"]}


def role_of(slot):
    """What fills a slot: food2 is another food."""
    return slot.rstrip("23")


@cache
def words_of(kind):
    """All words of a kind, such as "name", "colour" or "spot" (at every place)."""
    if kind in ("name", "kind"):
        return [*LISTS["girl"], *LISTS["boy"]] if kind == "name" else [*LISTS["kind"], *map(Word, PRONOUNS)]
    return LISTS.get(kind) or [word for place in LISTS["place"] for word in LISTS[f"{kind} {place.at}"]]


@cache
def spell(role, form):
    """How a slot is written -> [(text, piece, kind of word, its form)]: a text, and a word that follows it, if any.

    The piece says what the word tells about the slot: "" who or what it is, "colour" its colour, and so on."""
    if form in PRONOUNS["boy"]:
        return [("", form, "", "")]
    if role not in NAMES:
        return [("", "", role, form)]
    kinds = {"name": ("", "name"), "noun": ("", role), "article": ("article", "")}
    return [(text, *kinds.get(piece, (piece, piece)), "") for text, piece, *_ in Formatter().parse(NAMES[role][form])]


@dataclass
class Decided:
    """A word that the story so far decides, because it mentions somebody or something again."""

    start: int  # where in the text
    end: int
    kind: str  # words_of(kind) in this form could stand here
    form: str
    said: int  # how many words of the kind the story has used, this one included
    since: int  # the end of its last mention
    asked: bool  # does this telling recall a fact about it?


class Author:
    """Writes one story.

    text; spent, its information content in nats by what was chosen; decided, the words that take memory; events, a list
    of (name, {slot: word})."""

    def __init__(self, seed, index):
        self.random = Random(f"{seed} {index}").random
        self.spent = Counter()
        self.draft, self.events, self.decided = "", [], []
        self.cast, self.used = {}, set()  # who and what is in the story, by slot; all words cast so far
        self.state = {}  # {(subject, relation): object}
        self.introduced = set()  # {(subject, kind of word)}
        self.said = defaultdict(dict)  # {kind: {word: the end of its last mention}}
        self.told, self.alternatives = [], []  # casts of a repeated event; those that the sentence so far leaves open
        self.write_story()
        self.text = FIRST_LETTERS.sub(lambda m: m[1] + m[2].upper(), self.draft).replace("\n", " ")

    @property
    def nats(self):
        return math.fsum(self.spent.values())

    # Choices

    def choose(self, options, about="plot"):
        """The only source of chance: one of options (all different), each equally likely."""
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
        if role in ("hero", "friend", "child"):
            child = self.choose(("boy", "girl"), "cast")
            name, kind = self.pick(LISTS[child]), Word(child)
            if role != "child" and self.choose((True, False), "cast"):
                kind = self.pick(LISTS["kind"])
            word = Word(name, kind=kind, **PRONOUNS[child])
        elif role in NAMES:
            quality, colour = self.choose(LISTS["quality"], "cast"), self.pick(LISTS["colour"])
            word = Word(self.pick(LISTS[role]), quality=quality, colour=colour, article=article(quality).split()[0])
        else:  # every place has spots, helpers, and fun of its own
            word = self.pick(LISTS[role if role in LISTS else f"{role} {self.cast['place'].at}"])
        self.cast[slot] = word

    # Sentences

    def say(self, event, **cast):
        """Tell an event in one of its ways. What it recalls must be true; the rest becomes so. -> the newly cast."""
        self.cast.update(cast)
        facts, tellings = EVENTS[event]
        recalled = {slot for s, _, o, mode in facts if mode == "?" for slot in (s, o.partition(".")[0])}
        self.asked = recalled - {"hero"}  # who is named in every other sentence
        self.draft += "\n" * bool(self.draft)
        self.events.append((event, {}))
        new = {}
        self.render(parse(self.choose(tellings, "telling")), new)
        self.alternatives = []
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
                if form == "full" and getattr(word, "kind", "") in PRONOUNS:  # "Tom", not "Tom the boy"
                    form = ""
                for text, piece, kind, kind_form in spell(role_of(slot), form):
                    self.draft += text
                    if kind:
                        self.write(slot, kind, kind_form, word.form(piece))
                    elif piece:  # an article or a pronoun
                        self.draft += word.form(piece)

    def write(self, slot, kind, form, word):
        """Write a word, and record it if the story so far decides it."""
        start, subject, said = len(self.draft), self.cast[slot], self.said[kind]
        self.draft += word.form(form)
        open_choice = len({cast.get(slot) for cast in self.alternatives}) > 1  # which one comes next shows here
        if (subject, kind) in self.introduced and not open_choice:
            asked = slot in self.asked
            self.decided.append(Decided(start, len(self.draft), kind, form, len(said), said[word], asked))
        self.introduced.add((subject, kind))
        said[word] = len(self.draft)
        self.alternatives = [cast for cast in self.alternatives if cast.get(slot, subject) == subject]

    # Plots

    def write_story(self):
        self.plot = ""
        self.say("open")
        self.play("trait|hobby?")
        self.plot = self.choose(PLOTS)
        self.play(PLANS[self.plot])
        ends = {"home": "go_home", "trait": "end_trait", "hobby": "end_hobby"}
        if self.plot == "promise":  # which is kept at home
            del ends["home"]
        if ends := [event for slot, event in ends.items() if slot in self.cast]:
            self.say(self.choose(ends))
        self.say(f"moral_{self.plot}")
        self.play("the_end?")

    def play(self, steps):
        """Tell a plot, or a part of one."""
        for step in steps.split():
            if step.endswith("?") and not self.choose((True, False)):
                continue
            each, step = step.startswith("each:"), step.removeprefix("each:").rstrip("?")
            event, _, times = step.partition("*")
            if times:
                self.told = [self.say(event) for _ in range(int(self.choose(times)))]
            while each and self.told:
                event = self.choose(step.split("|"))
                cast = self.choose(self.told)
                self.alternatives = self.told  # the first word that tells them apart is a choice, not a memory
                self.say(event, **cast)
                self.told = [other for other in self.told if other is not cast]
            if not times and not each:
                step = self.choose(step.split("|"))
                self.say(step) if step in EVENTS else self.play(PLANS[step])


# What recall is worth -------------------------------------------------------------------------------------------------


def locate(story, tokenizer):
    """-> a story's tokens, and for each decided word its first token's place and its distance from the last mention."""
    tokens = tokenizer.encode_ordinary(story.text)
    starts = tokenizer.decode_with_offsets(tokens)[1]
    places = [bisect_left(starts, word.start - (story.text[word.start - 1] == " ")) for word in story.decided]
    return tokens, [(at, at - bisect_left(starts, w.since)) for at, w in zip(places, story.decided, strict=True)]


def worth(count, tokenizer, far=128):
    """What the floor of so many stories is made of, and what recall is worth, as lines of text: nats per token."""
    spent, worths, lengths = Counter(), Counter(), []
    for index in range(count):
        story = Author(0, index)
        tokens, places = locate(story, tokenizer)
        lengths.append(len(tokens) + 1)  # with <|endoftext|>
        spent.update(story.spent)
        for word, (_, distance) in zip(story.decided, places, strict=True):
            nats = math.log(len(words_of(word.kind)))
            worths.update(all=nats, apart=math.log(word.said), far=nats * (distance >= far))
    total = sum(lengths)
    floor, parts = sum(spent.values()) / total, ", ".join(f"{what} {nats / total:.4f}" for what, nats in spent.items())
    yield f"{count:,} stories of {total / count:.1f} tokens on average, {max(lengths)} at most"
    yield f"{floor:.4f} nats per token is the floor: {parts}"
    yield f"{floor + worths['all'] / total:.4f} for a model that knows the world and recalls nothing"
    yield f"{floor + worths['apart'] / total:.4f} for one that copies any word of the kind that the story has used"
    yield f"{worths['apart'] / total:.4f} is what keeping such words apart is worth"
    yield f"{worths['far'] / total:.4f} is what recalling words last said {far} or more tokens before is worth"


def main():
    from data.common import PATTERN, VOCABULARY, InputError, Parser, load_tokenizer, wrap

    example = "example: python data/stories.py tell 5 --seed=3"
    parser = Parser(description="Tell stories of the story world, measure it, or make its vocabulary.", epilog=example)
    commands = parser.add_subparsers(dest="command", required=True)
    tell = commands.add_parser("tell", help="print stories, and the information content of each")
    tell.add_argument("count", nargs="?", type=int, default=1, help="how many (default: 1)")
    tell.add_argument("--seed", type=int, default=0, help="seed of the corpus (default: 0)")
    floor = commands.add_parser("floor", help="what the floor is made of, and what recall is worth")
    floor.add_argument("count", nargs="?", type=int, default=1000, help="stories to measure (default: 1000)")
    commands.add_parser("vocabulary", help=f"write {VOCABULARY.name}: the bytes, and the words of 20,000 stories")
    args = parser.parse_args()
    if args.command == "tell":
        for index in range(args.count):
            story = Author(args.seed, index)
            print(f"{wrap(story.text)}\n({story.nats:.1f} nats)\n")
    elif args.command == "floor":
        if args.count < 1:
            raise InputError(f"{args.count} stories: must be at least 1")
        print(*worth(args.count, load_tokenizer("stories")), sep="\n")
    else:
        stories = (Author("vocabulary", index).text for index in range(20_000))
        words = Counter(piece.encode() for text in stories for piece in re.findall(PATTERN, text))
        tokens = [bytes([byte]) for byte in range(256)]  # so that any text has tokens
        tokens += sorted(words.keys() - set(tokens), key=lambda word: (-words[word], word))
        lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
        VOCABULARY.write_text("".join(lines), encoding="ascii")
        print(f"{len(tokens)} tokens in {VOCABULARY}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))  # where the package `data` is found
    from data.common import run

    run(main)
