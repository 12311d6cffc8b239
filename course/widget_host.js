// Takes the kernel's place in a static page: holds the saved traits. Put after a widget's module, which names it `widget`.
const handlers = {};
const model = {
  get: (name) => state[name],
  set(name, value) {
    state[name] = value;
    (handlers[`change:${name}`] || []).forEach((fn) => fn());
  },
  on: (name, fn) => (handlers[name] ??= []).push(fn),
  off(name, fn) { handlers[name] = (handlers[name] || []).filter((other) => other !== fn); },
  save_changes() {},
};
widget.render({ model, el: document.getElementById(place) });
