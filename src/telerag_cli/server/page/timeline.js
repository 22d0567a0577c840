// An answer's timeline: lanes on one axis of time, drawn as SVG; one or several answers on the same scale.

import { el, freshId, svg } from "./dom.js";
import { bytes, capital, count, counted, percent, seconds, small, stageName } from "./format.js";

const KINDS = ["llm", "link", "scoring", "embedding"];
const OUTCOMES = ["hit", "wasted", "missed"];
const OUTCOME_WORDS = {
  hit: "moved ahead and probed", wasted: "moved ahead, not probed", missed: "moved when the query needed it",
};
const MARKS = { lookahead: "lookahead begins", refinement: "refinement", query: "query arrives" };
const MOST_QUERIES = 6;
const MARK_ROW = 18, AXIS = 22, GAP = 10, LANE_GAP = 2, RIGHT = 8;
const LLM_ROW = 26, OTHER_ROW = 14, LINK_ROOM = 64, LINK_LEAST = 6;
const NEAR = 14;

// `runs`: [{name, timeline}], drawn one under the other. Zoom is shared, so lengths can be compared by eye.
export function timelines(runs) {
  const queries = Math.min(MOST_QUERIES, ...runs.map((run) => windows(run.timeline).length));
  const plots = runs.map((run) => new Plot(run));
  const element = el("div", { class: "timelines" });
  const total = Math.max(...runs.map((run) => run.timeline.total_s));
  const view = (number) => {
    if (number === null) {
      for (const plot of plots) plot.show(0, total);
      return;
    }
    const spans = plots.map((plot) => windows(plot.timeline)[number]);
    const long = Math.max(...spans.map(([from, to]) => to - from)) * 1.3;
    plots.forEach((plot, place) => plot.show(spans[place][0] - long * 0.1, spans[place][0] + long * 0.9));
  };
  if (queries > 0) element.append(zoom(queries, view));
  plots.forEach((plot) => element.append(plot.element));
  view(null);
  return element;
}

function zoom(queries, view) {
  const buttons = [null, ...Array(queries).keys()].map((number) => el("button", {
    type: "button", class: "segment", "aria-pressed": String(number === null),
    click: (event) => {
      for (const button of buttons) button.setAttribute("aria-pressed", String(button === event.currentTarget));
      view(number);
    },
  }, number === null ? "Whole answer" : queries === 1 ? "Around the query" : `Query ${number + 1}`));
  return el("div", { class: "segments", role: "group", "aria-label": "What the timeline shows" }, buttons);
}

// For each query: when it came, or what belongs to it began, and when the last of what belongs to it ended.
function windows(timeline) {
  const arrivals = timeline.marks.filter((mark) => mark.kind === "query").map((mark) => mark.at_s);
  const found = arrivals.map((at) => [at, at]);
  for (const lane of timeline.lanes) {
    for (const bar of lane.bars) {
      if (!arrivals.length || lane.kind === "llm" || (lane.kind === "link" && bar.outcome !== "missed")) continue;
      const far = arrivals.map((at) => Math.abs(bar.start_s - at));
      const nearest = found[far.indexOf(Math.min(...far))];
      nearest[0] = Math.min(nearest[0], bar.start_s);
      nearest[1] = Math.max(nearest[1], bar.end_s);
    }
  }
  return found.map(([from, to]) => [from, Math.max(to, from + 1e-4)]);
}

// Bars may stand for several lists each, where there were too many to draw.
const listsOf = (bar) => (Number.isInteger(bar.lists) ? bar.lists : 1);

export function moves(timeline) {
  const told = Object.fromEntries(OUTCOMES.map((outcome) => [outcome, { lists: 0, bytes: 0 }]));
  for (const lane of timeline.lanes) {
    if (lane.kind !== "link") continue;
    for (const bar of lane.bars) {
      told[bar.outcome].lists += listsOf(bar);
      told[bar.outcome].bytes += bar.bytes;
    }
  }
  return told;
}

