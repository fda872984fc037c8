"""test.py from the command line: one row per evaluation, resumable grids, packed files and clear error messages."""

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from conftest import load_program
from networks import random_model

import checkpoint as checkpoints
import results
from data import Normalization
from errors import UserError


@pytest.fixture(scope="module")
def program():
    return load_program("test.py", "evaluate_program")


@pytest.fixture
def call(program, run_main, image_folder, tmp_path, monkeypatch):
    """Calls test.py on a random three-class network with its data and results in temporary folders."""
    monkeypatch.chdir(tmp_path)
    model = random_model(0.1, classes=3)
    classes = ("class0", "class1", "class2")
    content = checkpoints.Checkpoint(model.architecture, model.state_dict(), "folder", classes, Normalization(), {})
    checkpoints.save(content, tmp_path / "c.safetensors")

    def run(*argv, checkpoint=True, data=True):
        first = ["--checkpoint", "c.safetensors"] * checkpoint + ["--data-dir", str(image_folder)] * data
        return run_main(program, *first, *argv)

    return run


@pytest.mark.parametrize(
    "flags,bits",
    [
        ([], ("", "")),
        (["--weight_quant_bits", "4", "--weight-per-channel"], ("4", "")),
        (["--activation_quant_bits", "8"], ("", "8")),
        (["--weight-bits=3", "--act_bits", "5", "--weight-per-tensor", "--rounding", "plain"], ("3", "5")),
        (["--weight-bits", "32"], ("", "")),
    ],
)
def test_one_evaluation_is_one_row(call, flags, bits):
    code, out, _ = call(*flags)
    (row,) = results.read(Path("results.csv"))
    assert code == 0 and "test_acc_quantized" in out
    assert (row["weight_quant_bits"], row["activation_quant_bits"]) == bits
    assert row["weight_per_channel"] == str("--weight-per-tensor" not in flags)
    assert float(row["acc_drop"]) == pytest.approx(float(row["test_acc_fp32"]) - float(row["test_acc_quantized"]), 1e-3)
    if bits == ("", ""):
        assert float(row["acc_drop"]) == 0


def test_a_grid_goes_on_where_it_stopped(call, program, monkeypatch):
    grid = ["--weight_bits", "8,2", "--act_bits", "8,4", "--calib_batches", "1", "--rounding", "nearest"]
    evaluate, calls = program.evaluate, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(program, "evaluate", interrupted)
    code, _, err = call(*grid)
    assert code == 130 and "results.csv has the points so far" in err
    assert len(results.read(Path("results.csv"))) == 2
    assert "2 of 4 points are in results.csv already" in call(*grid)[1]
    assert len(calls) == 3 + 2
    rows = results.read(Path("results.csv"))
    bits = {(r["weight_quant_bits"], r["activation_quant_bits"]) for r in rows}
    assert len(rows) == 4 and bits == set(itertools.product("82", "84"))
    assert Path("parallel_coordinates.png").read_bytes().startswith(b"\x89PNG")
    assert Path("parallel_coordinates.html").stat().st_size > 1e5
    sizes = {r["weight_quant_bits"]: int(r["packed_bytes"]) for r in rows}
    assert sizes["2"] < sizes["8"]


def test_the_figure_of_a_grid_is_of_this_grid(call, monkeypatch):
    import report

    drawn = []
    monkeypatch.setattr(report, "write_plots", lambda frame, path: drawn.append(frame) or path)
    for method in ("plain", "nearest"):
        assert call("--weight-bits", "8,4", "--rounding", method, "--calib-batches", "1")[0] == 0
    assert [set(frame["method"]) for frame in drawn] == [{"plain"}, {"nearest"}]
    assert [sorted(frame[report.WEIGHTS]) for frame in drawn] == [[4, 8]] * 2


