"""A built-in task of instructions: sentences to rewrite, words to sort, things to find, count and correct.

Every response is computed, and the only right one. Sentences are of the words of `experiments.data.grammar`, of which the two
splits share none; so no input of one split is in the other.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from experiments.data.grammar import PHENOMENA, VOCABULARY, inflections, pairs
from experiments.data.rows import Rows
from jaxprune.errors import UsageError

# Phenomena of the grammar of which an unacceptable sentence has one correction.
_FAULTS = {
    "agreement": "A verb does not agree with its subject.",
    "attractor": "A verb does not agree with its subject.",
    "reflexive": "A pronoun with -self or -selves is wrong.",
    "verb_form": "A verb has the wrong form.",
}

# What stands behind each kind of verb: a noun, its adjective, and what comes before them.
_OBJECTS = {
    "handle": ("thing", "quality", ""),
    "judge_person": ("person", "mood", ""),
    "intransitive": ("place", "quality", "in "),
}

Drawn = tuple[str, str]  # input and output


@dataclass(frozen=True)
class Clause:
    """Hold a clause in parts: who does what to whom.

    Args:
        who: the subject, in the plural where it takes the verb's base form.
        plural: the subject in the plural.
        many: whether the subject is.
        verb: form -> word, as `inflections` has them.
        rest: what stands behind the verb.
        adjectives: as they occur.
    """

    who: str
    plural: str
    many: bool
    verb: dict[str, str]
    rest: str
    adjectives: tuple[str, ...]

    def present(self) -> str:
        """Return the sentence in the present."""
        return _sentence(self.who, self.verb["b" if self.many else "z"], self.rest)

    def past(self) -> str:
        """Return the sentence in the past."""
        return _sentence(self.who, self.verb["d"], self.rest)


class Draw:
    """Draw words of a split; each row has a generator of its own."""

    def __init__(self, split: str, seed: str) -> None:
        self.split, self._rng = split, random.Random(seed)

    def number(self, most: int) -> int:
        """Return one of 0 to most - 1."""
        # random() alone is promised to give the same numbers in every version of Python.
        return int(self._rng.random() * most)

    def word(self, kind: str) -> str:
        """Return a word of an open class, in its base form."""
        known = VOCABULARY[kind][self.split == "validation"].split()
        return known[self.number(len(known))]

    def words(self, count: int) -> list[str]:
        """Return so many different words."""
        found: dict[str, None] = {}
        while len(found) < count:
            found[self.word(("thing", "place", "person", "mood", "quality")[self.number(5)])] = None
        return list(found)

    def clause(self, *, whom: bool = False, adjectives: bool = False) -> Clause:
        """Return a clause; `whom` for one with an object, `adjectives` for one with these."""
        kind = ("handle", "judge_person", "intransitive")[self.number(2 if whom else 3)]
        noun, quality, where = _OBJECTS[kind]
        subject, many = inflections("person", self.word("person")), bool(self.number(2))
        before = [self.word("mood")] if adjectives or self.number(3) == 0 else []
        behind = [self.word(quality)] if self.number(2 if adjectives else 3) == 0 else []
        plural = " ".join(["the", *before, subject["p"]])
        who = plural if many else " ".join(["the", *before, subject["s"]])
        rest = where + " ".join(["the", *behind, self.word(noun)])
        return Clause(who, plural, many, inflections(kind, self.word(kind)), rest, (*before, *behind))


def _sentence(*parts: str, end: str = ".") -> str:
    text = " ".join(parts)
    return text[0].upper() + text[1:] + end


def _to_past(draw: Draw) -> Drawn:
    clause = draw.clause()
    return clause.present(), clause.past()


def _to_present(draw: Draw) -> Drawn:
    clause = draw.clause()
    return clause.past(), clause.present()


def _question(draw: Draw) -> Drawn:
    clause = draw.clause()
    return clause.past(), _sentence("did", clause.who, clause.verb["b"], clause.rest, end="?")


def _negative(draw: Draw) -> Drawn:
    clause = draw.clause()
    return clause.past(), _sentence(clause.who, "did not", clause.verb["b"], clause.rest)


def _passive(draw: Draw) -> Drawn:
    clause = draw.clause(whom=True)
    return clause.past(), _sentence(clause.rest, "was", clause.verb["n"], "by", clause.who)


def _plural(draw: Draw) -> Drawn:
    clause = draw.clause()
    while clause.many:
        clause = draw.clause()
    return clause.present(), _sentence(clause.plural, clause.verb["b"], clause.rest)


def _sort(draw: Draw) -> Drawn:
    words = draw.words(4 + draw.number(3))
    return ", ".join(words), ", ".join(sorted(words))


def _reverse(draw: Draw) -> Drawn:
    words = draw.words(3 + draw.number(4))
    return ", ".join(words), ", ".join(words[::-1])


def _verb(draw: Draw) -> Drawn:
    clause = draw.clause()
    return clause.past(), clause.verb["d"]


def _adjectives(draw: Draw) -> Drawn:
    clause = draw.clause(adjectives=True)
    return clause.past(), ", ".join(clause.adjectives)


def _count_words(draw: Draw) -> Drawn:
    clauses = [draw.clause() for _ in range(1 + draw.number(2))]
    text = " and ".join(f"{clause.who} {clause.verb['d']} {clause.rest}" for clause in clauses)
    return _sentence(text), str(len(text.split()))


def _count_letters(draw: Draw) -> Drawn:
    kind = tuple(VOCABULARY)[draw.number(len(VOCABULARY))]
    forms = list(dict.fromkeys(inflections(kind, draw.word(kind)).values()))
    word = forms[draw.number(len(forms))]
    return word, str(len(word))


_KINDS: dict[str, tuple[Callable[[Draw], Drawn], tuple[str, ...]]] = {
    "past": (
        _to_past,
        (
            "Rewrite the sentence in the past tense.",
            "Put this sentence into the simple past.",
            "Change the verb to the past tense and write the whole sentence.",
        ),
    ),
    "present": (
        _to_present,
        (
            "Rewrite the sentence in the present tense.",
            "Put this sentence into the simple present.",
            "Change the verb to the present tense and write the whole sentence.",
        ),
    ),
    "question": (
        _question,
        (
            "Turn the sentence into a question that begins with Did.",
            "Make a yes or no question of this sentence.",
            "Ask whether this happened, in the same words.",
        ),
    ),
    "negative": (
        _negative,
        (
            'Make the sentence negative with "did not".',
            'Say that this did not happen; use "did not".',
            'Negate this sentence with the words "did not".',
        ),
    ),
    "passive": (
        _passive,
        (
            "Rewrite the sentence in the passive voice.",
            'Turn this sentence into the passive, with "by".',
            "Begin with the object: write the sentence in the passive voice.",
        ),
    ),
    "plural": (
        _plural,
        (
            "Put the subject of the sentence into the plural.",
            "Rewrite the sentence with a plural subject, and let the verb agree.",
            "Make the subject plural and change nothing else but the verb.",
        ),
    ),
    "sort": (
        _sort,
        (
            "Sort the words alphabetically.",
            "Put these words into alphabetical order, separated by commas.",
            "Arrange the list from A to Z.",
        ),
    ),
    "reverse": (
        _reverse,
        (
            "Write the words in reverse order.",
            "Turn this list around, the last word first.",
            "List these words backwards, separated by commas.",
        ),
    ),
    "verb": (
        _verb,
        (
            "Which word is the verb of the sentence?",
            "Find the verb and write it as it stands there.",
            "Extract the verb from this sentence.",
        ),
    ),
    "adjectives": (
        _adjectives,
        (
            "List all adjectives of the sentence, in their order.",
            "Extract the adjectives, separated by commas.",
            "Which adjectives does this sentence have?",
        ),
    ),
    "count_words": (
        _count_words,
        (
            "How many words does the sentence have?",
            "Count the words. Answer with a number.",
            "Give the number of words in this sentence.",
        ),
    ),
    "count_letters": (
        _count_letters,
        (
            "How many letters does the word have?",
            "Count the letters. Answer with a number.",
            "Give the number of letters in this word.",
        ),
    ),
}
_CORRECT = (
    "{fault} Write the correct sentence.",
    "{fault} Correct it and write the whole sentence.",
    "Correct this. {fault}",
)
NAMES = (*_KINDS, "correct")


def generate(train: int = 3900, validation: int = 325, seed: int = 0) -> dict[str, Rows]:
    """Generate both splits, with as many rows of each kind; a row's label is the place of its kind in `NAMES`.

    Args:
        train: rows to train on, a multiple of the number of kinds.
        validation: rows to validate on, likewise.
        seed: another one gives other rows.

    Raises:
        UsageError: a size is not such a multiple, or there are not so many rows.
    """
    return {split: _rows(split, size, seed) for split, size in (("train", train), ("validation", validation))}


def _rows(split: str, size: int, seed: int) -> Rows:
    each, rest = divmod(size, len(NAMES))
    if rest or each < 1:
        raise UsageError(f"cannot make {size} instructions; expected a positive multiple of {len(NAMES)}")
    made = [
        (*row, label)
        for label, name in enumerate(NAMES)
        for row in (_drawn(name, split, each, seed) if name in _KINDS else _corrections(split, each, seed))
    ]
    rng = random.Random(f"{seed} {split} order")
    made.sort(key=lambda _: rng.random())
    *texts, labels = (list(column) for column in zip(*made, strict=True))
    return Rows(tuple(texts), np.array(labels, np.int32), f"instructions:{split}")


def _drawn(name: str, split: str, count: int, seed: int) -> list[tuple[str, str, str]]:
    """Draw rows of one kind, no input twice."""
    make, phrasings = _KINDS[name]
    found: dict[str, tuple[str, str, str]] = {}
    for i in range(50 * count):
        draw = Draw(split, f"{seed} {split} {name} {i}")
        phrasing = phrasings[draw.number(len(phrasings))]
        given, output = make(draw)
        found.setdefault(given, (phrasing, given, output))
        if len(found) == count:
            return list(found.values())
    raise UsageError(f"{count} rows are too many of {name} for {split}: there are no more inputs")


def _corrections(split: str, count: int, seed: int) -> list[tuple[str, str, str]]:
    """Take unacceptable sentences of the grammar, and the acceptable ones as responses."""
    each = -(-count // len(_FAULTS))
    made = pairs(split, 2 * len(PHENOMENA) * each, seed)
    turns = zip(*([pair for pair in made if pair.phenomenon == name] for name in _FAULTS), strict=True)
    rows = []
    for i, pair in enumerate([pair for turn in turns for pair in turn][:count]):
        phrasing = _CORRECT[Draw(split, f"{seed} {split} correct {i}").number(len(_CORRECT))]
        rows.append((phrasing.format(fault=_FAULTS[pair.phenomenon]), pair.unacceptable, pair.acceptable))
    return rows
