"""results.csv: one row per evaluation, saved immediately; an interrupted grid finds its finished points here.

The first columns are required by the project; the last ones record how the row was made, so that two methods at the
same bits give two rows. An empty bits column means 32 (FP32). The benchmarks keep their tables with the same functions.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from errors import UserError, reason
from files import locked, write_bytes

COLUMNS = (
    "dataset",
    "checkpoint",
    "width_mult",
    "weight_quant_bits",
    "activation_quant_bits",
    "weight_per_channel",
    "batch_size",
    "seed",
    "test_acc_fp32",
    "test_acc_quantized",
    "acc_drop",
    "model_size_fp32_mb",
    "model_size_mb",
    "packed_bytes",
    "compression_ratio_model",
    "compression_ratio_weights",
    "compression_ratio_activations",
    "calib_seconds",
    "eval_seconds",
    "images_per_second",
    "checkpoint_hash",
    "method",
    "calib_images",
    "dataset_crc32",
)
# A point of a grid is done when a row agrees with it in these.
KEY = (
    "dataset",
    "checkpoint_hash",
    "weight_quant_bits",
    "activation_quant_bits",
    "weight_per_channel",
    "batch_size",
    "seed",
    "method",
    "calib_images",
    "dataset_crc32",
)


def read(path: Path, columns: Sequence[str] = COLUMNS, flag: str = "--output") -> list[dict[str, str]]:
    """The rows of a results file (or of another table, of those `columns`) as text; none where the file is empty or
    does not exist yet. UserError, which names `flag`, for a file of other
    columns, which is left alone."""
    try:  # names of files may hold any bytes; a spreadsheet may have put a byte order mark at the beginning
        text = Path(path).read_text(encoding="utf-8-sig", errors="surrogateescape")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be read ({error.strerror}); give another file") from None
    if not text.strip():
        return []
    try:
        reader = csv.DictReader(io.StringIO(text))
        names, rows = tuple(reader.fieldnames or ()), list(reader)
    except csv.Error as error:
        raise UserError(f"{flag} {path} is not a table ({reason(error)}); give another file") from None
    if names != tuple(columns):
        if len(names) == 1 and ";" in names[0]:
            raise UserError(
                f"{flag} {path} has semicolons between its cells; save it with commas, or give another file"
            )
        raise UserError(f"{flag} {path} has other columns than this program's results; give another file")
    if any(None in row or None in row.values() for row in rows):  # one has more or fewer cells than the header
        raise UserError(f"{flag} {path} has a row that does not match its header; fix it, or give another file")
    return rows


def append(
    path: Path, row: Mapping[str, Any], columns: Sequence[str] = COLUMNS, replaces: Sequence[str] = ()
) -> list[dict[str, str]]:
    """Appends one row and returns all rows. The file is replaced atomically; concurrent agents take turns. If
    `replaces` names columns, rows that agree with the new one in all of them are removed."""
    with locked(path, wait=True):
        rows = [old for old in read(path, columns) if not (replaces and same(old, row, replaces))]
        rows.append({name: text(row[name]) for name in columns})
        out = io.StringIO()
        writer = csv.DictWriter(out, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_bytes(Path(path), out.getvalue().encode(errors="surrogateescape"))
    return rows


def text(value: Any) -> str:
    """A cell: floats with at most six significant digits, None empty."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def has(rows: Sequence[Mapping[str, str]], row: Mapping[str, Any], key: Sequence[str] = KEY) -> bool:
    """Whether `rows` holds a measurement of the same point."""
    return any(same(old, row, key) for old in rows)


def same(old: Mapping[str, str], row: Mapping[str, Any], key: Sequence[str] = KEY) -> bool:
    """Whether a row that was read is a measurement of the same point: it agrees in the columns `key`."""
    return all(old[name] == text(row[name]) for name in key)
