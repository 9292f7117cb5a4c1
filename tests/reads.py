"""Counts what would make a GPU wait: calls that need a value of a tensor."""

from torch.overrides import TorchFunctionMode

READS = {
    "item",
    "tolist",
    "numpy",
    "cpu",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
    "__array__",
    "__repr__",
    "__format__",
    "is_nonzero",
    "nonzero",
    "equal",
    "allclose",
}


class Reads(TorchFunctionMode):
    """Collects the calls that need a value of a tensor, for which a GPU would have to be waited for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in READS:
            self.found.append(name)
        return func(*args, **(kwargs or {}))
