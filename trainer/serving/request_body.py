"""Reads the body of a prediction request: JSON, an image file, or a form with image files. Its memory and time are bounded.

`read_request` runs in a thread, outside the event loop of the server: it takes up to a second for the largest body.
"""

import base64
import binascii
import dataclasses
import email.message
import email.parser
import json
import zlib

from starlette.exceptions import HTTPException

from trainer.data import formats

MAX_INSTANCES = 128  # per request

# Of the JSON of a request. 128 instances have about 400; a parsed value takes up to 100 bytes, whatever it is.
MAX_JSON_VALUES = 10_000

# TensorFlow Serving takes the name of a signature; these two take the bytes of images.
SIGNATURES = {"serving_default": False, "explain": True}

EXPECTED_REQUEST = (
    '{"instances": [{"bytes": {"b64": "..."}}, ...]} as application/json, one image file as image/jpeg (image/png, ...), '
    "or image files as multipart/form-data"
)

_URL_SAFE_TO_STANDARD = bytes.maketrans(b"-_", b"+/")


@dataclasses.dataclass(frozen=True)
class BodyFormat:
    """What the headers of a request say about its body."""

    kind: str  # json, image or form
    boundary: bytes = b""  # of a form
    is_gzip: bool = False


@dataclasses.dataclass(frozen=True)
class RejectedInstance:
    """An instance of a request that is not an image within the limits."""

    reason: str


Instance = bytes | RejectedInstance  # bytes: the contents of an image file


@dataclasses.dataclass(frozen=True)
class PredictRequest:
    """The images of a request, and whether heat maps are requested."""

    instances: list[Instance]
    explain: bool


def body_format(content_type: str, content_encoding: str) -> BodyFormat:
    """The format that these headers declare; an empty type is JSON. Raises HTTPException 415 for any other format."""
    is_gzip = content_encoding.strip().lower() in ("gzip", "x-gzip")
    if not is_gzip and content_encoding.strip().lower() not in ("", "identity"):
        raise HTTPException(415, f"Content-Encoding {content_encoding!r} is not supported: send gzip, or no encoding.")
    header = email.message.Message()
    header["content-type"] = content_type
    name = header.get_content_type() if content_type else "application/json"
    # curl sends application/x-www-form-urlencoded, whatever the data, unless a header says otherwise: the commands in the
    # documentation of TensorFlow Serving and of this project. text/plain, on the other hand, is what a web page can send
    # to any server without asking it first (https://fetch.spec.whatwg.org/#cors-safelisted-request-header).
    if name in ("application/json", "application/x-www-form-urlencoded"):
        return BodyFormat("json", is_gzip=is_gzip)
    if name.startswith("image/") or name == "application/octet-stream":
        return BodyFormat("image", is_gzip=is_gzip)
    if name == "multipart/form-data":
        boundary = header.get_boundary("")
        if not boundary:
            raise HTTPException(
                400, "The Content-Type multipart/form-data has no boundary: let your HTTP client set it."
            )
        return BodyFormat("form", boundary.encode("latin-1", "replace"), is_gzip)
    raise HTTPException(415, f"Content-Type {content_type!r} is not supported: send {EXPECTED_REQUEST}.")


def read_request(
    body: bytes | bytearray, body_format: BodyFormat, *, explain: bool, max_bytes: int, max_image_pixels: int
) -> PredictRequest:
    """The images of a request. `explain` is that of its URL; JSON and forms can set it too.

    Raises HTTPException for a body that is not such a request, or that has more than `max_bytes` when it is inflated. An
    image of more than `max_image_pixels` is a RejectedInstance.
    """
    if body_format.is_gzip:
        body = _inflate(body, max_bytes)
    if body_format.kind == "image":
        instances: list[Instance] = [bytes(body)]
    elif body_format.kind == "form":
        instances, is_set = _read_form(body, body_format.boundary)
        explain = explain or is_set
    else:
        instances, is_set = _read_json(body)
        explain = explain or is_set
    return PredictRequest([_within_limit(instance, max_image_pixels) for instance in instances], explain)


def _inflate(body: bytes | bytearray, max_bytes: int) -> bytes:
    inflater = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)  # 16: gzip
    try:
        inflated = inflater.decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise HTTPException(400, f"The body is not gzip ({error}), as its Content-Encoding says.") from None
    if len(inflated) > max_bytes:
        raise HTTPException(413, f"The inflated request is larger than {max_bytes // 2**20} MiB: send fewer images.")
    if not inflater.eof or inflater.unused_data:
        raise HTTPException(400, "The body is not one whole gzip stream: it is truncated, or data follow its end.")
    return inflated


