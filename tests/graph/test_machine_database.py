"""The graph's own database: damaged, poisoned, unwritable; and what must not leave the machine."""

import json
import os
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer

import ormsgpack
import pytest
from driving import JOB, through

from tunesmith.graph import machine
from tunesmith.graph.machine import Strict
from tunesmith.orchestrator.states import JobState as S

# --- graph.db ----------------------------------------------------------------------------------------------------


def test_its_settings(tmp_path):
    with machine.checkpoints(tmp_path / "graph.db") as saver:
        saver.setup()
        assert saver.conn.execute("PRAGMA synchronous").fetchone() == (2,)
        assert saver.conn.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert isinstance(saver.serde, Strict)
    assert (tmp_path / "graph.db").stat().st_mode & 0o777 == 0o600


def test_only_plain_json_and_hashes_are_kept(drive, store, good):
    store.create(JOB, good)
    drive()
    with machine.checkpoints(drive.database) as saver:
        for item in saver.list({"configurable": {"thread_id": JOB}}):
            values = {key: value for key, value in item.checkpoint["channel_values"].items() if ":" not in key}
            assert set(values) <= {"job", "draft", "basis", "__start__"}
            json.dumps(values)
            if values.get("draft"):
                assert isinstance(json.loads(values["draft"]), dict)


def _garbage(path):
    path.write_bytes(bytes(range(256)) * 32)


def _torn(path):
    path.write_bytes(path.read_bytes()[:5000])


def _empty(path):
    path.write_bytes(b"")


def _foreign_schema(path):
    path.unlink()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE checkpoints (x)")
        connection.commit()


def _corrupt_blobs(path):
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE checkpoints SET checkpoint = x'c1c1c1'")
        connection.commit()


def _foreign_state(path):
    with closing(sqlite3.connect(path)) as connection:
        for rowid, kind, blob in connection.execute("SELECT rowid, type, checkpoint FROM checkpoints").fetchall():
            assert kind == "msgpack"
            doc = ormsgpack.unpackb(blob, option=ormsgpack.OPT_NON_STR_KEYS)
            doc["channel_values"] = {"job": "j-bbbbbb", "draft": 7, "branch:to:size": None}
            connection.execute("UPDATE checkpoints SET checkpoint = ? WHERE rowid = ?", (ormsgpack.packb(doc), rowid))
        connection.commit()


def _a_folder(path):
    path.unlink()
    path.mkdir()


def _a_link(path):
    path.unlink()
    path.symlink_to("/dev/zero")


def _unknown_node(path):
    with closing(sqlite3.connect(path)) as connection:
        for rowid, blob in connection.execute("SELECT rowid, checkpoint FROM checkpoints").fetchall():
            changed = blob.replace(b"branch:to:review", b"branch:to:rEvIeW")
            connection.execute("UPDATE checkpoints SET checkpoint = ? WHERE rowid = ?", (changed, rowid))
        connection.commit()


