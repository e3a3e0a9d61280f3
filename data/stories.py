"""A small world in which stories happen: simple English, a state that later sentences must agree with, known entropy.

Story i of a seed is a pure function of (seed, i). It follows a plan (a hero, a friend, a place, a thing, a trouble, an
ending, a moral), and every random choice of its author goes through Author.choose, which adds up -log p. No two
sequences of choices give the same text, so the sum is the exact information content of the text, -log P(text), and its
mean per token is the loss in nats that no model of these stories can beat.

world.txt holds the words and sentences, for writing here and for reading back:
    @name = word, word, ...     a list of words; verb:past object gives two forms ("feed:fed the ducks")
    == event: FACT, FACT        an event, what it says of the state, and below it the ways to tell it, one a line
    {slot} or {slot.field}      somebody or something of the story, cast where it first appears; {+slot} casts it anew
    [this|that]                 one of them
A fact is `subject relation object`: it sets the state; `...?` recalls it, so it must be true; `...!` must be false.
"""

import base64
import math
import random
import re
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

WORLD = re.sub(r"\n +", " ", (Path(__file__).parent / "world.txt").read_text(encoding="utf-8"))  # indented lines go on
FIRST_LETTERS = re.compile(r'(^|\n|[.!?] |\." |(?<!, )")([a-z])')  # of sentences, quoted ones too


class Word(str):
    """A word or phrase, with other forms of it as attributes (a, the, past, he, his, colour, ...)."""

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
    EVENTS[name] = facts, [parse(line) for line in body.splitlines()]


# How somebody or something is called, besides by the first of these words: by role and field, of words from the lists.
NAMES = {
    "person": {"": "{name}", "full": "{name} the {kind}", "kind": "{kind}"},
    "thing": {
        "": "{noun}",
        "full": "{quality} {colour} {noun}",
        "a": "{article} {quality} {colour} {noun}",
        "the": "the {colour} {noun}",
        "colour": "{colour}",
    },
    "home": {"": "{home} {where}", "a": "{article} {home} {where}", "the": "the {home} {where}"},
}
PRONOUNS = {
    "boy": dict(he="he", him="him", his="his", hers="his"),
    "girl": dict(he="she", him="her", his="her", hers="hers"),
}


def named(what, **words):
    """A Word of one of NAMES, such as named("thing", quality=..., colour=..., noun=...)."""
    words["article"] = article(next(iter(words.values()))).split()[0]
    forms = {field: form.format(**words) for field, form in NAMES[what].items()}
    return Word(forms.pop(""), **forms)


# A plot is a trouble and its end, step by step: an event, a method of Author, or one of PARTS. `step?` may be left out,
# and of `this|that` one is taken. The moral of a plot is the event moral_<plot>.
PLOTS = {
    "lost": "own set_out put pastime miss weep? search? ask_spot|ask_helper find hug?",
    "promise": "want promised do_chore tempt resist|yield reward",
    "party": "invite guests pastime quizzes",
    "swap": "own set_out swaps",
    "rescue": "set_out stuck try? borrow free name pastime give_back keep_pet?",
    "broken": "set_out lend break conceal pastime ask_thing lie? confess repair ask_glue?",
    "hide": "set_out count hide_and_seek",
    "errand": "errand way beggar share_either fun|scene? arrive ask_food praise",
    "treasure": "set_out map pastime? get_key guard? chest divide pastime? ask_divide|ask_key",
    "noise": "set_out hear guess dare? reveal feed_baby? name pastime ask_noise keep_pet?",
    "house": "set_out build paint_and_repaint move_in",
}
PARTS = {
    "resist": "refuse help_chore",
    "yield": "follow play pastime remember do_chore2",
    "pastime": "fun|snack|scene",
}


