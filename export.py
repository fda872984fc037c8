"""Exports a packed file to ONNX, for onnxruntime and other programs that run integer kernels.

examples:
  python export.py --packed w4a8.safetensors --output w4a8.onnx
  python export.py --packed w4a8.safetensors --output w4a8.onnx --data-dir D     and measure it there: onnxruntime

The model takes uint8 images [N, 3, 32, 32] as they are (`image`) and returns float32 `logits`; the normalisation is
inside. Quantization is written as QDQ: QuantizeLinear and DequantizeLinear around floating-point operations (ONNX
opset 21), which a runtime fuses into integer kernels. Weights and grids are those of the packed file; a sum that stays
in the accumulator here has no quantizer there either. Logits may differ in the last codes: integer kernels round biases
more coarsely (`weight_and_bias`), and a tie may be rounded the other way.

Weights are int8, one byte each, whatever their bits: code - zero_point fits, so that they need no zero-points and the
fast kernels take them (in half steps where a zero-point lies between two codes). Asymmetric 8-bit weights are the
exception: they become uint8 with a zero-point per channel, which onnxruntime computes correctly but slowly; quantize
with --symmetric for speed.
"""

if __name__ == "__main__":
    import startup  # noqa: F401 - first of all, see there

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

import data
import subject as subjects
from cli import option, parse
from compression import load_packed
from errors import UserError, optional_import, run_main
from evaluation import score
from files import check_writable, same_file, write_bytes
from network import INPUT
from packing import pack_bits
from quantization import Grid, Layer, QuantizedNetwork, predictor

OPSET, IR_VERSION = 21, 10  # the first that have 4-bit numbers; onnxruntime 1.18 and newer read them
SAFE_CODE = 64  # two products of larger int8 weights and uint8 activations overflow the int16 of AVX2's kernels
BATCH = 32  # images at once while measuring: activations stay in the cache


@dataclass(frozen=True)
class Settings:
    """The command line of export.py."""

    packed: Path | None = option(None, "the packed file, as test.py --save-packed and train.py --qat write it")
    output: Path | None = option(None, "where the ONNX model goes (default: beside the packed file, .onnx)")
    four_bit: bool = option(
        False, "weights of 4 bits and fewer as 4-bit numbers: half the file; onnxruntime computes in float32 then"
    )
    dataset: str | None = option(None, "data set to measure on (default: found from DATA_DIR)", choices=data.DATASETS)
    data_dir: Path | None = option(None, "folder of a data set: the exported model is measured on its test images")


def main() -> int:
    settings = parse(Settings, __doc__, sys.argv[1:])
    if settings.packed is None:
        raise UserError("--packed is missing; give a file that test.py --save-packed or train.py --qat wrote")
    network, info = load_packed(settings.packed)
    output = settings.output or settings.packed.with_suffix(".onnx")
    if same_file(settings.packed, output):
        raise UserError(f"--output is {output}, which is read here; give it another name")
    check_writable(output)
    model = to_onnx(network, settings.four_bit, {"classes": json.dumps(info.get("classes") or ())})
    write_bytes(output, model.SerializeToString(deterministic=True))
    sizes = [path.stat().st_size / 1e6 for path in (output, settings.packed)]
    print(f"wrote {output}: {sizes[0]:.3f} MB ({settings.packed} has {sizes[1]:.3f} MB)")
    if settings.data_dir or settings.dataset:
        folder = settings.data_dir or Path("data")
        _, classes, hint = subjects.origin(settings.packed, info)
        found = subjects.load_data(settings.dataset, folder, settings.packed, hint, classes)
        print(f"here:        {measured(predictor(network), found.test)}")
        print(f"onnxruntime: {measured(in_onnxruntime(output), found.test)}")
    return 0


def measured(forward: Callable[[Tensor], Tensor], test: data.Split) -> str:
    """Accuracy on the test images, and the speed."""
    forward(test.images[:BATCH])  # warm-up
    begun = time.perf_counter()
    accuracy = score(forward, test, BATCH, "cpu").accuracy
    return f"test accuracy {accuracy:.2f} %, {len(test) / (time.perf_counter() - begun):.0f} images/s"