@pytest.mark.parametrize(
    "harm",
    [_garbage, _torn, _empty, _foreign_schema, _corrupt_blobs, _foreign_state, _a_folder, _a_link, _unknown_node],
    ids=lambda harm: harm.__name__.strip("_"),
)
@pytest.mark.parametrize("stop", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_graph_db_that_cannot_be_read_never_loses_a_job(drive, store, vague, harm, stop):
    seen = iter(range(3))

    def between():
        if next(seen) == stop:
            for path in (drive.folder / "graph.db-wal", drive.folder / "graph.db-shm"):
                path.unlink(missing_ok=True)
            harm(drive.database)

    store.create(JOB, vague)
    through(drive, store, between)
    assert drive.state() == S.SUCCEEDED
    assert drive.calls() == ["save_plan", "save_plan", "submit", "diagnose", "collect", "finish"]


def test_a_place_that_cannot_be_written_is_done_without(drive, store, vague, caplog):
    drive.database = drive.folder / "nowhere" / "graph.db"
    store.create(JOB, vague)
    through(drive, store)
    assert drive.state() == S.SUCCEEDED
    assert "going on from the store" in caplog.text


def test_a_poisoned_row_is_not_executed_and_is_moved_aside(drive, store, good, tmp_path, caplog):
    """A1: a crafted checkpoint that names os.system, as every constructor kind the default serializer honours."""
    mark = tmp_path / "executed"
    command = f"touch {mark}"
    for code, payload in {
        0: ("os", "system", command),
        1: ("os", "system", (command,)),
        2: ("subprocess", "Popen", {"args": command, "shell": True}),
        3: ("os", "path", command, "join"),
        4: ("os", "system", {"x": command}),
        5: ("os", "system", {"x": command}, "construct"),
    }.items():
        store.create(JOB, good)
        drive()
        poison = ormsgpack.packb(ormsgpack.Ext(code, ormsgpack.packb(payload)))
        with pytest.raises(ValueError, match=payload[0]):
            Strict().loads_typed(("msgpack", poison))
        with closing(sqlite3.connect(drive.database)) as connection:
            connection.execute("UPDATE checkpoints SET type = 'msgpack', checkpoint = ?", (poison,))
            connection.execute("UPDATE writes SET type = 'msgpack', value = ?", (poison,))
            connection.commit()
        store.approve(JOB)
        assert drive() == "await"
        assert not mark.exists()
        assert (tmp_path / "graph.db.broken").exists()
        (tmp_path / "graph.db.broken").unlink()
    assert "moved to" in caplog.text


@pytest.mark.parametrize("kind", ["pickle", "json", "bytes", "elf"])
def test_rows_of_a_kind_we_never_write_are_refused(kind, tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'x'}",)

    with pytest.raises(ValueError, match="foreign"):
        Strict().loads_typed((kind, pickle.dumps(Evil())))
    assert not (tmp_path / "x").exists()


# --- what must not leave the machine --------------------------------------------------------------------------------

_TRACED = """
import sys
sys.path.insert(0, {here!r})
import jobstore
from pathlib import Path
from tunesmith.graph.machine import Tools, advance
from tunesmith.orchestrator.nouns import Request
store = jobstore.JobStore()
store.create("j-aaaaaa", Request(spec={spec!r}, cwd={cwd!r}), yes=True)
tools = Tools(store.lease("j-aaaaaa"), Path({cwd!r}) / "cache", lambda node: None)
assert advance("j-aaaaaa", tools, Path({cwd!r}) / "graph.db") == "await"
if {control}:
    from langgraph.graph import StateGraph
    graph = StateGraph(dict)
    graph.add_node("a", lambda state: state)
    graph.set_entry_point("a")
    graph.compile().invoke({{"x": 1}})
    from langsmith.run_trees import get_cached_client
    get_cached_client().flush()
from langchain_core.tracers.langchain import wait_for_all_tracers
wait_for_all_tracers()
"""


@pytest.mark.slow
@pytest.mark.parametrize("control", [False, True])
def test_nothing_is_traced_whatever_the_environment_says(good, tmp_path, control):
    """A15. The control (a bare graph in the same environment) shows that the sink would have heard it."""
    heard = []

    class Sink(BaseHTTPRequestHandler):
        def do_POST(self):
            heard.append(self.path)
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(202)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        do_GET = do_PATCH = do_POST

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Sink) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = os.path.dirname(__file__)
        code = _TRACED.format(here=here, spec=good.spec, cwd=str(tmp_path), control=control)
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        env = {**os.environ, "LANGSMITH_TRACING": "true", "LANGCHAIN_TRACING_V2": "true", "LANGSMITH_API_KEY": "lsv2_x"}
        env |= {"LANGSMITH_ENDPOINT": endpoint, "LANGCHAIN_ENDPOINT": endpoint}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        server.shutdown()
    assert bool(heard) == control, heard
