import json
import math
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from jaxprune.errors import UsageError
from jaxprune.report import append_jsonl, plot_ranks, write_json
from jaxprune.sites import Site

TYPES = {"attention/query": (8, 8), "attention/key": (8, 8), "fc1": (8, 32), "fc2": (32, 8)}


def make_sites(layers, types=TYPES):
    return [
        Site(f"encoder/layer_{i}/{path}", *shape, i, path.split("/")[-1])
        for i in range(layers)
        for path, shape in types.items()
    ]


@pytest.fixture
def drawn(monkeypatch):
    """The figures as they were when they were saved."""
    figures = []
    savefig = Figure.savefig

    def keep(self, *args, **kwargs):
        figures.append(self)
        return savefig(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def cells(figure):
    """{(column, row): text} of the numbers in the cells."""
    texts = {text.get_position(): text for text in figure.axes[0].texts}
    return {(int(x), int(y)): text for (x, y), text in texts.items()}


def test_every_cell_shows_its_rank(tmp_path, drawn):
    sites = make_sites(3)
    ranks = {sites[1].path: 16, sites[4].path: 7, sites[11].path: 0}
    plot_ranks(ranks, sites, tmp_path / "ranks.png", title="DPLoRA on RTE", budget=1000)
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")
    numbers = {position: text.get_text() for position, text in cells(drawn[0]).items()}
    assert numbers == {(i, j): "0" for i in range(4) for j in range(3)} | {(1, 0): "16", (0, 1): "7"}
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["query", "key", "fc1", "fc2"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1", "2"]
    assert drawn[0].get_suptitle() == "DPLoRA on RTE"
    # 16 (8 + 8) + 7 (8 + 8)
    assert axes.get_title() == "368 adapter parameters, 36.8 % of the budget of 1,000"


def contrast(text, background):
    """Contrast ratio of WCAG 2, 1 to 21."""
    from matplotlib.colors import to_rgb

    def luminance(colour):
        rgb = np.array(to_rgb(colour))
        return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    low, high = sorted([luminance(text), luminance(background)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("layers", "top"), [(6, 16), (12, 16), (32, 64)])
def test_labels_are_inside_the_picture_and_readable(tmp_path, drawn, layers, top):
    types = {f"mlp/{name}_proj": (8, 8) for name in ("q", "k", "v", "o", "gate", "up", "down")}
    sites = make_sites(layers, types)
    ranks = {site.path: i % (top + 1) for i, site in enumerate(sites)}
    title = "OPLoRA on stsb, sentence-transformers/all-MiniLM-L6-v2, seed 42, a title longer than the picture is wide"
    plot_ranks(ranks, sites, tmp_path / "ranks.png", title=title, budget=12345678)
    figure = drawn[0]
    axes, bar = figure.axes
    labels = [*axes.get_xticklabels(), *axes.get_yticklabels(), *bar.get_yticklabels(), axes.title, axes.yaxis.label]
    for text in [*labels, *figure.texts]:
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text
    down = sorted(text.get_window_extent().y0 for text in axes.get_yticklabels())
    height = axes.get_yticklabels()[0].get_window_extent().height
    assert np.diff(down).min() > height
    image = axes.collections[0]
    for text in cells(figure).values():
        rank = int(text.get_text())
        background = image.to_rgba(rank)[:3] if rank else "white"
        assert contrast(text.get_color(), background) >= (4.5 if rank else 3)


def test_colours_darken_steadily_and_zero_is_white(tmp_path, drawn):
    sites = make_sites(6)
    ranks = {site.path: i for i, site in enumerate(sites[:17])}
    plot_ranks(ranks, sites, tmp_path / "ranks.png")
    image = drawn[0].axes[0].collections[0]
    greys = [image.to_rgba(rank)[:3] @ np.array([0.299, 0.587, 0.114]) for rank in range(1, 17)]
    assert np.all(np.diff(greys) < 0)
    assert np.ma.getmaskarray(image.get_array()).sum() == len(sites) - 16


def test_same_last_name_and_missing_sites(tmp_path, drawn):
    types = {"attention/output/dense": (8, 8), "output/dense": (8, 8), "query": (8, 8)}
    sites = [site for site in make_sites(2, types) if site.path != "encoder/layer_1/output/dense"]
    plot_ranks({sites[0].path: 3}, sites, tmp_path / "ranks.png")
    axes = drawn[0].axes[0]
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert names == ["attention/output/dense", "layer_#/output/dense", "query"]
    assert set(cells(drawn[0])) == {(0, 0), (1, 0), (2, 0), (0, 1), (2, 1)}
    assert [patch.get_xy() for patch in axes.patches if patch.get_hatch()] == [(1, 1)]


def test_stacked_site_is_a_column_of_its_layers(tmp_path, drawn):
    sites = [Site("layers/wq", 4, 6, 0, "wq", (3,)), Site("layers/wo", 6, 4, 0, "wo", (3,))]
    plot_ranks({"layers/wq": [2, 0, 5], "layers/wo": 1}, sites, tmp_path / "ranks.png")
    numbers = {position: text.get_text() for position, text in cells(drawn[0]).items()}
    assert numbers == {(0, 0): "2", (0, 1): "0", (0, 2): "5", (1, 0): "1", (1, 1): "1", (1, 2): "1"}
    assert drawn[0].axes[0].get_title() == "100 adapter parameters"


def test_ranks_of_unknown_sites_and_unwritable_files_are_errors(tmp_path):
    sites = make_sites(1)
    with pytest.raises(UsageError, match="'encoder/layer_0/fc3', which is not a site.*fc1"):
        plot_ranks({"encoder/layer_0/fc3": 1}, sites, tmp_path / "ranks.png")
    with pytest.raises(UsageError, match="no sites"):
        plot_ranks({}, [], tmp_path / "ranks.png")
    (tmp_path / "file").write_text("")
    for write in (lambda path: plot_ranks({}, sites, path), lambda path: write_json(path, 1),
                  lambda path: append_jsonl(path, 1)):  # fmt: skip
        with pytest.raises(UsageError, match="cannot write .*file/x"):
            write(tmp_path / "file" / "x")


def test_drawing_needs_no_display_and_leaves_no_state(tmp_path):
    code = (
        "import sys\nimport jaxprune.report as r\nassert 'matplotlib' not in sys.modules\n"
        "from jaxprune.sites import Site\n"
        f"r.plot_ranks({{'a': 1}}, [Site('a', 2, 2, 0, 'a')], {str(tmp_path / 'x.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_json_of_numpy_and_jax_values(tmp_path):
    obj = {
        "np": np.float32(0.5), "int": np.int64(3), "flag": np.bool_(True), "array": np.array([[1.0, np.nan]]),
        "jax": jnp.array(2), "nan": math.nan, "inf": -math.inf, "path": tmp_path, "tuple": (1, None, "ü"),
        7: {"x": True},
    }  # fmt: skip
    write_json(tmp_path / "new" / "summary.json", obj)
    assert json.loads((tmp_path / "new" / "summary.json").read_text(), parse_constant=pytest.fail) == {
        "np": 0.5, "int": 3, "flag": True, "array": [[1.0, None]], "jax": 2, "nan": None, "inf": None,
        "path": str(tmp_path), "tuple": [1, None, "ü"], "7": {"x": True},
    }  # fmt: skip


def test_json_keeps_the_old_file_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})

    def disk_full(self, content):
        self.touch()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UsageError, match="No space left on device"):
        patch.setattr("pathlib.Path.write_bytes", disk_full)
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_jsonl_survives_a_torn_line(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    append_jsonl(path, {"step": 1, "loss": np.float32(0.25)})
    append_jsonl(path, {"step": 2, "loss": math.nan})
    with open(path, "a") as file:
        file.write('{"step": 3, "lo')
    append_jsonl(path, {"step": 4})
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in (*lines[:2], lines[3])] == [
        {"step": 1, "loss": 0.25},
        {"step": 2, "loss": None},
        {"step": 4},
    ]
    assert len(lines) == 4
