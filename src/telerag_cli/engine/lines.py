"""Output lines of a run: one JSON object per question, in OpenAI's Batch form where the input was."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
import time
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from telerag_cli.config import model_name
from telerag_cli.engine.engine import AskResult
from telerag_cli.engine.questions import Question, digest
from telerag_cli.errors import ArtifactError, TeleragError, one_line
from telerag_cli.files import wrap_os_error, writing
from telerag_cli.retrieval.report import JoinReport
from telerag_cli.text import TextError, parse_json, repaired

TORN = b'{"id": "'
"""How each line begins."""


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
        "model": model_name(answered.pipeline),
        "choices": [{"index": 0, "message": message, "finish_reason": answered.finish_reason}],
        "usage": usage(answered),
        "telerag": {"request": digest(question.batch), **body},
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


def error_line(question: Question, error: TeleragError) -> dict[str, Any]:
    """The line for a question that could not be answered."""
    about = {"code": error.code, "message": str(error)}
    if question.batch is None:
        return {"id": question.id, "question": question.text, "error": about}
    return {"id": f"batch_req_{question.id}", "custom_id": question.id, "response": None, "error": about}


def trace_line(question: Question, answered: AskResult) -> dict[str, Any]:
    """The line of a recording: every prompt, text, query and length, enough to replay it."""
    return {
        "id": question.id,
        "question": question.text,
        **({} if question.batch is None else {"request": digest(question.batch)}),
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
    """The output of a run: a line is there whole or not at all, and at once; one process writes it."""

    def __init__(self, path: Path, *, resume: bool, only: Collection[tuple[str, str]] | None = None) -> None:
        """Open for appending, and lock.

        ``resume`` keeps the answers that are there, of a recording those to ``only`` these questions; failed lines go,
        so that they are tried again, and so does a torn last one, left by a kill.

        Raises:
            ArtifactError: it holds something and ``resume`` is off; or a line of it is not a run's; or another process
                writes it.
            ResourceError: it cannot be written.
        """
        self.path = path
        self.answered: set[tuple[str, str]] = set()
        """Keys of the questions that have an answer."""
        self._file = self._open()
        try:
            if path.is_file() and (data := path.read_bytes()):
                if not resume:
                    raise ArtifactError(
                        f"{path} already holds {len(data):,} bytes.",
                        remedy="Give --resume to go on from it, or another -o.",
                    )
                if (kept := self._kept(data, only)) != data:
                    with writing(path) as temporary:
                        temporary.write_bytes(kept)
                    self._file.close()
                    self._file = self._open()
        except BaseException as error:
            self._file.close()
            if isinstance(error, OSError):
                raise wrap_os_error(error, path) from error
            raise

    def append(self, line: dict[str, Any]) -> None:
        """Write a line in one call, so that a kill leaves it whole, torn at the end, or absent.

        Raises:
            ResourceError: the disk is full; the part written is taken back.
        """
        data = repaired(json.dumps(line, ensure_ascii=False) + "\n").encode()
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

    def _open(self) -> io.FileIO:
        try:
            file = io.FileIO(self.path, "a")
        except OSError as error:
            raise wrap_os_error(error, self.path) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who held the lock may have put another file in its place.
            if not self.path.is_file() or os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                return file
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EINVAL, errno.ENOENT):
                raise wrap_os_error(error, self.path) from error
            if error.errno == errno.EINVAL:  # a terminal or a pipe
                return file
        file.close()
        raise ArtifactError(f"Another process writes {self.path}.", remedy="Wait until it ends, or give another -o.")

    def _kept(self, data: bytes, only: Collection[tuple[str, str]] | None) -> bytes:
        """Return the answers among the lines, and note the keys of their questions."""
        *lines, torn = data.split(b"\n")
        kept = []
        for number, raw in enumerate(lines, 1):
            key, failed = self._read(raw, number)
            if not failed and (only is None or key in only):
                self.answered.add(key)
                kept.append(raw + b"\n")
        if torn:  # it lacks its end, so that it is not JSON, unless it is a line of something else
            try:
                parse_json(torn)
            except TextError:
                if torn.startswith(TORN[: len(torn)]):
                    return b"".join(kept)
            raise ArtifactError(
                f"{self.path}:{len(lines) + 1} is not a line of a run: {torn[:60]!r}.", remedy="Give another -o."
            )
        return b"".join(kept)

    def _read(self, raw: bytes, number: int) -> tuple[tuple[str, str], bool]:
        """Return the key of a line's question, and whether it failed."""
        try:
            value = parse_json(raw)
            failed = value.get("error") is not None
            if "custom_id" in value:
                about = {} if failed else value["response"]["body"]["telerag"]
                return (value["custom_id"], about.get("request", "")), failed
            if not failed:
                value["answer"]
            return (value["id"], value.get("request", value["question"])), failed
        except (TextError, AttributeError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{self.path}:{number} is not a line of a run: {one_line(str(error), 80)}.", remedy="Give another -o."
            ) from error
