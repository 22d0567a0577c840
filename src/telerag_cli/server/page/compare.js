// The same question with and without lookahead, in words.

import { count, percent, seconds } from "./format.js";

export const runName = (lookahead) => `Lookahead ${lookahead}`;

export const otherThan = (lookahead) => (lookahead === "off" ? "refined" : "off");

// What is kept of a run: {lookahead, text, result}, of the result what is drawn and told.
export function kept(lookahead, text, { timings, timeline }) {
  return { lookahead, text, result: { timings, timeline } };
}

const SAME = 0.005;
const UNEQUAL = 0.1;

function difference(what, withIt, without) {
  const saved = without - withIt;
  if (Math.abs(saved) <= SAME * without) return `${what} took the same time, ${seconds(withIt)}`;
  const share = percent(Math.abs(saved) / without);
  return saved > 0
    ? `${what} took ${seconds(saved)} less with lookahead: ${seconds(withIt)} instead of ${seconds(without)} (${share} less)`
    : `${what} took ${seconds(-saved)} longer with lookahead: ${seconds(withIt)} instead of ${seconds(without)} (${share} more)`;
}

function llm(run) {
  const bars = run.result.timeline.lanes.filter((lane) => lane.kind === "llm").flatMap((lane) => lane.bars);
  const sum = (name) => bars.reduce((total, bar) => total + bar[name], 0);
  return {
    tokens: sum("prompt_tokens"), known: sum("cached_tokens"), took: sum("prefill_s"),
    written: sum("completion_tokens"), wrote: sum("decode_s"),
  };
}

// `runs`: two of `kept`, one of them without lookahead. What differs, and what beside lookahead made it differ.
export function verdict(runs) {
  const off = runs.find((run) => run.lookahead === "off");
  const on = runs.find((run) => run !== off);
  const said = [];
  const [slow, fast] = [off, on].map((run) => run.result.timings.retrieval_s);
  if (slow !== undefined && fast !== undefined) said.push(difference("Retrieval", fast, slow));
  said.push(difference("The whole answer", on.result.timeline.total_s, off.result.timeline.total_s));
  said.push(on.text === off.text ? "Both gave the same answer" : "The answers differ, because the model did not write the same twice");
  const [there, here] = [on, off].map(llm);
  const notes = [];
  if (Math.abs(there.known - here.known) > UNEQUAL * there.tokens) {
    notes.push(`The LLM knew ${count(there.known)} of ${count(there.tokens)} prompt tokens with lookahead and ${count(here.known)} of `
      + `${count(here.tokens)} without, so reading them took ${seconds(there.took)} and ${seconds(here.took)}. `
      + "Ask again to compare equals.");
  }
  if (there.written === here.written && Math.abs(there.wrote - here.wrote) > UNEQUAL * here.wrote) {
    notes.push(`Writing took ${seconds(there.wrote)} with lookahead and ${seconds(here.wrote)} without, though it wrote as much.`);
  }
  const { lists_hit: held, lists_wanted: wanted } = off.result.timeline.counts;
  if (held) notes.push(`Without lookahead, ${count(held)} of ${count(wanted)} lists were in fast memory from before.`);
  return { said: `${said.join(". ")}.`, note: notes.join(" ") };
}
