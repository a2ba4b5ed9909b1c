// Opens a report in headless Chromium: axe-core's findings, seconds to open, requests, and screenshots.
// node report_page.js PAGE.html CHROMIUM OUT_DIR, with puppeteer-core and axe-core in NODE_PATH.
"use strict";
const fs = require("fs");
const path = require("path");
const puppeteer = require("puppeteer-core");
const axe = fs.readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

async function look(browser, file, width, scheme, folder) {
  const page = await browser.newPage();
  await page.setBypassCSP(true); // for axe, which is put in; the page itself needs no more than its policy
  const asked = [];
  page.on("request", (one) => asked.push(one.url()));
  await page.setViewport({ width, height: 900 });
  await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
  const began = performance.now();
  await page.goto(`file://${file}`, { waitUntil: "load" });
  await page.evaluate(() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))));
  const open_s = (performance.now() - began) / 1000;
  for (const one of await page.$$("details")) await one.evaluate((node) => (node.open = true));
  const sideways_px = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
  if (folder) await page.screenshot({ path: path.join(folder, `${width}-${scheme}.png`), fullPage: true });
  await page.evaluate(axe);
  const found = await page.evaluate(() => window.axe.run());
  const violations = found.violations.map((one) => ({
    id: one.id, impact: one.impact, help: one.help, nodes: one.nodes.slice(0, 3).map((node) => node.html.slice(0, 200)),
  }));
  const saved = await saves(page);
  const stops = await tabs(page);
  await page.close();
  return { width, scheme, open_s, sideways_px, passes: found.passes.length, violations, saved, stops,
    requests: asked.filter((url) => !/^(file|data|blob):/.test(url)) };
}

// What a press on each figure's two buttons would save: how many, and whether each is what it says.
async function saves(page) {
  return page.evaluate(async () => {
    const made = [];
    const make = URL.createObjectURL;
    URL.createObjectURL = (blob) => { made.push(blob); return "#"; };
    const buttons = [...document.querySelectorAll("[data-save]")];
    for (const button of buttons) button.click();
    URL.createObjectURL = make;
    const texts = await Promise.all(made.map((blob) => blob.text()));
    const svg = texts.filter((text) => new DOMParser().parseFromString(text, "image/svg+xml").documentElement.tagName === "svg");
    const csv = texts.filter((text) => !text.startsWith("<") && text.split("\n").length > 2);
    return { buttons: buttons.length, svg: svg.length, csv: csv.length };
  });
}

// How many stops the Tab key makes, and whether each is seen (an outline) and has a name.
async function tabs(page) {
  await page.evaluate(() => document.activeElement && document.activeElement.blur());
  let stops = 0, seen = 0;
  for (; stops < 400; stops++) {
    await page.keyboard.press("Tab");
    const state = await page.evaluate(() => {
      const one = document.activeElement;
      if (!one || one === document.body) return null;
      return { outline: getComputedStyle(one).outlineStyle !== "none", name: (one.getAttribute("aria-label") || one.textContent).trim() };
    });
    if (state === null) break;
    seen += state.outline && state.name.length > 0;
  }
  return { stops, seen };
}

async function main() {
  const [file, chromium, folder] = process.argv.slice(2);
  const browser = await puppeteer.launch({ executablePath: chromium, headless: true, args: ["--no-sandbox", "--disable-gpu"] });
  const looks = [];
  for (const width of [1400, 390])
    for (const scheme of ["light", "dark"]) looks.push(await look(browser, path.resolve(file), width, scheme, folder));
  const version = await browser.version();
  await browser.close();
  console.log(JSON.stringify({ browser: version, axe: require("axe-core/package.json").version, looks }));
}
main().catch((error) => { console.error(error); process.exit(1); });
