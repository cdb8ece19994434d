"""Tokens of a split as compact arrays, exactly as `transformers.AutoTokenizer` makes them, cached on disk."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data.rows import Rows
from jaxprune.errors import UsageError, reason, shown
from jaxprune.models import EncoderConfig

log = logging.getLogger(__name__)

_NO_LIMIT = 2**31 - 1  # tokens, as many as no example has; the library counts in 64 bits
_VERSION = b"1"  # of the arrays below; a new one makes old cache files unreachable
_TYPES = (np.dtype(np.int32), np.dtype(np.int8), np.dtype(np.int64))  # of ids, type_ids and offsets


@dataclass(frozen=True)
class Encoded:
    """Hold the tokens of n examples, end to end.

    Args:
        ids: int32 `(tokens,)`.
        type_ids: int8 `(tokens,)`, 1 in the second text of a pair where the tokenizer says so.
        offsets: int64 `(n + 1,)`; example i is `ids[offsets[i]:offsets[i + 1]]`.
        labels: `(n, ...)`, int32 or, for regression, float32.
        predicts: whether the tokens of type 1 are those that the model learns to predict.
        notes: one line for each thing that people should know of it.
    """

    ids: np.ndarray
    type_ids: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    predicts: bool = False
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)


def encode(
    rows: Rows,
    model_dir: str | os.PathLike[str],
    max_length: int = 128,
    cache_dir: str | os.PathLike[str] | None = "auto",
) -> Encoded:
    """Tokenize rows with a model folder's fast tokenizer, exactly as `transformers.AutoTokenizer` does.

    Pairs are cut to `max_length` by shortening the longer text first.

    Args:
        rows: what `load_task` returns for one split.
        model_dir: folder with `tokenizer.json`.
        max_length: most tokens of an example, special tokens included.
        cache_dir: where to keep the arrays; None keeps none, "auto" means `jaxprune/tokens` in `$XDG_CACHE_HOME` or
            `~/.cache`. A damaged file there is made anew.

    Raises:
        UsageError: there is no usable `tokenizer.json`, or `max_length` leaves no room for text.
    """
    path = Path(model_dir) / "tokenizer.json"
    max_length = min(max_length, _NO_LIMIT)
    try:
        definition = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"no tokenizer.json in {str(model_dir)!r} ({error.strerror}); expected a model folder "
            "with a fast tokenizer, as AutoTokenizer.save_pretrained writes it"
        ) from error
    side = _truncation_side(path.with_name("tokenizer_config.json"))
    if cache_dir is None:
        return _tokenize(rows, path, definition, max_length, side)
    if cache_dir == "auto":
        cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "jaxprune" / "tokens"
    cached = Path(cache_dir) / f"{_key(rows, definition, max_length, side)}.npz"
    encoded = _read_cache(cached)
    if encoded is None:
        encoded = _tokenize(rows, path, definition, max_length, side)
        _write_cache(cached, encoded)
    return encoded


def _tokenize(rows: Rows, path: Path, definition: bytes, max_length: int, side: str) -> Encoded:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(definition.decode())
    except Exception as error:  # the library raises plain Exception
        raise UsageError(f"{path}: not a tokenizer ({reason(error)}); get the model folder again") from error
    special = tokenizer.num_special_tokens_to_add(len(rows.texts) == 2)
    if max_length <= special + 1:
        raise UsageError(
            f"max_length is {max_length}; expected at least {special + 2}, as {special} tokens are special"
        )
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length, strategy="longest_first", direction=side)
    ids, type_ids, lengths = [], [], []
    try:
        with _rust_silent():
            tokenizer.encode_batch_fast(_texts(rows, 0, 1))
        for start in range(0, len(rows), 4096):  # the library's own objects are large
            for e in tokenizer.encode_batch_fast(_texts(rows, start, start + 4096)):
                ids.append(np.array(e.ids, np.int32))
                type_ids.append(np.array(e.type_ids, np.int8))
                lengths.append(len(ids[-1]))
    except BaseException as error:
        # Plain ones of the library, numpy's where a number has more bits, and what Rust makes of its own failures.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UsageError(f"{path}: cannot tokenize ({reason(error)}); get the model folder again") from error
    if 0 in lengths:
        raise UsageError(
            f"{path}: makes no token of row {lengths.index(0)} of {rows.source}; mend the tokenizer or the row"
        )
    return Encoded(np.concatenate(ids), np.concatenate(type_ids), np.append(0, np.cumsum(lengths)), rows.labels)


def _texts(rows: Rows, start: int, end: int) -> list[Any]:
    """Return the texts of some rows as the library takes them: strings or pairs."""
    columns = [column[start:end] for column in rows.texts]
    return columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))


@contextlib.contextmanager
def _rust_silent() -> Iterator[None]:
    """Drop what is written to standard error, where Rust prints a trace of its own before Python learns of a failure."""
    try:
        kept = os.dup(2)
    except OSError:  # closed, so that nothing is printed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)


def _truncation_side(config: Path) -> str:
    """Return from which end the model folder wants texts cut."""
    try:
        side = json.loads(config.read_text("utf-8")).get("truncation_side", "right")
    except FileNotFoundError:
        return "right"
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"{config}: not a readable JSON object ({reason(error)}); get the model folder again"
        ) from error
    if side not in ("left", "right"):
        raise UsageError(f"{config}: truncation_side is {shown(side)}; expected 'left' or 'right'")
    return side


def check_ids(encoded: Encoded, config: EncoderConfig, model_dir: str | os.PathLike[str]) -> None:
    """Refuse tokens that a model has no vector for.

    Args:
        encoded: what `encode` returns.
        config: the model's.
        model_dir: its folder, for messages.

    Raises:
        UsageError: an id is not below the vocabulary, or a type not below the number of types.
    """
    sizes = {"token": (encoded.ids, config.vocab_size, "vocab_size")}
    if config.type_vocab_size:  # where there are none, the types are not read
        sizes["token type"] = (encoded.type_ids, config.type_vocab_size, "type_vocab_size")
    for what, (ids, size, name) in sizes.items():
        if (largest := ids.max()) >= size:
            raise UsageError(
                f"{Path(model_dir) / 'tokenizer.json'}: makes {what} {largest}, where config.json beside it has {name} "
                f"{size}; get a tokenizer and a model that belong together"
            )


def read(apply: Any, batch: Mapping[str, Any], key: Any = None) -> Any:
    """Run an adapted encoder on a packed batch.

    Args:
        apply: the model with its adapters.
        batch: of `experiments.data.packing`.
        key: for dropout; None drops nothing.
    """
    return apply(
        batch["input_ids"],
        segment_ids=batch["segment_ids"],
        position_ids=batch["position_ids"],
        token_type_ids=batch["token_type_ids"],
        first_tokens=batch["first_tokens"],
        rngs=None if key is None else {"dropout": key},
    )


def _key(rows: Rows, definition: bytes, max_length: int, side: str) -> str:
    settings = (max_length, side, len(rows.texts), rows.labels.shape, rows.labels.dtype.str)
    digest = hashlib.sha256(_VERSION + str(settings).encode())
    digest.update(hashlib.sha256(definition).digest())
    digest.update(rows.labels.tobytes())
    for column in rows.texts:
        # JSON, as it marks where a text ends, and surrogates survive it.
        digest.update(json.dumps(column).encode())
    return digest.hexdigest()


def _read_cache(path: Path) -> Encoded | None:
    """Return the arrays, or None where the file is missing, damaged (zip members carry a checksum) or another's."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            encoded = Encoded(**{name: arrays[name] for name in ("ids", "type_ids", "offsets", "labels")})
    except Exception:  # of a damaged archive numpy, zipfile and zlib each raise their own
        return None
    arrays = (encoded.ids, encoded.type_ids, encoded.offsets, encoded.labels)
    if [array.ndim for array in arrays[:3]] != [1] * 3 or [array.dtype for array in arrays[:3]] != list(_TYPES):
        return None
    tokens = encoded.offsets[-1] if len(encoded.offsets) == len(encoded) + 1 else -1
    whole = tokens == len(encoded.ids) == len(encoded.type_ids) and (np.diff(encoded.offsets) > 0).all()
    return encoded if whole and encoded.offsets[0] == 0 else None


def _write_cache(path: Path, encoded: Encoded) -> None:
    """Write beside the file and rename, so that no reader ever sees half of one."""
    partial = path.with_name(f"{path.stem}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            np.savez(file, ids=encoded.ids, type_ids=encoded.type_ids, offsets=encoded.offsets, labels=encoded.labels)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        _warn(f"tokens are not kept for the next run: cannot write into {str(path.parent)!r} ({error.strerror})")


@functools.cache
def _warn(message: str) -> None:
    """Say it once, not for every split."""
    log.warning(message)
