"""What the golden tests stand on: a small corpus, an LLM that answers by rule, and what this machine computes with."""

import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

import faiss
import torch

# The corpus: eight topics of twenty passages each, and a long text that is cut into several.

TOPICS = {
    "rivers": ("Danube", "Amazon", "Mekong", "Volga", "Niger"),
    "instruments": ("violin", "bassoon", "harpsichord", "trombone", "sitar"),
    "birds": ("albatross", "nightingale", "kingfisher", "barn owl", "puffin"),
    "metals": ("copper", "tungsten", "mercury", "aluminium", "silver"),
    "painters": ("Vermeer", "Hokusai", "Frida Kahlo", "Caravaggio", "Monet"),
    "dishes": ("paella", "ramen", "goulash", "moussaka", "injera"),
    "sports": ("fencing", "curling", "rowing", "judo", "cricket"),
    "planets": ("Mercury's orbit", "Venus", "Mars", "Jupiter", "Neptune"),
}
FACTS = {
    "rivers": (
        "The {0} floods its lower valley after the snow of spring has melted.",
        "Ships carry grain and timber down the {0} to the sea.",
        "Fishermen along the {0} catch sturgeon, carp and catfish with nets.",
        "A dam on the {0} turns its water into electric power.",
    ),
    "instruments": (
        "A {0} is tuned before the concert begins.",
        "The sound of the {0} is made by a vibrating string or column of air.",
        "Composers of the baroque wrote sonatas in which the {0} leads.",
        "A beginner at the {0} practises scales for an hour a day.",
    ),
    "birds": (
        "The {0} lays its eggs where foxes and rats cannot reach them.",
        "In winter the {0} leaves for warmer coasts.",
        "One recognises the {0} by its call at dusk.",
        "The {0} feeds its young on small fish, mice or insects.",
    ),
    "metals": (
        "Miners dig {0} ore out of deep shafts.",
        "{0} melts in a furnace and is cast into bars.",
        "Engineers use {0} in wires, lamps and thermometers.",
        "Alloys that contain {0} resist rust and wear.",
    ),
    "painters": (
        "{0} painted light and shadow with unusual care.",
        "Museums lend the canvases of {0} for exhibitions only rarely.",
        "Forgers have tried to imitate the brushwork of {0}.",
        "Letters of {0} tell of debts, travels and pigments.",
    ),
    "dishes": (
        "Cooks prepare {0} in a wide pan over an open fire.",
        "The recipe of {0} asks for onions, garlic and patience.",
        "Travellers eat {0} at stalls beside the market.",
        "Leftover {0} is warmed up the next morning for breakfast.",
    ),
    "sports": (
        "In {0} a referee decides whether a point counts.",
        "Olympic champions in {0} train twice a day.",
        "The rules of {0} were first written down by a club.",
        "An injury of the knee ends many careers in {0}.",
    ),
    "planets": (
        "Telescopes show storms, craters or clouds on {0}.",
        "A probe needs years to reach {0} from the Earth.",
        "The year of {0} is of another length than ours.",
        "Astronomers in antiquity already knew or later predicted {0}.",
    ),
}
LONG = (
    "Chapter {0} of the chronicle tells how the harbour was built, how pilots, coopers and customs officers lived "
    "there, and what they paid for bread, rope and tar in the years after the great storm of 17{0}."
)


def documents():
    """Passages as they are given to the command line."""
    for topic, names in TOPICS.items():
        for place, name in enumerate(names):
            for number, fact in enumerate(FACTS[topic]):
                text = fact.format(name)
                yield {
                    "id": f"{topic}-{place}-{number}",
                    "title": f"{name} ({topic})" if number % 2 else "",
                    "text": text[0].upper() + text[1:],
                    "topic": topic,
                    "year": 1900 + 7 * place + number,
                }


def long_text():
    """A text that no embedder takes whole."""
    return "# The harbour\n\n" + "\n\n".join(LONG.format(chapter) for chapter in range(10, 30))


QUESTIONS = (
    "Which fish do people catch in the Danube?",
    "Who painted light and shadow, and which letters of that painter are left?",
    "How does a harpsichord make its sound, and when is it tuned?",
)

# The LLM.

_ASKED = re.compile(r"^(?:Question|Follow-up|Q): (.+)$", re.MULTILINE)


