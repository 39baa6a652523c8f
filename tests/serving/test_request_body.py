"""Bodies of prediction requests, as people send them and as attackers do."""

import base64
import contextlib
import gzip
import json
import time
import tracemalloc

import pytest
import requests
from starlette.exceptions import HTTPException

from tests.support.tiny_model import make_image
from trainer.serving import request_body
from trainer.serving.request_body import RejectedInstance

MAX_BYTES = 32 * 2**20
IMAGE = make_image(0, height=20, width=31)


def read(body: bytes, content_type: str = "", content_encoding: str = "", *, explain: bool = False):
    body_format = request_body.body_format(content_type, content_encoding)
    return request_body.read_request(body, body_format, explain=explain, max_bytes=MAX_BYTES, max_image_pixels=10**6)


@pytest.mark.parametrize(("body", "status", "message"), [
    (b"", 400, "not JSON"), (b"{", 400, "not JSON"), (b"\xff", 400, "not JSON"), (b"[" * 9000, 400, "not JSON"),
    (b"[]", 400, "no list of instances"), (b"{}", 400, "no list of instances"), (b'{"instances": {}}', 400, "no list"),
    (b'{"instances": []}', 400, "no list of instances"), (b'{"instances": [%s1]}' % (b"1," * 128), 413, "129 instances"),
    (b'{"instances": [%s1]}' % (b"1," * 10000), 413, "more than 10000 JSON values"),
    (b'{"instances": [1], "parameters": {"explain": 1}}', 400, "parameters are not"),
    (b'{"instances": [1], "parameters": {"explian": true}}', 400, "parameters are not"),
    (b'{"instances": [1], "parameters": [1]}', 400, "parameters are not"),
    (b'{"instances": [1], "signature_name": "other"}', 400, "send serving_default or explain"),
    (IMAGE, 415, "a JPEG image: send it with the Content-Type image/jpeg"),
])  # fmt: skip
def test_an_invalid_request_is_rejected_with_the_expected_form(body, status, message):
    with pytest.raises(HTTPException, match=message) as raised:
        read(body)
    assert raised.value.status_code == status


def test_each_instance_is_accepted_or_rejected_on_its_own():
    instances = [{"bytes": {"b64": "aGk="}}, {"b64": "aGk="}, {"b64": "?"}, {"bytes": "aGk="}, 1, None, {"b64": 1}, []]
    request = read(json.dumps({"instances": instances, "parameters": None}).encode())
    assert not request.explain
    assert request.instances[:2] == [b"hi", b"hi"]
    assert request.instances[2].reason.startswith("not base64 (")
    assert request.instances[3:] == [RejectedInstance('not an image as {"bytes": {"b64": "..."}}')] * 5


def standard(contents: bytes) -> str:
    return base64.b64encode(contents).decode()


@pytest.mark.parametrize("encode", [
    lambda contents: standard(contents).rstrip("="),
    lambda contents: base64.encodebytes(contents).decode(),
    lambda contents: base64.encodebytes(contents).decode().replace("\n", "\r\n"),
    lambda contents: base64.urlsafe_b64encode(contents).decode(),
    lambda contents: base64.urlsafe_b64encode(contents).decode().rstrip("="),
    lambda contents: f" {standard(contents)}\n",
    lambda contents: f"data:image/jpeg;base64,{standard(contents)}",
    lambda contents: f"data:image/jpeg;name=a.jpg;base64,{standard(contents)}",
])  # fmt: skip
@pytest.mark.parametrize("num_bytes", range(300, 303))  # with 0, 1 and 2 characters of padding
def test_base64_is_read_as_people_write_it(encode, num_bytes):
    contents = bytes(i * 7 % 256 for i in range(num_bytes))
    body = json.dumps({"instances": [{"b64": encode(contents)}, {"bytes": {"b64": encode(contents)}}]}).encode()
    assert read(body).instances == [contents] * 2


def test_a_data_url_may_stand_for_the_instance():
    url = f"data:image/png;base64,{standard(IMAGE)}"
    assert read(json.dumps({"instances": [url, {"bytes": url}]}).encode()).instances == [IMAGE] * 2


@pytest.mark.parametrize(("text", "reason"), [
    ("aG +", "contains spaces: a + that a URL decoder turned into a space"),
    ("data:image/png,%89PNG", "not a data: URL in base64"),
    ("aGkä", "not base64 ("),
    ("aGk=aGk", "not base64 ("),
    ("a", "not base64 ("),
])  # fmt: skip
def test_text_that_is_not_base64_is_an_error_of_its_instance(text, reason):
    assert reason in read(json.dumps({"instances": [{"b64": text}]}).encode()).instances[0].reason


@pytest.mark.parametrize("content_type", ["image/jpeg", "image/*", "IMAGE/PNG; x=y", "application/octet-stream"])
def test_an_image_file_is_a_request(content_type):
    assert read(IMAGE, content_type).instances == [IMAGE]
    assert read(IMAGE, content_type, explain=True).explain


