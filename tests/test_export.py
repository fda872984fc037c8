"""The exported ONNX model: its weights are the packed ones, and onnxruntime agrees with our integer arithmetic."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from networks import random_model
from onnx import numpy_helper

import checkpoint
import export
from calibration import Plan, quantize_network
from compression import load_packed, save_packed
from data import Dataset, Normalization, Split, load
from errors import UserError
from network import Network, Op, fold_batch_norm, walk
from quantization import QuantizedNetwork, predictor, prepare, run_step
from subject import folded

IMAGES = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def quantized(weight_bits: int | None, act_bits: int | None, **changes: object) -> QuantizedNetwork:
    network = fold_batch_norm(random_model(0.35), Normalization())
    return quantize_network(network, IMAGES, Plan(weight_bits, act_bits, **changes))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Network, torch.Tensor]:
    """The bundled network, and images with edges and areas."""
    images = load("digits", tmp_path_factory.mktemp("digits")).test.images[:48]
    return folded(checkpoint.load(checkpoint.DEFAULT_CHECKPOINT), Path()), images


def run(model: onnx.ModelProto, images: torch.Tensor, names: Sequence[str] = ("logits",)) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(value) for value in session.run(names, {"image": images.numpy()})]


@pytest.mark.parametrize(
    ("weight_bits", "act_bits", "changes", "four_bit"),
    [
        (8, 8, {"symmetric": True}, False),
        (8, 8, {}, False),
        (6, 6, {"per_channel": False}, False),
        (4, 8, {}, False),
        (4, 8, {"symmetric": True}, True),
        (2, 8, {}, False),
        (2, 3, {"edge_bits": 8}, True),
        (2, 8, {"rounding": "cd"}, False),
        (2, 4, {"rounding": "cd", "edge_bits": 8}, True),
    ],
)
def test_onnxruntime_makes_the_codes_of_our_integer_arithmetic(trained, weight_bits, act_bits, changes, four_bit):
    """A tie that is rounded the other way grows from layer to layer, so layers are compared by codes one by one, each
    for the codes that onnxruntime made before it, and logits where 8 bits keep that small. There biases are rounded as
    integer kernels need them."""
    network, images = trained
    packed = quantize_network(network, images, Plan(weight_bits, act_bits, **changes))
    model = export.to_onnx(packed, four_bit)
    steps = {step.op.name: step for step in prepare(packed)}
    names = [op.name for op in packed.ops if op.name in packed.activations][:4]
    model.graph.output.extend(onnx.ValueInfoProto(name=f"{name}/real") for name in names)
    *reals, theirs = run(model, images, [f"{name}/real" for name in names] + ["logits"])
    made = {name: real / packed.activations[name].scale for name, real in zip(names, reals, strict=True)}

    def check(op: Op, inputs: list[torch.Tensor]) -> torch.Tensor:
        codes = run_step(steps[op.name], inputs)
        if op.name not in made:
            return codes
        off = (made[op.name] - codes).abs()
        assert (off > 0.5).float().mean() < (0.03 if act_bits == 8 else 2e-3), op.name
        return made[op.name].round()

    walk(packed.ops, dataclasses.replace(packed.normalization, std=1.0)(images), check)
    if act_bits == 8:
        logits = predictor(packed)(images)
        assert (logits - theirs).abs().mean() < 0.03 * logits.std()


@pytest.mark.parametrize("weight_bits", [None, 2, 4, 8])
def test_with_fp32_activations_logits_are_the_same(weight_bits):
    network = quantized(weight_bits, None)
    (logits,) = run(export.to_onnx(network), IMAGES)
    torch.testing.assert_close(logits, predictor(network)(IMAGES), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 7, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_weights_are_the_packed_ones_to_the_last_digit(bits, symmetric, four_bit):
    between = bits == 2 and not symmetric  # zero-points between two codes
    network = quantized(bits, 8, symmetric=symmetric, rounding="cd" if between else "nearest")
    assert any(layer.grid.parts == 2 for layer in network.layers.values()) == between
    model = export.to_onnx(network, four_bit)
    numbers = {one.name: numpy_helper.to_array(one).astype(np.float32) for one in model.graph.initializer}
    kinds = {one.name: one.data_type for one in model.graph.initializer}
    for name, layer in network.layers.items():
        scale, zero_point = (numbers[f"{name}/{part}"] for part in ("scale", "zero_point"))
        shape = (-1, *[1] * (layer.codes.ndim - 1))
        real = (numbers[f"{name}/codes"] - zero_point.reshape(shape)) * scale.reshape(shape)
        assert np.array_equal(real, layer.weight.numpy())  # powers of two between codes and scales change no digit
        small = four_bit and bits <= 4
        if small:
            assert kinds[f"{name}/codes"] == onnx.TensorProto.UINT4
        elif symmetric or bits < 8:
            assert kinds[f"{name}/codes"] == onnx.TensorProto.INT8
            assert not zero_point.any()  # what the fast kernels ask for
        else:
            assert kinds[f"{name}/codes"] in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)


def test_four_bit_weights_take_half_the_bytes():
    network = quantized(4, 8)
    whole, half = (export.to_onnx(network, four_bit).ByteSize() for four_bit in (False, True))
    codes = sum(layer.codes.numel() + len(layer.grid.zero_point) for layer in network.layers.values())
    bias_scales = sum(len(layer.bias) - 1 for layer in network.layers.values())  # float kernels need but one a layer
    assert abs(whole - half - codes / 2 - 4 * bias_scales) < 1000


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    path = tmp_path / "w4a8.safetensors"
    save_packed(quantized(4, 8), path, {"classes": [str(i) for i in range(10)], "dataset": "digits", "row": {}})
    return path


def main(monkeypatch: pytest.MonkeyPatch, *argv: object) -> int:
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, argv)])
    return export.main()


def test_the_program_writes_measures_and_names_the_classes(packed, monkeypatch, capsys):
    labels = run(export.to_onnx(load_packed(packed)[0]), IMAGES)[0].argmax(1)  # so that it is right every time
    test = Split(IMAGES, labels)
    data = Dataset("digits", tuple(str(i) for i in range(10)), test, test)
    monkeypatch.setattr(export.subjects, "load_data", lambda *_: data)
    assert main(monkeypatch, "--packed", packed, "--data-dir", packed.parent) == 0
    model = onnx.load(packed.with_suffix(".onnx"))
    assert {prop.key: prop.value for prop in model.metadata_props}["classes"].startswith('["0", "1"')
    written, here, there = capsys.readouterr().out.splitlines()
    assert "MB" in written and float(here.partition("test accuracy ")[2].split()[0]) > 70
    assert "onnxruntime: test accuracy 100.00 %" in there


def test_bad_input_is_one_line(packed, monkeypatch):
    for argv, message in {
        (): "--packed is missing",
        ("--packed", packed, "--output", packed): "--output is .* give it another name",
        ("--packed", packed.parent / "none"): "none",
        ("--packed", packed, "--output", packed / "x"): "cannot write",
    }.items():
        with pytest.raises(UserError, match=message):
            main(monkeypatch, *argv)
    before = packed.read_bytes()
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match="export.py needs the package onnx .*pip install onnx"):
        main(monkeypatch, "--packed", packed)
    assert packed.read_bytes() == before and not packed.with_suffix(".onnx").exists()
