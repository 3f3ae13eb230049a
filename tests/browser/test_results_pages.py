"""The results pages as people meet them: in a browser, on a phone, in the dark, with a screen reader's eyes."""

import re
import threading
from pathlib import Path

import pytest

from moelab.report import site
from moelab.report.site.server import ResultsServer

pytestmark = pytest.mark.slow
PUBLISHED = Path(__file__).parents[2] / "results"  # what a visitor meets: the pages in the repository
NEWEST, GPU, CURVES = "pr-moe/cpu/20260102-000000", "pr-moe/gpu/20260101-000000", "scaling/cpu/20260101-000000"
PAGES = (
    *("index.html", "overview.html", "claims.html", "figures.html", "about.html", "runs.html", "compare.html"),
    *(f"{NEWEST}/index.html", f"{NEWEST}/notebook.html", f"{CURVES}/index.html", f"compare.html?a={NEWEST}&b={GPU}"),
)
VIEWS = [(1400, "light"), (820, "light"), (390, "dark")]
# Promises, where `wait_for_function` would do: it compiles its condition again at each look, which the pages do not allow.
REDRAWN = """before => new Promise(resolve => {
  const look = () => document.querySelector(".chart canvas").toDataURL() !== before ? resolve() : requestAnimationFrame(look);
  look();
})"""


@pytest.fixture(scope="module")
def results(publish, tmp_path_factory):
    root = tmp_path_factory.mktemp("pages") / "results"
    base = {"moe128-350m-beats-own-base": (-0.30, -0.31, -0.305)}
    publish(root, "scaling", "cpu", claims=base, curves=curve_rows())
    publish(root, "pr-moe", "cpu", "20260101-000000", claims={"pr-moe-matches-moe128": (0.5, 0.5, 0.5)}, gain=0.3, finished="2026-01-01T00:00:00Z", losses=(2.0, 2.5))  # fmt: skip
    publish(root, "pr-moe", "cpu", "20260102-000000", claims={"pr-moe-matches-moe128": (0.01, 0.03, 0.2)}, gain=0.3, finished="2026-01-02T00:00:00Z", parameters={"tokens": 7})  # fmt: skip
    held = {"moe128-beats-moe32": (-0.1, -0.101, -0.102), "pr-moe-matches-moe128": (0.3, 0.3, 0.3)}
    publish(root, "pr-moe", "gpu", claims=held, gain=0.3)
    publish(root, "mine", "smoke")
    site.build(root)
    return root


def curve_rows(arms=("350M", "350M+MoE-128"), seeds=3, steps=20):
    """Made-up curves: the second arm is below the first by 0.1 nats per token at the end."""
    return [
        {"arm": arm, "seed": seed, "tokens": 1000 * step, "loss": 5 - 0.05 * step - 0.005 * step * i + 0.01 * seed}
        for i, arm in enumerate(arms)
        for seed in range(seeds)
        for step in range(steps + 1)
    ]


def shown(page, selector: str) -> list[str]:
    return [node.inner_text() for node in page.locator(selector).all() if node.is_visible()]


