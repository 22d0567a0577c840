"""What the page draws, in a real browser: timelines, comparisons, and whether everybody can use it."""

from pathlib import Path

import pytest

from page_double import answered, ask, ready, widths

FAULTS = Path(__file__).parent.parent.joinpath("support", "page_faults.js").read_text(encoding="utf-8")


def test_the_timeline_shows_each_move_and_its_figures(opened, double):
    page = opened()
    ask(page)
    turn = answered(page)
    for outcome, lists in {"hit": 3, "wasted": 2, "missed": 1}.items():
        assert turn.locator(f".bar.link.{outcome}").count() == lists
        assert turn.locator(f".legend [data-outcome={outcome}] b").text_content() == str(lists)
    assert turn.locator(".mark.refinement").count() == 1
    summary = turn.locator(".summary").text_content()
    assert [value for value in ("3 of 4", "75 %", "5.00 MiB", "512 KiB", "30 ms") if value not in summary] == []
    wide = widths(turn.locator(".bar.link.hit .shape"))
    assert max(wide) - min(wide) < 0.01
    readout = turn.locator(".readout")
    turn.locator(".bar.link.wasted .shape").first.hover()
    assert readout.text_content().startswith("link: list 1 0.12 to 0.19 s (70 ms) 1.00 MiB, wasted")
    page.mouse.move(2, 2)
    assert "list 1" not in readout.text_content()
    turn.locator(".plot [tabindex='0']").focus()
    for key in ("Home", "ArrowDown", "ArrowDown"):
        page.keyboard.press(key)
    assert readout.text_content().startswith("scoring: score 4 lists")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("End")
    assert readout.text_content().startswith("link: list 10 0.61 to 0.63 s (20 ms)")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("link: list 10")
    assert turn.locator(".plot [tabindex='0']").count() == 1
    turn.get_by_role("button", name="Around the query").click()
    assert turn.locator(".bar.link").count() == 1
    assert widths(turn.locator(".bar.link.missed .shape"))[0] > 5 * max(wide)
    turn.locator("details.data summary").click()
    turn.locator("details.data tbody").wait_for()
    assert turn.locator("details.data tbody tr").count() == 2 + 6 + 1 + 1 + 3


def test_with_and_without_lookahead_on_one_scale(opened, double):
    page = opened()
    ask(page, "First?")
    answered(page)
    ask(page)
    turn = answered(page, 2)
    turn.get_by_role("button", name="Compare with lookahead off").click()
    page.wait_for_selector(".verdict")
    assert [body["telerag"]["lookahead"] for body in double.asked] == ["refined", "refined", "off"]
    assert [body["telerag"].get("fresh", False) for body in double.asked] == [False, False, True]
    assert double.asked[2]["messages"] == double.asked[1]["messages"]
    verdict = turn.locator(".verdict").text_content()
    values = ("60 ms less", "30 ms", "90 ms", "67 %", "1.05 s", "1.11 s", "5.4 %")
    assert [value for value in values if value not in verdict] == []
    on, off = turn.locator(".timeline").all()
    assert on.locator("figcaption").text_content() == "Lookahead refined 1.05 s"
    assert off.locator(".bar.link.missed").count() == 4
    # The passage's bar is as long in both; the whole of one is longer.
    written = [widths(each.locator(".bar.llm .shape"))[0] for each in (on, off)]
    assert written[0] == pytest.approx(written[1], abs=0.01)
    turn.get_by_role("button", name="Around the query").click()
    scored = [widths(each.locator(".bar.scoring .shape"))[0] for each in (on, off)]
    assert scored[1] == pytest.approx(4 * scored[0], rel=0.01)
    page.reload()
    assert page.locator(".verdict").text_content() == verdict
    # What was asked first is asked again, as it had the harder start; it stays the upper one.
    double.cached = 100
    ready(page)
    page.click("text=Ask again with lookahead refined")
    page.wait_for_selector("text=200 of 240 prompt tokens with lookahead and 40 of 240 without")
    assert [body["telerag"]["lookahead"] for body in double.asked[3:]] == ["refined"]
    assert turn.locator("figcaption strong").all_text_contents() == ["Lookahead refined", "Lookahead off"]
    assert turn.get_by_role("button", name="Ask again with lookahead off").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_use_it(opened, double, scheme):
    page = opened(size=(360, 740), scheme=scheme)
    ask(page, "A question_with_a_word_that_does_not_end_" + "x" * 80)
    turn = answered(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.click("#server-button")
    page.wait_for_selector(".gauge")
    turn.get_by_role("button", name="Compare").click()
    page.wait_for_selector(".verdict")
    for summary in turn.locator("summary").all():
        summary.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    turn.locator(".source").first.click()
    assert page.locator("#passage").bounding_box()["height"] <= 0.83 * 740
    assert page.evaluate(FAULTS) == []
    page.keyboard.press("Escape")
    assert page.evaluate(FAULTS) == []
    assert page.get_attribute("html", "lang") == "en"
    for landmark in ("banner", "main", "contentinfo"):
        assert page.get_by_role(landmark).count() == 1
    before = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    for _ in range(2 if scheme == "light" else 1):
        page.click("#theme")
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") != before
