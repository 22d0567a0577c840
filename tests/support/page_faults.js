// What is wrong with the page for those who cannot see it, or not well: a list of sentences.
() => {
  const faults = [];
  const shown = (element) => element.checkVisibility({ visibilityProperty: true });
  const name = (element) => element.getAttribute("aria-label") || element.textContent.trim() || element.labels?.[0]?.textContent.trim()
    || document.getElementById(element.getAttribute("aria-labelledby"))?.textContent.trim();
  const named = "button, a, select, textarea, input, summary, [role=img], [role=group], [role=region], dialog";
  for (const element of document.querySelectorAll(named))
    if (!name(element)) faults.push(`no name: ${element.outerHTML.slice(0, 120)}`);
  const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
  for (const id of ids) if (ids.indexOf(id) !== ids.lastIndexOf(id)) faults.push(`twice: #${id}`);
  for (const attribute of ["aria-labelledby", "aria-describedby", "aria-controls", "for"])
    for (const element of document.querySelectorAll(`[${attribute}]`))
      if (!document.getElementById(element.getAttribute(attribute)) && shown(element))
        faults.push(`${attribute} of nothing: ${element.outerHTML.slice(0, 120)}`);
  let last = 0;
  for (const heading of document.querySelectorAll("h1, h2, h3, h4")) {
    const level = Number(heading.tagName[1]);
    if (last && level > last + 1) faults.push(`skipped a level: ${heading.outerHTML.slice(0, 120)}`);
    last = level;
  }
  for (const element of document.querySelectorAll("button, a:not(.skip), select"))
    if (shown(element) && element.getBoundingClientRect().height < 16) faults.push(`too low: ${element.outerHTML.slice(0, 120)}`);
  const parsed = (colour) => {
    const parts = colour.match(/[\d.]+/g).map(Number);
    const scale = colour.startsWith("color(") ? 255 : 1;
    return [...parts.slice(0, 3).map((part) => part * scale), parts[3] ?? 1];
  };
  const luminance = (colour) => colour.slice(0, 3).map((part) => part / 255)
    .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
    .reduce((sum, part, place) => sum + part * [0.2126, 0.7152, 0.0722][place], 0);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parsed(getComputedStyle(at).backgroundColor);
      if (colour[3] > 0.9) return colour;
    }
    return [255, 255, 255, 1];
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const seen = new Set();
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || seen.has(element) || !shown(element) || element.closest("svg, option, :disabled")) continue;
    seen.add(element);
    const [one, other] = [parsed(getComputedStyle(element).color), behind(element)].map(luminance);
    const contrast = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    if (contrast < 4.5) faults.push(`contrast ${contrast.toFixed(2)}: ${element.outerHTML.slice(0, 120)}`);
  }
  if (seen.size < 30) faults.push(`only ${seen.size} texts were looked at`);
  return faults;
}
