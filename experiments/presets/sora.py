"""SoRA's scripts on GLUE, without their schedule of thresholds."""

from experiments.presets.table import table

PRESETS = {
    "paper": {
        "sora": table(
            learning_rate=8e-4,
            batch_size=8,
            epochs=20,
            weight_decay=0.1,
            max_grad_norm=0.1,
            warmup=0.06,
            penalty=10,
            threshold=3e-4,
            prox="released",
            alpha=16,
        ),
    },
}
