"""G2R2 with DeBERTaV3-base on GLUE, table 10."""

from experiments.presets.table import table

PRESETS = {
    "paper": {
        "g2r2": table(
            ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb"),
            learning_rate=(1e-4, 1.5e-4, 2e-4, 3e-4, 2e-4, 1.2e-4, 4e-4, 2e-4),
            epochs=(10, 30, 30, 40, 10, 10, 40, 40),
            batch_size=(8, 8, 16, 16, 16, 16, 16, 16),
            weight_decay=0.01,
            max_length=512,
            g2r2_warmup=0.1,
            progressive=0.1,
            final=0.2,
        ),
    },
}
