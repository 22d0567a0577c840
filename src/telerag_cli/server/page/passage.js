// The panel that shows one passage: beside the conversation, or over it where there is no room.

import { titleOf } from "./answer.js";
import { byId, el } from "./dom.js";

const NARROW = matchMedia("(max-width: 47.99rem)");

// An address to follow, if the value is one and nothing else.
function address(value) {
  if (typeof value !== "string" || !/^https?:\/\/\S+$/i.test(value)) return null;
  try {
    return new URL(value).href;
  } catch {
    return null;
  }
}

function shown(value) {
  const href = address(value);
  if (href) return el("a", { href, target: "_blank", rel: "noopener noreferrer" }, value);
  return typeof value === "string" ? value : JSON.stringify(value);
}

export class PassagePanel {
  constructor() {
    this.dialog = byId("passage");
    this.opener = null;
    this.dialog.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      event.preventDefault();
      this.close();
    });
    this.dialog.addEventListener("cancel", (event) => {
      event.preventDefault();
      this.close();
    });
    // Outside of the sheet is the dialog's backdrop, which belongs to the dialog itself.
    this.dialog.addEventListener("click", (event) => event.target === this.dialog && this.close());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.dialog.open && !event.defaultPrevented) this.close();
    });
  }

  open(passage, passages, opener) {
    this.opener = opener ?? this.opener;
    const place = passages.indexOf(passage);
    const step = (by, label, sign) => {
      const next = passages[place + by];
      return el("button", { type: "button", class: "plain", "aria-label": label, disabled: !next,
        click: () => this.open(next, passages) }, sign);
    };
    const heading = el("h2", { id: "passage-title", tabindex: "-1" }, titleOf(passage));
    const metadata = Object.entries(passage.metadata ?? {});
    this.dialog.replaceChildren(el("div", { class: "passage-inner" },
      el("div", { class: "passage-bar" },
        el("span", { class: "muted" }, `Source ${passage.rank} of ${passages.length}`),
        el("span", { class: "grow" }),
        step(-1, "Previous source", "‹"), step(1, "Next source", "›"),
        el("button", { type: "button", class: "plain", "aria-label": "Close", click: () => this.close() }, "✕")),
      heading,
      el("dl", { class: "pairs" },
        el("div", {}, el("dt", {}, "id"), el("dd", {}, passage.id)),
        el("div", {}, el("dt", {}, "score"), el("dd", {}, passage.score.toPrecision(6)))),
      el("p", { class: "passage-text" }, passage.text),
      metadata.length > 0 && el("h3", {}, "Metadata"),
      metadata.length > 0 && el("dl", { class: "pairs" },
        metadata.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, shown(value)))))));
    if (!this.dialog.open) {
      if (NARROW.matches) this.dialog.showModal();
      else this.dialog.show();
    }
    document.body.classList.add("with-passage");
    this.dialog.scrollTop = 0;
    heading.focus();
  }

  close() {
    if (!this.dialog.open) return;
    this.dialog.close();
    document.body.classList.remove("with-passage");
    const back = this.opener?.isConnected ? this.opener : byId("question");
    back.focus();
  }
}
