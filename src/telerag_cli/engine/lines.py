"""Output lines of a run: one JSON object per question, in OpenAI's Batch form where the input was."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from telerag_cli.config import model_name
from telerag_cli.engine.engine import AskResult
from telerag_cli.engine.questions import Question
from telerag_cli.errors import ArtifactError
from telerag_cli.files import wrap_os_error, writing
from telerag_cli.retrieval.report import JoinReport


def answer_line(question: Question, answered: AskResult) -> dict[str, Any]:
    """The line for an answered question. Times are seconds, rounded to a microsecond."""
    body = answer_body(answered)
    if question.batch is None:
        return {"id": question.id, "question": question.text, "answer": answered.answer, **body}
    message = {"role": "assistant", "content": answered.answer}
    completion = {
        "id": f"chatcmpl-{question.id}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": question.batch.get("model") or model_name(answered.pipeline),
        "choices": [{"index": 0, "message": message, "finish_reason": answered.finish_reason}],
        "usage": usage(answered),
        "telerag": body,
    }
    response = {"status_code": 200, "request_id": f"req_{question.id}", "body": completion}
    return {"id": f"batch_req_{question.id}", "custom_id": question.id, "response": response, "error": None}


def answer_body(answered: AskResult) -> dict[str, Any]:
    """How an answer came about, beside its text."""
    joins = Counter(dict.fromkeys(JoinReport.count_names(), 0))
    for join in answered.joins:
        joins.update(join.counts())
    return {
        "passages": [
            {"rank": rank, "id": hit.passage.id, "score": hit.score, **_picked(hit.passage, "text", "metadata")}
            for rank, hit in enumerate(answered.found, 1)
        ],
        "citations": answered.citations,
        "pipeline": answered.pipeline,
        "queries": [list(retrieval.queries) for retrieval in answered.retrievals],
        "stages": [
            {
                "name": stage.name,
                **_picked(stage.generation, "text", "finish_reason"),
                **_picked(stage.generation, "prompt_tokens", "cached_tokens", "completion_tokens"),
                **_picked(stage.generation, "queue_s", "prefill_s", "decode_s"),
                **({"expected": asdict(stage.expected, dict_factory=_rounded)} if stage.expected else {}),
            }
            for stage in answered.stages
        ],
        "timings": _rounded(answered.timings.items()),
        "lookahead": {"mode": answered.lookahead.value, **joins},
        "plan": [asdict(plan, dict_factory=_rounded) for plan in answered.plans],
        "dropped_passages": answered.dropped_passages,
    }


def usage(answered: AskResult) -> dict[str, int]:
    """OpenAI's count of tokens, over all that the LLM read and wrote for an answer."""
    read = sum(stage.generation.prompt_tokens for stage in answered.stages)
    written = sum(stage.generation.completion_tokens for stage in answered.stages)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def error_line(question: Question, message: str) -> dict[str, Any]:
    """The line for a question that could not be answered."""
    if question.batch is None:
        return {"id": question.id, "question": question.text, "error": {"message": message}}
    error = {"code": "failed", "message": message}
    return {"id": f"batch_req_{question.id}", "custom_id": question.id, "response": None, "error": error}


def trace_line(question: Question, answered: AskResult) -> dict[str, Any]:
    """The line of a recording: every prompt, text, query and length, enough to replay it."""
    return {
        "id": question.id,
        "question": question.text,
        "pipeline": answered.pipeline,
        "answer": answered.answer,
        "generations": [
            {
                "stage": stage.name,
                "messages": [_picked(turn, "role", "content") for turn in stage.request.messages],
                "max_tokens": stage.request.max_tokens,
                **_picked(
                    stage.generation, "text", "finish_reason", "stopped_by", "prompt_tokens", "completion_tokens"
                ),
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
        "timings": _rounded(answered.timings.items()),
    }


def _picked(value: object, *names: str) -> dict[str, Any]:
    return _rounded((name, getattr(value, name)) for name in names)


def _rounded(items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Numbers as JSON, with whole bytes and times to a microsecond."""
    return {
        name: (round(item) if "bytes" in name else round(item, 6)) if isinstance(item, float) else item
        for name, item in items
    }


class RunFile:
    """The output of a run: a line is there whole or not at all, and at once."""

    def __init__(self, path: Path, *, resume: bool) -> None:
        """Open for appending.

        ``resume`` keeps the lines that are there; a torn last one, left by a kill, is cut off.

        Raises:
            ArtifactError: it exists, holds something, and ``resume`` is off; or a line of it is not a run's.
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
        """Note what was answered. Failed lines go, so that they are tried again, and so does a torn one."""
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise wrap_os_error(error, self.path) from error
        kept = []
        for number, raw in enumerate(data.split(b"\n")[:-1], 1):
            try:
                value = json.loads(raw)
                key = str(value.get("custom_id", value.get("id")))
            except (ValueError, AttributeError) as error:
                raise ArtifactError(
                    f"{self.path}:{number} is not a line of a run: {error}.", remedy="Give another -o."
                ) from error
            if value.get("error") is None:
                self.answered.add(key)
                kept.append(raw + b"\n")
        if (whole := b"".join(kept)) != data:
            with writing(self.path) as temporary:
                temporary.write_bytes(whole)
