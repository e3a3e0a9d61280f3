"""Read stories of the world back, and score them as a strict reader would: python data/stories.py judge FILE.txt

A story is read against the tellings of world.txt, the same that wrote it: each tells an event in a few sentences. What
it mentions is compared with what was said before. The scores are 0 to 10:

    grammar       10 times the share of words that stand in sentences of the world, capitals and punctuation included
    consistency   10 times the share of checkable statements that agree with what was told: somebody or something
                  mentioned again, a pronoun, a colour, a fact recalled. About a fifth of them recall something: the
                  world's own stories with every recalled word replaced by another have 7.7. Without statements: 0
    creativity    10 times the share of sequences of 8 tokens that are neither in the nearest training story nor a
                  repetition, over that share in unseen stories: a copy has 0, a new story about 10, and at most 10

That something happens twice, or after the end, contradicts nothing, and costs creativity alone.
"""

import re
from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache, cached_property

import numpy as np

from data.prepare import END, load_tokenizer
from data.stories import EVENTS, FIRST_LETTERS, LISTS, NAMES, PRONOUNS

NAMED = {"hero": "person", "friend": "person", "thing": "thing", "fragile": "thing", "home": "home"}  # as in NAMES
CHANGING = ("friend", "thing", "spot", "part", "colour", "fun", "food")  # the others stay who or what they are
# The fields that a role is introduced by; the roles that are not here, by all.
INTRODUCE = dict(hero=(), friend=("full",), thing=("a", "full"), fragile=("a", "full"), baby=("a",), tool=("a",))
SENTENCE_END = re.compile(r'(?<=[.!?]) (?=["A-Z])|(?<=[.!?]") (?=["A-Z])')
CHILD = {name: child for child in ("girl", "boy") for name in LISTS[child]}

# The sentences, from templates to regular expressions -----------------------------------------------------------------


def role_of(slot):
    return slot.rstrip("23")


def words_in(text):
    return set(re.findall(r"[\w']+", text.lower()))


def capital(before, text):
    """text with the capitals that a writer gives it behind `before`."""
    tail = before[-4:]  # as far as FIRST_LETTERS looks back
    return FIRST_LETTERS.sub(lambda m: m[1] + m[2].upper(), tail + text)[len(tail) :]


def words_of(role):
    """All words of a role, of every place."""
    return LISTS.get(role) or [word for place in LISTS["place"] for word in LISTS[f"{role} {place.at}"]]


def pieces_of(slot, form):
    """How a slot is filled -> a form like "the {colour} {}", and for each of its pieces {what is written: its value}.

    The piece "" says who or what it is; the others are what is said of it."""
    role = role_of(slot)
    what = NAMED.get(role)
    if form in PRONOUNS["boy"]:
        options = defaultdict(set)
        for child, forms in PRONOUNS.items():
            options[forms[form]].add(child)
        return "{child}", {"child": options}
    if what is None:
        return "{}", {"": {getattr(word, form) if form else str(word): str(word) for word in words_of(role)}}
    if what == "home":
        words = {"": [f"{home} {where}" for home in LISTS["home"] for where in LISTS["where"]]}
    elif what == "person":
        words = {"": CHILD, "kind": (*LISTS["kind"], *PRONOUNS)}
    else:
        words = {"": LISTS[role], "colour": LISTS["colour"], "quality": LISTS["quality"]}
    pieces = {piece: {str(option): str(option) for option in options} for piece, options in words.items()}
    return NAMES[what][form].replace(NAMES[what][""], "{}"), pieces


@dataclass
class Mention:
    """A slot of a telling: what fills it, and where a match of the telling has it."""

    slot: str
    anew: bool
    introduces: bool
    pieces: dict  # {piece: (name of its group, {what is written: its value})}


def pattern(parts, before, mentions):
    """The regular expression of a telling's parts; its slots are added to mentions."""
    out = ""
    for part in parts:
        if type(part) is str:
            out += re.escape(capital(before, part))
            before += part
            continue
        if type(part) is list:
            out += "(?:" + "|".join(pattern(option, before, mentions) for option in part) + ")"
        else:
            out += slot_pattern(*part, capital(before, "a") == "A", mentions)
        before += "x"
    return out


