"""Output of linear evaluation: terminal, ``lincls.jsonl``, loggers, the sorted table of heads."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from mocov3.config import LinclsConfig
from mocov3.evaluation.measures import described
from mocov3.metrics import JsonLine, Meter, plain
from mocov3.output.log import Log, Session, warn

LINES, RESULT = "lincls.jsonl", "lincls.json"


@dataclass(frozen=True)
class Titles:
    """What a head is judged by, as it is called."""

    first: str
    """Chooses the best head."""
    second: str
    keys: dict[str, str]
    """Names in JSON, of fields of ``HeadResult`` and of lines; empty: left out."""

    def named(self, line: JsonLine) -> JsonLine:
        """A line with its fields called so."""
        return {self.keys.get(key, key): value for key, value in line.items() if self.keys.get(key, key)}


CLASSES = Titles("Acc@1", "Acc@5", {})
_OF_FINDINGS = {
    "acc1": "auroc",
    "acc5": "average_precision",
    "best_acc1": "best_auroc",
    "train_acc1": "",
    "train_acc5": "",
}
FINDINGS = Titles("AUROC", "AP", _OF_FINDINGS)


def titles(labels: Tensor) -> Titles:
    """Of classes (images,) or findings (images, findings)."""
    return FINDINGS if labels.ndim == 2 else CLASSES


@dataclass
class HeadResult:
    """A head and how it is judged on the validation set, in %: accuracy, of findings AUROC and average precision."""

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


def table(results: Sequence[HeadResult], called: Titles = CLASSES) -> str:
    """Heads from best to worst by their best epoch, the best marked."""
    order = sorted(range(len(results)), key=lambda i: (-results[i].best_acc1, i))
    first, second = called.first, called.second
    lines = [f"  {'head':<10} {'lr':>8} {'wd':>8} {first:>8} {'epoch':>6}   {'last ' + first:>10} {second:>8}"]
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


def scores(called: Titles = CLASSES) -> list[Meter]:
    """Meters of loss, top-1 and top-5; of loss alone where there are findings."""
    accuracies = [Meter("Acc@1", "6.2f"), Meter("Acc@5", "6.2f")] if called is CLASSES else []
    return [Meter("Loss", ".4e"), *accuracies]


class EvaluationLog(Log):
    """Output of a run of linear evaluation. On ranks that do not write, every call does nothing.

    Args:
        config: of the run.
        session: what this process does of it.
        called: what heads are judged by.
    """

    def __init__(self, config: LinclsConfig, session: Session, called: Titles = CLASSES) -> None:
        self.called, self._scores = called, scores(called)
        super().__init__(config, session, self._scores)
        self._best = ""
        self._lines, _ = self.open(LINES, lambda line: line["epoch"] < session.first_epoch)

    @property
    def seconds(self) -> float:
        """Seconds of this epoch's steps so far."""
        return self._time.total

    def line(self, epoch: int, iteration: int, now: Sequence[float], mean: Sequence[float]) -> None:
        """A training step: loss, Acc@1, Acc@5 of this step and on average so far."""
        for meter, value, average in zip(self._scores, now, mean, strict=False):
            meter.value, meter.total, meter.count = value, average, 1
        self.terminal.line(self._progress.line(epoch, iteration))
        if self.terminal.moves:  # a file gets one line an epoch
            speed, waiting = self.speed()
            self.terminal.status(
                [
                    f"loss {mean[0]:.3f}",
                    self._best,
                    f"{speed:.0f} img/s",
                    f"wait {100 * waiting:.0f}%",
                    f"training Acc@1 {mean[1]:.1f}" if self.called is CLASSES else "",
                ]
            )

    def evaluated(self, best: HeadResult, epoch: int, epochs: int, many: bool) -> None:
        """The accuracy of the best head; in the reference's style `` * Acc@1 … Acc@5 …``."""
        name = f"  ({best.name})" if many else ""
        first, second = self.called.first, self.called.second
        self._best = f"{first} {best.acc1:.1f}"
        self.terminal.line(f" * {first} {best.acc1:.3f} {second} {best.acc5:.3f}{name}")
        if self.terminal.style == "bar":
            left = "" if self.terminal.moves or epoch + 1 == epochs else f"  {self.terminal.clock.left} left"
            self.say(f"epoch {epoch + 1}/{epochs}: {first} {best.acc1:.2f} {second} {best.acc5:.2f}{name}{left}")

    def write(self, lines: Sequence[JsonLine]) -> None:
        """Lines of ``lincls.jsonl``."""
        for line in lines:
            self._write(self._lines, self.called.named(line))
        best = max(lines, key=lambda line: line["best_acc1"])
        numbers = {
            k: v for k, v in plain(self.called.named(best)).items() if k != "epoch" and isinstance(v, int | float)
        }
        first = self.called.keys.get("acc1", "acc1")
        every = {
            f"{first}/{line['head']} lr {line['lr']:g} wd {line['weight_decay']:g}": line["acc1"] for line in lines
        }
        self.loggers.scalars({**numbers, **every}, best["epoch"])

    def summary(
        self, results: Sequence[HeadResult], about: JsonLine, measures: JsonLine, classes: Sequence[str]
    ) -> None:
        """The table of heads, its warnings, further measures of the best, and ``lincls.json``."""
        if not self.writes:
            return
        best = results[best_of(results)]
        every = [plain(self.called.named(asdict(r))) for r in results]
        content = {**about, "best": plain(self.called.named(asdict(best))), "heads": every}
        content |= {"measures": measures} if measures else {}
        partial = self.folder / f".{RESULT}.{os.getpid()}.partial"
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.folder / RESULT)
        if len(results) > 1:
            self.terminal.result(table(results, self.called))
        self.terminal.result(
            f"{about['protocol']}: best {self.called.first} {best.best_acc1:.3f} ({best.name}, after epoch "
            f"{best.best_epoch})"
        )
        for line in described(measures, classes):
            self.terminal.result(line)
        for text in edges(results):
            warn(text)
