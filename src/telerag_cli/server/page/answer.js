// An answer's text with its citations, and the list of its sources.

import { el } from "./dom.js";

const MARKER = /\[(\d{1,3})\]/g;

export const titleOf = (passage) => passage.title || passage.id;

// Where the server's offsets, which count characters, are in a JavaScript string, which counts UTF-16 units.
function unitsOf(text) {
  const places = [0];
  for (const character of text) places.push(places.at(-1) + character.length);
  return places;
}

// Code within the text: fenced blocks, up to the text's end if they are not closed, and `words` in a line. As
// {from, to, inner: [from, to], block}, in order.
function codeIn(text) {
  const found = [];
  for (const match of text.matchAll(/^```[^\n]*\n([^]*?)(?:^```[^\n]*\n?|(?![^]))|`([^`\n]+)`/gm)) {
    const block = match[2] === undefined;
    const inner = match.index + match[0].indexOf(block ? "\n" : "`") + 1;
    found.push({ from: match.index, to: match.index + match[0].length, inner: [inner, inner + (match[1] ?? match[2]).length], block });
  }
  return found;
}

// The text's citations, in order, as {from, to, rank, by}: the stretch that each stands for, which is empty for those
// found by their words. What looks like a marker in code is none.
function citesIn(text, passages, citations, codes) {
  const ranks = new Set(passages.map((passage) => passage.rank));
  const places = unitsOf(text);
  const found = [];
  for (const match of text.matchAll(MARKER)) {
    const [rank, from] = [Number(match[1]), match.index];
    if (ranks.has(rank) && !codes.some((code) => code.from <= from && from < code.to)) {
      found.push({ from, to: from + match[0].length, rank, by: "marker" });
    }
  }
  for (const { rank, by, end } of citations) {
    const at = places[end];
    if (by !== "overlap" || !ranks.has(rank) || at === undefined) continue;
    const code = codes.find((each) => each.from < at && at < each.to);
    found.push({ from: code?.to ?? at, to: code?.to ?? at, rank, by });
  }
  found.sort((one, other) => one.from - other.from || one.rank - other.rank);
  return found.filter(({ from, rank }, place) => from !== found[place - 1]?.from || rank !== found[place - 1].rank);
}

// Fills `place` with the text; `open(passage, button)` is called when a citation is pressed.
export function showAnswer(place, text, { passages, citations }, open) {
  const byRank = new Map(passages.map((passage) => [passage.rank, passage]));
  const codes = codeIn(text);
  const cites = citesIn(text, passages, citations, codes);
  const parts = [];
  let done = 0;
  for (const part of [...codes, ...cites].sort((one, other) => one.from - other.from || one.to - other.to)) {
    if (part.from < done) continue;
    parts.push(text.slice(done, part.from));
    done = part.to;
    if (part.inner) {
      const code = el("code", {}, text.slice(...part.inner));
      parts.push(part.block ? el("pre", { tabindex: "0", "aria-label": "Code" }, code) : code);
    } else parts.push(cite(byRank.get(part.rank), part, open));
  }
  place.replaceChildren(...parts, text.slice(done));
}

function cite(passage, { rank, by }, open) {
  const found = by === "overlap";
  return el("button", {
    type: "button",
    class: found ? "cite found" : "cite",
    "aria-label": `Source ${rank}${found ? ", found by its words" : ""}: ${titleOf(passage)}`,
    title: `${titleOf(passage)}${found ? " (found by its words)" : ""}`,
    click: (event) => open(passage, event.currentTarget),
  }, rank);
}

export function sources({ passages, citations }, open) {
  const cited = new Set(citations.map((citation) => citation.rank));
  return el("ol", { class: "sources", "aria-label": "Sources" },
    passages.map((passage) => el("li", {},
      el("button", {
        type: "button",
        class: cited.has(passage.rank) ? "source cited" : "source",
        click: (event) => open(passage, event.currentTarget),
      },
      el("span", { class: "number" }, passage.rank), " ",
      el("span", { class: "source-title" }, titleOf(passage)),
      cited.has(passage.rank) && el("span", { class: "unseen" }, " (cited)")))));
}
