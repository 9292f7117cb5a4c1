"""What ``mocov3 knn`` is given: bank and queries, and the k that the bank allows."""

from pathlib import Path

from mocov3.config import KnnConfig
from mocov3.config.evaluation import KS, RECALLS
from mocov3.data import Source, open_source
from mocov3.data.sources.findings import names_findings, refuse_one_sided, with_findings
from mocov3.data.sources.labels import Labelled, matched, read_labels, with_labels
from mocov3.data.sources.opening import has_unseen
from mocov3.errors import UserError


def open_sets(data: str, labels: str = "") -> tuple[Source, Source | None]:
    """The bank and the queries; no queries where one labelled folder, or what ``labels`` names, asks itself.

    Raises:
        UserError: if a set is missing or has no classes, or the queries have one that the bank lacks.
    """
    bank = open_source(data, "train")
    if labels:
        parts = (bank, open_source(data, "val")) if has_unseen(data) else (bank,)
        if not names_findings(labels, parts, "--labels"):
            return Labelled(bank, read_labels(Path(labels), bank, others=parts[1:])), None
        bank, *others = (part for part in with_findings(labels, parts) if len(part))
        refuse_one_sided(others[0] if others else bank, f"--labels {labels}")
        return bank, others[0] if others else None
    queries = open_source(data, "val") if has_unseen(data) else None
    for part, images in (("bank", bank), ("val", queries)):
        if images is not None and (images.labels is None or len(images.classes) < 2):
            raise UserError(
                f"data {data} ({part}): needs two or more class folders, images with labels, or --labels some.csv"
                f"{_said(images)}"
            )
    return with_labels(bank), queries and matched(bank.classes, queries, f"data {data}")


def _said(images: Source) -> str:
    """Why there are no labels, where reading them said that."""
    said = [line for line in getattr(images, "skipped", []) if "label" in line or "metadata" in line]
    return f" ({said[0]})" if said else ""


def limits(config: KnnConfig, available: int) -> tuple[tuple[int, ...], tuple[int, ...], list[str]]:
    """The values of k for the vote and recall that the bank allows, and a note on those left out.

    Raises:
        UserError: if a k that was asked for is above the bank.
    """
    notes, allowed = [], []
    for flag, given, default in (("--k", config.k, KS), ("--recall", config.recall, RECALLS)):
        above = [k for k in given if k > available]
        if above and given != default:
            raise UserError(f"{flag} {above[0]} is above the {available} images of the bank; give less")
        if above:
            notes.append(f"{flag} {','.join(map(str, above))} left out: the bank has {available} images")
        allowed.append(tuple(dict.fromkeys(k for k in given if k <= available)))
    if not allowed[0]:
        raise UserError(f"the bank has {available} images, too few for any k")
    return allowed[0], allowed[1], notes
