"""Notebooks as people run them: in a real JupyterLab in a browser, top to bottom."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.notebook]

TOKEN = "only-for-this-test"
# Nothing is written back into the notebooks, and nobody is asked for news.
SETTINGS = {
    "@jupyterlab/docmanager-extension/plugin": {"autosave": False},
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}

OPENED = "async path => { await jupyterapp.commands.execute('docmanager:open', {path}); await jupyterapp.shell.currentWidget.context.ready; await jupyterapp.shell.currentWidget.sessionContext.ready; }"
# The person's edit of the parameters cell.
PARAMETERS = """([from, to]) => {
    const cells = [...jupyterapp.shell.currentWidget.content.model.cells];
    const cell = cells.find(c => (c.getMetadata('tags') || []).includes('parameters'));
    const source = cell.sharedModel.getSource();
    cell.sharedModel.setSource(source.replace(from, to));
    return source.includes(from);
}"""
RUN = "() => jupyterapp.commands.execute('notebook:run-all-cells')"
CELLS = """() => [...jupyterapp.shell.currentWidget.content.model.cells].filter(c => c.type === 'code')
    .map(c => ({count: c.executionCount, outputs: c.outputs.toJSON()}))"""

SEEN = """figures => [...document.querySelectorAll('.jp-OutputArea-output img')]
    .filter(i => i.offsetParent && i.naturalWidth > 300).length >= figures"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def lab(chromium, tmp_path_factory):
    """The address of a JupyterLab started by `moelab lab`, with a workshop of its own."""
    root = tmp_path_factory.mktemp("lab")
    for plugin, values in SETTINGS.items():
        file = root / "settings" / f"{plugin}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    folders = {
        "MOELAB_HOME": "home",
        "MOELAB_RESULTS": "results",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTER_DATA_DIR": "data",
        "IPYTHONDIR": "ipython",
    }
    env = os.environ | {name: str(root / folder) for name, folder in folders.items()} | {"OMP_NUM_THREADS": "1"}
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    options = [f"--port={port}", f"--IdentityProvider.token={TOKEN}", "--no-browser", "--allow-root"]
    command = [sys.executable, "-m", "moelab.cli", "lab", *options, "--expose-app-in-browser"]
    with open(root / "log.txt", "w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"{address}/api/status?token={TOKEN}", timeout=60).close()
                break
            except (urllib.error.URLError, TimeoutError):
                assert process.poll() is None and time.monotonic() < until, (root / "log.txt").read_text()
                time.sleep(0.3)
        yield address
    finally:
        process.terminate()
        process.wait(300)


def test_the_first_notebook_runs_top_to_bottom_and_its_controls_work(lab, visit):
    """At smoke scale; what the other notebooks compute: tests/notebook."""
    page = visit(f"{lab}/lab?token={TOKEN}&reset")
    page.set_default_timeout(600_000)
    page.wait_for_function("() => window.jupyterapp !== undefined")
    page.evaluate("() => jupyterapp.restored.then(() => null)")
    page.evaluate(OPENED, "00_start.ipynb")
    assert page.evaluate(PARAMETERS, ['scale: str = "cpu"', 'scale: str = "smoke"'])
    page.evaluate(RUN)
    cells = page.evaluate(CELLS)
    errors = [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]
    assert errors == [] and all(cell["count"] for cell in cells)
    kinds = [kind for cell in cells for output in cell["outputs"] for kind in (output.get("data") or {})]
    assert kinds.count("image/png") == 4 and "application/vnd.jupyter.widget-view+json" in kinds
    page.set_viewport_size({"width": 1400, "height": 9000})  # as high as the notebook
    page.evaluate("() => jupyterapp.shell.collapseLeft()")
    page.evaluate("() => { jupyterapp.shell.currentWidget.content.activeCellIndex = 0; }")
    page.evaluate("() => document.querySelectorAll('.jp-WindowedPanel-outer').forEach(e => e.scrollTo(0, 0))")
    page.wait_for_function(SEEN, arg=4)
    widget = page.locator(".jupyter-widgets.widget-output").first
    widget.scroll_into_view_if_needed()
    before = widget.locator("img").get_attribute("src")
    page.get_by_role("button", name="before training").click()
    page.wait_for_function("b => document.querySelector('.widget-output img')?.src !== b", arg=before)
