"""training_log.txt: one line per epoch; each run's lines are preceded by its command line and the column names."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from errors import UserError, reason
from evaluation import Score
from files import write_bytes

COLUMNS = "epoch lr train_loss train_acc val_loss val_acc test_loss test_acc images_per_second"


@dataclass(frozen=True)
class Epoch:
    """One line. Losses are in nats, accuracies in percent; val and test are None where they were not evaluated."""

    epoch: int
    lr: float
    train_loss: float
    train_acc: float
    val: Score | None
    test: Score | None
    images_per_second: float

    def line(self) -> str:
        cells = [f"{self.epoch}", f"{self.lr:.5f}", f"{self.train_loss:.4f}", f"{self.train_acc:.2f}"]
        for part in (self.val, self.test):
            cells += [f"{part.loss:.4f}", f"{part.accuracy:.2f}"] if part else ["-", "-"]
        return " ".join([*cells, f"{self.images_per_second:.0f}"])


@contextlib.contextmanager
def open_log(path: Path, command: str, after: int | None) -> Iterator[TextIO]:
    """The log, opened for appending; the caller holds its lock. after: None starts a new section; a run resumed after
    epoch `after` goes on in its own, without the line of the epoch that it repeats (the process was killed between
    logging it and saving its state). If another run's section follows, the new lines go into a section of their own
    with the same title. UserError where the file cannot be used.
    """
    title = f"# {command}"
    try:
        old = path.read_text() if path.exists() else ""
        lines, goes_on = old.removesuffix("\n").split("\n"), False
        if after is not None and title in lines:
            start = len(lines) - lines[::-1].index(title)
            end = next((i for i in range(start, len(lines)) if lines[i].startswith("# ")), len(lines))
            repeated = [i for i in range(start, end) if is_after(lines[i], after)]
            if len(repeated) <= 1:  # more are another run's, of the same command in another folder: they stay
                goes_on = end == len(lines)
            if len(repeated) == 1:
                del lines[repeated[0]]
                old = "\n".join(lines) + "\n"
                write_bytes(path, old.encode())
        file = open(path, "a")
        file.write("\n" * bool(old and not old.endswith("\n")))
        if not goes_on:
            file.write(f"{title}\n{COLUMNS}\n")
        file.flush()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot use the log {path} ({reason(error)}); choose another --log-file") from None
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):  # disk full: reported when the line was written; closing tries again
            file.close()


def is_after(line: str, epoch: int) -> bool:
    number = line.partition(" ")[0]
    return number.isdigit() and int(number) > epoch
