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

  // Comparison: each result's data.js calls `add`.
  arrived: {},
  asked: {},
  add(result) {
    this.arrived[result.path] = result;
  },
  load(path) {
    this.asked[path] ??= new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = `${path}/data.js`;
      script.onload = () => resolve(this.arrived[path]);
      script.onerror = () => {
        delete this.asked[path]; // so that choosing it again tries again
        reject(new Error(`${path}: no data.js; building the pages again writes it`));
      };
      document.head.append(script);
    });
    return this.asked[path];
  },

  comparison(form) {
    const out = document.getElementById("compared");
    const asked = new URLSearchParams(location.search);
    const known = new Set([...form.a.options].map((option) => option.value));
    for (const side of ["a", "b"]) if (known.has(asked.get(side))) form[side].value = asked.get(side);
    const show = async () => {
      const { a, b } = Object.fromEntries(new FormData(form));
      const chosen = () => form.a.value === a && form.b.value === b; // still, when the data have arrived
      if (!a || !b) {
        out.textContent = a || b ? "Choose the other result." : "Choose two results.";
        return;
      }
      try {
        const pair = await Promise.all([this.load(a), this.load(b)]);
        if (!chosen()) return;
        out.replaceChildren(...this.side(pair, form.all.checked));
        this.focusable(out);
        history.replaceState(null, "", `?a=${encodeURIComponent(a)}&b=${encodeURIComponent(b)}`);
      } catch (error) {
        if (chosen()) out.textContent = error.message;
      }
    };
    form.addEventListener("input", show);
    form.addEventListener("submit", (event) => event.preventDefault());
    show();
  },

  side([a, b], all) {
    const { make } = this;
    const union = (x, y) => [...new Set([...x, ...y])];
    const by = (rows, key) => Object.fromEntries(rows.map((row) => [row[key], row]));
    const text = (value) => {
      if (value === undefined || value === null) return "–";
      if (typeof value !== "number") return String(value);
      return value.toLocaleString("en", Math.abs(value) >= 1000 ? { maximumFractionDigits: 0 } : { maximumSignificantDigits: 5 }).replace("-", "−");
    };
    const table = (caption, head, rows) =>
      make("div", { class: "scroll" },
        make("table", { class: `matrix columns-${head.length}` },
          make("caption", {}, caption),
          make("thead", {}, make("tr", {}, ...head.map((h) => make("th", { scope: "col" }, h)))),
          make("tbody", {},
            ...rows.map(({ cells: [first, ...rest], differs }) =>
              make("tr", differs ? { class: "differs" } : {},
                make("th", { scope: "row" }, first), ...rest.map((c, i) => make("td", { class: "wrap", "data-label": head[i + 1] ?? "" }, c)))))));
    const rows = (pairs) =>
      pairs.map((cells) => ({ cells, differs: cells[1] !== cells[2] })).filter((row) => all || row.differs);
    const parts = [
      make("div", { class: "pair" },
        ...[a, b].map((r, i) => make("h2", {}, "AB"[i] + ": ", make("a", { href: `${r.path}/index.html` }, `${r.facts.experiment}, ${r.facts.scale}, ${r.facts.finished.slice(0, 10)}`), make("small", {}, r.title)))),
    ];

    const facts = rows(union(Object.keys(a.facts), Object.keys(b.facts)).map((k) => [k, text(a.facts[k]), text(b.facts[k])]));
    if (facts.length) parts.push(table("How they were made", ["what", "A", "B"], facts));

    const [ca, cb] = [a, b].map((r) => by(r.claims, "id"));
    const say = (c) => {
      if (!c || (c.ours === "–" && c.verdict.startsWith("not test"))) return "no value in this result";
      const [mark, style] = c.sign.split(" ");
      return make("span", {}, make("span", { class: `badge ${style}` }, make("span", { "aria-hidden": "true" }, mark), c.verdict),
        c.ours === "–" ? "" : ` ${c.ours}${["–", "exact"].includes(c.interval) ? "" : ` (${c.interval})`}`);
    };
    const same = (x, y) => x && y && x.verdict === y.verdict && x.ours === y.ours && x.interval === y.interval;
    const judged = union(Object.keys(ca), Object.keys(cb))
      .map((id) => ({ cells: [make("span", {}, (ca[id] ?? cb[id]).statement, make("span", { class: "soft" }, ` ${(ca[id] ?? cb[id]).where}`)), (ca[id] ?? cb[id]).paper, say(ca[id]), say(cb[id])], differs: !same(ca[id], cb[id]) }))
      .filter((row) => all || row.differs);
    if (judged.length) parts.push(table("The paper's claims: verdict by itself, ours, 95 % interval", ["claim", "paper", "A", "B"], judged));

    // One matrix for each number of the arms: an arm a row.
    const [aa, ab] = [a, b].map((r) => by(r.arms, "arm"));
    const names = union(Object.keys(aa), Object.keys(ab));
    const keys = union(...[aa, ab].map((x) => Object.values(x).flatMap((row) => Object.keys(row)))).filter((key) => key !== "arm");
    const first = ["validation_loss", "seeds", "parameters", "tokens"].filter((key) => keys.includes(key));
    for (const key of union(first, keys)) {
      const matrix = rows(names.map((arm) => [arm, text(aa[arm]?.[key]), text(ab[arm]?.[key])])).map((row) => {
        const [x, y] = [aa[row.cells[0]]?.[key], ab[row.cells[0]]?.[key]];
        const change = typeof x === "number" && typeof y === "number" ? (y > x ? "+" : "") + text(y - x) : "–";
        return { ...row, cells: [...row.cells, change] };
      });
      if (!matrix.length) continue;
      const shown = table(`${key.replaceAll("_", " ")}, mean over seeds`, ["arm", "A", "B", "B − A"], matrix);
      parts.push(first.includes(key) ? shown : make("details", {}, make("summary", {}, key.replaceAll("_", " ")), shown));
    }

    const [fa, fb] = [a, b].map((r) => by(r.figures, "name"));
    for (const name of union(Object.keys(fa), Object.keys(fb))) {
      const one = (r, f, side) => {
        if (!f) return make("p", { class: "soft" }, `${side} has no figure ${name}.`);
        return make("figure", {}, make("h3", {}, `${side}: ${f.title}`),
          make("img", { class: "picture", src: `${r.path}/${f.file}`, alt: f.title, width: f.width, height: f.height }));
      };
      parts.push(make("h2", {}, name), make("div", { class: "pair" }, one(a, fa[name], "A"), one(b, fb[name], "B")));
    }

    for (const name of union(Object.keys(a.tables), Object.keys(b.tables))) {
      const one = (r, side) => {
        const t = r.tables[name];
        if (!t || !t.rows.length) return make("p", { class: "soft" }, `${side} has no table ${name}.`);
        const keys = Object.keys(t.rows[0]);
        const shown = table("", keys, t.rows.map((row) => ({ cells: keys.map((k) => text(row[k])) })));
        const folded = make("details", {}, make("summary", {}, `${side}: ${t.title} (${t.rows.length} rows)`), shown);
        folded.open = t.rows.length <= 12;
        return folded;
      };
      parts.push(make("h2", {}, name), make("div", { class: "pair" }, one(a, "A"), one(b, "B")));
    }
    return parts;
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
  const [filter, pick, choose] = ["filter", "pick", "choose"].map((id) => document.getElementById(id));
  if (filter) moelab.filters(filter);
  if (pick) moelab.picks(pick);
  if (choose) moelab.comparison(choose);
  document.querySelectorAll("table.sortable").forEach(moelab.sortable);
  moelab.focusable(document);
});
