"""`moelab browse` answers only requests that are for this machine, with files of the folder."""

import http.client
import os
import socket
import threading

import pytest

from moelab.report.site.sanitize import OF_FILES
from moelab.report.site.server import FRAMING, ResultsServer, _Handler


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("served")
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "index.html").write_text("results")
    (folder / "empty").mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "up").symlink_to(tmp_path)
    (folder / "loop").symlink_to(folder / "loop")
    os.mkfifo(folder / "fifo.html")
    for page in ("page/index.html", "old/index.htm"):
        (folder / page).parent.mkdir()
        (folder / page).symlink_to(tmp_path / "secret.txt")
    (folder / "figure.svg").write_text("<svg/>")
    (folder / "inside.html").symlink_to(folder / "index.html")
    with ResultsServer(folder, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server, path, host=None, method="GET"):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.putrequest(method, path, skip_host=True)
    if host is not False:
        connection.putheader("Host", host or f"127.0.0.1:{server.server_port}")
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.headers["Cache-Control"] == "no-cache", "a page of before a build is not shown after it"
    return answer.status, answer.read().decode(), answer.headers["Content-Security-Policy"]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_this_machine_is_answered_and_another_host_refused(server, method):
    port = server.server_port
    for name in ("127.0.0.1", "localhost", "LOCALHOST", "[::1]"):
        assert ask(server, "/", f"{name}:{port}", method) == (200, "results" if method == "GET" else "", FRAMING)
    for host in (f"evil.example:{port}", "127.0.0.1", "127.0.0.1:1", f"127.0.0.1.evil.example:{port}", False):
        status, text, _ = ask(server, "/", host, method)
        assert status == 403 and "results" not in text, host


def test_nothing_outside_the_folder_is_served_and_no_folder_is_listed(server):
    outside = ("/link.txt", "/up/secret.txt", "/up/", "/../secret.txt", "/%2e%2e/secret.txt", "/page/", "/old/")
    for path in (*outside, "/empty/"):
        status, text, _ = ask(server, path)
        assert status == 404 and "secret" not in text, path
    assert ask(server, "/inside.html")[:2] == (200, "results"), "a link that stays inside is followed"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_what_cannot_be_read_is_not_found_and_answered_at_once(server, method, capfd):
    for path in ("/%00", "/a%00.html", "/loop", "/loop/x", "/fifo.html", "/" + "x" * 5000, "/empty"):
        assert ask(server, path, method=method)[0] == 404, path
    assert ask(server, "/")[0] == 200 and "Traceback" not in capfd.readouterr().err


def test_pages_run_their_own_scripts_and_other_files_nothing(server):
    found = [ask(server, path)[2] for path in ("/", "/index.html?a=1", "/figure.svg")]
    assert found == [FRAMING, FRAMING, OF_FILES] and "sandbox" in OF_FILES and "script-src" not in OF_FILES


def test_a_silent_client_does_not_hold_a_thread(server, monkeypatch):
    assert 0 < _Handler.timeout <= 60
    monkeypatch.setattr(_Handler, "timeout", 0.1)
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as silent:
        silent.sendall(b"GET / HTTP/1.1\r\n")
        assert silent.recv(1) == b"", "the server closes it"


def test_a_port_in_use_is_one_line(server):
    with pytest.raises(ValueError, match=rf"port {server.server_port}: .*choose another with --port"):
        ResultsServer(server.folder, server.server_port)
