"""The text written with every exported model: what it is, where it comes from, how to load it."""

from mocov3.config.fields import Fields
from mocov3.errors import printable
from mocov3.export import preprocessing
from mocov3.export.formats import WRITERS, Exported
from mocov3.version import __version__

_CARD = """---
license: {tag}
library_name: {library}
tags:
- mocov3
- self-supervised
- image-feature-extraction
---
# {arch}, {trained}

Written by mocov3 {version} as `{format}`. {gives}

| | |
|---|---|
| arch | {arch} ({parameters:,} parameters, {features} features) |
| images | {size} × {size} px, {channels}, shorter side resized to {resized} ({how}), centre cut out |
| mean, std | {mean}, {std} (of pixels scaled to 0–1) |
| encoder | {encoder} |
| source | {source}{epochs}, sha256 `{sha256}` |
| origin | {origin} |
| licence | {licence} |
| verified | {verified} |

## Preprocessing

From the bytes of a file to what the network takes, exactly as in evaluation by mocov3. {own}

```python
{preprocessing}
```

## Use

```python
{usage}
```

## Recipe

{recipe}

Method: X. Chen, S. Xie, K. He, An Empirical Study of Training Self-Supervised Vision Transformers, arXiv 2104.02057.
"""


def card(model: Exported, to: str, name: str, verified: str, own: str) -> str:
    """The model card, Markdown with the header that model hubs read.

    Args:
        model: what was exported.
        to: the format.
        name: of the file or folder.
        verified: what was compared, and the differences.
        own: the same of the preprocessing that the format's library has; empty where it has none.
    """
    return _CARD.format(
        tag=_tag(model.licence),
        library={"timm": "timm", "transformers": "transformers"}.get(to, "pytorch"),
        arch=model.arch,
        version=__version__,
        gives=_gives(model),
        trained="fine-tuned" if "data_set" in model.recipe else "pre-trained by MoCo v3",
        format=to,
        parameters=sum(p.numel() for p in model.encoder.parameters()),
        features=model.encoder.num_features,
        size=model.image_size,
        how=model.interpolation,
        resized=model.resized,
        channels=model.channels,
        mean=", ".join(map(str, model.mean)),
        std=", ".join(map(str, model.std)),
        encoder=_encoder(model),
        source=printable(model.source),
        epochs="" if model.epochs is None else f" after {model.epochs} epochs",
        sha256=model.sha256,
        origin=printable(model.origin),
        licence=printable(model.licence),
        verified=verified,
        own=own,
        preprocessing=preprocessing.code(model),
        usage=WRITERS[to].usage(model, name),
        recipe=_recipe(model.recipe),
    )


def _gives(model: Exported) -> str:
    if not model.classes:
        return "The backbone gives features; it has no classifier."
    names = ", ".join(printable(name) for name in model.class_names[:1000])
    return f"Gives scores of {model.classes} classes{': ' + names if names else ''}."


def _encoder(model: Exported) -> str:
    tuned = model.recipe.get("data_set")
    if tuned:
        return f"fine-tuned on {printable(str(tuned))}" + (", average of the weights" if model.momentum else "")
    return "momentum encoder" if model.momentum else "query encoder"


def _recipe(recipe: Fields) -> str:
    if not recipe:
        return "Not stated in the source."
    return "\n".join(f"- {printable(str(k))}: {printable(str(v))}" for k, v in recipe.items())


def _tag(licence: str) -> str:
    for start, tag in (("CC-BY-NC", "cc-by-nc-4.0"), ("Apache-2.0", "apache-2.0"), ("MIT", "mit")):
        if licence.upper().startswith(start.upper()):
            return tag
    return "cc-by-nc-4.0" if "CC-BY-NC" in licence else "other"
