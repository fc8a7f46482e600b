// The pictures as tiles: what stands on them, how they move, how the keyboard walks among them.

import { pictureUrl } from "./api.js";

const MOVE_MS = 720;
const EASE = "cubic-bezier(.22,.9,.24,1)";
const still = matchMedia("(prefers-reduced-motion: reduce)");

export const isStill = () => still.matches;

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

export function sigmoid(logit) {
  return 1 / (1 + Math.exp(-logit));
}

export function scoreText(logit) {
  const score = sigmoid(logit);
  if (score >= 0.0005) return score.toFixed(3);
  const [mantissa, exponent] = score.toExponential(0).split("e");
  return `${mantissa}e${exponent.replace("-", "−")}`;
}

export function logitText(logit) {
  return `${logit < 0 ? "−" : "+"}${Math.abs(logit).toFixed(2)}`;
}

/** A hue that an id always has, so that the eye can follow it. */
function hueOf(id) {
  let hash = 7;
  for (const letter of id) hash = (hash * 31 + letter.codePointAt(0)) >>> 0;
  return (hash * 137) % 360;
}

/** A picture that fills its box: a plate with the id, until and unless there is a picture. */
export function picture(id, hasPicture, { width = 320, named = true } = {}) {
  const box = element("span", "picture");
  box.style.setProperty("--hue", hueOf(id));
  if (named) {
    const cut = id.lastIndexOf("/") + 1;
    const name = element("span", "plate-name");
    if (cut) name.append(element("small", "", id.slice(0, cut)));
    name.append(id.slice(cut));
    box.append(name);
  }
  box.classList.toggle("bare", !hasPicture);
  box.ready = hasPicture ? load(box, id, width) : Promise.resolve();
  return box;
}

async function load(box, id, width) {
  const image = new Image();
  image.alt = "";
  image.decoding = "async";
  try {
    image.src = await pictureUrl(id, width);
    await image.decode();
    box.append(image);
    box.classList.add("loaded");
  } catch {
    box.classList.add("bare");
  }
}

/** One candidate. `index` is its place before, from 0. */
export function tile(id, index, hasPicture) {
  const item = element("li", "tile");
  const button = element("button", "open");
  button.type = "button";
  button.tabIndex = -1;
  const shown = picture(id, hasPicture);
  button.append(shown);
  const under = element("div", "under");
  under.setAttribute("aria-hidden", "true");
  under.append(placeLine(index + 1));
  item.append(button, under);
  Object.assign(item, { button, under, ready: shown.ready });
  item.dataset.index = index;
  button.setAttribute("aria-label", `${index + 1}: ${id}`);
  return item;
}

function placeLine(place, change) {
  const line = element("span", "place");
  line.append(element("b", "", place));
  if (change === undefined) return line;
  const word = change > 0 ? "up" : change < 0 ? "down" : "same";
  const sign = { up: "▲", down: "▼", same: "=" }[word];
  line.append(element("span", `change ${word}`, change ? `${sign} ${Math.abs(change)}` : sign));
  return line;
}

/** Write what is known of a candidate onto its tile; `place` is null where it has no score. */
export function annotate(item, { id, index, place, logit, share, why, showPlace, total }) {
  const best = place === 0;
  item.classList.toggle("best", best);
  item.classList.toggle("unranked", place === null);
  if (place === null) {
    item.under.replaceChildren(placeLine(showPlace ? "–" : index + 1), element("span", "soft", "no score"));
    item.button.setAttribute("aria-label", `${id}: no score. ${why}. It was ${index + 1}`);
    item.button.title = why;
    return;
  }
  const change = index - place;
  const bar = element("span", "share");
  bar.append(element("i"));
  bar.firstChild.style.width = `${(share * 100).toFixed(1)}%`;
  const line = element("span", "scores");
  line.append(element("b", "", scoreText(logit)), element("span", "soft", logitText(logit)));
  item.under.replaceChildren(
    placeLine((showPlace ? place : index) + 1, change), bar, line, element("span", "name", id),
  );
  const moved = change ? `${change > 0 ? "up" : "down"} ${Math.abs(change)} from ${index + 1}` : "where it was";
  item.button.setAttribute(
    "aria-label",
    `${place + 1} of ${total}, ${moved}: ${id}, score ${scoreText(logit)}, logit ${logitText(logit)}`,
  );
}

/** Put tiles into a new order; each moves from where it was to where it belongs. */
export function reorder(grid, items) {
  const focused = document.activeElement;
  const before = new Map(items.map((item) => [item, item.getBoundingClientRect()]));
  for (const item of items) for (const move of item.getAnimations()) move.cancel();
  grid.replaceChildren(...items);
  if (grid.contains(focused)) focused.focus({ preventScroll: true });
  if (isStill()) return;
  items.forEach((item, place) => {
    const from = before.get(item);
    const to = item.getBoundingClientRect();
    if (!from.width || !to.width) return;
    const [dx, dy, scale] = [from.left - to.left, from.top - to.top, from.width / to.width];
    if (Math.abs(dx) < 1 && Math.abs(dy) < 1 && Math.abs(scale - 1) < 0.01) return;
    const start = `translate(${dx}px, ${dy}px) scale(${scale})`;
    item.classList.add("moving");
    item.style.zIndex = dy > 0 ? 1 : items.length - place + 1;
    const move = item.animate(
      [{ transform: start }, { transform: "none" }],
      { duration: MOVE_MS, delay: Math.min(place * 9, 260), easing: EASE, fill: "backwards" },
    );
    const settle = () => {
      item.classList.remove("moving");
      item.style.zIndex = "";
    };
    move.finished.then(settle, settle);
  });
}

/** Let one tile be reached by Tab, and the arrows walk from it. */
export function walk(grid, onReach) {
  const buttons = () => [...grid.querySelectorAll("button.open")];
  grid.addEventListener("focusin", (event) => {
    for (const button of buttons()) button.tabIndex = button === event.target ? 0 : -1;
    onReach(event.target.closest(".tile"));
  });
  grid.addEventListener("focusout", () => onReach(null));
  grid.addEventListener("pointerover", (event) => onReach(event.target.closest(".tile")));
  grid.addEventListener("pointerleave", () => onReach(null));
  grid.addEventListener("keydown", (event) => {
    const all = buttons();
    const at = all.indexOf(document.activeElement);
    if (at < 0 || event.altKey || event.ctrlKey || event.metaKey) return;
    const next = {
      ArrowRight: () => all[at + 1],
      ArrowLeft: () => all[at - 1],
      ArrowDown: () => nextInColumn(all, at, 1),
      ArrowUp: () => nextInColumn(all, at, -1),
      Home: () => all[0],
      End: () => all.at(-1),
    }[event.key];
    if (!next) return;
    event.preventDefault();
    next()?.focus();
  });
}

/** The nearest tile of the rows below (1) or above (-1). */
function nextInColumn(all, at, way) {
  const here = all[at].getBoundingClientRect();
  const edge = way > 0 ? here.bottom : here.top;
  let best = null;
  let least = Infinity;
  for (const button of all) {
    const there = button.getBoundingClientRect();
    const down = way > 0 ? there.top - edge : edge - there.bottom;
    if (down < -1) continue;
    const far = down * 3 + Math.abs(there.left + there.width / 2 - here.left - here.width / 2);
    if (far < least) [best, least] = [button, far];
  }
  return best;
}
