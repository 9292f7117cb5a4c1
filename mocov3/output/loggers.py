"""Where a run's numbers and images go besides its folder: TensorBoard, Weights & Biases, MLflow, behind three calls.

Places and accounts are each one's own business: ``WANDB_MODE=offline``, ``WANDB_PROJECT``, ``MLFLOW_TRACKING_URI``,
``MLFLOW_EXPERIMENT_NAME`` … A logger that fails costs no run: it is given up, with a warning.
"""

import contextlib
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8

from mocov3.config.fields import Fields
from mocov3.errors import UserError, printable

PROJECT = "mocov3"
RUN_ID = "logger_run.txt"
_PARAMS, _METRICS = 100, 500  # what MLflow takes at once
_PATIENCE = 60.0  # seconds that the end of a run waits for a server

ImageBytes = UInt8[np.ndarray, "height width 3"]


class Logger(Protocol):
    """What every logger can do. It is opened with the run's configuration."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of a step."""

    def image(self, name: str, image: ImageBytes, step: int) -> None:
        """An image of a step."""

    def close(self) -> None:
        """Hand over what is left."""


class Loggers:
    """Several loggers as one; each that fails is given up.

    Args:
        names: of ``tensorboard``, ``wandb``, ``mlflow``.
        folder: of the run.
        config: its configuration.
        first_step: step at which this process begins.
        quiet: whether loggers print nothing.
        warn: called with a line about a failure.

    Raises:
        UserError: if one cannot be opened by a run that begins; a resumed run does without it.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        *,
        config: Fields,
        first_step: int,
        quiet: bool,
        warn: Callable[[str], None],
    ) -> None:
        self.warn = warn
        self._loggers: dict[str, Logger] = {}
        for name in names:
            try:
                self._loggers[name] = _OPEN[name](folder, dict(config), first_step, quiet)
            except Exception as error:  # whatever a client raises
                if not first_step:
                    self.close()
                    raise UserError(f"--logger {name}: cannot be opened ({_reason(error)})") from None
                warn(f"--logger {name}: cannot be opened ({_reason(error)}); the run continues without it")

    def scalars(self, values: Mapping[str, float | None], step: int) -> None:
        """Numbers of a step; those that were not measured are left out."""
        known = {name: float(value) for name, value in values.items() if value is not None}
        self._each(lambda logger: logger.scalars(known, step))

    def image(self, name: str, image: ImageBytes, step: int) -> None:
        """An image of a step."""
        self._each(lambda logger: logger.image(name, image, step))

    def close(self) -> None:
        """Finish all of them."""
        self._each(lambda logger: logger.close())
        self._loggers.clear()

    def __bool__(self) -> bool:
        return bool(self._loggers)

    def _each(self, call: Callable[[Logger], None]) -> None:
        for name, logger in list(self._loggers.items()):
            try:
                call(logger)
            except Exception as error:  # whatever a client, its server or the disk thinks up
                self.warn(f"logger {name} is disabled ({_reason(error)})")
                del self._loggers[name]


class TensorBoardLogger:
    """Event files in the run's folder ``tensorboard``."""

    def __init__(self, folder: Path, config: Fields, first_step: int, quiet: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter

        _hush_event_threads()
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step or None)
        if not first_step:
            rows = "\n".join(f"| {name} | {str(value).replace('|', ' ')} |" for name, value in config.items())
            self._writer.add_text("config", f"| flag | value |\n|---|---|\n{rows}", 0)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """See ``Logger``."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, name: str, image: ImageBytes, step: int) -> None:
        """See ``Logger``."""
        self._writer.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """See ``Logger``."""
        self._writer.close()


class WandbLogger:
    """A run of Weights & Biases; its files are in the run's folder ``wandb``. A resumed run continues in it."""

    def __init__(self, folder: Path, config: Fields, first_step: int, quiet: bool) -> None:
        import wandb

        self._wandb = wandb
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=os.environ.get("WANDB_NAME") or folder.resolve().name,
            id=_run_id(folder, first_step),
            resume="allow",
            dir=str(folder),
            config=config,
            settings=wandb.Settings(console="off", silent=quiet),
        )
        # steps of a resumed run may come twice: the step is a number like others
        self._run.define_metric("*", step_metric="step")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """See ``Logger``."""
        self._run.log({**values, "step": step})

    def image(self, name: str, image: ImageBytes, step: int) -> None:
        """See ``Logger``."""
        self._run.log({name: self._wandb.Image(image), "step": step})

    def close(self) -> None:
        """See ``Logger``."""
        self._run.finish()


