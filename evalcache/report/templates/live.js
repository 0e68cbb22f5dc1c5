"use strict";
(() => {
  const at = (id) => document.getElementById(id);
  const box = at("ask-sql"), run = at("ask-run"), csv = at("ask-csv"), more = at("ask-more");
  const told = at("ask-status"), wrong = at("ask-error"), place = at("ask-answer");
  const ROWS_AT_ONCE = 500, LONG = 600, LOOK_AGAIN_MS = 10000;
  const KEPT = "evalcache-sql";
  let answer = null, shown = 0, busy = false;

  // What is not seen, or turns a line around, is written out: answers of models are other people's text.
  const visible = (text) => text.replace(/[\p{Cc}\p{Cf}\p{Cs}]/gu, (sign) => {
    if (sign === "\n" || sign === "\t") return sign;
    const code = sign.codePointAt(0), width = code < 256 ? 2 : code < 65536 ? 4 : 8;
    return "\\" + (width === 2 ? "x" : width === 4 ? "u" : "U") + code.toString(16).padStart(width, "0");
  });
  const make = (name, text, kind) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (kind) made.className = kind;
    return made;
  };
  const counted = (number, what) => number.toLocaleString("en") + " " + what + (number === 1 ? "" : "s");

  function cell(text, numeric) {
    if (text === null) return make("td", "NULL", "ask-null" + (numeric ? " number" : ""));
    const clear = visible(text);
    if (numeric || clear.length <= LONG) return make("td", clear, numeric ? "number" : "");
    const made = make("td"), folded = make("details");
    folded.append(make("summary", clear.slice(0, LONG / 3) + "… (" + counted(clear.length, "character") + ")"), clear);
    made.append(folded);
    return made;
  }

  function showMore() {
    const body = place.querySelector("tbody"), part = document.createDocumentFragment();
    for (const row of answer.rows.slice(shown, shown + ROWS_AT_ONCE)) {
      const line = make("tr");
      row.forEach((text, column) => line.append(cell(text, answer.numeric[column])));
      part.append(line);
    }
    body.append(part);
    shown = Math.min(shown + ROWS_AT_ONCE, answer.rows.length);
    const left = answer.rows.length - shown;
    if (left === 0 && document.activeElement === more) place.focus();
    more.hidden = left === 0;
    more.textContent = "Show " + counted(Math.min(left, ROWS_AT_ONCE), "more row") + " of " + answer.rows.length.toLocaleString("en");
  }

  function show() {
    const table = make("table"), head = make("tr"), top = make("thead");
    answer.columns.forEach((name, column) => {
      const title = make("th", visible(name), answer.numeric[column] ? "number" : "");
      title.scope = "col";
      head.append(title);
    });
    top.append(head);
    table.append(make("caption", "Answer of the query"), top, make("tbody"));
    place.replaceChildren(table);
    place.scrollTo(0, 0);
    place.hidden = answer.rows.length === 0;
    csv.hidden = answer.rows.length === 0;
    shown = 0;
    showMore();
    const parts = [counted(answer.rows.length, "row") + " in " + answer.seconds.toFixed(2) + " s"];
    if (answer.cut) parts[0] += ", cut at " + counted(answer.rows.length, "row") + ": the query has more";
    if (answer.cut_cells) parts.push(counted(answer.cut_cells, "long text") + " cut, each ends with …");
    told.textContent = parts.join("; ") + ".";
  }

  function fail(text) {
    answer = null;
    told.textContent = "";
    wrong.textContent = visible(text);
    wrong.hidden = false;
    place.hidden = csv.hidden = more.hidden = true;
  }

  async function ask() {
    if (busy) return;
    busy = true;
    run.setAttribute("aria-disabled", "true"); // not disabled: that would take the focus away
    wrong.hidden = true;
    told.textContent = "Running…";
    try { sessionStorage.setItem(KEPT, box.value); } catch { /* a browser may forbid it */ }
    try {
      const response = await fetch("/query", {
        method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ sql: box.value }),
        credentials: "same-origin", cache: "no-store", redirect: "error",
      });
      if (response.status === 403) {
        fail("This page is no longer known to its server. Open the address that evalcache ui printed last.");
      } else {
        const found = await response.json();
        if (response.ok) { answer = found; show(); } else fail(found.error);
      }
    } catch (error) {
      fail("No answer: has evalcache ui ended? (" + error.message + ")");
    } finally {
      busy = false;
      run.removeAttribute("aria-disabled");
    }
  }

  function download() {
    const quoted = (text) => (text === null ? "" : /[",\r\n]/.test(text) || text === "" ? '"' + text.replaceAll('"', '""') + '"' : text);
    const lines = [answer.columns, ...answer.rows].map((row) => row.map(quoted).join(",") + "\r\n");
    const link = make("a");
    link.href = URL.createObjectURL(new Blob(lines, { type: "text/csv;charset=utf-8" }));
    link.download = "evalcache-query.csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  }

  function fill(text) {
    box.focus();
    box.select();
    // So that Ctrl+Z brings back what stood there.
    if (!document.execCommand("insertText", false, text)) box.value = text;
  }

  run.addEventListener("click", ask);
  csv.addEventListener("click", download);
  more.addEventListener("click", showMore);
  box.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); ask(); }
  });
  for (const example of document.querySelectorAll(".ask-examples button")) {
    example.addEventListener("click", () => { fill(example.dataset.sql); ask(); });
  }
  // The query that a figure is checked with can be run here.
  for (const code of document.querySelectorAll(".check code")) {
    const [, sql] = /^evalcache query "([^]*)"$/.exec(code.textContent) ?? [];
    if (!sql) continue;
    const button = make("button", "Run it below", "ask-check");
    button.type = "button";
    button.addEventListener("click", () => { fill(sql); ask(); at("ask").scrollIntoView(); });
    code.closest(".check").append(button);
  }
  try { box.value = sessionStorage.getItem(KEPT) ?? box.value; } catch { /* as above */ }

  const state = document.querySelector(".live [data-state]");
  const news = at("live-new");
  const look = setInterval(async () => {
    if (document.hidden || !state) return;
    try {
      const response = await fetch("/state", { credentials: "same-origin", cache: "no-store", redirect: "error" });
      if (!response.ok || (await response.json()).state === state.dataset.state) return;
      news.textContent = "Runs have told more since.";
    } catch {
      news.textContent = "evalcache ui has ended.";
    }
    clearInterval(look);
  }, LOOK_AGAIN_MS);
})();
