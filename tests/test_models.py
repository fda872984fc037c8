"""MobileNetV2 against torchvision's: names, shapes, arithmetic; size and multiply-adds."""

import pytest
import torch
from torch import nn

from models import Architecture, MobileNetV2, multiply_adds, skeleton
from vision import import_torchvision


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("width", [0.1, 0.35, 1.0, 1.4])
def test_names_and_shapes_are_torchvisions(width):
    theirs = import_torchvision("torchvision.models").mobilenet_v2(num_classes=7, width_mult=width)
    expected = shapes(theirs)
    assert shapes(skeleton(Architecture(7, width))) == expected
    assert list(shapes(MobileNetV2(Architecture(7, width)))) == list(expected)


def test_logits_are_torchvisions_once_the_strides_agree():
    torch.manual_seed(0)
    theirs = import_torchvision("torchvision.models").mobilenet_v2(num_classes=5, width_mult=0.25)
    for i, module in enumerate(theirs.modules()):  # statistics other than 0 and 1
        if isinstance(module, nn.BatchNorm2d):
            generator = torch.Generator().manual_seed(i)
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    theirs.features[0][0].stride = theirs.features[2].conv[1][0].stride = (1, 1)
    ours = MobileNetV2(Architecture(5, 0.25))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)


def test_width_1_has_88_million_multiply_adds_and_2_24_million_parameters():
    model = MobileNetV2(Architecture(10, 1.0))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 2.24
    assert round(multiply_adds(model) / 1e6) == 88
    assert model.training  # counting leaves the mode as it was


def test_multiply_adds_of_layers_counted_by_hand():
    conv, depthwise = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1, groups=8)
    model = nn.Sequential(conv, depthwise, nn.Flatten(), nn.Linear(8 * 4 * 4, 10))
    assert multiply_adds(model, size=8) == 8 * 8 * 8 * 27 + 8 * 4 * 4 * 9 + 128 * 10


@pytest.mark.parametrize("size", [8, 16, 24, 32])
def test_images_from_8x8_up_work(size):
    x = torch.randn(2, 3, size, size)
    model = MobileNetV2(Architecture(10, 0.1))
    features = model.features(x)
    assert features.shape == (2, 1280, size // 8, size // 8)
    assert model(x).shape == (2, 10)


def test_a_skeleton_takes_no_memory_and_no_random_numbers():
    state = torch.get_rng_state()
    assert {p.device.type for p in skeleton(Architecture()).state_dict().values()} == {"meta"}
    assert torch.equal(state, torch.get_rng_state())


def test_tools_that_trace_the_network_find_ordinary_convolutions():
    """AIMET and Brevitas (benchmarks/peers.py) go by torch.fx."""
    model = MobileNetV2(Architecture(10, 0.1)).eval()
    traced = torch.fx.symbolic_trace(model)
    called = {node.target for node in traced.graph.nodes if node.op == "call_module"}
    assert {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)} <= called
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(traced(x), model(x))
