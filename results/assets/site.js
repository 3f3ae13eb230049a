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

  theme(name) {
    const root = document.documentElement;
    if (name === "auto") delete root.dataset.theme;
    else root.dataset.theme = name;
    const button = document.getElementById("theme");
    if (!button) return;
    button.querySelector("span").textContent = name;
    button.setAttribute("aria-label", "Colours: " + (name === "auto" ? "as the system" : name));
  },

  filters(form) {
    const items = [...document.querySelectorAll("[data-item]")];
    const tally = [...document.querySelectorAll(".tally button")];
    const apply = () => {
      const words = form.q.value.toLowerCase().split(/\s+/).filter(Boolean);
      const { scale, verdict, experiment } = Object.fromEntries(new FormData(form));
      const shown = { claim: 0, chapter: 0, result: 0 };
      for (const item of items) {
        const d = item.dataset;
        const chapter = "chapter" in d;
        const claim = "best" in d;
        let keep = words.every((word) => d.text.includes(word)) && (!experiment || d.experiment === experiment);
        if (claim) keep &&= (scale ? d.scale === scale : d.best === "1") && (!verdict || d.verdict === verdict);
        else if (chapter) moelab.panels(item, scale);
        else keep &&= !scale || d.scale === scale;
        item.hidden = !keep;
        if (keep) shown[claim ? "claim" : chapter ? "chapter" : "result"] += 1;
      }
      const untested = document.getElementById("untested");
      if (untested) {
        const left = untested.querySelectorAll("[data-item]:not([hidden])").length;
        untested.hidden = !left;
        untested.querySelector("summary strong").textContent = left;
        if (words.length || verdict) untested.open = left > 0;
      }
      for (const group of document.querySelectorAll("[data-group]"))
        group.hidden = !group.querySelector("[data-item]:not([hidden])");
      document.getElementById("tested").hidden = !document.querySelector("#tested [data-item]:not([hidden])");
      for (const button of tally) button.setAttribute("aria-pressed", String(button.dataset.verdict === verdict));
      const any = words.length || scale || verdict || experiment;
      const count = (n, word) => n + " " + word + (n === 1 ? "" : "s");
      document.getElementById("count").textContent = any
        ? [count(shown.claim, "claim"), count(shown.chapter, "experiment"), count(shown.result, "result")].join(", ")
        : "";
    };
    for (const button of tally)
      button.addEventListener("click", () => {
        form.verdict.value = form.verdict.value === button.dataset.verdict ? "" : button.dataset.verdict;
        apply();
      });
    form.addEventListener("input", apply);
    form.addEventListener("submit", (event) => event.preventDefault());
    apply();
  },

  panels(chapter, scale) {
    const scales = chapter.dataset.scales.split(" ").filter(Boolean);
    const wanted = scale || scales[0];
    for (const panel of chapter.querySelectorAll("[data-panel]")) panel.hidden = panel.dataset.panel !== wanted;
    const note = chapter.querySelector(".elsewhere");
    if (!note) return;
    note.hidden = !scale || scales.includes(scale) || !scales.length;
    note.textContent = `No result at scale ${scale}; there is one at ${scales.join(", ")}.`;
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
      script.onerror = () => reject(new Error(`${path}: no data.js; building the pages again writes it`));
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
      if (!a || !b) {
        out.textContent = a || b ? "Choose the other result." : "Choose two results.";
        return;
      }
      try {
        const pair = await Promise.all([this.load(a), this.load(b)]);
        out.replaceChildren(...this.side(pair, form.all.checked));
        this.focusable(out);
        history.replaceState(null, "", `?a=${encodeURIComponent(a)}&b=${encodeURIComponent(b)}`);
      } catch (error) {
        out.textContent = error.message;
      }
    };
    form.addEventListener("input", show);
    form.addEventListener("submit", (event) => event.preventDefault());
    show();
  },

  side([a, b], all) {
    const make = (tag, attributes = {}, ...children) => {
      const node = document.createElement(tag);
      for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
      node.append(...children);
      return node;
    };
    const union = (x, y) => [...new Set([...x, ...y])];
    const text = (value) => {
      if (value === undefined || value === null) return "–";
      if (typeof value !== "number") return String(value);
      return value.toLocaleString("en", Math.abs(value) >= 1000 ? { maximumFractionDigits: 0 } : { maximumSignificantDigits: 5 }).replace("-", "−");
    };
    const table = (caption, head, rows) =>
      make("div", { class: "scroll" },
        make("table", {},
          make("caption", {}, caption),
          make("thead", {}, make("tr", {}, ...head.map((h) => make("th", { scope: "col" }, h)))),
          make("tbody", {},
            ...rows.map(({ cells: [first, ...rest], differs }) =>
              make("tr", differs ? { class: "differs" } : {},
                make("th", { scope: "row" }, first), ...rest.map((c) => make("td", { class: "wrap" }, c)))))));
    const rows = (pairs) =>
      pairs.map((cells) => ({ cells, differs: cells[1] !== cells[2] })).filter((row) => all || row.differs);
    const parts = [
      make("div", { class: "pair" },
        ...[a, b].map((r, i) => make("h2", {}, "AB"[i] + ": ", make("a", { href: `${r.path}/index.html` }, r.title)))),
    ];

    const facts = rows(union(Object.keys(a.facts), Object.keys(b.facts)).map((k) => [k, text(a.facts[k]), text(b.facts[k])]));
    if (facts.length) parts.push(table("How they were made", ["", "A", "B"], facts));

    const claims = (r) => Object.fromEntries(r.claims.map((c) => [c.id, c]));
    const [ca, cb] = [claims(a), claims(b)];
    const say = (c) => (c ? `${c.verdict}${c.ours === "–" ? "" : `: ${c.ours} (${c.interval})`}` : "–");
    const judged = rows(union(Object.keys(ca), Object.keys(cb)).map((id) => {
      const claim = ca[id] ?? cb[id];
      return [`${claim.statement} Paper: ${claim.paper}.`, say(ca[id]), say(cb[id])];
    }));
    if (judged.length) parts.push(table("The paper's claims: verdict, ours, 95 % interval", ["claim", "A", "B"], judged));

    const arms = (r) => Object.fromEntries(r.arms.map((row) => [row.arm, row]));
    const [aa, ab] = [arms(a), arms(b)];
    const differences = [];
    for (const arm of union(Object.keys(aa), Object.keys(ab))) {
      if (!aa[arm] || !ab[arm]) {
        differences.push([arm, aa[arm] ? "there" : "not there", ab[arm] ? "there" : "not there", "–"]);
        continue;
      }
      for (const key of union(Object.keys(aa[arm]), Object.keys(ab[arm]))) {
        if (key === "arm") continue;
        const [x, y] = [aa[arm][key], ab[arm][key]];
        const change = typeof x === "number" && typeof y === "number" ? y - x : undefined;
        differences.push([`${arm}: ${key.replaceAll("_", " ")}`, text(x), text(y), text(change)]);
      }
    }
    const runs = rows(differences);
    if (runs.length) parts.push(table("Runs, means over seeds", ["arm", "A", "B", "B − A"], runs));

    const by = (r) => Object.fromEntries(r.figures.map((f) => [f.name, f]));
    const [fa, fb] = [by(a), by(b)];
    for (const name of union(Object.keys(fa), Object.keys(fb))) {
      const one = (r, f, side) => {
        if (!f) return make("p", { class: "soft" }, `${side} has no figure ${name}.`);
        const image = (kind, file) => make("img", { class: kind, src: `${r.path}/${file}`, alt: f.title });
        return make("figure", {}, make("h3", {}, `${side}: ${f.title}`),
          make("div", { class: "scroll" },
            ...(f.dark ? [image("light", f.light), image("dark", f.dark)] : [image("card", f.light)])));
      };
      parts.push(make("h2", {}, name), make("div", { class: "pair" }, one(a, fa[name], "A"), one(b, fb[name], "B")));
    }

    for (const name of union(Object.keys(a.tables), Object.keys(b.tables))) {
      const one = (r, side) => {
        const t = r.tables[name];
        if (!t || !t.rows.length) return make("p", { class: "soft" }, `${side} has no table ${name}.`);
        const keys = Object.keys(t.rows[0]);
        return table(`${side}: ${t.title}`, keys, t.rows.map((row) => ({ cells: keys.map((k) => text(row[k])) })));
      };
      parts.push(make("h2", {}, name), make("div", { class: "pair" }, one(a, "A"), one(b, "B")));
    }
    return parts;
  },

  // Let the keyboard reach boxes that scroll sideways.
  focusable(root) {
    for (const box of root.querySelectorAll(".scroll, .output_area"))
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
  moelab.focusable(document);
});