def slot_pattern(slot, form, anew, first, mentions):
    """first: it begins a sentence."""
    text, pieces = pieces_of(slot, form)
    introduces = form in INTRODUCE.get(role_of(slot), (form,))
    mention = Mention(slot, anew, introduces, {})
    if first:
        text = text[0].upper() + text[1:]

    def group(match):
        piece = match[1]
        if piece == "article":
            return "(?:an(?= [aeiou])|a(?= [^aeiou]))"
        values = pieces[piece]
        if first and match.start() == 0:
            values = {word[0].upper() + word[1:]: value for word, value in values.items()}
        name = f"{piece}_{len(mentions)}"
        mention.pieces[piece] = name, values
        return f"(?P<{name}>{'|'.join(map(re.escape, values))})"

    text = re.sub(r"\{(\w*)\}", group, text)
    if form == "full" and NAMED[role_of(slot)] == "person":  # "Tom the fox", or Tom alone, who is a boy
        text = text.replace(" the ", "(?: the ") + ")?"
    mentions.append(mention)
    return text


@dataclass
class Telling:
    """One way to tell an event, as something to be recognised."""

    event: str
    facts: list
    parts: list

    @cached_property
    def regex_and_mentions(self):
        mentions = []
        return re.compile(pattern(self.parts, "\n", mentions)), mentions


def sentences_of(parts):
    """The parts of a telling -> those of each of its sentences."""
    sentences = [[]]
    for part, after in zip(parts, [*parts[1:], ""], strict=True):
        if type(part) is not str:
            sentences[-1].append(part)
            continue
        # Whether a quotation ends its sentence shows in the letter behind it: split as if it stood there.
        named = type(after) is tuple and NAMED.get(role_of(after[0])) == "person" and not after[1]
        next_letter = "A" if named else capital(part, "a") if after else ""
        *ended, last = SENTENCE_END.split(part + next_letter)
        for text in ended:
            sentences[-1].append(text)
            sentences.append([])
        sentences[-1].append(last[: len(last) - len(next_letter)])
    return [[part for part in sentence if part] for sentence in sentences]


def atoms_of(parts):
    """A sequence of regular expressions without groups, cut where tellings may begin to differ."""
    before = "\n"
    for part in parts:
        if type(part) is str:
            yield from map(re.escape, re.findall(r"\S+ ?| ", capital(before, part)))
            before += part
        else:
            yield re.sub(r"\(\?P<\w+>", "(?:", pattern([part], before, []))
            before += "x"


def alternation(every):
    """Tellings -> one regular expression for all, and [the tellings that match, ...] by the group that ends the match.

    Beginnings that are the same are tried once."""
    root, alike = {}, []
    for telling in every:
        node = root
        for atom in atoms_of(telling.parts):
            node = node.setdefault(atom, {})
        node.setdefault(None, []).append(telling)

    def regex(node):
        out = [atom + regex(child) for atom, child in node.items() if atom is not None]
        if None in node:
            alike.append(node[None])
            out.append("(?= |$)()")
        return out[0] if len(out) == 1 else f"(?:{'|'.join(out)})"

    return re.compile(regex(root)), alike


@cache
def tellings():
    return alternation(Telling(event, facts, parts) for event, (facts, told) in EVENTS.items() for parts in told)


@cache
def sentences():
    """Every sentence of a telling, as one that tells no event."""
    every = (sentence for _, told in EVENTS.values() for parts in told for sentence in sentences_of(parts))
    return alternation(Telling(None, [], sentence) for sentence in every)


# Reading --------------------------------------------------------------------------------------------------------------


@dataclass
class Statement:
    """Something that can be checked, in words; told: the number of the passage that it agrees with or contradicts.

    asked: where in the text the word stands that what was told decides, as (start, end, {written: value});
    said: where that word was last said before this passage. Both are None where nothing is recalled."""

    says: str
    agrees: bool
    told: int | None = None
    asked: tuple | None = None
    said: int | None = None


@dataclass
class Passage:
    """A telling, with its event and who and what is in it; or a sentence that stands alone, or does not parse."""

    text: str
    parsed: bool
    event: str | None = None
    cast: dict = field(default_factory=dict)  # {slot: who or what}
    statements: list = field(default_factory=list)