def _read_json(body: bytes | bytearray) -> tuple[list[Instance], bool]:
    # An upper bound of the number of values, found in milliseconds before any is built. Base64 has none of these.
    if body.count(b",") + body.count(b"[") + body.count(b"{") > MAX_JSON_VALUES:
        raise HTTPException(
            413, f"The request has more than {MAX_JSON_VALUES} JSON values, or is not JSON: send {EXPECTED_REQUEST}."
        )
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        found = formats.detect_format(bytes(body[:32]))
        if found:
            raise HTTPException(
                415, f"The body is a {found} image: send it with the Content-Type image/{found.lower()}."
            ) from None
        raise HTTPException(400, f"The request is not JSON ({error}): send {EXPECTED_REQUEST}.") from None
    instances = request.get("instances") if isinstance(request, dict) else None
    if not isinstance(instances, list) or not instances:
        raise HTTPException(400, f"The request has no list of instances: send {EXPECTED_REQUEST}.")
    if len(instances) > MAX_INSTANCES:
        raise HTTPException(413, f"The request has {len(instances)} instances: send {MAX_INSTANCES} or fewer.")
    signature = request.get("signature_name") or "serving_default"
    if signature not in SIGNATURES:
        raise HTTPException(400, f"The signature_name is {signature!r}: send {' or '.join(SIGNATURES)}, or omit it.")
    parameters = request.get("parameters") or {}
    explain = parameters.get("explain", False) if isinstance(parameters, dict) else None
    if not isinstance(explain, bool) or set(parameters) - {"explain"}:
        raise HTTPException(400, 'The request\'s parameters are not {"explain": true} or {"explain": false}.')
    return [_read_instance(instance) for instance in instances], explain or SIGNATURES[signature]


def _read_instance(instance: object) -> Instance:
    """The contents in {"bytes": {"b64": "..."}} or {"b64": "..."}, the two forms that TensorFlow Serving takes.

    Also in a data: URL in place of the base64 text or of the instance.
    """
    value = instance.get("bytes", instance) if isinstance(instance, dict) else instance
    text = value.get("b64") if isinstance(value, dict) else value
    is_url = isinstance(text, str) and text.startswith("data:")
    if not isinstance(text, str) or not (is_url or isinstance(value, dict)):
        return RejectedInstance('not an image as {"bytes": {"b64": "..."}}')
    if is_url:
        declaration, _, text = text.partition(",")
        if not declaration.endswith(";base64"):
            return RejectedInstance("not a data: URL in base64: send data:image/jpeg;base64,...")
    return _decode_base64(text)


def _decode_base64(text: str) -> Instance:
    """Decodes base64 in the standard or the URL-safe alphabet, with or without line ends and padding."""
    try:
        encoded = text.strip().encode("ascii").translate(_URL_SAFE_TO_STANDARD, delete=b"\r\n\t").rstrip(b"=")
        if b" " in encoded:
            return RejectedInstance("not base64 (it contains spaces: a + that a URL decoder turned into a space?)")
        return base64.b64decode(encoded + b"=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        return RejectedInstance(f"not base64 ({error})")


def _read_form(body: bytes | bytearray, boundary: bytes) -> tuple[list[Instance], bool]:
    """The files of a form (RFC 7578), in order, and whether its field `explain` is set.

    In C, by `split`: parsers in Python take minutes for 30 MB of line ends, each of which may begin a boundary.
    """
    parts = (b"\r\n" + body).split(b"\r\n--" + boundary, MAX_INSTANCES + 2)[1:]
    if len(parts) > MAX_INSTANCES + 1:
        raise HTTPException(413, f"The form has more than {MAX_INSTANCES} parts: send {MAX_INSTANCES} files or fewer.")
    if not parts or not parts.pop().startswith(b"--"):
        raise HTTPException(
            400, "The body is not multipart/form-data with the boundary of its Content-Type, or is truncated."
        )
    instances: list[Instance] = []
    explain = False
    for part in parts:
        head, _, contents = part.partition(b"\r\n\r\n")
        name, is_file = _read_part_header(head)
        if is_file:
            instances.append(contents)
        elif name == "explain":
            explain = read_flag(name, contents.decode(errors="replace"))
        else:
            raise HTTPException(
                400,
                f"The form has a field {name[:50]!r} that is not a file: send files, as `curl --form image=@photo.jpg`.",
            )
    if not instances:
        raise HTTPException(400, "The form has no file: send files, as `curl --form image=@photo.jpg`.")
    return instances, explain


def _read_part_header(head: bytes) -> tuple[str, bool]:
    """The name of a part of a form, and whether it is a file."""
    header = email.parser.BytesHeaderParser().parsebytes(head.lstrip()) if len(head) < 4096 else email.message.Message()
    name = header.get_param("name", header="content-disposition")
    if not name:
        raise HTTPException(400, "A part of the form has no Content-Disposition with a name (RFC 7578).")
    if header.get("content-transfer-encoding", "binary").lower() not in ("binary", "8bit", "7bit"):
        raise HTTPException(400, "A part of the form has a Content-Transfer-Encoding: send the bytes as they are.")
    return str(name), header.get_filename() is not None


def read_flag(name: str, value: str) -> bool:
    """The value of a parameter of a URL or a form. Raises HTTPException if it is not true or false."""
    if value.lower() not in ("", "true", "false", "1", "0"):
        raise HTTPException(400, f"{name} is {value[:20]!r}: send true or false.")
    return value.lower() in ("true", "1")


def _within_limit(instance: Instance, max_image_pixels: int) -> Instance:
    if isinstance(instance, RejectedInstance):
        return instance
    size = formats.header_size(instance)  # of its header; None if it has none
    pixels = size.width * size.height if size else 0
    if pixels <= max_image_pixels:
        return instance
    return RejectedInstance(
        f"the image has {pixels / 1e6:.0f} megapixels, more than the limit of {max_image_pixels / 1e6:g} of this "
        "server: scale it down"
    )
