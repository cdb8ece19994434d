"""The command line, `python -m jaxprune`: look into adapters, runs and models, merge or resize adapters, and write.

Wrong input is one line on standard error and status 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jaxprune.errors import UsageError, reason, shown
from jaxprune.files import checked_path
from jaxprune.inputs import whole
from jaxprune.models import Settings, resolve, save_decoder
from jaxprune.models.save import CONFIG, save_classifier, tokenizer_files
from jaxprune.peft.names import CONFIG as PEFT_CONFIG
from jaxprune.peft.own import ADAPTERS
from jaxprune.runs import PREDICT, Reading, load_run, read_reading
from jaxprune.sites import Site, find_sites, site_at, unflatten
from jaxprune.writing import WRITING, load_writer, read_writing

_WIDTH = 80


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command that the arguments name, and exit: 0 on success, 2 on wrong input, 1 where the machine failed it."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        given = _parser().parse_args(sys.argv[1:] if arguments is None else arguments)
        lines = given.run(given)
        print("\n".join(lines), flush=True)
    except UsageError as error:
        _end(2, f"error: {error}")
    except KeyboardInterrupt:
        _end(128 + signal.SIGINT, "stopped")
    except BrokenPipeError:  # whoever read the output has gone, as `head` does
        sys.stdout = None
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        _end(1, f"stopped: {reason(error)}{f' ({error.filename})' if error.filename else ''}")
    except MemoryError:
        _end(1, "stopped: not enough memory")
    sys.exit(0)


def _end(status: int, line: str) -> NoReturn:
    print(f"jaxprune: {line}", file=sys.stderr)
    sys.exit(status)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; --help lists every command and flag")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="jaxprune", description="Look into adapters, runs and models, merge or resize adapters, and write."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    inspect = commands.add_parser("inspect", help="say what lies in a folder", description=inspected.__doc__)
    inspect.add_argument("target", help="folder of an adapter, a run or a model, or the hub id of a model")
    inspect.add_argument("--rank", default="8", help="rank whose cost to give for a model [8]")
    inspect.set_defaults(run=lambda given: inspected(given.target, given.rank))
    merge = commands.add_parser("merge", help="make an adapter and its model an ordinary checkpoint")
    merge.add_argument("adapter", help="folder of an adapter, or of a run that has one")
    merge.add_argument("--model", help="checkpoint it belongs to: a folder or a hub id [what the adapter names]")
    merge.add_argument("--output-dir", required=True, help="new or empty folder for the checkpoint")
    merge.set_defaults(run=lambda given: merged(given.adapter, given.model, given.output_dir))
    resize = commands.add_parser("resize", help="lower an adapter of PEFT to a budget, without data or model")
    resize.add_argument("adapter", help="folder of a LoRA or DoRA, or of a run that has one")
    resize.add_argument("--ratio", help="share of its parameters that may stay, for example 0.25")
    resize.add_argument("--budget", help="parameters that may stay")
    resize.add_argument("--rank-pattern", help='ranks by the ends of module paths, as JSON: \'{"query": 4, ".*": 2}\'')
    resize.add_argument("--output", required=True, help="folder to write")
    resize.set_defaults(
        run=lambda given: resized(given.adapter, given.output, given.ratio, given.budget, given.rank_pattern)
    )
    generate = commands.add_parser("generate", help="write with a decoder and its adapters")
    generate.add_argument("target", help="a run, an adapter, or a model: a folder, a GGUF file or a hub id")
    generate.add_argument("prompt", help="what to answer")
    generate.add_argument("--input", default="", help="what the instruction is about, as Alpaca's rows have it")
    generate.add_argument("--system", default="", help="in a chat, the message before the prompt")
    generate.add_argument("--model", help="checkpoint that adapters belong to [what they name]")
    generate.add_argument("--max-tokens", default="256", help="most tokens of the answer [256]")
    generate.add_argument("--temperature", default="0", help="0 takes the likeliest token [0]")
    generate.add_argument("--top-p", default="1", help="draw from the fewest tokens of so much probability [1]")
    generate.add_argument("--top-k", default="0", help="draw from so many tokens, 0 for all [0]")
    generate.add_argument("--beams", default="1", help="beginnings that a beam search keeps [1]")
    generate.add_argument("--seed", default="0", help="of what is drawn [0]")
    generate.set_defaults(run=lambda given: generated(**{k: v for k, v in vars(given).items() if k != "run"}))
    return parser


def generated(
    target: str, prompt: str, input: str = "", system: str = "", model: str | None = None, **settings: str
) -> list[str]:
    """Write an answer to standard output while it grows.

    Args:
      target: as for `load_writer`.
      prompt: the instruction.
      input: what it is about.
      system: in a chat, the message before it.
      model: as for `load_writer`.
      settings: of generation, as text.

    Raises:
      UsageError: a setting is no number or out of range; otherwise as `load_writer` and `Writer.stream`.
    """
    numbers = {name: _number(text) for name, text in settings.items()}
    Settings(**numbers).check()  # type: ignore[arg-type]
    for piece in load_writer(target, model=model).stream(prompt, input, system, **numbers):
        sys.stdout.write(piece)
        sys.stdout.flush()
    return [""]


def inspected(target: str, rank: Any = 8) -> list[str]:
    """Say what lies in a folder: an adapter of PEFT or of jaxprune, a finished run, or a model with its sites.

    Args:
      target: the folder, or the hub id of a model.
      rank: rank whose cost to give for a model.

    Raises:
      UsageError: it is none of these, or damaged.

    Returns:
      The lines to print.
    """
    number = whole(int(rank) if str(rank).isdecimal() else rank)
    if number is None or not 0 < number < 2**31:
        raise UsageError(f"rank {shown(rank)} cannot be used: expected a whole number, 1 or more")
    folder = checked_path("target", target)
    if folder.is_file():
        raise UsageError(f"{shown(target)} is a file; expected a folder")
    if (folder / PEFT_CONFIG).is_file():
        return _peft(folder)
    if (folder / ADAPTERS).is_file():
        return _own(folder)
    if (folder / "summary.json").is_file() or any((folder / part / PREDICT).is_file() for part in ("adapter", "model")):
        return _run(folder, number)
    if folder.is_dir() and not (folder / CONFIG).is_file():
        names = ", ".join(sorted(path.name for path in folder.iterdir())[:4]) or "nothing"
        raise UsageError(
            f"{shown(target)} is no adapter, run or model: it holds {shown(names)}; expected {PEFT_CONFIG}, {ADAPTERS}, "
            f"summary.json or {CONFIG}"
        )
    return _model(target, number)


def _peft(folder: Path) -> list[str]:
    from jaxprune.peft.load import read_folder

    config, tensors = read_folder(folder)
    ranks, sites, rest = {}, [], 0
    for name, tensor in tensors.items():
        module, _, part = name.removeprefix("base_model.model.").rpartition(".lora_")
        if part == "A.weight" and (other := tensors.get(name.replace("lora_A", "lora_B"))) is not None:
            path = module.replace(".", "/")
            if tensor.ndim != 2 or other.ndim != 2 or other.shape[1] != len(tensor):
                raise UsageError(f"{folder}: {module!r} has factors of shapes {tensor.shape} and {other.shape}")
            sites.append(site_at(path, tensor.shape[1], other.shape[0]))
            ranks[path] = len(tensor)
        elif part != "B.weight":  # the head, magnitudes
            rest += tensor.size
    if not sites:
        raise UsageError(f"{folder} has no LoRA factors in it; save the adapter again")
    head = ", ".join(map(str, config.get("modules_to_save") or ())) or "none"
    kind = "DoRA" if config.get("use_dora") else "LoRA"
    return [
        *_facts(
            kind=f"{kind} adapter of PEFT",
            base_model=config.get("base_model_name_or_path"),
            task_type=config.get("task_type"),
            saved_whole=head,
        ),
        *_ranks(ranks, sites, "parameters in factors", rest),
    ]


def _own(folder: Path) -> list[str]:
    from jaxprune.adapters import count
    from jaxprune.peft import load_adapters

    adapters, masks, weights = load_adapters(folder)
    kinds = Counter(type(adapter).__name__ for adapter in adapters.values())
    readers = {PREDICT: read_reading, WRITING: read_writing}
    base = next((read(folder / name).base_model for name, read in readers.items() if (folder / name).is_file()), None)
    ranks, sites, rest = {}, [], sum(weight.size for weight in weights.values())
    for path, adapter in adapters.items():
        axes = getattr(adapter, "rank_axes", {})
        first = next((name for name in axes if getattr(adapter, name).ndim == 2), None)
        if first is None:
            rest += adapter.count(masks.get(path))
            continue
        sites.append(site_at(path, getattr(adapter, first).shape[0], 1))
        ranks[path] = int(masks[path].sum()) if path in masks else getattr(adapter, first).shape[-1]
    total = count(adapters, masks) + sum(weight.size for weight in weights.values())
    lines = _facts(
        kind=f"adapters of jaxprune: {', '.join(f'{n} {kind}' for kind, n in kinds.items())}", base_model=base
    )
    table = _table(ranks, sites) if sites else []
    return [*lines, *table, f"{total - rest:,} parameters at {len(sites)} sites, {rest:,} beside them"]


def _run(folder: Path, rank: int) -> list[str]:
    path, said = folder / "summary.json", {}
    if path.is_file():
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(said, dict):
                raise ValueError(f"it is {shown(said)}, not an object")
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(
                f"{path} is damaged ({reason(error)}); run --resume on the run's folder writes it again"
            ) from None
    names = ("method", "task", "model", "seed", "metric", "score", "best_score", "adapter_params", "budget", "steps")
    known = {name: said[name] for name in names if said.get(name) is not None}
    lines = _facts(
        kind="run" if said else "run without summary.json", **known, events=len(said.get("events") or ()) or None
    )
    part = next((folder / name for name in ("adapter", "model") if (folder / name).is_dir()), None)
    if part is None:
        return [*lines, "nothing trained was saved in it yet: neither adapter/ nor model/"]
    return [*lines, f"{part.name}/", *inspected(str(part), rank)]


def _model(name: str, rank: int) -> list[str]:
    from jaxprune.models import load_classifier
    from jaxprune.models.decoder_weights import decoder_shapes, is_decoder, read_decoder_config

    source = resolve(name)
    if is_decoder(source):
        config = read_decoder_config(source)
        sites = find_sites(unflatten(decoder_shapes(config)), scan_axis=0)
    else:
        model = load_classifier(name, num_labels=2)  # the number of classes does not matter to the sites
        sites, config = find_sites(model.params), model.config
    groups: dict[tuple[str, int, int], list[Site]] = {}
    for site in sites:
        groups.setdefault((site.type, site.d_in, site.d_out), []).append(site)
    rows = [["sites", "type", "d_in -> d_out", f"rank {rank} costs"]]
    rows += [
        [str(len(own)), kind, f"{d_in} -> {d_out}", f"{sum(site.cost(rank) for site in own):,}"]
        for (kind, d_in, d_out), own in groups.items()
    ]
    rows.append([str(len(sites)), "all", "", f"{sum(site.cost(rank) for site in sites):,}"])
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    table = ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
    rule = "-" * len(table[0])
    body = sum(site.d_in * site.d_out for site in sites)
    return [
        *_facts(
            kind=f"{config.family} model", folder=source.gguf or source.folder, layers=config.num_layers, width=config.hidden_size
        ),
        table[0], rule, *table[1:-1], rule, table[-1], f"{body:,} parameters in the kernels of the sites",
    ]  # fmt: skip


def _facts(**said: Any) -> list[str]:
    """Lay names and values out in two columns; what is None is left out."""
    said = {name.replace("_", " "): value for name, value in said.items() if value is not None}
    width = max(map(len, said))
    text = {
        name: value if isinstance(value, str) else f"{value:.2f}" if isinstance(value, float) else f"{value:,}"
        if isinstance(value, int) and name != "seed" else str(value)
        for name, value in said.items()
    }  # fmt: skip
    return [f"{name.ljust(width)}  {shown(value)[1:-1]}" for name, value in text.items()]


def _ranks(ranks: Mapping[str, int], sites: Sequence[Site], what: str, rest: int) -> list[str]:
    params = sum(site.cost(ranks[site.path]) for site in sites)
    return [*_table(ranks, sites), f"{params:,} {what} at {len(sites)} sites, {rest:,} beside them"]


def _table(ranks: Mapping[str, int], sites: Sequence[Site]) -> list[str]:
    """Lay ranks out, layers down and types across; types with long names are letters, which the last lines explain."""
    from jaxprune.report.ranks import rank_lines

    lines = rank_lines(ranks, sites)
    return lines if max(map(len, lines)) <= _WIDTH else rank_lines(ranks, sites, letters=True)


def merged(adapter: str, model: str | None, output_dir: str) -> list[str]:
    """Fold an adapter into its model and write an ordinary checkpoint.

    Args:
      adapter: folder of an adapter, or of a run that has one.
      model: the checkpoint it belongs to; None for the one that the adapter names.
      output_dir: new or empty folder.

    Raises:
      UsageError: there is no adapter, it does not fit the model or cannot be merged, or the output folder is in use.

    Returns:
      The lines to print.
    """
    from jaxprune.adapters import merge, with_weights
    from jaxprune.models import load_classifier
    from jaxprune.peft import load_adapters, load_peft

    given, output = checked_path("adapter", adapter), checked_path("output_dir", output_dir)
    names = (PEFT_CONFIG, ADAPTERS)
    folder = next((f for f in (given, given / "adapter") if any((f / name).is_file() for name in names)), None)
    if folder is None:
        own = (given / CONFIG).is_file() or (given / "model" / CONFIG).is_file()
        why = "holds a whole model, so there is nothing to merge" if own else f"holds no {' and no '.join(names)}"
        raise UsageError(f"{shown(adapter)} {why}; name the folder of an adapter")
    if os.path.lexists(output) and not (output.is_dir() and not any(output.iterdir())):
        raise UsageError(f"output folder {shown(output_dir)} is in use; name a new or empty one")
    tokenizer = folder if tokenizer_files(folder) else None
    if _of_decoder(folder, model):
        writer = load_writer(folder, model=model)
        base, adapters = writer.model, writer.adapters
        reading = dataclasses.replace(writer.writing, base_model=None)
        beside = {**writer.tokenizer.files(), **({WRITING: reading.content()} if (folder / WRITING).is_file() else {})}
        save_decoder(output, base.config, merge(base.params, adapters, writer.masks), beside=beside)
        return _merged(adapters, folder, base.folder, output)
    labels, beside = None, {}
    if (folder / PREDICT).is_file():
        run = load_run(folder, model=model)
        base, adapters, masks, reading = run.model, run.adapters, run.masks, run.reading
        labels = reading.labels
        whole_reading = Reading(None, reading.texts, reading.labels, reading.max_length, reading.dtype)
        beside = {PREDICT: whole_reading.content()}
    else:
        classes, named = _classes(folder) if (folder / PEFT_CONFIG).is_file() else (None, None)
        if not (model or named):
            raise UsageError(f"{shown(adapter)} does not name its model; pass --model")
        base = load_classifier(model or str(named), num_labels=classes or _labels_of(model or str(named)))
        if (folder / ADAPTERS).is_file():
            adapters, masks, weights = load_adapters(folder)
        else:
            adapters, masks, weights = load_peft(folder, find_sites(base.params), torch_paths=base.torch_paths)
        if lost := [path for path in base.initialised if path not in weights]:
            raise UsageError(
                f"neither {folder} nor {base.folder} has {lost[0]!r}; name the checkpoint it was trained on"
            )
        base = dataclasses.replace(base, params=with_weights(base.params, weights))
    params = merge(base.params, adapters, masks)
    save_classifier(output, base.config, params, tokenizer=tokenizer or base.folder, labels=labels, beside=beside)
    return _merged(adapters, folder, base.folder, output)


def _merged(adapters: Mapping[str, Any], folder: Path, base: Path, output: Path) -> list[str]:
    return [f"merged {len(adapters)} adapters of {folder} into {base}", f"written to {output}"]


def _of_decoder(folder: Path, model: str | None) -> bool:
    """Say whether an adapter belongs to a decoder."""
    from jaxprune.models.decoder_weights import is_decoder

    if (folder / WRITING).is_file():
        return True
    if (folder / PREDICT).is_file() or not (folder / PEFT_CONFIG).is_file():
        return False
    named = model or _classes(folder)[1]
    return bool(named) and is_decoder(resolve(named))


def resized(
    adapter: str, output: str, ratio: str | None = None, budget: str | None = None, rank_pattern: str | None = None
) -> list[str]:
    """Lower an adapter of PEFT to a budget, as `jaxprune.resize` does.

    Args:
      adapter: folder of the adapter, or of a run that has one.
      output: folder to write.
      ratio: share of its parameters that may stay.
      budget: parameters that may stay.
      rank_pattern: JSON of {expression: rank}.

    Raises:
      UsageError: as `jaxprune.resize`, or a number or the JSON cannot be read.

    Returns:
      The lines to print.
    """
    from jaxprune.peft import resize

    given = checked_path("adapter", adapter)
    folder = next((f for f in (given, given / "adapter") if (f / PEFT_CONFIG).is_file()), given)
    patterns = None
    if rank_pattern is not None:
        try:
            patterns = json.loads(rank_pattern)
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"rank-pattern {shown(rank_pattern)} is not JSON ({reason(error)}); expected {{expression: rank}}"
            ) from None
    done = resize(folder, output, ratio=_number(ratio), budget=_number(budget), rank_pattern=patterns)  # type: ignore[arg-type]
    width = min(60, max(map(len, done.ranks)))
    rows = [
        f"{_short(name, width).ljust(width)}  {done.before[name]:>4} -> {rank:<4} {100 * done.kept[name]:5.1f} %"
        for name, rank in done.ranks.items()
    ]
    vllm = "more than vLLM takes" if done.vllm_rank is None else f"--max-lora-rank {done.vllm_rank} for vLLM"
    return [
        f"{'module'.ljust(width)}  rank           energy kept",
        *rows,
        *(textwrap.wrap(done.plan.status, _WIDTH) if done.plan else []),
        f"{done.params_before:,} to {done.params:,} parameters, {100 * done.energy:.2f} % of the energy kept",
        f"largest rank {max(done.ranks.values())}: {vllm}",
        f"written to {output}",
    ]


def _number(text: str | None) -> float | int | str | None:
    """Read a number; what is none stays as it is, for the error to show."""
    if text is None:
        return None
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        return text


def _short(name: str, width: int) -> str:
    return name if len(name) <= width else f"...{name[3 - width :]}"


def _classes(folder: Path) -> tuple[int | None, str | None]:
    """Return the number of outputs of the head that a PEFT folder holds, and the name of its model."""
    from jaxprune.peft.load import read_folder

    config, tensors = read_folder(folder)
    heads = ("classifier.weight", "classifier.out_proj.weight", "score.weight")
    sizes = [len(tensor) for name, tensor in tensors.items() if name.endswith(heads) and "lora_" not in name]
    named = config.get("base_model_name_or_path")
    return (sizes[-1] if sizes else None), (named if isinstance(named, str) and named else None)


def _labels_of(model: str) -> int:
    """Return how many classes config.json of a checkpoint has; 2 where it does not say, as in `transformers`."""
    from jaxprune.models.hub import refuse_gguf, resolve

    path = refuse_gguf(resolve(model)) / CONFIG
    try:
        said = json.loads(path.read_text(encoding="utf-8-sig"))
        return len(said.get("id2label") or ()) or whole(said.get("num_labels")) or 2
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UsageError(f"{path} is not a JSON object ({reason(error)}); fetch it again") from None
