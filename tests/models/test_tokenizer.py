"""Tokenizers of decoders: ids as `transformers`, a trained tokenizer and plain Python have them, and text as it streams."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from jaxprune.errors import UsageError
from jaxprune.models.tokenizer import load_tokenizer

gguf = pytest.importorskip("gguf")
regex = pytest.importorskip("regex")

TEXTS = [
    "", " ", "  ", "a", "Hello, world!", "The capital of France is Paris.", "don't you'll I'VE we're it's", "x=3.14  # pi",
    "def f(x):\n    return x ** 2  # square\n\n\nprint(f(3))", "1234567890", "12 345 6", "a  12", "\n\n12", "½ ² ٣٤ Ⅳ",
    "日本語のテキスト", "中文 字符,标点。", "🙂👨‍👩‍👧 emoji 🇫🇷", "naïve café e\u0301", "\t\ttabs\t and \r\n lines \r\n\r\n",
    "   lead", "trail   ",
    "<|im_start|>user\nhi<|im_end|>\n", "<|endoftext|>", "a<|im_end|>b", "<|not special|>", "\u00a0nbsp\u2003em",
    "ＦＵＬＬ", "مرحبا بالعالم", "Привет, мир", '{"a": [1, 2, null]}', "http://example.org/?q=a+b&c=%20", "\x00\x07", "<0x0A>",
    "▁a ▁", "Ġ Ċ", "İi", "\u200d",
]  # fmt: skip
ALPHABET = "abcdeABC  \n\n\t0129٣½.,;'’s-_/\\()[]{}<>|#é日本語中🙂\u0301\r▁Ġ"


def strings(count):
    rng = np.random.default_rng(0)
    return TEXTS + ["".join(rng.choice(list(ALPHABET), rng.integers(1, 40))) for _ in range(count - len(TEXTS))]


def write(path, said, kind="llama"):
    writer = gguf.GGUFWriter(path, kind)
    for key, value in said.items():
        key = f"tokenizer.{key}"
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_uint32(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def trained(pre):
    """A byte-level tokenizer as its makers train it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_]) if pre == "smollm" else bytes_
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=CONTROLS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(strings(400), trainer)
    return tokenizer


def byte_level(tokenizer, pre, **more):
    """What a GGUF file says of a byte-level tokenizer."""
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    said = {
        "ggml.model": "gpt2",
        "ggml.pre": pre,
        "ggml.tokens": tokens,
        "ggml.token_type": [3 if token in CONTROLS else 1 for token in tokens],
        "ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.eot_token_id": 3,
        "chat_template": TEMPLATE,
    }
    return {key: value for key, value in (said | more).items() if value is not None}


def bpe(piece, ranks):
    """Merge the best pair until there is none: byte-level BPE in plain Python."""
    while len(piece) > 1:
        best = min(zip(piece, piece[1:], strict=False), key=lambda pair: ranks.get(pair, 10**9))
        if best not in ranks:
            break
        merged, i = [], 0
        while i < len(piece):
            both = piece[i : i + 2] == list(best)
            merged.append("".join(best) if both else piece[i])
            i += 2 if both else 1
        piece = merged
    return piece


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "a.gguf"
    return load_tokenizer(write(path, byte_level(trained("smollm"), "smollm")))


@pytest.mark.parametrize("pre", ["smollm", "gpt-2"])
def test_ids_are_those_of_the_trained_tokenizer(pre, tmp_path):
    expected = trained(pre)
    mine = load_tokenizer(write(tmp_path / "a.gguf", byte_level(expected, pre)))
    texts = strings(400)
    assert mine.encode_batch(texts) == [encoding.ids for encoding in expected.encode_batch(texts)]
    for text in texts:
        assert mine.decode(mine.encode(text), skip_special=False) == text


@pytest.mark.parametrize(("pre", "digits"), [("llama-bpe", r"\p{N}{1,3}"), ("qwen2", r"\p{N}")])
def test_ids_are_those_of_plain_python(pre, digits, tmp_path):
    from tokenizers.pre_tokenizers import ByteLevel

    made = byte_level(trained("gpt-2"), pre)
    made["ggml.tokens"].append("xyzzy")  # which no merges lead to
    made["ggml.token_type"].append(1)
    mine = load_tokenizer(write(tmp_path / "a.gguf", made))
    ids = {token: i for i, token in enumerate(made["ggml.tokens"])}
    ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(made["ggml.merges"])}
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
    pattern = rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    spell = ByteLevel(add_prefix_space=False, use_regex=False)
    for text in [*strings(300), "xyzzy"]:
        if any(control in text for control in CONTROLS):
            continue
        expected = [1] if pre == "llama-bpe" else []  # Llama 3 begins with bos unless the file says no
        for piece in regex.findall(pattern, text):
            spelled = spell.pre_tokenize_str(piece)[0][0]
            whole = pre == "llama-bpe" and spelled in ids
            expected += [ids[part] for part in ([spelled] if whole else bpe(list(spelled), ranks))]
        assert mine.encode(text) == expected, text
        assert mine.encode(text, special=False) == expected[pre == "llama-bpe" :]


