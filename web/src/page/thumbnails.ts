// Thumbnails come packed in shards. The last ones are kept in memory, and images hold only what they show.

import type { ThumbnailPosition } from "../site/documents";
import type { SiteFiles } from "../site/files";
import { element } from "./dom";

const KEPT_SHARDS = 8; // of 1 MiB each

export class Thumbnails {
  private readonly shards = new Map<number, Promise<Uint8Array<ArrayBuffer>>>();

  constructor(private readonly files: SiteFiles) {}

  /** An image element, which stays empty if the position is null. */
  image(position: ThumbnailPosition | null | Promise<ThumbnailPosition | null>, alt: string): HTMLImageElement {
    const image = element("img", { alt, decoding: "async", width: 128, height: 128 });
    void this.show(image, position);
    return image;
  }

  async content([shard, start, bytes]: ThumbnailPosition): Promise<Uint8Array<ArrayBuffer>> {
    return (await this.shard(shard)).subarray(start, start + bytes);
  }

  private async show(image: HTMLImageElement, position: ThumbnailPosition | null | Promise<ThumbnailPosition | null>): Promise<void> {
    try {
      const found = await position;
      if (!found) return;
      const content = await this.content(found);
      const url = URL.createObjectURL(new Blob([content], { type: "image/webp" }));
      for (const event of ["load", "error"]) image.addEventListener(event, () => URL.revokeObjectURL(url), { once: true });
      image.src = url;
    } catch (error) {
      image.title = error instanceof Error ? error.message : String(error);
    }
  }

  private shard(number: number): Promise<Uint8Array<ArrayBuffer>> {
    const content = this.shards.get(number) ?? this.files.bytes(`data/thumbnails/${String(number).padStart(3, "0")}.bin`);
    this.shards.delete(number);
    this.shards.set(number, content); // the last one used is the last one dropped
    content.catch(() => this.shards.delete(number));
    if (this.shards.size > KEPT_SHARDS) this.shards.delete(this.shards.keys().next().value!);
    return content;
  }
}