class MlflowLogger:
    """A run of MLflow; calls wait in a queue for a thread, so that training never waits for a server."""

    def __init__(self, folder: Path, config: Fields, first_step: int, quiet: bool) -> None:
        # a server that is not there is said within seconds, where MLflow itself tries for minutes
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        self._metric = Metric
        self._client: Any = MlflowClient()
        self._id = self._open_run(folder, config, first_step)
        self._queue: queue.Queue[Any] = queue.Queue()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._serve, name="mlflow", daemon=True)
        self._thread.start()

    def _open_run(self, folder: Path, config: Fields, first_step: int) -> str:
        """The run's identifier: of a resumed run its own, else of a new one, which is told the configuration."""
        from mlflow.entities import Param

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        run = _run_id(folder, first_step)
        runs = self._client.search_runs([experiment], f"tags.mocov3_run = '{run}'", max_results=1)
        if runs:
            self._client.update_run(runs[0].info.run_id, status="RUNNING")
            return str(runs[0].info.run_id)
        created = self._client.create_run(experiment, tags={"mocov3_run": run}, run_name=folder.resolve().name)
        params = [Param(key, str(value)[:500]) for key, value in config.items()]
        for i in range(0, len(params), _PARAMS):
            self._client.log_batch(created.info.run_id, params=params[i : i + _PARAMS])
        return str(created.info.run_id)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """See ``Logger``."""
        self._check()
        now = int(1000 * time.time())
        for name, value in values.items():
            self._queue.put(self._metric(name, value, now, step))

    def image(self, name: str, image: ImageBytes, step: int) -> None:
        """See ``Logger``."""
        self._check()
        self._queue.put((name, image, step))

    def close(self) -> None:
        """See ``Logger``."""
        self._queue.put(None)
        self._thread.join(_PATIENCE)
        self._check()
        if self._thread.is_alive():
            raise TimeoutError(f"its server did not take everything within {_PATIENCE:.0f} s")
        self._client.set_terminated(self._id)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _serve(self) -> None:
        ended = False
        while not ended:
            waiting = [self._queue.get()]
            with contextlib.suppress(queue.Empty):
                while len(waiting) < _METRICS:
                    waiting.append(self._queue.get_nowait())
            ended = None in waiting
            try:
                self._send([item for item in waiting if item is not None])
            except Exception as error:  # told by the next call
                self._error = error
                return

    def _send(self, items: Sequence[object]) -> None:
        metrics = [item for item in items if not isinstance(item, tuple)]
        if metrics:
            self._client.log_batch(self._id, metrics=metrics)
        for name, image, step in (item for item in items if isinstance(item, tuple)):
            self._client.log_image(self._id, image, key=name, step=step)


_OPEN: dict[str, Any] = {"tensorboard": TensorBoardLogger, "wandb": WandbLogger, "mlflow": MlflowLogger}


def _hush_event_threads() -> None:
    """No traceback of TensorBoard's thread where the disk is full: its error is raised again by the next call."""
    former = threading.excepthook
    if getattr(former, "hushed", False):
        return

    def hook(args: threading.ExceptHookArgs) -> None:
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
            former(args)

    hook.hushed = True  # type: ignore[attr-defined]
    threading.excepthook = hook


def _run_id(folder: Path, first_step: int) -> str:
    """Name of the run with the loggers, kept in its folder for a resume."""
    file = folder / RUN_ID
    if first_step and file.exists() and (known := file.read_text(encoding="utf-8").strip()).isalnum():
        return known
    run_id = secrets.token_hex(8)
    file.write_text(run_id + "\n", encoding="utf-8")
    return run_id


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return printable(str(text).strip().splitlines()[0])[:200]
