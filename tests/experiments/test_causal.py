"""Instruction tuning against loops in float64: tokens at the boundary, packed batches, losses, outputs and scores."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from experiments.data import packing
from experiments.data.packing import Batches, evaluation_batches, single_example_batches
from experiments.data.prompts import TEMPLATES, prompt
from experiments.data.rows import Rows
from experiments.data.tokens import Encoded
from experiments.run.loading import each_finished
from experiments.tasks import causal, get_task
from jaxprune.errors import UsageError
from jaxprune.models.decoder_config import DecoderConfig
from jaxprune.models.decoder_weights import init_decoder
from jaxprune.models.tokenizer import load_tokenizer

WITH_INPUT = """\
Below is an instruction that describes a task, paired with an input that provides further context. Write a response that \
appropriately completes the request.

### Instruction:
Sort {x}.

### Input:
b, a

### Response:"""
WITHOUT_INPUT = """\
Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
Sort {x}.

### Response:"""


class Words(NamedTuple):
    """A byte-level BPE with the interface of the library's; `inner` puts <s> before a text."""

    inner: Any
    eos: int = 1

    def encode_batch(self, texts, *, special=True):
        return [found.ids for found in self.inner.encode_batch(texts, add_special_tokens=special)]

    def chat(self, messages, *, answer=True):
        said = "".join(f"<s>{message['role']}\n{message['content']}</s>\n" for message in messages)
        return said + "<s>assistant\n" * answer


@pytest.fixture(scope="module")
def tokenizer() -> Words:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    inner.decoder = decoders.ByteLevel()  # pyright: ignore
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    inner.train_from_iterator([WITH_INPUT, WITHOUT_INPUT, *['he said:"yes":"no"'] * 9], trainer)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])  # pyright: ignore
    return Words(inner)


def rows(*texts: tuple[str, str, str]) -> Rows:
    return Rows(tuple(map(list, zip(*texts, strict=True))), np.zeros(len(texts), np.int32), "rows.json")  # pyright: ignore


# Prompts and tokens


def test_the_stanford_template_byte_for_byte(tokenizer):
    """With braces in the texts, which are no places to fill."""
    assert prompt(tokenizer, "alpaca", "Sort {x}.", "b, a") == WITH_INPUT
    assert prompt(tokenizer, "alpaca", "Sort {x}.") == WITHOUT_INPUT


def test_a_chat_is_the_tokenizers_own(tokenizer):
    assert prompt(tokenizer, "chat", "Sort.", "b, a") == "<s>user\nSort.\n\nb, a</s>\n<s>assistant\n"
    assert prompt(tokenizer, "chat", "Sort.") == "<s>user\nSort.</s>\n<s>assistant\n"


TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)


@settings(deadline=None, max_examples=150)
@given(TEXTS, st.one_of(st.just(""), TEXTS), TEXTS, st.sampled_from(["alpaca", "chat"]))
def test_training_sees_the_prompt_that_generation_is_given(tokenizer, instruction, given_, response, template):
    """The prompt's tokens are those of the prompt alone; what follows is the response, to the last byte, and its end."""
    encoded = causal.encode(rows((instruction, given_, response)), tokenizer, template, 10_000)
    text = prompt(tokenizer, template, instruction, given_)
    alone = tokenizer.inner.encode(text, add_special_tokens=template == "alpaca").ids
    assert alone[0] == 0 and alone.count(0) == text.count("<s>") + (template == "alpaca")
    ids, predicted = encoded.ids.tolist(), encoded.type_ids.tolist()
    assert ids[: len(alone)] == alone and predicted == [0] * len(alone) + [1] * (len(ids) - len(alone))
    assert ids[-1] == tokenizer.eos
    assert tokenizer.inner.decode(ids[len(alone) : -1], skip_special_tokens=False) == response


def test_joined_texts_would_have_another_boundary(tokenizer):
    text = prompt(tokenizer, "alpaca", "Speak.")
    (alone,), (joined,) = tokenizer.encode_batch([text]), tokenizer.encode_batch([text + '"yes"'])
    assert joined[: len(alone)] != alone