class Reader:
    """Reads one story, passage by passage."""

    def __init__(self, text):
        self.text = " ".join(text.split())
        self.known = defaultdict(dict)  # {role: {who or what: {what is said of it: (value, passage)}}}
        self.cast = {}  # {slot: who or what}
        self.state = {}  # {(subject, relation): (object, passage)}
        self.said = {}  # {(role, who or what, what is said of it): where in the text}
        self.unread = set()  # words of what did not parse
        self.passages = []  # the last of these, and its number, are self.passage and self.now
        place = 0
        while place < len(self.text):
            place = self.read(place) + 1

    def read(self, start):
        """Read the passage that begins there -> its end."""
        for regex, alike in (tellings(), sentences()):
            if match := regex.match(self.text, start):
                self.tell(alike[match.lastindex - 1], start, match.end())
                return match.end()
        match = SENTENCE_END.search(self.text, start)
        end = match.start() if match else len(self.text)
        self.passages.append(Passage(self.text[start:end], False))
        self.lose(self.text[start:end])
        return end

    def lose(self, text):
        """This was not understood: it may have said anything of those who are in it."""
        words = words_in(text)
        self.unread |= words
        self.state = {key: value for key, value in self.state.items() if not words_in(key[0]) <= words}

    def doubt(self, *words):
        """May something that was not understood have told of them? (Of "feed the ducks" as "fed the ducks", too.)"""
        return any(words_in(word.partition(" ")[2] or word) <= self.unread for word in words)

    def check(self, *statement):
        self.passage.statements.append(Statement(*statement))

    def last_said(self, slot, piece):
        return self.said.get((role_of(slot), self.cast.get(slot), piece))

    def tell(self, alike, start, end):
        """Take in a telling."""
        # The same words may tell of something new, or again of something known. If none fits, it is the last.
        for telling in alike:
            regex, mentions = telling.regex_and_mentions
            match = regex.match(self.text, start)
            found = [(mention, filled) for mention in mentions if (filled := self.filled(mention, match))]
            if all(
                (filled[""] in self.known[role_of(mention.slot)]) != mention.anew
                for mention, filled in found
                if "" in filled and (mention.anew or telling.event is None)
            ):
                break
        self.now = len(self.passages)
        self.passage = Passage(self.text[start:end], True, telling.event)
        self.passages.append(self.passage)
        first, last = {}, {}  # {(slot, piece): (start, end, options)} of mentions in this passage
        for mention, filled in found:
            for piece in filled.keys() - {"child"}:
                name, options = mention.pieces[piece]
                last[mention.slot, piece] = *match.span(name), options
                first.setdefault((mention.slot, piece), last[mention.slot, piece])
            if "" in filled:
                self.who(mention, filled)
        asked = {value for _, _, value, mode in telling.facts if mode == "?"}
        for mention, filled in found:
            for piece in filled.keys() - {""}:
                place = first[mention.slot, piece] if f"{mention.slot}.{piece}" in asked else None
                self.what(mention.slot, piece, filled[piece], place)
        for fact in telling.facts:
            self.recall_or_set(*fact, first)
        for (slot, piece), (_, stop, _) in last.items():
            self.said[role_of(slot), self.cast.get(slot), piece] = stop
        if telling.event is None:
            self.lose(self.passage.text)

    def filled(self, mention, match):
        """{piece: value} of what was written; {} if the mention stands in an alternative that was not taken."""
        found = {piece: (match[name], values) for piece, (name, values) in mention.pieces.items()}
        return {piece: values[text] for piece, (text, values) in found.items() if text is not None}

    def what(self, slot, piece, value, asked):
        """Something is said of somebody or something: has it been so, if it was said before?"""
        known, here = self.known[role_of(slot)], self.passage.cast
        who = here.get(slot) or self.cast.get(slot)
        if who is None:
            if not self.unread:
                self.check(f"{slot}: nobody is known", False)
            return
        here[slot] = who
        if who not in known:  # the wrong one: that is a contradiction already
            return
        if piece not in known[who]:
            known[who][piece] = value, self.now
            if value not in PRONOUNS:
                return
            piece, value = "child", {value}  # a boy, or a girl: the name must be one's
        old, told = known[who][piece]
        if piece == "child":
            self.check(f"{who}: a {old}", old in value, told)
        else:
            said = self.last_said(slot, piece) if asked else None
            self.check(f"{who}: {piece} {value}", old == value, told, asked, said)

    def who(self, mention, filled):
        """Somebody or something is mentioned by name: is it known, is it the one it must be?"""
        who, slot, role, here = filled[""], mention.slot, role_of(mention.slot), self.passage.cast
        known = self.known[role]
        before = here.get(slot) or (None if role in CHANGING or mention.anew else self.cast.get(slot))
        here[slot] = who
        if before not in (None, who):
            told = known[before]["since"][1] if before in known else self.now  # unknown: the wrong one itself
            self.check(f"{who}, not {before}", False, told)
            return  # it is still the other
        elif who in known:
            if not mention.anew:
                self.check(who, True, known[who]["since"][1])
        elif not mention.introduces and self.passage.event != "open" and not self.doubt(who):
            self.check(f"{who} was not in the story", False)
        elif role in ("spot", "helper", "fun") and self.cast.get("place"):
            place = self.cast["place"]
            at = next(word.at for word in LISTS["place"] if word == place)
            self.check(f"{who}: {at}", who in LISTS[f"{role} {at}"], self.known["place"][place]["since"][1])
        elif role == "friend" and who == self.cast.get("hero"):
            self.check(f"{who} is two children", False)
        facts = known.setdefault(who, {"since": (None, self.now)})
        if role in ("hero", "friend"):
            facts.setdefault("child", (CHILD[who], self.now))
        if "kind" in mention.pieces and "kind" not in filled:  # Tom, not "Tom the fox"
            facts.setdefault("kind", (CHILD[who], self.now))
        self.cast[slot] = who

    def recall_or_set(self, slot, relation, value, mode, first):
        """As Author does; what is recalled is compared instead."""
        subject, (of, _, piece) = self.cast.get(slot, slot), value.partition(".")
        value = self.cast.get(of, of)
        if piece:  # checked where it is mentioned
            return
        if mode not in "?!":
            self.state[subject, relation] = value, self.now
            return
        old, told = self.state.get((subject, relation), (None, None))
        if old is None and (mode == "!" or self.doubt(subject, value)):
            return
        asked = said = None
        if mode == "?" and (key := self.later(slot, of, first)):
            right = [s for (s, r), (v, _) in self.state.items() if (r, v) == (relation, value)]
            if key[0] != slot or len(right) == 1:  # of several, the author may have chosen any
                asked, said = first[key], self.last_said(*key)
        self.check(f"{subject}: {relation} {value}", (old == value) == (mode == "?"), told, asked, said)

    def later(self, slot, other, first):
        """Of two slots, the one that is mentioned later, and so decided by the other: the key of its first mention.

        The hero is left out: it is named in every other sentence."""
        begins = [
            min((key for key in first if key[0] == s), key=first.get, default=None) for s in {slot, other} - {"hero"}
        ]
        return max(filter(None, begins), key=first.get, default=None)


