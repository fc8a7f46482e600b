// The page: what was asked, what came back, and what is shown of it.

import * as api from "./api.js";
import { drawStages, drawThreads, milliseconds } from "./charts.js";
import { annotate, isStill, logitText, picture, reorder, scoreText, sigmoid, tile, walk } from "./tiles.js";

const $ = (id) => document.getElementById(id);
const WAIT_FOR_PICTURES_MS = 700;
const MOST_IDS = 1000;
const MOST_IN_LINK = 2000; // characters of own ids
const NOTHING = -9999; // the server's logit of ids that the store lacks and that rank last

const state = {
  ids: [], own: null, seed: 0, count: 48, pictures: false, numImages: 0,
  items: [], answer: null, order: [], asking: null, drawing: 0,
};

// --- what the address holds -----------------------------------------------------------------

function readLink() {
  const given = new URLSearchParams(location.hash.slice(1));
  const seed = Number(given.get("seed"));
  $("query").value = given.get("q") ?? "";
  state.seed = given.has("seed") && Number.isSafeInteger(seed) && seed >= 0 ? seed : newSeed();
  const count = Number(given.get("n"));
  state.count = count >= 1 && count <= 500 ? Math.floor(count) : 48;
  const ids = given.get("ids");
  state.own = ids ? idsIn(ids) : null;
  if (state.own) $("ids").value = state.own.join("\n");
  return $("query").value.trim() !== "";
}

function link() {
  const now = new URLSearchParams();
  if ($("query").value.trim()) now.set("q", $("query").value.trim());
  if (state.own) {
    const ids = state.own.join("\n");
    if (ids.length <= MOST_IN_LINK) now.set("ids", ids);
  } else {
    now.set("n", state.count);
    now.set("seed", state.seed);
  }
  return `#${now}`;
}

function keepLink(how) {
  if (link() !== location.hash) history[how](null, "", link());
}

const newSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];
const idsIn = (text) => text.split(/\r?\n/).map((id) => id.trim()).filter(Boolean).slice(0, MOST_IDS);

// --- what is said ---------------------------------------------------------------------------

function say(text) {
  $("said").textContent = text;
}

function showError(error, again) {
  const needsKey = error.status === 401;
  $("unlock").hidden = !(api.needsKey && (needsKey || !api.key()));
  $("error").hidden = false;
  $("error-title").textContent = { 0: "No answer", 401: "Not allowed", 429: "Busy", 504: "Out of time" }[error.status] ?? "It was refused";
  $("error-text").textContent = error.message;
  $("error-more").textContent = error.requestId ? `${error.status}, request ${error.requestId}` : "";
  $("again").hidden = ![0, 408, 429].includes(error.status) && error.status < 500; // would be refused again
  $("again").onclick = again;
  if (needsKey) $("key").focus();
}

function hideError() {
  $("error").hidden = true;
}

function busy(is) {
  document.body.classList.toggle("busy", is);
  $("grid").setAttribute("aria-busy", is);
}

// --- candidates -----------------------------------------------------------------------------

/** Take the drawn or the visitor's own ids as candidates, and show them in that order. */
async function takeCandidates() {
  hideError();
  forgetAnswer();
  for (const radio of document.getElementsByName("count")) radio.checked = !state.own && Number(radio.value) === state.count;
  if (api.needsKey && !api.key()) {
    $("unlock").hidden = false;
    $("grid").replaceChildren();
    showEmpty("Pictures come once the server knows you.");
    return false;
  }
  busy(true);
  if (!state.items.length) showSkeleton();
  const drawing = (state.drawing += 1);
  try {
    const drawn = await api.drawCandidates(state.own ? 1 : state.count, state.seed);
    if (drawing !== state.drawing) return false; // a later draw shows its own
    $("unlock").hidden = true;
    Object.assign(state, { pictures: drawn.pictures, numImages: drawn.num_images, ids: state.own ?? drawn.ids });
  } catch (error) {
    if (drawing !== state.drawing) return false;
    Object.assign(state, { ids: [], items: [] });
    $("grid").replaceChildren();
    showError(error, start);
    return false;
  } finally {
    busy(false);
  }
  showCandidates();
  return state.ids.length > 0;
}

