"use strict";
// The texts of the page in two languages, and the functions that put them into its elements.

const TEXT = {
  en: {
    other: "中文", hello: "Add a picture and ask about it.", how: "Choose, paste or drop one.",
    how_touch: "Choose one, or take a photo.",
    type: "Ask about a picture", offers: "Questions from its training", settings: "Settings",
    conversation: "Conversation", question: "Question", answer: "Answer", sample: "Sample picture {n}",
    temperature: "Temperature", temperature_info: "0: always the most likely word; higher: more varied answers",
    top_p: "Top-p", top_p_info: "Sample from the most likely words that make up this share",
    length: "Maximum length of an answer, in tokens",
    choose: "Choose pictures", photo: "Take a photo", send: "Send (Enter)",
    stop: "Stop (Escape)", clear: "Clear the conversation", retry: "Retry", remove: "Remove this picture",
    picture: "Picture {n}", loading: "Loading the model…", loaded: "{name}, ready after {seconds} s",
    private: "Nothing leaves this device: the model runs in this page.",
    took: "{tokens} tokens · {rate} tokens/s", times: "first token after {first} ms · {ms} ms in total",
    cut: "cut at the maximum length", stopped: "stopped",
    forgotten: "the conversation is too long: its first {forgotten} turns were left out",
    unseen: "There is no picture, and this model was never trained without one",
    look: "Where did it look?", looked: "“{word}”: {share} of its attention on pictures",
    before: "Previous word", after: "Next word", close: "Close",
    empty: "Type a question, or add a picture.",
    many: "You added {n} pictures; the limit is {limit} per question.",
    broken: "This browser cannot read {name} as a picture. Save it as JPEG or PNG, and choose that file.",
    tags: "Write <image> once for each picture, or leave it out.",
    room: "The question is longer than the model reads. Use less text or fewer pictures.",
    run: "The text repeats one character so often that the model would read it as a picture.",
    memory: "This device ran out of memory. Try again with fewer pictures, or clear the conversation.",
    server: "Browsers load the files of this model only from a web server: run python -m http.server in their folder.",
    network: "The model could not be loaded from the network. Please reload the page.",
    failed: "Sorry, something went wrong. {reason}",
  },
  zh: {
    other: "English", hello: "添加一张图片，然后提问。", how: "可以选择、粘贴或拖入图片。",
    how_touch: "可以选择图片，也可以拍照。",
    type: "输入关于图片的问题", offers: "训练时常见的问题", settings: "设置",
    conversation: "对话", question: "问题", answer: "回答", sample: "示例图片 {n}",
    temperature: "温度", temperature_info: "为 0 时总是选概率最高的词；越高，回答越多样",
    top_p: "Top-p", top_p_info: "从概率最高的词开始累加，只在累计概率达到该值的范围内采样",
    length: "回答的最大长度（token 数）",
    choose: "选择图片", photo: "拍照", send: "发送（Enter）", stop: "停止（Esc）", clear: "清空对话", retry: "重新回答",
    remove: "移除这张图片", picture: "图片 {n}", loading: "正在加载模型…", loaded: "{name}，{seconds} 秒就绪",
    private: "模型在本页面内运行，所有内容都留在这台设备上。",
    took: "{tokens} 个 token · {rate} token/秒", times: "首字 {first} ms · 共 {ms} ms", cut: "已达最大长度", stopped: "已停止",
    forgotten: "对话过长，最早的 {forgotten} 轮已略去",
    unseen: "没有图片，而这个模型的训练数据都带图片",
    look: "注意力在哪里？", looked: "“{word}”：{share} 的注意力在图片上", before: "上一个词", after: "下一个词", close: "关闭",
    empty: "请输入问题，或添加一张图片。",
    many: "共 {n} 张图片，每次提问最多 {limit} 张。",
    broken: "浏览器无法读取图片 {name}。请另存为 JPEG 或 PNG 后重新选择。",
    tags: "<image> 的个数要与图片数量一致，也可以都不写。",
    room: "问题过长，超过模型能处理的长度。请减少文字或图片。",
    run: "文字中连续的相同字符太多，会被模型当作图片。",
    memory: "设备内存不足。请减少图片，或清空对话后再试。",
    server: "浏览器只能通过网页服务器加载这个模型的文件，请在文件所在的文件夹中运行 python -m http.server。",
    network: "无法从网络加载模型，请刷新页面。", failed: "抱歉，出错了。{reason}",
  },
};
const PROMPTS = { // as in inference/models.py, for a model that names no questions
  en: ["Describe this picture."], zh: ["描述这张图片。"],
  "en several": ["Compare these pictures."], "zh several": ["比较这些图片。"],
};
const MEANT = { // phrase → the worker's messages for which the page shows it
  memory: /memory|allocat/i, room: /tokens are more|longer than the model/, run: /in a row/, tags: /there are \d+ pict/,
  server: /file:.*cannot be fetched/, network: /cannot be fetched|came in part/,
};

// ---------------------------------------------------------------------------- texts in elements

const by = (id) => document.getElementById(id);
let language = navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
const filled = new WeakMap(); // element → values in its phrase
const phrase = (key, values = {}) => TEXT[language][key].replace(/\{(\w+)\}/g, (_, name) => values[name]);

/** Writes a phrase into an element, or as its label; `translate` updates it when the language changes. */
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

/** Creates an element; say, label: keys of phrases. */
function make(tag, {say, label, values, ...properties} = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  if (say) tell(element, say, values);
  if (label) tell(element, label, values, "label");
  return element;
}

/** Returns questions from the training, the best one first; in the other language if there are none in this one. */
function promptsOf(several) {
  const [key, other] = [language, language === "en" ? "zh" : "en"].map((each) => each + (several ? " several" : ""));
  return config.prompts?.[key] ?? config.prompts?.[other] ?? PROMPTS[key];
}

/** Returns the phrase for an error and its values. */
function meaning(error) {
  const reason = error.message ?? String(error);
  return [Object.keys(MEANT).find((key) => MEANT[key].test(reason)) ?? "failed", {reason}];
}
