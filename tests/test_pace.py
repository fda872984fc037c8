"""The time that is left, of runs with known costs."""

import copy

import pytest
import torch

import pace
from models import Architecture, MobileNetV2


def test_the_time_left_is_true_for_dearer_sizes_and_evaluations():
    """A run is played with known costs; the estimate is exact at every moment."""
    work = pace.Work(epochs=6, epoch_costs=(1.0, 3.0, 5.0), evaluation_cost=0.5, eval_every=4)
    moments, clock = [], 0.0
    for epoch in range(6):
        for part in (0.25, 0.5, 0.75, 1.0):
            clock += (1.0, 3.0, 5.0)[epoch // 2] / 4
            moments.append((clock, work.done(epoch, part)))
        if epoch in (3, 5):
            for part in (0.5, 1.0):
                clock += 0.25
                moments.append((clock, work.done(epoch, 1.0, part)))
    assert work.total == pytest.approx(clock) and work.done(6) == pytest.approx(clock)
    begin_clock, begin = moments[4]  # a run resumed here knows nothing of the time before
    for now, done in moments[5:]:
        left = pace.seconds_left(work, begin, done, 2 * (now - begin_clock))
        assert left == pytest.approx(2 * (clock - now))
    assert pace.seconds_left(work, begin, begin, 1.0) is None


def test_measuring_costs_changes_nothing():
    torch.manual_seed(0)
    model = MobileNetV2(Architecture(4, 0.1), dropout=0.5)
    before, numbers = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    costs = pace.size_costs(model, (8, 32), batch_size=64)
    assert len(costs) == 2 and 0 < costs[0] < costs[1]
    assert torch.equal(numbers, torch.get_rng_state()) and model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert pace.size_costs(model, (32,), 16) == (1.0,)