// As many digits as it takes to tell the ends of short bars apart.
function when(from, to) {
  const digits = Math.min(6, Math.max(2, Math.ceil(-Math.log10(Math.max(to - from, 1e-6)))));
  return `${from.toFixed(digits)} to ${to.toFixed(digits)} s (${seconds(to - from)})`;
}

// [what it is, when, figures] of a bar.
function described(lane, bar) {
  const time = when(bar.start_s, bar.end_s);
  if (lane.kind === "llm") {
    return [`${lane.name}: ${stageName(bar.stage)}`, time,
      `${counted(bar.prompt_tokens, "prompt token")}, ${count(bar.cached_tokens)} of them known already; `
      + `${count(bar.completion_tokens)} written; queue ${seconds(bar.queue_s)}, reading ${seconds(bar.prefill_s)}, `
      + `writing ${seconds(bar.decode_s)}`];
  }
  if (lane.kind === "link") {
    const what = listsOf(bar) === 1 && Number.isInteger(bar.list) ? `list ${bar.list}` : counted(listsOf(bar), "list");
    return [`${lane.name}: ${what}`, time, `${bytes(bar.bytes)}, ${bar.outcome}: ${OUTCOME_WORDS[bar.outcome]}`];
  }
  return [`${lane.name}: ${bar.label}`, time, ""];
}

const markDescribed = (mark) => [capital(MARKS[mark.kind] ?? mark.kind), seconds(mark.at_s), mark.label];

class Plot {
  constructor({ name, timeline }) {
    this.name = name;
    this.timeline = timeline;
    this.hatch = freshId("hatch");
    this.stripes = freshId("stripes");
    this.clip = freshId("clip");
    this.width = 0;
    this.active = null;
    this.groups = KINDS.map((kind) => timeline.lanes.filter((lane) => lane.kind === kind)).filter((lanes) => lanes.length);
    this.readout = el("p", { class: "readout" });
    this.frame = el("div", { class: "plot" });
    this.element = el("figure", { class: "timeline" },
      name && el("figcaption", {}, el("strong", {}, name), ` ${seconds(timeline.total_s)}`),
      this.frame, legend(timeline, this.groups), this.readout);
    this.frame.addEventListener("pointermove", (event) => this.point(event));
    this.frame.addEventListener("pointerdown", (event) => this.point(event));
    this.frame.addEventListener("pointerleave", () => this.choose(null));
    this.frame.addEventListener("focusin", (event) => this.choose(this.items[event.target.dataset.item] ?? null));
    this.frame.addEventListener("focusout", () => this.choose(null));
    this.frame.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(([entry]) => {
      const width = Math.round(entry.contentRect.width);
      if (width && width !== this.width) {
        this.width = width;
        this.draw();
      }
    }).observe(this.frame);
    this.choose(null);
  }

  show(from, to) {
    this.from = from;
    this.to = Math.max(to, from + 1e-6);
    if (this.width) this.draw();
  }

  x(at) {
    return this.left + ((at - this.from) / (this.to - this.from)) * (this.width - this.left - RIGHT);
  }

