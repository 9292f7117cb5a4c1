"""From files to batches of views. Nothing in this package imports torch, so that loader processes start at once."""

from mocov3.data.loading.loader import Loader
from mocov3.data.loading.slots import Batch, Work
from mocov3.data.sources.embedded import FashionMnist
from mocov3.data.sources.opening import Source, open_source
from mocov3.data.views.two_views import CentreView, TwoViews

__all__ = ["Batch", "CentreView", "FashionMnist", "Loader", "Source", "TwoViews", "Work", "open_source"]
