"""The pieces of a training step against the same by hand: schedule, SGD, averages, recording as a CUDA graph."""

import copy
import dataclasses
import math
import time

import pytest
import torch
from torch import nn

import augmentation
import recording
import training
from augmentation import Augmentation
from data import Normalization, Split
from evaluation import choose_device, score
from models import Architecture, MobileNetV2
from tests.training_helpers import NEEDS_CUDA
from training import Recipe


def test_learning_rate_and_image_size_by_hand():
    recipe = Recipe(epochs=10, warmup_epochs=2, lr=1.0)
    assert training.learning_rate(0.1, recipe) == pytest.approx(0.5)
    assert training.learning_rate(0.2, recipe) == 1.0
    assert training.learning_rate(0.6, recipe) == pytest.approx(0.5)
    assert training.learning_rate(1.0, recipe) == pytest.approx(0.0)
    assert training.learning_rate(0.9, dataclasses.replace(recipe, scheduler="constant")) == 1.0
    assert training.learning_rate(0.0, dataclasses.replace(recipe, warmup_epochs=0.0)) == 1.0
    sized = dataclasses.replace(recipe, progressive_sizes=(16, 24, 32))
    assert [training.image_size(done, sized, 32) for done in (0, 0.33, 0.34, 0.66, 0.67, 1.0)] == [
        16,
        16,
        24,
        24,
        32,
        32,
    ]
    assert training.image_size(0.0, recipe, 28) == 28


def test_progress_is_by_epochs_or_by_the_clock_whichever_is_further():
    state = training.State(None, None, None, epoch=2, step=5, seconds=90.0)
    assert training.progress(state, Recipe(epochs=10), steps=10) == 0.25
    assert training.progress(state, Recipe(epochs=10, max_minutes=2), steps=10) == 0.75
    assert training.progress(state, Recipe(epochs=10, max_minutes=100), steps=10) == 0.25
    assert training.progress(state, Recipe(epochs=10, max_minutes=1), steps=10) == 1.0
    state.startup = 30.0  # 60 seconds of 90 are over, but no more than 120 may pass
    assert training.progress(state, Recipe(epochs=10, max_minutes=2), steps=10) == pytest.approx(2 / 3)
    state.seconds = 120.0
    assert training.progress(state, Recipe(epochs=10, max_minutes=2), steps=10) == 1.0


def test_only_the_first_step_of_a_run_is_its_start():
    split = Split(torch.zeros(8, 3, 32, 32, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64))
    recipe, waits = Recipe(epochs=2, batch_size=2), iter([0.2] + [0.01] * 7)
    state = training.start(MobileNetV2(Architecture(10, 0.1)), recipe, torch.device("cpu"))
    for _ in range(2):
        training.train_epoch(state, split, recipe, lambda *_: time.sleep(next(waits)), lambda: None)
        training.next_epoch(state)
    assert 0.2 <= state.startup < state.seconds - 0.07


def test_batches_of_an_epoch_are_whole():
    assert [training.steps_per_epoch(n, 10) for n in (1, 9, 10, 11, 19, 20, 21)] == [1, 1, 1, 1, 1, 2, 2]


def test_one_step_is_pytorchs_sgd_by_hand():
    """Weight decay on matrices only, Nesterov momentum, label smoothing, normalised images, channels_last."""
    torch.manual_seed(0)
    model = MobileNetV2(Architecture(4, 0.1))
    split = Split(torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8), torch.randint(0, 4, (6,)))
    recipe = Recipe(
        epochs=1, batch_size=6, lr=0.1, warmup_epochs=0.0, weight_decay=0.2, augmentation=Augmentation(0, False, 0)
    )
    hand = copy.deepcopy(model).double().train()
    model = model.double()  # batch norm over 6 values magnifies rounding
    state = training.start(model, recipe, torch.device("cpu"))
    step = training.stepper(state, split, recipe, Normalization(), lambda x: model(x.double()))
    training.train_epoch(state, split, recipe, step, lambda: None)

    order, _ = augmentation.epoch_draws(6, recipe.seed, 0, "cpu")
    x = (split.images[order].double() - torch.tensor([125.0, 123, 114]).view(1, 3, 1, 1)) / 64
    log_p = hand(x).log_softmax(1)
    target = torch.full((6, 4), 0.1 / 4).scatter_add_(1, split.labels[order, None], torch.full((6, 1), 0.9))
    (-(target.double() * log_p).sum(1).mean()).backward()
    for (name, theirs), mine in zip(hand.named_parameters(), model.parameters(), strict=True):
        gradient = theirs.grad + (0.2 * theirs.detach() if theirs.ndim > 1 else 0)
        expected = theirs.detach() - 0.1 * (gradient + 0.9 * gradient)
        torch.testing.assert_close(mine.detach(), expected, rtol=1e-4, atol=1e-6, msg=name)


def test_the_average_is_the_recurrence():
    torch.manual_seed(0)
    model = MobileNetV2(Architecture(4, 0.1))
    average = copy.deepcopy(model)
    pairs = training.average_pairs(average, model)
    expected = {name: t.double() for name, t in model.state_dict().items() if t.is_floating_point()}
    for step in range(5):
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.add_(1)
        training.update_average(pairs, 0.3, step)
        decay = min(0.3, (1 + step) / (10 + step))
        now = model.state_dict()
        expected = {name: decay * old + (1 - decay) * now[name].double() for name, old in expected.items()}
    mine = average.state_dict()
    assert all(torch.allclose(mine[name].double(), value, atol=1e-5) for name, value in expected.items())


