"use strict";
(() => {
  const stage = document.querySelector("[data-frames]");
  if (stage) {
    const count = Number(stage.dataset.frames), rest = 4;
    const button = stage.querySelector("button"), slider = stage.querySelector("input");
    const counter = stage.querySelector("output");
    let tick = 0, playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
    const show = () => {
      const frame = Math.min(tick, count - 1); // the last frame rests before the loop begins again
      stage.style.setProperty("--f", frame);
      slider.value = frame;
      counter.textContent = `frame ${frame + 1} of ${count}`;
      document.body.dataset.frame = frame;
    };
    const name = () => {
      button.textContent = playing ? "Pause" : "Play";
    };
    button.addEventListener("click", () => {
      playing = !playing;
      name();
    });
    slider.addEventListener("input", () => {
      playing = false;
      tick = Number(slider.value);
      name();
      show();
    });
    setInterval(() => {
      if (!playing) return;
      tick = (tick + 1) % (count + rest);
      show();
    }, 125);
    name();
    show();
  }
  document.body.dataset.ready = "yes";
})();
