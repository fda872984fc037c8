"""The bits of each layer or activation, in a small YAML file that can be read, edited and reused.

layers:
  features.0.0: 8        # a convolution or the classifier, by its name in the network
activations:
  features.0.0: 4        # the result of an operation, by the same name
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from errors import UserError
from files import write_bytes
from network import Op, fused_operations, weighted

PARTS = {"layers": (1, 8, "--weight-bits"), "activations": (2, 8, "--act-bits")}  # the least and the most bits


def write(path: Path, layers: Mapping[str, int], activations: Mapping[str, int], notes: Sequence[str] = ()) -> None:
    """A YAML file with the bits of layers and activations, whichever there are; notes come first, as comments."""
    lines = [f"# {note}" for note in notes]
    for title, bits in (("layers", layers), ("activations", activations)):
        if bits:
            lines += [f"{title}:", *(f"  {name}: {b}" for name, b in bits.items())]
    write_bytes(path, ("\n".join(lines) + "\n").encode())


def read(path: Path) -> tuple[dict[str, int], dict[str, int]]:
    """(bits of layers, bits of activations) from a file as `write` makes it; one of them may be missing.
    UserError if the file is missing or is not a bits file."""
    import yaml

    try:
        text = Path(path).read_text()
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        document, twice = node and loader.construct_document(node), repeated(node)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--bits-file {path} cannot be read ({error}); make one with --target-size-mb") from None
    except (yaml.YAMLError, ValueError, AttributeError, LookupError, RecursionError) as error:  # a bad date, [[[[...
        raise UserError(f"--bits-file {path} is not YAML ({error}); expected layers: and activations:") from None
    if twice:
        raise UserError(f"--bits-file {path} has {twice} twice; remove one of them")
    if not isinstance(document, dict) or set(document) - set(PARTS) or not any(document.values()):
        raise UserError(f"--bits-file {path}: expected the parts layers: and activations:, one or both")
    layers, activations = (checked_bits(path, part, document.get(part) or {}) for part in PARTS)
    return layers, activations


def repeated(document: Any) -> str | None:
    """The first name that the YAML node of a bits file, or one of its parts, has twice: yaml.safe_load would silently
    take the last."""
    parts = [value for _, value in document.value] if getattr(document, "id", None) == "mapping" else []
    for mapping in (document, *parts):
        if getattr(mapping, "id", None) == "mapping":
            names = [name.value for name, _ in mapping.value]
            if twice := [name for name in names if names.count(name) > 1]:
                return str(twice[0])
    return None


def checked_bits(path: Path, part: str, bits: Any) -> dict[str, int]:
    if not isinstance(bits, dict):
        raise UserError(f"--bits-file {path}: {part} must hold lines 'name: bits'")
    low, high, _ = PARTS[part]
    for name, b in bits.items():
        if type(b) is not int or not low <= b <= high:
            raise UserError(f"--bits-file {path}: {name} has {b!r} bits; expected a whole number from {low} to {high}")
    return dict(bits)


def check_names(
    path: Path, layers: Mapping[str, int], activations: Mapping[str, int], ops: Sequence[Op], uniform: Sequence[bool]
) -> None:
    """UserError if the file names an unknown layer or activation, or omits one although no uniform bits are given for
    the rest (uniform: whether they are, for weights and for activations)."""
    known = [[op.name for op in some] for some in (weighted(ops), fused_operations(ops)[:-1])]
    for (part, (*_, flag)), bits, names, others in zip(
        PARTS.items(), (layers, activations), known, uniform, strict=True
    ):
        if unknown := [name for name in bits if name not in names]:
            raise UserError(
                f"--bits-file {path}: {part} has {unknown[0]!r}, which is not in the network; an example is {names[0]}"
            )
        if bits and not others and (missing := [name for name in names if name not in bits]):
            raise UserError(f"--bits-file {path}: {part} lacks {missing[0]}; name it, or give {flag} for the others")