def test_score_against_a_plain_loop():
    torch.manual_seed(0)
    split = Split(torch.randint(0, 256, (23, 3, 4, 4), dtype=torch.uint8), torch.randint(0, 5, (23,)))
    weight = torch.randn(48, 5)

    def forward(images):
        return images.float().flatten(1) / 255 @ weight

    logits = forward(split.images)
    right = sum(int(row.argmax()) == label for row, label in zip(logits, split.labels.tolist(), strict=True))
    loss = sum(-math.log(row.softmax(0)[label]) for row, label in zip(logits, split.labels.tolist(), strict=True))
    got = score(forward, split, 10, "cpu")
    assert got.count == 23 and got.accuracy == pytest.approx(100 * right / 23) and got.loss == pytest.approx(loss / 23)


def test_strided_depthwise_is_float32_under_a_cpus_autocast():
    """Same gradients as without autocast; where nothing is autocast, an ordinary convolution stays one."""
    recipe, device = Recipe(bf16=True, ema_decay=0.9), torch.device("cpu")
    model = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False), nn.Conv2d(8, 8, 1))
    plain = copy.deepcopy(model[0])
    state = training.start(model, recipe, device)
    assert [type(m) for m in state.model] == [training.Float32Conv, nn.Conv2d]
    x = torch.randn(2, 8, 6, 6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        state.model[0](x).square().sum().backward()
    plain(x.float()).square().sum().backward()
    torch.testing.assert_close(state.model[0].weight.grad, plain.weight.grad)
    assert type(training.start(plain, Recipe(), device).model) is nn.Conv2d


@pytest.mark.parametrize("compiled", [False, True])
def test_relu6_on_bits_is_relu6(compiled):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    numbers = every[~every.isnan()]
    results = []
    for relu in (nn.ReLU6(), training.BitsReLU6(inplace=True)):
        x = numbers.clone().requires_grad_()
        if compiled:
            relu = torch.compile(relu, backend="aot_eager", dynamic=False)
        y = relu(x * 1)  # in place on a result, as behind batch norm
        y.backward(torch.arange(len(x)).bfloat16())
        results.append((y.detach(), x.grad))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    model = training.start(MobileNetV2(Architecture(10, 0.1)), Recipe(bf16=True), torch.device("cpu")).model
    assert sum(type(m) is training.BitsReLU6 for m in model.modules()) == 35
    model.features[5].conv[0][1].running_mean.fill_(math.nan)
    assert not training.all_finite(training.start(model, Recipe(), torch.device("cpu")))


STEPS = 8  # of the two runs below: some before the recording, most from it


def cuda_run(**changes):
    """(state, images on the device, recipe) before the first of `STEPS` steps of a small network."""
    device = choose_device("cuda")
    recipe = Recipe(epochs=1, batch_size=8, ema_decay=0.9, augmentation=Augmentation(4, True, 8, True, 0.5), **changes)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8 * STEPS, 3, 32, 32), dtype=torch.uint8, generator=generator)
    split = Split(images, torch.randint(0, 10, (8 * STEPS,), generator=generator)).to(device)
    torch.manual_seed(0)
    model = MobileNetV2(Architecture(10, 0.1))
    return training.start(model if changes.get("bf16") else model.double(), recipe, device), split, recipe


@NEEDS_CUDA
@pytest.mark.parametrize("compiled", [False, True])
def test_a_recorded_step_trains_like_an_ordinary_one(compiled, monkeypatch):
    """Oracle: the same steps without a recording, in float64 and at a low rate, for an untrained network magnifies
    rounding (of the rate, which is a float32 in the recording); the rate changes at each step."""
    ends = []
    for record in (True, False):
        if not record:
            monkeypatch.setattr(training, "recorded", lambda step, optimizer: step)
        state, split, recipe = cuda_run(lr=0.002, warmup_epochs=0.5)
        network = torch.compile(state.model, dynamic=False) if compiled else state.model
        step = training.stepper(state, split, recipe, Normalization(), lambda x, f=network: f(x.double()))
        training.train_epoch(state, split, recipe, step, lambda: None)
        weights = torch.cat([p.detach().flatten() for p in state.model.state_dict().values() if p.ndim])
        ends.append((weights, state.sums.clone(), torch.cat([p.flatten() for p in state.average.parameters()])))
    for recorded, ordinary in zip(*ends, strict=True):
        torch.testing.assert_close(recorded, ordinary, rtol=1e-3, atol=1e-5)


@NEEDS_CUDA
def test_no_step_waits_for_the_gpu():
    state, split, recipe = cuda_run(bf16=True)
    seen = []

    def strict() -> None:  # from the end of the step that was recorded to the last step's
        seen.append(state.step)
        inside = recording.WARM_UP <= state.step < STEPS
        torch.cuda.set_sync_debug_mode("error" if inside else "default")

    step = training.stepper(state, split, recipe, Normalization(), state.model)
    training.train_epoch(state, split, recipe, step, strict)
    assert seen == list(range(1, STEPS + 1))
