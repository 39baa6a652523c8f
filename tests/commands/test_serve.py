"""The server as a process: what browsers and clients see of it, whatever they send."""

import base64
import collections
import concurrent.futures
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from playwright import sync_api

from tests.support import browser
from tests.support.paths import ROOT
from tests.support.processes import free_ports, run_command
from tests.support.tiny_model import CLASS_NAMES, make_image
from trainer import serve
from trainer.serving import app

sync_api.expect.set_options(timeout=60_000)  # milliseconds; a busy machine is no defect of the page
Answer = collections.namedtuple("Answer", "status value headers")


class Server:
    """`python -m trainer.serve` in a process of its own."""

    def __init__(self, *arguments: str, health: str = "/health", predict: str = "/predict", **environment):
        (self.port,) = free_ports(1)
        self.health, self.predict = health, predict
        arguments = [argument.format(port=self.port) for argument in arguments]
        environment = {name: value.format(port=self.port) for name, value in environment.items()}
        command = [sys.executable, "-m", "trainer.serve", *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})

    def ask(self, method: str, path: str, body: bytes | str | None = None, host="127.0.0.1") -> Answer:
        connection = http.client.HTTPConnection(host, self.port, timeout=60)
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            return Answer(response.status, json.loads(response.read()), response.headers)
        finally:
            connection.close()

    def ask_about(self, *contents: bytes, **parameters) -> Answer:
        instances = [{"bytes": {"b64": base64.b64encode(content).decode()}} for content in contents]
        request = {"instances": instances, **({"parameters": parameters} if parameters else {})}
        return self.ask("POST", self.predict, json.dumps(request))

    def wait_until_ready(self) -> Answer:
        seen = set()
        for _ in range(600):
            try:
                answer = self.ask("GET", self.health)
                if answer.status == 200:
                    assert seen <= {503}, "loading is told as such"
                    return answer
                seen.add(answer.status)
            except ConnectionError:
                assert self.process.poll() is None, self.process.stderr.read()
            time.sleep(0.1)
        raise TimeoutError

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@pytest.fixture(scope="module")
def server(tiny_model_dir):
    server = Server(f"--model_dir={tiny_model_dir}", "--port={port}")
    server.wait_until_ready()
    yield server
    server.process.kill()


@pytest.mark.slow
def test_a_dropped_picture_shows_its_label_and_a_broken_one_its_error(chromium, server, tmp_path):
    (tmp_path / "<i>red.jpg").write_bytes(make_image(0))
    (tmp_path / "broken.jpg").write_bytes(make_image(1)[:900])
    for width, scheme in ((1100, "light"), (390, "dark")):
        with browser.opened(chromium, f"http://127.0.0.1:{server.port}/", width=width, color_scheme=scheme) as page:
            page.on("filechooser", lambda chooser: None)  # from now on Chromium hands choosers over, and shows none
            sync_api.expect(page.locator("#state")).to_have_text("It knows 3 classes.")
            page.keyboard.press("Tab")
            sync_api.expect(page.locator("#files")).to_be_focused()
            with page.expect_file_chooser() as chooser:
                page.keyboard.press("Enter")
            chooser.value.set_files([tmp_path / "<i>red.jpg", tmp_path / "broken.jpg"])
            sync_api.expect(page.locator(".answer h2, .error")).to_have_count(2)
            first, second = page.locator("#cards > li").all()
            sync_api.expect(first.locator("h2 .label")).to_have_text(CLASS_NAMES[0])
            assert first.locator("ol li").count() == 3
            sync_api.expect(first.locator("canvas")).to_have_count(1)
            sync_api.expect(second.locator(".error")).to_have_text("truncated JPEG: the end of the picture is missing")
            browser.assert_nothing_sticks_out(page)
            for selector in ("h1", "h2 .label", ".error", ".answer .small", ".drop strong"):
                assert browser.contrast(page, selector) > 4.5, selector
            page.get_by_label("Show where the network saw it").uncheck()
            sync_api.expect(first.locator("canvas")).to_be_hidden()
            blue = base64.b64encode(make_image(2, kind="PNG")).decode()
            dropped = page.evaluate_handle(
                """text => {
                  const transfer = new DataTransfer();
                  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
                  transfer.items.add(new File([bytes], "blue.png", {type: "image/png"}));
                  return transfer;
                }""",
                blue,
            )
            page.dispatch_event("#drop", "drop", {"dataTransfer": dropped})
            sync_api.expect(page.locator("#cards > li").first.locator("h2 .label")).to_have_text("blue")
            page.get_by_role("button", name="Clear").click()
            assert page.locator("#cards > li").count() == 0


