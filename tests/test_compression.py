"""Packing, the packed file and its sizes, against slow plain versions, the file system and safetensors' own reader."""

import dataclasses
import functools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import compression
import entropy
import quantization
from compression import load_packed, read_packed, save_packed, size_report
from data import Normalization
from errors import UserError
from models import Architecture, MobileNetV2
from network import fold_batch_norm, value_sizes
from packing import pack_bits, unpack_bits
from sizes import fp32_state_bytes

INFO = {"dataset": "digits", "classes": ["zero", "one ☃"], "seed": 3, "settings": {"rounding": "nearest"}}


# ------------------------------------------------------------------------------------------------------------- bits


def plain_pack(codes: list[int], bits: int) -> list[int]:
    """Bit by bit: bit j of code i is bit (i * bits + j) % 8 of byte (i * bits + j) // 8."""
    packed = [0] * math.ceil(len(codes) * bits / 8)
    for i, code in enumerate(codes):
        for j in range(bits):
            place = i * bits + j
            packed[place // 8] |= (code >> j & 1) << place % 8
    return packed


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 8), st.integers(0, 70))
def test_packing_equals_the_bit_by_bit_loop(data, bits, count):
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count))
    packed = pack_bits(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == plain_pack(codes, bits)
    assert unpack_bits(packed, bits, count).tolist() == codes


def test_packing_takes_any_shape_and_layout():
    codes = torch.randint(0, 8, (5, 3, 3, 7), dtype=torch.uint8)
    strided = codes.to(memory_format=torch.channels_last)
    assert torch.equal(pack_bits(strided, 3), pack_bits(codes.flatten(), 3))
    assert pack_bits(torch.tensor(5, dtype=torch.uint8), 3).tolist() == [5]


@pytest.mark.parametrize(("bits", "value"), [(3, 8), (1, 2), (0, 0), (9, 0)])
def test_packing_refuses_codes_that_do_not_fit(bits, value):
    with pytest.raises(ValueError, match="bits"):
        pack_bits(torch.tensor([value], dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match="uint8"):
        pack_bits(torch.tensor([0.0]), 4)


@pytest.mark.parametrize(("length", "count"), [(2, 5), (1, 3), (2, 2), (3, 10**12), (2, -1)])
def test_unpacking_refuses_other_lengths(length, count):
    with pytest.raises(ValueError, match="do not take"):
        unpack_bits(torch.zeros(length, dtype=torch.uint8), 4, count)


def test_unpacking_refuses_bits_behind_the_last_code():
    with pytest.raises(ValueError, match="behind"):
        unpack_bits(torch.tensor([0b1000], dtype=torch.uint8), 3, 1)


# ---------------------------------------------------------------------------------------------------------- entropy


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 1200), st.floats(0, 40)), max_size=4), st.integers(0, 99))
def test_entropy_coding_is_exact_and_near_the_entropy(shapes, seed):
    random = np.random.default_rng(seed)
    layers = [
        (np.clip(np.round(random.normal(2 ** (b - 1), spread, n)), 0, 2**b - 1).astype(np.uint8), b)
        for b, n, spread in shapes
    ]
    coded = entropy.encode(layers)
    sizes = [(len(symbols), bits) for symbols, bits in layers]
    decoded = entropy.decode(coded.stream, coded.tables, sizes)
    assert all(np.array_equal(mine, symbols) for mine, (symbols, _) in zip(decoded, layers, strict=True))
    assert sum(coded.lengths) + 4 * entropy.LANES == len(coded.stream)
    shares = [np.bincount(symbols)[np.unique(symbols)] / len(symbols) for symbols, _ in layers]
    ideal = sum(-(s * np.log2(s)).sum() * n / 8 for s, (n, _) in zip(shares, sizes, strict=True))
    assert len(coded.stream) <= 1.01 * ideal + 4 * entropy.LANES + 16


@pytest.mark.parametrize("change", ["cut", "grow", "flip", "tables cut", "tables grow", "tables random", "count"])
def test_entropy_decoder_refuses_other_bytes(change):
    symbols = np.random.default_rng(0).integers(0, 5, 5000).astype(np.uint8)
    coded = entropy.encode([(symbols, 3)])
    stream, tables, count = coded.stream, coded.tables, len(symbols)
    if change == "count":
        count -= 1
    stream = {
        "cut": stream[:-2], "grow": stream + b"\0\0", "flip": stream[:1500] + bytes([stream[1500] ^ 1]) + stream[1501:]
    }.get(change, stream)  # fmt: skip
    tables = {"tables cut": tables[:-1], "tables grow": tables + b"\0", "tables random": b"random"}.get(change, tables)
    with pytest.raises(ValueError, match=r"stream|frequen"):
        entropy.decode(stream, tables, [(count, 3)])


