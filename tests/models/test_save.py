"""Saving a classifier: the files it came from again, and what cannot be said."""

import dataclasses

import numpy as np
import pytest

from jaxprune.errors import UsageError
from jaxprune.models import EncoderConfig, init_classifier, load_classifier, save_classifier
from jaxprune.models.weights import open_weights
from jaxprune.sites import flatten
from tests.models import tiny


def test_a_loaded_model_saves_as_it_was(family, folder, tmp_path):
    (folder / "vocab.txt").write_text("[PAD]\n")
    loaded = load_classifier(folder, num_labels=tiny.NUM_LABELS)
    saved = save_classifier(tmp_path / "saved", loaded.config, loaded.params, tokenizer=loaded.folder)
    assert (saved / "vocab.txt").read_text() == "[PAD]\n"
    written = {name: stored.read() for name, stored in open_weights(saved).items()}
    state = tiny.state(family)
    assert set(written) == set(state)
    for name, array in written.items():
        np.testing.assert_array_equal(array, state[name])
    again = load_classifier(saved, num_labels=tiny.NUM_LABELS)
    assert again.config == loaded.config and again.hf_config.num_labels == tiny.NUM_LABELS
    for path, leaf in flatten(again.params).items():
        np.testing.assert_array_equal(leaf, flatten(loaded.params)[path])


def test_layers_of_different_widths(family, tmp_path):
    loaded = load_classifier(
        tiny.save(tmp_path / "plain", tiny.CONFIGS[family], tiny.state(family)), num_labels=tiny.NUM_LABELS
    )
    config = dataclasses.replace(loaded.config, intermediate_sizes=(5, 52), key_dims=(3, 12), value_dims=(12, 7))
    model, params = init_classifier(config)
    layer = params["encoder"]["layer_0"]
    assert layer["mlp"]["fc2"]["kernel"].shape == (5, 36) and layer["attention"]["key"]["kernel"].shape == (36, 9)
    assert params["encoder"]["layer_1"]["attention"]["out"]["kernel"].shape == (21, 36)
    again = load_classifier(save_classifier(tmp_path / "saved", config, params), num_labels=tiny.NUM_LABELS)
    assert again.config == config and again.initialised == ()
    ids = tiny.batch(config.pad_token_id, 1)["input_ids"]
    np.testing.assert_array_equal(tiny.logits(again.model, again.params, ids), tiny.logits(model, params, ids))


def test_what_cannot_be_saved_is_refused(tmp_path):
    small = dict(hidden_size=24, num_heads=2, num_layers=1, vocab_size=50, intermediate_size=8)
    config = EncoderConfig(**small)
    _, params = init_classifier(config)
    with pytest.raises(UsageError, match="cannot say mlp_dropout=0.3"):
        save_classifier(tmp_path, dataclasses.replace(config, mlp_dropout=0.3), params)
    with pytest.raises(UsageError, match=r"3 parameters do not fit .*fc1/bias: got \(8,\), expected \(9,\)"):
        save_classifier(tmp_path, dataclasses.replace(config, intermediate_size=9), params)
    with pytest.raises(UsageError, match="key_dims=.4, 4. does not fit; expected 1 integers"):
        EncoderConfig(**small, key_dims=(4, 4))
    assert not list(tmp_path.iterdir())


def test_only_what_was_saved_here_is_replaced(family, folder, tmp_path):
    loaded = load_classifier(folder, num_labels=tiny.NUM_LABELS)

    def refused(target, message):
        before = {path: path.read_bytes() for path in target.iterdir()}
        with pytest.raises(UsageError, match=message):
            save_classifier(target, loaded.config, loaded.params, tokenizer=loaded.folder)
        assert {path: path.read_bytes() for path in target.iterdir()} == before

    refused(folder, "is where the tokenizer comes from")
    (tmp_path / "other").mkdir()
    for path in folder.iterdir():
        (tmp_path / "other" / path.name).write_bytes(path.read_bytes())
    refused(tmp_path / "other", "holds files that save_classifier has not written")
    saved = save_classifier(tmp_path / "saved", loaded.config, loaded.params)
    (saved / "vocab.txt").write_text("of the model before")
    save_classifier(saved, loaded.config, loaded.params)
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]
    (saved / "thesis.tex").write_text("")
    refused(saved, "holds other files, such as 'thesis.tex'")
