"""What a file is that is not an image which can be decoded, in words that say what to do."""

import re

# How other files start, and what they are. The most common ones in folders of downloaded images.
_OTHER_FILES = (
    (b"%pdf-", "PDF document: convert it with `pdftoppm -png document.pdf page`"),
    (b"8bps", "Photoshop document (PSD): export it as PNG or JPEG"),
    (b"version https://git-lfs.github.com/spec", "git-lfs pointer, not the image itself: run `git lfs pull`"),
    (b"\x1f\x8b", "gzip archive: unpack it"),
    (b"pk\x03\x04", "zip archive: unpack it"),
    (b"\0\0\0\x0cjxl ", "JPEG XL image: convert it with `djxl image.jxl image.png`"),
    (b"\xff\x0a", "JPEG XL image: convert it with `djxl image.jxl image.png`"),
    (b"\0\0\0\x0cjp  ", "JPEG 2000 image: convert it with `magick image.jp2 image.png`"),
    (b"\0\0\x01\0", "icon (ICO): convert it with `magick image.ico image.png`"),
)

_MEDIA_FILES = (
    ({b"crx "}, "raw image of a Canon camera (CR3): export it as JPEG"),
    ({b"qt  "}, "QuickTime video (MOV), not an image"),
    ({b"isom", b"iso2", b"mp41", b"mp42", b"avc1", b"M4V ", b"dash", b"3gp4", b"3gp5"}, "MP4 video, not an image"),
)


def describe(contents: bytes) -> str:
    """The kind of a file by its first bytes."""
    if not any(contents):
        return "only zeros: the file was never written"
    if contents[4:8] == b"ftyp":
        known = [words for brands, words in _MEDIA_FILES if brands & brands_of(contents)]
        return known[0] if known else "video or raw image (ISO media file), not a supported image"
    start = contents[:2048].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for signature, words in _OTHER_FILES:
        if start.startswith(signature) or contents.startswith(signature):
            return words
    # A prologue and comments precede the first element of XML and of some web pages.
    element = re.sub(rb"^(<\?.*?\?>|<!--.*?-->|\s)+", b"", start, flags=re.DOTALL)
    if element.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "a web page (HTML), not an image"
    if element.startswith((b"<svg", b"<!doctype svg")):
        return "SVG drawing: convert it with `magick image.svg image.png`"
    if element.startswith(b"<error>"):
        code = re.search(rb"<Code>(\w+)</Code>", contents[:2048], re.IGNORECASE)
        named = f" ({code[1].decode()})" if code else ""
        return f"error message of a storage service{named}, not an image: download it again"
    return "not a JPEG, PNG, GIF, BMP or WebP image"


def brands_of(contents: bytes) -> frozenset[bytes]:
    """The major and the compatible brands of an ISO media file."""
    end = min(int.from_bytes(contents[:4], "big"), len(contents), 256)
    return frozenset([contents[8:12], *(contents[at : at + 4] for at in range(16, end - 3, 4))])
