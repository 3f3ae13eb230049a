"""`moelab browse` answers only requests that are for this machine, with files of the folder."""

import http.client
import os
import threading

import pytest

from moelab.report.site.sanitize import OF_FILES, POLICY
from moelab.report.site.server import ResultsServer


@pytest.fixture
def server(tmp_path):
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
    answer = answered(server, path, host, method)
    return answer.status, answer.read().decode()


def answered(server, path, host=None, method="GET"):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.putrequest(method, path, skip_host=True)
    if host is not False:
        connection.putheader("Host", host or f"127.0.0.1:{server.server_port}")
    connection.endheaders()
    return connection.getresponse()


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "LOCALHOST", "[::1]"])
def test_this_machine_is_answered(server, name):
    assert ask(server, "/", f"{name}:{server.server_port}") == (200, "results")


@pytest.mark.parametrize(
    "host", ["evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "127.0.0.1.evil.example:{port}", False]
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_another_host_is_refused(server, host, method):
    status, text = ask(server, "/", host and host.format(port=server.server_port), method)
    assert status == 403 and "results" not in text


@pytest.mark.parametrize(
    "path",
    ["/link.txt", "/up/secret.txt", "/up/", "/../secret.txt", "/%2e%2e/secret.txt", "/empty/", "/page/", "/old/"],
)
def test_nothing_outside_the_folder_is_served_and_no_folder_is_listed(server, path):
    status, text = ask(server, path)
    assert status == 404 and "secret" not in text
    assert ask(server, "/inside.html") == (200, "results"), "a link that stays inside is followed"


@pytest.mark.parametrize("path", ["/%00", "/a%00.html", "/loop", "/loop/x", "/fifo.html", "/" + "x" * 5000, "/empty"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_what_cannot_be_read_is_not_found_and_answered_at_once(server, path, method, capfd):
    assert ask(server, path, method=method)[0] == 404
    assert ask(server, "/") == (200, "results") and "Traceback" not in capfd.readouterr().err


def test_pages_run_their_own_scripts_and_other_files_nothing(server):
    pages = ("/", "/index.html?a=1", "/figure.svg")
    found = [answered(server, path).headers["Content-Security-Policy"] for path in pages]
    assert found == [POLICY, POLICY, OF_FILES] and "sandbox" in OF_FILES and "script-src" not in OF_FILES


def test_a_port_in_use_is_one_line(server):
    with pytest.raises(ValueError, match=rf"port {server.server_port}: .*choose another with --port"):
        ResultsServer(server.folder, server.server_port)
