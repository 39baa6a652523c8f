"""trainer.serve as a process, as browsers, clients and Vertex AI use it."""

import base64
import concurrent.futures
import contextlib
import gzip
import http.client
import io
import json
import re
import resource
import shutil
import signal
import socket
import subprocess
import time

import numpy as np
import psutil
import pytest
import requests
from PIL import Image
from playwright import sync_api

import trainer
from tests.support import browser, slow_images, soak
from tests.support.paths import ROOT
from tests.support.processes import run_command
from tests.support.server import Server
from tests.support.tiny_model import CLASS_NAMES, make_image
from trainer import formatting, serve
from trainer.reporting import html, thumbnails

sync_api.expect.set_options(timeout=60_000)  # milliseconds; a slow machine is not an error of the page


@pytest.fixture(scope="module")
def server(tiny_model_dir):
    server = Server(f"--model_dir={tiny_model_dir}", "--port={port}", "--decode_timeout_secs=1.5", max_descriptors=1024)
    server.wait_until_ready()
    yield server
    server.kill()


@pytest.mark.slow
@pytest.mark.parametrize(("width", "color_scheme"), [(1100, "light"), (390, "dark")])
def test_the_page_shows_the_label_or_the_error_of_each_image(chromium, server, tmp_path, width, color_scheme):
    (tmp_path / "<i>red.jpg").write_bytes(make_image(0))
    (tmp_path / "broken.jpg").write_bytes(make_image(1)[:900])
    with browser.opened(chromium, f"http://127.0.0.1:{server.port}/", width=width, color_scheme=color_scheme) as page:
        page.on("filechooser", lambda chooser: None)  # Chromium then passes the choosers on instead of opening them
        sync_api.expect(page.locator("#state")).to_have_text("Ready: 3 classes.")
        assert page.locator("#model li").all_inner_texts() == list(CLASS_NAMES)
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
        sync_api.expect(second.locator(".error")).to_contain_text("truncated JPEG")
        browser.assert_nothing_overflows(page)
        for selector in ("h1", "h2 .label", ".error", ".answer .small", ".drop strong"):
            assert browser.contrast(page, selector) > 4.5, selector
        page.get_by_label("Show heat maps").uncheck()
        sync_api.expect(first.locator("canvas")).to_be_hidden()
        drop_file(page, "blue.png", make_image(2, kind="PNG"))
        sync_api.expect(page.locator("#cards > li").first.locator("h2 .label")).to_have_text("blue")
        page.get_by_role("button", name="Clear").click()
        assert page.locator("#cards > li").count() == 0


@pytest.mark.slow
@pytest.mark.parametrize("resize", ["stretch", "pad", "crop"])
def test_the_page_and_the_report_place_a_heat_map_on_the_same_region(chromium, server, resize):
    heat = np.zeros([8, 8])
    heat[4, 5] = 1
    health = {"status": "ready", "class_names": ["a"], "explains": True, "resize": resize}
    prediction = {"label": "a", "probability": 1.0, "probabilities": [1.0], "heatmap": heat.tolist()}
    with browser.opened(chromium, f"http://127.0.0.1:{server.port}/") as page:
        page.route("**/health", lambda route: route.fulfill(json=health))
        page.route("**/predict", lambda route: route.fulfill(json={"predictions": [prediction]}))
        page.reload()
        sync_api.expect(page.locator("#state")).to_have_text("Ready: 1 class.")
        file = io.BytesIO()
        Image.new("RGB", (200, 80), "blue").save(file, "PNG")
        drop_file(page, "wide.png", file.getvalue())
        sync_api.expect(page.locator("canvas")).to_have_count(1)
        shot = Image.open(io.BytesIO(page.locator(".frame").screenshot())).convert("RGB")
    red, _, blue = np.moveaxis(np.asarray(shot, float), -1, 0)
    shown = red - blue  # only the heat map is red and yellow; the image is blue, the page around it gray
    over_image = thumbnails.over_image(Image.fromarray((255 * heat).astype(np.uint8)), (200, 80), resize)
    expected = np.asarray(over_image.resize(shot.size), float)
    assert shown.max() > 90
    assert center_of(shown) == pytest.approx(center_of(expected), abs=4)


