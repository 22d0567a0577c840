// Numbers and names in words.

const group = new Intl.NumberFormat("en");

export const count = (number) => group.format(number);

export const counted = (number, one, many = `${one}s`) => `${count(number)} ${number === 1 ? one : many}`;

export function bytes(number) {
  let value = number;
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (value < 1024) return `${unit === "B" ? Math.round(value) : value.toFixed(value < 10 ? 2 : value < 100 ? 1 : 0)} ${unit}`;
    value /= 1024;
  }
  return `${value.toFixed(2)} TiB`;
}

// Three significant digits.
export function seconds(value) {
  const size = Math.abs(value);
  if (size === 0) return "0 s";
  if (size < 0.001) return `${Number((value * 1e6).toPrecision(2))} µs`;
  if (size < 0.9995) return `${Number((value * 1e3).toPrecision(3))} ms`;
  return `${size < 99.95 ? value.toPrecision(3) : value.toFixed(0)} s`;
}

export const percent = (share) => `${(share * 100).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;

export function duration(value) {
  const whole = Math.floor(value);
  const [days, hours, minutes] = [Math.floor(whole / 86400), Math.floor(whole / 3600) % 24, Math.floor(whole / 60) % 60];
  if (days) return `${days} d ${hours} h`;
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min ${whole % 60} s` : `${whole} s`;
}

export const capital = (words) => words.charAt(0).toUpperCase() + words.slice(1);

export const small = (words) => words.charAt(0).toLowerCase() + words.slice(1);

const STAGES = {
  __proto__: null,
  rewrite: "question in full",
  sub_questions: "sub-questions",
  judge: "judgement",
  need: "judgement whether to search",
};

// `query_2` → "query 2".
export function stageName(name) {
  const [, stem, number] = /^(.*?)(?:_(\d+))?$/.exec(name);
  const words = STAGES[stem] ?? stem.replaceAll("_", " ");
  return number ? `${words} ${number}` : words;
}

const PIPELINES = {
  __proto__: null,
  naive: "searches with the question as it is",
  hyde: "writes a passage that might answer and searches with it",
  subquestion: "breaks the question into smaller ones, and searches with all of them",
  iterative: "asks itself for the next query until it knows enough",
  iter_retgen: "searches again with its own answer, three rounds",
  flare: "searches again whenever it is unsure of a sentence",
  self_rag: "judges whether to search, answers from each passage, keeps the best",
};

export const pipelineHint = (name) => PIPELINES[name] ?? "";

export const LOOKAHEADS = {
  __proto__: null,
  refined: "lists move meanwhile, chosen anew as its text grows",
  question: "lists move meanwhile, chosen from the question alone",
  off: "lists move when the search needs them",
};
