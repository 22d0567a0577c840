"""Those who listen to a tracer hear what is added meanwhile."""

import threading

import pytest

from telerag_cli.tracing import Tracer


def test_listening_hears_what_a_disabled_tracer_forgets_and_only_meanwhile():
    tracer = Tracer(enabled=False)
    tracer.add("a", "before", 0.0, 1.0)
    assert not tracer.wanted
    with tracer.listening() as first:
        assert tracer.wanted
        with tracer.listening(most=1) as second:
            tracer.add("a", "one", 0.0, 1.0, list=3)
            tracer.add("a", "also", 0.0, 1.0)
            with tracer.span("a", "two"):
                pass
        tracer.clear()
        tracer.add("a", "three", 0.0, 1.0)
    tracer.add("a", "after", 0.0, 1.0)
    assert [span.name for span in first] == ["one", "also", "two", "three"]
    assert [span.name for span in second] == ["two"]
    assert first[0].details == {"list": 3}
    assert tracer.spans() == []
    assert not tracer.wanted
    with pytest.raises(KeyError), Tracer().listening():
        raise KeyError


def test_listeners_hear_each_span_once_from_any_thread():
    tracer = Tracer()
    heard = []

    def listen():
        for _ in range(20):
            with tracer.listening() as spans:
                tracer.add("a", threading.current_thread().name, 0.0, 1.0)
            heard.append([span.name for span in spans].count(threading.current_thread().name))

    threads = [threading.Thread(target=listen) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert heard == [1] * 80
    assert len(tracer.spans()) == 80