  draw() {
    const focused = this.frame.contains(document.activeElement) ? document.activeElement.dataset.item : null;
    this.left = this.width < 480 ? 70 : 84;
    this.items = [];
    const back = svg("g"), bars = svg("g", { "clip-path": `url(#${this.clip})` }), labels = svg("g", { "aria-hidden": "true" });
    let y = MARK_ROW + 4;
    let row = 1;
    for (const lanes of this.groups) {
      const kind = lanes[0].kind;
      const height = kind === "llm" ? LLM_ROW
        : kind === "link" ? Math.max(LINK_LEAST, Math.min(OTHER_ROW, LINK_ROOM / lanes.length)) : OTHER_ROW;
      const top = y;
      for (const lane of lanes) {
        back.append(svg("rect", { class: "track", x: this.left, y, width: this.width - this.left - RIGHT, height }));
        for (const bar of lane.bars) this.bar(bars, lane, bar, row, y, height);
        y += height + LANE_GAP;
        row += 1;
      }
      y -= LANE_GAP;
      labels.append(svg("text", { class: this.width < 480 ? "lane small" : "lane", x: 0, y: (top + y) / 2 + 4 },
        kind === "llm" ? "LLM" : capital(kind)));
      y += GAP;
    }
    const bottom = y - GAP + 4;
    const marks = this.marks(bottom);
    const height = bottom + AXIS;
    const picture = svg("svg", { width: this.width, height, viewBox: `0 0 ${this.width} ${height}`, role: "group",
      "aria-label": `Timeline${this.name ? `, ${this.name}` : ""}. Arrow keys go from bar to bar.` },
    this.patterns(bottom), back, this.axis(bottom), bars, marks, labels);
    this.frame.replaceChildren(picture);
    this.items.forEach((item, place) => {
      item.place = place;
      item.element.setAttribute("data-item", place);
      item.element.setAttribute("role", "img");
      item.element.setAttribute("aria-label", item.told.filter(Boolean).join(", "));
      item.element.setAttribute("tabindex", place === 0 ? "0" : "-1");
    });
    if (focused !== null) this.items[focused]?.element.focus();
    else this.choose(null);
  }

  bar(into, lane, bar, row, y, height) {
    const from = this.x(bar.start_s);
    const width = Math.max(this.x(bar.end_s) - from, 1.5);
    if (from + width < this.left || from > this.width - RIGHT) return;
    const element = svg("g", { class: `bar ${lane.kind}${bar.outcome ? ` ${bar.outcome}` : ""}` });
    if (lane.kind === "llm") this.llm(element, bar, from, width, y, height);
    else if (bar.outcome === "wasted") {
      // Lower than the others, and hatched: told apart without its colour too, however short it is.
      const half = Math.max(3, height / 2);
      element.append(svg("rect", { class: "shape", x: from, y: y + height - half, width, height: half, fill: `url(#${this.hatch})` }));
    } else {
      element.append(svg("rect", { class: "shape", x: from, y, width, height }));
      if (bar.outcome === "missed") element.append(svg("rect", { x: from, y, width, height, fill: `url(#${this.stripes})` }));
    }
    into.append(element);
    this.items.push({ element, row, from, to: from + width, top: y, bottom: y + height, told: described(lane, bar) });
  }

  // Waiting is an outline, reading the prompt is dark, writing is light.
  llm(element, bar, from, width, y, height) {
    const scale = width / Math.max(bar.end_s - bar.start_s, 1e-9);
    const queue = Math.min(width, bar.queue_s * scale);
    const prefill = Math.min(width - queue, bar.prefill_s * scale);
    element.append(
      svg("rect", { class: "shape", x: from, y, width, height }),
      svg("rect", { class: "written", x: from + queue + prefill, y, width: Math.max(0, width - queue - prefill), height }),
      svg("rect", { class: "prefill", x: from + queue, y, width: prefill, height }));
    const words = stageName(bar.stage);
    const start = Math.max(from + queue + prefill, this.left) + 6;
    const room = Math.min(from + width, this.width - RIGHT) - start - 4;
    if (room > words.length * 6.2) element.append(svg("text", { class: "stage", x: start, y: y + height / 2 + 4 }, words));
  }

  marks(bottom) {
    const group = svg("g");
    for (const mark of this.timeline.marks) {
      const x = this.x(mark.at_s);
      if (x < this.left - 1 || x > this.width - RIGHT + 1) continue;
      const middle = MARK_ROW / 2 + 2;
      const sign = {
        lookahead: `M${x} ${middle - 5}v10l8 -5z`,
        refinement: `M${x} ${middle - 5}l5 5l-5 5l-5 -5z`,
      }[mark.kind] ?? `M${x - 5} ${middle - 5}h10l-5 9z`;
      const element = svg("g", { class: `mark ${mark.kind}` },
        svg("line", { x1: x, x2: x, y1: middle + 5, y2: bottom }), svg("path", { class: "shape", d: sign }));
      group.append(element);
      this.items.push({ element, row: 0, from: x - 5, to: x + 5, top: 0, bottom: MARK_ROW, told: markDescribed(mark) });
    }
    return group;
  }