@pytest.mark.parametrize("content_type", [
    "text/plain", "text/plain;charset=UTF-8", "text/html", "application/xml", "nonsense", "multipart/mixed; boundary=b",
])  # fmt: skip
def test_another_content_type_is_refused_with_what_to_send(content_type):
    with pytest.raises(HTTPException, match=r'send \{"instances"') as raised:
        read(IMAGE, content_type)
    assert raised.value.status_code == 415


def form(files: list, data: dict | None = None) -> tuple[bytes, str]:
    """The body and the Content-Type of a form as requests sends it."""
    request = requests.Request("POST", "http://localhost", files=files, data=data).prepare()
    return request.body, request.headers["Content-Type"]


def test_a_form_holds_images_in_order():
    contents = [IMAGE, b"\r\n--x\r\n\r\n" * 3, b"", make_image(1, kind="PNG")]
    files = [("image", (f"bild ä {i}.jpg", one, "image/jpeg")) for i, one in enumerate(contents)]
    assert read(*form(files)).instances == contents
    assert read(*form(files, {"explain": "true"})).explain
    assert not read(*form(files, {"explain": "false"})).explain


def test_an_invalid_form_is_rejected_with_the_reason():
    body, content_type = form([("image", ("a.jpg", IMAGE))])
    many, many_type = form([("image", ("a.jpg", b"x"))] * 129)
    text, text_type = form([("image", (None, "x"))])
    encoded = body.replace(b"\r\n\r\n", b"\r\nContent-Transfer-Encoding: base64\r\n\r\n", 1)
    for sent, sent_type, message in [
        (body[:-10], content_type, "or is truncated"),
        (body, content_type + "x", "not multipart/form-data with the boundary"),
        (b"", content_type, "not multipart/form-data"),
        (many, many_type, "more than 128 parts"),
        (text, text_type, "field 'image' that is not a file"),
        (encoded, content_type, "Content-Transfer-Encoding"),
        (body.replace(b"name=", b"nome="), content_type, "no Content-Disposition with a name"),
        (body, "multipart/form-data", "no boundary"),
    ]:
        with pytest.raises(HTTPException, match=message):
            read(sent, sent_type)


def test_a_gzip_body_is_inflated_up_to_the_limit():
    body = json.dumps({"instances": [{"b64": standard(IMAGE)}]}).encode()
    assert read(gzip.compress(body), "application/json", "gzip").instances == [IMAGE]
    assert read(gzip.compress(IMAGE), "image/jpeg", "x-gzip").instances == [IMAGE]
    assert read(IMAGE, "image/jpeg", "identity").instances == [IMAGE]
    bomb = gzip.compress(bytes(100 * 2**20), 1)
    tracemalloc.start()
    with pytest.raises(HTTPException, match="inflated request is larger than 32 MiB") as raised:
        read(bomb, "application/json", "gzip")
    assert tracemalloc.get_traced_memory()[1] < 3 * MAX_BYTES
    tracemalloc.stop()
    assert raised.value.status_code == 413
    compressed = gzip.compress(body)
    for sent in (body, compressed[:-9], compressed + compressed, b""):
        with pytest.raises(HTTPException, match="gzip") as raised:
            read(sent, "application/json", "gzip")
        assert raised.value.status_code == 400
    with pytest.raises(HTTPException, match="Content-Encoding 'br' is not supported"):
        read(body, "application/json", "br")


@pytest.mark.parametrize("body", [
    b'{"instances":[' + b"[]," * (10 * 2**20) + b"[]]}",
    b'{"instances":[[' + b"[]," * (10 * 2**20) + b"[]]]}",
    b'{"instances":[' + b'{"b64":{}},' * (2 * 2**20) + b"1]}",
    b"[" * (31 * 2**20),
    b'{"instances":[{"b64":"' + b"\\/" * (15 * 2**20) + b'"}]}',
    b'{"instances":[{"b64":"' + b"A" * (31 * 2**20) + b'"}]}',
], ids=["instances", "one instance", "objects", "depth", "escapes", "base64"])  # fmt: skip
def test_31_megabytes_of_json_take_bounded_time_and_memory(body):
    started = time.thread_time()
    tracemalloc.start()
    with contextlib.suppress(HTTPException):
        read(body)
    assert tracemalloc.get_traced_memory()[1] < 5 * len(body)
    tracemalloc.stop()
    assert time.thread_time() - started < 3


def test_31_megabytes_of_form_take_bounded_time():
    started = time.thread_time()
    for filling in (b"\r\n", b"\r\n--", b"--b"):
        body = b"--b\r\n" + filling * (15 * 2**20)
        with pytest.raises(HTTPException):
            read(body, "multipart/form-data; boundary=boundary")
    assert time.thread_time() - started < 3


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares this size and contains little more than its header."""
    return make_image(0, kind="PNG")[:16] + width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes(100)


def test_an_image_above_the_limit_of_pixels_is_rejected_before_it_is_decoded():
    assert read(png_header(1000, 1000), "image/png").instances == [png_header(1000, 1000)]
    (rejected,) = read(png_header(1001, 1000), "image/png").instances
    assert rejected.reason.startswith("the image has 1 megapixels, more than the limit of 1")
