"""Tiny decoders, and what they compute in float64, written from the formulas with loops."""

from __future__ import annotations

import json
import math

import numpy as np
from safetensors.numpy import save_file

BASE = {
    "model_type": "llama", "vocab_size": 83, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
ROPE3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 8}
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "short_factor": [1.0, 1.1, 1.3, 1.5],
    "long_factor": [2.0, 3.0, 4.0, 6.0], "original_max_position_embeddings": 8,
}  # fmt: skip
CONFIGS = {
    "llama1": {**BASE, "num_key_value_heads": 6, "rope_theta": 10000.0},
    "llama2": {**BASE, "rms_norm_eps": 1e-6, "head_dim": None, "hidden_size": 48},
    "llama3": {**BASE, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "llama3.1": {**BASE, "rope_parameters": ROPE3},
    "llama3.2": {**BASE, "rope_parameters": ROPE3, "tie_word_embeddings": True},
    "linear": {**BASE, "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "dynamic": {
        **BASE,
        "max_position_embeddings": 8,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    },
    "yarn": {**BASE, "rope_parameters": YARN},
    "longrope": {**BASE, "rope_parameters": LONG},
    "biased": {**BASE, "attention_bias": True, "mlp_bias": True},
    "mistral": {**BASE, "model_type": "mistral", "sliding_window": 5},
    "qwen2": {**BASE, "model_type": "qwen2"},
}


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """List the arrays of a checkpoint."""
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    k = config["head_dim"] or d // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * k, config["num_key_value_heads"] * k
    found = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (v, d)
    linear = {
        "self_attn.q_proj": (q, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d), "self_attn.o_proj": (d, q),
        "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f),
    }  # fmt: skip
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        found |= {f"{at}{name}.weight": (d,) for name in ("input_layernorm", "post_attention_layernorm")}
        for name, shape in linear.items():
            found[f"{at}{name}.weight"] = shape
            qkv = name.split(".")[1] in ("q_proj", "k_proj", "v_proj")
            attention = name.startswith("self") and config.get("attention_bias")
            if (
                attention
                or (name.startswith("mlp") and config.get("mlp_bias"))
                or (qkv and config["model_type"] == "qwen2")
            ):
                found[f"{at}{name}.bias"] = shape[:1]
    return found


def weights(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Make weights so large that no path through the model vanishes."""
    rng = np.random.RandomState(seed)
    make = lambda name, s: 1 + 0.2 * rng.randn(*s) if "norm" in name else 0.2 * rng.randn(*s)  # noqa: E731
    return {name: make(name, shape).astype(np.float32) for name, shape in shapes(config).items()}


def save(folder, name: str, seed: int = 0, **changes):
    """Write a checkpoint folder; return it with its configuration and arrays."""
    config = {**CONFIGS[name], **changes}
    arrays = weights(config, seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, config, arrays


def logits(config: dict, arrays: dict, ids: np.ndarray) -> np.ndarray:
    """Compute one sequence in float64: plain, linear and llama3 positions only."""
    w = {name: a.astype(np.float64) for name, a in arrays.items()}
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    k = config["head_dim"] or config["hidden_size"] // heads
    frequencies = [_frequency(config, i, k) for i in range(k // 2)]
    norm = lambda x, s: x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"]) * s  # noqa: E731
    dense = lambda x, at: x @ w[f"{at}.weight"].T + w.get(f"{at}.bias", 0.0)  # noqa: E731
    x = w["model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}"
        h = norm(x, w[f"{at}.input_layernorm.weight"])
        q, key, value = (
            dense(h, f"{at}.self_attn.{n}_proj").reshape(len(ids), n_heads, k)
            for n, n_heads in (("q", heads), ("k", shared), ("v", shared))
        )
        out = np.zeros((len(ids), heads, k))
        for t in range(len(ids)):
            for head in range(heads):
                own = head // (heads // shared)
                first = max(0, t + 1 - (config.get("sliding_window") or len(ids)))
                scores = np.array(
                    [
                        _turned(q[t, head], t, frequencies) @ _turned(key[s, own], s, frequencies) / math.sqrt(k)
                        for s in range(first, t + 1)
                    ]
                )
                p = np.exp(scores - scores.max())
                out[t, head] = (p / p.sum()) @ value[first : t + 1, own]
        x = x + dense(out.reshape(len(ids), -1), f"{at}.self_attn.o_proj")
        h = norm(x, w[f"{at}.post_attention_layernorm.weight"])
        gate = dense(h, f"{at}.mlp.gate_proj")
        x = x + dense(gate / (1 + np.exp(-gate)) * dense(h, f"{at}.mlp.up_proj"), f"{at}.mlp.down_proj")
    return norm(x, w["model.norm.weight"]) @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


def _frequency(config: dict, i: int, k: int) -> float:
    rope = config.get("rope_parameters", {"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0)})
    f = rope["rope_theta"] ** (-2 * i / k)
    if rope["rope_type"] == "linear":
        return f / rope["factor"]
    if rope["rope_type"] == "llama3":
        wavelength, c = 2 * math.pi / f, rope["original_max_position_embeddings"]
        if wavelength < c / rope["high_freq_factor"]:
            return f
        if wavelength > c / rope["low_freq_factor"]:
            return f / rope["factor"]
        s = (c / wavelength - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
        return (1 - s) * f / rope["factor"] + s * f
    assert rope["rope_type"] == "default"
    return f


def _turned(x: np.ndarray, position: int, frequencies: list[float]) -> np.ndarray:
    half = len(x) // 2
    pairs = (x[:half] + 1j * x[half:]) * np.exp(1j * position * np.array(frequencies))
    return np.concatenate([pairs.real, pairs.imag])


CHAT = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def save_tokenizer(folder) -> None:
    """Write a tokenizer beside a tiny decoder: a word for every id, w3 and so on, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, 80)), "user", "assistant", "system"]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Replace("w", " w")
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    said = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>",
        "chat_template": CHAT,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
