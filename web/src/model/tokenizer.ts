// CLIP's tokenizer with truncation and padding, as unidiff_sdk/inference/encoder.py loads it.

import { Tokenizer } from "@huggingface/tokenizers";

const CHARACTERS_PER_TOKEN = 128; // far more than a token stands for

interface TokenizerJson {
  added_tokens?: { id: number; content: string }[];
  model?: { vocab?: Record<string, number> };
}
interface TokenizerConfig {
  pad_token?: string | { content: string };
  eos_token?: string | { content: string };
}

const contentOf = (token: string | { content: string } | undefined) => (typeof token === "object" ? token.content : token);

export class TextTokenizer {
  private readonly tokenizer: Tokenizer;
  private readonly pad: number;

  constructor(
    json: TokenizerJson,
    config: TokenizerConfig,
    readonly maxTokens: number,
  ) {
    const pad = contentOf(config.pad_token) ?? contentOf(config.eos_token);
    const id = pad === undefined ? undefined : (json.added_tokens?.find((each) => each.content === pad)?.id ?? json.model?.vocab?.[pad]);
    if (pad === undefined || id === undefined) throw new Error("the tokenizer has no pad token; export the bundle again");
    // The pad token is a special token also within a text.
    const known = json.added_tokens?.some((each) => each.id === id) ?? false;
    const flags = { single_word: false, lstrip: false, rstrip: false, normalized: false, special: true };
    const added = known ? json.added_tokens : [...(json.added_tokens ?? []), { id, content: pad, ...flags }];
    this.tokenizer = new Tokenizer({ ...json, added_tokens: added }, config);
    this.pad = id;
  }

  /** Token ids with start and end tokens, padded to `maxTokens`; a longer text loses its end. */
  encode(text: string): { ids: BigInt64Array; truncated: boolean } {
    const all = this.tokenizer.encode(cut(text, this.maxTokens)).ids;
    const truncated = all.length > this.maxTokens;
    const kept = truncated ? [...all.slice(0, this.maxTokens - 1), all[all.length - 1]!] : all;
    const ids = new BigInt64Array(this.maxTokens).fill(BigInt(this.pad));
    kept.forEach((id, position) => (ids[position] = BigInt(id)));
    return { ids, truncated };
  }
}

function cut(text: string, maxTokens: number): string {
  const longest = CHARACTERS_PER_TOKEN * maxTokens;
  return text.length <= longest ? text : text.split(/\s+/u).filter(Boolean).join(" ").slice(0, longest);
}
