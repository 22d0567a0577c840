"""What answering many requests at once gives, and what it costs: `LlamaCpp` beside a bare loop over `llama_decode`.

Both run on the same thread: once two threads of a process have called llama.cpp, OpenMP has more threads than there are
cores, no longer lets them spin, and short steps take nearly twice as long.

Tokens per second while 1, 8 and 16 requests are being answered, and of a long prompt; the wait for a first token on an idle
model and on a busy one; the tokens computed for prompts that begin alike; and how often a text is another one than when its
request is alone.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import llama_cpp

from telerag_cli.bench_record import record
from telerag_cli.files import write_json
from telerag_cli.generation.base import Generation, Message, Request
from telerag_cli.generation.batcher import Part
from telerag_cli.generation.llama_model import LlamaDecoder, LlamaModel
from telerag_cli.generation.llamacpp import LlamaCpp
from telerag_cli.generation.models import resolve_model

QUESTIONS = Path(__file__).resolve().parent.parent / "datasets" / "python_questions.txt"
CONTEXT_TOKENS = 512
OTHERS = 7
"""Requests that are being answered while another comes."""
LONG_PROMPT = 1024
SHARING = 16
PREFIX_WORDS = 300


class UsualDecoder(LlamaDecoder):
    """The same with llama.cpp's own choice of cache: float16, shared by all sequences, flash attention as it likes."""

    def _settings(self, slots: int, tokens: int) -> Any:
        settings = super()._settings(slots, tokens)
        usual = llama_cpp.llama_context_default_params()
        settings.kv_unified = True
        for name in ("flash_attn_type", "type_k", "type_v"):
            setattr(settings, name, getattr(usual, name))
        return settings


class BareLoop:
    """As little as it takes to decode some sequences with llama.cpp's own choice of cache; nobody reads the outputs."""

    def __init__(self, model: LlamaModel, prompts: Sequence[list[int]]) -> None:
        self._decoder = UsualDecoder(model, len(prompts), CONTEXT_TOKENS, None)
        self._context = self._decoder._context
        self._prompts = prompts
        self._batch = llama_cpp.llama_batch_init(len(prompts), 0, 1)

    def tokens_per_s(self, steps: int) -> float:
        """Read the prompts, and then time so many steps."""
        for slot, prompt in enumerate(self._prompts):
            self._decoder.cut(slot, 0)
            for start in range(0, len(prompt), self._decoder.chunk):
                chunk = prompt[start : start + self._decoder.chunk]
                self._decoder.decode([Part(slot, start, chunk, wants_output=False)])
        self._step(0)
        llama_cpp.llama_synchronize(self._context)
        started_s = time.perf_counter()
        for step in range(1, steps + 1):
            self._step(step)
        return len(self._prompts) * steps / (time.perf_counter() - started_s)

    def close(self) -> None:
        """Free the context."""
        llama_cpp.llama_batch_free(self._batch)
        self._decoder.close()

    def _step(self, step: int) -> None:
        batch = self._batch
        batch.n_tokens = len(self._prompts)
        for slot, prompt in enumerate(self._prompts):
            batch.token[slot] = prompt[step % len(prompt)]
            batch.pos[slot] = len(prompt) + step
            batch.n_seq_id[slot] = 1
            batch.seq_id[slot][0] = slot
            batch.logits[slot] = True
        status = llama_cpp.llama_decode(self._context, batch)
        assert status == 0, status


def ask(text: str, max_tokens: int, **options: Any) -> Request:
    """A request of one message."""
    return Request([Message("user", text)], max_tokens, **options)


async def generate_all(
    generator: LlamaCpp, requests: Sequence[Request]
) -> tuple[list[Generation], list[list[float]]]:
    """The generations, and when each token of each came."""
    times: list[list[float]] = [[] for _ in requests]

    def listener(number: int) -> Any:
        return lambda _text, _count: times[number].append(time.perf_counter())

    done = await asyncio.gather(
        *(generator.generate(request, listener(number)) for number, request in enumerate(requests))
    )
    return done, times


def decode_rate(generator: LlamaCpp, texts: Sequence[str], tokens: int) -> float:
    """Tokens per second from when the last request has its first token until the first has its last."""
    generator.forget()
    # Those that begin early are still at it when the last has begun.
    chunks = sum(generator.count_tokens([Message("user", text)]) for text in texts) // 16
    requests = [ask(text, tokens + chunks, ignore_eos=True) for text in texts]
    _done, times = asyncio.run(generate_all(generator, requests))
    begin_s, end_s = max(one[0] for one in times), min(one[-1] for one in times)
    return sum(begin_s < at <= end_s for one in times for at in one) / (end_s - begin_s)