def test_ids_of_the_real_file_are_those_of_transformers(smollm):
    """Apart from digits: `transformers` does not know that this vocabulary has them one by one, so that is added to it."""
    pytest.importorskip("torch")
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(smollm.parent, gguf_file=smollm.name)
    mine = load_tokenizer(smollm)
    texts = strings(300)
    plain = [text for text in texts if not regex.search(r"\p{N}", text)]
    assert len(plain) > 40 and mine.encode_batch(plain) == theirs(plain)["input_ids"]
    own = theirs.backend_tokenizer
    own.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), own.pre_tokenizer])
    ids = mine.encode_batch(texts)
    assert ids == theirs(texts)["input_ids"]
    for skip in (True, False):
        assert [mine.decode(row, skip_special=skip) for row in ids] == [
            theirs.decode(row, skip_special_tokens=skip, clean_up_tokenization_spaces=False) for row in ids
        ]
    assert (mine.bos, mine.eos, mine.pad, mine.stops) == (1, 2, 2, (2,))
    assert mine.inner.all_special_ids == theirs.all_special_ids and len(mine.inner) == len(theirs) == 49152
    messages = [
        {"role": "user", "content": "What is 2+2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": " 🙂 "},
    ]
    for answer in (True, False):
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
        assert mine.chat(messages, answer=answer) == expected
    assert mine.chat(messages[:1]).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert mine.encode(mine.chat(messages[:1]), special=False)[0] == 1


def sentencepiece(**more):
    """A vocabulary of Llama 2's kind: controls, bytes, and pieces with scores, some of them equal."""
    rng = np.random.default_rng(0)
    words = [
        f"▁{word}" for word in "the then there a and an hello world".split()
    ] + "he el ll lo wor ld ab abc bc abab 12 ▁▁".split()
    pieces = {word[i:j] for word in words for i in range(len(word)) for j in range(i + 1, len(word) + 1)} | set(
        "éxyz.,!<>|▁"
    )
    pieces = sorted(pieces, key=lambda piece: (-len(piece), piece))
    scores = {piece: -float(score) for piece, score in zip(pieces, rng.integers(0, 3, len(pieces)), strict=True)}
    # Of "pqrs", first pq; then pqr and rs have one score.
    scores |= {"q": -9.0, "p": -9.0, "r": -9.0, "s": -9.0, "rs": -5.0, "pq": -4.0, "pqr": -5.0}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *scores]
    said = {
        "ggml.model": "llama",
        "ggml.tokens": tokens,
        "ggml.scores": [0.0] * 259 + list(scores.values()),
        "ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(scores),
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
    }
    return said | more


@pytest.mark.parametrize("more", [{}, {"ggml.add_bos_token": False, "ggml.add_eos_token": True}])
def test_sentencepiece_is_that_of_transformers(more, tmp_path):
    pytest.importorskip("torch")
    from transformers import AutoTokenizer

    write(tmp_path / "a.gguf", sentencepiece(**more))
    theirs, mine = AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf"), load_tokenizer(tmp_path)
    rng = np.random.default_rng(1)
    texts = (
        strings(200)
        + ["".join(rng.choice(list("abchelowrdtn  12"), 30)) for _ in range(200)]
        + ["abababc</s> the<s>hello", "pqrs", "spqrsrs"]
    )
    assert mine.encode_batch(texts) == theirs(texts)["input_ids"]
    assert mine.encode_batch(texts, special=False) == theirs(texts, add_special_tokens=False)["input_ids"]
    ends = (mine.encode("the")[0] == 1, mine.encode("the")[-1] == 2)
    assert ends == ((False, True) if more else (True, False))
    for text in texts[-200:]:
        ids = mine.encode(text)
        assert mine.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        stream = mine.stream()
        assert "".join([*map(stream.add, ids), stream.end()]) == mine.decode(ids)


