"""Bits files: what is written is read back, and a bad one is one clear error."""

import pytest
import yaml
from networks import random_model

import bitsfile
from data import Normalization
from errors import UserError
from network import fold_batch_norm


@pytest.fixture(scope="module")
def network():
    return fold_batch_norm(random_model(0.1), Normalization())


def test_a_bits_file_comes_back(network, tmp_path):
    path = tmp_path / "b.yaml"
    layers = {op.name: 2 + i % 7 for i, op in enumerate(network.weighted)}
    bitsfile.write(path, layers, {"pool": 8}, ["made by a test", "KL: by layer"])
    assert path.read_text().startswith("# made by a test\n")
    assert yaml.safe_load(path.read_text()) == {"layers": layers, "activations": {"pool": 8}}
    assert bitsfile.read(path) == (layers, {"pool": 8})


@pytest.mark.parametrize(
    "text,words",
    [
        (None, "cannot be read"),
        ("layers: [", "not YAML"),
        ("layers: {features.0.0: 2024-13-45}", "not YAML"),
        ("layers: !!timestamp x", "not YAML"),
        ("layers: " + 3000 * "[", "not YAML"),
        ("", "layers:"),
        ("- 1", "layers:"),
        ("layer: {pool: 2}", "layers:"),
        ("layers: {pool: 4}\nlayers: {pool: 2}", "has layers twice; remove one"),
        ("layers:\n  features.0.0: 4\n  'features.0.0': 2", "has features.0.0 twice; remove one"),
        ("layers: [4]", "name: bits"),
        ("layers: {features.99: 4}", "features.99"),
        ("layers: {pool: 4}", "pool"),
        ("layers: {classifier.1: 9}", "9 bits"),
        ("layers: {classifier.1: four}", "'four' bits"),
        ("layers: {classifier.1: true}", "True bits"),
        ("layers: {classifier.1: 4}", "lacks features.0.0"),
        ("activations: {features.0.0: 1}", "1 bits"),
        ("activations: {classifier.1: 4}", "classifier.1"),
        ("activations: {features.0.0: 4}", "--act-bits"),
    ],
)
def test_a_bad_bits_file_is_one_clear_error(network, tmp_path, text, words):
    path = tmp_path / "b.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match="--bits-file") as error:
        bitsfile.check_names(path, *bitsfile.read(path), network.ops, (False, False))
    assert words in str(error.value)


def test_a_bits_file_may_name_some_layers_where_the_others_have_bits(network, tmp_path):
    (tmp_path / "b.yaml").write_text("layers: {classifier.1: 4}")
    layers, values = bitsfile.read(tmp_path / "b.yaml")
    bitsfile.check_names(tmp_path / "b.yaml", layers, values, network.ops, (True, False))
    assert (layers, values) == ({"classifier.1": 4}, {})