  axis(bottom) {
    const group = svg("g", { class: "axis", "aria-hidden": "true" });
    const span = this.to - this.from;
    const least = (span * 62) / (this.width - this.left - RIGHT);
    const power = 10 ** Math.floor(Math.log10(least));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= least * (1 - 1e-9));
    const inMs = span < 1;
    const digits = Math.max(0, -Math.floor(Math.log10(step * (inMs ? 1000 : 1)) + 1e-9));
    let last = null;
    for (let tick = Math.ceil(this.from / step - 1e-9); tick * step <= this.to + step * 1e-6; tick += 1) {
      const x = this.x(tick * step);
      const text = (tick * step * (inMs ? 1000 : 1)).toFixed(digits);
      last = svg("text", { x: Math.min(x, this.width - RIGHT), y: bottom + 15, "text-anchor": "middle" }, text);
      group.append(svg("line", { x1: x, x2: x, y1: MARK_ROW, y2: bottom + 3 }), last);
      if (x > this.width - 40) last.setAttribute("text-anchor", "end"), last.setAttribute("x", this.width);
    }
    if (last) last.append(inMs ? " ms" : " s");
    return group;
  }

  patterns(bottom) {
    return svg("defs", {},
      svg("clipPath", { id: this.clip },
        svg("rect", { x: this.left, y: 0, width: Math.max(1, this.width - this.left - RIGHT + 1.5), height: bottom })),
      svg("pattern", { id: this.hatch, width: 4, height: 4, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
        svg("rect", { class: "hatch-back", width: 4, height: 4 }), svg("rect", { class: "hatch-line", width: 1.6, height: 4 })),
      svg("pattern", { id: this.stripes, width: 5, height: 5, patternUnits: "userSpaceOnUse" },
        svg("rect", { class: "stripe", x: 3.6, width: 1.4, height: 5 })));
  }

  point(event) {
    const box = this.frame.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    let best = null;
    let least = NEAR;
    for (const item of this.items) {
      const aside = Math.max(item.from - x, x - item.to, 0);
      const above = Math.max(item.top - y, y - item.bottom, 0);
      // Among bars under the pointer the shortest: it is the one that is hard to meet.
      const far = aside + above * 2 + Math.min(1, (item.to - item.from) / this.width) * 0.5;
      if (far < least) [best, least] = [item, far];
    }
    this.choose(best);
  }

  key(event) {
    const here = this.items[event.target.dataset?.item];
    if (!here) return;
    const there = {
      ArrowRight: () => this.beside(here, 1), ArrowLeft: () => this.beside(here, -1),
      ArrowDown: () => this.across(here, 1), ArrowUp: () => this.across(here, -1),
      Home: () => this.inRow(here.row)[0], End: () => this.inRow(here.row).at(-1),
    }[event.key]?.();
    if (!there) return;
    event.preventDefault();
    here.element.setAttribute("tabindex", "-1");
    there.element.setAttribute("tabindex", "0");
    there.element.focus();
  }

  inRow(row) {
    return this.items.filter((item) => item.row === row).sort((one, other) => one.from - other.from);
  }

  beside(here, by) {
    const row = this.inRow(here.row);
    return row[row.indexOf(here) + by];
  }

  across(here, by) {
    const rows = [...new Set(this.items.map((item) => item.row))].sort((one, other) => one - other);
    const row = rows[rows.indexOf(here.row) + by];
    if (row === undefined) return undefined;
    const middle = (here.from + here.to) / 2;
    const aside = (item) => Math.max(item.from - middle, middle - item.to, 0);
    return this.inRow(row).reduce((best, item) => (aside(item) < aside(best) ? item : best));
  }

  choose(item) {
    this.active?.element.classList.remove("active");
    this.active = item;
    item?.element.classList.add("active");
    if (!item) {
      this.readout.replaceChildren(el("span", { class: "muted" }, "Point at a bar, or go through them with the arrow keys."));
      return;
    }
    const [what, time, figures] = item.told;
    this.readout.replaceChildren(el("strong", {}, what), ` ${time}`, figures ? el("span", { class: "muted" }, ` ${figures}`) : "");
  }
}

