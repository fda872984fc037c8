"""One other tool quantizes the neutral network at one pair of bit widths: run by peers.py in that tool's environment.

    python benchmarks/peer_worker.py WORK TOOL WEIGHT_BITS ACTIVATION_BITS REPLY

WORK is the folder that peers.py exported: the FP32 network (`fp32.onnx` with batch norm folded, and the checkpoint's
state for tools that start from torch), normalised images for calibration, validation and test, and their labels. Each
tool is one function that yields `Candidate`s: the settings its documentation recommends for this kind of network. Where
there are several, the choice is made on the checkpoint's held-out validation images; only the chosen one is measured on
the test images. The reply is one JSON object.
"""

import copy
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

BATCH = 256  # images at once when predicting, for every tool
ROOT = Path(__file__).resolve().parent.parent  # the torch tools build the network with the project's own module

REAL = "integers"  # the tool executes integer kernels
FLOAT = "float"  # weights are stored in few bits and turned back to float32 for every batch
SIMULATED = "simulated"  # fake quantization: float32 numbers moved to the grid


@dataclass(frozen=True)
class Candidate:
    """One quantized network. predict: float32 [n, 3, 32, 32] → logits [n, classes]; file: what a user would keep;
    stored: what it holds, "quantized" or what it is instead."""

    settings: str
    predict: Callable[[np.ndarray], np.ndarray]
    seconds: float
    file: Path
    arithmetic: str
    note: str = ""
    stored: str = "quantized"


@dataclass(frozen=True)
class Work:
    """The exported folder, and a folder of this tool's own for what it writes."""

    folder: Path
    own: Path
    options: dict[str, int]

    def images(self, part: str) -> np.ndarray:
        return np.load(self.folder / f"{part}.npy", mmap_mode="r")

    def labels(self, part: str) -> np.ndarray:
        return np.load(self.folder / f"{part}_labels.npy")

    def batches(self, part: str, size: int) -> list[np.ndarray]:
        images = self.images(part)
        return [np.array(images[i : i + size]) for i in range(0, len(images), size)]


# ------------------------------------------------------------------------------------------------------- onnxruntime


def onnxruntime(work: Work, weight_bits: int, activation_bits: int) -> Iterator[Candidate]:
    """Static QDQ. Per-channel weights, unsigned activations (its guide for x86 with VNNI); two kinds of calibration.

    Where weights have fewer than 8 bits, the first and the last layer keep 8.
    """
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        """Batches of calibration images, a range of them at a time: all at once would need too much memory."""

        def __init__(self) -> None:
            self.batches = work.batches("calibration", 64)
            self.rest = iter(self.batches)

        def __len__(self) -> int:
            return len(self.batches)

        def set_range(self, start_index: int, end_index: int) -> None:
            self.rest = iter(self.batches[start_index:end_index])

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.rest, None)
            return None if batch is None else {"input": batch}

    def quantized(name: str, method: CalibrationMethod, asymmetric_weights: bool) -> Candidate:
        begun = time.process_time()
        prepared, path = work.own / "prepared.onnx", work.own / f"{name}.onnx"
        quant_pre_process(str(work.folder / "fp32.onnx"), str(prepared), skip_symbolic_shape=True)
        layers = [n for n in onnx.load(prepared).graph.node if n.op_type in ("Conv", "Gemm")]
        edges = [layers[0], layers[-1]] if weight_bits < 8 else []
        signed, unsigned = {8: (QuantType.QInt8, QuantType.QUInt8), 4: (QuantType.QInt4, QuantType.QUInt4)}[weight_bits]
        quantize_static(
            str(prepared),
            str(path),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            weight_type=unsigned if asymmetric_weights else signed,
            activation_type={8: QuantType.QUInt8, 4: QuantType.QUInt4}[activation_bits],
            calibrate_method=method,
            extra_options={
                "WeightSymmetric": not asymmetric_weights,
                "CalibTensorRangeSymmetric": False,
                "CalibPercentile": 99.99,
                "CalibStridedMinMax": 1,
                "TensorQuantOverrides": {
                    layer.input[1]: [{"quant_type": QuantType.QInt8, "axis": 0}] for layer in edges
                },
            },
        )
        seconds = time.process_time() - begun
        integers = weight_bits == activation_bits == 8
        return Candidate(
            name, onnx_predictor(path, fuse=activation_bits == 8), seconds, path, REAL if integers else FLOAT
        )

    kinds = {"min-max": CalibrationMethod.MinMax, "percentile 99.99": CalibrationMethod.Percentile}
    for name, method in kinds.items():
        yield quantized(f"{name}, symmetric weights", method, False)
        if weight_bits < 8:
            yield quantized(f"{name}, asymmetric weights", method, True)


