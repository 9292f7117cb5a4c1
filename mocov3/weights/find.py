"""The backbone in a file of weights: ours and the reference's by their layout, others' by trial."""

import dataclasses
from dataclasses import dataclass, field

from torch import Tensor

from mocov3.config.archs import BUILT_IN_ARCHS, HEAD_KEYS
from mocov3.errors import UserError
from mocov3.models.backbones import Settings
from mocov3.models.lora import DOWN, UP
from mocov3.weights import Contents, attention_heads, our_entry
from mocov3.weights.locate import Place, fitting_archs, places

# what a file laid out as ours or the reference's is ← prefix of the encoder's keys in it; the first that occurs decides
_PREFIXES = {
    "pre-training checkpoint": "module.base_encoder.",
    "pre-training checkpoint without prefix": "base_encoder.",
    "linear evaluation": "module.",
    "backbone": "",
}
_USUAL_ENTRIES = ("", "state_dict", "model")


@dataclass(frozen=True)
class BackboneWeights:
    """The backbone found in a file, and the keys left out, each with its reason."""

    kind: str
    arch: str | None
    state: dict[str, Tensor]
    dropped: dict[str, str] = field(default_factory=dict)
    heads: attention_heads.Known = field(default_factory=attention_heads.Known)
    """Attention heads of a ViT, which shapes do not tell."""
    found: str = ""
    """Where in the file it was found by trial, for people; empty where it is where ours and the reference's have it."""
    near: str = ""
    """What of the file is nearest to an arch, for people, where nothing fits in full."""

    def sizes(self, arch: str, where: str) -> Settings:
        """What ``build_backbone`` needs to build ``arch`` for these weights beyond its name: ``num_heads`` of a ViT.

        Raises:
            UserError: if neither the file nor the user says which of two networks it is.
        """
        heads = attention_heads.to_build(self.heads, arch, self.state, where)
        return {} if heads is None else {"num_heads": heads}


def find_backbone(
    contents: Contents, where: str, *, momentum: bool = False, heads: int | None = None, arch: str | None = None
) -> BackboneWeights:
    """The backbone in the contents of a weights file: ours, the reference's, or of others, in whatever it is wrapped.

    Args:
        contents: what ``checkpoint.read`` returned.
        where: the file, for messages.
        momentum: take the momentum encoder of a pre-training checkpoint, or the average of a fine-tuned one.
        heads: attention heads of a ViT, of a file that does not tell.
        arch: the arch it is to be of, where the file does not say.

    Raises:
        UserError: if there is no backbone in it, or one of other attention heads than ``heads``.
    """
    named, near = named_arch(contents), None
    fitting: list[Place] = []
    if not _laid_out_as_ours(contents):
        fitting, near = places(contents, named or arch, momentum=momentum)
    if fitting:
        place, *others = fitting
        found = f"weights: {place}" + (f" (rather than {'; '.join(map(str, others[:3]))})" if others else "")
        if not others and place.entry in _USUAL_ENTRIES and place.prefix in _PREFIXES.values():
            found = ""
        encoder = place.prefix.endswith(("base_encoder.", "momentum_encoder."))
        kinds = {prefix: kind for kind, prefix in _PREFIXES.items()}
        kind = "pre-training checkpoint" if encoder else kinds.get(place.prefix, "backbone")
        weights = BackboneWeights(kind, named, place.state, place.beside, found=found)
    else:
        try:
            laid_out = _as_laid_out(contents, where, momentum)
        except UserError:
            if near is None or momentum:
                raise
            raise UserError(f"{where}: holds no backbone that fits; {near.near}") from None
        weights = dataclasses.replace(laid_out, arch=named, near=near.near if near else "")
    known = attention_heads.told(contents, weights.arch, weights.kind, weights.state, where)
    if heads is None and known.number is None and fitting:
        known = attention_heads.assumed(fitting[0].state, fitting[0].beside, fitting[0].translated and arch)
        if known.number is not None:
            said = f"{known.number} attention heads assumed ({known.by}): --heads says another number"
            found = f"{weights.found}; {said}" if weights.found else f"weights: {said}"
            weights = dataclasses.replace(weights, found=found)
    known = attention_heads.settled(known, heads, attention_heads.width_of(weights.state), where)
    return dataclasses.replace(weights, heads=known)


def named_arch(contents: Contents) -> str | None:
    """The arch that a file names: ours or ``timm/NAME``, also where it says NAME alone; ``None`` for other names."""
    arch = contents.get("arch")
    if not isinstance(arch, str) or arch in BUILT_IN_ARCHS or arch.startswith("timm/"):
        return arch if isinstance(arch, str) else None
    import timm

    return f"timm/{arch}" if timm.is_model(arch) else None


def _laid_out_as_ours(contents: Contents) -> bool:
    """Whether a file says itself where its backbone is: ours, and pre-training checkpoints of the reference."""
    state = contents.get("state_dict")
    keys = list(state) if isinstance(state, dict) else []
    encoders = tuple(prefix for prefix in _PREFIXES.values() if "base_encoder." in prefix)
    return bool(our_entry(contents)) or any(str(key).startswith(encoders) for key in keys)


def _as_laid_out(contents: Contents, where: str, momentum: bool) -> BackboneWeights:
    """The backbone where ours and the reference's files have it."""
    state = contents.get("state_dict", contents.get("model", contents))
    if momentum and isinstance(contents.get("model_ema"), dict) and contents["model_ema"]:
        momentum, state = False, contents["model_ema"]
    if not isinstance(state, dict) or not any(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{where}: holds no weights (entries: {', '.join(map(str, list(contents)[:6]))})")
    state = {str(k): v for k, v in state.items() if isinstance(v, Tensor)}
    kind, prefix = next((k, p) for k, p in _PREFIXES.items() if any(key.startswith(p) for key in state))
    if momentum:
        if "base_encoder." not in prefix:
            raise UserError(f"{where}: is a {kind} and has no momentum encoder")
        prefix = prefix.replace("base_encoder.", "momentum_encoder.")
    weights: dict[str, Tensor] = {}
    dropped: dict[str, str] = {}
    for key, value in state.items():
        name = key.removeprefix(prefix)
        if not key.startswith(prefix):
            dropped[key] = "not of this encoder"
        elif name.startswith(HEAD_KEYS):
            dropped[key] = "head"
        else:
            weights[name] = value
    weights = summed(weights)
    if not weights:
        raise UserError(f"{where}: holds no backbone, only {', '.join(list(state)[:3])} …")
    return BackboneWeights(kind, None, weights, dropped)


def summed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights with the low-rank pairs of ``--lora`` added to their matrices: a network without pairs."""
    whole = {key: value for key, value in state.items() if not key.endswith((DOWN, UP))}
    for key in (key for key in state if key.endswith(UP)):
        name = key.removesuffix(UP)
        whole[f"{name}weight"] = state[f"{name}weight"] + state[key] @ state[f"{name}{DOWN}"]
    return whole


def hint(weights: BackboneWeights) -> str:
    """What the weights are, or are nearest to, for a message that refuses them."""
    if fitting := fitting_archs(weights.state):
        width = attention_heads.width_of(weights.state)
        asked = attention_heads.choices(width) if weights.heads.number is None else ""
        return f"-a {' or '.join(fitting)} fits it" + (f", with {asked}" if asked else "")
    return weights.near or "no built-in arch fits it; is it timm/NAME?"