@pytest.mark.slow
def test_the_page_has_the_accuracy_and_marks_an_unsure_answer_in_the_language_of_the_server(chromium, server):
    accuracy = {"kind": "test", "accuracy": 0.965, "low": 0.94, "high": 0.98, "correct": 1930, "images": 2000}
    names = [f"class {number}" for number in range(40)]
    health = {"status": "ready", "class_names": names, "explains": False, "resize": "pad", "accuracy": accuracy}
    prediction = {"label": names[1], "probability": 0.55, "probabilities": [0.44, 0.55, 0.01, *[0.0] * 37]}
    settings = {"predict": "/predict", "health": "/health", "max_request_bytes": 10**6}
    with formatting.in_language("es"):
        text = html.render("serve.html", settings=settings)
    with browser.opened(chromium, f"http://127.0.0.1:{server.port}/", width=390) as page:
        page.route("**/", lambda route: route.fulfill(body=text, content_type="text/html; charset=utf-8"))
        page.route("**/health", lambda route: route.fulfill(json=health))
        page.route("**/predict", lambda route: route.fulfill(json={"predictions": [prediction]}))
        page.reload()
        sync_api.expect(page.locator("#state")).to_have_text("Listo: 40 clases.")
        assert page.locator("#model summary").inner_text() == "y 10 clases más"
        expected = (
            "Clasificó bien el 96,5 % de las imágenes de prueba (1930 de 2000; intervalo del 95 %: 94,0 % a 98,0 %)."
        )
        assert page.locator("#model p").first.inner_text() == expected
        drop_file(page, "one.png", make_image(0, kind="PNG"))
        sync_api.expect(page.locator(".unsure")).to_have_text("Dudoso: también puede ser class 0 (44,0 %).")
        browser.assert_nothing_overflows(page)
        for selector in (".unsure", "#model li", "#model p"):
            assert browser.contrast(page, selector) > 4.5, selector


def center_of(values: np.ndarray) -> tuple[float, float]:
    """The row and column of the middle of the high values."""
    rows, columns = np.nonzero(values > 0.6 * values.max())
    return rows.mean(), columns.mean()


def drop_file(page: sync_api.Page, name: str, contents: bytes) -> None:
    transfer = page.evaluate_handle(
        """([name, text]) => {
          const transfer = new DataTransfer();
          const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
          transfer.items.add(new File([bytes], name, {type: "image/png"}));
          return transfer;
        }""",
        [name, base64.b64encode(contents).decode()],
    )
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})


