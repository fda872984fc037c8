"""Settings from flags and mappings: spellings, limits, messages."""

import math
from dataclasses import dataclass
from pathlib import Path

import pytest

import cli
from cli import from_mapping, option, parse, to_argv
from errors import UserError


@dataclass(frozen=True)
class Settings:
    batch_size: int = option(128, "images", low=1)
    weight_decay: float = option(0.5, "decay, 5 % of it", low=0, high=1)
    weight_bits: tuple[int, ...] = option((), "bits", aliases=("weight_quant_bits",), choices=(2, 4, 8), group="bits")
    kind: str | None = option(None, "kind", choices=("a", "b"))
    flip: bool | None = option(None, "mirror")
    per_channel: bool = option(True, "per channel")
    data_dir: Path = option(Path("data"), "folder")


@pytest.mark.parametrize(
    "line, field, value",
    [
        ("", "batch_size", 128),
        ("--batch-size 4", "batch_size", 4),
        ("--batch_size=4", "batch_size", 4),
        ("--weight_decay 1e-2", "weight_decay", 0.01),
        ("--weight-quant-bits 8,4", "weight_bits", (8, 4)),
        ("--weight_quant_bits 2", "weight_bits", (2,)),
        ("--weight-bits=8,4,2", "weight_bits", (8, 4, 2)),
        ("--flip", "flip", True),
        ("--no-flip", "flip", False),
        ("--no_flip", "flip", False),
        ("--flip=false", "flip", False),
        ("--per_channel=True", "per_channel", True),
        ("--per-channel=0", "per_channel", False),
        ("--kind b", "kind", "b"),
        ("--data_dir ./my_data", "data_dir", Path("my_data")),
        ("--data_dir=my_data/x_y", "data_dir", Path("my_data/x_y")),
    ],
)
def test_flags(line, field, value):
    settings = parse(Settings, "", line.split())
    assert getattr(settings, field) == value and type(getattr(settings, field)) is type(value)
    assert parse(Settings, "", to_argv(settings)) == settings


@pytest.mark.parametrize(
    "line, message",
    [
        ("--batch-size 0", "--batch-size is '0'; expected a whole number, at least 1"),
        ("--batch-size 1.5", "--batch-size is '1.5'; expected a whole number"),
        ("--batch-size -3", "--batch-size is '-3'"),
        ("--weight-decay nan", "--weight-decay is 'nan'; expected a number, at least 0, at most 1"),
        ("--weight-decay 2", "--weight-decay is '2'"),
        ("--weight-bits 8,3", "--weight-bits is '8,3'; expected a comma-separated list, each one of 2, 4, 8"),
        ("--weight-bits ,", "--weight-bits is ','"),
        ("--kind c", "--kind is 'c'; expected one of a, b"),
        ("--flip=maybe", "--flip is 'maybe'; expected true or false"),
        ("--data-dir=", "--data-dir is ''; expected a path"),
        ("--batch 4", "unrecognized arguments: --batch 4"),
        ("--nonsense", "unrecognized arguments: --nonsense"),
        ("--batch-size", "expected one argument"),
    ],
)
def test_bad_flags_are_one_line_that_names_them(line, message):
    with pytest.raises(UserError) as error:
        parse(Settings, "", line.split())
    assert message in str(error.value) and "\n" not in str(error.value)


def test_mappings_take_names_and_aliases_and_refuse_the_rest():
    settings = from_mapping(Settings(), {"weight_quant_bits": 4, "batch-size": 8.0, "flip": True, "kind": None})
    assert settings == Settings(weight_bits=(4,), batch_size=8, flip=True)
    for bad, message in [
        ({"colour": 1}, "unknown parameter 'colour'; known ones are batch_size, "),
        ({"batch_size": "many"}, "--batch-size is 'many'"),
        ({"batch_size": True}, "--batch-size is True"),
        ({"batch_size": [1]}, "--batch-size is \\[1\\]"),
        ({"weight_decay": math.inf}, "--weight-decay is inf"),
        ({"weight_bits": 4, "weight_quant_bits": 4}, "--weight-bits is given twice"),
    ]:
        with pytest.raises(UserError, match=message):
            from_mapping(Settings(), bad)


def test_help_shows_groups_defaults_and_percent_signs(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Settings, "What it does.", ["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "(default: yes)" in text
    for part in ("What it does.", "bits:", "--weight-quant-bits", "5 % of it (default: 0.5)", "--no-flip"):
        assert part in text
    assert text.count("options:") == 1


def test_flag_spelling():
    assert cli.flag("batch_size") == "--batch-size"