function showSkeleton() {
  const number = Math.min(state.own?.length ?? state.count, 48);
  $("grid").replaceChildren(...Array.from({ length: number }, () => {
    const item = document.createElement("li");
    item.className = "tile skeleton";
    item.append(document.createElement("span"));
    return item;
  }));
}

function showCandidates() {
  state.items = state.ids.map((id, index) => tile(id, index, state.pictures));
  state.items.forEach((item) => item.button.addEventListener("click", () => openDetail(item)));
  if (state.items.length) state.items[0].button.tabIndex = 0;
  $("grid").replaceChildren(...state.items);
  $("empty").hidden = state.items.length > 0;
  if (!state.items.length) {
    const hasStore = state.numImages !== null;
    showEmpty(hasStore ? "The store is empty. `edje index` puts images into it." : "This server has no store of its own to draw from. Give it ids of yours.");
    if (!hasStore) openOwn(true);
    $("subtitle").textContent = "";
    return;
  }
  const number = state.ids.length.toLocaleString("en");
  $("heading").textContent = "Candidates";
  $("subtitle").textContent = state.own
    ? `${number} ids of your own, in your order`
    : `${number} of ${state.numImages.toLocaleString("en")} pictures, drawn at random`;
  say(`${number} candidates. ${$("subtitle").textContent}.`);
}

function showEmpty(text) {
  $("empty").hidden = false;
  $("empty").textContent = text;
}

function forgetAnswer() {
  state.asking?.abort();
  state.answer = null;
  document.body.classList.remove("answered");
  for (const id of ["summary", "weave", "orders"]) $(id).hidden = true;
}

// --- asking ---------------------------------------------------------------------------------

async function rerank({ keep = "pushState" } = {}) {
  const query = $("query").value.trim();
  if (!query) {
    $("query").focus();
    say("Type what the picture should show first.");
    return;
  }
  if (!state.ids.length && !(await takeCandidates())) return;
  keepLink(keep);
  hideError();
  state.asking?.abort();
  const asking = new AbortController();
  state.asking = asking;
  busy(true);
  try {
    const answer = await api.rerank(query, state.ids, asking.signal);
    const loaded = Promise.allSettled(state.items.map((item) => item.ready));
    await Promise.race([loaded, new Promise((go) => setTimeout(go, WAIT_FOR_PICTURES_MS))]);
    if (state.asking === asking) showAnswer(query, answer);
  } catch (error) {
    if (error.name !== "AbortError") {
      forgetAnswer();
      showError(error, () => rerank());
    }
  } finally {
    if (state.asking === asking) busy(false);
  }
}

function showAnswer(query, answer) {
  const ranked = answer.scores.filter((one) => one.logit > NOTHING);
  const known = new Set(ranked.map((one) => one.index));
  const rest = state.ids.map((_, index) => index).filter((index) => !known.has(index));
  state.order = [...ranked.map((one) => one.index), ...rest];
  state.answer = answer;
  const logits = ranked.map((one) => one.logit);
  const [top, span] = [logits[0], logits[0] - logits.at(-1)];
  answer.facts = new Map(ranked.map(({ index, logit }, place) => {
    const share = span > 0 ? 0.04 + (0.96 * (logit - top + span)) / span : 1;
    return [index, { place, logit, share }];
  }));
  for (const index of rest) answer.facts.set(index, { place: null, why: answer.errors.get(index) ?? "The store does not hold it" });
  document.body.classList.add("answered");
  showTimes(answer);
  showWeave();
  $("orders").hidden = false;
  document.querySelector("input[name=order][value=after]").checked = true;
  showOrder("after");
  const best = answer.facts.get(state.order[0]);
  say(best?.place === 0
    ? `${state.ids.length} pictures reranked in ${milliseconds(answer.total)}. Best: ${state.ids[state.order[0]]}, it was ${state.order[0] + 1}, score ${scoreText(best.logit)}.`
    : "None of the candidates has a score.");
  $("heading").textContent = "Reranked";
  const notes = answer.warnings.length ? ` ${answer.warnings.join("; ")}.` : "";
  $("subtitle").textContent = `Under each picture: its place, how far it moved, its score and its logit.${notes}`;
  document.title = `${query} · edje`;
}

