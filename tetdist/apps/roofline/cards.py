"""Kinds of GPUs: speed of their memory and arithmetic, from NVIDIA's data sheets."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """Kind of GPU.

    Attributes:
        processors: Number of its streaming multiprocessors.
        bandwidth: Memory bandwidth, in 1e9 bytes a second.
        fp32: 1e12 operations a second in float32, without matrix units; a product and a sum count
            as two.
        tf32, bf16, fp16: The same for its matrix units with dense matrices (data sheets often give
            twice that, for sparse ones), accumulated in float32. None: it has none for that type.
        words: Words that all occur in its names by drivers and clusters; empty: its name.
        reached: Factor on the fraction of arithmetic that convolutions reach (estimate.py).
        nvlink: NVLink of the variant for servers (SXM), 1e9 bytes a second each way; 0: none.
    """

    name: str
    memory_gb: float
    processors: int
    bandwidth: float
    fp32: float
    tf32: float | None
    bf16: float | None
    fp16: float
    words: tuple[str, ...] = ()
    reached: float = 1.0
    nvlink: float = 0.0

    def arithmetic(self, precision: str) -> float | None:
        """Return 1e12 operations a second of convolutions in a configuration's ``precision``; None:
        unknown, or there are no units for it."""
        known = {"fp32": self.fp32, "tf32": self.tf32, "bf16": self.bf16, "fp16": self.fp16}
        return known.get(precision)


# Variants for servers (SXM) if there are several. From NVIDIA's data sheets of the V100 (2020),
# A100 (2021), A40, L40S, H100 (2023), H200 (2024) and HGX B200 (2025), and the white papers on
# GA102 and Ada for the two RTX. Hopper's factor is fitted to MLPerf's rates relative to an A100
# (tests/roofline/test_estimate.py), which L40S matches without a factor. B200 is assumed to be like
# Hopper; A40 and the RTX are not compared with any measurement.
_CARDS = (
    Card("V100", 16, 80, 900, 15.7, None, None, 125, nvlink=150),
    Card("V100-32", 32, 80, 900, 15.7, None, None, 125, words=("v100", "32"), nvlink=150),
    Card("A100-40", 40, 108, 1555, 19.5, 156, 312, 312, words=("a100",), nvlink=300),
    Card("A100-80", 80, 108, 2039, 19.5, 156, 312, 312, words=("a100", "80"), nvlink=300),
    Card("A40", 48, 84, 696, 37.4, 74.8, 149.7, 149.7),
    Card("L40S", 48, 142, 864, 91.6, 183, 362, 362),
    Card("H100", 80, 132, 3350, 67, 495, 989, 989, reached=0.75, nvlink=450),
    Card("H100-PCIe", 80, 114, 2000, 51, 378, 756, 756, words=("h100", "pcie"), reached=0.75),
    Card("H200", 141, 132, 4800, 67, 495, 989, 989, reached=0.75, nvlink=450),
    Card("B200", 180, 148, 7700, 75, 1100, 2250, 2250, reached=0.75, nvlink=900),
    Card("RTX-3090", 24, 82, 936, 35.6, 35.6, 71, 71, words=("3090",)),
    Card("RTX-4090", 24, 128, 1008, 82.6, 82.6, 165, 165, words=("4090",)),
)
CARDS = {card.name: card for card in _CARDS}


def nvlink_of(text: str) -> float:
    """Return the NVLink that a GPU with this name must have, 1e9 bytes a second each way; 0: a
    card may lack it, or is unknown."""
    card = find(text)
    return 0.0 if card is None or re.search("pcie|nvl", text.lower()) else card.nvlink


def find(text: str) -> Card | None:
    """Return the card that a driver's or a cluster's name means, such as ``NVIDIA H100 80GB HBM3``
    or ``gpu:a100_80:4``; among several matches, the most specific one."""
    if re.search(r"\bmig\b|\dg[._]\d+gb|laptop", text.lower()):
        return None  # a part of a GPU, or a slower GPU of the same name

    def means(word: str) -> bool:
        # Do not match GB200 or V1000, but RTX4090.
        before = r"(?<![0-9])" if word[0].isdigit() else r"(?<![a-z0-9])"
        return re.search(rf"{before}{word}(?![0-9])", text.lower()) is not None

    found = [card for card in _CARDS if all(map(means, card.words or [card.name.lower()]))]
    return max(found, key=lambda card: len(card.words), default=None)
