"""Answers to two-turn questions, in the file that FastChat's judge reads: `python -m experiments.mt_bench`.

A line for each question:

    {"question_id": 81, "answer_id": ..., "model_id": ..., "choices": [{"index": 0, "turns": [t1, t2]}], "tstamp": ...}

Categories have temperatures of their own, as FastChat sets them; what it does not name gets 0.7. The second turn sees the first
with its answer. A file that was broken off is gone on with: questions that are answered there are not asked again.
"""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from experiments.run.cli import parse
from experiments.run.console import say
from jaxprune.checks import Range, whole
from jaxprune.errors import UsageError, reason, shown
from jaxprune.files import append_jsonl
from jaxprune.writing import Writer, load_writer

PROGRAM = "experiments.mt_bench"
TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1,
    "humanities": 0.1, "arena-hard-200": 0.0,
}  # fmt: skip
_OTHER = 0.7


@dataclass(frozen=True)
class AnswerConfig:
    """Answer the questions of MT-Bench with a decoder, as FastChat's judge reads them."""

    target: tyro.conf.Positional[str]
    """what a run has left, an adapter of PEFT, or a model: a folder, a GGUF file or a hub id"""
    questions: Path
    """FastChat's question.jsonl"""
    model: str | None = None
    """checkpoint that adapters belong to [what they name]"""
    output: Path | None = None
    """file to write [model_answer/MODEL_ID.jsonl]"""
    model_id: str | None = None
    """what the judge calls the model [the name of the target's folder]"""
    max_tokens: int = 1024
    """most tokens of an answer"""
    batch: int = 8
    """questions that are answered together"""
    limit: int | None = None
    """answer the first so many questions only"""
    seed: int = 42
    """of what is drawn"""


def main(arguments: list[str]) -> None:
    """Run what the command line asks for."""
    config = parse(AnswerConfig, arguments, PROGRAM)
    for flag, value, least in (
        ("--max-tokens", config.max_tokens, 1), ("--batch", config.batch, 1), ("--seed", config.seed, 0),
        ("--limit", 1 if config.limit is None else config.limit, 1),
    ):  # fmt: skip
        whole(flag, value, Range(least))
    questions = read_questions(config.questions)[: config.limit]
    name = config.model_id or Path(config.target).name
    output = config.output or Path("model_answer") / f"{name}.jsonl"
    done = answered(output)
    open_ = [question for question in questions if question["question_id"] not in done]
    if done:
        say("note", f"{output} has {len(questions) - len(open_)} of the {len(questions)} answers; the others follow")
    if open_:
        say("loading", config.target)
        writer = load_writer(config.target, model=config.model)
        answer(writer, open_, output, name, config)
    say(
        "files",
        f"{output}: {len(questions)} answers of {name}; FastChat's judge reads it from data/mt_bench/model_answer/",
    )


def answer(writer: Writer, questions: list[dict[str, Any]], output: Path, name: str, config: AnswerConfig) -> None:
    """Answer questions in batches, and write each batch when it is done."""
    start, tokens = time.monotonic(), 0
    for first in range(0, len(questions), config.batch):
        part = questions[first : first + config.batch]
        turns: list[list[str]] = [[] for _ in part]
        for number in range(max(len(question["turns"]) for question in part)):
            rows = [i for i, question in enumerate(part) if len(question["turns"]) > number]
            asked = [
                writer.writing.ask(
                    writer.tokenizer,
                    part[i]["turns"][number],
                    before=list(zip(part[i]["turns"], turns[i], strict=False)),
                )
                for i in rows
            ]
            settings = [
                writer.settings(
                    max_tokens=config.max_tokens,
                    temperature=TEMPERATURES.get(part[i].get("category", ""), _OTHER),
                    seed=config.seed + int(part[i]["question_id"]),
                )
                for i in rows
            ]
            for i, found in zip(rows, writer.write(asked, settings, batch=config.batch), strict=True):
                turns[i].append(writer.tokenizer.decode(found.tokens).strip())
                tokens += len(found.tokens)
        for question, texts in zip(part, turns, strict=True):
            line = {
                "question_id": question["question_id"], "answer_id": uuid.uuid4().hex, "model_id": name,
                "choices": [{"index": 0, "turns": texts}], "tstamp": time.time(),
            }  # fmt: skip
            append_jsonl(output, line)
        spent = time.monotonic() - start
        say("answered", f"{first + len(part)} of {len(questions)} questions, {tokens / spent:.0f} tokens a second")


def read_questions(path: Path) -> list[dict[str, Any]]:
    """Read FastChat's questions.

    Raises:
      UsageError: the file cannot be read, or a line is no question.
    """
    questions = []
    for number, line in enumerate(_lines(path), 1):
        try:
            question = json.loads(line)
            turns = question["turns"]
            if (
                not isinstance(question["question_id"], int)
                or not turns
                or not all(isinstance(t, str) and t for t in turns)
            ):
                raise ValueError("question_id is no whole number, or turns are no texts")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UsageError(
                f"{path}: line {number} is no question ({reason(error)}); expected question_id, category and turns"
            ) from None
        questions.append(question)
    if not questions:
        raise UsageError(f"{path} holds no questions; expected FastChat's question.jsonl")
    return questions


def answered(path: Path) -> set[int]:
    """Return which questions a file of answers has; a last line that was cut off is none."""
    if not path.exists():
        return set()
    found = set()
    for line in _lines(path):
        try:
            found.add(json.loads(line)["question_id"])
        except (ValueError, KeyError, TypeError):
            raise UsageError(
                f"{path} holds a line that is no answer, {shown(line)}; take it out, or name another --output"
            ) from None
    return found


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({reason(error)}); name a file of JSON lines") from None
