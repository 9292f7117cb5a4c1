"""From files to batches of views. Nothing in this package imports torch, so that loader processes start at once."""

from mocov3.data.loader import Batch, Loader, Work
from mocov3.data.sources import FashionMnist, Source, open_source
from mocov3.data.views import CentreView, TwoViews

__all__ = ["Batch", "CentreView", "FashionMnist", "Loader", "Source", "TwoViews", "Work", "open_source"]
