"""The bytes of packed codes: golden for every width, reversible for every length, refused outside their range."""

from __future__ import annotations

import pytest
import torch

from bitstep.numerics.packing import QuantizedWeight, pack, packed_size, unpack

# written out by hand from the definition in docs/format.md: code i in bits [i*b, (i+1)*b) of a little-endian stream
GOLDEN = {
    1: ([1, 0, 1, 1, 0, 0, 0, 1, 1], "8d01"),
    2: ([0, 1, 2, 3, 1], "e401"),
    3: ([1, 2, 3, 4, 5, 6, 7, 0, 5], "d158 1f05"),
    4: ([1, 2, 15], "210f"),
    5: ([1, 2, 3, 31], "418c 0f"),
    6: ([1, 2, 3, 63], "8130 fc"),
    7: ([1, 127, 64], "813f 10"),
    8: ([0, 1, 255], "0001 ff"),
}


@pytest.mark.parametrize("bits", GOLDEN)
def test_golden_bytes(bits: int) -> None:
    codes, expected = GOLDEN[bits]
    packed = pack(torch.tensor([codes]), bits)
    assert bytes(packed[0].tolist()) == bytes.fromhex(expected)
    assert unpack(packed, bits, len(codes)).tolist() == [codes]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 27, 64, 225])
def test_round_trip(bits: int, count: int) -> None:
    codes = torch.randint(2**bits, (2, 3, count), generator=torch.Generator().manual_seed(count), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (2, 3, packed_size(count, bits))
    assert torch.equal(unpack(packed, bits, count), codes)


@pytest.mark.parametrize("codes", [[-1], [16]])
def test_codes_out_of_range_are_refused(codes: list[int]) -> None:
    with pytest.raises(ValueError, match=r"\[0, 15\] for 4 bits"):
        pack(torch.tensor(codes), 4)


def test_wrong_row_length_is_refused() -> None:
    with pytest.raises(ValueError, match="rows of 2 bytes for 3 codes of 4 bits"):
        unpack(torch.zeros(2, 3, dtype=torch.uint8), 4, 3)


def test_dequantize_follows_the_definition() -> None:
    codes = torch.tensor([[[0, 3, 5], [7, 1, 2]]], dtype=torch.uint8)
    weight = QuantizedWeight(codes, torch.tensor([[0.5, 2.0]]), torch.tensor([4, 1], dtype=torch.uint8), 3, (2, 3, 1))
    assert weight.dequantize().tolist() == [[[-2.0], [-0.5], [0.5]], [[12.0], [0.0], [2.0]]]


def test_two_sign_bases_add_up() -> None:
    codes = torch.tensor([[[0, 1, 1]], [[0, 0, 1]]], dtype=torch.uint8)
    weight = QuantizedWeight(codes, torch.tensor([[1.0], [0.25]]), None, 1, (1, 3))
    assert weight.dequantize().tolist() == [[-1.25, 0.75, 1.25]]
