"""AdaLoRA's scripts for DeBERTaV3-base on GLUE; PEFT and they score after the update."""

from experiments.presets.table import table

PRESETS = {
    "paper": {
        "adalora": table(
            learning_rate=(8e-4, 5e-4, 1e-3, 5e-4, 8e-4, 1.2e-3, 8e-4, 2.2e-3),
            epochs=(25, 7, 30, 5, 5, 50, 24, 25),
            weight_decay=(0.0, 0.0, 0.01, 0.01, 0.01, 0.01, 0.01, 0.1),
            max_length=(64, 256, 320, 512, 320, 320, 128, 128),
            warmup=(100, 1000, 0.1, 500, 2000, 200, 1000, 100),
            init_rank=(3, 3, 2, 2, 2, 2, 2, 2),
            target_rank=1,
            alpha=(32, 16, 32, 32, 16, 32, 16, 32),
            tinit=(800, 8000, 600, 2000, 8000, 600, 6000, 800),
            tfinal=(3500, 50_000, 1800, 8000, 25_000, 1800, 22_000, 2000),
            interval=(10, 100, 1, 100, 100, 1, 100, 10),
            orthogonal=(0.1, 0.1, 0.1, 0.1, 0.1, 0.3, 0.1, 0.3),
            weights="after",
        ),
    },
}
