// What the tests ask of a page. Every function returns plain values.

const visible = (e) => e.checkVisibility({ visibilityProperty: true }) && e.getClientRects().length > 0;
const inSVG = (e) => e instanceof SVGElement;
const name = (e) => `${e.tagName}.${e.getAttribute("class") ?? ""} "${e.textContent.trim().slice(0, 40)}"`;
const own = (e) => [...e.childNodes].filter((n) => n.nodeType === 3 && n.data.trim());
const texts = () => [...document.querySelectorAll("body *:not(script):not(style):not(title)")].filter((e) => own(e).length && visible(e));
const scroller = (e) => e && (/auto|scroll/.test(getComputedStyle(e).overflowX) ? e : scroller(e.parentElement));

function rects(e) {
  const range = document.createRange();
  return own(e).flatMap((n) => { range.selectNodeContents(n); return [...range.getClientRects()]; });
}

// Where something sticks out: the document, a picture, a card that only tables and code may scroll in.
function overflows() {
  const root = document.documentElement, found = [];
  if (root.scrollWidth > root.clientWidth) found.push(`the document: ${root.scrollWidth} > ${root.clientWidth}`);
  for (const e of document.querySelectorAll("main *")) {
    if (!visible(e) || inSVG(e) || e.matches("pre, .wide, .wide *")) continue;
    if (e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== "inline") found.push(`${name(e)}: ${e.scrollWidth} > ${e.clientWidth}`);
  }
  for (const e of texts()) {
    const svg = e.closest("svg"), box = svg?.getBoundingClientRect();
    for (const r of svg ? [e.getBoundingClientRect()] : rects(e)) {
      if (box ? r.left < box.left - 1 || r.right > box.right + 1 || r.top < box.top - 1 || r.bottom > box.bottom + 1
              : !scroller(e) && (r.left < -1 || r.right > root.clientWidth + 1)) found.push(`${name(e)} is cut`);
    }
  }
  return found;
}

// Pairs of texts in one picture that lie on each other.
function collisions() {
  const found = [];
  for (const svg of document.querySelectorAll("main svg")) {
    const all = [...svg.querySelectorAll(".tick:not(.halo), .name")].filter(visible).map((e) => [e, e.getBoundingClientRect()]);
    all.forEach(([a, p], n) => all.slice(n + 1).forEach(([b, q]) => {
      if (Math.min(p.right, q.right) - Math.max(p.left, q.left) > 1 && Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 3)
        found.push(`${name(a)} on ${name(b)}`);
    }));
  }
  return found;
}

// Texts that are smaller on the screen than so many pixels.
function tiny(least) {
  return texts().flatMap((e) => {
    const svg = e.closest("svg"), scale = svg ? svg.getScreenCTM().a : 1;
    const size = parseFloat(getComputedStyle(e).fontSize) * scale;
    return size < least ? [`${name(e)}: ${size.toFixed(1)} px`] : [];
  });
}

const colours = new Map();
function colour(text) {  // [r, g, b, a] of what getComputedStyle says, which is rgb() or rgba() for what these pages write
  if (!colours.has(text)) {
    const found = text.match(/^rgba?\(([\d.]+), ([\d.]+), ([\d.]+)(?:, ([\d.]+))?\)$/);
    colours.set(text, found.slice(1).map((v, n) => (n < 3 || v ? Number(v) : 1)));
  }
  return colours.get(text);
}
const over = (top, base, a = 1) => [0, 1, 2].map((n) => top[n] * a + base[n] * (1 - a));
const linear = (v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
const light = (c) => 0.2126 * linear(c[0]) + 0.7152 * linear(c[1]) + 0.0722 * linear(c[2]);

function ground(e) {  // the colour behind an element
  const cell = e.parentElement.querySelector(":scope > rect.cell");
  if (cell) {
    const gone = getComputedStyle(cell.nextElementSibling);
    return over(colour(gone.fill), colour(getComputedStyle(cell).fill), parseFloat(gone.fillOpacity));
  }
  for (let at = e; at; at = at.parentElement) {
    const found = colour(getComputedStyle(at).backgroundColor);
    if (found[3] === 1) return found;
  }
  return [255, 255, 255];
}

// Texts whose contrast to what is behind them is below `least` (WCAG 2.2, relative luminance).
function pale(least) {
  const known = new Map();
  return texts().flatMap((e) => {
    const style = getComputedStyle(e), ink = colour(inSVG(e) ? style.fill : style.color), back = ground(e);
    const key = `${ink} ${back}`;
    if (!known.has(key)) {
      const [a, b] = [light(over(ink, back, ink[3])), light(back)];
      known.set(key, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
    }
    return known.get(key) < least ? [`${name(e)}: ${known.get(key).toFixed(2)}`] : [];
  });
}

// Pictures that answer, which of them has the focus, and the middle of a mark.
const answering = () => [...document.querySelectorAll("main svg[role=group]")].filter(visible);
const pictures = () => answering().length;
const where = () => answering().findIndex((svg) => svg.contains(document.activeElement));
function mark(picture, n) {
  const marks = [...answering().at(picture).querySelectorAll("[tabindex]")], found = marks.at(n);
  found.scrollIntoView({ block: "center" });
  const box = found.getBoundingClientRect();
  return { x: (box.left + box.right) / 2, y: (box.top + box.bottom) / 2, text: found.getAttribute("aria-label"), of: marks.length };
}
function tip() {
  const e = document.getElementById("tip"), box = e.getBoundingClientRect();
  const inside = box.left >= 0 && box.top >= 0 && box.right <= document.documentElement.clientWidth && box.bottom <= innerHeight;
  return { text: visible(e) ? e.textContent : "", inside };
}
const focused = () => [...answering()[where()].querySelectorAll("[tabindex]")].indexOf(document.activeElement);
const label = () => document.activeElement.getAttribute("aria-label");
