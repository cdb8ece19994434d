"""The built-in task is balanced, leaks nothing between its splits and cannot be solved by counting words."""

import hashlib
import re
from collections import Counter

import numpy as np
import pytest

from experiments.data.grammar import PHENOMENA, VOCABULARY, generate, inflections, pairs
from jaxprune.errors import UsageError


@pytest.fixture(scope="module")
def splits():
    return generate()


def words(rows) -> set[str]:
    return {word for text in rows.texts[0] for word in re.findall(r"[a-z]+", text.lower())}


def forms(side: int) -> set[str]:
    return {
        form.lower()
        for kind, sides in VOCABULARY.items()
        for word in sides[side].split()
        for form in inflections(kind, word).values()
    }


def test_sizes_and_balance(splits):
    for split, size in (("train", 4000), ("validation", 1000)):
        assert len(splits[split]) == size
        assert splits[split].labels.sum() == size // 2
        counts = Counter(pair.phenomenon for pair in pairs(split, size))
        assert counts == dict.fromkeys(PHENOMENA, size // 2 // len(PHENOMENA))


def test_every_prefix_is_about_balanced(splits):
    # max_train_samples takes the first rows
    assert 0.4 < splits["train"].labels[:500].mean() < 0.6


def test_no_sentence_twice(splits):
    texts = [text.lower() for rows in splits.values() for text in rows.texts[0]]
    assert len(set(texts)) == len(texts) == 5000


def test_splits_share_no_content_word(splits):
    assert not forms(0) & forms(1)
    assert not words(splits["train"]) & forms(1)
    assert not words(splits["validation"]) & forms(0)
    shared = words(splits["train"]) & words(splits["validation"])
    assert {"the", "himself", "did", "who"} <= shared and len(shared) < 70


def test_validation_holds_templates_that_training_lacks():
    assert not any(pair.held_out for pair in pairs("train", 4000))
    for phenomenon in PHENOMENA:
        held_out = [pair.held_out for pair in pairs("validation", 1000) if pair.phenomenon == phenomenon]
        assert np.mean(held_out) == 0.5


def test_sentences_are_well_formed(splits):
    for rows in splits.values():
        for text in rows.texts[0]:
            assert re.fullmatch(r"[A-Z][A-Za-z']*( [A-Za-z']+)+[.?]", text), text


def test_deterministic(splits):
    digest = hashlib.sha256()
    for rows in splits.values():
        digest.update("\n".join(rows.texts[0]).encode() + rows.labels.astype("<i4").tobytes())
    # The same on every machine and every Python; a change of the grammar changes it, and old scores with it.
    assert digest.hexdigest()[:16] == "26a1a534e326f5c9"
    assert generate(seed=1)["train"].texts != splits["train"].texts


@pytest.mark.parametrize(
    ("kind", "word", "expected"),
    [
        ("intransitive", "cry", "cry cries cried cried crying"),
        ("intransitive", "grin", "grin grins grinned grinned grinning"),
        ("intransitive", "kneel", "kneel kneels knelt knelt kneeling"),
        ("judge_person", "forgive", "forgive forgives forgave forgiven forgiving"),
        ("handle", "fix", "fix fixes fixed fixed fixing"),
        ("handle", "carry", "carry carries carried carried carrying"),
        ("handle", "destroy", "destroy destroys destroyed destroyed destroying"),
        ("person", "nurse", "nurse nurses"),
        ("place", "church", "church churches"),
        ("place", "library", "library libraries"),
        ("thing", "key", "key keys"),
        ("female", "lady", "lady ladies"),
        ("female", "wife", "wife wives"),
        ("male", "gentleman", "gentleman gentlemen"),
    ],
)
def test_inflections(kind, word, expected):
    assert " ".join(inflections(kind, word).values()) == expected


def test_a_pair_differs_only_in_its_phenomenon():
    by_phenomenon = {}
    for pair in pairs("train", 4000):
        by_phenomenon.setdefault(pair.phenomenon, []).append(pair)
    same_words = [
        Counter(pair.acceptable.lower().strip(".").split()) == Counter(pair.unacceptable.lower().strip(".").split())
        for pair in by_phenomenon["word_order"]
    ]
    assert all(same_words)
    for phenomenon in ("agreement", "attractor", "determiner", "reflexive", "binding", "argument", "verb_form"):
        for pair in by_phenomenon[phenomenon]:
            good, bad = pair.acceptable.split(), pair.unacceptable.split()
            assert len(good) == len(bad) and sum(a != b for a, b in zip(good, bad, strict=True)) == 1, pair


@pytest.mark.parametrize("features", ["words and word pairs", "length"])
def test_cannot_be_solved_by_counting(splits, features):
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    if features == "length":
        made = {s: np.eye(30)[[len(text.split()) for text in rows.texts[0]]] for s, rows in splits.items()}
    else:
        vectorizer = CountVectorizer(ngram_range=(1, 2), token_pattern=r"\w+|[.?]").fit(splits["train"].texts[0])
        made = {s: vectorizer.transform(rows.texts[0]) for s, rows in splits.items()}
    model = LogisticRegression(max_iter=1000).fit(made["train"], splits["train"].labels)
    assert model.score(made["validation"], splits["validation"].labels) < 0.6


@pytest.mark.parametrize("size", [0, -20, 30])
def test_sizes_that_cannot_be_balanced(size):
    with pytest.raises(UsageError, match="multiple of 20"):
        pairs("train", size)


def test_more_sentences_than_the_grammar_holds():
    with pytest.raises(UsageError, match="too many for validation"):
        pairs("validation", 40000)