# --------------------------------------------------------------------------------------------------------- networks


@functools.cache
def small_network():
    """A random width-0.1 network with batch norm statistics that are not the initial ones, folded."""
    generator = torch.Generator().manual_seed(0)
    model = MobileNetV2(Architecture(10, 0.1)).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data = 0.5 + torch.rand(len(module.weight), generator=generator)
            module.bias.data = 0.3 * torch.randn(len(module.weight), generator=generator)
            module.running_mean = 0.2 * torch.randn(len(module.weight), generator=generator)
            module.running_var = 0.5 + torch.rand(len(module.weight), generator=generator)
    for parameter in (m.weight for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)):
        parameter.data = torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5
    return fold_batch_norm(model, Normalization((120, 119, 7), 61.0))


def quantized(bits=4, activation_bits=8, between=False, **options):
    """bits: one number, None for FP32, or a function of the layer's place; between: every other channel's zero-point
    lies between two codes; options: those of `weight_grid`."""
    network = small_network()
    choose = bits if callable(bits) else lambda _: bits
    changes = {}
    for i, (name, weight) in enumerate(network.weights.items()):
        grid = None if choose(i) is None else quantization.weight_grid(weight, choose(i), **options)
        if between:
            zeros = torch.where(torch.arange(len(weight)) % 2 == 1, 0.5, grid.zero_point)
            grid = dataclasses.replace(grid, zero_point=zeros)
        changes[name] = quantization.quantize_layer(weight, network.biases[name], grid)
    result = quantization.with_layers(quantization.float_network(network), changes)
    if activation_bits is None:
        return result
    grids = {
        op.name: quantization.make_grid(activation_bits, torch.tensor(0.0 if op.unsigned else -3.7), torch.tensor(5.1))
        for op in network.ops[:-1]
    }
    return quantization.QuantizedNetwork(result.architecture, result.normalization, result.ops, result.layers, grids)


