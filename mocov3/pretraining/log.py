"""Output of a pre-training run: what its lines say, and the steps that changed nothing."""

import math
from collections.abc import Container, Mapping, Sequence

from mocov3 import losses
from mocov3.config import PretrainConfig
from mocov3.metrics import JsonLine, MetricsLine, measured
from mocov3.output.log import SKIPPED, Session, TrainingLog, warn
from mocov3.output.loggers import ImageBytes

_BINDS = 0.2
"""Share of the time spent waiting for images from which on loading, not training, says how fast a run is."""


class PretrainingLog(TrainingLog):
    """Output of a pre-training run. On ranks that do not write, every call does nothing.

    Args:
        config: of the run.
        session: what this process does of it.
        corrupt: indices of the unreadable images met by a former process.
    """

    def __init__(self, config: PretrainConfig, session: Session, corrupt: Container[int] = ()) -> None:
        super().__init__(config, session, corrupt)
        parts = 1.0 + (config.local_weight if config.local is not None else 0.0)
        self.start = parts * losses.loss_start(config.moco_t, config.batch_size)
        """Loss where all keys look alike."""
        self.floor = parts * losses.loss_floor(config.moco_t, config.batch_size)
        """Loss that it can hardly fall below."""
        self._skipped, _ = self.open(SKIPPED, lambda line: line["step"] < session.first_step)
        self._knn = self.last_known("knn")
        self.last = _parsed(self.former[-1]) if self.former else None
        """The last line of a former process, without k-NN: what a resume starts from."""
        self.shown: MetricsLine | None = None
        """The last line of this process."""

    def standing(self, epochs: float) -> str:
        """Where the run stands after so many epochs, in words."""
        done, of = (f"{round(count, 1):g}" for count in (epochs, self.terminal.clock.total / self.terminal.iterations))
        if self.shown is None:
            return f"{done} epochs"
        knn = f", k-NN {self._knn:.2f} %" if self._knn is not None else ""
        start, floor = f"start {self.start:.2f}", f"floor {self.floor:.2f}"
        return f"{done} of {of} epochs, loss {self.shown.loss:.4f} ({start}, {floor}){knn}"

    def losses(self, history: Sequence[tuple[int, float, float]]) -> None:
        """Record (step, loss, lr) of steps, in order: TensorBoard's tag ``loss`` and the line's averages."""
        for step, loss, lr in history:
            self._loss.update(loss)
            self._lr.update(lr)
            self.loggers.scalars({"loss": loss}, step)

    def metrics(self, line: MetricsLine) -> None:
        """Write one line of metrics, and show it."""
        self._write(self._metrics, line.as_dict())
        self.loggers.scalars(measured(line), line.step)
        self.terminal.line(self._progress.line(line.epoch, line.iteration))
        self.terminal.status(self._parts(line))
        self.shown = line

    def scalars(self, values: Mapping[str, float | None], step: int) -> None:
        """Further numbers, for the loggers alone."""
        self.loggers.scalars(values, step)

    @property
    def takes_images(self) -> bool:
        """Whether there is a logger that images are worth making for."""
        return bool(self.loggers)

    def image(self, name: str, image: ImageBytes, step: int) -> None:
        """An image, for the loggers."""
        self.loggers.image(name, image, step)

    def skipped(self, *, step: int, epoch: int, iteration: int, loss: float, images: list[int]) -> None:
        """List a step that changed nothing, with its images by index."""
        value = loss if math.isfinite(loss) else None
        self._skipped.write({"step": step, "epoch": epoch, "iteration": iteration, "loss": value, "pictures": images})
        if self.writes:
            warn(
                f"step {step} skipped: its loss ({loss:.4g}) or gradient was not finite, or a spike "
                f"(listed in {SKIPPED})"
            )

    def knn(self, line: MetricsLine, epoch: int) -> None:
        """Write the k-NN accuracy at the end of an epoch."""
        self._knn = line.knn
        self._write(self._metrics, line.as_dict())
        self.loggers.scalars({"knn": line.knn}, line.step)
        self.say(f"Epoch {epoch}: k-NN {line.knn:.2f} %")

    def _parts(self, line: MetricsLine) -> list[str]:
        return [
            self.terminal.between(line.loss, self.start, self.floor),
            f"k-NN {self._knn:.1f}" if self._knn is not None else "",
            f"drift {line.drift:.3f}" if line.drift is not None else "",
            f"{line.images_per_second:.0f} img/s",
            f"{'waits for data' if line.data_wait >= _BINDS else 'wait'} {100 * line.data_wait:.0f}%",
            f"found {100 * line.retrieval_accuracy:.0f}%",
        ]


def _parsed(entry: JsonLine) -> MetricsLine | None:
    try:
        return MetricsLine(**{**entry, "knn": None})
    except TypeError:  # of another version
        return None
