"""Kinds of GPUs: the speed of their memory and of their arithmetic, as NVIDIA's data sheets say."""

import re
from dataclasses import dataclass

from tetdist.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Card:
    """A kind of GPU.

    Attributes:
        name: By which a configuration names it.
        words: All of them are in the names by which drivers and clusters call it.
        memory_gb: Size of its memory, in 1e9 bytes.
        bandwidth: Bytes a second from and to that.
        fp32: Operations a second in float32, without matrix units; a product and a sum are two.
        tf32, bf16, fp16: The same of its matrix units, of full matrices (data sheets often give
            twice that, for matrices half of which are zeros), added up in float32. None: it has
            none for that type.
    """

    name: str
    words: tuple[str, ...]
    memory_gb: float
    bandwidth: float
    fp32: float
    tf32: float | None
    bf16: float | None
    fp16: float

    def arithmetic(self, precision: str) -> float | None:
        """Operations a second of convolutions in a configuration's ``precision``; None: not known,
        or there are no units for them."""
        known = {"fp32": self.fp32, "tf32": self.tf32, "bf16": self.bf16, "fp16": self.fp16}
        return known.get(precision)


def _card(
    name: str,
    memory_gb: float,
    gb_a_second: float,
    *teraflops: float | None,
    words: tuple[str, ...] = (),
) -> Card:
    fp32, tf32, bf16, fp16 = (None if one is None else one * 1e12 for one in teraflops)
    assert fp32 is not None
    assert fp16 is not None
    return Card(
        name=name,
        words=words or (name.lower(),),
        memory_gb=memory_gb,
        bandwidth=gb_a_second * 1e9,
        fp32=fp32,
        tf32=tf32,
        bf16=bf16,
        fp16=fp16,
    )


# GB, GB/s; TFLOP/s in fp32, tf32, bf16 and fp16. Of each the variant for servers (SXM) where there
# are several. From NVIDIA's data sheets of the V100 (2020), A100 (2021), A40, L40S, H100 (2023),
# H200 (2024) and HGX B200 (2025), and from the white papers on GA102 and Ada for the two RTX.
CARDS = {
    card.name: card
    for card in (
        _card("V100", 16, 900, 15.7, None, None, 125),
        _card("V100-32", 32, 900, 15.7, None, None, 125, words=("v100", "32")),
        _card("A100-40", 40, 1555, 19.5, 156, 312, 312, words=("a100",)),
        _card("A100-80", 80, 2039, 19.5, 156, 312, 312, words=("a100", "80")),
        _card("A40", 48, 696, 37.4, 74.8, 149.7, 149.7),
        _card("L40S", 48, 864, 91.6, 183, 362, 362),
        _card("H100", 80, 3350, 67, 495, 989, 989),
        _card("H100-PCIe", 80, 2000, 51, 378, 756, 756, words=("h100", "pcie")),
        _card("H200", 141, 4800, 67, 495, 989, 989),
        _card("B200", 180, 7700, 75, 1100, 2250, 2250),
        _card("RTX-3090", 24, 936, 35.6, 35.6, 71, 71, words=("3090",)),
        _card("RTX-4090", 24, 1008, 82.6, 82.6, 165, 165, words=("4090",)),
    )
}


def find(text: str) -> Card | None:
    """The card that a driver's or a cluster's name means, such as ``NVIDIA H100 80GB HBM3`` or
    ``gpu:a100_80:4``; of several that it may be, the one of which it says most."""

    if re.search(r"\bmig\b|\dg[._]\d+gb|laptop", text.lower()):
        return None  # a part of one, or a slower one of the same name

    def means(word: str) -> bool:
        # Neither a GB200 nor a V1000; but a RTX4090.
        before = r"(?<![0-9])" if word[0].isdigit() else r"(?<![a-z0-9])"
        return re.search(rf"{before}{word}(?![0-9])", text.lower()) is not None

    found = [card for card in CARDS.values() if all(map(means, card.words))]
    return max(found, key=lambda card: len(card.words), default=None)


def named(text: str, key: str) -> Card:
    """The card of that name.

    Args:
        text: What stands there.
        key: Where it stands, for the error.

    Raises:
        UserError: None is called so.
    """
    card = find(text)
    if card is None:
        raise UserError(
            f"{key}: {text!r} is none of the GPUs that the plan knows ({', '.join(CARDS)}); name "
            "the one that is nearest to it, or give the speed: --images-per-s X, or --benchmark "
            "FILE of tools/check_gpu.py"
        )
    return card