def test_what_is_saved_loads_in_transformers(small, tmp_path):
    from transformers import AutoTokenizer

    files = small.files()
    assert {"tokenizer.json", "tokenizer_config.json"} <= files.keys()
    assert json.loads(files["tokenizer_config.json"])["chat_template"] == TEMPLATE
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    theirs, again = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    texts, messages = strings(200), [{"role": "user", "content": "hi 12"}]
    assert small.encode_batch(texts) == theirs(texts)["input_ids"] == again.encode_batch(texts)
    assert small.chat(messages) == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert (
        again.chat(messages)
        == small.chat(messages)
        == "<|im_start|><|im_start|>user\nhi 12<|im_end|>\n<|im_start|>assistant\n"
    )
    assert small.chat(messages, answer=False) == "<|im_start|><|im_start|>user\nhi 12<|im_end|>\n"
    assert (theirs.bos_token_id, theirs.eos_token_id) == (again.bos, again.eos) == (1, 2)


def test_what_ends_a_turn(small, tmp_path):
    assert small.stops == (2, 3), "eos and eot"
    for name, content in small.files().items():
        (tmp_path / name).write_bytes(content)
    assert load_tokenizer(tmp_path).stops == (2,)
    for ends, stops in (([3, 2, 0], (0, 2, 3)), (0, (0, 2)), (None, (2,))):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        assert load_tokenizer(tmp_path).stops == stops
    for content, message in (
        ('{"eos_token_id": [3, "x"]}', "a token that ends a turn, 'x' cannot be used; expected a whole number, 0 to"),
        ('{"eos_token_id": 10000}', "a token that ends a turn, 10000 is out of range"),
        ("[]", "generation_config.json is not a JSON object"),
        ("{", "generation_config.json is not a JSON object"),
    ):
        (tmp_path / "generation_config.json").write_text(content)
        with pytest.raises(UsageError, match=message):
            load_tokenizer(tmp_path)


def test_padding_is_the_end_where_there_is_none(small, tmp_path):
    assert small.pad == small.eos == 2
    said = byte_level(trained("smollm"), "smollm", **{"ggml.padding_token_id": 0, "ggml.bos_token_id": None})
    tokenizer = load_tokenizer(write(tmp_path / "a.gguf", said))
    assert (tokenizer.pad, tokenizer.bos) == (0, None)
    (tmp_path / "b").mkdir()
    path = write(tmp_path / "b" / "b.gguf", byte_level(trained("smollm"), "smollm", **{"ggml.eos_token_id": None}))
    with pytest.raises(UsageError, match="the tokenizer of .*b.gguf names no end-of-text token"):
        load_tokenizer(path)


def test_a_stream_is_the_text_and_no_halves_of_characters(small):
    rng = np.random.default_rng(0)
    for text in strings(200):
        ids = small.encode(text)
        stream, parts = small.stream(skip_special=False), []
        for i in ids:
            parts.append(stream.add(i))
            assert "\ufffd" not in parts[-1]
            assert text.startswith("".join(parts)), "in order"
        assert "".join(parts) == text and stream.end() == ""
    for _ in range(200):  # of any ids, most of which are no UTF-8
        ids = rng.integers(0, len(small.inner), 30).tolist()
        stream = small.stream()
        assert "".join([*map(stream.add, ids), stream.end()]) == small.decode(ids)
    half = small.encode("鬱")[:-1]
    stream = small.stream()
    assert half and not any(map(stream.add, half)) and set(stream.end()) == {"\ufffd"} and stream.end() == ""


def test_text_comes_as_soon_as_it_is_whole(small):
    stream = small.stream()
    assert [stream.add(i) for i in small.encode("a1🙂b", special=False)][-1] == "b"
    assert len([part for part in map(small.stream().add, small.encode("a1b2")) if part]) == len(small.encode("a1b2"))


def test_user_defined_tokens_stay_whole_and_are_no_special_ones(tmp_path):
    said = byte_level(trained("smollm"), "smollm")
    said["ggml.tokens"] += ["<think>", "[PAD]"]
    said["ggml.token_type"] += [4, 5]
    tokenizer = load_tokenizer(write(tmp_path / "a.gguf", said))
    ids = tokenizer.encode("a<think>b[PAD]")
    assert ids.count(len(said["ggml.tokens"]) - 2) == 1 and len(said["ggml.tokens"]) - 1 not in ids
    assert tokenizer.decode(ids) == "a<think>b[PAD]"


