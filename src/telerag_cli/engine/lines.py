"""Output lines of a run: one JSON object a question, in OpenAI's Batch form where the input was."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from telerag_cli.config import model_name
from telerag_cli.engine.engine import Answered
from telerag_cli.engine.forecast import Prediction
from telerag_cli.engine.questions import Question
from telerag_cli.errors import ArtifactError
from telerag_cli.files import wrap_os_error
from telerag_cli.planning.planner import ExpectedText
from telerag_cli.retrieval.report import JoinReport


def answer_line(question: Question, answered: Answered) -> dict[str, Any]:
    """The line for an answered question. Times are seconds, rounded to a microsecond."""
    body = {"answer": answered.answer, **answer_body(answered)}
    if question.batch is None:
        return {"id": question.id, "question": question.text, **body}
    return _batch_line(question, answered, body)


def answer_body(answered: Answered) -> dict[str, Any]:
    """How an answer came about, beside its text."""
    return {
        "passages": [
            {
                "rank": rank,
                "id": hit.passage.id,
                "score": hit.score,
                "text": hit.passage.text,
                "metadata": hit.passage.metadata,
            }
            for rank, hit in enumerate(answered.found, 1)
        ],
        "citations": answered.citations,
        "pipeline": answered.pipeline,
        "queries": [list(retrieval.queries) for retrieval in answered.retrievals],
        "stages": [
            {
                "name": stage.name,
                "text": stage.generation.text,
                "finish_reason": stage.generation.finish_reason,
                "prompt_tokens": stage.generation.prompt_tokens,
                "cached_tokens": stage.generation.cached_tokens,
                "completion_tokens": stage.generation.completion_tokens,
                "queue_s": round(stage.generation.queue_s, 6),
                "prefill_s": round(stage.generation.prefill_s, 6),
                "decode_s": round(stage.generation.decode_s, 6),
                **({"expected": _rounded(stage.expected)} if stage.expected else {}),
            }
            for stage in answered.stages
        ],
        "timings": {name: round(seconds, 6) for name, seconds in answered.timings.items()},
        "lookahead": {"mode": answered.lookahead.value} | _sum(answered.joins),
        "plan": [_rounded(plan) for plan in answered.plans],
        "dropped_passages": answered.dropped_passages,
    }


def usage(answered: Answered) -> dict[str, int]:
    """OpenAI's count of tokens, over all that the LLM read and wrote for an answer."""
    read = sum(stage.generation.prompt_tokens for stage in answered.stages)
    written = sum(stage.generation.completion_tokens for stage in answered.stages)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def error_line(question: Question, message: str) -> dict[str, Any]:
    """The line for a question that could not be answered."""
    error = {"message": message}
    if question.batch is None:
        return {"id": question.id, "question": question.text, "error": error}
    return {
        "id": f"batch_req_{question.id}",
        "custom_id": question.id,
        "response": None,
        "error": {"code": "failed", **error},
    }


def trace_line(question: Question, answered: Answered) -> dict[str, Any]:
    """The line of a recording: every prompt, text, query and length, enough to replay it."""
    return {
        "id": question.id,
        "question": question.text,
        "pipeline": answered.pipeline,
        "answer": answered.answer,
        "generations": [
            {
                "stage": stage.name,
                "messages": [{"role": turn.role, "content": turn.content} for turn in stage.request.messages],
                "max_tokens": stage.request.max_tokens,
                "text": stage.generation.text,
                "finish_reason": stage.generation.finish_reason,
                "stopped_by": stage.generation.stopped_by,
                "prompt_tokens": stage.generation.prompt_tokens,
                "completion_tokens": stage.generation.completion_tokens,
                "tokens": [[token.start, token.end, token.logprob] for token in stage.generation.tokens],
                "took_s": round(stage.took_s, 6),
            }
            for stage in answered.stages
        ],
        "retrievals": [
            {
                "queries": list(retrieval.queries),
                "passages": [{"id": hit.passage.id, "score": hit.score} for hit in retrieval.found],
            }
            for retrieval in answered.retrievals
        ],
        "timings": {name: round(seconds, 6) for name, seconds in answered.timings.items()},
    }


