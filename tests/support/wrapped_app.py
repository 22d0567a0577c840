"""An application of a few routes in the server's middleware, driven without a network; what it logs and counts."""

import asyncio
import json
import threading

import httpx2
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from prometheus_client.parser import text_string_to_metric_families
from starlette.staticfiles import StaticFiles

from telerag_cli.errors import InputError
from telerag_cli.server.access_log import AccessLog, LogFormat
from telerag_cli.server.errors import as_api_error
from telerag_cli.server.metrics import Metrics
from telerag_cli.server.middleware import AccessOptions, with_middleware

SECRET = "never to be told"
GONE = {"type": "http.disconnect"}
CHUNKED = [(b"transfer-encoding", b"chunked")]


def application(folder=None):
    async def uncaught(request, error):
        return as_api_error(error, request.state.request_id).response()

    app = FastAPI(exception_handlers={Exception: uncaught})

    @app.get("/")
    @app.get("/health")
    @app.get("/telerag/state")
    async def seen():
        return {"status": "ok"}

    @app.get("/ready")
    async def not_ready():
        raise ValueError(SECRET)

    @app.get("/v1/models/{name}")
    async def model(name: str, request: Request):
        request.state.log.update(model="telerag-naive", prompt_tokens=7, queue_s=0.12345678, stream=False)
        return {"id": name, "request": request.state.request_id}

    @app.post("/v1/echo")
    async def echo(request: Request):
        body = await request.body()
        return {"bytes": len(body), "text": body.decode("latin-1")}

    @app.post("/v1/boom")
    async def boom():
        raise ValueError(SECRET)

    @app.post("/v1/wrong")
    async def wrong():
        raise InputError("The question is empty.")

    @app.get("/v1/torn")
    async def torn():
        async def pieces():
            yield "one"
            raise ValueError(SECRET)

        return StreamingResponse(pieces())

    @app.get("/v1/stream")
    async def stream(request: Request):
        async def pieces():
            try:
                for number in range(10_000):
                    yield f"{number}\n"
                    await asyncio.sleep(0.01)
            finally:
                app.state.stopped.set()

        return StreamingResponse(pieces())

    app.state.stopped = threading.Event()
    if folder:
        app.mount("/page", StaticFiles(directory=folder))
    return app


class Server:
    """An application in its middleware, and what was logged and counted."""

    def __init__(self, app=None, form=LogFormat.JSON, write=None, **options):
        self.lines = []
        self.app = app or application()
        self.metrics = Metrics("0")
        log = AccessLog(write or self.lines.append, form)
        self.wrapped = with_middleware(self.app, AccessOptions(**options), log, self.metrics)

    def ask(self, method, path, **how):
        async def asking():
            transport = httpx2.ASGITransport(app=self.wrapped, client=("192.0.2.7", 4321))
            async with httpx2.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
                return await client.request(method, path, **how)

        return asyncio.run(asking())

    async def driven(self, messages, *, sent=None, **how):
        """What is sent for these messages; after them nothing comes any more."""
        left = list(messages)

        async def receive():
            if left:
                return left.pop(0)
            await asyncio.Event().wait()

        return await driven(self.wrapped, receive, [] if sent is None else sent, **how)

    def drive(self, messages, **how):
        return asyncio.run(self.driven(messages, **how))

    @property
    def entries(self):
        return [json.loads(line) for line in self.lines]

    def counted(self, name, **labels):
        text = self.metrics.exposition()[0].decode()
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == f"telerag_{name}" and labels.items() <= sample.labels.items()
        )


async def driven(app, receive, sent, *, method="POST", path="/v1/echo", headers=()):
    """What an application sends for the messages that ``receive`` gives."""

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "root_path": ""}
    scope |= {"method": method, "path": path, "query_string": b"", "client": ("192.0.2.7", 4321)}
    await app(scope | {"headers": [(b"host", b"localhost"), *headers]}, receive, send)
    return sent


def body(data=b"", *, more=False):
    return {"type": "http.request", "body": data, "more_body": more}


def check_error(response, status, code):
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    return error
