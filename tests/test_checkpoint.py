"""Checkpoints: what is saved is loaded back, nothing is unpickled, and mismatches are reported."""

import dataclasses
import json
import math
import os
import pickle
import urllib.error

import pytest
import torch

import checkpoint as checkpoints
import data
from checkpoint import Checkpoint
from compression import load_packed, save_packed
from data import Normalization
from errors import UserError
from evaluation import score
from models import Architecture, MobileNetV2
from network import fold_batch_norm
from quantization import float_network, predictor
from subject import folded
from vision import import_torchvision


@pytest.fixture(scope="module")
def small() -> Checkpoint:
    torch.manual_seed(0)
    model = MobileNetV2(Architecture(3, 0.1))
    normal = Normalization((1, 2, 3), 50.0)
    return Checkpoint(model.architecture, model.state_dict(), "folder", ("a", "b", "ç"), normal, {"test_acc": 12.5})


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_what_is_saved_comes_back(tmp_path, small, name):
    checkpoints.save(small, tmp_path / name)
    loaded = checkpoints.load(tmp_path / name)
    for field in dataclasses.fields(Checkpoint):
        if field.name != "state":
            assert getattr(loaded, field.name) == getattr(small, field.name), field.name
    assert loaded.state.keys() == small.state.keys()
    assert all(torch.equal(loaded.state[key], small.state[key]) for key in small.state)
    first = (tmp_path / name).read_bytes()
    checkpoints.save(loaded, tmp_path / name)
    assert (tmp_path / name).read_bytes() == first
    assert os.listdir(tmp_path) == [name]
    import hashlib

    assert checkpoints.short_hash(tmp_path / name) == hashlib.sha256(first).hexdigest()[:8]


def test_the_network_has_the_weights_and_not_the_checkpoints_memory(small):
    model = checkpoints.build_model(small)
    assert not model.training and all(p.requires_grad for p in model.parameters())
    assert model.features[1].conv[0][0].weight.is_contiguous(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 32, 32)
    plain = MobileNetV2(small.architecture).eval()
    plain.load_state_dict(small.state)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
    before = small.state["classifier.1.bias"].clone()
    with torch.no_grad():
        model.classifier[1].bias.add_(1)
    assert torch.equal(small.state["classifier.1.bias"], before)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize("name, other", [("a.safetensors", "b.pth"), ("a.pth", "b.safetensors")])
def test_a_checkpoint_with_the_other_suffix_is_read(tmp_path, small, name, other):
    checkpoints.save(small, tmp_path / name)
    (tmp_path / name).rename(tmp_path / other)
    assert checkpoints.load(tmp_path / other).classes == small.classes


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state": Evil()}, "evil.pth")
    (tmp_path / "evil2.pth").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pth", "evil2.pth"):
        with pytest.raises(UserError, match="is not a checkpoint that can be read safely"):
            checkpoints.load(tmp_path / name)
    assert not (tmp_path / "unpickled").exists()