@pytest.mark.slow
def test_concurrent_requests_are_answered_in_bounded_memory(server):
    process = psutil.Process(server.process.pid)
    images = [make_image(i, seed=i, height=600, width=800) for i in range(3)]
    expected = [server.classify(image).value["predictions"][0] for image in images]
    assert [prediction["label"] for prediction in expected] == list(CLASS_NAMES)
    broken = [
        (b"hello", "not a JPEG, PNG, GIF, BMP or WebP"),
        (make_image(0)[:2000], "truncated JPEG: the end of the"),
        (make_image(0, kind="PNG").replace(b"IDAT", b"IDAT\0", 1), "damaged PNG: a checksum is wrong"),
        (b"", "empty file"),
    ]

    def send(i: int) -> int:
        """Sends a good image, or a good and a bad one; returns the resident memory of the server in bytes."""
        if i % 4:
            response = server.classify(images[i % 3])
            assert response.status == 200
            (prediction,) = response.value["predictions"]
            assert prediction["label"] == expected[i % 3]["label"]
            assert prediction["probabilities"] == pytest.approx(expected[i % 3]["probabilities"], abs=1e-5)
        else:
            contents, reason = broken[i // 4 % 4]
            response = server.classify(make_image(1), contents)
            assert response.status == 200
            good, bad = response.value["predictions"]
            assert good["label"] == CLASS_NAMES[1]
            assert bad["error"].startswith(reason)
            assert len(bad["error"]) < 150
        return process.memory_info().rss

    with concurrent.futures.ThreadPoolExecutor(8) as clients:
        list(clients.map(send, range(40)))
        before = process.memory_info().rss
        peak = max(clients.map(send, range(200)))
    assert peak - before < 100 * 2**20
    health = server.request("GET", "/health")
    model = health.value.pop("model")
    assert health.value == {
        "status": "ready",
        "class_names": list(CLASS_NAMES),
        "explains": True,
        "resize": "stretch",
        "accuracy": None,
    }
    assert model["picture_trainer"] == trainer.__version__
    assert len(model["sha256_of_variables"]) == 64


@pytest.mark.slow
def test_explain_adds_a_heat_map_to_the_same_prediction(server):
    (plain,) = server.classify(make_image(0)).value["predictions"]
    (explained,) = server.classify(make_image(0), explain=True).value["predictions"]
    assert set(explained) == {*plain, "heatmap"}
    assert explained["probabilities"] == pytest.approx(plain["probabilities"], abs=1e-5)
    assert len(explained["heatmap"]) == len(explained["heatmap"][0]) == 8
    assert max(map(max, explained["heatmap"])) == 1


@pytest.mark.slow
def test_the_curl_command_of_the_readme_returns_a_prediction(server, tmp_path):
    if not shutil.which("curl"):
        pytest.skip("no curl on this machine")
    readme = (ROOT / "README.md").read_text()
    (line,) = re.findall(r"^curl .*/predict .*$", readme, re.MULTILINE)
    (tmp_path / "photo.jpg").write_bytes(make_image(0))
    line = line.replace(":8080", f":{server.port}")
    process = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(process.stdout)["predictions"][0]["label"] == CLASS_NAMES[0]


def predictions_of(response) -> list[str]:
    assert response.status == 200, response
    return [prediction["label"] for prediction in response.value["predictions"]]


@pytest.mark.slow
@pytest.mark.parametrize("path", [
    "/predict", "/predict/", "/v1/models/any:predict", "/v1/models/any:predict/", "/v1/models/any/versions/3:predict",
])  # fmt: skip
def test_requests_are_answered_as_people_send_them(server, path):
    image, text = make_image(2), base64.b64encode(make_image(2)).decode()
    body = json.dumps({"instances": [{"b64": text.rstrip("=")}, {"b64": f"data:image/jpeg;base64,{text}"}]})
    assert predictions_of(server.request("POST", path, body, Content_Type="application/json")) == ["blue"] * 2
    compressed = gzip.compress(body.encode())
    response = server.request("POST", path, compressed, Content_Type="application/json", Content_Encoding="gzip")
    assert predictions_of(response) == ["blue"] * 2
    assert predictions_of(server.request("POST", path, image, Content_Type="image/jpeg")) == ["blue"]
    url = f"http://127.0.0.1:{server.port}{path}?explain=true"
    files = [("image", make_image(0)), ("image", image)]
    explained = requests.post(url, files=files, timeout=60).json()["predictions"]
    assert [prediction["label"] for prediction in explained] == [CLASS_NAMES[0], "blue"]
    assert len(explained[0]["heatmap"]) == 8
    refused = server.request("POST", path, body, Content_Type="text/plain")
    assert (refused.status, "as application/json" in refused.value["error"]) == (415, True)


@pytest.mark.slow
def test_tensorflow_serving_reports_its_model(server):
    for path in ("/v1/models/any", "/v1/models/any/versions/1"):
        (state,) = server.request("GET", path).value["model_version_status"]
        assert (state["version"], state["state"], state["status"]["error_code"]) == ("1", "AVAILABLE", "OK")


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/predict"])
def test_a_foreign_host_or_origin_is_refused_everywhere(server, path):
    method = "POST" if path == "/predict" else "GET"
    for headers in (
        {"Host": f"attacker.example:{server.port}"},
        {"Origin": "https://attacker.example"},
        {"Origin": "null", "Content_Type": "application/json"},
        {"Origin": f"http://127.0.0.1:{server.port + 1}", "Content_Type": "image/jpeg"},
    ):
        response = server.request(method, path, b"{}", **headers)
        assert (response.status, "is not allowed: start the server with --allowed_" in response.value["error"]) == (
            403,
            True,
        )
        assert "access-control-allow-origin" not in response.headers


@pytest.mark.slow
def test_a_slow_image_is_an_error_and_does_not_block_other_clients(server):
    with concurrent.futures.ThreadPoolExecutor(1) as clients:
        slow = clients.submit(server.classify, slow_images.large_png())
        while not slow.done():
            started = time.monotonic()
            assert predictions_of(server.classify(make_image(1))) == [CLASS_NAMES[1]]
            assert server.request("GET", "/health").status == 200
            assert time.monotonic() - started < 2
    (prediction,) = slow.result().value["predictions"]
    assert prediction["error"].startswith("cannot be decoded within 1.5 second")
    assert "trainer_serve_killed_decoders_total 1.0" in server.request("GET", "/metrics").value


@pytest.mark.slow
def test_silent_connections_are_replaced_and_closed(server):
    """More than the server has file descriptors. /health and predictions are answered all the time."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    address = ("127.0.0.1", server.port)
    connections = [socket.create_connection(address, timeout=60) for _ in range(1100)]
    try:
        for connection in connections[::2]:
            with contextlib.suppress(ConnectionError):  # replaced already
                connection.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
        for _ in range(20):
            started = time.monotonic()
            assert server.request("GET", "/health").status == 200
            assert time.monotonic() - started < 1
        assert predictions_of(server.classify(make_image(1))) == [CLASS_NAMES[1]]
        assert number_of_connections(server) <= 512
        connections[-1].settimeout(60)
        assert connections[-1].recv(1) == b""  # the timeout of the header
        assert number_of_connections(server) == 1  # that of this request
    finally:
        for connection in connections:
            connection.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_connections_that_stay_open_after_a_response_are_replaced(server):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    connections = []
    try:
        for _ in range(600):
            connections.append(http.client.HTTPConnection("127.0.0.1", server.port, timeout=60))
            connections[-1].request("GET", "/health")
            assert connections[-1].getresponse().read()
        assert number_of_connections(server) <= 512
        first, last = connections[0].sock, connections[-1].sock
        first.settimeout(60)
        assert first.recv(1) == b""  # closed by the server
        connections[-1].request("GET", "/health")
        assert connections[-1].getresponse().status == 200
        assert connections[-1].sock is last
    finally:
        for connection in connections:
            connection.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_burst_of_connections_waits_in_the_queue_of_the_kernel(server):
    """A client whose connection is not accepted would try again only after a second."""
    connections = [socket.socket() for _ in range(400)]
    server.process.send_signal(signal.SIGSTOP)  # so that nothing is accepted
    try:
        started = time.monotonic()
        for connection in connections:
            connection.settimeout(10)
            connection.connect(("127.0.0.1", server.port))
        assert time.monotonic() - started < 1
    finally:
        server.process.send_signal(signal.SIGCONT)
        for connection in connections:
            connection.close()
    assert server.request("GET", "/health").status == 200


def number_of_connections(server: Server) -> int:
    (line,) = re.findall(r"^trainer_serve_connections (.*)$", server.request("GET", "/metrics").value, re.MULTILINE)
    return int(float(line))


@pytest.mark.slow
def test_large_json_takes_bounded_memory_and_health_is_answered(server):
    process = psutil.Process(server.process.pid)
    body = b'{"instances":[' + b"[]," * (10 * 2**20) + b"[]]}"  # 31 MB
    before, peak, slowest = process.memory_info().rss, 0, 0.0
    with concurrent.futures.ThreadPoolExecutor(6) as clients:
        pending = [clients.submit(server.request, "POST", "/predict", body) for _ in range(6)]
        while not all(request.done() for request in pending):
            started = time.monotonic()
            assert server.request("GET", "/health").status == 200
            slowest = max(slowest, time.monotonic() - started)
            peak = max(peak, process.memory_info().rss)
    assert {(response.result().status, response.result().value["error"][:45]) for response in pending} == {
        (413, "The request has more than 10000 JSON values, ")
    }
    assert slowest < 1
    assert peak - before < 10 * len(body)  # the six bodies, some of them twice


@pytest.mark.slow
def test_metrics_count_what_the_server_did(server):
    before = metrics_of(server)
    assert predictions_of(server.classify(make_image(0), make_image(1))) == list(CLASS_NAMES[:2])
    server.request("POST", "/predict", b"{", Content_Type="text/plain")
    after = metrics_of(server)
    for name, difference in [
        ('requests_total{status="200"}', 1),
        ('requests_total{status="415"}', 1),
        ("request_seconds_count", 2),
        ('images_total{result="classified"}', 2),
        ("batch_images_sum", 2),
        ("requests_in_progress", 0),
        ("request_bytes", 0),
        ("queue_images", 0),
    ]:
        assert after[f"trainer_serve_{name}"] - before.get(f"trainer_serve_{name}", 0) == difference, name


def metrics_of(server: Server) -> dict[str, float]:
    lines = [line.rsplit(" ", 1) for line in server.request("GET", "/metrics").value.splitlines() if line[0] != "#"]
    return {name: float(value) for name, value in lines}


@pytest.mark.slow
def test_good_clients_are_served_among_bad_ones(server):
    result = soak.run(server, 30)
    assert not result.failures, result.summary()
    # Where other work takes the CPUs, latency measures that work.
    assert np.percentile(result.health_secs, 99) < (1 if result.cpu_wait < 0.2 else 15), result.summary()
    assert result.memory_growth_mib() < 200, result.summary()
    assert result.log_bytes < 2**20, result.summary()
    assert {"slow image: 200 error", "origin: 403", "host: 403", "text/plain: 415"} <= set(result.attacks)


@pytest.fixture
def vertex_server(tiny_model_dir):
    """A server as Vertex AI starts it, with small limits."""
    server = Server(
        "--max_request_mb=1",
        "--max_requests=1",
        "--timeout_secs=15",
        "--decoders=1",
        health="/ping",
        predict="/v1/endpoints/7:predict",
        AIP_HTTP_PORT="{port}",
        AIP_HEALTH_ROUTE="/ping",
        AIP_PREDICT_ROUTE="/v1/endpoints/7:predict",
        AIP_STORAGE_URI=str(tiny_model_dir),
    )
    server.wait_until_ready()
    yield server
    server.kill()


@pytest.mark.slow
def test_vertex_sets_port_routes_and_model_and_the_limits_hold(vertex_server):
    connections = psutil.Process(vertex_server.process.pid).net_connections()
    assert [c.laddr.ip for c in connections if c.status == "LISTEN"] == ["0.0.0.0"]
    assert vertex_server.classify(make_image(1)).value["predictions"][0]["label"] == CLASS_NAMES[1]
    too_large = vertex_server.classify(bytes(2**20))
    assert (too_large.status, "larger than 1 MiB" in too_large.value["error"]) == (413, True)
    assert vertex_server.request("GET", "/ping", Host="7.us-central1-123.prediction.vertexai.goog").status == 200
    assert vertex_server.request("GET", "/ping", Host="a.example", Origin="https://b.example").status == 403
    slow = http.client.HTTPConnection("127.0.0.1", vertex_server.port, timeout=30)
    slow.request("POST", vertex_server.predict, headers={"Content-Length": "1000"}, body=b"{")
    time.sleep(0.5)
    assert vertex_server.classify(make_image(1)).status == 200  # a slow client does not block another
    response = slow.getresponse()
    assert response.status == 408
    assert "did not arrive within 15 seconds" in json.loads(response.read())["error"]
    with concurrent.futures.ThreadPoolExecutor(1) as clients:
        first = clients.submit(vertex_server.classify, slow_images.large_png(4500))  # over a second
        time.sleep(0.5)  # it arrives
        busy = vertex_server.classify(make_image(1))
        assert (busy.status, busy.headers["Retry-After"]) == (503, "1")
        assert "Concurrency limit of 1" in busy.value["error"]
        assert first.result().status == 200


@pytest.mark.slow
def test_sigterm_completes_the_request_in_progress(vertex_server):
    body = json.dumps({"instances": [{"b64": base64.b64encode(make_image(2)).decode()}]}).encode()
    connection = http.client.HTTPConnection("127.0.0.1", vertex_server.port, timeout=30)
    headers = {"Content-Length": str(len(body))}
    connection.request("POST", vertex_server.predict, headers=headers, body=body[:100])
    time.sleep(0.5)
    vertex_server.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    connection.send(body[100:])
    assert json.loads(connection.getresponse().read())["predictions"][0]["label"] == "blue"
    assert vertex_server.process.wait(30) == 0
    log = vertex_server.log()
    assert "Stopped." in log
    assert "Traceback" not in log


def test_a_folder_without_a_model_is_a_one_line_error(tmp_path):
    process = run_command("trainer.serve", f"--model_dir={tmp_path}", "--port=0")
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1
    assert "holds neither saved_model.pb nor config.json" in process.stderr


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_ends_the_server_with_an_error(tmp_path):
    (tmp_path / "saved_model.pb").write_text("text")
    process = run_command("trainer.serve", f"--model_dir={tmp_path}", "--port=0")
    assert process.returncode == 2
    assert f"error: --model_dir={tmp_path}: saved_model.pb is not a SavedModel" in process.stderr
    assert "Traceback" not in process.stderr


def test_a_flag_takes_precedence_over_the_environment():
    values = {"model_dir": "m", "host": "127.0.0.1", "port": 80, "allowed_hosts": []}
    environment = {"AIP_HTTP_PORT": "8080", "AIP_STORAGE_URI": "gs://b/m/", "AIP_PREDICT_ROUTE": "/p"}
    routes = {"predict_route": "/p", "health_route": "/health"}
    from_environment = {"model_dir": "gs://b/m", "host": "0.0.0.0", "port": 8080, "allowed_hosts": ["*"]}
    assert serve.with_environment(values, set(), environment) == {**from_environment, **routes}
    assert serve.with_environment(values, set(values), environment) == {**values, **routes}
    assert serve.with_environment(values, set(values), {})["predict_route"] == "/predict"
