"""The channel masks of the slides, whose numbers of parameters are those of DoRA and masks on query and value alone.

How long they train is not said.
"""

from experiments.presets.table import table

PRESETS = {
    "paper": {
        "channelmask": table(
            targets="query,value",
            learning_rate=5e-5,
            final_learning_rate=1e-5,
            schedule="stages",
            batch_size=8,
            channels="paper_like",
            learn="paper",
        ),
    },
}