class Author:
    """Writes one story: text, nats (its information content), and events, [(name, {slot: word})], in their order."""

    def __init__(self, seed, index):
        self.random = random.Random(f"{seed} {index}").random
        self.nats = 0.0
        self.told, self.events = [], []
        self.cast, self.used = {}, set()  # who and what is in the story, by slot; all words cast so far
        self.state = {}  # {(subject, relation): object}
        self.write()
        self.text = FIRST_LETTERS.sub(lambda m: m[1] + m[2].upper(), "\n".join(self.told)).replace("\n", " ")

    def choose(self, options):
        """The only source of chance: one of options (all different), each as likely."""
        self.nats += math.log(len(options))
        return options[int(self.random() * len(options))]

    def coin(self):
        return self.choose((True, False))

    def pick(self, options):
        """One of options that is not in the story yet."""
        word = self.choose([option for option in options if option not in self.used])
        self.used.add(word)
        return word

    def appear(self, slot):
        """Cast somebody or something new for a slot: food2 is another food."""
        role = slot.rstrip("23")
        if role in ("hero", "friend"):
            child = self.choose(("boy", "girl"))
            name, kind = self.pick(LISTS[child]), self.pick(LISTS["kind"]) if self.coin() else child
            word = named("person", name=name, kind=kind) if kind != child else Word(name, full=name, kind=kind)
            word.__dict__.update(PRONOUNS[child])
        elif role in ("thing", "fragile"):
            quality, colour, noun = self.choose(LISTS["quality"]), self.pick(LISTS["colour"]), self.pick(LISTS[role])
            word = named("thing", quality=quality, colour=colour, noun=noun)
        elif role == "home":
            word = named("home", home=self.choose(LISTS["home"]), where=self.choose(LISTS["where"]))
        else:  # every place has spots, helpers, and fun of its own
            word = self.pick(LISTS[role if role in LISTS else f"{role} {self.cast['place'].at}"])
        self.cast[slot] = word

    def render(self, parts, drawn):
        for part in parts:
            if type(part) is str:
                yield part
            elif type(part) is list:
                yield from self.render(self.choose(part), drawn)
            else:
                slot, field, anew = part
                if anew or slot not in self.cast:
                    self.appear(slot)
                word = drawn[slot] = self.cast[slot]
                yield getattr(word, field) if field else word

    def say(self, event, **cast):
        """Tell an event in one of its ways, with this cast. What it recalls must be true; the rest becomes so."""
        self.cast.update(cast)
        facts, tellings = EVENTS[event]
        drawn = {}
        self.told.append("".join(self.render(self.choose(tellings), drawn)))
        self.events.append((event, drawn))
        self.recall_or_set(facts)

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

    def write(self):
        self.say("open")
        self.play("trait|hobby?")
        plot = self.choose(tuple(PLOTS))
        self.play(PLOTS[plot])
        recollections = self.recollections()
        if plot != "promise":  # which is kept at home
            recollections.insert(0, {"event": "go_home"})
        if recollections and self.coin():
            self.say(**self.choose(recollections))
        self.say(f"moral_{plot}")
        if self.coin():
            self.say("the_end")

    def recollections(self):
        """Events that end the day by remembering something of the story, each with a cast of what it remembers."""
        events = [{"event": f"end_{slot}"} for slot in ("trait", "hobby") if slot in self.cast]
        for (subject, relation), value in self.state.items():
            if relation == "done":
                events.append({"event": "ask_day", "fun": subject, "friend": value})
            elif relation == "snack":
                events.append({"event": "supper", "food3": subject, "friend": value})
            elif relation == "at" and value == self.cast["hero"] and hasattr(subject, "colour"):
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

    # Steps that repeat an event with a changing cast.

    def others(self, event, times, *slots):
        """Tell an event several times, with new ones in these slots -> the cast of before, and the new ones."""
        casts = [{slot: self.cast[slot] for slot in slots}]
        for _ in range(times):
            for slot in slots:
                del self.cast[slot]
            self.say(event)
            casts.append({slot: self.cast[slot] for slot in slots})
        return casts

    def take_one(self, casts):
        """Remove one of the casts, and return it."""
        return casts.pop(casts.index(self.choose(casts)))

    def guests(self):
        self.gifts = self.others("guest", self.choose((2, 3)), "friend", "thing")

    def quizzes(self):
        for event in (self.choose(("quiz", "quiz_colour")), self.choose(("quiz", "quiz_colour")), "thank"):
            self.say(event, **self.take_one(self.gifts))

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

    def hide_and_seek(self):
        self.say("hider")
        hidden = self.others("hider", 2, "friend", "spot")
        self.play("ready not_seek?")
        found = []
        for _ in range(2):
            found.append(self.take_one(hidden))
            self.say("seek", **found[-1])
        self.say("last_hider", **hidden[0])
        if self.coin():
            self.say("recount", **found[0], friend2=found[1]["friend"], spot2=found[1]["spot"])

    def share_either(self):
        food, food2 = self.cast["food"], self.cast["food2"]
        if self.coin():
            food, food2 = food2, food
        self.say("share", food=food, food2=food2)

    def paint_and_repaint(self):
        self.say("paint")
        painted = self.others("paint", self.choose((1, 2)), "part", "colour")
        self.play("pastime? rain")
        while painted:
            self.say("repaint", **self.take_one(painted))


