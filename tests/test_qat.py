"""Fine-tuning learns, ends in a packed file that test.py reads, and goes on where it was cut."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from test_learned import assert_same, small_network, start_of

import augmentation
import checkpoint as checkpoints
import data
import qat
import runstate
import test
import train
import training
from compression import load_packed
from errors import UserError
from evaluation import score
from learned import LearnedNetwork
from models import Architecture, MobileNetV2
from network import forward, to_device
from quantization import predictor
from tests.training_helpers import NEEDS_CUDA

RECIPE = training.Recipe(
    epochs=10, batch_size=8, lr=0.01, warmup_epochs=0, augmentation=augmentation.Augmentation(0, False)
)


@pytest.fixture(scope="module")
def fp32(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of width 0.1 that knows the three classes of the folder `images` (they differ in brightness)."""
    path = tmp_path_factory.mktemp("fp32") / "c.pth"
    settings = dict(data_dir=image_folder, width_mult=0.1, epochs=6, batch_size=8, val_size=6, lr=0.05, save_path=path)
    train.train(train.Settings(device="cpu", **settings))
    return path


def arguments(fp32: Path, image_folder: Path, path: Path, epochs: int = 2) -> list[str]:
    text = f"--qat --checkpoint {fp32} --data-dir {image_folder} --save-path {path} --epochs {epochs} --batch-size 8"
    more = "--device cpu --weight-quant-bits 2 --activation-quant-bits 4 --qat-lr 0.003"
    return [*text.split(), *more.split()]


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
def test_training_at_two_bits_lowers_the_loss(kind: str) -> None:
    device = torch.device(kind)
    network, images = small_network()
    labels = forward(network, images).argmax(1)
    model = LearnedNetwork(network, start_of(network, images, 2, 2))
    teacher, split = to_device(network, device), data.Split(images, labels).to(device)
    state = qat.start(qat.FineTuning(teacher, model, split, split[slice(0)], 0, {}), RECIPE, device)
    criterion = qat.distillation(teacher, 1.0, 0.0)
    step = training.stepper(state, split, RECIPE, network.normalization, state.model, criterion)
    losses = []
    for _ in range(RECIPE.epochs):
        training.train_epoch(state, split, RECIPE, step, lambda: None)
        losses.append(training.epoch_means(state, len(images))[0])
        training.next_epoch(state)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(("share", "bf16"), [(0.0, False), (0.3, False), (1.0, False), (1.0, True)])
def test_distillation_is_a_mean_of_both_losses(share: float, bf16: bool) -> None:
    """Oracle: the two sums, written out. A random network with large gains magnifies bfloat16's rounding: that
    teacher says about the same."""
    network, images = small_network()
    logits, labels = torch.randn(24, 10), torch.randint(10, (24,))
    x = network.normalization(images)
    p = forward(network, images).softmax(1)
    q = logits.softmax(1)
    hard = -q[torch.arange(24), labels].log().mean()
    soft = (p * (p / q).log()).sum(1).mean()
    loss = qat.distillation(network, share, 0.0, bf16)(logits, x, labels)
    torch.testing.assert_close(loss, (1 - share) * hard + share * soft, rtol=0.15 if bf16 else 1e-3, atol=1e-4)