def measure_rates(
    model: LlamaModel, questions: Sequence[str], widths: Sequence[int], tokens: int, repeats: int
) -> list[dict[str, Any]]:
    """Rates at each width, in pairs of which now one and now the other goes first."""
    results = []
    for width in widths:
        texts = list(itertools.islice(itertools.cycle(questions), width))
        generator = LlamaCpp(model, context_tokens=CONTEXT_TOKENS, parallel=width)
        bare = BareLoop(model, [model.prompt([Message("user", text)]) for text in texts])
        runs: dict[str, Callable[[], float]] = {
            "telerag": partial(decode_rate, generator, texts, tokens),
            "bare": partial(generator.between_steps, partial(bare.tokens_per_s, tokens)),
        }
        for run in runs.values():
            run()
        pairs = []
        for turn in range(repeats):
            order = list(runs) if turn % 2 == 0 else list(runs)[::-1]
            rates = {name: runs[name]() for name in order}
            pairs.append({**rates, "ratio": rates["telerag"] / rates["bare"]})
        bare.close()
        close_keeping(generator, model)
        middle = {name: statistics.median(pair[name] for pair in pairs) for name in pairs[0]}
        results.append({"width": width, **middle, "pairs": pairs})
        print(
            f"width {width:2}: {middle['telerag']:6.1f} tokens/s, bare loop {middle['bare']:6.1f}, {middle['ratio']:.2f}"
        )
    return results


def close_keeping(generator: LlamaCpp, model: LlamaModel) -> None:
    """Close a generator whose model is still needed."""
    with mock.patch.object(model, "close"):
        generator.close()


def reading_rate(model: LlamaModel, decoder: type[LlamaDecoder], tokens: int) -> float:
    """Tokens per second of a prompt on an idle model."""
    reader = decoder(model, 1, tokens, None)
    prompt = model.prompt([Message("user", words(0, tokens))])[:tokens]
    started_s = time.perf_counter()
    for start in range(0, len(prompt), reader.chunk):
        reader.decode([Part(0, start, prompt[start : start + reader.chunk], wants_output=False)])
    llama_cpp.llama_synchronize(reader._context)
    rate = len(prompt) / (time.perf_counter() - started_s)
    reader.close()
    return rate


def measure_reading(model: LlamaModel, repeats: int) -> dict[str, Any]:
    """A long prompt with our cache, on which a text does not depend on its neighbours, and with llama.cpp's usual one."""
    pairs = [{"telerag": reading_rate(model, LlamaDecoder, LONG_PROMPT), "usual": reading_rate(model, UsualDecoder, LONG_PROMPT)}
             for _ in range(repeats + 1)][1:]  # fmt: skip
    middle = {name: statistics.median(pair[name] for pair in pairs) for name in pairs[0]}
    ratio = statistics.median(pair["telerag"] / pair["usual"] for pair in pairs)
    print(
        f"a prompt of {LONG_PROMPT} tokens: {middle['telerag']:.1f} tokens/s, usual cache {middle['usual']:.1f}, {ratio:.2f}"
    )
    return {"tokens": LONG_PROMPT, **middle, "ratio": ratio, "pairs": pairs}


