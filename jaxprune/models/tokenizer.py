"""Tokenizers of decoders, from a model's folder or a GGUF file: ids, text, streams of text, chat templates."""

from __future__ import annotations

import json
import operator
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxprune.checks import Range, whole
from jaxprune.errors import UsageError, reason, shown
from jaxprune.models.gguf import read_metadata
from jaxprune.models.hub import Source, resolve

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
# By llama.cpp's name for what is done before byte-level BPE: patterns that cut the text, one after the other.
_CUTS = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_QWEN2,),
}
_CONTROL, _USER = 3, 4  # types of token


def load_tokenizer(source: Source | str | os.PathLike[str]) -> Tokenizer:
    """Load a decoder's tokenizer, without PyTorch.

    From a folder it is what `transformers.AutoTokenizer` makes of it. From a GGUF file it is byte-level BPE cut as gpt-2, smollm,
    llama-bpe or qwen2 do, or the SentencePiece-like BPE of Llama 2 as `transformers.LlamaTokenizer` has it.

    Args:
      source: what `resolve` returns, or a folder, GGUF file or hub id.

    Raises:
      UsageError: it is nowhere, damaged, of an unknown kind, or has no end-of-text token.
    """
    source = source if isinstance(source, Source) else resolve(source)
    return _from_gguf(source.gguf) if source.gguf else _from_folder(source.folder)


@dataclass(frozen=True)
class Tokenizer:
    """A decoder's tokenizer.

    Attributes:
      inner: the tokenizer as `transformers` has it.
      origin: the file or folder that it comes from, for messages.
      bos: id of the token that begins a text; None where the model has none.
      eos: id of the token that ends a text.
      pad: id to pad with; the model's own, or `eos` where it has none: mask by length, never by comparing with it.
      stops: ids that end a turn, ascending: `eos`, and what the model's files name beside it.
    """

    inner: Any
    origin: Path
    bos: int | None
    eos: int
    pad: int
    stops: tuple[int, ...]

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return a text's ids.

        Special tokens that stand in the text, as `chat` writes them, become their ids in any case.

        Args:
          text: any text.
          special: whether to add what the tokenizer puts around a text, such as `bos`. A chat template writes its own.

        Raises:
          UsageError: it is no text, or holds half of a surrogate pair.
        """
        return self.encode_batch([text], special=special)[0]

    def encode_batch(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """Return the ids of each text, as `encode` does; they are not padded."""
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise UsageError(f"what to encode is {shown(texts)}; expected texts")
        if not texts:
            return []
        try:
            return self.inner(
                list(texts),
                add_special_tokens=special,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )["input_ids"]
        except (UnicodeEncodeError, TypeError) as error:
            raise UsageError(f"a text cannot be encoded ({reason(error)}); remove the surrogates from it") from None

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the text of ids; bytes that are no UTF-8 become U+FFFD.

        Args:
          ids: token ids; those beyond the vocabulary have no text.
          skip_special: whether to leave out special tokens.

        Raises:
          UsageError: they are no ids.
        """
        try:
            return self.inner.backend_tokenizer.decode(
                [operator.index(i) for i in ids], skip_special_tokens=skip_special
            )
        except (TypeError, ValueError, OverflowError) as error:
            raise UsageError(f"what to decode is {shown(ids)} ({reason(error)}); expected token ids") from None

    def stream(self, *, skip_special: bool = True) -> Stream:
        """Start to decode ids one by one."""
        return Stream(self, skip_special)

    def chat(self, messages: Sequence[Mapping[str, str]], *, answer: bool = True) -> str:
        """Write a conversation as the model's chat template does; encode it with `special=False`.

        Args:
          messages: [{"role": "system" | "user" | "assistant", "content": text}, ...].
          answer: whether to end with the start of the assistant's turn.

        Raises:
          UsageError: there is no template, it fails, or a message lacks its role or content.
        """
        if not self.inner.chat_template:
            raise UsageError(f"{self.origin} has no chat template; write the prompt as a plain text")
        if isinstance(messages, str | Mapping) or not messages:
            raise UsageError(f"a conversation is {shown(messages)}; expected a list of messages")
        for message in messages:
            for key in ("role", "content"):
                if not isinstance(message, Mapping) or not isinstance(message.get(key), str):
                    raise UsageError(
                        f"a message is {shown(message)}, without a text as its {key}; "
                        'expected {"role": "user", "content": "..."}'
                    )
        plain = [dict(message) for message in messages]
        try:
            return self.inner.apply_chat_template(plain, tokenize=False, add_generation_prompt=answer)
        except Exception as error:  # a template is a program, which can fail in any way
            raise UsageError(f"the chat template of {self.origin} fails ({reason(error)}); mend the messages") from None

    def files(self) -> dict[str, bytes]:
        """Return {name: content} of the files from which `transformers` loads this tokenizer with its chat template."""
        with tempfile.TemporaryDirectory() as folder:
            self.inner.save_pretrained(folder, save_jinja_files=False)
            found = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
        config = json.loads(found["tokenizer_config.json"])
        # The name that every version knows; what this one writes is new in version 5.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        return found | {"tokenizer_config.json": (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()}


