"""Decoders that write: a model, an adapter of PEFT with its model, or what a run has left, and prompts in their own form."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxprune.adapters import Adapters, Masks
from jaxprune.attaching import attach
from jaxprune.errors import UsageError, reason, shown
from jaxprune.files import checked_path
from jaxprune.models.decoder_weights import PretrainedDecoder, load_decoder
from jaxprune.models.generate import Generator, Settings
from jaxprune.models.tokenizer import Tokenizer, load_tokenizer
from jaxprune.peft import load_adapters, load_peft
from jaxprune.peft.load import read_folder
from jaxprune.peft.names import CONFIG as PEFT_CONFIG
from jaxprune.peft.own import ADAPTERS

WRITING = "generate.json"

# What was asked, and the answer.
Turn = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Writing:
    """How a decoder is asked: `generate.json` in `adapter/` and `model/` of a run.

    Attributes:
      base_model: hub id or folder of the checkpoint that adapters belong to; None where the weights are whole.
      template: the form of a prompt with and without an input, `{instruction}` and `{input}` standing for them; None for the
        tokenizer's own, for chats.
      max_length: tokens of prompt and answer in training.
      dtype: what the model computes in.
    """

    base_model: str | None = None
    template: Mapping[str, str] | None = None
    max_length: int | None = None
    dtype: str = "float32"

    def content(self) -> bytes:
        """Return the content of the file."""
        return (json.dumps(dataclasses.asdict(self), indent=2) + "\n").encode()

    def ask(
        self, tokenizer: Tokenizer, instruction: str, given: str = "", system: str = "", before: Sequence[Turn] = ()
    ) -> list[int]:
        """Return the tokens of a prompt.

        Args:
          tokenizer: the model's.
          instruction: what to do, or what to say in a chat.
          given: an input for it; in a chat it stands below the instruction.
          system: in a chat, what comes before.
          before: earlier turns of the conversation; with a template each is its own prompt, answer and end.

        Raises:
          UsageError: the tokenizer has no chat template, or the form has no place for a `system`.
        """
        if self.template is None:
            content = f"{instruction}\n\n{given}" if given else instruction
            messages = [{"role": "system", "content": system}] if system else []
            for asked, answer in before:
                messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            return tokenizer.encode(tokenizer.chat([*messages, {"role": "user", "content": content}]), special=False)
        if system:
            raise UsageError("the run's template has no place for a system message; leave it out")
        form = self.template["with_input" if given else "without_input"]
        ids: list[int] = []
        for asked, answer in before:
            ids += [*self.ask(tokenizer, asked), *tokenizer.encode(answer, special=False), tokenizer.eos]
        # One pass, so that braces in a text mean nothing.
        text = re.sub(r"\{(instruction|input)\}", lambda m: instruction if m[1] == "instruction" else given, form)
        return ids + tokenizer.encode(text, special=not before)


class Writer:
    """A decoder that writes; `load_writer` makes it.

    Attributes:
      writing: how it is asked.
      model: the model that the adapters are attached to.
      adapters: what was trained, none for a model by itself.
      masks: of the adapters.
      tokenizer: the model's.
      write: tokens in, tokens out, see `jaxprune.models.Generator`.
    """

    def __init__(
        self, writing: Writing, model: PretrainedDecoder, adapters: Adapters, masks: Masks, tokenizer: Tokenizer
    ) -> None:
        self.writing, self.model, self.adapters, self.masks, self.tokenizer = writing, model, adapters, masks, tokenizer
        self.write = Generator(attach(model.model), model.config, model.params, adapters, masks)

    def __repr__(self) -> str:
        return f"<Writer {self.model.folder.name} with {len(self.adapters)} adapters>"

    def generate(self, prompts: Sequence[Any], *, batch: int = 8, **settings: Any) -> list[str]:
        """Answer every prompt.

        Args:
          prompts: texts; or pairs (instruction, input).
          batch: prompts that are answered together.
          settings: fields of `jaxprune.models.Settings`: `max_tokens`, `temperature`, `top_p`, `top_k`, `beams`, ...

        Raises:
          UsageError: a prompt is something else or too long, or a setting is unknown or out of range.
        """
        if isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence):
            raise UsageError(f"prompts {shown(prompts)} cannot be used: expected a list of texts")
        pairs = [(one,) if isinstance(one, str) else one for one in prompts]
        for i, pair in enumerate(pairs):
            texts = isinstance(pair, tuple | list) and 1 <= len(pair) <= 2 and all(isinstance(x, str) for x in pair)
            if not texts:
                raise UsageError(
                    f"prompt {i} is {shown(prompts[i])}: expected a text, or a pair of instruction and input"
                )
        asked = [self.writing.ask(self.tokenizer, pair[0], "".join(pair[1:])) for pair in pairs]
        return [self.tokenizer.decode(a.tokens) for a in self.write(asked, self.settings(**settings), batch=batch)]

    def stream(self, instruction: str, given: str = "", system: str = "", **settings: Any) -> Iterator[str]:
        """Answer one prompt piece by piece; arguments and errors as for `Writing.ask` and `generate`."""
        how = self.settings(**settings)
        text = self.tokenizer.stream()
        for piece in self.write.stream(self.writing.ask(self.tokenizer, instruction, given, system), how):
            if new := "".join(text.add(token) for token in piece):
                yield new
        if rest := text.end():
            yield rest

    def settings(self, **settings: Any) -> Settings:
        """Return settings of generation, checked, with the tokenizer's own ends of a turn."""
        if unknown := settings.keys() - set(Settings._fields):
            raise UsageError(f"{min(unknown)} is no setting; expected one of {', '.join(Settings._fields)}")
        return Settings(**{"stops": self.tokenizer.stops, **settings}).check()