def learn_bpe(counts, size):
    """Byte-pair encoding: merge the most frequent pair of neighbours until there are `size` tokens, or no pair is left.

    counts: {piece of text: how often it occurs}. Returns {token bytes: rank}, as tiktoken wants it."""
    words = [([bytes([byte]) for byte in piece.encode()], count) for piece, count in counts.items()]
    ranks = {bytes([byte]): byte for byte in range(256)}
    while len(ranks) < size:
        pairs = Counter()
        for word, count in words:
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        a, b = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks[a + b] = len(ranks)
        for word, _ in words:
            for i in range(len(word) - 2, -1, -1):
                if word[i : i + 2] == [a, b]:
                    word[i : i + 2] = [a + b]
    return ranks


def main():
    from data.prepare import DATA, PATTERN, VOCABULARY, Parser, load_data, wrap

    example = "example: python data/stories.py tell 5 --seed=3"
    parser = Parser(description="Tell stories of the story world, judge them, or make its vocabulary.", epilog=example)
    commands = parser.add_subparsers(dest="command", required=True)
    tell = commands.add_parser("tell", help="print stories, and the information content of each")
    tell.add_argument("count", nargs="?", type=int, default=1, help="how many (default: 1)")
    tell.add_argument("--seed", type=int, default=0, help="seed of the corpus (default: 0)")
    vocabulary = commands.add_parser("vocabulary", help=f"learn the tokens of {VOCABULARY.name} from 20,000 stories")
    vocabulary.add_argument("--size", type=int, default=3071, help="tokens, without <|endoftext|> (default: 3071)")
    judge = commands.add_parser("judge", help="score stories for grammar, consistency and creativity, 0 to 10 each")
    judge.add_argument("file", type=Path, help="stories with <|endoftext|> or blank lines between them")
    judge.add_argument("--explain", action="store_true", help="what is wrong with each story")
    judge.add_argument(
        "--data", type=Path, default=DATA / "stories", help="what they must not be copied from (%(default)s)"
    )
    args = parser.parse_args()
    if args.command == "tell":
        for index in range(args.count):
            story = Author(args.seed, index)
            print(f"{wrap(story.text)}\n({story.nats:.1f} nats)\n")
    elif args.command == "judge":
        from data.judge import report

        try:
            text = args.file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{args.file}: cannot be read as text: {error}") from error
        for line in report(text, load_data(args.data), args.explain):
            print(line)
    else:
        if not 256 <= args.size < 65535:
            raise ValueError(f"--size={args.size}: must be from 256, the bytes, to 65534")
        text = "\n".join(Author("vocabulary", index).text for index in range(20_000))
        ranks = learn_bpe(Counter(re.findall(PATTERN, text)), args.size)
        lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
        VOCABULARY.write_text("".join(lines), encoding="ascii")
        print(f"{len(ranks)} tokens in {VOCABULARY}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))  # where the package `data` is found
    from data.prepare import run

    run(main)
