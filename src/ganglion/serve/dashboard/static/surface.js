// A canvas that is as sharp as the screen and is drawn only when something changed.

const FONT = '"Inter", ui-sans-serif, system-ui, sans-serif';
const surfaces = new Set();
let isScheduled = false;

export class Surface {
  #draw;
  #isDirty = true;

  constructor(canvas, draw) {
    this.canvas = canvas;
    this.pen = canvas.getContext("2d");
    this.width = this.height = 0;
    this.#draw = draw;
    this.resizes = new ResizeObserver(() => this.redraw());
    this.resizes.observe(canvas);
    surfaces.add(this);
    this.redraw();
  }

  redraw() {
    this.#isDirty = true;
    if (isScheduled) return;
    isScheduled = true;
    requestAnimationFrame(() => {
      isScheduled = false;
      for (const surface of surfaces) surface.#paint();
    });
  }

  font(size, weight = 500) {
    this.pen.font = `${weight} ${size}px ${FONT}`;
  }

  close() {
    this.resizes.disconnect();
    surfaces.delete(this);
  }

  #paint() {
    if (!this.#isDirty) return;
    this.#isDirty = false;
    const { canvas, pen } = this;
    this.width = canvas.clientWidth;
    this.height = canvas.clientHeight;
    const scale = Math.min(2, devicePixelRatio || 1);
    const [wide, high] = [Math.round(this.width * scale), Math.round(this.height * scale)];
    if (canvas.width !== wide || canvas.height !== high) Object.assign(canvas, { width: wide, height: high });
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, this.width, this.height);
    pen.globalAlpha = 1;
    this.#draw(pen, this.width, this.height);
  }
}

export function redrawAll() {
  for (const surface of surfaces) surface.redraw();
}
