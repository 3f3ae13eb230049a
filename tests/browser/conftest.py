"""A headless Chromium, and pages that note what goes wrong in them.

Without one the tests are skipped, or fail where `MOELAB_BROWSER=require` says that there must be one (continuous integration).
"""

from __future__ import annotations

import os
import shutil

import pytest

# No sandbox: tests run as root in containers. The others keep Chromium from calling home.
_FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)


def _missing(reason: str) -> None:
    if os.environ.get("MOELAB_BROWSER") == "require":
        pytest.fail(f"MOELAB_BROWSER=require, but {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="module")
def chromium():
    """The browser; its own download of one is not needed.

    Its event loop counts as running in this thread until it is closed. A notebook executed by the same process would
    run in another thread meanwhile, where no interrupt ends it.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _missing("playwright is not installed (extra browser-tests)")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        _missing("no chromium on the path (Debian: apt install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=list(_FLAGS))
        yield browser
        browser.close()


BUSY = ("to activate", "did not appear within")  # what JupyterLab says on a busy machine


@pytest.fixture
def visit(chromium):
    """Opens pages: `visit(address, width=…, scheme=…, script=…)`; at the end none must have done anything wrong.

    Wrong are errors and warnings on a console, and requests that fail or leave the folder or the host.
    """
    contexts, wrong = [], []

    def visit(address: str, *, width: int = 1280, scheme: str = "light", script: bool = True):
        context = chromium.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=script
        )
        context.set_default_timeout(180_000)
        contexts.append(context)
        page = context.new_page()
        home = ("file:", "data:", "/".join(address.split("/", 3)[:3]))

        def said(message) -> None:
            if message.type in ("error", "warning") and not any(words in message.text for words in BUSY):
                wrong.append(message.text)

        def failed(request) -> None:
            if request.failure != "net::ERR_ABORTED":  # it ends because the test leaves the page
                wrong.append(f"failed: {request.url}")

        page.on("console", said)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("requestfailed", failed)
        page.on("request", lambda r: None if r.url.startswith(home) else wrong.append(f"outside: {r.url}"))
        page.goto(address)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert wrong == []
