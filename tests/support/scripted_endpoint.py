"""An OpenAI-compatible server on loopback that does what a test tells it to, and requests for it."""

import asyncio
import contextlib
import gc
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from telerag_cli.llm import refusals as module
from telerag_cli.llm.base import Message, Request
from telerag_cli.llm.endpoint import Endpoint

ADDRESS = "127.0.0.1"


def ask(text="Name a colour.", max_tokens=8, **options):
    return Request([Message("user", text)], max_tokens, **options)


def run(endpoint, request, on_text=None):
    return asyncio.run(endpoint.generate(request, on_text))


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        script = self.server.script
        self.body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if script.chat and self.path != script.chat:
            script.absent(self)
            return
        if not isinstance(self.body["messages"], list):  # somebody looks whether there is anything here
            refuse(400, "Nothing was asked.")(self)
            return
        script.bodies.append(self.body)
        script.keys.append(self.headers["authorization"])
        with script.lock:
            reply = script.replies.pop(0) if len(script.replies) > 1 else script.replies[0]
        try:
            reply(self)
        except (BrokenPipeError, ConnectionResetError):
            script.hung_up.set()

    def do_GET(self):
        assert self.path.endswith("/models")
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "me"} for name in self.server.script.models]
        answer(200, {"object": "list", "data": data})(self)

    def log_message(self, *_arguments):
        pass

    def piece(self, text):
        self.wfile.write(text if isinstance(text, bytes) else text.encode())
        self.wfile.flush()

    def begin(self, status=200, kind="text/event-stream", **headers):
        self.send_response(status)
        for name, value in {"content-type": kind, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()


class Script:
    """A server on loopback; its replies are given in order, the last one again and again."""

    def __init__(self):
        self.replies, self.models = [stream("Blue")], ["small"]
        self.bodies, self.keys = [], []
        self.chat = None
        """The only path where there are chat completions; any, if None."""
        self.absent = refuse(404, "Not Found")
        """What every other path gets."""
        self.lock, self.hung_up = threading.Lock(), threading.Event()
        self.server = ThreadingHTTPServer((ADDRESS, 0), Handler)
        self.server.daemon_threads = True
        self.server.script = self
        self.url = f"http://{ADDRESS}:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def endpoint(self, *replies, **options):
        self.replies = list(replies)
        return Endpoint(self.url, "small", **{"retries": 2, **options})

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@contextlib.contextmanager
def without_garbage():
    """What was made before is no garbage of the tests within, and looking through it again and again takes long."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@contextlib.contextmanager
def scripted(monkeypatch):
    """A `Script` that is closed at the end; tries come soon after one another, and no key is in the environment."""
    monkeypatch.setattr(module, "FIRST_WAIT_S", 0.02)
    monkeypatch.delenv(module.KEY_VARIABLE, raising=False)
    script = Script()
    yield script
    script.close()
    gc.collect()  # what was left open warns here, and warnings are errors


def answer(status, body, **headers):
    def reply(handler):
        handler.begin(status, "application/json", **headers)
        handler.piece(json.dumps(body))

    return reply


def refuse(status, message, code=None, **headers):
    return answer(status, {"error": {"message": message, "type": "error", "code": code}}, **headers)


def event(delta=None, finish=None, usage=None, **more):
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish, **more}]
    chunk = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "small", "choices": choices}
    return f"data: {json.dumps(chunk | ({'usage': usage} if usage else {}))}\n\n"


def stream(*pieces, finish="stop", usage=None, pause_s=0.0, **end):
    def reply(handler):
        handler.begin()
        handler.piece(event({"role": "assistant", "content": ""}))
        for piece in pieces:
            handler.piece(event({"content": piece}))
            time.sleep(pause_s)
        if finish:
            handler.piece(event({}, finish, **end))
        if usage:
            handler.piece(event(usage=usage))
        handler.piece("data: [DONE]\n\n")

    return reply


def raw(*texts, silence_s=0.0):
    def reply(handler):
        handler.begin()
        for text in texts:
            handler.piece(text)
        time.sleep(silence_s)

    return reply
