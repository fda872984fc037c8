"""benchmarks/tables.py: means and deviations against numbers by hand, and only between the markers."""

import sys
from pathlib import Path

import pytest

import report
import results
from errors import UserError
from report import ACCURACY

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))


@pytest.fixture(scope="module")
def tables():
    import tables

    return tables


def rows():
    common = dict(weight_quant_bits=4, test_acc_fp32=90.0, model_size_mb=1.0, compression_ratio_model=9.0)
    common |= dict(checkpoint_hash="abc", calib_images=512)
    made = [(8, "auto", 0, 89.0), (8, "auto", 1, 89.5), (8, "plain", 0, 88.0), (4, "auto", 0, 85.0)]
    made += [(8, "auto+entropy", 0, 50.0)]
    names = ("activation_quant_bits", "method", "seed", "test_acc_quantized")
    return [{**common, **dict(zip(names, row, strict=True))} for row in made]


def test_accuracies_and_drops(tables):
    frame = report.to_frame(rows())
    lines = tables.accuracies(frame).splitlines()
    assert lines[4] == "| 4 | **89.25 ± 0.35** (88.00) |  | **85.00** |  | 1.000 MB | 9.00× |"
    lines = tables.drops(frame).splitlines()
    assert lines[0] == "| w/a | aim | auto, 512 images | plain, 512 images |"
    assert "| 4/8 | 0.4 | 0.75 ± 0.35 | 2.00 |" in lines and "| 4/4 | 2.0 | 5.00 |  |" in lines
    assert lines[-1] == "FP32 90.00 %."


def test_coded_files_are_told_smallest_first(tables):
    made = [dict(rows()[0], method="auto+entropy", packed_bytes=1_000_000, weight_quant_bits=4)]
    made += [dict(made[0], method="auto+entropy+mixed", packed_bytes=500_000, weight_quant_bits=2.5), rows()[0]]
    lines = tables.coded([report.to_frame(made)]).splitlines()[2:]
    assert lines == [
        "| 90.00 | 2.50 on average | 8 | 500,000 | 9.00 times | 1.00 |",
        "| 90.00 | 4 | 8 | 1,000,000 | 9.00 times | 1.00 |",
    ]


def test_what_goes_beyond_is_told_by_method_and_size(tables):
    common = rows()[0]
    made = [dict(common, weight_quant_bits=3, seed=s, test_acc_quantized=88.0 + s) for s in (0, 1)]
    made += [dict(common, method="qat", weight_quant_bits=2), dict(common, weight_quant_bits=4), *rows()]
    assert tables.beyond(report.to_frame(made)).splitlines()[2:] == [
        "| other bits | 3 | 8 | 88.50 ± 0.71 | 1.50 ± 0.71 | 1.000 MB | 9.00× |",
        "| entropy coding (`--entropy`, lossless) | 4 | 8 | 50.00 | 40.00 | 1.000 MB | 9.00× |",
        "| fine-tuned (`train.py --qat`) | 2 | 8 | 89.00 | 1.00 | 1.000 MB | 9.00× |",
    ]


def test_the_committed_tables_are_those_of_the_committed_results(tables):
    settings = tables.Settings()
    networks = [tables.read_one_checkpoint(path) for path in (settings.results, settings.second, settings.first)]
    page = settings.page.read_text()
    readme = settings.readme.read_text()
    assert tables.accuracies(networks[0]) in readme
    assert tables.beyond(tables.with_fine_tuned(*networks[:2])) in readme
    assert all(table in page for table in (*map(tables.drops, networks), tables.coded(networks)))


def test_the_committed_tables_of_methods_and_of_the_recipe_are_those_of_their_results(tables):
    import methods
    import recipe

    rows = results.read(tables.HERE / "methods.csv", methods.COLUMNS)
    first = [row for row in rows if row["checkpoint_hash"] == rows[0]["checkpoint_hash"]]
    assert methods.table(first) in tables.Settings.page.read_text()
    rows = results.read(tables.HERE / "recipe.csv", recipe.COLUMNS)
    assert recipe.page(rows) in tables.Settings.readme.read_text()


def test_fine_tuned_files_of_an_earlier_network_are_told_with_its_accuracy(tables):
    earlier = report.to_frame([dict(rows()[0], method="qat", weight_quant_bits=2, test_acc_fp32=85.0)])
    frame = report.to_frame(rows())
    line = "| fine-tuned (`train.py --qat`) of a network of 85.00 % | 2 | 8 | 89.00 | -4.00 | 1.000 MB | 9.00× |"
    assert tables.beyond(tables.with_fine_tuned(frame, earlier)).splitlines()[-1] == line
    own = report.to_frame([dict(rows()[0], method="qat", weight_quant_bits=2, test_acc_quantized=77.0)])
    assert tables.with_fine_tuned(own, earlier)[ACCURACY].tolist() == own[ACCURACY].tolist()


@pytest.mark.parametrize("column, other", [("checkpoint_hash", "def"), ("dataset_crc32", "456")])
def test_rows_of_two_checkpoints_or_data_sets_are_refused(tables, tmp_path, column, other):
    path, row = tmp_path / "r.csv", dict.fromkeys(results.COLUMNS, 1) | dict(checkpoint_hash="abc", dataset_crc32="123")
    results.append(path, row)
    assert len(tables.read_one_checkpoint(path)) == 1
    results.append(path, row | {column: other})
    with pytest.raises(UserError, match=f"see its column {column}"):
        tables.read_one_checkpoint(path)
