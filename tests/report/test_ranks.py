import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from jaxprune.errors import UsageError
from jaxprune.report import plot_ranks, plot_ranks_before_after
from jaxprune.sites import Site

TYPES = {"attention/query": (8, 8), "attention/key": (8, 8), "fc1": (8, 32), "fc2": (32, 8)}


def make_sites(layers, types=TYPES):
    return [
        Site(f"encoder/layer_{i}/{path}", *shape, i, path.split("/")[-1])
        for i in range(layers)
        for path, shape in types.items()
    ]


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


def inside(figure, texts):
    for text in texts:
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text


def contrast(text, background):
    """Contrast ratio of WCAG 2, 1 to 21."""

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
    inside(figure, [*labels, *figure.texts])
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


def scanned(layers):
    return [
        Site(f"layers/{kind}[{i}]", *size, i, kind)
        for i in range(layers)
        for kind, size in (("wq", (4, 6)), ("wo", (6, 4)))
    ]


def test_layers_of_a_scan_are_rows_of_one_column(tmp_path, drawn):
    ranks = {"layers/wq[0]": 2, "layers/wq[2]": 5, **{f"layers/wo[{i}]": 1 for i in range(3)}}
    plot_ranks(ranks, scanned(3), tmp_path / "ranks.png")
    numbers = {position: text.get_text() for position, text in cells(drawn[0]).items()}
    assert numbers == {(0, 0): "2", (0, 1): "0", (0, 2): "5", (1, 0): "1", (1, 1): "1", (1, 2): "1"}
    assert drawn[0].axes[0].get_title() == "100 adapter parameters"


def test_ranks_of_unknown_sites_are_errors(tmp_path):
    sites = make_sites(1)
    with pytest.raises(UsageError, match="'encoder/layer_0/fc3', which is not a site.*fc1"):
        plot_ranks({"encoder/layer_0/fc3": 1}, sites, tmp_path / "ranks.png")
    with pytest.raises(UsageError, match="'encoder/layer_0/fc3', which is not a site.*fc1"):
        plot_ranks_before_after({}, {"encoder/layer_0/fc3": 1}, sites, tmp_path / "ranks.png")
    with pytest.raises(UsageError, match="no sites"):
        plot_ranks({}, [], tmp_path / "ranks.png")


def pixel(picture, axes, column, row):
    """The colour (3,) near a cell's corner, where no number stands, read from the pixels of the file."""
    x, y = axes.transData.transform((column + 0.1, row + 0.15))
    return picture[picture.shape[0] - 1 - int(y), int(x), :3]


def test_before_and_after_have_the_same_colours_and_removed_sites_are_crossed_out(tmp_path, drawn):
    sites = make_sites(3)
    before = {sites[0].path: 8, sites[1].path: 5, sites[2].path: 16, sites[6].path: 3}
    after = {sites[0].path: 8, sites[1].path: 0, sites[2].path: 3}
    plot_ranks_before_after(before, after, sites, tmp_path / "x.png", title="DPLoRA on RTE")
    figure = drawn[0]
    left, right, bar = figure.axes
    texts = [{text.get_position(): text.get_text() for text in axes.texts} for axes in (left, right)]
    zeros = {(i + 0.5, j + 0.5): "0" for i in range(4) for j in range(3)}
    assert texts[0] == zeros | {(0.5, 0.5): "8", (1.5, 0.5): "5", (2.5, 0.5): "16", (2.5, 1.5): "3"}
    assert texts[1] == zeros | {(0.5, 0.5): "8", (1.5, 0.5): "×", (2.5, 0.5): "3", (2.5, 1.5): "×"}
    # 8 (8 + 8) + 5 (8 + 8) + 19 (8 + 32) before, 8 (8 + 8) + 3 (8 + 32) after
    assert left.get_title() == "before: 968 adapter parameters"
    assert right.get_title() == "after: 248 adapter parameters (25.6 %)"
    assert figure.legends[0].get_texts()[0].get_text() == "had a rank, removed by pruning (2 of 4)"

    picture = imread(tmp_path / "x.png")
    assert picture.shape[:2] == (round(figure.bbox.height), round(figure.bbox.width))
    assert np.array_equal(pixel(picture, left, 0, 0), pixel(picture, right, 0, 0))
    assert np.array_equal(pixel(picture, left, 2, 1), pixel(picture, right, 2, 0))
    white, removed = pixel(picture, right, 3, 2), pixel(picture, right, 1, 0)
    assert np.array_equal(white, [1, 1, 1]) and np.array_equal(pixel(picture, left, 3, 2), white)
    assert np.ptp(removed) == 0 and removed[0] < 0.9
    assert np.array_equal(removed, pixel(picture, right, 2, 1))
    inside(figure, [left.title, right.title, *figure.legends[0].get_texts(), *bar.get_yticklabels()])
    assert left.title.get_window_extent().x1 < right.title.get_window_extent().x0


def test_nothing_removed_needs_no_legend(tmp_path, drawn):
    before, after = {"layers/wq[0]": 2, "layers/wq[1]": 3}, {"layers/wq[0]": 2, "layers/wq[1]": 1}
    plot_ranks_before_after(before, after, scanned(2), tmp_path / "x.png")
    assert not drawn[0].legends
    assert "×" not in {text.get_text() for axes in drawn[0].axes for text in axes.texts}
    assert drawn[0].axes[1].get_title() == "after: 30 adapter parameters (60.0 %)"
