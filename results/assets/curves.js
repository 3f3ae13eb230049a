"use strict";
// Interactive charts of curves, drawn with uPlot: hover or use the arrow keys to read values, drag to zoom, choose arms, seeds, axis
// and the arm to subtract; differences have the paper's points beside them. The choices stand in the address.
// Each figure's picture stays in the page, and is what there is without a script.
(() => {
  // Two-sided 97.5 % points of Student's distribution by degrees of freedom; from 30 on those of the normal one.
  const STUDENT = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.16, 2.145, 2.131, 2.12, 2.11, 2.101, 2.093, 2.086, 2.08, 2.074, 2.069, 2.064, 2.06, 2.056, 2.052, 2.048, 2.045];
  const student = (n) => STUDENT[n - 2] ?? 1.96;
  const BANDS = 3; // more bands cover one another
  const ROWS = 40; // of the table
  const dark = () => getComputedStyle(document.documentElement).colorScheme === "dark" || (getComputedStyle(document.documentElement).colorScheme !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);
  const css = (name) => {
    const probe = document.body.appendChild(Object.assign(document.createElement("span"), { style: `color: var(${name})` }));
    const { color } = getComputedStyle(probe);
    probe.remove();
    return color;
  };
  const { make } = moelab;
  const tokens = (n) => (n >= 1e9 ? `${+(n / 1e9).toPrecision(3)} B` : n >= 1e6 ? `${+(n / 1e6).toPrecision(3)} M` : `${Math.round(n / 1e3)} k`);
  const percent = (share) => `${+(100 * share).toPrecision(2)} %`;
  const number = (v, digits, signed) => ((signed && v > 0 ? "+" : "") + v.toFixed(digits)).replace("-", "−");

  function table(data) {
    // arm -> seed -> Map of tokens to value
    const found = {};
    for (const [arm, seed, grid, values] of data.series) {
      const points = ((found[arm] ??= {})[seed] = new Map());
      data.grids[grid].forEach((x, i) => points.set(x, values[i]));
    }
    return found;
  }

  function lines(all, arm, base, seeds) {
    // seed -> Map of tokens to value, less the base arm's of the same seed and tokens
    const found = {};
    for (const seed of seeds) {
      const own = all[arm]?.[seed];
      if (!own) continue;
      if (!base) found[seed] = own;
      else if (all[base]?.[seed]) {
        const other = all[base][seed];
        found[seed] = new Map([...own].filter(([x]) => other.has(x)).map(([x, y]) => [x, y - other.get(x)]));
      }
    }
    return found;
  }

  // The paper's difference of two arms at the same share of the training: Map of share to [value, uncertainty].
  function published(data, arm, base) {
    const theirs = new Map((data.paper[base] ?? []).map(([share, loss, wide]) => [share, [loss, wide]]));
    return new Map((data.paper[arm] ?? []).filter(([share]) => theirs.has(share)).map(([share, loss, wide]) => [share, [loss - theirs.get(share)[0], wide + theirs.get(share)[1]]]));
  }

  function chart(box, name) {
    const data = JSON.parse(box.querySelector("script").textContent);
    const all = table(data);
    const arms = Object.keys(data.arms);
    const seeds = [...new Set(data.series.map(([, seed]) => seed))].sort((a, b) => a - b);
    const gap = data.values === "gap";
    const label = box.dataset.label;
    const shares = arms.every((arm) => data.whole[arm]);
    const beside = shares && arms.some((arm) => data.paper[arm].length) && (gap ? data.paper[data.against]?.length : true);

    const option = (value, text) => make("option", { value }, text);
    const show = make("select", {}, option("", gap ? `minus ${data.against || "the reference"}` : "loss"), ...arms.map((arm) => option(arm, gap ? `less ${arm}` : `minus ${arm}`)));
    const which = make("select", {}, option("mean", seeds.length > 1 ? "mean of seeds, 95 % interval" : "the one seed"), ...(seeds.length > 1 ? [option("each", "each seed"), ...seeds.map((seed) => option(seed, `seed ${seed}`))] : []));
    const part = make("select", {}, option("0", "all tokens"), option("0.25", "from a quarter on"), option("0.5", "the last half"), option("0.75", "the last quarter"));
    const along = make("select", {}, option("tokens", "training tokens"), option("share", "share of the paper’s training"));
    if (beside && gap) along.value = "share";
    const dashes = (arm) => data.arms[arm][2].map((length) => 2 * length); // in pixels; none is a solid line
    const stripes = (dash, end = 0) => dash.map((length, i) => `${i % 2 ? "#0000" : "#000"} ${end}px ${(end += length)}px`).join();
    const switches = {}, values = {};
    const legend = make("fieldset", { class: "arms" }, make("legend", {}, "Arms"));
    for (const arm of arms) {
      switches[arm] = make("input", { type: "checkbox" });
      switches[arm].checked = true;
      values[arm] = make("span", { class: "value" });
      const swatch = make("span", { class: "swatch" });
      swatch.style.setProperty("--light", data.arms[arm][0]);
      swatch.style.setProperty("--dark", data.arms[arm][1]);
      if (dashes(arm).length) swatch.style.mask = `repeating-linear-gradient(90deg, ${stripes(dashes(arm))})`;
      legend.append(make("label", {}, switches[arm], swatch, ` ${arm} `, values[arm]));
    }
    const at = make("span", { class: "soft at", "aria-live": "polite" });
    const area = make("div", { class: "area", role: "group", tabindex: "0", "aria-label": `${label}. Chart; the arrow keys read its values, the table has them all.` });
    const grid = make("div", { class: "grid scroll", tabindex: "0", role: "group", "aria-label": "Values of the chart" });
    grid.hidden = true;
    const tab = make("button", { type: "button", class: "button", "aria-pressed": "false" }, "Table");
    const controls = make("div", { class: "controls" },
      make("label", {}, "Show ", show), ...(seeds.length > 1 ? [make("label", {}, "Seeds ", which)] : []),
      ...(shares ? [make("label", {}, "Over ", along)] : []), ...(data.along ? [make("label", {}, "Range ", part)] : []), tab);
    const note = beside ? " Diamonds: the paper’s Fig 1 at the same share of its training, along one run, beside differences." : "";
    const help = make("p", { class: "soft small" }, `Move over the chart, or use the arrow keys, to read values; drag to zoom, double-click to see all again. Intervals are of each point by itself.${note}`);
    box.append(controls, area, grid, make("div", { class: "read" }, legend, at), help);

    // The choices, as they stand in the address under the figure's name.
    const selects = { show, seeds: which, over: along, range: part };
    const first = Object.fromEntries(Object.entries(selects).map(([key, select]) => [key, select.value]));
    const said = new URLSearchParams(new URLSearchParams(location.search).get(name) ?? "");
    for (const [key, select] of Object.entries(selects)) if ([...select.options].some((o) => o.value === said.get(key))) select.value = said.get(key);
    const off = said.get("off")?.split("|") ?? [];
    for (const arm of arms) if (off.includes(arm)) switches[arm].checked = false;
    function remember() {
      const state = new URLSearchParams(Object.entries(selects).filter(([key, select]) => select.value !== first[key]).map(([key, select]) => [key, select.value]));
      const hidden = arms.filter((arm) => !switches[arm].checked);
      if (hidden.length) state.set("off", hidden.join("|"));
      const asked = new URLSearchParams(location.search);
      if (state.size) asked.set(name, state.toString());
      else asked.delete(name);
      const address = location.pathname + (asked.size ? `?${asked}` : "") + location.hash;
      if (address !== location.pathname + location.search + location.hash) history.replaceState(null, "", address);
    }

    let plot, drawn = [];
    const shown = () => arms.filter((arm) => switches[arm].checked && arm !== show.value);
    const place = (arm, x) => (along.value === "share" ? x / data.whole[arm] : x);
    const where = (x) => (along.value === "share" ? `${percent(x)} of the paper’s training` : `${tokens(x)} tokens`);

    // For each arm: where it has values, their means and bounds, each seed's, and the paper's.
    function curves() {
      const base = show.value;
      const last = Math.max(...data.grids.flat());
      const chosen = which.value === "mean" || which.value === "each" ? seeds : [Number(which.value)];
      return shown().map((arm) => {
        const found = Object.values(lines(all, arm, base, chosen)).filter((points) => points.size);
        const points = new Map();
        for (const x of [...new Set(found.flatMap((one) => [...one.keys()]))].sort((a, b) => a - b)) {
          if (x < last * Number(part.value)) continue;
          const there = found.map((one) => one.get(x)).filter((y) => y !== undefined);
          const n = there.length, mean = there.reduce((sum, y) => sum + y, 0) / n;
          const half = n > 1 ? student(n) * Math.sqrt(there.reduce((sum, y) => sum + (y - mean) ** 2, 0) / (n - 1) / n) : 0;
          points.set(place(arm, x), { mean, half, each: found.map((one) => one.get(x) ?? null), n });
        }
        const theirs = along.value === "share" && Number(part.value) === 0 ? (gap ? (base ? new Map() : published(data, arm, data.against)) : base ? published(data, arm, base) : new Map()) : new Map();
        return { arm, points, seeds: found.length, theirs };
      }).filter(({ points }) => points.size);
    }

    function draw() {
      plot?.destroy();
      remember();
      const night = dark(), base = show.value, difference = gap || Boolean(base), share = along.value === "share";
      for (const arm of arms) switches[arm].closest("label").classList.toggle("off", arm === base);
      drawn = curves();
      const x = [...new Set(drawn.flatMap(({ points, theirs }) => [...points.keys(), ...theirs.keys()]))].sort((a, b) => a - b);
      const columns = [x], series = [{}], bands = [];
      for (const { arm, points, theirs, seeds: n } of drawn) {
        const color = data.arms[arm][night ? 1 : 0], dash = dashes(arm);
        const line = (value, extra = {}) => {
          columns.push(x.map((v) => (points.has(v) ? value(points.get(v)) : null)));
          series.push({ stroke: color, dash, width: 2, spanGaps: true, points: { show: !data.along, size: 6 }, ...extra });
          return columns.length - 1;
        };
        if (which.value === "each") for (let i = 0; i < n; i++) line(({ each }) => each[i] ?? null, { width: 1.2 });
        else {
          line(({ mean }) => mean);
          if (n > 1 && drawn.length <= BANDS) {
            const quiet = { width: 0, stroke: "transparent", points: { show: false } };
            bands.push({ series: [line(({ mean, half }) => mean + half, quiet), line(({ mean, half }) => mean - half, quiet)], fill: color + "2b" });
          }
        }
        if (theirs.size) {
          columns.push(x.map((v) => theirs.get(v)?.[0] ?? null));
          series.push({ stroke: color, width: 0, paths: () => null, points: { show: (u, i) => (diamonds(u, i, theirs, color), false) } });
        }
      }
      const ink = css("--soft"), rule = css("--line"), unit = "nats per token";
      const axis = { stroke: ink, grid: { stroke: rule, width: 1 }, ticks: { stroke: rule, width: 1 }, font: "12px system-ui, sans-serif", labelFont: "12px system-ui, sans-serif" };
      const what = base ? `minus ${base} (${unit})` : gap ? `minus ${data.against || "the reference"} (${unit})` : `${data.along ? "" : "final "}validation loss (${unit})`;
      const log = !data.along || (share && drawn.some(({ theirs }) => theirs.size));
      const marks = share ? [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1] : x;
      plot = new uPlot({
        width: area.clientWidth,
        height: Math.max(260, Math.min(400, Math.round(area.clientWidth * 0.55))),
        legend: { show: false },
        scales: {
          x: log ? { time: false, distr: 3, range: (u, low, high) => [low / 1.1, high * 1.1] } : { time: false },
          y: { range: (u, low, high) => (low === null ? [0, 1] : uPlot.rangeNum(difference ? Math.min(low, 0) : low, difference ? Math.max(high, 0) : high, 0.06, false)) },
        },
        cursor: { drag: { x: true, y: false }, points: { size: 6 } },
        axes: [
          { ...axis, label: share ? "share of the paper’s training, by tokens a parameter" : "training tokens", values: (u, ticks) => ticks.map((v) => (v === null ? "" : share ? percent(v) : tokens(v))), space: share ? 48 : 70, ...(log ? { splits: (u) => marks.filter((v) => v >= u.scales.x.min && v <= u.scales.x.max), filter: (u, ticks) => ticks } : {}) },
          { ...axis, label: what, size: 62, values: (u, ticks) => ticks.map((v) => String(+v.toFixed(4)).replace("-", "−")) },
        ],
        series, bands,
        hooks: { setCursor: [(u) => read(u.cursor.idx)], drawAxes: [(u) => difference && zero(u, ink)] },
      }, columns, area);
      read(null);
      if (!grid.hidden) fill();
    }

    function diamonds(u, i, theirs, color) {
      const { ctx } = u, size = 5 * devicePixelRatio;
      ctx.save();
      ctx.strokeStyle = color;
      ctx.fillStyle = css("--ground");
      ctx.lineWidth = 1.6 * devicePixelRatio;
      for (const [share, [value, wide]] of theirs) {
        if (share < u.scales.x.min || share > u.scales.x.max) continue;
        const x = u.valToPos(share, "x", true), y = u.valToPos(value, "y", true);
        ctx.beginPath();
        ctx.moveTo(x, u.valToPos(value - wide, "y", true));
        ctx.lineTo(x, u.valToPos(value + wide, "y", true));
        ctx.stroke();
        ctx.beginPath();
        ctx.moveTo(x, y - size);
        for (const [dx, dy] of [[size, 0], [0, size], [-size, 0]]) ctx.lineTo(x + dx, y + dy);
        ctx.closePath();
        ctx.fill();
        ctx.stroke();
      }
      ctx.restore();
    }

    function zero(u, color) {
      const y = u.valToPos(0, "y", true);
      const { left, top, width, height } = u.bbox;
      if (y < top || y > top + height) return;
      u.ctx.save();
      u.ctx.strokeStyle = color;
      u.ctx.setLineDash([5, 4]);
      u.ctx.beginPath();
      u.ctx.moveTo(left, y);
      u.ctx.lineTo(left + width, y);
      u.ctx.stroke();
      u.ctx.restore();
    }

    const signed = () => gap || Boolean(show.value);
    const written = ({ mean, half, n }) => number(mean, 3, signed()) + (n > 1 ? ` ±${half.toFixed(3)}` : "");

    // Write the values under the pointer, or the last ones, beside the names of the arms.
    function read(index) {
      const x = plot.data[0], i = index ?? Math.max(...drawn.map(({ points }) => x.indexOf([...points.keys()].at(-1))), -1);
      at.textContent = i >= 0 ? `at ${where(x[i])}` : "";
      for (const arm of arms) values[arm].textContent = arm === show.value ? "(subtracted)" : "";
      // Arms are evaluated at different shares of the training: the last point before counts.
      const before = (points) => points.get([...points.keys()].filter((at) => at <= x[i]).at(-1));
      for (const { arm, points, theirs } of drawn)
        values[arm].textContent = (before(points) && x[i] <= [...points.keys()].at(-1) * 1.1 ? written(before(points)) : "") + (theirs.has(x[i]) ? ` ◇ ${number(theirs.get(x[i])[0], 3, true)}` : "");
    }

    function step(by) {
      const x = plot.data[0];
      const next = Math.max(0, Math.min(x.length - 1, (plot.cursor.idx ?? (by > 0 ? -1 : x.length)) + by));
      plot.setCursor({ left: plot.valToPos(x[next], "x"), top: plot.over.clientHeight / 2 });
    }

    function fill() {
      const rows = [...new Set(drawn.flatMap(({ points, theirs }) => [...points.keys(), ...theirs.keys()]))].sort((a, b) => a - b);
      const every = Math.ceil(rows.length / ROWS), kept = rows.filter((_, i) => (rows.length - 1 - i) % every === 0);
      const columns = drawn.flatMap(({ arm, points, theirs }) => [[arm, (x) => (points.has(x) ? written(points.get(x)) : "")], ...(theirs.size ? [[`${arm}, the paper’s`, (x) => (theirs.has(x) ? `${number(theirs.get(x)[0], 3, true)} ±${theirs.get(x)[1].toFixed(3)}` : "")]] : [])]);
      grid.replaceChildren(make("table", {},
        make("caption", {}, every > 1 ? `One in ${every} of ${rows.length} points; the data file has all.` : ""),
        make("thead", {}, make("tr", {}, make("th", { scope: "col" }, along.value === "share" ? "share of training" : "tokens"), ...columns.map(([head]) => make("th", { scope: "col", class: "n" }, head)))),
        make("tbody", {}, ...kept.map((x) => make("tr", {}, make("th", { scope: "row" }, along.value === "share" ? percent(x) : tokens(x)), ...columns.map(([, cell]) => make("td", { class: "n" }, cell(x))))))));
    }

    tab.addEventListener("click", () => {
      grid.hidden = !grid.hidden;
      area.hidden = !grid.hidden;
      tab.setAttribute("aria-pressed", String(!grid.hidden));
      if (area.hidden) fill();
      else draw();
    });
    area.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
      if (!by) return;
      event.preventDefault();
      step(by);
    });
    box.addEventListener("input", draw);
    new ResizeObserver(() => plot && area.clientWidth && Math.abs(plot.width - area.clientWidth) > 2 && draw()).observe(area);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => plot && draw());
    document.getElementById("theme").addEventListener("click", () => plot && requestAnimationFrame(draw)); // in the new colours
    return draw;
  }

  for (const box of document.querySelectorAll(".chart")) {
    const button = make("button", { type: "button", class: "button", "aria-expanded": "false" }, "Read, zoom, switch arms");
    box.before(make("p", { class: "actions" }, button));
    const name = box.dataset.name;
    let draw;
    const set = (open) => {
      box.hidden = !open;
      button.textContent = open ? "Close the chart" : "Read, zoom, switch arms";
      button.setAttribute("aria-expanded", String(open));
      if (open && !draw) draw = chart(box, name);
      if (open) draw();
    };
    button.addEventListener("click", () => set(box.hidden));
    set(new URLSearchParams(location.search).has(name));
  }
})();