def test_the_packed_file_is_evaluated_by_test_py(
    fp32: Path, image_folder: Path, tmp_path: Path, run_main, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its accuracy is the one that training saw, and its size is that of 2-bit codes."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "q.safetensors"
    code, out, err = run_main(train, *arguments(fp32, image_folder, path))
    assert code == 0, err
    network, info = load_packed(path)
    assert network.layers["features.2.conv.0.0"].grid.bits == 2
    assert {grid.bits for grid in network.activations.values()} == {4, 8}  # 8 before the classifier
    dataset = data.load("folder", image_folder)
    accuracy = score(predictor(network), dataset.test, 8, "cpu").accuracy
    assert accuracy == pytest.approx(info["metrics"]["test_acc"])
    code, out, err = run_main(test, "--packed", path, "--data-dir", image_folder, "--output", tmp_path / "r.csv")
    assert code == 0 and f"w2a4: test_acc_quantized {accuracy:.2f}" in out, err


def test_a_cut_run_ends_with_the_same_bits(fp32: Path, image_folder: Path, tmp_path: Path) -> None:
    fp32 = Path(shutil.copy(fp32, tmp_path))
    whole, cut = (tmp_path / name for name in ("whole.safetensors", "cut.safetensors"))
    settings = train.parse(train.Settings, "", arguments(fp32, image_folder, whole))
    train.train(settings)

    class Cut(Exception):
        pass

    def stop(_: object) -> None:
        raise Cut

    settings = dataclasses.replace(settings, save_path=cut)
    with pytest.raises(Cut):
        train.train(settings, stop)
    settings = dataclasses.replace(settings, resume=True)
    before, content = fp32.read_bytes(), checkpoints.load(fp32)
    other = dataclasses.replace(content, metrics=content.metrics | {"minutes": 99})
    checkpoints.save(other, fp32)  # another file of the same name
    with pytest.raises(UserError, match="began from another network than .*c.pth is now"):
        train.train(settings)
    fp32.write_bytes(before)
    train.train(settings)
    assert_same(load_packed(cut)[0], load_packed(whole)[0])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"--weight-quant-bits": None, "--activation-quant-bits": None}, "--weight-quant-bits"),
        ({"--checkpoint": None}, "--checkpoint"),
        ({"--weight-quant-bits": "9"}, "--weight-quant-bits"),
        ({"--checkpoint": "nowhere.pth"}, "nowhere.pth does not exist"),
    ],
)
def test_bad_input_is_one_line(change: dict, says: str, image_folder: Path, tmp_path: Path, run_main) -> None:
    words = arguments(tmp_path / "none.pth", image_folder, tmp_path / "q.safetensors")
    for name, value in change.items():
        i = words.index(name)
        words[i : i + 2] = [] if value is None else [name, value]
    code, _, err = run_main(train, *words)
    assert code == 2 and says in err and err.strip().count("\n") == 0


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--qat", "--weight-bits", "4", "--lr", "0.5"], "--lr does nothing with --qat"),
        (["--weight-bits", "4"], "--weight-quant-bits goes with --qat"),
        (["--save-path", "{checkpoint}"], "--save-path is the --checkpoint"),
        (["--qat", "--weight-bits", "4", "--save-path", "{checkpoint}"], "--save-path is the --checkpoint"),
        (["--seed", "100000000000000"], "--seed"),
        (["--qat", "--weight-bits", "4", "--label-smoothing", "0.2"], "--label-smoothing does nothing"),
    ],
)
def test_nothing_is_ignored_and_no_start_is_replaced(
    flags: list, says: str, fp32: Path, image_folder: Path, tmp_path: Path, run_main
) -> None:
    before = fp32.read_bytes()
    words = [word.format(checkpoint=fp32) for word in flags]
    words = ["--checkpoint", fp32, "--data-dir", image_folder, "--save-path", tmp_path / "q", *words]
    code, _, err = run_main(train, *words)
    assert code == 2 and says in err and err.strip().count("\n") == 0
    assert fp32.read_bytes() == before and not (tmp_path / "q").exists()


def test_another_data_set_is_refused(image_folder: Path, tmp_path: Path, run_main) -> None:
    model = MobileNetV2(Architecture(10, 0.1))
    known = checkpoints.Checkpoint(
        model.architecture, model.state_dict(), "digits", tuple("0123456789"), data.Normalization(), {}
    )
    checkpoints.save(known, tmp_path / "d.pth")
    code, _, err = run_main(train, *arguments(tmp_path / "d.pth", image_folder, tmp_path / "q.safetensors"))
    assert code == 2 and "other classes" in err and "give --dataset digits" in err
    assert not (tmp_path / "q.safetensors").exists()


def test_the_fp32_checkpoint_is_never_overwritten() -> None:
    settings = train.with_save_path(dataclasses.replace(train.Settings(), qat=True, weight_quant_bits=2))
    assert settings.save_path == Path("checkpoints/mnv2_w2a32_qat.safetensors")
    assert train.with_save_path(train.Settings()) == train.Settings()
    json.dumps(runstate.plain(settings))
