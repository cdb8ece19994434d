"""The intervals and ranks of PrunedLoRA's released code.

In the paper's reviews the learning rate is the largest of a grid; its table of settings is not public, nor are its epochs.
"""

from experiments.presets.table import table

PRESETS = {
    "paper": {
        "prunedlora": table(
            learning_rate=1e-5,
            schedule="cosine",
            warmup=0.05,
            weight_decay=1e-5,
            rank=128,
            target=64,
            interval=10,
            remove=2,
            dropout=0.05,
        ),
    },
}