def test_long_responses_are_cut_and_prompts_that_fill_all_are_left_out(tokenizer):
    texts = [("a", "", "b"), ("a", "", "b" * 40), ("a" * 300, "", "b"), ("a", "c", "d")]
    prompts = [len(ids) for ids in tokenizer.encode_batch([prompt(tokenizer, "alpaca", *row[:2]) for row in texts])]
    most = max(prompts[0], prompts[3]) + 2  # as many as the shortest response has with its end
    assert prompts[1] == prompts[0] and prompts[2] > most
    labelled = Rows(rows(*texts).texts, np.arange(4, dtype=np.int32), "rows.json", ("held out",))
    encoded = causal.encode(labelled, tokenizer, "alpaca", most)
    lengths = np.diff(encoded.offsets)
    assert lengths.tolist() == [prompts[0] + 2, most, prompts[3] + 2] and encoded.labels.tolist() == [0, 1, 3]
    last = [encoded.ids[end - 1] for end in encoded.offsets[1:]]
    assert [token == tokenizer.eos for token in last] == [True, False, True]
    assert encoded.notes == (
        "held out",
        f"1 of the 4 responses of rows.json are cut at --max-length {most}",
        f"1 of the 4 rows of rows.json are left out, as their prompts alone fill --max-length {most}",
    )
    # A prompt of just so many tokens leaves nothing.
    short, long = sorted((texts[0], texts[3]), key=lambda row: prompts[texts.index(row)])
    for room, left in ((0, 1), (1, 2)):
        encoded = causal.encode(rows(short, long), tokenizer, "alpaca", prompts[texts.index(long)] + room)
        assert len(encoded) == len(encoded.offsets) - 1 == left
    with pytest.raises(
        UsageError, match=rf"shortest prompt of rows.json has {prompts[0]} tokens.*--max-length 20; raise"
    ):
        causal.encode(rows(texts[0]), tokenizer, "alpaca", 20)


# Batches


VOCABULARY = 30


def examples(count: int, seed: int = 0, longest: int = 12) -> Encoded:
    rng = np.random.default_rng(seed)
    made = [(int(rng.integers(1, longest)), int(rng.integers(1, longest))) for _ in range(count)]
    lengths = [a + b for a, b in made]
    types = np.concatenate([[0] * a + [1] * b for a, b in made]).astype(np.int8)
    ids = rng.integers(0, VOCABULARY, sum(lengths)).astype(np.int32)
    return Encoded(ids, types, np.append(0, np.cumsum(lengths)), np.arange(count, dtype=np.int32), predicts=True)


RNG = np.random.default_rng(1)
TABLE, HEAD = RNG.normal(size=(VOCABULARY, 8)), RNG.normal(size=(8, VOCABULARY))


def decoder(ids, segments, positions, *, scored, targets):
    """A causal model: what a token sees is a sum over those of its segment up to itself, by their positions."""
    place = jnp.arange(ids.shape[1])
    seen = (segments[:, :, None] == segments[:, None, :]) & (place[:, None] >= place)
    hidden = jnp.tanh(seen.astype(jnp.float32) @ (jnp.float32(TABLE)[ids] / (1.0 + positions[..., None])))
    logits = jnp.take_along_axis(hidden, scored[..., None], 1) @ jnp.float32(HEAD)
    nll = -jnp.take_along_axis(log_softmax(logits), targets[..., None], -1)[..., 0]
    return nll, logits.argmax(-1) == targets


def log_softmax(logits):
    return logits - jnp.log(jnp.exp(logits).sum(-1, keepdims=True))


def by_hand(encoded: Encoded, i: int) -> tuple[float, int, int]:
    """Return the sum of the losses, the tokens, and the right ones of one example, in float64, token by token."""
    start, end = encoded.offsets[i], encoded.offsets[i + 1]
    hidden, nll, tokens, right = np.zeros(8), 0.0, 0, 0
    for position, at in enumerate(range(start, end - 1)):
        hidden = hidden + TABLE[encoded.ids[at]] / (1.0 + position)
        if encoded.type_ids[at + 1]:
            logits, target = np.tanh(hidden) @ HEAD, encoded.ids[at + 1]
            nll += np.log(np.exp(logits).sum()) - logits[target]
            tokens += 1
            right += logits.argmax() == target
    return nll, tokens, right


def parts(batch):
    return [{name: x[i] for name, x in batch.items()} for i in range(len(batch["input_ids"]))]


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("microbatches", [1, 3])
def test_a_step_is_the_mean_over_its_predicted_tokens(microbatches, pack):
    """Over all microbatches together, though one holds more of them than another; the last batch has fillers."""
    task, encoded = get_task("alpaca"), examples(40)
    batches = Batches(encoded, 12, 5, microbatches=microbatches, pack=pack)
    apart, shapes = [], set()
    for step in range(batches.steps_per_epoch):
        batch: Any = task.finish(batches.batch(1, step))  # pyright: ignore[reportAttributeAccessIssue]
        shapes.add(batch["scored"].shape[-1])
        several = parts(batch) if microbatches > 1 else [batch]
        losses = [float(task.loss(decoder, part, None)) for part in several]
        members = batches.indices(1, step)
        hands = [by_hand(encoded, i) for i in members[members >= 0]]
        assert np.mean(losses) == pytest.approx(sum(x[0] for x in hands) / sum(x[1] for x in hands), rel=1e-5)
        apart.append(np.ptp([(part["weights"] > 0).sum() for part in several]))
        assert sum((part["weights"] > 0).sum() for part in several) == sum(x[1] for x in hands)
    assert len(members[members < 0]) == 8 and len(shapes) == 1
    assert microbatches == 1 or max(apart) > 0