def number_of(text):
    """A number that depends on every character."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])


def reply_to(body):
    """A text for a request to ``/chat/completions``: in the form asked for, about what is asked, with citations."""
    last = body["messages"][-1]["content"]
    number = number_of(json.dumps(body["messages"], ensure_ascii=False))
    asked = " ".join(_ASKED.findall(last)) or last
    words = sorted(set(re.findall(r"\w{4,}", asked)), key=lambda word: (-len(word), word))[:6] or ["nothing"]
    chosen = words[number % len(words)]
    schema = body.get("response_format", {}).get("json_schema", {}).get("schema")
    if not schema:
        more = "".join(f" Others tell it in {ways} other ways, all of them longer." for ways in range(number % 3))
        return (
            f"What is known of {chosen} comes from {words[0]} [{number % 3 + 1}]. It has to do with "
            f"{' and '.join(words[:3])} in {number % 97 + 2} ways [{number % 5 + 1}].{more}"
        )
    ((name, value),) = schema["properties"].items()
    if "enum" in value:
        return json.dumps({name: value["enum"][number % 5 // 2 % len(value["enum"])]})
    turned = [words[(number + place) % len(words)] for place in range(value["maxItems"])]
    lines = [f"{place}. What is told of {word} and {chosen}?" for place, word in enumerate(turned, 1)]
    return json.dumps({name: lines})


def cut(text, body):
    """The tokens of a text that the request lets through, why they end, and at which stop text."""
    ends = [(text.index(stop), stop) for stop in body.get("stop", ()) if stop in text]
    place, stop = min(ends, default=(len(text), None))
    tokens = re.findall(r"\s*\S+", text[:place])
    most = body["max_tokens"]
    return (tokens[:most], "length", None) if len(tokens) > most else (tokens, "stop", stop)


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self._begin("application/json")
        self.wfile.write(json.dumps({"object": "list", "data": [{"id": "golden", "object": "model"}]}).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        tokens, reason, stop = cut(reply_to(body), body)
        self._begin("text/event-stream")
        for token in tokens:
            logprob = -1.5 if number_of(f"{tokens} {token}") % 4 == 0 else -0.05
            told = {"token": token, "logprob": logprob, "bytes": list(token.encode()), "top_logprobs": []}
            logprobs = {"content": [told]} if body.get("logprobs") else None
            self._choice({"content": token}, None, logprobs=logprobs)
        self._choice({}, reason, stop_reason=stop)
        read = sum(len(message["content"].split()) for message in body["messages"])
        usage = {"prompt_tokens": read, "completion_tokens": len(tokens), "total_tokens": read + len(tokens)}
        self._event(choices=[], usage={**usage, "prompt_tokens_details": {"cached_tokens": read // 3}})
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_arguments):
        pass

    def _begin(self, kind):
        self.send_response(200)
        self.send_header("content-type", kind)
        self.end_headers()

    def _choice(self, delta, reason, **more):
        self._event(choices=[{"index": 0, "delta": delta, "finish_reason": reason, **more}])

    def _event(self, **more):
        chunk = {"id": "chunk", "object": "chat.completion.chunk", "created": 0, "model": "golden", **more}
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.flush()


@contextlib.contextmanager
def language_model():
    """Run the LLM at a port of its own; yields the address of its API."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()
            thread.join()


# The machine.

PACKAGES = ("numpy", "scipy", "torch", "pyarrow", "tokenizers", "transformers", "sentence-transformers")


def fingerprint():
    """All that the last bits of an embedding or a centroid depend on, as far as one can tell from outside."""
    with contextlib.suppress(OSError):
        pairs = (line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
        found = {name.strip(): value.strip() for name, value in pairs}
        flags = " ".join(sorted(found.pop("flags", found.pop("Features", "")).split()))
        names = ("model name", "cpu family", "model", "stepping")
        return {
            "processor": {name: found.get(name, "") for name in names},
            "flags": hashlib.sha256(flags.encode()).hexdigest()[:16],
            "threads": {"torch": torch.get_num_threads(), "faiss": faiss.omp_get_max_threads()},
            "code": {"torch": torch.backends.cpu.get_cpu_capability(), "faiss": faiss.get_compile_options()},
            "packages": {name: version(name) for name in PACKAGES} | {"faiss": faiss.__version__},
        }
    return {}