@pytest.mark.parametrize("address", [*PAGES, "published index.html", "published explorer.html"])
@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_a_page_is_whole_and_accessible(results, visit, address, scheme, width):
    from axe_playwright_python.sync_playwright import Axe

    root = PUBLISHED if address.startswith("published") else results
    page = visit(f"{root.as_uri()}/{address.removeprefix('published ')}", width=width, scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    page.evaluate("document.querySelectorAll('img').forEach(i => i.loading = 'eager')")
    page.evaluate("Promise.all([...document.images].map(i => i.decode().catch(() => {})))")
    visible = "[...document.images].filter(i => i.offsetParent)"
    assert page.evaluate(f"{visible}.every(i => i.naturalWidth > 0)")
    pictures = address.endswith(("/index.html", "/notebook.html", "figures.html"))  # compare.html has them in frames
    assert page.evaluate(f"{visible}.length") >= pictures
    if address.startswith(CURVES):
        page.get_by_role("button", name="Read, zoom, switch arms").click()
        assert page.locator(".chart canvas").bounding_box()["width"] <= width
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(wide) <= 0, "the page does not scroll sideways"
    # Without preload: axe would ask for the style sheet again, which a page from a file may not; nor may it ask frames.
    checked = Axe().run(page, options={"preload": False, "iframes": False}).response
    assert len(checked["passes"]) > 15
    assert [f"{v['id']}: {n['html'][:200]}" for v in checked["violations"] for n in v["nodes"]] == []


def test_before_the_fold_of_the_start_page_stand_its_figure_and_at_most_120_words(visit):
    page = visit(f"{PUBLISHED.as_uri()}/index.html", width=1400)
    seen = page.evaluate("""() => {
      const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
      for (let node; (node = walk.nextNode()); ) {
        const range = document.createRange();
        range.selectNodeContents(node);
        const box = range.getBoundingClientRect(), parent = node.parentElement;
        const folded = parent.closest("details:not([open])") && !parent.closest("summary");
        const seen = box.right > 0 && box.top < innerHeight && parent.checkVisibility() && !parent.closest(".hidden");
        if (seen && !folded) found.push(node.data);
      }
      return found.join(" ");
    }""")
    words = [word for word in seen.split() if re.search(r"\w", word)]
    assert 60 < len(words) <= 120, seen
    assert re.search(r"[\d.]+ nats per token .* \(paper: [\d.]+\)", seen), "a value beside the paper's"
    box = page.locator("#hero img").bounding_box()
    assert box["width"] > 400 and box["y"] + box["height"] < 900


def test_the_explorer_shows_what_is_chosen_and_keeps_it_in_the_address(visit):
    page = visit(f"{PUBLISHED.as_uri()}/index.html")
    page.get_by_role("link", name="explorer").click()
    before = page.locator("#grid tbody").inner_text()
    page.get_by_label("Cluster").select_option("h100")
    page.get_by_label("Best by").select_option("cost")
    after = page.locator("#grid tbody").inner_text()
    assert after != before and "h100, best by cost" in page.locator("caption").inner_text()
    page.goto(page.url)
    assert "cluster=h100" in page.url and page.locator("#grid tbody").inner_text() == after
    page.get_by_label("Model").select_option("24B+MoE-128")
    page.get_by_label("GPUs at most").select_option("1")
    assert "it does not fit" in page.locator("caption").inner_text()


def test_search_and_filters(results, visit):
    page = visit(f"{results.as_uri()}/claims.html")
    rows = "#tested tr[data-item]"
    search = page.locator("#filter").get_by_label("Search")
    assert len(shown(page, rows)) == 3
    search.fill("moe-128's validation loss")
    (row,) = shown(page, rows)
    assert "ends within about 0.01" in row and "1 claim" in page.locator("#count").inner_text()
    search.fill("latency")
    assert len(shown(page, "#untested tbody tr")) > 5, "claims that nothing has tested unfold when they are looked for"
    search.fill("")
    page.locator("select[name=experiment]").select_option("pr-moe")
    assert len(shown(page, rows)) == 2
    page.locator("select[name=experiment]").select_option("")
    page.locator("select[name=verdict]").select_option("trained: does not hold")
    (row,) = shown(page, rows)
    assert row.startswith("✗")
    page.goto(page.url)
    assert "verdict=trained" in page.url and len(shown(page, rows)) == 1, "it stands in the address"
    search.fill("nothing has these words")
    page.get_by_role("button", name="Clear them").click()
    assert len(shown(page, rows)) == 3 and "?" not in page.url
    page.evaluate("document.getElementById('untested').open = true; scrollTo(0, 3000)")
    assert page.evaluate("scrollY") > 1000
    assert page.locator("#filter").bounding_box()["y"] < 100, "the filters stay in sight"
    for width in (1000, 820):
        page.set_viewport_size({"width": width, "height": 700})
        head, filters = (page.locator(part).bounding_box() for part in (".top", "#filter"))
        assert head["y"] + head["height"] <= filters["y"] + 1, "and the head does not cover them"


def test_the_search_in_the_head_and_a_count_lead_to_the_claims(results, visit):
    page = visit(f"{results.as_uri()}/{NEWEST}/index.html")
    for _ in range(3):  # the link to the content, the start page, the search
        page.keyboard.press("Tab")
    page.keyboard.type("latency")
    page.keyboard.press("Enter")
    page.wait_for_url("**/claims.html?q=latency")
    assert len(shown(page, "#untested tbody tr")) > 5
    page.goto(f"{results.as_uri()}/overview.html")
    page.get_by_role("link", name="does not hold").click()
    page.wait_for_url("**/claims.html?*")  # with its scripts
    assert [row[0] for row in shown(page, "#tested tr[data-item]")] == ["✗"]


def test_scale_switch(results, visit):
    page = visit(f"{results.as_uri()}/figures.html")
    chapters, entries = "section[data-chapter]", "table.all tbody tr"
    chapter = "section[data-experiment='pr-moe'] "
    (facts,) = shown(page, chapter + ".facts")
    assert facts.startswith("gpu"), "the most telling scale first"
    assert len(shown(page, entries)) == 5
    scale = page.locator("select[name=scale]")
    scale.select_option("cpu")
    (facts,) = shown(page, chapter + ".facts")
    assert facts.startswith("cpu") and len(shown(page, entries)) == 3
    scale.select_option("gpu")
    assert len(shown(page, chapters)) == 1, "no empty card"
    page.locator("#filter").get_by_label("Search").fill("scaling")
    assert not shown(page, chapters) and page.locator("#nothing").is_visible()


def test_colour_switch(results, visit):
    page = visit(f"{results.as_uri()}/{NEWEST}/index.html")
    ground = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(ground) == "rgb(255, 255, 255)"
    page.locator("#curves img").wait_for()
    button = page.get_by_role("button", name="Colours")
    button.click()
    button.click()
    assert page.evaluate(ground) == "rgb(20, 24, 29)"
    corner = page.locator("#curves img").screenshot()
    button.click()  # auto, on a light system
    assert page.locator("#curves img").screenshot() != corner, "the figure follows the page"
    button.click()
    button.click()
    page.goto(f"{results.as_uri()}/index.html")
    assert page.evaluate(ground) == "rgb(20, 24, 29)", "the choice is kept"


def test_two_results_side_by_side(results, visit):
    page = visit(f"{results.as_uri()}/figures.html")
    pick = page.locator("#pick")
    assert pick.get_by_role("button", name="Compare").is_disabled()
    pick.get_by_label("pr-moe, cpu, 2026-01-02").check()
    pick.get_by_label("pr-moe, cpu, 2026-01-01").check()
    pick.get_by_role("button", name="Compare").click()
    for side, about in (("a", "pr-moe"), ("b", "pr-moe")):
        frame = page.frame_locator(f"iframe[name={side}]")
        frame.get_by_role("heading", level=1).wait_for()
        assert about in frame.locator("main").inner_text()
    page.goto(f"{results.as_uri()}/compare.html?a={NEWEST}")
    assert page.locator("#compared iframe:visible").count() == 1, "the other is to be chosen"
    page.locator("select[name=b]").select_option(CURVES)
    page.frame_locator("iframe[name=b]").locator(".chart, img").first.wait_for()
    assert f"b={CURVES.replace('/', '%2F')}" in page.url


def test_without_a_script_everything_is_there(results, visit):
    page = visit(f"{results.as_uri()}/figures.html", script=False)
    assert len(shown(page, "table.all tbody tr")) == 5 and not shown(page, "#filter")
    assert len(shown(page, "section[data-experiment='pr-moe'] .facts")) == 2
    page.goto(f"{results.as_uri()}/{CURVES}/index.html")
    page.locator("#loss-curves img").wait_for()
    assert not page.locator(".chart").is_visible()


def test_served_pages_lead_from_a_claim_to_its_figure_and_notebook(results, visit):
    """With the headers of `moelab browse`, under which a page loads what it needs."""
    with ResultsServer(results, 0) as server:
        (thread := threading.Thread(target=server.serve_forever)).start()
        try:
            page = visit(f"{server.address}claims.html")
            page.locator("#tested tr[data-item] a").first.click()
            page.wait_for_url(f"**/{CURVES}/index.html#*", wait_until="networkidle")
            page.get_by_role("link", name="Executed notebook").click()
            page.get_by_role("heading", name="Notebook of scaling").wait_for()
            page.wait_for_load_state("networkidle")  # all of it is there before the server ends
        finally:
            server.shutdown()
            thread.join()


def test_curves_can_be_read_switched_and_subtracted(results, visit):
    page = visit(f"{results.as_uri()}/{CURVES}/index.html")
    chart = page.locator(".chart")
    assert not chart.is_visible() and page.locator("#loss-curves img").is_visible()
    page.get_by_role("button", name="Read, zoom, switch arms").click()
    assert page.locator(".chart canvas").bounding_box()["width"] > 500
    assert "Intervals are of each point by itself" in chart.inner_text(), "not of the looks at the seeds"
    values = chart.locator(".value")
    assert values.all_inner_texts() == ["4.010 ±0.025", "3.910 ±0.025"], "the last values, with their intervals"
    chart.get_by_label("Show").select_option("350M")
    assert values.all_inner_texts() == ["(subtracted)", "−0.100 ±0.000"], "paired by seed"
    chart.get_by_label("Over").select_option("share")
    assert "of the paper’s training" in chart.locator(".at").inner_text()
    chart.locator(".area").focus()
    page.keyboard.press("End")
    assert "◇ −0.3" in values.nth(1).inner_text(), "the paper's point at the end of its training"
    chart.get_by_role("button", name="Table").click()
    assert "350M+MoE-128, the paper’s" in chart.locator(".grid").inner_text()
    assert not chart.locator(".area").is_visible()
    assert page.evaluate("document.querySelector('.chart canvas').width") > 500, "no plot is drawn without a width"
    chart.get_by_role("button", name="Table").click()
    page.goto(page.url)
    assert chart.get_by_label("Show").input_value() == "350M" and chart.get_by_label("Over").input_value() == "share"
    drawn = page.evaluate("document.querySelector('.chart canvas').toDataURL()")
    page.get_by_role("button", name="Colours").dblclick()  # light, as it is, then dark
    page.evaluate(REDRAWN, drawn)
    chart.get_by_label("Over").select_option("tokens")
    chart.get_by_label("Show").select_option("")
    chart.get_by_label("Seeds").select_option("2")
    assert values.all_inner_texts() == ["4.020", "3.920"]
    chart.get_by_role("checkbox", name="350M+MoE-128").uncheck()
    assert values.all_inner_texts() == ["4.020", ""] and "off" in page.url
    chart.locator(".area").focus()
    page.keyboard.press("Home")
    assert chart.locator(".at").inner_text() == "at 1 k tokens" and values.first.inner_text() == "4.970"
    box = page.locator(".chart .u-over").bounding_box()
    page.mouse.move(box["x"] + 2, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 60)
    page.mouse.up()
    page.get_by_role("button", name="Close the chart").click()
    assert not chart.is_visible()


def test_a_table_is_sorted_by_its_heads(results, visit):
    page = visit(f"{results.as_uri()}/index.html")
    heads = page.locator("table.digest thead th")

    def names():
        return [row.split("\t")[0] for row in shown(page, "table.digest tbody tr")]

    before = sorted(names(), key=str.lower)
    heads.nth(0).get_by_role("button").click()
    assert names() == before and heads.nth(0).get_attribute("aria-sort") == "ascending"
    assert not heads.nth(2).get_by_role("button").count(), "effects have several units"
    heads.nth(0).get_by_role("button").click()
    assert names() == before[::-1]
