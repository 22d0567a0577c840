// The conversation on the page: each turn, how it is answered, and what is under it.

import { ask, Failure } from "./api.js";
import { showAnswer, sources } from "./answer.js";
import { kept, otherThan, runName, verdict } from "./compare.js";
import { announce, el, freshId } from "./dom.js";
import { capital, count, counted, seconds, small, stageName } from "./format.js";
import { pipelineOf } from "./settings.js";
import { ASKING, DONE, FAILED, STOPPED } from "./store.js";
import { dataTable, summary, timelines } from "./timeline.js";

const UNREADABLE = "The server sent something that is no answer.";
const FOLLOWED = 160;
const NOTHING = { passages: [], citations: [] };

// One streamed answer. `told` is called as it comes: {stage}, {written}, {stages}; returns {text, finish, result}.
async function streamed(body, signal, told) {
  const stages = new Map();
  let text = "";
  let finish = null;
  let result = null;
  try {
    for await (const chunk of ask(body, signal)) {
      const choice = chunk.choices?.[0];
      const ours = chunk.telerag;
      if (ours?.event === "queued") {
        told({ progress: ours.position ? `Waiting in the queue, ${count(ours.position)} before it…` : "Asked…" });
      }
      if (ours?.event === "stage") told({ progress: `Writing ${stageName(ours.stage)}…` });
      if (ours?.event === "retrieving") told({ progress: "Retrieving…" });
      if (ours?.event === "retrieved") told({ progress: `Reading ${counted(ours.passages.length, "passage")}…` });
      if (ours?.event === "text") {
        stages.set(ours.stage, ours.text);
        told({ stages });
      }
      if (choice?.delta?.content) {
        text += choice.delta.content;
        told({ written: text });
      }
      if (choice?.finish_reason) {
        finish = choice.finish_reason;
        result = ours;
      }
    }
  } catch (failure) {
    throw Object.assign(failure, { written: text });
  }
  if (!result) throw Object.assign(new Failure(UNREADABLE), { written: text });
  return { text, finish, result };
}

const requestOf = (turn, messages, lookahead, fresh) => ({
  model: turn.model, messages, telerag: { lookahead, timeline: true, events: true, ...(fresh && { fresh }) },
});

export class ConversationView {
  // `kept` holds the turns; `panel` shows passages; `onBusy(stop)` is told what stops the answer under way, or null;
  // `askKey(message)` resolves to whether there is a new key; `onTrouble` is called when the server may be gone.
  constructor(place, kept, { panel, onBusy, askKey, onTrouble }) {
    this.place = place;
    this.kept = kept;
    this.panel = panel;
    this.onBusy = onBusy;
    this.askKey = askKey;
    this.onTrouble = onTrouble;
    this.busy = false;
    this.show();
  }

  show() {
    this.place.replaceChildren(...this.kept.turns.map((turn) => this.element(turn)));
  }

  async ask(turn) {
    this.kept.turns.push(turn);
    const element = this.element(turn);
    this.place.append(element);
    await this.answer(turn, element);
  }

  // Everything that has the server answer goes through here: one at a time, stoppable, and again after a key was given.
  // A `fresh` one finds neither prompts nor lists of earlier answers, so that its times can be compared.
  async run(turn, lookahead, told, { fresh = false } = {}) {
    const controller = new AbortController();
    this.setBusy(true);
    this.onBusy(() => controller.abort());
    try {
      for (;;) {
        try {
          return await streamed(requestOf(turn, this.kept.messagesFor(turn), lookahead, fresh), controller.signal, told);
        } catch (failure) {
          if (controller.signal.aborted) return { stopped: true, text: failure.written ?? "" };
          if (failure.needsKey && (await this.askKey(failure.message))) continue;
          const known = failure instanceof Failure;
          if (!known || failure.status === 0 || failure.status >= 500) this.onTrouble();
          const wait = failure.retryAfterS ? ` Try again in ${Math.ceil(failure.retryAfterS)} s.` : "";
          return { failed: `${known ? failure.message : UNREADABLE}${wait}`, text: failure.written ?? "" };
        }
      }
    } finally {
      this.setBusy(false);
      this.onBusy(null);
    }
  }

  setBusy(busy) {
    this.busy = busy;
    for (const button of this.place.querySelectorAll("[data-when-free]")) button.disabled = busy;
  }

