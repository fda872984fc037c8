"""A training step recorded once as a CUDA graph and replayed: one launch for each step instead of hundreds.

At 32x32 pixels the kernels of a step are so short that launching them takes longer than running them: on an H100 with
batches of 128, MobileNetV2's kernels ran for 4.7 ms of a step of 7.6 ms although forward and backward pass had graphs
of their own already. So everything between two changes of the learning rate is recorded: choice of the images,
augmentation, forward and backward pass, optimizer. https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor, int], None]  # (picks [B] int64, draws [B, n], image size): trains on these images

WARM_UP = 3  # steps before the recording: compilers, cuDNN's choice of algorithms and the optimizer's state settle


def recorded(step: Step, optimizer: torch.optim.Optimizer) -> Step:
    """`step`, recorded for each batch size and image size after `WARM_UP` steps with them, which train as usual.

    A recording keeps the addresses of all tensors: weights, gradients and the optimizer's state must stay where they
    are from then on (load_state_dict of an optimizer moves them), and `step` may not wait for the device. The learning
    rate is read anew from the optimizer's first group at every step; all groups have the same.
    """
    device = optimizer.param_groups[0]["params"][0].device
    stream = torch.cuda.Stream(device)
    rate = torch.zeros((), device=device)
    warmed: dict[tuple[int, int], int] = {}
    replays: dict[tuple[int, int], Callable[[Tensor, Tensor], None]] = {}

    def record(picks: Tensor, draws: Tensor, size: int) -> Callable[[Tensor, Tensor], None]:
        picks, draws, graph = picks.clone(), draws.clone(), torch.cuda.CUDAGraph()
        number = optimizer.param_groups[0]["lr"]
        set_rate(optimizer, rate)  # a tensor, for a number would be recorded as it is now
        with torch.cuda.graph(graph, stream=stream):
            step(picks, draws, size)
        set_rate(optimizer, number)

        def replay(new_picks: Tensor, new_draws: Tensor) -> None:
            picks.copy_(new_picks)
            draws.copy_(new_draws)
            rate.fill_(optimizer.param_groups[0]["lr"])
            graph.replay()

        return replay

    def run(picks: Tensor, draws: Tensor, size: int) -> None:
        key = len(picks), size
        if key in replays:
            replays[key](picks, draws)
            return
        # As torch asks for: the same stream as the recording's, for gradients are summed on that of their first use.
        with timed_algorithms():
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                step(picks, draws, size)
            torch.cuda.current_stream(device).wait_stream(stream)
            warmed[key] = warmed.get(key, 0) + 1
            if warmed[key] == WARM_UP:
                replays[key] = record(picks, draws, size)

    return run


@contextlib.contextmanager
def timed_algorithms() -> Iterator[None]:
    """cuDNN times its algorithms and takes the fastest, instead of guessing."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def set_rate(optimizer: torch.optim.Optimizer, rate: Tensor | float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
