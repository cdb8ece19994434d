"""Train several runs in one compiled step: the flags of each, as their own command takes them, with a + between.

    python -m experiments.together --method lora --seed 1 --output-dir a + --method lora --seed 2 --output-dir b

`python -m experiments.compare --together` does so for all the seeds of a method and task.
"""

from __future__ import annotations

from experiments.run.start import start

PROGRAM = "experiments.together"


def main(arguments: list[str]) -> None:
    """Run what the command line asks for."""
    from experiments.run.flags import parse_run  # here, as importing takes seconds
    from experiments.run.together import run

    cuts = [-1, *(i for i, argument in enumerate(arguments) if argument == "+"), len(arguments)]
    run([parse_run(arguments[a + 1 : b], PROGRAM) for a, b in zip(cuts, cuts[1:], strict=False)])


if __name__ == "__main__":
    start(PROGRAM, f"{PROGRAM}:main")
