"""Size of a JPEG XL image by its header (ISO/IEC 18181-1), as the plug-in for Pillow decodes while it opens a file."""

_STREAM, _CONTAINER = b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"
SIGNATURES = (_STREAM, _CONTAINER)
_RATIOS = ((1, 1), (6, 5), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
_HEADER = 2 + 10  # bytes that the size takes at most, with the signature


def size(data: bytes) -> tuple[int, int]:
    """Width and height in pixels as stored.

    Raises:
        ValueError: if there is no such header.
    """
    stream = data[:_HEADER] if data.startswith(_STREAM) else _codestream(data)
    if not stream.startswith(_STREAM):
        raise ValueError("the JPEG XL header is damaged")
    bits, place = int.from_bytes(stream[2:], "little"), 0

    def take(count: int) -> int:
        nonlocal place
        value = bits >> place & (1 << count) - 1
        place += count
        return value

    def side() -> int:
        return 8 * (1 + take(5)) if small else 1 + take((9, 13, 18, 30)[take(2)])

    small = take(1)
    height = side()
    ratio = take(3)
    if ratio:
        across, down = _RATIOS[ratio - 1]
        return height * across // down, height
    return side(), height


def _codestream(data: bytes) -> bytes:
    """The first bytes of what the boxes of a container hold, which may come in parts."""
    stream, place = b"", len(_CONTAINER)
    while place + 8 <= len(data) and len(stream) < _HEADER:
        length, head = int.from_bytes(data[place : place + 4]), 8
        if length == 1:  # a length of 64 bits follows
            length, head = int.from_bytes(data[place + 8 : place + 16]), 16
        kind, end = data[place + 4 : place + 8], place + length if length else len(data)
        if kind in (b"jxlc", b"jxlp"):
            first = place + head + (4 if kind == b"jxlp" else 0)  # a part has a number
            stream += data[first : min(end, first + _HEADER)]
        if end < place + head:
            break
        place = end
    return stream[:_HEADER]
