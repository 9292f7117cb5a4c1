"""Starting weights: ``--init`` as a file (ours, the reference's, timm's, torchvision's) or as ``timm/NAME``.

Both encoders start from them; the heads stay fresh.
"""

import dataclasses
import os
from pathlib import Path

from torch import Tensor

from mocov3.config.archs import CLASSIFIER_KEYS, RESNETS
from mocov3.config.presets import PRESETS, ViewPreset
from mocov3.errors import UserError, nearest
from mocov3.models import Encoder
from mocov3.output.log import warn
from mocov3.weights import Contents, attention_heads, checkpoint, trained_with
from mocov3.weights.adapters import read_adapter, with_adapter
from mocov3.weights.convert import load_into, views_of
from mocov3.weights.find import BackboneWeights, find_backbone, hint


def load_start(init: str, encoders: list[Encoder], arch: str, heads: int | None = None, adapter: str = "") -> None:
    """Load the weights of ``--init``, as ``--adapter`` says, into encoders, their projectors left alone.

    Raises:
        UserError: if they cannot be had, are not of this arch (naming the arch they fit, if it is one of ours), or not
            of the encoders' attention heads (``heads``: those of a file that does not tell).
    """
    where = f"--init {init}"
    weights = starting_weights(init, heads, arch)
    if adapter:
        weights = with_adapter(weights, read_adapter(adapter), where)
    weights = for_channels(weights, encoders[0], where)
    try:
        for encoder in encoders:
            load_into(encoder, weights, where)
    except UserError as error:
        raise UserError(f"{error} ({hint(weights)})") from None


def is_timms(init: str) -> bool:
    """Whether ``--init`` names weights that timm publishes, and no file."""
    return init.startswith("timm/") and not Path(init).is_file()


def views_of_start(init: str, adapter: str = "", contents: Contents | None = None) -> tuple[str, ViewPreset]:
    """The views that the weights of ``--init`` were trained with: the preset's name, and its values with their own
    normalisation; ``photos`` where nothing is said, as by files of the reference and DeiT. ``contents``: of the file,
    if that has been read.

    Raises:
        UserError: if there is no such file.
    """
    if is_timms(init) and not adapter:
        import timm

        photos, cfg = PRESETS["photos"], timm.get_pretrained_cfg(init.removeprefix("timm/"))
        return "photos", dataclasses.replace(photos, mean=tuple(cfg.mean), std=tuple(cfg.std)) if cfg else photos
    contents = read_adapter(adapter).contents if adapter else contents or checkpoint.read(init)
    name = str(trained_with(contents).get("view_preset") or "photos")
    return name, views_of(contents, f"--adapter {adapter}" if adapter else f"--init {init}")


def for_channels(weights: BackboneWeights, encoder: Encoder, where: str) -> BackboneWeights:
    """The first convolution for another number of channels, by timm's rule.

    One channel: the sum of the three, so that grey images give what they gave as RGB; more: the three in turn, scaled
    to the same sum.
    """
    from timm.models import adapt_input_conv

    state, changed = dict(weights.state), dict[str, Tensor]()
    for key, wanted in encoder.state_dict().items():
        value = state.get(name := key if key in state else key.removeprefix("backbone."))
        if value is None or value.ndim != 4 or value.shape[:1] + value.shape[2:] != wanted.shape[:1] + wanted.shape[2:]:
            continue
        if value.shape[1] == 3 != wanted.shape[1] and not changed:  # the first of all, in the order of the keys
            changed[name] = adapt_input_conv(wanted.shape[1], value)
    if changed:
        warn(f"{where}: {next(iter(changed))} was trained on 3 channels; it starts from them, summed or repeated")
    return dataclasses.replace(weights, state={**state, **changed})


def starting_weights(
    init: str, heads: int | None = None, arch: str | None = None, contents: Contents | None = None
) -> BackboneWeights:
    """The backbone that ``--init`` names; ``heads`` and ``arch`` as for ``find_backbone``, ``contents`` of the file, if
    that has been read.

    Raises:
        UserError: if there is no such file or model, it cannot be fetched, or is of other attention heads.
    """
    if is_timms(init):
        return _from_timm(init, heads)
    return find_backbone(contents or checkpoint.read(init), f"--init {init}", heads=heads, arch=arch)


def _from_timm(init: str, heads: int | None) -> BackboneWeights:
    import timm

    name = init.removeprefix("timm/")
    if not timm.is_model(name):
        raise UserError(
            f"--init {init}: timm {timm.__version__} has no such model; {nearest(name, timm.list_models())[:300]}"
        )
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "10")
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except RuntimeError as error:
        raise UserError(f"--init {init}: timm has no weights of this name ({str(error)[:100]})") from None
    except Exception as error:  # the hub's client raises its own errors, the network others
        raise UserError(
            f"--init {init}: its weights could not be fetched ({type(error).__name__}); fetch them on a "
            "machine with a network and give the file"
        ) from None
    state = {key: value for key, value in model.state_dict().items() if not key.startswith(CLASSIFIER_KEYS)}
    known = attention_heads.Known(attention_heads.heads_of(model), "timm's network")
    known = attention_heads.settled(known, heads, attention_heads.width_of(state), f"--init {init}")
    plain = name.split(".", 1)[0]  # torchvision's ResNets are ours
    return BackboneWeights("timm model", plain if plain in RESNETS else init, state, heads=known)
