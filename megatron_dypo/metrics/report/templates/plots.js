"use strict";
const read = (id) => JSON.parse(document.getElementById(id).textContent);

read("figures").forEach((figure, index) =>
  Plotly.newPlot(`plot-${index}`, figure.data, figure.layout, { responsive: true, displaylogo: false, displayModeBar: false }));
