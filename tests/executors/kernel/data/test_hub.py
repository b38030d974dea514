"""The Hub is asked only where it can be reached, and its absence is said quickly and clearly."""

import http.server
import socket
import threading

import pytest

from tunesmith.executors.kernel.data import hub
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.nouns import DataSource


@pytest.fixture(autouse=True)
def online(monkeypatch):
    for key in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(key, raising=False)
    for key in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(key, raising=False)


def reason(**options):
    with pytest.raises(InputError) as caught:
        hub.reach("org/set", **options)
    assert caught.value.code == "data.unreachable"
    assert caught.value.where == "org/set"
    return caught.value.why


def test_told_not_to_ask():
    assert "told not to" in reason(offline=True)


def test_an_offline_variable(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in reason(offline=False)


def test_nobody_answers(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    assert "refused" in reason(offline=False)


def test_somebody_listens_and_is_silent(monkeypatch):
    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{mute.getsockname()[1]}")
        assert "answer" in reason(offline=False)


def test_an_endpoint_that_is_no_url(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "nonsense")
    assert "nonsense" in reason(offline=False)


@pytest.mark.parametrize("status", [200, 404])
def test_any_answer_is_an_answer(monkeypatch, status):
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        hub.reach("org/set", offline=False)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_rows_come_through_datasets(write, tmp_path, monkeypatch):
    """The real library, on a folder in place of a repository: only the network is left out."""
    pytest.importorskip("datasets")
    monkeypatch.setattr(hub, "reach", lambda name, offline: None)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write("set/train.jsonl", [{"question": "a", "answer": "b"}] * 3)
    source = DataSource(source=str(tmp_path / "set"))
    found = list(hub.records(source, offline=False))
    assert found[2] == (f"{source.source}:train row 3", {"question": "a", "answer": "b"})
    with pytest.raises(InputError) as caught:
        list(hub.records(DataSource(source=str(tmp_path / "none")), offline=False))
    assert caught.value.code == "data.hub"