# Scores ---------------------------------------------------------------------------------------------------------------


def grammar(passages):
    """0 to 10: the share of words that stand in sentences of the world."""
    words = [len(passage.text.split()) for passage in passages]
    return 10 * sum(n for n, passage in zip(words, passages, strict=True) if passage.parsed) / max(1, sum(words))


def consistency(passages):
    """0 to 10: the share of checkable statements that agree with what was told."""
    agree = [statement.agrees for passage in passages for statement in passage.statements]
    return 10 * sum(agree) / max(1, len(agree))


def far_recalls(passages, words=50):
    """How many things are recalled that were last spoken of that many words before, and how many of them rightly."""
    text = " ".join(passage.text for passage in passages)
    far = [
        s.agrees
        for p in passages
        for s in p.statements
        if s.asked and s.said is not None and text.count(" ", s.said, s.asked[0]) >= words
    ]
    return len(far), sum(far)


@dataclass
class Question:
    """A place in a story where what was told decides the words."""

    place: int  # of the first token that answers
    distance: int  # tokens since the answer was last said
    answer: list  # tokens
    candidates: list  # of lists of tokens: all that could stand there, the answer among them


def questions(stories, tokenizer):
    """Where stories, lists of tokens, recall what they told -> a list of Questions for each."""
    encoded = {}  # by id: options are made once for each telling, and stay
    for tokens in stories:
        text, begins = tokenizer.decode_with_offsets(tokens)
        reader, found = Reader(text), []
        passages = reader.passages if reader.text == text else ()  # else its places are not those of the tokens
        for statement in (statement for passage in passages for statement in passage.statements):
            if not statement.agrees or statement.asked is None or statement.said is None:
                continue
            start, end, options = statement.asked
            space = " " * (text[start - 1 : start] == " ")  # a token begins with the space before it
            place = bisect_left(begins, start - len(space))
            if (id(options), space) not in encoded:
                encoded[id(options), space] = {o: tokenizer.encode_ordinary(space + o) for o in options}
            candidates = encoded[id(options), space]
            answer = candidates[text[start:end]]
            if tokens[place : place + len(answer)] == answer:
                distance = place - bisect_left(begins, statement.said)
                found.append(Question(place, distance, answer, list(candidates.values())))
        yield found


def hashes(tokens):
    """A number for each 8 tokens in a row."""
    factors = np.random.default_rng(0).integers(2**63, size=8, dtype=np.uint64) | np.uint64(1)
    count = max(0, len(tokens) - 7)
    return sum((tokens[i : count + i].astype(np.uint64) * factors[i] for i in range(8)), np.zeros(count, np.uint64))


