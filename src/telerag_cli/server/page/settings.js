// What a person chooses: pipeline, lookahead, theme, key. Choices stay in this browser; the key stays in this tab.

import { apiKey, useKey } from "./api.js";
import { byId, el } from "./dom.js";
import { LOOKAHEADS, pipelineHint } from "./format.js";

const THEMES = ["system", "light", "dark"];
const PREFIX = "telerag-";
const USUAL = "telerag-hyde";

function kept(name) {
  try {
    return localStorage.getItem(`telerag.${name}`);
  } catch {
    return null;
  }
}

function keep(name, value) {
  try {
    if (value === null) localStorage.removeItem(`telerag.${name}`);
    else localStorage.setItem(`telerag.${name}`, value);
  } catch {
    // Chosen again next time.
  }
}

export const pipelineOf = (model) => (model.startsWith(PREFIX) ? model.slice(PREFIX.length) : model);

export class Choices {
  constructor() {
    this.pipeline = byId("pipeline");
    this.lookaheads = byId("lookahead");
    const before = kept("lookahead");
    if (before !== null && before in LOOKAHEADS) this.lookaheads.value = before;
    this.pipeline.addEventListener("change", () => {
      keep("model", this.pipeline.value);
      this.hint();
    });
    this.lookaheads.addEventListener("change", () => {
      keep("lookahead", this.lookaheads.value);
      this.hint();
    });
    this.hint();
  }

  get model() {
    return this.pipeline.value;
  }

  get lookahead() {
    return this.lookaheads.value;
  }

  offer(models) {
    const wanted = [this.pipeline.value, kept("model"), USUAL, models[0]].find((model) => models.includes(model));
    this.pipeline.replaceChildren(...models.map((model) => el("option", { value: model }, pipelineOf(model))));
    if (wanted) this.pipeline.value = wanted;
    this.pipeline.disabled = models.length === 0;
    this.hint();
  }

  hint() {
    const pipeline = pipelineOf(this.pipeline.value);
    const said = pipelineHint(pipeline);
    // Before its search nothing is written, unless a question leans on earlier ones.
    const ahead = pipeline === "naive" ? "lookahead has time only for a question that leans on earlier ones" : LOOKAHEADS[this.lookahead];
    byId("hint").textContent = said ? `${pipeline} ${said}; ${ahead}.` : "";
  }
}

export class Theme {
  constructor() {
    this.button = byId("theme");
    this.chosen = kept("theme") ?? "system";
    this.button.addEventListener("click", () => {
      this.chosen = THEMES[(THEMES.indexOf(this.chosen) + 1) % THEMES.length];
      keep("theme", this.chosen === "system" ? null : this.chosen);
      this.show();
    });
    this.show();
  }

  show() {
    if (this.chosen === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = this.chosen;
    this.button.replaceChildren(
      el("span", { "aria-hidden": "true" }, { system: "◐", light: "○", dark: "●" }[this.chosen] ?? "◐"),
      el("span", { class: "unseen" }, `Theme: ${this.chosen}`));
    this.button.title = `Theme: ${this.chosen}`;
  }
}

// Asks for the key; resolves to whether one was given. Everybody who asks meanwhile gets the same answer.
export class KeyDialog {
  constructor() {
    this.dialog = byId("key");
    this.asked = null;
    byId("key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      const value = byId("key-value").value.trim();
      if (!value) return;
      useKey(value);
      this.end(true);
    });
    byId("key-cancel").addEventListener("click", () => this.end(false));
    this.dialog.addEventListener("cancel", (event) => {
      event.preventDefault();
      this.end(false);
    });
  }

  ask(said) {
    if (this.asked) return this.asked.promise;
    const asked = {};
    asked.promise = new Promise((resolve) => (asked.resolve = resolve));
    this.asked = asked;
    byId("key-said").textContent = apiKey() ? `The key was not accepted: ${said}` : said;
    byId("key-value").value = "";
    this.dialog.showModal();
    byId("key-value").focus();
    return asked.promise;
  }

  end(given) {
    this.dialog.close();
    byId("key-value").value = "";
    const asked = this.asked;
    this.asked = null;
    asked?.resolve(given);
  }
}
