"""What a quantized network takes: bytes of each layer in the packed file, and of the activations of one image.

Pure accounting: compression.py fills in what it wrote, and asserts that the sum is the file's size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from torch import Tensor

from network import INPUT, fused_operations, peak_bytes, value_sizes
from packing import packed_bytes
from quantization import QuantizedNetwork


@dataclass(frozen=True)
class LayerSize:
    """One layer's part of the file, in bytes. bits is 32 where the weight stays in FP32.

    code_bytes: the codes as stored, packed or entropy-coded; in the latter case what the stream grew by while the layer
    was coded, which differs a little from the layer's own information because each lane holds back up to 2 bytes.
    float_bytes: the bias (float16, or float32 where the weight is), and the FP32 weight. Blobs deflated for all layers
    together are divided among the layers in proportion.
    """

    name: str
    kind: str
    numel: int
    bits: int
    code_bytes: int
    scale_bytes: int
    zero_point_bytes: int
    float_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.code_bytes + self.scale_bytes + self.zero_point_bytes + self.float_bytes

    @property
    def weight_bytes(self) -> int:
        """Bytes that encode the weight: codes, scales and zero-points, or FP32 values; without the bias."""
        return 4 * self.numel if self.bits == 32 else self.code_bytes + self.scale_bytes + self.zero_point_bytes


@dataclass(frozen=True)
class SizeReport:
    """What a packed file holds, byte for byte: rows + grid_bytes + table_bytes + header_bytes == total_bytes, the size
    of the file on disk.

    grid_bytes: activation grids. table_bytes: the entropy coder's tables and end states, shared by all layers.
    header_bytes: names, manifest, alignment. fp32_bytes: see `fp32_state_bytes`.

    activation_bytes, peak_activation_bytes and their fp32_ counterparts: the sum over all stored activations of one
    32x32 image, and the maximum alive at once (operation by operation as `fused_operations` has them, in order, nothing
    recomputed). A value takes its grid's bits an element, rounded up to whole bytes; without a grid (the logits, as a
    rule) 4 bytes an element. The image is 8-bit pixels where activations are quantized, and float32 where they are not.
    """

    rows: tuple[LayerSize, ...]
    grid_bytes: int
    table_bytes: int
    header_bytes: int
    fp32_bytes: int
    activation_bytes: int
    fp32_activation_bytes: int
    peak_activation_bytes: int
    fp32_peak_activation_bytes: int

    @property
    def total_bytes(self) -> int:
        return sum(row.total_bytes for row in self.rows) + self.grid_bytes + self.table_bytes + self.header_bytes

    @property
    def model_size_mb(self) -> float:
        """The file on disk, all included, in units of 10^6 bytes."""
        return self.total_bytes / 1e6

    @property
    def model_size_fp32_mb(self) -> float:
        """The FP32 state as trained, in units of 10^6 bytes."""
        return self.fp32_bytes / 1e6

    @property
    def compression_ratio_model(self) -> float:
        """FP32 state as trained (`fp32_state_bytes`, no header) over the packed file, all included."""
        return self.fp32_bytes / self.total_bytes

    @property
    def compression_ratio_weights(self) -> float:
        """Weights of convolutions and classifier at 32 bits, over what stands for them: codes, scales, zero-points,
        the entropy coder's tables. No biases, no header."""
        return 4 * sum(r.numel for r in self.rows) / (sum(r.weight_bytes for r in self.rows) + self.table_bytes)

    @property
    def compression_ratio_activations(self) -> float:
        """All values of one image: FP32 bytes over quantized bytes."""
        return self.fp32_activation_bytes / self.activation_bytes

    @property
    def compression_ratio_peak_activations(self) -> float:
        """The most bytes of values alive at once: FP32 over quantized."""
        return self.fp32_peak_activation_bytes / self.peak_activation_bytes


def fp32_state_bytes(state: Mapping[str, Tensor]) -> int:
    """Bytes of all tensors of a state dict: weights, biases, batch norm's parameters and running statistics, and its
    counters (`num_batches_tracked`, 8 bytes each). No header. Width 1.0 and 10 classes: 9,083,592, of which the
    counters are 416."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def activation_sizes(network: QuantizedNetwork) -> tuple[int, int, int, int]:
    """(total, FP32 total, peak, FP32 peak) bytes of the values of one image; counted as SizeReport says."""
    ops = fused_operations(network.ops)
    elements = value_sizes(network.ops, {name: layer.codes for name, layer in network.layers.items()})
    elements = {name: elements[name] for name in (INPUT, *(op.name for op in ops))}
    bits = {name: network.activations[name].bits if name in network.activations else 32 for name in elements}
    bits[INPUT] = 8 if network.activations else 32
    quantized = {name: packed_bytes(count, bits[name]) for name, count in elements.items()}
    full = {name: 4 * count for name, count in elements.items()}
    peaks = [int(peak_bytes(ops, sizes)) for sizes in (quantized, full)]
    return sum(quantized.values()), sum(full.values()), *peaks


def shared_out(rows: Sequence[LayerSize], field: str, total: int) -> tuple[LayerSize, ...]:
    """The rows with `total` bytes shared out over that field of the quantized layers, each in its proportion."""
    before = [getattr(row, field) if row.bits != 32 else 0 for row in rows]
    ends = [0, *(total * part // sum(before) for part in accumulate(before))]
    return tuple(
        row if row.bits == 32 else replace(row, **{field: end - start})
        for row, (start, end) in zip(rows, pairwise(ends), strict=True)
    )
