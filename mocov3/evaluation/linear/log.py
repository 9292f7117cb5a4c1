"""Output of linear evaluation: terminal, ``lincls.jsonl``, loggers, the sorted table of heads."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mocov3.metrics import Meter, Progress
from mocov3.output.log import LineFile, Stopwatch, cut, warn
from mocov3.output.loggers import Loggers
from mocov3.output.terminal import Terminal

LINES, RESULT = "lincls.jsonl", "lincls.json"


@dataclass
class HeadResult:
    """A head and its accuracy on the validation set, in %."""

    head: str
    lr: float
    weight_decay: float
    acc1: float = 0.0
    acc5: float = 0.0
    loss: float = 0.0
    """Mean cross-entropy on the validation set."""
    best_acc1: float = 0.0
    best_epoch: int = -1

    def update(self, loss: float, acc1: float, acc5: float, epoch: int) -> None:
        """Take over an evaluation after ``epoch``."""
        self.loss, self.acc1, self.acc5 = loss, acc1, acc5
        if self.best_epoch < 0 or acc1 > self.best_acc1:
            self.best_acc1, self.best_epoch = acc1, epoch

    @property
    def name(self) -> str:
        """Kind, learning rate, weight decay."""
        return f"{self.head} lr {self.lr:g} wd {self.weight_decay:g}"


def best_of(results: Sequence[HeadResult]) -> int:
    """Number of the head of the highest best accuracy; the first of equals."""
    return max(range(len(results)), key=lambda i: (results[i].best_acc1, -i))


def table(results: Sequence[HeadResult]) -> str:
    """Heads from best to worst by their best epoch, the best marked."""
    order = sorted(range(len(results)), key=lambda i: (-results[i].best_acc1, i))
    lines = [f"  {'head':<10} {'lr':>8} {'wd':>8} {'Acc@1':>8} {'epoch':>6}   {'last Acc@1':>10} {'Acc@5':>8}"]
    for place, i in enumerate(order):
        r = results[i]
        lines.append(
            f"{'*' if place == 0 else ' '} {r.head:<10} {r.lr:>8g} {r.weight_decay:>8g} {r.best_acc1:>8.3f} "
            f"{r.best_epoch:>6}   {r.acc1:>10.3f} {r.acc5:>8.3f}"
        )
    return "\n".join(lines)


def edges(results: Sequence[HeadResult]) -> list[str]:
    """Warnings where the best head has the smallest or largest learning rate or weight decay that was tried."""
    best = results[best_of(results)]
    said = []
    for field, flag in (("lr", "--lr"), ("weight_decay", "--wd")):
        tried = sorted({getattr(r, field) for r in results})
        value = getattr(best, field)
        if len(tried) < 2 or value not in (tried[0], tried[-1]) or (field == "weight_decay" and value == 0):
            continue
        if not any(getattr(r, field) in tried[1:-1] and r.best_acc1 >= best.best_acc1 for r in results):
            side, more = ("smallest", "smaller") if value == tried[0] else ("largest", "larger")
            said.append(f"the best head has the {side} {flag} tried ({value:g}); try {more} ones")
    return said


class EvaluationLog:
    """Output of a run of linear evaluation. On ranks that do not write, every call does nothing.

    Args:
        folder: of the files.
        active: whether this rank writes.
        style: of ``mocov3.output.terminal``.
        epochs: of the whole run.
        iterations: of an epoch.
        batch_size: images a step, over all ranks.
        first_epoch: lines of it and later ones, of a former run, are cut off.
        done: steps of a former run.
        write: whether there is a file at all.
        loggers: names of ``mocov3.output.loggers``.
        config: what loggers are told of the run.
    """

    def __init__(
        self,
        folder: Path,
        *,
        active: bool,
        style: str,
        epochs: int,
        iterations: int,
        batch_size: int,
        first_epoch: int,
        done: int = 0,
        write: bool = True,
        loggers: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.active, self.batch_size = folder, active, batch_size
        self.terminal = Terminal(style, epochs=epochs, iterations=iterations, done=done, active=active)
        self._meters = [
            Meter("Time", "6.3f"),
            Meter("Data", "6.3f"),
            Meter("Loss", ".4e"),
            Meter("Acc@1", "6.2f"),
            Meter("Acc@5", "6.2f"),
        ]
        self._progress = Progress(iterations, self._meters)
        self._clock, self._epoch, self._done = Stopwatch(), -1, done
        self._waited = 0.0
        self._best = ""
        self._file: LineFile | None = None
        if not (active and write):
            return
        cut(folder / LINES, lambda entry: entry["epoch"] < first_epoch)
        self._file = LineFile(folder / LINES)
        self._loggers = Loggers(
            loggers, folder, config=config or {}, first_step=done, quiet=style == "quiet", warn=warn
        )

    def say(self, text: str) -> None:
        """A line of explanation."""
        self.terminal.say(text)

    def waited(self) -> None:
        """A batch has arrived."""
        self._waited = self._clock.lap()

    def stepped(self, epoch: int) -> None:
        """A step has ended."""
        if epoch != self._epoch:
            self._epoch = epoch
            for meter in self._meters:
                meter.total, meter.count = 0.0, 0
        self._meters[1].update(self._waited)
        self._meters[0].update(self._waited + self._clock.lap())
        self._done += 1
        self.terminal.advance(self._done)

    def restart(self) -> None:
        """Time from here."""
        self._clock.lap()

    @property
    def seconds(self) -> float:
        """Seconds of this epoch's steps so far."""
        return self._meters[0].total

    def line(self, epoch: int, iteration: int, now: Sequence[float], mean: Sequence[float]) -> None:
        """A training step: loss, Acc@1, Acc@5 of this step and on average so far."""
        if not self.active:
            return
        for meter, value, average in zip(self._meters[2:], now, mean, strict=True):
            meter.value, meter.total, meter.count = value, average, 1
        self.terminal.line(self._progress.line(epoch, iteration))
        if self.terminal.moves:  # a file gets one line an epoch
            seconds, waited = self._meters[0].total, self._meters[1].total
            self.terminal.status(
                [
                    f"loss {mean[0]:.3f}",
                    self._best,
                    f"{self.batch_size * self._meters[0].count / max(seconds, 1e-9):.0f} img/s",
                    f"wait {100 * waited / max(seconds, 1e-9):.0f}%",
                    f"training Acc@1 {mean[1]:.1f}",
                ]
            )

    def test(self, iteration: int, iterations: int, seconds: float, values: Sequence[float]) -> None:
        """An evaluation: loss, Acc@1, Acc@5 on average so far."""
        meters = [Meter("Time", "6.3f", seconds, seconds, 1)]
        for (name, form), value in zip((("Loss", ".4e"), ("Acc@1", "6.2f"), ("Acc@5", "6.2f")), values, strict=True):
            meters.append(Meter(name, form, value, value, 1))
        self.terminal.line(Progress(iterations, meters).line(None, iteration))

    def evaluated(self, best: HeadResult, epoch: int, epochs: int, many: bool) -> None:
        """The accuracy of the best head; in the reference's style `` * Acc@1 … Acc@5 …``."""
        name = f"  ({best.name})" if many else ""
        self._best = f"Acc@1 {best.acc1:.1f}"
        self.terminal.line(f" * Acc@1 {best.acc1:.3f} Acc@5 {best.acc5:.3f}{name}")
        if self.terminal.style == "bar":
            left = "" if self.terminal.moves or epoch + 1 == epochs else f"  {self.terminal.clock.left} left"
            self.say(f"epoch {epoch + 1}/{epochs}: Acc@1 {best.acc1:.2f} Acc@5 {best.acc5:.2f}{name}{left}")

    def write(self, lines: Sequence[dict[str, Any]]) -> None:
        """Lines of ``lincls.jsonl``."""
        if self._file is None:
            return
        for line in map(_plain, lines):
            self._file.write(json.dumps(line))
            self.terminal.json(line)
        best = max(lines, key=lambda line: line["best_acc1"])
        numbers = {k: v for k, v in _plain(best).items() if k != "epoch" and isinstance(v, int | float)}
        every = {f"acc1/{line['head']} lr {line['lr']:g} wd {line['weight_decay']:g}": line["acc1"] for line in lines}
        self._loggers.scalars({**numbers, **every}, best["epoch"])

    def result(self, results: Sequence[HeadResult], about: dict[str, Any]) -> None:
        """The table of heads, its warnings, and ``lincls.json``."""
        if not self.active:
            return
        best = results[best_of(results)]
        content = {**about, "best": _plain(asdict(best)), "heads": [_plain(asdict(r)) for r in results]}
        partial = self.folder / f".{RESULT}.{os.getpid()}.partial"
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.folder / RESULT)
        if len(results) > 1:
            self.terminal.result(table(results))
        self.terminal.result(
            f"{about['protocol']}: best Acc@1 {best.best_acc1:.3f} ({best.name}, after epoch {best.best_epoch})"
        )
        for text in edges(results):
            warn(text)

    def sync(self) -> None:
        """Flush what was logged so far to the disk, as far as the disk takes it."""
        if self._file is not None:
            self._file.sync()

    def close(self) -> None:
        """Finish the file and the bar."""
        self.terminal.close()
        if self._file is not None:
            self._file.close()
            self._loggers.close()


def _plain(line: dict[str, Any]) -> dict[str, Any]:
    """The line without NaN and infinities, which JSON does not know: losses of heads that diverged are null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
