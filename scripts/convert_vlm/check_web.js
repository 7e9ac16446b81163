"use strict";
// Asks a page made by `--to web` without a browser: node check_web.js FOLDER QUESTIONS [--plain]
// Or measures its speed: node check_web.js FOLDER --speed [--plain]
//
// QUESTIONS: JSON, [{turns, pictures: [{rgba: base64, width, height}], max_new_tokens}]. Writes JSON: for each question
// ids, pixels and features of the pictures, logits after the prompt (base64 of bytes and floats), answer ids, text.
// --plain: without the kernel. --speed: runs a picture of 640 x 480, its prompt and 64 tokens six times; writes memory
// and CPU seconds, which other programs do not lengthen, of the first run and the median of the others.

const fs = require("fs"), path = require("path"), vm = require("vm");
const [folder, questions, plain] = process.argv.slice(2);
const cpu = () => (process.cpuUsage().user + process.cpuUsage().system) / 1e6, started = cpu();
const page = fs.readFileSync(path.join(folder, "chat.html"), "utf8");
const scripts = (mark) => page.matchAll(new RegExp(`<script[^>]* ${mark}[^>]*>([^]*?)</script>`, "g"));
const read = (id) => scripts(`id="${id}"`).next().value[1];
const bytesOf = (text) => Uint8Array.from(Buffer.from(text, "base64"));
const base64 = (array) => Buffer.from(array.buffer, array.byteOffset, array.byteLength).toString("base64");

vm.runInThisContext(read("engine"), "engine"); // classes and functions are then as in the page's worker
const config = JSON.parse(read("config")), tokenizer = new Tokenizer(JSON.parse(read("tokenizer")));
const files = config.files?.map(({name}) => fs.readFileSync(path.join(folder, name)));
const weights = Buffer.concat(files ?? Array.from(scripts('class="weights"'), ([, text]) => bytesOf(text)));

function peakMemory() { // in MB; on Linux maxRSS begins with the memory of the program that started this one
  const peak = process.platform === "linux" && fs.readFileSync("/proc/self/status", "utf8").match(/VmHWM:\s*(\d+)/);
  return peak ? peak[1] * 1.024e-3 : process.resourceUsage().maxRSS / 1000; // not every sandbox reports it
}

function speed(model) {
  const round = (number) => Number(number.toPrecision(3)), load_s = round(cpu() - started), times = [];
  const noise = Uint8ClampedArray.from({length: 4 * 640 * 480}, (_, i) => (i * i * 31 + i) % 251);
  const {ids} = model.encodeChat([{role: "user", content: model.userTurn("Describe this picture.", 1)}], tokenizer);
  for (let n = 0; n < 6; n++) {
    const begun = cpu(), features = [model.see(resize(linesIn(noise, 640), 640, 480, config.processor))], saw = cpu();
    const cache = model.newCache();
    let logits = model.forward(ids, features, cache);
    const read = cpu();
    for (let i = 0; i < 64; i++) logits = model.forward([model.sample(logits, {}, null)], [], cache); // also after the end of an answer
    times.push({picture_s: saw - begun, prefill_s: read - saw, tokens_per_s: 64 / (cpu() - read)});
  }
  const [first, ...others] = times, median = {};
  for (const key in first) median[key] = round(others.map((each) => each[key]).sort((a, b) => a - b)[2]);
  const [first_s, memory_mb] = [first.picture_s + first.prefill_s, peakMemory()].map(round);
  return {load_s, first_s, ...median, prompt: ids.length, memory_mb};
}

(async () => {
  const began = performance.now();
  const kernel = plain ? null : bytesOf(read("kernel")), memory = memoryFor(weights.length, kernel);
  new Uint8Array(memory.buffer).set(weights);
  const model = new MiniMindV(config, new Weights(memory, kernel));
  if (questions === "--speed") return process.stdout.write(`${JSON.stringify(speed(model))}\n`);
  const loaded = (performance.now() - began) / 1000, answers = [];
  for (const {turns, pictures, max_new_tokens} of JSON.parse(fs.readFileSync(questions, "utf8"))) {
    const {ids} = model.encodeChat(turns, tokenizer), begun = performance.now();
    const seen = ({rgba, width, height}) => resize(linesIn(bytesOf(rgba), width), width, height, config.processor);
    const pixels = pictures.map(seen);
    const features = pixels.map((each) => model.see(each)), saw = performance.now();
    const logits = model.forward(ids, features, model.newCache()), read = performance.now();
    const answer = [...model.generate(ids, features, model.newCache(), {max_new_tokens, temperature: 0})];
    const text = tokenizer.decode(answer), end = performance.now();
    const seconds = {see: (saw - begun) / 1000, prefill: (read - saw) / 1000, answer: (end - read) / 1000};
    const arrays = {pixels: pixels.map(base64), features: features.map(base64), logits: base64(logits)};
    answers.push({ids, ...arrays, answer, text, seconds});
  }
  process.stdout.write(JSON.stringify({loaded, answers}));
})();
