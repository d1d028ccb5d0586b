"use strict";
// Controls, keys and the start.
(() => {
  const { raw, state, element } = Lens;
  const byId = (id) => document.getElementById(id);
  const COLOURS = [["visual", "visual"], ["temporal", "temporal"], ["entropy", "entropy"], ["weight", "weight"],
    ["advantage", "advantage"], ["log_prob", "log p"]];
  const KEYS = [["j / k", "next, previous answer"], ["left / right", "previous, next token"], ["n / p", "next, previous prompt"],
    ["1 - 6", "colour by visual, temporal, entropy, weight, advantage, log p"], ["v / m / e", "signal visual, temporal (moments), entropy on and off"],
    ["s", "list or side by side"], ["r", "settings of training"], ["/", "search"], ["t", "light or dark"], ["?", "this"]];

  Lens.exportName = (number) => {
    const { run, step } = raw.exports[number];
    return new Set(raw.exports.map((item) => item.run)).size > 1 ? `${run}, step ${step}` : `step ${step}`;
  };

  function choice(label, options, value, act) {
    const box = element("div", "choice");
    if (label) box.append(element("span", "label", label));
    const set = element("div", "set");
    for (const [key, text, off] of options) {
      const button = element("button", key === value ? "on" : "", text);
      button.disabled = Boolean(off);
      button.setAttribute("aria-pressed", String(key === value));
      button.dataset.key = key;
      button.addEventListener("click", () => act(key));
      set.append(button);
    }
    box.append(set);
    return box;
  }

  let pending = false;
  function reselect() { // at most once a frame, however fast the slider moves
    if (pending) return;
    pending = true;
    requestAnimationFrame(() => {
      pending = false;
      Lens.reselect();
      Lens.repaint();
      shares();
      if (state.tab !== "histogram") Lens.showPanel();
      if (state.token !== null) Lens.showToken(state.token);
    });
  }

  function shares() {
    for (const name of Lens.SIGNALS) {
      const output = byId(`share-${name}`);
      if (!output) continue;
      let [tokens, taken] = [0, 0];
      for (const row of Lens.rowsOf(state.export)) {
        if (!raw.answers[name][row]) continue;
        for (let at = Lens.offsets[row]; at < Lens.offsets[row + 1]; at += 1) {
          if (!((Lens.flags[at] >> 6) & 1)) continue;
          tokens += 1;
          taken += Lens.masks[name][at];
        }
      }
      output.textContent = tokens ? `${((100 * taken) / tokens).toFixed(1)}% of ${tokens} tokens` : "no such tokens";
    }
    const trained = Lens.settingsOf(state.export);
    byId("reset").disabled = JSON.stringify(trained) === JSON.stringify(state.settings);
  }

  function controls() {
    const box = byId("controls");
    box.replaceChildren();
    const { settings } = state;
    const present = COLOURS.filter(([name]) => Lens.columns[name]);
    box.append(element("h3", "", "colour by"), choice("", present, state.colour, (key) => { state.colour = key; recolour(); }));
    box.append(scaleBar());
    box.append(element("h3", "", "selected tokens"));
    for (const name of Lens.SIGNALS) {
      const has = Lens.hasSignal(state.export, name);
      const line = element("div", `signal ${name}${has ? "" : " off"}`);
      const label = element("label");
      const on = Object.assign(element("input"), { type: "checkbox", checked: settings.on[name] && has, disabled: !has, id: `on-${name}` });
      on.addEventListener("change", () => {
        settings.on[name] = on.checked;
        if (on.checked && settings.ratios[name] === 0) settings.ratios[name] = 0.2;
        controls();
        reselect();
      });
      label.append(on, element("span", `key ${name}`, name));
      const slider = Object.assign(element("input"), { type: "range", min: 0, max: 1, step: 0.01, value: settings.ratios[name], disabled: !has, id: `ratio-${name}` });
      slider.setAttribute("aria-label", `share of tokens by ${name}`);
      const number = element("output", "", `${Math.round(settings.ratios[name] * 1000) / 10}%`);
      slider.addEventListener("input", () => {
        settings.ratios[name] = Number(slider.value);
        number.textContent = `${Math.round(settings.ratios[name] * 1000) / 10}%`;
        reselect();
      });
      label.append(number);
      line.append(label, slider, Object.assign(element("small", "dim", has ? "" : "not in this export"), { id: has ? `share-${name}` : "" }));
      box.append(line);
    }
    const set = (key) => (value) => { settings[key] = value; controls(); reselect(); };
    box.append(choice("of each", [["response", "answer"], ["group", "group"], ["batch", "batch"]], settings.scope, set("scope")));
    box.append(choice("ties", [["quantile", "together"], ["count", "exact count"]], settings.rule, set("rule")));
    box.append(choice("sign", [["trained", "as trained"], ["absolute", "magnitude"], ["signed", "signed"]], settings.sign, set("sign")));
    const reset = Object.assign(element("button", "wide", "settings of training"), { id: "reset" });
    reset.addEventListener("click", () => { state.settings = Lens.settingsOf(state.export); controls(); reselect(); });
    box.append(reset, agreement());
    box.append(element("h3", "", "answers"));
    box.append(choice("", [["all", "all"], ["right", "right"], ["wrong", "wrong"]], state.outcome, (key) => { state.outcome = key; relist(); }));
    box.append(choice("", [["list", "list"], ["side", "side by side"]], state.layout, (key) => { state.layout = key; relist(); }));
    shares();
  }

  function scaleBar() {
    const box = element("div", "scale");
    const { max, diverging } = Lens.scale();
    for (let i = 0; i <= 24; i += 1) {
      const t = diverging ? (i / 24) * 2 - 1 : i / 24;
      const cell = element("i");
      const colour = Lens.colourOf(Math.sign(t) * t * t * max || 0);
      cell.style.backgroundColor = colour ? colour.fill : "transparent";
      box.append(cell);
    }
    const ends = element("div", "ends");
    const first = diverging ? `-${Lens.format(max)}` : "0";
    ends.append(element("small", "", first), element("small", "dim", "square-root scale"), element("small", "", `${state.colour === "log_prob" ? "-" : ""}${Lens.format(max)}`));
    const whole = element("div");
    whole.append(box, ends);
    return whole;
  }

  function agreement() {
    const found = Lens.agreement(state.export);
    const node = Object.assign(element("p", "agreement"), { id: "agreement" });
    if (found === null || found.same + found.other === 0) node.textContent = "Training recorded no selection here.";
    else if (found.other === 0) {
      node.textContent = `With its settings this page selects as training did: ${found.same} of ${found.same} marks.`;
      node.classList.add("good");
    } else {
      node.textContent = `With its settings this page selects ${found.other} of ${found.same + found.other} marks otherwise than training did`
        + (raw.exports[state.export].tieSeed == null || Lens.settingsOf(state.export).scope !== "response"
          ? ": this export holds a part of the batch, or not what breaks ties." : ".");
      node.classList.add("bad");
    }
    return node;
  }

  function recolour() { Lens.rescale(); controls(); Lens.repaint(); Lens.showPanel(); }
  function relist() { controls(); Lens.layout(); Lens.showPanel(); }
  function choose(number) {
    state.export = number;
    if (state.compare === number) state.compare = null;
    Object.assign(state, { settings: Lens.settingsOf(number), answer: null, token: null });
    byId("list").scrollTop = 0;
    fill();
    refresh();
  }
  function refresh() { Lens.rescale(); Lens.reselect(); controls(); Lens.layout(); Lens.showPanel(); Lens.showToken(state.token); }

  function fill() {
    const option = (value, text, on) => Object.assign(element("option", "", text), { value, selected: on });
    byId("export").replaceChildren(...raw.exports.map((_, i) => option(i, Lens.exportName(i), i === state.export)));
    byId("compare").replaceChildren(option("", "nothing", state.compare === null),
      ...raw.exports.map((_, i) => i).filter((i) => i !== state.export).map((i) => option(i, Lens.exportName(i), i === state.compare)));
    byId("comparison").hidden = raw.exports.length < 2;
  }

  function setTheme(theme) {
    state.theme = theme;
    document.documentElement.dataset.theme = theme;
    Lens.forgetCharts();
    if (state.settings) { controls(); Lens.repaint(); Lens.showPanel(); Lens.showToken(state.token); }
  }
  const turn = () => setTheme(Lens.isDark() ? "light" : "dark");

  function step(by) {
    const order = Lens.order();
    if (!order.length) return;
    const at = order.indexOf(state.answer);
    const next = order[at < 0 ? 0 : Math.min(Math.max(at + by, 0), order.length - 1)];
    Lens.goTo(next, raw.answers.length[next] ? Lens.offsets[next] : null);
  }
  function stepPrompt(by) {
    const order = Lens.order();
    const at = order.indexOf(state.answer);
    const prompt = raw.answers.prompt[order[Math.max(at, 0)]];
    const rest = by > 0 ? order.slice(Math.max(at, 0)) : order.slice(0, Math.max(at, 0)).reverse();
    let next = rest.find((row) => raw.answers.prompt[row] !== prompt);
    if (next === undefined) return;
    next = order.find((row) => raw.answers.prompt[row] === raw.answers.prompt[next]);
    Lens.goTo(next, raw.answers.length[next] ? Lens.offsets[next] : null);
  }
  function stepToken(by) {
    if (state.answer === null) return step(1);
    const [first, last] = [Lens.offsets[state.answer], Lens.offsets[state.answer + 1] - 1];
    if (last < first) return;
    const at = state.token === null ? first : Math.min(Math.max(state.token + by, first), last);
    Lens.goTo(state.answer, at);
  }
  const flip = (name) => { const box = byId(`on-${name}`); if (!box.disabled) box.click(); };
  const ACTIONS = {
    j: () => step(1), k: () => step(-1), ArrowRight: () => stepToken(1), ArrowLeft: () => stepToken(-1),
    n: () => stepPrompt(1), p: () => stepPrompt(-1), v: () => flip("visual"), m: () => flip("temporal"), e: () => flip("entropy"),
    s: () => { state.layout = state.layout === "list" ? "side" : "list"; relist(); },
    r: () => byId("reset").click(), t: turn, "?": () => byId("keys").showModal(), "/": () => byId("search").focus(),
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || byId("keys").open) return;
    if (event.target.matches("input[type=search], select")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (event.target.matches("input[type=range]") && event.key.startsWith("Arrow")) return;
    const colour = COLOURS[Number(event.key) - 1];
    const action = ACTIONS[event.key] || (colour && Lens.columns[colour[0]] && (() => { state.colour = colour[0]; recolour(); }));
    if (!action) return;
    event.preventDefault();
    action();
  });

  function help() {
    const box = byId("keys");
    const grid = element("dl", "values");
    for (const [key, text] of KEYS) grid.append(element("dt", "", key), element("dd", "", text));
    const close = element("button", "wide", "close");
    close.addEventListener("click", () => box.close());
    box.append(element("h3", "", "keys"), grid, element("p", "dim", "Filled: the value that colours, on one scale for all answers. "
      + "Lines below a token: selected by visual, temporal, entropy. Everything here is in this file; it asks nothing of any network."), close);
  }

  byId("title").textContent = raw.title;
  byId("export").addEventListener("change", (event) => choose(Number(event.target.value)));
  byId("compare").addEventListener("change", (event) => {
    state.compare = event.target.value === "" ? null : Number(event.target.value);
    refresh();
  });
  let typing = 0;
  byId("search").addEventListener("input", (event) => {
    clearTimeout(typing);
    typing = setTimeout(() => { state.query = event.target.value.trim(); relist(); }, 120);
  });
  byId("theme").addEventListener("click", turn);
  byId("help").addEventListener("click", ACTIONS["?"]);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => setTheme(event.matches ? "dark" : "light"));
  state.colour = (COLOURS.find(([name]) => name === "temporal" && Lens.columns[name]) || COLOURS.find(([name]) => Lens.columns[name]) || ["weight"])[0];
  setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  help();
  choose(0);
  document.documentElement.dataset.ready = "yes";
})();
