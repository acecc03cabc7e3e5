// A token is {token, alpha, base, teacher, entropy, forced} and, where known, q, lp, lt (log-probabilities) and
// top {base, q, teacher}, lists of [id, log-probability]. What every page does with one is here.
const tone = a => LOOK.tones[Math.round((LOOK.tones.length - 1) * Math.min(Math.max(a, 0), 1))];
const shade = kl => Math.round(LOOK.shades * (1 - Math.exp(-Math.max(kl, 0) / LOOK.scale)));
const tokenClass = t => `t a${Math.round(100 * t.alpha)} k${shade(Math.max(t.base, t.teacher))}${t.forced ? " forced" : ""}`;
const shown = s => s.replace(/\n/g, "⏎").replace(/ /g, "␣");
const cell = (tag, text, set) => Object.assign(document.createElement(tag), { textContent: text }, set);
const number = (x, digits) => x == null ? "∞" : x.toFixed(digits);

// What is known of a token, as the content of the tip.
function tokenTip(t, names) {
  const title = cell("h3", shown(t.token) || "(end)"), parts = [title];
  title.append(cell("em", `α ${number(t.alpha, 3)}${t.forced ? ", forced to the teacher" : ""}`));
  const entropy = t.entropy === undefined ? "" : ` · entropy ${number(t.entropy, 2)}`;
  parts.push(cell("div", `KL to base ${number(t.base, 3)}, to teacher ${number(t.teacher, 3)}${entropy}`));
  if (t.q !== undefined) parts.push(cell("div", `log q ${number(t.q, 2)} · base ${number(t.lp, 2)} · teacher ${number(t.lt, 2)}`));
  if (t.top) {
    const table = cell("table", ""), head = table.insertRow();
    for (const [name, a] of [["base", 0], ["q", t.alpha], ["teacher", 1]]) head.append(Object.assign(cell("th", name), { style: `color:${tone(a)}` }));
    for (let k = 0; k < 4; k++) {
      const row = table.insertRow();
      for (const [list, a] of [[t.top.base, 0], [t.top.q, t.alpha], [t.top.teacher, 1]]) {
        const td = row.insertCell();
        if (!list[k]) continue;
        const [id, logprob] = list[k], p = Math.exp(logprob), bar = document.createElement("u");
        td.textContent = `${p.toFixed(2)} ${shown(names[id] ?? `#${id}`)}`;
        if (names[id] === t.token) td.className = "drawn";
        bar.style.cssText = `width:${Math.max(100 * p, 1)}%;background:${tone(a)}`;
        td.append(bar);
      }
    }
    parts.push(table);
  }
  return parts;
}
function showTip(tip, parts, at) {
  tip.replaceChildren(...parts);
  const width = tip.offsetWidth, height = tip.offsetHeight;
  tip.style.left = Math.min(Math.max(at.left, 12), innerWidth - width - 12) + "px";
  tip.style.top = (at.bottom + height + 12 < innerHeight ? at.bottom + 8 : Math.max(at.top - height - 8, 8)) + "px";
  tip.style.visibility = "visible";
}
// Lets pointer and arrow keys walk through the tokens of a text: pick(index) shows one, hide() none.
function walk(text, count, picked, pick, hide) {
  text.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") hide(); });
  text.addEventListener("blur", hide);
  text.addEventListener("keydown", event => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") hide();
    if (!step || !count()) return;
    event.preventDefault();
    pick(Math.min(Math.max(picked() + step, 0), count() - 1));
  });
  document.addEventListener("scroll", hide, { passive: true });
}
// Curves over the tokens of one text: series are [name, colour, dashes].
function curves(svg, tokens, picked, top, series, ticks, digits, pick, hide) {
  const width = svg.clientWidth, height = +svg.getAttribute("height"), left = 34, low = height - 16, count = Math.max(tokens.length, 24);
  const x = k => left + (width - left - 4) * (count > 1 ? k / (count - 1) : 0), y = v => low - (low - 8) * Math.min(v ?? top, top) / top;
  let inner = ticks.map(v => `<line class="rule" x1="${left}" x2="${width}" y1="${y(v)}" y2="${y(v)}"/><text x="${left - 6}" y="${y(v) + 4}" text-anchor="end">${v.toFixed(digits)}</text>`).join("");
  inner += `<text x="${left}" y="${height - 1}">token 1</text><text x="${width}" y="${height - 1}" text-anchor="end">${count}</text>`;
  for (const [name, colour, dash] of series) {
    const points = tokens.map((t, k) => `${x(k).toFixed(1)},${y(t[name]).toFixed(1)}`).join(" ");
    inner += `<polyline points="${points}" fill="none" stroke="${colour}" stroke-width="2" stroke-linejoin="round" stroke-dasharray="${dash}"/>`;
    if (tokens[picked]) inner += `<circle cx="${x(picked)}" cy="${y(tokens[picked][name])}" r="4" fill="${colour}"/>`;
  }
  if (tokens[picked]) inner += `<line x1="${x(picked)}" x2="${x(picked)}" y1="8" y2="${low}" stroke="var(--soft)" stroke-dasharray="2 3"/>`;
  svg.innerHTML = inner;
  svg.onpointermove = event => {
    const k = Math.round((event.offsetX - left) / (width - left - 4) * (count - 1));
    if (tokens[k] && k !== picked) pick(k);
  };
  svg.onpointerleave = hide;
}
function drawCurves(tokens, picked, pick, hide) {
  const finite = tokens.flatMap(t => [t.base, t.teacher]).filter(x => x != null), most = Math.max(0.1, ...finite);
  curves(document.getElementById("alpha-chart"), tokens, picked, 1, [["alpha", "var(--middle)", ""]], [0, 0.5, 1], 1, pick, hide);
  curves(document.getElementById("kl-chart"), tokens, picked, most * 1.08, [["base", "var(--base)", ""], ["teacher", "var(--teacher)", "5 5"]], [0, most / 2, most], 2, pick, hide);
}
