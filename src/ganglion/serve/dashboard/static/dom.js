// Elements without innerHTML: everything that a robot or an operator wrote is text, never markup.

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

export function setText(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

export function setValue(target, number, unit = "", tone = "") {
  const key = `${number}|${unit}|${tone}`;
  if (target.dataset.shown === key) return;
  target.dataset.shown = key;
  target.className = tone;
  target.replaceChildren(number, ...(unit ? [element("small", {}, unit)] : []));
}

export function setFacts(list, facts) {
  const key = JSON.stringify(facts);
  if (list.dataset.shown === key) return;
  list.dataset.shown = key;
  list.replaceChildren(
    ...facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))),
  );
}

export function setLegend(list, entries) {
  const key = JSON.stringify(entries);
  if (list.dataset.shown === key) return;
  list.dataset.shown = key;
  list.replaceChildren(
    ...entries.map(({ colour, shape, name, value }) => {
      const item = element("li", {}, name, ...(value ? [element("b", {}, value)] : []));
      if (colour) {
        const swatch = element("i", shape ? { class: shape } : {});
        swatch.style.setProperty("--swatch", colour);
        item.prepend(swatch);
      }
      return item;
    }),
  );
}
