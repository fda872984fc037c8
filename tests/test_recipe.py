"""benchmarks/recipe.py: runs differ in one thing, the table against numbers by hand, no row is trained twice."""

import sys
from pathlib import Path

import pytest
from conftest import write_images

import results
import train
from errors import UserError

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))


@pytest.fixture(scope="module")
def recipe():
    import recipe

    return recipe


def test_a_run_differs_from_the_default_in_its_change(recipe):
    settings, common = recipe.Settings(runs=Path("r")), ["--epochs", "10", "--data-dir", "d"]
    base = recipe.run_settings(settings, common, "default", 3)
    assert (base.epochs, base.eval_every, base.seed, base.resume) == (10, 10, 3, True)
    run = recipe.run_settings(settings, common, "cutout 8 + no-flip", 3)
    changed = {name for name, value in vars(run).items() if value != getattr(base, name)}
    assert changed == {"cutout", "flip", "save_path", "log_file"} and (run.cutout, run.flip) == (8, False)
    assert recipe.shown_flags(base) == "--epochs 10"
    shorter = recipe.run_settings(settings, [*common, "--max-minutes", "5"], "default", 3)
    assert recipe.shown_flags(shorter) == "--epochs 10 --max-minutes 5.0"
    assert shorter.save_path != base.save_path and shorter.log_file != base.log_file
    assert len({recipe.run_settings(settings, [], c, 0).save_path for c in recipe.CHANGES}) == len(recipe.CHANGES)


@pytest.mark.parametrize("common, change", [([], "lr fast"), ([], "tempo 3"), (["--val-size", "0"], "default")])
def test_what_is_no_flag_of_training_is_told_before_the_first_run(recipe, common, change):
    with pytest.raises(UserError, match="lr|tempo|val-size"):
        recipe.run_settings(recipe.Settings(), common, change, 0)


def test_table_has_means_and_gains_over_the_default_of_the_same_seeds(recipe):
    made = [("default", 0, 80.0, 79.0), ("default", 1, 82.0, 81.0), ("cutout 8", 1, 83.5, 82.0)]
    names = ("change", "seed", "val_acc", "test_acc")
    rows = [{"flags": "--epochs 9", **dict(zip(names, map(str, row), strict=True))} for row in made]
    assert recipe.page(rows).splitlines()[4:] == [
        "| cutout 8 | 83.50 | +1.50 | 82.00 | 1 |",
        "| default | 81.00 ± 1.41 |  | 80.00 ± 1.41 | 2 |",
    ]


def test_runs_are_trained_once_and_the_page_is_written(recipe, image_folder, tmp_path, monkeypatch):
    output, page, trained = tmp_path / "r.csv", tmp_path / "page.md", []
    page.write_text("before\n")
    argv = ["recipe.py", "--changes", "default,cutout 8", "--runs", str(tmp_path / "runs"), "--output", str(output)]
    argv += ["--page", str(page), "--", "--data-dir", str(image_folder), "--epochs", "1", "--width-mult", "0.1"]
    argv += ["--device", "cpu", "--batch-size", "16"]
    monkeypatch.setattr(sys, "argv", argv)
    real = train.train
    monkeypatch.setattr(train, "train", lambda settings: trained.append(settings.cutout) or real(settings))
    assert recipe.main() == 0 and recipe.main() == 0
    rows = results.read(output, recipe.COLUMNS)
    assert trained == [0, 8] and [row["change"] for row in rows] == ["default", "cutout 8"]
    assert {row["flags"] for row in rows} == {"--width-mult 0.1 --epochs 1 --batch-size 16"}
    assert page.read_text().startswith("before\n") and recipe.page(rows) in page.read_text()
    write_images(tmp_path / "others", classes=2)
    argv[argv.index("--data-dir") + 1] = str(tmp_path / "others")
    with pytest.raises(UserError, match="default_seed0_.*safetensors was trained on other images; give another --runs"):
        recipe.main()
    argv[argv.index("--runs") + 1] = str(tmp_path / "more")
    assert recipe.main() == 0 and trained == [0, 8, 0, 0, 8]
    rows = results.read(output, recipe.COLUMNS)
    assert len(rows) == 4 and len({row["val_crc32"] for row in rows}) == 2
    assert recipe.page(rows[2:]) in page.read_text()  # the other rows are not compared with these


def test_rows_that_came_along_still_count(recipe, monkeypatch):
    rows = results.read(recipe.HERE / "recipe.csv", recipe.COLUMNS)
    common = "--dataset folder --progressive-sizes 16,24,32 --width-mult 0.35 --epochs 10 --bf16 --data-dir d"
    flags = recipe.shown_flags(recipe.parse(train.Settings, "", common.split()))
    point = {"flags": flags, "change": "lr 0.2", "seed": 0, "val_crc32": "81edf194"}
    assert results.has(rows, point, recipe.KEY)
    assert not results.has(rows, point | {"val_crc32": "00000000"}, recipe.KEY)
