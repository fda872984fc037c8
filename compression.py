"""The packed file: a quantized network stored densely in one small safetensors file.

A few flat blobs hold the layers' data in the order of the operations, which the architecture determines; the header
holds one JSON manifest:

    codes        uint8    every layer's codes at its own width (`pack_bits`), each layer starting on a byte boundary
    stream       uint8    with entropy coding: the layers it makes smaller (entropy.py); tables: their frequencies
    scales       float16  [out] a layer, or [1] per tensor
    zero_points  uint8    packed like the codes, in half steps with b + 1 bits where one lies between two codes; omitted
                          for layers whose zero-points are all 2^(b-1)
    biases       float16  of the quantized layers
    floats       float32  weight, then bias, of every layer that stays in FP32
    grids        uint8    4 bytes per activation: bits (0: FP32), zero-point, scale (float16, little-endian)

With entropy coding, scales, zero_points and biases are deflated (zlib; then uint8) where that makes them smaller.

The manifest holds a SHA-256 of the whole file (with the digest itself read as 64 zeros), so a truncated, edited or
damaged file is rejected before any of it is used; lengths and ranges are checked next.
"""

import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import entropy as entropy_coder
from data import Normalization
from errors import UserError, reason
from files import obstacle, write_bytes
from models import Architecture, skeleton
from network import Op, operations, weighted
from packing import pack_bits, packed_bytes, unpack_bits
from quantization import BIAS_FRACTION_BITS, Grid, Layer, QuantizedNetwork
from sizes import LayerSize, SizeReport, activation_sizes, fp32_state_bytes, shared_out

FORMAT = "mobilenetv2-cifar-packed"
# Version of the format → the network's bias_fraction_bits. Since version 3 zero-points may lie between codes.
VERSIONS = {1: 0, 2: BIAS_FRACTION_BITS, 3: BIAS_FRACTION_BITS}
MARK = b'{\\"sha256\\":\\"'  # the manifest begins with its digest; quotes are escaped, for it is JSON within JSON
BLANK = b"0" * 64
MOST_HEADER_BYTES, MOST_BYTES = 2**20, 2**31  # larger files cannot be ours and are not read
# Blobs that may be deflated → their dtype once inflated.
DEFLATED = {"scales": torch.float16, "zero_points": torch.uint8, "biases": torch.float16}
MOST_INFLATED_BYTES = 2**24
MOST_CODES = 2**26  # upper bound on decoded codes (a few bytes can decode to any number): twice the weights at width 4


# ----------------------------------------------------------------------------------------------------- the packed file


@dataclass(frozen=True)
class LayerFormat:
    """What the manifest says of one layer. bits: 0 for FP32. per_channel: a scale for each output channel. middle: all
    zero-points are 2^(b-1) and left out. halves: zero-points are in half steps. coded: bytes in the entropy coder's
    stream, None where the codes are packed in `codes`."""

    bits: int
    per_channel: bool = False
    middle: bool = False
    halves: bool = False
    coded: int | None = None


@dataclass(frozen=True)
class Packed:
    """Everything in a packed file. formats: one per weighted layer, in order; deflated: names of blobs;
    total_bytes: the file's size."""

    network: QuantizedNetwork
    formats: tuple[LayerFormat, ...]
    blobs: Mapping[str, Tensor]
    deflated: tuple[str, ...]
    info: dict[str, Any]
    total_bytes: int