BROKEN = {
    "text": (b"hello", "not a JPEG, PNG, GIF, BMP or WebP picture"),
    "truncated": (make_image(0)[:2000], "truncated JPEG: the end of the picture is missing"),
    "damaged inside": (make_image(0, kind="PNG").replace(b"IDAT", b"IDAT\0", 1), "cannot be decoded: Invalid PNG"),
    "empty": (b"", "empty file"),
}


@pytest.mark.slow
def test_good_requests_are_answered_whatever_else_is_asked_and_memory_stays(server):
    process = psutil.Process(server.process.pid)
    wanted = [server.ask_about(make_image(i, seed=i, height=600, width=800)).value["predictions"][0] for i in range(3)]
    assert [prediction["label"] for prediction in wanted] == list(CLASS_NAMES)
    broken = list(BROKEN.values())

    def ask(i: int) -> int:
        if i % 4:
            answer = server.ask_about(make_image(i % 3, seed=i % 3, height=600, width=800))
            assert answer.status == 200
            (prediction,) = answer.value["predictions"]
            assert prediction["label"] == wanted[i % 3]["label"]
            assert prediction["probabilities"] == pytest.approx(wanted[i % 3]["probabilities"], abs=1e-5)
        else:
            contents, reason = broken[i // 4 % 4]
            answer = server.ask_about(make_image(1), contents)  # the bad picture does not harm its neighbour
            assert answer.status == 200
            assert answer.value["predictions"][0]["label"] == CLASS_NAMES[1]
            assert answer.value["predictions"][1]["error"].startswith(reason)
            assert len(answer.value["predictions"][1]["error"]) < 150
        return process.memory_info().rss

    with concurrent.futures.ThreadPoolExecutor(8) as clients:
        list(clients.map(ask, range(40)))
        before = process.memory_info().rss
        peak = max(clients.map(ask, range(200)))
    assert peak - before < 100 * 2**20
    assert server.ask("GET", "/health").value == {"status": "ready", "class_names": list(CLASS_NAMES), "explains": True}


@pytest.mark.slow
def test_a_heat_map_is_there_for_who_asks(server):
    (plain,) = server.ask_about(make_image(0)).value["predictions"]
    (explained,) = server.ask_about(make_image(0), explain=True).value["predictions"]
    assert set(explained) == {*plain, "heatmap"}
    assert explained["probabilities"] == pytest.approx(plain["probabilities"], abs=1e-5)
    assert len(explained["heatmap"]) == len(explained["heatmap"][0]) == 8
    assert max(map(max, explained["heatmap"])) == 1


@pytest.mark.slow
def test_the_readmes_curl_gets_an_answer(server, tmp_path):
    if not shutil.which("curl"):
        pytest.skip("no curl on this machine")
    readme = (ROOT / "README.md").read_text()
    (line,) = re.findall(r"^curl .*/predict .*$", readme, re.MULTILINE)
    (tmp_path / "photo.jpg").write_bytes(make_image(0))
    line = line.replace(":8080", f":{server.port}")
    answer = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout)["predictions"][0]["label"] == CLASS_NAMES[0]


@pytest.mark.slow
def test_vertex_sets_routes_port_and_model_and_limits_hold_and_a_signal_lets_it_finish(tiny_model_dir):
    server = Server(
        *("--max_request_mb=1", "--max_requests=1", "--timeout_secs=3"),
        **{"health": "/ping", "predict": "/v1/endpoints/7:predict"},
        **{"AIP_HTTP_PORT": "{port}", "AIP_HEALTH_ROUTE": "/ping", "AIP_PREDICT_ROUTE": "/v1/endpoints/7:predict"},
        AIP_STORAGE_URI=str(tiny_model_dir),
    )
    try:
        server.wait_until_ready()
        listening = [c.laddr.ip for c in psutil.Process(server.process.pid).net_connections() if c.status == "LISTEN"]
        assert listening == ["0.0.0.0"]
        assert server.ask_about(make_image(1)).value["predictions"][0]["label"] == CLASS_NAMES[1]
        too_large = server.ask_about(bytes(2**20))
        assert (too_large.status, "larger than 1 MiB" in too_large.value["error"]) == (413, True)
        slow = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        slow.request("POST", server.predict, headers={"Content-Length": "1000"}, body=b"{")
        time.sleep(0.5)
        busy = server.ask_about(make_image(1))
        assert (busy.status, busy.headers["Retry-After"]) == (503, "1")
        response = slow.getresponse()
        assert response.status == 408
        assert "did not arrive within 3 seconds" in json.loads(response.read())["error"]
        body = json.dumps({"instances": [{"b64": base64.b64encode(make_image(2)).decode()}]}).encode()
        last = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        last.request("POST", server.predict, headers={"Content-Length": str(len(body))}, body=body[:100])
        time.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        last.send(body[100:])
        assert json.loads(last.getresponse().read())["predictions"][0]["label"] == "blue"
        assert server.process.wait(30) == 0
        errors = server.process.stderr.read()
        assert "Ended." in errors
        assert "Traceback" not in errors
    finally:
        server.process.kill()


