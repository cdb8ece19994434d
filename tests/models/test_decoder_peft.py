"""Adapters of decoders exchanged with PEFT, and merged checkpoints with transformers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.models.decoder_weights import load_decoder, save_decoder
from tests.models import decoders

IDS = np.random.RandomState(1).randint(3, 83, (2, 11))


@pytest.fixture(params=["llama3.2", "qwen2"])
def trained(request, tmp_path):
    """A decoder with adapters of several ranks, some components masked, one layer without any."""
    loaded = load_decoder(decoders.save(tmp_path / "base", request.param)[0], groups=(1, 2))
    sites = loaded.sites()
    ranks = {s.path: 1 + i % 4 for i, s in enumerate(sites) if s.layer != 1}
    adapters, masks = jp.init_lora(jax.random.key(0), sites, ranks)
    adapters = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), adapters)
    masks = {
        path: mask.at[0].set(0.0) if i % 3 == 0 and len(mask) > 1 else mask
        for i, (path, mask) in enumerate(masks.items())
    }
    logits = jp.attach(loaded.model)(loaded.params, adapters, masks, jnp.asarray(IDS))
    return loaded, sites, adapters, masks, np.asarray(logits)


def test_peft_computes_the_same_and_its_folder_comes_back(trained, tmp_path):
    loaded, sites, adapters, masks, logits = trained
    jp.save_peft(
        adapters, masks, tmp_path / "adapter", torch_paths=loaded.torch_paths, params=loaded.params, task_type="CAUSAL_LM",
        base_model=loaded.folder, profile="vllm",
    )  # fmt: skip
    again = jp.load_peft(tmp_path / "adapter", sites, torch_paths=loaded.torch_paths)[:2]
    got = jp.attach(loaded.model)(loaded.params, *again, jnp.asarray(IDS))
    np.testing.assert_allclose(got, logits, atol=1e-5)
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(loaded.folder)
    plain = base(torch.tensor(IDS)).logits.detach().numpy()
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    theirs = model(torch.tensor(IDS)).logits.detach().numpy()
    np.testing.assert_allclose(theirs, logits, atol=1e-5)
    assert np.abs(plain - logits).max() > 0.1
    # And back: what PEFT saves is what was given.
    model.save_pretrained(tmp_path / "theirs")
    again = jp.load_peft(tmp_path / "theirs", sites, torch_paths=loaded.torch_paths)[:2]
    np.testing.assert_allclose(jp.attach(loaded.model)(loaded.params, *again, jnp.asarray(IDS)), logits, atol=1e-5)


def test_merged_checkpoint(trained, tmp_path):
    loaded, _, adapters, masks, logits = trained
    folder = save_decoder(tmp_path / "merged", loaded.config, jp.merge(loaded.params, adapters, masks))
    merged = load_decoder(folder)
    np.testing.assert_allclose(merged.model.apply({"params": merged.params}, jnp.asarray(IDS)), logits, atol=1e-5)
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor(IDS)).logits.detach()
    np.testing.assert_allclose(theirs, logits, atol=1e-5)