class Stream:
    """Text of ids that come one by one.

    What `add` and `end` return is, joined, what `decode` returns for all ids. A character whose bytes lie in several tokens
    is held back until it is whole.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special
        # Ids whose text is out and those that are held back. A decoder may treat the first token of a text in its own way,
        # so that the last ids before the held ones are decoded with them.
        self._out: list[int] = []
        self._held: list[int] = []

    def add(self, token: int) -> str:
        """Take an id and return the text that is complete with it; "" where none is."""
        self._held.append(token)
        new = self._new()
        # A replacement character at the end may be the start of a character.
        if not new or new.endswith("\ufffd"):
            return ""
        self._out, self._held = self._held, []
        return new

    def end(self) -> str:
        """Return the rest."""
        new, self._held = self._new(), []
        return new

    def _new(self) -> str:
        before = self._tokenizer.decode(self._out, skip_special=self._skip)
        return self._tokenizer.decode(self._out + self._held, skip_special=self._skip)[len(before) :]


def _from_folder(folder: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        raise UsageError(f"{folder} has no tokenizer.json; expected the folder of a model with a fast tokenizer")
    try:
        inner = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        inner.backend_tokenizer  # noqa: B018  which a slow one has not
    except Exception as error:  # the libraries raise whatever they meet, plain Exception among it
        raise UsageError(f"the tokenizer in {folder} cannot be loaded ({reason(error)}); fetch it again") from None
    path = folder / "generation_config.json"
    said: Any = None
    if path.is_file():
        try:
            said = json.loads(path.read_text(encoding="utf-8-sig")).get("eos_token_id")
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise UsageError(f"{path} is not a JSON object ({reason(error)}); fetch it again") from None
    return _made(inner, folder, said if isinstance(said, list) else [] if said is None else [said])


def _from_gguf(path: Path) -> Tokenizer:
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    said = {key.removeprefix("tokenizer."): value for key, value in read_metadata(path).items()}
    tokens, kinds = said.get("ggml.tokens"), said.get("ggml.token_type") or []
    kind, cut = said.get("ggml.model"), said.get("ggml.pre", "gpt-2")
    if (
        not isinstance(tokens, list)
        or not tokens
        or (kinds and len(kinds) != len(tokens))
        or len({*tokens}) < len(tokens)
    ):
        raise UsageError(
            f"{path} has no tokenizer, or a damaged one: expected tokenizer.ggml.tokens, each once and with its type; fetch it "
            "again"
        )

    def named(name: str) -> str | None:
        i = said.get(f"ggml.{name}_token_id")
        key = f"{path}: tokenizer.ggml.{name}_token_id"
        return None if i is None else tokens[whole(key, i, Range(0, len(tokens) - 1))]

    try:
        if kind == "gpt2":
            backend = _byte_level(tokens, said.get("ggml.merges"), cut)
        elif kind == "llama":
            backend = _sentencepiece(
                tokens, said.get("ggml.scores"), said.get("ggml.merges"), said.get("ggml.add_space_prefix", True)
            )
        else:
            raise UsageError(f"its kind is {shown(kind)}; expected gpt2 or llama")
    except UsageError as error:
        raise UsageError(f"the tokenizer in {path} cannot be used: {error}") from None
    except Exception as error:  # the library raises plain Exception
        raise UsageError(f"the tokenizer in {path} is damaged ({reason(error)}); fetch it again") from None
    for wanted, special in ((_CONTROL, True), (_USER, False)):
        found = [token for token, type_ in zip(tokens, kinds, strict=False) if type_ == wanted]
        backend.add_tokens([AddedToken(token, normalized=False, special=special) for token in found])
    bos, eos = named("bos"), named("eos")
    # What llama.cpp does where the file does not say.
    adds_bos = said.get("ggml.add_bos_token", kind == "llama" or cut == "llama-bpe")
    start, end = [bos] * bool(bos and adds_bos), [eos] * bool(eos and said.get("ggml.add_eos_token"))
    backend.post_processor = processors.TemplateProcessing(
        single=[*start, "$A", *end], special_tokens=[(token, tokens.index(token)) for token in {*start, *end}]
    )
    names = {"bos": bos, "eos": eos, "unk": named("unknown"), "pad": named("padding")}
    inner = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=said.get("chat_template"),
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": token for name, token in names.items() if token},
    )
    ends = [tokens.index(token) for name in ("eot", "eom") if (token := named(name))]
    return _made(inner, path, ends)


def _byte_level(tokens: Sequence[str], merges: Any, cut: str) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    if cut not in _CUTS:
        raise UsageError(f"it cuts texts as {shown(cut)}; expected {', '.join(_CUTS)}")
    if not isinstance(merges, list):
        raise UsageError("it lacks tokenizer.ggml.merges")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    # In Llama 3 a piece that is a token is taken whole, even where no merges lead to it.
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=cut == "llama-bpe"))  # pyright: ignore
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in _CUTS[cut]]
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, spelled])  # pyright: ignore
    backend.decoder = decoders.ByteLevel()  # pyright: ignore
    return backend


def _sentencepiece(tokens: Sequence[str], scores: Any, merges: Any, space: bool) -> Any:
    from transformers import LlamaTokenizer

    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise UsageError("it lacks tokenizer.ggml.scores, one for each token")
    ids = {token: i for i, token in enumerate(tokens)}
    if merges is None:
        # Every cut of a token into two tokens is a merge: the best token first, of its cuts the one with the longest start.
        cuts = [
            (-score, -cut, cut - len(token), i, token[:cut], token[cut:])
            for i, (token, score) in enumerate(zip(tokens, scores, strict=True))
            for cut in range(1, len(token))
            if token[:cut] in ids and token[cut:] in ids
        ]
        merges = [f"{left} {right}" for *_, left, right in sorted(cuts)]
    pairs = [tuple(merge.split(" ")) for merge in merges]
    return LlamaTokenizer(vocab=ids, merges=pairs, add_prefix_space=space).backend_tokenizer


def _made(inner: Any, origin: Path, ends: Sequence[Any]) -> Tokenizer:
    eos = inner.eos_token_id
    if eos is None:
        raise UsageError(f"the tokenizer of {origin} names no end-of-text token; expected an eos token")
    ends = [whole(f"{origin}: a token that ends a turn,", end, Range(0, len(inner) - 1)) for end in ends]
    pad = eos if inner.pad_token_id is None else inner.pad_token_id
    return Tokenizer(inner, origin, inner.bos_token_id, eos, pad, tuple(sorted({eos, *ends})))
