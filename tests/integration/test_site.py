"""The files behind the page and the API's description, without a browser."""

import re
from importlib import resources

import pytest
from starlette.testclient import TestClient

from page_double import Double, double_app
from telerag_cli.server import site


@pytest.fixture(scope="module")
def client():
    with TestClient(double_app(Double())) as client:
        yield client


def test_files_carry_a_policy_and_are_sent_once(client):
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["content-security-policy"] == site.STRICT
    assert page.headers["cache-control"] == "no-cache"
    again = client.get("/", headers={"if-none-match": f'"other", W/{page.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == page.headers["etag"]
    assert client.get("/", headers={"if-none-match": '"other"'}).status_code == 200
    assert client.get("/page/main.js").headers["content-type"] == "text/javascript; charset=utf-8"
    assert client.get("/page/icon.svg").headers["content-type"] == "image/svg+xml"
    assert client.get("/page/swagger-ui.css").status_code == 200
    assert "'unsafe-inline'" not in site.STRICT
    assert client.head("/").status_code == 200


@pytest.mark.parametrize("name", ["index.html", "docs.html", "../site.py", "%2e%2e%2fsite.py", "main.jsx", ""])
def test_only_the_fixed_files_are_served(client, name):
    assert client.get(f"/page/{name}").status_code == 404


def test_every_file_is_served_and_names_no_address(client):
    folder = resources.files("telerag_cli.server") / "page"
    files = {entry.name: entry.read_text(encoding="utf-8") for entry in folder.iterdir()}
    for name, text in files.items():
        assert client.get(f"/page/{name}").status_code == (404 if name.endswith(".html") else 200)
        addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"'`]*", text))
        assert addresses <= {"http://www.w3.org/2000/svg"}, name
        writes = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function"
        assert not re.search(writes, text), name
        assert set(re.findall(r'from "\./([\w.]+)"', text)) <= set(files)
    for name in ("index.html", "docs.html"):
        assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", files[name])


def test_nothing_of_it_is_in_the_description_of_the_api(client):
    paths = client.get("/openapi.json").json()["paths"]
    assert set(paths) == {"/v1/models", "/telerag/state", "/v1/chat/completions"}
