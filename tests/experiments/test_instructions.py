"""The built-in instructions against the language's rules, written a second time and applied to the sentences as texts."""

from __future__ import annotations

import re

import numpy as np
import pytest

from experiments.data import instructions
from experiments.data.grammar import VOCABULARY
from jaxprune.errors import UsageError

SPLITS = instructions.generate(3900, 1300)
ROWS = [
    (split, instructions.NAMES[kind], *row)
    for split, rows in SPLITS.items()
    for *row, kind in zip(*rows.texts, rows.labels, strict=True)
]

IRREGULAR = {  # past, participle
    "sleep": "slept slept", "kneel": "knelt knelt", "weep": "wept wept", "grin": "grinned grinned", "keep": "kept kept",
    "bring": "brought brought", "grab": "grabbed grabbed", "forgive": "forgave forgiven",
}  # fmt: skip


def words(*kinds: str) -> set[str]:
    return {word for kind in kinds for split in VOCABULARY[kind] for word in split.split()}


def past(verb: str) -> str:
    if verb in IRREGULAR:
        return IRREGULAR[verb].split()[0]
    return re.sub(r"([^aeiou])y$", r"\1i", verb) + ("d" if verb.endswith("e") else "ed")


def participle(verb: str) -> str:
    return IRREGULAR[verb].split()[1] if verb in IRREGULAR else past(verb)


def third(verb: str) -> str:
    return re.sub(r"([^aeiou])y$", r"\1ie", verb) + ("es" if re.search(r"(s|x|z|ch|sh)$", verb) else "s")


VERBS = words("handle", "judge_person", "intransitive")
FORMS = {form: verb for verb in VERBS for form in (verb, third(verb), past(verb), participle(verb))}
ADJECTIVES = words("mood", "quality")


def split_at_verb(sentence: str, told: bool) -> tuple[list[str], str, list[str]]:
    """Return the words before the verb, its base form, and those behind it; `told` in the past."""
    assert sentence.endswith(".")
    text = sentence[0].lower() + sentence[1:-1]
    tokens = text.split()
    # "love" is a verb here and "kind" none: a verb stands behind a noun, and no adjective does.
    (at,) = [i for i, token in enumerate(tokens) if token in FORMS and tokens[i - 1] not in {"the"} | ADJECTIVES]
    base = FORMS[tokens[at]]
    many = tokens[at - 1].endswith("s")
    assert tokens[at] == (past(base) if told else base if many else third(base))
    return tokens[:at], base, tokens[at + 1 :]


def joined(*tokens: str, end: str = ".") -> str:
    text = " ".join(tokens)
    return text[0].upper() + text[1:] + end


def expected(kind: str, given: str) -> str:
    if kind in ("sort", "reverse"):
        listed = given.split(", ")
        return ", ".join(sorted(listed) if kind == "sort" else reversed(listed))
    if kind == "count_words":
        return str(given.count(" ") + 1)
    if kind == "count_letters":
        assert given.isalpha()
        return str(len(list(given)))
    before, verb, behind = split_at_verb(given, kind not in ("past", "plural"))
    one = third(verb)
    return {
        "past": joined(*before, past(verb), *behind),
        "present": joined(*before, verb if before[-1].endswith("s") else one, *behind),
        "question": joined("did", *before, verb, *behind, end="?"),
        "negative": joined(*before, "did", "not", verb, *behind),
        "passive": joined(*behind, "was", participle(verb), "by", *before),
        "plural": joined(*before[:-1], before[-1] + "s", verb, *behind),
        "verb": past(verb),
        "adjectives": ", ".join(word for word in [*before, *behind] if word in ADJECTIVES),
    }[kind]


@pytest.mark.parametrize("kind", [name for name in instructions.NAMES if name != "correct"])
def test_every_response_is_what_the_rules_give(kind):
    rows = [(given, output) for _, name, _, given, output in ROWS if name == kind]
    assert len(rows) == 400
    assert [output for _, output in rows] == [expected(kind, given) for given, _ in rows]


