"""report.py: tables against slow plain versions, figures against what they must show."""

import itertools
import math

import numpy as np
import pytest

import report
from errors import UserError


def row(weight_bits, activation_bits, accuracy, size, batch_size=128, **changes):
    made = dict(dataset="digits", checkpoint="ab12cd34", width_mult=1.0, weight_quant_bits=weight_bits)
    made |= dict(activation_quant_bits=activation_bits, weight_per_channel=True, batch_size=batch_size, seed=0)
    made |= dict(test_acc_fp32=94.0, test_acc_quantized=accuracy, acc_drop=94.0 - accuracy, model_size_fp32_mb=9.1)
    made |= dict(model_size_mb=size, compression_ratio_model=9.1 / size, images_per_second=4000.0 + batch_size)
    return made | changes


GRID = [
    row(w, a, 94.0 - 40 / w**2 - 30 / a**2, 0.09 + 2.24 * w / 8, b)
    for w, a, b in itertools.product((2, 4, 6, 8), (2, 4, 6, 8), (128, 256))
]
FP32 = row(None, None, 94.0, 9.1)


def test_empty_bits_are_32_and_rows_without_accuracy_are_dropped():
    frame = report.to_frame([FP32, row(4, None, 93.0, 1.2), row(4, 8, math.nan, 1.2)])
    assert list(frame["weight_quant_bits"]) == [32, 4]
    assert list(frame["activation_quant_bits"]) == [32, 32]
    assert report.names(frame) == ["FP32", "w4a32"]


def test_mixed_precision_keeps_its_mean_bits(tmp_path):
    frame = report.to_frame([FP32, row(3.27, 8, 93.0, 1.0), row(4, 8, 93.5, 1.2)])
    assert report.names(frame) == ["FP32", "w3.27a8", "w4a8"]
    report.write_plots(frame, tmp_path / "p.png")
    shown = report.heatmap_figure(frame).data[0]
    assert list(shown.y) == ["w3.27", "w4", "w32"] and list(shown.x) == ["a8", "a32"]


def test_fp32_row_without_quantized_accuracy_gets_the_reference():
    assert report.to_frame([row(None, None, math.nan, 9.1)])["test_acc_quantized"].tolist() == [94.0]


def test_results_file_round_trip(tmp_path):
    frame = report.to_frame([FP32, *GRID])
    frame.replace({"weight_quant_bits": {32: None}}).to_csv(tmp_path / "results.csv", index=False)
    again = report.read_results(tmp_path / "results.csv")
    for name in ("weight_quant_bits", "activation_quant_bits", "test_acc_quantized", "model_size_mb", "batch_size"):
        assert list(again[name]) == list(frame[name])


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00\x81\x82"])
def test_bad_results_file_is_refused(tmp_path, content):
    path = tmp_path / "results.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="results.csv"):
        report.read_results(path)


def test_an_error_without_a_message_is_one_line_too(tmp_path, monkeypatch):
    import pandas as pd

    def fails(*_, **__):
        raise ValueError

    monkeypatch.setattr(pd, "read_csv", fails)
    with pytest.raises(UserError, match="r.csv is not a table that test.py wrote .ValueError."):
        report.read_results(tmp_path / "r.csv")


@pytest.mark.parametrize("seed", range(20))
def test_pareto_front_against_all_pairs(seed):
    random = np.random.default_rng(seed)
    points = random.integers(0, 6, size=(12, 2)).astype(float) + 1  # small numbers: ties are likely
    frame = report.to_frame([row(4, 8, accuracy, size) for size, accuracy in points])
    front = report.pareto_front(frame)
    expected = {
        (s, a)
        for s, a in map(tuple, points)
        if not any((s2 <= s and a2 > a) or (s2 < s and a2 >= a) for s2, a2 in points)
    }
    found = list(zip(front["model_size_mb"], front["test_acc_quantized"], strict=True))
    assert set(found) == expected and len(found) == len(expected)
    assert found == sorted(found)


