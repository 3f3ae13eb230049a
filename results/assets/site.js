"use strict";
// The pages are complete without this script. It adds filters, the colour switch and the comparison, and loads nothing from outside the folder.
document.documentElement.classList.add("script");

const moelab = {
  kept(key, value) {
    // Storage may be forbidden, in particular for a page opened as a file; then nothing is stored.
    try {
      if (value === undefined) return localStorage.getItem(key);
      localStorage.setItem(key, value);
    } catch {}
    return null;
  },

  make(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  },

  theme(name) {
    const root = document.documentElement;
    if (name === "auto") delete root.dataset.theme;
    else root.dataset.theme = name;
    const button = document.getElementById("theme");
    if (!button) return;
    button.querySelector("span").textContent = name;
    button.setAttribute("aria-label", `Colours: ${name === "auto" ? "as the system (auto)" : name}`);
  },

  // The filters act on all lists of a page, and stand in the address, so that what is shown can be passed on.
  filters(form) {
    const items = [...document.querySelectorAll("[data-item]")];
    const names = ["q", "scale", "verdict", "experiment"];
    const asked = new URLSearchParams(location.search);
    for (const name of names) {
      const known = name === "q" || [...form[name].options].some((option) => option.value === asked.get(name) || option.text === asked.get(name));
      if (asked.get(name) && known) form[name].value = asked.get(name);
    }
    const apply = () => {
      const words = form.q.value.toLowerCase().split(/\s+/).filter(Boolean);
      const { scale, verdict, experiment } = Object.fromEntries(new FormData(form));
      const shown = { claim: 0, experiment: 0, result: 0 };
      const there = new Set();
      for (const item of items) {
        const d = item.dataset;
        const kind = "chapter" in d ? "experiment" : "best" in d ? "claim" : "result";
        let keep = words.every((word) => d.text.includes(word)) && (!experiment || d.experiment === experiment);
        if (kind === "claim") keep &&= (scale ? d.scale === scale : d.best === "1") && (!verdict || d.verdict === verdict);
        else keep &&= !verdict || d.verdicts.split("|").includes(verdict);
        if (kind === "experiment") {
          const scales = d.scales.split(" ");
          for (const panel of item.querySelectorAll("[data-panel]")) panel.hidden = panel.dataset.panel !== (scale || scales[0]);
          keep &&= !scale || scales.includes(scale); // a card without a result at this scale would be empty
        }
        if (kind === "result") keep &&= !scale || d.scale === scale;
        item.hidden = !keep;
        there.add(kind);
        if (keep) shown[kind] += 1;
      }
      const any = words.length || scale || verdict || experiment;
      for (const group of document.querySelectorAll("[data-group]"))
        group.hidden = Boolean(any) && !group.querySelector("[data-item]:not([hidden])") && Boolean(group.querySelector("[data-item]"));
      for (const body of document.querySelectorAll("tbody[data-group]"))
        for (const axis of body.querySelectorAll("[data-axis]")) {
          let row = axis.nextElementSibling;
          while (row && row.hidden && !("axis" in row.dataset)) row = row.nextElementSibling;
          axis.hidden = !row || "axis" in row.dataset;
        }
      const untested = document.getElementById("untested");
      if (untested) {
        const left = untested.querySelectorAll("[data-item]:not([hidden])").length;
        untested.querySelector("summary strong").textContent = left;
        untested.hidden = !left;
        if (words.length || verdict) untested.open = left > 0;
      }
      const tested = document.getElementById("tested");
      if (tested) tested.hidden = !tested.querySelector("[data-item]:not([hidden])");
      document.getElementById("nothing").hidden = shown.claim + shown.experiment + shown.result > 0;
      const count = (n, word) => n + " " + word + (n === 1 ? "" : "s");
      document.getElementById("count").textContent = any ? [...there].map((kind) => count(shown[kind], kind)).join(", ") : "";
      const chosen = new URLSearchParams(names.filter((name) => form[name].value).map((name) => [name, form[name].value]));
      const address = location.pathname + (chosen.size ? `?${chosen}` : "") + location.hash;
      if (address !== location.pathname + location.search + location.hash) history.replaceState(null, "", address);
    };
    document.querySelector("#nothing button").addEventListener("click", () => {
      for (const name of names) form[name].value = "";
      apply();
    });
    form.addEventListener("input", apply);
    form.addEventListener("submit", (event) => event.preventDefault());
    apply();
  },

  // A long table in pages: rows that the filter leaves, `size` at a time. What is asked stands in the address.
  pages(form, table, size = 50) {
    const asked = new URLSearchParams(location.search);
    form.q.value = asked.get("q") ?? "";
    if ([...form.used.options].some((option) => option.value === asked.get("used"))) form.used.value = asked.get("used");
    let first = 0;
    const show = () => {
      const words = form.q.value.toLowerCase().split(/\s+/).filter(Boolean);
      const rows = [...table.tBodies[0].rows];
      const kept = rows.filter((row) => {
        const text = row.textContent.toLowerCase();
        return words.every((word) => text.includes(word)) && row.lastElementChild.textContent.includes(form.used.value);
      });
      if (first >= kept.length) first = 0;
      const shown = new Set(kept.slice(first, first + size));
      for (const row of rows) row.hidden = !shown.has(row);
      form.querySelector("output").textContent = kept.length ? `${first + 1} to ${first + shown.size} of ${kept.length}` : "none fits";
      form.back.disabled = first === 0;
      form.on.disabled = first + size >= kept.length;
      const chosen = new URLSearchParams(["q", "used"].filter((name) => form[name].value).map((name) => [name, form[name].value]));
      history.replaceState(null, "", location.pathname + (chosen.size ? `?${chosen}` : ""));
    };
    const turn = (by) => {
      first = Math.max(0, first + by);
      show();
      table.scrollIntoView();
    };
    const again = () => {
      first = 0;
      show();
    };
    form.back.addEventListener("click", () => turn(-size));
    form.on.addEventListener("click", () => turn(size));
    form.addEventListener("input", again);
    form.addEventListener("submit", (event) => event.preventDefault());
    table.addEventListener("sorted", again);
    show();
  },

  picks(form) {
    const boxes = [...form.querySelectorAll("input[type=checkbox]")];
    const button = form.querySelector("button");
    const chosen = () => boxes.filter((box) => box.checked);
    form.addEventListener("change", () => (button.disabled = chosen().length !== 2));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const [a, b] = chosen().map((box) => encodeURIComponent(box.value));
      location.href = `compare.html?a=${a}&b=${b}`;
    });
    boxes.forEach((box) => (box.checked = false));
  },

  // Two results side by side, a frame each; the choice stands in the address.
  comparison(form) {
    const asked = new URLSearchParams(location.search);
    const known = new Set([...form.a.options].map((option) => option.value));
    for (const side of ["a", "b"]) if (known.has(asked.get(side))) form[side].value = asked.get(side);
    const show = () => {
      const chosen = Object.fromEntries(new FormData(form));
      for (const frame of document.querySelectorAll("#compared iframe")) {
        const path = chosen[frame.name];
        frame.hidden = !path;
        if (path && frame.dataset.path !== path) frame.src = `${path}/index.html`;
        frame.dataset.path = path;
      }
      history.replaceState(null, "", `?${new URLSearchParams(chosen)}`);
    };
    form.addEventListener("input", show);
    form.addEventListener("submit", (event) => event.preventDefault());
    show();
  },

  // A click on the head of a column sorts by it, a second one the other way; rows without a value come last.
  // A column of values in several units has no order.
  sortable(table) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      if ("unsorted" in head.dataset) return;
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const key = ({ cells }) => (cells[column].dataset.value === undefined ? cells[column].textContent : cells[column].dataset.value && Number(cells[column].dataset.value));
        const empty = (value) => value === "" || value === "–";
        const compare = (x, y) => (typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), "en", { numeric: true })) * (down ? -1 : 1);
        const rows = [...table.tBodies[0].rows].map((row) => [key(row), row]);
        rows.sort(([x], [y]) => empty(x) - empty(y) || compare(x, y));
        table.tBodies[0].append(...rows.map(([, row]) => row));
        table.dispatchEvent(new Event("sorted"));
      });
    });
  },

  // Let the keyboard reach boxes that scroll sideways.
  focusable(root) {
    for (const box of root.querySelectorAll(".scroll, .output_area, .notebook details.table"))
      if (box.scrollWidth > box.clientWidth) {
        box.tabIndex = 0;
        box.setAttribute("role", "group");
        box.setAttribute("aria-label", "scrolls sideways");
      }
  },
};

moelab.theme(moelab.kept("theme") ?? "auto");
document.addEventListener("DOMContentLoaded", () => {
  const themes = ["auto", "light", "dark"];
  moelab.theme(moelab.kept("theme") ?? "auto");
  document.getElementById("theme").addEventListener("click", () => {
    const next = themes[(themes.indexOf(document.documentElement.dataset.theme ?? "auto") + 1) % themes.length];
    moelab.kept("theme", next);
    moelab.theme(next);
  });
  const [filter, pick, choose, browse] = ["filter", "pick", "choose", "browse"].map((id) => document.getElementById(id));
  if (filter) moelab.filters(filter);
  if (pick) moelab.picks(pick);
  if (choose) moelab.comparison(choose);
  if (browse) moelab.pages(browse, document.getElementById("runs"));
  document.querySelectorAll("table.sortable").forEach(moelab.sortable);
  moelab.focusable(document);
});