def onnx_predictor(path: Path, fuse: bool) -> Callable[[np.ndarray], np.ndarray]:
    """`fuse`: let it make integer kernels of QDQ groups; those of 4-bit activations become an invalid graph there."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")  # no saturation on CPUs without VNNI
    if not fuse:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


# ----------------------------------------------------------------------------------------------------- NNCF, OpenVINO


def nncf(work: Work, weight_bits: int, activation_bits: int) -> Iterator[Candidate]:
    """`nncf.quantize` on the OpenVINO model: its default, and the mixed preset with accurate bias correction."""
    import nncf
    import openvino

    core = openvino.Core()
    settings = {openvino.properties.inference_num_threads(): 1, openvino.properties.hint.inference_precision(): "f32"}

    def candidate(name: str, make: Callable[[], openvino.Model]) -> Candidate:
        begun = time.process_time()
        model = make()
        seconds = time.process_time() - begun
        path = work.own / name
        path.mkdir(exist_ok=True)
        openvino.save_model(model, path / "model.xml", compress_to_fp16=False)
        compiled = core.compile_model(path / "model.xml", "CPU", settings)
        arithmetic = REAL if activation_bits == 8 else FLOAT
        return Candidate(name, lambda x: compiled(x)[0], seconds, path, arithmetic)

    def read() -> openvino.Model:
        return core.read_model(work.folder / "fp32.onnx")

    if activation_bits == 32:
        yield candidate("compress_weights INT8_ASYM", lambda: nncf.compress_weights(read()))
        return
    batches = work.batches("calibration", 1)  # its guide calibrates image by image; subset_size counts batches
    for preset, fast in ((nncf.QuantizationPreset.PERFORMANCE, True), (nncf.QuantizationPreset.MIXED, False)):
        yield candidate(
            f"{preset.value}, {'fast' if fast else 'accurate'} bias correction",
            lambda preset=preset, fast=fast: nncf.quantize(
                read(), nncf.Dataset(batches), preset=preset, subset_size=len(batches), fast_bias_correction=fast
            ),
        )


# ------------------------------------------------------------------------------------------------- tools around torch


def torch_model(work: Work, folded: bool = False):
    """The FP32 network in evaluation mode; `folded`: batch norm folded into the convolutions."""
    import torch

    from models import Architecture, skeleton

    model = skeleton(Architecture(**json.loads((work.folder / "architecture.json").read_text())))
    model.load_state_dict(torch.load(work.folder / "fp32.pth", weights_only=True), assign=True)
    model.eval()
    if folded:
        from torch.nn.utils.fusion import fuse_conv_bn_eval

        for parent in list(model.modules()):
            names = list(parent._modules) if isinstance(parent, torch.nn.Sequential) else []
            for name, following in zip(names, names[1:], strict=False):
                if isinstance(parent._modules[following], torch.nn.BatchNorm2d):
                    conv, norm = parent._modules[name], parent._modules[following]
                    parent._modules[name] = fuse_conv_bn_eval(conv, norm)
                    parent._modules[following] = torch.nn.Identity()
    return model.requires_grad_(False)


def torch_predictor(model) -> Callable[[np.ndarray], np.ndarray]:
    import torch

    @torch.inference_mode()
    def predict(images: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(images).contiguous(memory_format=torch.channels_last)).numpy()

    return predict


def aimet(work: Work, weight_bits: int, activation_bits: int) -> Iterator[Candidate]:
    """Batch norm folded, its default configuration (per channel, symmetric weights), nearest and AdaRound.

    Where weights have fewer than 8 bits, the first and the last layer keep 8. AdaRound looks at weights alone, so one
    rounding serves all activation widths; its seconds count in each.
    """
    import torch

    from vision import import_torchvision

    import_torchvision()
    import aimet_torch.onnx
    from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters
    from aimet_torch.batch_norm_fold import fold_all_batch_norms
    from aimet_torch.common.defs import QuantScheme
    from aimet_torch.model_preparer import prepare_model
    from aimet_torch.quantsim import QuantizationSimModel

    image = torch.zeros(1, 3, 32, 32)
    batches = [torch.from_numpy(b) for b in work.batches("calibration", 32)]

    def prepared() -> torch.nn.Module:
        model = prepare_model(torch_model(work))
        fold_all_batch_norms(model, input_shapes=tuple(image.shape))
        return model

    def edges(model: torch.nn.Module) -> list[torch.nn.Module]:
        layers = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
        return [layers[0], layers[-1]]

    def simulated(name: str, model: torch.nn.Module, scheme: QuantScheme, encodings: Path | None) -> Candidate:
        begun = time.process_time()
        sim = QuantizationSimModel(
            model, image, scheme, default_output_bw=activation_bits, default_param_bw=weight_bits
        )
        if weight_bits < 8:
            for layer in edges(sim.model):
                layer.param_quantizers["weight"].bitwidth = 8
        if encodings:
            sim.set_and_freeze_param_encodings(str(encodings))
        sim.compute_encodings(lambda m, _: [m(b) for b in batches], None)
        seconds = time.process_time() - begun
        path, note, stored = work.own / f"{name}.onnx", "", "quantized"
        try:
            aimet_torch.onnx.export(
                copy.deepcopy(sim.model), image, str(path), opset_version=21, dynamo=False, prequantize_constants=True
            )
        except Exception as error:
            note, stored = f"aimet: its ONNX export of quantized weights fails ({type(error).__name__})", "FP32 export"
            exported = work.own / name
            exported.mkdir(exist_ok=True)
            sim.export(str(exported), "model", image)
            path = exported / "model.onnx"  # beside it lie the grids in JSON and copies of the network: not counted
        return Candidate(name, torch_predictor(sim.model), seconds, path, SIMULATED, note, stored)

    schemes = {"tf_enhanced": QuantScheme.post_training_tf_enhanced, "min-max": QuantScheme.post_training_tf}
    for name, scheme in schemes.items():
        yield simulated(f"nearest, {name}", prepared(), scheme, None)
    iterations = work.options["adaround_iterations"]
    if iterations:
        folder = work.folder / f"aimet-adaround-{weight_bits}-{iterations}"
        model = prepared()
        if not (folder / "seconds").exists():
            folder.mkdir(exist_ok=True)
            begun = time.process_time()
            rounded = Adaround.apply_adaround(
                model,
                image,
                AdaroundParameters(batches, len(batches), iterations, forward_fn=lambda m, x: m(x)),
                str(folder),
                "rounded",
                default_param_bw=weight_bits,
                param_bw_override_list=[(layer, 8) for layer in edges(model)] if weight_bits < 8 else None,
            )
            torch.save(rounded.state_dict(), folder / "state.pth")
            (folder / "seconds").write_text(str(time.process_time() - begun))
        model.load_state_dict(torch.load(folder / "state.pth", weights_only=True))
        candidate = simulated(
            f"AdaRound {iterations} iterations, tf_enhanced",
            model,
            QuantScheme.post_training_tf_enhanced,
            folder / "rounded.encodings",
        )
        yield replace(candidate, seconds=candidate.seconds + float((folder / "seconds").read_text()))


def brevitas(work: Work, weight_bits: int, activation_bits: int) -> Iterator[Candidate]:
    """Its own ImageNet recipe, layerwise backend: per channel, asymmetric activations, percentile 99.99 or least
    squares, bias correction; with and without equalization and GPTQ. Where weights have fewer than 8 bits, it keeps 8
    in the first layer (in the last one for 1,000 classes only).
    """
    import torch

    from vision import import_torchvision

    import_torchvision()
    from brevitas.export import export_onnx_qcdq
    from brevitas.graph.quantize import preprocess_for_quantize
    from brevitas_examples.imagenet_classification.ptq import ptq_common

    def loader(images: int) -> list[tuple[torch.Tensor, None]]:
        return [(torch.from_numpy(b), None) for b in work.batches("calibration", 64)[: max(1, images // 64)]]

    everything = loader(len(work.images("calibration")))
    gptq_images = work.options["gptq_images"]
    variants = [("sym", 0, 0), ("asym", 0, 0), ("asym", 20, 0)]
    variants += [("asym", 0, gptq_images)] if gptq_images and weight_bits < 8 else []
    for weights, equalize, gptq in variants:
        begun = time.process_time()
        model = preprocess_for_quantize(torch_model(work), equalize_iters=equalize, equalize_merge_bias=True)
        model = ptq_common.quantize_model(
            model,
            backend="layerwise",
            weight_bit_width=weight_bits,
            act_bit_width=activation_bits,
            bias_bit_width=32,
            weight_quant_granularity="per_channel",
            act_quant_percentile=99.99,
            act_quant_type="asym",
            scale_factor_type="float_scale",
            quant_format="int",
            weight_quant_type=weights,
            act_param_method="stats" if activation_bits == 8 else "mse",
        )
        model.eval()
        with torch.no_grad():
            model(everything[0][0])
        ptq_common.calibrate(everything, model)
        if gptq:
            ptq_common.apply_gptq(loader(gptq), model, act_order=True, create_weight_orig=True)
        ptq_common.apply_bias_correction(everything, model)
        seconds = time.process_time() - begun
        name = f"{weights} weights, bias correction" + f", equalization {equalize}" * bool(equalize)
        name += f", GPTQ on {gptq} images" * bool(gptq)
        path, note, stored = work.own / f"{name}.onnx", "", "quantized"
        try:
            exported = copy.deepcopy(model)
            export_onnx_qcdq(exported, args=torch.zeros(1, 3, 32, 32), export_path=str(path), dynamo=False)
        except Exception as error:
            note, stored = f"brevitas: its ONNX export fails here ({type(error).__name__})", "FP32 torch file"
            path = work.own / f"{name}.pth"
            torch.save(model.state_dict(), path)
        yield Candidate(name, torch_predictor(model), seconds, path, SIMULATED, note, stored)


def quanto(work: Work, weight_bits: int, activation_bits: int) -> Iterator[Candidate]:
    """Batch norm folded; per-channel weights by its default optimizer; int8 activations, calibrated.

    Where weights have fewer than 8 bits, the first and the last layer keep 8. Its HQQ optimizer is left out: of a
    convolution it stores one float zero-point per weight, so that its file at 4 bits is as large as FP32's.
    """
    import torch
    from optimum.quanto import Calibration, freeze, qint2, qint4, qint8, quantization_map, quantize
    from safetensors.torch import save_file

    kinds = {8: qint8, 4: qint4, 2: qint2}
    activations = None if activation_bits == 32 else kinds[activation_bits]
    edges = ["features.0.0", "classifier.1"]
    begun = time.process_time()
    model = torch_model(work, folded=True)
    for module in model.modules():
        if isinstance(module, torch.nn.ReLU6):
            module.inplace = False  # in place, it has no effect on quanto's activation tensors
    quantize(model, weights=qint8, activations=activations, include=edges)
    quantize(model, weights=kinds[weight_bits], activations=activations, exclude=edges)
    if activations:
        with torch.no_grad(), Calibration():
            for batch in work.batches("calibration", 64):
                model(torch.from_numpy(batch))
    freeze(model)
    seconds = time.process_time() - begun
    path = work.own / "saved"
    path.mkdir(exist_ok=True)
    save_file(model.state_dict(), path / "model.safetensors")
    (path / "quantization_map.json").write_text(json.dumps(quantization_map(model)))
    yield Candidate("default optimizer", torch_predictor(model), seconds, path, FLOAT)


def torchao(work: Work, weight_bits: int, activation_bits: int) -> Iterator[Candidate]:
    """PT2E with ExecuTorch's XNNPACK quantizer (per channel, symmetric weights), lowered to a .pte and run from it.

    Where weights have fewer than 8 bits, the first and the last layer keep 8; the file holds 8-bit codes all the same.
    """
    import executorch.kernels.quantized  # noqa: F401 (registers the operators at the ends of the delegated part)
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    size = 64  # its programs have a fixed number of images
    sample = (torch.zeros(size, 3, 32, 32),)
    begun = time.process_time()
    captured = torch.export.export(torch_model(work), sample).module()
    top = 2 ** (weight_bits - 1) - 1  # from -top, as its default for 8 bits: the lowest code would shift the scale
    quantizer = XNNPACKQuantizer()
    quantizer.set_global(get_symmetric_quantization_config(True, weight_qmin=-top, weight_qmax=top))
    if weight_bits < 8:
        for name in ("features.0", "classifier"):
            quantizer.set_module_name(name, get_symmetric_quantization_config(True))
    prepared = prepare_pt2e(captured, quantizer)
    with torch.inference_mode():
        for batch in work.batches("calibration", size):
            prepared(torch.from_numpy(padded(batch, size)))
    converted = convert_pt2e(prepared)
    seconds = time.process_time() - begun
    lowered = to_edge_transform_and_lower(torch.export.export(converted, sample), partitioner=[XnnpackPartitioner()])
    path = work.own / "model.pte"
    path.write_bytes(lowered.to_executorch().buffer)
    method = Runtime.get().load_program(path).load_method("forward")

    def predict(images: np.ndarray) -> np.ndarray:
        parts = [images[i : i + size] for i in range(0, len(images), size)]
        results = [method.execute([torch.from_numpy(padded(part, size))])[0].numpy().copy() for part in parts]
        return np.concatenate(results)[: len(images)]

    yield Candidate("PT2E, XNNPACK quantizer", predict, seconds, path, REAL)


def padded(images: np.ndarray, size: int) -> np.ndarray:
    """`size` images: those given, and the first of them again and again."""
    return images[np.arange(size) % len(images)]


# ---------------------------------------------------------------------------------------------------------- measuring

TOOLS: dict[str, Callable[[Work, int, int], Iterator[Candidate]]] = {
    "onnxruntime": onnxruntime,
    "nncf": nncf,
    "aimet": aimet,
    "brevitas": brevitas,
    "quanto": quanto,
    "torchao": torchao,
}
VERSIONS = {
    "onnxruntime": ("onnxruntime",),
    "nncf": ("nncf", "openvino"),
    "aimet": ("aimet-torch",),
    "brevitas": ("brevitas",),
    "quanto": ("optimum-quanto",),
    "torchao": ("torchao", "executorch"),
}


def accuracy(work: Work, part: str, predict: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
    """(percent right, images per second) over one part; the first batch is run once before, to warm up."""
    labels, right = work.labels(part), 0
    batches = work.batches(part, BATCH)
    predict(batches[0])
    begun = time.process_time()
    for i, batch in enumerate(batches):
        right += int((np.asarray(predict(batch)).argmax(1) == labels[i * BATCH : i * BATCH + len(batch)]).sum())
    return 100.0 * right / len(labels), len(labels) / (time.process_time() - begun)


def stored_bytes(file: Path) -> int:
    """Bytes of the file, or of all files of a folder."""
    return sum(f.stat().st_size for f in file.rglob("*") if f.is_file()) if file.is_dir() else file.stat().st_size


def main() -> None:
    folder, tool, weight_bits, activation_bits, reply = sys.argv[1:]
    own = Path(folder) / f"{tool}-{weight_bits}-{activation_bits}"
    own.mkdir(exist_ok=True)
    work = Work(Path(folder), own, json.loads((Path(folder) / "options.json").read_text()))
    tried = []
    for candidate in TOOLS[tool](work, int(weight_bits), int(activation_bits)):
        right, _ = accuracy(work, "validation", candidate.predict)
        tried.append((right, candidate))
        print(f"{tool} {weight_bits}/{activation_bits} {candidate.settings}: {right:.2f} % on validation", flush=True)
    _, best = max(tried, key=lambda pair: pair[0])  # the first of equals
    right, speed = accuracy(work, "test", best.predict)
    versions = " + ".join(f"{name} {importlib.metadata.version(name)}" for name in VERSIONS[tool])
    Path(reply).write_text(
        json.dumps(
            {
                "version": versions,
                "settings": best.settings,
                "accuracy": right,
                "bytes": stored_bytes(best.file),
                "quantize_seconds": best.seconds,
                "images_per_second": speed,
                "arithmetic": best.arithmetic,
                "note": best.note,
                "stored": best.stored,
            }
        )
    )


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
