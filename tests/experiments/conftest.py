"""Model folders with tokenizers of the two kinds that encoders use."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.models import tiny

TEXTS = ["one two three four five six seven words are cut", "don't $1,000 naïve café 3.14 plain", "the same word again"]


@pytest.fixture
def bert_like(tmp_path) -> Path:
    """A folder with a WordPiece tokenizer, which marks the second text with type 1."""
    return _bert_tokenizer(tmp_path / "bert")


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> Path:
    """A whole model folder: that tokenizer, a configuration and random weights."""
    folder = _bert_tokenizer(tmp_path_factory.mktemp("model") / "bert")
    config = {**tiny.CONFIGS["bert"], "vocab_size": 120, "max_position_embeddings": 48}
    shapes = json.loads(str(tiny.golden("bert")["shapes"]))
    for name in shapes:
        if name.endswith("word_embeddings.weight"):
            shapes[name] = [120, 36]
        elif name.endswith("position_embeddings.weight"):
            shapes[name] = [48, 36]
    arrays = {name: array for name, array in tiny.weights(shapes).items() if not name.startswith("classifier")}
    return tiny.save(folder, config, arrays)


@pytest.fixture(scope="session")
def tiny_rte(tmp_path_factory) -> Path:
    """A folder with a learnable little RTE: a pair is entailed when both texts hold the same first word.

    All texts are equally long, so that a run compiles one training step; `test_packing.py` has lengths of all kinds.
    """
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    words = "one two three four five six seven words are cut plain the same word again".split()
    (folder / "rte").mkdir()
    for split, n in (("train", 48), ("validation", 14)):
        rows = []
        for i in range(n):
            first, second = rng.sample(words, 2)
            rest = [" ".join(rng.choices(words, k=3)) for _ in range(2)]
            pair = (first, first if i % 2 else second)
            rows.append({"sentence1": f"{pair[0]} {rest[0]}", "sentence2": f"{pair[1]} {rest[1]}", "label": i % 2})
        (folder / "rte" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _bert_tokenizer(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # pyright: ignore[reportCallIssue]
    tokenizer.normalizer = normalizers.BertNormalizer()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    # As some published folders have them: settings of the file that must not leak into the tokens.
    tokenizer.enable_padding(length=40)
    tokenizer.enable_truncation(7)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    return _save(folder, tokenizer, {"tokenizer_class": "BertTokenizer", **names})


@pytest.fixture
def roberta_like(tmp_path) -> Path:
    """A folder with a byte-level BPE tokenizer, which puts two separators between texts and knows no types."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)  # pyright: ignore
    names = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"}
    names |= {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
    return _save(tmp_path / "roberta", tokenizer, {"tokenizer_class": "RobertaTokenizer", **names})


def _save(folder: Path, tokenizer, config: dict) -> Path:
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
