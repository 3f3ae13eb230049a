"use strict";
// Interactive charts of curves, drawn with uPlot: hover to read values, drag to zoom, choose arms, seeds and the arm to subtract.
// Each figure's picture stays in the page, and is what there is without a script.
(() => {
  // Two-sided 97.5 % points of Student's distribution by degrees of freedom; from 30 on those of the normal one.
  const STUDENT = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.16, 2.145, 2.131, 2.12, 2.11, 2.101, 2.093, 2.086, 2.08, 2.074, 2.069, 2.064, 2.06, 2.056, 2.052, 2.048, 2.045];
  const student = (n) => STUDENT[n - 2] ?? 1.96;
  const dark = () => getComputedStyle(document.documentElement).colorScheme === "dark" || (getComputedStyle(document.documentElement).colorScheme !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);
  const css = (name) => {
    const probe = document.body.appendChild(Object.assign(document.createElement("span"), { style: `color: var(${name})` }));
    const { color } = getComputedStyle(probe);
    probe.remove();
    return color;
  };
  const make = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  };
  const tokens = (n) => (n >= 1e9 ? `${+(n / 1e9).toPrecision(3)} B` : n >= 1e6 ? `${+(n / 1e6).toPrecision(3)} M` : `${Math.round(n / 1e3)} k`);
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

  function chart(box) {
    const data = JSON.parse(box.querySelector("script").textContent);
    const all = table(data);
    const arms = Object.keys(data.arms);
    const seeds = [...new Set(data.series.map(([, seed]) => seed))].sort((a, b) => a - b);
    const xs = [...new Set(data.grids.flat())].sort((a, b) => a - b);
    const gap = data.values === "gap";
    const label = box.dataset.label;

    const option = (value, text) => make("option", { value }, text);
    const show = make("select", {}, option("", gap ? "as in the picture" : "loss"), ...arms.map((arm) => option(arm, `minus ${arm}`)));
    const which = make("select", {}, option("mean", seeds.length > 1 ? "mean of seeds, 95 % interval" : "the one seed"), ...(seeds.length > 1 ? [option("each", "each seed"), ...seeds.map((seed) => option(seed, `seed ${seed}`))] : []));
    const part = make("select", {}, option("0", "all tokens"), option("0.25", "from a quarter on"), option("0.5", "the last half"), option("0.75", "the last quarter"));
    const switches = {}, values = {};
    const legend = make("fieldset", { class: "arms" }, make("legend", {}, "Arms"));
    for (const arm of arms) {
      switches[arm] = make("input", { type: "checkbox" });
      switches[arm].checked = true;
      values[arm] = make("span", { class: "value" });
      const swatch = make("span", { class: "swatch" });
      swatch.style.setProperty("--light", data.arms[arm][0]);
      swatch.style.setProperty("--dark", data.arms[arm][1]);
      legend.append(make("label", {}, switches[arm], swatch, ` ${arm} `, values[arm]));
    }
    const at = make("span", { class: "soft at" });
    const area = make("div", { class: "area", role: "img", "aria-label": `${label}. Interactive; the numbers are in the data file below.` });
    const controls = make("div", { class: "controls" },
      make("label", {}, "Show ", show), ...(seeds.length > 1 ? [make("label", {}, "Seeds ", which)] : []), ...(data.along ? [make("label", {}, "Range ", part)] : []));
    const help = make("p", { class: "soft small" }, "Move over the chart to read values; drag to zoom, double-click to see all again.");
    box.append(controls, area, make("div", { class: "read" }, legend, at), help);

    let plot, drawn = [];
    const shown = () => arms.filter((arm) => switches[arm].checked && arm !== show.value);

    function draw() {
      plot?.destroy();
      const night = dark();
      const base = show.value;
      const difference = gap || Boolean(base);
      const first = xs[0] + (xs.at(-1) - xs[0]) * Number(part.value);
      const x = xs.filter((v) => v >= first);
      const columns = [x], series = [{}], bands = [];
      drawn = [];
      for (const arm of arms) switches[arm].closest("label").classList.toggle("off", arm === base);
      for (const arm of shown()) {
        const color = data.arms[arm][night ? 1 : 0];
        const chosen = which.value === "mean" || which.value === "each" ? seeds : [Number(which.value)];
        const found = Object.values(lines(all, arm, base, chosen)).filter((points) => points.size);
        if (!found.length) continue;
        const line = (column, extra = {}) => {
          columns.push(column);
          series.push({ stroke: color, width: 2, spanGaps: true, points: { show: !data.along, size: 6 }, ...extra });
          return columns.length - 1;
        };
        if (which.value === "each") {
          found.forEach((points) => line(x.map((v) => points.get(v) ?? null), { width: 1.2 }));
        }
        const means = [], lows = [], highs = [];
        for (const v of x) {
          const there = found.map((points) => points.get(v)).filter((y) => y !== undefined);
          const n = there.length;
          if (!n) {
            means.push(null), lows.push(null), highs.push(null);
            continue;
          }
          const mean = there.reduce((sum, y) => sum + y, 0) / n;
          const half = n > 1 ? student(n) * Math.sqrt(there.reduce((sum, y) => sum + (y - mean) ** 2, 0) / (n - 1) / n) : 0;
          means.push(mean), lows.push(mean - half), highs.push(mean + half);
        }
        if (which.value !== "each") {
          line(means);
          if (found.length > 1) {
            const quiet = { width: 0, stroke: "transparent", points: { show: false } };
            const high = line(highs, quiet), low = line(lows, quiet);
            bands.push({ series: [high, low], fill: color + "2b" });
          }
        }
        drawn.push({ arm, means, lows, highs, n: found.length });
      }
      const ink = css("--soft"), grid = css("--line");
      const axis = { stroke: ink, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, width: 1 }, font: "12px system-ui, sans-serif", labelFont: "12px system-ui, sans-serif" };
      const unit = "nats per token";
      const what = base ? `minus ${base} (${unit})` : gap ? `difference (${unit})` : `${data.along ? "" : "final "}validation loss (${unit})`;
      plot = new uPlot({
        width: area.clientWidth,
        height: Math.max(260, Math.min(400, Math.round(area.clientWidth * 0.55))),
        legend: { show: false },
        scales: { x: data.along ? { time: false } : { time: false, distr: 3, range: (u, low, high) => [low / 1.1, high * 1.1] }, y: { range: (u, low, high) => (low === null ? [0, 1] : uPlot.rangeNum(difference ? Math.min(low, 0) : low, difference ? Math.max(high, 0) : high, 0.06, false)) } },
        cursor: { drag: { x: true, y: false }, points: { size: 6 } },
        axes: [
          { ...axis, label: "training tokens", values: (u, ticks) => ticks.map(tokens), space: 70, ...(data.along ? {} : { splits: (u) => u.data[0], filter: (u, ticks) => ticks }) },
          { ...axis, label: what, size: 62, values: (u, ticks) => ticks.map((v) => String(+v.toFixed(4)).replace("-", "−")) },
        ],
        series, bands,
        hooks: { setCursor: [(u) => read(u.cursor.idx)], drawAxes: [(u) => difference && zero(u, ink)] },
      }, columns, area);
      read(null);
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

    // Write the values under the pointer, or the last ones, beside the names of the arms.
    function read(index) {
      const i = index ?? plot.data[0].length - 1;
      const signed = gap || Boolean(show.value);
      at.textContent = plot.data[0].length ? `at ${tokens(plot.data[0][i])} tokens` : "";
      for (const arm of arms) values[arm].textContent = arm === show.value ? "(subtracted)" : "";
      for (const { arm, means, lows, highs, n } of drawn)
        if (means[i] !== null && means[i] !== undefined)
          values[arm].textContent = number(means[i], 3, signed) + (n > 1 ? ` ±${((highs[i] - lows[i]) / 2).toFixed(3)}` : "");
    }

    box.addEventListener("input", draw);
    new ResizeObserver(() => plot && area.clientWidth && Math.abs(plot.width - area.clientWidth) > 2 && draw()).observe(area);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => plot && draw());
    document.getElementById("theme").addEventListener("click", () => plot && draw());
    return draw;
  }

  for (const box of document.querySelectorAll(".chart")) {
    // A picture of one panel shows the same curves along training: the chart takes its place. Others, which show the paper's
    // values or more beside ours, stay above it.
    const picture = box.parentElement.querySelector(".picture");
    const alone = Number(box.dataset.panels) === 1 && JSON.parse(box.querySelector("script").textContent).along;
    const button = make("button", { type: "button", class: "button", "aria-expanded": String(alone) }, alone ? "Show the picture" : "Hover, zoom, switch arms");
    const holder = make("p", { class: "actions" }, button);
    box.before(holder);
    let draw;
    const set = (open) => {
      box.hidden = !open;
      if (alone) picture.hidden = open;
      button.textContent = open ? (alone ? "Show the picture" : "Close the chart") : "Hover, zoom, switch arms";
      button.setAttribute("aria-expanded", String(open));
      if (open && !draw) draw = chart(box);
      if (open) draw();
    };
    button.addEventListener("click", () => set(box.hidden));
    set(alone || (matchMedia("(max-width: 46rem)").matches && !picture.querySelector("source")));
  }
})();