/** Show the tiles before or after reranking. */
function showOrder(which) {
  const showPlace = which === "after";
  const total = state.ids.length;
  state.items.forEach((item, index) =>
    annotate(item, { id: state.ids[index], index, ...state.answer.facts.get(index), showPlace, total }));
  const order = showPlace ? state.order : state.ids.map((_, index) => index);
  $("grid").classList.toggle("ranked", showPlace);
  reorder($("grid"), order.map((index) => state.items[index]));
  const buttons = order.map((index) => state.items[index].button);
  if (!buttons.includes(document.activeElement)) buttons.forEach((one, at) => (one.tabIndex = at ? -1 : 0));
}

function showTimes(answer) {
  $("summary").hidden = false;
  const [figure, unit] = milliseconds(answer.total).split(" ");
  const small = document.createElement("small");
  small.textContent = ` ${unit}`;
  $("total").replaceChildren(figure, small);
  $("rate").textContent = Math.round((state.ids.length / answer.total) * 1000).toLocaleString("en");
  drawStages($("stages"), $("legend"), answer.stages, answer.total);
  $("trip").textContent = `${milliseconds(answer.trip)} from this browser and back, ${state.ids.length} candidates`;
}

function showWeave() {
  const number = state.ids.length;
  $("weave").hidden = number < 2;
  $("weave").style.setProperty("--number", number);
  $("weave-before").textContent = state.own ? "in your order" : "as drawn";
  const strip = (order) => order.map((index) => {
    const box = picture(state.ids[index], state.pictures, { named: false });
    box.dataset.index = index;
    if (state.answer.facts.get(index).place === 0) box.classList.add("best");
    return box;
  });
  $("strip-before").replaceChildren(...strip(state.ids.map((_, index) => index)));
  $("strip-after").replaceChildren(...strip(state.order));
  drawThreads($("threads"), state.order, !isStill());
}

/** Mark one candidate's thread and its two ends; null: none. */
function markThread(item) {
  const weave = $("weave");
  weave.classList.toggle("marked", item !== null);
  for (const old of weave.querySelectorAll(".on")) old.classList.remove("on");
  if (item === null) return;
  for (const part of weave.querySelectorAll(`[data-index="${item.dataset.index}"]`)) part.classList.add("on");
}

// --- one picture, large ---------------------------------------------------------------------

function openDetail(item) {
  const index = Number(item.dataset.index);
  const id = state.ids[index];
  const facts = state.answer?.facts.get(index);
  $("detail").dataset.index = index;
  $("detail-picture").replaceChildren(picture(id, state.pictures, { width: 1280 }));
  $("detail-id").textContent = id;
  const rows = [["Before", `${index + 1} of ${state.ids.length}`]];
  if (facts && facts.place !== null) {
    rows.push(["After", `${facts.place + 1} of ${state.ids.length}`], ["Score", sigmoid(facts.logit).toPrecision(4).replace("e-", "e−")], ["Logit", logitText(facts.logit)]);
  } else if (facts) rows.push(["After", `no score: ${facts.why}`]);
  $("detail-facts").replaceChildren(...rows.map(([name, value]) => {
    const row = document.createElement("div");
    row.append(Object.assign(document.createElement("dt"), { textContent: name }), Object.assign(document.createElement("dd"), { textContent: value }));
    return row;
  }));
  const shown = [...$("grid").children];
  $("detail-place").textContent = `Picture ${shown.indexOf(item) + 1} of ${shown.length}`;
  if (!$("detail").open) $("detail").showModal();
}

