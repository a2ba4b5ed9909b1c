// Opens pages of the docs in headless Chromium: axe-core's findings, what is wider than the page, and screenshots.
// node docs_pages.js CHROMIUM OUT_DIR|- PAGE.html ..., with puppeteer-core and axe-core in NODE_PATH.
"use strict";
const fs = require("fs");
const path = require("path");
const puppeteer = require("puppeteer-core");
const axe = fs.readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

async function look(browser, file, width, scheme, folder) {
  const page = await browser.newPage();
  const asked = [];
  page.on("request", (one) => asked.push(one.url()));
  await page.setViewport({ width, height: 900 });
  await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
  await page.goto(`file://${path.resolve(file)}`, { waitUntil: "load" });
  // Lazy pictures are drawn where they are seen, which a picture of the whole page does not do by itself.
  await page.evaluate(() => document.querySelectorAll("img").forEach((one) => (one.loading = "eager")));
  await page.evaluate(() => Promise.all([...document.images].map((one) => one.decode().catch(() => null))));
  const sideways_px = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
  const lost = await page.evaluate(() => [...document.images].filter((one) => !one.naturalWidth).map((one) => one.src));
  if (folder !== "-") {
    const name = path.basename(file, ".html");
    await page.screenshot({ path: path.join(folder, `${name}-${width}-${scheme}.png`), fullPage: true });
  }
  await page.evaluate(axe);
  const found = await page.evaluate(() => window.axe.run());
  const violations = found.violations.map((one) => ({
    id: one.id, impact: one.impact, help: one.help, count: one.nodes.length,
    nodes: one.nodes.slice(0, 3).map((node) => node.html.slice(0, 200)),
  }));
  await page.close();
  return { width, scheme, sideways_px, lost, passes: found.passes.length, violations,
    requests: asked.filter((url) => !/^(file|data|blob):/.test(url)) };
}

async function main() {
  const [chromium, folder, ...files] = process.argv.slice(2);
  const args = ["--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"];
  const browser = await puppeteer.launch({ executablePath: chromium, headless: true, args });
  const pages = [];
  for (const file of files) {
    const looks = [];
    for (const width of [1400, 390])
      for (const scheme of ["light", "dark"]) looks.push(await look(browser, file, width, scheme, folder));
    pages.push(looks);
  }
  const version = await browser.version();
  await browser.close();
  console.log(JSON.stringify({ browser: version, axe: require("axe-core/package.json").version, pages }));
}
main().catch((error) => { console.error(error); process.exit(1); });
