"""See `experiments.bench`."""

from experiments.bench import PROGRAM
from experiments.run.start import start

if __name__ == "__main__":
    start(PROGRAM, f"{PROGRAM}:run")
