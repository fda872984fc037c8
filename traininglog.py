"""training_log.txt: one line per epoch; each run's lines are preceded by its command line and the column names."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from errors import UserError
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
    """The log, opened for appending. after: None starts a new section; for a run resumed after epoch `after`, its
    section is truncated there (a process killed between logging an epoch and saving its state repeats that epoch). If
    another run's section follows, the new lines go into a section of their own with the same title.
    """
    title = f"# {command}"
    try:
        old = path.read_text() if path.exists() else ""
        lines, goes_on = old.splitlines(), False
        if after is not None and title in lines:
            start = len(lines) - lines[::-1].index(title)
            end = next((i for i in range(start, len(lines)) if lines[i].startswith("# ")), len(lines))
            goes_on = end == len(lines)
            kept = lines[:start] + [line for line in lines[start:end] if not is_after(line, after)] + lines[end:]
            if kept != lines:  # otherwise the file stays: another run may be writing to it
                old = "\n".join(kept) + "\n"
                write_bytes(path, old.encode())
        file = open(path, "a")
        if not goes_on:
            file.write("\n" * bool(old and not old.endswith("\n")) + f"{title}\n{COLUMNS}\n")
            file.flush()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot use the log {path} ({error}); choose another --log-file") from None
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):  # disk full: reported when the line was written; closing tries again
            file.close()


def is_after(line: str, epoch: int) -> bool:
    number = line.partition(" ")[0]
    return number.isdigit() and int(number) > epoch
