"use strict";
(function () {
  const options = JSON.parse(document.getElementById("charts").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const held = [];
  const PAPER = 680; // pixels between the margins of a page
  let printing = false;

  // A pass as a bar on its stage's line, and what it is on pointing at it.
  function gantt(params, api) {
    const start = api.coord([api.value(0), api.value(1)]);
    const end = api.coord([api.value(0) + api.value(2), api.value(1)]);
    const height = api.size([0, 1])[1] * 0.8;
    const area = params.coordSys;
    const shape = echarts.graphic.clipRectByRect(
      { x: start[0], y: start[1] - height / 2, width: Math.max(end[0] - start[0], 0.5), height: height },
      { x: area.x, y: area.y, width: area.width, height: area.height }
    );
    return shape && { type: "rect", shape: shape, style: { fill: api.visual("color"), stroke: printing || !dark.matches ? "#ffffff" : "#14181f", lineWidth: end[0] - start[0] > 4 ? 0.5 : 0 } };
  }

  function seconds(value) { return value >= 1 ? value.toPrecision(4) + " s" : (value * 1000).toPrecision(3) + " ms"; }

  function prepared(option) {
    const own = structuredClone(option);
    delete own.units;
    own.backgroundColor = "transparent";
    own.aria = { enabled: true, label: { enabled: false }, decal: { show: false } };
    own.textStyle = { fontFamily: "system-ui, 'Segoe UI', Arial, sans-serif" };
    for (const series of own.series) {
      if (series.type === "gantt") {
        series.type = "custom";
        series.renderItem = gantt;
        series.encode = { x: [0], y: 1 };
        series.itemStyle = { color: series.color };
        own.tooltip.formatter = function (one) {
          const d = one.value;
          return one.seriesName + " of micro-batch " + d[3] + "\nstage " + d[1] + ", at " + seconds(d[0]) + ", takes " + seconds(d[2]);
        };
      } else if (series.data.length && series.data[0] && series.data[0].name !== undefined) {
        own.tooltip.formatter = function (one) {
          return [one.name, one.value[0] + " " + option.units[0], one.value[1] + " " + option.units[1]].join("\n");
        };
      }
    }
    return own;
  }

  // Thousands of bars are quicker as one picture.
  function busy(option) { return option.series.reduce(function (n, one) { return n + one.data.length; }, 0) > 4000; }

  function draw(width) {
    for (const one of held.splice(0)) { one.dispose(); }
    for (const place of document.querySelectorAll("[data-chart]")) {
      const option = options[place.dataset.chart];
      const chart = echarts.init(place, dark.matches && !printing ? "dark" : null, { renderer: busy(option) ? "canvas" : "svg", width: width });
      chart.setOption(prepared(option));
      held.push(chart);
    }
    document.documentElement.dataset.drawn = String(held.length);
  }

  let waiting = 0;
  window.addEventListener("resize", function () {
    clearTimeout(waiting);
    if (printing) { return; }
    waiting = setTimeout(function () { if (!printing) { for (const one of held) { one.resize(); } } }, 60);
  });
  dark.addEventListener("change", function () { draw(); });
  const closed = [];
  window.addEventListener("beforeprint", function () {
    printing = true;
    for (const one of document.querySelectorAll("details:not([open])")) { one.open = true; closed.push(one); }
    draw(PAPER);
  });
  window.addEventListener("afterprint", function () {
    printing = false;
    for (const one of closed.splice(0)) { one.open = false; }
    draw();
  });
  draw();
})();
