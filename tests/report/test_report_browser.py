"""The page of a run in headless Chromium: no error, no request; hover, zoom, keyboard, thumbnails, widths, themes."""

import json
import os
import shutil

import numpy as np
import pytest
from conftest import TINY
from PIL import Image
from report_runs import until, write_long_run

from mocov3.config.command_lines import parse_pretrain

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium here (Debian: apt-get install chromium)")
WIDTHS = {"phone": (390, 844), "laptop": (1280, 800), "wide": (2200, 1200)}
MARKUP = "<img src=x onerror=document.title='broken'>"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        found = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The page of a short run of a ViT on 120 labelled images, one class named as markup."""
    from mocov3.pretraining.task import main
    from mocov3.report.command import write_page
    from mocov3.report.runs import read_run

    root = tmp_path_factory.mktemp("browser")
    rng = np.random.Generator(np.random.PCG64(0))
    for split, count in (("train", 16), ("val", 60)):
        for label, name in enumerate((MARKUP, "stripes")):
            folder = root / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8) // 2
                pixels[:, :: 2 + label * 3] = 250
                Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    flags = ["-a", "timm/test_vit", "--knn-every", "1", "--epochs", "3", "--output-dir", str(root / "run"), "--quiet"]
    config = parse_pretrain([str(root / "data"), *TINY, *flags], prog="test")
    assert main(config, script_door=False) == 0
    write_page([read_run(root / "run")], root / "run" / "report.html", device="cpu")
    return root / "run"


@pytest.fixture
def opened(browser, run):
    """Open the page of ``run`` or another: (size, theme, file) → page; what it said and asked for in ``page.said``."""
    contexts = []

    def open_page(size="laptop", theme="light", file=None):
        width, height = WIDTHS[size]
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=theme, has_touch=size == "phone"
        )
        contexts.append(context)
        page = context.new_page()
        said = []
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message) or dialog.dismiss())
        page.on("request", lambda request: None if request.url.startswith("data:") else said.append(request.url))
        file = file or run / "report.html"
        page.goto(f"file://{file}")
        until(page, "document.documentElement.dataset.ready")
        assert said == [f"file://{file}"]  # the page itself, and nothing else
        said.clear()
        page.said = said
        return page

    yield open_page
    for context in contexts:
        context.close()


def near(page, id):
    """Bring a chart into sight and wait until it is drawn."""
    page.evaluate("id => document.getElementById(id).scrollIntoView({block: 'center', behavior: 'instant'})", id)
    page.wait_for_selector(f"#{id}[data-drawn]", timeout=30_000)
    page.wait_for_timeout(100)
    return page.locator(f"#{id}")


def test_charts_in_the_browser_hold_the_metrics(opened, run):
    page = opened()
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["knn"] is None]
    for id, name in (("loss", "loss"), ("rank", "effective_rank"), ("speed", "images_per_second")):
        near(page, id)
        x, y = page.evaluate("id => [0, 1].map(i => document.getElementById(id).data[0]['xy'[i]])", id)
        assert x == [line["step"] for line in lines]
        assert y == pytest.approx([line[name] for line in lines], rel=1e-4)
    assert page.said == []


def test_hover_and_linked_zoom(opened):
    page = opened()
    loss = near(page, "loss")
    box = loss.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector("#loss .hoverlayer .hovertext", timeout=10_000)
    buttons = page.evaluate("[...document.querySelectorAll('#loss .modebar-btn')].map(b => b.dataset.title)")
    assert not [b for b in buttons if "loud" in b or "Share" in b or "Edit" in b]  # nothing sends a chart away
    label = page.locator("#loss .hoverlayer").text_content()
    assert "epoch" in label
    assert "step" in label
    before = page.evaluate("document.getElementById('loss')._fullLayout.xaxis.range")
    page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + box["height"] * 0.4)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + box["height"] * 0.45, steps=6)
    page.mouse.up()
    until(page, "r => document.getElementById('loss')._fullLayout.xaxis.range[0] > r[0]", before)
    zoomed = page.evaluate("document.getElementById('loss')._fullLayout.xaxis.range")
    assert before[0] < zoomed[0] < zoomed[1] < before[1]
    near(page, "gradients")  # drawn now, at the same steps
    until(page, "r => Math.abs(document.getElementById('gradients')._fullLayout.xaxis.range[0] - r) < 1e-6", zoomed[0])
    near(page, "loss").dblclick(position={"x": box["width"] / 2, "y": box["height"] / 2})
    until(page, "r => document.getElementById('gradients')._fullLayout.xaxis.range[0] < r", zoomed[0])
    assert page.said == []


def test_keyboard(opened):
    page = opened()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    seen = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        if page.evaluate("document.activeElement.id") == "loss":
            break
    assert {"theme", "SUMMARY", "loss"} <= seen
    range_of = "document.getElementById('loss')._fullLayout.xaxis.range"
    low = page.evaluate(range_of)[0]
    page.keyboard.press("+")
    until(page, f"low => {range_of}[0] > low", low)
    a, b = page.evaluate(range_of)
    page.keyboard.press("ArrowRight")
    until(page, f"a => {range_of}[0] > a", a)
    assert np.diff(page.evaluate(range_of)) == pytest.approx(b - a)
    page.keyboard.press("0")
    until(page, f"low => Math.abs({range_of}[0] - low) < 1e-9", low)
    page.evaluate("document.getElementById('theme').focus()")
    theme = page.evaluate("document.documentElement.dataset.theme")
    page.keyboard.press("Enter")
    assert page.evaluate("document.documentElement.dataset.theme") != theme
    page.wait_for_timeout(300)
    assert page.said == []


def test_map_shows_thumbnails_on_hover_and_zoom(opened):
    page = opened()
    id = "map-r0-1"
    near(page, id)
    place = page.evaluate(
        """id => {
        const plot = document.getElementById(id), l = plot._fullLayout, box = plot.getBoundingClientRect();
        const t = plot.data[0];
        return [box.x + l._size.l + l.xaxis.l2p(t.x[3]), box.y + l._size.t + l.yaxis.l2p(t.y[3]), t.customdata[3]];
    }""",
        id,
    )
    page.mouse.move(place[0] - 3, place[1])
    page.mouse.move(place[0], place[1], steps=4)
    page.wait_for_selector("#tip:not([hidden])", timeout=10_000)
    tip = page.locator("#tip")
    assert tip.inner_text().startswith(("<img src=x", "stripes")) or ".png" in tip.inner_text()
    assert tip.locator(".thumb").count() == 1
    assert page.evaluate("id => (document.getElementById(id).layout.images || []).length", id) == 0
    page.mouse.move(place[0] - 12, place[1] - 12)
    page.mouse.down()
    page.mouse.move(place[0] + 12, place[1] + 12, steps=5)
    page.mouse.up()
    until(page, "id => document.getElementById(id).dataset.images > 0", id)
    shown = page.evaluate("id => document.getElementById(id).layout.images.map(i => i.source.slice(0, 22))", id)
    assert 0 < len(shown) <= 80
    assert set(shown) == {"data:image/jpeg;base64"}
    assert page.said == []


def test_names_with_markup_are_text_in_the_browser(opened):
    page = opened()
    bars = near(page, "classes-r0")
    assert MARKUP in bars.inner_text().replace("\n", "")
    assert MARKUP in near(page, "map-r0-1").locator(".legend").text_content()
    assert page.evaluate("document.querySelectorAll('img[src=x]').length") == 0
    assert page.title() == "Run run"
    assert page.said == []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", WIDTHS)
def test_widths_and_themes(opened, size, theme, tmp_path):
    page = opened(size, theme)
    assert page.evaluate("document.documentElement.dataset.theme") == theme
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing sticks out
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (theme == "light")
    near(page, "loss")
    text = page.evaluate("getComputedStyle(document.querySelector('#loss .xtick text')).fill")
    assert contrast(text, ground) > 4.5
    for muted in (".about", ".lead", ".word", "nav a", ".tiles small"):
        if page.locator(muted).count():
            colour = page.evaluate("s => getComputedStyle(document.querySelector(s)).color", muted)
            assert contrast(colour, ground) > 4.5, muted
    box = page.locator("#loss .main-svg").first.bounding_box()
    assert box["width"] <= page.locator("#loss").bounding_box()["width"] + 1
    page.screenshot(path=tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50
    assert page.said == []


def contrast(one, other):
    """WCAG's ratio of two rgb(…) colours."""

    def luminance(colour):
        values = np.array([float(v) for v in colour[4:-1].split(",")]) / 255
        linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_a_long_run_in_the_browser(opened, tmp_path):
    from mocov3.report.command import write_page
    from mocov3.report.runs import read_run

    write_long_run(tmp_path)
    write_page([read_run(tmp_path)], tmp_path / "report.html", images=0)
    page = opened(file=tmp_path / "report.html")
    near(page, "gradients")
    assert page.evaluate("document.getElementById('gradients').data[0].x.length") > 1500
    assert page.said == []
