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

// JupyterLab takes arrows (headings) and Enter (edit mode) for its own, but from controls with this attribute.
function keepKeys(root) {
  for (const control of root.querySelectorAll("button, input, select")) control.dataset.lmSuppressShortcuts = "true";
}