def test_a_folder_without_a_model_is_the_users_error(tmp_path):
    answer = run_command("trainer.serve", f"--model_dir={tmp_path}", "--port=0")
    assert answer.returncode == 2
    assert answer.stderr.count("\n") == 1
    assert "holds neither saved_model.pb nor config.json" in answer.stderr


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_ends_the_server_with_one_line(tmp_path):
    (tmp_path / "saved_model.pb").write_text("text")
    answer = run_command("trainer.serve", f"--model_dir={tmp_path}", "--port=0")
    assert answer.returncode == 2
    assert f"error: --model_dir={tmp_path}: saved_model.pb is no SavedModel" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_port_in_use_is_the_users_error(tmp_path):
    (tmp_path / "saved_model.pb").touch()
    with serve._listen("127.0.0.1", 0) as listening:
        answer = run_command("trainer.serve", f"--model_dir={tmp_path}", f"--port={listening.getsockname()[1]}")
    assert answer.returncode == 2
    assert "cannot be listened on (Address already in use)" in answer.stderr


def test_a_flag_that_is_given_wins_over_what_vertex_sets():
    values = {"model_dir": "m", "host": "127.0.0.1", "port": 80}
    environment = {"AIP_HTTP_PORT": "8080", "AIP_STORAGE_URI": "gs://b/m/", "AIP_PREDICT_ROUTE": "/p"}
    routes = {"predict_route": "/p", "health_route": "/health"}
    assert serve.with_environment(values, set(), environment) == {
        **{"model_dir": "gs://b/m", "host": "0.0.0.0", "port": 8080},
        **routes,
    }
    assert serve.with_environment(values, set(values), environment) == {**values, **routes}
    assert serve.with_environment(values, set(values), {})["predict_route"] == "/predict"


@pytest.mark.parametrize(("body", "status", "message"), [
    (b"", 400, "no JSON"), (b"{", 400, "no JSON"), (b"\xff", 400, "no JSON"), (b"[" * 100000, 400, "no JSON"),
    (b"[]", 400, "no list of instances"), (b"{}", 400, "no list of instances"), (b'{"instances": {}}', 400, "no list"),
    (b'{"instances": []}', 400, "no list of instances"), (b'{"instances": [%s1]}' % (b"1," * 128), 413, "129 instances"),
    (b'{"instances": [1], "parameters": {"explain": 1}}', 400, "parameters are not"),
    (b'{"instances": [1], "parameters": {"explian": true}}', 400, "parameters are not"),
    (b'{"instances": [1], "parameters": [1]}', 400, "parameters are not"),
])  # fmt: skip
def test_what_is_no_request_is_refused_with_what_was_expected(body, status, message):
    with pytest.raises(app.HTTPException, match=message) as refused:
        app.read_request(body, 10**6)
    assert refused.value.status == status


def test_each_instance_is_read_by_itself_in_both_forms():
    instances = [{"bytes": {"b64": "aGk="}}, {"b64": "aGk="}, {"b64": "?"}, {"bytes": "aGk="}, 1, None, {"b64": 1}, []]
    contents, explain = app.read_request(json.dumps({"instances": instances, "parameters": None}).encode(), 10**6)
    assert contents[:2] == [b"hi", b"hi"]
    assert not explain
    assert [str(content).split(" ")[1] for content in contents[2:]] == ["base64", "a", "a", "a", "a", "a"]


def png_of(width: int, height: int) -> bytes:
    """The bytes of a PNG that claims this size, and not much more than its header."""
    return make_image(0, kind="PNG")[:16] + width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes(100)


def test_a_picture_of_too_many_pixels_is_refused_by_itself_and_large_ones_are_decoded_alone():
    small, large, bomb = png_of(10, 10), png_of(1000, 700), png_of(1001, 1000)
    instances = [{"b64": base64.b64encode(content).decode()} for content in (small, large, bomb, large, small)]
    contents, _ = app.read_request(json.dumps({"instances": instances}).encode(), 10**6)
    assert str(contents[2]) == "the picture has 1 megapixels, more than the 1 that this server takes: scale it down"
    batches = list(app.batches(contents, 10**6))
    assert [len(batch) for batch in batches] == [3, 2]
    assert [content for batch in batches for content in batch] == contents
    assert [len(batch) for batch in app.batches([small] * 20, 10**6)] == [8, 8, 4]