def save_packed(network: QuantizedNetwork, path: Path, info: Mapping[str, Any], entropy: bool = False) -> SizeReport:
    """Writes the packed file atomically and reports its sizes. info: anything JSON can hold (data set, class names,
    settings); comes back from `load_packed` (tuples as lists). entropy: codes the codes losslessly where that is
    smaller. ValueError for a network that the file cannot hold exactly (scales or biases beyond float16, operations
    that are not the architecture's); TypeError where info is not JSON. The old file stays then."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; give a file name for the packed model")
    choices = [to_blobs(network, coded) for coded in ((False, True) if entropy else (False,))]
    contents = [serialise(manifest(network, formats, deflated, info), blobs) for formats, deflated, blobs in choices]
    content = min(contents, key=len)  # a tiny network may not pay for the tables
    formats, deflated, blobs = choices[contents.index(content)]
    content = sign(content)
    write_bytes(path, content)
    sizes = size_report(Packed(network, formats, blobs, deflated, dict(info), len(content)))
    assert sizes.total_bytes == path.stat().st_size, "the report misses bytes of the file"
    return sizes


def load_packed(path: Path) -> tuple[QuantizedNetwork, dict[str, Any]]:
    """(network, info) of a packed file; the network's logits are bit for bit those of the one that was saved.
    UserError as in `read_packed`."""
    packed = read_packed(path)
    return packed.network, packed.info


def from_zero_point(codes: Tensor, grid: Grid, direction: int) -> Tensor:
    """Codes [out, k] minus (direction -1) or plus (+1: the inverse) their channel's zero-point, modulo 2^b: with the
    zeros of all channels aligned, a layer's codes are distributed more narrowly and one table serves all channels. Of a
    zero-point between two codes the lower one counts."""
    zero_points = grid.zero_point.cpu().floor().int().reshape(-1, 1)
    return ((codes.int() + direction * zero_points) & grid.highest).to(torch.uint8)


def to_blobs(
    network: QuantizedNetwork, entropy: bool
) -> tuple[tuple[LayerFormat, ...], tuple[str, ...], dict[str, Tensor]]:
    """The formats, the names of the deflated blobs, and the blobs that are not empty."""
    parts: dict[str, list[Tensor]] = {name: [] for name in ("codes", "scales", "zero_points", "biases", "floats")}
    if network.ops != operations(network.architecture):
        raise ValueError("these are not the operations of the architecture, from which the file's reader derives them")
    formats: list[LayerFormat] = []
    to_code: dict[int, tuple[np.ndarray, int]] = {}
    for op in weighted(network.ops):
        layer, grid = network.layers[op.name], network.layers[op.name].grid
        if grid is None:
            parts["floats"] += [layer.codes.detach().float().cpu().reshape(-1), layer.bias.detach().float().cpu()]
            formats.append(LayerFormat(0))
            continue
        form, symbols = layer_format(layer, entropy)
        if symbols is None:
            parts["codes"].append(pack_bits(layer.codes, grid.bits))
        else:
            to_code[len(formats)] = (symbols, grid.bits)
        formats.append(form)
        parts["scales"].append(exact_half(grid.scale, f"{op.name}: scales"))
        parts["biases"].append(exact_half(layer.bias, f"{op.name}: biases"))
        if not form.middle:
            parts["zero_points"].append(pack_bits(zero_codes(grid), grid.bits + form.halves))
    blobs = {name: torch.cat(tensors) for name, tensors in parts.items() if tensors}
    smaller = {name: deflated_blob(blobs[name]) for name in DEFLATED if entropy and name in blobs}
    smaller = {name: blob for name, blob in smaller.items() if len(blob) < blobs[name].nbytes}
    blobs |= smaller
    if to_code:
        result = entropy_coder.encode(list(to_code.values()))
        for i, length in zip(to_code, result.lengths, strict=True):
            formats[i] = replace(formats[i], coded=length)
        blobs["stream"], blobs["tables"] = as_bytes(result.stream), as_bytes(result.tables)
    if network.activations:
        if surplus := set(network.activations) - {op.name for op in network.ops}:
            raise ValueError(f"activation grids of values that are not there: {sorted(surplus)}")
        blobs["grids"] = as_bytes(b"".join(pack_grid(network.activations.get(op.name)) for op in network.ops))
    return tuple(formats), tuple(smaller), blobs


def layer_format(layer: Layer, entropy: bool) -> tuple[LayerFormat, np.ndarray | None]:
    """How a quantized layer is stored, and the symbols to code where entropy coding makes it smaller (None: packed).
    `coded` is a forecast until the stream is written."""
    grid, coded = layer.grid, None
    middle = bool((grid.zero_point == 2 ** (grid.bits - 1)).all())
    symbols = from_zero_point(layer.codes.cpu().flatten(1), grid, -1).numpy().reshape(-1) if entropy else None
    if entropy:
        coded = math.ceil(entropy_coder.coded_bytes(symbols, grid.bits))
        if coded >= packed_bytes(len(symbols), grid.bits):
            coded = symbols = None
    return LayerFormat(grid.bits, grid.scale.ndim == 1, middle, grid.parts == 2, coded), symbols


def deflated_blob(blob: Tensor) -> Tensor:
    return as_bytes(entropy_coder.deflate(blob.numpy().tobytes(), blob.element_size()))


def inflated_blob(blob: Tensor, dtype: torch.dtype) -> Tensor:
    content = entropy_coder.inflate(blob.numpy().tobytes(), dtype.itemsize, MOST_INFLATED_BYTES)
    return torch.frombuffer(bytearray(content), dtype=dtype)


def exact_half(x: Tensor, what: str) -> Tensor:
    """float16 [n]; ValueError where that is not the same number."""
    half = x.detach().cpu().reshape(-1).half()
    if not torch.equal(half.float(), x.detach().cpu().reshape(-1).float()) or not half.isfinite().all():
        raise ValueError(f"{what} are not exact in float16; round them before evaluating")
    return half


def zero_codes(grid: Grid) -> Tensor:
    """Zero-points as uint8 [n], in half steps where one lies between two codes; ValueError where one is not on its
    grid."""
    flat = grid.zero_point.cpu().reshape(-1)
    if float(flat.min()) < 0 or float(flat.max()) > grid.highest:
        raise ValueError("a zero-point is not a code of its grid")
    return (flat * grid.parts).to(torch.uint8)


def pack_grid(grid: Grid | None) -> bytes:
    if grid is None:
        return bytes(4)
    if not 1 <= grid.bits <= 8 or grid.scale.ndim or grid.parts > 1:
        raise ValueError("activations take one grid of 1 to 8 bits a tensor, its zero-point a code")
    scale = float(exact_half(grid.scale, "an activation's scale"))
    return struct.pack("<BBe", grid.bits, int(zero_codes(grid)), scale)


def unpack_grid(content: bytes) -> Grid | None:
    bits, zero_point, scale = struct.unpack("<BBe", content)
    if bits == 0 and content == bytes(4):
        return None
    return checked(Grid(bits, torch.tensor(scale), torch.tensor(float(zero_point))))


def checked(grid: Grid) -> Grid:
    """The grid, if it is one: else ValueError."""
    inside = 1 <= grid.bits <= 8 and float(grid.zero_point.max()) <= grid.highest
    if not inside or not bool(((grid.scale > 0) & grid.scale.isfinite()).all()):
        raise ValueError("a grid out of range")
    return grid


def as_bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def manifest(
    network: QuantizedNetwork, formats: Sequence[LayerFormat], deflated: Sequence[str], info: Mapping[str, Any]
) -> dict[str, Any]:
    """bits, per_channel, middle, halves: one digit a layer. halves, coded, deflated: present where there is something
    to say."""
    halves = any(form.halves for form in formats)
    names = ("bits", "per_channel", "middle", *(["halves"] if halves else []))
    digits = {key: "".join(str(int(getattr(p, key))) for p in formats) for key in names}
    version = next(v for v, bits in VERSIONS.items() if bits == network.bias_fraction_bits and (v > 2 or not halves))
    coded = [form.coded for form in formats]
    return {
        "sha256": BLANK.decode(),
        "format": FORMAT,
        "version": version,
        "architecture": asdict(network.architecture),
        "normalization": asdict(network.normalization),
        **digits,
        **({} if all(length is None for length in coded) else {"coder": "rans", "coded": coded}),
        **({"deflated": deflated} if deflated else {}),
        "info": dict(info),
    }


def read_formats(document: Mapping[str, Any]) -> tuple[LayerFormat, ...]:
    """The inverse of `manifest` for its layers; ValueError, KeyError or TypeError where they are not what it wrote."""
    allowed = {"bits": "012345678", "per_channel": "01", "middle": "01", "halves": "01"}
    document = {"halves": "0" * len(document["bits"]), **document}
    columns = [[digits.index(digit) for digit in document[key]] for key, digits in allowed.items()]
    coded = document.get("coded", [None] * len(columns[0]))
    if not all(length is None or (type(length) is int and length >= 0) for length in coded):
        raise ValueError("coded lengths out of range")
    rows = zip(*columns, coded, strict=True)
    return tuple(LayerFormat(bits, bool(c), bool(m), bool(h), length) for bits, c, m, h, length in rows)


def serialise(document: Mapping[str, Any], blobs: Mapping[str, Tensor]) -> bytes:
    from safetensors.torch import save

    content = save(dict(blobs), {"packed": json.dumps(document, separators=(",", ":"))})
    if int.from_bytes(content[:8], "little") > MOST_HEADER_BYTES:
        raise ValueError("info is too long for the header of a packed file")
    return content


def digest_place(content: bytes) -> int:
    """Where the digest's 64 digits begin; -1 where there is no manifest."""
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    at = header.find(MARK)
    return at if at < 0 else 8 + at + len(MARK)


