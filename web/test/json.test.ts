import { describe, expect, it } from "vitest";
import { parseJson, stringifyJson } from "../../unidiff_sdk/serve/static/json.js";
import { cases } from "./cases";

describe("JSON", () => {
  it("keeps every integer that Python writes", () => {
    const texts = cases<string[]>("json");
    expect(texts.some((text) => JSON.stringify(JSON.parse(text)) !== text)).toBe(true); // what JavaScript alone rounds
    for (const text of texts) expect(stringifyJson(parseJson(text))).toBe(text);
  });

  it("has other numbers as numbers", () => {
    expect(parseJson('{"a": 9007199254740993, "b": [7, 0.5, 1e300], "c": "9007199254740993"}')).toEqual({
      a: 9007199254740993n,
      b: [7, 0.5, 1e300],
      c: "9007199254740993",
    });
    expect(parseJson("9007199254740991")).toBe(9007199254740991);
  });

  it("is refused if it is not valid", () => {
    for (const text of ["", "{", "[9007199254740993", "[09007199254740993]"]) expect(() => parseJson(text), text).toThrow(SyntaxError);
  });
});
