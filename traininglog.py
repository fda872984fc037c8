"""training_log.txt: one line an epoch, and before each run's lines its command line and the names of the columns."""

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
    """The log, open to append: a new part for a new run (None); for one resumed `after` an epoch its part, cut there.

    (A process killed between writing its line and saving its state does that epoch again.) Where another run's part
    stands behind it, the lines to come are a part of their own, under the same title.
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
        with contextlib.suppress(OSError):  # a full disk: whoever wrote the lines was told, this would try them again
            file.close()


def is_after(line: str, epoch: int) -> bool:
    number = line.partition(" ")[0]
    return number.isdigit() and int(number) > epoch
