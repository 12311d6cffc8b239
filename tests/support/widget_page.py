"""A page that shows one widget without Jupyter, and the contrast of what is drawn in it."""

import json

HOME = "http://widgets.invalid/"
BODY = '<!doctype html><html lang="en"><body><div id="widget"{}></div></body></html>'
MOUNT = """async ([source, css, state]) => {
    const module = (await import(URL.createObjectURL(new Blob([source], {type: "text/javascript"})))).default;
    const handlers = {};
    window.model = {
        get: (name) => state[name],
        set: (name, value) => { state[name] = value; (handlers["change:" + name] || []).forEach((fn) => fn()); },
        on: (name, fn) => (handlers[name] ??= []).push(fn), off: () => {}, save_changes: () => {},
    };
    document.head.insertAdjacentHTML("beforeend", `<style>${css}</style>`);
    await module.render({model: window.model, el: document.getElementById("widget")});
    await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
}"""
# contrast, as WCAG 2 defines it, of each mark with the widget's paper: named colours, swatches as painted, elements
CONTRASTS = """([selector, names]) => {
    const root = document.querySelector(selector), pen = document.createElement("canvas").getContext("2d");
    const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
        .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const read = (colour) => {
        pen.clearRect(0, 0, 1, 1);
        pen.fillStyle = colour;
        pen.fillRect(0, 0, 1, 1);
        return [...pen.getImageData(0, 0, 1, 1).data];
    };
    const ratio = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
    const style = getComputedStyle(root), paper = read(style.backgroundColor), found = {};
    for (const name of names) found[name] = ratio(read(style.getPropertyValue(name)), paper);
    for (const swatch of root.querySelectorAll(".legend canvas")) {
        const data = swatch.getContext("2d").getImageData(0, 0, swatch.width, swatch.height).data;
        let best = 0;
        for (let i = 0; i < data.length; i += 4)
            if (data[i + 3] === 255) best = Math.max(best, ratio(data.slice(i, i + 3), paper));
        found[`swatch ${swatch.parentElement.textContent}`] = best;
    }
    for (const mark of root.querySelectorAll("[data-mark]")) {
        const look = getComputedStyle(mark);
        const colours = [look.backgroundColor, look.fill, look.stroke, look.borderTopColor];
        const seen = colours.filter((c) => c.startsWith("rgb")).map(read).filter((c) => c[3] === 255);
        const solid = seen.map((c) => ratio(c, paper));
        found[mark.dataset.mark] = Math.min(found[mark.dataset.mark] ?? 99, Math.max(0, ...solid));
    }
    found.text = ratio(read(style.color), paper);
    return found;
}"""
PALETTE = ("--line", "--focus", "--resident", "--hit", "--miss", "--prefetched")


def traits(widget) -> dict:
    """What Python sends to the browser, as JSON does it."""
    names = [name for name in widget.traits(sync=True) if not name.startswith("_")]
    return json.loads(json.dumps({n: getattr(widget, n) for n in names if n not in ("layout", "tabbable", "tooltip")}))


def mount(page, widget, inert=False) -> None:
    """Show `widget` in an empty page, `inert` as the site does without a kernel."""
    body = BODY.format(" inert" if inert else "")
    page.route("**/*", lambda route: route.fulfill(body=body, content_type="text/html"))
    page.goto(HOME)
    page.evaluate(MOUNT, [str(widget._esm), str(widget._css), traits(widget)])


def contrasts(page, root, names=PALETTE) -> dict[str, float]:
    """Contrast with the paper of the widget `root`: of `names`, of each swatch, of each element with `data-mark`."""
    return page.evaluate(CONTRASTS, [root, list(names)])


def slide(page, selector, value) -> None:
    """Move a slider as a hand does."""
    page.locator(selector).evaluate("(e, v) => { e.value = v; e.dispatchEvent(new Event('input')); }", value)


def told(page, root) -> dict[str, str]:
    """What the widget's element says of its state."""
    return page.locator(root).evaluate("e => ({...e.dataset})")
