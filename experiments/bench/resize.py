"""Time `jaxprune.resize`: `python -m experiments.bench resize`.

A folder of random factors at the sites of a model, as PEFT would write it; reading, decomposing, solving, writing and reading
back are timed together, as a user waits for them.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from experiments.bench.allocate import llama_3_8b, roberta_base
from experiments.run.cli import parse

SHAPES = {"roberta-base": roberta_base, "llama-3-8b": llama_3_8b}


@dataclass(frozen=True)
class ResizeConfig:
    """Time the lowering of a LoRA folder to a budget."""

    shapes: Literal["roberta-base", "llama-3-8b"] = "llama-3-8b"
    """whose sites"""
    rank: int = 64
    """components at every site before"""
    ratios: tuple[float, ...] = (0.5, 0.25, 0.125)
    """shares of the parameters that stay"""


def main(arguments: list[str]) -> None:
    """Write a folder, lower it, and print seconds."""
    from safetensors.numpy import save_file

    from jaxprune.peft import resize

    config = parse(ResizeConfig, arguments, "experiments.bench resize")
    sites, rng = SHAPES[config.shapes](), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        source, tensors = Path(folder) / "adapter", {}
        for site in sites:
            name = f"base_model.model.{site.path.replace('/', '.')}"
            fall = np.float32(0.95) ** np.arange(config.rank, dtype=np.float32)
            a = rng.standard_normal((config.rank, site.d_in), np.float32) * fall[:, None] * np.float32(rng.lognormal())
            tensors[f"{name}.lora_A.weight"] = a
            tensors[f"{name}.lora_B.weight"] = rng.standard_normal((site.d_out, config.rank), np.float32)
        source.mkdir()
        save_file(tensors, source / "adapter_model.safetensors")
        said = {"peft_type": "LORA", "r": config.rank, "lora_alpha": config.rank, "target_modules": "all-linear"}
        (source / "adapter_config.json").write_text(json.dumps(said))
        for number, ratio in enumerate(config.ratios):
            start = time.perf_counter()
            done = resize(source, Path(folder) / f"lowered_{number}", ratio=ratio)
            seconds = time.perf_counter() - start
            assert done.plan
            print(
                f"{config.shapes}, {len(sites)} sites of rank {config.rank}: {done.params_before:,} to {done.params:,} "
                f"parameters in {seconds:.1f} s, {done.plan.seconds:.2f} s of it the program; {100 * done.energy:.1f} % of the "
                f"energy kept, ranks {min(done.ranks.values())} to {max(done.ranks.values())}"
            )
