"""Serve the pages on this machine."""

from __future__ import annotations

import functools
import http.server
from http import HTTPStatus
from pathlib import Path
from typing import Any

from moelab.report.site.sanitize import OF_FILES, POLICY

FRAMING = f"{POLICY}; frame-src 'self'"
"""What a page may do as served; of the pages only compare.html allows itself to show others in frames."""
HOSTS = ("127.0.0.1", "localhost", "[::1]")
"""Names of this machine that a request may give in its Host header.

A page of another site can make a browser ask 127.0.0.1 under that site's own name (DNS rebinding) and read the answer.
Requests under other names are therefore refused.
"""


class ResultsServer(http.server.ThreadingHTTPServer):
    """Serves the files of a folder on 127.0.0.1.

    Args:
        port: 0 takes a free one; `server_port` says which.

    Raises:
        ValueError: one line: the port is in use or not allowed.
    """

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder.resolve()
        try:
            super().__init__(("127.0.0.1", port), functools.partial(_Handler, directory=str(self.folder)))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"port {port}: {reason}; choose another with --port") from None
        self.hosts = {f"{host}:{self.server_port}" for host in HOSTS}
        if self.server_port == 80:
            self.hosts |= set(HOSTS)  # browsers leave the default port out

    @property
    def address(self) -> str:
        """The address of the start page."""
        return f"http://127.0.0.1:{self.server_port}/"


class _Handler(http.server.SimpleHTTPRequestHandler):
    server: ResultsServer
    timeout = 20.0  # seconds for a request, after which a client that is silent no longer holds a thread

    def send_head(self) -> Any:
        """Refuse what is asked of another host, and files outside the folder, where a symbolic link may lead."""
        if self.headers.get("Host", "").lower() not in self.server.hosts:
            self.send_error(HTTPStatus.FORBIDDEN, "Host must be this machine")
            return None
        if not self._is_served():
            self.send_error(HTTPStatus.NOT_FOUND, "File not found")
            return None
        return super().send_head()

    def _is_served(self) -> bool:
        """Return whether the path names a file in the folder, or a folder in it whose page is one."""
        try:
            path = Path(self.translate_path(self.path))
            path = (path / "index.html" if path.is_dir() else path).resolve()
            return path.is_relative_to(self.server.folder) and path.is_file()
        except (ValueError, RuntimeError, OSError):  # a zero byte, a loop of links
            return False

    def end_headers(self) -> None:
        """Say what a page may do, and that no other file does anything."""
        page = getattr(self, "path", "").partition("?")[0].endswith((".html", "/"))
        self.send_header("Content-Security-Policy", FRAMING if page else OF_FILES)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-cache")  # ask whether a page has changed
        super().end_headers()