function stepDetail(way) {
  const shown = [...$("grid").children];
  const at = shown.findIndex((item) => item.dataset.index === $("detail").dataset.index);
  openDetail(shown[(at + way + shown.length) % shown.length]);
}

// --- the beginning --------------------------------------------------------------------------

async function showFacts() {
  try {
    const info = await api.info();
    const engines = (info.engines ?? []).map((one) => [one.backend, one.precision, one.layers && `layers ${one.layers}`].filter(Boolean).join(" "));
    const images = info.num_images === undefined ? null : `${info.num_images.toLocaleString("en")} images`;
    const facts = [engines.join(" → "), info.device, images].filter(Boolean);
    $("facts").replaceChildren(...facts.map((fact) => Object.assign(document.createElement("li"), { textContent: fact })));
    $("version").textContent = `edje-runtime ${info.version}`;
  } catch { /* what fails here fails below, too, and is said there */ }
}

async function copy(text, button, otherwise) {
  const said = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = otherwise; // only pages of https or this machine may copy
  }
  say(button.textContent);
  setTimeout(() => (button.textContent = said), 1600);
}

function openOwn(is) {
  $("own").hidden = !is;
  $("own-open").setAttribute("aria-expanded", is);
  return is;
}

async function start() {
  const asks = readLink();
  if (api.key() || !api.needsKey) showFacts();
  if ((await takeCandidates()) && asks) await rerank({ keep: "replaceState" });
}

async function again() {
  const asked = state.answer !== null;
  if (!(await takeCandidates())) return;
  if (asked) await rerank();
  else keepLink("replaceState");
}

function connect() {
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    rerank();
  });
  for (const radio of document.getElementsByName("count")) radio.addEventListener("change", () => {
    Object.assign(state, { count: Number(radio.value), own: null });
    again();
  });
  $("draw").addEventListener("click", () => {
    Object.assign(state, { seed: newSeed(), own: null });
    again();
  });
  $("own-open").addEventListener("click", () => openOwn($("own").hidden) && $("ids").focus());
  $("own-use").addEventListener("click", () => {
    const ids = idsIn($("ids").value);
    if (!ids.length) return $("ids").focus();
    state.own = ids;
    again();
  });
  $("own-drop").addEventListener("click", () => {
    state.own = null;
    again();
  });
  $("share").addEventListener("click", () => {
    keepLink("replaceState");
    copy(location.href, $("share"), "In the address");
  });
  $("unlock").addEventListener("submit", (event) => {
    event.preventDefault();
    api.keepKey($("key").value.trim());
    $("key").value = "";
    start();
  });
  for (const radio of document.getElementsByName("order")) radio.addEventListener("change", () => showOrder(radio.value));
  walk($("grid"), (item) => item?.button ? markThread(item) : markThread(null));
  $("detail-close").addEventListener("click", () => $("detail").close());
  $("detail-back").addEventListener("click", () => stepDetail(-1));
  $("detail-next").addEventListener("click", () => stepDetail(1));
  $("detail-copy").addEventListener("click", () => copy($("detail-id").textContent, $("detail-copy"), "Select it"));
  $("detail").addEventListener("click", (event) => event.target === $("detail") && $("detail").close());
  $("detail").addEventListener("close", () => state.items[Number($("detail").dataset.index)]?.button.focus());
  $("detail").addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") stepDetail(-1);
    if (event.key === "ArrowRight") stepDetail(1);
  });
  addEventListener("keydown", (event) => {
    const isTyping = event.target.closest?.("input:not([type=radio]), textarea, dialog");
    if (event.key !== "/" || isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    $("query").focus();
    $("query").select();
  });
  addEventListener("popstate", start);
  new ResizeObserver(() => state.answer && drawThreads($("threads"), state.order, false)).observe($("weave"));
}

connect();
start();