function legend(timeline, groups) {
  const told = moves(timeline);
  const kinds = new Set(groups.map((lanes) => lanes[0].kind));
  const marks = new Set(timeline.marks.map((mark) => mark.kind));
  const sign = (kind) => el("span", { class: `sign ${kind}`, "aria-hidden": "true" });
  const entries = [];
  if (kinds.has("llm")) entries.push(el("li", {}, sign("prefill"), "reads the prompt"), el("li", {}, sign("llm"), "writes"));
  if (kinds.has("link")) {
    for (const outcome of OUTCOMES) {
      const { lists, bytes: moved } = told[outcome];
      entries.push(el("li", { "data-outcome": outcome, "data-lists": lists, title: `${OUTCOME_WORDS[outcome]}: ${bytes(moved)}` },
        sign(outcome), `${outcome} `, el("b", {}, count(lists)), el("span", { class: "unseen" }, `: ${OUTCOME_WORDS[outcome]}`)));
    }
  }
  if (marks.has("refinement")) entries.push(el("li", {}, sign("refinement"), "refinement"));
  if (marks.has("query")) entries.push(el("li", {}, sign("query"), "query"));
  return el("ul", { class: "legend", "aria-label": "Legend" }, entries);
}

// What the timeline says, in a sentence.
export function summary(result) {
  const { counts } = result.timeline;
  const retrieval = result.timings.retrieval_s;
  if (!counts.lists_wanted) return `Nothing was searched; the answer took ${seconds(result.timeline.total_s)}.`;
  const parts = [
    `${count(counts.lists_hit)} of ${counted(counts.lists_wanted, "probed list")} were in fast memory when the query arrived`
    + ` (${percent(counts.lists_hit / counts.lists_wanted)})`,
    counts.lists_moved ? `${bytes(counts.bytes_moved)} moved while the LLM wrote` : "nothing moved while the LLM wrote",
  ];
  if (counts.lists_undrawn) parts.push(`${counted(counts.lists_undrawn, "move")} were not seen and are not drawn`);
  if (counts.lists_missed) parts.push(`${counted(counts.lists_missed, "list")} (${bytes(counts.bytes_missed)}) came only then`);
  if (retrieval !== undefined) parts.push(`retrieval took ${seconds(retrieval)}`);
  return `${parts.join("; ")}.`;
}

// All that is drawn, as a table; filled when it is opened, for it may be long.
export function dataTable(timeline, name) {
  const label = `Data of the timeline${name ? `, ${name}` : ""}`;
  const place = el("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": label });
  const fill = () => {
    if (place.firstChild) return;
    const bars = timeline.lanes.flatMap((lane) => lane.bars.map((bar) => ({ at: bar.start_s, end: bar.end_s, lane, bar })));
    const marks = timeline.marks.map((mark) => ({ at: mark.at_s, end: mark.at_s, mark }));
    const rows = [...bars, ...marks].sort((one, other) => one.at - other.at).map(({ at, end, lane, bar, mark }) => {
      const [what, , figures] = mark ? markDescribed(mark) : described(lane, bar);
      return el("tr", {}, el("th", { scope: "row" }, what), el("td", { class: "figure" }, at.toFixed(4)),
        el("td", { class: "figure" }, (end - at).toFixed(4)), el("td", {}, figures ?? ""));
    });
    place.append(el("table", {},
      el("thead", {}, el("tr", {}, ["What", "Begins, s", "Takes, s", "Figures"].map((head, column) =>
        el("th", { scope: "col", class: column === 1 || column === 2 ? "figure" : null }, head)))),
      el("tbody", {}, rows)));
  };
  const details = el("details", { class: "data" }, el("summary", {}, name ? `Figures, ${small(name)}` : "Figures"), place);
  details.addEventListener("toggle", fill);
  return details;
}