def sign(content: bytes) -> bytes:
    """The file with the digest of itself in its place."""
    at = digest_place(content)
    blank = content[:at] + BLANK + content[at + 64 :]
    return content[:at] + hashlib.sha256(blank).hexdigest().encode() + content[at + 64 :]


def read_packed(path: Path) -> Packed:
    """The file's content, all of it checked; its `size_report` is the one that `save_packed` returned.

    UserError, one line, for a file that is missing, damaged, edited, or not a packed model."""
    content = read_bytes(Path(path))
    if sign(content) != content:
        raise UserError(f"{path} is damaged or was edited (checksum mismatch); pack the model again")
    try:
        from safetensors.torch import load

        size = int.from_bytes(content[:8], "little")
        document = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["packed"])
        if document["format"] != FORMAT or document["version"] not in VERSIONS:
            raise ValueError(f"format {document['format']}, version {document['version']}")
        blobs, formats, deflated = load(content), read_formats(document), tuple(document.get("deflated", ()))
        plain = {**blobs, **{name: inflated_blob(blobs[name], DEFLATED[name]) for name in deflated}}
        network = from_blobs(document, formats, plain)
        return Packed(network, formats, blobs, deflated, dict(document["info"]), len(content))
    except Exception as error:  # many types, one meaning: the digest matches, but this program did not write the file
        raise UserError(f"{path} is not a packed model that this version can read ({reason(error)})") from None


