import { copyFileSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { gzipSync } from "node:zlib";
import { defineConfig, type Plugin } from "vite";

const here = (path: string) => fileURLToPath(new URL(path, import.meta.url));
const page = here("../unidiff_sdk/cli/servers/site/page");

// ONNX Runtime for CPUs and for GPUs. Its WebAssembly is compressed to a quarter, because simple servers send files as
// they are. The page decompresses it, so its name must not be one that a server would decompress on the way.
const BUILDS = { wasm: "ort-wasm-simd-threaded", webgpu: "ort-wasm-simd-threaded.asyncify" };

function copyRuntime(): Plugin {
  return {
    name: "copy-runtime",
    apply: "build",
    closeBundle() {
      mkdirSync(`${page}/ort`, { recursive: true });
      for (const [name, build] of Object.entries(BUILDS)) {
        const source = here(`node_modules/onnxruntime-web/dist/${build}`);
        copyFileSync(`${source}.mjs`, `${page}/ort/${name}.mjs`);
        writeFileSync(`${page}/ort/${name}.bin`, gzipSync(readFileSync(`${source}.wasm`), { level: 9 }));
      }
    },
  };
}

/** Without `crossorigin`, a page that is opened as a file still has its style sheet, and can say what is wrong. */
function plainLinks(): Plugin {
  return { name: "plain-links", transformIndexHtml: { order: "post", handler: (html) => html.replaceAll(" crossorigin", "") } };
}

/** The licenses of the packages that the page includes. */
function writeLicenses(): Plugin {
  return {
    name: "write-licenses",
    apply: "build",
    closeBundle() {
      const { dependencies } = JSON.parse(readFileSync(here("package.json"), "utf8")) as { dependencies: Record<string, string> };
      const texts = Object.entries(dependencies).map(([name, version]) => {
        const folder = here(`node_modules/${name}`);
        const { license } = JSON.parse(readFileSync(`${folder}/package.json`, "utf8")) as { license: string };
        const file = readdirSync(folder).find((each) => /^licen[cs]e/iu.test(each));
        return `${name} ${version}: ${license}\n\n${file ? readFileSync(`${folder}/${file}`, "utf8") : ""}`;
      });
      writeFileSync(`${page}/licenses.txt`, texts.join("\n\n"));
    },
  };
}

export default defineConfig({
  base: "./", // the site may be served from any folder
  plugins: [copyRuntime(), plainLinks(), writeLicenses()],
  resolve: { conditions: ["onnxruntime-web-use-extern-wasm", "module", "browser", "production", "import", "default"] },
  build: {
    outDir: page,
    emptyOutDir: true,
    target: "es2022",
    modulePreload: { polyfill: false },
    rollupOptions: {
      input: { page: here("index.html"), sw: here("src/service/sw.ts") },
      output: { entryFileNames: (chunk) => (chunk.name === "sw" ? "sw.js" : "assets/[name]-[hash].js") },
    },
  },
  worker: { format: "es" },
  test: { include: ["test/**/*.test.ts"] },
} as Parameters<typeof defineConfig>[0]);
