// The dialog that generates images.

import type { GeneratedImage, Info, StepProgress } from "../engine";
import type { Rgb } from "../model/images";
import type { Client } from "../protocol";
import type { LoadProgress } from "../site/files";
import { byId, canvasOf, element, megabytes, pngOf } from "./dom";
import { captionOf } from "./results";
import { state } from "./state";

const MAX_SEED = 2 ** 32;
const NAME_LENGTH = 40;

export class Generating {
  private running: AbortController | null = null;
  private urls: string[] = [];

  constructor(
    private readonly client: Client,
    private readonly generator: NonNullable<Info["generator"]>,
    private readonly onFindSimilar: (pixels: Rgb, url: string) => void,
  ) {
    const sampler = byId<HTMLSelectElement>("sampler");
    sampler.append(...Object.keys(generator.samplers).map((name) => element("option", { value: name }, name)));
    sampler.value = generator.sampler;
    sampler.addEventListener("change", () => this.offerSteps());
    this.offerSteps();
    byId<HTMLInputElement>("guidance").value = String(generator.guidance_scale);
    byId("open-generate").hidden = false;
    byId("open-generate").addEventListener("click", () => this.open());
    byId("prompt-form").addEventListener("submit", (event) => {
      event.preventDefault();
      void this.generate();
    });
    byId("stop").addEventListener("click", () => this.running?.abort());
    const dialog = byId<HTMLDialogElement>("generate");
    dialog.addEventListener("close", () => this.running?.abort());
    dialog.querySelector("[data-close]")!.addEventListener("click", () => dialog.close());
  }

  private open(): void {
    if (state.q) byId<HTMLInputElement>("prompt").value = state.q;
    byId<HTMLDialogElement>("generate").showModal();
  }

  private offerSteps(): void {
    const steps = byId<HTMLSelectElement>("steps");
    const offered = this.generator.samplers[byId<HTMLSelectElement>("sampler").value] ?? [];
    const before = Number(steps.value) || this.generator.steps;
    steps.replaceChildren(...offered.map((count) => element("option", { value: String(count) }, String(count))));
    steps.value = String(offered.includes(before) ? before : offered[0]);
  }

  private async generate(): Promise<void> {
    this.running?.abort();
    const mine = (this.running = new AbortController());
    const value = (id: string) => byId<HTMLInputElement>(id).value;
    const seed = value("seed") === "" ? Math.floor(Math.random() * MAX_SEED) : Number(value("seed"));
    const request = {
      prompt: value("prompt"),
      negative_prompt: "",
      n: Number(value("n")) || 1,
      seed,
      steps: Number(value("steps")),
      sampler: value("sampler"),
      guidance_scale: Number(value("guidance")) || 1,
    };
    const started = performance.now();
    this.clear();
    this.busy(true);
    byId("generate-status").textContent = "Generating…";
    try {
      const images = await this.client.call("generate", [request], { onEvent: (event) => ("received" in event ? this.loading(event) : this.step(event)), signal: mine.signal });
      const cards = await Promise.all(images.map((image) => this.card(image, request.prompt)));
      byId("generated").replaceChildren(...cards);
      byId("generate-status").textContent = `${images.length === 1 ? "1 image" : `${images.length} images, the best match first,`} in ${((performance.now() - started) / 1000).toFixed(1)} s`;
    } catch (error) {
      const { name, message } = error as Error;
      byId("generate-status").textContent = name === "AbortError" ? "Stopped." : message;
    } finally {
      if (this.running === mine) this.busy(false);
    }
  }

  private busy(on: boolean): void {
    byId("stop").hidden = !on;
    const progress = byId<HTMLProgressElement>("progress");
    progress.hidden = !on;
    if (on) progress.value = 0;
  }

  private loading({ received, total }: LoadProgress): void {
    byId<HTMLProgressElement>("progress").value = received / total;
    byId("generate-status").textContent = `Loading the generator: ${megabytes(received)} of ${megabytes(total)} MB`;
  }

  private step({ done, total, preview }: StepProgress): void {
    byId("generate-status").textContent = "Generating…";
    byId<HTMLProgressElement>("progress").value = done / total;
    if (preview) byId("generated").replaceChildren(element("li", { className: "card" }, element("span", { className: "frame" }, canvasOf(preview))));
  }

  private async card({ image, seed, score, nearest }: GeneratedImage, prompt: string): Promise<HTMLLIElement> {
    const url = await pngOf(image);
    this.urls.push(url);
    const find = () => {
      this.urls = this.urls.filter((each) => each !== url); // the search shows it from now on
      byId<HTMLDialogElement>("generate").close();
      this.onFindSimilar(image, url);
    };
    return element(
      "li",
      { className: "card" },
      element("a", { className: "frame", href: url, download: `${prompt.slice(0, NAME_LENGTH)} ${seed}.png` }, element("img", { src: url, alt: prompt })),
      element("p", {}, `Score ${score.toFixed(3)}, seed ${seed}`),
      element("span", { className: "facts" }, `Nearest: ${captionOf(nearest)} (${nearest.score.toFixed(3)})`),
      element("div", { className: "tools" }, element("button", { type: "button", onclick: find }, "Find similar")),
    );
  }

  private clear(): void {
    byId("generated").replaceChildren();
    for (const url of this.urls.splice(0)) URL.revokeObjectURL(url);
  }
}
