"""Answer the questions of MT-Bench, two turns each, as FastChat's judge reads them: `python -m experiments.mt_bench`.

    python -m experiments.mt_bench runs/alpaca-oplora-42 --questions question.jsonl

The questions are those of L. Zheng et al., "Judging LLM-as-a-judge with MT-Bench and Chatbot Arena" (arXiv 2306.05685), in
FastChat's `fastchat/llm_judge/data/mt_bench/question.jsonl`. The judge needs a paid service and is not run here.
"""

from __future__ import annotations

from experiments.run.start import start

PROGRAM = "experiments.mt_bench"


if __name__ == "__main__":
    start(PROGRAM, "experiments.run.answers:main")