def replaced(state: dict, name: str, tensor: torch.Tensor | None) -> dict:
    rest = {key: value for key, value in state.items() if key != name}
    return rest if tensor is None else {**rest, name: tensor}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    "name, tensor, message",
    [
        ("classifier.1.bias", None, "width 0.1 with 3 classes: classifier.1.bias is missing; it is damaged, give"),
        ("extra", torch.zeros(2), "extra is not a tensor of this network"),
        ("classifier.1.bias", torch.zeros(10), r"classifier.1.bias is float32 \[10\], expected float32 \[3\]"),
        ("classifier.1.bias", torch.zeros(3).half(), r"classifier.1.bias is float16 \[3\], expected float32 \[3\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, small, suffix, name, tensor, message):
    path = tmp_path / f"a{suffix}"
    checkpoints.save(dataclasses.replace(small, state=replaced(small.state, name, tensor)), path)
    with pytest.raises(UserError, match=message):
        checkpoints.load(path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architecture": Architecture(3, 0.35)}, "does not fit a network of width 0.35 with 3 classes"),
        ({"architecture": Architecture(3, "wide")}, "no header that fits"),
        ({"architecture": Architecture("many", 0.1)}, "no header that fits"),
        ({"architecture": Architecture(3, math.inf)}, "no header that fits"),
        ({"classes": ("a", "b")}, "names 2 classes for 3 outputs"),
        ({"classes": ("a", "b", 3)}, "no header that fits"),
        ({"metrics": []}, "no header that fits"),
        ({"metrics": {"val_size": "abc"}}, "no header that fits"),
        ({"metrics": {"split_seed": 2**70}}, "no header that fits"),
    ],
)
def test_headers_that_do_not_fit_are_refused(tmp_path, small, changes, message):
    checkpoints.save(dataclasses.replace(small, **changes), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=message):
        checkpoints.load(tmp_path / "a.safetensors")


@pytest.mark.parametrize("normal", [{"mean": [1, 2]}, {"mean": "abc"}, {"std": 0}, {"std": -1.0}, {"std": "NaN"}])
def test_normalisations_that_are_none_are_refused(tmp_path, small, normal):
    header = json.loads(checkpoints.to_header(small))
    header["normalization"] |= {name: math.nan if value == "NaN" else value for name, value in normal.items()}
    checkpoints.write_torch(tmp_path / "a.pth", {"checkpoint": json.dumps(header), "state": small.state})
    with pytest.raises(UserError, match="no header that fits"):
        checkpoints.load(tmp_path / "a.pth")


def test_weights_that_are_no_numbers_are_refused(tmp_path, small):
    state = small.state | {"classifier.1.bias": small.state["classifier.1.bias"] * math.nan}
    checkpoints.save(dataclasses.replace(small, state=state), tmp_path / "a.pth")
    with pytest.raises(UserError, match="weights that are not finite numbers"):
        checkpoints.load(tmp_path / "a.pth")


def test_statistics_that_cannot_be_are_refused(tmp_path, small):
    name = "features.1.conv.0.1.running_var"
    state = small.state | {name: small.state[name] - 2}
    checkpoints.save(dataclasses.replace(small, state=state), tmp_path / "a.pth")
    with pytest.raises(UserError, match=f"a.pth has negative variances \\({name}\\)"):
        checkpoints.load(tmp_path / "a.pth")
    huge, still = small.state["features.1.conv.0.0.weight"] * 0 + 3e38, small.state[name] * 0
    state = small.state | {"features.1.conv.0.0.weight": huge, name: still}
    with pytest.raises(UserError, match="a.pth has weights in features.1.conv.0.0 that are not finite"):
        folded(dataclasses.replace(small, state=state), tmp_path / "a.pth")


def test_what_is_no_checkpoint_is_called_what_it_is(tmp_path, small, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = float_network(fold_batch_norm(checkpoints.build_model(small), small.normalization))
    for name in ("packed.safetensors", "packed.pth"):
        save_packed(network, tmp_path / name, {})
    os.mkfifo("pipe")
    torch.save(torch.nn.Linear(1, 1), "module.pth")
    (tmp_path / "text.pth").write_text("hello")
    for name, says in (
        ("", r"\. is a folder; give a checkpoint that train.py wrote"),
        ("text.pth", "it is neither a safetensors file nor one of torch.save"),
        ("pipe", "is a device or a pipe"),
        ("x" * 300, "cannot be read .File name too long"),
        ("packed.pth", "is a packed file; evaluate it with test.py --packed"),
        ("packed.safetensors", "is a packed file; evaluate it with test.py --packed"),
        ("module.pth", "is not a checkpoint that can be read safely"),
    ):
        with pytest.raises(UserError, match=says) as told:
            checkpoints.load(checkpoints.Path(name))
        assert str(told.value).isprintable()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_other_files_are_refused(tmp_path, small, suffix):
    path = tmp_path / f"a{suffix}"
    with pytest.raises(UserError, match="does not exist"):
        checkpoints.load(path)
    checkpoints.save(small, path)
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is not a checkpoint"):
            checkpoints.load(path)
    path.write_bytes(whole)
    torch.save(small.state, tmp_path / "bare.pth")
    with pytest.raises(UserError, match="is not a checkpoint of this project .bare weights.*only .*train.py wrote"):
        checkpoints.load(tmp_path / "bare.pth")


def test_the_files_that_come_along_know_real_images(real_images):
    """200 test images; their files tell how many of all 10,000 are right."""
    images = data.load("folder", real_images[0])
    checkpoint = checkpoints.load(checkpoints.DEFAULT_CHECKPOINT)
    network = fold_batch_norm(checkpoints.build_model(checkpoint), checkpoint.normalization)
    files = [(float_network(network), checkpoint.metrics, checkpoint.classes)]
    for name in ("mnv2_cifar10_w2a2_qat.safetensors", "mnv2_cifar10_w2a4_qat.safetensors"):
        packed, info = load_packed(checkpoints.DEFAULT_CHECKPOINT.with_name(name))
        files.append((packed, info["metrics"], tuple(info["classes"])))
    for quantized, told, classes in files:
        assert classes == images.classes
        reached = score(predictor(quantized), images.test, 256, "cpu").accuracy
        assert abs(reached - told["test_acc"]) < 8  # three standard deviations


# ------------------------------------------------------------------------------------------------- ImageNet weights


@pytest.fixture
def imagenet_path(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub" / "checkpoints" / "mobilenet_v2-7ebf99e0.pth"


def test_pretrained_weights_come_from_torchvisions_cache(imagenet_path):
    torch.manual_seed(1)
    imagenet = import_torchvision("torchvision.models").mobilenet_v2().state_dict()
    imagenet_path.parent.mkdir(parents=True)
    torch.save(imagenet, imagenet_path)
    model = MobileNetV2(Architecture(10))
    state = checkpoints.pretrained_state(model)
    model.load_state_dict(state)
    assert state["classifier.1.weight"].shape == (10, 1280)
    assert all(torch.equal(state[key], imagenet[key]) for key in imagenet if not key.startswith("classifier"))


def test_pretrained_without_file_or_network_says_what_to_put_where(imagenet_path, monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError, match=f"no route.*put https://.*/mobilenet_v2-7ebf99e0.pth at {imagenet_path}"):
        checkpoints.pretrained_state(MobileNetV2(Architecture(10)))


def test_a_damaged_pretrained_file_is_named(imagenet_path):
    imagenet_path.parent.mkdir(parents=True)
    imagenet_path.write_bytes(b"half")
    with pytest.raises(UserError, match=f"{imagenet_path} is not a checkpoint.*delete it"):
        checkpoints.pretrained_state(MobileNetV2(Architecture(10)))
    torch.save({"features.0.0.weight": torch.zeros(1)}, imagenet_path)
    with pytest.raises(UserError, match="does not fit a network of width 1.0 with 10 .* is missing .*; delete it, or"):
        checkpoints.pretrained_state(MobileNetV2(Architecture(10)))


def test_pretrained_is_for_width_1(imagenet_path):
    with pytest.raises(UserError, match="--pretrained has weights for --width-mult 1.0 only, not 0.5"):
        checkpoints.pretrained_state(MobileNetV2(Architecture(10, 0.5)))
