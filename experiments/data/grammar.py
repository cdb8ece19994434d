"""A built-in task: is the sentence acceptable English? Made by a small grammar, so a run needs no download.

Ten phenomena, each as minimal pairs of an acceptable and an unacceptable sentence. The two splits share no noun, verb,
name, adjective or adverb, and half of the validation templates never occur in training. Templates come in mirrored
groups (or as reorderings of the same words), so that counting words and word pairs says next to nothing.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

import numpy as np

from experiments.data.rows import Rows
from jaxprune.errors import UsageError

# Open classes: words of the training split; words of the validation split.
VOCABULARY = {
    "person": (
        "teacher doctor nurse lawyer farmer student writer singer driver soldier judge painter dancer player engineer "
        "artist scientist neighbor guest visitor manager reporter detective baker",
        "pilot poet author banker tourist sailor guard musician officer professor surgeon gardener",
    ),
    "male": (
        "king boy prince waiter actor father uncle son husband grandfather",
        "man brother nephew monk gentleman",
    ),
    "female": (
        "queen girl princess waitress actress mother aunt daughter wife grandmother",
        "woman sister niece nun lady",
    ),
    "kin_male": ("father uncle son husband grandfather", "brother nephew"),
    "kin_female": ("mother aunt daughter wife grandmother", "sister niece"),
    "mister": (
        "John David Michael James Robert Paul Mark Peter Daniel Thomas Henry George Frank Steven Kevin Brian",
        "Edward Simon Martin Patrick Walter Arthur Eric Adam",
    ),
    "miss": (
        "Mary Anna Susan Linda Karen Laura Sarah Emma Julia Helen Alice Rachel Lisa Nancy Maria Kate",
        "Emily Jane Margaret Diane Rebecca Sophie Ruth Claire",
    ),
    "thing": (
        "book lamp chair table letter bottle picture camera phone bag box hat coat shirt basket mirror clock guitar "
        "map ring radio umbrella cup plate",
        "computer painting ticket coin jacket bicycle blanket violin key candle newspaper bell",
    ),
    "place": (
        "house garden school park kitchen library station church castle museum hotel hospital",
        "office restaurant palace market tower theater",
    ),
    # no object, ever; and no adjective, as in "is faint"
    "intransitive": (
        "laugh smile sneeze cough arrive sleep tremble yawn complain hesitate snore apologize stumble sigh",
        "cry shiver frown blush kneel giggle weep grin",
    ),
    # takes a thing, and cannot do without; and no past that is another verb's base, as in "did not found"
    "handle": (
        "select repair carry examine damage replace touch keep remove inspect fetch",
        "discover destroy purchase fix bring grab obtain",
    ),
    # takes a person, who may be oneself
    "judge_person": (
        "admire praise blame criticize describe protect defend introduce trust love hate punish",
        "forgive reward support respect doubt embarrass",
    ),
    "say": ("think believe say claim", "suspect insist notice assume"),
    "know": ("know ask forget", "wonder remember learn"),
    "mood": (
        "tired happy angry famous young rich tall busy kind hungry lonely nervous",
        "sad proud clever strong calm polite",
    ),
    "quality": (
        "old new expensive heavy broken dirty small beautiful cheap clean blue large",
        "big green wet empty strange ugly",
    ),
    "adverb": ("often always usually rarely", "sometimes regularly frequently"),
}

# Closed classes, the same in both splits: each word with its forms.
_CLOSED: dict[str, tuple[dict[str, str], ...]] = {
    "be": ({"s": "is", "p": "are"},),
    "have": ({"s": "has", "p": "have"},),
    "this": ({"s": "this", "p": "these"}, {"s": "that", "p": "those"}),
    "count": (
        {"s": "every", "p": "many"},
        {"s": "each", "p": "several"},
        {"s": "one", "p": "two"},
        {"s": "another", "p": "few"},
    ),
    "modal": tuple({"": word} for word in ("will", "can", "must", "should", "might")),
    "pronoun": tuple(
        {"subject": subject, "object": object_}
        for subject, object_ in (("he", "him"), ("she", "her"), ("they", "them"), ("we", "us"))
    ),
}

_VERBS = ("intransitive", "handle", "judge_person", "say", "know")
_NOUNS = ("person", "male", "female", "kin_male", "kin_female", "thing", "place")
_PLURALS = {"man": "men", "gentleman": "gentlemen", "woman": "women", "wife": "wives"}
_PASTS = {  # past, participle
    "sleep": ("slept", "slept"),
    "kneel": ("knelt", "knelt"),
    "weep": ("wept", "wept"),
    "grin": ("grinned", "grinned"),
    "keep": ("kept", "kept"),
    "bring": ("brought", "brought"),
    "grab": ("grabbed", "grabbed"),
    "forgive": ("forgave", "forgiven"),
    "think": ("thought", "thought"),
    "say": ("said", "said"),
    "know": ("knew", "known"),
    "forget": ("forgot", "forgotten"),
}
_DOUBLING = ("grin", "grab", "forget")

# Templates: [acceptable|unacceptable]; {class1.form} with the same word for the same number; forms of nouns are
# s(ingular), p(lural), N the number of this sentence, M the other one; of verbs b(ase), z (third person), d (past),
# n (participle), g (-ing), V agreeing with N, X agreeing with M. The second tuple is for validation only.
_TEMPLATES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "agreement": (
        (
            "The {person1.N} {adverb1} [{intransitive1.V}|{intransitive1.X}].",
            "The {person1.N} [{be.V}|{be.X}] {mood1}.",
            "The {person1.N} [{judge_person1.V}|{judge_person1.X}] the {person2.s}.",
            "The {thing1.N} [{be.V}|{be.X}] in the {place1.s}.",
        ),
        (
            "{mister1} and {miss1} {adverb1} [{intransitive1.b}|{intransitive1.z}].",
            "Where [{be.V}|{be.X}] the {thing1.N}?",
        ),
    ),
    "attractor": (
        (
            "The {thing1.N} near the {thing2.M} [{be.V}|{be.X}] {quality1}.",
            "The {person1.N} behind the {person2.M} [{be.V}|{be.X}] {mood1}.",
            "The {person1.N} that the {person2.M} {judge_person1.X} [{be.V}|{be.X}] {mood1}.",
            "The {person1.N} who {judge_person1.V} the {person2.M} [{be.V}|{be.X}] {mood1}.",
            "The {person1.N} who [{judge_person1.V}|{judge_person1.X}] the {person2.M} {intransitive1.d}.",
        ),
        (
            "The {thing1.N} behind the {thing2.M} near the {place1.M} [{be.V}|{be.X}] {quality1}.",
            "The {person1.N} the {person2.M} {judge_person1.X} [{be.V}|{be.X}] {mood1}.",
        ),
    ),
    "determiner": (
        (
            "The {person1.s} {handle1.d} {this1.N} [{thing1.N}|{thing1.M}].",
            "The {person1.s} {handle1.d} {count1.N} [{thing1.N}|{thing1.M}].",
            "{count1.N} [{person1.N}|{person1.M}] {intransitive1.d}.",
            "{this1.N} [{person1.N}|{person1.M}] {handle1.d} the {thing1.s}.",
        ),
        (
            "{miss1} {handle1.d} {this1.N} {quality1} [{thing1.N}|{thing1.M}].",
            "{this1.N} [{thing1.N}|{thing1.M}] near the {place1.s} must be {quality1}.",
        ),
    ),
    "reflexive": (
        (
            "The {male1.s} {judge_person1.d} [himself|herself].",
            "The {female1.s} {judge_person1.d} [herself|himself].",
            "The {male1.p} {judge_person1.d} [themselves|himself].",
            "The {female1.s} {judge_person1.d} [herself|themselves].",
            "The {female1.p} {judge_person1.d} [themselves|herself].",
            "The {male1.s} {judge_person1.d} [himself|themselves].",
            "{mister1} {adverb1} {judge_person1.z} [himself|herself].",
            "{miss1} {adverb1} {judge_person1.z} [herself|himself].",
        ),
        (
            "The {male1.s} near the {female1.s} {judge_person1.d} [himself|herself].",
            "The {female1.s} near the {male1.s} {judge_person1.d} [herself|himself].",
            "The {male1.s} and the {male2.s} {judge_person1.d} [themselves|himself].",
            "The {female1.s} behind the {female2.p} {judge_person1.d} [herself|themselves].",
        ),
    ),
    "binding": (
        (
            "The {male1.s} {say1.d} that the {female1.s} {judge_person1.d} [herself|himself].",
            "The {female1.s} {say1.d} that the {male1.s} {judge_person1.d} [himself|herself].",
            "{mister1} {say1.z} that the {female1.p} {judge_person1.b} [themselves|himself].",
            "The {female1.p} {say1.b} that {mister1} {judge_person1.z} [himself|themselves].",
            "{miss1} {say1.z} that the {male1.p} {judge_person1.b} [themselves|herself].",
            "The {male1.p} {say1.b} that {miss1} {judge_person1.z} [herself|themselves].",
            "{miss1}'s {kin_male1.s} {judge_person1.d} [himself|herself].",
            "{mister1}'s {kin_female1.s} {judge_person1.d} [herself|himself].",
        ),
        (
            "The {male1.s} that {miss1} {judge_person1.d} {judge_person2.d} [himself|herself].",
            "The {female1.s} that {mister1} {judge_person1.d} {judge_person2.d} [herself|himself].",
            "[The {male1.s} {judge_person1.d} himself|Himself {judge_person1.d} the {male1.s}].",
            "[The {female1.s} {judge_person1.d} herself|Herself {judge_person1.d} the {female1.s}].",
        ),
    ),
    "argument": (
        (
            "The {person1.s} [{handle1.d}|{intransitive1.d}] the {thing1.s}.",
            "The {person1.s} [{intransitive1.d}|{handle1.d}] yesterday.",
            "{mister1} [{handle1.d}|{intransitive1.d}] {this1.N} {thing1.N}.",
            "{miss1} [{intransitive1.d}|{handle1.d}] in the {place1.s}.",
        ),
        (
            "The {thing1.s} was [{handle1.n}|{intransitive1.n}] by the {person1.s}.",
            "Why did the {person1.s} [{intransitive1.b}|{handle1.b}]?",
        ),
    ),
    "verb_form": (
        (
            "The {person1.N} {have.V} [{handle1.n}|{handle1.b}] the {thing1.s}.",
            "The {person1.s} {modal1} [{handle1.b}|{handle1.z}] the {thing1.s}.",
            "The {person1.s} did not [{handle1.b}|{handle1.d}] the {thing1.s}.",
            "The {person1.N} {be.V} [{intransitive1.g}|{intransitive1.b}].",
            "The {person1.N} {modal1} [{intransitive1.b}|{intransitive1.g}].",
        ),
        (
            "The {thing1.s} was [{handle1.n}|{handle1.b}] by the {person1.s}.",
            "The {person1.s} had to [{handle1.b}|{handle1.d}] the {thing1.s}.",
            "Does the {person1.s} {adverb1} [{intransitive1.b}|{intransitive1.z}]?",
        ),
    ),
    "word_order": (
        (
            "The {person1.s} [{handle1.d} the {thing1.s}|the {thing1.s} {handle1.d}].",
            "The [{mood1} {person1.s}|{person1.s} {mood1}] {intransitive1.d}.",
            "The {person1.s} [{adverb1} {handle1.z}|{handle1.z} {adverb1}] the {thing1.s}.",
            "[The {person1.s}|{person1.s} the] {intransitive1.d} in the {place1.s}.",
        ),
        (
            "The {person1.s} [who {judge_person1.z} {mister1}|{mister1} who {judge_person1.z}] {intransitive1.d}.",
            "The {person1.s} [has been|been has] {intransitive1.g}.",
            "The {thing1.s} is [near the {place1.s}|the {place1.s} near].",
        ),
    ),
    "question": (
        (
            "Where [did the {person1.s}|the {person1.s} did] {intransitive1.b}?",
            "{miss1} {know1.d} where [the {person1.s} {intransitive1.d}|did the {person1.s} {intransitive1.b}].",
            "What did the {person1.s} {handle1.b}[| the {thing1.s}]?",
            "Did the {person1.s} {handle1.b}[ the {thing1.s}|]?",
        ),
        (
            "The {thing1.s} that the {person1.s} {handle1.d} [is|the {thing2.s} is] {quality1}.",
            "The {person1.s} who {handle1.d} [the {thing1.s} |]{intransitive1.d}.",
        ),
    ),
    "case": (
        (
            "[{pronoun1.subject} {judge_person1.d} {pronoun2.object}|"
            "{pronoun2.object} {judge_person1.d} {pronoun1.subject}].",
            "The {person1.s} {judge_person1.d} [{pronoun1.object}|{pronoun1.subject}].",
            "[{pronoun1.subject}|{pronoun1.object}] {judge_person1.d} the {person1.s}.",
        ),
        (
            "{miss1} {say1.d} that [{pronoun1.subject}|{pronoun1.object}] {intransitive1.d}.",
            "The {person1.s} near [{pronoun1.object}|{pronoun1.subject}] {intransitive1.d}.",
        ),
    ),
}
PHENOMENA = tuple(_TEMPLATES)

_SLOT = re.compile(r"\{([a-z_]+)(\d?)\.?(\w*)\}")
_CHOICE = re.compile(r"\[([^|]*)\|([^\]]*)\]")


@dataclass(frozen=True)
class Pair:
    """Hold a minimal pair: the phenomenon is all that tells the sentences apart."""

    phenomenon: str
    acceptable: str
    unacceptable: str
    held_out: bool  # its template occurs in validation only


def generate(train: int = 4000, validation: int = 1000, seed: int = 0) -> dict[str, Rows]:
    """Generate both splits; label 1 is acceptable, and both labels are equally frequent in each phenomenon.

    Args:
        train: sentences to train on, a multiple of twice the number of phenomena.
        validation: sentences to validate on, likewise.
        seed: another one gives other sentences from the same vocabulary and templates.

    Raises:
        UsageError: a size is not such a multiple, or the grammar does not hold so many sentences.
    """
    sizes = {"train": train, "validation": validation}
    return {split: _rows(pairs(split, size, seed), split, seed) for split, size in sizes.items()}


def pairs(split: str, sentences: int, seed: int = 0) -> list[Pair]:
    """Generate the minimal pairs of a split, phenomenon by phenomenon; arguments as in `generate`."""
    each, rest = divmod(sentences, 2 * len(PHENOMENA))
    if rest or each < 1:
        raise UsageError(f"cannot make {sentences} sentences; expected a positive multiple of {2 * len(PHENOMENA)}")
    made: list[Pair] = []
    seen: set[str] = set()
    for phenomenon, (shared, held_out) in _TEMPLATES.items():
        templates = shared if split == "train" else _alternate(shared, held_out)
        rng = random.Random(f"{seed} {split} {phenomenon}")
        for i in range(each):
            template, number = templates[i % len(templates)], "sp"[i // len(templates) % 2]
            for _ in range(1000):
                words = _draw(template, split, rng)
                good, bad = (_expand(template, side, number, words) for side in (1, 2))
                if good not in seen and bad not in seen:
                    break
            else:
                raise UsageError(f"{sentences} sentences are too many for {split}: no new one fits {template!r}")
            seen |= {good, bad}
            made.append(Pair(phenomenon, good, bad, template in held_out))
    return made


def inflections(kind: str, word: str) -> dict[str, str]:
    """Return form -> word for a word of an open class."""
    if kind in _NOUNS:
        return {"s": word, "p": _PLURALS.get(word) or _add_s(word)}
    if kind in _VERBS:
        stem = word + word[-1] if word in _DOUBLING else word.removesuffix("e")
        past = word[:-1] + "ied" if _ends_in_y(word) else stem + "ed"
        past, participle = _PASTS.get(word, (past, past))
        return {"b": word, "z": _add_s(word), "d": past, "n": participle, "g": stem + "ing"}
    return {"": word}


def _rows(made: list[Pair], split: str, seed: int) -> Rows:
    sentences = [(text, label) for pair in made for text, label in ((pair.acceptable, 1), (pair.unacceptable, 0))]
    rng = random.Random(f"{seed} {split} order")
    sentences.sort(key=lambda _: rng.random())
    texts, labels = zip(*sentences, strict=True)
    return Rows((list(texts),), np.array(labels, np.int32), f"grammar:{split}")


def _alternate(shared: tuple[str, ...], held_out: tuple[str, ...]) -> list[str]:
    """Return templates of which every other one is held out, each kind in even shares."""
    turns = range(len(shared) * len(held_out))
    return [template for i in turns for template in (shared[i % len(shared)], held_out[i % len(held_out)])]


def _draw(template: str, split: str, rng: random.Random) -> dict[str, dict[str, str]]:
    """Draw a word, with its forms, for each class and digit of a template; no word twice."""
    words: dict[str, dict[str, str]] = {}
    for kind, index, _ in _SLOT.findall(template):
        while kind + index not in words:
            if kind in _CLOSED:
                word = _pick(_CLOSED[kind], rng)
            else:
                word = inflections(kind, _pick(VOCABULARY[kind][split == "validation"].split(), rng))
            if word not in words.values():
                words[kind + index] = word
    return words


def _expand(template: str, side: int, number: str, words: dict[str, dict[str, str]]) -> str:
    """Fill a template; `side` is 1 for the acceptable sentence, 2 for the other."""
    other = "p" if number == "s" else "s"
    agreeing = {"N": number, "V": number, "M": other, "X": other}

    def form(match: re.Match[str]) -> str:
        kind, index, name = match.groups()
        name = agreeing.get(name, name)
        if kind in _VERBS:
            name = {"s": "z", "p": "b"}.get(name, name)
        return words[kind + index][name]

    text = _SLOT.sub(form, _CHOICE.sub(rf"\{side}", template))
    return text[0].upper() + text[1:]


def _pick(options, rng: random.Random):
    # random() alone is promised to give the same numbers in every version of Python.
    return options[int(rng.random() * len(options))]


def _add_s(word: str) -> str:
    if _ends_in_y(word):
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "x", "z", "ch", "sh")) else "s")


def _ends_in_y(word: str) -> bool:
    return word.endswith("y") and word[-2] not in "aeiou"