CASES = {
    "w32a32": {"bits": None, "activation_bits": None},
    "w32a8": {"bits": None},
    "w4a32": {"activation_bits": None},
    "w4a8": {},
    "w4a8 per tensor": {"per_channel": False},
    "w4a8 symmetric": {"symmetric": True},
    "w3a4 symmetric per tensor": {"bits": 3, "activation_bits": 4, "symmetric": True, "per_channel": False},
    "w2a2": {"bits": 2, "activation_bits": 2},
    "w8a8": {"bits": 8},
    "w1a8 between codes": {"bits": 1, "between": True},
    "w2a4 between codes": {"bits": 2, "activation_bits": 4, "between": True},
    "mixed": {"bits": lambda i: (8, 6, 5, 4, 3, 2, 7)[i % 7]},
    "mixed with FP32": {"bits": lambda i: (None, 6, 2)[i % 3], "activation_bits": 6},
}


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("coded", [False, True], ids=["packed", "entropy"])
@pytest.mark.parametrize("case", CASES)
def test_a_packed_file_gives_the_same_logits(case, coded, images, tmp_path):
    network, path = quantized(**CASES[case]), tmp_path / "new" / "model.safetensors"
    sizes = save_packed(network, path, INFO, entropy=coded)
    loaded, info = load_packed(path)
    assert info == INFO
    assert (loaded.architecture, loaded.normalization, loaded.ops) == (
        network.architecture,
        network.normalization,
        network.ops,
    )
    for name, layer in network.layers.items():
        assert torch.equal(loaded.layers[name].codes, layer.codes)
        assert layer.grid is None or layer.grid.parts == loaded.layers[name].grid.parts == 1 + ("between" in case)
        assert torch.equal(loaded.layers[name].weight, layer.weight)
    expected = quantization.predictor(network)(images)
    assert expected.std() > 0
    assert torch.equal(quantization.predictor(loaded)(images), expected)
    assert sizes == size_report(read_packed(path))
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("coded", [False, True], ids=["packed", "entropy"])
@pytest.mark.parametrize("case", CASES)
def test_reported_bytes_are_the_bytes_of_the_file(case, coded, tmp_path):
    network, path = quantized(**CASES[case]), tmp_path / "model.safetensors"
    sizes = save_packed(network, path, INFO, entropy=coded)
    content = path.read_bytes()
    assert sizes.total_bytes == len(content) == round(sizes.model_size_mb * 1e6)
    assert sizes.header_bytes == 8 + int.from_bytes(content[:8], "little")
    with safe_open(path, "pt") as file:  # safetensors' own reader
        blobs = {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118
    total = {key: sum(getattr(row, f"{key}_bytes") for row in sizes.rows) for key in ("scale", "zero_point", "float")}
    assert total["scale"] == blobs.get("scales", 0)
    assert total["zero_point"] == blobs.get("zero_points", 0)
    assert total["float"] == blobs.get("biases", 0) + blobs.get("floats", 0)
    assert sizes.grid_bytes == blobs.get("grids", 0)
    weights = {name: layer.codes.numel() for name, layer in network.layers.items()}
    assert {row.name: row.numel for row in sizes.rows} == weights
    plain = {  # worked out from the network alone
        name: math.ceil(layer.codes.numel() * layer.grid.bits / 8)
        for name, layer in network.layers.items()
        if layer.grid
    }
    lanes = 2 * entropy.LANES if "stream" in blobs else 0  # what the lanes may carry from one layer to the next
    assert all(row.code_bytes <= plain.get(row.name, 0) + lanes for row in sizes.rows)
    assert sum(row.code_bytes for row in sizes.rows) + sizes.table_bytes <= sum(plain.values())
    if not coded:
        assert sum(row.code_bytes for row in sizes.rows) == blobs.get("codes", 0) == sum(plain.values())
    held = sum(
        row.code_bytes + row.scale_bytes + row.zero_point_bytes + row.numel * 4 * (row.bits == 32) for row in sizes.rows
    )
    assert sizes.compression_ratio_weights == 4 * sum(weights.values()) / (held + sizes.table_bytes)


def test_width_one_agrees_with_the_ledger():
    """2,202,560 weights, 17,056 normalised channels with four numbers and 52 counters, ten classes."""
    with torch.device("meta"):
        state = MobileNetV2(Architecture()).state_dict()
    assert fp32_state_bytes(state) == 4 * (2_202_560 + 4 * 17_056 + 10) + 8 * 52 == 9_083_592


def test_symmetric_grids_need_no_zero_points_and_entropy_coding_pays(tmp_path):
    asymmetric = save_packed(quantized(4), tmp_path / "a", INFO)
    symmetric = save_packed(quantized(4, symmetric=True), tmp_path / "s", INFO)
    coded = save_packed(quantized(4, symmetric=True), tmp_path / "c", INFO, entropy=True)
    assert sum(row.zero_point_bytes for row in symmetric.rows) == 0
    assert coded.total_bytes < symmetric.total_bytes < asymmetric.total_bytes


def test_equal_codes_take_no_room_in_the_stream(images, tmp_path):
    """A dead layer's stream has length 0, which is not the same as 'not coded'."""
    network = quantized(4, None)
    name = "features.1.conv.1"
    grid = quantization.weight_grid(network.layers[name].weight, 4)
    dead = quantization.Layer(grid.zero_point.to(torch.uint8).view(-1, 1, 1, 1).expand_as(network.layers[name].codes),
                              grid, network.layers[name].bias)  # fmt: skip
    network = quantization.with_layers(network, {name: dead})
    assert len(grid.zero_point.unique()) > 1  # the codes differ, but not from their channels' zero-points
    sizes = save_packed(network, tmp_path / "m", INFO, entropy=True)
    assert [row.code_bytes for row in sizes.rows if row.name == name] == [0]
    loaded, _ = load_packed(tmp_path / "m")
    assert torch.equal(quantization.predictor(loaded)(images), quantization.predictor(network)(images))
    assert size_report(read_packed(tmp_path / "m")) == sizes


def test_activation_bytes_are_counted_by_hand(tmp_path):
    sizes = save_packed(quantized(4, 4), tmp_path / "m", INFO)
    network = quantized(4, 4)
    elements = value_sizes(network.ops, {name: layer.codes for name, layer in network.layers.items()})
    accumulated = {op.inputs[1] for op in network.ops if op.kind == "add"}  # sides of sums, never stored
    assert accumulated
    counts = {name: count for name, count in elements.items() if name not in {"input", "classifier.1", *accumulated}}
    assert sizes.fp32_activation_bytes == 4 * (3072 + sum(counts.values()) + 10)
    assert sizes.activation_bytes == 3072 + sum(math.ceil(count / 2) for count in counts.values()) + 40
    assert 7 < sizes.compression_ratio_activations < 8
    # The peak: the second stage's 48 hidden channels at 32 x 32, before and after the depthwise convolution.
    widest = max(elements.values())
    assert sizes.fp32_peak_activation_bytes >= 4 * widest
    assert sizes.peak_activation_bytes < sizes.fp32_peak_activation_bytes
    weights_only = save_packed(quantized(4, None), tmp_path / "m", INFO)
    assert weights_only.compression_ratio_activations == weights_only.compression_ratio_peak_activations == 1.0


# ------------------------------------------------------------------------------------------------- files that are bad


def refused(path):
    with pytest.raises(UserError) as caught:
        load_packed(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


@pytest.fixture(scope="module", params=[False, True], ids=["packed", "entropy"])
def good(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "good.safetensors"
    save_packed(quantized(lambda i: (None, 3, 4)[min(i, 2)]), path, INFO, entropy=request.param)
    return path.read_bytes()


def test_every_truncation_is_refused(good, tmp_path):
    path = tmp_path / "cut.safetensors"
    header = 8 + int.from_bytes(good[:8], "little")
    for length in [*range(0, 40), *range(40, header + 40, 97), *range(header, len(good), 5003), len(good) - 1]:
        path.write_bytes(good[:length])
        refused(path)
    path.write_bytes(good + b"\0")
    refused(path)


def test_every_flipped_bit_is_refused(good, tmp_path):
    path = tmp_path / "flipped.safetensors"
    path.write_bytes(good)
    header = 8 + int.from_bytes(good[:8], "little")
    random = np.random.default_rng(0)
    for place in [*range(header), *random.integers(header, len(good), 100).tolist()]:
        flipped = good[place] ^ 1 << int(random.integers(8))
        with open(path, "r+b") as file:
            for byte in (flipped, good[place]):
                file.seek(place)
                file.write(bytes([byte]))
                file.flush()
                if byte == flipped:
                    refused(path)
    load_packed(path)  # all bits are back


def test_foreign_files_are_refused(good, tmp_path):
    path = tmp_path / "x.safetensors"
    assert "does not exist" in refused(path)
    assert "is a folder" in refused(tmp_path)
    random = np.random.default_rng(0)
    for content in (b"", b"\0" * 8, b"\xff" * 5000, random.bytes(9), random.bytes(70_000), b"\2\0\0\0\0\0\0\0{}"):
        path.write_bytes(content)
        assert "not a packed model" in refused(path)
    save_file({"codes": torch.zeros(5, dtype=torch.uint8)}, path, {"packed": "{}"})
    assert "not a packed model" in refused(path)
    torch.save({"a": torch.zeros(3)}, path)
    assert "not a packed model" in refused(path)
    with open(path, "wb") as file:  # says that it is large, and is
        file.write((10**9).to_bytes(8, "little"))
        file.truncate(10**12)
    assert "not a packed model" in refused(path)
    with open(path, "wb") as file:  # begins like ours, and goes on for a terabyte
        file.write(good)
        file.truncate(10**12)
    assert "not a packed model" in refused(path)


def test_a_change_of_the_metadata_alone_is_refused(good, tmp_path):
    """The same tensors written by safetensors, with another normalisation: well-formed, but not what was packed."""
    path = tmp_path / "edited.safetensors"
    path.write_bytes(good)
    with safe_open(path, "pt") as file:
        tensors, header = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()["packed"]  # noqa: SIM118
    save_file(tensors, path, {"packed": header.replace('"std":61.0', '"std":62.0')})
    assert "damaged or was edited" in refused(path)


def resigned(content, edit):
    """The file with its manifest and blobs edited and a digest that fits them: what only its lengths can betray."""
    from safetensors.torch import load

    size = int.from_bytes(content[:8], "little")
    document = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["packed"])
    blobs = load(content)
    edit(document, blobs)
    return compression.sign(compression.serialise({**document, "sha256": "0" * 64}, blobs))


LIES = {
    "format": lambda d, b: d.update(format="other"),
    "version": lambda d, b: d.update(version=99),
    "no info": lambda d, b: d.pop("info"),
    "more bits": lambda d, b: d.update(bits=d["bits"].replace("4", "8")),
    "bits out of range": lambda d, b: d.update(bits=d["bits"].replace("4", "9")),
    "one layer less": lambda d, b: d.update(bits=d["bits"][:-1]),
    "per tensor": lambda d, b: d.update(per_channel="0" * len(d["per_channel"])),
    "no zero-points": lambda d, b: d.update(middle="1" * len(d["middle"])),
    "wider": lambda d, b: d["architecture"].update(width_mult=0.5),
    "endless": lambda d, b: d["architecture"].update(width_mult=1e300),
    "negative": lambda d, b: d["architecture"].update(width_mult=-1.0, num_classes=-5),
    "more classes": lambda d, b: d["architecture"].update(num_classes=10**15),
    "not a number": lambda d, b: d["architecture"].update(width_mult="much"),
    "std": lambda d, b: d["normalization"].update(std=0.0),
    "mean": lambda d, b: d["normalization"].update(mean=[1, 2]),
    "coded": lambda d, b: d.update(coded=[10**18] * len(d["bits"])),
    "codes cut": lambda d, b: b.update(scales=b["scales"][:-1].clone()),
    "scales longer": lambda d, b: b.update(scales=torch.cat([b["scales"], b["scales"]])),
    "scales of another type": lambda d, b: b.update(scales=b["scales"].float()),
    "scales infinite": lambda d, b: b.update(scales=b["scales"] * torch.inf),
    "grids cut": lambda d, b: b.update(grids=b["grids"][:-4].clone()),
    "grids of 200 bits": lambda d, b: b.update(grids=torch.full_like(b["grids"], 200)),
    "surplus": lambda d, b: b.update(more=torch.zeros(3)),
    "deflated": lambda d, b: d.update(deflated=["grids"]),
    "deflated or not": lambda d, b: d.pop("deflated", None) or d.update(deflated=["scales"]),
    "no floats": lambda d, b: b.pop("floats"),
}


def test_few_bytes_that_would_make_endless_codes_are_refused(tmp_path, monkeypatch):
    """A table of one symbol takes nothing from the stream, however many codes there are."""
    network, path = quantized(4), tmp_path / "bomb.safetensors"
    same = {
        name: dataclasses.replace(layer, codes=torch.zeros_like(layer.codes)) for name, layer in network.layers.items()
    }
    save_packed(quantization.with_layers(network, same), path, INFO, entropy=True)
    load_packed(path)
    monkeypatch.setattr(compression, "MOST_CODES", 1000)
    assert "more codes than" in refused(path)


@pytest.mark.parametrize("lie", LIES)
def test_lies_under_a_valid_digest_are_refused(lie, good, tmp_path):
    path = tmp_path / "lie.safetensors"
    path.write_bytes(resigned(good, lambda document, blobs: None))
    assert load_packed(path)[1] == INFO  # signing again without a change is no damage
    path.write_bytes(resigned(good, LIES[lie]))
    assert "not a packed model that this version can read" in refused(path)


def test_saving_refuses_what_it_cannot_hold_and_leaves_the_old_file(good, tmp_path):
    path = tmp_path / "old.safetensors"
    path.write_bytes(good)
    network = quantized(4)
    name = next(iter(network.layers))
    layer = network.layers[name]
    third = torch.tensor(1 / 3)
    bad_bias = quantization.Layer(layer.codes, layer.grid, layer.bias + third)
    bad_scale = quantization.Layer(
        layer.codes, quantization.Grid(4, layer.grid.scale * third, layer.grid.zero_point), layer.bias
    )
    for bad in (bad_bias, bad_scale):
        with pytest.raises(ValueError, match="not exact in float16"):
            save_packed(quantization.with_layers(network, {name: bad}), path, INFO)
    with pytest.raises(ValueError, match="not the operations"):
        save_packed(dataclasses.replace(network, ops=network.ops[:-1]), path, INFO)
    with pytest.raises(TypeError):
        save_packed(network, path, {"tensor": third})
    with pytest.raises(ValueError, match="too long"):
        save_packed(network, path, {"text": "x" * 2**20})
    with pytest.raises(UserError, match="is a folder"):
        save_packed(network, tmp_path, INFO)
    assert path.read_bytes() == good and list(tmp_path.iterdir()) == [path]


def test_the_file_is_the_same_each_time(tmp_path):
    for name in ("a", "b"):
        save_packed(quantized(4), tmp_path / name, INFO, entropy=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
