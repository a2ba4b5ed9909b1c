// What is wider than its box can be scrolled with the keys, and the two columns beside a page have names.
"use strict";

function reachable() {
  for (const one of document.querySelectorAll("article pre, article .table-wrapper")) {
    if (one.scrollWidth <= one.clientWidth) {
      one.removeAttribute("tabindex");
      continue;
    }
    one.tabIndex = 0;
    one.setAttribute("role", "group");
    one.setAttribute("aria-label", one.tagName === "PRE" ? "Code, wider than the page" : "Table, wider than the page");
  }
}

document.addEventListener("DOMContentLoaded", () => {
  const names = { "aside.sidebar-drawer": "All pages", "aside.toc-drawer": "This page" };
  for (const [one, name] of Object.entries(names)) document.querySelector(one)?.setAttribute("aria-label", name);
  reachable();
});
addEventListener("load", reachable);
addEventListener("resize", reachable);