def measure_first_token(model: LlamaModel, repeats: int) -> dict[str, Any]:
    """Seconds until the first token of a prompt on an idle model and while others are being answered, in turn."""
    generator = LlamaCpp(model, context_tokens=CONTEXT_TOKENS, parallel=OTHERS + 1)

    async def first_token(turn: int) -> tuple[float, int]:
        started_s = time.perf_counter()
        # Its own first word, so that nothing of it is known.
        (done,), ((first_s, *_),) = await generate_all(generator, [ask(words(turn, 260), 2, ignore_eos=True)])
        return first_s - started_s, done.prompt_tokens

    async def measure() -> tuple[list[float], list[float], int]:
        idle, busy = [], []
        tokens = 0
        for turn in range(repeats + 1):
            generator.forget()
            idle.append((await first_token(2 * turn))[0])
            generator.forget()
            others = [
                asyncio.create_task(generator.generate(ask(f"{number}?", 400, ignore_eos=True)))
                for number in range(OTHERS)
            ]
            written = generator.stats().written_tokens
            while generator.stats().written_tokens < written + 4 * OTHERS:
                await asyncio.sleep(0.01)
            seconds, tokens = await first_token(2 * turn + 1)
            busy.append(seconds)
            for other in others:
                other.cancel()
            await asyncio.gather(*others, return_exceptions=True)
        return idle[1:], busy[1:], tokens  # the first warmed up

    idle, busy, tokens = asyncio.run(measure())
    chunk_s = generator.between_steps(partial(chunk_seconds, model, repeats))
    close_keeping(generator, model)
    over = [later / (2 * earlier + chunk_s) for earlier, later in zip(idle, busy, strict=True)]
    result = {"prompt_tokens": tokens, "others": OTHERS, "idle_s": statistics.median(idle),
              "busy_s": statistics.median(busy), "chunk_s": chunk_s, "part_of_goal": statistics.median(over),
              "all_idle_s": idle, "all_busy_s": busy}  # fmt: skip
    print(f"first token of {tokens} tokens: idle {result['idle_s']:.3f} s, beside {OTHERS} {result['busy_s']:.3f} s, "
          f"a chunk {chunk_s:.3f} s")  # fmt: skip
    return result


def chunk_seconds(model: LlamaModel, repeats: int) -> float:
    """A step with a whole chunk of a prompt beside the others' tokens."""
    decoder = LlamaDecoder(model, OTHERS + 1, CONTEXT_TOKENS, None)
    prompt = model.prompt([Message("user", words(0, 400))])
    for slot in range(OTHERS):
        decoder.decode([Part(slot, 0, prompt[:32], wants_output=True)])
    seconds = []
    for _ in range(repeats + 1):
        parts = [Part(slot, 32, prompt[32:33], wants_output=True) for slot in range(OTHERS)]
        started_s = time.perf_counter()
        decoder.decode([*parts, Part(OTHERS, 0, prompt[: decoder.chunk], wants_output=False)])
        seconds.append(time.perf_counter() - started_s)
        for slot in range(OTHERS + 1):
            decoder.cut(slot, 32 if slot < OTHERS else 0)
    decoder.close()
    return statistics.median(seconds[1:])


def words(seed: int, count: int) -> str:
    """A text of so many words that begins like no other."""
    return f"Number {seed}: " + " ".join(itertools.islice(itertools.cycle(("red", "green", "blue")), count))


def measure_sharing(model: LlamaModel) -> dict[str, Any]:
    """Tokens computed when requests that begin alike come together."""
    generator = LlamaCpp(model, context_tokens=CONTEXT_TOKENS, parallel=SHARING)
    prefix = words(0, PREFIX_WORDS)
    requests = [ask(f"{prefix} {number}?", 4) for number in range(SHARING)]
    done, _times = asyncio.run(generate_all(generator, requests))
    evaluated = generator.stats().evaluated_tokens
    close_keeping(generator, model)
    prompts = [one.prompt_tokens for one in done]
    result = {"requests": SHARING, "prompt_tokens": sum(prompts), "longest_prompt": max(prompts), "evaluated": evaluated,
              "evaluated_for_all_but_one": evaluated - max(prompts)}  # fmt: skip
    print(f"{SHARING} prompts that begin alike: {evaluated} of {sum(prompts)} tokens evaluated")
    return result


def texts_at(generator: LlamaCpp, questions: Sequence[str], width: int, tokens: int) -> list[str]:
    """The answers when so many are written at a time."""
    generator.forget()

    async def all_of_them() -> list[str]:
        gate = asyncio.Semaphore(width)

        async def one(question: str) -> str:
            async with gate:
                return (await generator.generate(ask(question, tokens))).text

        return list(await asyncio.gather(*map(one, questions)))

    return asyncio.run(all_of_them())


def count_differing(
    model: LlamaModel,
    decoder: type[LlamaDecoder],
    questions: Sequence[str],
    widths: Sequence[int],
    tokens: int,
) -> dict[str, int]:
    """For each width above 1, how many answers at temperature 0 are not those of width 1."""
    with mock.patch("telerag_cli.generation.llamacpp.LlamaDecoder", decoder):
        generator = LlamaCpp(model, context_tokens=CONTEXT_TOKENS, parallel=max(widths))
    alone = texts_at(generator, questions, 1, tokens)
    differing = {}
    for width in widths:
        if width > 1:
            texts = texts_at(generator, questions, width, tokens)
            differing[str(width)] = sum(here != there for here, there in zip(alone, texts, strict=True))
    close_keeping(generator, model)
    return differing


