"use strict";
(() => {
  const root = document.documentElement;
  const page = JSON.parse(document.getElementById("data").textContent);
  const drawn = new Set();
  const coarse = matchMedia("(pointer: coarse)").matches;
  const colour = name => getComputedStyle(root).getPropertyValue(name).trim();
  let stepRange = null, following = false;

  // --- theme: the system's until the button is pressed
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const setTheme = name => { root.dataset.theme = name; drawn.forEach(draw); };
  dark.addEventListener("change", e => setTheme(e.matches ? "dark" : "light"));
  root.dataset.theme = dark.matches ? "dark" : "light";
  document.getElementById("theme").addEventListener("click", () => setTheme(root.dataset.theme === "dark" ? "light" : "dark"));

  // --- charts
  const themed = trace => {
    const own = colour("--c" + ((trace.meta && trace.meta.colour || 0) % 10));
    const marker = Object.assign({}, trace.marker, { color: own });
    if (trace.type === "bar") return Object.assign({}, trace, { marker });
    return Object.assign({}, trace, { line: Object.assign({ width: 2 }, trace.line, { color: own }), marker });
  };

  const layoutOf = spec => {
    const text = colour("--text"), muted = colour("--muted"), grid = colour("--grid");
    const layout = JSON.parse(JSON.stringify(spec.layout));
    const axes = Object.keys(layout).filter(key => /^[xy]axis/.test(key));
    for (const key of axes) {
      layout[key] = Object.assign({ gridcolor: grid, zerolinecolor: grid, linecolor: grid, automargin: true, exponentformat: "power" }, layout[key]);
    }
    for (const shape of layout.shapes) shape.line = Object.assign({ color: muted }, shape.line);
    for (const note of layout.annotations) note.font = { color: muted, size: 11 };
    if (spec.steps && stepRange) layout.xaxis.range = stepRange.slice();
    return Object.assign({
      margin: { l: 50, r: 10, t: coarse ? 32 : 10, b: 40 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", size: 12, color: text }, hovermode: spec.map ? "closest" : "x",
      hoverlabel: { bgcolor: colour("--panel"), bordercolor: colour("--line"), font: { color: text } },
      legend: { orientation: "h", x: 0, y: coarse ? -.3 : 1, yanchor: coarse ? "top" : "bottom", font: { size: 11 } },
      hoverdistance: spec.map ? 12 : 200, dragmode: coarse ? false : "zoom", uirevision: "keep",
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--muted"), activecolor: colour("--accent") },
    }, layout);
  };

  // no button that sends the chart to anybody
  const config = {
    responsive: true, displaylogo: false, showSendToCloud: false, showEditInChartStudio: false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "sendChartToCloud", "sendDataToCloud"],
  };

  function draw(id) {
    const spec = page.charts[id], place = document.getElementById(id);
    const first = !drawn.has(id);
    drawn.add(id);
    return Plotly.react(place, spec.data.map(themed), layoutOf(spec), config).then(() => {
      if (!first) { if (spec.map) imagesOn(id); return; }
      place.dataset.drawn = "1";
      if (spec.steps) place.on("plotly_relayout", change => follow(id, change));
      if (spec.map) mapEvents(id);
      place.addEventListener("keydown", event => keys(event, place, spec));
    });
  }

  // charts over steps are zoomed together, so that what happens at one time lines up
  function follow(id, change) {
    if (following) return;
    const low = change["xaxis.range[0]"], high = change["xaxis.range[1]"];
    if (low === undefined && !change["xaxis.autorange"]) return;
    stepRange = low === undefined ? null : [low, high];
    following = true;
    const update = stepRange ? { "xaxis.range": stepRange.slice() } : { "xaxis.autorange": true };
    Promise.all([...drawn].filter(other => other !== id && page.charts[other].steps)
      .map(other => Plotly.relayout(other, update))).finally(() => { following = false; });
  }

  // arrows move, + and - zoom, 0 or Home shows all
  function keys(event, place, spec) {
    const axis = (name, low, high) => {
      const a = place._fullLayout[name], [from, to] = a.range, size = to - from;
      return { [`${name}.range[0]`]: from + low * size, [`${name}.range[1]`]: to + high * size };
    };
    const both = (low, high) => Object.assign(axis("xaxis", low, high), spec.map ? axis("yaxis", low, high) : {});
    const moves = {
      ArrowLeft: () => axis("xaxis", -.15, -.15), ArrowRight: () => axis("xaxis", .15, .15),
      "+": () => both(.15, -.15), "=": () => both(.15, -.15), "-": () => both(-.2, .2),
      0: () => ({ "xaxis.autorange": true, "yaxis.autorange": true }),
    };
    moves.Home = moves[0];
    if (spec.map) {
      moves.ArrowUp = () => axis("yaxis", .15, .15);
      moves.ArrowDown = () => axis("yaxis", -.15, -.15);
    }
    if (!moves[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const update = moves[event.key]();
    if ("yaxis.autorange" in update && spec.layout.yaxis.range) {
      delete update["yaxis.autorange"];
      update["yaxis.range"] = spec.layout.yaxis.range.slice();
    }
    Plotly.relayout(place, update);
  }

  // --- maps: a thumbnail on hover, thumbnails in place of points where few are in sight
  const sheets = {};
  const sheet = name => sheets[name] ||= new Promise(done => {
    const image = new Image();
    image.onload = () => done(image);
    image.src = getComputedStyle(document.querySelector("." + name)).backgroundImage.slice(5, -2);
  });

  function thumb(set, index) {
    const mark = document.createElement("span");
    mark.className = "thumb " + set.sheet;
    mark.style.setProperty("--cols", set.columns);
    mark.style.setProperty("--x", index % set.columns);
    mark.style.setProperty("--y", Math.floor(index / set.columns));
    return mark;
  }

  function mapEvents(id) {
    const place = document.getElementById(id), set = page.sets[page.charts[id].map];
    const tip = document.getElementById("tip");
    place.on("plotly_hover", ({ points, event }) => {
      const index = points[0].customdata, label = set.labels ? set.classes[set.labels[index]] : "";
      const words = document.createElement("div");
      words.textContent = set.names[index] + (label ? " · " + label : "");
      tip.replaceChildren(thumb(set, index), words);
      tip.hidden = false;
      const box = tip.getBoundingClientRect();
      tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - box.width - 8)) + "px";
      tip.style.top = Math.max(4, Math.min(event.clientY + 14, innerHeight - box.height - 8)) + "px";
    });
    place.on("plotly_unhover", () => { tip.hidden = true; });
    place.addEventListener("mouseleave", () => { tip.hidden = true; });
    place.on("plotly_relayout", change => { if (!("images" in change)) imagesOn(id); });
    imagesOn(id);
  }

  async function imagesOn(id) {
    const place = document.getElementById(id), spec = page.charts[id], set = page.sets[spec.map];
    const [left, right] = place._fullLayout.xaxis.range, [low, high] = place._fullLayout.yaxis.range;
    const seen = [];
    for (const trace of place.data) {
      if (trace.visible === "legendonly") continue;
      trace.x.forEach((x, i) => {
        const y = trace.y[i];
        if (x >= left && x <= right && y >= low && y <= high) seen.push([x, y, trace.customdata[i]]);
      });
    }
    let images = [];
    if (seen.length <= 80) {
      const from = await sheet(set.sheet), side = set.side, pad = document.createElement("canvas");
      const size = place._fullLayout._size;
      pad.width = pad.height = side;
      images = seen.map(([x, y, index]) => {
        pad.getContext("2d").drawImage(from, index % set.columns * side, Math.floor(index / set.columns) * side, side, side, 0, 0, side, side);
        return { source: pad.toDataURL("image/jpeg", .8), xref: "x", yref: "y", x, y, xanchor: "center", yanchor: "middle",
          sizex: 32 / size.w * (right - left), sizey: 32 / size.h * (high - low), layer: "above" };
      });
    }
    if (images.length || (place.layout.images || []).length) {
      await Plotly.relayout(place, { images });
      place.dataset.images = images.length;
    }
  }

  // --- plotly is packed: unpack, run, draw what is in sight and the rest as it comes near
  async function unpack() {
    const text = atob(document.getElementById("plotly").textContent.trim());
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  }

  async function start() {
    if (typeof DecompressionStream === "undefined") throw new Error("This browser is too old to draw the charts; their tables are below each.");
    await unpack();
    const near = new IntersectionObserver(entries => {
      for (const entry of entries) if (entry.isIntersecting) { near.unobserve(entry.target); draw(entry.target.id); }
    }, { rootMargin: "500px" });
    const places = Object.keys(page.charts).map(id => document.getElementById(id));
    const first = places.filter(place => place.getBoundingClientRect().top < innerHeight);
    await Promise.all(first.map(place => draw(place.id)));
    places.filter(place => !first.includes(place)).forEach(place => near.observe(place));
    addEventListener("beforeprint", () => places.forEach(place => draw(place.id)));
    root.dataset.ready = Math.round(performance.now());
  }

  start().catch(error => { document.getElementById("trouble").textContent = error.message; });
})();