def test_what_the_model_takes_of_a_batch_token_by_token():
    encoded = examples(11)
    batches = Batches(encoded, 4, 3)
    for step in range(batches.steps_per_epoch):
        batch = batches.batch(0, step)
        done = causal.finish(batch)
        assert done["scored"].shape == done["targets"].shape == (len(batch["input_ids"]), batches.room)
        found = []
        for row, column in itertools.product(*map(range, done["scored"].shape)):
            place = (row, column)
            if done["weights"][place]:
                at = int(done["scored"][place])
                assert batch["segment_ids"][row, at] == batch["segment_ids"][row, at + 1]
                assert done["targets"][place] == batch["input_ids"][row, at + 1]
                found.append((int(done["example"][place]), int(batch["position_ids"][row, at + 1])))
            else:
                assert not any(done[name][place] for name in ("scored", "targets", "example"))
        expected = [
            (place, int(position))
            for place, i in enumerate(batches.indices(0, step)) if i >= 0
            for position in np.flatnonzero(encoded.type_ids[encoded.offsets[i] : encoded.offsets[i + 1]])
        ]  # fmt: skip
        assert sorted(found) == sorted(expected)
        np.testing.assert_allclose(done["weights"][done["weights"] > 0], 1 / len(expected), rtol=1e-6)


def test_outputs_and_scores_of_a_split():
    task, splits = get_task("alpaca"), {"a": examples(25), "b": examples(9, 1, longest=30)}
    made = evaluation_batches(splits, 8)
    assert len({batches.room for batches in made.values()}) == 1
    for split, batches in made.items():
        outputs = batches.restore([np.asarray(task.outputs(decoder, task.finish(batch))) for batch in batches.all()])  # pyright: ignore
        hands = np.array([by_hand(splits[split], i) for i in range(len(splits[split]))])
        np.testing.assert_allclose(outputs, hands, rtol=1e-5)
        nll, tokens, right = hands.T
        score = task.score(outputs, splits[split].labels)
        assert tuple(score) == task.metrics == ("loss", "perplexity", "token_accuracy", "exact_match")
        np.testing.assert_allclose(
            list(score.values()),
            [
                nll.sum() / tokens.sum(),
                np.exp(nll.sum() / tokens.sum()),
                100 * right.sum() / tokens.sum(),
                100 * (right == tokens).mean(),
            ],
            rtol=1e-5,
        )
    outputs = np.array([[2.0, 2, 2], [3.0, 3, 2], [1.0, 1, 1], [0.5, 4, 0]])
    built_in = get_task("instructions").score(outputs, np.zeros(4))
    assert built_in == pytest.approx(
        {"exact_match": 50.0, "loss": 0.65, "perplexity": np.exp(0.65), "token_accuracy": 50.0}
    )
    assert np.isfinite(task.score(np.array([[1e6, 1, 0]]), np.zeros(1))["perplexity"])


def test_what_stands_for_no_token_does_not_count():
    """Places for none have any loss there is, and the most probable token is right by chance."""
    encoded = examples(5)
    batches = Batches(encoded, 8, None)
    batch: Any = causal.finish(batches.batch(0, 0))

    def sure(ids, *_, scored, targets):
        return jnp.where(batch["weights"] > 0, 1.0, jnp.inf), scored >= 0

    found = np.asarray(get_task("alpaca").outputs(sure, batch))
    members = batches.indices(0, 0)
    tokens = [by_hand(encoded, i)[1] if i >= 0 else 0 for i in members]
    assert -1 in members and found.tolist() == [[count] * 3 for count in tokens]


def test_splits_have_room_for_the_fullest_of_them():
    made = evaluation_batches({"a": examples(2, longest=5), "b": examples(30, longest=40)}, 8)
    assert made["a"].room == made["b"].room > 32
    assert {batch["predicted"].shape for batches in made.values() for batch in batches.all()} == {
        (made["a"].shapes[0][0], made["a"].room)
    }


def test_single_examples_have_means_of_their_own():
    task, encoded = get_task("alpaca"), examples(7)
    batch = each_finished(task, single_example_batches(encoded, 7))
    losses = [float(task.loss(decoder, part, None)) for part in parts(batch)]
    expected = [by_hand(encoded, i)[0] / by_hand(encoded, i)[1] for i in range(7)]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8), st.integers(0, 40))
