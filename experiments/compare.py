"""Compare methods, tasks and seeds: `python -m experiments.compare --methods lora full --tasks mrpc rte`."""

from experiments.run.start import start

if __name__ == "__main__":
    start("experiments.compare", "experiments.run.comparison:run")
