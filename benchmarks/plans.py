"""What ``--recipe auto`` would choose for sizes of sets and machines that need not be present, as a Markdown table.

    python benchmarks/plans.py

Photographs of 500×375 px, no limit of time (epochs are then cut to the time that steps are measured to take).
"""

from typing import Any

from mocov3.config import PretrainConfig
from mocov3.planning.auto import GIB, Images, Machine, choose_settings
from mocov3.pretraining.assemble import count_memory

_COUNTS = {"50": 50, "500": 500, "5 k": 5_000, "50 k": 50_000, "1.3 M": 1_281_167}
_MACHINES = {
    "CPU, 8 cores": Machine("cpu", 8 * GIB, 8),
    "8 GB": Machine("cuda", 8 * GIB, 8),
    "12 GB": Machine("cuda", 12 * GIB, 8),
    "80 GB": Machine("cuda", 80 * GIB, 16),
}


def main() -> None:
    """Print the table."""
    print("| images | machine | arch, px | batch | optimizer, lr | epochs (steps) | held out | memory, counted |")
    print("|---|---|---|---|---|---|---|---|")
    for title, count in _COUNTS.items():
        for name, machine in _MACHINES.items():
            images = Images(count, 375, "photos", "", "", gray=False)

            def memory(values: dict[str, Any], batch: int, sixteen_bits: bool = machine.device == "cuda") -> float:
                return count_memory(PretrainConfig(**values), sixteen_bits=sixteen_bits).peak(batch)

            choices = choose_settings(images, machine, None, {}, lambda _: (0.0, {}), memory)
            settings: dict[str, Any] = {c.name: c.value for c in choices if not c.name.startswith("(")}
            held = settings.get("hold_out", 0)
            steps = (count - held) // settings["batch_size"] * settings["epochs"]
            print(
                f"| {title} | {name} | {settings['arch']}, {settings['image_size']} | {settings['batch_size']} | "
                f"{settings['optimizer']}, {settings['lr']:g} | {settings['epochs']} ({steps:,}) | {held} | "
                f"{memory(settings, settings['batch_size']) / GIB:.1f} GB |"
            )


if __name__ == "__main__":
    main()