def read_bytes(path: Path) -> bytes:
    """The file's content, if its beginning is that of a packed model: a large foreign file is not read whole."""
    if wrong := obstacle(path):
        raise UserError(f"{path} {wrong}; give --packed a file that test.py wrote")
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            size = int.from_bytes(start, "little")
            start += file.read(size) if size <= MOST_HEADER_BYTES else b""
            if digest_place(start) < 0 or path.stat().st_size > MOST_BYTES:
                raise UserError(
                    f"{path} is not a packed model, or is damaged; give --packed a file that test.py wrote, or an FP32 "
                    "checkpoint as --checkpoint"
                )
            return start + file.read()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


class Blobs:
    """The blobs, read from front to back; ValueError where one is too short, too long, or of another type."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors, self.places = tensors, dict.fromkeys(tensors, 0)

    def take(self, name: str, count: int, dtype: torch.dtype) -> Tensor:
        start = self.places.get(name, 0)
        part = self.tensors.get(name, torch.empty(0, dtype=dtype))[start : start + count]
        if part.shape != (count,) or part.dtype != dtype:
            raise ValueError(f"{name}: expected {start + count} or more of {dtype}")
        self.places[name] = start + count
        return part

    def finish(self) -> None:
        for name, place in self.places.items():
            if self.tensors[name].shape != (place,):
                raise ValueError(f"{name}: {self.tensors[name].numel() - place} too many")


def from_blobs(
    document: Mapping[str, Any], formats: Sequence[LayerFormat], tensors: Mapping[str, Tensor]
) -> QuantizedNetwork:
    """The network of a manifest and its blobs; raises some error where they do not agree."""
    architecture = Architecture(**document["architecture"])
    normal = document["normalization"]
    normalization = Normalization(tuple(normal["mean"]), float(normal["std"]))
    ops, blobs = operations(architecture), Blobs(tensors)
    shapes = {name: tensor.shape for name, tensor in skeleton(architecture).state_dict().items()}
    layers = {}
    for op, form in zip(weighted(ops), formats, strict=True):
        shape = shapes[f"{op.name}.weight"]
        count, out = shape.numel(), shape[0]
        if form.bits == 0:
            weight = blobs.take("floats", count, torch.float32).reshape(shape)
            layers[op.name] = Layer(weight, None, blobs.take("floats", out, torch.float32))
            continue
        if form.coded is None:
            packed = blobs.take("codes", packed_bytes(count, form.bits), torch.uint8)
            codes = unpack_bits(packed, form.bits, count).reshape(shape)
        else:
            codes = torch.empty(shape, dtype=torch.uint8, device="meta")  # decoded below, all layers together
        grid = read_grid(blobs, form, out)
        layers[op.name] = Layer(codes, grid, blobs.take("biases", out, torch.float16).float())
    coded = {op.name: p.coded for op, p in zip(weighted(ops), formats, strict=True) if p.coded is not None}
    if sum(layers[name].codes.numel() for name in coded) > MOST_CODES:
        raise ValueError("more codes than any network of ours has")
    if coded:
        layers |= decode_layers(blobs, {name: layers[name] for name in coded}, sum(coded.values()))
    activations = {}
    if "grids" in tensors:
        content = blobs.take("grids", 4 * len(ops), torch.uint8).numpy().tobytes()
        grids = {op.name: unpack_grid(content[4 * i : 4 * i + 4]) for i, op in enumerate(ops)}
        activations = {name: grid for name, grid in grids.items() if grid is not None}
    blobs.finish()
    return QuantizedNetwork(architecture, normalization, ops, layers, activations, VERSIONS[document["version"]])


def read_grid(blobs: Blobs, form: LayerFormat, out: int) -> Grid:
    """A layer's weight grid."""
    channels = out if form.per_channel else 1
    scale = blobs.take("scales", channels, torch.float16).float()
    zeros = torch.full((channels,), 2.0 ** (form.bits - 1))
    if not form.middle:
        bits = form.bits + form.halves
        packed = blobs.take("zero_points", packed_bytes(channels, bits), torch.uint8)
        zeros = unpack_bits(packed, bits, channels).float() / (1 + form.halves)
    return checked(Grid(form.bits, scale, zeros) if form.per_channel else Grid(form.bits, scale[0], zeros[0]))