def plural(noun: str) -> bool:
    return (
        noun.endswith("s")
        and noun not in words("male", "female", "kin_female")
        or noun in {"men", "women", "wives", "gentlemen"}
    )


def fits(fault: str, sentence: str, at: int) -> bool:
    """Tell whether the word at a place fits its sentence."""
    tokens = sentence.rstrip(".?").split()
    word, before = tokens[at], tokens[at - 1]
    if "agree" in fault:
        head = tokens[3] if tokens[0] == "Where" else tokens[1]
        many = tokens[1] == "and" or plural(head)
        return word in ({"are"} | VERBS if many else {"is"} | {third(verb) for verb in VERBS})
    if "pronoun" in fault:
        head = tokens[0] if tokens[0] != "The" else tokens[1]
        if tokens[2] == "and" or (plural(head) and head not in words("mister", "miss")):
            return word == "themselves"
        return word == ("himself" if head in words("male", "mister") else "herself")
    if before in {"have", "has", "was"}:
        return word in {participle(verb) for verb in VERBS}
    if before in {"is", "are"}:
        return word.endswith("ing")
    assert before in {"will", "can", "must", "should", "might", "not", "to"} | words("adverb")
    return word in VERBS


def test_a_correction_changes_the_one_word_that_is_wrong():
    rows = [(asked, given, output) for _, name, asked, given, output in ROWS if name == "correct"]
    assert len(rows) == 400 and len({asked for asked, _, _ in rows}) == 9
    for asked, given, output in rows:
        wrong, right = given.rstrip(".?").split(), output.rstrip(".?").split()
        (at,) = [i for i, pair in enumerate(zip(wrong, right, strict=True)) if len(set(pair)) > 1]
        assert fits(asked, output, at) and not fits(asked, given, at), (asked, given, output)


def test_no_input_twice_and_none_in_both_splits():
    assert {split: len(rows) for split, rows in instructions.generate().items()} == {"train": 3900, "validation": 325}
    inputs = {split: rows.texts[1] for split, rows in SPLITS.items()}
    for split, rows in SPLITS.items():
        assert np.bincount(rows.labels).tolist() == [len(rows) // 13] * 13
        for label in range(13):
            of_kind = [text for text, kind in zip(inputs[split], rows.labels, strict=True) if kind == label]
            assert len(set(of_kind)) == len(of_kind)
    assert not set(inputs["train"]) & set(inputs["validation"])


def test_rows_are_short_and_mixed_and_every_kind_has_several_phrasings():
    assert max(len(output.split()) for *_, output in ROWS) <= 15
    for split, rows in SPLITS.items():
        assert len(set(rows.labels[:60])) >= 12, split
        for kind in instructions.NAMES:
            assert len({asked for part, name, asked, _, _ in ROWS if (part, name) == (split, kind)}) >= 3


def test_rows_are_a_function_of_the_seed():
    again, other = instructions.generate(3900, 1300), instructions.generate(seed=1)
    for split, rows in SPLITS.items():
        assert again[split].texts == rows.texts and np.array_equal(again[split].labels, rows.labels)
        assert not set(zip(*other[split].texts, strict=True)) >= set(zip(*rows.texts, strict=True))
    # A row does not depend on how many others there are.
    few = instructions.generate(130, 13)["train"]
    assert set(zip(*few.texts, strict=True)) <= set(zip(*SPLITS["train"].texts, strict=True))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((100, 325), "cannot make 100 instructions; expected a positive multiple of 13"),
        ((3900, 0), "cannot make 0 instructions"),
        ((3900, 13 * 5000), "5000 rows are too many of .* for validation: there are no more inputs"),
    ],
)
def test_sizes_that_cannot_be_made(sizes, message):
    with pytest.raises(UsageError, match=message):
        instructions.generate(*sizes)
