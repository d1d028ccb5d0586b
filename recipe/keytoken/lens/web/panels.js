"use strict";
// What stands beside the list: one token, its answer as curves, and tables and histograms of all that is shown.
(() => {
  const { raw, offsets, state, element, format } = Lens;
  const byId = (id) => document.getElementById(id);
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const VALUES = [
    ["visual", "visual score"], ["temporal", "temporal score"], ["entropy", "entropy"],
    ["uncertainty", "score of the entropy signal"], ["truncated_entropy", "entropy of the nucleus"],
    ["disagreement", "disagreement"], ["log_prob", "log p, real clip"], ["log_prob_masked", "log p, without the picture"],
    ["log_prob_shuffled", "log p, other order"], ["weight", "weight in training"], ["advantage", "advantage"],
  ];
  const COLOURS = { visual: "--visual", temporal: "--temporal", entropy: "--entropy" };
  const rowOfToken = (at) => {
    let [low, high] = [0, offsets.length - 1];
    while (low + 1 < high) { const middle = (low + high) >> 1; if (offsets[middle] <= at) low = middle; else high = middle; }
    return low;
  };

  // ---- one token
  let drawn = null;
  Lens.showToken = (at) => {
    const box = byId("token");
    box.replaceChildren();
    if (at === null) {
      box.append(element("h3", "", "token"), element("p", "note", "Point at a token, or press j and the arrows."));
      return drawProfile(null);
    }
    const row = rowOfToken(at);
    const word = Lens.vocabulary[Lens.words[at]];
    const title = element("h3");
    title.append(element("code", "word", word.trim() || JSON.stringify(word)),
      element("span", "dim", ` ${at - offsets[row] + 1} of ${raw.answers.length[row]}, ${Lens.classes[Lens.words[at]]}`));
    box.append(title);
    const grid = element("dl", "values");
    for (const [name, label] of VALUES) {
      const value = Lens.value(name, at);
      if (Number.isNaN(value)) continue;
      const key = element("dt", COLOURS[name] ? `key ${name}` : "", label);
      grid.append(key, element("dd", "", format(value)));
    }
    box.append(grid);
    const names = (bits) => Lens.SIGNALS.filter((_, bit) => (bits >> bit) & 1).join(", ") || "nothing";
    const bits = Lens.flags[at];
    const facts = element("p", "dim");
    facts.textContent = `now selected by ${names(Lens.selected(at))}`
      + ((bits >> 3) & 7 ? `; in training by ${names(bits & (bits >> 3) & 7)}` : "")
      + ((bits >> 6) & 1 ? "" : "; not part of the loss");
    box.append(facts);
    drawProfile(row, at - offsets[row]);
  };

  // ---- charts, by uPlot
  const axis = (label, extra) => ({
    stroke: () => css("--dim"), grid: { stroke: () => css("--line"), width: 1 }, ticks: { show: false },
    font: "11px system-ui", labelFont: "11px system-ui", label, labelSize: 14, size: label ? 30 : 26, ...extra,
  });
  let profile = null;
  function drawProfile(row, position) {
    const box = byId("profile");
    const key = `${row}/${state.theme}/${box.clientWidth}`;
    if (row === null || !raw.answers.length[row]) { box.replaceChildren(); profile = null; drawn = null; return; }
    if (key !== drawn) {
      drawn = key;
      box.replaceChildren();
      const range = [offsets[row], offsets[row + 1]];
      const names = Lens.SIGNALS.filter((name) => Lens.columns[name] && !Number.isNaN(Lens.columns[name][range[0]]));
      const data = [Array.from({ length: range[1] - range[0] }, (_, i) => i + 1),
        ...names.map((name) => Array.from(Lens.columns[name].subarray(...range)))];
      profile = new uPlot({
        width: box.clientWidth, height: 120, cursor: { y: false, drag: { x: true, y: false } }, legend: { show: false },
        scales: { x: { time: false } },
        axes: [axis("", { size: 20 }), axis("", { size: 36 })],
        series: [{}, ...names.map((name) => ({ label: name, stroke: () => css(COLOURS[name]), width: 1.5, points: { show: data[0].length < 60, size: 4 } }))],
      }, data, box);
    }
    if (profile) profile.setCursor({ left: profile.valToPos(position + 1, "x"), top: 10 }, false);
  }

  // Tokens of the answers that the list shows, of the first export only unless two are compared.
  function shown() {
    return Lens.groups().flatMap((group) => group.sides.flat());
  }
  function* tokensOf(rows) {
    for (const row of rows) {
      for (let at = offsets[row]; at < offsets[row + 1]; at += 1) if ((Lens.flags[at] >> 6) & 1) yield [at, row];
    }
  }

  function histogram(panel) {
    const rows = shown();
    const top = Lens.scale().max * 1.25;
    const low = Lens.scale().diverging || state.colour === "log_prob" ? -top : 0;
    const count = 40;
    const step = (top - low) / count;
    const edges = Array.from({ length: count }, (_, i) => low + (i + 0.5) * step);
    const split = rows.some((row) => raw.answers.right[row] === true) && rows.some((row) => raw.answers.right[row] === false);
    const kinds = split ? ["right", "wrong"] : ["all"];
    const bins = kinds.map(() => new Array(count).fill(0));
    const totals = kinds.map(() => 0);
    for (const [at, row] of tokensOf(rows)) {
      const value = Lens.value(state.colour, at);
      if (Number.isNaN(value) || raw.answers[state.colour]?.[row] === false) continue; // no such signal
      const kind = split ? (raw.answers.right[row] ? 0 : 1) : 0;
      totals[kind] += 1;
      bins[kind][Math.max(0, Math.min(count - 1, Math.floor((value - low) / step)))] += 1;
    }
    const shares = bins.map((bin, kind) => bin.map((number) => (100 * number) / Math.max(totals[kind], 1)));
    panel.append(element("p", "dim", `${state.colour.replaceAll("_", " ")}: percent of the tokens of `
      + kinds.map((kind, i) => `${kind} answers (${totals[i]})`).join(" and of ") + ". The last bar holds all above; the scale of percents is bent near 0."));
    const chart = element("div", "chart");
    panel.append(chart);
    const legend = element("p", "legend");
    kinds.forEach((kind) => legend.append(element("span", `swatch ${kind}`), ` ${kind}  `));
    panel.append(legend);
    new uPlot({
      width: chart.clientWidth || 340, height: 210, legend: { show: false }, cursor: { y: false },
      scales: { x: { time: false }, y: { distr: 4, asinh: 1, range: (_, __, max) => [0, max * 1.1] } },
      axes: [axis("", { size: 22 }), axis("", { size: 40, filter: (_, ticks) => ticks, splits: (u) => [0, 0.3, 1, 3, 10, 30, 100].filter((t) => t <= u.scales.y.max), values: (_, ticks) => ticks.map((t) => `${t}%`) })],
      series: [{}, ...kinds.map((kind) => ({
        label: kind, stroke: () => css(`--${kind}`), fill: () => `${css(`--${kind}`)}33`, width: 1.5,
        paths: uPlot.paths.stepped({ align: 1 }), points: { show: false },
      }))],
    }, [edges, ...shares], chart);
  }

  // Rows of a table by the key of a token: how often, and mean scores of right and wrong answers.
  function gather(keyOf) {
    const found = new Map();
    for (const [at, row] of tokensOf(shown())) {
      const key = keyOf(Lens.words[at]);
      if (key === "") continue;
      if (!found.has(key)) found.set(key, { key, tokens: 0, visual: 0, temporal: 0, entropy: 0, nv: 0, nt: 0, ne: 0, selected: 0 });
      const entry = found.get(key);
      entry.tokens += 1;
      if (Lens.selected(at)) entry.selected += 1;
      for (const [name, n] of [["visual", "nv"], ["temporal", "nt"], ["entropy", "ne"]]) {
        if (name !== "entropy" && !raw.answers[name][row]) continue;
        const value = Lens.value(name, at);
        if (!Number.isNaN(value)) { entry[name] += value; entry[n] += 1; }
      }
    }
    return [...found.values()].map((entry) => ({
      key: entry.key, tokens: entry.tokens, visual: entry.visual / entry.nv, temporal: entry.temporal / entry.nt,
      entropy: entry.entropy / entry.ne, selected: entry.selected / entry.tokens,
    }));
  }
  let sorting = { column: "temporal", down: true };
  function table(panel, name, keyOf, least) {
    let rows = gather(keyOf).filter((entry) => entry.tokens >= least);
    const value = (entry) => (Number.isNaN(entry[sorting.column]) ? -Infinity : entry[sorting.column]);
    rows.sort((a, b) => (sorting.column === "key" ? a.key.localeCompare(b.key) : value(b) - value(a)) * (sorting.down ? 1 : -1));
    const total = rows.length;
    rows = rows.slice(0, 60);
    panel.append(element("p", "dim", `Means over the tokens that the list shows; a click on a heading sorts.${total > 60 ? ` The first 60 of ${total}.` : ""}`));
    const node = element("table");
    const head = element("tr");
    for (const [column, label] of [["key", name], ["tokens", "n"], ["visual", "visual"], ["temporal", "temporal"], ["entropy", "entropy"], ["selected", "selected"]]) {
      const cell = element("th", column === sorting.column ? "sorted" : "");
      const button = element("button", "", label);
      button.addEventListener("click", () => {
        sorting = { column, down: column === sorting.column ? !sorting.down : true };
        Lens.showPanel();
      });
      cell.append(button);
      head.append(cell);
    }
    node.append(head);
    const most = {};
    for (const signal of Lens.SIGNALS) most[signal] = Math.max(...rows.map((entry) => Math.abs(entry[signal]) || 0), 1e-9);
    for (const entry of rows) {
      const line = element("tr");
      line.append(element("td", "word", entry.key), element("td", "", entry.tokens));
      for (const signal of Lens.SIGNALS) {
        const cell = element("td", `bar ${signal}`, format(entry[signal]));
        cell.style.setProperty("--part", `${(100 * (Math.abs(entry[signal]) || 0)) / most[signal]}%`);
        line.append(cell);
      }
      line.append(element("td", "", `${(100 * entry.selected).toFixed(0)}%`));
      node.append(line);
    }
    panel.append(node);
  }

  function outcomes(panel) {
    const kinds = [["right", true], ["wrong", false]];
    const all = shown();
    panel.append(element("p", "dim", "Mean over the tokens of an answer, averaged over answers; right against wrong."));
    const node = element("table");
    const head = element("tr");
    ["", ...kinds.map(([kind]) => `${kind} (${all.filter((row) => raw.answers.right[row] === (kind === "right")).length})`), "difference"]
      .forEach((label) => head.append(element("th", "", label)));
    node.append(head);
    const mean = (list) => (list.length ? list.reduce((a, b) => a + b, 0) / list.length : NaN);
    const measures = [...Lens.SIGNALS.map((name) => [name, (at) => Lens.value(name, at)]), ["selected now", (at) => (Lens.selected(at) ? 1 : 0)],
      ["weight in training", (at) => Lens.value("weight", at)]];
    for (const [label, measure] of measures) {
      const means = kinds.map(([, flag]) => mean(all.filter((row) => raw.answers.right[row] === flag
          && (raw.answers[label] === undefined || raw.answers[label][row]))
        .map((row) => mean([...tokensOf([row])].map(([at]) => measure(at)))).filter((x) => !Number.isNaN(x))));
      const line = element("tr");
      line.append(element("td", "word", label), ...means.map((value) => element("td", "", format(value))), element("td", "", format(means[0] - means[1])));
      node.append(line);
    }
    panel.append(node);
  }

  function about(panel) {
    for (const number of new Set([state.export, state.compare])) {
      if (number === null) continue;
      const item = raw.exports[number];
      panel.append(element("h3", "", Lens.exportName(number)));
      const views = item.views;
      panel.append(element("p", "", `Method ${item.method || "unknown"}${item.control !== "none" ? `, control ${item.control}` : ""}.`
        + (views.visual ? ` Visual: against the view ${views.visual}. Temporal: against the view ${views.temporal}.` : "")));
      for (const note of item.missing) panel.append(element("p", "note", note));
      if (item.selection) {
        const grid = element("dl", "values");
        for (const [key, value] of Object.entries(item.selection)) grid.append(element("dt", "", key.replaceAll("_", " ")), element("dd", "", value === null ? "none" : String(value)));
        panel.append(grid);
      }
    }
  }

  const TABS = { histogram, words: (panel) => table(panel, "word", (id) => Lens.vocabulary[id].trim(), 2),
    classes: (panel) => table(panel, "class", (id) => Lens.classes[id], 1), outcomes, about };
  Lens.showPanel = () => {
    const tabs = byId("tabs");
    tabs.replaceChildren();
    for (const name of Object.keys(TABS)) {
      const button = element("button", name === state.tab ? "on" : "", name);
      button.setAttribute("role", "tab");
      button.setAttribute("aria-selected", String(name === state.tab));
      button.addEventListener("click", () => { state.tab = name; Lens.showPanel(); });
      tabs.append(button);
    }
    byId("panel").replaceChildren();
    TABS[state.tab](byId("panel"));
  };
  Lens.forgetCharts = () => { drawn = null; };
})();
