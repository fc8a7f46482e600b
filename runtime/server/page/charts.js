// Where the time went, and which way every candidate went.

const SVG = "http://www.w3.org/2000/svg";
const BEST = 5; // threads that are drawn strong

export function milliseconds(ms) {
  if (ms >= 1000) return `${(ms / 1000).toFixed(2)} s`;
  if (ms >= 100) return `${ms.toFixed(0)} ms`;
  return `${ms.toFixed(ms >= 10 ? 1 : 2)} ms`;
}

/** Fill the stacked bar and its legend; stages that took no time are left out. */
export function drawStages(bar, legend, stages, total) {
  const parts = [...stages].filter(([, ms]) => ms >= 0.005);
  const sum = parts.reduce((all, [, ms]) => all + ms, 0);
  if (total - sum > 0.02 * total) parts.push(["other", total - sum]);
  bar.replaceChildren(
    ...parts.map(([name, ms]) => {
      const part = document.createElement("i");
      part.dataset.stage = name;
      part.style.flexGrow = ms;
      return part;
    }),
  );
  legend.replaceChildren(
    ...parts.map(([name, ms]) => {
      const item = document.createElement("li");
      const dot = document.createElement("i");
      dot.dataset.stage = name;
      const time = document.createElement("b");
      time.textContent = milliseconds(ms);
      item.append(dot, `${name} `, time);
      return item;
    }),
  );
}

/** Draw a thread from each candidate's place before to its place after, in pixels of the drawing. */
export function drawThreads(svg, order, isAnimated) {
  const { width, height } = svg.getBoundingClientRect();
  const step = width / order.length;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const paths = order.map((index, place) => {
    const path = document.createElementNS(SVG, "path");
    const [from, to] = [(index + 0.5) * step, (place + 0.5) * step];
    path.setAttribute("d", `M${from} 0C${from} ${height * 0.5} ${to} ${height * 0.5} ${to} ${height}`);
    path.setAttribute("pathLength", "1"); // so that one dash is all of it
    path.dataset.index = index;
    path.style.setProperty("--place", place);
    path.classList.toggle("best", place < BEST);
    path.classList.toggle("drawn", place < BEST && isAnimated);
    return path;
  });
  svg.replaceChildren(...paths.reverse()); // the best lies on top
}
