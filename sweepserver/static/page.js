// A sweep's or a run's page: fetches its data, puts the parts in place, draws the figures, comes back while it is live.
"use strict";

const page = document.getElementById("page");
let order = null; // [column, ascending] of the runs table
let drawn = {};

function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function draw(element, figure) {
  const text = JSON.stringify(figure).replaceAll("#222222", css("--text")); // black on white, as drawn for paper
  if (drawn[element.dataset.figure || element.dataset.curve] === text) return; // unchanged: keep zoom and selection
  drawn[element.dataset.figure || element.dataset.curve] = text;
  figure = JSON.parse(text);
  const axis = { gridcolor: css("--line"), zerolinecolor: css("--line"), linecolor: css("--line"), automargin: true };
  const layout = Object.assign({}, figure.layout, {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true,
    font: { family: "system-ui, sans-serif", size: 12, color: css("--text") },
    xaxis: Object.assign({}, axis, (figure.layout || {}).xaxis), yaxis: Object.assign({}, axis, (figure.layout || {}).yaxis),
  });
  element.style.height = `${layout.height}px`;
  Plotly.react(element, figure.data, layout, { displaylogo: false, responsive: true, displayModeBar: false });
}

function sortTable() {
  const table = document.getElementById("runs");
  if (!table) return;
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.onclick = () => {
      const descendingFirst = head.classList.contains("metric");
      order = order && order[0] === column ? [column, !order[1]] : [column, !descendingFirst];
      sortTable();
    };
    if (order && order[0] === column) head.setAttribute("aria-sort", order[1] ? "ascending" : "descending");
    else head.removeAttribute("aria-sort");
  });
  if (!order) return;
  const [column, ascending] = order;
  const key = (row) => {
    const cell = row.cells[column];
    return cell.dataset.value !== undefined ? cell.dataset.value : cell.textContent.trim();
  };
  const rows = [...table.tBodies[0].rows];
  const compare = (a, b) => {
    const x = key(a), y = key(b);
    if ((x === "") !== (y === "")) return x === "" ? 1 : -1; // unknown ones last, both ways
    const numbers = x !== "" && y !== "" && isFinite(x) && isFinite(y);
    const sign = numbers ? x - y : x.localeCompare(y);
    return ascending ? sign : -sign;
  };
  rows.sort(compare).forEach((row) => table.tBodies[0].append(row));
}

function show(data) {
  for (const [name, html] of Object.entries(data.parts)) {
    const part = document.querySelector(`[data-part="${name}"]`);
    if (!part || part.innerHTML === html) continue;
    const box = part.querySelector(".console, .scroll");
    const place = box && [box.scrollTop, box.scrollHeight - box.scrollTop - box.clientHeight < 30];
    part.innerHTML = html; // made by the server's escaping templates
    const fresh = part.querySelector(".console, .scroll");
    if (fresh && place) fresh.scrollTop = place[1] && fresh.matches(".console") ? fresh.scrollHeight : place[0];
  }
  sortTable();
  let any = false;
  for (const [name, figure] of Object.entries(data.figures || {})) {
    const card = document.querySelector(`[data-card="${name}"]`);
    card.hidden = !figure;
    any = any || !!figure;
    if (figure) draw(card.querySelector("[data-figure]"), figure);
  }
  const none = document.getElementById("no-figures");
  if (none) none.hidden = any;
  const curves = document.getElementById("curves");
  if (curves && data.curves) {
    curves.closest("[data-card]").hidden = !Object.keys(data.curves).length;
    for (const [name, figure] of Object.entries(data.curves)) {
      let element = [...curves.children].find((child) => child.dataset.curve === name);
      if (!element) {
        element = document.createElement("div");
        element.dataset.curve = name;
        curves.append(element);
      }
      draw(element, figure);
    }
    document.getElementById("left-out").textContent = data.left_out > 0 ? `${data.left_out} more metrics are not drawn.` : "";
  }
  page.dataset.shown = String(Number(page.dataset.shown || 0) + 1);
}

let timer;

async function refresh() {
  clearTimeout(timer); // a change of the color scheme must not begin a second chain
  let wait = 3000;
  try {
    const answer = await fetch(page.dataset.source, { headers: { Accept: "application/json" } });
    if (answer.status === 401) return location.reload();
    if (answer.ok) {
      const data = await answer.json();
      show(data);
      if (!data.live) return;
      if (document.hidden) wait = 10000;
    }
  } catch (error) {
    console.error(error); // the server restarts: try again
    wait = 5000;
  }
  timer = setTimeout(refresh, wait);
}

refresh();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { drawn = {}; refresh(); });
