"""Flags for own images: a budget of time, judging without labels, groups, and training on from existing weights."""

from dataclasses import dataclass
from pathlib import Path

from mocov3.config.fields import flag, path
from mocov3.config.schedule import budget_hours
from mocov3.config.views import ViewFlags
from mocov3.errors import UserError

OWN = "own images"
GROUP_HELP = (
    "which images belong together (slices of a patient, frames of a film): FILE.csv:COLUMN, a column of the images' "
    "own table, or a regular expression on names (its first bracket, where it has one); none: not even those that the "
    "images say themselves"
)
ADAPTER_HELP = "adapter that a run with --lora trained on the same weights (mocov3 export CKPT --adapter)"


@dataclass(frozen=True)
class OwnFlags(ViewFlags):
    """What pre-training on own images adds; the defaults change nothing."""

    budget: str = flag(
        "",
        "time that --recipe auto plans for, as 30m, 2h or 1d (default: 1 h on a CPU, 12 h on a GPU, or less if it "
        "needs less)",
        result=False,
        group=OWN,
        metavar="TIME",
        per_rank=True,
    )
    hold_out: int = flag(0, "images kept from training, for the quality without labels", group=OWN, metavar="N", low=0)
    quality_every: int = flag(
        0,
        "epochs between judgements without labels, on images of --hold-out or DIR/val (0: none); keeps the last "
        "network that has not collapsed, with --guard the best, as best_unlabelled.pth.tar",
        result=False,
        group=OWN,
        metavar="EPOCHS",
        low=0,
    )
    patience: int = flag(
        0,
        "stop after this many judgements in a row without a new best (0: never)",
        result=False,
        group=OWN,
        metavar="N",
        low=0,
    )
    group_by: str = flag(
        "",
        f"{GROUP_HELP}; such images are never in one batch, held out together, and never each other's neighbours",
        group=OWN,
        metavar="GROUPS",
    )
    freeze_epochs: int = flag(
        0,
        "epochs at the start in which only the heads are trained; then the backbone warms up over --warmup-epochs",
        group=OWN,
        low=0,
    )
    freeze_until: str = flag(
        "", "block up to which the backbone stays as it starts (layer2, blocks.5)", group=OWN, metavar="BLOCK"
    )
    layer_decay: float = flag(
        1.0, "factor of the learning rate from each block of the backbone to the one below", group=OWN, above=0, high=1
    )

    lora: int = flag(
        0,
        "train pairs of this rank beside the matrices of a ViT's blocks, and norms; all else stays as --init, a stem's "
        "batch statistics too",
        group=OWN,
        metavar="RANK",
        low=0,
    )
    unfreeze_last: int = flag(
        0, "with --lora, train the last N blocks whole, without pairs", group=OWN, metavar="N", low=0
    )
    adapter: str = flag("", ADAPTER_HELP, kind=path, group=OWN, metavar="FILE")

    preserve: float = flag(
        0.0,
        "weight of the cosine distance to the features of the --init network, one forward pass more (0: none)",
        group=OWN,
        metavar="W",
        low=0,
    )

    guard: str = flag(
        "",
        "labelled images of the kind that the --init network knows, DIR or DIR,labels.csv: at every judgement "
        "(--quality-every) k-NN on them is compared with the start's; 'start': only how many neighbours of new images "
        "stay the same",
        kind=path,
        group=OWN,
        metavar="DIR[,CSV]",
    )
    guard_drop: float = flag(
        2.0,
        "points of k-NN on the images of --guard that may be lost: where more cannot be ruled out (95 %), the run "
        "stops, and what it keeps is the best network before that, or the start",
        group=OWN,
        metavar="POINTS",
        above=0,
        high=100,
    )
    new_labels: str = flag(
        "",
        "classes of new images that are not trained on, a CSV of path,label, or 'folders': at the end the start is "
        "tested against what was trained",
        kind=path,
        group=OWN,
        metavar="CSV",
    )

    @property
    def guards(self) -> bool:
        """Whether there are images of the old kind to be compared on."""
        return self.guard not in ("", "start")

    @property
    def compares_with_start(self) -> bool:
        """Whether the network of ``--init`` is needed as long as the run lasts."""
        return bool(self.preserve or self.guard or self.new_labels)

    def check_own(self) -> None:
        """Refuse values that make no sense.

        Raises:
            UserError: naming the first.
        """
        given = vars(self)
        if (self.lora or self.adapter) and not given["init"]:
            raise UserError("--lora and --adapter go beside existing weights: give --init")
        if self.adapter and not Path(self.adapter).is_file():
            raise UserError(f"--adapter {self.adapter}: there is no such file")
        if self.lora and (given["fsdp"] or self.freeze_until):
            raise UserError("--lora holds the backbone still itself: leave out --fsdp and --freeze-until")
        if self.preserve and (given["fsdp"] or not given["init"]):
            raise UserError("--preserve holds the network of --init on every process: give --init, without --fsdp")
        if (self.guard or self.new_labels) and not (given["init"] and self.quality_every):
            raise UserError(
                "--guard and --new-labels compare with the network of --init at every judgement: give --init and "
                "--quality-every"
            )
        if self.unfreeze_last and not self.lora:
            raise UserError("--unfreeze-last goes beside --lora; without pairs it is --freeze-until BLOCK that does it")
        if self.patience and not self.quality_every:
            raise UserError("--patience counts judgements of --quality-every; give both")
        if self.budget and given["recipe"] not in ("auto", "adapt") and given["schedule"] != "wsd":
            raise UserError(
                "--budget is what --recipe auto plans for, or --schedule wsd uses up; else give --epochs, or "
                "--max-hours as a limit"
            )
        budget_hours(self.budget)
