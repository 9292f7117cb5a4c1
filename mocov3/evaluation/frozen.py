"""A frozen backbone for evaluation: from a weights file, a name, or none (pixels); which feature of it is taken."""

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mocov3 import models
from mocov3.config.archs import HEAD_KEYS, check_heads, is_vit, stored_heads
from mocov3.config.evaluation import FeatureConfig
from mocov3.config.presets import PRESETS, Reading, ViewPreset
from mocov3.config.views import as_read
from mocov3.data import CentreView
from mocov3.errors import UserError
from mocov3.evaluation.features import Extractor
from mocov3.evaluation.layers import Pixels, layer_of
from mocov3.models.backbones import Encoder, Settings, TimmEncoder, build_backbone
from mocov3.weights import Contents, attention_heads, checkpoint, our_entry
from mocov3.weights.adapters import read_adapter, with_adapter
from mocov3.weights.convert import load_into, settings_of, views_of
from mocov3.weights.find import find_backbone, hint

PIXELS = "pixels"


@dataclass(frozen=True)
class Frozen:
    """A backbone in evaluation mode without gradients, and how images are prepared for it."""

    network: nn.Module
    features: Callable[[Tensor], Tensor]
    arch: str
    image_size: int
    preset: ViewPreset
    settings: Settings
    """Of ``build_backbone``."""
    about: str
    """What it is, for people."""

    @property
    def width(self) -> int:
        """Numbers of an image's feature that linear evaluation uses."""
        return int(self.network.num_features)  # type: ignore[arg-type]

    @property
    def heads(self) -> int | None:
        """Attention heads of one of our ViTs, else ``None``."""
        return attention_heads.heads_of(self.network) if is_vit(self.arch) else None

    @property
    def head(self) -> str:
        """Name of the module in place of the classifier."""
        return str(self.network.projector_name)

    @property
    def view(self) -> CentreView:
        """The evaluation view."""
        return CentreView(self.image_size, self.preset.evaluation_zoom, reading=self.preset.reading)

    @property
    def extractor(self) -> Extractor:
        """What makes its features of images."""
        return Extractor(self.network, self.features, self.view, self.preset.mean, self.preset.std)

    def to(self, device: torch.device) -> "Frozen":
        """The same on a device, in the layout that convolutions are fastest in."""
        self.network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self

    def digest(self) -> str:
        """sha256 over names and values of all parameters and buffers but those of the head."""
        head = f"{self.head}."
        total = hashlib.sha256()
        for name, value in self.network.state_dict().items():
            if not name.startswith(head):
                total.update(name.encode())
                total.update(value.detach().cpu().numpy().tobytes())  # in C order, whatever the memory layout
        return total.hexdigest()


def open_frozen(
    model: str,
    *,
    flag: str,
    arch: str = "",
    encoder: str = "base",
    image_size: int = 0,
    view_preset: str = "",
    layer: str = "",
    untrained: bool = False,
    seed: int = 0,
    heads: int | None = None,
    adapter: str = "",
    channels: int = 0,
    bit_window: str = "",
) -> Frozen:
    """The backbone that ``model`` names.

    Args:
        model: a weights file; the name of an arch (freshly initialised by ``seed``); ``timm/NAME`` (timm's published
            weights unless ``untrained``); ``pixels``.
        flag: the flag that gave it, for messages.
        arch: of a file that does not say; of one that does, it must agree.
        encoder: ``base`` or ``momentum``.
        image_size: side of the views in pixels; 0: as in pre-training, else 224.
        view_preset: its mean, standard deviation and centre crop; empty: as in pre-training, else ``photos``.
        layer: which feature, see ``FeatureConfig``.
        untrained: do not take timm's published weights.
        seed: of a fresh initialisation.
        heads: attention heads of a ViT, of a file that does not tell, or of a fresh one.
        adapter: what a run with ``--lora`` trained on a file's weights; its views are then those of that run.
        channels: of an image; 0: as in pre-training, else 3.
        bit_window: LOW,HIGH of images of more than 8 bits; empty: as in pre-training, else none.

    Raises:
        UserError: if the file holds no backbone, or not of this arch (naming those that fit) or these heads.
    """
    if Path(model).is_file():
        read = channels, bit_window
        return _from_file(model, f"{flag} {model}", arch, encoder, image_size, view_preset, layer, heads, adapter, read)
    if adapter:
        raise UserError(f"--adapter {adapter}: belongs to a file of weights; {flag} {model} names none")
    check_heads(heads, model)
    if encoder == "momentum" or layer == "projector":
        what = "momentum encoder" if encoder == "momentum" else "projector"
        raise UserError(f"{flag} {model}: has no {what}; a pre-training checkpoint has")
    torch.manual_seed(seed)
    size, channels = image_size or 224, channels or 3
    preset = as_read(PRESETS[view_preset or "photos"], channels, bit_window)
    if model == PIXELS:
        return _frozen(Pixels(size, channels), PIXELS, size, preset, {}, "pixels, no network", layer)
    if model.startswith("timm/") and not untrained:
        return _published(model, image_size, preset if view_preset else None, layer, channels, bit_window)
    settings: Settings = {"image_size": size, **({"num_heads": heads} if heads else {})}
    settings |= _of_channels(channels)
    return _frozen(
        build_backbone(model, **settings), model, size, preset, settings, f"{model}, untrained (seed {seed})", layer
    )


