"""During training: k-NN accuracy on DIR/val, and images for the loggers (views; queries with their neighbours)."""

import numpy as np
import torch
from torch import Tensor

from mocov3.config import PretrainConfig
from mocov3.data import CentreView, Source
from mocov3.data.loading.loader import loader_workers
from mocov3.data.sources.groups import groups_of
from mocov3.data.sources.survey import scattered
from mocov3.distributed import World
from mocov3.evaluation.features import Extractor, collect
from mocov3.evaluation.neighbours import Groups, K, knn_predict, nearest
from mocov3.models import MoCo
from mocov3.models.precision import frozen_precision
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
        groups = groups_of((known, validation), self.config.group_by)
        (bank, classes, read), (queries, answers, asked) = (self._features(s) for s in (known, validation))
        own = Groups.between(groups and (groups[0][read], groups[1][asked]))
        if self.log.takes_images:
            shown = scattered(len(queries), _QUERIES)
            rows = torch.from_numpy(shown)
            k = min(_NEIGHBOURS, own.available if own else len(bank))
            found = nearest(bank, queries[rows], k, groups=own and own.of_queries(rows)).index.numpy()
            sheet = draw_neighbours(validation, asked[shown], known, read[found], self.config.preset.reading)
            self.log.image("neighbours", np.asarray(sheet), step)
        return self._accuracy(bank, classes, queries, answers, own)

    def _accuracy(self, bank: Tensor, classes: Tensor, queries: Tensor, answers: Tensor, own: Groups | None) -> float:
        """Accuracy in % over the queries of all ranks, each of which searches for a part of them on its device."""
        world = self.world
        mine = torch.arange(world.rank, len(queries), world.size)
        k, among = min(K, own.available if own else len(bank)), own and own.of_queries(mine)
        predicted = knn_predict(bank, classes, queries[mine], k=k, groups=among, device=world.device)
        hits = world.sum((predicted == answers[mine]).sum().to(world.device))
        return 100 * int(hits) / len(queries)

    def _features(self, source: Source) -> tuple[Tensor, Tensor, np.ndarray]:
        """Features, classes and indices of the readable images."""
        c, preset = self.config, self.config.preset
        view = CentreView(c.image_size, preset.evaluation_zoom, reading=preset.reading)
        collected = collect(
            Extractor(self.model.base_encoder, self.model.features, view, preset.mean, preset.std),
            source,
            world=self.world,
            workers=loader_workers(c.workers, self.world.local_size, len(source)),
            autocast=frozen_precision("auto", self.world.device).autocast,
            check=False,
            title=f"data {c.data_title}",
        )
        read = np.flatnonzero(collected.readable)
        features = collected.features[torch.from_numpy(read)] if collected.corrupt else collected.features
        return features, torch.as_tensor(source.labels, dtype=torch.long)[torch.from_numpy(read)], read
