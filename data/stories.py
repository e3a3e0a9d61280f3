"""A small world in which stories happen: simple English, a state that later sentences must agree with, known entropy.

Story i of a seed is a pure function of (seed, i). It follows a plot, and every random choice of its author goes through
Author.choose, which adds up -log p. Different choices give different texts, so the sum is the exact information content
of the text, -log P(text). Its mean per token is the floor: the loss in nats that no model of these stories can beat.

world.txt holds the words and sentences, for writing here and for reading in judge.py:
    @name = word, word, ...     a list of words; verb:past object gives two forms ("feed:fed the ducks")
    == event: FACT, FACT        an event, what it says about the state, and below it the ways to tell it, one a line
    {slot} or {slot.field}      somebody or something in the story, cast at the first mention; {+slot} casts it anew
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
    """A way to tell an event -> nested parts: str, (slot, field, anew), or [alternatives], each a list of parts."""

    def sequence():
        parts = []
        while tokens and tokens[-1] not in "]|":
            token = tokens.pop()
            if token == "[":
                parts.append([sequence()])
                while tokens.pop() == "|":
                    parts[-1].append(sequence())
            elif token[0] == "{":
                slot, _, field = token.strip("{+}").partition(".")
                parts.append((slot, field, token[1] == "+"))
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
EVENTS = {}
for name, facts, body in re.findall(r"^== (\w+):(.*)\n((?:[^=#\n].*\n)+)", WORLD, re.M):
    facts = [(*fact.rstrip("?!").split(), fact[-1]) for fact in facts.split(",") if fact.strip()]
    EVENTS[name] = facts, body.splitlines()

LISTS["home"] = [
    Word(f"{home} {where}", a=f"{article(home)} {where}", the=f"the {home} {where}")
    for home in LISTS["home"]
    for where in LISTS["where"]
]
PRONOUNS = {
    "boy": dict(he="he", him="him", his="his", hers="his"),
    "girl": dict(he="she", him="her", his="her", hers="hers"),
}
LISTS["name"] = LISTS["girl"] + LISTS["boy"]
# What is called by more than one word: by role, then by field. A slot of any other role holds one word of a list.
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
def spell(role, field):
    """How a slot is written -> [(text, piece, kind of word, its form)]: a text, and a word that follows it, if any.

    The piece says what of the slot the word tells: "" is who or what it is."""
    if field in PRONOUNS["boy"]:
        return [("", field, "", "")]
    if role not in NAMES:
        return [("", "", role, field)]
    kinds = {"name": ("", "name"), "noun": ("", role), "article": ("article", "")}
    return [(text, *kinds.get(piece, (piece, piece)), "") for text, piece, *_ in Formatter().parse(NAMES[role][field])]


@cache
def words_of(kind):
    """All words of a kind, such as "name", "colour" or "spot" (at every place)."""
    if kind == "kind":
        return LISTS["kind"] + [Word(child) for child in PRONOUNS]
    return LISTS.get(kind) or [word for place in LISTS["place"] for word in LISTS[f"{kind} {place.at}"]]


# A plot is a trouble and its end, step by step: an event, a method of Author, or one of PARTS. `step?` may be left out,
# and of `this|that` one is taken. The moral of a plot is the event moral_<plot>.
PLOTS = {
    "lost": "own set_out put pastime miss weep? search? ask_spot|ask_helper find hug?",
    "promise": "want promised do_chore tempt resist|yield reward",
    "party": "invite tell_pairs pastime ask_pairs",
    "swap": "own set_out swaps",
    "rescue": "set_out stuck tell_pairs borrow free ask_pairs give_back",
    "broken": "set_out lend break conceal pastime ask_thing lie? confess repair ask_glue?",
    "hide": "set_out count tell_pairs ready ask_pairs",
    "errand": "errand way beggar share_either scene? arrive ask_food praise",
    "treasure": "set_out map get_key guard? chest divide pastime? ask_divide|ask_key",
    "noise": "set_out hear tell_pairs dare? reveal name pastime ask_pairs keep_pet?",
    "house": "set_out build tell_pairs rain ask_pairs move_in",
    "play": "set_out stage tell_pairs curtain pastime ask_pairs",
    "band": "set_out tune tell_pairs applause pastime ask_pairs",
    "kites": "set_out fly tell_pairs pastime gust ask_pairs",
    "picnic": "set_out spread tell_pairs fun|scene ask_pairs",
    "tools": "set_out tidy tell_pairs pastime ask_pairs",
    "shelter": "set_out foundlings tell_pairs pastime ask_pairs",
}
PARTS = {
    "resist": "refuse help_chore",
    "yield": "follow replay pastime remember do_chore2",
    "pastime": "fun|snack|scene",
}
PAIRS = {  # plot: how many pairs it tells, one by one; the event; what is paired; the event that asks in another order
    "party": ((4, 5), "guest", "child thing", "quiz|quiz_colour"),
    "hide": ((4, 5), "hider", "child spot", "seek"),
    "rescue": ((3, 4), "try", "child tool", "return_tool"),
    "noise": ((4,), "guess", "child monster", "ask_guess"),
    "house": ((4, 5), "paint", "child part colour", "repaint"),
    "play": ((4, 5, 6), "costume", "child costume", "ask_costume"),
    "band": ((4, 5, 6), "instrument", "child instrument", "ask_instrument"),
    "kites": ((4, 5, 6), "kite", "child colour", "give_kite"),
    "picnic": ((4, 5, 6), "bring", "child food", "ask_dish"),
    "tools": ((4, 5), "put_tool", "child tool spot", "fetch_tool"),
    "shelter": ((4, 5, 6), "name_baby", "child baby pet", "feed_pet"),
}


@dataclass
class Decided:
    """A word that the story so far decides, as somebody or something is mentioned again."""

    start: int  # where it begins in the text
    end: int
    kind: str  # words_of(kind) in this form could stand here
    form: str
    said: int  # how many words of the kind the story has used, this one included
    since: int  # where it was last said: the end of that mention
    asked: bool  # does this telling recall a fact about it?


class Author:
    """Writes one story.

    text; spent, its information content in nats, by what the choices were about; decided, the words that need memory;
    events, [(name, {slot: word})], in their order."""

    def __init__(self, seed, index):
        self.random = Random(f"{seed} {index}").random
        self.spent = Counter()
        self.draft, self.events, self.decided = "", [], []
        self.cast, self.used = {}, set()  # who and what is in the story, by slot; all words cast so far
        self.state = {}  # {(subject, relation): object}
        self.introduced = set()  # (who or what, kind of word) that the story has told
        self.said = defaultdict(dict)  # {kind: {word: where it was last said}}
        self.alternatives = []  # casts that the sentences told so far leave open
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

    def coin(self):
        return self.choose((True, False))

    def pick(self, options):
        """One of options that is not in the story yet."""
        word = self.choose([option for option in options if option not in self.used], "cast")
        self.used.add(word)
        return word

    def choose_cast(self, casts):
        """One of several casts for the same event. The first word that tells them apart is a choice, not a memory."""
        cast = self.choose(casts)
        self.alternatives = [other for other in casts if other.get("event") == cast.get("event")]
        return cast

    def appear(self, slot):
        """Cast somebody or something new for a slot."""
        role = role_of(slot)
        if role in ("hero", "friend", "child"):
            child = self.choose(("boy", "girl"), "cast")
            name, kind = self.pick(LISTS[child]), child
            if role != "child" and self.choose((True, False), "cast"):
                kind = self.pick(LISTS["kind"])
            word = Word(name, kind=kind, **PRONOUNS[child])
        elif role in ("thing", "fragile"):
            quality, colour = self.choose(LISTS["quality"], "cast"), self.pick(LISTS["colour"])
            word = Word(self.pick(LISTS[role]), quality=quality, colour=colour, article=article(quality).split()[0])
        else:  # every place has spots, helpers, and fun of its own
            word = self.pick(LISTS[role if role in LISTS else f"{role} {self.cast['place'].at}"])
        self.cast[slot] = word

    # Sentences

    def say(self, event, **cast):
        """Tell an event in one of its ways, with this cast. What it recalls must be true; the rest becomes so."""
        self.cast.update(cast)
        facts, tellings = EVENTS[event]
        slots = {slot for s, _, o, mode in facts if mode == "?" for slot in (s, o.partition(".")[0])}
        self.asked = slots - {"hero"}  # who is named in every other sentence
        self.draft += "\n" * bool(self.draft)
        self.events.append((event, {}))
        self.render(parse(self.choose(tellings, "telling")))
        self.alternatives = []
        self.recall_or_set(facts)

    def render(self, parts):
        for part in parts:
            if type(part) is str:
                self.draft += part
            elif type(part) is list:
                self.render(self.choose(part, "wording"))
            else:
                slot, field, anew = part
                if anew or slot not in self.cast:
                    self.appear(slot)
                self.events[-1][1][slot] = self.cast[slot]
                self.mention(slot, field)

    def mention(self, slot, field):
        word = self.cast[slot]
        if field == "full" and getattr(word, "kind", "") in PRONOUNS:  # "Tom", not "Tom the boy"
            field = ""
        for text, piece, kind, form in spell(role_of(slot), field):
            self.draft += text
            if kind:
                self.write(slot, kind, form, getattr(word, piece) if piece else word)
            elif piece:  # an article or a pronoun
                self.draft += getattr(word, piece)

    def write(self, slot, kind, form, word):
        """Write a word, and record it if the story so far decides it."""
        start, subject, said = len(self.draft), self.cast[slot], self.said[kind]
        self.draft += getattr(word, form) if form else word
        settled = len({cast.get(slot) for cast in self.alternatives}) <= 1
        if settled and (subject, kind) in self.introduced:
            asked = slot in self.asked
            self.decided.append(Decided(start, len(self.draft), kind, form, len(said), said[word], asked))
        self.introduced.add((subject, kind))
        said[word] = len(self.draft)
        self.alternatives = [cast for cast in self.alternatives if cast.get(slot, subject) == subject]

    def recall_or_set(self, facts):
        for subject, relation, value, mode in facts:
            subject = self.cast.get(subject, subject)
            slot, _, field = value.partition(".")
            value = getattr(self.cast[slot], field) if field else self.cast.get(slot, slot)
            if mode in "?!":
                held = self.state.get((subject, relation))
                if (held == value) != (mode == "?"):
                    raise AssertionError(f"{subject} {relation} {value}{mode} but the state has {held}")
            else:
                self.state[subject, relation] = value

    # Plots

    def write_story(self):
        self.say("open")
        self.play("trait|hobby?")
        self.plot = self.choose(tuple(PLOTS))
        self.play(PLOTS[self.plot])
        recollections = self.recollections()
        if self.plot != "promise":  # which is kept at home
            recollections.insert(0, {"event": "go_home"})
        if recollections:
            self.say(**self.choose_cast(recollections))
        self.say(f"moral_{self.plot}")
        if self.coin():
            self.say("the_end")

    def recollections(self):
        """Events that end the day by remembering something in the story, each with a cast of what it remembers."""
        events = [{"event": f"end_{slot}"} for slot in ("trait", "hobby") if slot in self.cast]
        for (subject, relation), value in self.state.items():
            if relation == "at" and value == self.cast["hero"] and hasattr(subject, "colour"):
                events.append({"event": "bed", "thing": subject})
        return events

    def play(self, steps):
        """Tell a plot, or a part of one."""
        for step in steps.split():
            if step.endswith("?") and not self.coin():
                continue
            step = self.choose(step.rstrip("?").split("|")) if "|" in step else step.rstrip("?")
            if step in PARTS:
                self.play(PARTS[step])
            elif step in EVENTS:
                self.say(step)
            else:
                getattr(self, step)()

    def tell_pairs(self):
        """Who brought what, what lies where, ...: tell an event several times, with new ones in both slots."""
        counts, event, slots, _ = PAIRS[self.plot]
        self.pairs = []
        for _ in range(self.choose(counts)):
            for slot in slots.split():
                self.cast.pop(slot, None)
            self.say(event)
            self.pairs.append({slot: self.cast[slot] for slot in slots.split()})

    def ask_pairs(self):
        """Recall all pairs, in another order."""
        while self.pairs:
            event = self.choose(PAIRS[self.plot][3].split("|"))
            pair = self.choose_cast(self.pairs)
            self.say(event, **pair)
            self.pairs.remove(pair)

    def swaps(self):
        self.say("swap")
        friend, thing, thing2 = (self.cast[slot] for slot in ("friend", "thing", "thing2"))
        self.appear("friend")
        self.say("next_friend")
        friend2 = self.cast["friend"]
        self.appear("thing2")
        self.say("swap", thing=thing2)
        self.play("pastime?")
        self.say("regret", friend=friend, thing=thing)
        self.say("swap_back")
        if self.coin():
            self.say("count_swaps", friend2=friend2, thing3=thing2)

    def share_either(self):
        food, food2 = self.cast["food"], self.cast["food2"]
        self.say("share", **self.choose_cast([dict(food=food, food2=food2), dict(food=food2, food2=food)]))


# What recall is worth, in tokens --------------------------------------------------------------------------------------


@dataclass
class Question:
    """A word of a story that what was told decides, in tokens."""

    place: int  # of the first token that answers
    distance: int  # tokens since the answer was last said
    answer: list  # tokens
    candidates: list  # of lists of tokens: all words of the kind, the answer among them
    said: int  # how many of them the story has used so far
    asked: bool  # is a fact recalled, or is somebody or something just mentioned again?


@cache
def encoded(tokenizer, kind, form, space, capital):
    """{word as it is written: its tokens} for all words of a kind."""
    words = [str(getattr(word, form) if form else word) for word in words_of(kind)]
    words = [word[0].upper() + word[1:] for word in words] if capital else words
    return {word: tokenizer.encode_ordinary(" " * space + word) for word in words}


def questions(story, tokenizer):
    """The decided words of an Author's story -> its tokens, and a list of Questions."""
    text, tokens = story.text, tokenizer.encode_ordinary(story.text)
    begins, found = tokenizer.decode_with_offsets(tokens)[1], []
    for word in story.decided:
        space = text[word.start - 1] == " "  # a token begins with the space before it
        place = bisect_left(begins, word.start - space)
        candidates = encoded(tokenizer, word.kind, word.form, space, text[word.start].isupper())
        answer = candidates[text[word.start : word.end]]
        distance = place - bisect_left(begins, word.since)
        found.append(Question(place, distance, answer, [*candidates.values()], word.said, word.asked))
    return tokens, found