def test_the_checkpoint_that_was_not_named_is_said(call, image_folder):
    Path("checkpoints").mkdir()
    Path("c.safetensors").rename("checkpoints/mnv2_fp32_best.pth")
    code, out, _ = call(checkpoint=False)
    assert code == 0 and "mnv2_fp32_best.pth" in out  # read by its content, which is a .safetensors
    Path("checkpoints/mnv2_fp32_best.pth").unlink()
    code, out, err = call("--dataset", "digits", checkpoint=False, data=False)
    name = "mnv2_cifar10_fp32.safetensors"
    assert code == 2 and name in out and f"{name} knows airplane" in err


def test_the_same_grid_on_other_images_is_measured(call, image_folder):
    shutil.copytree(image_folder, "other")
    next((Path("other") / "test" / "class0").iterdir()).unlink()
    grid = ["--weight-bits", "8,4", "--rounding", "plain"]
    assert call(*grid)[0] == 0
    assert "already" not in call(*grid, "--data-dir", "other", data=False)[1]
    assert "2 of 2 points are in results.csv already" in call(*grid)[1]
    assert len({r["dataset_crc32"] for r in results.read(Path("results.csv"))}) == 2


def test_bits_given_twice_are_one_point(call):
    assert call("--weight-bits", "8,8", "--act-bits", "8,4,8", "--rounding", "plain")[0] == 0
    assert len(results.read(Path("results.csv"))) == 2


def test_a_packed_file_on_other_images_has_no_fp32_accuracy(call, image_folder):
    assert call("--weight-bits", "4", "--save-packed", "p.safetensors", "--rounding", "plain")[0] == 0
    shutil.copytree(image_folder, "other")
    next((Path("other") / "test" / "class0").iterdir()).unlink()
    code, out, err = call("--packed", "p.safetensors", "--data-dir", "other", checkpoint=False, data=False)
    assert code == 0 and "no FP32" in out and "not measured on these images" in err
    made, other = results.read(Path("results.csv"))
    assert made["acc_drop"] and (other["test_acc_fp32"], other["acc_drop"]) == ("", "")
    assert made["dataset_crc32"] != other["dataset_crc32"]


def test_a_packed_file_does_not_depend_on_the_batch_size(call):
    for size in ("7", "1000"):
        flags = ["--weight-bits", "4", "--rounding", "plain", "--batch-size", size, "--save-packed", size]
        assert call(*flags)[0] == 0
    assert Path("7").read_bytes() == Path("1000").read_bytes()


def test_batch_size_changes_no_accuracy(call):
    for size in ("1", "5", "256"):
        assert call("--weight-bits", "3", "--act-bits", "3", "--batch-size", size, "--calib-batches", "1")[0] == 0
    assert len({r["test_acc_quantized"] for r in results.read(Path("results.csv"))}) == 1


def test_a_packed_file_needs_nothing_else(call):
    assert call("--weight-bits", "4", "--act-bits", "6", "--save-packed", "p.safetensors")[0] == 0
    Path("c.safetensors").unlink()
    assert call("--packed", "p.safetensors", checkpoint=False)[0] == 0
    made, read = results.read(Path("results.csv"))
    assert {k for k in made if made[k] != read[k]} <= {"calib_seconds", "eval_seconds", "images_per_second"}
    assert int(made["packed_bytes"]) == Path("p.safetensors").stat().st_size


@pytest.mark.parametrize(
    "flags,column,most",
    [
        (["--target-size-mb", "0.06", "--entropy"], "packed_bytes", 60_000),
        (["--max-drop", "30"], "drop on validation", 30),
        (["--target-activation-bits", "3.5", "--weight-bits", "4"], "activation_quant_bits", 3.5),
        (["--target-activation-bits", "7", "--weight-bits", "4", "--rounding", "auto"], "activation_quant_bits", 7),
        (["--target-size-mb", "0.1", "--act-bits", "4", "--rounding", "auto"], "packed_bytes", 100_000),
    ],
)
def test_mixed_precision_keeps_its_promise_and_comes_back(call, flags, column, most):
    target, others = flags[:2], ["--calib-batches", "1", "--bits-file", "b.yaml", "--rounding", "nearest", *flags[2:]]
    assert call(*target, *others)[0] == 0
    notes = Path("b.yaml").read_text()
    assert notes.startswith("# Bits of each layer and activation")
    assert call(*others)[0] == 0, call(*others)[2]
    searched, read = results.read(Path("results.csv"))
    if column == "drop on validation":
        assert float(notes.partition("# Drop ")[2].partition(" points")[0]) <= most
    else:
        assert 0.8 * most < float(searched[column]) <= most
    assert {k for k in read if read[k] != searched[k]} <= {"calib_seconds", "eval_seconds", "images_per_second"}
    assert target[0] == "--target-activation-bits" or f"# Packed file: {read['packed_bytes']} bytes." in notes
    assert "mixed" in read["method"] and 1 <= float(read["weight_quant_bits"]) < 8


