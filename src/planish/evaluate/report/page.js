// Charts answer to pointer and keyboard. Tab goes from chart to chart, ← → along a line or row, ↑ ↓ to the next one, Escape closes.
(() => {
  const NEAR = 24, GAP = 8, MOST = 4;  // pixels on the screen; names of marks that lie on each other
  const tip = Object.assign(document.createElement("div"), { id: "tip", hidden: true });
  tip.setAttribute("role", "tooltip");
  document.body.append(tip);
  let shown = null;  // the mark that the tip is about

  const middle = (mark) => {
    const box = mark.getBoundingClientRect();
    return { x: (box.left + box.right) / 2, y: (box.top + box.bottom) / 2, top: box.top, bottom: box.bottom };
  };
  const show = (mark, text) => {
    hide();
    shown = mark;
    mark.classList.add("on");
    tip.textContent = text;
    tip.hidden = false;
    place();
  };
  const hide = () => {
    shown?.classList.remove("on");
    shown = null;
    tip.hidden = true;
  };
  const place = () => {
    if (!shown) return;
    const at = middle(shown), wide = document.documentElement.clientWidth;
    const left = Math.min(at.x - tip.offsetWidth / 2, wide - tip.offsetWidth - GAP);
    const above = at.top - tip.offsetHeight - GAP;
    tip.style.left = `${Math.max(GAP, left)}px`;
    tip.style.top = `${above > 0 ? above : at.bottom + GAP}px`;
  };

  for (const picture of document.querySelectorAll("main svg[role=img]")) {
    const card = picture.parentElement;  // listens: an SVG element that does becomes a stop of the Tab key
    const rows = new Map(), text = new Map();  // a line or row of cells → its marks; mark → what it says
    for (const title of picture.querySelectorAll("title")) {
      const mark = title.parentElement, row = mark.parentElement;
      text.set(mark, title.textContent);
      title.remove();  // or the browser shows it as well
      mark.setAttribute("role", "img");
      mark.setAttribute("aria-label", text.get(mark).replaceAll("\n", ", "));
      mark.setAttribute("tabindex", -1);
      rows.set(row, [...(rows.get(row) ?? []), mark]);
    }
    if (!text.size) continue;
    const lines = [...rows.values()].reverse();  // what is drawn last lies on top
    picture.setAttribute("role", "group");
    lines[0][0].setAttribute("tabindex", 0);

    const step = (mark, key) => {
      const at = middle(mark), line = lines.find((l) => l.includes(mark));
      line.sort((a, b) => middle(a).x - middle(b).x);
      const next = { ArrowLeft: line.indexOf(mark) - 1, ArrowRight: line.indexOf(mark) + 1, Home: 0, End: line.length - 1 }[key];
      if (next !== undefined) return line[next];
      const far = (m) => (m === mark ? -1 : Math.abs(middle(m).x - at.x));
      const column = lines.map((l) => l.reduce((a, b) => (far(b) < far(a) ? b : a)));
      const order = column.map((m, n) => [middle(m).y, n, m]).sort((a, b) => a[0] - b[0] || a[1] - b[1]).map((o) => o[2]);
      return order[order.indexOf(mark) + (key === "ArrowUp" ? -1 : 1)];
    };
    card.addEventListener("keydown", (event) => {
      if (!["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"].includes(event.key)) return;
      event.preventDefault();
      step(event.target, event.key)?.focus();
    });
    card.addEventListener("focusin", ({ target }) => {
      for (const mark of text.keys()) mark.setAttribute("tabindex", mark === target ? 0 : -1);
      show(target, text.get(target));
    });
    card.addEventListener("focusout", hide);

    let last = null;  // so that what Escape closed stays closed until the pointer reaches another mark
    card.addEventListener("pointermove", (event) => {
      const far = new Map();
      for (const mark of text.keys()) {
        const box = mark.getBoundingClientRect();
        const x = Math.max(box.left - event.clientX, 0, event.clientX - box.right);
        const y = Math.max(box.top - event.clientY, 0, event.clientY - box.bottom);
        far.set(mark, Math.hypot(x, y));
      }
      const near = [...text.keys()].reverse().reduce((a, b) => (far.get(b) < far.get(a) ? b : a));
      const found = far.get(near) <= NEAR ? near : null;
      if (found === last) return;
      last = found;
      if (!found) return hide();
      const under = [...text.keys()].filter((m) => m !== found && far.get(m) === 0).map((m) => text.get(m).split("\n")[0]);
      const more = under.length > MOST ? `; ${under.length - MOST} more` : "";
      show(found, text.get(found) + (under.length && !far.get(found) ? `\nalso here: ${under.slice(0, MOST).join("; ")}${more}` : ""));
    });
    card.addEventListener("pointerleave", () => { last = null; hide(); });
  }
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  for (const name of ["scroll", "resize"]) addEventListener(name, place, true);
})();
