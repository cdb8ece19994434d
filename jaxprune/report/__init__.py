"""Put a run on disk: its numbers as JSON, its pictures, and one page that shows both."""

from jaxprune.files import append_jsonl as append_jsonl
from jaxprune.files import write_json as write_json
from jaxprune.report.page import write_page as write_page
from jaxprune.report.pruning import plot_pruning as plot_pruning
from jaxprune.report.ranks import plot_ranks as plot_ranks
from jaxprune.report.ranks import plot_ranks_before_after as plot_ranks_before_after
