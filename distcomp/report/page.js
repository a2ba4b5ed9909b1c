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
