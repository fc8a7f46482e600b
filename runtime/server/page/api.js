// What the page asks of the server: the same routes as everybody, with the visitor's key.

const KEY = "edje-key";
const MOST_AT_ONCE = 6;

export const needsKey = document.documentElement.dataset.needsKey === "yes";

/** A request that the server refused, in its own words. */
export class Refused extends Error {
  constructor(status, message, { retryAfter = null, requestId = null } = {}) {
    super(message);
    Object.assign(this, { status, retryAfter, requestId });
  }
}

export function key() {
  return needsKey ? sessionStorage.getItem(KEY) : null;
}

export function keepKey(value) {
  if (value) sessionStorage.setItem(KEY, value);
  else sessionStorage.removeItem(KEY);
  forgetPictures();
}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (key()) headers.authorization = `Bearer ${key()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server cannot be reached.");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new Refused(response.status, body?.message ?? `${response.status} ${response.statusText}`, {
    retryAfter: response.headers.get("retry-after"),
    requestId: response.headers.get("x-request-id"),
  });
}

export async function info() {
  return (await ask("info")).json();
}

export async function drawCandidates(count, seed) {
  return (await ask(`page/candidates?count=${count}&seed=${seed}`)).json();
}

/** Rank `ids` for a query: {scores: [{index, logit}], errors, warnings, stages, total, trip}. */
export async function rerank(query, ids, signal) {
  const began = performance.now();
  const response = await ask("v2/rerank", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ query, documents: ids, raw_scores: true }),
    signal,
  });
  const body = await response.json();
  const trip = performance.now() - began;
  const stages = serverTiming(response.headers.get("server-timing") ?? "");
  const total = stages.get("total") ?? trip;
  stages.delete("total");
  return {
    scores: body.results.map((one) => ({ index: one.index, logit: one.relevance_score })),
    errors: new Map((body.errors ?? []).map((one) => [one.index, one.message])),
    warnings: body.meta?.warnings ?? [],
    stages,
    total,
    trip,
  };
}

/** "a;dur=1.5, b;dur=2" -> Map {a => 1.5, b => 2}, milliseconds. */
function serverTiming(header) {
  const found = [...header.matchAll(/([\w-]+)\s*;[^,]*?dur=([\d.]+)/g)];
  return new Map(found.map(([, name, ms]) => [name, Number(ms)]));
}

// Pictures. Without keys an <img> asks by itself; with one they are fetched, and shown as blobs.

let kept = new Map(); // path -> promise of a URL
let running = 0;
const waiting = [];

function pathOf(id, width) {
  const path = id.split("/").map(encodeURIComponent).join("/");
  return `images/${path}?w=${width}`;
}

export async function pictureUrl(id, width) {
  const path = pathOf(id, width);
  if (!key()) return path;
  if (!kept.has(path)) kept.set(path, fetchPicture(path));
  return kept.get(path);
}

async function fetchPicture(path) {
  if (running >= MOST_AT_ONCE) await new Promise((go) => waiting.push(go));
  running += 1;
  try {
    const response = await ask(path);
    return URL.createObjectURL(await response.blob());
  } finally {
    running -= 1;
    waiting.shift()?.();
  }
}

export function forgetPictures() {
  for (const url of kept.values()) url.then(URL.revokeObjectURL, () => {});
  kept = new Map();
}
