"""Generation: the cache against whole passes, transformers' greedy and beam search, sampling against its distribution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.errors import UsageError
from jaxprune.models.decoder_weights import load_decoder
from jaxprune.models.generate import Generator, Settings
from tests.models import decoders

RNG = np.random.RandomState(0)
PROMPTS = [RNG.randint(3, 83, n).tolist() for n in (5, 9, 3, 11, 7)]
STOP = 2


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A decoder that stops now and then."""
    folder, _, arrays = decoders.save(tmp_path_factory.mktemp("model"), "llama3", max_position_embeddings=64)
    arrays["lm_head.weight"][STOP] *= 3
    from safetensors.numpy import save_file

    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    return load_decoder(folder)


def generator(loaded, adapters=None, masks=None):
    return Generator(jp.attach(loaded.model), loaded.config, loaded.params, adapters or {}, masks or {})


def test_greedy_is_the_argmax_of_whole_passes(loaded):
    told: dict[int, list[int]] = {}
    add = lambda new: [told.setdefault(i, []).extend(tokens) for i, tokens in new.items()]  # noqa: E731
    answers = generator(loaded)(PROMPTS, Settings(max_tokens=12, stops=(STOP,)), batch=2, every=5, told=add)
    apply = jax.jit(lambda ids: loaded.model.apply({"params": loaded.params}, ids))
    for i, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        text = list(prompt)
        while len(text) < len(prompt) + 12:
            padded = jnp.asarray([text + [0] * (30 - len(text))])
            text.append(int(apply(padded)[0, len(text) - 1].argmax()))
            if text[-1] == STOP:
                break
        assert answer.tokens + [STOP] * answer.stopped == text[len(prompt) :]
        assert told[i] == answer.tokens
    assert {a.stopped for a in answers} == {True, False}


def test_stacks_and_adapters(loaded):
    sites = loaded.sites()
    adapters, masks = jp.init_lora(jax.random.key(0), sites, {s.path: 2 for s in sites})
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    settings = Settings(max_tokens=6)
    plain, tuned = generator(loaded)(PROMPTS, settings), generator(loaded, adapters, masks)(PROMPTS, settings)
    assert plain != tuned
    parts = load_decoder(loaded.folder, groups=(1, 2))
    assert generator(parts, adapters, masks)(PROMPTS, settings) == tuned


@pytest.mark.parametrize(("beams", "penalty"), [(1, 1.0), (4, 1.0), (3, 0.0), (4, 2.0)])
def test_transformers_writes_the_same(loaded, beams, penalty):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(loaded.folder).eval()
    length = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (length - len(p)) + p for p in PROMPTS])
    seen = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in PROMPTS])
    out = model.generate(
        ids, attention_mask=seen, max_new_tokens=14, do_sample=False, num_beams=beams, length_penalty=penalty
    )
    want = [row[: row.index(STOP)] if STOP in row else row for row in out[:, length:].tolist()]
    settings = Settings(max_tokens=14, stops=(STOP,), beams=beams, length_penalty=penalty)
    assert [a.tokens for a in generator(loaded)(PROMPTS, settings, batch=2)] == want
    assert len({len(tokens) for tokens in want}) > 1


@pytest.mark.parametrize("how", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.6}, {"top_k": 5, "top_p": 0.8}])
def test_sampling_draws_from_its_distribution(loaded, how):
    settings = {"temperature": 2.0, **how}
    prompt = PROMPTS[0]
    logits = np.asarray(loaded.model.apply({"params": loaded.params}, jnp.asarray([prompt]))[0, -1], np.float64)
    p = np.exp(logits / settings["temperature"])
    p[np.argsort(-p)[settings.get("top_k") or len(p) :]] = 0
    p /= p.sum()
    order = np.argsort(-p)
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= settings.get("top_p", 1.0)]] = 0
    p /= p.sum()
    many = 3000
    each = [Settings(max_tokens=1, seed=i, **settings) for i in range(many)]
    answers = generator(loaded)([prompt] * many, each, batch=many)
    counts = np.bincount([a.tokens[0] for a in answers], minlength=len(p))
    assert counts[p == 0].sum() == 0
    seen = p > 0
    chi2 = ((counts - many * p)[seen] ** 2 / (many * p[seen])).sum()
    # The mean of chi squared is its degrees of freedom, its variance twice that.
    assert chi2 < seen.sum() + 5 * np.sqrt(2 * seen.sum())


def test_an_answer_does_not_depend_on_its_neighbours(loaded):
    settings = [Settings(max_tokens=8, temperature=1.0, seed=i) for i in range(5)]
    together = generator(loaded)(PROMPTS, settings, batch=5)
    assert [generator(loaded)([p], s)[0] for p, s in zip(PROMPTS, settings, strict=True)] == together
    assert generator(loaded)(PROMPTS[:1], settings[1])[0] != together[0]


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[]], Settings(), "prompt 0 has no tokens"),
        (
            [[3] * 60],
            Settings(max_tokens=5),
            "prompt 0 has 60 tokens, and with 5 of the answer that is more than the 64 pos",
        ),
        ([[3]], Settings(max_tokens=0), "max_tokens is 0; expected a whole number, 1 or more"),
        ([[3]], Settings(temperature=-1.0), "temperature is -1.0; expected a number, 0 or more"),
        ([[3]], Settings(top_p=0.0), "top_p is 0.0; expected a number above 0 and up to 1"),
        ([[3]], Settings(beams=2, temperature=1.0), "beams 2 and temperature 1.0: a beam search draws nothing"),
        ([[3], [4]], [Settings()], "1 settings for 2 prompts"),
        ([[3], [4]], [Settings(), Settings(max_tokens=3)], "need the same max_tokens, stops and beams"),
    ],
)
def test_bad_input(loaded, prompts, settings, message):
    with pytest.raises(UsageError, match=message):
        generator(loaded)(prompts, settings)
    assert generator(loaded)([]) == []
