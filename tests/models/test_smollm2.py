"""The real SmolLM2, as it lies in its package: logits, perplexity and answers beside transformers on PyTorch."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import jaxprune as jp
from experiments.bench import perplexity
from jaxprune.models import load_decoder, load_tokenizer

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
TEXTS = [
    "The capital of France is Paris, and that of Germany is",
    "def add(a, b):\n    return a +",
    "In 2024, 17 of 300 people",
]


@pytest.fixture(scope="module")
def decoder(smollm):
    return load_decoder(NAME, groups=(30,))  # one layer to compile


def test_it_knows_its_capitals(smollm):
    writer = jp.load_writer(NAME)
    assert writer.generate(["What is the capital of France?"], max_tokens=12) == ["The capital of France is Paris."]


def test_logits_and_perplexity_beside_pytorch(decoder, smollm, real_data, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm.parent, gguf_file=smollm.name, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(decoder.source)
    apply = jax.jit(lambda params, ids: decoder.model.apply({"params": params}, ids))
    for text in TEXTS:
        ids = np.array([tokenizer.encode(text)])
        with torch.no_grad():
            want = model(torch.tensor(ids)).logits.numpy()
        padded = np.pad(ids, [(0, 0), (0, 20 - ids.shape[1])])  # one program for all
        got = apply(decoder.params, padded)[:, : ids.shape[1]]
        np.testing.assert_allclose(got, want, atol=1e-3)
    text = (real_data / "corpus" / "wikitext-2.test.txt").read_text()[:8000]
    (tmp_path / "a.txt").write_text(text)
    perplexity.main(["--text", str(tmp_path / "a.txt"), "--window", "256", "--windows", "4", "--batch", "4"])
    rows = torch.tensor(tokenizer.encode(text, special=False)[: 4 * 256]).reshape(4, 256)
    with torch.no_grad():
        want = float(torch.exp(model(rows, labels=rows).loss))
    assert float(capsys.readouterr().out.split("perplexity ")[1].split()[0]) == pytest.approx(want, abs=2e-3)