def _batch_line(question: Question, answered: Answered, body: dict[str, Any]) -> dict[str, Any]:
    completion = {
        "id": f"chatcmpl-{question.id}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": (question.batch or {}).get("model") or model_name(answered.pipeline),
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": answered.answer},
                "finish_reason": answered.finish_reason,
            }
        ],
        "usage": usage(answered),
        "telerag": {key: value for key, value in body.items() if key != "answer"},
    }
    response = {"status_code": 200, "request_id": f"req_{question.id}", "body": completion}
    return {"id": f"batch_req_{question.id}", "custom_id": question.id, "response": response, "error": None}


def _rounded(value: ExpectedText | Prediction) -> dict[str, Any]:
    """As JSON, with whole bytes and times to a microsecond."""

    def short(items: list[tuple[str, Any]]) -> dict[str, Any]:
        return {
            name: (round(item) if "bytes" in name else round(item, 6)) if isinstance(item, float) else item
            for name, item in items
        }

    return asdict(value, dict_factory=short)


def _sum(joins: list[JoinReport]) -> dict[str, int]:
    total = dict.fromkeys(JoinReport.count_names(), 0)
    for join in joins:
        for name, value in join.counts().items():
            total[name] += value
    return total


class RunFile:
    """The output of a run: a line is there whole or not at all, and at once."""

    def __init__(self, path: Path, *, resume: bool) -> None:
        """Open for appending.

        Args:
            path: the file.
            resume: keep the lines that are there; a torn last one, left by a kill, is cut off.

        Raises:
            ArtifactError: it exists, holds something, and ``resume`` is off; or a line of it is no run's line.
            ResourceError: it cannot be written.
        """
        self.path = path
        self.answered: set[str] = set()
        if path.exists() and path.is_file() and path.stat().st_size:
            if not resume:
                raise ArtifactError(
                    f"{path} already holds {path.stat().st_size:,} bytes.",
                    remedy="Give --resume to go on from it, or another -o.",
                )
            self._take_up()
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise wrap_os_error(error, path) from error

    def append(self, line: dict[str, Any]) -> None:
        """Write a line in one call, so that a kill leaves it whole, torn at the end, or absent.

        Raises:
            ResourceError: the disk is full; the part written is taken back.
        """
        data = (json.dumps(line, ensure_ascii=False) + "\n").encode()
        end = self._file.seek(0, os.SEEK_END) if self._file.seekable() else None
        try:
            done = 0
            while done < len(data):
                done += self._file.write(data[done:])
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            raise wrap_os_error(error, self.path) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._file.close()

    def _take_up(self) -> None:
        kept = []
        for number, raw in enumerate(self._lines(), 1):
            if not raw.endswith(b"\n"):
                break
            try:
                value = json.loads(raw)
                key = str(value.get("custom_id", value.get("id")))
            except (ValueError, AttributeError) as error:
                raise ArtifactError(
                    f"{self.path}:{number} is no line of a run: {error}.", remedy="Give another -o."
                ) from error
            if value.get("error") is None:
                self.answered.add(key)
                kept.append(raw)
        # Failed lines are tried again, so they go, and so does a torn one.
        if sum(map(len, kept)) != self.path.stat().st_size:
            temporary = self.path.with_name(f".{self.path.name}.partial")
            try:
                temporary.write_bytes(b"".join(kept))
                temporary.replace(self.path)
            except OSError as error:
                raise wrap_os_error(error, self.path) from error

    def _lines(self) -> Iterator[bytes]:
        try:
            with self.path.open("rb") as lines:
                yield from lines
        except OSError as error:
            raise wrap_os_error(error, self.path) from error
