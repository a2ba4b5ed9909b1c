// Point at a method anywhere, or press it in the legend, and its lines come forward. The page is whole without this.
"use strict";
const marked = document.querySelectorAll("[data-style]");
let pressed = null;
function show(style) {
  document.body.classList.toggle("chosen", style !== null);
  for (const one of marked) one.classList.toggle("front", one.dataset.style === style);
}
for (const one of marked) {
  one.addEventListener("pointerenter", () => show(one.dataset.style));
  one.addEventListener("pointerleave", () => show(pressed));
}
for (const button of document.querySelectorAll(".legend button")) {
  button.addEventListener("click", () => {
    pressed = pressed === button.dataset.style ? null : button.dataset.style;
    for (const one of document.querySelectorAll(".legend button"))
      one.setAttribute("aria-pressed", String(one.dataset.style === pressed));
    show(pressed);
  });
}
// Each figure is saved as it stands, with the colours of the page, and its numbers as CSV. Nothing is fetched.
const KEPT = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-dasharray", "stroke-linejoin", "opacity", "font-size", "font-family", "font-weight"];
function drawn(figure) {
  const shown = [...figure.querySelectorAll("svg[role=img]")].find((one) => one.getClientRects().length);
  const copy = shown.cloneNode(true);
  const [from, to] = [shown, copy].map((one) => [one, ...one.querySelectorAll("*")]);
  from.forEach((one, at) => {
    const style = getComputedStyle(one);
    for (const name of KEPT) to[at].style.setProperty(name, style.getPropertyValue(name));
  });
  const [, , width, height] = shown.getAttribute("viewBox").split(" ");
  copy.setAttribute("width", width);
  copy.setAttribute("height", height);
  copy.style.background = getComputedStyle(document.body).backgroundColor;
  return new XMLSerializer().serializeToString(copy);
}
function save(text, type, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
document.body.classList.add("scripted");
for (const button of document.querySelectorAll("[data-save]")) {
  button.addEventListener("click", () => {
    const figure = button.closest("figure");
    const title = figure.querySelector("figcaption span").firstChild.textContent;
    const name = title.trim().toLowerCase().replace(/[^a-z0-9]+/g, "-");
    if (button.dataset.save === "svg") save(drawn(figure), "image/svg+xml", `${name}.svg`);
    else save(figure.querySelector(".numbers").content.textContent, "text/csv", `${name}.csv`);
  });
}
