"""DyLoRA on CoLA."""

from experiments.presets.table import table

PRESETS = {"paper": {"dylora": table(("cola",), learning_rate=4e-4, epochs=80, weight_decay=0.1, alpha=16)}}
