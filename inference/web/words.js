"use strict";
// What the page says in its two languages, and how its elements get their words, which follow when it changes.

const TEXT = {
  en: {
    other: "中文", hello: "Show me a picture and ask about it.", how: "Choose, paste or drop one.",
    how_touch: "Choose one, or take a photo.",
    type: "Ask about a picture", offers: "Questions that the model knows", settings: "Settings",
    conversation: "Conversation", question: "Question", answer: "Answer", sample: "Sample picture {n}",
    temperature: "Temperature", temperature_info: "0: always the likeliest word; higher: more surprising",
    top_p: "Top-p", top_p_info: "Draw from the likeliest words that make up this share",
    length: "Longest answer, in tokens", choose: "Choose pictures", photo: "Take a photo", send: "Send (Enter)",
    stop: "Stop (Escape)", clear: "Clear the conversation", retry: "Retry", remove: "Remove this picture",
    picture: "Picture {n}", loading: "Loading the model…", loaded: "{name}, ready after {seconds} s",
    private: "Nothing leaves this device: the model runs in this page.",
    took: "{tokens} tokens · {rate} tokens/s", times: "{first} ms to the first · {ms} ms in all",
    cut: "cut at the longest answer", stopped: "stopped",
    forgotten: "too long to remember whole: the first {forgotten} turns were left out",
    unseen: "No picture was given, and this model was never trained without one",
    look: "Where did it look?", looked: "“{word}”: {share} of its attention on pictures",
    before: "Word before", after: "Next word", close: "Close",
    empty: "Type a question, or add a picture.",
    many: "These are {n} pictures, at most {limit} can go with one question.",
    broken: "This browser cannot read {name} as a picture. Save it as JPEG or PNG, and choose that file.",
    tags: "Write <image> once for each picture, or leave it out.",
    room: "The question is longer than the model reads. Use less text or fewer pictures.",
    run: "The text has so many of one sign in a row that the model would take them for a picture.",
    memory: "This device ran out of memory. Try again with fewer pictures, or clear the conversation.",
    server: "Browsers read the files of this model from a web server only: python -m http.server, in their folder.",
    network: "The model could not be loaded from the network. Please load the page again.",
    failed: "Something went wrong here, sorry. {reason}",
  },
  zh: {
    other: "English", hello: "给我看一张图片，然后提问。", how: "可以选择、粘贴或拖入图片。",
    how_touch: "可以选择图片，也可以拍照。",
    type: "就图片提问", offers: "模型熟悉的问题", settings: "设置", conversation: "对话", question: "问题", answer: "回答",
    sample: "示例图片 {n}",
    temperature: "温度", temperature_info: "0：总是选最可能的词；越高越多变",
    top_p: "Top-p", top_p_info: "只从累计概率达到此值的最可能的词中抽取", length: "回答的最大长度（token）",
    choose: "选择图片", photo: "拍照", send: "发送（Enter）", stop: "停止（Esc）", clear: "清空对话", retry: "重新回答",
    remove: "移除这张图片", picture: "图片 {n}", loading: "正在加载模型…", loaded: "{name}，{seconds} 秒就绪",
    private: "模型就在本页面中运行，任何内容都不会离开这台设备。",
    took: "{tokens} 个 token · {rate} token/秒", times: "首字 {first} ms · 共 {ms} ms", cut: "已达最大长度", stopped: "已停止",
    forgotten: "对话太长，最早的 {forgotten} 轮没有读入",
    unseen: "没有给图片，而这个模型只在有图片的数据上训练过",
    look: "它看了哪里？", looked: "“{word}”：{share} 的注意力在图片上", before: "上一个词", after: "下一个词", close: "关闭",
    empty: "请输入问题，或添加一张图片。",
    many: "共有 {n} 张图片，每个问题最多 {limit} 张。",
    broken: "浏览器无法把 {name} 当作图片读取。请另存为 JPEG 或 PNG，再重新选择。",
    tags: "请为每张图片写一次 <image>，或都不写。",
    room: "问题超出了模型能读的长度。请减少文字或图片。",
    run: "文字中连续的相同符号太多，模型会把它们当作图片。",
    memory: "设备内存不足。请减少图片，或清空对话后再试。",
    server: "浏览器只能通过网页服务器读取这个模型的文件：请在其文件夹中运行 python -m http.server。",
    network: "无法从网络加载模型。请重新打开页面。", failed: "抱歉，这里出错了。{reason}",
  },
};
const PROMPTS = { // as in inference/models.py, for a model that names no questions
  en: ["Describe this picture."], zh: ["描述这张图片。"],
  "en several": ["Compare these pictures."], "zh several": ["比较这些图片。"],
};
const MEANT = { // what the worker says when something goes wrong, and the phrase for it
  memory: /memory|allocat/i, room: /tokens are more|longer than the model/, run: /in a row/, tags: /there are \d+ pict/,
  server: /file:.*cannot be fetched/, network: /cannot be fetched|came in part/,
};

// ---------------------------------------------------------------------------- how elements get them

const by = (id) => document.getElementById(id);
let language = navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
const filled = new WeakMap(); // element → what goes into its phrase
const phrase = (key, values = {}) => TEXT[language][key].replace(/\{(\w+)\}/g, (_, name) => values[name]);

/** Writes a phrase into an element, or as its label; it follows when the language changes. */
function tell(element, key, values, as = "say") {
  filled.set(element, values);
  element.dataset[as] = key;
  const text = key && phrase(key, values);
  if (as === "say") return void (element.textContent = text);
  element.setAttribute("aria-label", text);
  if (element.tagName === "BUTTON") element.title = text;
}

function translate() {
  document.documentElement.lang = {en: "en", zh: "zh-CN"}[language];
  for (const as of ["say", "label"]) {
    for (const each of document.querySelectorAll(`[data-${as}]`)) tell(each, each.dataset[as], filled.get(each), as);
  }
  box.placeholder = phrase("type");
  by("language").textContent = phrase("other");
  const questions = promptsOf(false).map((text) => make("button", {textContent: text, onclick: () => write(text)}));
  by("offers").replaceChildren(...samples, ...questions);
}

/** A new element; say, label: phrases. */
function make(tag, {say, label, values, ...properties} = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  if (say) tell(element, say, values);
  if (label) tell(element, label, values, "label");
  return element;
}

/** Questions that the model knows, in the other language if in this one there is none; the best one first. */
function promptsOf(several) {
  const [key, other] = [language, language === "en" ? "zh" : "en"].map((each) => each + (several ? " several" : ""));
  return config.prompts?.[key] ?? config.prompts?.[other] ?? PROMPTS[key];
}

/** The phrase for what went wrong, and what goes into it. */
function meaning(error) {
  const reason = error.message ?? String(error);
  return [Object.keys(MEANT).find((key) => MEANT[key].test(reason)) ?? "failed", {reason}];
}
