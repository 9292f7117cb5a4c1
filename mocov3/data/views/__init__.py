"""Two views of an image: what is random about them as data, and the ways to apply it."""

from mocov3.data.views.two_views import CentreView, TwoViews

__all__ = ["CentreView", "TwoViews"]