def test_batch_effect_is_the_spread_over_batch_sizes():
    changed = [row(4, 8, 91.0, 1.2, 128), row(4, 8, 91.5, 1.2, 256), row(8, 8, 92.0, 2.3, 128)]
    effect = report.batch_effect(report.to_frame(changed))
    assert effect["configuration"].tolist() == ["w4a8"]  # w8a8 ran at one batch size only
    assert effect["spread"].tolist() == [0.5]
    assert (report.batch_effect(report.to_frame(GRID))["spread"] == 0).all()
    assert len(report.batch_effect(report.to_frame(GRID))) == 16


def test_batch_effect_does_not_mix_seeds():
    rows = [row(4, 8, 90.0 + seed, 1.2, batch, seed=seed) for seed in (0, 1) for batch in (64, 128)]
    assert report.batch_effect(report.to_frame(rows))["spread"].tolist() == [0.0, 0.0]


def test_milestones_name_what_was_reached_and_what_was_not_run():
    rows = [row(8, 8, 93.9, 2.3), row(8, 8, 93.8, 2.3), row(4, 8, 93.0, 1.2), row(8, 3, 80.0, 2.3), row(6, 4, 90.0, 2)]
    table = report.milestones(report.to_frame(rows)).set_index("configuration")
    assert list(table.index) == ["FP32", "w8a8", "w6a8", "w4a8", "a ≤ 4"]
    assert table.loc["w8a8", "accuracy"] == pytest.approx(93.85) and table.loc["w8a8", "runs"] == 2  # of seeds the mean
    assert table.loc["w6a8", "run"] == "not run" and math.isnan(table.loc["w6a8", "accuracy"])
    assert table.loc["a ≤ 4", "run"] == "w6a4" and table.loc["a ≤ 4", "drop"] == 4.0
    assert table.loc["FP32", "accuracy"] == 94.0 and table.loc["FP32", "runs"] == 0  # from the others' reference
    mixed = report.milestones(report.to_frame([*rows, row(3.5, 3.27, 91.0, 1.1, method="auto+mixed")]))
    assert mixed.iloc[-1]["run"] == "w3.5a3.27"


@pytest.mark.parametrize("low, high", [(0.63, 9.1), (46.7, 94.3), (93.1, 93.4), (1.0, 1.1), (3.9, 7.5), (0.002, 700)])
def test_ticks_are_few_round_and_inside(low, high):
    for ticks in (report.linear_ticks(low, high), report.log_ticks(low, high)):
        assert 2 <= len(ticks) <= 9
        assert ticks == sorted(set(ticks))
        assert all(low * 0.999 <= tick <= high * 1.001 for tick in ticks)
        assert all(float(f"{tick:.4g}") == tick for tick in ticks)
    assert report.linear_ticks(low, low) == [low]


def test_axes_place_values_by_their_own_scales():
    frame = report.to_frame([FP32, row(4, 8, 90.0, 1.0), row(8, 8, 92.0, 3.0)])
    axes = report.parallel_axes(frame)
    assert [axis.label for axis in axes] == ["ActBits", "WeightBits", "CompressionRatio", "ModelSizeMB", "QuantAcc"]
    assert [text for _, text in axes[1].ticks] == ["4", "8", "32"]
    assert axes[1].places.tolist() == pytest.approx([5 / 6, 1 / 6, 3 / 6])
    for axis in axes[2:]:  # the ticks lie on the same scale as the values
        values = {"CompressionRatio": 9.1 / frame["model_size_mb"], "ModelSizeMB": frame["model_size_mb"]}
        values = values.get(axis.label, frame["test_acc_quantized"])
        transform = math.log if axis.label != "QuantAcc" else float
        slope, start = np.polyfit([transform(v) for v in values], axis.places, 1)
        for place, text in axis.ticks:
            assert place == pytest.approx(start + slope * transform(float(text.strip("×"))), abs=1e-9)