  async answer(turn, element) {
    Object.assign(turn, { status: ASKING, text: "", finish: null, result: null, failure: null, comparison: null });
    this.kept.save();
    const live = this.live(element);
    element.scrollIntoView({ block: "start" });
    announce("Asked.");
    const ended = await this.run(turn, turn.lookahead, live);
    turn.text = ended.text;
    if (ended.stopped) turn.status = STOPPED;
    else if (ended.failed) Object.assign(turn, { status: FAILED, failure: { message: ended.failed } });
    else Object.assign(turn, { status: DONE, finish: ended.finish, result: ended.result });
    this.kept.save();
    // A new conversation may have begun meanwhile.
    if (!element.isConnected) return;
    element.replaceWith(this.element(turn));
    announce(turn.status === DONE ? `Answer: ${turn.text}` : turn.status === STOPPED ? "Stopped." : turn.failure.message);
  }

  // Shows in `element` what comes of an answer; what it returns is told.
  live(element) {
    const progress = el("p", { class: "progress" }, el("span", { class: "pulse", "aria-hidden": "true" }), el("span", {}, "Asking…"));
    const text = el("div", { class: "answer", "aria-busy": "true" });
    const before = el("div", { class: "stage-list" });
    const stageBox = el("details", { class: "stages", hidden: true }, el("summary", {}, "What the LLM writes first"), before);
    element.querySelector(".turn-body").replaceChildren(progress, stageBox, text);
    let frame = 0;
    let written = "";
    return (news) => {
      if (news.progress) {
        progress.lastChild.textContent = news.progress;
        announce(news.progress);
      }
      if (news.stages) {
        stageBox.hidden = false;
        before.replaceChildren(...[...news.stages].map(([name, words]) => stageEntry(name, "", words)));
      }
      if (news.written === undefined) return;
      written = news.written;
      progress.hidden = true;
      frame ||= requestAnimationFrame(() => {
        frame = 0;
        showAnswer(text, written, NOTHING);
        follow(text);
      });
    };
  }

  element(turn) {
    const heading = freshId("question");
    const body = el("div", { class: "turn-body" });
    const element = el("article", { class: "turn", "aria-labelledby": heading, "data-status": turn.status },
      el("h2", { id: heading, class: "asked" }, turn.question), body);
    if (turn.status === ASKING) return element;
    if (turn.text) {
      const answer = el("div", { class: "answer" });
      const known = turn.result ?? NOTHING;
      showAnswer(answer, turn.text, known, (passage, button) => this.panel.open(passage, known.passages, button));
      body.append(answer);
    }
    if (turn.status === DONE) this.done(turn, element, body);
    else body.append(this.failure(turn, element));
    return element;
  }

  failure(turn, element) {
    const stopped = turn.status === STOPPED;
    return el("div", { class: stopped ? "failure stopped" : "failure" },
      el("p", {}, stopped ? "Stopped." : turn.failure.message),
      el("button", { type: "button", class: "secondary", "data-when-free": true, click: () => this.again(turn, element) },
        stopped ? "Ask again" : "Retry"));
  }

  async again(turn, element) {
    if (this.busy) return;
    const fresh = this.element({ ...turn, status: ASKING });
    element.replaceWith(fresh);
    await this.answer(turn, fresh);
  }

  done(turn, element, body) {
    const result = turn.result;
    if (result.passages.length) body.append(sources(result, (passage, button) => this.panel.open(passage, result.passages, button)));
    body.append(el("p", { class: "meta" }, meta(turn)));
    const seen = el("section", { class: "seen", "aria-label": "How it came about" });
    body.append(seen);
    this.under(turn, element, seen);
  }

