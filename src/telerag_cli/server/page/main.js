// Puts the page together.

import { Failure, pipelines } from "./api.js";
import { ConversationView } from "./conversation.js";
import { announce, byId, el } from "./dom.js";
import { counted } from "./format.js";
import { PassagePanel } from "./passage.js";
import { Choices, KeyDialog, Theme } from "./settings.js";
import { ServerPanel } from "./state.js";
import { Conversation, newTurn } from "./store.js";

const question = byId("question"), send = byId("send"), stop = byId("stop"), welcome = byId("welcome"), notice = byId("notice");
const choices = new Choices();
const keys = new KeyDialog();
const panel = new PassagePanel();
const kept = new Conversation();
let stopNow = null;

new Theme();
kept.load();

const view = new ConversationView(byId("turns"), kept, {
  panel,
  askKey,
  onTrouble: () => server.now(),
  onBusy: (end) => {
    stopNow = end;
    send.hidden = end !== null;
    stop.hidden = end === null;
    if (end === null && document.activeElement === document.body) focusQuestion();
  },
});

const server = new ServerPanel({
  onReady: () => choices.model || offerPipelines(),
  onState: ({ index }) => {
    byId("welcome-index").textContent = index ? `${counted(index.passages, "passage")} in ${counted(index.lists, "list")}.` : "";
  },
});

async function askKey(message) {
  const given = await keys.ask(message);
  if (given) {
    server.now();
    offerPipelines();
  }
  return given;
}

async function offerPipelines() {
  try {
    choices.offer(await pipelines());
  } catch (failure) {
    if (failure.needsKey) await askKey(failure.message);
    else if (!(failure instanceof Failure)) throw failure;
    // The server's word in the bar says that it cannot be reached; it is asked again when it is ready.
  }
}

function showWelcome() {
  welcome.hidden = kept.turns.length > 0;
}

function say(words, button) {
  notice.replaceChildren(el("span", {}, words), button ?? "",
    el("button", { type: "button", class: "plain", "aria-label": "Dismiss", click: () => (notice.hidden = true) }, "✕"));
  notice.hidden = false;
  announce(words);
}

async function submit() {
  const text = question.value.trim();
  if (!text || view.busy) return;
  if (!choices.model) {
    say("The server has not said yet which pipelines it has. Your question is kept.");
    server.now();
    return;
  }
  question.value = "";
  grow();
  notice.hidden = true;
  welcome.hidden = true;
  await view.ask(newTurn(text, choices.model, choices.lookahead));
  if (!kept.keeps) say("This browser has no room to keep the conversation; it is lost when you leave the page.");
}

// Not on a telephone, where a keyboard would cover half of what there is to read.
function focusQuestion() {
  if (matchMedia("(pointer: fine)").matches) question.focus();
}

function grow() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
question.addEventListener("input", grow);
question.addEventListener("keydown", (event) => {
  // While an input method composes a word, Enter ends the word.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
stop.addEventListener("click", () => {
  stopNow?.();
  question.focus();
});
byId("new").addEventListener("click", () => {
  if (!kept.turns.length) {
    question.focus();
    return;
  }
  stopNow?.();
  panel.close();
  const before = kept.turns;
  const renew = (turns) => {
    kept.turns = turns;
    kept.save();
    view.show();
    showWelcome();
    question.focus();
  };
  renew([]);
  say("A new conversation.", el("button", { type: "button", class: "secondary", click: () => {
    renew([...before, ...kept.turns]);
    notice.hidden = true;
  } }, "Bring the old one back"));
});

showWelcome();
offerPipelines();
focusQuestion();
if (kept.turns.length) scrollTo({ top: document.body.scrollHeight, behavior: "instant" });
