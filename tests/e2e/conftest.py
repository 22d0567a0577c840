"""One browser and one double of the server for each module that looks at the page."""

import shutil
from urllib.parse import urlsplit

import pytest

from page_double import Double, doubled

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LOOK_MS = 10_000


@pytest.fixture(scope="module")
def tab():
    if CHROMIUM is None:
        pytest.skip("needs a Chromium on the path (Debian's package `chromium`)")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the package `playwright`")
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        tab = browser.new_page(reduced_motion="reduce")
        tab.set_default_timeout(LOOK_MS)
        yield tab
        browser.close()


@pytest.fixture(scope="module")
def page_server():
    double = Double()
    with doubled(double) as (url, _stop):
        yield url, double


@pytest.fixture
def double(page_server):
    # As new for each test, though the server has it since the first test.
    page_server[1].__init__()
    return page_server[1]


@pytest.fixture
def opened(tab, page_server):
    """Opens the page as a new visitor; nothing may be asked of other servers, blocked by the policy, or thrown."""
    wrong = []
    home = page_server[0]

    def requested(request):
        asked = urlsplit(request.url)
        if asked.scheme not in ("data", "about") and asked.netloc != urlsplit(home).netloc:
            wrong.append(request.url)

    def logged(message):
        if "Content Security Policy" in message.text:
            wrong.append(message.text)

    def visit(path="", url=home, size=(1100, 900), scheme="light"):
        nonlocal home
        home = url
        tab.set_viewport_size({"width": size[0], "height": size[1]})
        tab.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        tab.goto(url + path)
        return tab

    listeners = {"request": requested, "console": logged, "pageerror": lambda error: wrong.append(str(error))}
    for event, listener in listeners.items():
        tab.on(event, listener)
    yield visit
    tab.evaluate("localStorage.clear(); sessionStorage.clear()")
    tab.goto("about:blank")
    for event, listener in listeners.items():
        tab.remove_listener(event, listener)
    assert wrong == []