def fresh(stories, train, end):
    """The share of each story's 8-grams that are neither in the nearest story of train nor repeat one of its own.

    stories: arrays of tokens; train: a stream of stories with the token `end` between them. Punctuation counts too."""
    grams = [np.unique(hashes(story)) for story in stories]
    every = np.unique(np.concatenate(grams))
    may_be = np.zeros(2**24, bool)  # most 8-grams of train are in no story: leave them out before searching
    may_be[every >> np.uint64(40)] = True
    found, where, begun = [], [], 0  # which of `every`, and in which story of train
    for start in range(0, len(train), 2**22):
        tokens = np.asarray(train[start : start + 2**22 + 7])  # 8-grams that begin in this piece
        numbers = hashes(tokens)
        hits = np.flatnonzero(may_be[numbers >> np.uint64(40)])
        places = np.searchsorted(every, numbers[hits]).clip(max=len(every) - 1)
        real = every[places] == numbers[hits]
        ends = begun + np.cumsum(tokens == end)
        found.append(places[real])
        where.append(ends[hits[real]])
        begun = ends[min(2**22, len(ends)) - 1]
    found, where = np.unique(np.stack((np.concatenate(found), np.concatenate(where))), axis=1)
    first = np.searchsorted(found, np.arange(len(every) + 1))
    shares = []
    for story, own in zip(stories, grams, strict=True):
        own = np.searchsorted(every, own)
        near = np.concatenate([where[first[i] : first[i + 1]] for i in own] or [where[:0]])
        shares.append((len(own) - np.bincount(near, minlength=1).max()) / max(1, len(story) - 7))
    return np.array(shares)


def split_stories(tokens, end):
    """A stream with the token `end` before, between and behind its stories -> the stories, arrays."""
    return [story[1:] for story in np.split(np.asarray(tokens), np.flatnonzero(tokens == end))[1:-1]]


def judge(texts, data):
    """Score stories: {"grammar": array, "consistency": array, "creativity": array}, 0 to 10 each, and the readings.

    data: what load_data() gives for the stories that the author of the texts has read."""
    meta, train, val = data
    tokenizer = load_tokenizer(meta["tokenizer"])
    end = tokenizer.eot_token
    unseen = split_stories(val, end)[:200]
    stories = [np.array(tokenizer.encode_ordinary(" ".join(text.split())), dtype=np.uint16) for text in texts]
    shares = fresh(stories + unseen, train, end)
    readings = [Reader(text).passages for text in texts]
    return {
        "grammar": np.array([grammar(passages) for passages in readings]),
        "consistency": np.array([consistency(passages) for passages in readings]),
        "creativity": 10 * (shares[: len(texts)] / shares[len(texts) :].mean()).clip(max=1),
    }, readings


def mean_and_error(values, groups=None):
    """The mean and its standard error, None where there is no telling; values of one group are not independent."""
    if len(values) == 0:
        return None, None
    groups = np.arange(len(values)) if groups is None else np.unique(groups, return_inverse=True)[1]
    count, mean = groups.max() + 1, float(np.mean(values))
    sums = np.bincount(groups, np.asarray(values) - mean)
    return mean, float(np.sqrt(np.sum(sums**2) * count / (count - 1)) / len(values)) if count > 1 else None


def explain(passages):
    """What is wrong with a story: each passage that does not parse or contradicts, and below it what it contradicts."""
    for passage in passages:
        wrong = [statement for statement in passage.statements if not statement.agrees]
        if wrong or not passage.parsed:
            yield ("contradiction: " if wrong else "no such sentence: ") + passage.text
        for statement in wrong:
            told = None if statement.told is None else passages[statement.told]
            told = f"; it was told: {told.text}" if told and told is not passage else ""
            yield f"    {statement.says}{told}"


def report(text, data, explained):
    """The scores of stories between <|endoftext|> or blank lines, as lines of text."""
    text = re.sub(r"(?m)^\([\d.]+ nats\)$", "", text)  # behind a story of stories.py tell
    texts = text.split(END) if END in text else re.split(r"\n\s*\n", text)
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError("no stories to judge: the text is empty")
    scores, readings = judge(texts, data)
    for i, passages in enumerate(readings if explained else ()):
        yield f"story {i + 1}: " + ", ".join(f"{name} {values[i]:.1f}" for name, values in scores.items())
        yield from (f"    {line}" for line in explain(passages))
    for name, values in scores.items():
        mean, error = mean_and_error(values)
        yield f"{name:<12}{mean:6.2f}" + (f" ± {error:.2f}" if error is not None else "")
    far, right = np.sum([far_recalls(passages) for passages in readings], axis=0)
    yield f"{right} of {far} things last spoken of 50 words before, or more, are recalled rightly"