def decode_layers(blobs: Blobs, layers: Mapping[str, Layer], length: int) -> dict[str, Layer]:
    """The layers with their codes out of the entropy coder's stream of `length` bytes and its states."""
    stream = blobs.take("stream", 4 * entropy_coder.LANES + length, torch.uint8)
    tables = blobs.take("tables", blobs.tensors["tables"].numel(), torch.uint8)
    sizes = [(layer.codes.numel(), layer.grid.bits) for layer in layers.values()]
    decoded = entropy_coder.decode(stream.numpy().tobytes(), tables.numpy().tobytes(), sizes)
    result = {}
    for (name, layer), symbols in zip(layers.items(), decoded, strict=True):
        codes = from_zero_point(torch.from_numpy(symbols).reshape(len(layer.bias), -1), layer.grid, +1)
        result[name] = replace(layer, codes=codes.reshape(layer.codes.shape))
    return result


# ------------------------------------------------------------------------------------------------- the sizes of a file


def size_report(packed: Packed) -> SizeReport:
    """The sizes of a file; the header is what the blobs leave of it."""
    network, blobs = packed.network, packed.blobs
    rows = tuple(
        layer_size(op, network.layers[op.name], p) for op, p in zip(weighted(network.ops), packed.formats, strict=True)
    )
    size = {name: tensor.numel() * tensor.element_size() for name, tensor in blobs.items()}
    tables = size.get("tables", 0) + (4 * entropy_coder.LANES if "stream" in size else 0)
    header = packed.total_bytes - sum(size.values())
    trained = fp32_state_bytes(skeleton(network.architecture).state_dict())
    for name, field in {"scales": "scale_bytes", "zero_points": "zero_point_bytes", "biases": "float_bytes"}.items():
        if name in packed.deflated:
            rows = shared_out(rows, field, size[name])
    return SizeReport(rows, size.get("grids", 0), tables, header, trained, *activation_sizes(network))


def layer_size(op: Op, layer: Layer, form: LayerFormat) -> LayerSize:
    count, out = layer.codes.numel(), len(layer.bias)
    if form.bits == 0:
        return LayerSize(op.name, op.kind, count, 32, 0, 0, 0, 4 * (count + out))
    channels = out if form.per_channel else 1
    codes = packed_bytes(count, form.bits) if form.coded is None else form.coded
    zeros = 0 if form.middle else packed_bytes(channels, form.bits + form.halves)
    return LayerSize(op.name, op.kind, count, form.bits, codes, 2 * channels, zeros, 2 * out)