def open_configured(config: FeatureConfig) -> Frozen:
    """The backbone of ``--model`` and the flags beside it.

    Raises:
        UserError: as ``open_frozen``.
    """
    return open_frozen(
        config.model,
        flag="--model",
        arch=config.arch,
        encoder=config.encoder,
        image_size=config.image_size,
        view_preset=config.view_preset,
        layer=config.layer,
        untrained=config.untrained,
        seed=config.seed,
        heads=config.heads,
        adapter=config.adapter,
        channels=config.channels,
        bit_window=config.bit_window,
    )


def _from_file(
    path: str,
    where: str,
    arch: str,
    encoder: str,
    image_size: int,
    view_preset: str,
    layer: str,
    heads: int | None,
    adapter: str,
    read: tuple[int, str],
) -> Frozen:
    contents = checkpoint.read(path)
    weights = find_backbone(contents, where, momentum=encoder == "momentum", heads=heads, arch=arch or None)
    if adapter:
        trained = read_adapter(adapter)
        weights, contents = with_adapter(weights, trained, where), trained.contents
    if arch and weights.arch and weights.arch != arch:
        raise UserError(f"{where}: is of arch {weights.arch}, not {arch}; give -a {weights.arch}")
    name = arch or weights.arch
    if not name:
        raise UserError(f"{where}: does not say which arch it is; {hint(weights)}")
    entry = our_entry(contents)
    try:
        config = dict(entry["config"]) if entry else {}
        size = image_size or int(config.get("image_size") or 224)
        preset = views_of(contents, where, view_preset)
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError):
        raise UserError(f"{where}: its entry 'mocov3' is damaged; give a whole file") from None
    preset = _read(preset, *read, where, known=bool(config) or "view" in (entry or {}))
    settings: Settings = {"image_size": size, **settings_of(weights.state, name), **weights.sizes(name, where)}
    settings |= _of_channels(preset.reading.channels)
    try:
        network = (
            _with_projector(contents, name, encoder, settings, where)
            if layer == "projector"
            else (build_backbone(name, **settings))
        )
        load_into(network, weights, where)
    except UserError as error:
        raise UserError(f"{error} ({hint(weights)})") from None
    which = f", {encoder} encoder" if weights.kind.startswith("pre-training") else ""
    about = f"{name} of {path} ({weights.kind}{which})"
    return _frozen(network, name, size, preset, settings, about, layer)


def _read(preset: ViewPreset, channels: int, bit_window: str, where: str, *, known: bool) -> ViewPreset:
    """The views of a file's weights, of images that are read as flags say."""
    own = preset.reading
    if known and channels not in (0, own.channels):
        raise UserError(f"{where}: is of images of {own.channels} channels, not --channels {channels}; leave that out")
    asked = as_read(preset, channels or own.channels, bit_window)
    return asked if bit_window else dataclasses.replace(asked, reading=Reading(asked.reading.channels, own.window))


def _of_channels(channels: int) -> Settings:
    return {} if channels == 3 else {"in_chans": channels}


def _with_projector(contents: Contents, arch: str, encoder: str, settings: Settings, where: str) -> Encoder:
    part = f"{encoder}_encoder."
    state = {k.removeprefix("module."): v for k, v in contents.get("state_dict", {}).items() if isinstance(v, Tensor)}
    part_state = {k.removeprefix(part): v for k, v in state.items() if k.startswith(part)}
    for name in HEAD_KEYS:
        head_state = {k.removeprefix(name): v for k, v in part_state.items() if k.startswith(name)}
        matrices = [v for v in head_state.values() if v.ndim == 2]
        if matrices:
            model = models.build(arch, dim=len(matrices[-1]), mlp_dim=len(matrices[0]), **settings).base_encoder
            projector = getattr(model, model.projector_name)
            checkpoint.check_state(projector, head_state, where)
            projector.load_state_dict(head_state)
            return model
    raise UserError(f"{where}: holds no projector; a pre-training checkpoint does")


def _published(
    model: str, image_size: int, asked: ViewPreset | None, layer: str, channels: int, bit_window: str
) -> Frozen:
    import timm

    name = model.removeprefix("timm/")
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=False) if timm.is_model(name) else None
    size = image_size or (cfg.input_size[-1] if cfg else 224)
    try:
        network = TimmEncoder(name, size, pretrained=True, **({"in_chans": channels} if channels != 3 else {}))
    except UserError:
        raise
    except Exception as error:  # whatever the hub's client raises without a network
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(
            f"--model {model}: its published weights could not be fetched ({reason}); give a weights file "
            f"with -a {model}, or --untrained"
        ) from None
    data_config = timm.data.resolve_model_data_config(network.backbone)
    mean, std, zoom = tuple(data_config["mean"]), tuple(data_config["std"]), 1 / data_config["crop_pct"]
    preset = asked or as_read(
        dataclasses.replace(PRESETS["photos"], mean=mean, std=std, evaluation_zoom=zoom), channels, bit_window
    )
    settings: Settings = {"image_size": size, **_of_channels(channels)}
    about = f"{model}, timm's published weights"
    return _frozen(network, model, size, preset, settings, about, layer)


def _frozen(
    network: nn.Module, arch: str, size: int, preset: ViewPreset, settings: Settings, about: str, layer: str
) -> Frozen:
    if is_vit(arch) and size % int(settings.get("patch_size", 16)):
        patch = int(settings.get("patch_size", 16))
        raise UserError(
            f"--image-size {size} does not divide into patches of {patch} px; "
            f"nearest: {max(size // patch, 1) * patch} or {(size // patch + 1) * patch}"
        )
    network.eval().requires_grad_(False)
    if unusual := stored_heads(settings.get("num_heads"), arch, None):
        about += f", {unusual} attention heads"
    if layer:
        about += f", layer {layer}"
    return Frozen(network, layer_of(network, arch, layer), arch, size, preset, settings, about)
