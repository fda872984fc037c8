"""results.csv: rows stay, points are found again, foreign files are left alone."""

import pytest

import results
from errors import UserError


def row(**changes):
    return {name: name for name in results.COLUMNS} | {"weight_quant_bits": 4, "activation_quant_bits": None} | changes


def test_rows_are_kept_and_found(tmp_path):
    path = tmp_path / "deep" / "results.csv"
    assert results.read(path) == []
    results.append(path, row(test_acc_quantized=91.23456789))
    results.append(path, row(weight_quant_bits=8))
    rows = results.read(path)
    assert [r["weight_quant_bits"] for r in rows] == ["4", "8"]
    assert rows[0]["activation_quant_bits"] == "" and rows[0]["test_acc_quantized"] == "91.2346"
    assert results.has(rows, row()) and not results.has(rows, row(weight_quant_bits=6))
    assert results.has(rows, row(eval_seconds=3)) and not results.has(rows, row(seed=5))


def test_names_of_any_bytes_are_kept(tmp_path):
    path, name = tmp_path / "r.csv", "caf\udce9.pth"  # the byte E9, as Python has it in names of files
    for _ in range(2):
        results.append(path, row(checkpoint=name))
    assert [r["checkpoint"] for r in results.read(path)] == [name] * 2


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"\xff\xfe\x00", b"x" * 200_000])
def test_a_foreign_file_is_refused_and_kept(tmp_path, content):
    path = tmp_path / "results.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match="--output"):
        results.append(path, row())
    with pytest.raises(UserError, match="^--peers .*; give another file$"):
        results.read(path, ("tool", "bytes"), "--peers")
    assert path.read_bytes() == content


def test_what_a_spreadsheet_saved_is_read_or_its_separator_named(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("\n")  # empty: new
    results.append(path, row())
    saved = path.read_text()
    path.write_text(saved, encoding="utf-8-sig")
    assert results.has(results.read(path), row())
    path.write_text(saved.replace(",", ";"))
    with pytest.raises(UserError, match="--output .* has semicolons between its cells; save it with commas"):
        results.read(path)


def test_an_overlong_cell_is_one_line(tmp_path):
    path = tmp_path / "results.csv"
    results.append(path, row(checkpoint="x" * 200_000))
    with pytest.raises(UserError, match="--output .* is not a table .*field larger than field limit"):
        results.read(path)


def test_a_row_with_a_cell_too_many_is_told(tmp_path):
    path = tmp_path / "r.csv"
    results.append(path, row())
    for spoilt in (path.read_text().rstrip() + ",my note\n", path.read_text().rpartition(",")[0] + "\n"):
        path.write_text(spoilt)
        with pytest.raises(UserError, match="has a row that does not match its header"):
            results.read(path)
