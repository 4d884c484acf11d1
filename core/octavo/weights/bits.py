"""Codes of a few bits in words: a little-endian bit stream along the last axis, low bits first."""

import torch


def packed_width(num_codes: int, bits: int) -> int:
    """32-bit words that `num_codes` codes take."""
    return -(-num_codes * bits // 32)


def unpack_bits(words: torch.Tensor, bits: int, num_codes: int) -> torch.Tensor:
    """The first codes of each row: words [..., W] -> uint8 [..., num_codes]; code i is bits i b to (i + 1) b.

    Words are int32, or uint8 where the stream ends with an octet.
    """
    octets = words.contiguous().view(torch.uint8)
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=words.device)
        codes = octets.unsqueeze(-1).bitwise_right_shift(shifts).bitwise_and_((1 << bits) - 1)
    else:  # eight codes lie in `bits` octets
        octets = torch.nn.functional.pad(octets, (0, -octets.shape[-1] % bits))
        places = torch.arange(0, 8 * bits, 8, device=words.device)
        octads = (octets.view(*octets.shape[:-1], -1, bits).long() << places).sum(-1)
        shifts = torch.arange(0, 8 * bits, bits, device=words.device)
        codes = (octads.unsqueeze(-1) >> shifts).bitwise_and_((1 << bits) - 1).to(torch.uint8)
    return codes.flatten(-2)[..., :num_codes]


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse: integers [..., n] below 2^b -> int32 words [..., ceil(n b / 32)]; the rest of the last is 0."""
    width = packed_width(codes.shape[-1], bits)
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 32))
    octads = torch.zeros(*codes.shape[:-1], codes.shape[-1] // 8, dtype=torch.int64, device=codes.device)
    for place, code in enumerate(codes.reshape(*octads.shape, 8).unbind(-1)):  # at once they would take 8 bytes each
        octads |= code.long() << (bits * place)
    octets = [(octads >> (8 * place)).bitwise_and_(255).to(torch.uint8) for place in range(bits)]
    words: torch.Tensor = torch.stack(octets, -1).flatten(-2).view(torch.int32)
    return words[..., :width].contiguous()


def pack_octets(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """As `pack_bits`, but the stream ends with the last octet that is needed: uint8 [..., ceil(n b / 8)]."""
    return pack_bits(codes, bits).view(torch.uint8)[..., : -(-codes.shape[-1] * bits // 8)].contiguous()
