"""How an instruction is put to a decoder: templates as data, and the tokens of prompt and response.

The Stanford template is that of R. Taori et al., Stanford Alpaca, 2023, byte for byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from jaxprune.models.tokenizer import Tokenizer


class Template(NamedTuple):
    """A prompt with and without an input; the response follows at once."""

    with_input: str
    without_input: str


# A template that is None is the tokenizer's own, for chats.
TEMPLATES: dict[str, Template | None] = {
    "alpaca": Template(
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a response "
        "that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:",
    ),
    "chat": None,
}


def prompt(tokenizer: Tokenizer, template: str, instruction: str, given: str = "") -> str:
    r"""Return the text up to where the response begins.

    Args:
      tokenizer: whose chat template may be used.
      template: a key of `TEMPLATES`. In a chat the input stands after an empty line in the message of the user.
      instruction: what to do.
      given: the input; empty for none.
    """
    form = TEMPLATES[template]
    if form is None:
        content = f"{instruction}\n\n{given}" if given else instruction
        return tokenizer.chat([{"role": "user", "content": content}], answer=True)
    return (form.with_input if given else form.without_input).format(instruction=instruction, input=given)


def prompt_tokens(tokenizer: Tokenizer, template: str, rows: Sequence[tuple[str, str]]) -> list[list[int]]:
    """Return the tokens of the prompts of (instruction, input), as training and generation both have them.

    A chat template writes its first special token itself; before another template the tokenizer puts it.
    """
    texts = [prompt(tokenizer, template, *row) for row in rows]
    return tokenizer.encode_batch(texts, special=TEMPLATES[template] is not None)


def response_tokens(tokenizer: Tokenizer, responses: Sequence[str]) -> list[list[int]]:
    """Return the tokens of responses and the one that ends each.

    They are cut apart from the prompt's: joined texts may have a token across the boundary (a colon and the quote behind it),
    which a model that is given the prompt alone never sees.
    """
    return [[*ids, tokenizer.eos] for ids in tokenizer.encode_batch(list(responses), special=False)]
