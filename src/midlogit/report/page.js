const DATA = JSON.parse(document.getElementById("data").textContent), TIP = document.getElementById("tip");
const leave = () => { TIP.style.visibility = "hidden"; };

// Texts: the spans of a text are its tokens, in the order of its lists.
document.querySelectorAll("[data-text]").forEach(text => {
  const lists = DATA.texts[+text.dataset.text], spans = [...text.querySelectorAll(".t")];
  const charts = text.dataset.charts !== undefined;
  let picked = -1;
  const tokens = spans.map((span, k) => ({
    token: lists.token[k], alpha: lists.alpha[k], base: lists.base[k], teacher: lists.teacher[k], entropy: lists.entropy[k],
    forced: !!lists.forced[k], q: lists.q[k], lp: lists.lp[k], lt: lists.lt[k],
    top: lists.top && { base: lists.top.base[k], q: lists.top.q[k], teacher: lists.top.teacher[k] } }));
  const draw = () => { if (charts) drawCurves(tokens, picked, pick, hide); };
  const hide = () => { if (picked < 0) return; spans[picked].classList.remove("on"); picked = -1; leave(); draw(); };
  function pick(k) {
    if (picked >= 0) spans[picked].classList.remove("on");
    picked = k;
    spans[k].classList.add("on");
    showTip(TIP, tokenTip(tokens[k], DATA.names), spans[k].getClientRects()[0] ?? spans[k].getBoundingClientRect());
    draw();
  }
  for (const name of ["pointerover", "pointerdown"])
    text.addEventListener(name, event => { const k = spans.indexOf(event.target); if (k >= 0) pick(k); });
  walk(text, () => spans.length, () => picked, pick, hide);
  if (charts) { draw(); addEventListener("resize", draw); }
});

// Pictures: a mark says what it shows.
for (const name of ["pointerover", "pointerdown"])
  document.addEventListener(name, event => {
    const mark = event.target.closest?.("figure [aria-label]:not(svg)");
    if (!mark) { if (event.target.closest?.("figure")) leave(); return; }
    const box = mark.getBoundingClientRect();
    const at = { left: event.clientX + 14, bottom: Math.min(event.clientY, box.bottom), top: Math.min(event.clientY, box.bottom) };
    showTip(TIP, mark.getAttribute("aria-label").split("; ").map(part => cell("div", part)), at);
  });
document.querySelectorAll("figure").forEach(figure => figure.addEventListener("pointerleave", leave));
