"use strict";
// The list of answers. Only what can be seen is in the document: rows above and below are made when scrolled to.
(() => {
  const { raw, offsets, state } = Lens;
  const MARGIN = 800; // pixels made beyond the window
  const FRAME = 46; // height of a frame, as in lens.css
  const COLUMN = 330; // least width of an answer side by side
  const list = document.getElementById("list");
  const canvas = document.getElementById("canvas");
  let rows = [];
  let heights = [];
  let tops = [0];
  const made = new Map(); // number of a row -> its element

  // ---- small helpers; text never becomes markup
  Lens.element = (tag, className, text) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const { element } = Lens;
  Lens.format = (value) => {
    if (value === null || value === undefined || Number.isNaN(value)) return "-";
    if (value === 0) return "0";
    const size = Math.abs(value);
    return size >= 1000 || size < 0.001 ? value.toExponential(1) : value.toPrecision(3);
  };

  // ---- colours: one scale for all answers that are shown, so that they compare
  const DIVERGING = new Set(["advantage", "score_visual", "score_temporal"]);
  const RAMPS = {
    light: [[253, 231, 37, 0], [181, 222, 43, 0.45], [53, 183, 121, 0.75], [33, 145, 140, 0.9], [49, 104, 142, 1], [68, 1, 84, 1]],
    dark: [[68, 1, 84, 0], [72, 60, 150, 0.55], [49, 104, 142, 0.85], [33, 145, 140, 0.95], [53, 183, 121, 1], [253, 231, 37, 1]],
    low: [[5, 113, 176, 0], [5, 113, 176, 0.95]],
    high: [[230, 97, 1, 0], [230, 97, 1, 0.95]],
  };
  function ramp(stops, t) {
    const x = Math.min(Math.max(t, 0), 1) * (stops.length - 1);
    const low = Math.min(Math.floor(x), stops.length - 2);
    return stops[low].map((value, i) => value + (x - low) * (stops[low + 1][i] - value));
  }
  Lens.isDark = () => state.theme === "dark";
  let scale = { max: 1, diverging: false };
  Lens.scale = () => scale;
  Lens.rescale = () => {
    const found = [];
    for (const number of new Set([state.export, state.compare])) {
      if (number === null) continue;
      for (const row of Lens.rowsOf(number)) {
        for (let at = offsets[row]; at < offsets[row + 1]; at += 1) {
          const value = Math.abs(Lens.value(state.colour, at));
          if (value > 0) found.push(value); // NaN is not
        }
      }
    }
    const sorted = Float32Array.from(found).sort();
    const top = sorted.length ? sorted[Math.floor(raw.scalePart * (sorted.length - 1))] : 1;
    scale = { max: top || 1, diverging: DIVERGING.has(state.colour) || (sorted.length > 0 && hasNegative()) };
  };
  function hasNegative() {
    const column = Lens.columns[state.colour];
    return state.colour !== "log_prob" && column !== undefined && column.some((value) => value < 0);
  }
  const LEVELS = 48; // enough for an eye, and few enough to keep
  let palette = { key: "", colours: new Map() };
  Lens.colourOf = (value) => {
    if (Number.isNaN(value)) return null;
    const key = `${state.theme}/${scale.diverging}`;
    if (palette.key !== key) palette = { key, colours: new Map() };
    // A square root: small differences can be seen as well.
    const level = Math.round(Math.sqrt(Math.min(Math.abs(value) / scale.max, 1)) * LEVELS) * (value < 0 ? -1 : 1);
    if (!palette.colours.has(level)) palette.colours.set(level, colourAt(level / LEVELS));
    return palette.colours.get(level);
  };
  function colourAt(t) {
    const [r, g, b, a] = scale.diverging
      ? ramp(t < 0 ? RAMPS.low : RAMPS.high, Math.abs(t))
      : ramp(Lens.isDark() ? RAMPS.dark : RAMPS.light, Math.abs(t));
    const under = Lens.isDark() ? 22 : 255;
    const light = (0.299 * r + 0.587 * g + 0.114 * b) * a + under * (1 - a);
    const fill = `rgba(${r.toFixed(0)},${g.toFixed(0)},${b.toFixed(0)},${a.toFixed(3)})`;
    return { fill, ink: light > 135 ? "#111" : "#fff" };
  }

  // ---- what is shown
  const matches = (row) => {
    if (state.outcome !== "all" && raw.answers.right[row] !== (state.outcome === "right")) return false;
    if (!state.query) return true;
    const query = state.query.toLowerCase();
    return Lens.prompts[raw.answers.prompt[row]].text.toLowerCase().includes(query)
      || Lens.textOf(row).toLowerCase().includes(query);
  };
  const keyOf = (number) => {
    const prompt = Lens.prompts[number];
    return JSON.stringify([prompt.text, prompt.strips.map((strip) => strip.path)]);
  };
  // Groups of answers by prompt: {prompt, sides: [rows of the first export, rows of the other]}.
  Lens.groups = () => {
    const found = new Map();
    const side = (number, place) => {
      for (const row of Lens.rowsOf(number)) {
        const prompt = raw.answers.prompt[row];
        const key = state.compare === null ? prompt : keyOf(prompt);
        if (!found.has(key)) found.set(key, { prompt, sides: [[], []], seen: [false, false] });
        found.get(key).seen[place] = true;
        if (matches(row)) found.get(key).sides[place].push(row);
      }
    };
    side(state.export, 0);
    if (state.compare !== null) side(state.compare, 1);
    const groups = [...found.values()].filter((group) => group.sides[0].length + group.sides[1].length);
    return state.compare === null ? groups : groups.filter((group) => group.seen[0] && group.seen[1]);
  };

  Lens.layout = () => {
    rows = [];
    const width = list.clientWidth - 40;
    const across = state.layout === "side" ? Math.max(1, Math.floor(width / COLUMN)) : 1;
    let shown = 0;
    for (const group of Lens.groups()) {
      rows.push({ head: group, guess: 150 });
      const [first, second] = group.sides;
      shown += first.length + second.length;
      if (state.compare !== null) {
        for (let i = 0; i < Math.max(first.length, second.length); i += 1) {
          rows.push({ answers: [first[i], second[i]], columns: 2, guess: 90 });
        }
        continue;
      }
      for (let i = 0; i < first.length; i += across) {
        const members = first.slice(i, i + across);
        const length = Math.max(...members.map((row) => raw.answers.length[row]));
        rows.push({ answers: members, columns: across, guess: 50 + Math.ceil((length * 50 * across) / width) * 30 });
      }
    }
    heights = rows.map((row) => row.guess);
    for (const node of made.values()) node.remove();
    made.clear();
    document.getElementById("count").textContent = `${shown} answers`;
    let empty = document.getElementById("empty");
    if (!rows.length) {
      if (!empty) list.append((empty = Object.assign(element("p", "note"), { id: "empty" })));
      empty.textContent = raw.answers.length.length ? emptiness() : "These exports hold no answers.";
    } else if (empty) empty.remove();
    place();
    Lens.draw();
  };
  const emptiness = () => (state.compare !== null
    ? "The two steps have no prompt in common (same text, same clips)." : "No answer is like that.");

  function place() {
    tops = new Array(rows.length + 1);
    tops[0] = 8;
    heights.forEach((height, i) => { tops[i + 1] = tops[i] + height; });
    canvas.style.height = `${tops[rows.length] + 40}px`;
  }
  function rowAt(y) {
    let [low, high] = [0, rows.length];
    while (low + 1 < high) {
      const middle = (low + high) >> 1;
      if (tops[middle] <= y) low = middle; else high = middle;
    }
    return low;
  }

  Lens.draw = () => {
    if (!rows.length) return;
    const anchor = rowAt(list.scrollTop);
    const before = tops[anchor];
    for (let pass = 0; pass < 4; pass += 1) { // heights are known once a row is made
      const first = rowAt(Math.max(list.scrollTop - MARGIN, 0));
      const last = rowAt(list.scrollTop + list.clientHeight + MARGIN);
      for (const [number, node] of made) if (number < first || number > last) { node.remove(); made.delete(number); }
      const fresh = [];
      const together = document.createDocumentFragment();
      for (let number = first; number <= last; number += 1) {
        if (made.has(number)) continue;
        const node = rows[number].head ? headOf(rows[number].head) : answersOf(rows[number]);
        made.set(number, node);
        fresh.push(number);
        together.append(node);
      }
      canvas.append(together);
      let changed = false;
      for (const number of fresh) {
        const height = made.get(number).offsetHeight;
        if (height !== heights[number]) { heights[number] = height; changed = true; }
      }
      if (changed) place();
      for (const [number, node] of made) node.style.transform = `translateY(${tops[number]}px)`;
      if (!changed) break;
    }
    const moved = tops[anchor] - before;
    if (moved) list.scrollTop += moved; // what is looked at stays where it is
  };
  Lens.inDocument = () => made.size;

  // ---- one prompt
  function headOf(group) {
    const prompt = Lens.prompts[group.prompt];
    const node = element("article", "head");
    const title = element("div", "question");
    title.append(element("span", "id", prompt.id), element("span", "ask", prompt.text));
    node.append(title);
    const rewards = element("div", "rewards");
    group.sides.forEach((side, place) => {
      if (!side.length) return;
      const group_ = element("span", "dots");
      if (state.compare !== null) group_.append(element("small", "", Lens.exportName(place ? state.compare : state.export)));
      for (const row of side) {
        const dot = element("button", `dot ${outcomeOf(row)}`, Lens.format(raw.answers.reward[row]));
        dot.title = `answer ${raw.answers.number[row]}: reward ${Lens.format(raw.answers.reward[row])}`;
        dot.addEventListener("click", () => Lens.goTo(row));
        group_.append(dot);
      }
      rewards.append(group_);
    });
    node.append(rewards, Lens.stripsOf(prompt));
    return node;
  }
  const outcomeOf = (row) => (raw.answers.right[row] === null ? "open" : raw.answers.right[row] ? "right" : "wrong");

  Lens.stripsOf = (prompt) => {
    const box = element("div", "strips");
    if (!prompt.clipsKnown) box.append(element("p", "note", "This export does not say which clip the prompt shows."));
    for (const strip of prompt.strips) {
      const view = raw.exports[prompt.export].views.temporal || "shuffled";
      if (strip.frames.length) {
        const both = element("div", "pair");
        both.append(stripOf(strip, strip.frames.map((_, i) => i), "real"));
        if (strip.order) both.append(stripOf(strip, strip.order, view));
        box.append(both);
      }
      if (strip.note) box.append(element("p", "note", strip.note));
    }
    return box;
  };
  function stripOf(strip, order, name) {
    const line = element("figure", "strip");
    line.append(element("figcaption", "", name));
    order.forEach((source, place) => {
      const cell = element("span", "frame");
      const image = element("img");
      image.src = strip.frames[source];
      image.alt = `frame ${source + 1}`;
      image.style.width = `${Math.round(FRAME * strip.aspect)}px`; // known before it is decoded, as rows are measured
      const seconds = strip.times[source];
      image.title = `frame ${source + 1}, ${seconds} s${source === place ? "" : `, shown at place ${place + 1}`}`;
      cell.append(image, element("small", source === place ? "" : "moved", `${source + 1}`));
      line.append(cell);
    });
    return line;
  }

  // ---- one answer
  function answersOf(row) {
    const node = element("div", "answers");
    node.style.setProperty("--columns", row.columns);
    row.answers.forEach((answer, place) => {
      node.append(answer === undefined ? element("div", "answer none", "no such answer") : answerOf(answer, row.answers, place));
    });
    return node;
  }
  function answerOf(row, pair) {
    const node = element("article", `answer ${outcomeOf(row)}${row === state.answer ? " current" : ""}`);
    node.dataset.row = row;
    const head = element("div", "meta");
    const first = Lens.offsets[row];
    head.append(element("b", "", `#${raw.answers.number[row]}`), element("span", `badge ${outcomeOf(row)}`,
      { right: "right", wrong: "wrong", open: "reward" }[outcomeOf(row)] + ` ${Lens.format(raw.answers.reward[row])}`));
    const advantage = Lens.value("advantage", first);
    if (raw.answers.length[row] && !Number.isNaN(advantage)) head.append(element("span", "dim", `A ${advantage > 0 ? "+" : ""}${Lens.format(advantage)}`));
    head.append(element("span", "dim", `${raw.answers.length[row]} tokens`));
    if (state.compare !== null && pair.length === 2 && same(pair[0], pair[1])) head.append(element("span", "dim", "same answer"));
    node.append(head, textOf(row));
    return node;
  }
  function same(a, b) {
    if (a === undefined || b === undefined || raw.answers.length[a] !== raw.answers.length[b]) return false;
    for (let i = 0; i < raw.answers.length[a]; i += 1) if (Lens.words[offsets[a] + i] !== Lens.words[offsets[b] + i]) return false;
    return true;
  }
  function textOf(row) {
    const box = element("p", "text");
    if (!raw.answers.length[row]) box.append(element("span", "note", "(no tokens)"));
    for (let at = offsets[row]; at < offsets[row + 1]; at += 1) {
      const text = Lens.vocabulary[Lens.words[at]];
      const blank = text.length - text.trimStart().length;
      if (blank && blank < text.length) box.append(text.slice(0, blank));
      const token = document.createElement("span");
      token.textContent = blank === text.length ? text.replaceAll("\n", "⏎\n").replaceAll(" ", "␣") || "·" : text.slice(blank);
      token.dataset.at = at;
      Lens.paint(token, at);
      box.append(token);
    }
    return box;
  }
  const CLASSES = Array.from({ length: 8 }, (_, bits) => `tok${bits & 1 ? " v" : ""}${bits & 2 ? " m" : ""}${bits & 4 ? " e" : ""}`);
  Lens.paint = (token, at) => {
    const colour = Lens.colourOf(Lens.value(state.colour, at));
    const style = colour ? `background-color:${colour.fill};color:${colour.ink}` : "";
    if (token.styled !== style) { token.style.cssText = style; token.styled = style; }
    const name = CLASSES[Lens.selected(at)] + ((Lens.flags[at] >> 6) & 1 ? "" : " cut") + (at === state.token ? " current" : "");
    if (token.className !== name) token.className = name;
  };
  Lens.repaint = () => {
    for (const node of made.values()) {
      for (const token of node.querySelectorAll(".tok")) Lens.paint(token, Number(token.dataset.at));
    }
  };

  // ---- moving about
  Lens.order = () => rows.flatMap((row) => (row.answers || []).filter((answer) => answer !== undefined));
  Lens.goTo = (answer, at) => {
    const number = rows.findIndex((row) => row.answers && row.answers.includes(answer));
    if (number < 0) return;
    state.answer = answer;
    if (at !== undefined) state.token = at;
    const bottom = tops[number] + heights[number];
    if (tops[number] < list.scrollTop + 20) list.scrollTop = tops[number] - 60;
    else if (bottom > list.scrollTop + list.clientHeight) {
      list.scrollTop = Math.min(tops[number] - 60, bottom - list.clientHeight + 60);
    }
    Lens.draw();
    for (const node of canvas.querySelectorAll(".answer")) {
      node.classList.toggle("current", Number(node.dataset.row) === answer && node.dataset.row !== undefined);
    }
    for (const token of canvas.querySelectorAll(".tok.current")) token.classList.remove("current");
    const token = canvas.querySelector(`.tok[data-at="${Number(state.token)}"]`);
    if (token) token.classList.add("current");
    Lens.showToken(state.token);
  };
  canvas.addEventListener("mouseover", (event) => {
    const token = event.target.closest(".tok");
    if (token) Lens.showToken(Number(token.dataset.at));
  });
  canvas.addEventListener("click", (event) => {
    const token = event.target.closest(".tok");
    const answer = event.target.closest(".answer[data-row]");
    if (answer) Lens.goTo(Number(answer.dataset.row), token ? Number(token.dataset.at) : undefined);
  });
  let waiting = false;
  list.addEventListener("scroll", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; Lens.draw(); });
  }, { passive: true });
  new ResizeObserver(() => { if (rows.length) { const top = list.scrollTop; Lens.layout(); list.scrollTop = top; Lens.draw(); } }).observe(list);
})();