  // The timeline, or both after a comparison, and what else there is to read and to do.
  under(turn, element, seen) {
    const { result } = turn;
    const runs = result.timeline && turn.comparison;
    seen.replaceChildren();
    if (runs) {
      const { said, note } = verdict(runs);
      // The turn's own way of looking ahead comes first, whichever was asked last.
      const shown = [...runs].sort((one, other) => (other.lookahead === turn.lookahead) - (one.lookahead === turn.lookahead));
      const drawn = shown.map((run) => ({ name: runName(run.lookahead), timeline: run.result.timeline }));
      seen.append(el("p", { class: "verdict" }, said), note && el("p", { class: "muted small" }, note), timelines(drawn));
      for (const run of shown) seen.append(el("p", { class: "summary" }, el("b", {}, `${runName(run.lookahead)}: `), summary(run.result)));
      for (const run of drawn) seen.append(dataTable(run.timeline, run.name));
      for (const run of shown.filter((each) => each.text !== turn.text)) {
        seen.append(el("details", {}, el("summary", {}, `The answer with lookahead ${run.lookahead}`),
          el("p", { class: "stage-text" }, run.text)));
      }
    } else if (result.timeline) {
      seen.append(timelines([{ name: "", timeline: result.timeline }]), el("p", { class: "summary" }, summary(result)),
        dataTable(result.timeline, ""));
    }
    seen.append(writing(turn));
    if (!result.timeline) return;
    // After a comparison the older of the two can be asked again, for the first of all may have had an easier start.
    const next = runs ? runs[0].lookahead : otherThan(turn.lookahead);
    const words = runs ? `Ask again with lookahead ${next}` : `Compare with lookahead ${next === "off" ? "off" : "on"}`;
    const actions = el("div", { class: "actions" });
    actions.append(el("button", { type: "button", class: "secondary", "data-when-free": true,
      click: () => this.compare(turn, next, element, seen, actions) }, words));
    seen.append(actions);
  }

  async compare(turn, lookahead, element, seen, actions) {
    if (this.busy) return;
    const words = el("span", {}, `Asking again with lookahead ${lookahead}…`);
    actions.replaceChildren(el("p", { class: "progress" }, el("span", { class: "pulse", "aria-hidden": "true" }), words));
    announce(words.textContent);
    const ended = await this.run(turn, lookahead, (news) => {
      if (news.progress) words.textContent = `With lookahead ${lookahead}: ${small(news.progress)}`;
      else if (news.written !== undefined) words.textContent = `With lookahead ${lookahead}: writing the answer…`;
    }, { fresh: true });
    if (ended.result) {
      const before = turn.comparison?.[1] ?? kept(turn.lookahead, turn.text, turn.result);
      turn.comparison = [before, kept(lookahead, ended.text, ended.result)];
      this.kept.save();
    }
    if (!element.isConnected) return;
    this.under(turn, element, seen);
    if (ended.result) {
      announce(verdict(turn.comparison).said);
      seen.querySelector(".verdict").scrollIntoView({ block: "nearest" });
    } else {
      const said = ended.stopped ? "The comparison was stopped." : ended.failed;
      seen.querySelector(".actions").append(el("p", { class: "failure-line" }, said));
      announce(said);
    }
  }
}

function meta(turn) {
  const { result } = turn;
  const last = result.stages.at(-1);
  const took = result.timings.total_s;
  return [
    pipelineOf(turn.model),
    `lookahead ${turn.lookahead}`,
    took !== undefined && seconds(took),
    last && `${counted(result.stages.reduce((sum, stage) => sum + stage.completion_tokens, 0), "token")} written`,
    turn.finish === "length" && "cut at the limit of tokens",
    result.dropped_passages > 0 && `${counted(result.dropped_passages, "passage")} did not fit the prompt`,
  ].filter(Boolean).join(" · ");
}

function stageEntry(name, figures, text) {
  return el("div", { class: "stage-entry" },
    el("h3", {}, capital(stageName(name)), figures && el("span", { class: "muted" }, ` ${figures}`)),
    el("p", { class: "stage-text" }, text));
}

// What the LLM wrote on the way to the answer, and what was searched for.
function writing(turn) {
  const { stages, queries } = turn.result;
  const entries = stages.filter((stage) => stage.text.trim() !== turn.text.trim()).map((stage) => stageEntry(stage.name,
    `${count(stage.completion_tokens)} tokens in ${seconds(stage.prefill_s + stage.decode_s)}`, stage.text));
  const searched = queries.flat().map((query) => el("li", {}, query));
  return el("details", { class: "stages" }, el("summary", {}, "What the LLM wrote, and what was searched for"),
    el("div", { class: "stage-list" }, entries,
      searched.length > 0 && el("div", { class: "stage-entry" },
        el("h3", {}, "Searched for"), el("ul", { class: "queries" }, searched)),
      !entries.length && !searched.length && el("p", { class: "muted" }, "Nothing but the answer.")));
}

// Keeps the end of the text in sight while somebody reads along, and leaves alone who has scrolled away.
function follow(text) {
  const below = text.getBoundingClientRect().bottom - document.querySelector(".dock").getBoundingClientRect().top + 24;
  if (below > 0 && below < FOLLOWED) scrollBy({ top: below });
}