def test_conversations_that_cannot_be_written(small, tmp_path):
    for messages, message in (
        ([], "a conversation is ..; expected a list"),
        ("hi", "a conversation is 'hi'; expected a list"),
        ({"role": "user", "content": "hi"}, "expected a list of messages"),
        (["hi"], "a message is 'hi', without a text as its role; expected .*role.*content"),
        ([{"content": "hi"}], "without a text as its role"),
        ([{"role": "user", "content": None}], "without a text as its content"),
        ([{"role": "tool", "content": "hi"}], "the chat template of .*a.gguf fails .no tools here.; mend the messages"),
    ):
        with pytest.raises(UsageError, match=message):
            small.chat(messages)
    said = byte_level(trained("smollm"), "smollm", chat_template=None)
    with pytest.raises(UsageError, match="b.gguf has no chat template; write the prompt as a plain text"):
        load_tokenizer(write(tmp_path / "b.gguf", said)).chat([{"role": "user", "content": "hi"}])


def test_what_cannot_be_encoded_or_decoded(small):
    for texts in ("hi", [1], [None]):
        with pytest.raises(UsageError, match="what to encode is .*; expected texts"):
            small.encode_batch(texts)
    with pytest.raises(UsageError, match="remove the surrogates from it"):
        small.encode("a\ud800")
    for ids in (["a"], [1.5], [-1], 3, [2**70]):
        with pytest.raises(UsageError, match="what to decode is .*; expected token ids"):
            small.decode(ids)
    assert small.encode_batch([]) == [] and small.decode(np.array([], int)) == "" and small.decode([10**6]) == ""


BAD = {
    "none": ({"ggml.tokens": None}, "a.gguf has no tokenizer, or a damaged one"),
    "twice": ({"ggml.tokens": ["a", "a"], "ggml.token_type": None}, "expected tokenizer.ggml.tokens, each once"),
    "types": ({"ggml.token_type": [1, 2]}, "has no tokenizer, or a damaged one"),
    "model": ({"ggml.model": "bert"}, "cannot be used: its kind is 'bert'; expected gpt2 or llama"),
    "cut": ({"ggml.pre": "tekken"}, "it cuts texts as 'tekken'; expected gpt-2, smollm, llama-bpe, qwen2"),
    "no merges": ({"ggml.merges": None}, "it lacks tokenizer.ggml.merges"),
    "merges": ({"ggml.merges": ["a zzzzzz"]}, "the tokenizer in .*a.gguf is damaged .*; fetch it again"),
    "three": ({"ggml.merges": ["a b c"]}, "the tokenizer in .*a.gguf is damaged"),
    "scores": ({"ggml.model": "llama"}, "it lacks tokenizer.ggml.scores, one for each token"),
    "eos": ({"ggml.eos_token_id": 10**6}, "tokenizer.ggml.eos_token_id 1000000 is out of range"),
    "bos": ({"ggml.bos_token_id": "x"}, "tokenizer.ggml.bos_token_id 'x' cannot be used"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_files_are_one_line(what, tmp_path):
    given, message = BAD[what]
    path = write(tmp_path / "a.gguf", byte_level(trained("smollm"), "smollm", **given))
    with pytest.raises(UsageError, match=message) as caught:
        load_tokenizer(path)
    assert len(str(caught.value)) < 500


def test_bad_folders_are_one_line(tmp_path):
    with pytest.raises(UsageError, match="has no tokenizer.json; expected the folder of a model with a fast tokenizer"):
        load_tokenizer(tmp_path)
    for content in ("", "{}", '{"model": 1}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(UsageError, match="the tokenizer in .* cannot be loaded .*; fetch it again"):
            load_tokenizer(tmp_path)


def test_torch_is_not_needed(tmp_path):
    path = write(tmp_path / "a.gguf", byte_level(trained("smollm"), "smollm"))
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from jaxprune.models.tokenizer import load_tokenizer\n"
        "assert not {'transformers', 'tokenizers', 'gguf', 'jinja2'} & sys.modules.keys()\n"
        f"t = load_tokenizer({str(path)!r})\n"
        "import pathlib; folder = pathlib.Path(sys.argv[1])\n"
        "for name, content in t.files().items(): (folder / name).write_bytes(content)\n"
        "ids = t.encode('a 12')\n"
        "assert load_tokenizer(folder).encode('a 12') == ids and t.chat([{'role': 'user', 'content': 'x'}])\n"
        "assert sys.modules['torch'] is None; print(t.decode(ids))"
    )
    (tmp_path / "new").mkdir()
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "new"], capture_output=True, text=True)
    assert done.stdout == "a 12\n", done.stderr
