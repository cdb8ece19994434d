"""Compare methods, tasks and seeds: `python -m experiments.compare --methods lora oplora --tasks mrpc rte`."""

from experiments.start import start

if __name__ == "__main__":
    start("experiments.compare", "experiments.comparison:run")
