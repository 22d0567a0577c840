// The server: fetch, its errors, and its server-sent events.

const KEY = "telerag.key";
let unkept = "";

export function apiKey() {
  try {
    return sessionStorage.getItem(KEY) ?? unkept;
  } catch {
    return unkept;
  }
}

export function useKey(value) {
  unkept = value;
  try {
    sessionStorage.setItem(KEY, value);
  } catch {
    // Kept until the page is left, then.
  }
}

export class Failure extends Error {
  constructor(message, { status = 0, code = null, retryAfterS = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfterS = retryAfterS;
  }

  get needsKey() {
    return this.status === 401;
  }
}

const UNREACHABLE = "The server cannot be reached: it has stopped, or something between here and there has. Your question is kept.";
const CUT = "The connection ended before the answer did: the server has stopped, or something between here and there has.";

async function failureOf(response) {
  const wait = Number.parseFloat(response.headers.get("retry-after"));
  const known = { status: response.status, retryAfterS: Number.isFinite(wait) ? wait : null };
  try {
    const { error } = await response.json();
    if (typeof error?.message === "string") return new Failure(error.message, { ...known, code: error.code });
  } catch {
    // Not this server's own words: a proxy answers in HTML.
  }
  return new Failure(`The server answered ${response.status} ${response.statusText}`.trim() + ".", known);
}

async function request(path, { body, signal } = {}) {
  const headers = { accept: body?.stream ? "text/event-stream" : "application/json" };
  if (body) headers["content-type"] = "application/json";
  if (apiKey()) headers.authorization = `Bearer ${apiKey()}`;
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), {
      method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body), cache: "no-store", redirect: "error",
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Failure(UNREACHABLE);
  }
  if (!response.ok) throw await failureOf(response);
  return response;
}

// Ids of the pipelines' models, in the server's order.
export async function pipelines() {
  const { data } = await (await request("v1/models")).json();
  return data.map((model) => model.id).filter((id) => id.startsWith("telerag-"));
}

export async function serverState(signal) {
  return (await request("telerag/state", { signal })).json();
}

// Chunks of a streamed answer, parsed. Throws a Failure if the server says so, or falls silent before the end.
export async function* ask(body, signal) {
  const response = await request("v1/chat/completions", { body: { ...body, stream: true }, signal });
  for await (const data of eventData(response.body, signal)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Failure(chunk.error.message, { code: chunk.error.code });
    yield chunk;
  }
  throw new Failure(CUT);
}

// The `data` of each server-sent event of a byte stream, however its bytes are cut.
export async function* eventData(stream, signal) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      rest += decoder.decode(value, { stream: !done });
      // A carriage return at the very end may be half of a line's end.
      const whole = done || !rest.endsWith("\r") ? rest : rest.slice(0, -1);
      const lines = whole.split(/\r\n|\n|\r/);
      rest = lines.pop() + rest.slice(whole.length);
      for (const line of lines) {
        if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        }
      }
      if (done) return;
    }
  } catch (error) {
    if (signal?.aborted || error instanceof Failure) throw error;
    throw new Failure(CUT);
  } finally {
    reader.cancel().catch(() => {});
  }
}