def test_no_row_can_hold_more_predicted_tokens_than_there_is_room_for(sizes, spare):
    """Against every choice of examples that fits into a row."""
    lengths, predicted = np.array([a + b for a, b in sizes]), np.array([b for _, b in sizes])
    length = int(lengths.max()) + spare
    most = max(
        sum(predicted[list(chosen)])
        for count in range(len(sizes) + 1)
        for chosen in itertools.combinations(range(len(sizes)), count)
        if sum(lengths[list(chosen)]) <= length
    )
    for row, expected in ((length, most), (None, predicted.max())):
        assert packing._room(lengths, predicted, row) == -(-int(expected) // 32) * 32


def test_other_tasks_have_no_such_places():
    encoded = examples(5)
    plain = Encoded(encoded.ids, encoded.type_ids, encoded.offsets, encoded.labels)
    assert "predicted" not in Batches(plain, 4, 0).batch(0, 0) and "predicted" not in single_example_batches(plain, 3)


# With the library's own decoder and tokenizer


@pytest.fixture(scope="module")
def tiny_decoder(tokenizer, tmp_path_factory):
    """A whole model folder: that tokenizer, a configuration and random weights."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("decoder")
    names = dict(
        bos_token="<s>", eos_token="</s>", chat_template="{% for m in messages %}<s>{{ m.content }}{% endfor %}"
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.inner, **names).save_pretrained(folder / "words")
    config = DecoderConfig(
        vocab_size=400,
        hidden_size=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=12,
        intermediate_size=32,
        tied=True,
    )
    params = init_decoder(dataclasses.replace(config, initializer_range=0.3))[1]
    beside = {**load_tokenizer(folder / "words").files(), "README.md": b"x"}
    causal.Causal("x").save(folder / "model", config, params, beside)
    return folder / "model"


@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_a_step_of_a_decoder_is_that_of_examples_alone(tiny_decoder, template):
    """Loss and gradients of packed microbatches, against one example at a time with all its logits."""
    task = causal.Causal("x", template=template, chunk=5)
    model = task.load(str(tiny_decoder), "float32", 0)
    texts = [
        ("Sort.", "b, a", "a, b"),
        ("Greet.", "", "Hello there!"),
        ("Say yes.", "", '"yes"'),
        ("Count.", "a b c", "3"),
    ]
    encoded = task.encode(rows(*texts), model, 200)
    batch: Any = task.finish(Batches(encoded, 4, 0, microbatches=2).batch(0, 0))
    forward, ranks = jp.attach(model.model), {site.path: 2 for site in model.sites()}
    adapters, masks = jp.init_lora(jax.random.key(0), model.sites(), ranks)
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, adapters)

    def apart(adapters):
        nll, tokens = 0.0, 0
        for start, end in itertools.pairwise(encoded.offsets):
            ids, predicted = encoded.ids[None, start:end], np.flatnonzero(encoded.type_ids[start:end])
            logits = forward(model.params, adapters, masks, jnp.asarray(ids))[0]
            nll -= log_softmax(logits)[predicted - 1, ids[0, predicted]].sum()
            tokens += len(predicted)
        return nll / tokens

    def packed(adapters):
        apply = functools.partial(forward, model.params, adapters, masks)
        return sum(task.loss(apply, part, None) for part in parts(batch)) / 2

    for one, other in zip(
        *map(jax.tree.leaves, (jax.value_and_grad(f)(adapters) for f in (apart, packed))), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=1e-5)
    # A checkpoint of a larger vocabulary than its model's has no vectors for some tokens.
    with pytest.raises(
        UsageError, match="makes token .*, where the model has 100; get a tokenizer and a model that belong"
    ):
        task.encode(
            rows(*texts), dataclasses.replace(model, config=dataclasses.replace(model.config, vocab_size=100)), 200
        )


# What is left behind


def test_what_is_needed_to_generate_is_left_behind():
    task: Any = get_task("alpaca")
    said = json.loads(task.reading("base", 256, "bfloat16")["generate.json"])
    text = said["template"]["with_input"].replace("{instruction}", "Sort {x}.").replace("{input}", "b, a")
    assert text == WITH_INPUT and (said["base_model"], said["max_length"], said["dtype"]) == ("base", 256, "bfloat16")
    chat = json.loads(causal.Causal("x", template="chat").reading(None, 9, "float32")["generate.json"])
    assert chat["template"] is None  # the tokenizer's own
    assert set(TEMPLATES) == {"alpaca", "chat"}
