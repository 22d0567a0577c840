// The server's state: a word in the bar, and a panel with figures while it is open.

import { serverState } from "./api.js";
import { byId, el } from "./dom.js";
import { bytes, count, counted, duration, percent } from "./format.js";

const OPEN = "telerag.server.open";
const EACH_MS = 1000;
const CLOSED_MS = 3000;
const LONGEST_MS = 30_000;
const TIMEOUT_MS = 5000;
const WORDS = { loading: "loading", ready: "ready", draining: "stopping", unreachable: "unreachable", locked: "key needed" };

export class ServerPanel {
  // `onReady` is called whenever the server becomes ready, `onState` with each state that it tells.
  constructor({ onReady, onState }) {
    this.onReady = onReady;
    this.onState = onState;
    this.button = byId("server-button");
    this.panel = byId("server");
    this.status = null;
    this.failures = 0;
    this.timer = 0;
    this.round = 0;
    this.button.addEventListener("click", () => this.toggle(this.panel.hidden));
    document.addEventListener("visibilitychange", () => this.now());
    let open = false;
    try {
      open = localStorage.getItem(OPEN) === "yes";
    } catch {
      // Closed, then.
    }
    this.toggle(open);
  }

  toggle(open) {
    this.panel.hidden = !open;
    this.button.setAttribute("aria-expanded", String(open));
    try {
      localStorage.setItem(OPEN, open ? "yes" : "no");
    } catch {
      // Closed again next time.
    }
    this.now();
  }

  // Asks at once, and then again as often as is of use.
  now() {
    clearTimeout(this.timer);
    this.round += 1;
    if (!document.hidden) this.poll(this.round);
  }

  async poll(round) {
    let state = null;
    let status = "unreachable";
    try {
      state = await serverState(AbortSignal.timeout(TIMEOUT_MS));
      status = state.status;
    } catch (failure) {
      if (failure.needsKey) status = "locked";
    }
    if (round !== this.round) return;
    this.failures = state ? 0 : this.failures + 1;
    this.show(status, state);
    // Somebody who is asked for a key asks again with it.
    if (status === "locked" || (this.panel.hidden && status === "ready")) return;
    const pause = state ? (this.panel.hidden ? CLOSED_MS : EACH_MS) : Math.min(LONGEST_MS, EACH_MS * 2 ** this.failures);
    this.timer = setTimeout(() => this.now(), pause);
  }

  show(status, state) {
    const before = this.status;
    this.status = status;
    this.button.dataset.status = status;
    byId("server-status").textContent = WORDS[status] ?? status;
    if (state) this.onState(state);
    if (!this.panel.hidden) this.fill(status, state);
    if (status === "ready" && before !== "ready") this.onReady();
  }

  fill(status, state) {
    const inner = el("div", { class: "server-inner" });
    if (!state) {
      inner.append(el("p", { class: "muted" }, status === "locked"
        ? "The server asks for a key before it tells its state."
        : "The server cannot be reached. It is asked again from time to time."));
    } else {
      inner.append(arena(state.arena), queue(state.queue), llm(state.llm), rates(state.rates), about(state));
    }
    this.panel.replaceChildren(inner);
  }
}

function cell(name, ...children) {
  return el("div", { class: "cell" }, el("h2", {}, name), ...children);
}

const waiting = () => el("p", { class: "muted" }, "not loaded yet");

// A bar of shares of a whole; widths are set on the element, which a strict policy allows where an attribute is not.
function bar(label, parts) {
  const element = el("div", { class: "gauge", role: "img", "aria-label": label });
  for (const [kind, share] of parts) {
    const part = el("span", { class: kind });
    part.style.width = `${Math.min(100, Math.max(0, share * 100))}%`;
    element.append(part);
  }
  return element;
}

function dots(label, full, all) {
  return el("div", { class: "slots", role: "img", "aria-label": label },
    Array.from({ length: Math.min(all, 64) }, (_, place) => el("span", { class: place < full ? "slot busy" : "slot" })));
}

function arena(state) {
  if (!state) return cell("Fast memory", waiting());
  const held = `${bytes(state.resident_bytes)} of ${bytes(state.bytes)}`;
  return cell("Fast memory",
    bar(`${held} hold lists, ${bytes(state.moving_bytes)} are being filled`,
      [["resident", state.resident_bytes / state.bytes], ["moving", state.moving_bytes / state.bytes]]),
    el("p", { class: "figure" }, held),
    el("p", { class: "muted" },
      `${counted(state.lists_resident, "list")}, ${count(state.lists_moving)} moving, ${count(state.references)} in use`));
}

function queue(state) {
  if (!state) return cell("Requests", waiting());
  return cell("Requests",
    bar(`${count(state.waiting)} of ${count(state.limit)} places in the queue are taken`,
      [["queued", state.limit ? state.waiting / state.limit : 0]]),
    el("p", { class: "figure" }, `${count(state.running)} running`),
    el("p", { class: "muted" }, `${count(state.waiting)} waiting; room for ${count(state.limit)}`));
}

function llm(state) {
  if (!state) return cell("LLM", waiting());
  if (!state.slots) return cell("LLM", el("p", { class: "muted" }, "runs elsewhere; it does not tell"));
  return cell("LLM",
    dots(`${count(state.running)} of ${counted(state.slots, "slot")} are writing`, state.running, state.slots),
    el("p", { class: "figure" }, `${count(state.running)} of ${counted(state.slots, "slot")}`),
    el("p", { class: "muted" }, `${count(state.waiting)} waiting for one`));
}

function rates(state) {
  if (!state) return cell("Rates", waiting());
  const rows = [
    ["tokens", `${state.tokens_per_s.toFixed(1)} /s`],
    ["requests", `${state.requests_per_s.toFixed(2)} /s`],
    ["link", `${bytes(state.link_bytes_per_s)}/s`],
    ["hits", state.hit_ratio === null ? "–" : percent(state.hit_ratio)],
  ];
  return cell(`Last ${state.window_s} s`, el("dl", { class: "rates" },
    rows.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))));
}

function about(state) {
  const index = state.index;
  const parts = [
    state.model && `LLM ${state.model}`,
    state.embedder && `embeddings ${state.embedder}`,
    index && `${counted(index.passages, "passage")} in ${counted(index.lists, "list")}, ${bytes(index.bytes)}`,
    state.lookahead && `${counted(state.lookahead.rounds, "round")} of lookahead under way`,
    `telerag ${state.version}`,
    `up ${duration(state.uptime_s)}`,
  ];
  return el("p", { class: "about muted" }, parts.filter(Boolean).join(" · "));
}
