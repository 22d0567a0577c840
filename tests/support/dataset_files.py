"""Datasets in the forms of the public ones, with invented content, and a server that fails as real ones do."""

import contextlib
import gzip
import hashlib
import io
import json
import tarfile
import threading
import zipfile
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from telerag_cli.datasets.cache import Cached, Fetched
from telerag_cli.datasets.catalogue import describe

NQ = (
    '{"question": "who keeps the lighthouse", "answer": ["Ada Pell", "Mrs Pell"]}\n'
    '{"question": "where do the boats sleep", "answer": ["in the shed"]}\n'
)
HOTPOT = [
    {
        "_id": "h1",
        "question": "Which hill is taller, Low or Mole?",
        "answer": "Mole",
        "type": "comparison",
        "supporting_facts": [["Low", 0], ["Mole", 1]],
        "context": [["Low", ["It is 10 m."]], ["Mole", ["A hill.", "12 m, é."]]],
    },
    {
        "_id": "h2",
        "question": "Is the mill older than the inn?",
        "answer": "yes",
        "supporting_facts": [],
        "context": [],
    },
]
TRIVIA = {
    "Data": [
        {
            "Question": "What do bees make?",
            "QuestionId": "tc_1",
            "SearchResults": [],
            "Answer": {"Value": "Honey", "Aliases": ["Honey", "Bee honey"], "NormalizedAliases": ["honey"]},
        },
        {"Question": "What floats?", "QuestionId": "tc_2", "Answer": {"Value": "Cork", "Aliases": []}},
    ],
    "Domain": "unfiltered-web",
    "VerifiedEval": False,
}
FLASHRAG = (
    '{"id": "test_0", "question": "Who baked it?", "golden_answers": ["Ben", "Benjamin"], "metadata": {"n": 1}}\n'
    '{"id": "test_1", "question": "When was it baked?", "golden_answers": ["at noon"]}\n'
)
WIKIPEDIA = (
    'id\ttext\ttitle\n1\t"Oats (""Avena"") grow"\tOat\n2\tRye is sown in autumn\tRye\n3\tBarley\t"Bread, beer"\n'
)
FLASHRAG_WIKIPEDIA = (
    '{"id": "0", "contents": "\\"Oat\\"\\nOats grow"}\n{"id": "1", "contents": "\\"Rye\\"\\nRye is sown"}\n'
)
CORPUS = [
    {"_id": "d1", "title": "Oat", "text": "Oats grow.", "metadata": {"url": "u"}},
    {"_id": "d2", "title": "A title alone", "text": ""},
    {"_id": "d3", "title": "", "text": ""},
    {"_id": "d4", "title": "", "text": "Rye."},
]
QUERIES = [{"_id": f"q{n}", "text": f"Question {n}?", "metadata": {}} for n in range(1, 5)]
QRELS = {
    "test": "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td4\t0\nq3\td4\t1\n",
    "train": "query-id\tcorpus-id\tscore\nq2\td2\t1\n",
}


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def packed_zip(members):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return packed.getvalue()


def packed_tar(members):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, text in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
    return packed.getvalue()


def beir(corpus=None, queries=None, qrels=None, folder="small/"):
    return packed_zip(
        {
            f"{folder}corpus.jsonl": lines(CORPUS) if corpus is None else corpus,
            f"{folder}queries.jsonl": lines(QUERIES) if queries is None else queries,
            **{f"{folder}qrels/{split}.tsv": text for split, text in (qrels or QRELS).items()},
        }
    )


def description(folder, name, parser, files, kind="questions", split="test", **more):
    """A TOML file of one's own; ``files`` are tables. Returns its path as the command takes it."""
    text = f'name = "{name}"\ntitle = "T"\nwhat = "invented"\nhomepage = "http://h"\nlicence = "ours"\n'
    text += f'kind = "{kind}"\nparser = "{parser}"\n' + (f'split = "{split}"\n' if split else "")
    for file in files:
        given = {"address": f"http://127.0.0.1:9/{file['name']}", **file}
        members = given.pop("members", {})
        text += "\n[[files]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in given.items())
        if members:
            text += "members = {" + ", ".join(f"{key} = {json.dumps(value)}" for key, value in members.items()) + "}\n"
    path = folder / f"{name}.toml"
    path.write_text(text + "".join(f"{key} = {json.dumps(value)}\n" for key, value in more.items()))
    return str(path)


def fetched(folder, path, contents):
    """A dataset whose files lie in the cache as if they had been fetched."""
    cached = Cached.of(describe(path), folder)
    cached.root.mkdir(parents=True, exist_ok=True)
    for file in cached.dataset.files:
        if file.name in contents:
            content = contents[file.name]
            content = content.encode() if isinstance(content, str) else content
            cached.path(file).write_bytes(content)
            cached.record(file, Fetched("here", len(content), hashlib.sha256(content).hexdigest(), "2026-01-01"))
    return cached


def failed(result, code, *values):
    """A command that ended with this exit code and an error that holds all of these values."""
    told = " ".join(result.stderr.split())
    assert result.exit_code == code, told
    assert [str(value) for value in values if str(value) not in told] == [], told


def gz(text):
    return gzip.compress(text.encode(), mtime=0)


@dataclass
class Server:
    """What it has, how it fails, and what it was asked."""

    files: dict = field(default_factory=dict)
    etag: str | None = '"one"'
    modified: str | None = None
    ranges: bool = True
    ignores_condition: bool = False
    drop_after: int | None = None
    """Bytes of a body after which the connection is closed, once."""
    stall: threading.Event | None = None
    """Sends half and waits for it."""
    status: int | None = None
    length: bool = True
    endless: bool = False
    """Sends the body again and again."""
    linked: str = ""
    """What a redirection says of the file that it leads to."""
    moved: dict = field(default_factory=dict)
    asked: list = field(default_factory=list)
    """(path, Range, If-Range) of each request."""
    base: str = ""


@contextlib.contextmanager
def serving(**options):
    """A server on loopback."""
    server = Server(**options)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers.get("Range")
            condition = self.headers.get("If-Range")
            server.asked.append((self.path, asked, condition))
            if self.path in server.moved:
                self.send_response(302)
                self.send_header("Location", server.moved[self.path])
                if server.linked:
                    self.send_header("X-Linked-ETag", server.linked)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            body = server.files.get(self.path.lstrip("/"))
            if server.status or body is None:
                self.send_error(server.status or 404)
                return
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and server.ranges else 0
            if condition not in (None, server.etag, server.modified) and not server.ignores_condition:
                start, asked = 0, None
            if start >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if asked and server.ranges else 200)
            if asked and server.ranges:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            for name, value in (("ETag", server.etag), ("Last-Modified", server.modified)):
                if value:
                    self.send_header(name, value)
            if server.length:
                self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            self.send_body(body[start:])

        def send_body(self, body):
            if server.drop_after is not None:
                self.wfile.write(body[: server.drop_after])
                server.drop_after, self.close_connection = None, True
                return
            if server.stall is not None:
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                server.stall.wait(20)
                self.close_connection = True
                return
            self.wfile.write(body)
            with contextlib.suppress(OSError):  # whoever has enough hangs up
                while server.endless:
                    self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        server.base = f"http://127.0.0.1:{http.server_port}"
        try:
            yield server
        finally:
            if server.stall is not None:
                server.stall.set()
            http.shutdown()
            thread.join()
