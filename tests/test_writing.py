"""Writing with a decoder: prompts and conversations, runs and PEFT folders, the command line, MT-Bench's file."""

from __future__ import annotations

import json
import subprocess
import sys

import jax
import pytest

import jaxprune as jp
from experiments.run import answers
from jaxprune import command
from jaxprune.errors import UsageError
from jaxprune.models.decoder_weights import load_decoder
from jaxprune.models.tokenizer import load_tokenizer
from jaxprune.writing import WRITING, Writing, load_writer
from tests.models import decoders

FORM = {"with_input": "w4 {instruction} w5 {input} w6", "without_input": "w4 {instruction} w6"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny decoder with a tokenizer."""
    folder = decoders.save(tmp_path_factory.mktemp("model"), "llama3", max_position_embeddings=256)[0]
    decoders.save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    """An adapter of it, as a run of instructions leaves it."""
    folder = tmp_path_factory.mktemp("run") / "adapter"
    loaded = load_decoder(model)
    adapters, masks = jp.init_lora(jax.random.key(0), loaded.sites(), {s.path: 2 for s in loaded.sites()})
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    beside = {**load_tokenizer(model).files(), WRITING: Writing(str(model), FORM, 128).content()}
    jp.save_peft(
        adapters, masks, folder, torch_paths=loaded.torch_paths, task_type="CAUSAL_LM", base_model=model, beside=beside
    )
    return folder


def ids(text: str) -> list[int]:
    names = {"user": 80, "assistant": 81, "system": 82, "</s>": 2}
    return [names[word] if word in names else int(word[1:]) for word in text.split()]


def test_prompts(model):
    tokenizer = load_tokenizer(model)
    chat, form = Writing(), Writing(template=FORM)
    assert chat.ask(tokenizer, "w7") == ids("user w7 </s> assistant")
    assert chat.ask(tokenizer, "w7", "w8", "w9") == ids("system w9 </s> user w7 w8 </s> assistant")
    assert chat.ask(tokenizer, "w7", before=[("w8", "w9")]) == ids(
        "user w8 </s> assistant w9 </s> user w7 </s> assistant"
    )
    assert form.ask(tokenizer, "w7") == ids("w4 w7 w6")
    assert form.ask(tokenizer, "w7", "w8") == ids("w4 w7 w5 w8 w6")
    assert form.ask(tokenizer, "w7", before=[("w8", "w9 w10")]) == ids("w4 w8 w6 w9 w10 </s> w4 w7 w6")
    # A text that looks like the form is a text.
    assert len(form.ask(tokenizer, "{input} w7", "w8")) == len(ids("w4 w3 w7 w5 w8 w6"))
    with pytest.raises(UsageError, match="template has no place for a system message"):
        form.ask(tokenizer, "w7", system="w8")


def test_a_model_an_adapter_and_what_is_streamed(model, adapter):
    plain, tuned = load_writer(model), load_writer(adapter.parent)
    assert (len(plain.adapters), len(tuned.adapters)) == (0, 21) and tuned.writing.template == FORM
    bare = load_writer(adapter.parent, model=model)
    for writer in (plain, tuned):
        answers = writer.generate(["w7 w9", ("w9", "w11")], max_tokens=9)
        assert "".join(writer.stream("w9", "w11", max_tokens=9)) == answers[1]
        assert "".join(writer.stream("w9", "w11", max_tokens=9, beams=3)) == writer.generate(
            [("w9", "w11")], max_tokens=9, beams=3
        )[0]  # fmt: skip
    assert plain.generate(["w7"], max_tokens=9) != tuned.generate(["w7"], max_tokens=9)
    assert bare.generate(["w7"], max_tokens=9) == tuned.generate(["w7"], max_tokens=9)
    # Of PEFT's own folder, which says nothing of a template, the model's chat is taken.
    (adapter / WRITING).rename(adapter / "away")
    try:
        assert load_writer(adapter).writing == Writing()
    finally:
        (adapter / "away").rename(adapter / WRITING)


def test_merged_it_writes_the_same(adapter, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["merge", str(adapter), "--output-dir", str(tmp_path / "m")])
    assert stop.value.code == 0 and "merged 21 adapters" in capsys.readouterr().out
    merged = load_writer(tmp_path / "m")
    assert merged.writing == Writing(None, FORM, 128) and not merged.adapters
    one, other = merged.generate(["w7 w8"], max_tokens=12), load_writer(adapter).generate(["w7 w8"], max_tokens=12)
    assert one == other


def test_command_line(adapter, model, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(
            ["generate", str(adapter), "w7", "--input", "w8", "--max-tokens", "6", "--temperature", "1", "--seed", "3"]
        )
    assert stop.value.code == 0
    want = load_writer(adapter).generate([("w7", "w8")], max_tokens=6, temperature=1.0, seed=3)[0]
    assert capsys.readouterr().out.strip() == want.strip()
    with pytest.raises(SystemExit) as stop:
        command.main(["inspect", str(model), "--rank", "2"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "llama model" in out
    assert ["21", "all", "2,496"] in [line.split() for line in out.splitlines()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL", "w7", "--temperature", "hot"], "temperature is 'hot'; expected a number, 0 or more"),
        (["MODEL", "w7", "--max-tokens", "1.5"], "max_tokens is 1.5; expected a whole number, 1 or more"),
        (
            ["MODEL", "w7", "--max-tokens", "300"],
            "prompt 0 has 4 tokens, and with 300 of the answer that is more than the 256",
        ),
        (["ADAPTER", "w7", "--system", "w8"], "the run's template has no place for a system message"),
        (["nowhere/at/all", "w7"], "'nowhere/at/all' is not a folder"),
        (["MODEL"], "the following arguments are required: prompt"),
    ],
)
def test_bad_commands(arguments, message, model, adapter, capsys):
    named = [{"MODEL": str(model), "ADAPTER": str(adapter)}.get(text, text) for text in arguments]
    with pytest.raises(SystemExit) as stop:
        command.main(["generate", *named])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "generate.json is damaged"),
        ('{"template": {"with_input": "a"}}', "its template has no with_input and without_input"),
        ('{"dtype": "int8"}', "dtype is 'int8', not float32 or bfloat16"),
        ('{"base_model": 3}', "base_model is 3, not text"),
        ('{"colour": 1}', "is damaged"),
    ],
)
def test_damaged_reading(content, message, adapter):
    whole = (adapter / WRITING).read_text()
    try:
        (adapter / WRITING).write_text(content)
        with pytest.raises(UsageError, match=message):
            load_writer(adapter)
    finally:
        (adapter / WRITING).write_text(whole)


def test_bad_prompts(model):
    writer = load_writer(model)
    for prompts, message in (("w7", "expected a list of texts"), ([7], "prompt 0 is 7: expected a text, or a pair")):
        with pytest.raises(UsageError, match=message):
            writer.generate(prompts)
    with pytest.raises(UsageError, match="warmth is no setting; expected one of max_tokens"):
        writer.generate(["w7"], warmth=1)


QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["w7 w8", "w9"]},
    {"question_id": 82, "category": "math", "turns": ["w10", "w11 w12"], "reference": ["w1", "w2"]},
    {"question_id": 83, "category": "other", "turns": ["w10"]},
]


def test_mt_bench_answers(adapter, tmp_path, capsys):
    path, output = tmp_path / "question.jsonl", tmp_path / "out" / "a.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    flags = [str(adapter), "--questions", str(path), "--output", str(output), "--max-tokens", "7", "--model-id", "m"]
    answers.main([*flags, "--limit", "1"])
    answers.main([*flags, "--batch", "2"])
    assert "has 1 of the 3 answers; the others follow" in capsys.readouterr().out
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["question_id"] for line in lines] == [81, 82, 83]
    writer = load_writer(adapter)
    for line, question in zip(lines, QUESTIONS, strict=True):
        assert line["model_id"] == "m" and isinstance(line["answer_id"], str) and isinstance(line["tstamp"], float)
        (choice,) = line["choices"]
        assert choice["index"] == 0 and len(choice["turns"]) == len(question["turns"])
        before: list[tuple[str, str]] = []
        for asked, got in zip(question["turns"], choice["turns"], strict=True):
            how = writer.settings(
                max_tokens=7, temperature={"writing": 0.7, "math": 0.0, "other": 0.7}[question["category"]],
                seed=42 + question["question_id"],
            )  # fmt: skip
            (want,) = writer.write([writer.writing.ask(writer.tokenizer, asked, before=before)], how)
            assert got == writer.tokenizer.decode(want.tokens).strip()
            before.append((asked, got))
    answers.main(flags)  # nothing is left to do
    assert len(output.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ("", [], "holds no questions"),
        ("{}\n", [], "line 1 is no question"),
        ('{"question_id": 1, "turns": []}', [], "line 1 is no question"),
        (None, [], "question.jsonl cannot be read"),
        (json.dumps(QUESTIONS[0]), ["--max-tokens", "0"], "--max-tokens 0 is out of range"),
        (json.dumps(QUESTIONS[0]), ["--limit", "0"], "--limit 0 is out of range"),
    ],
)
def test_bad_questions(content, flags, message, model, tmp_path):
    path = tmp_path / "question.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=message):
        answers.main([str(model), "--questions", str(path), "--output", str(tmp_path / "a.jsonl"), *flags])
    assert not (tmp_path / "a.jsonl").exists()


def test_importing_jaxprune_stays_light():
    heavy = ("transformers", "tokenizers", "gguf", "jinja2", "torch")
    code = f"import sys, jaxprune; print([n for n in {heavy} if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_ids_of_the_tiny_tokenizer(model):
    assert load_tokenizer(model).encode("w7 user </s>") == ids("w7 user </s>")
