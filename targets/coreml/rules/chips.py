"""Chips, and the generation of Neural Engine that each has."""

from __future__ import annotations

from ....exporter.errors import UnknownNameError

GENERATIONS: dict[str, int] = {
    "A13": 13, "M1": 13, "A14": 14, "M2": 14, "A15": 15, "M3": 15, "A16": 16, "A17": 16, "A18": 16, "M4": 16, "M5": 16,
}  # fmt: skip
"""Chip to generation, as ANEForge's catalogue of operations counts them: 13 for what every engine since the M1's has, 16 for the last
generation that brought anything (the ladder M1 = A13, M2 = A14, M3 = A15, M4 and M5 = A16 and A17; A17 and A18 add no operation).

Only Macs were measured there: that an A chip is of the generation of its number is what the catalogue's names say. That Apple calls the
engines of the A14 and the M1 the same (https://github.com/hollance/neural-engine/blob/master/docs/supported-devices.md) speaks for one
generation less; who wants to be safe names the chip before, or none.
Source: https://aneforge.readthedocs.io/en/latest/op-catalog/, arXiv:2606.17090.
"""

OLDEST = min(GENERATIONS.values())
"""The generation that counts when no chip is named: what runs there runs on all."""


def check_chip(chip: str) -> None:
    """Refuses a chip that the rules do not know; empty is all of them.

    Raises:
        UnknownNameError: It is none of `GENERATIONS`.
    """
    if chip and chip not in GENERATIONS:
        raise UnknownNameError("chip", chip, list(GENERATIONS))


def chips_before(generation: int) -> str:
    """The chips of the generations before one, in words."""
    return ", ".join(chip for chip, held in sorted(GENERATIONS.items(), key=lambda item: (item[1], item[0])) if held < generation)