def many(questions: Sequence[str], count: int) -> list[str]:
    """So many questions, no two alike: once all are asked, they are asked for a short answer."""
    return [question if place < len(questions) else f"In short: {question}"
            for place, question in zip(range(count), itertools.cycle(questions), strict=False)]  # fmt: skip


def measure_sameness(model: LlamaModel, **options: Any) -> dict[str, dict[str, int]]:
    """How often texts differ, with our cache and the usual one."""
    caches = {"telerag": LlamaDecoder, "usual": UsualDecoder}
    differing = {name: count_differing(model, decoder, **options) for name, decoder in caches.items()}
    for name, counts in differing.items():
        print(f"{name} cache: of {len(options['questions'])} texts differ {counts}")
    return differing


def rows_for_readme(result: dict[str, Any]) -> list[dict[str, str]]:
    """The figures."""
    first, sharing = result["first_token"], result["sharing"]
    ours, usual = (result["differing"][cache] for cache in ("telerag", "usual"))
    rows = [
        {
            "what": f"Decoding at width {rate['width']}",
            "value": f"{rate['telerag']:.0f} tokens/s ({rate['ratio']:.2f} x)",
            "against": f"a bare loop over llama_decode: {rate['bare']:.0f} tokens/s",
            "goal": "at least 0.9 x",
        }
        for rate in result["rates"]
    ]
    reading = result["reading"]
    rows.append(
        {
            "what": f"Reading a prompt of {reading['tokens']:,} tokens, so that no text depends on its neighbours",
            "value": f"{reading['telerag']:.0f} tokens/s ({reading['ratio']:.2f} x)",
            "against": f"with llama.cpp's usual cache: {reading['usual']:.0f} tokens/s",
        }
    )
    limit_s = 2 * first["idle_s"] + first["chunk_s"]
    rows.append(
        {
            "what": f"First token of a prompt of {first['prompt_tokens']} tokens while {OTHERS} others are answered",
            "value": f"{first['busy_s']:.2f} s",
            "against": f"idle: {first['idle_s']:.2f} s; a chunk: {first['chunk_s']:.2f} s",
            "goal": f"at most 2 x idle and a chunk: {limit_s:.2f} s",
        }
    )
    rows.append(
        {
            "what": f"Tokens evaluated for {SHARING} prompts that begin with the same {PREFIX_WORDS} words",
            "value": f"{sharing['evaluated']:,}",
            "against": f"all of them: {sharing['prompt_tokens']:,}",
            "goal": "the shared beginning once",
        }
    )
    count = result["questions"]
    rows.append(
        {
            "what": "Answers at temperature 0 that differ from those of width 1, at width "
            + " and ".join(ours),
            "value": " and ".join(f"{number} of {count}" for number in ours.values()),
            "against": "with llama.cpp's usual cache: "
            + " and ".join(f"{number} of {count}" for number in usual.values()),
            "goal": "0",
        }
    )
    return rows


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a GGUF file; by default the bundled model")
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--tokens", type=int, default=96, help="steps that are timed")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--questions", type=int, default=48, help="texts that are compared")
    parser.add_argument("--question-tokens", type=int, default=48, help="tokens of each of them")
    parser.add_argument("-o", "--output", type=Path, help="JSON file for the result")
    options = parser.parse_args()

    path = resolve_model(options.model, None)
    asked = QUESTIONS.read_text(encoding="utf-8").splitlines()
    questions = many(asked, options.questions)
    model = LlamaModel(path)
    rates = measure_rates(model, asked, options.widths, options.tokens, options.repeats)
    reading = measure_reading(model, options.repeats)
    first_token = measure_first_token(model, options.repeats)
    sharing = measure_sharing(model)
    differing = measure_sameness(
        model, questions=questions, widths=options.widths, tokens=options.question_tokens
    )
    model.close()
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "model": path.stem,
            "threads": len(os.sched_getaffinity(0)),
            "tokens": options.tokens,
            "rates": rates,
            "reading": reading,
            "first_token": first_token,
            "sharing": sharing,
            "questions": len(questions),
            "question_tokens": options.question_tokens,
            "differing": differing,
        }
        made = record(shlex.join(["python", *sys.argv]), **result, figures=rows_for_readme(result))
        write_json(options.output, json.loads(json.dumps(made)))


if __name__ == "__main__":
    main()
