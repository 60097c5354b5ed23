"""Cards are known by the names that drivers and clusters give them."""

import pytest

from tetdist.apps.roofline import cards


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA A100-SXM4-40GB", "A100-40"),
        ("NVIDIA A100-SXM4-80GB", "A100-80"),
        ("a100_80", "A100-80"),
        ("a100", "A100-40"),
        ("Tesla V100-SXM2-32GB", "V100-32"),
        ("nvidia_h200", "H200"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("rtx4090", "RTX-4090"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A10", None),
        ("NVIDIA L40", None),
        ("", None),
    ],
)
def test_names(text, name):
    found = cards.find(text)
    assert (None if found is None else found.name) == name


def test_each_is_found_by_its_own_name():
    for name, card in cards.CARDS.items():
        assert cards.find(name) is card