def in_onnxruntime(path: Path) -> Callable[[Tensor], Tensor]:
    """uint8 images [B, 3, 32, 32] → logits [B, classes] of an exported model, on as many threads as torch has."""
    runtime = optional_import("onnxruntime", "measuring an exported model")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"image": images.numpy()})[0])


# ----------------------------------------------------------------------------------------------------------- the graph


@dataclass(frozen=True)
class Graph:
    """An ONNX graph while it grows. Every method returns the name of the value that it adds."""

    onnx: ModuleType
    nodes: list[Any] = field(default_factory=list)
    constants: list[Any] = field(default_factory=list)

    def constant(self, name: str, numbers: Any) -> str:
        """float32."""
        array = np.array(torch.as_tensor(numbers).numpy(), np.float32, order="C")
        self.constants.append(self.onnx.numpy_helper.from_array(array, name))
        return name

    def codes(self, name: str, codes: Tensor, kind: str) -> str:
        """Integers. UINT4: two to a byte, the first one low, as `pack_bits` has them."""
        content = pack_bits(codes.to(torch.uint8), 4) if kind == "UINT4" else codes.to(getattr(torch, kind.lower()))
        raw = content.contiguous().numpy().tobytes()
        kind = getattr(self.onnx.TensorProto, kind)
        self.constants.append(self.onnx.helper.make_tensor(name, kind, tuple(codes.shape), raw, raw=True))
        return name

    def node(self, kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [name], name, **attributes))
        return name


def to_onnx(network: QuantizedNetwork, four_bit: bool = False, metadata: dict[str, str] | None = None) -> Any:
    """The network as an onnx.ModelProto, checked by ONNX's own checker. four_bit: weights of at most 4 bits as uint4.

    UserError where the package onnx is not installed."""
    onnx = optional_import("onnx", "export.py")
    graph, last = Graph(onnx), network.ops[-1]
    real = {INPUT: normalized_image(graph, network)}  # value → name of its real numbers
    scales = {INPUT: 1 / network.normalization.std}
    for op in network.ops:
        inputs, grid = [real[name] for name in op.inputs], network.activations.get(op.name)
        scales[op.name] = float(grid.scale) if grid else 1.0
        name = "logits" if op is last and not grid else op.name
        if op.has_weight:
            layer = network.layers[op.name]
            clipped = grid is not None and grid.bits < 8
            input_scale = scales[op.inputs[0]] if network.activations and not clipped else None
            inputs += weight_and_bias(graph, op.name, layer, input_scale, four_bit)
        if op.kind == "conv":
            shape = dict(strides=[op.stride] * 2, pads=[op.padding] * 4, group=op.groups)
            y = graph.node("Conv", inputs, name, **shape)
        elif op.kind == "linear":
            y = graph.node("Gemm", inputs, name, transB=1)
        elif op.kind == "pool":
            y = graph.node("Flatten", [graph.node("GlobalAveragePool", inputs, f"{name}/mean")], name)
        else:
            y = graph.node("Add", inputs, name)
        if grid:
            y = on_grid(graph, op.name, y, grid)
        elif op.relu6:
            y = clip(graph, f"{name}/relu6", y, 0, 6)
        real[op.name] = y
    return finished(graph, real[last.name], len(network.layers[last.name].bias), metadata or {})


def normalized_image(graph: Graph, network: QuantizedNetwork) -> str:
    """The pixels are exact integers around the mean colour, which no grid with one zero-point could be."""
    pixels = graph.node("Cast", ["image"], "image/pixels", to=graph.onnx.TensorProto.FLOAT)
    mean = graph.constant("image/mean", np.reshape(network.normalization.mean, (1, 3, 1, 1)))
    centred = graph.node("Sub", [pixels, mean], "image/centred")
    return graph.node("Div", [centred, graph.constant("image/std", network.normalization.std)], "image/normalized")