def test_spread_keeps_levels_apart_and_accuracies_in_place():
    axes = report.parallel_axes(report.to_frame([FP32, *GRID]))
    for index, axis in enumerate(axes):
        moved = report.spread(axes, index)
        if axis.ordinal:
            assert np.abs(moved - axis.places).max() < 0.25 / len(axis.ticks)
        else:
            assert np.abs(moved - axis.places).max() < (0.03 if axis is not axes[-1] else 1e-12)
    assert len(set(report.spread(axes, 0))) == len(GRID) + 1  # no two lines on top of each other


def test_curves_end_at_their_values():
    frame = report.to_frame([row(4, 8, 90.0, 1.0), row(8, 8, 92.0, 3.0)])
    figure = report.parallel_coordinates_figure(frame)
    trace = figure.data[0]
    assert [d.label for d in trace.dimensions] == [a.label for a in report.parallel_axes(frame)]
    assert list(trace.line.color) == [90.0, 92.0]


@pytest.mark.parametrize("rows", [[FP32, *GRID], [row(4, 8, 90.0, 1.2)], [row(8, 8, 93.0, 2.3)] * 3])
def test_written_plots_are_whole_and_need_no_network(tmp_path, rows):
    from matplotlib.image import imread

    page = report.write_plots(report.to_frame(rows), tmp_path / "new" / "plot.png")
    figure = imread(tmp_path / "new" / "plot.png")
    assert figure.shape[1] > 1500 and len(np.unique(figure.reshape(-1, figure.shape[2]), axis=0)) > 50
    text = page.read_text()
    assert page == tmp_path / "new" / "plot.html" and "parcoords" in text
    assert "<script src=" not in text and 'src="http' not in text
    assert sorted(p.name for p in page.parent.iterdir()) == ["plot.html", "plot.png"]


def test_figure_colours_lines_by_accuracy(tmp_path):
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    def share(rows, color):
        report.parallel_coordinates_png(report.to_frame(rows), tmp_path / "plot.png")
        pixels = imread(tmp_path / "plot.png")[:, :1650, :3]  # without the colour bar
        return (np.abs(pixels - (0.85 * np.array(to_rgb(color)) + 0.15)).max(axis=2) < 0.03).mean()

    low, high = report.COLORS[0], report.COLORS[-1]
    poor = [row(8, 8, 94.0, 2.3), *[row(2, a, 50.0, 0.6) for a in (2, 4, 6)]]
    good = [row(2, 2, 50.0, 0.6), *[row(8, a, 94.0, 2.3) for a in (4, 6, 8)]]
    assert share(poor, low) > share(poor, high) > 0
    assert share(good, high) > share(good, low) > 0


def test_no_rows_are_refused(tmp_path):
    with pytest.raises(UserError, match="no results"):
        report.write_plots(report.to_frame([]), tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())


def test_figures_show_their_numbers():
    frame = report.to_frame([FP32, *GRID])
    heat = report.heatmap_figure(frame).data[0]
    assert list(heat.y) == ["w2", "w4", "w6", "w8", "w32"] and list(heat.x)[-1] == "a32"
    assert heat.z[1][3] == pytest.approx(94.0 - 40 / 16 - 30 / 64) and math.isnan(heat.z[0][4])
    traces = {trace.name: trace for trace in report.pareto_figure(frame).data}
    assert sum(len(t.x) for n, t in traces.items() if "activations" in n) == 33
    assert list(traces["Pareto front"].text) == ["w2a8", "w4a8", "w6a8", "w8a8", "FP32"]
    assert traces["FP32"].y == (94.0,) and traces["FP32"].x == (9.1,)


def test_sizes_figure_adds_up():
    sizes = [dict(name="a", numel=8, code_bytes=500_000, scale_bytes=4), dict(name="b", code_bytes=0, scale_bytes=6)]
    figure = report.sizes_figure(sizes)
    assert sum(sum(bar.y) for bar in figure.data) == pytest.approx(500.010)
    assert "0.500 MB" in figure.layout.title.text
