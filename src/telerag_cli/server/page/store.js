// The conversation, kept in this browser: bounded, and of a version, so that another version's is not misread.

const PLACE = "telerag.conversation.v1";
const MOST_TURNS = 40;
const MOST_CHARACTERS = 2_000_000;
const TOLD_TURNS = 10;

export const ASKING = "asking", DONE = "done", STOPPED = "stopped", FAILED = "failed";

// What a turn is: {id, question, model, lookahead, status, text, finish, result, failure, comparison}. `result` is the
// `telerag` part of the answer; `comparison` holds two runs of the question, with and without lookahead, the older first.
export function newTurn(question, model, lookahead) {
  return { id: newId(), question, model, lookahead, status: ASKING, text: "", finish: null, result: null, failure: null, comparison: null };
}

// Not `crypto.randomUUID`: a page from another host without TLS has none.
function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export class Conversation {
  constructor() {
    this.turns = [];
    this.keeps = true;
  }

  load() {
    try {
      const kept = JSON.parse(localStorage.getItem(PLACE) ?? "null");
      this.turns = Array.isArray(kept?.turns) ? kept.turns : [];
    } catch {
      this.turns = [];
    }
    for (const turn of this.turns) {
      if (turn.status !== ASKING) continue;
      turn.status = FAILED;
      turn.failure = { message: "The page was left before this answer ended." };
    }
  }

  // Writes it down; what is too much goes, oldest first: timelines, then whole turns.
  save() {
    const kept = this.turns.slice(-MOST_TURNS).map((turn) => ({ ...turn }));
    for (let light = 0; kept.length; ) {
      const written = JSON.stringify({ turns: kept });
      if (written.length <= MOST_CHARACTERS && this.write(written)) return;
      if (light < kept.length) {
        kept[light].result &&= { ...kept[light].result, timeline: null };
        kept[light].comparison = null;
        light += 1;
      } else {
        kept.shift();
        light -= 1;
      }
    }
    this.write(JSON.stringify({ turns: [] }));
  }

  write(text) {
    try {
      localStorage.setItem(PLACE, text);
      this.keeps = true;
    } catch {
      this.keeps = false;
    }
    return this.keeps;
  }

  // What is sent to have `turn` answered: the turns before it that have an answer, and its question.
  messagesFor(turn) {
    const before = this.turns.slice(0, this.turns.indexOf(turn)).filter((each) => each.status !== FAILED && each.text.trim());
    const said = before.slice(-TOLD_TURNS).flatMap((each) => [
      { role: "user", content: each.question },
      { role: "assistant", content: each.text },
    ]);
    return [...said, { role: "user", content: turn.question }];
  }
}