def weight_and_bias(graph: Graph, name: str, layer: Layer, input_scale: float | None, four_bit: bool) -> list[str]:
    """A layer's parameters, as float32 or as codes behind DequantizeLinear. input_scale: None where no integer kernel
    can take the layer, because its output needs a Clip (4-bit weights have none either).

    Where int8 (or uint4) has more room than the codes need, all codes are shifted to the left and the scales divided:
    integer kernels add the bias as int32 at the scale of the sums, and a finer scale rounds it less. Other biases are
    int32 at a scale of their own, because onnxruntime would round float32 ones to the scale of the sums."""
    grid = layer.grid
    if grid is None:
        return [graph.constant(f"{name}/weight", layer.codes), graph.constant(f"{name}/bias", layer.bias)]
    zero_points, codes = (grid.zero_point * grid.parts).int(), layer.codes.int() * grid.parts
    centred = (grid.parts * (layer.codes - grid.shaped(codes.ndim)[1])).int()
    bits = grid.bits + grid.parts - 1  # of half steps, where a zero-point lies between two codes
    if four_bit and bits <= 4:
        kind, shift = "UINT4", 4 - bits
    elif -128 <= centred.min() and centred.max() <= 127:
        room = [k for k in range(8) if int(centred.abs().max()) << k <= SAFE_CODE]
        kind, codes, zero_points, shift = "INT8", centred, torch.zeros_like(zero_points), max(room, default=0)
    else:
        kind, shift = "UINT8", 0
    axis = {"axis": 0} if grid.scale.ndim else {}
    scale = grid.scale / grid.parts / 2**shift
    weight = [graph.codes(f"{name}/codes", codes << shift, kind), graph.constant(f"{name}/scale", scale)]
    weight.append(graph.codes(f"{name}/zero_point", zero_points << shift, kind))
    if input_scale is None or kind == "UINT4":
        axis_of_bias, unit = {}, layer.bias.double().abs().max().clamp(min=1e-30) / 2**30
    else:
        axis_of_bias, unit = axis, scale.double() * input_scale
    bias = [graph.codes(f"{name}/bias_codes", (layer.bias.double() / unit).round(), "INT32")]
    bias.append(graph.constant(f"{name}/bias_scale", unit))
    return [
        graph.node("DequantizeLinear", weight, f"{name}/weight", **axis),
        graph.node("DequantizeLinear", bias, f"{name}/bias", **axis_of_bias),
    ]


def on_grid(graph: Graph, name: str, y: str, grid: Grid) -> str:
    """The value moved to its grid. Codes are uint8 whatever the bits: a Clip before keeps them below 2^bits. The grid's
    ends are ReLU6's too."""
    scale, zero_point = float(grid.scale), int(grid.zero_point)
    if grid.bits < 8:
        y = clip(graph, f"{name}/clipped", y, -zero_point * scale, (grid.highest - zero_point) * scale)
    parts = [graph.constant(f"{name}/grid_scale", scale)]
    parts.append(graph.codes(f"{name}/grid_zero_point", grid.zero_point, "UINT8"))
    codes = graph.node("QuantizeLinear", [y, *parts], f"{name}/quantized")
    return graph.node("DequantizeLinear", [codes, *parts], f"{name}/real")


def clip(graph: Graph, name: str, y: str, low: float, high: float) -> str:
    return graph.node("Clip", [y, graph.constant(f"{name}/low", low), graph.constant(f"{name}/high", high)], name)


def finished(graph: Graph, logits: str, classes: int, metadata: dict[str, str]) -> Any:
    """The model around the graph."""
    onnx = graph.onnx
    helper, kinds = onnx.helper, onnx.TensorProto
    image = helper.make_tensor_value_info("image", kinds.UINT8, ["batch", 3, 32, 32])
    result = helper.make_tensor_value_info(logits, kinds.FLOAT, ["batch", classes])
    content = helper.make_graph(graph.nodes, "mobilenetv2", [image], [result], graph.constants)
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(content, opset_imports=opsets, ir_version=IR_VERSION, producer_name="mobilenetv2-cifar")
    helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    return model


if __name__ == "__main__":
    run_main(main)
