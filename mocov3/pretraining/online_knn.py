"""During training: k-NN accuracy on DIR/val, and images for the loggers (views; queries with their neighbours)."""

import numpy as np
import torch

from mocov3.config import PretrainConfig
from mocov3.data import CentreView, Source
from mocov3.data.loading.loader import loader_workers
from mocov3.data.sources.survey import scattered
from mocov3.distributed import World
from mocov3.evaluation.features import extract
from mocov3.evaluation.neighbours import knn_accuracy, nearest
from mocov3.models import MoCo
from mocov3.output.sheet import draw_neighbours, draw_views
from mocov3.pretraining.inputs import open_validation
from mocov3.pretraining.log import PretrainingLog

_QUERIES, _NEIGHBOURS = 8, 8


class OnlineKnn:
    """What a run measures and shows of itself while it trains.

    Args:
        config: of the run.
        world: this rank; features are divided among the ranks.
        model: its query backbone is looked at.
        source: the images that are trained on.
        log: whose loggers get the images.
    """

    def __init__(self, config: PretrainConfig, world: World, model: MoCo, source: Source, log: PretrainingLog) -> None:
        self.config, self.world, self.model, self.source, self.log = config, world, model, source, log

    def show_views(self, step: int) -> None:
        """Some images with draws of both views."""
        if self.log.takes_images:
            sheet, rows = draw_views(self.source, self.config)
            if rows:
                self.log.image("views", np.asarray(sheet), step)

    def knn(self, step: int) -> float:
        """k-NN accuracy in % of the validation images; every rank must call it at the same step."""
        known, validation = open_validation(self.config, self.source)
        bank, queries = (self._features(source) for source in (known, validation))
        labels = [torch.as_tensor(source.labels, dtype=torch.long) for source in (known, validation)]
        if self.log.takes_images:
            shown = scattered(len(validation), _QUERIES)
            neighbours = nearest(bank, queries[torch.from_numpy(shown)], min(_NEIGHBOURS, len(bank)))
            sheet = draw_neighbours(validation, shown, known, neighbours.index.numpy(), self.config.preset.reading)
            self.log.image("neighbours", np.asarray(sheet), step)
        return knn_accuracy(bank, labels[0], queries, labels[1])

    def _features(self, source: Source) -> torch.Tensor:
        c, preset = self.config, self.config.preset
        return extract(
            self.model.base_encoder,
            self.model.features,
            source,
            CentreView(c.image_size, preset.evaluation_zoom, reading=preset.reading),
            world=self.world,
            mean=preset.mean,
            std=preset.std,
            workers=loader_workers(c.workers, self.world.local_size, len(source)),
        )
