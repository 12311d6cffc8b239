// Put before each widget's module by Python: a module without imports cannot share it otherwise.
// JupyterLab, VS Code, Colab and Furo each say their own way what they show; where nothing is said, the system decides.
function isDark(el) {
  const body = document.body.dataset, lab = el.closest("[data-jp-theme-light]");
  const light = (lab || document.body).dataset.jpThemeLight;
  if (light) return light === "false";
  const said = body.vscodeThemeKind || document.documentElement.getAttribute("theme") || body.theme || "auto";
  if (said.includes("dark")) return true;
  if (said.includes("light") || window.google?.colab) return false; // Colab names its theme only where it is dark
  return matchMedia("(prefers-color-scheme: dark)").matches;
}

// calls `fn` whenever another theme may have been chosen; returns what ends that
function onTheme(fn) {
  const system = matchMedia("(prefers-color-scheme: dark)"), watcher = new MutationObserver(fn);
  const attributeFilter = ["data-jp-theme-light", "data-vscode-theme-kind", "data-theme", "theme"];
  for (const place of [document.body, document.documentElement]) watcher.observe(place, { attributes: true, attributeFilter });
  system.addEventListener("change", fn);
  return () => {
    watcher.disconnect();
    system.removeEventListener("change", fn);
  };
}

// whether the reader asked the system for less motion
const isStill = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

// JupyterLab takes arrows (headings) and Enter (edit mode) for its own, but from controls with this attribute.
function keepKeys(root) {
  for (const control of root.querySelectorAll("button, input, select, [tabindex]")) control.dataset.lmSuppressShortcuts = "true";
}

// an element with properties and children; names with a dash are attributes
function make(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.includes("-") || key === "role") made.setAttribute(key, value);
    else if (key === "data") Object.assign(made.dataset, value);
    else made[key] = value;
  }
  made.append(...children);
  return made;
}

// an element of a drawing, with attributes and a text
function svg(name, attributes, text) {
  const space = make("div", { innerHTML: "<svg></svg>" }).firstChild.namespaceURI, made = document.createElementNS(space, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// the root of a widget in `el`, with its theme kept up to date; `redress` is called after a change of theme
function plant(el, name, frame, redress = () => {}) {
  const root = make("div", { className: `mixoff-${name} mixoff`, innerHTML: frame });
  el.replaceChildren(root);
  keepKeys(root);
  const dress = (once) => {
    root.classList.toggle("mixoff-dark", isDark(el));
    const width = root.clientWidth;
    redress();
    // while JupyterLab loads a theme's style, widths are not yet what the reader will see
    if (once !== true) requestAnimationFrame(() => { if (root.clientWidth !== width) dress(true); });
  };
  requestAnimationFrame(dress); // now that it stands in the page, whose theme it takes
  return { root, $: (selector) => root.querySelector(selector), forget: onTheme(dress), dress };
}
