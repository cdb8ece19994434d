"""When compaction pays: it shrinks every later step, and costs a compilation now."""

from __future__ import annotations

COMPACT = ("auto", "always", "never")


def worth_compacting(*, step_seconds: float, time_ratio: float, steps_left: int, compile_seconds: float) -> bool:
    """Tell whether what compaction saves is more than what it costs.

        step_seconds (1 - time_ratio) steps_left > compile_seconds

    Args:
      step_seconds: what a training step takes now.
      time_ratio: predicted step time after compaction over the one before (`jaxprune.step_time` of the live ranks over that
        of the present shapes).
      steps_left: training steps still to do.
      compile_seconds: what compiling anew is going to take, for example what it took last time.
    """
    return step_seconds * (1 - time_ratio) * steps_left > compile_seconds