def worth(count, tokenizer, seed=0):
    """What the floor of `count` stories is made of, and what recall is worth, as lines of text: nats per token."""
    spent, worths, lengths, far = Counter(), Counter(), [], 128
    for index in range(count):
        story = Author(seed, index)
        tokens, asked = questions(story, tokenizer)
        lengths.append(len(tokens) + 1)  # with <|endoftext|>
        spent.update(story.spent)
        for question in asked:
            worths["nothing"] += math.log(len(question.candidates))
            worths["copy"] += math.log(question.said)
            worths["far"] += math.log(len(question.candidates)) * (question.distance >= far)
            worths["questions"] += question.asked and question.said > 1
    total = sum(lengths)
    floor = sum(spent.values()) / total
    yield f"{count:,} stories of {total / count:.1f} tokens on average, {max(lengths)} at most"
    yield f"{floor:.4f} nats per token is the floor: " + ", ".join(f"{k} {v / total:.4f}" for k, v in spent.items())
    yield f"{floor + worths['nothing'] / total:.4f} for a model that knows the world and recalls nothing"
    yield f"{floor + worths['copy'] / total:.4f} for one that copies any word of the kind that the story has used"
    yield f"{worths['copy'] / total:.4f} is what keeping such words apart is worth"
    yield f"{worths['far'] / total:.4f} is what recalling words is worth that were last said {far} tokens before, or more"
    yield f"{worths['questions'] / count:.1f} questions a story have two candidates or more"


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
