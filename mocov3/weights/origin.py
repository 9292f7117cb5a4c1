"""Where weights come from and under which licence they may be used; carried from file to file."""

from functools import lru_cache

from mocov3.weights import Contents, checkpoint, our_entry

_OWN = "trained from scratch by mocov3"
_TRAINERS = "the trainer's to choose"
_REFERENCE = "CC-BY-NC 4.0 (weights of facebookresearch/moco-v3)"


def origin_of(contents: Contents) -> dict[str, str]:
    """Origin and licence of the weights in a file: what it says itself, else what its layout tells."""
    entry = our_entry(contents)
    if isinstance(entry.get("origin"), str):
        return {"origin": entry["origin"], "licence": str(entry.get("licence") or "not stated")}
    state = contents.get("state_dict")
    if isinstance(state, dict) and any(str(k).startswith("module.base_encoder.") for k in state):
        return {"origin": "a file of facebookresearch/moco-v3, or of a program of its layout", "licence": _REFERENCE}
    return {"origin": "not stated in the file", "licence": "not stated in the file; ask where you got it"}


@lru_cache
def origin_of_run(init: str) -> dict[str, str]:
    """Entries ``origin`` and ``licence`` of a run that starts from ``--init`` (empty: from scratch)."""
    if not init:
        return {"origin": _OWN, "licence": _TRAINERS}
    if init.startswith("timm/"):
        return {"origin": f"initialised from {init}, trained on by mocov3", "licence": timm_licence(init)}
    before = origin_of(checkpoint.read(init))
    return {"origin": f"initialised from {init} ({before['origin']})"[:500], "licence": before["licence"]}


def timm_licence(name: str) -> str:
    """The licence that timm states for the weights of ``timm/NAME``."""
    import timm

    settings = timm.get_pretrained_cfg(name.removeprefix("timm/"))
    stated = getattr(settings, "license", None)
    return f"{stated} (as timm states it)" if stated else "that of the weights timm fetches; see their model card"