@pytest.mark.parametrize(
    "flags,words",
    [
        (["--weight-bits", "9"], "--weight-quant-bits"),
        (["--weight-bits", "4,x"], "--weight-quant-bits"),
        (["--batch-size", "0"], "--batch-size"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--weight-bits", "4,2", "--save-packed", "p"], "--save-packed"),
        (["--packed", "nowhere.safetensors"], "--packed"),
        (["--dataset", "digits"], "class"),
        (["--output", "c.safetensors"], "--output"),
        (["--target-size-mb", "0.06", "--max-drop", "1"], "--max-drop"),
        (["--target-size-mb", "0.06", "--weight-bits", "4"], "--weight-bits"),
        (["--target-activation-bits", "1"], "--target-activation-bits"),
        (["--target-size-mb", "0.001", "--rounding", "nearest", "--calib-batches", "1"], "--target-size-mb"),
        (["--bits-file", "nowhere.yaml"], "--bits-file"),
        (["--bits-file", "c.safetensors"], "--bits-file"),
        (["--bits-file", "b.yaml", "--weight-bits", "4,3"], "grid"),
        (["--bits-file", "b.yaml", "--packed", "p"], "--packed"),
        (["--packed", "p", "--entropy"], "--entropy"),
        (["--save-packed", "c.safetensors", "--weight-bits", "4"], "--save-packed"),
        (["--save-packed", ".", "--weight-bits", "4"], "cannot write ."),
        (["--weight-bits", "4,2", "--plot", "p.html"], "--plot"),
        (["--seed", "99999999999999999999"], "--seed"),
        (["--entropy"], "--entropy goes with --weight-bits or --act-bits"),
        (["--weight-bits", "32", "--entropy"], "--entropy goes with --weight-bits"),
        (["--act-bits", "8", "--symmetric"], "--symmetric goes with --weight-bits"),
        (["--weight-bits", "4", "--equalize"], "--equalize goes with --act-bits"),
        (["--weight-bits", "4", "--plot", "x.png"], "--plot goes with a list of bits"),
        (["--device", "nope"], "--device is 'nope'"),
        (["--weight-bits", "4,2", "--plot", "."], "--plot"),
        (["--weight-bits", "4,2", "--plot", "o.png", "--output", "./o.png"], "--output and --plot both write"),
        (["--weight-bits", "4", "--save-packed", "o.csv", "--output", "o.csv"], "--save-packed and --output are both"),
        (["--target-size-mb", "1", "--bits-file", "r", "--output", "r"], "--output and --bits-file are both"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(call, flags, words):
    code, _, err = call(*flags, checkpoint="--packed" not in flags)
    assert code == 2 and words in err and len(err.strip().splitlines()) == 1
    assert not Path("results.csv").exists()


def test_a_largest_drop_needs_images_to_choose_on(call, image_folder):
    shutil.copytree(image_folder, "few")
    for folder in Path("few/train").iterdir():
        for image in sorted(folder.iterdir())[3:]:
            image.unlink()
    code, _, err = call("--max-drop", "1", "--data-dir", "few", "--rounding", "nearest", data=False)
    assert code == 2 and "--max-drop" in err and "fewer than ten" in err.splitlines()[-1]


def test_targets_are_checked_before_the_work(call, program, monkeypatch):
    monkeypatch.setattr(program, "evaluate", lambda *_: pytest.fail("worked first"))
    Path("file").write_text("")
    Path("b.yaml").write_text("layers: {classifier.1: 4}")
    for flags in (["--output", "file/r.csv"], ["--save-packed", "file/p"], ["--save-packed", "b.yaml"]):
        flags += ["--bits-file", "b.yaml"]
        code, _, err = call("--weight-bits", "4", *flags)
        assert code == 2 and flags[1] in err


def test_no_output_replaces_an_input_or_a_file_of_another_kind(call):
    checkpoint = Path("c.safetensors").read_bytes()
    Path("notes.txt").write_text("mine")
    search = ["--target-size-mb", "1", "--bits-file"]
    for flags in (
        [*search, "c.safetensors"],
        [*search, "notes.txt"],
        ["--weight-bits", "4", "--save-packed", "c.safetensors"],
        ["--weight-bits", "4", "--save-packed", "notes.txt"],
    ):
        code, _, err = call(*flags)
        assert code == 2 and flags[-1] in err and len(err.strip().splitlines()) == 1
    assert Path("c.safetensors").read_bytes() == checkpoint and Path("notes.txt").read_text() == "mine"
    for _ in range(2):  # what test.py wrote itself is replaced
        assert call("--weight-bits", "4", "--rounding", "plain", "--save-packed", "p.safetensors")[0] == 0


def test_a_packed_file_is_labelled_by_its_header(call, program):
    assert (
        call("--weight-bits", "4", "--act-bits", "6", "--rounding", "plain", "--save-packed", "p.safetensors")[0] == 0
    )
    labels = program.label(program.Settings(packed=Path("p.safetensors")))
    assert labels.name == "w4a6-b256" and "plain" in labels.tags


def test_bits_of_a_file_decide_what_few_bits_need(program, tmp_path, monkeypatch):
    """Eight bits at both ends where some layer has three or fewer, not because the bits are a file's."""
    monkeypatch.chdir(tmp_path)
    for bits, edge in ((8, None), (3, 8)):
        Path("b.yaml").write_text(f"layers: {{features.0.0: 8, classifier.1: {bits}}}")
        settings = program.Settings(bits_file=Path("b.yaml"), activation_quant_bits=(4,))
        assert program.point_of(settings).plan.edge_bits == edge
    with pytest.raises(UserError, match="reconstruct always tunes"):
        program.point_of(program.Settings(weight_quant_bits=(4,), rounding="reconstruct", tune=False))


def test_the_method_names_only_what_it_changed(program):
    settings = program.Settings(activation_quant_bits=(4,), weight_range="mse", equalize=True)
    assert program.point_of(settings).method == "auto+equalize=True"


def test_an_agent_gets_no_bits_that_nobody_gave(program, call, image_folder):
    """Its run takes the parameters of a sweep as they are: no bits given are none, not 32."""
    Path("b.yaml").write_text("layers: {classifier.1: 4}\n")
    settings = program.Settings(checkpoint=Path("c.safetensors"), data_dir=image_folder, bits_file=Path("b.yaml"))
    with pytest.raises(UserError, match="layers lacks features.0.0"):
        program.evaluate(settings, program.Shared(settings), Path("p.safetensors"))


def test_the_packed_file_does_not_hold_the_folder_of_its_checkpoint(call):
    Path("deep").mkdir()
    shutil.copy("c.safetensors", "deep/c.safetensors")
    for i, path in enumerate(("c.safetensors", "deep/c.safetensors")):
        line = ["--checkpoint", path, "--weight-bits", "4", "--rounding", "nearest", "--save-packed", f"p{i}"]
        assert call(*line, checkpoint=False)[0] == 0
    assert Path("p0").read_bytes() == Path("p1").read_bytes()
    assert [row["checkpoint"] for row in results.read(Path("results.csv"))] == ["c.safetensors", "deep/c.safetensors"]


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_file_that_is_no_checkpoint(call, content):
    if content is None:
        torch.save({"weights": torch.zeros(3)}, "x.pth")
    else:
        Path("x.pth").write_bytes(content)
    code, _, err = call("--checkpoint", "x.pth", checkpoint=False)
    assert code == 2 and "x.pth" in err and "train.py" in err