def load_writer(target: str | os.PathLike[str], *, model: str | os.PathLike[str] | None = None) -> Writer:
    """Load a decoder to write with.

    Args:
      target: a finished run of instructions, its `adapter/` or `model/`, a PEFT folder of a decoder, a GGUF file, or a model: a
        folder or a hub id.
      model: the checkpoint that adapters belong to, where it is no longer where they say.

    Raises:
      UsageError: it is none of these, or damaged, or the model is no decoder.
    """
    path = checked_path("target", target)
    part = next(
        (p for p in (path, path / "adapter", path / "model") if (p / WRITING).is_file() or (p / PEFT_CONFIG).is_file()),
        None,
    )
    if part is None:
        loaded = load_decoder(target)
        return Writer(Writing(), loaded, {}, {}, load_tokenizer(loaded.source))
    writing = read_writing(part / WRITING) if (part / WRITING).is_file() else Writing()
    own = (part / ADAPTERS).is_file()
    if not own and not (part / PEFT_CONFIG).is_file():
        loaded = load_decoder(part, dtype=jnp.dtype(writing.dtype))
        return Writer(writing, loaded, {}, {}, load_tokenizer(loaded.source))
    base = model or writing.base_model or (not own and read_folder(part)[0].get("base_model_name_or_path"))
    if not base:
        raise UsageError(f"{part} names no base model; pass model, the checkpoint that the adapters belong to")
    loaded = load_decoder(base, dtype=jnp.dtype(writing.dtype))
    if own:
        adapters, masks, _ = load_adapters(part)
    else:
        adapters, masks, _ = load_peft(part, loaded.sites(), torch_paths=loaded.torch_paths)
    return Writer(writing, loaded, adapters, masks, load_tokenizer(loaded.source))


def read_writing(path: Path) -> Writing:
    """Read `generate.json`; a damaged one is a UsageError."""
    try:
        writing = Writing(**json.loads(path.read_text(encoding="utf-8")))
        form = writing.template
        if form is not None and not {"with_input", "without_input"} <= {
            k for k, v in form.items() if isinstance(v, str)
        }:
            raise ValueError("its template has no with_input and without_input")
        if writing.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype is {shown(writing.dtype)}, not float32 or bfloat16")
        if writing.base_model is not None and not isinstance(writing.base_model, str):
            raise ValueError(f"base_model is {shown(writing.base_model)}, not text")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"{path} is damaged ({reason(error)}); run --resume on the run's folder writes it again"
        ) from None
    return writing
